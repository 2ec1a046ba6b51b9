"""An ExecuTorch program in a manifest: what is written is read, a stranger's lies are refused."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from edge_lora import Slot, SlotTable
from edge_lora.bundle import (
    FileRecord,
    Manifest,
    Program,
    StoredSlot,
    TensorSpec,
    read_manifest,
    verify_files,
    write_manifest,
)
from edge_lora.bundle_check import stored_weight, verify_fingerprint, verify_slots
from edge_lora.bundle_program import ProgramSlot
from edge_lora.errors import BundleError
from edge_lora.slots import fingerprint_of

Q = np.arange(6, dtype=np.float32).reshape(2, 3)
E = np.arange(8, dtype=np.float32).reshape(4, 2) - 3
SCALES = np.array([0.5, 2], np.float32)
CODES = np.array([[1, -2, 3], [0, 127, -127]], np.int8)
PTE = b"ET12" + Q.tobytes() + E.tobytes() + SCALES.tobytes() + CODES.tobytes()
FILE = "executorch/model.pte"
X, Y = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch", 2))


def sha(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def some_program():
    q = ProgramSlot(4, sha(Q), lora_inputs=("q.lora_a", "q.lora_b"))
    return Program(
        file=FILE,
        inputs=(X,),
        input_order=("x", "q.lora_a", "q.lora_b"),
        outputs=(Y,),
        slots={"q.weight": q, "e.weight": ProgramSlot(28, "", is_read_in_place=True)},
        max_rank=8,
        largest={"batch": 24},
        canary={"x": {"values": [1.0, 2.0, 3.0], "shape": [1, 3]}},
    )


def some_manifest():
    q, e = Slot("q.weight", (2, 3), "F32", sha(Q)), Slot("e.weight", (4, 2), "F32", sha(E))
    fingerprint = fingerprint_of([q, e])
    return Manifest(
        base_id="tiny",
        fingerprint=fingerprint,
        task="generic",
        slots=SlotTable([q, e], "tiny", fingerprint),
        stored={},
        inputs=(),
        outputs=(),
        files={FILE: FileRecord(len(PTE), hashlib.sha256(PTE).hexdigest())},
        parity={"executorch": 1e-6},
        base_slots=2,
        program=some_program(),
    )


def in_8_bit():
    manifest = some_manifest()
    offset = PTE.index(CODES.tobytes())
    place = ProgramSlot(offset, sha(CODES) + sha(E), "I8", PTE.index(SCALES.tobytes()))
    program = replace(
        some_program(),
        slots={**manifest.program.slots, "q.weight": place},
        input_order=("x",),
        weights="int8-dynamic",
    )
    return replace(manifest, program=program)


def in_both_engines():
    place = StoredSlot("onnx/weights.bin", 0, "oi", "w")
    return replace(
        some_manifest(),
        stored={"q.weight": place, "e.weight": replace(place, offset=24)},
        inputs=(X,),
        outputs=(Y,),
        files={**some_manifest().files, "onnx/weights.bin": FileRecord(56, "ab" * 32)},
    )


KINDS = {"fp32": some_manifest, "8 bits": in_8_bit, "both engines": in_both_engines}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "executorch").mkdir()
    (tmp_path / FILE).write_bytes(PTE)
    write_manifest(tmp_path, some_manifest())
    return tmp_path


def edited(folder, edit):
    path = folder / "bundle.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(folder, kind):
    expected = KINDS[kind]()
    write_manifest(folder, expected)
    found = read_manifest(folder)
    assert dict(found.slots) == dict(expected.slots)
    assert replace(found, slots=expected.slots) == expected
    assert list(found.weights) == ["q.weight", "e.weight"]
    before = (folder / "bundle.json").read_bytes()
    write_manifest(folder, found)
    assert (folder / "bundle.json").read_bytes() == before


def test_a_sound_program_verifies(folder):
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    verify_slots(folder, manifest)
    assert verify_fingerprint(manifest)
    np.testing.assert_array_equal(stored_weight(folder, manifest, "e.weight"), E)


def test_another_weight_in_the_program_is_named(folder):
    damaged = bytearray(PTE)
    damaged[4] ^= 1
    (folder / FILE).write_bytes(damaged)
    with pytest.raises(BundleError, match=f"q.weight: the bytes in {FILE}"):
        verify_slots(folder, read_manifest(folder))


def test_8_bit_weights_are_codes_times_scales(folder):
    write_manifest(folder, in_8_bit())
    manifest = read_manifest(folder)
    verify_slots(folder, manifest)
    weight = stored_weight(folder, manifest, "q.weight")
    np.testing.assert_array_equal(weight, [[0.5, -1, 1.5], [0, 254, -254]])


@pytest.mark.parametrize("minor", [0, 1])
def test_an_older_bundle_has_no_program(folder, minor):
    manifest = replace(in_both_engines(), program=None)
    write_manifest(folder, manifest)
    found = read_manifest(edited(folder, lambda raw: raw.update(edge_lora_bundle=[1, minor])))
    assert found.program is None
    assert list(found.weights) == list(manifest.stored)


def in_program(**fields):
    return lambda raw: raw["executorch"].update(fields)


def in_place(name="q.weight", **fields):
    return lambda raw: raw["executorch"]["slots"][name].update(fields)


def without(key):
    return lambda raw: raw["executorch"].pop(key)


INPUT = {"name": "x", "dtype": "float32", "shape": []}
BROKEN = {
    "a list": (lambda r: r.update(executorch=[]), "'executorch' is []"),
    "null": (lambda r: r.update(executorch=None), "'executorch' is None"),
    "unknown key": (in_program(news=1), "executorch: unknown keys ['news']"),
    "no file": (without("file"), "executorch: 'file' is missing"),
    "unlisted file": (in_program(file="../model.pte"), "'../model.pte' is not listed"),
    "file a number": (in_program(file=5), "executorch: 'file' is 5"),
    "no inputs": (without("inputs"), "executorch: 'inputs' is None"),
    "input dtype": (in_program(inputs=[{**INPUT, "dtype": "O"}]), "inputs: x: 'dtype' is 'O'"),
    "no outputs": (without("outputs"), "executorch: 'outputs' is None"),
    "no order": (without("input_order"), "executorch: 'input_order' is None"),
    "order lacks an input": (in_program(input_order=["x"]), "'input_order' must name each"),
    "order names a stranger": (
        in_program(input_order=["x", "q.lora_a", "q.lora_b", "z"]),
        "'input_order' must name each",
    ),
    "an input twice": (in_program(inputs=[INPUT, INPUT]), "'input_order' must name each"),
    "an input for two slots": (
        in_place(lora_inputs=["x", "q.lora_b"]),
        "'input_order' must name each",
    ),
    "no slots": (without("slots"), "executorch: 'slots' is None"),
    "a slot is missing": (lambda r: r["executorch"]["slots"].pop("e.weight"), "e.weight: is miss"),
    "a stranger's slot": (
        lambda r: r["executorch"]["slots"].update({"z\n": {}}),
        r"slot 'z\n' is not in the slot table",
    ),
    "slot a list": (lambda r: r["executorch"]["slots"].update({"e.weight": []}), "'place' is []"),
    "unknown slot key": (in_place(news=1), "slot q.weight: unknown keys ['news']"),
    "offset a text": (in_place(offset="4"), "slot q.weight: 'offset' is '4'"),
    "offset a bool": (in_place(offset=True), "slot q.weight: 'offset' is True"),
    "offset negative": (in_place(offset=-4), "slot q.weight: 'offset' is -4"),
    "offset too large": (in_place(offset=88), "slot q.weight: 'offset' 88 of its values is out"),
    "offset not aligned": (in_place(offset=5), "slot q.weight: 'offset' 5 is not a multiple"),
    "key short": (in_place(key="ab"), "slot q.weight: 'key' is 'ab'"),
    "key of a bias damaged": (in_place(key=sha(Q) + "z" * 64), "'key' is 'zzz"),
    "no key": (lambda r: r["executorch"]["slots"]["q.weight"].pop("key"), "'key' is missing"),
    "neither packed nor read": (in_place(key=""), "slot q.weight: 'is_read_in_place' is False"),
    "in place a number": (in_place(is_read_in_place=1), "slot q.weight: 'is_read_in_place' is 1"),
    "one key for two": (
        in_place("e.weight", key=sha(Q), is_read_in_place=False),
        "two slots have one 'key'",
    ),
    "tied, but not twice": (in_place("e.weight", key=sha(E)), "'packed_offset' is None, but only"),
    "twice, but not tied": (in_place(packed_offset=60), "'packed_offset' is 60, but only"),
    "a copy that overlaps": (
        in_place("e.weight", key=sha(E), packed_offset=24),
        "of two slots overlap",
    ),
    "overlap": (in_place("e.weight", offset=24), "the weights of two slots overlap"),
    "unknown dtype": (in_place(dtype="F16"), "slot q.weight: 'dtype' is 'F16'"),
    "8 bits in fp32": (in_place(dtype="I8", scales_offset=60), "but slots have 'dtype' I8"),
    "8 bits, no scales": (in_place(dtype="I8"), "'scales_offset' is None of I8"),
    "scales of fp32": (in_place(scales_offset=60), "'scales_offset' is 60 of F32"),
    "scales outside": (
        in_place(dtype="I8", scales_offset=len(PTE) - 4),
        "'offset' 70 of its values is outside",
    ),
    "8 bits read in place": (
        in_place("e.weight", dtype="I8", scales_offset=60),
        "is I8, but not a matrix",
    ),
    "one lora input": (in_place(lora_inputs=["a"]), "'lora_inputs' must be two names"),
    "no rank": (in_program(max_rank=0), "slots have inputs, but 'max_rank' is 0"),
    "rank a text": (in_program(max_rank="8"), "executorch: 'max_rank' is '8'"),
    "largest a list": (in_program(largest=[]), "executorch: 'largest' is []"),
    "largest of a stranger": (in_program(largest={"seq": 9}), "largest: 'seq' is no size of an"),
    "largest is none": (in_program(largest={"batch": 0}), "executorch: largest: 'batch' is 0"),
    "largest a bool": (in_program(largest={"batch": True}), "largest: 'batch' is True"),
    "unknown weights": (in_program(weights="int4"), "executorch: 'weights' is 'int4'"),
    "weights a list": (in_program(weights=[]), "executorch: 'weights' is []"),
    "a cache": (in_program(cache_length=9), "'cache_length' is 9 for task 'generic'"),
    "a cache that is negative": (in_program(cache_length=-1), "'cache_length' is -1"),
    "no cache": (lambda r: r.update(task="causal-lm"), "'cache_length' is 0 for task 'causal-lm'"),
    "canary shape": (
        in_program(canary={"x": {"values": [1], "shape": [2]}}),
        "executorch: canary input 'x': 1 values do not fill",
    ),
    "no place at all": (lambda r: r.pop("executorch"), "slot q.weight: 'stored' is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_program_is_refused(folder, case):
    edit, fact = BROKEN[case]
    with pytest.raises(BundleError) as caught:
        read_manifest(edited(folder, edit))
    assert fact in str(caught.value)
    assert str(folder) in str(caught.value)


def test_inputs_in_another_order_than_the_method_takes_them(folder):
    second = {**INPUT, "name": "z"}

    def edit(raw):
        program = raw["executorch"]
        program["inputs"].append(second)
        program["input_order"] = ["z", *program["input_order"]]

    with pytest.raises(BundleError, match="'inputs' are in another order than in 'input_order'"):
        read_manifest(edited(folder, edit))


def test_a_slot_that_only_one_engine_has_is_refused(folder):
    write_manifest(folder, in_both_engines())
    with pytest.raises(BundleError, match=r"slot e.weight: 'stored' is missing"):
        read_manifest(edited(folder, lambda raw: raw["slots"][1].pop("stored")))
