"""``from_peft_model``: the base with our deltas gives the outputs of the live, unmerged model."""

import copy

import pytest
import torch

from edge_lora import reference
from edge_lora.errors import UnsupportedError
from edge_lora.interop.peft_config import MERGED_TYPES
from edge_lora.methods.model_base import ModelBase
from edge_lora.methods.peft_model import from_peft_model

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SETTINGS = {
    "C3A": {"block_size": 16},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 8},
    "ROAD": {"group_size": 16},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 100},
}
UNTRIED = {
    "ADAMSS": "needs scikit-learn",
    "BEFT": "trains biases, a Llama has none: below",
}
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def small_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def wrapped(model, kind, **settings):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        **{"target_modules": ["q_proj", "down_proj"], **settings}
    )
    found = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return found


def check(model, live, *inputs, **settings):
    adapter = from_peft_model(live, **settings)
    base = ModelBase(model)
    assert not base.slots.problems(adapter)
    ours = copy.deepcopy(model)
    for name, delta in adapter.deltas.items():
        weight = reference.apply(base.weight(name), [(form, 1.0) for form in delta.forms])
        ours.get_parameter(name).data = torch.from_numpy(weight)
    with torch.no_grad():
        outputs = [m(*inputs) for m in (ours, live, model)]
    got, want, before = (getattr(output, "logits", output) for output in outputs)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - before).abs().max() > 1e-3
    return adapter


@pytest.mark.parametrize("kind", [kind for kind in MERGED_TYPES if kind not in UNTRIED])
def test_a_type_that_only_peft_reads(kind, small_llama):
    check(small_llama, wrapped(small_llama, kind, **SETTINGS.get(kind, {})), IDS)


def test_a_type_that_trains_biases(mixed):
    adapter = check(mixed, wrapped(mixed, "BEFT", target_modules=["wide", "head"]), IDS % 31)
    assert sorted(adapter.deltas) == ["head.bias", "wide.bias"]


@pytest.mark.parametrize(
    ("kind", "settings", "parameter"),
    [
        ("OFT", {"bias": "all", "oft_block_size": 4}, "conv1.bias"),
        ("BOFT", {"bias": "boft_only", "boft_block_size": 4}, "wide.bias"),
        ("HRA", {"modules_to_save": ["head"], "r": 2}, "head.weight"),
        ("LORA", {"modules_to_save": ["norm"]}, "norm.weight"),
    ],
)
def test_what_was_trained_of_the_base_itself_needs_the_base(kind, settings, parameter, mixed):
    live = wrapped(mixed, kind, **{"target_modules": ["wide"], **settings})
    with pytest.raises(UnsupportedError, match=r"of the base, .*give base="):
        from_peft_model(live)
    assert parameter in check(mixed, live, IDS % 31, base=mixed).deltas


def test_one_trained_half_of_a_tied_pair_is_refused(tiny_gpt2):
    live = wrapped(
        tiny_gpt2,
        "LORA",
        target_modules=["c_attn"],
        modules_to_save=["lm_head"],
        fan_in_fan_out=True,
    )
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight: shares its tensor"):
        from_peft_model(live, base=tiny_gpt2)


def test_another_model_is_no_base(small_llama, tiny_llama):
    with pytest.raises(UnsupportedError, match=r"(?s)layers\.1\..*no such|gone.*in the base"):
        from_peft_model(wrapped(small_llama, "HIRA"), base=tiny_llama)


def test_the_live_model_is_left_as_it_was(small_llama):
    live = wrapped(small_llama, "HIRA")
    before = {name: value.clone() for name, value in live.state_dict().items()}
    from_peft_model(live)
    after = live.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_base_that_was_changed_before_training_is_refused(small_llama):
    with pytest.raises(UnsupportedError, match="init_lora_weights='pissa' changed the base"):
        from_peft_model(wrapped(small_llama, "LORA", init_lora_weights="pissa"))


def test_an_untrained_adapter_is_refused(small_llama):
    config = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UnsupportedError, match="it changes no weight"):
        from_peft_model(peft.get_peft_model(copy.deepcopy(small_llama), config))
