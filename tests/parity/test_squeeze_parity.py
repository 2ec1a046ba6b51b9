"""Our rank reduction against PEFT's ``add_weighted_adapter(combination_type="svd")``."""

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, LowRank
from edge_lora.squeeze import squeeze

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


def test_the_same_delta_as_peft():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False))
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, "one")
    wrapped.add_adapter("two", config)
    layer = wrapped.base_model.model[0]

    def factor(matrices, name):
        return matrices[name].weight.detach().numpy()

    forms = tuple(
        LowRank(factor(layer.lora_A, name), factor(layer.lora_B, name).T, scale)
        for name, scale in (("one", 0.5 * 0.7), ("two", 0.5 * 0.3))
    )
    wrapped.add_weighted_adapter(
        ["one", "two"], [0.7, 0.3], "sum", combination_type="svd", svd_rank=4
    )
    theirs = layer.get_delta_weight("sum").detach().numpy()
    delta = Delta((40, 24), "F32", forms)
    ours, _ = squeeze(Adapter("x", "lora", BaseIdentity("0" * 64), {"w": delta}), 4)
    (form,) = ours.deltas["w"].forms
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(form.bt.T @ form.a * form.scale, theirs, atol=1e-6)
