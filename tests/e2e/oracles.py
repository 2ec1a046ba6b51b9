"""What a switch must be equal to: engines of their own over weights that NumPy merged on disk."""

import shutil
import warnings
from dataclasses import replace

import numpy as np

from edge_lora import Adapter, reference
from edge_lora.bundle_program import Program
from edge_lora.forms import matrix_shape


def merged_run(session, parts, feeds, folder):
    """Return a run's outputs over a copy of the session's bundle with ``parts`` in its weights.

    Args:
        session: Open on the base; it is not touched.
        parts: (adapter file, weight) each.
        feeds: The inputs.
        folder: Where to put the copy.
    """
    shutil.copytree(session.folder, folder)
    terms = {}
    for path, weight in parts:
        adapter = Adapter.load(path)
        for slot, delta in adapter.deltas.items():
            terms.setdefault(slot, []).extend((f, weight * adapter.alpha) for f in delta.forms)
    for slot, these in terms.items():
        for place in places(session.manifest, slot):
            shape = session.manifest.slots[slot].shape
            out_features, in_features = matrix_shape(shape)
            stored = (in_features, out_features) if place.layout == "io" else shape
            raw = np.memmap(folder / place.file, np.float32, "r+", place.offset, stored)
            base = np.ascontiguousarray(raw.T if place.layout == "io" else raw)
            merged = reference.apply(base, these)
            raw[:] = merged.T if place.layout == "io" else merged
            raw.flush()
    if isinstance(session.manifest.program, Program):
        return run_program(session.manifest, folder, feeds)
    return run_graph(folder, feeds)


def places(manifest, slot):
    """Return every place of a slot's weight in the files of the session's engine."""
    place = manifest.stored[slot]
    if manifest.program is None:
        return [place]
    return [replace(place, offset=at) for at in manifest.program.slots[slot].offsets]


def run_graph(folder, feeds):
    """Run a bundle's graph in a plain ONNX Runtime session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    model = str(folder / "onnx" / "model.onnx")
    plain = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in plain.get_outputs()]
    return dict(zip(names, plain.run(names, feeds), strict=True))


def run_program(manifest, folder, feeds):
    """Run a bundle's program in ExecuTorch's own Python runtime, with no adapter fed."""
    import torch

    with warnings.catch_warnings():  # its imports use what Python will drop
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime

    program = manifest.program
    arrays = dict(feeds)
    for name, place in program.slots.items():
        out_features, in_features = matrix_shape(manifest.slots[name].shape)
        if place.lora_inputs:
            a, b = place.lora_inputs
            arrays[a] = np.zeros((in_features, 1), np.float32)
            arrays[b] = np.zeros((1, out_features), np.float32)
    method = Runtime.get().load_program(str(folder / program.file)).load_method("forward")
    found = method.execute([torch.from_numpy(arrays[name]) for name in program.input_order])
    names = [spec.name for spec in program.outputs]
    return {name: value.numpy().copy() for name, value in zip(names, found, strict=True)}
