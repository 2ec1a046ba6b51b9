"""PEFT's LORA (with rsLoRA, DoRA, biases, embeddings, convolutions) and ADALORA.

| tensor | shape | becomes |
|---|---|---|
| lora_A.weight | (rank, in) or (rank, in, kernel …) | ``a``, flattened |
| lora_B.weight | (out, rank) or (out, rank, 1 …) | ``bt``, transposed |
| lora_B.bias | (out,) | Dense on the module's bias |
| lora_embedding_A, _B | (rank, rows), (dim, rank) | ``bt`` and ``a``: the table is (rows, dim) |
| lora_magnitude_vector | one for each output | gain in the factors, and RowScale(gain - 1) |
| lora_E (AdaLoRA) | (rank, 1) | folded into ``a`` |

``fan_in_fan_out`` needs nothing: the factors have the same shapes, and our slots are (out, in).
DoRA's norms are those of Scaling DoRA: no (out, in) array is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import AdapterFileError, UnsupportedError
from edge_lora.forms import Dense, LowRank, RowScale, to_fp32
from edge_lora.interop.peft_source import (
    Array,
    Float32,
    Lowered,
    Parts,
    Source,
    fp32,
    require_shape,
)

LORA_PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector",
)  # fmt: skip
ADALORA_PARTS = ("lora_A", "lora_B", "lora_E")
_RANK_NUMBER_FLOOR = 1e-5  # PEFT divides AdaLoRA's scale by rank + this


def lora(source: Source) -> list[Lowered]:
    """Return the forms of every LORA module."""
    if source.config.flag("use_dora"):
        source.require_base("DoRA's gain is relative to the norms of the base's weights")
    return source.each(lambda parts: _lora_module(source, parts))


def adalora(source: Source) -> list[Lowered]:
    """Return the forms of every ADALORA module; modules pruned to rank 0 drop out."""
    rank = source.config.natural("init_r")
    alpha = source.config.number("lora_alpha")
    scale = (alpha if alpha > 0 else float(rank)) / (rank + _RANK_NUMBER_FLOOR)

    def convert(parts: Parts) -> Iterator[Lowered]:
        a, b, e = parts.take("lora_A", "lora_B", "lora_E")
        require_shape("lora_A", a, None, None)
        require_shape("lora_B", b, None, a.shape[0])
        require_shape("lora_E", e, a.shape[0], 1)
        if a.shape[0]:
            form = LowRank(fp32(a) * fp32(e), _transposed(b), scale)
            yield Lowered(parts.weight, (b.shape[0], a.shape[1]), (form,))

    return source.each(convert)


def _lora_module(source: Source, parts: Parts) -> Iterator[Lowered]:
    scale = _scale(source, parts)
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        form, shape = _embedding(parts, scale)
        axis = 1
    else:
        form, shape = _linear_or_conv(parts, scale)
        axis = 0
    if form.rank != source.config.rank_of(parts.module):
        raise AdapterFileError(
            f"its factors have rank {form.rank}, the config says "
            f"{source.config.rank_of(parts.module)}"
        )
    if source.config.flag("lora_bias"):
        (bias,) = parts.take("lora_B.bias")
        require_shape("lora_B.bias", bias, shape[0])
        yield Lowered(parts.bias, (shape[0],), (Dense(bias, scale),))
    if source.config.flag("use_dora"):
        (magnitude,) = parts.take("lora_magnitude_vector")
        yield Lowered(parts.weight, shape, _dora(source, parts, form, shape, magnitude, axis))
    else:
        yield Lowered(parts.weight, shape, (form,))


def _scale(source: Source, parts: Parts) -> float:
    rank, alpha = source.config.rank_of(parts.module), source.config.alpha_of(parts.module)
    return alpha / (math.sqrt(rank) if source.config.flag("use_rslora") else rank)


def _linear_or_conv(parts: Parts, scale: float) -> tuple[LowRank, tuple[int, ...]]:
    a, b = parts.take("lora_A.weight", "lora_B.weight")
    if a.ndim not in (2, 3, 4, 5):
        raise AdapterFileError(f"lora_A.weight is {a.shape}, of no layer that LoRA adapts")
    if b.ndim == a.ndim > 2 and b.shape[1] != a.shape[0]:
        raise UnsupportedError("grouped convolutions are not supported")
    require_shape("lora_A.weight", a, *a.shape)
    require_shape("lora_B.weight", b, None, a.shape[0], *[1] * (a.ndim - 2))
    form = LowRank(a.reshape(a.shape[0], -1), _transposed(b.reshape(b.shape[:2])), scale)
    return form, (b.shape[0], *a.shape[1:])


def _embedding(parts: Parts, scale: float) -> tuple[LowRank, tuple[int, ...]]:
    a, b = parts.take("lora_embedding_A", "lora_embedding_B")
    require_shape("lora_embedding_A", a, None, None)
    require_shape("lora_embedding_B", b, None, a.shape[0])
    return LowRank(_transposed(b), a, scale), (a.shape[1], b.shape[0])


def _dora(
    source: Source,
    parts: Parts,
    form: LowRank,
    shape: tuple[int, ...],
    magnitude: Array,
    axis: int,
) -> tuple[LowRank, RowScale]:
    """Return the two forms whose sum is ``gain * (W + delta) - W`` along an axis of W."""
    slot = source.slot(parts.weight)
    if slot.shape != shape:
        raise AdapterFileError(f"made for shape {shape}, slot is {slot.shape}")
    weight = source.require_base("").weight(slot.name).reshape(shape[0], -1)
    magnitude = fp32(magnitude.reshape(-1)).astype(np.float64)
    require_shape("lora_magnitude_vector", magnitude, weight.shape[axis])
    a, bt = to_fp32(form.a), to_fp32(form.bt)
    if axis == 0:
        norms = norms_of_sum(weight, a, bt, form.scale)
    else:
        norms = norms_of_sum(weight.T, bt, a, form.scale)
    if not norms.all():
        raise AdapterFileError("a row of the adapted weight is zero, DoRA divides by its norm")
    gain = magnitude / norms
    scaled = fp32(gain)
    a, bt = (a, bt * scaled) if axis == 0 else (a * scaled, bt)
    return LowRank(a, bt, form.scale), RowScale(fp32(gain - 1), axis="row" if axis == 0 else "col")


def norms_of_sum(weight: Float32, a: Float32, bt: Float32, scale: float) -> NDArray[np.float64]:
    """Return the norm of every row of ``weight + scale * bt.T @ a`` without forming the sum.

    Args:
        weight: (out, in).
        a: (rank, in).
        bt: (rank, out).
        scale: Of the product.

    Returns:
        (out,) fp64.

    Cost:
        2 * out * in * rank FLOP; scratch 3 * out * rank numbers.

    Source:
        Scaling DoRA: ``|W|^2 + 2s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)``.
    """
    b = bt.T.astype(np.float64)  # (out, rank)
    squares = np.einsum("oi,oi->o", weight, weight, dtype=np.float64)
    cross = ((weight @ a.T) * b).sum(axis=1)
    gram = a.astype(np.float64) @ a.T.astype(np.float64)  # (rank, rank)
    own = ((b @ gram) * b).sum(axis=1)
    norms: NDArray[np.float64] = np.sqrt(
        np.maximum(squares + 2 * scale * cross + scale**2 * own, 0)
    )
    return norms


def _transposed(array: Array) -> Array:
    return np.ascontiguousarray(array.T)
