"""Loaded, but without effect, is an error: a canary run must see the adapter."""

from __future__ import annotations

from edge_lora.bundle import Manifest
from edge_lora.errors import NoEffectError
from edge_lora.runtime.adapters import LoadedAdapter
from edge_lora.runtime.canary import same
from edge_lora.runtime.engines import Arrays

_ADVICE = "Look at its sizes and scale with: edge-lora inspect FILE --slots"


def require_changes(adapter: LoadedAdapter, changed: int) -> None:
    """Raise NoEffectError if not one of the base's values would change."""
    if not changed:
        raise NoEffectError(
            f"adapter {adapter.name!r} has no effect: not one of the base's values would "
            "change. Its values are zero, or too small to matter in the base's precision. "
            f"{_ADVICE}"
        )


def is_visible(adapter: LoadedAdapter, manifest: Manifest) -> bool:
    """Whether every canary run passes through one of the adapter's slots.

    False if all of them are tables in which the canary may not look up the changed rows.
    """
    places = [manifest.stored.get(manifest.slots[s].name) for s in adapter.deltas]
    return any(place is None or not place.is_table for place in places)


def require_difference(adapter: LoadedAdapter, base: Arrays, adapted: Arrays) -> None:
    """Raise NoEffectError if a canary run gives the base's outputs to the bit."""
    if same(base, adapted):
        raise NoEffectError(
            f"adapter {adapter.name!r} has no effect: its values differ from the base's, but a "
            "canary run gives the base's output to the bit. Train it longer, or adapt slots "
            "that reach the output"
        )
