"""Bind an adapter that names no base to one: the only place where an import gets its base."""

from __future__ import annotations

from dataclasses import replace

from edge_lora.adapter import Adapter, BaseIdentity
from edge_lora.slots import SlotTable


def bind(adapter: Adapter, slots: SlotTable) -> Adapter:
    """Return the adapter with the fingerprint, slot hashes, dtypes and canonical names of a base.

    An adapter that is bound to this base already is returned as it is.

    Raises:
        AdapterMismatchError: If it does not fit, or is bound to another base; lists every reason.
    """
    slots.check(adapter)
    return adapter if adapter.base.fingerprint else bound_to(adapter, slots)


def bound_to(adapter: Adapter, slots: SlotTable) -> Adapter:
    """Return an unbound adapter bound to a base that an importer checked it against already."""
    deltas = {
        slots[name].name: replace(delta, dtype=slots[name].dtype, slot_hash=slots[name].slot_hash)
        for name, delta in adapter.deltas.items()
    }
    return replace(adapter, base=BaseIdentity(slots.fingerprint, slots.base_id), deltas=deltas)
