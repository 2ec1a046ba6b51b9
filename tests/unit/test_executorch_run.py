"""edge-lora-run: what it measures is right, and what it cannot do it says."""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from edge_lora.adapter import Adapter, BaseIdentity, Delta
from edge_lora.bundle import Manifest, TensorSpec, hash_file, read_manifest, write_manifest
from edge_lora.bundle_program import Program, ProgramSlot
from edge_lora.forms import LowRank, Sparse
from edge_lora.slots import Slot, SlotTable

pytest.importorskip("edge_lora_executorch")
torch = pytest.importorskip("torch")
pytest.importorskip("executorch.exir")
pytestmark = pytest.mark.torch

RUN = Path(sys.executable).with_name("edge-lora-run")
FILE = "executorch/model.pte"


class Model(torch.nn.Module):
    """An embedding that is read in place, two linears that are packed, and a tied head."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(19, 24)
        self.up = torch.nn.Linear(24, 37)
        self.down = torch.nn.Linear(37, 24, bias=False)
        self.head = torch.nn.Linear(24, 19, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.down(torch.tanh(self.up(self.table(ids)))))


def lower(model, ids):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shapes = ({1: torch.export.Dim("seq", max=16)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ExecuTorch's own
        program = torch.export.export(model, (ids,), dynamic_shapes=shapes)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return edge.to_executorch().buffer


def slot_of(name, values):
    aliases = ("head.weight",) if name == "table.weight" else ()
    digest = sha256(values.tobytes()).hexdigest()
    return Slot(name, values.shape, "F32", digest, aliases=aliases)


def place_of(name, values, bias, raw):
    data = values.tobytes()
    key = "".join(sha256(v.tobytes()).hexdigest() for v in (values, bias) if v is not None)
    first = raw.find(data)
    if name != "table.weight":
        return ProgramSlot(first, key)
    return ProgramSlot(first, key, is_read_in_place=True, packed_offset=raw.find(data, first + 1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return Model().eval()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    raw = lower(model, torch.tensor([[1, 2, 3]]))
    (folder / FILE).parent.mkdir()
    (folder / FILE).write_bytes(raw)
    weights = {n: v.detach().numpy() for n, v in model.named_parameters() if v.ndim == 2}
    biases = {"up.weight": model.up.bias.detach().numpy()}
    slots = SlotTable([slot_of(n, v) for n, v in weights.items()], "model")
    program = Program(
        file=FILE,
        inputs=(TensorSpec("ids", "int64", (1, "seq")),),
        input_order=("ids",),
        outputs=(TensorSpec("y", "float32", (1, "seq", 19)),),
        slots={n: place_of(n, v, biases.get(n), raw) for n, v in weights.items()},
        canary={"ids": {"values": [3, 0, 18, 7], "shape": [1, 4]}},
    )
    write_manifest(
        folder,
        Manifest(
            base_id="model",
            fingerprint=slots.fingerprint,
            task="generic",
            slots=slots,
            stored={},
            inputs=(),
            outputs=(),
            files={FILE: hash_file(folder / FILE)},
            program=program,
        ),
    )
    return folder


def adapter_for(bundle, form_of, names=None, **changes):
    manifest = read_manifest(bundle)
    deltas = {
        name: Delta(slot.shape, slot.dtype, (form_of(slot.shape),), slot.slot_hash)
        for name, slot in manifest.slots.items()
        if names is None or name in names
    }
    base = BaseIdentity(manifest.fingerprint, manifest.base_id)
    return replace(Adapter("a", "test", base, deltas), **changes)


def sparse(shape):
    rng = np.random.default_rng(1)
    indices = np.sort(rng.choice(shape[0] * shape[1], 20, replace=False)).astype(np.uint32)
    return Sparse(indices, rng.standard_normal(20).astype(np.float32))


def low_rank(shape):
    rng = np.random.default_rng(2)
    a, bt = rng.standard_normal((2, 3, max(shape))).astype(np.float32) * 0.1
    return LowRank(a=a[:, : shape[1]].copy(), bt=bt[:, : shape[0]].copy())


def dense_delta(form, shape):
    if isinstance(form, LowRank):
        return (form.a.T @ form.bt).T
    delta = np.zeros(shape[0] * shape[1], np.float32)
    delta[form.indices] = form.values
    return delta.reshape(shape)


def rms(model, forms):
    """Return what the output of the canary comes to with these deltas added, by torch."""
    merged = {
        name: values + torch.from_numpy(dense_delta(forms[name], values.shape))
        for name, values in model.state_dict().items()
        if name in forms
    }
    with torch.no_grad():
        y = torch.func.functional_call(model, merged, (torch.tensor([[3, 0, 18, 7]]),))
    return float(y.double().square().mean().sqrt())


def run(*arguments):
    command = [str(RUN), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_swaps_change_the_output_as_torch_says(bundle, model, tmp_path, threads):
    paths = {}
    for name, form_of in (("few", sparse), ("all", low_rank)):
        paths[name] = adapter_for(bundle, form_of).save(tmp_path / f"{name}.safetensors")
    parts = [f"{name}={path}" for name, path in paths.items()]
    code, out, err = run(bundle, *parts, "--runs", 7, "--threads", threads)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["is_base_again"] is True
    assert report["threads"] == threads
    assert report["runs"]["forward"]["output_rms"] == pytest.approx(rms(model, {}), rel=1e-5)
    for found, form_of in zip(report["adapters"], (sparse, low_rank), strict=True):
        forms = {name: form_of(slot.shape) for name, slot in read_manifest(bundle).slots.items()}
        measured = found["runs"]["forward"]
        assert measured["output_rms"] == pytest.approx(rms(model, forms), rel=1e-5)
        latency = measured["latency_ms"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"]
        assert latency["p99"] <= latency["max"]
    assert [a["name"] for a in report["adapters"]] == ["few", "all"]
    assert report["adapters"][0]["changed_values"] == 60


def test_needs_no_environment(bundle):
    done = subprocess.run(
        [str(RUN), str(bundle), "--runs", "1"], env={}, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "BUNDLE is missing"),
        (["b", "x"], "'x' is not NAME=FILE"),
        (["b", "=x"], "'=x' is not NAME=FILE"),
        (["b", "--runs"], "--runs needs a number"),
        (["b", "--runs", "0"], "--runs is '0'"),
        (["b", "--threads", "1x"], "--threads is '1x'"),
        (["b", "--fast"], "unknown option '--fast'"),
        (["b", "x=1", "x=2"], "two adapters are named 'x'"),
    ],
)
def test_usage(arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("usage:")


def test_help():
    code, out, _ = run("--help")
    assert code == 0
    assert out.startswith("usage: edge-lora-run BUNDLE")


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"base": BaseIdentity("0" * 64)}, None, "it was trained on another base"),
        ({"base": BaseIdentity("")}, ["up.weight"], None),  # names no base: its hashes count
    ],
)
def test_adapters_of_other_bases(bundle, tmp_path, changes, names, message):
    path = adapter_for(bundle, sparse, names, **changes).save(tmp_path / "a.safetensors")
    code, out, err = run(bundle, f"a={path}", "--runs", 1)
    if message is None:
        assert code == 0, err
    else:
        assert (code, out) == (1, "")
        assert message in err


def test_adapters_of_other_slots(bundle, tmp_path):
    good = adapter_for(bundle, sparse)
    deltas = dict(good.deltas)
    deltas["nowhere"] = deltas.pop("table.weight")
    deltas["up.weight"] = replace(deltas["up.weight"], slot_hash="f" * 16)
    path = replace(good, deltas=deltas).save(tmp_path / "a.safetensors")
    code, _, err = run(bundle, f"a={path}")
    assert code == 1
    assert "nowhere: no such slot" in err
    assert "up.weight: trained on weight ffffffffffffffff" in err


def test_8_bit_slots_are_refused_with_what_to_do(bundle, tmp_path):
    path = adapter_for(bundle, sparse, ["up.weight"]).save(tmp_path / "a.safetensors")
    copied = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = copied / "bundle.json"
    manifest.write_text(edited(manifest, lambda r: place(r).update(dtype="I8")))
    code, _, err = run(copied, f"a={path}", "--runs", 1)
    assert code == 1
    assert "up.weight: is not fp32 in the program" in err
    assert "export the base with fp32 weights" in err


def test_files_that_are_missing(bundle, tmp_path):
    assert run(tmp_path)[0] == 1
    code, _, err = run(bundle, f"a={tmp_path / 'no.safetensors'}")
    assert code == 1
    assert "no.safetensors" in err


@pytest.fixture
def copied(bundle, tmp_path):
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_a_damaged_program(copied):
    raw = bytearray((copied / FILE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copied / FILE).write_bytes(raw)
    code, _, err = run(copied)
    assert code == 1
    assert "is damaged: its sha256 is not the manifest's" in err
    (copied / FILE).write_bytes(raw[:-1])
    code, _, err = run(copied)
    assert code == 1
    assert "the manifest says" in err


def edited(path, edit):
    raw = json.loads(path.read_text())
    edit(raw)
    return json.dumps(raw)


def place(raw):
    return raw["executorch"]["slots"]["up.weight"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(edge_lora_bundle=[2, 0]), "format version [2,0]"),
        (lambda r: r.pop("executorch"), "has no ExecuTorch program"),
        (lambda r: r["executorch"].update(file="../x"), "lies outside the bundle"),
        (lambda r: place(r).update(offset=1 << 62), "its values are outside the file"),
        (lambda r: place(r).update(offset=place(r)["offset"] - 16), "another sha256 than the slot"),
        (lambda r: place(r).update(offset=-1), "'offset' is not a whole number"),
        (lambda r: place(r).update(key=""), "up.weight: the program does not hold its weight"),
        (lambda r: place(r).update(key="0" * 64), "did not pack"),
        (lambda r: place(r).update(is_read_in_place=3), "damaged"),
        (lambda r: r["slots"][1].update(shape=[37, 0]), "'shape' has an axis of 0"),
        (lambda r: r["slots"][1].update(shape=[1 << 31] * 8), "too many values"),
        (lambda r: r["slots"].append(r["slots"][0]), "table.weight"),
        (lambda r: r["executorch"].update(input_order=[]), "'input_order' has 0 names"),
        (lambda r: r["executorch"]["canary"]["ids"].update(shape=[1, 99]), "another shape"),
        (lambda r: r["executorch"]["canary"]["ids"].update(values=["x"]), "Error:"),
    ],
)
def test_hostile_manifests(copied, edit, message):
    path = copied / "bundle.json"
    path.write_text(edited(path, edit))
    code, out, err = run(copied, "--runs", 1)
    assert (code, out) == (1, "")
    assert message in err


def test_a_manifest_that_is_no_json(copied):
    for text in ("", "[", "[]", '{"a": 1, "a": 2}', "[" * 1000):
        (copied / "bundle.json").write_text(text)
        code, _, err = run(copied)
        assert code == 1
        assert "bundle.json" in err
