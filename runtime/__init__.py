"""The runtime: open a bundle, run it, switch adapters under it. Needs no torch and no onnx."""

from edge_lora.runtime.opening import open_bundle
from edge_lora.runtime.session import Session
from edge_lora.runtime.switching import SwapStats

__all__ = ["Session", "SwapStats", "open_bundle"]
