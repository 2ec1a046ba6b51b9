"""``edge-lora export`` with sites and gains, and ``edge-lora run`` at a rank, on a model folder."""

import json

import pytest
from click.testing import CliRunner

from edge_lora.bundle import read_manifest
from edge_lora.cli import main

torch = pytest.importorskip("torch")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def facts_of(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def exported(torch_model, tmp_path_factory):
    """A bundle made by the command, with one token per character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("command")
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {"<end>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch_model.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>"
    ).save_pretrained(folder / "base")
    facts = facts_of(
        "export", "--base", folder / "base", "-o", folder / "bundle", "--slots", "inputs",
        "--slot-forms", "low_rank", "--slot-forms", "row_scale", "--sites", "*.mlp",
    )  # fmt: skip
    assert facts["sites"] == 2
    assert facts["slots"] == 15
    return folder / "bundle"


@pytest.fixture(scope="module")
def nested(torch_model, exported, tmp_path_factory):
    """An adapter that a nested method trained, with its own ranks."""
    from edge_lora.methods import attach

    attached = attach(torch_model, "dylora", rank=4, ranks=[1, 2, 4])
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    adapter = attached.lower("nested")
    attached.detach()
    assert adapter.base.fingerprint == read_manifest(exported).fingerprint
    return adapter.save(tmp_path_factory.mktemp("nested") / "nested.safetensors")


def test_the_bundle_has_sites_and_gains(exported):
    manifest = read_manifest(exported)
    assert set(manifest.sites) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    without = [name for name, place in manifest.stored.items() if not place.gain_input]
    assert without == ["model.embed_tokens.weight"]  # the tied head: only if named
    listed = facts_of("inspect", exported, "--slots")
    assert {"model.layers.0.mlp": True}.items() <= {
        row["slot"]: row["unfused"] for row in listed["slots"]
    }.items()


@pytest.mark.parametrize("mode", [(), ("--unfused",)])
def test_run_at_a_rank(mode, exported, nested):
    common = ("run", exported, nested, "--prompt", "abc", "--max-tokens", 12, *mode)
    texts = {}
    for rank in (1, 4):
        facts = facts_of(*common, "--rank", rank)
        assert facts["rank"] == rank
        texts[rank] = facts["text"]
    assert texts[4] == facts_of(*common)["text"]
    assert texts[1] != texts[4]


def test_fused_and_unfused_say_the_same_at_a_rank(exported, nested):
    common = ("run", exported, nested, "--prompt", "abc", "--max-tokens", 12, "--rank", 2)
    assert facts_of(*common)["text"] == facts_of(*common, "--unfused")["text"]


def test_run_with_a_latency_budget(exported, nested):
    common = ("run", exported, nested, "--prompt", "abc", "--max-tokens", 3, "--unfused")
    assert facts_of(*common, "--rank", "auto:60000ms")["rank"] == 4
    result = run(*common, "--rank", "auto:0ms")
    assert result.exit_code == 1
    assert "keeps 0 ms: rank 1" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "fast"), "neither a number nor like auto:12ms"),
        (("--rank", "auto:9ms"), "takes --unfused"),
        (("--unfused", "--rank", "1"), "without 0.5"),
    ],
)
def test_a_rank_that_makes_no_sense_is_a_usage_error(options, message, exported, nested):
    scaled = f"{nested}:0.5" if "--unfused" in options else nested
    result = run("run", exported, scaled, "--prompt", "x", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    result = run("run", exported, "--prompt", "x", "--rank", 2)
    assert result.exit_code == 2
    assert "exactly one adapter" in result.stderr


def test_a_rank_that_was_not_trained_lists_the_others(exported, nested):
    result = run("run", exported, nested, "--prompt", "x", "--rank", 3)
    assert result.exit_code == 1
    assert "rank 3; its ranks: 1, 2, 4" in result.stderr
