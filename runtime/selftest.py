"""Before a route is trusted: change one weight, see it in the output, change it back, see the base."""

from __future__ import annotations

from edge_lora.native import Image

from edge_lora.bundle import Manifest
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.canary import finite, same
from edge_lora.runtime.engines import Arrays, Engine

_POKE = 3.0  # far from any trained weight, so that the change survives every later rounding


def self_test(engine: Engine, image: Image, manifest: Manifest, feeds: Arrays) -> None:
    """Raise UnsupportedError if patching ``image`` does not reach ``engine``, or does not undo.

    Three slots are tried (first, middle, last of those that every input passes through), so a
    route that reaches only some kinds of layer is found out.
    """
    base = before = engine.run(feeds)
    if not finite(base):
        raise UnsupportedError("the base's own output is not finite on the canary input")
    poked: dict[str, float] = {}
    try:
        for name in _probed_slots(manifest):
            poked[name] = image.poke(name, 0, _POKE)
            after = engine.run(feeds)
            if same(before, after):
                raise UnsupportedError(f"changing a weight of {name} does not change the output")
            before = after
    finally:
        for name, old in poked.items():
            image.poke(name, 0, old)
    if not same(base, engine.run(feeds)):
        raise UnsupportedError("changing weights back does not give the base's output back")


def _probed_slots(manifest: Manifest) -> list[str]:
    names = [n for n, place in manifest.stored.items() if set(place.operators) != {"Gather"}]
    return sorted({names[0], names[len(names) // 2], names[-1]}) if names else []
