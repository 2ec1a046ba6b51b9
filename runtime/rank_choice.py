"""``rank="auto:12ms"``: the largest rank of a nested adapter whose step keeps a latency budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from time import perf_counter

import numpy as np

from edge_lora.bundle import Manifest
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.engines import Arrays, Engine

Rank = int | str | None
"""One of an adapter's ranks, ``"auto:<milliseconds>ms"``, or None for the whole adapter."""
_WARM_UPS = 3
_RUNS = 15  # of each rank, in turns, so that a busy moment hits all of them


def budget_of(rank: str) -> float:
    """Return the budget in milliseconds.

    >>> budget_of("auto:12.5ms")
    12.5
    """
    match = re.fullmatch(r"auto:(\d+(?:\.\d+)?)ms", rank, re.ASCII)
    if match is None:
        raise UnsupportedError(f"rank {rank!r} is neither a number nor like 'auto:12ms'")
    return float(match[1])


def step_feeds(engine: Engine, manifest: Manifest, canary: Arrays) -> dict[str, object]:
    """Return the inputs of what is measured: one decode step, or the canary run as it is.

    The step of a causal language model follows the canary's tokens.
    """
    if manifest.task != "causal-lm":
        return {name: engine.value(np.ascontiguousarray(array)) for name, array in canary.items()}
    outputs = engine.run(canary)
    batch, past = canary["input_ids"].shape
    one = np.ones((batch, 1), np.int64)
    last = canary["input_ids"][:, -1:]
    if manifest.program is not None:  # its cache is inside
        step = {"input_ids": last, "start": np.array([past], np.int64)}
    else:
        step = {
            "input_ids": last,
            "attention_mask": np.ones((batch, past + 1), np.int64),
            "position_ids": one * past,
            **{n: outputs[n.replace("past.", "present.", 1)] for n in canary if "past." in n},
        }
    return {name: engine.value(np.ascontiguousarray(array)) for name, array in step.items()}


def measure(
    engine: Engine, feeds: Mapping[str, object], variants: Mapping[int, Mapping[str, object]]
) -> dict[int, float]:
    """Return the median milliseconds of a step with each of ``variants`` (rank -> inputs)."""
    times: dict[int, list[float]] = {rank: [] for rank in variants}
    for turn in range(_WARM_UPS + _RUNS):
        for rank, inputs in variants.items():
            start = perf_counter()
            engine.run_values({**feeds, **inputs})
            if turn >= _WARM_UPS:
                times[rank].append((perf_counter() - start) * 1e3)
    return {rank: float(np.median(values)) for rank, values in times.items()}


def choose(name: str, latencies: Mapping[int, float], budget_ms: float) -> int:
    """Return the largest rank within the budget.

    Raises:
        UnsupportedError: If there is none; lists what was measured.
    """
    fitting = [rank for rank, ms in latencies.items() if ms <= budget_ms]
    if fitting:
        return max(fitting)
    told = ", ".join(f"rank {rank} {ms:.2f} ms" for rank, ms in latencies.items())
    raise UnsupportedError(f"no rank of adapter {name!r} keeps {budget_ms:g} ms: {told}")
