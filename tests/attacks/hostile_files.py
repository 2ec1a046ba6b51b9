"""Adapter files that no reader may trust, one function or entry each."""

import hashlib
import json
import struct

import numpy as np

TWO_ONES = bytes([0b01, 0b11])  # gaps 1 and 0 at k = 1: indices 1 and 2
FLOATS = np.arange(1, 7, dtype=np.float32).tobytes()


def sparse_head(**changes):
    return {"form": "sparse", "mode": "add", "scale": 1.0, "index": "rice", "k": 1, **changes}


def low_rank_head(**changes):
    return {"form": "low_rank", "scale": 1.0, **changes}


def block_head(**changes):
    return {"form": "block", "mode": "add", "scale": 1.0, "axis": "row", **changes}


def dense_head(**changes):
    return {"form": "dense", "mode": "add", "scale": 1.0, **changes}


def low_rank_tensors(a=("F32", [1, 3]), bt=("F32", [1, 2])):
    return {"w/0/A": (*a, FLOATS[:12]), "w/0/Bt": (*bt, FLOATS[:8])}


def sparse_tensors(stream=TWO_ONES, count=2, index_dtype="U8", value_dtype="F32", shape=None):
    size = {"F32": 4, "F16": 2}[value_dtype]
    values = np.ones(count, {"F32": "<f4", "F16": "<f2"}[value_dtype]).tobytes()
    assert len(values) == size * count
    width = {"U8": 1, "I16": 2, "I32": 4, "U32": 4, "I64": 8}[index_dtype]
    return {
        "w/0/idx": (index_dtype, [len(stream) // width], stream),
        "w/0/val": (value_dtype, [count] if shape is None else shape, values),
    }


def block_tensors(indices=(0,), width=3, dtype="U32"):
    data = np.array(indices, "<u4").tobytes()
    values = np.ones(len(indices) * width, np.float32).tobytes()
    return {
        "w/0/idx": (dtype, [len(indices)], data),
        "w/0/val": ("F32", [len(indices), width], values),
    }


def outer_of(tensors):
    """Return safetensors entries and data of name -> (dtype, shape, bytes)."""
    entries, data = {}, b""
    for name, (dtype, shape, blob) in tensors.items():
        offsets = [len(data), len(data) + len(blob)]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += blob
    return entries, data


def inner_of(data, forms, **changes):
    """Return the edge_lora header; a change to None leaves the key out."""
    header = {
        "edge_lora": 1,
        "name": "t",
        "method": "m",
        "base": {"id": "b", "sha256": "00"},
        "alpha": 1.0,
        "slots": {"w": {"shape": [2, 3], "dtype": "F32", "forms": forms}},
        "provenance": {},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        **changes,
    }
    return {key: value for key, value in header.items() if value is not None}


def file_of(outer, data, inner=None):
    """Join a file; ``outer`` and ``inner`` are JSON text or objects."""
    if inner is not None:
        text = inner if isinstance(inner, str) else json.dumps(inner)
        outer = {"__metadata__": {"edge_lora": text}, **outer}
    head = outer if isinstance(outer, bytes) else json.dumps(outer).encode()
    return struct.pack("<Q", len(head)) + head + data


def adapter(forms=None, tensors=None, shape=None, slot="w", **changes):
    """Return a file that is sound unless an argument makes it otherwise."""
    forms = [sparse_head()] if forms is None else forms
    outer, data = outer_of(sparse_tensors() if tensors is None else tensors)
    if shape is not None or slot != "w":
        entry = {"shape": shape or [2, 3], "dtype": "F32", "forms": forms}
        changes = {"slots": {slot: entry}, **changes}
    return file_of(outer, data, inner_of(data, forms, **changes))


def with_entry(name, **changes):
    """Change one safetensors entry of a sound file."""
    outer, data = outer_of(sparse_tensors())
    outer[name] = {**outer[name], **changes}
    return file_of(outer, data, inner_of(data, [sparse_head()]))


def with_outer_text(old, new, inner=True):
    """Change the text of the safetensors header of a sound file."""
    outer, data = outer_of(sparse_tensors())
    header = {"__metadata__": {"edge_lora": json.dumps(inner_of(data, [sparse_head()]))}, **outer}
    text = json.dumps(header if inner else outer)
    assert old in text
    return file_of(text.replace(old, new, 1).encode(), data)


def with_inner_text(old, new):
    """Change the text of the edge_lora header of a sound file."""
    outer, data = outer_of(sparse_tensors())
    text = json.dumps(inner_of(data, [sparse_head()]))
    assert old in text
    return file_of(outer, data, text.replace(old, new, 1))


def nested(depth):
    """Return provenance so deep that the header nests ``depth`` levels."""
    value = {}
    for _ in range(depth - 2):
        value = {"a": value}
    return value


SOUND = {
    "sparse": adapter(),
    "low rank": adapter([low_rank_head()], low_rank_tensors()),
    "block": adapter([block_head()], block_tensors()),
    "dense": adapter([dense_head()], {"w/0/val": ("F32", [2, 3], FLOATS)}),
    "dense of another shape but as many": adapter(
        [dense_head()], {"w/0/val": ("F32", [6], FLOATS)}
    ),
    "dense that replaces": adapter([dense_head(mode="set")], {"w/0/val": ("F32", [6], FLOATS)}),
    "no entries": adapter([sparse_head(k=0)], sparse_tensors(b"", 0)),
    "no rows": adapter([block_head()], block_tensors(())),
    "unknown keys": adapter(future={"x": [1, None]}),
    "deep": adapter(provenance=nested(64)),
    "spaces around the header": with_outer_text('{"__m', ' \n{"__m'),
    "strange slot name": adapter(
        slot="../../é\u2028/w",
        tensors={f"../../é\u2028/{k}": v for k, v in sparse_tensors().items()},
    ),
    "unaligned values": adapter(
        [sparse_head(), low_rank_head()],
        {
            "w/0/idx": ("U8", [2], TWO_ONES),
            "w/0/val": ("F16", [2], b"\x00\x3c" * 2),
            **{k.replace("/0/", "/1/"): v for k, v in low_rank_tensors().items()},
        },
    ),
    "negative scale, integer alpha": adapter([sparse_head(scale=-2)], alpha=3),
    "rank above the sizes": adapter(
        [low_rank_head()],
        {
            "w/0/A": ("F32", [9, 3], np.ones(27, np.float32).tobytes()),
            "w/0/Bt": ("F32", [9, 2], np.ones(18, np.float32).tobytes()),
        },
    ),
}

CONTAINER = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "only a size": struct.pack("<Q", 0) + b"\0\0",
    "header size 2^60": struct.pack("<Q", 1 << 60) + b"{}",
    "header size 2^64-1": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "header longer than the file": struct.pack("<Q", 3) + b"{}",
    "header over the cap": struct.pack("<Q", (64 << 20) + 1) + b" " * ((64 << 20) + 1),
    "big-endian header size": struct.pack(">Q", 2) + b"{}",
    "header of no tensors": struct.pack("<Q", 2) + b"{}",
    "not UTF-8": file_of(b'{"\xff": 1}', b""),
    "byte order mark": with_outer_text('{"__m', '\ufeff{"__m'),
    "UTF-16": file_of('{"a": {}}'.encode("utf-16"), b""),
    "not an object": file_of(b"[1, 2, 3]", b""),
    "a number": file_of(b"12345", b""),
    "not JSON": file_of(b"{'a': 1}", b""),
    "comment": with_outer_text("{", "{/* */"),
    "trailing comma": with_outer_text("}}", "},}"),
    "zero byte behind the header": file_of(b"{}\0 {", b""),
    "nested 100,000 deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "unclosed 100,000 deep": file_of(b"[" * 100_000, b""),
    "metadata missing": with_outer_text("w/0/idx", "w/0/idx", inner=False),
    "metadata of numbers": with_outer_text('{"edge_lora"', '{"n": 1, "edge_lora"'),
    "metadata null": file_of(b'{"__metadata__": null}', b""),
    "metadata a list": file_of(b'{"__metadata__": []}', b""),
    "duplicate tensor": with_outer_text(
        '"w/0/val"', '"w/0/val": {"dtype":"U8","shape":[8],"data_offsets":[2,10]}, "w/0/val"'
    ),
    "duplicate dtype": with_outer_text('"dtype": "U8"', '"dtype": "U8", "dtype": "U8"'),
    "duplicate metadata": with_outer_text('"__metadata__"', '"__metadata__": {}, "__metadata__"'),
    "truncated in a tensor": adapter()[:-3],
    "trailing byte": adapter() + b"\0",
    "hole": with_entry("w/0/val", data_offsets=[3, 11]),
    "overlap": with_entry("w/0/val", data_offsets=[1, 9]),
    "begin behind end": with_entry("w/0/val", data_offsets=[10, 2]),
    "offset past the file": with_entry("w/0/val", data_offsets=[1 << 40, (1 << 40) + 8]),
    "offset near 2^64": with_entry("w/0/val", data_offsets=[(1 << 64) - 8, (1 << 64) - 1]),
    "offset above 2^64": with_entry("w/0/val", data_offsets=[2, 1 << 70]),
    "negative offset": with_entry("w/0/idx", data_offsets=[-1, 2]),
    "three offsets": with_entry("w/0/val", data_offsets=[2, 10, 10]),
    "one offset": with_entry("w/0/val", data_offsets=[2]),
    "offsets of text": with_entry("w/0/val", data_offsets=["2", "10"]),
    "negative dimension": with_entry("w/0/val", shape=[-2]),
    "fractional dimension": with_entry("w/0/val", shape=[2.0]),
    "minus zero": with_outer_text('"shape": [2]', '"shape": [-0]'),
    "shape product overflows to 4": with_entry(
        "w/0/val", shape=[4194305, 4194305, 211106198978564]
    ),
    "huge shape, small data": with_entry("w/0/val", shape=[1_000_000]),
    "nine axes": with_entry("w/0/val", shape=[2, 1, 1, 1, 1, 1, 1, 1, 1]),
    "unknown dtype": with_entry("w/0/val", dtype="F33"),
    "dtype that is not ours": with_entry("w/0/val", dtype="I32"),
    "dtype of another size": with_entry("w/0/val", dtype="F16"),
    "dtype missing": with_outer_text('"dtype": "U8", ', ""),
    "entry null": with_outer_text('"w/0/val": {', '"w/0/xxx": null, "w/0/val": {'),
}

IDENTITY = {
    "no edge_lora header": file_of(*outer_of(sparse_tensors())),
    "header not JSON": with_inner_text("{", "{{"),
    "header a list": file_of({"__metadata__": {"edge_lora": "[]"}}, b""),
    "header with a byte order mark": with_inner_text("{", "\ufeff{"),
    "header with a duplicate key": with_inner_text('"alpha"', '"alpha": 5, "alpha"'),
    "duplicate slot": with_inner_text('"w":', '"w": {}, "w":'),
    "future version": adapter(edge_lora=2),
    "version as text": adapter(edge_lora="1"),
    "version as a float": with_inner_text('"edge_lora": 1', '"edge_lora": 1.0'),
    "version true": adapter(edge_lora=True),
    "version missing": adapter(edge_lora=None),
    "too deep": adapter(provenance=nested(65)),
    "NaN": with_inner_text('"alpha": 1.0', '"alpha": NaN'),
    "infinity": with_inner_text('"alpha": 1.0', '"alpha": -Infinity'),
    "number too large": with_inner_text('"alpha": 1.0', '"alpha": 1e999'),
    "huge whole number": with_inner_text('"alpha": 1.0', f'"alpha": 1{"0" * 400}'),
    "broken surrogate": with_inner_text('"t"', '"\\ud800"'),
    "alpha as text": adapter(alpha="1.0"),
    "alpha true": adapter(alpha=True),
    "alpha missing": adapter(alpha=None),
    "name missing": adapter(name=None),
    "name a number": adapter(name=3),
    "method missing": adapter(method=None),
    "base missing": adapter(base=None),
    "base text": adapter(base="00"),
    "base without a hash": adapter(base={"id": "b"}),
    "base id a number": adapter(base={"id": 1, "sha256": "00"}),
    "provenance a list": adapter(provenance=[]),
    "hash missing": adapter(tensors_sha256=None),
    "hash of other bytes": adapter(tensors_sha256="0" * 64),
    "hash in capitals": adapter(tensors_sha256=hashlib.sha256(TWO_ONES).hexdigest().upper()),
    "flipped bit": adapter()[:-1] + b"\x3e",
    "slots a list": adapter(slots=[]),
    "slots missing": adapter(slots=None),
    "no slots": file_of({}, b"", inner_of(b"", [], slots={})),
    "slot null": adapter(slots={"w": None}),
    "control character in a slot's name": adapter(
        slot="w\n", tensors={k.replace("w", "w\n"): v for k, v in sparse_tensors().items()}
    ),
    "zero byte in a slot's name": adapter(
        slot="w\0", tensors={k.replace("w", "w\0"): v for k, v in sparse_tensors().items()}
    ),
    "slot hash a number": adapter(
        slots={"w": {"shape": [2, 3], "dtype": "F32", "forms": [sparse_head()], "hash": 5}}
    ),
    "slot dtype not text": adapter(
        slots={"w": {"shape": [2, 3], "dtype": 5, "forms": [sparse_head()]}}
    ),
}

FORMS = {
    "no forms": adapter([], {}),
    "forms an object": adapter({"0": sparse_head()}),
    "form null": adapter([None]),
    "unknown form": adapter([sparse_head(form="hadamard")]),
    "unknown mode": adapter([sparse_head(mode="multiply")]),
    "mode missing": adapter([{k: v for k, v in sparse_head().items() if k != "mode"}]),
    "scale missing": adapter([{k: v for k, v in sparse_head().items() if k != "scale"}]),
    "scale as text": adapter([sparse_head(scale="2")]),
    "scale for set": adapter([sparse_head(mode="set", scale=2.0)]),
    "set with another form": adapter(
        [sparse_head(mode="set"), dense_head()],
        {**sparse_tensors(), "w/1/val": ("F32", [2, 3], FLOATS)},
    ),
    "tensor missing": adapter(tensors={"w/0/val": ("F32", [2], FLOATS[:8])}),
    "tensor that belongs to no form": adapter(
        tensors={**sparse_tensors(), "w/1/val": ("F32", [0], b"")}
    ),
    "empty shape product": adapter([sparse_head()], sparse_tensors(b"", 0), shape=[0, 3]),
    "negative slot shape": adapter(shape=[-2, -3]),
    "fractional slot shape": adapter(shape=[2.0, 3]),
    "slot shape of text": adapter(shape=["2", "3"]),
    "slot shape true": adapter(shape=[True, 6]),
    "slot over 2^32 values": adapter(shape=[1 << 16, (1 << 16) + 1]),
    "slot shape overflows": adapter(shape=[1 << 40, 1 << 40]),
    "slot of nine axes": adapter(shape=[2, 3, 1, 1, 1, 1, 1, 1, 1]),
    "rank 0": adapter(
        [low_rank_head()], {"w/0/A": ("F32", [0, 3], b""), "w/0/Bt": ("F32", [0, 2], b"")}
    ),
    "ranks differ": adapter(
        [low_rank_head()],
        {"w/0/A": ("F32", [2, 3], FLOATS), "w/0/Bt": ("F32", [1, 2], FLOATS[:8])},
    ),
    "A transposed": adapter([low_rank_head()], low_rank_tensors(a=("F32", [3, 1]))),
    "A of one axis": adapter([low_rank_head()], low_rank_tensors(a=("F32", [3]))),
    "A of bytes": adapter([low_rank_head()], low_rank_tensors(a=("U8", [1, 12]))),
    "A of integers": adapter([low_rank_head()], low_rank_tensors(a=("U32", [1, 3]))),
    "Bt missing": adapter([low_rank_head()], {"w/0/A": ("F32", [1, 3], FLOATS[:12])}),
    "NaN in values": adapter(
        [dense_head()], {"w/0/val": ("F32", [6], FLOATS[:20] + struct.pack("<f", float("nan")))}
    ),
    "infinity in fp16": adapter([dense_head()], {"w/0/val": ("F16", [6], b"\x00\x7c" * 6)}),
    "NaN in bf16": adapter([dense_head()], {"w/0/val": ("BF16", [6], b"\xc0\x7f" * 6)}),
    "dense too short": adapter([dense_head()], {"w/0/val": ("F32", [5], FLOATS[:20])}),
    "block axis": adapter([block_head(axis="diagonal")], block_tensors()),
    "block rows as columns": adapter([block_head(axis="col")], block_tensors()),
    "block index out of range": adapter([block_head()], block_tensors((2,))),
    "block index 2^32-1": adapter([block_head()], block_tensors((0xFFFFFFFF,))),
    "block unsorted": adapter([block_head()], block_tensors((1, 0))),
    "block duplicated": adapter([block_head()], block_tensors((1, 1))),
    "block of signed indices": adapter([block_head()], block_tensors(dtype="I32")),
    "block of float indices": adapter([block_head()], block_tensors(dtype="F32")),
}

INDICES = {
    "out of range": adapter(tensors=sparse_tensors(bytes([0b01, 0b1100])), shape=[1, 3]),
    "gap far out of range": adapter(tensors=sparse_tensors(bytes([0]) + bytes(1000) + b"\x03")),
    "gap overflows 64 bits": adapter(
        [sparse_head(k=31)], sparse_tensors(bytes(8) + bytes(1 << 13) + b"\x03")
    ),
    "too few": adapter(tensors=sparse_tensors(bytes([0b01, 0b01]))),
    "too many": adapter(tensors=sparse_tensors(bytes([0b01, 0b111]))),
    "more than the slot": adapter([sparse_head(k=0)], sparse_tensors(b"\x7f", 7)),
    "no ones": adapter(tensors=sparse_tensors(bytes([0b01, 0]))),
    "low padding set": adapter(tensors=sparse_tensors(bytes([0b101, 0b11]))),
    "trailing byte": adapter(tensors=sparse_tensors(TWO_ONES + b"\0")),
    "stream missing": adapter(tensors=sparse_tensors(b"")),
    "stream for no values": adapter([sparse_head(k=0)], sparse_tensors(b"\0", 0)),
    "k negative": adapter([sparse_head(k=-1)]),
    "k 32": adapter([sparse_head(k=32)]),
    "k 2^63": adapter([sparse_head(k=1 << 63)]),
    "k a float": adapter([sparse_head(k=1.0)]),
    "k missing": adapter([{key: v for key, v in sparse_head().items() if key != "k"}]),
    "unknown coding": adapter([sparse_head(index="flat32")]),
    "coding missing": adapter([{k: v for k, v in sparse_head().items() if k != "index"}]),
    "int64 indices": adapter(tensors=sparse_tensors(bytes(16), index_dtype="I64")),
    "int16 indices": adapter(tensors=sparse_tensors(bytes(4), index_dtype="I16")),
    "uint32 indices": adapter(tensors=sparse_tensors(bytes(8), index_dtype="U32")),
    "stream of two axes": adapter(
        tensors={**sparse_tensors(), "w/0/idx": ("U8", [2, 1], TWO_ONES)}
    ),
    "values of two axes": adapter(tensors=sparse_tensors(shape=[2, 1])),
    "lines of 15 outputs": adapter(
        [sparse_head(index="line16", k=0)], sparse_tensors(b"\x01", 16), shape=[15, 3]
    ),
    "lines of 17 values": adapter(
        [sparse_head(index="line16", k=0)], sparse_tensors(b"\x01", 17), shape=[16, 3]
    ),
    "line out of range": adapter(
        [sparse_head(index="line16", k=0)], sparse_tensors(b"\x08", 16), shape=[16, 3]
    ),
}

HOSTILE = {
    f"{group}: {name}": blob
    for group, files in (
        ("container", CONTAINER),
        ("identity", IDENTITY),
        ("forms", FORMS),
        ("indices", INDICES),
    )
    for name, blob in files.items()
}
