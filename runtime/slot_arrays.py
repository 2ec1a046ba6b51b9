"""An adapter as arrays for the graph's optional inputs.

Factors may be fp16, bf16 or coded, at any of their ranks, and stand beside row scales and
bottlenecks; so they are decoded and stacked here, by the definitions of ``forms``, whatever they
are. That is done once per adapter and rank, and takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_lora.adapter import Adapter
from edge_lora.bundle import Manifest
from edge_lora.bundle_sites import ACTIVATIONS, SiteInputs
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import (
    FORM_NAMES,
    VALUE_DTYPES,
    Bottleneck,
    Form,
    LowRank,
    RowScale,
    Values,
    to_fp32,
)
from edge_lora.slots import Slot

Float32 = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]


def slot_arrays(adapter: Adapter, manifest: Manifest) -> Arrays:
    """Return input name -> array, such that the graph computes with ``adapter``.

    Raises:
        UnsupportedError: If the bundle lacks inputs for it, or a form has no unfused way; lists
            every slot.
    """
    arrays: Arrays = {}
    problems = []
    for name, delta in adapter.deltas.items():
        slot = manifest.slots[name]
        try:
            if slot.kind == "site":
                forms = [form for form in delta.forms if isinstance(form, Bottleneck)]
                if len(forms) != len(delta.forms):
                    raise UnsupportedError("a site takes bottlenecks only")
                inputs = manifest.sites[slot.name].inputs
                found: Mapping[str, NDArray[np.generic]] = _site_arrays(
                    forms, adapter.alpha, slot, inputs
                )
            else:
                found = _weight_arrays(delta.forms, adapter.alpha, slot, manifest)
        except UnsupportedError as error:
            problems.append(f"{name}: {error}")
            continue
        for key, array in found.items():
            dtype = VALUE_DTYPES[slot.dtype] if array.dtype == np.float32 else array.dtype
            arrays[key] = np.asarray(array, dtype, order="C")
    if problems:
        advice = (
            "Use set_adapter(), which needs an fp32 base, or export the bundle with the inputs "
            "that it needs"
        )
        title = f"adapter {adapter.name!r} cannot run unfused"
        raise UnsupportedError(f"{list_all(title, problems)}\n{advice}")
    return arrays


def _weight_arrays(
    forms: Sequence[Form], alpha: float, slot: Slot, manifest: Manifest
) -> dict[str, Float32]:
    place = manifest.stored[slot.name]
    factors = [form for form in forms if isinstance(form, LowRank)]
    scales = [form for form in forms if isinstance(form, RowScale) and form.axis == "row"]
    for form in forms:
        if not isinstance(form, LowRank) and form not in scales:
            raise UnsupportedError(f"form {_told(form)} is not low-rank and runs fused only")
    arrays: dict[str, Float32] = {}
    if factors:
        if place.lora_inputs is None:
            raise UnsupportedError("the bundle has no inputs for this slot")
        rank, most = (
            sum(form.rank for form in factors),
            manifest.program and manifest.program.max_rank,
        )
        if most and rank > most:
            raise UnsupportedError(f"rank {rank} is over {most}, the most that the program takes")
        arrays.update(zip(place.lora_inputs, _factors(factors, alpha, slot), strict=True))
    if scales:
        if place.gain_input is None:
            raise UnsupportedError("the bundle has no row_scale input for this slot")
        parts = [to_fp32(form.values) * np.float32(alpha * form.scale) for form in scales]
        arrays[place.gain_input] = np.sum([np.ones_like(parts[0]), *parts], axis=0)
    return arrays


def _factors(forms: Sequence[LowRank], alpha: float, slot: Slot) -> tuple[Float32, Float32]:
    """Return a (in, rank) and b (rank, out) of all forms, every scale folded into b."""
    a = np.concatenate([to_fp32(form.a) for form in forms])  # (rank, in)
    bt = np.concatenate([to_fp32(f.bt) * np.float32(alpha * f.scale) for f in forms])  # (rank, out)
    if slot.kind != "conv":
        return a.T, bt
    ones = (1,) * (len(slot.shape) - 2)
    return a.reshape(-1, *slot.shape[1:]), bt.T.reshape(*bt.T.shape, *ones)


def _site_arrays(
    forms: Sequence[Bottleneck], alpha: float, slot: Slot, inputs: SiteInputs
) -> dict[str, NDArray[np.generic]]:
    """Return all branches of a site as one; see ``bundle_sites`` for the order of its units."""
    forms = sorted(forms, key=lambda form: ACTIVATIONS.index(form.act))
    d_out, d_in = slot.shape
    scales = [np.float32(alpha * form.scale) for form in forms]
    ups = [to_fp32(f.up).T * scale for f, scale in zip(forms, scales, strict=True)]
    biases = [_or_zeros(f.up_bias, d_out) * s for f, s in zip(forms, scales, strict=True)]
    counts = [sum(form.rank for form in forms if form.act == act) for act in ACTIVATIONS]
    return {
        inputs.down_in: _down(forms, "parallel", d_in),
        inputs.down_out: _down(forms, "sequential", d_out),
        inputs.down_bias: np.concatenate([_or_zeros(f.down_bias, f.rank) for f in forms]),
        inputs.units: np.array(counts, np.int64),
        inputs.up: np.concatenate(ups),
        inputs.up_bias: np.sum(biases, axis=0, dtype=np.float32),
        inputs.switch: np.ones(1, np.int64),
    }


def _down(forms: Sequence[Bottleneck], placement: str, width: int) -> Float32:
    """Return (width, units), with columns of zeros for branches that read something else."""
    if all(form.placement != placement for form in forms):
        return np.zeros((width, 1), np.float32)
    columns = [
        to_fp32(f.down).T if f.placement == placement else np.zeros((width, f.rank), np.float32)
        for f in forms
    ]
    return np.concatenate(columns, axis=1)


def _or_zeros(values: Values | None, length: int) -> Float32:
    return np.zeros(length, np.float32) if values is None else to_fp32(values)


def _told(form: Form) -> str:
    name = FORM_NAMES[type(form)]
    return f"{name} of columns" if isinstance(form, RowScale) else name
