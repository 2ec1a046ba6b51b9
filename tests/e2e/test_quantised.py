"""Adapters fused into 8-bit programs: codes change, scales stay, and what that costs is told."""

import itertools
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter, reference
from edge_lora.bundle import read_manifest
from edge_lora.bundle_check import stored_weight
from edge_lora.errors import BundleError, NoEffectError, UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.runtime.canary import canary_feeds

sys.path.insert(0, str(Path(__file__).parent))
from conftest import adapter_maker
from oracles import run_program

pytest.importorskip("edge_lora_executorch")
KINDS = ["sparse", "low_rank", "dense", "set", "dora"]


@pytest.fixture(scope="module")
def bundle(mlp, tmp_path_factory):
    import torch

    from edge_lora.export import export_bundle

    folder = tmp_path_factory.mktemp("mlp") / "int8"
    export_bundle(
        mlp, folder, example_inputs={"input": torch.randn(3, 24)}, engines=("executorch",),
        program_weights="int8-dynamic", progress=False,
    )  # fmt: skip
    assert {place.dtype for place in read_manifest(folder).program.slots.values()} == {"I8"}
    return folder


@pytest.fixture(scope="module")
def make(bundle, tmp_path_factory):
    return adapter_maker(bundle, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=["packed", "reload"])
def session(request, bundle):
    with open_bundle(bundle, threads=1, route=request.param) as opened:
        yield opened


def codes_with(bundle, path):
    """Return slot -> codes that NumPy rounds the adapter to, and the relative error of that."""
    manifest, adapter = read_manifest(bundle), Adapter.load(path)
    file = np.fromfile(bundle / manifest.program.file, np.uint8)
    codes, lost, meant = {}, 0.0, 0.0
    for name, delta in adapter.deltas.items():
        place, rows = manifest.program.slots[name], delta.shape[0]
        scales = file[place.scales_offset : place.scales_offset + 4 * rows].view(np.float32)
        base = np.array(stored_weight(bundle, manifest, name))
        wanted = reference.apply(base, [(form, adapter.alpha) for form in delta.forms])
        codes[name] = np.clip(np.rint(wanted / scales[:, None]), -128, 127).astype(np.int8)
        lost += np.square(codes[name] * scales[:, None].astype(float) - wanted).sum()
        meant += np.square(wanted.astype(float) - base).sum()
    return codes, np.sqrt(lost / meant)


def rewritten(bundle, folder, codes):
    """Write a program whose weights are ``codes``."""
    manifest = read_manifest(bundle)
    data = bytearray((bundle / manifest.program.file).read_bytes())
    for name, values in codes.items():
        offset = manifest.program.slots[name].offset
        data[offset : offset + values.nbytes] = values.tobytes()
    (folder / manifest.program.file).parent.mkdir(parents=True)
    (folder / manifest.program.file).write_bytes(bytes(data))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_switch_is_the_program_with_the_adapters_codes(session, bundle, make, kind, tmp_path):
    path, feeds = make(kind), canary_feeds(session.manifest)
    base, before = session.run(feeds), session.image_sha256()
    session.load_adapter(path, kind)
    stats = session.set_adapter(kind)
    codes, error = codes_with(bundle, path)
    expected = run_program(session.manifest, rewritten(bundle, tmp_path, codes), feeds)
    for name, found in session.run(feeds).items():
        np.testing.assert_array_equal(found, expected[name])
        assert np.abs(found - base[name]).max() > 1e-3
    assert stats.rounding_error == pytest.approx(error, rel=1e-3)
    assert stats.bytes > 0
    session.disable_adapters()
    assert session.differing_slots() == []
    assert session.image_sha256() == before
    for name, found in session.run(feeds).items():
        np.testing.assert_array_equal(found, base[name])


def test_a_small_rounding_error_means_the_fp32_adapter(session, bundle, mlp_bundle, make):
    """Over the same slots in fp32, the adapter does the same up to what 8 bits cost the base."""
    path = make("low_rank", 3, alpha=0.2)
    feeds = canary_feeds(session.manifest)
    session.load_adapter(path, "skill")
    base = session.run(feeds)["output_0"]
    stats = session.set_adapter("skill")
    with open_bundle(mlp_bundle, threads=1) as fp32:
        exact = fp32.run(feeds)["output_0"]
        fp32.load_adapter(path, "skill")
        fp32.set_adapter("skill")
        wanted = fp32.run(feeds)["output_0"] - exact
    found = session.run(feeds)["output_0"] - base
    assert 0 < stats.rounding_error < 0.5
    assert np.linalg.norm(found - wanted) < np.linalg.norm(wanted)


def test_any_walk_ends_at_the_base(session, make):
    before = session.image_sha256()
    rng = np.random.default_rng(0)
    seen = {}
    for kind in KINDS:
        session.load_adapter(make(kind), kind)  # others may be active while this one is packed
        session.set_adapter(kind)
        seen[kind] = session.image_sha256()
    for _ in range(20):
        if rng.random() < 0.3:
            session.set_adapters(["sparse", "low_rank"], [float(w) for w in rng.normal(size=2)])
        else:
            kind = str(rng.choice(KINDS))
            session.set_adapter(kind)
            assert session.image_sha256() == seen[kind]
    session.disable_adapters()
    assert session.differing_slots() == []
    assert session.image_sha256() == before


def test_a_delta_below_half_a_step_has_no_effect(session, make):
    with pytest.raises(NoEffectError, match="no effect"):
        session.load_adapter(make("low_rank", 4, alpha=1e-6), "nothing")
    assert session.adapters == []


