"""LoRA-Squeeze: an adapter of lower rank, by singular values.

    delta = U diag(s) V.T    ->    B = U sqrt(diag(s)),  A = sqrt(diag(s)) V.T,  scale = 1

of the ``rank`` largest s. The error is what is left out, the square root of their sum of squares,
and no matrix of that rank has less.

* Low-rank forms, several of a slot together: QR of the stacked B and of A.T, then the SVD of the
  small core. The (out, in) matrix is never formed, the result is exact.
* Sparse, Block and Dense forms that add: randomised SVD of their sum (Halko, Martinsson, Tropp
  2011) with power iterations, seeded; exact SVD where the wanted rank is not small.
* A RowScale stays beside its slot's other forms. Forms that replace the weight (mode "set") and
  Bottlenecks stay whole.

Source: LoRA-Squeeze (Post variant); Halko et al., arXiv:0909.4061.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edge_lora.adapter import Adapter, Delta
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import (
    FORM_NAMES,
    Bottleneck,
    Form,
    LowRank,
    RowScale,
    WeightForm,
    is_replacing,
    values_of,
)
from edge_lora.reference import delta_of
from edge_lora.slot_errors import stacked_factors

Matrix = NDArray[np.float64]
_OVERSAMPLE = 10
_POWER_ITERATIONS = 4
_NOISE = 1e-12  # of fp64 factorisations, relative to the largest singular value
_FIRST_GUESS = 16  # of the rank that an energy needs


@dataclass(frozen=True)
class Squeezed:
    """What became of one slot.

    Attributes:
        slot: Its name.
        rank_before: Rank of its low-rank forms together; 0 if it had others.
        rank: Of the form that it has now; 0 if it was left whole.
        discarded: Share of the delta's energy (its squared Frobenius norm) that is gone.
        note: Why it was left whole, or "".
    """

    slot: str
    rank_before: int
    rank: int
    discarded: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Singular:
    """The leading singular triples of a delta.

    Attributes:
        u: (out, k).
        s: (k,), descending.
        vt: (k, in).
        energy: Squared Frobenius norm of the whole delta.
    """

    u: Matrix
    s: Matrix
    vt: Matrix
    energy: float

    @property
    def numerical_rank(self) -> int:
        """Number of singular values above the noise of the computation, at least 1."""
        return max(int(np.sum(self.s > _NOISE * self.s[0])), 1)

    def discarded(self, rank: int) -> float:
        """Return the share of the energy that the first ``rank`` triples leave out."""
        if not self.energy:
            return 0.0
        return float(max(self.energy - np.sum(self.s[:rank] ** 2), 0.0) / self.energy)

    def rank_for(self, energy: float) -> int | None:
        """Return the least rank that keeps a share of the energy, at least 1; None if not here."""
        if not self.energy:
            return 1
        kept = np.cumsum(self.s**2) / self.energy
        enough = np.flatnonzero(kept >= energy - 1e-12)
        return int(enough[0]) + 1 if enough.size else None


def squeeze(
    adapter: Adapter, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> tuple[Adapter, list[Squeezed]]:
    """Return the adapter with one low-rank form of lower rank per slot, and what that cost.

    Factors keep fp16 or bf16 if all values of their slot have it, else they are fp32. A slot
    that is cut forgets its nested ranks.

    Args:
        adapter: Any; not modified.
        rank: The most that a slot may have; a slot of low-rank forms that has less keeps it.
        energy: Instead of ``rank``: the share of each delta's energy to keep, in (0, 1].
        seed: Of the randomised SVD.

    Raises:
        UnsupportedError: If not exactly one of ``rank`` and ``energy`` is given, if it is out of
            range, or if no slot can be squeezed.
    """
    if (rank is None) == (energy is None):
        raise UnsupportedError("give either a rank or an energy to keep")
    if rank is not None and rank < 1:
        raise UnsupportedError(f"rank is {rank}, must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UnsupportedError(f"energy is {energy}, must be in (0, 1]")
    deltas, report = {}, []
    for slot, delta in adapter.deltas.items():
        deltas[slot], found = _squeeze_slot(slot, delta, rank, energy, seed)
        report.append(found)
    if not any(found.rank for found in report):
        notes = [f"{found.slot}: {found.note}" for found in report]
        raise UnsupportedError(list_all(f"no slot of {adapter.name!r} can be squeezed", notes))
    recipe = {"rank": rank, "energy": energy, "seed": seed}
    provenance = {**adapter.provenance, "squeezed": recipe}
    return replace(adapter, deltas=deltas, provenance=provenance), report


def _squeeze_slot(
    slot: str, delta: Delta, rank: int | None, energy: float | None, seed: int
) -> tuple[Delta, Squeezed]:
    adding = [f for f in delta.forms if not isinstance(f, RowScale | Bottleneck)]
    adding = [form for form in adding if not is_replacing(form)]
    if not adding or len(delta.shape) < 2:
        kinds = " + ".join(FORM_NAMES[type(form)] for form in delta.forms)
        whole = " with mode 'set'" if is_replacing(delta.forms[0]) else ""
        return delta, Squeezed(slot, 0, 0, note=f"{kinds}{whole} adds no matrix")
    low_rank = all(isinstance(form, LowRank) for form in adding)
    before = sum(form.rank for form in adding if isinstance(form, LowRank)) if low_rank else 0
    if low_rank and len(adding) == 1 and rank is not None and before <= rank:
        return delta, Squeezed(slot, before, before)
    found = (
        _svd_of_factors(adding)
        if low_rank
        else _svd_of_sum(adding, delta.shape, rank, energy, np.random.default_rng(seed))
    )
    wanted = rank if rank is not None else found.rank_for(energy or 1.0)
    kept = min(wanted or found.s.size, found.numerical_rank)
    if low_rank and len(adding) == 1 and kept >= before:
        return delta, Squeezed(slot, before, before)
    root = np.sqrt(found.s[:kept])[:, None]
    dtype = _common_dtype(adding)
    form = LowRank((root * found.vt[:kept]).astype(dtype), (root * found.u.T[:kept]).astype(dtype))
    others = tuple(f for f in delta.forms if isinstance(f, RowScale))
    squeezed = Squeezed(slot, before, kept, found.discarded(kept))
    return replace(delta, forms=(form, *others)), squeezed


def _svd_of_factors(forms: Sequence[Form]) -> Singular:
    """Return all singular triples of a sum of low-rank forms, through the core of its factors."""
    left, right = stacked_factors([(form, 1.0) for form in forms])
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)  # at most (R, R)
    k = s.size
    return Singular(q_left @ u[:, :k], s, vt[:k] @ q_right.T, float(np.sum(s**2)))


def _svd_of_sum(
    forms: Sequence[WeightForm],
    shape: tuple[int, ...],
    rank: int | None,
    energy: float | None,
    rng: np.random.Generator,
) -> Singular:
    """Return the leading singular triples of a sum of any forms that add."""
    nowhere = np.broadcast_to(np.float32(0), shape)  # no form here looks at the weight
    total = sum((delta_of(form, nowhere) for form in forms), np.zeros((), np.float32))
    matrix = np.asarray(total, np.float64)  # (out, in)
    guess = rank or _FIRST_GUESS
    while True:
        found = leading_svd(matrix, guess, rng)
        if energy is None or found.rank_for(energy) or found.s.size >= min(matrix.shape):
            return found
        guess *= 2


def leading_svd(matrix: Matrix, rank: int, rng: np.random.Generator) -> Singular:
    """Return the ``rank`` leading singular triples of (out, in), or all if that is most of them.

    Halko et al. 2011, algorithms 4.4 and 5.1: a random sketch of the range, orthonormalised after
    every power iteration, then the SVD of the matrix projected onto it.
    """
    energy = float(np.sum(matrix**2))
    width = rank + _OVERSAMPLE
    if 2 * width >= min(matrix.shape):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return Singular(u, s, vt, energy)
    basis = np.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], width)))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(matrix.T @ basis)[0]
        basis = np.linalg.qr(matrix @ basis)[0]
    small, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Singular((basis @ small)[:, :rank], s[:rank], vt[:rank], energy)


def _common_dtype(forms: Sequence[Form]) -> DTypeLike:
    found = {getattr(v, "dtype", None) for form in forms for v in values_of(form).values()}
    only = found.pop()
    return np.float32 if found or only is None else only
