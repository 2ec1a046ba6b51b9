"""``convert`` without a base: formats, bits, ranks, and what is refused."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, RowScale, Sparse
from edge_lora.cli import main
from edge_lora.interop.gguf import to_gguf
from edge_lora.interop.gguf_names import GgufBase
from edge_lora.slot_errors import slot_errors, total_error

RNG = np.random.default_rng(0)
SLOTS = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *(str(a) for a in arguments)])


def facts_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def low_rank(rank=8):
    a, b = RNG.standard_normal((rank, 48)), RNG.standard_normal((rank, 96))
    return LowRank(a.astype(np.float32), b.astype(np.float32), 2 / rank)


@pytest.fixture
def adapter():
    deltas = {slot: Delta((96, 48), "F32", (low_rank(),)) for slot in SLOTS}
    return Adapter("mine", "lora", BaseIdentity("0" * 64, "tiny"), deltas)


@pytest.fixture
def source(adapter, tmp_path):
    return adapter.save(tmp_path / "source.safetensors")


def test_bits(source, adapter, tmp_path):
    out = tmp_path / "out.safetensors"
    facts = facts_of(run(source, out, "--bits", 2, "--group", "row", "--json"))
    written = Adapter.load(out)
    assert facts["slot_errors"] == [
        {"slot": e.slot, "relative_error": e.relative} for e in slot_errors(adapter, written)
    ]
    assert facts["relative_error"] == total_error(slot_errors(adapter, written)) > 0.1
    assert (facts["from"], facts["to"], facts["name"]) == ("edge-lora", "edge-lora", "mine")
    assert facts["bytes_before"] == source.stat().st_size
    assert facts["bytes"] == out.stat().st_size < source.stat().st_size / 4
    assert written.deltas[SLOTS[0]].forms[0].a.group == "row"


@pytest.mark.parametrize("group", ["tensor", 24])
def test_groups_and_books(source, tmp_path, group):
    out = tmp_path / "out.safetensors"
    assert run(source, out, "--bits", 4, "--group", group, "--book", "lloyd_max").exit_code == 0
    coded = Adapter.load(out).deltas[SLOTS[0]].forms[0].a
    assert (coded.bits, coded.group) == (4, group)
    assert Adapter.load(out).provenance["quantised"]["book"] == "lloyd_max"


def test_rank(source, adapter, tmp_path):
    out = tmp_path / "out.safetensors"
    facts = facts_of(run(source, out, "--rank", 3, "--json"))
    assert facts["ranks"] == [3, 3]
    assert facts["values"] == facts["values_before"] * 3 // 8
    assert facts["relative_error"] == pytest.approx(facts["discarded_energy"] ** 0.5, rel=1e-5)
    assert [s["rank_before"] for s in facts["squeezed"]] == [8, 8, 8]


def test_energy_and_bits_together(source, tmp_path):
    out = tmp_path / "out.safetensors"
    facts = facts_of(run(source, out, "--energy", 0.8, "--bits", 8, "--json"))
    assert 0 < facts["discarded_energy"] <= 0.2
    form = Adapter.load(out).deltas[SLOTS[0]].forms[0]
    assert (form.rank, form.a.bits) == (facts["squeezed"][0]["rank"], 8)


def test_to_peft_and_back(source, adapter, tmp_path):
    folder, back = tmp_path / "peft", tmp_path / "back.safetensors"
    assert facts_of(run(source, folder, "--json"))["to"] == "peft"
    facts = facts_of(run(folder, back, "--name", "mine again", "--json"))
    assert (facts["from"], facts["name"]) == ("peft", "mine again")
    found = Adapter.load(back)
    assert found.base.fingerprint == ""
    assert total_error(slot_errors(adapter, found)) < 1e-7
    assert run(source, folder).exit_code == 0, "its two files are replaced"


def test_from_gguf(adapter, tmp_path):
    path = to_gguf(adapter, tmp_path / "x.gguf", GgufBase(8))
    facts = facts_of(run(path, tmp_path / "x.safetensors", "--json"))
    assert (facts["from"], facts["relative_error"]) == ("gguf", pytest.approx(0, abs=1e-12))


def test_suffixes_are_overruled_by_to(source, tmp_path):
    out = tmp_path / "mine.bin"
    assert run(source, out, "--to", "edge-lora").exit_code == 0
    assert Adapter.load(out).name == "mine"


def test_plain_lines_in_a_pipe(source, tmp_path):
    result = run(source, tmp_path / "out.safetensors", "--rank", 2)
    lines = result.stdout.splitlines()
    assert "ranks: 2 to 2" in lines
    assert "slot\trank\trelative error" in lines
    assert "writing" in result.stderr
    same = run(source, tmp_path / "same.safetensors")
    assert "slot\trank\trelative error" not in same.stdout.splitlines(), "nothing is lost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "2", "--energy", "0.9"], "either --rank or --energy"),
        (["--bits", "3"], "'3' is not one of"),
        (["--bits", "4", "--group", "0"], "'0' is not 'tensor', 'row' or a number"),
        (["--bits", "4", "--to", "peft"], "--bits is for our own files; peft files hold no codes"),
        (["--to", "gguf"], "--to gguf needs --base BUNDLE"),
        (["--to", "onnx"], "--to onnx needs --base BUNDLE"),
        (["--prompt", "x"], "--prompt needs --base BUNDLE"),
        (["--energy", "0"], "0<x<=1"),
    ],
)
def test_usage_errors_exit_with_2(source, tmp_path, options, message):
    result = run(source, tmp_path / "out.safetensors", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == [source]


def refused(result, *facts):
    assert result.exit_code == 1, result.output
    assert result.stderr.count("Error: ") == 1
    for fact in facts:
        assert fact in result.stderr


def test_what_is_in_the_way_is_never_lost(source, tmp_path):
    before = source.read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    refused(run(source, source, "--bits", 4), "OUT is SOURCE")
    refused(run(source, folder, "--to", "edge-lora"), "is a folder, and edge-lora is a file")
    refused(run(source, folder), "exists and is no PEFT folder")
    refused(run(source, tmp_path / "none" / "x.safetensors"), "there is no folder")
    assert source.read_bytes() == before
    assert [f.name for f in folder.iterdir()] == ["thesis.txt"]


def test_bad_sources_are_refused(tmp_path):
    out = tmp_path / "out.safetensors"
    refused(run(tmp_path / "none.safetensors", out), "none.safetensors' does not exist")
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "empty", out), "empty")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(50))
    refused(run(tmp_path / "junk.gguf", out), "junk.gguf", "version 0")
    (tmp_path / "junk").write_bytes(b"\xff" * 99)
    refused(run(tmp_path / "junk", out), "junk")
    assert not out.exists()


def test_what_a_target_cannot_hold_is_refused_whole(tmp_path):
    sparse = Sparse(np.array([3], np.uint32), np.ones(1, np.float32))
    deltas = {
        SLOTS[0]: Delta((96, 48), "F32", (low_rank(), RowScale(np.ones(96, np.float32)))),
        SLOTS[1]: Delta((96, 48), "F32", (sparse,)),
    }
    path = Adapter("x", "mixed", BaseIdentity(""), deltas).save(tmp_path / "x.safetensors")
    refused(run(path, tmp_path / "folder"), SLOTS[0], SLOTS[1])
    assert list(tmp_path.iterdir()) == [path]


def test_a_misspelt_suffix_is_no_peft_folder(source, tmp_path):
    result = run(source, tmp_path / "x.safetensor")
    assert result.exit_code == 2
    assert "'.safetensor', which is none of .safetensors, .gguf, .onnx_adapter" in result.stderr
    assert run(source, tmp_path / "v1.2", "--to", "peft").exit_code == 0


@pytest.mark.parametrize("option", [("--group", "row"), ("--book", "lloyd_max")])
def test_how_to_code_without_bits_is_a_usage_error(option, source, tmp_path):
    result = run(source, tmp_path / "x.safetensors", *option)
    assert result.exit_code == 2
    assert "give --bits too" in result.stderr


def test_what_nobody_may_want_is_told(source, tmp_path):
    result = run(source, tmp_path / "x.safetensors", "--rank", 1, "--bits", 1)
    assert result.exit_code == 0
    assert "% off. Use more bits or a higher rank" in result.stderr
    assert "no smaller" not in result.stderr
    assert "no smaller" in run(source, tmp_path / "y.safetensors").stderr
