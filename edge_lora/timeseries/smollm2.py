"""The first layers of SmolLM2-135M as a frozen encoder of patches."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import nn

from edge_lora.bases import load_model
from edge_lora.errors import EngineUnavailableError, UnsupportedError

if TYPE_CHECKING:
    from transformers import LlamaModel


LAYERS = 30


def first_layers(count: int) -> LlamaModel:
    """Return the first ``count`` layers and the final norm, without the token table.

    Raises:
        EngineUnavailableError: If the package with the weights is not installed.
        UnsupportedError: If the model has fewer layers.
    """
    if not 1 <= count <= LAYERS:
        raise UnsupportedError(f"smollm2:{count}: the model has {LAYERS} layers, 1 to {LAYERS}")
    if find_spec("gguf") is None:
        raise EngineUnavailableError(
            "the base 'smollm2' is read with gguf. Install it with: pip install 'edge-lora[demo]'"
        )
    model: LlamaModel = load_model("smollm2").model.model
    model.layers = model.layers[:count]
    model.embed_tokens = nn.Identity()  # windows come in as vectors
    model.config.num_hidden_layers = count
    model.config.use_cache = False
    model.config._attn_implementation = "eager"
    return model.eval()
