"""PEFT's LOHA and LOKR: products of two small matrices, entry by entry or Kronecker's.

Both are low-rank, with the product of the two ranks: exactly LowRank where that is smaller than
the whole matrix, else Dense.

| type | delta | as factors |
|---|---|---|
| LOHA | ``(A1 B1) * (A2 B2)`` | columns ``A1[:, i] * A2[:, j]``, rows ``B1[i] * B2[j]`` |
| LOKR | ``kron(A1 B1, A2 B2)`` | ``kron(A1, A2)``, ``kron(B1, B2)`` |

Source: Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098; Yeh et al. 2024, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from edge_lora.errors import AdapterFileError
from edge_lora.forms import Dense, Form, LowRank
from edge_lora.interop.peft_source import (
    Array,
    Float32,
    Lowered,
    Parts,
    Source,
    fp32,
    require_shape,
)

LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR_PARTS = (
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
MAX_VALUES = 1 << 30
_CORE = "ijkl,ip,jr->prkl"  # Tucker-2: a small core between two factors, for convolutions


def loha(source: Source) -> list[Lowered]:
    """Return the form of every LOHA module."""

    def convert(parts: Parts) -> Iterator[Lowered]:
        scale = _scale(source, parts)
        w1a, w1b, w2a, w2b = map(fp32, parts.take(*LOHA_PARTS[:4]))
        if "hada_t1" in parts or "hada_t2" in parts:
            t1, t2 = map(fp32, parts.take("hada_t1", "hada_t2"))
            shape = _core_shape("hada_w1", t1, w1a, w1b)
            if _core_shape("hada_w2", t2, w2a, w2b) != shape:
                raise AdapterFileError("its two products have different shapes")
            shape = _slot_shape(source, parts, shape)
            delta = np.einsum(_CORE, t1, w1a, w1b) * np.einsum(_CORE, t2, w2a, w2b)
            yield Lowered(parts.weight, shape, (Dense(delta.reshape(shape), scale),))
            return
        require_shape("hada_w1_a", w1a, None, None)
        require_shape("hada_w1_b", w1b, w1a.shape[1], None)
        out_features, in_features = w1a.shape[0], w1b.shape[1]
        require_shape("hada_w2_a", w2a, out_features, None)
        require_shape("hada_w2_b", w2b, w2a.shape[1], in_features)
        shape = _slot_shape(source, parts, (out_features, in_features))
        rank = w1a.shape[1] * w2a.shape[1]
        form: Form
        if _is_smaller(rank, out_features, in_features):
            a = (w1b[:, None] * w2b[None, :]).reshape(rank, in_features)
            bt = (w1a.T[:, None] * w2a.T[None, :]).reshape(rank, out_features)
            form = LowRank(a, bt, scale)
        else:
            form = Dense(((w1a @ w1b) * (w2a @ w2b)).reshape(shape), scale)
        yield Lowered(parts.weight, shape, (form,))

    return source.each(convert)


def lokr(source: Source) -> list[Lowered]:
    """Return the form of every LOKR module."""

    def convert(parts: Parts) -> Iterator[Lowered]:
        scale = _scale(source, parts)
        w1a, w1b = _factors(parts, "lokr_w1")
        height, width = w1a.shape[0], w1b.shape[1]
        kernel = _kernel(parts)
        if kernel is not None:
            natural, w2 = kernel
            shape = (height * natural[0], width * natural[1], *natural[2:])
            shape = _slot_shape(source, parts, shape)
            delta = _kron(w1a @ w1b, w2())
            yield Lowered(parts.weight, shape, (Dense(delta.reshape(shape), scale),))
            return
        w2a, w2b = _factors(parts, "lokr_w2")
        out_features, in_features = height * w2a.shape[0], width * w2b.shape[1]
        shape = _slot_shape(source, parts, (out_features, in_features))
        form: Form
        if _is_smaller(w1a.shape[1] * w2a.shape[1], out_features, in_features):
            a, bt = np.kron(w1b, w2b), np.ascontiguousarray(np.kron(w1a, w2a).T)
            form = LowRank(a, bt, scale)
        else:
            form = Dense(_kron(w1a @ w1b, w2a @ w2b).reshape(shape), scale)
        yield Lowered(parts.weight, shape, (form,))

    return source.each(convert)


def _scale(source: Source, parts: Parts) -> float:
    return source.config.alpha_of(parts.module, "alpha") / source.config.rank_of(parts.module)


def _factors(parts: Parts, name: str) -> tuple[Float32, Float32]:
    """Return two factors of one matrix; of a whole one, one of them is the identity."""
    if name in parts:
        (whole,) = parts.take(name)
        whole = fp32(require_shape(name, whole, None, None))
        identity = np.eye(min(whole.shape), dtype=np.float32)
        return (whole, identity) if whole.shape[0] > whole.shape[1] else (identity, whole)
    a, b = map(fp32, parts.take(f"{name}_a", f"{name}_b"))
    require_shape(f"{name}_a", a, None, None)
    require_shape(f"{name}_b", b, a.shape[1], None)
    return a, b


def _kernel(parts: Parts) -> tuple[tuple[int, ...], Callable[[], Float32]] | None:
    """Return the shape of a convolution's W2 and what computes it; None of a linear layer."""
    if "lokr_t2" in parts:
        core, left, right = map(fp32, parts.take("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        shape = _core_shape("lokr_w2", core, left, right)
        return shape, lambda: np.einsum(_CORE, core, left, right)
    if "lokr_w2" in parts and parts.tensors["lokr_w2"].ndim > 2:
        whole = fp32(parts.take("lokr_w2")[0])
        return whole.shape, lambda: whole
    return None


def _core_shape(name: str, core: Array, left: Array, right: Array) -> tuple[int, ...]:
    """Return the shape of a core between its two factors."""
    require_shape(f"{name}'s core", core, None, None, None, None)
    require_shape(f"{name}_a", left, core.shape[0], None)
    require_shape(f"{name}_b", right, core.shape[1], None)
    return (left.shape[1], right.shape[1], *core.shape[2:])


def _kron(w1: Float32, w2: Float32) -> Float32:
    """As PEFT: for a one-dimensional convolution (3 axes) ``w1`` gets its new axis in front."""
    return np.kron(w1.reshape(*w1.shape, 1, 1) if w2.ndim == 4 else w1, w2)


def _is_smaller(rank: int, out_features: int, in_features: int) -> bool:
    return rank * (out_features + in_features) < out_features * in_features


def _slot_shape(source: Source, parts: Parts, natural: tuple[int, ...]) -> tuple[int, ...]:
    """Return the slot's shape, of which the file may hold a flattened one; computes nothing yet.

    Raises:
        AdapterFileError: If the sizes differ or, without a base, the size is absurd: small
            factors can claim a matrix of any size.
    """
    if source.base is None:
        if math.prod(natural) > MAX_VALUES:
            raise AdapterFileError(f"claims a weight of {natural}, over {MAX_VALUES} values")
        return natural
    shape = source.slot(parts.weight).shape
    if math.prod(shape) != math.prod(natural):
        raise AdapterFileError(f"made for {natural}, slot is {shape}")
    return shape
