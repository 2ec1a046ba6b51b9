"""``to_peft`` against PEFT itself: what is written loads there and gives the same outputs."""

import copy

import numpy as np
import pytest
import torch

from edge_lora import (
    Adapter,
    BaseIdentity,
    Delta,
    Dense,
    LowRank,
    RowScale,
    Sparse,
    from_peft,
    reference,
    to_peft,
)
from edge_lora.codebook import encode
from edge_lora.errors import UnsupportedError
from edge_lora.methods.model_base import ModelBase

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def made(model, forms, alpha=1.0):
    """Return an adapter of ``forms``: slot -> function of its shape."""
    slots = ModelBase(model).slots
    deltas = {
        name: Delta(slots[name].shape, slots[name].dtype, make(slots[name].shape))
        for name, make in forms.items()
    }
    return Adapter("made", "test", BaseIdentity("", "somebody/base"), deltas, alpha)


def low_rank(rank, scale, seed=0, values=lambda x: x, **nested):
    def make(shape):
        rng = np.random.default_rng(seed)
        a = rng.standard_normal((rank, int(np.prod(shape[1:])))).astype(np.float32)
        bt = rng.standard_normal((rank, shape[0])).astype(np.float32)
        return (LowRank(values(a), values(bt), scale, **nested),)

    return make


def sparse(count, scale=1.0, seed=0, mode="add"):
    def make(shape):
        rng = np.random.default_rng(seed)
        index = np.sort(rng.choice(int(np.prod(shape)), count, replace=False)).astype(np.uint32)
        return (Sparse(index, rng.standard_normal(count).astype(np.float32), scale, mode),)

    return make


def check(model, adapter, folder, inputs):
    """Load the folder in PEFT: merged weights and unmerged outputs are the reference's."""
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    base = ModelBase(model)
    wanted = copy.deepcopy(model)
    for name, delta in adapter.deltas.items():
        terms = [(form, adapter.alpha) for form in delta.forms]
        weight = torch.from_numpy(reference.apply(base.weight(name), terms))
        target = wanted.get_parameter(name)
        target.data = weight if target.shape == weight.shape else weight.T
        if target.shape[0] == target.shape[-1] and target.ndim == 2 and is_conv1d(wanted, name):
            target.data = weight.T
    with torch.no_grad():
        ours, theirs, before = wanted(inputs), loaded(inputs), model(inputs)
    ours, theirs, before = (getattr(o, "logits", o) for o in (ours, theirs, before))
    assert (ours - before).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    again = from_peft(folder, base=base)
    for name, delta in adapter.deltas.items():
        zero = np.zeros(delta.shape, np.float32)
        want = sum(reference.delta_of(form, zero, adapter.alpha) for form in delta.forms)
        got = reference.delta_of(again.deltas[name].forms[0], zero)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return again


def is_conv1d(model, name):
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


IDS = torch.arange(24).reshape(2, 12) % 31


def test_lora_with_one_rank_for_all(tiny_llama, tmp_path):
    q, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    adapter = made(tiny_llama, {q: low_rank(4, 0.25), down: low_rank(4, 0.25, 1)}, alpha=0.5)
    check(tiny_llama, adapter, to_peft(adapter, tmp_path / "out"), IDS)
    config = (tmp_path / "out" / "adapter_config.json").read_text()
    assert '"rank_pattern": {}' in config
    assert "somebody/base" in config


def test_lora_whose_slots_differ_nested_and_coded(tiny_llama, tmp_path):
    name = "model.layers.{}.self_attn.q_proj.weight".format
    nested = {"ranks": (2, 6), "rank_scale": (0.5, 0.3)}
    adapter = made(
        tiny_llama,
        {
            name(0): low_rank(3, 1 / 7),
            name(1): low_rank(6, 0.3, 1, **nested),
            "model.layers.0.mlp.up_proj.weight": low_rank(3, 0.1, 2, lambda x: encode(x, 2)),
            "model.embed_tokens.weight": low_rank(2, 0.4, 3, lambda x: x.astype(np.float16)),
        },
    )
    check(tiny_llama, adapter, to_peft(adapter, tmp_path), IDS)


def test_lora_of_convolutions_and_embeddings(mixed, tmp_path):
    names = ["table", "conv1", "conv2", "wide", "head"]
    adapter = made(mixed, {f"{n}.weight": low_rank(2, 0.3, i) for i, n in enumerate(names)})
    check(mixed, adapter, to_peft(adapter, tmp_path, base=ModelBase(mixed)), IDS)


def test_lora_of_transposed_layers(tiny_gpt2, tmp_path):
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj", "transformer.wpe"]
    adapter = made(tiny_gpt2, {f"{n}.weight": low_rank(2, 0.3, i) for i, n in enumerate(names)})
    check(tiny_gpt2, adapter, to_peft(adapter, tmp_path), IDS)


def test_shira_is_filled_up_to_peft_s_size(tiny_llama, tmp_path):
    q, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    adapter = made(tiny_llama, {q: sparse(256, 2.0), down: sparse(300, 1.0, 1)}, alpha=3.0)
    again = check(tiny_llama, adapter, to_peft(adapter, tmp_path), IDS)
    assert again.method == "shira"
    assert again.deltas[q].forms[0].indices.size == 2 * (64 + 64)
    assert again.deltas[down].forms[0].indices.size == 2 * (64 + 160)


def test_a_shira_that_trains_in_peft_comes_back_as_it_was(tiny_llama, tmp_path):
    slot = "model.layers.0.self_attn.q_proj.weight"
    adapter = made(tiny_llama, {slot: sparse(128)})
    form = from_peft(to_peft(adapter, tmp_path), base=ModelBase(tiny_llama)).deltas[slot].forms[0]
    np.testing.assert_array_equal(form.indices, adapter.deltas[slot].forms[0].indices)
    np.testing.assert_array_equal(form.values, adapter.deltas[slot].forms[0].values)


def test_what_peft_cannot_hold_is_refused_slot_by_slot(tiny_llama, tmp_path):
    name = "model.layers.0.{}.weight".format
    ones = np.ones(64, np.float32)
    adapter = made(
        tiny_llama,
        {
            name("self_attn.q_proj"): low_rank(2, 1.0),
            name("self_attn.o_proj"): lambda s: (*low_rank(2, 1.0)(s), RowScale(ones)),
            name("input_layernorm"): lambda s: (Dense(np.ones(s, np.float32)),),
            name("self_attn.k_proj"): sparse(9),
        },
    )
    with pytest.raises(UnsupportedError) as error:
        to_peft(adapter, tmp_path / "out")
    message = str(error.value)
    assert "o_proj.weight: 2 forms (low_rank, row_scale)" in message
    assert "input_layernorm.weight: form 'dense'" in message
    assert "k_proj.weight: form 'sparse', others are 'low_rank'" in message
    assert "q_proj" not in message
    assert not (tmp_path / "out").exists()


def test_a_shira_that_replaces_or_is_too_dense_is_refused(tiny_llama, tmp_path):
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    with pytest.raises(UnsupportedError, match="replaces entries"):
        to_peft(made(tiny_llama, {q: sparse(9, mode="set")}), tmp_path)
    with pytest.raises(UnsupportedError, match=r"(?s)rank 32 for all.*k_proj.*at most rank 21"):
        to_peft(made(tiny_llama, {q: sparse(4090), k: sparse(9)}), tmp_path)
