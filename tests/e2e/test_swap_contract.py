"""The promises of a switch, on a real engine."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter
from edge_lora.errors import AdapterMismatchError, NoEffectError, UnknownNameError, UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.runtime.canary import canary_feeds

sys.path.insert(0, str(Path(__file__).parent))
from oracles import merged_run

KINDS = [
    "sparse", "line", "low_rank", "dense", "rows", "columns", "set", "mixed",
    "coded", "dora", "ia3",
]  # fmt: skip


ENGINES = ["onnxruntime", "executorch"]
ROUTES = [
    ("onnxruntime", "packed"), ("onnxruntime", "unpacked"), ("onnxruntime", "reload"),
    ("executorch", "packed"), ("executorch", "reload"),
]  # fmt: skip


@pytest.fixture(params=ROUTES, ids="-".join)
def session(request, bundle_for):
    engine, route = request.param
    with open_bundle(bundle_for(engine), threads=2, route=route) as opened:
        assert (opened.engine, opened.route) == (engine, route)
        yield opened


@pytest.fixture
def feeds(session):
    return canary_feeds(session.manifest)


def assert_equal_bits(found, expected):
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_a_session_built_from_merged_weights(
    session, make_adapter, feeds, kind, tmp_path
):
    path = make_adapter(kind)
    base = session.run(feeds)
    session.load_adapter(path, kind)
    assert_equal_bits(session.run(feeds), base)  # loading changes nothing
    stats = session.set_adapter(kind)
    assert stats.bytes > 0
    assert stats.route == session.route
    expected = merged_run(session, [(path, 1.0)], feeds, tmp_path / "merged")
    found = session.run(feeds)
    if session.route == "packed":
        assert_equal_bits(found, expected)
    else:  # other kernels, which sum in another order
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-3, atol=1e-3)
    session.disable_adapters()
    assert_equal_bits(session.run(feeds), base)
    assert session.differing_slots() == []


def test_a_weighted_sum_equals_the_merged_session(session, make_adapter, feeds, tmp_path):
    paths = [make_adapter("sparse", 1), make_adapter("sparse", 2), make_adapter("low_rank", 3)]
    for i, path in enumerate(paths):
        session.load_adapter(path, str(i))
    session.set_adapters(["0", "1", "2"], [0.7, -0.3, 0.5])
    assert session.active_adapters == {"0": 0.7, "1": -0.3, "2": 0.5}
    if session.route == "packed":
        parts = list(zip(paths, [0.7, -0.3, 0.5], strict=True))
        assert_equal_bits(
            session.run(feeds), merged_run(session, parts, feeds, tmp_path / "merged")
        )
    session.set_adapters([])
    assert session.differing_slots() == []


def test_any_walk_ends_at_the_base(session, make_adapter):
    before = session.image_sha256()
    rng = np.random.default_rng(0)
    for i, kind in enumerate(KINDS):
        session.load_adapter(make_adapter(kind), kind)
        assert session.image_sha256() == before, i
    composable = [k for k in KINDS if k != "set"]
    for _ in range(60):
        if rng.random() < 0.3:
            picks = list(rng.choice(composable, 2, replace=False))
            session.set_adapters(picks, [float(w) for w in rng.normal(size=2)])
        else:
            session.set_adapter(str(rng.choice(KINDS)))
    assert session.differing_slots()
    session.disable_adapters()
    assert session.differing_slots() == []
    assert session.image_sha256() == before


def test_runs_see_the_old_adapter_or_the_new_one(session, make_adapter, feeds):
    names = ["a", "b"]
    for seed, name in enumerate(names):
        session.load_adapter(make_adapter("sparse", seed), name)
    allowed = {session.run(feeds)["logits"].tobytes()}
    for name in names:
        session.set_adapter(name)
        allowed.add(session.run(feeds)["logits"].tobytes())
    seen, stop = [], threading.Event()

    def reader():
        while not stop.is_set():
            seen.append(session.run(feeds)["logits"].tobytes())

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(100):
        session.set_adapters([names[i % 2]] if i % 3 else [])
    stop.set()
    for thread in threads:
        thread.join(30)
    assert len(seen) > 10
    assert set(seen) <= allowed


def test_an_error_changes_nothing(session, make_adapter, feeds, tmp_path):
    session.load_adapter(make_adapter("sparse"), "good")
    session.set_adapter("good")
    before, state = session.image_sha256(), session.state_id
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(make_adapter("low_rank").read_bytes()[:-1])
    with pytest.raises(Exception, match="broken"):
        session.load_adapter(broken)
    with pytest.raises(UnknownNameError, match="loaded: good"):
        session.set_adapter("missing")
    with pytest.raises(UnsupportedError, match="not finite"):
        session.set_adapters(["good"], [float("nan")])
    assert (session.image_sha256(), session.state_id) == (before, state)
    assert session.adapters == ["good"]


def test_an_adapter_of_another_base_is_refused_with_every_reason(session, make_adapter, tmp_path):
    import dataclasses

    adapter = Adapter.load(make_adapter("sparse"))
    slot, delta = next(iter(adapter.deltas.items()))
    wrong = {
        "no.such.slot": delta,
        slot: dataclasses.replace(delta, slot_hash="0" * 16),
    }
    path = dataclasses.replace(
        adapter, base=dataclasses.replace(adapter.base, fingerprint="0" * 64), deltas=wrong
    ).save(tmp_path / "other.safetensors")
    with pytest.raises(AdapterMismatchError) as caught:
        session.load_adapter(path)
    for text in ("fingerprints differ", "no.such.slot: no such slot", "trained on weight 0000"):
        assert text in str(caught.value)


def test_an_adapter_without_effect_is_refused(session, make_adapter, tmp_path):
    import dataclasses

    path = dataclasses.replace(Adapter.load(make_adapter("sparse")), alpha=0.0).save(
        tmp_path / "nothing.safetensors"
    )
    with pytest.raises(NoEffectError, match="no effect"):
        session.load_adapter(path)
    assert session.adapters == []


def test_what_replaces_a_weight_is_neither_weighted_nor_composed(session, make_adapter, feeds):
    session.load_adapter(make_adapter("set", 1), "set")
    session.load_adapter(make_adapter("sparse", 2), "other")
    before = session.run(feeds)
    for names, weights in ((["set"], [0.5]), (["set", "other"], [1.0, 1.0])):
        with pytest.raises(UnsupportedError, match="mode 'set'"):
            session.set_adapters(names, weights)
        assert session.active_adapters == {}
        assert_equal_bits(session.run(feeds), before)


def test_using_gives_back_what_was_there(session, make_adapter):
    session.load_adapter(make_adapter("sparse", 1), "a")
    session.load_adapter(make_adapter("low_rank", 2), "b")
    session.set_adapter("a", 0.5)
    with session.using("b"):
        assert session.active_adapters == {"b": 1.0}
    assert session.active_adapters == {"a": 0.5}
    with pytest.raises(UnsupportedError, match="is active"):
        session.delete_adapter("a")
    session.disable_adapters()
    session.delete_adapter("a")
    assert session.adapters == ["b"]


def test_state_id_names_the_content(session, make_adapter):
    base = session.state_id
    session.load_adapter(make_adapter("sparse", 1), "a")
    session.load_adapter(make_adapter("sparse", 2), "b")
    ids = {base}
    for names, weights in (
        [["a"], [1.0]],
        [["a"], [0.5]],
        [["b"], [1.0]],
        [["a", "b"], [1.0, 1.0]],
    ):
        session.set_adapters(names, weights)
        ids.add(session.state_id)
    assert len(ids) == 5
    session.disable_adapters()
    assert session.state_id == base


@pytest.mark.parametrize("engine", ENGINES)
def test_two_sessions_of_one_bundle_do_not_touch_each_other(engine, bundle_for, make_adapter):
    bundle = bundle_for(engine)
    with open_bundle(bundle, threads=2, route="packed") as first:
        feeds = canary_feeds(first.manifest)
        base = first.run(feeds)
        with open_bundle(bundle, threads=2, route="packed") as second:
            for session, kind in ((first, "sparse"), (second, "low_rank")):
                session.load_adapter(make_adapter(kind), "skill")
            first.set_adapter("skill")
            assert_equal_bits(second.run(feeds), base)
            one = first.run(feeds)
            second.set_adapter("skill")
            assert_equal_bits(first.run(feeds), one)
        assert_equal_bits(first.run(feeds), one)
        first.disable_adapters()
        assert_equal_bits(first.run(feeds), base)


def test_a_slot_may_be_called_by_its_alias(session, make_adapter, tmp_path):
    import dataclasses

    adapter = Adapter.load(make_adapter("sparse", slots="model.embed_tokens.weight"))
    (delta,) = adapter.deltas.values()
    path = dataclasses.replace(adapter, deltas={"lm_head.weight": delta}).save(tmp_path / "a.st")
    session.load_adapter(path, "head")
    assert session.set_adapter("head").bytes > 0
    session.disable_adapters()
    assert session.differing_slots() == []


def test_deleting_an_adapter_frees_all_its_patches(session, make_adapter):
    session.load_adapter(make_adapter("sparse", 1), "a")
    once = session.patch_bytes
    for weight in (0.1, 0.2, 0.3, 0.4):
        session.set_adapter("a", weight)
    if session.route != "reload":
        assert session.patch_bytes <= 2 * once + 1000
    session.disable_adapters()
    session.delete_adapter("a")
    assert session.patch_bytes == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_layout_cache_is_made_again(engine, bundle_for, tmp_path, monkeypatch):
    from edge_lora.runtime.engines.packed_blocks import packed_layout

    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path))
    for content in (None, b"", b"junk"):
        for path in (tmp_path / "layouts").glob("*"):
            path.write_bytes(content or b"")
        packed_layout.cache_clear()
        open_bundle(bundle_for(engine), threads=1, route="packed").close()
    assert all(path.stat().st_size > 100 for path in (tmp_path / "layouts").iterdir())
