"""What goes wrong silently in ExecuTorch: a session must refuse it, or be right.

Each expected output comes from the official runtime, over a file with the weights in it.
"""

import json
import logging
import shutil
import warnings
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, Dense
from edge_lora.bundle import hash_file, read_manifest, write_manifest
from edge_lora.errors import BundleError, EdgeLoraError, UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.slots import SlotTable

pytest.importorskip("edge_lora_executorch")
torch = pytest.importorskip("torch")
pytest.importorskip("executorch")
IDS = {"ids": np.array([[1, 5, 2]], np.int64)}


class Net(torch.nn.Module):
    """A table, and two linear layers, one with a bias."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(16, 24)
        self.up = torch.nn.Linear(24, 40)
        self.down = torch.nn.Linear(40, 7, bias=False)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.table(ids))))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("EDGE_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from edge_lora.export import export_bundle

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bundles") / "net"
    ids = torch.tensor([[1, 5, 2]])
    export_bundle(
        Net().eval(), folder, example_inputs={"ids": ids}, engines=("executorch",),
        slot_names=["*"], progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def weights(bundle):
    """Return other values for every slot."""
    rng = np.random.default_rng(0)
    slots = read_manifest(bundle).slots.values()
    return {slot.name: rng.standard_normal(slot.shape, np.float32) for slot in slots}


@pytest.fixture(scope="module")
def adapter(bundle, weights, tmp_path_factory):
    """Return an adapter file that turns the base into ``weights``."""
    manifest = read_manifest(bundle)
    file = np.fromfile(bundle / manifest.program.file, np.uint8)
    deltas = {}
    for name, values in weights.items():
        slot, place = manifest.slots[name], manifest.program.slots[name]
        raw = file[place.offset : place.offset + values.nbytes]
        base = raw.view(np.float32).reshape(slot.shape)
        deltas[name] = Delta(slot.shape, slot.dtype, (Dense(values - base),), slot.slot_hash)
    identity = BaseIdentity(manifest.fingerprint, manifest.base_id)
    path = tmp_path_factory.mktemp("adapters") / "other.safetensors"
    return Adapter("other", "made for tests", identity, deltas).save(path)


def rewritten(bundle, folder, weights, *, in_table=True):
    """Copy a bundle with other values in its program, under the names that the old ones gave."""
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    path = folder / manifest.program.file
    data = bytearray(path.read_bytes())
    for name, values in weights.items():
        offset = manifest.program.slots[name].offset
        data[offset : offset + values.nbytes] = values.tobytes()
    path.write_bytes(bytes(data))
    files = {**manifest.files, manifest.program.file: hash_file(path)}
    slots = list(manifest.slots.values())
    if in_table:
        slots = [replace(s, sha256=sha256(weights[s.name].tobytes()).hexdigest()) for s in slots]
    table = SlotTable(slots, manifest.base_id, manifest.fingerprint)
    write_manifest(folder, replace(manifest, files=files, slots=table))
    return folder


def official(folder):
    """Run the program with ExecuTorch's own Python runtime."""
    with warnings.catch_warnings():  # its imports use what Python will drop
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(folder / read_manifest(folder).program.file))
    (found,) = program.load_method("forward").execute([torch.from_numpy(IDS["ids"])])
    return found.numpy().copy()


def output(session):
    (found,) = session.run(IDS).values()
    return found


@pytest.mark.parametrize("route", ["packed", "reload"])
def test_a_switch_is_what_the_official_runtime_makes_of_merged_weights(
    bundle, weights, adapter, route, tmp_path
):
    merged = official(rewritten(bundle, tmp_path / "merged", weights))
    with open_bundle(bundle, threads=1, route=route) as session:
        base = output(session)
        np.testing.assert_array_equal(base, official(bundle))
        session.load_adapter(adapter, "other")
        session.set_adapter("other")
        np.testing.assert_allclose(output(session), merged, rtol=1e-5, atol=1e-5)
        assert np.abs(merged - base).max() > 0.1
        session.disable_adapters()
        np.testing.assert_array_equal(output(session), base)


def test_programs_whose_weights_have_equal_names_do_not_share_them(
    bundle, weights, adapter, tmp_path
):
    """A cache keyed by name serves the first program's weights to the second, without a word."""
    other = rewritten(bundle, tmp_path / "other", weights)
    with (
        open_bundle(bundle, threads=1, route="packed") as one,
        open_bundle(other, threads=1, route="packed") as two,
        open_bundle(other, threads=1, route="reload") as three,
    ):
        one.load_adapter(adapter, "other")
        for switched in (False, True):
            np.testing.assert_array_equal(output(two), official(other))
            np.testing.assert_array_equal(output(three), official(other))
            one.set_adapters(["other"] if switched else [])
        one.disable_adapters()
        np.testing.assert_array_equal(output(one), official(bundle))


def test_sessions_of_one_bundle_are_not_linked(bundle, adapter):
    with (
        open_bundle(bundle, threads=1, route="packed") as one,
        open_bundle(bundle, threads=1, route="packed") as two,
    ):
        base = output(two)
        for session in (one, two):
            session.load_adapter(adapter, "other")
        one.set_adapter("other")
        np.testing.assert_array_equal(output(two), base)
        switched = output(one)
        two.set_adapter("other")
        two.disable_adapters()
        np.testing.assert_array_equal(output(one), switched)
        assert two.differing_slots() == []


