"""Bi-AdaptFormer: sites with another source, the head, refusals; the rest is in test_methods."""

import numpy as np
import pytest
import torch
from torch import nn

from edge_lora import Adapter
from edge_lora.codebook import Coded
from edge_lora.errors import ShapeError, UnknownNameError, UnsupportedError
from edge_lora.forms import Dense, to_fp32
from edge_lora.methods import attach

PAIRS = ["*.norm2->*.mlp"]


class Block(nn.Module):
    """Half a transformer block, with the norm before the MLP."""

    def __init__(self, width):
        super().__init__()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    def __init__(self, width=12, classes=5):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier()


def train(attached, x, steps=5):
    optimizer = torch.optim.AdamW(list(attached.parameters()), lr=1e-2)
    labels = torch.arange(len(x)) % 5
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(attached.model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_numpy(model, adapter, x):
    """Run the classifier with an adapter of relu bottlenecks that read x before the norm."""
    for i, block in enumerate(model.blocks):
        (form,) = adapter.deltas[f"blocks.{i}.norm2->blocks.{i}.mlp"].forms
        branch = np.maximum(x.numpy() @ to_fp32(form.down).T, 0) @ to_fp32(form.up).T
        x = block(x) + torch.from_numpy(branch * np.float32(form.scale))
    (head,) = adapter.deltas["classifier.weight"].forms
    return x.mean(1).numpy() @ to_fp32(head.values).T + model.classifier.bias.numpy()


@pytest.mark.parametrize("bits", [1, 4, None])
def test_branch_before_the_norm_and_head_lower_to_what_the_model_computes(model, bits, tmp_path):
    x = torch.randn(10, 3, 12)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    attached = attach(
        model, "biadaptformer", slots=PAIRS, rank=6, bits=bits, scale=3.0, head="classifier"
    )
    losses = train(attached, x)
    assert losses[-1] < losses[0]
    adapter = attached.lower(dtype="F32")
    with torch.no_grad():
        trained = model(x).numpy()
        attached.detach()
        assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
        read = Adapter.load(adapter.save(tmp_path / "vit.safetensors"))
        attached.slots.check(read)
        np.testing.assert_allclose(in_numpy(model, read, x), trained, rtol=1e-4, atol=1e-5)
    (head,) = read.deltas["classifier.weight"].forms
    assert isinstance(head, Dense)
    assert head.mode == "set"
    assert isinstance(head.values, Coded) == (bits is not None)
    assert {d.slot_hash for n, d in read.deltas.items() if "->" in n} == {""}


def test_sites_do_not_count_in_the_fingerprint(model):
    plain = attach(model, "lora")
    fingerprint = plain.slots.fingerprint
    plain.detach()
    attached = attach(model, "biadaptformer")
    assert attached.slots.fingerprint == fingerprint
    assert attached.slots["blocks.0.mlp"].kind == "site"


def test_without_codes_the_model_starts_as_the_base(model):
    x = torch.randn(2, 3, 12)
    wanted = model(x)
    attached = attach(model, "biadaptformer", bits=None, head="classifier")
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)
    attached.detach()
    attach(model, "biadaptformer", bits=1)
    assert not torch.equal(model(x), wanted)


def test_dropout_is_for_training_alone(model):
    attach(model, "biadaptformer", dropout=0.5, scale=100.0)
    x = torch.randn(2, 3, 12)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_a_model_without_sites_is_refused():
    with pytest.raises(UnknownNameError, match=r"no slot by default in Sequential.*named mlp"):
        attach(nn.Sequential(nn.Linear(3, 3)), "biadaptformer")


def test_sequential_refuses_another_source(model):
    with pytest.raises(UnsupportedError, match="output of its own module"):
        attach(model, "biadaptformer", slots=PAIRS, placement="sequential")


def test_a_source_that_runs_later_is_refused(model):
    attached = attach(model, "biadaptformer", slots=["*.mlp->*.norm2"])
    with pytest.raises(UnsupportedError, match="did not run before it"):
        model(torch.randn(2, 3, 12))
    attached.detach()
    model(torch.randn(2, 3, 12))


def test_a_width_that_was_misread_is_refused(model):
    model.blocks[0].mlp.forward = lambda x: x[..., :5]
    attach(model, "biadaptformer")
    with pytest.raises(ShapeError, match=r"'blocks\.0\.mlp'.*\(5, 12\)"):
        model(torch.randn(2, 3, 12))


def test_a_head_is_one_slot(model):
    with pytest.raises(UnsupportedError, match=r"matches 4 linear slots.*blocks\.0\.mlp\.0"):
        attach(model, "biadaptformer", head="*.mlp.*")
    assert all(p.requires_grad for p in model.parameters())
