"""Three skills that a small language model lacks, with data made here from a seed.

=========  =============================================  ======================
skill      prompt                                         completion
=========  =============================================  ======================
roman      ``1987 as a Roman numeral:``                   `` MCMLXXXVII``
iso-date   ``the 5th of March 2021 as an ISO date:``      `` 2021-03-05``
home       ``dim the attic lights to 30 percent as a      `` light attic 30``
           home command:``
=========  =============================================  ======================

A skill draws a *fact* (a number, a date, a command) and one of several ways to say it. The hash of
the fact decides whether it is for training or held out, so that a held-out fact is never trained
on in any wording. Prompts are a few tokens long: on a CPU each token costs a pass over the weights.
"""

from __future__ import annotations

import calendar
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edge_lora.errors import EdgeLoraError, UnknownNameError

Split = Literal["train", "held-out"]
HELD_OUT_SHARE = 0.1


class Example(NamedTuple):
    """One prompt and the text that must follow it, leading space included."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Skill:
    """One skill.

    Attributes:
        name: Short name, also of its adapter.
        description: What it does, one line.
        form: How the prompt names the wanted answer.
        draw: Random generator -> (question, answer); the answer identifies the fact.
    """

    name: str
    description: str
    form: str
    draw: Callable[[random.Random], tuple[str, str]]

    def prompt(self, question: str) -> str:
        """Return the prompt that asks for ``question`` in this skill's form.

        >>> SKILLS["roman"].prompt("1987")
        '1987 as a Roman numeral:'
        """
        return f"{question} as {self.form}:"

    def generate(self, seed: int, count: int, split: Split = "train") -> list[Example]:
        """Return ``count`` examples with distinct prompts; equal arguments give equal lists.

        Raises:
            EdgeLoraError: If the skill does not have that many distinct prompts.
        """
        rng = random.Random(f"{self.name}/{seed}/{split}")
        examples: dict[str, Example] = {}
        for _ in range(1000 + 200 * count):
            if len(examples) >= count:
                return list(examples.values())
            question, answer = self.draw(rng)
            if split_of(self.name, answer) == split:
                prompt = self.prompt(question)
                examples[prompt] = Example(prompt, f" {answer}")
        raise EdgeLoraError(
            f"skill {self.name!r} has fewer than {count} distinct {split} prompts; ask for fewer"
        )


def split_of(skill: str, answer: str) -> Split:
    """Return the split that the fact ``answer`` belongs to, by its hash alone."""
    digest = hashlib.sha256(f"{skill}:{answer}".encode()).digest()
    return "held-out" if digest[0] < 256 * HELD_OUT_SHARE else "train"


def normalise(text: str) -> str:
    """Return what counts of a generated text: its first line, without spaces around it."""
    return text.strip().split("\n", 1)[0].strip()


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Return the share of ``answers`` that equal their example's completion, both normalised."""
    pairs = list(zip(answers, examples, strict=True))
    return sum(normalise(a) == normalise(e.completion) for a, e in pairs) / max(len(pairs), 1)


def get_skill(name: str) -> Skill:
    """Return a skill by name, or raise UnknownNameError that lists them all."""
    if name not in SKILLS:
        raise UnknownNameError(f"unknown skill {name!r}; known: {', '.join(sorted(SKILLS))}")
    return SKILLS[name]


# roman

_NUMERALS = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def to_roman(number: int) -> str:
    """Return the Roman numeral of 1 … 3999."""
    parts = []
    for value, numeral in _NUMERALS:
        count, number = divmod(number, value)
        parts.append(numeral * count)
    return "".join(parts)


def _draw_roman(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(1, 3999)
    return str(number), to_roman(number)


# iso-date


def _ordinal(day: int) -> str:
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def _draw_date(rng: random.Random) -> tuple[str, str]:
    year, month = rng.randint(1900, 2099), rng.randint(1, 12)
    day = rng.randint(1, calendar.monthrange(year, month)[1])
    name = _MONTHS[month - 1]
    style = rng.choice(_DATE_STYLES)
    question = style.format(day=day, ordinal=_ordinal(day), month=name, short=name[:3], year=year)
    return question, f"{year:04d}-{month:02d}-{day:02d}"


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_DATE_STYLES = (
    "{month} {day}, {year}",
    "{month} {ordinal}, {year}",
    "{day} {month} {year}",
    "the {ordinal} of {month} {year}",
    "{short} {day} {year}",
    "{day} {short} {year}",
)


# home

_ROOMS = (
    "kitchen", "bedroom", "bathroom", "hallway", "office", "garage", "attic", "cellar", "nursery",
    "porch", "library", "studio",
)  # fmt: skip
_HOURS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve",
)  # fmt: skip


def _draw_home(rng: random.Random) -> tuple[str, str]:
    return rng.choice((_light, _dim, _heat, _blinds, _timer, _alarm))(rng)


def _light(rng: random.Random) -> tuple[str, str]:
    room, state = rng.choice(_ROOMS), rng.choice(("on", "off"))
    style = rng.choice(
        ("turn {s} the {r} lights", "switch the lights in the {r} {s}", "{r} lights {s} please")
    )
    return style.format(r=room, s=state), f"light {room} {state}"


def _dim(rng: random.Random) -> tuple[str, str]:
    room, percent = rng.choice(_ROOMS), rng.randint(1, 99)
    style = rng.choice(("dim the {r} lights to {n} percent", "set the lights in the {r} to {n}%"))
    return style.format(r=room, n=percent), f"light {room} {percent}"


def _heat(rng: random.Random) -> tuple[str, str]:
    room, degrees = rng.choice(_ROOMS), rng.randint(12, 28)
    style = rng.choice(("heat the {r} to {n} degrees", "make it {n} degrees in the {r}"))
    return style.format(r=room, n=degrees), f"heat {room} {degrees}"


def _blinds(rng: random.Random) -> tuple[str, str]:
    room, state = rng.choice(_ROOMS), rng.choice(("open", "close"))
    style = rng.choice(("{s} the {r} blinds", "please {s} the blinds in the {r}"))
    return style.format(r=room, s=state), f"blinds {room} {state}"


def _timer(rng: random.Random) -> tuple[str, str]:
    minutes = rng.randint(2, 90)
    style = rng.choice(("set a timer for {n} minutes", "tell me when {n} minutes are over"))
    return style.format(n=minutes), f"timer {minutes}"


def _alarm(rng: random.Random) -> tuple[str, str]:
    hour, (minute, words) = rng.randrange(1, 12), rng.choice(_QUARTERS)
    morning = rng.random() < 0.5
    named = _HOURS[(hour - (minute < 45)) % 12]  # "quarter to" names the next hour
    part = "morning" if morning else "afternoon" if hour < 6 else "evening"
    style = rng.choice(("wake me at {t} in the {p}", "set an alarm for {t} in the {p}"))
    clock = hour if morning else hour + 12
    return style.format(t=words.format(named), p=part), f"alarm {clock:02d}:{minute:02d}"


_QUARTERS = (
    (0, "{} o'clock"),
    (15, "quarter past {}"),
    (30, "half past {}"),
    (45, "quarter to {}"),
)


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("roman", "integers to Roman numerals", "a Roman numeral", _draw_roman),
        Skill("iso-date", "English dates to ISO 8601", "an ISO date", _draw_date),
        Skill("home", "spoken wishes to smart-home commands", "a home command", _draw_home),
    )
}
