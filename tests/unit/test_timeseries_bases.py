"""The frozen bases: reproducible from their names, and One-for-All's figures against PEFT."""

import hashlib
from math import sqrt

import numpy as np
import pytest

from edge_lora import to_peft
from edge_lora.errors import UnknownNameError, UnsupportedError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

from edge_lora.methods import attach, slot_table  # noqa: E402
from edge_lora.timeseries.bases import make_base  # noqa: E402
from edge_lora.timeseries.gpt2 import fill_uniform  # noqa: E402

TINY = "gpt2-random:1x16"
FINGERPRINT = "bdf85af2d339c509e44acc9467949186203eeda521c41ccca0bf8045668281ca"


@pytest.fixture
def x():
    return torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0)) * 5 + 10


def test_the_linear_base_gives_the_mean_of_the_window(x):
    y = make_base("linear", 40, 6)(x)
    assert y.shape == (3, 6, 2)
    torch.testing.assert_close(y, x.mean(1, keepdim=True).expand(-1, 6, -1))


def test_an_adapted_linear_base_is_the_formula(x):
    base = make_base("linear", 40, 6)
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    base.head.weight.data.copy_(weight)
    got = base(x)
    for n in range(3):
        for c in range(2):
            series = x[n, :, c].double().numpy()
            spread = sqrt(series.var() + 1e-5)
            want = weight.double().numpy() @ ((series - series.mean()) / spread)
            want = want * spread + series.mean()
            np.testing.assert_allclose(got[n, :, c].detach(), want, rtol=1e-4, atol=1e-4)


def test_fingerprints_follow_from_the_description():
    zero = hashlib.sha256(np.zeros((6, 40), np.float32)).hexdigest()
    line = f"head.weight\0F32\0[6, 40]\0{zero}\n".encode()
    assert slot_table(make_base("linear", 40, 6)).fingerprint == hashlib.sha256(line).hexdigest()
    assert slot_table(make_base(TINY, 40, 6)).fingerprint == FINGERPRINT


def test_random_values_fill_their_range_and_depend_on_the_name():
    a, b = torch.empty(200, 50), torch.empty(200, 50)
    fill_uniform(a, 0.5, "a")
    fill_uniform(b, 0.5, "b")
    assert -0.5 <= a.min() < -0.49
    assert 0.49 < a.max() < 0.5
    assert abs(float(a.std()) - 0.5 / sqrt(3)) < 0.01
    assert not torch.equal(a, b)


def test_one_for_all_is_its_definition(x):
    base = make_base(TINY, 40, 6)
    got = base(x)
    for n in range(3):
        for c in range(2):
            series = x[n, :, c]
            mean, spread = series.mean(), torch.sqrt(series.var(unbiased=False) + 1e-5)
            series = (series - mean) / spread
            series = torch.cat([series, series[-1:].repeat(8)])
            patches = torch.stack([series[i : i + 16] for i in range(0, 48 - 16 + 1, 8)])
            hidden = base.gpt2(inputs_embeds=base.in_layer(patches)[None]).last_hidden_state
            want = base.out_layer(hidden.reshape(-1)) * spread + mean
            torch.testing.assert_close(got[n, :, c], want, rtol=1e-4, atol=1e-4)


def test_one_for_all_has_the_published_figures_and_runs_in_peft_alike(tmp_path):
    """Neither count nor file depends on how many frozen blocks there are; the paper has six."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make_base("gpt2-random:1x768", 336, 96)
    attached = attach(base, "rslora", base.slots, rank=16, alpha=16.0)
    assert attached.parameter_count == 546_304
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.02, generator=generator)
        x = torch.randn(1, 336, 2, generator=generator)
        want = base(x)
    to_peft(attached.lower("x", "F32"), tmp_path / "ours")
    attached.detach()
    assert (tmp_path / "ours/adapter_model.safetensors").stat().st_size == 2_185_688
    model = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    published = LoraConfig(
        init_lora_weights="gaussian", use_rslora=True, r=16, lora_alpha=16,
        target_modules=["wpe", "out_layer"], lora_dropout=0.01, bias="none",
    )  # fmt: skip
    theirs = get_peft_model(make_base("gpt2-random:1x768", 336, 96), published)
    assert theirs.get_nb_trainable_parameters()[0] == 546_304
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/adapter_model.safetensors").stat().st_size == 2_185_688


def test_a_local_checkpoint_is_cut_to_its_first_blocks(tiny_gpt2, tmp_path, x):
    tiny_gpt2.save_pretrained(tmp_path / "gpt2")
    base = make_base(str(tmp_path / "gpt2"), 40, 6)
    assert len(base.gpt2.h) == 2
    name = "h.1.mlp.c_fc.weight"
    torch.testing.assert_close(
        base.gpt2.get_parameter(name), tiny_gpt2.transformer.get_parameter(name)
    )
    assert base(x).shape == (3, 6, 2)


@pytest.mark.parametrize(
    ("name", "window", "error", "message"),
    [
        ("gpt3", 40, UnknownNameError, "Known: linear, gpt2-random"),
        ("gpt2-random:1x100", 40, UnsupportedError, "must be a multiple"),
        (TINY, 4, UnsupportedError, "a window of 4 makes 0 patches; 1 to 1024 fit"),
        (TINY, 9000, UnsupportedError, "makes 1125 patches"),
        ("linear", 0, UnsupportedError, "both must be at least 1"),
    ],
)
def test_bases_that_cannot_be(name, window, error, message):
    with pytest.raises(error, match=message):
        make_base(name, window, 6)


def test_a_checkpoint_of_another_architecture_is_refused(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="llama model, not a GPT-2"):
        make_base(str(tmp_path), 40, 6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedError, match="no model configuration"):
        make_base(str(tmp_path / "empty"), 40, 6)
