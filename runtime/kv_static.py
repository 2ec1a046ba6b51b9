"""A key/value cache that lies inside the graph, one for all who run it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edge_lora.runtime.engines import Engine


class RememberingEngine(Engine, Protocol):
    """An engine whose graph keeps something of every run.

    Attributes:
        runs: How many runs there were.
    """

    runs: int

    def alone(self) -> AbstractContextManager[None]:
        """Keep the runs of other threads out, between several of one's own."""


@dataclass
class StaticCache:
    """The one cache of a graph, as long as nobody else runs.

    The graph is fed the new tokens and the position of the first; positions from there on are
    overwritten, those behind the last are not looked at. So a run that is not this decoder's takes
    the cache away, and the next step fills it again.

    Attributes:
        length: Positions of the cache.
    """

    length: int
    batches: bool = False
    filled: int = 0
    rebuilds: int = 0
    _last_run: int = 0

    def clear(self) -> None:
        """Forget everything; see ``KeyValueCache``."""
        self.rebuilds += self.filled > 0
        self.filled = 0

    def run(
        self,
        engine: Engine,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],  # noqa: ARG002  one sequence has no padding
        adapter: Mapping[str, object],
    ) -> NDArray[np.float32]:
        """Run what is not held yet; see ``KeyValueCache``."""
        ours = cast("RememberingEngine", engine)
        with ours.alone():
            if ours.runs != self._last_run:
                self.clear()
            feeds = {
                "input_ids": engine.value(np.ascontiguousarray(ids[:, self.filled :])),
                "start": engine.value(np.array([self.filled], np.int64)),
                **adapter,
            }
            outputs = engine.run_values(feeds)
            self.filled, self._last_run = ids.shape[1], ours.runs
        return np.asarray(engine.numpy(outputs["logits"])[:, -1], np.float32)
