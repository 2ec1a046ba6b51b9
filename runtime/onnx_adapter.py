"""An adapter as ONNX Runtime's own ``.onnx_adapter``: the arrays for the graph's optional inputs.

Any ONNX Runtime can run the bundle's graph with it, without this package:
``RunOptions.add_active_adapter``. It is made for one bundle: values have the dtypes of its graph,
every scale is folded in.
"""

from __future__ import annotations

from pathlib import Path

from edge_lora.adapter import Adapter
from edge_lora.atomic import replacing
from edge_lora.bundle import read_manifest
from edge_lora.bundle_engine import as_seen_by, choose_engine
from edge_lora.errors import EngineUnavailableError
from edge_lora.runtime.slot_arrays import slot_arrays


def to_onnx_adapter(adapter: Adapter, path: str | Path, bundle: str | Path) -> Path:
    """Write what a run of ``bundle``'s graph is fed to compute with ``adapter``.

    Args:
        adapter: Bound to the bundle's base, or unbound.
        path: File to write, atomically.
        bundle: Exported with slots or sites as inputs.

    Raises:
        AdapterMismatchError: If the adapter does not fit the bundle.
        UnsupportedError: If the bundle lacks inputs for it, or a form runs fused only; lists every
            slot.
        EngineUnavailableError: If ONNX Runtime is not installed, or the bundle has no ONNX graph.
    """
    manifest = read_manifest(bundle)
    manifest = as_seen_by(choose_engine(Path(bundle), manifest, "onnxruntime"), manifest)
    manifest.slots.check(adapter)
    arrays = slot_arrays(adapter, manifest)
    try:
        from onnxruntime import AdapterFormat, OrtValue
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            "a .onnx_adapter needs ONNX Runtime to be written. "
            "Install it with: pip install 'edge-lora[onnxruntime]'"
        ) from error
    form = AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters(
        {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    )
    path = Path(path)
    with replacing(path) as part:
        form.export_adapter(str(part.absolute()))
    return path