def test_compiled_patches_come_back_from_disk(bundle, make, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path))
    digests = set()
    for damage in (None, b"junk", None):
        for path in (tmp_path / "patches").glob("*"):
            path.write_bytes(damage or path.read_bytes())
        with open_bundle(bundle, threads=1, route="packed") as session:
            session.load_adapter(make("sparse", 5), "a")
            session.set_adapter("a")
            digests.add(session.image_sha256())
    assert len(digests) == 1


def test_an_interrupt_at_any_point_of_a_swap_leaves_what_was_active(bundle, make, monkeypatch):
    with open_bundle(bundle, threads=1, route="packed") as session:
        base = session.image_sha256()
        for kind in ("sparse", "dense"):
            session.load_adapter(make(kind), kind)
        session.set_adapter("sparse")
        before = session.image_sha256()
        weights = session._live.weights
        pieces = len(weights._active)
        find, left = weights._block, itertools.count()

        def interrupted(piece):
            if next(left) == 0:
                raise KeyboardInterrupt
            return find(piece)

        monkeypatch.setattr(weights, "_block", interrupted)
        for skipped in range(2 * pieces):
            left = itertools.count(-skipped)
            with pytest.raises(KeyboardInterrupt):
                session.set_adapter("dense")
            assert session.image_sha256() == before
            assert session.active_adapters == {"sparse": 1.0}
        session.disable_adapters()
        assert session.image_sha256() == base


def test_an_interrupt_after_a_swap_is_taken_back(bundle, make, monkeypatch):
    from edge_lora.runtime.quantised_weights import QuantisedWeights

    swap = QuantisedWeights.swap

    def interrupted(self, parts):
        swap(self, parts)
        monkeypatch.setattr(QuantisedWeights, "swap", swap)
        raise KeyboardInterrupt

    with open_bundle(bundle, threads=1, route="packed") as session:
        session.load_adapter(make("sparse"), "sparse")
        monkeypatch.setattr(QuantisedWeights, "swap", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.set_adapter("sparse")
        assert session.active_adapters == {}
        assert session.differing_slots() == []


def test_a_session_whose_restoring_fails_too_says_that_it_is_broken(bundle, make, monkeypatch):
    with open_bundle(bundle, threads=1, route="packed") as session:
        session.load_adapter(make("sparse"), "sparse")
        weights = session._live.weights

        def broken(piece):
            raise MemoryError

        monkeypatch.setattr(weights, "_block", broken)
        with pytest.raises(MemoryError):
            session.set_adapter("sparse")
        with pytest.raises(UnsupportedError, match="failed half way"):
            session.run(canary_feeds(session.manifest))


def test_sessions_are_not_linked(bundle, make):
    with (
        open_bundle(bundle, threads=1, route="packed") as one,
        open_bundle(bundle, threads=1, route="packed") as two,
    ):
        before = two.image_sha256()
        one.load_adapter(make("dense"), "a")
        one.set_adapter("a")
        assert two.image_sha256() == before
        assert two.differing_slots() == []


def test_an_untrustworthy_image_is_not_patched(bundle, caplog, monkeypatch):
    """If bytes that we write do not reach the kernels, the self-test finds it out."""
    from edge_lora.runtime.engines.executorch_engine import ExecuTorchEngine

    elsewhere = ExecuTorchEngine.blocks
    monkeypatch.setattr(
        ExecuTorchEngine,
        "blocks",
        lambda self: {s: [b.copy() for b in blocks] for s, blocks in elsewhere(self).items()},
    )
    with caplog.at_level(logging.WARNING), open_bundle(bundle, threads=1) as session:
        assert session.route == "reload"
    assert "does not change the output" in caplog.text


@pytest.mark.parametrize("route", ["packed", "reload"])
@pytest.mark.parametrize(
    ("key", "shift"), [("offset", -16), ("offset", 1), ("scales_offset", 4), ("scales_offset", -16)]
)
def test_codes_or_scales_that_lie_elsewhere_are_refused(bundle, route, key, shift, tmp_path):
    folder = tmp_path / "shifted"
    shutil.copytree(bundle, folder)
    document = json.loads((folder / "bundle.json").read_text())
    document["executorch"]["slots"]["2.weight"][key] += shift
    (folder / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"2\.weight: (the bytes|no scales)|overlap"):
        open_bundle(folder, threads=1, route=route)


def test_a_layer_with_the_scales_of_another_is_found_out(bundle, caplog, monkeypatch):
    """XNNPACK hands a layer the packed weight of another that has equal codes: do what it does."""
    from edge_lora.runtime.engines.program_memory import ProgramMemory

    load = ProgramMemory._load

    def mixed_up(self, handle, threads, probed):
        load(self, handle, threads, probed)
        offset, size = max(self.program.entries().values(), key=lambda place: place[1])
        packed = self.program.packed()[offset : offset + size]
        packed[:] = packed[::-1].copy()

    monkeypatch.setattr(ProgramMemory, "_load", mixed_up)
    with caplog.at_level(logging.WARNING), open_bundle(bundle, threads=1) as session:
        assert session.route == "reload"
    assert "XNNPACK takes some of its layers for the same" in caplog.text


def test_the_adapter_file_of_the_fp32_base_fits(bundle, mlp_bundle):
    assert read_manifest(bundle).fingerprint == read_manifest(mlp_bundle).fingerprint
