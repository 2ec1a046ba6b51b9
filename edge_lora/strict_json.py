"""JSON from a stranger: no duplicate keys, bounded depth, typed access that names what is wrong.

The compiled core has the same rules, so that both readers refuse the same files.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

from edge_lora.errors import AdapterFileError

MAX_DEPTH = 64
T = TypeVar("T")


def parse_strict(text: str | bytes) -> object:
    """Parse one JSON text.

    Raises:
        AdapterFileError: If it is not JSON, nests deeper than 64, or holds a duplicate key, a
            number that is not finite or a broken surrogate pair.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_whole_number,
        )
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"not JSON: {error}") from error
    _require_plain(value, 1)
    return value


def member(holder: dict[str, Any], key: str, kind: type[T]) -> T:
    """Return ``holder[key]``; raise AdapterFileError if it is missing or not of ``kind``."""
    if key not in holder:
        raise AdapterFileError(f"header is damaged: missing {key!r}")
    value = holder[key]
    if not isinstance(value, kind):
        raise AdapterFileError(
            f"header is damaged: {key!r} is {value!r:.40}, must be {kind.__name__}"
        )
    return value


def number(holder: dict[str, Any], key: str) -> float:
    """Return ``holder[key]``; raise AdapterFileError if it is missing or no number."""
    value = member(holder, key, object)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterFileError(f"header is damaged: {key!r} is {value!r:.40}, must be a number")
    return float(value)


def natural(value: object, what: str) -> int:
    """Return ``value`` if it is a whole number from 0 on; raise AdapterFileError if not."""
    if type(value) is not int or value < 0:
        raise AdapterFileError(
            f"header is damaged: {what} is {value!r:.40}, must be a whole number"
        )
    return value


def _require_plain(value: object, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise AdapterFileError("the header nests too deep")
        for child in [*value, *value.values()] if isinstance(value, dict) else value:
            _require_plain(child, depth + 1)
    elif isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise AdapterFileError("a broken surrogate pair in the header")
    elif isinstance(value, int | float) and not _is_finite(value):
        raise AdapterFileError("a number in the header is not finite")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise AdapterFileError("duplicate keys in the header")
    return found


def _whole_number(text: str) -> float:
    return int(text) if text != "-0" else -0.0  # minus zero is no whole number to the core


def _no_constant(text: str) -> float:
    raise AdapterFileError(f"{text} in the header")
