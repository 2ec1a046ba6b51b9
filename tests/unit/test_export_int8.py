"""Torch rounds to 8 bits as XNNPACK does: the weight by its rows, the activations by theirs."""

import pytest
import torch

from edge_lora.export.int8_linear import in_8_bits

pytestmark = pytest.mark.torch


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(32, 16).eval()


def test_a_loud_row_does_not_coarsen_the_others(linear):
    x = torch.randn(1, 5, 32)
    loud = x.clone()
    loud[0, 0] *= 1000
    with torch.no_grad(), in_8_bits({"": linear}):
        assert torch.equal(linear(loud)[0, 1:], linear(x)[0, 1:])


def test_rounding_costs_a_little_and_ends_with_the_block(linear):
    x = torch.randn(7, 32)
    with torch.no_grad():
        expected = linear(x)
        with in_8_bits({"": linear}):
            error = (linear(x) - expected).abs().max() / expected.abs().max()
        assert 0 < error < 0.02
        assert torch.equal(linear(x), expected)
