"""One-for-All's network: a window as overlapping patches through frozen GPT-2 blocks.

    x -> normalise -> repeat the last value -> patches -> in_layer -> GPT-2 -> flatten
      -> out_layer -> put mean and spread back

Its adapter is rank-stabilised LoRA of rank 16 and alpha 16 on the position table (``gpt2.wpe``)
and ``out_layer``; in_layer, out_layer's own weight and the norms stay as they are, and the first
two are random. This is what the published code does; the paper's text differs from it (alpha,
overlap of patches, learning rate).

Source: Dey, Dev, Schoen-Phelan 2026, arXiv:2603.29756. The initial random weights are ours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError
from edge_lora.timeseries.forecaster import Forecaster
from edge_lora.timeseries.gpt2 import fill_uniform
from edge_lora.timeseries.patches import LEAST_WINDOW, PATCH, count_overlapping, overlapping

if TYPE_CHECKING:
    from transformers import GPT2Model


class OneForAll(Forecaster):
    """The network; see the module."""

    slots = ("gpt2.wpe", "out_layer")

    def __init__(
        self, gpt2: GPT2Model, window: int, horizon: int, name: str, affine: bool = False
    ) -> None:
        super().__init__(name, window, horizon, affine)
        width, positions = gpt2.config.n_embd, gpt2.config.n_positions
        self.patches = count_overlapping(window)
        if window < LEAST_WINDOW or self.patches > positions:
            raise UnsupportedError(
                f"a window of {window} makes {max(0, self.patches)} patches; 1 to {positions} fit"
            )
        self.gpt2 = gpt2
        self.in_layer = nn.Linear(PATCH, width)
        self.out_layer = nn.Linear(self.patches * width, horizon)
        for key, layer in (("in_layer", self.in_layer), ("out_layer", self.out_layer)):
            bound = 1 / math.sqrt(layer.in_features)  # as nn.Linear
            fill_uniform(layer.weight, bound, f"{key}.weight")
            fill_uniform(layer.bias, bound, f"{key}.bias")

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels)."""
        batch, channels = x.shape[0], x.shape[2]
        series, mean, spread = self.norm(x.transpose(1, 2).flatten(0, 1))
        tokens = self.in_layer(overlapping(series))
        # One row of positions for each series: were they constant, an engine would look them up
        # once, when it loads the graph, and adapters of the table would change nothing.
        positions = torch.arange(self.patches, device=x.device).expand(tokens.shape[0], -1)
        hidden = self.gpt2(inputs_embeds=tokens, position_ids=positions).last_hidden_state
        y = self.norm.back(self.out_layer(hidden.flatten(1)), mean, spread)
        return y.view(batch, channels, self.horizon).transpose(1, 2)
