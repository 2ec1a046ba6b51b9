"""GGUF adapters: what is written, what is read back, what is refused."""

import struct

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, RowScale, Sparse
from edge_lora.errors import AdapterFileError, EdgeLoraError, UnsupportedError
from edge_lora.interop.gguf import from_gguf, to_gguf
from edge_lora.interop.gguf_file import open_gguf, write_gguf
from edge_lora.interop.gguf_names import (
    ARCHITECTURES,
    GgufBase,
    gguf_name,
    rotated_order,
    slot_name,
)
from edge_lora.quantise import quantise
from edge_lora.reference import delta_of

RNG = np.random.default_rng(0)
MODULES = "self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"
Q, K, UP = (f"model.layers.1.{module}.weight" for module in MODULES)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {Q: (32, 24), K: (16, 24), UP: (40, 24), EMBEDDING: (50, 24), HEAD: (50, 24)}
BASE = GgufBase(head_dim=8)


def low_rank(slot, rank=3, scale=0.25, dtype=np.float32):
    out_features, in_features = SHAPES[slot]
    a, b = RNG.standard_normal((rank, in_features)), RNG.standard_normal((rank, out_features))
    return LowRank(a.astype(dtype), b.astype(dtype), scale)


def adapter_of(forms, alpha=1.0):
    deltas = {
        slot: Delta(SHAPES.get(slot, (32, 24)), "F32", made if isinstance(made, tuple) else (made,))
        for slot, made in forms.items()
    }
    return Adapter("mine", "lora", BaseIdentity("0" * 64, "tiny"), deltas, alpha)


def dense(adapter, slot):
    delta = adapter.deltas[slot]
    weight = np.zeros(delta.shape, np.float32)
    return sum(delta_of(form, weight, adapter.alpha) for form in delta.forms)


@pytest.fixture
def adapter():
    return adapter_of(
        {slot: low_rank(slot, rank, 2.0 / rank) for rank, slot in enumerate(SHAPES, 1)}
    )


def test_round_trip(adapter, tmp_path):
    back = from_gguf(to_gguf(adapter, tmp_path / "x.gguf", BASE), head_dim=8)
    assert (back.name, back.base.fingerprint, list(back.deltas)) == ("mine", "", list(SHAPES))
    for slot in SHAPES:
        np.testing.assert_array_equal(dense(back, slot), dense(adapter, slot))


def test_scales_differ_by_slot_and_by_strength(tmp_path):
    """Ranks 3 and 5 with one rsLoRA alpha: llama.cpp divides by the rank, not by its root."""
    forms = {UP: low_rank(UP, 3, 16 / 3**0.5), HEAD: low_rank(HEAD, 5, 16 / 5**0.5)}
    before = adapter_of(forms, alpha=0.5)
    path = to_gguf(before, tmp_path / "x.gguf", BASE)
    assert open_gguf(path).metadata["adapter.lora.alpha"] == pytest.approx(16 * 3**0.5 * 0.5)
    back = from_gguf(path)
    for slot in forms:
        np.testing.assert_allclose(dense(back, slot), dense(before, slot), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e35, -2.0])
def test_a_first_scale_of_any_size(scale, tmp_path):
    before = adapter_of({UP: low_rank(UP, scale=scale), HEAD: low_rank(HEAD)})
    back = from_gguf(to_gguf(before, tmp_path / "x.gguf", BASE))
    for slot in before.deltas:
        found, expected = dense(back, slot), dense(before, slot)
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_forms_of_one_slot_are_joined_and_codes_decoded(tmp_path):
    before = quantise(adapter_of({UP: (low_rank(UP, 3, 0.5), low_rank(UP, 2, -1.5))}), 4)
    back = from_gguf(to_gguf(before, tmp_path / "x.gguf", BASE))
    assert back.deltas[UP].forms[0].rank == 5
    np.testing.assert_allclose(dense(back, UP), dense(before, UP), atol=1e-5)


def test_fp16_stays_where_nothing_is_folded(tmp_path):
    forms = {UP: low_rank(UP, dtype=np.float16), HEAD: low_rank(HEAD, 5, dtype=np.float16)}
    file = open_gguf(to_gguf(adapter_of(forms), tmp_path / "x.gguf", BASE))
    up, head = gguf_name(UP), gguf_name(HEAD)
    assert file.read(f"{up}.lora_a").dtype == file.read(f"{up}.lora_b").dtype == np.float16
    assert file.read(f"{head}.lora_a").dtype == np.float16
    assert file.read(f"{head}.lora_b").dtype == np.float32


def test_the_gguf_package_reads_the_same(adapter, tmp_path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(to_gguf(adapter, tmp_path / "x.gguf", BASE))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == gguf.GGUFType.ADAPTER
    assert fields["general.architecture"] == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]
    assert fields["adapter.type"] == "lora"
    assert fields[gguf.Keys.Adapter.LORA_ALPHA] == 2.0
    ours = open_gguf(tmp_path / "x.gguf")
    assert [t.name for t in reader.tensors] == list(ours.tensors)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, ours.read(tensor.name))


