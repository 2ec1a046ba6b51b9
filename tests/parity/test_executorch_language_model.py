"""A causal language model as an ExecuTorch program, against transformers' own forward and cache."""

from importlib import import_module

import pytest
import torch

from edge_lora.bundle import read_manifest
from edge_lora.bundle_check import verify_slots
from edge_lora.errors import UnsupportedError
from edge_lora.export import export_bundle

pytest.importorskip("executorch")
pytestmark = pytest.mark.torch

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 40,
}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval()


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=24)).eval()


CASES = {
    "llama": (llama, {}, 40, 1e-5),
    "llama in 8 bits": (llama, {"program_weights": "int8-dynamic"}, 40, 0.05),
    "qwen2, a bias at q, k and v": (qwen2, {"cache_length": 24}, 24, 1e-5),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    make, options, length, tolerance = CASES[request.param]
    model, out = make(), tmp_path_factory.mktemp("lm") / "out"
    export_bundle(model, out, engines=("executorch",), progress=False, **options)
    return model, out, length, tolerance


def program_of(out):
    runtime = import_module("executorch.runtime").Runtime.get()
    program = runtime.load_program((out / "executorch/model.pte").read_bytes())
    return program, program.load_method("forward")


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_a_prompt_and_every_step_agree_with_a_forward_over_all_tokens(exported):
    model, out, length, tolerance = exported
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 61, (1, length), generator=generator)
    with torch.no_grad():
        expected = model(tokens).logits
    program, method = program_of(out)
    prompt = method.execute([tokens[:, :6].contiguous(), torch.tensor([0])])[0]
    assert error(prompt, expected[:, :6]) < tolerance
    for i in range(6, length):  # to the last position of the cache
        step = method.execute([tokens[:, i : i + 1].contiguous(), torch.tensor([i])])[0]
        assert error(step, expected[:, i : i + 1]) < tolerance
    del program  # the method reads its memory until here


def test_a_new_prompt_sees_nothing_of_what_was_written_before(exported):
    model, out, length, tolerance = exported
    generator = torch.Generator().manual_seed(6)
    first, second = torch.randint(0, 61, (2, 1, length), generator=generator)
    with torch.no_grad():
        expected = model(second[:, :4]).logits
    program, method = program_of(out)
    method.execute([first, torch.tensor([0])])
    found = method.execute([second[:, :4].contiguous(), torch.tensor([0])])[0]
    assert error(found, expected) < tolerance
    del program


def test_the_manifest_says_how_to_run_it(exported):
    model, out, length, _ = exported
    manifest = read_manifest(out)
    program = manifest.program
    assert program.cache_length == length
    assert program.input_order == ("input_ids", "start")
    assert [spec.shape for spec in program.inputs] == [(1, "seq"), (1,)]
    assert program.outputs[0].shape == (1, "seq", 61)
    assert set(program.canary) == {"input_ids", "start"}
    assert manifest.config["num_layers"] == 1
    assert "canary" not in manifest.config
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(program.slots) == len(linear)
    assert all(place.key for place in program.slots.values())  # XNNPACK computes every one
    verify_slots(out, manifest)


@pytest.mark.parametrize(
    ("make", "length", "fact"),
    [(llama, 41, "the model's context is 40"), (mistral, 25, "its attention window is 24"),
     (llama, 5, "it must hold 19 tokens")],
)  # fmt: skip
def test_a_cache_that_cannot_be_is_refused(tmp_path, make, length, fact):
    with pytest.raises(UnsupportedError, match=fact):
        export_bundle(
            make(), tmp_path / "out", engines=("executorch",), cache_length=length, progress=False
        )
    assert list(tmp_path.iterdir()) == []
