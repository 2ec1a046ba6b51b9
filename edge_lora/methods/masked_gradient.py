"""SHiRA trained by masking the gradient of the full weight: the reference of ``sparse_values``.

The weight itself is the parameter; a hook multiplies its gradient by the 0/1 mask right after it is
accumulated, hence before any clipping. It needs the dense gradient and optimizer state, but no
custom forward, so it trains any module (embeddings too). Needs an elementwise optimizer and weight
decay 0: decoupled decay moves weights outside the mask, which ``forms`` refuses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Form, Sparse
from edge_lora.methods.attached import Trained, module_key
from edge_lora.methods.base_slots import SlotWeight


class SlotMask(nn.Module):
    """A full trainable weight, the positions that may move, and a copy of the base.

    Attributes:
        weight: The model's own parameter.
        positions: (nnz,) int64, flat row-major in the slot's orientation.
        base: Copy of the base, as the module stores it.
    """

    positions: Tensor
    base: Tensor

    def __init__(self, slot: SlotWeight, positions: Tensor) -> None:
        super().__init__()
        self.slot = slot
        self.weight = slot.parameter
        self.weight.requires_grad_(True)
        self.register_buffer("positions", positions)
        self.register_buffer("base", slot.parameter.detach().clone())
        self._handle = self.weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            self._mask_gradient
        )

    def mask(self) -> Tensor:
        """Return the bool mask in the orientation of the stored weight."""
        flat = torch.zeros(self.weight.numel(), dtype=torch.bool, device=self.weight.device)
        flat[self.positions] = True
        mask = flat.view(self.slot.shape)
        return mask.t() if self.slot.is_transposed else mask

    def _mask_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad.mul_(self.mask())

    @torch.no_grad()
    def restore(self) -> None:
        """Remove the hook and write the base back."""
        self._handle.remove()
        self.weight.copy_(self.base)


class MaskedGradient(Trained):
    """Full weights of all slots, trained under their masks."""

    def __init__(self, slots: Mapping[str, SlotWeight], positions: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.slots = nn.ModuleDict(
            {module_key(name): SlotMask(slot, positions[name]) for name, slot in slots.items()}
        )

    def _each(self) -> list[SlotMask]:
        return [slot for slot in self.slots.values() if isinstance(slot, SlotMask)]

    def forms(self) -> dict[str, list[Form]]:
        """Return one Sparse form per slot: what the weight gained over the base, in fp32.

        Raises:
            UnsupportedError: If weights outside the masks have moved.
        """
        result: dict[str, list[Form]] = {}
        moved = []
        for slot in self._each():
            delta = slot.weight.detach().float() - slot.base.float()
            if bool((delta[~slot.mask()] != 0).any()):
                moved.append(slot.slot.name)
            flat = (delta.t() if slot.slot.is_transposed else delta).flatten()
            values = flat[slot.positions].cpu().numpy()
            result[slot.slot.name] = [Sparse(slot.positions.cpu().numpy().astype("uint32"), values)]
        if moved:
            title = "weights outside the mask have changed"
            raise UnsupportedError(f"{list_all(title, moved)}\nTrain with weight_decay=0")
        return result

    def parameter_count(self) -> int:
        """Return the number of unmasked entries."""
        return sum(slot.positions.numel() for slot in self._each())

    def restore(self) -> None:
        """Give every slot its base back."""
        for slot in self._each():
            slot.restore()
