"""Frozen bases for forecasting, built from their description alone.

A base takes ``x`` (batch, window, channels), any number of channels, and returns (batch, horizon,
channels): each channel is a series of its own. Normalisation is inside: the mean and spread of each
window are taken off first and put back at the end, so raw values can go in and come out.

| name | what is frozen | slots of an adapter |
|---|---|---|
| ``linear`` | nothing: a zero (horizon, window) weight | ``head`` |
| ``gpt2-random``, ``gpt2-random:2x64`` | 6 blocks of width 768, or LAYERSxWIDTH | wpe, out_layer |
| a folder | the first 6 blocks of that GPT-2 checkpoint | wpe, out_layer |

``linear`` is the yardstick of every other base: an adapter on it is a low-rank linear forecast.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from edge_lora.errors import UnknownNameError, UnsupportedError
from edge_lora.timeseries.forecaster import Forecaster, normalised

RANDOM_NAME = re.compile(r"gpt2-random(:(?P<layers>[1-9]\d?)x(?P<width>[1-9]\d{0,3}))?")


class LinearForecaster(Forecaster):
    """No base at all: one zero weight on the normalised window. Untrained, it gives the mean."""

    slots = ("head",)
    lr = 3e-3

    def __init__(self, window: int, horizon: int) -> None:
        super().__init__("linear", window, horizon)
        self.head = nn.Linear(window, horizon, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels)."""
        x, mean, spread = normalised(x)
        y: Tensor = self.head(x.transpose(1, 2)).transpose(1, 2)
        return y * spread + mean


def make_base(name: str, window: int, horizon: int) -> Forecaster:
    """Return the base of that name; see the table at the top of this file.

    The same name, window and horizon give the same weights, and so the same fingerprint, on every
    machine; a folder's depend on its content too.

    Raises:
        UnknownNameError: No such base.
        UnsupportedError: Impossible sizes, or a checkpoint that is no GPT-2.
    """
    if window < 1 or horizon < 1:
        raise UnsupportedError(f"window is {window} and horizon {horizon}; both must be at least 1")
    if name == "linear":
        return LinearForecaster(window, horizon)
    from edge_lora.timeseries.gpt2 import checkpoint_blocks, random_blocks
    from edge_lora.timeseries.one_for_all import OneForAll

    shape = RANDOM_NAME.fullmatch(name)
    if shape is not None:
        layers, width = (int(n) for n in (shape["layers"] or 6, shape["width"] or 768))
        return OneForAll(random_blocks(layers, width), window, horizon, name)
    if Path(name).is_dir():
        return OneForAll(checkpoint_blocks(Path(name)), window, horizon, Path(name).name)
    raise UnknownNameError(
        f"unknown base {name!r}. Known: linear, gpt2-random, gpt2-random:LAYERSxWIDTH, or the "
        "folder of a GPT-2 checkpoint"
    )
