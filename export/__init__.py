"""Export a torch model as a bundle: plain ONNX with named slots, checked against torch."""

from edge_lora.export.exporter import export_bundle

__all__ = ["export_bundle"]
