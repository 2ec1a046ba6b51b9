"""Before a route is trusted: change a weight, see it in the output; undo it, see the base."""

from __future__ import annotations

import math
from typing import Protocol

from edge_lora.bundle import Manifest
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.canary import finite, same
from edge_lora.runtime.engines import Arrays, Engine

_POKE = 3.0  # far from any trained weight, so that the change survives every later rounding
_TRIES = 8  # values of a slot to try: one may feed a unit that is off for this input


class Pokable(Protocol):
    """Weights of which single values can be changed."""

    def poke(self, name: str, index: int, value: float) -> float:
        """Exchange one value of a slot; returns the old one."""


def self_test(engine: Engine, weights: Pokable, manifest: Manifest, feeds: Arrays) -> None:
    """Raise UnsupportedError if patching ``weights`` does not reach ``engine``, or does not undo.

    Three weights are tried (first, middle, last of those that every input passes through), so a
    route that reaches only some kinds of layer is found out; and of biases and norms, which an
    engine may have folded into something else, one for each set of operators that read them. A
    weight behind one that is zero is not seen alone: it is tried again with the others changed.
    """
    base = before = engine.run(feeds)
    if not finite(base):
        raise UnsupportedError("the base's own output is not finite on the canary input")
    poked: dict[tuple[str, int], float] = {}
    try:
        pending, factor = _probed_slots(manifest), 1.0
        while pending:
            unseen = []
            for name in pending:
                for index, value in _probed_values(math.prod(manifest.slots[name].shape)).items():
                    old = weights.poke(name, index, factor * value)
                    poked.setdefault((name, index), old)
                    after = engine.run(feeds)
                    if not same(before, after):
                        break
                else:
                    unseen.append(name)
                before = after
            if len(unseen) == len(pending):
                names = ", ".join(unseen)
                raise UnsupportedError(f"changing weights of {names} does not change the output")
            pending, factor = unseen, factor + 1
    finally:
        for (name, index), old in poked.items():
            weights.poke(name, index, old)
    if not same(base, engine.run(feeds)):
        raise UnsupportedError("changing weights back does not give the base's output back")


def _probed_slots(manifest: Manifest) -> list[str]:
    slots = manifest.weights
    others = {manifest.stored[n].operators: n for n, slot in slots.items() if slot.kind == "other"}
    names = [
        name
        for name, place in manifest.stored.items()
        if slots[name].kind != "other" and not place.is_table
    ]
    ends = {names[0], names[len(names) // 2], names[-1]} if names else set()
    return sorted({*ends, *others.values()})


def _probed_values(size: int) -> dict[int, float]:
    """Return flat indices, spread over rows and columns, and what to write there."""
    signs = (1.0, -1.0)
    return {i * (size // _TRIES + 1) % size: signs[i % 2] * _POKE for i in range(_TRIES)}
