"""Linear layers that store their weight transposed, computed as plain ones while they are traced.

GPT-2 of transformers stores (in, out). XNNPACK then packs a weight that is not the slot's; so each
such layer gets a copy of its weight in the slot's own shape for the time of the export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

WEIGHT = "slot_weight"
"""Name of the buffer (out, in) that a module has meanwhile."""


@contextlib.contextmanager
def as_plain_linear(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let ``modules``, whose weights are (in, out), compute with (out, in) inside the block."""
    try:
        for module in modules:
            weight: Any = module.weight
            module.register_buffer(WEIGHT, weight.detach().t().contiguous())
            vars(module)["forward"] = partial(_forward, module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
            module._buffers.pop(WEIGHT, None)


def _forward(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401  (a buffer of any module)
    return functional.linear(x, getattr(module, WEIGHT), module.bias)
