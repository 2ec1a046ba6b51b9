"""DoRA: the factored norm, its memory, and slots that are not linear."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edge_lora.errors import UnsupportedError
from edge_lora.methods import attach
from edge_lora.methods.dora import norms, squared_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factored_norm_is_the_norm(dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, 70).to(dtype)
    weight[3] = 0
    a, b = torch.randn(4, 70), torch.randn(50, 4)
    b[3] = 0
    exact = weight.double() + 0.7 * b.double() @ a.double()
    wanted = torch.linalg.norm(exact, dim=1)
    wanted[3] = 1  # a row of zeros
    found = norms(weight, squared_norms(weight), a, b, 0.7)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_rows_that_cancel_are_not_negative_under_the_root():
    weight = torch.tensor([[1e4, 1e-4]])
    found = norms(
        weight, squared_norms(weight), torch.tensor([[1e4, 1e-4]]), -torch.ones(1, 1), 1.0
    )
    assert torch.isfinite(found).all()


class LargestTensor(TorchDispatchMode):
    """Records the most entries that one operation allocated; views of old tensors do not count."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.entries, self.op = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        for tensor in filter(torch.is_tensor, tensors):
            is_new = tensor.untyped_storage().data_ptr() not in self.known
            if is_new and tensor.numel() > self.entries:
                self.entries, self.op = tensor.numel(), func
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_array_of_the_size_of_the_weight_is_made(dtype, monkeypatch):
    monkeypatch.setattr("edge_lora.methods.dora._SCRATCH_ENTRIES", 10 * 300)
    model = nn.Sequential(nn.Linear(300, 200)).to(dtype)
    attached = attach(model, "dora", rank=4)
    with torch.no_grad():
        attached.trained.each()[0].b.normal_()
    x = torch.randn(8, 300, dtype=dtype, requires_grad=True)
    largest = LargestTensor(model)
    with largest:
        model(x).square().sum().backward()
        attached.lower()
    assert attached.trained.each()[0].magnitude.grad.abs().max() > 0
    assert 0 < largest.entries <= 10 * 300, largest.op  # of 60,000


def test_a_tied_embedding_is_refused(tiny_gpt2):
    with pytest.raises(UnsupportedError, match=r"output layer too[\s\S]*wte\.weight"):
        attach(tiny_gpt2, "dora", ["*.wte"])
