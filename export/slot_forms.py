"""What the inputs of a slot carry, and what they are called in every engine."""

from __future__ import annotations

from edge_lora.slots import Slot

SLOT_FORMS = ("low_rank", "row_scale")
"""What an adapter may feed at a slot."""


def lora_input_names(slot: Slot) -> tuple[str, str]:
    """Return the names of a slot's two inputs.

    >>> lora_input_names(Slot("q.weight", (2, 3), "F32", ""))
    ('q.lora_a', 'q.lora_b')
    """
    module = slot.name.removesuffix(".weight")
    return f"{module}.lora_a", f"{module}.lora_b"


def gain_input_name(slot: Slot) -> str:
    """Return the name of a slot's gain.

    >>> gain_input_name(Slot("q.weight", (2, 3), "F32", ""))
    'q.row_gain'
    """
    return f"{slot.name.removesuffix('.weight')}.row_gain"
