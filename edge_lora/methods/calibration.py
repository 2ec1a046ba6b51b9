"""Summed gradients of chosen weights over a few batches, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError
from edge_lora.methods.base_slots import SlotWeight

Batch = Any
"""A mapping of keyword arguments for the model, or anything that the loss function understands."""
LossFunction = Callable[[nn.Module, Batch], Tensor]

_ACCUMULATOR_BYTES = 1 << 30  # fp32 sums held at a time; more weights than fit take another pass


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return ``model(**batch).loss``, as transformers' models give it when the batch holds labels.

    Raises:
        UnsupportedError: If the model gives no loss; pass a loss function instead.
    """
    try:
        loss = getattr(model(**batch), "loss", None)
    except TypeError as error:
        raise UnsupportedError(
            f"the model cannot be called with this batch ({error}). "
            "Pass loss=function(model, batch)"
        ) from error
    if not isinstance(loss, Tensor):
        raise UnsupportedError(
            f"{type(model).__name__} returns no loss for this batch. Add labels to it, or pass "
            "loss=function(model, batch)"
        )
    return loss


def summed_gradients(
    model: nn.Module,
    weights: Sequence[SlotWeight],
    batches: Sequence[Batch],
    loss: LossFunction = model_loss,
) -> Iterator[tuple[SlotWeight, Tensor]]:
    """Yield each weight with the fp32 sum of its gradients over ``batches``, (out_features, rest).

    At most 1 GiB of sums (or one weight) is held at a time: the batches are run again for the next
    group of weights. The model is run in eval mode and left as it was.
    """
    was_training = model.training
    model.eval()
    try:
        for group in _groups(weights):
            sums = _sum_group(model, group, batches, loss)
            for weight in group:
                total = sums.pop(weight.name)
                yield weight, (total.t() if weight.is_transposed else total).flatten(1)
    finally:
        model.train(was_training)


def _groups(weights: Sequence[SlotWeight]) -> Iterator[list[SlotWeight]]:
    group: list[SlotWeight] = []
    size = 0
    for weight in weights:
        if group and size + weight.parameter.numel() * 4 > _ACCUMULATOR_BYTES:
            yield group
            group, size = [], 0
        group.append(weight)
        size += weight.parameter.numel() * 4
    if group:
        yield group


def _sum_group(
    model: nn.Module, group: Sequence[SlotWeight], batches: Sequence[Batch], loss: LossFunction
) -> dict[str, Tensor]:
    sums = {w.name: torch.zeros_like(w.parameter, dtype=torch.float32) for w in group}
    handles = []
    try:
        for weight in group:
            weight.parameter.requires_grad_(True)

            def collect(parameter: Tensor, total: Tensor = sums[weight.name]) -> None:
                if parameter.grad is not None:
                    total += parameter.grad
                parameter.grad = None  # each dense gradient lives for one moment only

            register = weight.parameter.register_post_accumulate_grad_hook
            handles.append(register(collect))  # type: ignore[no-untyped-call]
        for batch in batches:
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for weight in group:
            weight.parameter.requires_grad_(False)
    return sums
