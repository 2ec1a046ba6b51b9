"""Bad input on the command line: exit code 1, one message that names the thing, nothing changed."""

import dataclasses
import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora import Adapter, BaseIdentity, LowRank
from edge_lora.cli import main
from edge_lora.runtime import open_bundle

SLOT = "2.weight"  # (48, 48)


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result, *facts):
    """Assert exit code 1 and one message with all ``facts``."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.output
    for fact in facts:
        assert fact in result.stderr, result.stderr


def content_of(folder):
    """Return every file's bytes and times."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def bundle(mlp_bundle, tmp_path):
    """Return a copy of the small bundle that a test may damage."""
    return shutil.copytree(mlp_bundle, tmp_path / "bundle")


@pytest.fixture
def check(mlp_bundle):
    """Return a function: both ways to give an adapter to a bundle refuse it and change nothing."""

    def check(adapter, *facts, verbs=("verify", "bench")):
        before = content_of(adapter.parent), content_of(mlp_bundle)
        for verb in verbs:
            refused(run(verb, mlp_bundle, adapter), *facts)
        assert (content_of(adapter.parent), content_of(mlp_bundle)) == before
        with open_bundle(mlp_bundle, threads=1) as session:
            image, state = session.image_sha256(), session.state_id
            with pytest.raises(Exception) as caught:  # noqa: PT011  (the facts are compared)
                session.load_adapter(adapter, "x")
            for fact in facts:
                assert fact in str(caught.value)
            assert (session.image_sha256(), session.state_id) == (image, state)
            assert session.adapters == []

    return check


