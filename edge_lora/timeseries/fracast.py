"""Fracast-0, a forecasting model of 85,001 parameters, as a frozen base.

It looks at up to 2,048 rows, scaled by the least and largest of the window, and gives nine
quantiles of the next 48; longer forecasts go on from the median. Shorter windows are marked as
missing at their start. Weights: the package ``fracast`` (Apache-2.0).

An adapter changes its linear layers, but not the one that reads nothing but the dilation: an engine
computes that once, when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edge_lora.errors import EngineUnavailableError, UnsupportedError
from edge_lora.timeseries.forecaster import Forecaster

CONTEXT, LEAST = 2048, 8
MEDIAN = 4  # of the nine quantiles
LEAST_SPAN = 1e-5


class Fracast(Forecaster):
    """The model with its scaling; untrained adapters leave its own forecasts."""

    slots = ("core.in_proj", "core.periodic.proj", "core.block.*", "head.*")
    lr: ClassVar[float] = 1e-3
    batch_size: ClassVar[int] = 16
    settings: ClassVar[Mapping[str, Any]] = {"rank": 4, "alpha": 4.0}

    def __init__(self, window: int, horizon: int) -> None:
        """Load the fp32 weights.

        Raises:
            EngineUnavailableError: If the package is not installed.
            UnsupportedError: If the window is too short for it.
        """
        super().__init__("fracast", window, horizon)
        if window < LEAST:
            raise UnsupportedError(f"fracast needs a window of at least {LEAST} rows, not {window}")
        self.core, self.head = _load()

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (batch, window, channels) as (batch, horizon, channels): the median."""
        batch, channels = x.shape[0], x.shape[2]
        series = x.transpose(1, 2).flatten(0, 1)
        end = series.shape[1] + self.horizon
        while series.shape[1] < end:
            series = torch.cat([series, self._next(series[:, -CONTEXT:])], 1)
        y = series[:, self.window : end]
        return y.reshape(batch, channels, self.horizon).transpose(1, 2)

    def _next(self, series: Tensor) -> Tensor:
        """Return the medians of the next rows of (n, rows), rows at most the context."""
        low = series.amin(1, keepdim=True)
        span = (series.amax(1, keepdim=True) - low).clamp(min=LEAST_SPAN)
        missing = (CONTEXT - series.shape[1], 0)
        values = nn.functional.pad((series - low) / span, missing)
        seen = nn.functional.pad(torch.ones_like(series), missing)
        is_seen = seen > 0
        hidden = self.core(values[:, None], is_seen[:, None], seen[:, None])
        quantiles = self.head.forward_horizon(  # type: ignore[operator]
            hidden, last_obs=values[:, -1:], ctx=values, ctx_mask=is_seen
        )
        medians: Tensor = quantiles[:, :, MEDIAN] * span + low
        return medians


def _load() -> tuple[nn.Module, nn.Module]:
    try:
        import fracast.inference as package
    except ImportError as error:
        raise EngineUnavailableError(
            "the base 'fracast' needs its package. "
            "Install it with: pip install 'edge-lora[forecast]'"
        ) from error
    core, head = package.load_fracast(Path(package.__file__).parent / "weights", weights="fp32")
    return core, head
