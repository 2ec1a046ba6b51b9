"""The packed .bin files of the reference: sizes, bytes, round trips, refusals.

No released file is at hand: the oracle is a packer written here from the format's description.
"""

import struct
from dataclasses import replace

import numpy as np
import pytest

from edge_lora import Adapter
from edge_lora.codebook import Coded, encode, levels_of
from edge_lora.errors import AdapterFileError, EdgeLoraError, UnsupportedError
from edge_lora.forms import Bottleneck, Dense, LowRank, to_fp32
from edge_lora.interop.binary_bin import BinLayout, read_bin, transposed, write_bin


def vit(form, **changes):
    """ViT-B/16 with a CIFAR-100 head, by shapes alone."""
    if form == "bottleneck":
        names = [f"blocks.{i}.norm2->blocks.{i}.mlp" for i in range(12)]
    else:
        names = [f"layer.{i}.{n}.weight" for i in range(12) for n in ("query", "value")]
    layout = {"rank": 32, "head": "head.weight", "head_shape": (100, 768), **changes}
    return BinLayout(dict.fromkeys(names, (768, 768)), form, **layout)


def small(form="low_rank", bits=1, coded_head=True):
    return BinLayout(
        {"q.weight": (12, 8), "v.weight": (4, 8)}, form, rank=4, bits=bits, scale=0.1,
        head="head.weight", head_shape=(5, 8), head_is_coded=coded_head,
    )  # fmt: skip


def random_file(layout, seed=0):
    """Pack random tensors as the format says, value by value; return bytes and decoded tensors."""
    rng = np.random.default_rng(seed)
    levels, each = levels_of("gauss_l1", layout.bits), 8 // layout.bits
    blob, tensors = b"", {}
    for name, shape in layout.coded_shapes().items():
        codes = rng.integers(2**layout.bits, size=shape)
        mean, std = np.float32(rng.normal()), np.float32(rng.random())
        flat = codes.flatten().tolist()
        for start in range(0, len(flat), each):
            blob += bytes(
                [sum(c << layout.bits * i for i, c in enumerate(flat[start : start + each]))]
            )
        blob += struct.pack("<f", mean) + struct.pack("<f", std)
        tensors[name] = levels[codes] * std + mean
    if layout.head and not layout.head_is_coded:
        head = rng.standard_normal(layout.head_shape[0] * (layout.head_shape[1] + 1)).astype("<f4")
        blob += head.tobytes()
        tensors["head"] = head
    return blob, tensors


