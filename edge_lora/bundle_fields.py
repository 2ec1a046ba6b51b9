"""Typed access to a stranger's JSON object: a helper returns what it read or raises.

``where`` names the object in messages: "slot q.weight", "file onnx/weights.bin".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from edge_lora.errors import BundleError

MAX_AXIS = 1 << 31
MAX_VALUES = 1 << 40  # of one tensor
MAX_AXES = 8
MAX_BYTES = 1 << 60  # of a file or an offset into it
MAX_CANARY_VALUES = 1_000_000  # stored in the manifest, over all inputs
T = TypeVar("T")


def collect(problems: list[str], read: Callable[..., T], *arguments: object) -> T | None:
    """Return ``read(*arguments)``; on a BundleError note its message and return None."""
    try:
        return read(*arguments)
    except BundleError as error:
        problems.append(str(error))
        return None


def refuse(where: str, key: str, value: object, must: str) -> BundleError:
    """Return the error for a field that is not what it must be."""
    return BundleError(f"{where}: {key!r} is {_short(value)}, must be {must}")


def require_keys(holder: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that nobody knows: they may change what the others mean."""
    unknown = sorted(set(holder) - set(known))
    if unknown:
        raise BundleError(f"{where}: unknown keys {_short(unknown)}")


def member(holder: Mapping[str, Any], key: str, where: str) -> Any:  # noqa: ANN401
    """Return ``holder[key]``."""
    if key not in holder:
        raise BundleError(f"{where}: {key!r} is missing")
    return holder[key]


def mapping(value: object, key: str, where: str) -> dict[str, Any]:
    """Return ``value`` if it is an object."""
    if not isinstance(value, dict):
        raise refuse(where, key, value, "an object")
    return value


def sequence(value: object, key: str, where: str) -> list[Any]:
    """Return ``value`` if it is a list."""
    if not isinstance(value, list):
        raise refuse(where, key, value, "a list")
    return value


def text(value: object, key: str, where: str, known: Collection[str] = ()) -> str:
    """Return ``value`` if it is a string that is not empty and, if asked for, one of ``known``."""
    if not isinstance(value, str) or not value or not _is_encodable(value):
        raise refuse(where, key, value, "a text that is not empty")
    if known and value not in known:
        raise refuse(where, key, value, f"one of {', '.join(known)}")
    return value


def texts(value: object, key: str, where: str) -> tuple[str, ...]:
    """Return ``value`` if it is a list of strings."""
    return tuple(text(item, key, where) for item in sequence(value, key, where))


def digest(value: object, key: str, where: str) -> str:
    """Return ``value`` if it is a sha256 in hex."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise refuse(where, key, value, "64 hex digits")
    return value


def natural(value: object, key: str, where: str, least: int = 0, most: int = MAX_BYTES) -> int:
    """Return ``value`` if it is a whole number (true and false are none) in the range."""
    if type(value) is not int or not least <= value <= most:
        raise refuse(where, key, value, f"a whole number from {least} to {most}")
    return value


def axes(value: object, key: str, where: str, least: int = 0) -> tuple[int, ...]:
    """Return ``value`` if it is a shape of a size that can exist."""
    shape = tuple(natural(n, key, where, least, MAX_AXIS) for n in sequence(value, key, where))
    if len(shape) > MAX_AXES or math.prod(shape) > MAX_VALUES:
        raise refuse(where, key, value, f"at most {MAX_AXES} axes and {MAX_VALUES} values")
    return shape


def symbolic_axes(value: object, key: str, where: str) -> tuple[int | str, ...]:
    """Return ``value`` if it is a shape whose axes are numbers or names."""
    items = sequence(value, key, where)
    axes([item for item in items if not isinstance(item, str)], key, where)
    if len(items) > MAX_AXES:
        raise refuse(where, key, value, f"at most {MAX_AXES} axes")
    return tuple(text(n, key, where) if isinstance(n, str) else int(n) for n in items)


def canary(value: object, of: str = "config") -> None:
    """Refuse a canary whose values do not fill their shapes, or that is too large to be one."""
    total = 0
    for name, stored in mapping(value, "canary", of).items():
        where = f"{of}: canary input {_short(name)}"
        record = mapping(stored, "canary", where)
        values = sequence(member(record, "values", where), "values", where)
        shape = axes(member(record, "shape", where), "shape", where)
        if math.prod(shape) != len(values):
            raise BundleError(f"{where}: {len(values)} values do not fill shape {list(shape)}")
        for item in values:
            if not isinstance(item, int | float) or not -(2**63) <= item < 2**64:
                raise refuse(where, "values", item, "numbers")
        total += len(values)
    if total > MAX_CANARY_VALUES:
        raise BundleError(f"{of}: the canary has {total} values, over {MAX_CANARY_VALUES}")


def _is_encodable(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def _short(value: object) -> str:
    return f"{value!a:.60}"
