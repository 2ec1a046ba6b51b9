"""The gain and shift of a base's normalisation, trained beside whatever a method trains.

Adapters with a gain are made to be worn one at a time. The file holds the change of the gain, so
two of them together add their changes, where their effects would multiply: the sum of two adapters
is neither of them nor both. A gain near zero, which such a sum may give, is kept away from zero
where the forecast is divided by it.
"""

from __future__ import annotations

import torch
from torch import nn

from edge_lora.forms import Dense, Form
from edge_lora.methods.attached import Attached, Trained
from edge_lora.methods.base_slots import find_others, slot_of
from edge_lora.slots import SlotTable
from edge_lora.timeseries.forecaster import Forecaster


class WithAffine(Trained):
    """A method's part, and the normalisation's own parameters, which are trained in place."""

    def __init__(self, method: Trained, base: Forecaster) -> None:
        super().__init__()
        self.method = method
        self.affine = nn.ParameterList(base.get_parameter(name) for name in base.affine_slots)
        self.names = base.affine_slots
        self.before = [parameter.detach().clone() for parameter in self.affine]
        for parameter in self.affine:
            parameter.requires_grad_(True)

    def forms(self) -> dict[str, list[Form]]:
        """Return the method's forms, and the change of each parameter as a Dense."""
        found = dict(self.method.forms())
        for name, now, before in zip(self.names, self.affine, self.before, strict=True):
            change = now.detach().cpu() - before.cpu()
            found[name] = [Dense(change.numpy())]
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back; the method's own attachment takes the rest off."""
        for parameter, before in zip(self.affine, self.before, strict=True):
            parameter.copy_(before)

    def parameter_count(self) -> int:
        """Return how many numbers are free to move."""
        return self.method.parameter_count() + len(self.affine)

    def before_step(self, step: int) -> None:
        """Tell the method."""
        self.method.before_step(step)

    def after_step(self, step: int) -> None:
        """Tell the method."""
        self.method.after_step(step)


def with_affine(attached: Attached, base: Forecaster) -> Attached:
    """Return ``attached`` with the gain and shift of ``base`` trained too."""
    others = find_others(base)
    table = attached.slots
    slots = [*table.values(), *(slot_of(others[name]) for name in base.affine_slots)]
    joint = WithAffine(attached.trained, base)

    def take_off() -> None:
        joint.restore()
        attached.detach()

    return Attached(
        base, attached.method, attached.config,
        SlotTable(slots, table.base_id, table.fingerprint), joint, take_off,
    )  # fmt: skip
