"""``convert --base``: the outputs of a live session with the adapter before and after."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora import Adapter, BaseIdentity, Bottleneck, Delta
from edge_lora.bundle import read_manifest
from edge_lora.cli import main
from edge_lora.cli.equivalence import first_difference
from edge_lora.interop.gguf import from_gguf, to_gguf
from edge_lora.interop.gguf_names import GgufBase
from edge_lora.interop.peft_export import to_peft
from edge_lora.slot_errors import slot_errors, total_error


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *(str(a) for a in arguments), "--threads", "1"])


def facts_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def source(make_adapter):
    return make_adapter("low_rank", 1, slots="model.layers.*", alpha=0.5)


@pytest.fixture(scope="module")
def text_bundle(bundle, tmp_path_factory):
    """Return the tiny bundle with a tokenizer of one word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("text") / "bundle")
    words = {f"w{i}": i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def test_the_same_adapter_gives_the_same_texts(text_bundle, source, tmp_path):
    out = tmp_path / "x.safetensors"
    facts = facts_of(run(source, out, "--base", text_bundle, "--prompt", "w1 w5", "--json"))
    (row,) = facts["equivalence"]
    assert (row["target"], row["largest_difference"]) == ("edge-lora, fused", 0)
    assert row["effect"] > 0.01
    assert (row["same_texts"], row["texts"], row["first_differences"]) == (1, 1, [None])


def test_fewer_bits_change_outputs_and_the_report_says_so(text_bundle, source, tmp_path):
    prompts = [f"w{i} w{i + 3} w{2 * i}" for i in range(1, 30)]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    out = tmp_path / "x.safetensors"
    command = [source, out, "--base", text_bundle, "--bits", "1", *options]
    (row,) = facts_of(run(*command, "--json"))["equivalence"]
    assert 0 < row["largest_difference"] < row["effect"] * 2
    assert row["texts"] == 29
    assert row["same_texts"] == row["first_differences"].count(None) < 29
    printed = run(*command).stdout
    assert f"{row['same_texts']} of 29 the same, others differ from token" in printed


def test_a_stranger_is_bound_to_the_base(bundle, source, tmp_path):
    folder = to_peft(Adapter.load(source), tmp_path / "peft")
    out = tmp_path / "x.safetensors"
    facts = facts_of(run(folder, out, "--base", bundle, "--json"))
    manifest = read_manifest(bundle)
    bound = Adapter.load(out)
    assert bound.base.fingerprint == manifest.fingerprint
    assert all(d.slot_hash == manifest.slots[s].slot_hash for s, d in bound.deltas.items())
    assert facts["base"] == manifest.base_id
    assert "texts" not in facts["equivalence"][0], "it has no tokenizer"


def test_gguf_of_a_bundle_that_says_its_architecture(bundle, source, tmp_path):
    out = tmp_path / "x.gguf"
    facts = facts_of(run(source, out, "--base", bundle, "--json"))
    assert facts["equivalence"][0]["largest_difference"] < 1e-4
    assert facts["relative_error"] < 1e-6
    assert total_error(slot_errors(Adapter.load(source), from_gguf(out, bundle))) < 1e-6


def test_onnx_adapter_runs_in_plain_onnx_runtime(bundle, source, tmp_path):
    facts = facts_of(run(source, tmp_path / "x.onnx_adapter", "--base", bundle, "--json"))
    ours, plain = facts["equivalence"]
    assert (ours["largest_difference"], plain["target"]) == (0, "onnxruntime")
    assert plain["largest_difference"] < 1e-3 < plain["effect"]


def test_dense_adapters_become_low_rank_ones(mlp_bundle, make_mlp_adapter, tmp_path):
    source = make_mlp_adapter("dense")
    out = tmp_path / "x.safetensors"
    facts = facts_of(run(source, out, "--base", mlp_bundle, "--energy", 0.9, "--json"))
    assert 0 < facts["discarded_energy"] < 0.1
    (row,) = facts["equivalence"]
    assert 0 < row["largest_difference"] < row["effect"]


def refused(result, *facts):
    assert result.exit_code == 1, result.output
    assert result.stderr.count("Error: ") == 1
    for fact in facts:
        assert fact in result.stderr


def test_what_does_not_fit_the_base_is_refused(bundle, mlp_bundle, source, tmp_path):
    out = tmp_path / "x.safetensors"
    refused(run(source, out, "--base", mlp_bundle), "fingerprints differ")
    refused(run(source, tmp_path / "x.gguf", "--base", mlp_bundle), "fingerprints differ")
    refused(run(source, out, "--base", tmp_path), "is not a bundle")
    refused(run(source, out, "--base", bundle, "--prompt", "x"), "takes no text")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_the_comparison_fails(bundle, source, tmp_path):
    """The session refuses an adapter without effect."""
    adapter = Adapter.load(source)
    silent = adapter.scaled(1e-30).save(tmp_path / "silent.safetensors")
    refused(run(silent, tmp_path / "x.safetensors", "--base", bundle), "has no effect")
    assert list(tmp_path.iterdir()) == [silent]


def test_a_bundle_without_an_architecture_has_no_gguf(bundle, source, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    raw = json.loads((copy / "bundle.json").read_text())
    for model_type, message in ((None, "does not say which architecture"), ("gpt2", "'gpt2'")):
        raw["config"]["model_type"] = model_type
        (copy / "bundle.json").write_text(json.dumps(raw))
        refused(run(source, tmp_path / "x.gguf", "--base", copy), message, "llama, mistral")


def test_a_gguf_of_another_architecture_is_refused(bundle, source, tmp_path):
    out = tmp_path / "x.safetensors"
    theirs = to_gguf(Adapter.load(source), tmp_path / "x.gguf", GgufBase(16, "qwen2"))
    refused(run(theirs, out, "--base", bundle), "made for architecture 'qwen2'", "is 'llama'")
    assert not out.exists()
    refused(run(theirs, out, "--base", tmp_path), "is not a bundle")


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([], [1]) == 0


@pytest.fixture(scope="module")
def site_bundle(tmp_path_factory):
    import torch

    from edge_lora.export import export_bundle

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.Linear(48, 48)).eval()
    folder = tmp_path_factory.mktemp("sites") / "bundle"
    inputs = {"input": torch.randn(2, 5, 24)}
    export_bundle(model, folder, example_inputs=inputs, slots="inputs", sites=["1"], progress=False)
    return folder


def test_a_bottleneck_is_compared_as_the_active_adapter(site_bundle, tmp_path):
    manifest = read_manifest(site_bundle)
    slot = manifest.slots["1"]
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(s).astype(np.float32) for s in ((4, 48), (48, 4)))
    form = Bottleneck(down, up, 0.5, "relu", "parallel", np.ones(4, np.float32))
    base = BaseIdentity(manifest.fingerprint)
    made = Adapter("x", "x", base, {"1": Delta(slot.shape, slot.dtype, (form,))})
    source = made.save(tmp_path / "source.safetensors")
    out = tmp_path / "x.safetensors"
    facts = facts_of(run(source, out, "--bits", 8, "--base", site_bundle, "--json"))
    (row,) = facts["equivalence"]
    assert row["target"] == "edge-lora, sites fed"
    assert 0 < row["largest_difference"] < row["effect"] / 10
    assert 0 < facts["relative_error"] < 0.05
    onnx = tmp_path / "x.onnx_adapter"
    facts = facts_of(run(source, onnx, "--base", site_bundle, "--json"))
    plain = facts["equivalence"][1]
    assert plain["target"] == "onnxruntime"
    assert plain["largest_difference"] < 1e-5 < plain["effect"]
