"""The largest rank within a latency budget."""

import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.rank_choice import budget_of, choose, measure

LATENCIES = {1: 2.0, 4: 5.0, 8: 5.5, 16: 9.0}


@pytest.mark.parametrize(("budget", "rank"), [(2, 1), (4.9, 1), (5, 4), (6, 8), (1e6, 16)])
def test_the_largest_that_fits(budget, rank):
    assert choose("a", LATENCIES, budget) == rank


def test_a_slow_small_rank_does_not_hide_a_fast_large_one():
    assert choose("a", {1: 3.0, 2: 2.0}, 2.5) == 2


def test_none_that_fits_lists_what_was_measured():
    with pytest.raises(UnsupportedError, match=r"'a' keeps 1.5 ms: rank 1 2.00 ms, rank 4 5.00"):
        choose("a", LATENCIES, 1.5)


@pytest.mark.parametrize("text", ["auto", "auto:", "auto:12", "auto:-1ms", "auto:1e3ms", "12", ""])
def test_what_is_no_budget(text):
    with pytest.raises(UnsupportedError, match="neither a number nor like 'auto:12ms'"):
        budget_of(text)


def test_ranks_take_turns_and_the_median_of_the_later_runs_counts(monkeypatch):
    runs, clock = [], [0.0]

    class Engine:
        def run_values(self, feeds):
            runs.append(feeds["rank"])
            first = len(runs) <= 6  # the warm-ups of two ranks
            clock[0] += 1.0 if first else feeds["rank"] * 1e-3

    monkeypatch.setattr("edge_lora.runtime.rank_choice.perf_counter", lambda: clock[0])
    found = measure(Engine(), {"x": 0}, {2: {"rank": 2}, 4: {"rank": 4}})
    assert found == pytest.approx({2: 2.0, 4: 4.0})
    assert runs[:4] == [2, 4, 2, 4]
