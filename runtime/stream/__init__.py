"""Forecasts as values arrive: thousands of series, an adapter each, under a memory budget."""

from edge_lora.runtime.stream.forecasts import Forecast, Forecasts
from edge_lora.runtime.stream.residents import Residents

__all__ = ["Forecast", "Forecasts", "Residents"]
