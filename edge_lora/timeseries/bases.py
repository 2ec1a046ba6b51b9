"""Frozen bases for forecasting, by name.

A base takes ``x`` (batch, window, channels), any number of channels, and returns (batch, horizon,
channels): each channel is a series of its own. Normalisation is inside: the mean and spread of each
window are taken off first and put back at the end, so raw values can go in and come out.

| name | what is frozen | slots of an adapter |
|---|---|---|
| ``linear`` | nothing: a zero (horizon, window) weight | ``head`` |
| ``gpt2-random[:LxW]`` | One-for-All: random GPT-2, 6 blocks of width 768 or LxW | wpe, out_layer |
| a folder | One-for-All: the first 6 blocks of that GPT-2 checkpoint | wpe, out_layer |
| ``gpt2-compact[:LxW]``, ``gpt2-compact:FOLDER`` | the same blocks | in_layer, wpe, out_layer |
| ``smollm2:K`` | the first K layers of SmolLM2-135M | in_layer, out_layer |
| ``fracast`` | a small forecasting model | its linear layers |

``linear`` is the yardstick of every other base: an adapter on it is a low-rank linear forecast.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edge_lora.errors import UnknownNameError, UnsupportedError
from edge_lora.timeseries.forecaster import Forecaster

if TYPE_CHECKING:
    from transformers import GPT2Model

SHAPE = re.compile(r"(?P<layers>[1-9]\d?)x(?P<width>[1-9]\d{0,3})")
LAYERS, WIDTH = 6, 768  # of One-for-All
NAMES = (
    "linear, gpt2-random, gpt2-random:LAYERSxWIDTH, the folder of a GPT-2 checkpoint, "
    "gpt2-compact, gpt2-compact:LAYERSxWIDTH, gpt2-compact:FOLDER, smollm2:LAYERS, fracast"
)


class LinearForecaster(Forecaster):
    """No base at all: one zero weight on the normalised window. Untrained, it gives the mean."""

    slots = ("head",)
    lr = 3e-3

    def __init__(self, window: int, horizon: int, affine: bool = False) -> None:
        super().__init__("linear", window, horizon, affine)
        self.head = nn.Linear(window, horizon, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels)."""
        series, mean, spread = self.norm(x.transpose(1, 2))
        y: Tensor = self.norm.back(self.head(series), mean, spread)
        return y.transpose(1, 2)


def make_base(name: str, window: int, horizon: int, affine: bool = False) -> Forecaster:
    """Return the base of that name; see the table at the top of this file.

    The same name, window and horizon give the same weights, and so the same fingerprint, on every
    machine; a folder's depend on its content too.

    Args:
        name: See the table.
        window: Rows that a forecast sees.
        horizon: Rows that it gives.
        affine: A gain and a shift in the normalisation, which every adapter trains.

    Raises:
        UnknownNameError: No such base.
        UnsupportedError: Impossible sizes, a checkpoint that is no GPT-2, or a base with a
            normalisation of its own that is to be affine.
        EngineUnavailableError: A package with weights is not installed.
    """
    if window < 1 or horizon < 1:
        raise UnsupportedError(f"window is {window} and horizon {horizon}; both must be at least 1")
    kind, _, rest = name.partition(":")
    match kind:
        case "linear" if not rest:
            return LinearForecaster(window, horizon, affine)
        case "fracast" if not rest:
            return _fracast(window, horizon, affine)
        case "smollm2" if rest.isdecimal():
            return _smollm2(int(rest), window, horizon, affine)
        case "gpt2-compact" if not rest or SHAPE.fullmatch(rest) or Path(rest).is_dir():
            return _gpt2_compact(rest, window, horizon, affine)
        case "gpt2-random" if not rest or SHAPE.fullmatch(rest):
            return _one_for_all(_gpt2(rest), window, horizon, name, affine)
    if Path(name).is_dir():
        return _one_for_all(_gpt2(name), window, horizon, Path(name).name, affine)
    raise UnknownNameError(f"unknown base {name!r}. Known: {NAMES}")


def portable_name(name: str) -> str:
    """Return a base's name without the way to its folder on this machine, if it is one."""
    kind, colon, rest = name.partition(":")
    if kind == "gpt2-compact" and not SHAPE.fullmatch(rest) and Path(rest).is_dir():
        return f"{kind}{colon}{Path(rest).resolve().name}" if rest else name
    is_folder = Path(name).is_dir() and name not in ("linear", "fracast", "gpt2-random")
    return Path(name).resolve().name if is_folder else name


def _gpt2(source: str) -> GPT2Model:
    """Return blocks: random ones of a shape such as "2x64" (default: 6x768), or of a folder."""
    from edge_lora.timeseries.gpt2 import checkpoint_blocks, random_blocks

    shape = SHAPE.fullmatch(source)
    if source and shape is None:
        return checkpoint_blocks(Path(source))
    layers, width = (int(shape["layers"]), int(shape["width"])) if shape else (LAYERS, WIDTH)
    return random_blocks(layers, width)


def _one_for_all(gpt2: GPT2Model, window: int, horizon: int, name: str, affine: bool) -> Forecaster:
    from edge_lora.timeseries.one_for_all import OneForAll

    return OneForAll(gpt2, window, horizon, name, affine)


def _gpt2_compact(source: str, window: int, horizon: int, affine: bool) -> Forecaster:
    from edge_lora.timeseries.compact import Compact, count_patches
    from edge_lora.timeseries.gpt2 import keep_positions

    gpt2 = _gpt2(source)
    keep_positions(gpt2, count_patches(window))
    name = f"gpt2-compact:{Path(source).name}" if source else "gpt2-compact"
    return Compact(gpt2, gpt2.config.n_embd, window, horizon, name, affine)


def _smollm2(layers: int, window: int, horizon: int, affine: bool) -> Forecaster:
    from edge_lora.timeseries.compact import Compact
    from edge_lora.timeseries.smollm2 import first_layers

    encoder = first_layers(layers)
    width = encoder.config.hidden_size
    return Compact(encoder, width, window, horizon, f"smollm2:{layers}", affine)


def _fracast(window: int, horizon: int, affine: bool) -> Forecaster:
    from edge_lora.timeseries.fracast import Fracast

    if affine:
        raise UnsupportedError("fracast scales windows in its own way; it has no affine option")
    return Fracast(window, horizon)
