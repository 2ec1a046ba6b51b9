"""Settings of PEFT that decide whether an adapter means anything on the original base."""

import copy
import tracemalloc

import numpy as np
import pytest
import torch

from edge_lora import from_peft, reference
from edge_lora.errors import AdapterFileError, AdapterMismatchError, EdgeLoraError, UnsupportedError
from edge_lora.interop.binding import bind
from edge_lora.interop.peft_low_rank import norms_of_sum
from edge_lora.interop.torch_random import TorchGenerator
from edge_lora.methods.model_base import ModelBase
from edge_lora.slots import SlotTable

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
IDS = torch.arange(24).reshape(2, 12)


def moved(live, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return live.eval()


def outputs_with(model, adapter):
    base, ours = ModelBase(model), copy.deepcopy(model)
    for name, delta in adapter.deltas.items():
        weight = reference.apply(base.weight(name), [(form, 1.0) for form in delta.forms])
        ours.get_parameter(name).data = torch.from_numpy(weight)
    with torch.no_grad():
        return ours(IDS).logits


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_changed_base_is_refused_and_the_converted_adapter_is_exact(init, tiny_llama, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=init)
    live = peft.get_peft_model(copy.deepcopy(tiny_llama), config)
    config.init_lora_weights = True  # else PEFT would begin again when it loads the start
    live.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init
    moved(live)
    live.save_pretrained(tmp_path / "trained")
    with pytest.raises(UnsupportedError, match=f"'{init}' changed the base's weights"):
        from_peft(tmp_path / "trained", base=ModelBase(tiny_llama))
    live.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    adapter = from_peft(tmp_path / "converted", base=ModelBase(tiny_llama))
    assert all(delta.forms[0].rank == 8 for delta in adapter.deltas.values())
    with torch.no_grad():
        want = live(IDS).logits
    assert (outputs_with(tiny_llama, adapter) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", False])
def test_an_init_that_leaves_the_base_alone_is_plain_lora(init, tiny_llama, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    live = moved(peft.get_peft_model(copy.deepcopy(tiny_llama), config))
    live.save_pretrained(tmp_path)
    with torch.no_grad():
        want = live(IDS).logits
    got = outputs_with(tiny_llama, from_peft(tmp_path, base=ModelBase(tiny_llama)))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_width_are_kept_as_they_are(dtype, tiny_llama, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    live = peft.get_peft_model(copy.deepcopy(tiny_llama), config).eval()
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    live.save_pretrained(tmp_path)
    adapter = from_peft(tmp_path, base=ModelBase(tiny_llama))
    (form,) = adapter.deltas["model.layers.0.self_attn.q_proj.weight"].forms
    assert form.a.dtype.name == form.bt.dtype.name == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        want = live.float()(IDS).logits
    got = outputs_with(tiny_llama, adapter)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_adalora_pruned_to_other_ranks(tiny_llama, tmp_path):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=7, target_modules=["q_proj", "v_proj"], total_step=10
    )
    live = moved(peft.get_peft_model(copy.deepcopy(tiny_llama), config))
    keep = {"0": [True, False, True, True], "1": [False] * 4}
    kept = {}
    for name, module in live.base_model.model.named_modules():
        if hasattr(module, "lora_E"):
            kept[f"{name}.lora_E"] = keep[name.split(".")[2]]
            with torch.no_grad():
                module.lora_E["default"][~torch.tensor(kept[f"{name}.lora_E"])] = 0
    live.peft_config["default"].rank_pattern = kept
    with torch.no_grad():
        want = live(IDS).logits
    live.save_pretrained(tmp_path)
    adapter = from_peft(tmp_path, base=ModelBase(tiny_llama))
    assert [d.forms[0].rank for d in adapter.deltas.values()] == [3, 3]  # layer 1 dropped out
    got = outputs_with(tiny_llama, adapter)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_one_half_of_a_tied_pair_is_refused(tiny_gpt2, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(tiny_gpt2), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"shares its tensor with transformer\.wte\.weight"):
        from_peft(tmp_path, base=ModelBase(tiny_gpt2))
    unbound = from_peft(tmp_path)
    assert "lm_head.weight" in unbound.deltas  # the base may not be tied
    with pytest.raises(AdapterMismatchError, match=r"lm_head\.weight: shares its tensor with"):
        bind(unbound, ModelBase(tiny_gpt2).slots)


TIED = {
    "lora": {"target_modules": ["embed_tokens"], "init_lora_weights": False},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 5]},
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_pair_that_peft_keeps_tied_is_one_slot(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    settings = peft.LoraConfig(r=2, lora_alpha=3, ensure_weight_tying=True, **TIED[case])
    live = peft.get_peft_model(copy.deepcopy(model), settings)
    if case != "lora":  # there its factors share memory, and begin at random
        moved(live)
    live.eval().save_pretrained(tmp_path)
    adapter = from_peft(tmp_path, base=ModelBase(model))
    assert "model.embed_tokens.weight" in adapter.deltas
    assert "lm_head.weight" not in adapter.deltas
    with torch.no_grad():
        want = live(IDS).logits
    assert (want - model(IDS).logits).abs().max() > 1e-3
    assert (outputs_with(model, adapter) - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_square_module_that_may_lie_either_way_is_refused(tiny_gpt2, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["attn.c_proj"])
    peft.get_peft_model(copy.deepcopy(tiny_gpt2), config).save_pretrained(tmp_path)
    whole = ModelBase(tiny_gpt2)
    unsure = {"weight": whole.weight, "stores_transposed": lambda self, name: None}
    for base in (None, type("Unsure", (), {"slots": whole.slots, **unsure})()):
        with pytest.raises(AdapterFileError, match=r"attn\.c_proj\.weight: whether its layer"):
            from_peft(tmp_path, base=base)


def test_the_copy_of_an_embedding_must_be_the_base_s(tiny_llama, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(tiny_llama), config).save_pretrained(tmp_path)
    from_peft(tmp_path, base=ModelBase(tiny_llama))
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.add_(0.5)
    with pytest.raises(AdapterFileError, match="is not this base's"):
        from_peft(tmp_path, base=ModelBase(tiny_llama))


def test_a_base_without_some_slots_cannot_order_drawn_indices(tiny_llama, tmp_path):
    config = peft.UniLoraConfig(r=2, theta_d_length=40, target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(tiny_llama), config).save_pretrained(tmp_path)
    whole = ModelBase(tiny_llama)
    part = SlotTable(list(whole.slots.values())[1:], "part", whole.slots.fingerprint)
    unread = {"weight": whole.weight, "stores_transposed": whole.stores_transposed}
    base = type("Part", (), {"slots": part, **unread})()
    with pytest.raises(UnsupportedError, match=r"(?s)save_indices=True.*leaves out"):
        from_peft(tmp_path, base=base)


def test_a_base_that_is_none_of_ours_is_refused(tiny_llama, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(tiny_llama), config).save_pretrained(tmp_path)
    with pytest.raises(EdgeLoraError, match=r"LlamaForCausalLM.*ModelBase"):
        from_peft(tmp_path, base=tiny_llama)


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, 2**62 + 1])
def test_torch_s_numbers_are_drawn_to_the_bit(seed):
    ours, theirs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for shape, bound in (((7, 300), 0.3), ((1000, 5), 1 / 3), ((1,), 1e-3)):
        want = torch.empty(shape).uniform_(-bound, bound, generator=theirs).numpy()
        np.testing.assert_array_equal(ours.uniform(shape, bound), want)


def test_dora_s_norms_need_no_whole_matrix():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((900, 1100), np.float32)
    a, bt = rng.standard_normal((8, 1100), np.float32), rng.standard_normal((8, 900), np.float32)
    tracemalloc.start()
    norms = norms_of_sum(weight, a, bt, 0.3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = weight.astype(np.float64) + 0.3 * bt.T.astype(np.float64) @ a
    np.testing.assert_allclose(norms, np.linalg.norm(whole, axis=1), rtol=1e-6)
    assert peak < weight.nbytes / 8
