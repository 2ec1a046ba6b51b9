"""On a GPU: the loop moves model and adapter there, and the base still comes back to the bit."""

import pytest
import torch

from edge_lora.methods import attach, list_methods
from edge_lora.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("trainer", [*list_methods(), "masked"])
def test_train_on_cuda_and_restore(trainer, precision, tiny_llama, token_batches, tmp_path):
    method, config = ("shira", {"trainer": "masked"}) if trainer == "masked" else (trainer, {})
    before = {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    buffers = {k: v.clone() for k, v in tiny_llama.named_buffers()}

    def session(**options):
        attached = attach(tiny_llama, method, **config)
        report = train(
            attached, token_batches[:2], steps=8, lr=1e-2, mixed_precision=precision,
            checkpoint_dir=tmp_path, progress=False, **options,
        )  # fmt: skip
        assert {p.device.type for p in attached.parameters()} == {"cuda"}
        adapter = attached.lower("skill")
        logits = tiny_llama(input_ids=token_batches[0]["input_ids"].cuda()).logits
        attached.detach()
        return report, adapter, logits

    session(stop_after=4)
    report, adapter, logits = session()
    assert report.resumed_from == 4
    assert report.losses[-1] < report.losses[0]
    attached = attach(tiny_llama.cpu(), method, **config)  # names sites, if it stands at any
    attached.slots.check(adapter)
    attached.detach()
    assert logits.isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in tiny_llama.state_dict().items())
    assert all(torch.equal(v, buffers[k]) for k, v in tiny_llama.named_buffers())
