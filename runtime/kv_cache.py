"""Keys and values of the tokens that a causal language model has run already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_lora.runtime.engines import Engine
from edge_lora.runtime.kv_growing import GrowingCache
from edge_lora.runtime.kv_static import StaticCache

if TYPE_CHECKING:
    from edge_lora.runtime.session import Session

Ids = NDArray[np.int64]
Values = Mapping[str, object]


class KeyValueCache(Protocol):
    """What one decoder's next step needs of its earlier ones.

    Attributes:
        batches: Whether several sequences run at once.
        length: Most positions that it holds; 0: as many as the model takes.
        filled: Positions that it holds.
        rebuilds: How often what it held was lost, so that it had to be filled again.
    """

    batches: bool
    length: int
    filled: int
    rebuilds: int

    def clear(self) -> None:
        """Forget everything: the weights that filled it are no longer in use."""

    def run(self, engine: Engine, ids: Ids, mask: Ids, adapter: Values) -> NDArray[np.float32]:
        """Run what is not held yet.

        Args:
            engine: Of the session, which holds its weights as they are meanwhile.
            ids: All tokens so far, (batch, total).
            mask: 1 where a token is real, 0 where it pads, (batch, total).
            adapter: What the run is fed beside its inputs.

        Returns:
            Logits of the last position, (batch, vocab).
        """


def cache_for(session: Session) -> KeyValueCache:
    """Return an empty cache of the kind that the session's graph has."""
    program = session.manifest.program
    if program is not None:
        return StaticCache(program.cache_length)
    return GrowingCache([s for s in session.inputs.values() if s.name.startswith("past.")])
