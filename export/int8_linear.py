"""Linear layers in 8 bits, as XNNPACK computes them: codes and a scale per row of the weight.

The activations are quantised at every run, so nothing is calibrated. The weight is quantised once,
``round(weight / scale)`` with ``scale = max|row| / 127``, and an adapter's codes use these scales.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.nn import functional

from edge_lora.errors import list_all

logger = logging.getLogger(__name__)

CODES, SCALES, ZEROS = "int8_codes", "int8_scales", "int8_zeros"
"""Names of the buffers that a module has while it is in 8 bits."""
LARGEST = 127
_LEAST_SCALE = 1e-12  # of a row of zeros


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (out, in) int8 and scales (out,) fp32 of a weight (out, in)."""
    scales = (weight.abs().amax(dim=1) / LARGEST).clamp_min(_LEAST_SCALE)
    codes = (weight / scales[:, None]).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


def linears_to_quantise(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers by name, but for those that must keep fp32.

    These are layers whose weight another module reads too, and layers of different weights whose
    codes are equal: XNNPACK names what it packs by the codes, without the scales, so it would take
    one for the other.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    readers: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            readers[id(parameter)] = readers.get(id(parameter), 0) + 1
    alone = {name: m for name, m in modules.items() if readers[id(m.weight)] == 1}
    alike: dict[bytes, list[str]] = {}
    for name, module in alone.items():
        codes, _ = quantised(module.weight.detach())
        alike.setdefault(hashlib.sha256(codes.numpy().data).digest(), []).append(name)
    mixed = {
        name
        for names in alike.values()
        if not all(torch.equal(alone[names[0]].weight, alone[n].weight) for n in names[1:])
        for name in names
    }
    if mixed:
        title = "kept in fp32, since their weights differ and would have the same 8-bit codes"
        logger.warning("%s", list_all(title, sorted(mixed)))
    return {name: m for name, m in alone.items() if name not in mixed}


@contextlib.contextmanager
def in_8_bits(modules: Mapping[str, torch.nn.Linear]) -> Iterator[None]:
    """Let ``modules`` compute in 8 bits inside the block."""
    try:
        for module in modules.values():
            _quantise(module)
        yield
    finally:
        for module in modules.values():
            _restore(module)


def _quantise(module: torch.nn.Linear) -> None:
    codes, scales = quantised(module.weight.detach())
    buffers = {CODES: codes, SCALES: scales, ZEROS: torch.zeros(len(scales), dtype=torch.int64)}
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    vars(module)["forward"] = partial(_forward, module)


def _restore(module: torch.nn.Linear) -> None:
    vars(module).pop("forward", None)
    for name in (CODES, SCALES, ZEROS):
        module._buffers.pop(name, None)


def _forward(module: torch.nn.Linear, x: Tensor) -> Tensor:
    """Return x @ weight.T + bias, both operands rounded to 8 bits: x by its rows, as XNNPACK."""
    ops = torch.ops.quantized_decomposed
    bounds, largest = (-128, 127, torch.int8), (-LARGEST, LARGEST, torch.int8)
    scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = ops.quantize_per_token(x, scale, zero, *bounds)
    rounded = ops.dequantize_per_token(codes, scale, zero, *bounds, torch.float32)
    buffers = (getattr(module, name) for name in (CODES, SCALES, ZEROS))
    weight = ops.dequantize_per_channel.default(*buffers, 0, *largest)
    return functional.linear(rounded, weight, module.bias)
