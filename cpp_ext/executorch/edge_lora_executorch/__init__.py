"""ExecuTorch programs whose packed weights edge_lora can patch in place.

Used by ``edge_lora.runtime.open_bundle(bundle, engine="executorch")``; needs no torch.
``_native.pyi`` documents what is here.
"""

from edge_lora_executorch._native import Program, version

__all__ = ["Program", "version"]
