"""A frozen encoder between two layers that are the adapter's own.

    x -> normalise -> patches of 24 -> in_layer -> encoder -> flatten -> out_layer -> mean, spread

One-for-All's scheme without what its files leave out. There, in_layer and out_layer are random and
frozen, and whoever has the adapter alone cannot rebuild the forecast. Here both are zero in the
base, so that the adapter's change of them *is* the layer; the position table has the rows in use
and no more; patches do not overlap, so there are a third as many, and the head, which is most of
the adapter, is a third as wide. The window is filled up at its start with its first value.

The encoder takes ``inputs_embeds`` and ``position_ids`` as transformers' models do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_lora.timeseries.forecaster import Forecaster

PATCH = 24


def count_patches(window: int) -> int:
    """Return how many patches a window makes."""
    return -(-window // PATCH)


class Compact(Forecaster):
    """The network; see the module."""

    nonzero_start = ("in_layer.weight",)
    lr = 3e-4

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        window: int,
        horizon: int,
        name: str,
        affine: bool = False,
    ) -> None:
        """Take an encoder of (n, patches, width), with its position table, if any, cut to fit."""
        super().__init__(name, window, horizon, affine)
        self.patches = count_patches(window)
        self.encoder = encoder
        self.in_layer = nn.Linear(PATCH, width, bias=False)
        self.out_layer = nn.Linear(self.patches * width, horizon, bias=False)
        nn.init.zeros_(self.in_layer.weight)
        nn.init.zeros_(self.out_layer.weight)
        table = ("encoder.wpe",) if hasattr(encoder, "wpe") else ()
        self.slots = ("in_layer", *table, "out_layer")

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels)."""
        batch, channels = x.shape[0], x.shape[2]
        series, mean, spread = self.norm(x.transpose(1, 2).flatten(0, 1))
        missing = self.patches * PATCH - self.window
        series = nn.functional.pad(series[:, None], (missing, 0), "replicate")[:, 0]
        tokens = self.in_layer(series.view(-1, self.patches, PATCH))
        # A row for each series, as in One-for-All: a constant look-up would be folded away.
        positions = torch.arange(self.patches, device=x.device).expand(tokens.shape[0], -1)
        hidden = self.encoder(inputs_embeds=tokens, position_ids=positions).last_hidden_state
        y = self.norm.back(self.out_layer(hidden.flatten(1)), mean, spread)
        return y.view(batch, channels, self.horizon).transpose(1, 2)
