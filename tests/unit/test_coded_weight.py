"""Weights seen through codes: gradient against autograd, codes against the NumPy decoder."""

import numpy as np
import pytest
import torch

from edge_lora import codebook
from edge_lora.methods.coded_weight import coded, seen_through_codes

SHAPES = [((7, 33), "tensor"), ((7, 33), "row"), ((7, 33), 50), ((5, 8), 4), ((1, 9), 8)]


def written_out(weight, bits, size):
    """Return the definition with ``detach`` as the stop of the gradient, group by group."""
    levels = torch.from_numpy(codebook.levels_of("gauss_l1", bits)).to(weight)
    parts = []
    for part in weight.flatten().split(size):
        mean = part.mean()
        std = part.std() if part.numel() > 1 else torch.zeros_like(mean)
        normal = (part - mean) / (std + 1e-5)
        nearest = levels[(normal.detach()[:, None] - levels).abs().argmin(1)]
        parts.append(((nearest - normal).detach() + normal) * std + mean)
    return torch.cat(parts).view(weight.shape)


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize(("shape", "group"), SHAPES)
@pytest.mark.parametrize("spread", [1.0, 2e-5])
def test_gradient_is_that_of_the_definition(shape, group, bits, spread):
    """A spread near the floor of 1e-5 shows that the floor is differentiated too."""
    torch.manual_seed(0)
    weight = (torch.randn(shape, dtype=torch.float64) * spread + 0.3 * spread).requires_grad_()
    gradient = torch.randn(shape, dtype=torch.float64)
    size = codebook.group_size(group, shape)
    ours = seen_through_codes(weight, bits, group)
    theirs = written_out(weight, bits, size)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    (d_ours,) = torch.autograd.grad(ours, weight, gradient)
    (d_theirs,) = torch.autograd.grad(theirs, weight, gradient)
    torch.testing.assert_close(d_ours, d_theirs, rtol=1e-10, atol=1e-10)
    assert (d_ours - gradient).abs().max() > 1e-5  # the statistics do count


def test_gradient_is_nearly_the_short_formula():
    torch.manual_seed(1)
    weight = torch.randn(40, 25, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(40, 25, dtype=torch.float64)
    value = seen_through_codes(weight, 1)
    (ours,) = torch.autograd.grad(value, weight, gradient)
    normal = ((weight - weight.mean()) / weight.std()).detach()
    chosen = ((value - weight.mean()) / weight.std()).detach()
    wanted = gradient + (gradient * (chosen - normal)).sum() * normal / (normal.numel() - 1)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_forward_is_what_the_codes_decode_to_bit_for_bit(shape, group, bits):
    torch.manual_seed(2)
    weight = torch.randn(shape) * 1e-3
    codes = coded(weight, bits, group)
    assert codebook.problems_of(codes, "weight") == []
    assert np.array_equal(codes.decode(), seen_through_codes(weight, bits, group).numpy())


@pytest.mark.parametrize("bits", codebook.BITS)
def test_codes_are_those_of_the_numpy_encoder(bits):
    torch.manual_seed(3)
    weight = torch.randn(64, 40)
    ours, theirs = coded(weight, bits, "row"), codebook.encode(weight.numpy(), bits, "row")
    np.testing.assert_allclose(ours.stats, theirs.stats, rtol=2e-6, atol=1e-7)
    unpacked = [codebook.unpack(c.codes, bits, c.size).astype(int) for c in (ours, theirs)]
    differ = np.abs(unpacked[0] - unpacked[1])  # a value on a threshold may round either way
    assert differ.max() <= 1
    assert differ.mean() < 1e-3


def test_decoded_values_are_not_a_fixed_point():
    """Why nobody may code an adapter again: each time the spread shrinks by the 1-bit level."""
    torch.manual_seed(4)
    once = seen_through_codes(torch.randn(100, 100), 1)
    twice = seen_through_codes(once, 1)
    assert twice.std().item() == pytest.approx(0.6745 * once.std().item(), rel=1e-3)


def test_equal_values_decode_to_themselves_and_give_a_finite_gradient():
    weight = torch.full((4, 4), 0.5, requires_grad=True)
    value = seen_through_codes(weight, 2)
    assert torch.equal(value, weight)
    value.square().sum().backward()
    assert torch.isfinite(weight.grad).all()
