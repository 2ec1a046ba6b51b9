"""SHiRA: train 1-2 % of the entries of each weight in place, at full rank.

    W' = W + S,   S zero outside a fixed mask M,   S = 0 at first

| symbol | here |
|---|---|
| M | ``masks.choose``: positions, exactly ``density`` of each slot |
| S at M | the values of ``sparse_values`` (default), or of ``masked_gradient`` |

Lowers to one Sparse form per slot, for ``struct`` masks too (rows and a diagonal overlap; one form
is exact and has no order). Source: Bhardwaj et al. 2024, arXiv:2406.13175. Differences: exact
counts instead of Bernoulli trials, a seed of its own for every slot, and ``line`` masks (see
``masks``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from edge_lora.errors import UnknownNameError, UnsupportedError, list_all, unknown_name
from edge_lora.methods.attached import Trained, slot_seed
from edge_lora.methods.base_slots import SlotWeight
from edge_lora.methods.calibration import Batch, LossFunction, model_loss, summed_gradients
from edge_lora.methods.masked_gradient import MaskedGradient
from edge_lora.methods.masks import MASKS, choose, problem_of
from edge_lora.methods.sparse_values import SparseValues
from edge_lora.slots import SlotKind

TRAINERS: dict[str, type[SparseValues] | type[MaskedGradient]] = {
    "values": SparseValues,
    "masked": MaskedGradient,
}


@dataclass(frozen=True)
class ShiraConfig:
    """What can be set.

    Attributes:
        density: Share of each slot's entries that is trained, in (0, 1].
        mask: One of rand, struct, wm, grad, snip, line, line-wm, line-grad, line-snip.
        trainer: "values" (small memory) or "masked" (any module).
        seed: Of the masks; each slot derives its own.
        floor: Share of the budget spread evenly over outputs before a scored mask takes the best,
            in [0, 1].
        calibration: Batches for the masks that read a gradient; may be run more than once.
        loss: Their loss; by default ``model(**batch).loss``.
    """

    density: float = 0.01
    mask: str = "rand"
    trainer: Literal["values", "masked"] = "values"
    seed: int = 0
    floor: float = 0.0
    calibration: Sequence[Batch] | None = field(default=None, metadata={"recorded": False})
    loss: LossFunction = field(default=model_loss, metadata={"recorded": False})

    def __post_init__(self) -> None:
        """Refuse unknown names and impossible numbers."""
        if self.mask not in MASKS:
            raise UnknownNameError(unknown_name("mask", self.mask, list(MASKS)))
        if self.trainer not in TRAINERS:
            raise UnknownNameError(unknown_name("trainer", self.trainer, list(TRAINERS)))
        problems = []
        if not 0 < self.density <= 1:
            problems.append(f"density is {self.density!r}, must be in (0, 1]")
        if not 0 <= self.floor <= 1:
            problems.append(f"floor is {self.floor!r}, must be in [0, 1]")
        if MASKS[self.mask].needs_gradient and not self.calibration:
            problems.append(f"mask {self.mask!r} reads gradients: pass calibration=[batches]")
        if problems:
            raise UnsupportedError("; ".join(problems))


class SHiRA:
    """The method: choose a mask for each slot, then train under it."""

    config_class: ClassVar[type] = ShiraConfig
    kinds: ClassVar[frozenset[SlotKind]] = frozenset({"linear", "conv", "embedding"})

    @staticmethod
    def attach(model: nn.Module, slots: Mapping[str, SlotWeight], config: ShiraConfig) -> Trained:
        """Choose the masks and install the trainer that the config names."""
        reasons = {name: problem_of(config.mask, _matrix_shape(w)) for name, w in slots.items()}
        problems = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
        if problems:
            title = f"mask {config.mask!r} does not fit {len(problems)} of {len(slots)} slots"
            raise UnsupportedError(
                f"{list_all(title, problems)}\nLeave them out with slots=[…] or use another mask"
            )
        return TRAINERS[config.trainer](slots, _positions(model, slots, config))


def _matrix_shape(weight: SlotWeight) -> tuple[int, int]:
    out_features, in_features = weight.matrix.shape
    return out_features, in_features


def _positions(
    model: nn.Module, slots: Mapping[str, SlotWeight], config: ShiraConfig
) -> dict[str, Tensor]:
    def choose_one(weight: SlotWeight, gradient: Tensor | None) -> Tensor:
        seed = slot_seed(config.seed, weight.name)
        return choose(config.mask, weight.matrix, config.density, seed, gradient, config.floor)

    if not MASKS[config.mask].needs_gradient:
        return {name: choose_one(weight, None) for name, weight in slots.items()}
    gradients = summed_gradients(
        model, list(slots.values()), list(config.calibration or ()), config.loss
    )
    return {weight.name: choose_one(weight, gradient) for weight, gradient in gradients}
