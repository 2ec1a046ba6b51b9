"""The bundle's ``weights.bin``: large tensors as external data, every slot at an aligned offset."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

PAGE_BYTES = 4096  # slots start on a page, so that a runtime can map each one
ALIGN_BYTES = 64  # a cache line: what CPU kernels want of any other tensor
INLINE_BYTES = 1024  # smaller tensors stay in model.onnx, where graph optimisers can read them


def write_weights(model: ir.Model, slots: Collection[str], path: Path) -> dict[str, int]:
    """Move large initializers and all ``slots`` into the file ``path``; return each slot's offset.

    The model's tensors then refer to the file, by its bare name. Tensors are written one at a time.
    """
    offsets = {}
    with path.open("wb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if name not in slots and tensor.nbytes < INLINE_BYTES:
                continue
            alignment = PAGE_BYTES if name in slots else ALIGN_BYTES
            offset = -(-file.tell() // alignment) * alignment
            file.write(bytes(offset - file.tell()))
            file.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=name,
                base_dir=path.parent,
            )
            if name in slots:
                offsets[name] = offset
    return offsets
