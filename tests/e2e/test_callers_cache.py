"""Runs over a cache inside the graph: never a mixture of what two adapters have written there."""

import sys
from pathlib import Path

import numpy as np
import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime import open_bundle
from edge_lora.runtime.generate import generate

sys.path.insert(0, str(Path(__file__).parent))
from conftest import adapter_maker


@pytest.fixture(scope="module")
def make(program_bundle, tmp_path_factory):
    return adapter_maker(program_bundle, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def session(program_bundle, make):
    with open_bundle(program_bundle, threads=1) as opened:
        opened.load_adapter(make("low_rank", slots="*_proj.weight"), "A")
        yield opened


def feeds(tokens, start):
    return {"input_ids": np.array([tokens], np.int64), "start": np.array([start], np.int64)}


def run(session, tokens, start, **adapter):
    return session.run(feeds(tokens, start), **adapter)["logits"][0, -1]


def test_a_run_after_a_switch_must_begin_anew(session):
    session.set_adapter("A")
    wanted = run(session, [3, 5, 7, 9], 0)
    session.disable_adapters()
    run(session, [3, 5, 7], 0)
    session.set_adapter("A")
    with pytest.raises(UnsupportedError, match="Run all tokens again with start=0"):
        run(session, [9], 3)
    run(session, [3, 5, 7], 0)
    np.testing.assert_allclose(run(session, [9], 3), wanted, rtol=1e-5, atol=1e-5)


def test_an_unfused_adapter_is_another_state(session):
    run(session, [3, 5, 7], 0)
    with pytest.raises(UnsupportedError, match="0 positions"):
        run(session, [9], 3, adapter="A")
    run(session, [3, 5, 7], 0, adapter="A")
    run(session, [9], 3, adapter="A")


def test_loading_and_generating_take_the_cache_away(session, make):
    run(session, [3, 5, 7], 0)
    session.load_adapter(make("low_rank", 1), "B")
    with pytest.raises(UnsupportedError, match="0 positions"):
        run(session, [9], 3)
    run(session, [3, 5, 7], 0)
    generate(session, [[1, 2]], max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="0 positions"):
        run(session, [9], 3)


def test_bound_inputs_follow_the_same_rule(session):
    binding = session.io_binding()
    for name, array in feeds([9], 3).items():
        binding.bind_input(name, array)
    with pytest.raises(UnsupportedError, match="0 positions"):
        binding.run()
    run(session, [3, 5, 7], 0)
    binding.run()
