"""Low-rank branches of embeddings and convolutions: what is lowered is what was computed."""

import numpy as np
import pytest
import torch
from torch import nn

from edge_lora import reference
from edge_lora.errors import UnsupportedError
from edge_lora.methods import attach, find_weights

METHODS = ["lora", "rslora", "bilora", "dora"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Embedding(11, 6, padding_idx=2), torch.arange(11)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 4, (1, 3), padding="same", groups=4), torch.randn(2, 4, 9, 9)),
        (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", bias=False), torch.randn(2, 4, 9)),
    ],
    ids=["embedding", "grouped", "depthwise", "circular"],
)
def test_lower_is_what_the_module_computes(method, module, x):
    torch.manual_seed(0)
    model = nn.Sequential(module)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(x).detach()
    attached = attach(model, method, ["*"], rank=2)
    if method != "bilora":
        assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        trained = model(x)
        (delta,) = attached.lower(dtype="F32").deltas.values()
        attached.detach()
        assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
        weight = find_weights(model)["0.weight"].tensor
        new = reference.apply(weight.numpy(), [(form, 1.0) for form in delta.forms])
        weight.copy_(torch.from_numpy(new))
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
        weight.copy_(base["0.weight"])
    assert (trained - before).abs().max() > 0.05


@pytest.mark.parametrize("method", ["lora", "bilora"])
def test_a_tied_head_follows_the_embedding(method, tiny_gpt2, token_batches):
    """Both modules read one weight, so both get the branch."""
    attached = attach(tiny_gpt2, method, ["*.wte"], rank=3)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        trained = tiny_gpt2(**token_batches[0]).logits
        (delta,) = attached.lower(dtype="F32").deltas.values()
        attached.detach()
        weight = tiny_gpt2.get_input_embeddings().weight
        assert weight is tiny_gpt2.lm_head.weight
        before = tiny_gpt2(**token_batches[0]).logits
        weight.add_(torch.from_numpy(reference.delta_of(delta.forms[0], weight.numpy())))
        logits = tiny_gpt2(**token_batches[0]).logits
    assert (trained - before).abs().max() > 0.05
    torch.testing.assert_close(logits, trained, rtol=1e-4, atol=2e-5)


def test_the_padding_row_of_an_embedding_is_not_trained():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=1))
    attached = attach(model, "lora", ["*"])
    model(torch.arange(5)).sum().backward()
    (branch,) = attached.trained.each()
    assert not branch.b.grad[1].any()
    assert branch.b.grad[0].any()


def test_an_embedding_that_renormalises_its_rows_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(UnsupportedError, match=r"0\.weight: an embedding with max_norm"):
        attach(model, "lora", ["*"])


def test_columns_of_an_embedding_have_the_magnitude():
    model = nn.Sequential(nn.Embedding(11, 6))
    delta = attach(model, "dora", ["*"]).lower().deltas["0.weight"]
    assert [form.axis for form in delta.forms[1:]] == ["col"]
    assert np.array_equal(delta.forms[1].values, np.zeros(6))
