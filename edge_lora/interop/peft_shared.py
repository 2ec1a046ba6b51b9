"""PEFT's VERA, RANDLORA and UNILORA: a few trained numbers per layer, the rest shared and random.

The random part is read from the file where it was saved. Where it was not, it is made again if
that needs no more than NumPy (VERA: torch's generator; UNILORA: NumPy's), else refused.

| type | delta | form |
|---|---|---|
| VERA | ``diag(b) B diag(d) A`` | LowRank |
| RANDLORA | ``alpha / rank * sum_j B_j diag(lambda_j) A diag(gamma_j)``, full rank | Dense |
| UNILORA | LoRA whose entries are those of a shared ``theta``, over sqrt(their uses) | LowRank |

Source: Kopiczko et al. 2023, arXiv:2310.11454; Albert et al. 2025, arXiv:2502.00987; Uni-LoRA
2025, arXiv:2506.00799.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edge_lora.errors import AdapterFileError, UnsupportedError, list_all
from edge_lora.forms import VALUE_DTYPES, Dense, LowRank, matrix_shape
from edge_lora.interop.peft_source import (
    Array,
    Float32,
    Lowered,
    Parts,
    Source,
    fp32,
    require_shape,
)
from edge_lora.interop.torch_random import TorchGenerator
from edge_lora.slots import fingerprint_of

VERA_PARTS = ("vera_lambda_b", "vera_lambda_d")
RANDLORA_PARTS = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
UNILORA_PARTS = (
    "unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B",
)  # fmt: skip
MAX_PROJECTION = 1 << 28  # numbers; a config may ask for any size
_SHAPES = "the file does not say the layers' shapes"


def vera(source: Source) -> list[Lowered]:
    """Return the LowRank form of every VERA module."""
    source.require_base(_SHAPES)
    shapes = _matrix_shapes(source)
    rank = source.config.natural("r")
    if not shapes:
        return []
    if "vera_A" in source.shared or "vera_B" in source.shared:
        shared = Parts("shared", source.shared)
        a_all, b_all = map(fp32, shared.take("vera_A", "vera_B"))
        require_shape("vera_A", a_all, rank, None)
        require_shape("vera_B", b_all, None, rank)
    else:
        widest = max(width for _, width in shapes.values())
        tallest = max(height for height, _ in shapes.values())
        a_all, b_all = _vera_projection(source, rank, tallest, widest)

    def convert(parts: Parts) -> Iterator[Lowered]:
        b, d = map(fp32, parts.take(*VERA_PARTS))
        out_features, in_features = shapes[parts.module]
        require_shape("vera_lambda_b", b, out_features)
        require_shape("vera_lambda_d", d, rank)
        a = require_shape("vera_A", a_all[:, :in_features], rank, in_features)
        factor = require_shape("vera_B", b_all[:out_features], out_features, rank)
        form = LowRank(d[:, None] * a, np.ascontiguousarray((b[:, None] * factor).T))
        yield Lowered(parts.weight, (out_features, in_features), (form,))

    return source.each(convert)


def _vera_projection(
    source: Source, rank: int, tallest: int, widest: int
) -> tuple[Float32, Float32]:
    """Return A (rank, widest) and B (tallest, rank) as PEFT draws them from its key."""
    if rank * max(tallest, widest) > MAX_PROJECTION:
        raise UnsupportedError(f"rank {rank} asks for a projection of over {MAX_PROJECTION} values")
    generator = TorchGenerator(source.config.natural("projection_prng_key", 2**63, least=0))
    a = generator.uniform((rank, widest), _kaiming_bound(widest))
    return a, generator.uniform((tallest, rank), _kaiming_bound(rank))


def _kaiming_bound(fan_in: int) -> float:
    return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))


def randlora(source: Source) -> list[Lowered]:
    """Return the Dense form of every RANDLORA module."""
    source.require_base(_SHAPES)
    shapes = _matrix_shapes(source)
    rank = source.config.natural("r")
    scale = source.config.number("randlora_alpha") / rank
    for name in ("randlora_A", "randlora_B"):
        if name in source.shared:
            shared = source.shared.pop(name)
            for parts in source.modules.values():
                parts.tensors.setdefault(name, shared)
    if not any("randlora_A" in parts for parts in source.modules.values()):
        raise UnsupportedError(
            "its random matrices are not in the file, and PEFT draws them in bf16 or fp16, as the "
            "machine has it. Save it again with save_projection=True"
        )

    def convert(parts: Parts) -> Iterator[Lowered]:
        weights, gamma, a, b = map(fp32, parts.take(*RANDLORA_PARTS))
        out_features, in_features = shapes[parts.module]
        short, tall = sorted((out_features, in_features))
        bases = math.ceil(short / rank)
        require_shape("randlora_lambda", weights, rank, bases)
        require_shape("randlora_gamma", gamma, bases, short)
        require_shape("randlora_A", a, rank, 1, None)
        require_shape("randlora_B", b, None, None, rank)
        a = require_shape("randlora_A", a[:, 0, :short], rank, short)
        b = require_shape("randlora_B", b[:tall, :bases], tall, bases, rank)
        # PEFT pairs the flat (rank, bases) of one side with the flat (bases, rank) of the other.
        inner = weights[:, :, None] * a[:, None, :] * gamma  # (rank, bases, short)
        delta = b.reshape(tall, -1) @ inner.reshape(-1, short)
        delta = delta if short == in_features else delta.T
        shape = (out_features, in_features)
        yield Lowered(parts.weight, shape, (Dense(np.ascontiguousarray(delta), scale),))

    return source.each(convert)


def unilora(source: Source) -> list[Lowered]:
    """Return the LowRank form of every UNILORA module."""
    base = source.require_base(_SHAPES)
    (theta,) = Parts("shared", source.shared).take("unilora_theta_d")
    require_shape("unilora_theta_d", theta, source.config.natural("theta_d_length", 1 << 32))
    theta = fp32(theta)
    rank = source.config.natural("r")
    if not source.modules:
        _draw_indices(source, rank, theta.size)

    def convert(parts: Parts) -> Iterator[Lowered]:
        index_a, index_b, scales_a, scales_b = parts.take(*UNILORA_PARTS)
        slot = source.slot(parts.weight)
        out_features, in_features = matrix_shape(slot.shape)
        for name, index, scales, shape in (
            ("A", index_a, scales_a, (rank, in_features)),
            ("B", index_b, scales_b, (out_features, rank)),
        ):
            require_shape(f"unilora_scales_{name}", scales, *shape)
            if index.shape != shape or index.dtype.kind != "i":
                raise AdapterFileError(
                    f"unilora_indices_{name} is {index.dtype} {index.shape}, must be whole "
                    f"numbers {shape}"
                )
            if index.size and not 0 <= int(index.min()) <= int(index.max()) < theta.size:
                raise AdapterFileError(f"unilora_indices_{name} reaches outside of theta")
        a, b = theta[index_a] * fp32(scales_a), theta[index_b] * fp32(scales_b)
        form = LowRank(a, np.ascontiguousarray(b.T))
        yield Lowered(parts.weight, base.slots[parts.weight].shape, (form,))

    return source.each(convert)


def _draw_indices(source: Source, rank: int, length: int) -> None:
    """Fill in the indices and scales of every targeted layer, as PEFT draws them from its seed."""
    names = _targeted(source)
    slots = {name: source.slot(f"{name}.weight") for name in names}
    sizes = [rank * sum(matrix_shape(slot.shape)) for slot in slots.values()]
    if sum(sizes) > MAX_PROJECTION:
        raise UnsupportedError(f"rank {rank} asks for over {MAX_PROJECTION} indices")
    random = np.random.default_rng(source.config.natural("proj_seed", 2**63, least=0))
    repeats, remaining = divmod(sum(sizes), length)
    drawn = np.repeat(np.arange(length), repeats)
    if remaining:
        drawn = np.concatenate([drawn, random.choice(length, size=remaining, replace=False)])
    random.shuffle(drawn)
    uses = np.bincount(drawn, minlength=length).astype(np.float32)
    shares = np.float32(1) / np.sqrt(np.maximum(uses, np.float32(1)))
    start = 0
    for name, slot in slots.items():
        out_features, in_features = matrix_shape(slot.shape)
        tensors: dict[str, Array] = {}
        for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            index = drawn[start : start + math.prod(shape)].reshape(shape)
            start += index.size
            tensors[f"unilora_indices_{part}"] = index
            tensors[f"unilora_scales_{part}"] = shares[index].astype(VALUE_DTYPES[slot.dtype])
        source.modules[name] = Parts(name, tensors)


def _targeted(source: Source) -> list[str]:
    """Return the modules that the config targets, in the order of the model."""
    base = source.require_base(_SHAPES)
    problems = [
        f"{key} is set"
        for key in ("layers_to_transform", "layers_pattern")
        if source.config.raw.get(key)
    ]
    if source.config.raw.get("target_modules") in (None, [], "all-linear"):
        problems.append("target_modules does not name the layers")
    if fingerprint_of(base.slots.values()) != base.slots.fingerprint:
        problems.append("the base leaves out some of its slots, and the order counts")
    if problems:
        title = "which layers its indices belong to cannot be told; save with save_indices=True"
        raise UnsupportedError(list_all(title, problems))
    is_targeted = source.config.selector("target_modules")
    linear = [slot.name for slot in base.slots.values() if slot.kind == "linear"]
    return [module for module in (n.removesuffix(".weight") for n in linear) if is_targeted(module)]


def _matrix_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """Return the shape of every module's weight; modules without a slot become problems."""
    shapes = {}
    for module in list(source.modules):
        try:
            shapes[module] = matrix_shape(source.slot(f"{module}.weight").shape)
        except KeyError as error:
            source.problems.append(f"{module}: {error}")
            del source.modules[module]
    return shapes
