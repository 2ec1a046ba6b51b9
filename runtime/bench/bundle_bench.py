"""Measure a bundle and its adapters: open, load, swap, first run after a swap, steady, churn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_lora import native
from edge_lora.errors import EdgeLoraError, UnsupportedError
from edge_lora.runtime.bench.measure import (
    Samples,
    device,
    interleave,
    peak_bytes,
    resident_bytes,
    time_once,
)
from edge_lora.runtime.canary import canary_feeds
from edge_lora.runtime.engines import Route
from edge_lora.runtime.opening import open_bundle
from edge_lora.runtime.session import Session

LEAST_RUNS = 50
Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchReport:
    """Everything measured, with what is needed to measure it again.

    Attributes:
        context: Device, versions, threads, route, hashes, runs.
        samples: "phase/variant" -> raw times in ms.
        memory: Name -> bytes.
    """

    context: Mapping[str, Any]
    samples: Mapping[str, Samples]
    memory: Mapping[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """One row per phase and variant, with percentiles in ms and the ratio to the base."""
        base = self.samples["steady/base"].median
        return [
            {
                "phase": key.split("/")[0],
                "variant": key.split("/", 1)[1],
                "runs": len(samples.ms),
                **samples.summary(),
                "vs_base": samples.median / base if key.startswith("steady/") else None,
            }
            for key, samples in self.samples.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, raw samples included."""
        return {
            "context": dict(self.context),
            "rows": self.rows(),
            "samples_ms": {key: list(samples.ms) for key, samples in self.samples.items()},
            "memory_bytes": dict(self.memory),
        }


def bench_bundle(
    folder: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    engine: str = "auto",
    threads: int | None = None,
    route: Route | Literal["auto"] = "auto",
    runs: int = LEAST_RUNS,
    inputs: Mapping[str, NDArray[np.generic]] | None = None,
    progress: Progress = lambda _: None,
) -> BenchReport:
    """Measure a bundle and its adapters on this device.

    Args:
        folder: The bundle.
        adapters: Name -> adapter file; at least one.
        engine: What executes the graph.
        threads: Of the engine and of swaps.
        route: How fused adapters are switched.
        runs: Counted runs per variant; at least 50.
        inputs: What to run; default: the bundle's canary (for a language model, a short text).
        progress: Called with the name of each phase.
    """
    if not adapters:
        raise UnsupportedError("nothing to switch: give at least one adapter as NAME=PATH")
    if runs < LEAST_RUNS:
        raise UnsupportedError(f"{runs} runs are too few to tell; use at least {LEAST_RUNS}")
    memory = {"start": resident_bytes()}
    samples: dict[str, Samples] = {}
    sessions: list[Session] = []
    progress("open")

    def open_session() -> None:
        sessions.append(open_bundle(folder, engine, threads=threads, route=route))

    samples["open/bundle"] = Samples((time_once(open_session),))
    with sessions[0] as session:
        memory["base"] = resident_bytes()
        progress("load")
        for name, path in adapters.items():
            load = partial(session.load_adapter, path, name)
            samples[f"load/{name}"] = Samples((time_once(load),))
        memory["loaded"] = resident_bytes()
        feeds = dict(inputs or canary_feeds(session.manifest))
        before = session.image_sha256()
        samples |= _steady(session, list(adapters), feeds, runs, progress)
        samples |= _switching(session, list(adapters), feeds, runs, progress)
        errors = {name: session.set_adapter(name).rounding_error for name in adapters}
        session.disable_adapters()
        memory |= {"end": resident_bytes(), "peak": peak_bytes()}
        context = {
            "device": device(),
            "cpu_features": native.cpu_features(),
            "engine": session.engine,
            "threads": threads,
            "route": session.route,
            "runs": runs,
            "warm_up": 3,
            "bundle": session.manifest.base_id,
            "fingerprint": session.manifest.fingerprint,
            "adapters": {name: str(path) for name, path in adapters.items()},
            "rounding_error": errors,
            "inputs": {name: list(array.shape) for name, array in feeds.items()},
            "base_restored": session.image_sha256() == before and not session.differing_slots(),
            "image_sha256": before,
        }
    return BenchReport(context, samples, memory)


def _steady(
    session: Session,
    names: list[str],
    feeds: dict[str, NDArray[np.generic]],
    runs: int,
    progress: Progress,
) -> dict[str, Samples]:
    """Time runs of the base, of each fused adapter and, where possible, of each unfused one."""
    progress("steady")
    actions: dict[str, Callable[[], object]] = {"steady/base": lambda: session.run(feeds)}
    before: dict[str, Callable[[], object]] = {"steady/base": session.disable_adapters}
    for name in names:
        fused, unfused = f"steady/fused {name}", f"steady/unfused {name}"
        actions[fused] = lambda: session.run(feeds)
        before[fused] = _settle(session, name, feeds)
        try:
            session.disable_adapters()
            session.run(feeds, adapter=name)
        except EdgeLoraError:
            continue  # sparse, or a bundle without slots as inputs
        actions[unfused] = partial(session.run, feeds, adapter=name)
        before[unfused] = session.disable_adapters
    return interleave(actions, runs, before=before)


def _settle(
    session: Session, name: str, feeds: dict[str, NDArray[np.generic]]
) -> Callable[[], object]:
    """Return an action that fuses ``name`` and runs once, so that the next run is a steady one."""

    def settle() -> None:
        session.set_adapter(name)
        session.run(feeds)

    return settle


def _switching(
    session: Session,
    names: list[str],
    feeds: dict[str, NDArray[np.generic]],
    runs: int,
    progress: Progress,
) -> dict[str, Samples]:
    """Time swaps in and out, the first run after a swap, and round-robin churn."""
    times: dict[str, list[float]] = {}
    progress("swap")
    for _ in range(runs):
        for name in names:
            times.setdefault(f"swap/base to {name}", []).append(session.set_adapter(name).ms)
            first = time_once(lambda: session.run(feeds))
            times.setdefault(f"first run/{name}", []).append(first)
            times.setdefault(f"swap/{name} to base", []).append(session.disable_adapters().ms)
    progress("churn")
    for i in range(runs if len(names) > 1 else 0):
        stats = session.set_adapter(names[i % len(names)])
        times.setdefault("churn/round robin", []).append(stats.ms)
        session.run(feeds)
    return {key: Samples(tuple(values)) for key, values in times.items()}
