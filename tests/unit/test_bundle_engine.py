"""Which engine opens a bundle, and what it sees of the manifest."""

from dataclasses import replace
from pathlib import Path

import pytest

from edge_lora.bundle import FileRecord, Manifest, Program, StoredSlot, TensorSpec
from edge_lora.bundle_engine import PARTS, as_seen_by, choose_engine, engines_of
from edge_lora.bundle_program import ProgramSlot
from edge_lora.errors import EngineUnavailableError, UnknownNameError
from edge_lora.runtime.engines import ENGINES
from edge_lora.slots import Slot, SlotTable

FOLDER = Path("tiny")
SLOTS = [
    Slot("q.weight", (2, 3), "F32", "0" * 64),
    Slot("e.weight", (4, 2), "F32", "1" * 64, "embedding"),
]
PROGRAM = Program(
    file="executorch/model.pte",
    inputs=(TensorSpec("y", "int64", (1,)),),
    input_order=("y", "a", "b"),
    outputs=(),
    slots={
        "q.weight": ProgramSlot(16, "0" * 64, lora_inputs=("a", "b")),
        "e.weight": ProgramSlot(64, "", is_read_in_place=True),
    },
    canary={"y": {"values": [1], "shape": [1]}},
)
GRAPH = FileRecord(1, "2" * 64)
BOTH = Manifest(
    base_id="tiny",
    fingerprint="3" * 64,
    task="generic",
    slots=SlotTable(SLOTS, "tiny", "3" * 64),
    stored={slot.name: StoredSlot("onnx/weights.bin", 0, "io", slot.name) for slot in SLOTS},
    inputs=(TensorSpec("x", "int64", (1,)),),
    outputs=(),
    files={"onnx/model.onnx": GRAPH},
    program=PROGRAM,
)
ONLY_PROGRAM = replace(BOTH, stored={}, inputs=(), files={})
ONLY_GRAPH = replace(BOTH, program=None)


def test_every_engine_has_a_part():
    assert list(PARTS) == list(ENGINES)


@pytest.mark.parametrize(
    ("manifest", "engines"),
    [
        (BOTH, ["onnxruntime", "executorch"]),
        (ONLY_GRAPH, ["onnxruntime"]),
        (ONLY_PROGRAM, ["executorch"]),
    ],
)
def test_auto_takes_the_first_engine_that_the_bundle_has(manifest, engines):
    assert engines_of(manifest) == engines
    assert choose_engine(FOLDER, manifest, "auto") == engines[0]
    for engine in engines:
        assert choose_engine(FOLDER, manifest, engine) == engine


def test_an_engine_that_the_bundle_lacks_is_refused_with_the_way_out():
    with pytest.raises(EngineUnavailableError, match="no ONNX graph; export it with engines="):
        choose_engine(FOLDER, ONLY_PROGRAM, "onnxruntime")
    with pytest.raises(EngineUnavailableError, match="no ExecuTorch program"):
        choose_engine(FOLDER, ONLY_GRAPH, "executorch")
    with pytest.raises(EngineUnavailableError, match="no ONNX graph and no ExecuTorch program"):
        choose_engine(FOLDER, replace(ONLY_GRAPH, files={}), "auto")
    with pytest.raises(UnknownNameError, match="executorch"):
        choose_engine(FOLDER, BOTH, "executorc")


def test_each_engine_sees_its_own_part():
    graph = as_seen_by("onnxruntime", BOTH)
    assert (graph.program, graph.inputs, graph.stored) == (None, BOTH.inputs, BOTH.stored)
    program = as_seen_by("executorch", BOTH)
    assert program.inputs == PROGRAM.inputs
    assert program.config["canary"] == PROGRAM.canary
    assert program.slots.fingerprint == BOTH.fingerprint
    q, e = program.stored["q.weight"], program.stored["e.weight"]
    assert (q.file, q.offset, q.layout, q.lora_inputs) == (PROGRAM.file, 16, "oi", ("a", "b"))
    assert (q.is_table, e.is_table) == (False, True)


def test_what_only_the_graph_has_is_no_slot_of_the_program():
    site = Slot("mlp", (2, 2), "F32", "", "site")
    manifest = replace(BOTH, slots=SlotTable([*SLOTS, site], "tiny", "3" * 64))
    assert "mlp" in as_seen_by("onnxruntime", manifest).slots
    assert "mlp" not in as_seen_by("executorch", manifest).slots
