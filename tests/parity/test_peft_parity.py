"""PEFT as the oracle: same init, same data, same optimizer give the same losses and weights."""

import copy

import numpy as np
import pytest
import torch

from edge_lora import reference
from edge_lora.methods import attach

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
STEPS = 20
TARGETS = ["q_proj", "o_proj"]  # both 64 x 64 in the tiny Llama
SLOTS = [f"*.{t}" for t in TARGETS]


def train_steps(model, parameters, batches, steps=STEPS):
    optimizer = torch.optim.AdamW(list(parameters), lr=5e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def slots_of(attached, part):
    return {m.name if part == "branches" else m.weight[0].name: m
            for m in getattr(attached.trained, part).values()}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_lora_trains_as_in_peft(method, family, request, token_batches):
    model = request.getfixturevalue(family).train()
    targets = TARGETS if family == "tiny_llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=method == "rslora",
        fan_in_fan_out=family == "tiny_gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    attached = attach(model, method, slots=[f"*.{t}" for t in targets], rank=4, alpha=6.0)
    branches = slots_of(attached, "branches")
    layers = {
        name.removeprefix("base_model.model.") + ".weight": layer
        for name, layer in theirs.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert layers.keys() == branches.keys()
    assert len(branches) == 4
    with torch.no_grad():
        for name, layer in layers.items():
            branches[name].a.copy_(layer.lora_A["default"].weight)
            assert layer.scaling["default"] == branches[name].scale
    their_losses = train_steps(
        theirs, (p for p in theirs.parameters() if p.requires_grad), token_batches
    )
    our_losses = train_steps(model, attached.parameters(), token_batches)
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-6)
    adapter = attached.lower(dtype="F32")
    for name, layer in layers.items():
        wanted = layer.get_delta_weight("default").detach()
        wanted = wanted.T if family == "tiny_gpt2" else wanted
        assert wanted.abs().max() > 1e-3
        delta = adapter.deltas[name]
        ours = reference.delta_of(delta.forms[0], np.zeros(delta.shape, np.float32))
        np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-4, atol=1e-6)


def test_lora_starts_from_the_distribution_that_peft_starts_from(tiny_llama):
    attached = attach(tiny_llama, "lora", rank=8)
    for branch in slots_of(attached, "branches").values():
        bound = 1 / np.sqrt(branch.a.shape[1])  # Kaiming uniform with a = sqrt(5)
        assert branch.a.abs().max().item() <= bound
        assert branch.a.std().item() == pytest.approx(bound / np.sqrt(3), rel=0.15)
        assert not branch.b.any()


def shira_config(masks):
    """Return PEFT's SHiRA with the same entries: r * (64 + 64) of 4096."""
    config = peft.ShiraConfig(r=2, target_modules=TARGETS)

    def mask_fn(base_layer, r, **_):
        for slot in masks.values():
            weight = slot.weight[0].parameter
            if torch.equal(weight, base_layer.weight):
                mask = torch.zeros(weight.numel())
                mask[slot.positions.long()] = 1
                assert int(mask.sum()) == r * 128
                return mask.view(weight.shape)
        raise AssertionError("no such layer")

    config.mask_fn = mask_fn
    return config


@pytest.mark.parametrize("mask", ["rand", "wm", "line", "snip"])
def test_shira_trains_as_in_peft(mask, tiny_llama, token_batches):
    base = copy.deepcopy(tiny_llama)
    attached = attach(
        tiny_llama, "shira", slots=SLOTS, density=2 * 128 / 4096, mask=mask,
        calibration=token_batches[:2],
    )  # fmt: skip
    masks = slots_of(attached, "slots")
    theirs = peft.get_peft_model(base, shira_config(masks))
    layers = {
        name.removeprefix("base_model.model.") + ".weight": layer
        for name, layer in theirs.named_modules()
        if hasattr(layer, "shira_weight") and hasattr(layer, "base_layer")
    }
    assert layers.keys() == masks.keys()
    their_losses = train_steps(
        theirs, (p for p in theirs.parameters() if p.requires_grad), token_batches
    )
    our_losses = train_steps(tiny_llama, attached.parameters(), token_batches)
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-6)
    adapter = attached.lower(dtype="F32")
    for name, layer in layers.items():
        (form,) = adapter.deltas[name].forms
        rows, columns = layer.shira_indices["default"].numpy()
        assert np.array_equal(form.indices, rows * 64 + columns)
        wanted = layer.shira_weight["default"].detach().numpy()
        assert np.abs(wanted).max() > 1e-2
        np.testing.assert_allclose(form.values, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("mask", ["rand", "line", "struct"])
def test_both_trainers_agree_after_50_adam_steps(family, mask, request, token_batches):
    model = request.getfixturevalue(family)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    results = {}
    for trainer in ("values", "masked"):
        attached = attach(model, "shira", mask=mask, density=0.05, trainer=trainer)
        optimizer = torch.optim.Adam(list(attached.parameters()), lr=1e-4)
        for step in range(50):
            model(**token_batches[step % 8]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        attached.after_step(49)
        results[trainer] = {k: v.clone() for k, v in model.state_dict().items()}
        adapter = attached.lower(dtype="F32")
        attached.detach()
    for name, weight in base.items():
        values, masked = results["values"][name], results["masked"][name]
        assert (values - masked).abs().max() <= 1e-6, name
        if name in adapter.deltas:
            indices = adapter.deltas[name].forms[0].indices
            free = np.zeros(weight.numel(), bool)
            free[indices] = True
            free = free.reshape(adapter.deltas[name].shape)
            free = free.T if family == "tiny_gpt2" else free
            for trained in (values, masked):
                moved = (trained != weight).numpy()
                assert not moved[~free].any()
                assert moved[free].mean() > 0.9
        else:
            assert torch.equal(values, weight)
            assert torch.equal(masked, weight)
