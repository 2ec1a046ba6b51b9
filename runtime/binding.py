"""Inputs bound to memory once, for many calls without copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.input_check import check_inputs

if TYPE_CHECKING:
    from edge_lora.runtime.session import Session


class IoBinding:
    """Bound inputs of a session, and optionally an unfused adapter; made by ``Session.io_binding``.

    A bound array is read anew by every ``run``: write the next input into it in place.
    """

    def __init__(self, session: Session, adapter: str | None, rank: int | None) -> None:
        """Bind nothing yet."""
        self._session, self._adapter, self._rank = session, adapter, rank
        self._arrays: dict[str, NDArray[np.generic]] = {}  # kept: the engine looks into them
        self._values: dict[str, object] = {}

    def bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        """Let the graph read ``name`` from ``array``; checked now, so that runs are not."""
        if not array.flags.c_contiguous:
            raise UnsupportedError(
                f"input {name!r} is not contiguous, so it cannot be bound in place"
            )
        session = self._session
        check_inputs({name: array}, session.inputs, session.largest, partial=True)
        self._arrays[name] = array
        with self._session.held() as engine:
            self._values[name] = engine.value(array)

    def bind_value(self, name: str, value: object) -> None:
        """Let the graph read ``name`` from an engine tensor, such as an earlier run's output."""
        self._values[name] = value

    def run(self) -> Mapping[str, object]:
        """Run once; returns the outputs as the engine's own tensors."""
        with self._session.held() as engine:
            adapter = self._session.unfused_values(self._adapter, self._rank)
            with self._session.following(self._values, self._adapter, self._rank):
                return engine.run_values({**self._values, **adapter})

    def numpy(self, value: object) -> NDArray[np.generic]:
        """Return an output as a NumPy array."""
        with self._session.held() as engine:
            return engine.numpy(value)
