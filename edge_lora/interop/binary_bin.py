"""The packed ``.bin`` files of the reference code of Bi-LoRA and Bi-AdaptFormer, byte for byte.

A file has no header: it is the tensors of the adapted model in the order of its modules,

    down of the first place, up of the first place, down of the second …, the head

and each tensor is its codes, row-major and low bits first, then mean and standard deviation as
little-endian fp32. A head that is not coded is its weight and its bias as fp32, at the end. Which
model, which rank, how many bits and which scale (the reference keeps it in a YAML file beside)
must be known from elsewhere: that is what ``BinLayout`` says.

The reference drops the last byte of a tensor whose codes do not fill whole bytes, so such layouts
are refused. So are 8 bits: its levels are then far from the book that they are to converge to.
Its coded head has no bias: the base's must be zero.

Source: the files' writer in the code of Jie, Wang, Deng 2023, arXiv:2307.16867.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.atomic import replacing
from edge_lora.codebook import Coded, levels_of, pack, unpack
from edge_lora.errors import AdapterFileError, EdgeLoraError, UnsupportedError, list_all
from edge_lora.forms import Bottleneck, Dense, Form, LowRank, Values

BITS = (1, 2, 4)
_STATS_BYTES = 8


@dataclass(frozen=True)
class BinLayout:
    """What a file does not say of itself.

    Attributes:
        places: Slot (low_rank) or site (bottleneck) -> (out_features, in_features), in the order
            of the model's modules. Bi-LoRA needs q and v as slots of their own.
        form: What stands there: "low_rank" for Bi-LoRA, "bottleneck" (relu, parallel) for
            Bi-AdaptFormer.
        rank: Rows of every down.
        bits: 1, 2 or 4.
        scale: Multiplies every branch.
        head: Slot of the classifier's weight, its bias being ``….bias`` beside it; "" for none.
        head_shape: (classes, in_features).
        head_is_coded: Whether the head is of ``bits`` too (Bi-Head), or fp32.
    """

    places: Mapping[str, tuple[int, int]]
    form: Literal["low_rank", "bottleneck"]
    rank: int
    bits: int = 1
    scale: float = 1.0
    head: str = ""
    head_shape: tuple[int, int] = (0, 0)
    head_is_coded: bool = True

    def __post_init__(self) -> None:
        """Refuse layouts that no file can have."""
        problems = []
        if self.bits not in BITS:
            problems.append(f"bits is {self.bits!r}, must be one of {', '.join(map(str, BITS))}")
        if self.rank < 1 or not self.places:
            problems.append(f"rank {self.rank!r} and {len(self.places)} places, want at least one")
        if not problems:
            problems = [
                f"{name}: {prod(shape)} codes of {self.bits} bits do not fill whole bytes"
                for name, shape in self.coded_shapes().items()
                if prod(shape) * self.bits % 8
            ]
        if problems:
            raise UnsupportedError(list_all("layout of no .bin file", problems))

    def coded_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape of every coded tensor, in the order of the file."""
        shapes = {}
        for name, (out_features, in_features) in self.places.items():
            shapes[f"{name}/down"] = (self.rank, in_features)
            shapes[f"{name}/up"] = (out_features, self.rank)
        if self.head and self.head_is_coded:
            shapes[self.head] = self.head_shape
        return shapes

    @property
    def head_bias(self) -> str:
        """Name of the slot of the classifier's bias."""
        return self.head.removesuffix("weight") + "bias"

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        coded = sum(
            prod(shape) * self.bits // 8 + _STATS_BYTES for shape in self.coded_shapes().values()
        )
        classes, width = self.head_shape
        has_plain_head = bool(self.head) and not self.head_is_coded
        return coded + (4 * classes * (width + 1) if has_plain_head else 0)


def read_bin(path: str | Path, layout: BinLayout, dtype: str = "F32") -> Adapter:
    """Read one file as an adapter that is bound to no base; nothing is coded anew.

    Args:
        path: The file.
        layout: What it holds.
        dtype: safetensors' name of the base weights' dtype.

    Raises:
        AdapterFileError: No such file, another length than the layout says, or statistics that are
            NaN, infinite or negative.
    """
    path = Path(path)
    try:
        size = path.stat().st_size if path.is_file() else -1
        if size != layout.nbytes:
            found = "is not a file" if size < 0 else f"has {size} bytes"
            raise AdapterFileError(
                f"{found}, its layout ({len(layout.places)} places, rank {layout.rank}, "
                f"{layout.bits} bits) makes {layout.nbytes}"
            )
        return _adapter(path.stem, path.read_bytes(), layout, dtype)
    except (EdgeLoraError, OSError) as error:
        raise AdapterFileError(f"adapter file '{path}': {error}") from error


