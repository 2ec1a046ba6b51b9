"""Which slots an ExecuTorch program can change, and where in the file their weights lie.

XNNPACK packs the weights of the linear layers that it computes, each once, under a name made of
the content of weight and bias. Kernels outside XNNPACK read their weights where they lie.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from edge_lora.bundle_program import ProgramSlot
from edge_lora.errors import UnsupportedError, list_all
from edge_lora.export.int8_linear import CODES
from edge_lora.export.transposed_linear import WEIGHT
from edge_lora.slots import Slot

_LINEAR, _EMBEDDING = "aten.linear.default", "aten.embedding.default"
_DEQUANTISE = "quantized_decomposed.dequantize_per_channel.default"
_ALIGNMENT = 16  # of weights in the file
_MOST_HITS = 10_000  # a weight that starts like so many other places cannot be told apart


@dataclass(frozen=True, eq=False)
class Reader:
    """What reads one parameter in the traced program.

    Attributes:
        operator: Its full name, "aten.linear.default".
        is_weight: Whether the parameter is its weight.
        bias: The parameter or buffer that it adds, if any, by name.
    """

    operator: str
    is_weight: bool
    bias: str | None


@dataclass(frozen=True, eq=False)
class Values:
    """What the program holds of one slot.

    Attributes:
        raw: The weight, or codes of 8 bits, in the slot's shape.
        scales: Of codes: (out,).
    """

    raw: torch.Tensor
    scales: torch.Tensor | None = None


def readers_of(traced: ExportedProgram) -> dict[str, list[Reader]]:
    """Return what reads each parameter, by the parameter's name in ``traced``.

    What stands for a weight (codes of 8 bits, a transposed copy) goes by that weight's name.
    """
    signature = traced.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: dict[str, list[Reader]] = defaultdict(list)
    for node in traced.graph.find_nodes(op="placeholder"):
        if node.name not in names:
            continue
        for value, user in _users(node):
            is_linear = str(user.target) == _LINEAR
            position = 1 if is_linear else 0
            is_weight = len(user.args) > position and user.args[position] is value
            bias = user.args[2] if is_linear and len(user.args) > 2 else None
            name = names[bias.name] if isinstance(bias, torch.fx.Node) else None
            found[_weight_of(names[node.name])].append(Reader(str(user.target), is_weight, name))
    return dict(found)


def _users(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, torch.fx.Node]]:
    """Yield what computes with a parameter, dequantised or not, and the value that it reads."""
    for user in node.users:
        if str(user.target) == _DEQUANTISE and user.args[0] is node:
            yield from ((user, reader) for reader in user.users)
        else:
            yield node, user


def _weight_of(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.weight".removeprefix(".") if leaf in (CODES, WEIGHT) else name


def refusal(slot: Slot, readers: Sequence[Reader], twins: Sequence[str]) -> str | None:
    """Return why this engine cannot change a slot; None if it can."""
    if slot.kind not in ("linear", "embedding"):
        return f"is {_told(slot)}; only linear layers and embeddings can be changed"
    if not readers:
        return "is not read by the traced forward"
    operators = {r.operator for r in readers if r.is_weight} | {
        f"{r.operator} (as an operand)" for r in readers if not r.is_weight
    }
    if unknown := sorted(operators - {_LINEAR, _EMBEDDING}):
        return f"is read by {', '.join(unknown)}; only linear layers and embeddings can be changed"
    if twins:
        return f"holds the same values as {', '.join(twins)}, and XNNPACK packs equal weights once"
    if len({r.bias for r in readers if r.operator == _LINEAR}) > 1:
        return "is shared by linear layers of different biases, which XNNPACK packs twice"
    return None


def _told(slot: Slot) -> str:
    return "a convolution's" if slot.kind == "conv" else "a bias or norm"


def places(
    pte: bytes,
    slots: Mapping[str, Slot],
    values: Mapping[str, Values],
    readers: Mapping[str, Sequence[Reader]],
    biases: Mapping[str, torch.Tensor],
    read_in_place: Iterable[str],
) -> dict[str, ProgramSlot]:
    """Return where the program keeps each slot's weight.

    Args:
        pte: The program's file.
        slots: By name.
        values: Slot -> weight, or codes and scales.
        readers: Slot -> what reads it.
        biases: Name in ``readers`` -> bias.
        read_in_place: The slots that kernels outside XNNPACK read.

    Raises:
        UnsupportedError: If a weight is not found exactly as often as it must lie there.
    """
    arrays = {name: _array(values[name].raw) for name in slots}
    scales = {name: _array(v.scales) for name, v in values.items() if v.scales is not None}
    offsets, of_scales = find_all(pte, arrays), find_all(pte, scales)
    found, problems = {}, []
    kernels = set(read_in_place)
    for name in slots:
        linear = [r for r in readers[name] if r.operator == _LINEAR]
        # What reads a weight of linear layers only, in place, is a linear layer.
        is_packed = bool(linear) and (name not in kernels or len(linear) < len(readers[name]))
        expected = is_packed + (name in kernels)
        if len(offsets[name]) != expected:
            problems.append(f"{name}: found {len(offsets[name])} times, expected {expected}")
            continue
        if name in scales and len(of_scales[name]) != 1:
            problems.append(f"{name}: scales found {len(of_scales[name])} times, expected 1")
            continue
        content = _sha256(arrays[name])
        if is_packed and content.encode() not in pte:
            problems.append(f"{name}: XNNPACK does not name it by its content")
            continue
        bias = next((r.bias for r in linear if r.bias), None)
        key = content + (_sha256(_array(biases[bias])) if bias else "") if is_packed else ""
        found[name] = ProgramSlot(
            offset=offsets[name][0],  # kernels' own come first in the file
            key=key,
            dtype="I8" if name in scales else "F32",
            scales_offset=of_scales[name][0] if name in scales else None,
            is_read_in_place=name in kernels,
            packed_offset=offsets[name][1] if expected == 2 else None,
        )
    if problems:
        raise UnsupportedError(list_all("weights that cannot be told apart in model.pte", problems))
    return found


def _array(tensor: torch.Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = tensor.detach().contiguous().numpy()
    return array


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(array.data).hexdigest()


def find_all(pte: bytes, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, list[int]]:
    """Return every aligned offset at which the bytes of each array lie in ``pte``.

    One pass over the file looks for the first telling word of every array.
    """
    if not arrays:
        return {}
    raws = {name: array.view(np.uint8).reshape(-1) for name, array in arrays.items()}
    probes = {name: _telling_word(raw) for name, raw in raws.items()}
    words = np.frombuffer(pte, np.uint64, len(pte) // 8)[::2]
    wanted = np.unique(np.array([word for _, word in probes.values()], np.uint64))
    hits = _positions(words, wanted)
    image = np.frombuffer(pte, np.uint8)
    found: dict[str, list[int]] = {}
    for name, raw in raws.items():
        skip, word = probes[name]
        starts = hits[word] * _ALIGNMENT - skip
        found[name] = [
            int(start)
            for start in starts[:_MOST_HITS]
            if start >= 0 and np.array_equal(image[start : start + raw.size], raw)
        ]
    return found


def _telling_word(raw: NDArray[np.uint8]) -> tuple[int, int]:
    """Return offset and value of the first 8 bytes, at an aligned place, that are not all zero."""
    padded = np.zeros(-(-raw.size // _ALIGNMENT) * _ALIGNMENT, np.uint8)
    padded[: raw.size] = raw
    words = padded.view(np.uint64)[::2]
    index = int(np.argmax(words != 0))
    return index * _ALIGNMENT, int(words[index])


def _positions(
    words: NDArray[np.uint64], wanted: NDArray[np.uint64]
) -> dict[int, NDArray[np.intp]]:
    step = 1 << 22
    found: dict[int, list[NDArray[np.intp]]] = {int(word): [] for word in wanted}
    for start in range(0, len(words), step):
        chunk = words[start : start + step]
        order = np.minimum(np.searchsorted(wanted, chunk), len(wanted) - 1)
        places = np.flatnonzero(wanted[order] == chunk)
        for word in np.unique(chunk[places]):
            found[int(word)].append(places[chunk[places] == word] + start)
    empty = np.empty(0, np.intp)
    return {word: np.concatenate([empty, *parts]) for word, parts in found.items()}
