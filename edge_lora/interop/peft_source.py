"""One PEFT folder, sorted: which tensors belong to which module, and what is known of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import AdapterFileError, EdgeLoraError, UnknownNameError, UnsupportedError
from edge_lora.forms import Form
from edge_lora.interop.base import BaseWeights
from edge_lora.interop.peft_config import PeftConfig
from edge_lora.interop.peft_folder import Tensors
from edge_lora.slots import Slot

MODEL_PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
Array = NDArray[Any]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Lowered:
    """Forms for one parameter of the base.

    Attributes:
        name: The parameter's name.
        shape: As the file implies it.
        forms: They add up.
        is_shared: Whether PEFT changes every module that shares the tensor (tied weights), too.
    """

    name: str
    shape: tuple[int, ...]
    forms: tuple[Form, ...]
    is_shared: bool = False


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of one adapted module; what is taken is removed."""

    module: str
    tensors: Tensors

    @property
    def weight(self) -> str:
        """Name of the module's weight."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        """Name of the module's bias."""
        return f"{self.module}.bias"

    def __contains__(self, part: str) -> bool:
        """Whether there is such a tensor."""
        return part in self.tensors

    def take(self, *parts: str) -> list[Array]:
        """Return the tensors of these names; raise AdapterFileError that lists the missing ones."""
        missing = [part for part in parts if part not in self.tensors]
        if missing:
            raise AdapterFileError(f"{', '.join(missing)} missing")
        return [self.tensors.pop(part) for part in parts]


@dataclass(eq=False)
class Source:
    """What a converter of one type works on.

    Attributes:
        config: The checked config.
        base: The base to bind to, if any.
        modules: Adapted module -> its tensors, in the order of the base (or of the file).
        shared: Tensors of the adapter as a whole, without their prefix.
        rest: Tensors of the model that are no tuner's, without their prefix.
        problems: Every reason found so far why the adapter cannot be imported.
    """

    config: PeftConfig
    base: BaseWeights | None
    modules: dict[str, Parts] = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)
    rest: Tensors = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def require_base(self, why: str) -> BaseWeights:
        """Return the base; raise UnsupportedError with ``why`` if there is none."""
        if self.base is None:
            raise UnsupportedError(
                f"{why}; give base=: a bundle's folder, or edge_lora.methods.model_base"
                ".ModelBase(model)"
            )
        return self.base

    def slot(self, name: str) -> Slot:
        """Return the slot of the base; raise UnknownNameError if it has none of that name."""
        base = self.require_base("the file does not say the layers' shapes")
        try:
            return base.slots[name]
        except KeyError:
            raise UnknownNameError("the base has no such slot") from None

    def each(self, convert: Callable[[Parts], Iterable[Lowered]]) -> list[Lowered]:
        """Convert every module; what goes wrong with one is noted and the others go on."""
        found: list[Lowered] = []
        for parts in self.modules.values():
            try:
                found += convert(parts)
            except (EdgeLoraError, ValueError) as error:
                self.problems.append(f"{parts.module}: {error}")
                continue
            if parts.tensors:
                left = ", ".join(parts.tensors)
                self.problems.append(f"{parts.module}: {left} not expected with this config")
        return found


def sort_tensors(
    config: PeftConfig, base: BaseWeights | None, tensors: Tensors, part_names: tuple[str, ...]
) -> Source:
    """Return the source with every tensor in its place; those without one are problems.

    Args:
        config: The checked config.
        base: The base to bind to, if any.
        tensors: All tensors of the file.
        part_names: What the type's tensors are called, after the module's name.
    """
    source = Source(config, base)
    for key, array in tensors.items():
        if not key.startswith(SHARED_PREFIX):
            source.problems.append(f"{key}: does not begin with {SHARED_PREFIX!r}")
        elif not key.startswith(MODEL_PREFIX):
            source.shared[key.removeprefix(SHARED_PREFIX)] = array
        else:
            name = key.removeprefix(MODEL_PREFIX)
            part = next((part for part in part_names if name.endswith(f".{part}")), None)
            if part is None:
                source.rest[name] = array
            else:
                module = name.removesuffix(f".{part}")
                source.modules.setdefault(module, Parts(module, {})).tensors[part] = array
    return source


def require_shape(what: str, array: Array, *shape: int | None) -> Array:
    """Return ``array`` if it has that shape (None: any size); raise AdapterFileError if not."""
    fits = array.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind == "i":
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise AdapterFileError(f"{what} is {array.dtype} {array.shape}, must be ({wanted})")
    return array


def fp32(array: Array) -> Float32:
    """Return the values as fp32, exactly."""
    return array.astype(np.float32, copy=False)


def tied_problem(name: str, slot: Slot) -> str:
    """Return why an adapter of one module cannot change a tensor that several share."""
    others = ", ".join(other for other in (slot.name, *slot.aliases) if other != name)
    return (
        f"{name}: shares its tensor with {others}, and PEFT adapts only one of them. "
        "Untie them in the base"
    )
