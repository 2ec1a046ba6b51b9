"""A key/value cache inside the graph, filled by callers who say themselves where a run starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import numpy as np

from edge_lora.bundle import Manifest
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.engines import Engine
from edge_lora.runtime.kv_static import RememberingEngine

_TOKENS, _START = "input_ids", "start"


class CallersCache:
    """What the last run of a caller left in the cache, and with which weights.

    A run that starts behind position 0 reads what earlier runs wrote. If those had another adapter,
    or were not a caller's (a decoder's, or the canary of an adapter that was loaded), the result
    would be of no adapter at all.
    """

    def __init__(self) -> None:
        """Nothing is filled."""
        self._filled, self._state, self._last_run = 0, "", -1

    @contextmanager
    def following(self, engine: Engine, feeds: Mapping[str, object], state: str) -> Iterator[None]:
        """Keep others out for the one run of the block.

        Args:
            engine: Of the session, which holds its weights as they are meanwhile.
            feeds: The run's ``input_ids`` (1, seq) and ``start`` (1,).
            state: The session's, for this run.

        Raises:
            UnsupportedError: If it starts behind what runs of the same state have filled.
        """
        ours = cast("RememberingEngine", engine)
        start = int(np.ravel(cast("np.ndarray", feeds[_START]))[0])
        new = int(np.shape(cast("np.ndarray", feeds[_TOKENS]))[-1])
        with ours.alone():
            is_kept = (ours.runs, state) == (self._last_run, self._state)
            filled = self._filled if is_kept else 0
            if start > filled:
                raise UnsupportedError(
                    f"this run starts at position {start}, but with the adapters in use now "
                    f"{filled} positions of the graph's cache are filled: the others are of other "
                    "weights, or of another run than the last. Run all tokens again with start=0, "
                    "or use session.generate(), which does that by itself"
                )
            yield
            self._filled, self._state, self._last_run = start + new, state, ours.runs


def callers_cache(manifest: Manifest) -> CallersCache | None:
    """Return the cache of a session; None if its graph has none inside."""
    names = {spec.name for spec in manifest.inputs}
    has_cache = manifest.program is not None and manifest.program.cache_length > 0
    return CallersCache() if has_cache and {_TOKENS, _START} <= names else None
