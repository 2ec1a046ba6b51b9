"""A live session over a bundle: run it, and switch adapters under it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_lora.adapter import AUTO
from edge_lora.bundle import Manifest, TensorSpec
from edge_lora.errors import UnknownNameError, UnsupportedError
from edge_lora.runtime.adapters import LoadedAdapter, load, unbound
from edge_lora.runtime.binding import IoBinding
from edge_lora.runtime.cache import cache_key
from edge_lora.runtime.engines import Arrays, Engine, Route
from edge_lora.runtime.input_check import check_inputs
from edge_lora.runtime.kv_callers import callers_cache
from edge_lora.runtime.live import Live
from edge_lora.runtime.picking import Picking
from edge_lora.runtime.rank_choice import Rank
from edge_lora.runtime.switching import SwapStats, paired
from edge_lora.runtime.unfused import SlotInputs

if TYPE_CHECKING:
    from edge_lora.runtime.scenarios import Choice


class Session:
    """A live base whose adapters can be switched between runs.

    Made by :func:`edge_lora.runtime.open_bundle`. Safe to use from several threads: runs share the
    base, a switch waits for the runs that have begun and holds back those that have not. A run sees
    the old adapter or the new one, never a mixture.
    """

    def __init__(self, folder: Path, manifest: Manifest, engine: str, live: Live) -> None:
        """Switch adapters in ``live``, which is ``manifest`` open in the engine of that name."""
        self.folder = folder
        self.manifest = manifest
        self.engine = engine
        self._live = live
        self._cache = callers_cache(manifest)
        self._changing = threading.Lock()  # one load, switch or delete at a time
        self._loaded: dict[str, LoadedAdapter] = {}
        self._picking = Picking(self._live, self._changing, self._loaded)

    @property
    def route(self) -> Route:
        """How fused adapters are switched in this session."""
        return self._live.engine.route

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Required inputs: name -> dtype and shape with symbolic dimensions."""
        return self._live.engine.inputs

    @property
    def largest(self) -> Mapping[str, int]:
        """Name of a symbolic dimension -> the most that the engine takes; others have no limit."""
        return self.manifest.program.largest if self.manifest.program else {}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs: name -> dtype and shape with symbolic dimensions."""
        return self._live.engine.outputs

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._loaded)

    def header(self, name: str) -> LoadedAdapter:
        """Return what the file of a loaded adapter says: method, base, slots with their forms."""
        return self._require_loaded(name)

    @property
    def active_adapters(self) -> dict[str, float]:
        """Names and weights of the adapters that every run computes with; empty is the base.

        After ``set_adapter("auto")``: that of the last run, which the next one may change.
        """
        return {adapter.name: weight for adapter, weight in self._live.active}

    @property
    def state_id(self) -> str:
        """Hash of base + active adapters + weights: the key for caches that depend on them.

        After ``set_adapter("auto")``: of base + scenario set, whatever the last run picked.
        """
        return self.state_with(None)

    def state_with(self, adapter: str | None, rank: int | None = None) -> str:
        """Return ``state_id`` for calls that also run with ``adapter`` unfused, at ``rank``."""
        active = [(adapter.content_hash, weight) for adapter, weight in self._live.active]
        scenarios = self._picking.scenarios
        if scenarios is not None and self._live.picks:
            return cache_key(self.manifest.fingerprint, AUTO, scenarios.sha256)
        unfused = self._require_loaded(adapter).at_rank(rank).content_hash if adapter else None
        return cache_key(self.manifest.fingerprint, active, unfused)

    def run(
        self, inputs: Arrays, adapter: str | None = None, rank: Rank = None
    ) -> dict[str, NDArray[np.generic]]:
        """Run the graph once.

        Args:
            inputs: Name -> array, for every name in ``inputs``.
            adapter: A loaded adapter to use unfused, for this call alone (needs a bundle exported
                with slots or sites as inputs, and no fused adapter).
            rank: One of a nested adapter's ranks, or "auto:12ms" for the largest whose decode step
                takes at most 12 ms here, measured at its first use. Default: the whole adapter.

        Returns:
            Name -> array, owned by the caller.
        """
        check_inputs(inputs, self.inputs, self.largest)
        chosen = self.rank_of(adapter, rank)
        while True:
            with self._live.lock.shared():  # held() costs more than a small graph's nodes
                self._live.require_open()
                if adapter is not None or not self._live.picks:
                    fed = self._slot_inputs(adapter, chosen).arrays
                    feeds = {**inputs, **fed} if fed else inputs
                    if self._cache is None:
                        return self._live.engine.run(feeds)
                    with self.following(inputs, adapter, chosen):
                        return self._live.engine.run(feeds)
                scenarios = self._picking.require()
            outputs = self._picking.run(scenarios, inputs)
            if outputs is not None:  # else another adapter or set came meanwhile
                return outputs

    def rank_of(self, adapter: str | None, rank: Rank = None) -> int | None:
        """Return the rank that an unfused run of ``adapter`` with ``rank`` uses; None: the whole.

        Raises:
            UnsupportedError: If there is no such rank, or none keeps the latency budget; then it
                lists what was measured. Or if a rank is given, but no adapter.
        """
        if adapter is None:
            if rank is not None:
                raise UnsupportedError(f"rank {rank!r} is of no adapter; name one with adapter=")
            return None
        if not isinstance(rank, str):
            return self._require_loaded(adapter).at_rank(rank).rank
        with self.held():
            self._require_base(adapter)
            return self._live.unfused.at_rank(self._require_loaded(adapter), rank).rank

    def unfused_values(self, adapter: str | None, rank: int | None = None) -> Mapping[str, object]:
        """Return the engine tensors that a call inside ``held()`` is fed beside its inputs."""
        if self._live.picks:
            raise UnsupportedError(f"adapter {AUTO!r} picks by the input of run(); use that")
        return self._slot_inputs(adapter, rank).values

    def io_binding(self, adapter: str | None = None, rank: Rank = None) -> IoBinding:
        """Return a binding of inputs and outputs to memory that stays, for calls without copies.

        Unlike ONNX Runtime's own active adapters, an unfused ``adapter`` works through it.
        """
        return IoBinding(self, adapter, self.rank_of(adapter, rank))

    def following(
        self, feeds: Mapping[str, object], adapter: str | None, rank: int | None
    ) -> AbstractContextManager[None]:
        """Let one run, inside ``held()``, follow earlier ones in a cache that the graph has inside.

        Raises:
            UnsupportedError: On entering, if what it follows is of other weights.
        """
        if self._cache is None:
            return nullcontext()
        state = self.state_with(adapter, rank)
        return self._cache.following(self._live.engine, feeds, state)

    def held(self) -> AbstractContextManager[Engine]:
        """Hold the weights as they are: no switch happens inside. Do not switch or run inside."""
        return self._live.held()

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
        adapter: str | None = None,
        rank: Rank = None,
    ) -> str:
        """Continue a text; greedy, or nucleus sampling if ``top_p`` is given.

        For batches, token ids and timings see
        :func:`edge_lora.runtime.generate.generate`.
        """
        from edge_lora.runtime.generate import generate_text
        from edge_lora.runtime.sampling import greedy, nucleus

        sample = greedy if top_p is None else nucleus(top_p, temperature, seed)
        return generate_text(self, prompt, max_new_tokens, sample, adapter, rank)

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Read, check and compile an adapter; the weights in use do not change.

        Args:
            path: An adapter file.
            name: Its name in this session; default: the name in the file. A name that is taken is
                refused.

        Returns:
            The name.

        Raises:
            AdapterFileError: If the file is damaged.
            AdapterMismatchError: If it does not fit this base; every reason is listed.
            NoEffectError: If the outputs of a canary run do not change.

        Warns:
            UserWarning: If the file does not say on which base it was trained.
        """
        loaded = load(Path(path).absolute(), name)
        name = loaded.name
        if name == AUTO:
            raise UnsupportedError(
                f"an adapter cannot be named {AUTO!r}, which asks a session to choose; "
                f"give it another name: load_adapter({str(path)!r}, name)"
            )
        with self._changing:
            self._live.require_open()
            if name in self._loaded:
                raise UnsupportedError(
                    f"an adapter named {name!r} is loaded already; give another name, "
                    "or delete_adapter() it first"
                )
            self._require_slots()
            self.manifest.slots.check(loaded)
            if not loaded.base.fingerprint:
                warnings.warn(unbound(loaded, self.manifest.base_id), stacklevel=2)
            try:
                self._live.prove_effect(loaded)
            except BaseException:
                self._forget(loaded)
                raise
            self._loaded[name] = loaded
        return name

    def load_scenarios(self, folder: str | Path) -> list[str]:
        """Load the adapters of a scenario set, each under its condition's name, and its classifier.

        Nothing changes yet: ``set_adapter("auto")`` then lets every run pick by its own input.

        Returns:
            The names.

        Raises:
            BundleError: If the set is damaged; lists everything.
            AdapterMismatchError: If the set or an adapter in it does not fit this base.
            UnsupportedError: If a set is loaded already, or a name is taken.
        """
        return self._picking.load(self, folder)

    def choose(self, inputs: Arrays) -> Choice:
        """Return what the loaded scenario set takes these windows for; nothing is run."""
        return self._picking.require().choose(inputs)

    def delete_scenarios(self) -> None:
        """Forget the scenario set and its adapters, none of which may be active."""
        with self._changing:
            names = self._picking.require().names
            busy = [AUTO] if self._live.picks else [n for n in names if n in self.active_adapters]
            if busy:
                raise UnsupportedError(f"{busy[0]!r} is active; call disable_adapters() first")
            self._picking.scenarios = None
            self._delete(names)

    def set_adapter(self, name: str, weight: float = 1.0, rank: int | None = None) -> SwapStats:
        """Make one adapter active, at one of its ranks if it is nested; see ``set_adapters``.

        "auto" lets every ``run`` pick an adapter of the loaded scenario set by its own input, and
        switch if that is another one than before. A batch may be of several conditions: each
        gets a run of its own.
        """
        if name == AUTO:
            return self._picking.start(weight, rank)
        return self.set_adapters([name], [weight], [rank])

    def set_adapters(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        ranks: Sequence[int | None] | None = None,
    ) -> SwapStats:
        """Let every run compute with a weighted sum of adapters, instead of those active now.

        What they have for weights is fused; their bottlenecks are fed to the sites on every run.

        Args:
            names: Loaded adapters, each at most once; none is the base.
            weights: One finite number each; default 1. Zero leaves the adapter out.
            ranks: One each; default None, the whole adapter.
        """
        asked = paired(names, weights, ranks)
        if AUTO in names:
            raise UnsupportedError(f"{AUTO!r} stands alone; use set_adapter({AUTO!r})")
        with self._changing:
            wanted = [(self._require_loaded(n).at_rank(rank), weight) for n, weight, rank in asked]
            return self._live.switch([(adapter, weight) for adapter, weight in wanted if weight])

    def disable_adapters(self) -> SwapStats:
        """Give the base back, to the bit."""
        return self.set_adapters([])

    def delete_adapter(self, name: str) -> None:
        """Forget a loaded adapter; one that is active must be taken out first."""
        with self._changing:
            self._live.require_open()
            self._require_loaded(name)
            scenarios = self._picking.scenarios
            if scenarios is not None and name in scenarios.names:
                raise UnsupportedError(
                    f"adapter {name!r} is part of the scenario set; call delete_scenarios()"
                )
            if name in self.active_adapters:
                raise UnsupportedError(
                    f"adapter {name!r} is active; call disable_adapters() or set another one first"
                )
            self._delete([name])

    @contextmanager
    def using(self, name: str, weight: float = 1.0, rank: int | None = None) -> Iterator[Session]:
        """Make an adapter active in the block; what was active before comes back after it."""
        before, was_auto = self._live.active, self._live.picks
        self.set_adapter(name, weight, rank)
        try:
            yield self
        finally:
            if was_auto:
                self.set_adapter(AUTO)
            else:
                self.set_adapters(
                    [adapter.name for adapter, _ in before],
                    [weight for _, weight in before],
                    [adapter.rank for adapter, _ in before],
                )

    def differing_slots(self) -> list[str]:
        """Return the slots whose weights in use are not the base's; compares every value."""
        with self.held():
            return self._live.weights.differing_slots()

    @property
    def patch_bytes(self) -> int:
        """Memory that compiled adapters take beside the base."""
        return self._live.weights.nbytes

    def image_sha256(self) -> str:
        """Return the sha256 (hex) of the weights in use, as they lie in memory."""
        with self.held():
            return self._live.weights.sha256()

    def close(self) -> None:
        """Free the engine; the session cannot be used afterwards."""
        with self._changing:
            self._live.close()

    def __enter__(self) -> Session:
        """Return the session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _delete(self, names: Sequence[str]) -> None:
        """Drop adapters, none of them active; the caller holds ``_changing``."""
        with self._live.lock.exclusive():
            for name in names:
                self._forget(self._loaded.pop(name))

    def _forget(self, loaded: LoadedAdapter) -> None:
        """Free what is kept of an adapter, unless another loaded one does the same."""
        if all(other.file_hash != loaded.file_hash for other in self._loaded.values()):
            self._live.forget(loaded)

    def _slot_inputs(self, name: str | None, rank: int | None) -> SlotInputs:
        """Return what one call is fed: for an unfused adapter, or for those that are active."""
        if name is None:
            return self._live.fed
        self._require_base(name)
        return self._live.unfused.inputs(self._require_loaded(name).at_rank(rank))

    def _require_base(self, name: str) -> None:
        self._require_loaded(name)
        if self._live.active:
            raise UnsupportedError(
                f"adapter {name!r} cannot run unfused while {list(self.active_adapters)} is "
                "active; call disable_adapters() first"
            )

    def _require_loaded(self, name: str) -> LoadedAdapter:
        if name not in self._loaded:
            known = ", ".join(self._loaded) or "none; load one with load_adapter()"
            raise UnknownNameError(f"no adapter named {name!r}; loaded: {known}")
        return self._loaded[name]

    def _require_slots(self) -> None:
        if not self.manifest.slots:
            raise UnsupportedError(
                f"'{self.folder}' has no slots, so no adapter can be loaded: it was not exported "
                "for adapters. Export its model with: edge-lora export --base MODEL -o DIR"
            )
