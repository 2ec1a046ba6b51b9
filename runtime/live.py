"""The engine of a session, and the adapters that are in it now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from edge_lora.bundle import Manifest
from edge_lora.errors import EdgeLoraError, UnsupportedError
from edge_lora.runtime.active_sites import ActiveSites
from edge_lora.runtime.adapters import LoadedAdapter, Parts
from edge_lora.runtime.canary import canary_feeds
from edge_lora.runtime.engines import Engine, Route, open_engine
from edge_lora.runtime.fused import fusible, low_precision_weights, open_weights
from edge_lora.runtime.lock import ReadWriteLock
from edge_lora.runtime.proof import is_visible, require_changes, require_difference
from edge_lora.runtime.switching import SwapStats
from edge_lora.runtime.unfused import SlotInputs, UnfusedAdapters


class Live:
    """A running graph under a lock: runs share it, a switch has it alone.

    Whoever calls ``switch`` or ``prove_effect`` sees to it that nobody else does meanwhile.

    Attributes:
        engine: What runs.
        weights: Where fused adapters live.
        unfused: Adapters that one call is fed.
        lock: Shared by runs.
        active: The adapters that every run computes with.
        fed: What their bottlenecks are fed by.
        picks: Whether every run picks one of a scenario set's adapters, and ``active`` is the last.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        engine: str,
        route: Route,
        threads: int,
        adapter_budget_bytes: int | None,
    ) -> None:
        """Open ``manifest`` on one route; raises UnsupportedError if that route fails here."""
        self.lock = ReadWriteLock()
        self.active: Parts = ()
        self.fed = SlotInputs({}, {})
        self.picks = False
        self._folder, self._manifest = folder, manifest
        self._fused: Parts = ()  # those of the active ones that are in the weights
        self._canary = canary_feeds(manifest)
        self._closed = False
        self._broken = False  # a switch failed half way: the weights are no adapter's
        self.engine: Engine = open_engine(engine, folder, manifest, route, threads)
        try:
            self.weights = open_weights(
                folder, manifest, self.engine, self._canary, threads, adapter_budget_bytes
            )
        except EdgeLoraError:
            self.engine.close()
            raise
        self.unfused = UnfusedAdapters(manifest, self.engine, self._canary)
        self._sites = ActiveSites(manifest, self.engine)

    @contextmanager
    def held(self) -> Iterator[Engine]:
        """Hold the weights as they are: no switch happens inside. Do not switch or run inside."""
        with self.lock.shared():
            self.require_open()
            yield self.engine

    def switch(self, active: Parts, *, picks: bool = False) -> SwapStats:
        """Let every run compute with ``active`` from now on."""
        self.require_open()
        fused, fed = self._prepared(active)
        error = 0.0
        if fused:  # may compile: not while runs wait
            error = self.weights.prepare(fused).rounding_error
        with self.lock.exclusive():
            start = perf_counter()
            try:
                written = self._swap(fused)
                ms = (perf_counter() - start) * 1e3
            except EdgeLoraError:
                raise  # nothing was changed, or the weights said that they are damaged
            except BaseException:  # an interrupt does not say how far it got
                self._restore()
                raise
            self.active, self._fused, self.fed, self.picks = active, fused, fed, picks
            self.weights.keep(fused)
        return SwapStats(ms, written, self.engine.route, error)

    def prove_effect(self, loaded: LoadedAdapter) -> None:
        """Run a canary with and without ``loaded``; nobody else sees either.

        Raises:
            NoEffectError: If the outputs are the same.
            UnsupportedError: If it can be neither fused nor fed.
        """
        fused: Parts = ()
        if low_precision_weights(loaded, self._manifest):
            inputs = self.unfused.inputs(loaded)
        else:
            fused, inputs = self._prepared([(loaded, 1.0)])
        if fused:
            changed = self.weights.prepare(fused).changed
            if not loaded.has_bottleneck:
                require_changes(loaded, changed)
            if not is_visible(loaded, self._manifest):
                return  # the compiler's count of changes must do
        with self.lock.exclusive():
            try:
                self._swap([])
                base = self.engine.run(self._canary)
                self._swap(fused)
                adapted = self.engine.run({**self._canary, **inputs.arrays})
            finally:
                self._restore()
        require_difference(loaded, base, adapted)

    def forget(self, loaded: LoadedAdapter) -> None:
        """Free what is kept of an adapter that is not active."""
        self.weights.forget(loaded)
        self.unfused.forget(loaded)
        self._sites.forget(loaded)

    def require_open(self) -> None:
        """Raise UnsupportedError if nothing may run any more."""
        if self._closed:
            raise UnsupportedError(f"the session over '{self._folder}' is closed")
        if self._broken:
            raise UnsupportedError(
                f"a switch of the session over '{self._folder}' failed half way, so its weights "
                "are no adapter's; open the bundle again"
            )

    def close(self) -> None:
        """Free the engine, once no run is left."""
        with self.lock.exclusive():
            if self._closed:
                return
            self._closed = True
            self.weights.close()
            self.unfused.clear()
            self.engine.close()

    def _prepared(self, active: Parts) -> tuple[Parts, SlotInputs]:
        """Return what is fused for ``active``, and what the sites are fed."""
        return fusible(active, self._manifest), self._sites.inputs(active)

    def _swap(self, parts: Parts) -> int:
        """Swap; if that failed and could not be taken back, nothing may run any more."""
        try:
            return self.weights.swap(parts)
        except BaseException:
            self._broken = self.weights.damaged
            raise

    def _restore(self) -> None:
        """Put back what was fused; if that fails, nothing may run any more."""
        try:
            self._swap(self._fused)
        except BaseException:
            self._broken = True
            raise
