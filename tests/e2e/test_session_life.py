"""A session's life: closing, use after it, files that change under it, threads."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity
from edge_lora.errors import AdapterFileError, EdgeLoraError, UnsupportedError
from edge_lora.runtime import open_bundle

ROUTES = ["packed", "unpacked", "reload"]


@pytest.fixture
def x():
    return {"input": np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)}


@pytest.mark.parametrize("route", ROUTES)
def test_closing_twice_and_use_after_it(route, mlp_bundle, make_mlp_adapter, x):
    session = open_bundle(mlp_bundle, threads=1, route=route)
    session.load_adapter(make_mlp_adapter(), "a")
    session.set_adapter("a")
    binding = session.io_binding()
    binding.bind_input("input", x["input"])
    session.close()
    session.close()
    for use in (
        lambda: session.run(x),
        lambda: session.run(x, adapter="a"),
        binding.run,
        lambda: session.set_adapter("a"),
        session.disable_adapters,
        lambda: session.load_adapter(make_mlp_adapter("low_rank"), "b"),
        session.differing_slots,
        session.image_sha256,
        lambda: session.delete_adapter("a"),
    ):
        with pytest.raises(UnsupportedError, match="is closed"):
            use()
    with open_bundle(mlp_bundle, threads=1, route=route) as again:
        assert again.differing_slots() == []


@pytest.mark.parametrize("route", ROUTES)
def test_a_file_that_changed_is_not_taken_for_the_one_that_was_loaded(
    route, mlp_bundle, make_mlp_adapter, x, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path / "cache"))
    path = shutil.copy(make_mlp_adapter("sparse", 1), tmp_path / "a.safetensors")
    with open_bundle(mlp_bundle, threads=1, route=route, adapter_budget_bytes=0) as session:
        base = session.run(x)["output_0"]
        session.load_adapter(path, "a")
        session.load_adapter(make_mlp_adapter("sparse", 3), "b")
        shutil.copy(make_mlp_adapter("sparse", 2), path)
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(AdapterFileError, match="changed since it was loaded"):
            session.set_adapter("a")
        assert session.active_adapters == {}
        assert session.run(x)["output_0"].tobytes() == base.tobytes()
        session.set_adapter("b")  # the session is still of use


@pytest.mark.parametrize("budget", [None, 0])
def test_loading_and_switching_while_others_run(budget, mlp_bundle, make_mlp_adapter, x):
    paths = [make_mlp_adapter("sparse", seed) for seed in range(6)]
    with open_bundle(mlp_bundle, threads=1, adapter_budget_bytes=budget) as session:
        base = session.run(x)["output_0"].tobytes()
        allowed = {base}
        for i, path in enumerate(paths):
            session.load_adapter(path, f"known-{i}")
            session.set_adapter(f"known-{i}")
            allowed.add(session.run(x)["output_0"].tobytes())
            session.disable_adapters()
            session.delete_adapter(f"known-{i}")
        assert len(allowed) == 7
        seen, problems, stop = set(), [], threading.Event()

        def run():
            while not stop.is_set():
                seen.add(session.run(x)["output_0"].tobytes())

        def change(worker):
            try:
                for round_ in range(10):
                    for i in range(worker, 6, 2):
                        session.load_adapter(paths[i], f"{worker}-{i}")
                        session.set_adapter(f"{worker}-{i}")
                        session.disable_adapters()
                        session.delete_adapter(f"{worker}-{i}") if round_ % 2 else None
                        if not round_ % 2:
                            with pytest.raises(EdgeLoraError, match="loaded already"):
                                session.load_adapter(paths[i], f"{worker}-{i}")
                            session.delete_adapter(f"{worker}-{i}")
            except Exception as error:
                problems.append(error)

        runners = [threading.Thread(target=run) for _ in range(2)]
        changers = [threading.Thread(target=change, args=(w,)) for w in range(2)]
        for thread in runners + changers:
            thread.start()
        for thread in changers:
            thread.join(60)
        stop.set()
        for thread in runners:
            thread.join(10)
        # One worker may fuse between the other's disable and delete of its own: never an error.
        assert problems == []
        assert base in seen
        assert seen <= allowed
        session.disable_adapters()
        assert session.differing_slots() == []


def test_ten_adapters_cost_ten_patches(mlp_bundle, make_mlp_adapter):
    paths = [make_mlp_adapter("sparse", seed) for seed in range(10)]
    values = sum(d.forms[0].values.size for p in paths for d in Adapter.load(p).deltas.values())
    with open_bundle(mlp_bundle, threads=1) as session:
        for i, path in enumerate(paths):
            session.load_adapter(path, str(i))
        assert 0 < session.patch_bytes < 40 * values  # old and new value, place, and a little


@pytest.mark.parametrize("route", ROUTES)
def test_a_load_gives_the_active_adapter_back_though_its_file_is_gone(
    route, mlp_bundle, make_mlp_adapter, x, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path / "cache"))
    path = Path(shutil.copy(make_mlp_adapter("sparse", 1), tmp_path / "a.safetensors"))
    with open_bundle(mlp_bundle, threads=1, route=route, adapter_budget_bytes=0) as session:
        session.load_adapter(path, "a")
        session.set_adapter("a")
        fused = session.run(x)["output_0"]
        path.unlink()
        shutil.rmtree(tmp_path / "cache")
        session.load_adapter(make_mlp_adapter("sparse", 2), "b")
        assert session.active_adapters == {"a": 1.0}
        assert session.run(x)["output_0"].tobytes() == fused.tobytes()


def test_an_unbound_adapter_loads_with_a_warning(mlp_bundle, make_mlp_adapter, x, tmp_path):
    bound = Adapter.load(make_mlp_adapter("sparse", 1))
    path = replace(bound, base=BaseIdentity("")).save(tmp_path / "unbound.safetensors")
    with open_bundle(mlp_bundle, threads=1) as session:
        with pytest.warns(UserWarning, match="edge-lora convert FILE OUT --base BUNDLE"):
            session.load_adapter(path, "unbound")
        session.load_adapter(make_mlp_adapter("sparse", 1), "bound")
        with session.using("unbound"):
            found = session.run(x)["output_0"]
        with session.using("bound"):
            assert session.run(x)["output_0"].tobytes() == found.tobytes()


def test_deleting_an_adapter_leaves_what_its_twin_needs(
    mlp_bundle, make_mlp_adapter, x, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path / "cache"))
    path = shutil.copy(make_mlp_adapter("low_rank", 1), tmp_path / "a.safetensors")
    with open_bundle(mlp_bundle, threads=1) as session:
        for name in ("one", "twin"):
            session.load_adapter(path, name)
        session.set_adapter("one")
        expected = session.run(x)["output_0"]
        session.delete_adapter("twin")
        Path(path).unlink()
        shutil.rmtree(tmp_path / "cache")
        session.load_adapter(make_mlp_adapter("low_rank", 2), "other")
        assert session.active_adapters == {"one": 1.0}
        assert session.run(x)["output_0"].tobytes() == expected.tobytes()


def test_a_session_that_cannot_go_back_after_a_canary_refuses_to_run(
    mlp_bundle, make_mlp_adapter, x, monkeypatch
):
    with open_bundle(mlp_bundle, threads=1) as session:
        session.load_adapter(make_mlp_adapter("low_rank", 1), "a")
        session.set_adapter("a")
        swap = session._live.weights.swap

        def stuck(parts):
            if [loaded.name for loaded, _ in parts] == ["a"]:
                raise MemoryError
            return swap(parts)

        monkeypatch.setattr(session._live.weights, "swap", stuck)
        with pytest.raises(MemoryError):
            session.load_adapter(make_mlp_adapter("low_rank", 2), "b")
        with pytest.raises(UnsupportedError, match="open the bundle again"):
            session.run(x)


def test_nothing_stays_of_a_load_that_was_interrupted(mlp_bundle, make_mlp_adapter, x, monkeypatch):
    with open_bundle(mlp_bundle, threads=1) as session:
        with monkeypatch.context() as patch:
            patch.setattr(session._live.engine, "run", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.load_adapter(make_mlp_adapter("low_rank", 1), "a")
        assert session.patch_bytes == 0
        session.load_adapter(make_mlp_adapter("low_rank", 2), "a")
        found = session.run(x, adapter="a")["output_0"]
        session.set_adapter("a")
        np.testing.assert_allclose(found, session.run(x)["output_0"], rtol=1e-4, atol=1e-5)


def _interrupted(feeds):
    raise KeyboardInterrupt


@pytest.mark.parametrize("rank", [2, "auto:5ms", "nonsense"])
def test_a_rank_without_an_adapter_is_refused(rank, mlp_bundle, x):
    with open_bundle(mlp_bundle, threads=1) as session:
        for use in (lambda: session.run(x, rank=rank), lambda: session.io_binding(rank=rank)):
            with pytest.raises(UnsupportedError, match="is of no adapter"):
                use()
