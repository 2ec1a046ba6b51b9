"""SHiRA trained by its values alone: no dense gradient, no dense optimizer state, no second weight.

Trainable are ``v`` (nnz) in fp32. The weight in the model's own storage holds ``round(base + v)``
at the masked positions; it is refreshed when ``v`` has changed, once per optimizer step. So

    forward    y = x W'^T + b                              a plain linear layer, only x is kept
    backward   dx = dy W'
               dv_k = sum_t dy[t, row_k] * x[t, col_k]     (a sampled product)

The sampled product is computed for blocks of rows: one matrix product into a scratch of at most 64
MiB, then a gather of the block's entries. That runs at matrix-product speed, where gathering
columns of ``dy`` and ``x`` first would move T * nnz elements twice.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError, list_all
from edge_lora.forms import Form, Sparse
from edge_lora.methods.attached import Trained, module_key
from edge_lora.methods.base_slots import SlotWeight, is_transformers_conv1d

_SCRATCH_ENTRIES = 1 << 24  # of one block of rows, 64 MiB in fp32: enough for full product speed


class SlotValues(nn.Module):
    """The trainable values of one slot.

    Attributes:
        values: (nnz,) fp32, added to the base; zero at first.
        positions: (nnz,) int32, flat row-major in the slot's (out_features, in_features),
            ascending.
        base: (nnz,) the base weight there, in its own dtype.
    """

    positions: Tensor
    base: Tensor

    def __init__(self, weight: SlotWeight, positions: Tensor) -> None:
        super().__init__()
        base = weight.matrix.flatten()[positions]
        self.weight = [weight]  # in a list: it is the model's, not a parameter of this module
        self.shape = tuple(weight.matrix.shape)
        self.values = nn.Parameter(torch.zeros(len(positions), device=base.device))
        self.register_buffer("positions", positions.to(torch.int32))
        self.register_buffer("base", base)
        self._written = self.values._version
        self._blocks: tuple[int, list[tuple[int, int, int, int]]] | None = None

    def write(self) -> None:
        """Bring the weight up to date, if the values have changed since the last time."""
        if self.values._version != self._written:
            self.put(self.base.float() + self.values.detach())
            self._written = self.values._version

    @torch.no_grad()
    def put(self, entries: Tensor) -> None:
        """Write ``entries`` (nnz,) to the masked positions of the weight, rounded to its dtype."""
        weight = self.weight[0]
        positions = self.positions.long()
        if weight.is_transposed:
            out_features, in_features = self.shape
            positions = positions % in_features * out_features + positions // in_features
        storage = weight.parameter.view(-1)
        storage.index_copy_(0, positions, entries.to(storage.dtype))

    def row_blocks(self) -> list[tuple[int, int, int, int]]:
        """Return (first row, end row, first entry, end entry) of each block that holds entries."""
        if self._blocks is None or self._blocks[0] != self.positions._version:
            self._blocks = (self.positions._version, self._cut_blocks())
        return self._blocks[1]

    def _cut_blocks(self) -> list[tuple[int, int, int, int]]:
        out_features, in_features = self.shape
        rows = max(1, _SCRATCH_ENTRIES // in_features)
        starts = list(range(0, out_features, rows))
        ends = [*starts[1:], out_features]
        limits = torch.tensor([row * in_features for row in [*starts, out_features]])
        cuts = torch.searchsorted(self.positions.cpu().long(), limits).tolist()
        blocks = zip(starts, ends, cuts[:-1], cuts[1:], strict=True)
        return [block for block in blocks if block[3] > block[2]]

    def sampled_product(self, dy: Tensor, x: Tensor) -> Tensor:
        """Return dv (nnz,) fp32 from dy (t, out_features) and x (t, in_features) of one dtype."""
        in_features = self.shape[1]
        dv = torch.empty_like(self.values)
        for row, end_row, start, end in self.row_blocks():
            product = dy[:, row:end_row].t() @ x  # (rows, in_features)
            dv[start:end] = product.view(-1)[self.positions[start:end] - row * in_features]
        return dv

    def gather(self, gradient: Tensor) -> Tensor:
        """Return dv (nnz,) fp32 from a dense gradient of the slot, one layer's temporary."""
        return gradient.flatten()[self.positions].float()


