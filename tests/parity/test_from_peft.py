"""``from_peft`` against PEFT's own merged model: one test for each type and each option."""

import copy

import numpy as np
import pytest
import torch

from edge_lora import reference
from edge_lora.interop.peft import TYPES, from_peft
from edge_lora.interop.peft_keys import unknown_settings
from edge_lora.methods.model_base import ModelBase

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TOLERANCE = 1e-5  # of the largest value


def trained(model, config, seed=1):
    """Return a PEFT model whose every trainable number was moved."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrapped


def adapted(base, adapter):
    """Return every weight of ``base`` that the adapter changes, by the reference."""
    return {
        name: reference.apply(base.weight(name), [(form, adapter.alpha) for form in delta.forms])
        for name, delta in adapter.deltas.items()
    }


def check(model, config, folder, bind=True, seed=1):
    """Save with PEFT, import, and compare every parameter with PEFT's merged model."""
    wrapped = trained(model, config, seed)
    wrapped.save_pretrained(folder)
    base = ModelBase(model)
    adapter = from_peft(folder, base=base if bind else None)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    ours = adapted(base, adapter)
    changed = 0
    for name, before in model.named_parameters():
        want = merged[name].detach()
        if name not in ours:
            assert torch.equal(want, before), f"{name} was not imported"
            continue
        slot = base.slots[name]
        want = want.T if tuple(want.shape) != slot.shape else want
        transposed = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        want = merged[name].detach().T if transposed and want.ndim == 2 else want
        error = np.abs(ours[name] - want.numpy()).max() / want.abs().max().item()
        assert error <= TOLERANCE, (name, error)
        assert np.abs(ours[name] - base.weight(name)).max() > 1e-3, name
        changed += 1
    assert changed == len(adapter.deltas) > 0
    if bind:
        assert adapter.base.fingerprint == base.slots.fingerprint
        assert not base.slots.problems(adapter)
    else:
        assert adapter.base.fingerprint == ""
    return adapter


ATTENTION = ["q_proj", "v_proj", "down_proj"]  # 64 x 64, 32 x 64 and 64 x 160 in the tiny Llama

