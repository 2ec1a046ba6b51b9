"""A caller's run follows his own earlier ones in the graph's cache, or is refused."""

import threading
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.kv_callers import CallersCache


class Engine:
    """Counts its runs."""

    def __init__(self):
        self.runs, self._turn = 0, threading.RLock()

    @contextmanager
    def alone(self):
        with self._turn:
            yield


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def run(engine):
    cache = CallersCache()

    def run(start, count, state="base"):
        feeds = {"input_ids": np.zeros((1, count), np.int64), "start": np.array([start], np.int64)}
        with cache.following(engine, feeds, state):
            engine.runs += 1

    return run


def test_runs_follow_each_other(run):
    run(0, 3)
    run(3, 1)
    run(4, 2)
    run(2, 1)  # again from an earlier position
    run(3, 1)


def test_a_gap_is_refused_and_changes_nothing(run, engine):
    run(0, 3)
    with pytest.raises(UnsupportedError, match=r"starts at position 4, .* 3 positions"):
        run(4, 1)
    assert engine.runs == 1
    run(3, 1)


def test_what_was_behind_a_shorter_run_is_no_more(run):
    run(0, 5)
    run(0, 2)
    with pytest.raises(UnsupportedError, match="2 positions"):
        run(3, 1)


def test_other_weights_start_anew(run):
    run(0, 3)
    with pytest.raises(UnsupportedError, match=r"start=0, or use session\.generate"):
        run(3, 1, "adapter")
    run(3, 1)  # nothing was run meanwhile
    run(0, 4, "adapter")
    run(4, 1, "adapter")


def test_a_run_of_another_takes_the_cache_away(run, engine):
    run(0, 3)
    engine.runs += 1
    with pytest.raises(UnsupportedError, match=" 0 positions"):
        run(3, 1)
    run(0, 4)


def test_a_run_that_failed_filled_nothing(engine):
    cache = CallersCache()
    feeds = {"input_ids": np.zeros((1, 3), np.int64), "start": np.zeros(1, np.int64)}
    with suppress(KeyError), cache.following(engine, feeds, "base"):
        engine.runs += 1
        raise KeyError
    with (
        pytest.raises(UnsupportedError),
        cache.following(engine, {**feeds, "start": np.array([3])}, "base"),
    ):
        pass
