"""PEFT as the oracle of DoRA and of slots that are not linear: same init, steps, merged weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from edge_lora import reference
from edge_lora.methods import attach, find_weights

peft = pytest.importorskip("peft")


class Small(nn.Module):
    """An embedding, a linear layer, two convolutions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12, padding_idx=0)
        self.linear = nn.Linear(12, 16)
        self.conv1 = nn.Conv1d(16, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.out = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.conv1(torch.tanh(self.linear(self.embed(ids))).transpose(1, 2))
        return self.out(torch.relu(self.conv2(x[:, None])).mean((2, 3)))


def steps(model, parameters, count=8):
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(list(parameters), lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(count):
        ids = torch.randint(20, (4, 14), generator=generator)
        loss = nn.functional.cross_entropy(model(ids), ids[:, 0] % 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def copy_factors(attached, theirs):
    """Start from PEFT's factors; an embedding's are the other way round."""
    for branch in attached.trained.each():
        name = branch.name.removesuffix(".weight")
        layer = theirs.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            if hasattr(layer, "lora_embedding_A") and "default" in layer.lora_embedding_A:
                branch.a.copy_(layer.lora_embedding_B["default"].t())
                assert not layer.lora_embedding_A["default"].any()
            else:
                branch.a.copy_(layer.lora_A["default"].weight.flatten(1))
            if hasattr(branch, "magnitude"):
                magnitude = layer.lora_magnitude_vector["default"].weight.flatten()
                torch.testing.assert_close(branch.magnitude, magnitude, rtol=1e-6, atol=0)
        assert branch.scale == layer.scaling["default"]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_every_kind_trains_as_in_peft_and_merges_to_its_weights(method):
    torch.manual_seed(0)
    model = Small()
    targets = ["embed", "linear", "conv1", "conv2"]
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, use_rslora=method == "rslora",
        use_dora=method == "dora",
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    attached = attach(model, method, slots=targets, rank=3, alpha=6.0)
    copy_factors(attached, theirs)
    their_losses = steps(theirs, (p for p in theirs.parameters() if p.requires_grad))
    our_losses = steps(model, attached.parameters())
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-5)
    adapter = attached.lower(dtype="F32")
    attached.detach()
    merged = theirs.merge_and_unload().state_dict()
    weights = find_weights(model)
    assert sorted(adapter.deltas) == sorted(f"{t}.weight" for t in targets)
    for name, delta in adapter.deltas.items():
        base = weights[name].tensor.numpy()
        ours = reference.apply(base, [(form, 1.0) for form in delta.forms])
        wanted = merged[name].numpy()
        assert np.abs(wanted - base).max() > 1e-2
        error = np.linalg.norm(ours - wanted) / np.linalg.norm(wanted - base)
        assert error <= 1e-5, (name, error)


def test_an_embedding_starts_from_the_distribution_that_peft_starts_from():
    attached = attach(Small(), "lora", slots=["embed"], rank=64)
    (branch,) = attached.trained.each()
    assert branch.a.std().item() == pytest.approx(1, rel=0.1)
    assert not branch.b.any()
