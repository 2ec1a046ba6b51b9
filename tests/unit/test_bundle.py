import hashlib
import json
from dataclasses import replace

import pytest

from edge_lora import Slot, SlotTable
from edge_lora.bundle import (
    FileRecord,
    Manifest,
    StoredSlot,
    TensorSpec,
    read_manifest,
    verify_files,
    write_manifest,
)
from edge_lora.errors import BundleError

WEIGHTS = bytes(range(24))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/weights.bin").write_bytes(WEIGHTS)
    write_manifest(tmp_path, some_manifest())
    return tmp_path


def some_manifest():
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    slot = Slot("q.weight", (2, 3), "F32", digest, aliases=("tied.weight",))
    place = StoredSlot("onnx/weights.bin", 0, "io", "q.weight", ("MatMul",), ("q.a", "q.b"))
    return Manifest(
        base_id="tiny",
        fingerprint="ab" * 32,
        task="generic",
        slots=SlotTable([slot], "tiny", "ab" * 32),
        stored={"q.weight": place},
        inputs=(TensorSpec("x", "float32", ("batch", 3)),),
        outputs=(TensorSpec("y", "float32", ("batch", 2)),),
        files={"onnx/weights.bin": FileRecord(len(WEIGHTS), digest)},
        parity={"onnxruntime": 1e-6},
        config={"eos": [2]},
        producer={"torch": "2"},
        extra={"later": [1, 2]},
    )


def edited(folder, edit):
    path = folder / "bundle.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    return folder


def test_round_trip(folder):
    found, expected = read_manifest(folder), some_manifest()
    assert dict(found.slots) == dict(expected.slots)
    assert found.slots.fingerprint == expected.fingerprint
    assert replace(found, slots=expected.slots) == expected


def test_writing_again_gives_the_same_bytes(folder):
    before = (folder / "bundle.json").read_bytes()
    write_manifest(folder, read_manifest(folder))
    assert (folder / "bundle.json").read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_a_sound_bundle_verifies(folder):
    verify_files(folder, read_manifest(folder))


def test_a_changed_file_is_named(folder):
    (folder / "onnx/weights.bin").write_bytes(WEIGHTS[::-1])
    with pytest.raises(
        BundleError, match=r"weights.bin has sha256 .* the file changed after export"
    ):
        verify_files(folder, read_manifest(folder))


def test_a_shorter_and_a_missing_file_are_named(folder):
    manifest = read_manifest(folder)
    manifest = replace(manifest, files={**manifest.files, "gone": FileRecord(1, "0")})
    (folder / "onnx/weights.bin").write_bytes(WEIGHTS[:5])
    with pytest.raises(BundleError) as caught:
        verify_files(folder, manifest)
    assert "onnx/weights.bin has 5 bytes, manifest says 24" in str(caught.value)
    assert "gone is missing" in str(caught.value)


def test_a_link_in_place_of_a_file_is_refused(folder):
    target = folder / "elsewhere"
    target.write_bytes(WEIGHTS)
    (folder / "onnx/weights.bin").unlink()
    (folder / "onnx/weights.bin").symlink_to(target)
    with pytest.raises(BundleError, match="not a plain file"):
        verify_files(folder, read_manifest(folder))


def test_no_bundle_says_how_to_make_one(tmp_path):
    with pytest.raises(BundleError, match="edge-lora export"):
        read_manifest(tmp_path)


def test_a_newer_minor_version_is_read_and_its_keys_kept(folder):
    edited(folder, lambda raw: raw.update(edge_lora_bundle=[1, 9], news="kept"))
    assert read_manifest(folder).extra["news"] == "kept"


BROKEN = {
    "unknown major version": (lambda r: r.update(edge_lora_bundle=[2, 0]), "format version [2, 0]"),
    "no version": (lambda r: r.pop("edge_lora_bundle"), "format version None"),
    "no slots": (lambda r: r.pop("slots"), "damaged"),
    "slots not a list": (lambda r: r.update(slots=7), "damaged"),
    "unknown slot key": (lambda r: r["slots"][0].update(surprise=1), "damaged"),
    "path up": (
        lambda r: r["files"].update({"../x": {"size": 1, "sha256": "0"}}),
        "'../x' lies outside",
    ),
    "absolute path": (
        lambda r: r["files"].update({"/etc/passwd": {"size": 1, "sha256": "0"}}),
        "'/etc/passwd' lies outside",
    ),
    "unlisted file": (lambda r: r["slots"][0]["stored"].update(file="other.bin"), "is not listed"),
    "offset outside": (lambda r: r["slots"][0]["stored"].update(offset=25), "offset 25 is outside"),
    "negative offset": (
        lambda r: r["slots"][0]["stored"].update(offset=-1),
        "offset -1 is outside",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_manifest_is_refused(folder, case):
    edit, fact = BROKEN[case]
    with pytest.raises(BundleError) as caught:
        read_manifest(edited(folder, edit))
    assert fact in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000])
def test_a_manifest_that_is_no_json_object(folder, text):
    (folder / "bundle.json").write_text(text)
    with pytest.raises(BundleError):
        read_manifest(folder)
