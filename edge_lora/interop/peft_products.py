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

from collections.abc import Iterator

import numpy as np

from edge_lora.errors import AdapterFileError
from edge_lora.forms import Dense, Form, LowRank, matrix_shape
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
_CORE = "ijkl,ip,jr->prkl"  # Tucker-2: a small core between two factors, for convolutions


def loha(source: Source) -> list[Lowered]:
    """Return the form of every LOHA module."""

    def convert(parts: Parts) -> Iterator[Lowered]:
        scale = _scale(source, parts)
        w1a, w1b, w2a, w2b = map(fp32, parts.take(*LOHA_PARTS[:4]))
        if "hada_t1" in parts or "hada_t2" in parts:
            t1, t2 = map(fp32, parts.take("hada_t1", "hada_t2"))
            delta = np.einsum(_CORE, t1, w1a, w1b) * np.einsum(_CORE, t2, w2a, w2b)
            yield _dense(source, parts, delta, scale)
            return
        out_features, in_features = w1a.shape[0], w1b.shape[-1]
        require_shape("hada_w1_a", w1a, out_features, None)
        require_shape("hada_w1_b", w1b, w1a.shape[1], in_features)
        require_shape("hada_w2_a", w2a, out_features, None)
        require_shape("hada_w2_b", w2b, w2a.shape[1], in_features)
        rank = w1a.shape[1] * w2a.shape[1]
        if _is_smaller(rank, out_features, in_features):
            a = (w1b[:, None] * w2b[None, :]).reshape(rank, in_features)
            bt = (w1a.T[:, None] * w2a.T[None, :]).reshape(rank, out_features)
            shape = _shape(source, parts, (out_features, in_features))
            yield Lowered(parts.weight, shape, (LowRank(a, bt, scale),))
        else:
            yield _dense(source, parts, (w1a @ w1b) * (w2a @ w2b), scale)

    return source.each(convert)


def lokr(source: Source) -> list[Lowered]:
    """Return the form of every LOKR module."""

    def convert(parts: Parts) -> Iterator[Lowered]:
        scale = _scale(source, parts)
        w1 = _factors(parts, "lokr_w1")
        if "lokr_t2" in parts:
            core, left, right = map(fp32, parts.take("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
            w2 = np.einsum(_CORE, core, left, right)
            yield _dense(source, parts, _kron(w1[0] @ w1[1], w2), scale)
            return
        w2a, w2b = _factors(parts, "lokr_w2")
        rank = w1[0].shape[1] * w2a.shape[1]
        out_features, in_features = w1[0].shape[0] * w2a.shape[0], w1[1].shape[1] * w2b.shape[-1]
        if w2b.ndim == 2 and _is_smaller(rank, out_features, in_features):
            a, bt = np.kron(w1[1], w2b), np.ascontiguousarray(np.kron(w1[0], w2a).T)
            shape = _shape(source, parts, (out_features, in_features))
            yield Lowered(parts.weight, shape, (LowRank(a, bt, scale),))
        else:
            w2 = np.tensordot(w2a, w2b, 1)
            if w2.ndim == 3:
                source.require_base("the file does not say the shape of a convolution")
            yield _dense(source, parts, _kron(w1[0] @ w1[1], w2), scale)

    return source.each(convert)


def _scale(source: Source, parts: Parts) -> float:
    return source.config.alpha_of(parts.module, "alpha") / source.config.rank_of(parts.module)


def _factors(parts: Parts, name: str) -> tuple[Float32, Float32]:
    """Return two factors of one matrix; of an unfactored one one is the identity."""
    if name in parts:
        whole = fp32(parts.take(name)[0])
        if whole.ndim < 2:
            raise AdapterFileError(f"{name} is {whole.shape}, must be a matrix")
        if whole.ndim == 2 and whole.shape[0] > whole.shape[1]:
            return whole, np.eye(whole.shape[1], dtype=np.float32)
        return np.eye(whole.shape[0], dtype=np.float32), whole
    a, b = map(fp32, parts.take(f"{name}_a", f"{name}_b"))
    require_shape(f"{name}_a", a, None, None)
    require_shape(f"{name}_b", b, a.shape[1], None)
    return a, b


def _kron(w1: Float32, w2: Float32) -> Float32:
    """As PEFT: for a one-dimensional convolution (3 axes) ``w1`` gets its new axis in front."""
    return np.kron(w1.reshape(*w1.shape, 1, 1) if w2.ndim == 4 else w1, w2)


def _is_smaller(rank: int, out_features: int, in_features: int) -> bool:
    return rank * (out_features + in_features) < out_features * in_features


def _shape(source: Source, parts: Parts, matrix: tuple[int, int]) -> tuple[int, ...]:
    """Return the slot's shape if the base is known: convolutions are stored flattened."""
    if source.base is None:
        return matrix
    shape = source.slot(parts.weight).shape
    return shape if matrix_shape(shape) == matrix else matrix


def _dense(source: Source, parts: Parts, delta: Array, scale: float) -> Lowered:
    shape = tuple(delta.shape)
    if source.base is not None:
        slot = source.slot(parts.weight)
        shape = slot.shape if np.prod(slot.shape) == delta.size else shape
    form: Form = Dense(fp32(delta).reshape(shape), scale)
    return Lowered(parts.weight, shape, (form,))
