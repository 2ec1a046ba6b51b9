"""``ModelBase``: every parameter that an importer may ask for, as its slot has it."""

import numpy as np
import pytest

from edge_lora.methods.model_base import ModelBase

torch = pytest.importorskip("torch")


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.norm = torch.nn.LayerNorm(2)
        self.same = self.norm
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))


def test_a_parameter_without_axes_is_no_slot():
    base = ModelBase(Scaled())
    assert [(slot.name, slot.kind) for slot in base.slots.values()] == [
        ("layer.weight", "linear"),
        ("layer.bias", "other"),
        ("norm.weight", "other"),
        ("norm.bias", "other"),
    ]
    assert base.slots["same.bias"].name == "norm.bias"
    assert "logit_scale" in base.names
    assert base.weight("logit_scale") == np.float32(2.5)


def test_it_knows_which_layers_store_the_transpose(tiny_gpt2):
    base = ModelBase(tiny_gpt2)
    square = "transformer.h.0.attn.c_proj.weight"
    assert base.stores_transposed(square)
    assert (
        base.weight(square).T.tobytes()
        == tiny_gpt2.get_parameter(square).detach().numpy().tobytes()
    )
    for name in ("transformer.wpe.weight", "lm_head.weight", "transformer.ln_f.weight"):
        assert not base.stores_transposed(name)
