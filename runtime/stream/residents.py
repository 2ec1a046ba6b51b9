"""Adapters of many series in one session: loaded when first needed, least recently used out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_lora.csv_values import LARGEST
from edge_lora.runtime.adapters import read_file
from edge_lora.runtime.session import Session

HEADER_BYTES = 1700  # of a loaded adapter beside its patch: measured over 1,000 in CPython 3.11
OTHERS = "*"
"""Stands for all series that are not named."""


@dataclass(frozen=True, slots=True)
class _Resident:
    """An adapter in memory: its name in the session, and ``Residents.step_of`` it."""

    name: str
    step: float | None


class Residents:
    """Which adapter each series runs with, and which of them are in memory.

    Files are known by their path: series that name the same one share it. The session is left to
    this object: it loads, switches and deletes adapters of its own names there.
    """

    def __init__(self, session: Session, adapters: Mapping[str, str | Path]) -> None:
        """Run each series of ``adapters`` with its file, all others with that of "*", if any."""
        self._session = session
        self._paths = {series: Path(path).absolute() for series, path in adapters.items()}
        self._loaded: dict[Path, _Resident] = {}  # in order of last use
        self._current: Path | None = None
        self.loads = self.evictions = 0
        self.largest = 0  # memory that one adapter took so far
        session.disable_adapters()

    def of(self, series: str) -> Path | None:
        """Return the adapter file of a series; None: the base."""
        return self._paths.get(series, self._paths.get(OTHERS))

    @property
    def count(self) -> int:
        """How many adapters are in memory."""
        return len(self._loaded)

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self._session.patch_bytes + HEADER_BYTES * len(self._loaded)

    def has(self, path: Path | None) -> bool:
        """Whether an adapter is in memory; the base always is."""
        return path is None or path in self._loaded

    def use(self, path: Path | None, budget: int | None = None) -> str | None:
        """Make an adapter, or the base, the one that the session runs with.

        Args:
            path: Its file.
            budget: Bytes that adapters may take afterwards; the one in use stays in any case.

        Returns:
            Its name in the session.

        Raises:
            EdgeLoraError: If the file is damaged or does not fit; what was in use stays.
        """
        if path is None:
            if self._current is not None:
                self._session.disable_adapters()
            name = None
        else:
            name = self._in_memory(path).name
            if path != self._current:
                self._session.set_adapter(name)
        self._current = path
        self.shrink(budget)
        return name

    def shrink(self, budget: int | None) -> None:
        """Throw out the least recently used until all take ``budget`` bytes; not the one in use."""
        for path in list(self._loaded):
            if budget is None or self.nbytes <= budget:
                break
            if path != self._current:
                self._session.delete_adapter(self._loaded.pop(path).name)
                self.evictions += 1

    def step_of(self, path: Path) -> float | None:
        """Return the seconds between rows that an adapter in memory was trained on, if it says so.

        It is what the file said when it was loaded: the file may be gone by now.
        """
        return self._loaded[path].step

    def _in_memory(self, path: Path) -> _Resident:
        """Return an adapter as the one that was used last; load it if need be."""
        resident = self._loaded.pop(path, None)
        if resident is not None:
            self._loaded[path] = resident
            return resident
        before, step = self.nbytes, _step(path)
        resident = _Resident(self._session.load_adapter(path, str(path)), step)
        self._loaded[path] = resident
        self.largest = max(self.largest, self.nbytes - before)
        self.loads += 1
        return resident


def _step(path: Path) -> float | None:
    """Return the step that an adapter file says; one that is no time in seconds is none."""
    provenance: Any = json.loads(read_file(path).header).get("provenance")
    training = provenance.get("training") if isinstance(provenance, dict) else None
    step = training.get("step") if isinstance(training, dict) else None
    return float(step) if isinstance(step, int | float) and 0 < step <= LARGEST else None