def test_a_file_of_the_gguf_package_is_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 8.0)
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    a = RNG.standard_normal((4, 24)).astype(np.float16)
    b = RNG.standard_normal((40, 4)).astype(np.float32)
    writer.add_tensor("blk.1.ffn_up.weight.lora_a", a)
    writer.add_tensor("blk.1.ffn_up.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = from_gguf(tmp_path / "x.gguf")
    (form,) = back.deltas[UP].forms
    assert (back.name, form.scale) == ("x", 2.0)
    np.testing.assert_array_equal(form.a, a)
    np.testing.assert_array_equal(form.bt, b.T)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(architecture):
    gguf = pytest.importorskip("gguf")
    (number,) = (n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, 4)
    modules = [
        f"model.layers.3.{module}" for module in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    ]  # fmt: skip
    head = ["lm_head"] if names.get_name("lm_head") else []  # Gemma's is always tied
    for module in [*modules, "model.embed_tokens", *head]:
        expected = f"{names.get_name(module)}.weight"
        assert gguf_name(f"{module}.weight") == expected
        assert slot_name(expected) == f"{module}.weight"


def test_only_a_llama_is_reordered(adapter, tmp_path):
    path = to_gguf(adapter, tmp_path / "x.gguf", GgufBase(8, "qwen2"))
    back = from_gguf(path)  # needs no width of a head
    np.testing.assert_array_equal(dense(back, Q), dense(adapter, Q))
    (form,) = adapter.deltas[Q].forms
    np.testing.assert_array_equal(open_gguf(path).read("blk.1.attn_q.weight.lora_b"), form.bt.T)


def test_rotation_pairs_neighbours():
    """Two heads of four: (0, 2) and (1, 3) turn together in transformers, neighbours in GGUF."""
    order = rotated_order(8, 4)
    pairs = [(head + i, head + i + 2) for head in (0, 4) for i in (0, 1)]
    assert order.reshape(-1, 2).tolist() == [list(pair) for pair in pairs]


def test_without_a_base_rotated_rows_are_refused(adapter, tmp_path):
    path = to_gguf(adapter, tmp_path / "x.gguf", BASE)
    with pytest.raises(UnsupportedError, match="width of a head; give the base"):
        from_gguf(path)


def test_everything_that_cannot_be_written_is_listed(tmp_path):
    sparse = Sparse(np.array([1], np.uint32), np.ones(1, np.float32))
    forms = {
        Q: sparse,
        UP: (low_rank(UP), RowScale(np.ones(40, np.float32))),
        EMBEDDING: low_rank(EMBEDDING),
        "transformer.h.0.attn.c_attn.weight": LowRank(
            np.ones((1, 24), np.float32), np.ones((1, 32), np.float32)
        ),
    }
    path = tmp_path / "x.gguf"
    with pytest.raises(UnsupportedError) as caught:
        to_gguf(adapter_of(forms), path, GgufBase(8, is_tied=True))
    for fact in (
        f"{Q}: form sparse is not low-rank",
        f"{UP}: form row_scale is not low-rank",
        f"{EMBEDDING}: llama.cpp cannot adapt an embedding that is also the output head",
        "transformer.h.0.attn.c_attn.weight: llama.cpp adapts no such weight",
        "--rank R",
    ):
        assert fact in str(caught.value)
    with pytest.raises(UnsupportedError, match="32 rows are not whole heads of 12"):
        to_gguf(adapter_of({Q: low_rank(Q)}), path, GgufBase(12))
    with pytest.raises(UnsupportedError, match="beyond fp32"):
        to_gguf(adapter_of({UP: low_rank(UP), HEAD: low_rank(HEAD, 3, 1e39)}), path, BASE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", [{"head_dim": 8, "architecture": "gpt2"}, {"head_dim": 7}])
def test_an_unknown_base_is_refused(base):
    with pytest.raises(UnsupportedError, match=r"Known: llama, qwen2|must be even"):
        GgufBase(**base)


GOOD = {
    "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora",
    "adapter.lora.alpha": 3.0,
}  # fmt: skip
PAIR = {
    "blk.1.ffn_up.weight.lora_a": np.ones((3, 24), np.float32),
    "blk.1.ffn_up.weight.lora_b": np.ones((40, 3), np.float32),
}
NAN = np.full((40, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"general.architecture": "gpt2"}, {}, "architecture 'gpt2' is not known; known: llama"),
        ({"general.type": "model"}, {}, "general.type is 'model', must be 'adapter'"),
        ({"adapter.type": "control"}, {}, "adapter.type is 'control', must be 'lora'"),
        ({"adapter.lora.alpha": float("nan")}, {}, "alpha is nan"),
        ({"adapter.lora.alpha": 3}, {}, "alpha is 3, must be a finite number"),
        ({}, {"blk.1.ffn_up.weight.lora_b": None}, "lora_b' is missing"),
        ({}, {"blk.1.ffn_up.weight": np.ones((3, 3), np.float32)}, "is no half of a low-rank"),
        ({}, {"blk.1.ffn_up.weight.lora_b": np.ones((40, 2), np.float32)}, "do not pair up"),
        ({}, {"blk.1.ffn_up.weight.lora_b": np.ones(3, np.float32)}, "do not pair up"),
        ({}, {"x.lora_a": np.ones((1, 2), np.float32), "x.lora_b": np.ones((2, 1), np.float32)},
         "'x' is of no weight that is known"),
        ({}, {"blk.1.ffn_up.weight.lora_b": NAN}, "NaN"),
        ({}, dict.fromkeys(PAIR), "no slots"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_such_adapter_is_refused(metadata, tensors, message, tmp_path):
    kept = {name: array for name, array in {**PAIR, **tensors}.items() if array is not None}
    path = write_gguf(tmp_path / "x.gguf", {**GOOD, **metadata}, kept)
    with pytest.raises(AdapterFileError, match=r"x\.gguf") as caught:
        from_gguf(path)
    assert message in str(caught.value)


def head(tensors=0, pairs=0, version=3, body=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def text(value):
    return struct.pack("<Q", len(value)) + value


def tensor(name=b"t", sizes=(1,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "truncated"),
        (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
        (head(version=1), "version 1, this reader knows 2 and 3"),
        (head(tensors=1 << 40), "tensors, at most"),
        (head(pairs=1 << 63), "metadata pairs, at most"),
        (head(pairs=1, body=struct.pack("<Q", 1 << 40)), "bytes in a text, at most"),
        (head(pairs=1, body=text(b"k")), "truncated"),
        (head(pairs=1, body=text(b"k") + struct.pack("<I", 77)), "value has type 77"),
        (head(pairs=1, body=text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 50)), "in a list, at most"),
        (head(pairs=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "has values of type 9"),
        (head(pairs=1, body=text(b"\xff")), "codec can't decode"),
        (head(pairs=2, body=(text(b"k") + struct.pack("<II", 4, 1)) * 2), "'k' stands twice"),
        (head(tensors=2, body=tensor() * 2), "'t' stands twice"),
        (head(tensors=1, body=tensor(sizes=(1,) * 5)), "has 5 axes"),
        (head(tensors=1, body=tensor(sizes=(3, 0))), "has shape (0, 3)"),
        (head(1, 1, 3, text(b"general.alignment") + struct.pack("<II", 4, 0) + tensor()),
         "general.alignment is 0"),
        (head(1, 1, 3, text(b"general.alignment") + struct.pack("<II", 4, 2**32 - 8) + tensor()),
         "general.alignment is 4294967288"),
    ],
)  # fmt: skip
def test_a_damaged_container_is_refused(blob, message, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(blob)
    with pytest.raises(AdapterFileError) as caught:
        open_gguf(path)
    assert message in str(caught.value)
    assert "x.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tensor(sizes=(1 << 40, 1 << 40)), "takes bytes"),
        (tensor(offset=1 << 62), "takes bytes"),
        (tensor(kind=2), "has GGML type 2; known: F32, F16, BF16"),
    ],
)
def test_a_tensor_beyond_the_file_or_of_another_type_is_refused(entry, message, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(head(tensors=1, body=entry) + bytes(64))
    file = open_gguf(path)
    with pytest.raises(AdapterFileError, match=message):
        file.read("t")


def test_a_file_cut_anywhere_is_refused(adapter, tmp_path):
    blob = to_gguf(adapter, tmp_path / "x.gguf", BASE).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in {*range(0, 400, 7), *range(400, len(blob) - 64, 997)}:
        path.write_bytes(blob[:length])
        with pytest.raises(AdapterFileError):
            from_gguf(path, head_dim=8)


def test_damaged_bytes_are_refused_or_other_values(adapter, tmp_path):
    """Nothing but our own errors, whatever a byte is changed into."""
    blob = to_gguf(adapter, tmp_path / "x.gguf", BASE).read_bytes()
    rng = np.random.default_rng(5)
    path, refused = tmp_path / "damaged.gguf", 0
    for _ in range(400):
        damaged = bytearray(blob)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(1200)] = rng.integers(256)  # the header and its neighbourhood
        path.write_bytes(damaged)
        try:
            from_gguf(path, head_dim=8)
        except EdgeLoraError:
            refused += 1
    assert refused > 200


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(AdapterFileError, match=r"none\.gguf' does not exist"):
        from_gguf(tmp_path / "none.gguf")