def write_bin(adapter: Adapter, path: str | Path, layout: BinLayout) -> Path:
    """Write an adapter of codes as one file, atomically; its scales and name are not in it.

    Args:
        adapter: From ``bilora`` or ``biadaptformer``, with one group for each tensor.
        path: The file.
        layout: What to write, in which order.

    Raises:
        UnsupportedError: If the adapter is not what the layout says; lists every difference.
    """
    problems = [f"{name}: not in the layout" for name in adapter.deltas.keys() - _slots(layout)]
    problems += [f"{name}: not in the adapter" for name in _slots(layout) - adapter.deltas.keys()]
    if adapter.alpha != 1.0:
        problems.append(f"alpha is {adapter.alpha!r}, which the file cannot say")
    parts: list[bytes] = []
    if not problems:
        for name, values in _values(adapter, layout, problems).items():
            shape = layout.coded_shapes().get(name)
            if shape is None:
                parts.append(np.ascontiguousarray(values, "<f4").tobytes())
            elif problem := _coded_problem(values, shape, layout.bits):
                problems.append(f"{name}: {problem}")
            else:
                assert isinstance(values, Coded)  # _coded_problem saw to it
                parts += [values.codes.tobytes(), values.stats.astype("<f4").tobytes()]
    if problems:
        title = f"adapter {adapter.name!r} cannot be written as this .bin file"
        raise UnsupportedError(list_all(title, sorted(problems)))
    return _write(Path(path), b"".join(parts))


def _adapter(name: str, blob: bytes, layout: BinLayout, dtype: str) -> Adapter:
    data, at = np.frombuffer(blob, np.uint8), 0
    tensors: dict[str, Coded] = {}
    book = levels_of("gauss_l1", layout.bits)
    for key, shape in layout.coded_shapes().items():
        length = prod(shape) * layout.bits // 8
        stats = data[at + length : at + length + _STATS_BYTES].copy().view("<f4").reshape(1, 2)
        tensors[key] = Coded(data[at : at + length], stats, book, shape)
        at += length + _STATS_BYTES
    deltas: dict[str, Delta] = {}
    for place, shape in layout.places.items():
        down, up = tensors[f"{place}/down"], tensors[f"{place}/up"]
        form: Form = Bottleneck(down, up, layout.scale)
        if layout.form == "low_rank":
            form = LowRank(down, transposed(up), layout.scale)
        deltas[place] = Delta(shape, dtype, (form,))
    if layout.head and layout.head_is_coded:
        head = Dense(tensors[layout.head], mode="set")
        deltas[layout.head] = Delta(layout.head_shape, dtype, (head,))
    elif layout.head:
        classes, width = layout.head_shape
        numbers = data[at:].copy().view("<f4")
        weight, bias = numbers[:-classes].reshape(classes, width), numbers[-classes:]
        deltas[layout.head] = Delta(layout.head_shape, dtype, (Dense(weight, mode="set"),))
        deltas[layout.head_bias] = Delta((classes,), dtype, (Dense(bias, mode="set"),))
    method = "bilora" if layout.form == "low_rank" else "biadaptformer"
    return Adapter(name, method, BaseIdentity(""), deltas)


def transposed(coded: Coded) -> Coded:
    """Return a coded matrix, (m, n) in one group, as the codes of its transpose."""
    codes = unpack(coded.codes, coded.bits, coded.size).reshape(coded.shape)
    packed = pack(np.ascontiguousarray(codes.T).reshape(-1), coded.bits)
    return Coded(packed, coded.stats, coded.book, coded.shape[::-1], coded.group)


def _slots(layout: BinLayout) -> set[str]:
    heads = {layout.head} if layout.head_is_coded else {layout.head, layout.head_bias}
    return {*layout.places, *(heads if layout.head else ())}


def _values(adapter: Adapter, layout: BinLayout, problems: list[str]) -> dict[str, Values]:
    """Return the values of every tensor in the order of the file; notes what cannot be there."""
    found: dict[str, Values] = {}
    for name in layout.places:
        match adapter.deltas[name].forms:
            case (LowRank(a=down, bt=bt, scale=scale, ranks=()),) if layout.form == "low_rank":
                up = transposed(bt) if isinstance(bt, Coded) and bt.ndim == 2 else bt
                found |= {f"{name}/down": down, f"{name}/up": up}
            case (Bottleneck(down, up, scale, "relu", "parallel", None, None),) if (
                layout.form == "bottleneck"
            ):
                found |= {f"{name}/down": down, f"{name}/up": up}
            case _:
                problems.append(f"{name}: is not one plain {layout.form} form")
                continue
        if scale != layout.scale:
            problems.append(f"{name}: scale is {scale!r}, the layout says {layout.scale!r}")
    heads = [layout.head] if layout.head_is_coded else [layout.head, layout.head_bias]
    for name in heads if layout.head else []:
        match adapter.deltas[name].forms:
            case (Dense(values=values, mode="set"),):
                found[name] = values
            case _:
                problems.append(f"{name}: is not one dense form of mode 'set'")
    return found


def _coded_problem(values: Values, shape: tuple[int, int], bits: int) -> str:
    if not isinstance(values, Coded):
        return f"is {values.dtype}, not codes. Code it with: edge-lora convert --bits {bits}"
    if values.shape != shape or values.bits != bits:
        return f"is {values.shape} of {values.bits} bits, the layout says {shape} of {bits}"
    if len(values.stats) != 1:
        return f"has {len(values.stats)} groups, the file one for each tensor"
    if not np.allclose(values.book, levels_of("gauss_l1", bits), rtol=0, atol=1e-6):
        return "has another book than 'gauss_l1'"
    return ""


def _write(path: Path, blob: bytes) -> Path:
    with replacing(path) as part:
        part.write_bytes(blob)
    return path