class _Linear(torch.autograd.Function):
    """A linear layer that keeps its input and gives a gradient to the values of its weight."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        values: Tensor,  # noqa: ARG004  (autograd needs to see it)
        slot: SlotValues,
        bias: Tensor | None,
    ) -> Tensor:
        weight = slot.weight[0]
        ctx.slot = slot
        ctx.save_for_backward(x, weight.parameter)
        return F.linear(x, weight.tensor, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        slot: SlotValues = ctx.slot
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dv = slot.sampled_product(dy_rows, x.reshape(-1, x.shape[-1]).to(dy.dtype))
        dx = None
        if ctx.needs_input_grad[0]:
            matrix = weight.t() if slot.weight[0].is_transposed else weight
            dx = (dy_rows @ matrix.to(dy.dtype)).view(x.shape).to(x.dtype)
        return dx, dv, None, None


class _Convolution(torch.autograd.Function):
    """The same for Conv1d and Conv2d; the dense gradient of one layer is a temporary."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        values: Tensor,  # noqa: ARG004
        slot: SlotValues,
        module: nn.Conv1d | nn.Conv2d,
    ) -> Tensor:
        ctx.slot, ctx.module = slot, module
        ctx.save_for_backward(x, module.weight)
        return type(module).forward(module, x)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        module = ctx.module
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x.to(dy.dtype), weight.to(dy.dtype), None, module.stride, module.padding,
            module.dilation, False, [0], module.groups, [ctx.needs_input_grad[0], True, False],
        )  # fmt: skip
        return None if dx is None else dx.to(x.dtype), ctx.slot.gather(dw), None, None


class SparseValues(Trained):
    """Values of all slots, installed as the ``forward`` of the modules that read them."""

    def __init__(self, slots: Mapping[str, SlotWeight], positions: Mapping[str, Tensor]) -> None:
        super().__init__()
        _refuse_what_it_cannot_train(slots)
        self.slots = nn.ModuleDict(
            {
                module_key(name): SlotValues(weight, positions[name])
                for name, weight in slots.items()
            }
        )
        for slot in self._each():
            for module in slot.weight[0].modules:
                module.forward = _forward_of(module, slot)

    def _each(self) -> list[SlotValues]:
        return [slot for slot in self.slots.values() if isinstance(slot, SlotValues)]

    def forms(self) -> dict[str, list[Form]]:
        """Return one Sparse form per slot."""
        return {
            slot.weight[0].name: [
                Sparse(
                    slot.positions.cpu().numpy().astype("uint32"),
                    slot.values.detach().float().cpu().numpy(),
                )
            ]
            for slot in self._each()
        }

    def after_step(self, step: int) -> None:  # noqa: ARG002
        """Write the new values now, so that even readers of bare weights see them."""
        for slot in self._each():
            slot.write()

    def restore(self) -> None:
        """Put the base entries and the modules' own ``forward`` back."""
        for slot in self._each():
            for module in slot.weight[0].modules:
                del module.forward
            slot.put(slot.base)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Take values and masks; a mask that moves gives the old positions back first."""
        for slot in self._each():
            slot.put(slot.base)
        result = super().load_state_dict(*args, **kwargs)
        for slot in self._each():
            slot.put(slot.base.float() + slot.values.detach())
            slot._written = slot.values._version
        return result


def _forward_of(module: nn.Module, slot: SlotValues) -> Any:  # noqa: ANN401
    def forward(x: Tensor) -> Tensor:
        slot.write()
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            y: Tensor = _Convolution.apply(x, slot.values, slot, module)  # type: ignore[no-untyped-call]
        else:
            y = _Linear.apply(x, slot.values, slot, module.bias)  # type: ignore[no-untyped-call]
        return y

    return forward


def _refuse_what_it_cannot_train(slots: Mapping[str, SlotWeight]) -> None:
    plain = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward}
    problems = []
    for name, weight in slots.items():
        for module in weight.modules:
            own = "forward" in vars(module) or not (
                type(module).forward in plain or is_transformers_conv1d(module)
            )
            padded = getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(
                getattr(module, "padding", None), str
            )
            if own or padded:
                problems.append(f"{name}: read by a {type(module).__name__} of its own kind")
    if problems:
        title = "trainer 'values' knows only plain Linear, Conv1D, Conv1d and Conv2d modules"
        raise UnsupportedError(f"{list_all(title, problems)}\nUse trainer='masked' for these slots")
