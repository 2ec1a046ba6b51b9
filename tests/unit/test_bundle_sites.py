"""Sites in a manifest: what is written is read, and a stranger's lies are refused."""

import hashlib
import json

import pytest

from edge_lora import Slot, SlotTable
from edge_lora.bundle import (
    FileRecord,
    Manifest,
    StoredSlot,
    TensorSpec,
    read_manifest,
    write_manifest,
)
from edge_lora.bundle_check import verify_fingerprint, verify_slots
from edge_lora.bundle_sites import BundleSite, SiteInputs
from edge_lora.errors import BundleError
from edge_lora.slots import fingerprint_of

WEIGHTS = bytes(range(24)) + bytes(8)
INPUTS = SiteInputs("i.a", "i.b", "i.c", "i.units", "i.up", "i.d", "on")


def some_manifest():
    weight = Slot("q.weight", (2, 3), "F32", hashlib.sha256(WEIGHTS[:24]).hexdigest())
    bias = Slot("q.bias", (2,), "F32", hashlib.sha256(WEIGHTS[24:]).hexdigest(), "other")
    sites = {
        "q": BundleSite(INPUTS),
        "norm->q": BundleSite(INPUTS),
    }
    site_slots = [Slot(name, (2, 3), "F32", "", "site") for name in sites]
    fingerprint = fingerprint_of([weight])
    file = "onnx/weights.bin"
    return Manifest(
        base_id="tiny",
        fingerprint=fingerprint,
        task="generic",
        slots=SlotTable([weight, bias, *site_slots], "tiny", fingerprint),
        stored={
            "q.weight": StoredSlot(file, 0, "oi", "q.weight", ("Gemm",), None, "q.row_gain"),
            "q.bias": StoredSlot(file, 24, "oi", "q.bias", ("Gemm",)),
        },
        inputs=(TensorSpec("x", "float32", ("batch", 3)),),
        outputs=(TensorSpec("y", "float32", ("batch", 2)),),
        files={file: FileRecord(len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())},
        base_slots=1,
        sites=sites,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/weights.bin").write_bytes(WEIGHTS)
    write_manifest(tmp_path, some_manifest())
    return tmp_path


def edited(folder, edit):
    path = folder / "bundle.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    return folder


def test_round_trip(folder):
    found, expected = read_manifest(folder), some_manifest()
    assert found.sites == expected.sites
    assert found.stored == expected.stored
    assert dict(found.slots) == dict(expected.slots)
    assert list(found.weights) == ["q.weight", "q.bias"]


def test_only_weights_are_verified_and_only_layers_count_in_the_fingerprint(folder):
    manifest = read_manifest(folder)
    verify_slots(folder, manifest)
    assert verify_fingerprint(manifest)


def test_an_older_bundle_has_no_sites_and_no_gains(folder):
    def edit(raw):
        del raw["sites"]
        raw["edge_lora_bundle"] = [1, 0]
        for slot in raw["slots"]:
            del slot["stored"]["gain_input"]

    manifest = read_manifest(edited(folder, edit))
    assert manifest.sites == {}
    assert manifest.stored["q.weight"].gain_input is None


def in_site(**fields):
    return lambda raw: raw["sites"][0].update(fields)


def in_inputs(**fields):
    return lambda raw: raw["sites"][0]["inputs"].update(fields)


BROKEN = {
    "sites an object": (lambda r: r.update(sites={}), "'sites' is {}"),
    "a site a text": (lambda r: r.update(sites=["q"]), "site 0: 'record' is 'q'"),
    "unknown key": (in_site(hash="0"), "site q: unknown keys ['hash']"),
    "name a number": (in_site(name=3), "site 0: 'name' is 3"),
    "name of a weight": (in_site(name="q.weight"), "site q.weight: names another slot too"),
    "site twice": (lambda r: r["sites"].append(r["sites"][0]), "site q: names another slot too"),
    "one width": (in_site(shape=[2]), "site q: 'shape' is [2]"),
    "no width": (in_site(shape=[2, 0]), "site q: 'shape' is 0"),
    "width a bool": (in_site(shape=[True, 3]), "site q: 'shape' is True"),
    "unknown dtype": (in_site(dtype="I8"), "site q: 'dtype' is 'I8'"),
    "no inputs": (lambda r: r["sites"][0].pop("inputs"), "site q: 'inputs' is missing"),
    "inputs a list": (in_site(inputs=[]), "site q: 'inputs' is []"),
    "an input too many": (in_inputs(gate="g"), "site q: unknown keys ['gate']"),
    "an input too few": (lambda r: r["sites"][0]["inputs"].pop("up"), "site q: 'up' is missing"),
    "an input a number": (in_inputs(up=1), "site q: 'up' is 1"),
    "one name for two inputs": (in_inputs(up="on"), "two of its 'inputs' have one name"),
    "a slot that is a site": (
        lambda r: r["slots"][0].update(kind="site"),
        "slot q.weight: 'kind' is 'site'",
    ),
    "gain a number": (
        lambda r: r["slots"][0]["stored"].update(gain_input=2),
        "slot q.weight: 'gain_input' is 2",
    ),
    "is_input a word": (
        lambda r: r["slots"][0]["stored"].update(is_input="yes"),
        "slot q.weight: 'is_input' must be true or false",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_manifest_is_refused(folder, case):
    edit, fact = BROKEN[case]
    with pytest.raises(BundleError) as caught:
        read_manifest(edited(folder, edit))
    assert fact in str(caught.value)
