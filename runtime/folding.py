"""Linear bottlenecks as changes of a weight, so that they can be fused.

Beside ``y = W x + b``, a branch without activation is one more linear map:

| placement | change of W | change of b |
|---|---|---|
| parallel | ``s * up @ down`` | ``s * (up @ down_bias + up_bias)`` |
| sequential | ``s * up @ (down @ W)`` | ``s * (up @ (down @ b + down_bias) + up_bias)`` |
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.adapter import Adapter, Delta
from edge_lora.bundle import Manifest
from edge_lora.bundle_check import stored_weight
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Bottleneck, Dense, LowRank, to_fp32
from edge_lora.runtime.adapters import LoadedAdapter, load
from edge_lora.runtime.cache import cache_folder, cache_key

Float32 = NDArray[np.float32]


def fold_bottleneck(form: Bottleneck, weight: Float32) -> LowRank:
    """Return the change of ``weight`` (out, in), fp32, that does what a linear branch does.

    Raises:
        UnsupportedError: If the branch has an activation.
    """
    if form.act != "none":
        raise UnsupportedError(f"its activation {form.act!r} is no linear map")
    down = to_fp32(form.down)
    a = down if form.placement == "parallel" else down @ weight
    return LowRank(a, np.ascontiguousarray(to_fp32(form.up).T), form.scale)


def fold_bias(form: Bottleneck, bias: Float32) -> Float32:
    """Return the change of ``bias`` (out,), fp32, that goes with ``fold_bottleneck``."""
    middle = np.zeros(form.rank, np.float32)
    if form.down_bias is not None:
        middle += to_fp32(form.down_bias)
    if form.placement == "sequential":
        middle += to_fp32(form.down) @ bias
    change = to_fp32(form.up) @ middle
    if form.up_bias is not None:
        change += to_fp32(form.up_bias)
    return change * np.float32(form.scale)


def fused_form(loaded: LoadedAdapter, folder: Path, manifest: Manifest) -> LoadedAdapter:
    """Return what is fused for ``loaded``: itself, or a derived file without bottlenecks.

    Args:
        loaded: Fits the bundle.
        folder: The bundle's.
        manifest: The bundle's.

    Raises:
        UnsupportedError: If a bottleneck is no change of one weight; lists every such site.
    """
    if not loaded.has_bottleneck:
        return loaded
    adapter = _folded(loaded.read(), folder, manifest)
    name = cache_key(manifest.fingerprint, loaded.content_hash)
    path = adapter.save(cache_folder("folded") / f"{name}.safetensors")
    return replace(load(path, loaded.name), origin=loaded)


def _folded(adapter: Adapter, folder: Path, manifest: Manifest) -> Adapter:
    deltas = {n: d for n, d in adapter.deltas.items() if manifest.slots[n].kind != "site"}
    problems = []
    for site in [name for name in adapter.deltas if name not in deltas]:
        try:
            changes = _fold_site(site, adapter.deltas[site], folder, manifest)
            taken = [name for name in changes if name in deltas]
            if taken:
                raise UnsupportedError(f"{taken[0]} is changed by another part of this adapter")
            deltas |= changes
        except UnsupportedError as error:
            problems.append(f"{site}: {error}")
    if problems:
        title = f"adapter {adapter.name!r} has bottlenecks that cannot be fused"
        raise UnsupportedError(
            f"{list_all(title, problems)}\nRun it unfused: session.run(inputs, adapter=NAME)"
        )
    return replace(adapter, deltas=deltas)


def _fold_site(name: str, delta: Delta, folder: Path, manifest: Manifest) -> dict[str, Delta]:
    """Return the deltas of the weight, and of the bias if it changes, that replace a site's."""
    forms = [form for form in delta.forms if isinstance(form, Bottleneck)]
    producer = manifest.sites[name].producer
    if producer is None:
        raise UnsupportedError("its output is not that of one linear layer")
    if any(form.placement == "parallel" for form in forms) and not producer.reads_site_input:
        raise UnsupportedError("it is parallel to more than one linear layer")
    slot = manifest.slots[producer.weight]
    weight = np.asarray(stored_weight(folder, manifest, slot.name), np.float32)
    folded = tuple(fold_bottleneck(form, weight) for form in forms)
    changes = {slot.name: Delta(slot.shape, slot.dtype, folded, slot.slot_hash)}
    bias = np.zeros(slot.shape[0], np.float32)
    if producer.bias in manifest.stored:
        bias = np.asarray(stored_weight(folder, manifest, producer.bias), np.float32)
    elif producer.bias and any(form.placement == "sequential" for form in forms):
        raise UnsupportedError(f"it reads {producer.bias}, which is no slot of this bundle")
    change = np.sum([fold_bias(form, bias) for form in forms], axis=0, dtype=np.float32)
    if change.any():
        if producer.bias not in manifest.stored:
            reason = f"{producer.bias or 'a bias that the layer does not have'}"
            raise UnsupportedError(f"it changes {reason}, which is no slot of this bundle")
        place = manifest.slots[producer.bias]
        values = (Dense(change.reshape(place.shape)),)
        changes[place.name] = Delta(place.shape, place.dtype, values, place.slot_hash)
    return changes
