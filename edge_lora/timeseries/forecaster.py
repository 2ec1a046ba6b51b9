"""What all bases share: their description, and instance normalisation of a window."""

from typing import ClassVar

import torch
from torch import Tensor, nn

EPSILON = 1e-5  # added to the variance of a window


def normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (batch, window, channels) without mean and spread of each window, and both."""
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    spread = torch.sqrt((centred * centred).mean(1, keepdim=True) + EPSILON)
    return centred / spread, mean, spread


class Forecaster(nn.Module):
    """A frozen base: (batch, window, channels) to (batch, horizon, channels).

    Attributes:
        slots: Patterns of the weights that an adapter changes.
        lr: Peak learning rate that validation chose.
        id: Readable name.
        window: Rows that a forecast sees.
        horizon: Rows that it gives.
    """

    slots: ClassVar[tuple[str, ...]]
    lr: ClassVar[float] = 1e-3

    def __init__(self, name: str, window: int, horizon: int) -> None:
        super().__init__()
        self.id = f"{name}-{window}-{horizon}"
        self.window, self.horizon = window, horizon
