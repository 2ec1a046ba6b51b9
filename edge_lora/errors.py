"""Every error that a user can meet, as one small tree.

A message says what failed and on what, the two facts that disagree, and what to do next.
Inner code collects the facts; the public border raises once with all of them.
"""

import difflib
from collections.abc import Sequence


class EdgeLoraError(Exception):
    """Base of every error raised on purpose by this package."""


class ShapeError(EdgeLoraError, ValueError):
    """Arrays of a form do not fit together or do not fit their slot."""


class UnsupportedError(EdgeLoraError):
    """The request is well formed, but this engine, form or build cannot do it."""


class AdapterFileError(EdgeLoraError):
    """An adapter file is damaged, malicious or of an unknown version."""


class AdapterMismatchError(EdgeLoraError):
    """A sound adapter does not fit this base."""


class NoEffectError(EdgeLoraError):
    """An adapter loaded, but the outputs of the base do not change."""


class BundleError(EdgeLoraError):
    """The content of a bundle is missing, damaged or changed."""


class EngineUnavailableError(EdgeLoraError):
    """The engine or the compiled core is not installed here."""


class UnknownNameError(EdgeLoraError, KeyError):
    """A name (slot pattern, method, mask, adapter) is unknown; the message lists the known ones."""

    def __str__(self) -> str:
        """Return the plain message: KeyError would show its repr."""
        return str(self.args[0]) if self.args else ""


class NativeError(EdgeLoraError):
    """The compiled core refused; ``code`` is its ``el_status``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def list_all(title: str, problems: Sequence[str], limit: int = 20) -> str:
    """Return one message that lists every problem on a line of its own.

    Args:
        title: First line, without a colon at its end.
        problems: One fact each; at least one.
        limit: How many to spell out before only counting the rest.
    """
    lines = [f"{title}:", *(f"  {problem}" for problem in problems[:limit])]
    if len(problems) > limit:
        lines.append(f"  … and {len(problems) - limit} more")
    return "\n".join(lines)


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """Return the message for an unknown name: the close one if any, and all known ones.

    >>> unknown_name("mask", "rnd", ["rand", "wm"])
    "unknown mask 'rnd'. Did you mean 'rand'? Known: rand, wm"
    """
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}"
