"""Bi-LoRA: what is particular to factors of few bits."""

import numpy as np
import pytest
import torch

from edge_lora import Adapter
from edge_lora.codebook import Coded
from edge_lora.methods import attach


def test_lower_emits_the_codes_that_the_forward_multiplied(tiny_llama, token_batches, tmp_path):
    attached = attach(tiny_llama, "bilora", slots=["*.q_proj", "*.v_proj"], rank=4, bits=2)
    optimizer = torch.optim.AdamW(list(attached.parameters()), lr=1e-2)
    for batch in token_batches[:3]:
        tiny_llama(**batch).loss.backward()
        optimizer.step()
    adapter = attached.lower(dtype="F16")  # the dtype is of values that are not coded
    read = Adapter.load(adapter.save(tmp_path / "few_bits.safetensors"))
    assert len(read.deltas) == 4
    for branch in attached.trained.each():
        a, b, scale = branch.factors(training=False)
        (form,) = read.deltas[branch.name].forms
        assert isinstance(form.a, Coded)
        assert form.a.bits == form.bt.bits == 2
        assert form.scale == scale
        assert np.array_equal(form.a.decode(), a.detach().numpy())
        assert np.array_equal(form.bt.decode(), b.detach().t().numpy())


def test_a_file_of_one_bit_is_far_smaller(tiny_llama, tmp_path):
    """Arrays shrink 32 times; the header of a tiny model is what remains."""
    sizes = {}
    for method in ("lora", "bilora"):
        attached = attach(tiny_llama, method, rank=8)
        sizes[method] = attached.lower(dtype="F32").nbytes
        attached.detach()
    assert sizes["lora"] / sizes["bilora"] > 25


def test_b_starts_small_with_a_spread_and_never_beyond_twice_it(tiny_llama):
    attached = attach(tiny_llama, "bilora", rank=16)
    for branch in attached.trained.each():
        assert branch.b.abs().max() <= 2e-3
        assert branch.b.std().item() == pytest.approx(0.88e-3, rel=0.1)  # of a normal cut at 2


def test_a_diverged_spread_is_refused_by_name(tiny_llama):
    attached = attach(tiny_llama, "bilora", slots=["*.0.*.q_proj"])
    with torch.no_grad():
        next(attached.parameters())[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"not finite[\s\S]*q_proj"):
        attached.lower()
