"""Regular expressions of strangers over module names, matched within a budget of steps.

``re`` tries one way after another, and a short pattern can have more ways than there is time. Here
a pattern is an automaton that follows all ways at once and remembers where they led: a character of
a name costs one step if they were there before, else about one for each state.

Understood are characters and classes of them, groups, alternatives, repetitions, ``^`` and ``$``;
what else ``re`` knows (backreferences, looking around, flags) is refused.

Source: Thompson 1968, doi:10.1145/363347.363387.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from edge_lora.errors import AdapterFileError

MAX_PATTERN = 256
MAX_PATTERNS = 1 << 16
MAX_REGEXES = 256
_MAX_STATES = 2000
_MAX_DEPTH = 20
_MAX_STEPS = 20_000_000
_NEW_STEP = 10  # what a step to where no name led before counts, in time and memory
_AT_END = ""  # where a name's next character would be
_ANCHOR = -1
_REPEAT = re.compile(r"(?:[*+?]|\{(?:(\d+)(,?)(\d*)|,(\d*))\})\??")
_TOKEN = re.compile(
    rf"""\((?:\?:|\?P<\w+>|(?!\?)) | [)|^$] | {_REPEAT.pattern}
    | \[\^?(?:\\[dDwWsS]|\\\W|-(?!-)|\|(?!\|)|[^\]\\\[&~|-])+\]
    | \\[dDwWsS] | \\[^\w\s] | [^\\(\[]""",
    re.VERBOSE,
)
_PLAIN = re.compile(r"\^?(?:[\w-]|\\[^\w\s]|\.)*")

Node = Callable[["Pattern", int], int]
"""Adds a part of a pattern after a state and returns the state behind it."""


class Budget:
    """How many steps all patterns of a file may take together."""

    def __init__(self, steps: int = _MAX_STEPS) -> None:
        """Allow ``steps``."""
        self._left = steps

    def take(self, steps: int) -> None:
        """Use up steps; raises AdapterFileError if they are not there."""
        self._left -= steps
        if self._left < 0:
            raise AdapterFileError("config: its patterns are too costly to match with its names")


class Pattern:
    """One regular expression, compiled."""

    def __init__(self, pattern: str, budget: Budget, wrapped: str = "{}") -> None:
        """Compile ``pattern``, put into ``wrapped``.

        Raises:
            AdapterFileError: If it is no regular expression, or none that is understood.
        """
        self._budget = budget
        self._edges: list[list[tuple[str, int]]] = [[]]  # label: a token, "" needs no character
        self._classes: dict[str, re.Pattern[str]] = {}
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        try:
            if len(pattern) > MAX_PATTERN:
                raise _PatternError(f"over {MAX_PATTERN} characters")
            _Parser(pattern).parse()  # before the wrapping could close what it leaves open
            self._end = _Parser(wrapped.format(pattern)).parse()(self, 0)
        except (_PatternError, re.error) as error:
            raise AdapterFileError(f"config: pattern {pattern!r:.60}: {error}") from error
        self._start = self._closure({0}, "", "^")

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of ``name`` matches; raises AdapterFileError if the budget is spent."""
        self._budget.take(len(name) + 1)
        states = self._start
        for character in (*name, _AT_END):
            known = self._known.get((states, character))
            states = self._step(states, character) if known is None else known
            if not states:
                return False
        return self._end in states

    def state(self) -> int:
        """Return a new state."""
        if len(self._edges) >= _MAX_STATES:
            raise _PatternError(f"too large, over {_MAX_STATES} states")
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, start: int, end: int, label: str = "") -> None:
        """Lead from a state to another: freely, at an anchor, or by a character of a class."""
        self._edges[start].append((label, end))
        if label not in ("", "^", "$") and label not in self._classes:
            self._classes[label] = re.compile(label)

    def _step(self, states: frozenset[int], character: str) -> frozenset[int]:
        if character == _AT_END:
            found = self._closure(states, "", "$")
        else:
            fitting = {label for label, one in self._classes.items() if one.fullmatch(character)}
            edges = [edge for state in states for edge in self._edges[state]]
            found = self._closure({end for label, end in edges if label in fitting}, "")
            self._budget.take(_NEW_STEP * (len(edges) + len(self._classes)))
        self._known[states, character] = found
        return found

    def _closure(self, states: Iterable[int], *free: str) -> frozenset[int]:
        """Return what can be reached from ``states`` by edges of the labels ``free``."""
        found = set(states)
        new = list(found)
        while new:
            edges = self._edges[new.pop()]
            self._budget.take(_NEW_STEP * (len(edges) + 1))
            for label, end in edges:
                if label in free and end not in found:
                    found.add(end)
                    new.append(end)
        return frozenset(found)


class _PatternError(Exception):
    """Why a pattern is refused."""


class _Parser:
    """Recursive descent; a part of the pattern becomes what adds it to an automaton."""

    def __init__(self, pattern: str) -> None:
        self._tokens: list[str] = []
        position = 0
        while position < len(pattern):
            token = _TOKEN.match(pattern, position)
            if token is None:
                raise _PatternError(f"{pattern[position : position + 8]!r} is not understood here")
            self._tokens.append(token[0])
            position = token.end()
        self._tokens.reverse()

    def parse(self) -> Node:
        node = self._alternatives(0)
        if self._tokens:
            raise _PatternError("unbalanced parenthesis")
        return node

    def _next_is(self, *tokens: str) -> bool:
        return bool(self._tokens) and self._tokens[-1] in tokens

    def _alternatives(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise _PatternError(f"groups nest deeper than {_MAX_DEPTH}")
        branches = [self._sequence(depth)]
        while self._next_is("|"):
            self._tokens.pop()
            branches.append(self._sequence(depth))
        return lambda pattern, start: _either(pattern, start, branches)

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while self._tokens and not self._next_is("|", ")"):
            token = self._tokens.pop()
            if _REPEAT.fullmatch(token):
                raise _PatternError(f"nothing to repeat before {token!r}")
            part = self._group(depth) if token[0] == "(" else _single(token)
            found = _REPEAT.fullmatch(self._tokens[-1]) if self._tokens else None
            if found and token not in "^$":
                self._tokens.pop()
                part = _repeated(part, *_bounds(found))
            parts.append(part)
        return lambda pattern, start: _sequence(pattern, start, parts)

    def _group(self, depth: int) -> Node:
        node = self._alternatives(depth + 1)
        if not self._next_is(")"):
            raise _PatternError("missing )")
        self._tokens.pop()
        return node


def _single(token: str) -> Node:
    def build(pattern: Pattern, start: int) -> int:
        end = pattern.state()
        pattern.edge(start, end, token)
        return end

    return build


def _sequence(pattern: Pattern, start: int, parts: list[Node]) -> int:
    for part in parts:
        start = part(pattern, start)
    return start


def _either(pattern: Pattern, start: int, branches: list[Node]) -> int:
    end = pattern.state()
    for branch in branches:
        pattern.edge(branch(pattern, start), end)
    return end


def _bounds(found: re.Match[str]) -> tuple[int, int | None]:
    """Return how often at least and at most (None: any number)."""
    simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[0][0])
    if simple:
        return simple
    least = int(found[1] or 0)
    most = found[3] or found[4] if found[2] or found[1] is None else found[1]
    if most and int(most) < least:
        raise _PatternError(f"{found[0]} asks for at least {least} and at most {most}")
    return least, int(most) if most else None


def _repeated(part: Node, least: int, most: int | None) -> Node:
    def build(pattern: Pattern, start: int) -> int:
        for _ in range(least):
            start = _joined(pattern, part(pattern, start))
        if most is None:
            start = _joined(pattern, start)
            pattern.edge(part(pattern, start), start)
            return _joined(pattern, start)
        for _ in range(most - least):
            end = _joined(pattern, part(pattern, start))
            pattern.edge(start, end)
            start = end
        return start

    return build


def _joined(pattern: Pattern, start: int) -> int:
    """Return a new state that ``start`` leads to; so every repetition counts as a state."""
    end = pattern.state()
    pattern.edge(start, end)
    return end


def ends_of(module: str) -> Iterator[str]:
    """Yield a module's name, then without its first part, and so on: as PEFT matches names."""
    yield module
    for dot in re.finditer(r"\.", module):
        yield module[dot.end() :]


class PatternTable:
    """Patterns with values; the first one that matches the end of a module's name counts.

    Patterns that are but names, of which there may be one for each module, are looked up. In them
    a dot is any character, so that names are grouped by where their dots are.
    """

    def __init__(self, patterns: Mapping[str, object], what: str, budget: Budget) -> None:
        """Compile ``patterns``; raises AdapterFileError if one is refused, or they are too many."""
        if len(patterns) > MAX_PATTERNS:
            raise AdapterFileError(f"config: {what!r} has over {MAX_PATTERNS} patterns")
        self._values = list(patterns.values())
        self._budget = budget
        self._plain: dict[tuple[tuple[int, ...], str], int] = {}  # of any character, text: number
        self._anys: dict[int, set[tuple[int, ...]]] = defaultdict(set)  # by length
        self._regexes: list[tuple[int, Pattern]] = []
        others = {n: p for n, p in enumerate(patterns) if not self._is_added(n, p)}
        if len(others) > MAX_REGEXES:
            raise AdapterFileError(
                f"config: {what!r} has over {MAX_REGEXES} patterns that are more than a name"
            )
        for number, pattern in others.items():
            self._regexes.append((number, Pattern(pattern, budget, r"(.*\.)?({})$")))

    def get(self, module: str, default: object) -> object:
        """Return the value of the first pattern that matches."""
        found = (self._plain.get(key) for key in self._keys(module))
        first = min((number for number in found if number is not None), default=len(self._values))
        for number, regex in self._regexes:
            if number < first and regex.fullmatch(module):
                first = number
                break
        return self._values[first] if first < len(self._values) else default

    def _is_added(self, number: int, pattern: str) -> bool:
        """Add a pattern that is but a name; return False if it is more."""
        if len(pattern) > MAX_PATTERN or _PLAIN.fullmatch(pattern) is None:
            return False
        characters = re.findall(r"\\?.", pattern.removeprefix("^"))
        anys = tuple(n for n, character in enumerate(characters) if character == ".")
        if pattern.startswith("^"):
            anys = (_ANCHOR, *anys)
        self._anys[len(characters)].add(anys)
        self._plain.setdefault((anys, "".join(c[-1] for c in characters)), number)
        return True

    def _keys(self, module: str) -> Iterator[tuple[tuple[int, ...], str]]:
        for end in ends_of(module):
            for anys in self._anys.get(len(end), ()):
                self._budget.take(len(end) + 1)
                characters = list(end)
                for index in anys:
                    if index != _ANCHOR:
                        characters[index] = "."
                if end is module or _ANCHOR not in anys:
                    yield anys, "".join(characters)
