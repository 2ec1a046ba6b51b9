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


def test_a_file_in_a_linked_folder_is_refused(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "onnx"
    (folder / "onnx").rename(elsewhere)
    (folder / "onnx").symlink_to(elsewhere)
    with pytest.raises(BundleError, match="not a plain file"):
        verify_files(folder, read_manifest(folder))


def test_a_bundle_behind_a_link_is_sound(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "bundle"
    link.symlink_to(folder)
    verify_files(link, read_manifest(link))


def test_no_bundle_says_how_to_make_one(tmp_path):
    with pytest.raises(BundleError, match="edge-lora export"):
        read_manifest(tmp_path)


def test_a_newer_minor_version_is_read_and_its_keys_kept(folder):
    edited(folder, lambda raw: raw.update(edge_lora_bundle=[1, 9], news="kept"))
    assert read_manifest(folder).extra["news"] == "kept"


def in_slot(**fields):
    return lambda raw: raw["slots"][0].update(fields)


def in_place(**fields):
    return lambda raw: raw["slots"][0]["stored"].update(fields)


def with_canary(values, shape):
    return lambda raw: raw["config"].update(canary={"x": {"values": values, "shape": shape}})


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
    "offset outside": (
        lambda r: r["slots"][0]["stored"].update(offset=25),
        "'offset' 25 is outside",
    ),
    "negative offset": (in_place(offset=-1), "'offset' -1 is outside"),
    "the weight runs past the end": (in_place(offset=1), "'offset' 1 is outside"),
    "offset a text": (in_place(offset="x"), "slot q.weight: 'offset' is 'x'"),
    "offset a bool": (in_place(offset=True), "slot q.weight: 'offset' is True"),
    "unknown layout": (in_place(layout="zz"), "slot q.weight: 'layout' is 'zz'"),
    "layout a list": (in_place(layout=[]), "slot q.weight: 'layout' is []"),
    "place a list": (in_slot(stored=[]), "slot q.weight: 'stored' is []"),
    "operators a text": (in_place(operators="MatMul"), "slot q.weight: 'operators' is"),
    "one lora input": (in_place(lora_inputs=["a"]), "slot q.weight: 'lora_inputs'"),
    "initializer a number": (in_place(initializer=3), "slot q.weight: 'initializer' is 3"),
    "negative shape": (in_slot(shape=[-2, -2]), "slot q.weight: 'shape' is -2"),
    "shape of texts": (in_slot(shape=["a"]), "slot q.weight: 'shape' is 'a'"),
    "shape of bools": (in_slot(shape=[True, 6]), "slot q.weight: 'shape' is True"),
    "no shape": (in_slot(shape=[]), "slot q.weight: 'shape'"),
    "long axis": (in_slot(shape=[2**31 + 1]), "slot q.weight: 'shape' is 2147483649"),
    "many values": (in_slot(shape=[2**31, 2**31]), "slot q.weight: 'shape' is [2147483648,"),
    "unknown dtype": (in_slot(dtype="I8"), "slot q.weight: 'dtype' is 'I8'"),
    "unknown kind": (in_slot(kind="gru"), "slot q.weight: 'kind' is 'gru'"),
    "no hash": (in_slot(sha256="0"), "slot q.weight: 'sha256' is '0'"),
    "slot name a number": (in_slot(name=5), "slot 0: 'name' is 5"),
    "slot name half a surrogate": (in_slot(name="\ud800"), "slot 0: 'name' is"),
    "aliases of numbers": (in_slot(aliases=[1]), "slot q.weight: 'aliases' is 1"),
    "slot twice": (lambda r: r["slots"].append(r["slots"][0]), "names another slot too"),
    "size a text": (
        lambda r: r["files"]["onnx/weights.bin"].update(size="10"),
        "file 'onnx/weights.bin': 'size' is '10'",
    ),
    "unknown task": (lambda r: r.update(task="poetry"), "'task' is 'poetry'"),
    "base a list": (lambda r: r.update(base=[]), "'base' is []"),
    "base id a number": (lambda r: r["base"].update(id=1), "base: 'id' is 1"),
    "fingerprint a number": (lambda r: r["base"].update(fingerprint=1), "base: 'fingerprint' is 1"),
    "input dtype": (lambda r: r["inputs"][0].update(dtype="object"), "inputs: x: 'dtype' is"),
    "input axis": (lambda r: r["inputs"][0].update(shape=["n", -1]), "inputs: x: 'shape' is -1"),
    "input axis a bool": (lambda r: r["inputs"][0].update(shape=[True]), "inputs: x: 'shape' is"),
    "input axis a list": (lambda r: r["inputs"][0].update(shape=[[]]), "inputs: x: 'shape' is []"),
    "output name": (lambda r: r["outputs"][0].update(name=None), "outputs: 'name' is None"),
    "parity a text": (lambda r: r.update(parity={"ort": "small"}), "parity: 'ort' is 'small'"),
    "producer a number": (lambda r: r.update(producer={"torch": 2}), "producer: 'torch' is 2"),
    "config a list": (lambda r: r.update(config=[]), "'config' is []"),
    "layers a text": (lambda r: r["config"].update(num_layers="2"), "config: 'num_layers' is '2'"),
    "eos a text": (lambda r: r["config"].update(eos_token_ids=["2"]), "'eos_token_ids' is '2'"),
    "canary shape": (with_canary([1], [2]), "canary input 'x': 1 values do not fill shape [2]"),
    "canary texts": (with_canary(["1"], [1]), "canary input 'x': 'values' is '1'"),
    "canary not a number": (with_canary([float("nan")], [1]), "'values' is nan"),
    "canary too large": (with_canary([0] * 1_000_001, [1_000_001]), "over 1000000"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_manifest_is_refused(folder, case):
    edit, fact = BROKEN[case]
    with pytest.raises(BundleError) as caught:
        read_manifest(edited(folder, edit))
    assert fact in str(caught.value)
    assert str(folder) in str(caught.value)


def test_everything_wrong_is_listed_at_once(folder):
    def edit(raw):
        raw["task"] = 3
        in_slot(dtype="I8")(raw)
        raw["inputs"][0]["dtype"] = "?"

    with pytest.raises(BundleError) as caught:
        read_manifest(edited(folder, edit))
    assert all(key in str(caught.value) for key in ("'task'", "slot q.weight", "inputs: x"))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000])
def test_a_manifest_that_is_no_json_object(folder, text):
    (folder / "bundle.json").write_text(text)
    with pytest.raises(BundleError):
        read_manifest(folder)