def edit_header(path, out, edit):
    """Write a copy of an adapter file after ``edit(header, outer, data)``, with the right hash."""
    blob = path.read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    outer, data = json.loads(blob[8 : 8 + size]), bytearray(blob[8 + size :])
    header = json.loads(outer["__metadata__"]["edge_lora"])
    edit(header, outer, data)
    header["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    outer["__metadata__"]["edge_lora"] = json.dumps(header)
    head = json.dumps(outer).encode()
    out.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return out


def overwrite(name, array):
    """Return an edit that replaces the first bytes of one tensor."""

    def edit(header, outer, data):
        begin, end = outer[name]["data_offsets"]
        raw = np.asarray(array).tobytes()
        assert len(raw) <= end - begin
        data[begin : begin + len(raw)] = raw

    return edit


def changed(path, out, **fields):
    return dataclasses.replace(Adapter.load(path), **fields).save(out)


def test_adapter_of_another_base(check, make_mlp_adapter, tmp_path):
    base = BaseIdentity("0" * 64, "somebody-else")
    path = changed(make_mlp_adapter(), tmp_path / "a.safetensors", base=base)
    check(path, "trained on another base", "somebody-else")


def test_adapter_for_a_slot_that_is_not_there(check, make_mlp_adapter, tmp_path):
    deltas = Adapter.load(make_mlp_adapter()).deltas
    path = tmp_path / "a.safetensors"
    changed(make_mlp_adapter(), path, deltas={"22.weight": deltas[SLOT]})
    check(path, "22.weight: no such slot (close: 2.weight)", "inspect BUNDLE --slots")


def test_adapter_of_a_wrong_shape(check, make_mlp_adapter, tmp_path):
    source = Adapter.load(make_mlp_adapter())
    form = LowRank(np.ones((2, 7), np.float32), np.ones((2, 48), np.float32))
    delta = dataclasses.replace(source.deltas[SLOT], shape=(48, 7), forms=(form,))
    path = changed(make_mlp_adapter(), tmp_path / "a.safetensors", deltas={SLOT: delta})
    check(path, "2.weight: made for shape (48, 7), slot is (48, 48)")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adapter_with_values_that_are_no_numbers(check, make_mlp_adapter, tmp_path, value):
    edit = overwrite(f"{SLOT}/0/val", np.float32(value))
    path = edit_header(make_mlp_adapter("line"), tmp_path / "bad.safetensors", edit)
    check(path, "bad.safetensors", SLOT, "NaN or infinity")


@pytest.mark.parametrize(
    "indices",
    [[1, 2, 9999], [3, 2, 1], [2, 2, 3]],
    ids=["out of range", "unsorted", "duplicated"],
)
def test_adapter_with_bad_indices(check, make_mlp_adapter, tmp_path, indices):
    edit = overwrite(f"{SLOT}/0/idx", np.array(indices, np.uint32))
    path = edit_header(make_mlp_adapter("rows"), tmp_path / "bad.safetensors", edit)
    check(path, "bad.safetensors", SLOT)


def test_adapter_whose_packed_indices_leave_the_slot(check, make_mlp_adapter, tmp_path):
    def widen(header, outer, data):
        header["slots"][SLOT]["forms"][0]["k"] += 4

    path = edit_header(make_mlp_adapter(), tmp_path / "bad.safetensors", widen)
    check(path, "bad.safetensors", SLOT)


def test_adapter_of_an_unknown_format_version(check, make_mlp_adapter, tmp_path):
    edited = edit_header(
        make_mlp_adapter(), tmp_path / "new.safetensors", lambda h, *_: h.update(edge_lora=2)
    )
    check(edited, "new.safetensors", "version 2")


@pytest.mark.parametrize("content", ["empty", "truncated", "junk", "text"])
def test_adapter_file_that_is_no_adapter(check, make_mlp_adapter, tmp_path, content):
    sound = make_mlp_adapter().read_bytes()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(
        {
            "empty": b"",
            "truncated": sound[: len(sound) // 2],
            "junk": np.random.default_rng(0).bytes(5000),
            "text": b"<!doctype html><html>404 not found</html>" * 10,
        }[content]
    )
    check(path, "bad.safetensors")


def test_adapter_without_effect(check, make_mlp_adapter, tmp_path):
    path = changed(make_mlp_adapter(), tmp_path / "a.safetensors", alpha=0.0)
    check(path, "no effect", "inspect FILE", verbs=["bench"])


def test_adapter_file_that_is_missing(check, tmp_path):
    path = tmp_path / "none.safetensors"
    check(path, "none.safetensors")


@pytest.mark.parametrize("named", ["{path}", "skill={path}", "skill={path}:0.5"])
def test_argument_with_a_missing_file(mlp_bundle, tmp_path, named):
    argument = named.format(path=tmp_path / "none.safetensors")
    refused(run("bench", mlp_bundle, argument), "none.safetensors", "does not exist")


@pytest.mark.parametrize("keep_time", [False, True], ids=["", "time restored"])
def test_bundle_changed_after_export(bundle, make_mlp_adapter, keep_time):
    open_bundle(bundle, threads=1).close()  # noted as sound on this device
    weights = bundle / "onnx" / "weights.bin"
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    if keep_time:
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = content_of(bundle)
    facts = ("onnx/weights.bin", "changed after export", str(bundle))
    refused(run("verify", bundle), *facts)
    if not keep_time:  # the cheap check of an open goes by size, time and inode
        refused(run("bench", bundle, make_mlp_adapter()), *facts)
        refused(run("bench", bundle, make_mlp_adapter()), *facts)
    assert content_of(bundle) == before


def test_folder_that_is_no_bundle(tmp_path, make_mlp_adapter):
    facts = (str(tmp_path), "not a bundle", "edge-lora export")
    for arguments in (
        ("verify", tmp_path),
        ("inspect", tmp_path),
        ("bench", tmp_path, make_mlp_adapter()),
    ):
        refused(run(*arguments), *facts)


def test_bundle_of_a_newer_version(bundle, make_mlp_adapter):
    manifest = bundle / "bundle.json"
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**raw, "edge_lora_bundle": [2, 0]}))
    for arguments in (("verify", bundle), ("bench", bundle, make_mlp_adapter())):
        refused(run(*arguments), str(bundle), "format version [2, 0]", "newer edge-lora")


def test_bundle_without_a_tokenizer_cannot_take_text(mlp_bundle):
    refused(run("run", mlp_bundle, "--prompt", "hello"), "no tokenizer", str(mlp_bundle))


@pytest.mark.parametrize("verb", [("bench",), ("run", "--prompt", "x")])
def test_unknown_route(mlp_bundle, make_mlp_adapter, verb):
    result = run(*verb, mlp_bundle, make_mlp_adapter(), "--route", "teleport")
    assert result.exit_code == 2
    for fact in ("teleport", "packed", "unpacked", "reload"):
        assert fact in result.stderr


def test_report_of_an_unknown_ending_is_refused_before_measuring(
    mlp_bundle, make_mlp_adapter, tmp_path
):
    result = run("bench", mlp_bundle, make_mlp_adapter(), "-o", tmp_path / "report.pdf")
    refused(result, "report.pdf", ".json, .csv, .md, .html")
    assert "steady" not in result.stderr
    assert list(tmp_path.iterdir()) == []
