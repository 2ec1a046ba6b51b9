"""Settings shared by all tests."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads on tiny models only wait for each other

settings.register_profile("local", max_examples=50, deadline=None)
settings.register_profile(
    "ci",
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", max_examples=500, deadline=None)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local")
)


@pytest.fixture
def tiny_llama():
    """Return a random Llama: grouped-query attention, untied head, hidden 64, fp32, eval mode."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_gpt2():
    """Return a random GPT-2: Conv1D layers, head tied to the embedding, hidden 64, no dropout."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def token_batches():
    """Return eight batches of random tokens with labels, (2, 12), vocabulary 128."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(128, (2, 12), generator=generator) for _ in range(8)]
    return [{"input_ids": i, "labels": i} for i in ids]
