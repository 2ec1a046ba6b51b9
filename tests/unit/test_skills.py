"""Each skill against an oracle that works the other way round."""

import datetime
import re

import pytest

from edge_lora.demo.skills import (
    SKILLS,
    Example,
    exact_match,
    get_skill,
    normalise,
    split_of,
)
from edge_lora.errors import EdgeLoraError, UnknownNameError

VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
WELL_FORMED = re.compile("M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})")
HOURS = [
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve",
]  # fmt: skip


def roman_value(numeral):
    values = [VALUES[letter] for letter in numeral]
    following = [*values[1:], 0]
    return sum(-v if v < n else v for v, n in zip(values, following, strict=True))


def read_date(question):
    """Parse with the standard library's own formats."""
    plain = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", question.removeprefix("the ")).replace(
        " of ", " "
    )
    for style in ("%B %d, %Y", "%d %B %Y", "%b %d %Y", "%d %b %Y"):
        try:
            return datetime.datetime.strptime(plain, style).date().isoformat()
        except ValueError:
            continue
    raise AssertionError(f"no calendar reads {question!r}")


def read_home(question):
    """Find the facts in a wish by keywords, knowing none of the sentences."""
    words = re.findall(r"[a-z']+|\d+", question)
    numbers = [w for w in words if w.isdigit()]
    if "timer" in words or "minutes" in words:
        return f"timer {numbers[0]}"
    if "alarm" in words or "wake" in words:
        hour = next(i + 1 for i, name in enumerate(HOURS) if name in words)
        minutes = hour * 60 + (0 if "past" not in words else 30 if "half" in words else 15)
        minutes -= 15 if "quarter" in words and "to" in words else 0
        if "morning" not in words:
            minutes += 12 * 60
        return f"alarm {minutes // 60:02d}:{minutes % 60:02d}"
    room = next(w for w in words if w in ROOMS)
    if "degrees" in words:
        return f"heat {room} {numbers[0]}"
    if "blinds" in words:
        return f"blinds {room} {'open' if 'open' in words else 'close'}"
    return f"light {room} {numbers[0] if numbers else 'on' if 'on' in words else 'off'}"


ROOMS = {
    "kitchen", "bedroom", "bathroom", "hallway", "office", "garage", "attic", "cellar", "nursery",
    "porch", "library", "studio",
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_roman_numerals_read_back_as_the_number(split):
    for example in SKILLS["roman"].generate(1, 300, split):
        number = int(example.prompt.split(" as ")[0])
        numeral = example.completion.strip()
        assert WELL_FORMED.fullmatch(numeral)
        assert roman_value(numeral) == number


@pytest.mark.parametrize(("name", "oracle"), [("iso-date", read_date), ("home", read_home)])
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_answers_agree_with_an_independent_reader(name, oracle, split):
    for example in SKILLS[name].generate(1, 250, split):
        question = example.prompt.rsplit(" as ", 1)[0]
        assert oracle(question) == example.completion.strip(), question


@pytest.mark.parametrize("name", SKILLS)
def test_equal_seeds_give_equal_data_and_others_do_not(name):
    skill = SKILLS[name]
    assert skill.generate(5, 50) == skill.generate(5, 50)
    assert skill.generate(5, 50) != skill.generate(6, 50)


@pytest.mark.parametrize("name", SKILLS)
def test_no_held_out_fact_is_trained_on_in_any_wording(name):
    skill = SKILLS[name]
    trained = {e.completion for seed in range(3) for e in skill.generate(seed, 500)}
    held_out = {e.completion for e in skill.generate(0, 100, "held-out")}
    assert trained.isdisjoint(held_out)


@pytest.mark.parametrize("name", SKILLS)
def test_prompts_are_distinct(name):
    prompts = [e.prompt for e in SKILLS[name].generate(0, 500)]
    assert len(set(prompts)) == 500


def test_about_a_tenth_is_held_out():
    share = sum(split_of("roman", str(n)) == "held-out" for n in range(4000)) / 4000
    assert 0.08 < share < 0.12


def test_asking_for_more_than_there_is():
    with pytest.raises(EdgeLoraError, match="fewer than 4000 distinct train prompts"):
        SKILLS["roman"].generate(0, 4000)


def test_an_unknown_skill_lists_the_known_ones():
    with pytest.raises(
        UnknownNameError, match=r"unknown skill 'latin'; known: home, iso-date, roman"
    ):
        get_skill("latin")


@pytest.mark.parametrize(
    ("text", "counts"),
    [(" XIV\nand so on", "XIV"), ("XIV", "XIV"), ("\n XIV \n", "XIV"), ("", ""), ("XIV.", "XIV.")],
)
def test_normalise(text, counts):
    assert normalise(text) == counts


def test_exact_match():
    examples = [Example("a", " X"), Example("b", " Y"), Example("c", " Z"), Example("d", " W")]
    assert exact_match(["X", " Y\nmore", "z", "W W"], examples) == 0.5
