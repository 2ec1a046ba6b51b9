"""GPT-2 blocks as a frozen encoder: from a seed, or the first ones of a local checkpoint.

Random weights come from the raw bits of a counter and exact arithmetic, not from torch's generator,
whose normal values differ in the last bit between processors: the fingerprint of a base that is
described and not shipped must be the same everywhere.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_lora.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import GPT2Model

LAYERS = 6  # of a checkpoint
HEAD_WIDTH = 64  # as every GPT-2
SPREAD = 0.02  # of GPT-2's weights
SEED = 2021


def random_blocks(layers: int, width: int) -> GPT2Model:
    """Return GPT-2 with fixed random weights and no token table.

    Raises:
        UnsupportedError: If ``width`` does not divide into heads.
    """
    from transformers import GPT2Config, GPT2Model

    heads = max(1, width // HEAD_WIDTH)
    if width > HEAD_WIDTH and width % HEAD_WIDTH:
        raise UnsupportedError(
            f"width is {width}; above {HEAD_WIDTH} it must be a multiple of that"
        )
    with torch.device("meta"):
        model = GPT2Model(_config(GPT2Config(n_layer=layers, n_embd=width, n_head=heads)))
    model = model.to_empty(device="cpu")
    _drop_tokens(model)
    for name, parameter in sorted(model.named_parameters()):
        _fill(name, parameter, layers)
    return model.eval()


def checkpoint_blocks(folder: Path) -> GPT2Model:
    """Return the first blocks of a local GPT-2 checkpoint, without its token table.

    Raises:
        UnsupportedError: If the folder holds no GPT-2 in the Hugging Face layout.
    """
    from transformers import AutoConfig, GPT2Model

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"'{folder}' holds no model configuration: {error}") from error
    if config.model_type != "gpt2":
        raise UnsupportedError(f"'{folder}' holds a {config.model_type} model, not a GPT-2")
    model = GPT2Model.from_pretrained(
        folder, config=_config(config), dtype=torch.float32, local_files_only=True
    )
    model.h = model.h[:LAYERS]
    _drop_tokens(model)
    return model.eval()


def keep_positions(model: GPT2Model, count: int) -> None:
    """Cut the position table to its first ``count`` rows.

    Raises:
        UnsupportedError: If it has fewer.
    """
    table = model.wpe.weight.detach()
    if not 1 <= count <= len(table):
        raise UnsupportedError(f"the window makes {count} patches; 1 to {len(table)} fit")
    model.wpe = nn.Embedding(count, table.shape[1], _weight=table[:count].clone())


def _config(config: Any) -> Any:  # noqa: ANN401
    """Switch off what a frozen encoder has no use for."""
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    config.use_cache = False
    config._attn_implementation = "eager"
    return config


def _drop_tokens(model: GPT2Model) -> None:
    """Take the token table out: windows come in as vectors."""
    model.wte = nn.Identity()


def _fill(name: str, parameter: Tensor, layers: int) -> None:
    """Give a parameter GPT-2's initial value: norms 1, biases 0, weights random."""
    with torch.no_grad():
        if name.endswith(".bias"):
            parameter.zero_()
        elif ".ln_" in name or name.startswith("ln_"):
            parameter.fill_(1.0)
        else:
            is_residual = name.endswith("c_proj.weight")
            spread = SPREAD / math.sqrt(2 * layers) if is_residual else SPREAD
            fill_uniform(parameter, spread * math.sqrt(3), name)


def fill_uniform(parameter: Tensor, bound: float, name: str) -> None:
    """Fill with values in [-bound, bound) that depend on ``name`` alone, on every machine."""
    bits = np.random.PCG64([SEED, *name.encode()]).random_raw(parameter.numel())
    unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(unit * np.float32(bound)).view(parameter.shape))
