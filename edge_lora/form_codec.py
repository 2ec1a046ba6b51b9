"""One form as an entry of a file's header and its tensors; ``adapter_file`` has the whole file.

| form | tensors | beside "form" and "scale" the header has |
|---|---|---|
| low_rank | ``A`` (rank, in), ``Bt`` (rank, out) | ``ranks``, ``rank_scale`` if nested |
| sparse | ``idx`` U8 stream (see ``index_codec``), ``val`` (nnz) | ``mode``, ``index``, ``k`` |
| block | ``idx`` U32 (k), ``val`` | ``mode``, ``axis`` |
| dense | ``val`` | ``mode`` |
| row_scale | ``val`` (out or in) | ``axis`` |
| bottleneck | ``down``, ``up``, perhaps ``down_b``, ``up_b`` | ``act``, ``placement`` |

A tensor of values is F32, F16 or BF16, or coded: then it is U8, the statistics (groups, 2) as
little-endian fp32 followed by the codes, and ``enc`` has its entry: the number of its codebook in
the file's header and the shape that it decodes to, ``"enc": {"A": [0, 16, 576]}``. A codebook is
``{"book": [levels, fp32], "group": "tensor" | "row" | number}``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_lora import index_codec
from edge_lora.codebook import Coded, Group, book_problems, group_count
from edge_lora.errors import AdapterFileError
from edge_lora.forms import (
    CHOICES,
    FORM_NAMES,
    Block,
    Bottleneck,
    Dense,
    Form,
    LowRank,
    RowScale,
    Sparse,
    Values,
    matrix_shape,
    values_of,
)
from edge_lora.strict_json import member, natural, number

Tensors = dict[str, NDArray[Any]]
Head = dict[str, Any]
MAX_AXES = 8
MAX_ELEMENTS = 1 << 32  # an index is a uint32
_CODINGS = ("rice", "line16")
_FILE_NAMES = {
    "a": "A", "bt": "Bt", "values": "val", "down": "down", "up": "up",
    "down_bias": "down_b", "up_bias": "up_b",
}  # fmt: skip


@dataclass
class Codebooks:
    """The codebooks of one file; tensors name them by number."""

    heads: list[Head] = field(default_factory=list)

    def number_of(self, coded: Coded) -> int:
        """Return the number of the book and group of ``coded``, new if need be."""
        head = {"book": [float(level) for level in coded.book], "group": coded.group}
        if head not in self.heads:
            self.heads.append(head)
        return self.heads.index(head)

    @staticmethod
    def decode(heads: list[Any]) -> list[tuple[NDArray[np.float32], Group]]:
        """Return the book and group of every codebook of a header."""
        books: list[tuple[NDArray[np.float32], Group]] = []
        for head in heads:
            levels = member(head, "book", list)
            if len(levels) > 256 or any(type(level) not in (int, float) for level in levels):
                raise AdapterFileError("header is damaged: a codebook is not 2 to 256 numbers")
            with np.errstate(over="ignore"):  # an infinite level is refused like any other
                book = np.array(levels, np.float64).astype(np.float32)
            group = head.get("group")
            if group not in ("tensor", "row"):
                group = natural(group, "group of a codebook")
            if problems := book_problems(book, group):
                raise AdapterFileError(f"codebook {len(books)} has {'; '.join(problems)}")
            books.append((book, group))
        return books


def encode_form(form: Form, shape: tuple[int, ...], books: Codebooks) -> tuple[Head, Tensors]:
    """Return what the header says about a form of a slot of ``shape``, and its tensors."""
    head: Head = {"form": FORM_NAMES[type(form)], "scale": float(form.scale)}
    tensors: Tensors = {}
    encodings: dict[str, list[int]] = {}
    for name, values in values_of(form).items():
        key = _FILE_NAMES[name]
        if isinstance(values, Coded):
            encodings[key] = [books.number_of(values), *values.shape]
            stats = np.ascontiguousarray(values.stats, "<f4").view(np.uint8).reshape(-1)
            tensors[key] = np.concatenate([stats, values.codes])
        else:
            tensors[key] = values
    match form:
        case LowRank(ranks=ranks, rank_scale=rank_scale):
            if ranks:
                head |= {"ranks": list(ranks), "rank_scale": [float(s) for s in rank_scale]}
        case Sparse(indices=indices, mode=mode):
            lines = index_codec.lines_of(indices, matrix_shape(shape))
            tensors["idx"], k = index_codec.rice_encode(indices if lines is None else lines)
            head |= {"mode": mode, "index": "rice" if lines is None else "line16", "k": k}
        case Block(axis=axis, indices=indices, mode=mode):
            tensors["idx"] = indices
            head |= {"mode": mode, "axis": axis}
        case Dense(mode=mode):
            head["mode"] = mode
        case RowScale(axis=axis):
            head["axis"] = axis
        case Bottleneck(act=act, placement=placement):
            head |= {"act": act, "placement": placement}
    return {**head, **({"enc": encodings} if encodings else {})}, tensors


@dataclass(frozen=True)
class FormReader:
    """Reads the forms of one slot out of a file's tensors.

    Attributes:
        tensors: Of the whole file; what a form takes is removed.
        books: ``Codebooks.decode`` of the header.
        shape: Of the slot.
    """

    tensors: Tensors
    books: list[tuple[NDArray[np.float32], Group]]
    shape: tuple[int, ...]

    def read(self, head: Head, prefix: str) -> Form:
        """Return the form that ``head`` describes, whose tensors' names begin with ``prefix``."""
        kind, scale = member(head, "form", str), number(head, "scale")
        encodings = member({"enc": {}, **head}, "enc", dict)

        def take(key: str) -> NDArray[Any]:
            if prefix + key not in self.tensors:
                raise AdapterFileError(f"tensor {prefix + key!r} is missing")
            return self.tensors.pop(prefix + key)

        def values(key: str) -> Values:
            array = take(key)
            return self._coded(key, array, encodings.pop(key)) if key in encodings else array

        decoders: dict[str, Callable[[], Form]] = {
            "low_rank": lambda: LowRank(values("A"), values("Bt"), scale, *_nested(head)),
            "sparse": lambda: self._sparse(head, take("idx"), values("val"), scale),
            "block": lambda: Block(
                _choice(head, "axis"), take("idx"), values("val"), scale, _choice(head, "mode")
            ),
            "dense": lambda: self._dense(values("val"), scale, _choice(head, "mode")),
            "row_scale": lambda: RowScale(values("val"), scale, _choice(head, "axis")),
            "bottleneck": lambda: Bottleneck(
                values("down"),
                values("up"),
                scale,
                _choice(head, "act"),
                _choice(head, "placement"),
                values("down_b") if prefix + "down_b" in self.tensors else None,
                values("up_b") if prefix + "up_b" in self.tensors else None,
            ),
        }
        if kind not in decoders:
            raise AdapterFileError(f"unknown form {kind!r}; known: {sorted(decoders)}")
        form = decoders[kind]()
        if encodings:
            raise AdapterFileError(f"enc names {sorted(encodings)}, no values of this form")
        return form

    def _coded(self, key: str, array: NDArray[Any], encoding: object) -> Coded:
        if array.dtype != np.uint8 or array.ndim != 1:
            raise AdapterFileError(f"{key} is {array.dtype} {array.shape}, coded values are uint8")
        if not isinstance(encoding, list) or not 1 <= len(encoding) <= MAX_AXES + 1:
            raise AdapterFileError(f"enc of {key} is {encoding!r}, must be [codebook, shape …]")
        which, *axes = [natural(n, f"enc of {key}") for n in encoding]
        if which >= len(self.books):
            raise AdapterFileError(f"{key} has codebook {which}, the file has {len(self.books)}")
        (book, group), shape = self.books[which], tuple(axes)
        if prod(shape) > MAX_ELEMENTS:
            raise AdapterFileError(f"{key} is {shape}, which is over 2^32 values")
        length = 8 * group_count(group, shape)
        if length > array.size:
            raise AdapterFileError(
                f"{key} has {array.size} bytes, its statistics alone take {length}"
            )
        stats = array[:length].view("<f4").reshape(-1, 2)
        return Coded(array[length:], stats, book, shape, group)

    def _dense(self, values: Values, scale: float, mode: Any) -> Dense:  # noqa: ANN401
        if isinstance(values, np.ndarray) and values.size == np.prod(self.shape):
            values = values.reshape(self.shape)
        return Dense(values, scale, mode)

    def _sparse(self, head: Head, stream: NDArray[Any], values: Values, scale: float) -> Sparse:
        count = values.size
        out_features, in_features = matrix_shape(self.shape)
        size, line = out_features * in_features, index_codec.LINE
        if stream.dtype != np.uint8 or stream.ndim != 1:
            raise AdapterFileError(f"idx is {stream.dtype} {stream.shape}, must be a uint8 stream")
        k = natural(head.get("k"), "k")
        if _choice(head, "index") == "rice":
            indices = index_codec.rice_decode(stream, count, k, size)
            return Sparse(indices, values, scale, _choice(head, "mode"))
        if out_features % line or count % line:
            raise AdapterFileError(
                "line16 indices need multiples of 16, "
                f"found {(out_features, in_features)} and {count}"
            )
        lines = index_codec.rice_decode(stream, count // line, k, size // line)
        return Sparse(
            index_codec.expand_lines(lines, in_features), values, scale, _choice(head, "mode")
        )


def _nested(head: Head) -> tuple[tuple[int, ...], tuple[float, ...]]:
    given = {"ranks": [], "rank_scale": [], **head}
    ranks = tuple(natural(n, "ranks") for n in member(given, "ranks", list))
    scales = member(given, "rank_scale", list)
    if any(type(scale) not in (int, float) for scale in scales):
        raise AdapterFileError(f"rank_scale is {scales}, must be numbers")
    return ranks, tuple(float(scale) for scale in scales)


def _choice(head: Head, key: str) -> Any:  # noqa: ANN401  (a Literal of the form's)
    known = _CODINGS if key == "index" else CHOICES[key]
    value = member(head, key, str)
    if value not in known:
        raise AdapterFileError(f"unknown {key} {value!r}; known: {', '.join(map(repr, known))}")
    return value
