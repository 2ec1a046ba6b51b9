"""Timing and memory, measured so that a noisy machine cannot fool the reader."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, sleep

import numpy as np

PERCENTILES = (50, 90, 95, 99)
# Threads of an engine go on spinning for a while after a run, on the cores that the next one needs.
SETTLE_S = 0.02


@dataclass(frozen=True)
class Samples:
    """Raw times of one thing, in ms, in the order they were taken."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.ms))

    def summary(self) -> dict[str, float]:
        """p50, p90, p95, p99, min, max, in ms."""
        points = {f"p{p}": float(np.percentile(self.ms, p)) for p in PERCENTILES}
        return {**points, "min": min(self.ms), "max": max(self.ms)}


def time_once(action: Callable[[], object]) -> float:
    """Return the wall time of one call in ms."""
    start = perf_counter()
    action()
    return (perf_counter() - start) * 1e3


def interleave(
    actions: Mapping[str, Callable[[], object]],
    runs: int,
    warm_up: int = 3,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Samples]:
    """Time several actions in turn, A B C A B C …, so that a drift of the machine hits all alike.

    Args:
        actions: Name -> what to time.
        runs: Counted rounds.
        warm_up: Rounds that are not counted, first.
        before: Name -> what to do, untimed, before that action.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    gc.collect()
    gc.disable()
    try:
        for i in range(warm_up + runs):
            for name, action in actions.items():
                if before and name in before:
                    before[name]()
                sleep(SETTLE_S)
                ms = time_once(action)
                if i >= warm_up:
                    times[name].append(ms)
    finally:
        gc.enable()
    return {name: Samples(tuple(values)) for name, values in times.items()}


def ratio(samples: Mapping[str, Samples], a: str, b: str) -> float:
    """Return median(a) / median(b)."""
    return samples[a].median / samples[b].median


def resident_bytes() -> int:
    """Memory of this process that is in RAM and its own (anonymous), in bytes; 0 where unknown."""
    return _status_bytes("RssAnon")


def peak_bytes() -> int:
    """Most memory of this process that was ever in RAM, in bytes; 0 where unknown."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def device() -> dict[str, str | int]:
    """Name what the numbers were taken on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "commit": _commit(),
        **{name: _version(name) for name in ("edge-lora", "onnxruntime", "executorch", "numpy")},
    }


def _processor() -> str:
    match = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    return match[1] if match else platform.processor() or "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()