def test_a_session_after_a_patched_one_begins_with_the_base(bundle, adapter):
    """The memory file of a closed session may have left its number, and so its path, behind."""
    for _ in range(3):
        with open_bundle(bundle, threads=1, route="packed") as session:
            np.testing.assert_array_equal(output(session), official(bundle))
            session.load_adapter(adapter, "other")
            session.set_adapter("other")


def test_what_is_patched_never_reaches_the_disk(bundle, adapter):
    path = bundle / read_manifest(bundle).program.file
    before, files = path.read_bytes(), sorted(bundle.rglob("*"))
    with open_bundle(bundle, threads=1, route="packed") as session:
        session.load_adapter(adapter, "other")
        session.set_adapter("other")
        assert path.read_bytes() == before
        assert sorted(bundle.rglob("*")) == files
    assert path.read_bytes() == before


def doctored(bundle, folder, **changes):
    """Copy a bundle whose manifest says something wrong about every packed slot."""
    shutil.copytree(bundle, folder)
    document = json.loads((folder / "bundle.json").read_text())
    for place in document["executorch"]["slots"].values():
        if place["key"]:
            place.update(changes)
    (folder / "bundle.json").write_text(json.dumps(document))
    return folder


def test_weights_that_only_look_as_if_they_were_read_in_place_are_found_out(
    bundle, adapter, tmp_path, caplog
):
    """The partitioner bakes mutable weights into its delegate; patching them has no effect."""
    folder = doctored(bundle, tmp_path / "baked", key="", is_read_in_place=True)
    with pytest.raises(UnsupportedError, match="does not change the output"):
        open_bundle(folder, threads=1, route="unpacked")
    with caplog.at_level(logging.WARNING), open_bundle(folder, threads=1) as session:
        assert session.route == "reload"
        session.load_adapter(adapter, "other")
        session.set_adapter("other")
        assert np.abs(output(session) - official(bundle)).max() > 0.1
    assert "route 'reload' is in use instead of 'packed'" in caplog.text


@pytest.mark.parametrize("route", ["packed", "reload"])
def test_weights_in_the_programs_description_are_refused(bundle, route, tmp_path):
    """An adapter for such a slot would rewrite what the engine executes."""
    shutil.copytree(bundle, tmp_path / "forged")
    document = json.loads((bundle / "bundle.json").read_text())
    document["executorch"]["slots"]["table.weight"]["offset"] = 64
    (table,) = (slot for slot in document["slots"] if slot["name"] == "table.weight")
    data = (bundle / document["executorch"]["file"]).read_bytes()
    table["sha256"] = sha256(data[64 : 64 + 4 * 16 * 24]).hexdigest()
    (tmp_path / "forged" / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"has its data(.|\n)*table\.weight: at 64"):
        open_bundle(tmp_path / "forged", threads=1, route=route)


def test_names_of_packed_weights_that_are_not_there_are_refused(bundle, tmp_path):
    folder = doctored(bundle, tmp_path / "lost", key="0" * 64)
    with pytest.raises(EdgeLoraError):
        open_bundle(folder, threads=1, route="packed")


def test_outputs_that_the_program_does_not_have_are_refused(bundle, tmp_path):
    folder = Path(shutil.copytree(bundle, tmp_path / "outputs"))
    document = json.loads((folder / "bundle.json").read_text())
    (output,) = document["executorch"]["outputs"]
    document["executorch"]["outputs"] = [output, {**output, "name": "other"}]
    (folder / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="names 2 outputs, the program has 1"):
        open_bundle(folder, threads=1)


def test_a_forged_layout_is_not_trusted(bundle, adapter, tmp_path, monkeypatch):
    """A cached layout of the right size, but not of this kernel, fits no packed weight."""
    from edge_lora.native import Layout

    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path))
    open_bundle(bundle, threads=1, route="packed").close()
    for shape in ((40, 24), (24, 40), (7, 40)):
        forged = Layout.plain(shape[1], shape[0], "oi").to_bytes()
        for path in (tmp_path / "layouts").iterdir():
            path.write_bytes(forged)
        with pytest.raises(UnsupportedError, match="no memory of the engine holds its weight"):
            open_bundle(bundle, threads=1, route="packed")
        open_bundle(bundle, threads=1, route="packed").close()  # it was learned anew


def test_a_program_with_other_weights_than_its_table_is_refused(bundle, weights, tmp_path):
    folder = rewritten(bundle, tmp_path / "other", weights, in_table=False)
    with pytest.raises(BundleError, match="does not hold the weights"):
        open_bundle(folder, threads=1)


@pytest.mark.parametrize("route", ["packed", "reload"])
@pytest.mark.parametrize("shift", [-16, -4, 4])
def test_a_manifest_changed_after_it_was_trusted_is_read_again(bundle, route, shift, tmp_path):
    """The files are as they were; only where a weight lies is another place now."""
    folder = tmp_path / "shifted"
    shutil.copytree(bundle, folder)
    open_bundle(folder, threads=1).close()
    document = json.loads((folder / "bundle.json").read_text())
    document["executorch"]["slots"]["up.weight"]["offset"] += shift
    (folder / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"up\.weight: the bytes in executorch/model\.pte"):
        open_bundle(folder, threads=1, route=route)
