"""The file by its specification: read here with nothing but json and struct."""

import json
import struct
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Block, Delta, Dense, LowRank, Sparse
from edge_lora.errors import AdapterFileError

RNG = np.random.default_rng(3)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def u32(*values):
    return np.array(values, np.uint32)


def some_adapter():
    line = np.sort(np.arange(16) * 40 + 7).astype(np.uint32)
    return Adapter(
        name="test",
        method="shira",
        base=BaseIdentity("ab" * 32, "tiny"),
        alpha=0.5,
        deltas={
            "q.weight": Delta(
                (32, 40), "F32", (LowRank(normal(4, 40), normal(4, 32), 2.0),), "0" * 16
            ),
            "k.weight": Delta((32, 40), "F32", (Sparse(u32(1, 5, 1279), normal(3, dtype="f2")),)),
            "l.weight": Delta((32, 40), "F32", (Sparse(line, normal(16)),)),
            "v.weight": Delta(
                (32, 40),
                "F32",
                (
                    Block("row", u32(0, 31), normal(2, 40)),
                    Block("col", u32(3), normal(1, 32, dtype=ml_dtypes.bfloat16)),
                ),
            ),
            "n.bias": Delta((7,), "F32", (Dense(normal(7), mode="set"),)),
        },
        provenance={"seed": 7},
        extra={"note": {"unknown": True}},
    )


@pytest.fixture
def path(tmp_path):
    return some_adapter().save(tmp_path / "a.safetensors")


def split(blob):
    size = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def join(header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def edited(path, edit):
    """Rewrite the edge_lora header of the file with ``edit`` applied to it."""
    outer, data = split(path.read_bytes())
    inner = json.loads(outer["__metadata__"]["edge_lora"])
    edit(inner)
    outer["__metadata__"]["edge_lora"] = json.dumps(inner)
    path.write_bytes(join(outer, data))
    return path


def test_round_trip(path):
    before, after = some_adapter_of(path), Adapter.load(path)
    assert after.content_hash == before.content_hash
    assert (after.name, after.method, after.base, after.alpha) == (
        "test",
        "shira",
        before.base,
        0.5,
    )
    assert after.provenance == {"seed": 7}
    assert after.extra == {"note": {"unknown": True}}
    assert after.deltas["q.weight"].slot_hash == "0" * 16


def some_adapter_of(path):
    """The adapter as it was saved: loading and saving again gives the same bytes."""
    loaded = Adapter.load(path)
    again = loaded.save(path.with_name("again.safetensors"))
    assert again.read_bytes() == path.read_bytes()
    return loaded


def test_values_survive_to_the_bit(tmp_path):
    adapter = some_adapter()
    loaded = Adapter.load(adapter.save(tmp_path / "a.safetensors"))
    for slot, delta in adapter.deltas.items():
        for form, back in zip(delta.forms, loaded.deltas[slot].forms, strict=True):
            assert type(back) is type(form)
            for key, value in vars(form).items():
                found = getattr(back, key)
                if isinstance(value, np.ndarray):
                    assert found.dtype == value.dtype
                    assert found.tobytes() == value.tobytes()
                else:
                    assert found == value


def test_the_layout_is_the_specified_one(path):
    outer, _ = split(path.read_bytes())
    header = json.loads(outer["__metadata__"]["edge_lora"])
    assert header["edge_lora"] == 1
    assert outer["q.weight/0/A"]["shape"] == [4, 40]
    assert outer["q.weight/0/Bt"]["shape"] == [4, 32]
    assert outer["k.weight/0/idx"]["dtype"] == "U8"
    assert outer["v.weight/1/val"]["dtype"] == "BF16"
    assert header["slots"]["k.weight"]["forms"][0]["index"] == "rice"
    assert header["slots"]["l.weight"]["forms"][0]["index"] == "line16"


def test_a_slot_names_its_dtype_unless_it_is_fp32(tmp_path):
    one = Dense(np.ones((2, 2), np.float32))
    slots = {name: Delta((2, 2), name, (one,)) for name in ("F32", "BF16")}
    path = Adapter("x", "test", BaseIdentity(""), slots).save(tmp_path / "x.safetensors")
    outer, _ = split(path.read_bytes())
    header = json.loads(outer["__metadata__"]["edge_lora"])
    assert {k: v.get("dtype") for k, v in header["slots"].items()} == {"F32": None, "BF16": "BF16"}
    assert {k: d.dtype for k, d in Adapter.load(path).deltas.items()} == {k: k for k in slots}


def test_no_part_file_is_left(path):
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        replace(some_adapter(), provenance={"loss": float("nan")}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_missing_file(tmp_path):
    with pytest.raises(AdapterFileError, match="does not exist"):
        Adapter.load(tmp_path / "none.safetensors")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match="not a plain file"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 9, 100, -1])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterFileError):
        Adapter.load(path)


def test_junk(path):
    path.write_bytes(RNG.bytes(4096))
    with pytest.raises(AdapterFileError):
        Adapter.load(path)


def test_one_flipped_bit_in_the_tensors(path):
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(AdapterFileError, match="sha256"):
        Adapter.load(path)


def test_plain_safetensors_are_told_how_to_convert(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": normal(2)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match="edge-lora train"):
        Adapter.load(tmp_path / "x.safetensors")


DENSE = {"form": "dense", "scale": 1, "mode": "add"}
EDITS = {
    "unknown version": (lambda h: h.update(edge_lora=2), "format version 2, this reader knows 1"),
    "unknown form": (
        lambda h: h["slots"]["k.weight"]["forms"][0].update(form="magic"),
        "unknown form 'magic'",
    ),
    "unknown mode": (
        lambda h: h["slots"]["k.weight"]["forms"][0].update(mode="mul"),
        "unknown mode 'mul'",
    ),
    "slot dropped": (lambda h: h["slots"].pop("k.weight"), "belongs to no form"),
    "slot invented": (
        lambda h: h["slots"].update(z={"shape": [2, 2], "dtype": "F32", "forms": [DENSE]}),
        "tensor 'z/0/val' is missing",
    ),
    "wrong shape": (
        lambda h: h["slots"]["q.weight"].update(shape=[32, 41]),
        "slot wants (rank, 41)",
    ),
    "no base": (lambda h: h.pop("base"), "missing 'base'"),
    "alpha not finite": (lambda h: h.update(alpha=float("inf")), "Infinity"),
    "slots not a table": (lambda h: h.update(slots=[1]), "header is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_a_header_that_lies(path, case):
    edit, fact = EDITS[case]
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(edited(path, edit))
    assert fact in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_damage_is_listed_at_once(path):
    def edit(header):
        header["slots"]["k.weight"]["forms"][0]["mode"] = "mul"
        header["slots"]["q.weight"]["forms"][0]["form"] = "magic"

    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(edited(path, edit))
    assert "unknown form 'magic'" in str(caught.value)
    assert "unknown mode 'mul'" in str(caught.value)
