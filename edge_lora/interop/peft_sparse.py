"""PEFT's SHIRA, IA3 and TRAINABLE_TOKENS: single entries, gains and rows of a weight.

| tensor | shape | becomes |
|---|---|---|
| shira_weight, shira_indices | (k,), (2, k): rows, columns | Sparse |
| ia3_l of an output | (out, 1), convolution (1, out, 1 …) | RowScale(l - 1), and of the bias |
| ia3_l of an input (feedforward) | (1, in), convolution (1, in, 1 …) | RowScale(l - 1, "col") |
| trainable_tokens_delta | (tokens, dim) | Block of rows, replacing |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edge_lora.errors import AdapterFileError, UnsupportedError
from edge_lora.forms import Block, RowScale, Sparse
from edge_lora.interop.peft_config import PeftConfig
from edge_lora.interop.peft_source import Array, Lowered, Parts, Source, fp32, require_shape
from edge_lora.slots import Slot

SHIRA_PARTS = ("shira_weight", "shira_indices")
IA3_PARTS = ("ia3_l",)
TOKEN_PARTS = ("trainable_tokens_delta",)
_SHAPES = "the file does not say the layers' shapes"


def shira(source: Source) -> list[Lowered]:
    """Return the Sparse form of every SHIRA module."""
    source.require_base(_SHAPES)

    def convert(parts: Parts) -> Iterator[Lowered]:
        values, indices = parts.take(*SHIRA_PARTS)
        shape = source.slot(parts.weight).shape
        require_shape("shira_weight", values, None)
        if indices.shape != (2, values.size):
            raise AdapterFileError(
                f"shira_indices is {indices.shape}, must be (2, {values.size}): rows and columns"
            )
        flat = _flat(indices, shape)
        order = np.argsort(flat, kind="stable")
        if (np.diff(flat[order]) == 0).any():
            raise AdapterFileError("shira_indices names an entry twice")
        form = Sparse(flat[order].astype(np.uint32), values[order])
        yield Lowered(parts.weight, shape, (form,))

    return source.each(convert)


def _flat(indices: Array, shape: tuple[int, ...]) -> Array:
    """Return row-major positions, int64; PEFT on Windows stores them as whole fp32 numbers."""
    whole = indices.astype(np.int64)
    if len(shape) != 2 or (whole != indices).any():
        raise AdapterFileError("shira_indices must be whole numbers, positions in a matrix")
    limits = np.array(shape)[:, None]
    if (whole < 0).any() or (whole >= limits).any():
        raise AdapterFileError(f"shira_indices reaches outside of the slot's shape {shape}")
    return np.asarray(whole[0] * shape[1] + whole[1])


def ia3(source: Source) -> list[Lowered]:
    """Return the RowScale forms of every IA3 module."""
    base = source.require_base(_SHAPES)
    scales_input = _selector_of_inputs(source.config)
    names_biases = any(slot.kind == "other" for slot in base.slots.values())

    def convert(parts: Parts) -> Iterator[Lowered]:
        (gain,) = parts.take("ia3_l")
        slot = source.slot(parts.weight)
        if len(slot.shape) < 2:
            raise AdapterFileError(f"the slot is {slot.shape}, no layer that IA3 adapts")
        is_input = scales_input(parts.module)
        require_shape("ia3_l", gain, *_gain_shape(slot.shape, is_input))
        values = fp32(gain.reshape(-1)) - np.float32(1)
        if is_input:
            kernel = int(np.prod(slot.shape[2:]))
            form = RowScale(np.repeat(values, kernel), axis="col")
            yield Lowered(parts.weight, slot.shape, (form,))
            return
        if not names_biases:
            raise UnsupportedError(
                "IA3 scales the layer's bias too, and this base does not say whether there is one; "
                "give base=edge_lora.methods.model_base.ModelBase(model)"
            )
        yield Lowered(parts.weight, slot.shape, (RowScale(values),))
        if parts.bias in base.slots:
            yield Lowered(parts.bias, (values.size,), (RowScale(values),))

    return source.each(convert)


def _selector_of_inputs(config: PeftConfig) -> Callable[[str], bool]:
    """As PEFT: a listed name matches the end of a module's, also in the middle of a word."""
    if isinstance(config.raw.get("feedforward_modules"), str):
        return config.selector("feedforward_modules")
    names = tuple(config.names("feedforward_modules"))
    return lambda module: module.endswith(names)


def _gain_shape(slot: tuple[int, ...], is_input: bool) -> tuple[int, ...]:
    """Return the shape of the gain of a layer whose weight is ``slot``."""
    if len(slot) == 2:
        return (1, slot[1]) if is_input else (slot[0], 1)
    return (1, slot[1] if is_input else slot[0], *[1] * (len(slot) - 2))


def trainable_tokens(source: Source) -> list[Lowered]:
    """Return the replaced rows of every TRAINABLE_TOKENS module."""
    source.require_base(_SHAPES)
    tokens = source.config.raw.get("token_indices")
    return source.each(
        lambda parts: [
            replaced_rows(source.slot(parts.weight), parts.take(*TOKEN_PARTS)[0], tokens)
        ]
    )


def replaced_rows(slot: Slot, rows: Array, tokens: object) -> Lowered:
    """Return ``rows`` as replacements of the rows ``tokens`` of a table.

    Args:
        slot: The table's, (rows, dim).
        rows: (tokens, dim).
        tokens: The config's list of row numbers, in the order of ``rows``.
    """
    if not isinstance(tokens, list) or any(type(n) is not int for n in tokens):
        raise AdapterFileError(f"config: token indices are {tokens!r:.40}, must be whole numbers")
    require_shape("trainable_tokens_delta", rows, len(tokens), slot.shape[-1])
    numbers = np.array(tokens, np.int64)
    if (numbers < 0).any() or (numbers >= slot.shape[0]).any():
        raise AdapterFileError(f"config: token indices reach outside of {slot.shape[0]} rows")
    order = np.argsort(numbers, kind="stable")
    form = Block("row", numbers[order].astype(np.uint32), rows[order], mode="set")
    return Lowered(slot.name, slot.shape, (form,), is_shared=True)