LLAMA = {
    "LORA": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=ATTENTION),
    "LORA rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=ATTENTION, use_rslora=True
    ),
    "LORA patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=ATTENTION, use_rslora=True,
        rank_pattern={"v_proj": 2, r"layers\.1\..*down_proj": 6},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 3, "down_proj": 11},
    ),
    "LORA dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=ATTENTION, use_dora=True
    ),
    "LORA modules_to_save": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm"]
    ),
    "LORA saved squares": lambda: peft.LoraConfig(
        r=4, target_modules=["down_proj"], modules_to_save=["q_proj"]
    ),
    "LORA tokens": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9, 3, 77]}
    ),
    "LORA embedding": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["embed_tokens", "lm_head"]
    ),
    "LORA mica": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="orthogonal"
    ),
    "ADALORA": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=7, target_modules=ATTENTION, total_step=100
    ),
    "SHIRA": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=5),
    "VERA": lambda: peft.VeraConfig(r=5, target_modules=ATTENTION, projection_prng_key=11),
    "VERA drawn again": lambda: peft.VeraConfig(
        r=5, target_modules=ATTENTION, projection_prng_key=11, save_projection=False
    ),
    "RANDLORA": lambda: peft.RandLoraConfig(r=5, randlora_alpha=13, target_modules=ATTENTION),
    "RANDLORA sparse": lambda: peft.RandLoraConfig(
        r=6, target_modules=["gate_proj", "down_proj"], sparse=True
    ),
    "UNILORA": lambda: peft.UniLoraConfig(
        r=3, theta_d_length=1000, target_modules=ATTENTION, proj_seed=4
    ),
    "UNILORA saved": lambda: peft.UniLoraConfig(
        r=3, theta_d_length=64, target_modules=ATTENTION, save_indices=True
    ),
    "LOHA": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=ATTENTION, alpha_pattern={"v_proj": 2}
    ),
    "LOHA full": lambda: peft.LoHaConfig(r=9, alpha=5, target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=ATTENTION),
    "LOKR both": lambda: peft.LoKrConfig(
        r=2, alpha=5, target_modules=ATTENTION, decompose_both=True, decompose_factor=8
    ),
    "LOKR full": lambda: peft.LoKrConfig(r=60, alpha=5, target_modules=["q_proj", "gate_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=ATTENTION, feedforward_modules=["down_proj"]),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[5, 1, 100]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LLAMA)
def test_a_llama_is_what_peft_merges(case, tiny_llama, tmp_path):
    check(tiny_llama, LLAMA[case](), tmp_path)


def test_every_type_that_is_read_from_its_file_has_a_case():
    assert {case.split()[0] for case in LLAMA} == set(TYPES)


@pytest.mark.parametrize("kind", TYPES)
def test_every_setting_of_peft_is_known(kind):
    fields = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    assert not unknown_settings(kind, dict.fromkeys(fields, True))
    assert unknown_settings(kind, {**dict.fromkeys(fields, True), "brandnew": 1}) == ["brandnew"]


MIXED = {
    "LORA": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["table", "conv1", "conv2", "wide", "head"],
        rank_pattern={"conv2": 2},
    ),
    "LORA dora": lambda: peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["table", "conv1", "conv2", "wide"], use_dora=True
    ),
    "LORA lora_bias": lambda: peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["conv1", "conv2", "wide", "head"], lora_bias=True
    ),
    "LORA bias all": lambda: peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["wide"], bias="all", modules_to_save=["norm"]
    ),
    "LORA saved by the ends of words": lambda: peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["wide"], modules_to_save=["onv1"]
    ),
    "LORA bias lora_only": lambda: peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["wide"], bias="lora_only"
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["conv2", "wide", "head"], feedforward_modules=["head"]
    ),
    "IA3 by the ends of words": lambda: peft.IA3Config(
        target_modules="conv2|wide|head", feedforward_modules=["2", "ead"]
    ),
    "IA3 conv input": lambda: peft.IA3Config(
        target_modules=["conv2", "wide"], feedforward_modules="conv2|wide"
    ),
    "LOHA": lambda: peft.LoHaConfig(
        r=2, alpha=5, target_modules=["conv1", "conv2", "wide"], use_effective_conv2d=True
    ),
    "LOHA flat": lambda: peft.LoHaConfig(r=2, alpha=5, target_modules=["conv1", "conv2"]),
    "LOKR": lambda: peft.LoKrConfig(
        r=1, alpha=5, target_modules=["conv1", "conv2", "wide"], use_effective_conv2d=True
    ),
    "LOKR flat": lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=["conv1", "conv2"]),
    "LOKR whole": lambda: peft.LoKrConfig(r=9, alpha=5, target_modules=["conv1", "conv2"]),
    "VERA": lambda: peft.VeraConfig(r=3, target_modules=["wide", "head"], save_projection=False),
    "SHIRA": lambda: peft.ShiraConfig(r=2, target_modules=["wide"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_convolutions_embeddings_and_biases_are_what_peft_merges(
    case, mixed, tmp_path, monkeypatch
):
    kron = torch.kron  # refuses the strides that PEFT hands it

    def plain(tensor):
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    monkeypatch.setattr(torch, "kron", lambda a, b: kron(plain(a), plain(b)))
    check(mixed, MIXED[case](), tmp_path)


GPT2 = {
    "LORA": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["c_attn", "wpe"], fan_in_fan_out=True
    ),
    "LORA dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["c_proj"], fan_in_fan_out=True, use_dora=True
    ),
    "LORA saved": lambda: peft.LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["c_fc", "ln_f"]
    ),
    "LORA saved, none transposed": lambda: peft.LoraConfig(
        r=4, target_modules=["wpe"], modules_to_save=["c_fc"]
    ),
    "LORA saved squares": lambda: peft.LoraConfig(
        r=4, target_modules=["mlp.c_proj"], modules_to_save=["attn.c_proj"], fan_in_fan_out=True
    ),
    "LORA saved squares, none transposed": lambda: peft.LoraConfig(
        r=4, target_modules=["wpe"], modules_to_save=["attn.c_proj"]
    ),
    "LORA saved table": lambda: peft.LoraConfig(
        r=4, target_modules=["c_attn"], modules_to_save=["wpe"], fan_in_fan_out=True
    ),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    "UNILORA": lambda: peft.UniLoraConfig(
        r=2, theta_d_length=50, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GPT2)
def test_transposed_layers_are_what_peft_merges(case, tiny_gpt2, tmp_path):
    for parameter in tiny_gpt2.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # its biases begin at zero
    check(tiny_gpt2, GPT2[case](), tmp_path)


@pytest.mark.parametrize(
    "case", ["LORA", "LORA rslora", "LORA patterns", "ADALORA", "LOHA", "LOKR", "LORA embedding"]
)
def test_without_a_base_it_is_unbound_and_the_same(case, tiny_llama, tmp_path):
    check(tiny_llama, LLAMA[case](), tmp_path, bind=False)
