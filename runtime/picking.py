"""Runs that pick an adapter by their own input: what a session does once "auto" is set."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edge_lora.adapter import AUTO
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.adapters import LoadedAdapter
from edge_lora.runtime.engines import Arrays
from edge_lora.runtime.live import Live
from edge_lora.runtime.switching import SwapStats

if TYPE_CHECKING:
    from edge_lora.runtime.scenarios import Outputs, Scenarios
    from edge_lora.runtime.session import Session


class Picking:
    """The scenario set of a session, if it has one, and the runs that pick from it.

    The set changes only while ``live.picks`` is false, which in turn changes only under the lock:
    who holds it and sees true can rely on the set until it is given back.

    Attributes:
        scenarios: The set.
    """

    def __init__(
        self, live: Live, changing: threading.Lock, loaded: Mapping[str, LoadedAdapter]
    ) -> None:
        """Switch ``live`` among ``loaded``, by name, whenever ``changing`` is free."""
        self._live, self._changing, self._loaded = live, changing, loaded
        self._loading = threading.Lock()  # one set at a time
        self.scenarios: Scenarios | None = None

    def load(self, session: Session, folder: str | Path) -> list[str]:
        """Read a set and load its adapters into the session; return their names."""
        from edge_lora.runtime.scenarios import Scenarios

        scenarios = Scenarios(folder, session.manifest)
        with self._loading:
            if self.scenarios is not None:
                raise UnsupportedError("a scenario set is loaded; call delete_scenarios() first")
            scenarios.load_into(session)
            with self._changing:
                self.scenarios = scenarios
        return list(scenarios.names)

    def require(self) -> Scenarios:
        """Return the set; raises UnsupportedError if there is none."""
        self._live.require_open()
        if self.scenarios is None:
            raise UnsupportedError("no scenario set is loaded; call load_scenarios() first")
        return self.scenarios

    def start(self, weight: float, rank: int | None) -> SwapStats:
        """Let every run pick from now on; the set's default is active until the first has."""
        if weight != 1 or rank is not None:
            raise UnsupportedError(f"{AUTO!r} takes whole adapters: no weight, no rank")
        with self._changing:
            return self._switch(self.require().default)

    def run(self, scenarios: Scenarios, inputs: Arrays) -> Outputs | None:
        """Run with the adapters that the input asks for; nobody else can switch in between.

        Returns:
            None if runs do not pick from ``scenarios`` any more: nothing was run.
        """
        choice = scenarios.choose(inputs)
        with self._live.held() as engine:  # the usual case, in which runs go side by side
            if not self._picks_from(scenarios):
                return None
            if set(choice.conditions) == set(self._active):
                return engine.run({**inputs, **self._live.fed.arrays})
        with self._changing:
            if not self._picks_from(scenarios):
                return None
            first = next(iter(self._active), "")
            return scenarios.run(inputs, choice, self._run_as, first)

    @property
    def _active(self) -> list[str]:
        return [adapter.name for adapter, _ in self._live.active]

    def _picks_from(self, scenarios: Scenarios) -> bool:
        return self._live.picks and self.scenarios is scenarios

    def _run_as(self, name: str, inputs: Arrays) -> Outputs:
        """Run with one adapter, which stays active; the caller holds ``changing``."""
        if self._active != [name]:
            self._switch(name)
        with self._live.held() as engine:
            return engine.run({**inputs, **self._live.fed.arrays})

    def _switch(self, name: str) -> SwapStats:
        return self._live.switch([(self._loaded[name], 1.0)], picks=True)
