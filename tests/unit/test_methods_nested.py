"""DyLoRA and MatryoshkaLoRA: every prefix is an adapter, and what a training forward is."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from edge_lora import Adapter, reference
from edge_lora.errors import UnsupportedError
from edge_lora.methods import attach, find_weights
from edge_lora.methods.dylora import rank_of_step
from edge_lora.methods.matryoshka import row_weights
from edge_lora.methods.nested import all_ranks

METHODS = ["dylora", "matryoshka"]


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 7))


def filled(model, method, **config):
    """Attach and give both factors values."""
    attached = attach(model, method, **config)
    (branch,) = attached.trained.each()
    with torch.no_grad():
        branch.b.normal_()
    return attached, branch


def prefix_output(model, branch, x, rank, scale):
    """The LoRA of the truncated factors, written out."""
    return (
        x @ model[0].weight.T
        + model[0].bias
        + scale * (x @ branch.a[:rank].T @ branch.b[:, :rank].T)
    )


@pytest.mark.parametrize("method", METHODS)
def test_each_rank_is_the_lora_of_the_truncated_factors(method, tmp_path):
    model = linear().eval()
    attached, branch = filled(model, method, rank=8, ranks=(1, 3, 8), alpha=6.0)
    scales = dict(
        zip((1, 3, 8), (6.0, 2.0, 0.75) if method == "dylora" else (6.0,) * 3, strict=True)
    )
    x = torch.randn(5, 10)
    adapter = Adapter.load(attached.lower(dtype="F32").save(tmp_path / "nested.safetensors"))
    (form,) = adapter.deltas["0.weight"].forms
    assert form.ranks == (1, 3, 8)
    assert form.rank_scale == tuple(scales.values())
    for rank, scale in scales.items():
        attached.trained.use_rank(rank)
        y = model(x).detach()
        torch.testing.assert_close(y, prefix_output(model, branch, x, rank, scale).detach())
        weight = find_weights(model)["0.weight"].tensor.numpy()
        cut = reference.apply(weight, [(form.at_rank(rank), 1.0)])
        np.testing.assert_allclose(x.numpy() @ cut.T + model[0].bias.detach().numpy(), y, rtol=1e-5)
    with pytest.raises(
        UnsupportedError, match="rank 2 is not among the ranks in training: 1, 3, 8"
    ):
        attached.trained.use_rank(2)


def test_dylora_trains_at_the_drawn_rank():
    model = linear().train()
    attached, branch = filled(model, "dylora", rank=4, ranks=[1, 2, 3, 4], alpha=5.0, seed=3)
    x = torch.randn(5, 10)
    for step in range(6):
        attached.before_step(step)
        rank = rank_of_step((1, 2, 3, 4), 3, step)
        torch.testing.assert_close(model(x), prefix_output(model, branch, x, rank, 5.0 / rank))


@pytest.mark.parametrize("ranks", [(1, 2, 3, 4), (2, 4)])
def test_frozen_dylora_has_no_gradient_outside_the_drawn_rank(ranks):
    model = linear().train()
    attached, branch = filled(model, "dylora", rank=4, ranks=ranks, frozen=True)
    seen = set()
    for step in range(12):
        attached.before_step(step)
        model(torch.randn(5, 10)).square().sum().backward()
        rank = branch.drawn
        first = max((k for k in ranks if k < rank), default=0)
        learns = torch.zeros(4, dtype=torch.bool)
        learns[first:rank] = True
        assert torch.equal(branch.a.grad.abs().sum(1) > 0, learns)
        assert torch.equal(branch.b.grad.abs().sum(0) > 0, learns)
        branch.a.grad = branch.b.grad = None
        seen.add(rank)
    assert seen == set(ranks)


def test_drawn_ranks_are_uniform_and_follow_from_seed_and_step():
    ranks = (1, 2, 4, 8)
    draws = [rank_of_step(ranks, 0, step) for step in range(4000)]
    assert draws == [rank_of_step(ranks, 0, step) for step in range(4000)]
    assert draws[:50] != [rank_of_step(ranks, 1, step) for step in range(50)]
    assert all(count == pytest.approx(1000, abs=120) for count in Counter(draws).values())
    attached = attach(linear(), "dylora", rank=8, seed=0)
    (branch,) = attached.trained.each()
    for step in (7, 3, 7):  # in any order: a resumed run starts anywhere
        attached.before_step(step)
        assert branch.drawn == draws[step]


def test_row_weights_of_the_example():
    found = row_weights((1, 2, 4, 8, 16), (1.0,) * 5).tolist()
    assert found == [5, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("scaling", "divide"), [("one", lambda k: 1), ("rank", lambda k: k), ("sqrt_rank", np.sqrt)]
)
def test_matryoshka_trains_the_sum_over_all_ranks(scaling, divide):
    model = linear().train()
    _, branch = filled(model, "matryoshka", rank=6, alpha=3.0, scaling=scaling)
    x = torch.randn(5, 10)
    base = x @ model[0].weight.T + model[0].bias
    wanted = base.clone()
    for rank in (1, 2, 4, 6):
        wanted += prefix_output(model, branch, x, rank, 3.0 / divide(rank)) - base
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_validation_sees_what_is_deployed(method, tiny_llama, token_batches):
    """In training mode the model computes something else than any device; in eval mode the same."""
    attached = attach(tiny_llama, method, rank=4, slots=["*.q_proj"])
    with torch.no_grad():
        for branch in attached.trained.each():
            branch.b.normal_(std=0.1)
    attached.before_step(next(s for s in range(99) if rank_of_step((1, 2, 4), 0, s) == 1))
    deployed = tiny_llama.eval()(**token_batches[0]).logits
    assert not torch.allclose(tiny_llama.train()(**token_batches[0]).logits, deployed, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "ranks", [(), (2, 1, 4), (1, 2), (0, 4), (1, 1, 4), (1.0, 4), (2, 4, 8), 4, "1,4"]
)
def test_impossible_ranks(method, ranks):
    with pytest.raises(UnsupportedError, match="must ascend from at least 1 to 4, the rank"):
        attach(linear(), method, rank=4, ranks=ranks)


def test_default_ranks():
    assert [all_ranks(n, None) for n in (1, 2, 5, 8)] == [(1,), (1, 2), (1, 2, 4, 5), (1, 2, 4, 8)]


class Heads(nn.ModuleList):
    """Four linear classifiers of one input: their mean is less a matter of luck than one."""

    def forward(self, x):
        return torch.stack([head(x) for head in self])


def accuracy_of_ranks(method, **config):
    """Train linear classifiers from zero at rank 8; return their accuracy cut to 1, 2, 4, 8."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(4, 10, 8, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(4, 16, 8, generator=generator))
    truth = u @ torch.diag(0.7 ** torch.arange(8)) @ v.mT  # (heads, 10, 16)
    model = Heads(nn.Linear(16, 10, bias=False) for _ in range(4)).train()
    for head in model:
        nn.init.zeros_(head.weight)
    attached = attach(model, method, rank=8, **config)
    optimizer = torch.optim.Adam(list(attached.parameters()), lr=1e-2)
    for step in range(250):
        attached.before_step(step)
        x = torch.randn(64, 16, generator=generator)
        labels = (x @ truth.mT).argmax(2)
        nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten()).mul(4).backward()
        optimizer.step()
        optimizer.zero_grad()
    forms = [delta.forms[0] for delta in attached.lower(dtype="F32").deltas.values()]
    x = torch.randn(1000, 16, generator=generator).numpy()
    labels = (x @ truth.mT.numpy()).argmax(2)
    return [
        np.mean([
            ((x @ form.a[:k].T @ form.bt[:k]).argmax(1) == wanted).mean()
            for form, wanted in zip(forms, labels, strict=True)
        ])
        for k in (1, 2, 4, 8)
    ]  # fmt: skip


def test_small_ranks_of_nested_methods_are_better_than_a_cut_lora():
    """A toy: plain LoRA spreads what it learns over all rows, nested methods put it first."""
    alphas = {"lora": 8.0, "dylora": 8.0, "matryoshka": 1.0}
    found = {method: accuracy_of_ranks(method, alpha=alpha) for method, alpha in alphas.items()}
    plain, drawn, summed = (np.array(found[method]) for method in alphas)
    assert (drawn[:3] > 1.1 * plain[:3]).all(), found
    assert drawn[0] > 1.2 * plain[0], found
    assert (summed[1:3] > 1.05 * plain[1:3]).all(), found  # at rank 1 no better than LoRA, here
