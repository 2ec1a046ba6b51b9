"""A key/value cache that goes in and out of every run, and grows by what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import TensorSpec
from edge_lora.runtime.engines import Engine


@dataclass
class GrowingCache:
    """The engine's own tensors, from ``present.*`` of one run to ``past.*`` of the next.

    Attributes:
        past: The graph's ``past.*`` inputs, (batch, heads, positions, head size) each.
    """

    past: Sequence[TensorSpec]
    batches: bool = True
    length: int = 0
    filled: int = 0
    rebuilds: int = 0
    _values: dict[str, object] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything; see ``KeyValueCache``."""
        self.rebuilds += self.filled > 0
        self.filled = 0
        self._values.clear()

    def run(
        self,
        engine: Engine,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        adapter: Mapping[str, object],
    ) -> NDArray[np.float32]:
        """Run what is not held yet; see ``KeyValueCache``."""
        if not self.filled:
            self._values = {s.name: engine.value(_empty(s, len(ids))) for s in self.past}
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, self.filled :]
        feeds = {
            "input_ids": engine.value(np.ascontiguousarray(ids[:, self.filled :])),
            "attention_mask": engine.value(mask),
            "position_ids": engine.value(np.ascontiguousarray(positions)),
            **self._values,
            **adapter,
        }
        outputs = engine.run_values(feeds)
        self._values = {s.name: outputs[s.name.replace("past.", "present.")] for s in self.past}
        self.filled = ids.shape[1]
        return np.asarray(engine.numpy(outputs["logits"])[:, -1], np.float32)


def _empty(spec: TensorSpec, batch: int) -> NDArray[np.generic]:
    rest = [d if isinstance(d, int) else 0 for d in spec.shape[1:]]
    return np.zeros([batch, *rest], spec.dtype)