@pytest.mark.parametrize(
    ("layout", "nbytes"),
    [
        (vit("bottleneck"), 83_528),
        (vit("low_rank"), 157_448),
        (vit("bottleneck", head_is_coded=False), 381_520),
    ],
    ids=["AdaptFormer-32, Bi-Head", "LoRA-32, Bi-Head", "AdaptFormer-32, fp32 head"],
)
def test_sizes_are_the_published_ones_and_round_trips_identical(layout, nbytes, tmp_path):
    assert layout.nbytes == nbytes
    path = tmp_path / "in.bin"
    blob = bytearray(np.random.default_rng(1).bytes(nbytes))
    at = 0
    for shape in layout.coded_shapes().values():  # random bytes are rarely sound statistics
        at += shape[0] * shape[1] // 8
        blob[at : at + 8] = struct.pack("<ff", 0.1, 0.2)
        at += 8
    blob[at:] = np.ones((nbytes - at) // 4, "<f4").tobytes()
    path.write_bytes(blob)
    write_bin(read_bin(path, layout), tmp_path / "out.bin", layout)
    assert (tmp_path / "out.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("coded_head", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("form", ["low_rank", "bottleneck"])
def test_reads_what_was_packed_by_hand(form, bits, coded_head, tmp_path):
    layout = small(form, bits, coded_head)
    blob, tensors = random_file(layout)
    path = tmp_path / "cifar-bit1-dim4.bin"
    path.write_bytes(blob)
    adapter = read_bin(path, layout)
    assert adapter.name == "cifar-bit1-dim4"
    assert adapter.base.fingerprint == ""
    for name in layout.places:
        (found,) = adapter.deltas[name].forms
        assert found.scale == 0.1
        down, up = (found.a, to_fp32(found.bt).T) if form == "low_rank" else (found.down, found.up)
        assert np.array_equal(to_fp32(down), tensors[f"{name}/down"])
        assert np.array_equal(to_fp32(up), tensors[f"{name}/up"])
        assert isinstance(found, LowRank if form == "low_rank" else Bottleneck)
    (head,) = adapter.deltas["head.weight"].forms
    assert head.mode == "set"
    if coded_head:
        assert np.array_equal(to_fp32(head.values), tensors["head.weight"])
    else:
        (bias,) = adapter.deltas["head.bias"].forms
        assert np.array_equal(np.append(head.values.flatten(), bias.values), tensors["head"])
    read = Adapter.load(adapter.save(tmp_path / "ours.safetensors"))
    write_bin(read, tmp_path / "again.bin", layout)
    assert (tmp_path / "again.bin").read_bytes() == blob


def test_transposing_codes_is_transposing_values():
    values = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    coded = encode(values, 2)
    assert np.array_equal(transposed(coded).decode(), coded.decode().T)


@pytest.mark.parametrize("change", [-8, -1, 1, 4])
def test_another_length_is_one_clear_error(change, tmp_path):
    layout = small()
    blob, _ = random_file(layout)
    path = tmp_path / "x.bin"
    path.write_bytes(blob[:change] if change < 0 else blob + bytes(change))
    with pytest.raises(
        AdapterFileError, match=rf"x\.bin.*has {len(blob) + change} bytes.*{len(blob)}"
    ):
        read_bin(path, layout)


@pytest.mark.parametrize("stats", [(float("nan"), 1), (0, float("inf")), (0, -1)])
def test_impossible_statistics_are_refused_by_name(stats, tmp_path):
    layout = small()
    blob = bytearray(random_file(layout)[0])
    blob[4:12] = struct.pack("<ff", *stats)
    (tmp_path / "x.bin").write_bytes(blob)
    with pytest.raises(AdapterFileError, match=r"x\.bin[\s\S]*q\.weight: form 0: a has a mean"):
        read_bin(tmp_path / "x.bin", layout)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.bin"):
        with pytest.raises(AdapterFileError, match="is not a file"):
            read_bin(path, small())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"bits": 8}, "bits is 8"), ({"rank": 0}, "rank 0"), ({"rank": 1, "bits": 1}, "whole bytes")],
)
def test_layouts_of_no_file_are_refused(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        replace(small(), **changes)


def test_what_the_file_cannot_say_is_refused_and_nothing_written(tmp_path):
    layout = small()
    (tmp_path / "x.bin").write_bytes(random_file(layout)[0])
    adapter = read_bin(tmp_path / "x.bin", layout)
    (low_rank,), (head,) = (adapter.deltas[n].forms for n in ("q.weight", "head.weight"))

    def with_form(name, form):
        delta = replace(adapter.deltas[name], forms=(form,))
        return replace(adapter, deltas={**adapter.deltas, name: delta})

    fp32 = to_fp32(low_rank.a)
    assert isinstance(low_rank.a, Coded)
    refused = {
        "alpha is 2.0": adapter.scaled(2.0),
        r"q.weight/down: is float32, not codes": with_form("q.weight", replace(low_rank, a=fp32)),
        r"has 4 groups": with_form("q.weight", replace(low_rank, a=encode(fp32, 1, "row"))),
        r"of 2 bits, the layout says \(4, 8\) of 1": with_form(
            "q.weight", replace(low_rank, a=encode(fp32, 2))
        ),
        "another book": with_form(
            "q.weight", replace(low_rank, a=encode(fp32, 1, book="lloyd_max"))
        ),
        "scale is 0.5": with_form("q.weight", replace(low_rank, scale=0.5)),
        "mode 'set'": with_form("head.weight", Dense(head.values)),
        r"v\.weight: not in the adapter": replace(
            adapter, deltas={k: d for k, d in adapter.deltas.items() if k != "v.weight"}
        ),
    }
    for message, bad in refused.items():
        with pytest.raises(UnsupportedError, match=message):
            write_bin(bad, tmp_path / "out.bin", layout)
    with pytest.raises(EdgeLoraError, match="not one plain bottleneck"):
        write_bin(adapter, tmp_path / "out.bin", replace(layout, form="bottleneck"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin"]


def test_what_was_trained_can_be_written(tmp_path):
    torch = pytest.importorskip("torch")
    from edge_lora.methods import attach

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 12), "v": torch.nn.Linear(8, 4)})
    adapter = attach(model, "bilora", rank=4, scale=0.1).lower()
    layout = replace(small(), head="")
    read = read_bin(write_bin(adapter, tmp_path / "x.bin", layout), layout)
    assert (tmp_path / "x.bin").stat().st_size == layout.nbytes
    for name, delta in adapter.deltas.items():
        (ours,), (theirs,) = delta.forms, read.deltas[name].forms
        assert np.array_equal(to_fp32(ours.a), to_fp32(theirs.a))
        assert np.array_equal(to_fp32(ours.bt), to_fp32(theirs.bt))
