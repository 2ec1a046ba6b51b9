"""Adapters that are picked by the input of each run; see ``edge_lora.scenarios``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_lora.bundle import Manifest, TensorSpec
from edge_lora.errors import AdapterMismatchError, UnsupportedError, list_all
from edge_lora.runtime.engines import Arrays
from edge_lora.runtime.input_check import check_inputs
from edge_lora.scenarios import ScenarioSet, read_scenarios

if TYPE_CHECKING:
    from edge_lora.runtime.session import Session

Outputs = dict[str, NDArray[np.generic]]
_FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Choice:
    """What the windows of one batch were taken for.

    Attributes:
        conditions: One per window of the batch.
        names: All conditions of the set, in the order of ``probabilities``.
        probabilities: (batch, len(names)); NaN for a window that cannot be judged, because it is
            not finite: it gets the set's default.
    """

    conditions: tuple[str, ...]
    names: tuple[str, ...]
    probabilities: NDArray[np.float32]


class Scenarios:
    """A scenario set that fits a session's base."""

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        """Read and check the set.

        Raises:
            BundleError: If the set is damaged.
            AdapterMismatchError: If it is of another base, or judges an input that is not there.
        """
        self._set = read_scenarios(folder)
        self._inputs = {spec.name: spec for spec in manifest.inputs}
        self._outputs = {spec.name: spec for spec in manifest.outputs}
        problems = _mismatches(self._set, manifest, self._inputs)
        if problems:
            raise AdapterMismatchError(
                list_all(f"scenario set '{folder}' does not fit {manifest.base_id!r}", problems)
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The conditions, which are the names of their adapters in the session."""
        return self._set.names

    @property
    def default(self) -> str:
        """The condition for what cannot be judged."""
        return self._set.default

    @property
    def sha256(self) -> str:
        """Hash of the whole set."""
        return self._set.sha256

    def load_into(self, session: Session) -> None:
        """Load every adapter under its condition's name, or none."""
        done: list[str] = []
        try:
            for condition in self._set.conditions:
                path = self._set.folder / condition.adapter.file
                done.append(session.load_adapter(path, condition.name))
        except BaseException:
            for name in done:
                session.delete_adapter(name)
            raise

    def choose(self, inputs: Arrays) -> Choice:
        """Judge the windows of the set's input, (batch, window) or (batch, window, channels)."""
        name, window = self._set.input, self._set.classifier.features.window
        if name not in inputs:
            raise UnsupportedError(f"input {name!r} is missing; the scenario set judges it")
        x = inputs[name]
        check_inputs({name: x}, self._inputs)
        if x.shape[1] != window:
            raise UnsupportedError(
                f"input {name!r} has windows of {x.shape[1]}, the scenario set judges {window}"
            )
        found = self._set.classifier.probabilities(np.asarray(x, np.float64))
        conditions = tuple(
            self.names[best] if known else self.default
            for best, known in zip(found.argmax(1), np.isfinite(found.sum(1)), strict=True)
        )
        return Choice(conditions, self.names, found)

    def run(
        self, inputs: Arrays, choice: Choice, run: Callable[[str, Arrays], Outputs], first: str
    ) -> Outputs:
        """Run each condition's part of a batch, and put the outputs back into order.

        Args:
            inputs: Of the whole batch.
            choice: Of ``inputs``.
            run: Runs a part with a condition's adapter.
            first: The condition to begin with, if it is among them: the one that is active.
        """
        asked = sorted(set(choice.conditions), key=lambda name: (name != first, name))
        if len(asked) < 2:
            return run(asked[0] if asked else self.default, inputs)
        split = self._split_inputs()
        conditions = np.array(choice.conditions)
        parts, rows = [], []
        for name in asked:
            own = np.flatnonzero(conditions == name)
            rows.append(own)
            parts.append(run(name, {k: v[own] if k in split else v for k, v in inputs.items()}))
        order = np.argsort(np.concatenate(rows))
        return {key: np.concatenate([part[key] for part in parts])[order] for key in parts[0]}

    def _split_inputs(self) -> set[str]:
        """Return the inputs that have the batch axis first; every output must have it too."""
        axis = self._inputs[self._set.input].shape[0]
        others = [s.name for s in self._outputs.values() if not s.shape or s.shape[0] != axis]
        if isinstance(axis, int) or others:
            what = f"outputs {', '.join(others)} have" if others else "the graph has"
            raise UnsupportedError(
                f"the windows of this batch are of several conditions, but {what} no free batch "
                "axis to put them together on; run one window at a time"
            )
        return {s.name for s in self._inputs.values() if s.shape and s.shape[0] == axis}


def _mismatches(found: ScenarioSet, manifest: Manifest, inputs: dict[str, TensorSpec]) -> list[str]:
    """Say why a set cannot be used on a base."""
    problems = []
    if found.fingerprint != manifest.fingerprint:
        problems.append(
            f"it is of base {found.base_id!r} with fingerprint {found.fingerprint[:12]}…, "
            f"this one has {manifest.fingerprint[:12]}…"
        )
    spec, window = inputs.get(found.input), found.classifier.features.window
    if spec is None:
        problems.append(f"no input {found.input!r} to judge; inputs: {', '.join(inputs)}")
    elif spec.dtype not in _FLOATS or len(spec.shape) not in (2, 3):
        problems.append(
            f"input {found.input!r} is {spec.dtype} {spec.shape}, must be floats of "
            "(batch, window) or (batch, window, channels)"
        )
    elif spec.shape[1] != window and isinstance(spec.shape[1], int):
        problems.append(f"input {found.input!r} has windows of {spec.shape[1]}, it judges {window}")
    return problems
