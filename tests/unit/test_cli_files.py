"""``inspect`` and ``verify``: files in, facts out, one message for everything wrong."""

import hashlib
import json

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, Slot, SlotTable, Sparse
from edge_lora.bundle import FileRecord, Manifest, StoredSlot, TensorSpec, write_manifest
from edge_lora.cli import main

WEIGHT = np.arange(32 * 4, dtype=np.float32).reshape(32, 4)
SLOT = Slot("q.weight", (32, 4), "F32", hashlib.sha256(WEIGHT.tobytes()).hexdigest())
TABLE = SlotTable([SLOT], "tiny")


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    record = FileRecord(WEIGHT.nbytes, hashlib.sha256(WEIGHT.tobytes()).hexdigest())
    spec = TensorSpec("x", "float32", ("batch", 4))
    manifest = Manifest(
        "tiny", TABLE.fingerprint, "generic", TABLE,
        {"q.weight": StoredSlot("weights.bin", 0, "oi", "q.weight")},
        (spec,), (spec,), {"weights.bin": record},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def adapter(tmp_path):
    low_rank = LowRank(np.ones((2, 4), np.float16), np.ones((2, 32), np.float16))
    sparse = Sparse(np.array([1, 5], np.uint32), np.ones(2, np.float32))
    delta = Delta((32, 4), "F32", (low_rank, sparse), SLOT.slot_hash)
    made = Adapter("mine", "test", BaseIdentity(TABLE.fingerprint, "tiny"), {"q.weight": delta})
    return made.save(tmp_path / "mine.safetensors")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_inspect_adapter(adapter):
    facts = json.loads(run("inspect", adapter, "--json", "--slots").stdout)
    assert facts["kind"] == "adapter"
    assert facts["name"] == "mine"
    assert facts["values"] == 2 * 4 + 32 * 2 + 2
    assert facts["file_bytes"] == adapter.stat().st_size
    assert facts["forms"] == {"low_rank r2 float16": 1, "sparse add float32": 1}
    assert facts["slots"][0]["slot"] == "q.weight"


def test_inspect_bundle(bundle):
    facts = json.loads(run("inspect", bundle, "--json", "--slots").stdout)
    assert facts["kind"] == "bundle"
    assert facts["base_fingerprint"] == TABLE.fingerprint
    assert [row["slot"] for row in facts["slots"]] == ["q.weight"]


def test_inspect_prints_plain_lines_in_a_pipe(bundle):
    result = run("inspect", bundle, "--slots")
    assert "base: tiny" in result.stdout.splitlines()
    assert "q.weight\t[32, 4]\tF32" in result.stdout


def test_verify_a_sound_pair(bundle, adapter):
    result = run("verify", bundle, adapter)
    assert result.exit_code == 0
    assert result.stdout == "sound: 2 checked, 1 adapters fit\n"
    assert "checking" in result.stderr


def test_verify_lists_everything_wrong(bundle, adapter, tmp_path):
    (bundle / "weights.bin").write_bytes(WEIGHT.tobytes()[:-4])
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"\xff" * 100)
    other = Adapter.load(adapter)
    stranger = Adapter("stranger", "test", BaseIdentity("0" * 64, "other"), other.deltas)
    path = stranger.save(tmp_path / "stranger.safetensors")
    result = run("verify", bundle, adapter, junk, path)
    assert result.exit_code == 1
    assert result.stderr.count("Error: ") == 1
    assert "weights.bin has 508 bytes, manifest says 512" in result.stderr
    assert "junk.safetensors" in result.stderr
    assert "trained on another base" in result.stderr
    assert "Traceback" not in result.stderr


def test_verify_json_holds_the_problems_and_still_fails(bundle, adapter):
    blob = bytearray(adapter.read_bytes())
    blob[-1] ^= 1
    adapter.write_bytes(blob)
    result = run("verify", bundle, adapter, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["sound"] is False
    assert len(report["problems"]) == 1


def edit_manifest(bundle, edit):
    path = bundle / "bundle.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def rewrite_weights(bundle, blob):
    """Change the weights and their file's record: only the slot table still knows."""
    (bundle / "weights.bin").write_bytes(blob)
    sha256 = hashlib.sha256(blob).hexdigest()
    edit_manifest(bundle, lambda raw: raw["files"]["weights.bin"].update(sha256=sha256))


def test_verify_recomputes_the_slots(bundle):
    rewrite_weights(bundle, WEIGHT[::-1].tobytes())
    result = run("verify", bundle)
    assert result.exit_code == 1
    assert "q.weight: the bytes in weights.bin have sha256" in result.stderr


def test_verify_reads_a_transposed_slot(bundle):
    rewrite_weights(bundle, WEIGHT.T.tobytes())
    edit_manifest(bundle, lambda raw: raw["slots"][0]["stored"].update(layout="io"))
    assert run("verify", bundle).exit_code == 0


@pytest.mark.parametrize(
    ("count", "fingerprint", "told", "is_sound"),
    [
        (1, TABLE.fingerprint, "recomputed", True),
        (1, "0" * 64, "differs", False),
        (2, "0" * 64, "skipped", True),
        (0, TABLE.fingerprint, "skipped", True),
    ],
)
def test_verify_recomputes_the_fingerprint_where_it_can(bundle, count, fingerprint, told, is_sound):
    edit_manifest(bundle, lambda raw: raw["base"].update(slots=count, fingerprint=fingerprint))
    report = json.loads(run("verify", bundle, "--json").stdout)
    assert report["fingerprints"][str(bundle)].startswith(told)
    assert report["sound"] is is_sound


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_missing_file_is_refused_by_name(verb, tmp_path):
    result = run(verb, tmp_path / "none.safetensors")
    assert result.exit_code == 1
    assert "none.safetensors' does not exist" in result.stderr


def test_usage_errors_exit_with_2():
    assert run("verify").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("inspect", "x", "--nonsense").exit_code == 2
