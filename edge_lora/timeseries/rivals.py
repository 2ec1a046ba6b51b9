"""Small forecasters of others, whole, trained in the same loop: what an adapter stands beside.

| name | what |
|---|---|
| ``dlinear`` | a moving average of 25 and the rest, each through a linear map (Zeng et al. 2022) |
| ``rlinear`` | reversible affine normalisation around one linear map (Li et al. 2023) |
| ``patchtst`` | patches of 16, stride 8, 3 encoder layers of width 16 (Nie et al. 2022) |

Sources: arXiv:2205.13504, 2305.10721, 2211.14730. Written from their formulas. Differences: every
channel shares all weights, the gain and shift of RLinear and PatchTST too; PatchTST has layer norms
in place of batch norms, since the training loop keeps the statistics of those as they are, and its
attention has no residual scores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_lora.errors import UnknownNameError
from edge_lora.methods.attached import Attached, Trained
from edge_lora.slots import SlotTable
from edge_lora.timeseries.forecaster import Normalise
from edge_lora.timeseries.patches import LEAST_WINDOW, PATCH, count_overlapping, overlapping
from edge_lora.timeseries.training import Recipe, Shuffled, require_device, train_forecast
from edge_lora.timeseries.windows import Parts
from edge_lora.training import TrainReport

AVERAGE = 25
WIDTH, HEADS, LAYERS, FEEDFORWARD, DROPOUT = 16, 4, 3, 128, 0.3


class DLinear(nn.Module):
    """Trend and rest, each through its own linear map."""

    lr = 3e-3
    epochs = 10
    least_window = 1

    def __init__(self, window: int, horizon: int) -> None:
        super().__init__()
        self.trend = nn.Linear(window, horizon)
        self.rest = nn.Linear(window, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels)."""
        x = x.transpose(1, 2)
        side = AVERAGE // 2
        trend = nn.functional.avg_pool1d(
            nn.functional.pad(x, (side, side), "replicate"), AVERAGE, stride=1
        )
        y: Tensor = self.trend(trend) + self.rest(x - trend)
        return y.transpose(1, 2)


class RLinear(nn.Module):
    """One linear map of the normalised window."""

    lr = 3e-3
    epochs = 10
    least_window = 1

    def __init__(self, window: int, horizon: int) -> None:
        super().__init__()
        self.norm = Normalise(affine=True)
        self.head = nn.Linear(window, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels)."""
        series, mean, spread = self.norm(x.transpose(1, 2))
        y: Tensor = self.norm.back(self.head(series), mean, spread)
        return y.transpose(1, 2)


class PatchTST(nn.Module):
    """A small transformer encoder over patches of one channel."""

    lr = 2e-4
    epochs = 10
    least_window = LEAST_WINDOW

    def __init__(self, window: int, horizon: int) -> None:
        super().__init__()
        self.patches = count_overlapping(window)
        self.norm = Normalise(affine=True)
        self.embed = nn.Linear(PATCH, WIDTH)
        self.positions = nn.Parameter(torch.empty(self.patches, WIDTH).uniform_(-0.02, 0.02))
        self.dropout = nn.Dropout(DROPOUT)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, FEEDFORWARD, DROPOUT, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(self.patches * WIDTH, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels)."""
        batch, channels = x.shape[0], x.shape[2]
        series, mean, spread = self.norm(x.transpose(1, 2).flatten(0, 1))
        tokens = self.dropout(self.embed(overlapping(series)) + self.positions)
        y: Tensor = self.head(self.encoder(tokens).flatten(1))
        y = self.norm.back(y, mean, spread)
        return y.view(batch, channels, -1).transpose(1, 2)


RIVALS: dict[str, type[DLinear | RLinear | PatchTST]] = {
    "dlinear": DLinear,
    "rlinear": RLinear,
    "patchtst": PatchTST,
}


class _All(Trained):
    """Every parameter of a model that is no base of anything."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def train_rival(
    name: str, parts: Parts, seed: int = 0, device: str = "cpu", epochs: int | None = None
) -> tuple[nn.Module, TrainReport]:
    """Return a rival trained on ``parts``, in its best epoch's state, and its curves.

    Args:
        name: One of ``RIVALS``.
        parts: Windows.
        seed: Of init, order and dropout.
        device: "cpu" or "cuda".
        epochs: Passes over all training windows; by default the rival's own.

    Raises:
        UnknownNameError: No such rival.
    """
    if name not in RIVALS:
        raise UnknownNameError(f"unknown rival {name!r}. Known: {', '.join(RIVALS)}")
    torch.manual_seed(seed)
    model = RIVALS[name](parts.train.window, parts.train.horizon).to(require_device(device))
    attached = Attached(model, name, None, SlotTable(()), _All(model), lambda: None)
    recipe = Recipe(epochs=epochs or model.epochs, lr=model.lr, seed=seed, device=device)
    batches = Shuffled(parts.train, 256, seed)
    report = train_forecast(attached, batches, parts.validation, recipe)
    return model.eval(), report
