"""Properties of the sampled product and of masks, over shapes."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edge_lora import codebook
from edge_lora.methods import find_weights, sparse_values
from edge_lora.methods.coded_weight import coded, seen_through_codes
from edge_lora.methods.masks import LINE, MASKS, choose
from edge_lora.methods.sparse_values import SlotValues

sizes = st.integers(1, 40)


@given(sizes, sizes, sizes, st.integers(1, 300), st.integers(0, 2**31))
def test_sampled_product_is_the_dense_gradient_at_the_mask(tokens, n_out, n_in, scratch, seed):
    rng = np.random.default_rng(seed)
    nnz = rng.integers(1, n_out * n_in + 1)
    positions = np.sort(rng.choice(n_out * n_in, nnz, replace=False))
    dy, x = rng.standard_normal((tokens, n_out)), rng.standard_normal((tokens, n_in))
    wanted = (dy.T @ x).reshape(-1)[positions]
    slot = SlotValues(find_weights(nn.Linear(n_in, n_out))["weight"], torch.from_numpy(positions))
    before, sparse_values._SCRATCH_ENTRIES = sparse_values._SCRATCH_ENTRIES, scratch
    try:
        dv = slot.sampled_product(torch.from_numpy(dy), torch.from_numpy(x))
    finally:
        sparse_values._SCRATCH_ENTRIES = before
    assert dv.dtype == torch.float32
    np.testing.assert_allclose(dv.numpy(), wanted, rtol=1e-5, atol=1e-5)


@given(
    st.sampled_from(sorted(MASKS)), st.integers(1, 4), sizes, st.floats(0.001, 1.0),
    st.floats(0, 1), st.integers(0, 2**31),
)  # fmt: skip
def test_masks_are_ascending_and_as_many_as_asked(mask, groups, n_in, density, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * LINE, n_in, generator=generator)
    gradient = torch.randn(groups * LINE, n_in, generator=generator)
    positions = choose(mask, weight, density, seed, gradient, floor).numpy()
    assert (np.diff(positions) > 0).all()
    assert 0 <= positions[0] <= positions[-1] < weight.numel()
    count = max(1, round(density * weight.numel()))
    if mask.startswith("line"):
        assert len(positions) == LINE * max(1, round(count / LINE))
    elif mask != "struct":
        assert len(positions) == count
    assert np.array_equal(choose(mask, weight, density, seed, gradient, floor), positions)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from(codebook.BITS),
    st.one_of(st.sampled_from(["tensor", "row"]), st.integers(1, 40)),
    st.floats(-20, 20),
    st.integers(0, 2**31),
)
def test_a_forward_through_codes_is_what_they_decode_to(shape, bits, group, magnitude, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0**magnitude + rng.choice([0.0, 1.0])
    weight = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    codes = coded(weight, bits, group)
    forward = seen_through_codes(weight, bits, group)
    assert codebook.problems_of(codes, "weight") == []
    assert np.array_equal(codes.decode(), forward.detach().numpy())
    forward.square().sum().backward()
    assert torch.isfinite(weight.grad).all()
