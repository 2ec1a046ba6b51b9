"""The slots of torch models: names, shapes, hashes, aliases."""

import hashlib

import pytest
import torch
from torch import nn

from edge_lora.errors import UnsupportedError
from edge_lora.methods import attach, find_weights, slot_table
from edge_lora.methods.base_slots import default_slots, hash_weight


def test_linear_slot_has_the_bytes_of_its_weight(tiny_llama):
    table = slot_table(tiny_llama)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = tiny_llama.get_parameter(name).detach().numpy()
    assert table[name].shape == (64, 160)
    assert table[name].dtype == "F32"
    assert table[name].kind == "linear"
    assert table[name].sha256 == hashlib.sha256(weight.tobytes()).hexdigest()


def test_conv1d_slot_is_the_transpose(tiny_gpt2):
    table = slot_table(tiny_gpt2)
    name = "transformer.h.0.mlp.c_fc.weight"
    stored = tiny_gpt2.get_parameter(name).detach().numpy()
    assert stored.shape == (64, 256)
    assert table[name].shape == (256, 64)
    assert table[name].sha256 == hashlib.sha256(stored.T.copy().tobytes()).hexdigest()


def test_tied_weights_are_one_slot_with_an_alias(tiny_gpt2):
    table = slot_table(tiny_gpt2)
    slot = table["transformer.wte.weight"]
    assert slot.kind == "embedding"
    assert slot.aliases == ("lm_head.weight",)
    assert table["lm_head.weight"] is slot
    assert "lm_head.weight" not in list(table)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_half_precision_hashes_its_own_bytes(dtype, name):
    layer = nn.Linear(3, 5).to(dtype)
    slot = slot_table(layer)["weight"]
    raw = layer.weight.detach().view(torch.int16).numpy().tobytes()
    assert (slot.dtype, slot.sha256) == (name, hashlib.sha256(raw).hexdigest())


def test_convolution_is_a_slot():
    slot = slot_table(nn.Sequential(nn.Conv2d(3, 8, 3)))["0.weight"]
    assert (slot.kind, slot.shape) == ("conv", (8, 3, 3, 3))


def test_hash_in_chunks_equals_hash_at_once(monkeypatch):
    weight = torch.randn(37, 11)
    whole = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    monkeypatch.setattr("edge_lora.methods.base_slots._HASH_CHUNK_BYTES", 100)
    assert hash_weight(weight) == whole


def test_fingerprint_does_not_depend_on_what_is_adapted(tiny_llama):
    before = slot_table(tiny_llama).fingerprint
    first = attach(tiny_llama, "lora", slots=["*.q_proj"])
    assert first.slots.fingerprint == before
    first.detach()
    second = attach(tiny_llama, "shira", slots=["*.k_proj", "*.up_proj"])
    assert second.slots.fingerprint == before


def test_fingerprint_sees_one_changed_bit(tiny_llama):
    before = slot_table(tiny_llama).fingerprint
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert slot_table(tiny_llama).fingerprint != before


def test_default_slots_leave_the_head_out(tiny_llama, tiny_gpt2):
    for model, count in ((tiny_llama, 14), (tiny_gpt2, 8)):
        names = default_slots(model, find_weights(model))
        assert len(names) == count
        assert "lm_head.weight" not in names


def test_unsupported_dtype_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"1\.weight is torch\.float64"):
        find_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
