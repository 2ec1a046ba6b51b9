"""The two files of a PEFT folder, read as what they are: somebody else's.

``adapter_config.json`` is strict JSON of limited size; ``adapter_model.safetensors`` holds finite
numbers under names that begin with ``base_model.``. Pickles (``.bin``, ``.pt``) are never opened:
reading one runs whatever code its author put in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from edge_lora.errors import AdapterFileError, EdgeLoraError, list_all
from edge_lora.forms import VALUE_DTYPES
from edge_lora.strict_json import parse_strict

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 16 << 20  # AdaLoRA lists a flag for every rank of every layer
MAX_WEIGHTS_BYTES = 4 << 30
MAX_HEADER_BYTES = 64 << 20
MAX_NAME = 256
_DTYPES = {
    **VALUE_DTYPES,
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
Tensors = dict[str, NDArray[Any]]


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``adapter_config.json`` as an object.

    Raises:
        AdapterFileError: If it is missing, too large or not strict JSON.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = "" if folder.is_dir() else " (that folder does not exist)"
        raise AdapterFileError(
            f"'{folder}' is not a PEFT adapter: no {CONFIG_NAME}{hint}. "
            "Give the folder that save_pretrained() wrote"
        )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterFileError(f"over {MAX_CONFIG_BYTES} bytes")
        config = parse_strict(path.read_bytes())
    except (EdgeLoraError, OSError) as error:
        raise AdapterFileError(f"'{path}': {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"'{path}': not a JSON object")
    return config


def read_tensors(folder: Path) -> Tensors:
    """Return all tensors of ``adapter_model.safetensors``; fp64 is rounded to fp32.

    Raises:
        AdapterFileError: If it is missing, damaged, or a tensor is of a dtype that no adapter has,
            or not finite; lists every such tensor.
    """
    path = folder / WEIGHTS_NAME
    try:
        if not path.is_file():
            raise AdapterFileError(_advice_without_weights(folder))
        blob = _read_blob(path)
        entries = dict(safetensors.deserialize(blob))  # type: ignore[no-untyped-call]
    except (EdgeLoraError, OSError) as error:
        raise AdapterFileError(f"PEFT adapter '{folder}': {error}") from error
    except Exception as error:  # safetensors' own type
        raise AdapterFileError(
            f"PEFT adapter '{folder}': {WEIGHTS_NAME} is damaged: {error}"
        ) from error
    problems: list[str] = []
    tensors = {name: _array(name, entry, problems) for name, entry in entries.items()}
    if problems:
        raise AdapterFileError(list_all(f"PEFT adapter '{folder}' is not sound", problems))
    if not tensors:
        raise AdapterFileError(f"PEFT adapter '{folder}': {WEIGHTS_NAME} holds no tensors")
    return tensors


def _read_blob(path: Path) -> bytes:
    size = path.stat().st_size
    if not 10 <= size <= MAX_WEIGHTS_BYTES:
        raise AdapterFileError(
            f"{path.name} has {size} bytes, an adapter has 10 to {MAX_WEIGHTS_BYTES}"
        )
    blob = path.read_bytes()
    header_bytes = int.from_bytes(blob[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(blob) - 8):
        raise AdapterFileError(f"{path.name} is truncated: its header claims {header_bytes} bytes")
    parse_strict(blob[8 : 8 + header_bytes])
    return blob


def _advice_without_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        return f"no {WEIGHTS_NAME}"
    return (
        f"{pickles[0]} is a pickle, which may run code when it is read, and is not opened. Where "
        "you trust it, convert it: PeftModel.from_pretrained(model, folder)"
        ".save_pretrained(new_folder)"
    )


def _array(name: str, entry: dict[str, Any], problems: list[str]) -> NDArray[Any]:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None or len(name) > MAX_NAME or not name.isprintable():
        problems.append(f"{name!r:.80}: dtype {entry['dtype']}; adapters have {', '.join(_DTYPES)}")
        return np.zeros(0, np.float32)
    array = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    if array.dtype.kind == "i":
        return array
    array = array.astype(np.float32) if dtype.itemsize == 8 else array
    if not np.isfinite(array.astype(np.float32, copy=False)).all():
        problems.append(f"{name}: holds NaN or infinity")
    return array
