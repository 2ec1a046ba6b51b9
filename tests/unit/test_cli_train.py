"""``train`` and ``methods`` on a random model of a few thousand weights."""

import json

import pytest
from click.testing import CliRunner

from edge_lora import Adapter
from edge_lora.cli import main

pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.torch


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def base(tiny_llama, tmp_path):
    """A model folder as Hugging Face lays it out, with one token per character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {"<end>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "base"
    tiny_llama.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"{n} ->", "completion": f" {n + 1}"}) for n in range(20)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        (("lora", "--set", "rank=2"), 14),
        (("shira", "--set", "density=0.05", "--set", "mask=snip"), 14),
        (("bilora", "--set", "bits=2", "--set", "group=row"), 14),
        (("dylora", "--set", "rank=3", "--set", "ranks=[1,3]", "--set", "frozen=true"), 14),
        (("biadaptformer", "--set", "bits=null", "--slot-names", "model.layers.1.mlp"), 1),
    ],
    ids=lambda options: options[0] if isinstance(options, tuple) else "",
)
def test_train_writes_an_adapter_and_a_plot(base, data, tmp_path, options, slots):
    out, plot = tmp_path / "plus-one.safetensors", tmp_path / "loss.png"
    result = run(
        "train", "--base", base, "--data", data, "--method", *options, "--steps", 6, "--lr", 0.01,
        "--device", "cpu", "-o", out, "--plot", plot, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["steps"] == 6
    assert facts["best_validation_loss"] is not None
    adapter = Adapter.load(out)
    assert adapter.name == "plus-one"
    assert len(adapter.deltas) == facts["slots"] == slots
    assert adapter.provenance["training"]["steps"] == 6
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_taken_up_again(base, data, tmp_path):
    arguments = (
        "train", "--base", base, "--data", data, "--method", "lora", "--steps", 4,
        "--device", "cpu", "--checkpoint", tmp_path / "run", "-o",
    )  # fmt: skip
    assert run(*arguments, tmp_path / "a.safetensors").exit_code == 0
    assert run(*arguments, tmp_path / "b.safetensors").exit_code == 0
    first, second = (Adapter.load(tmp_path / f"{n}.safetensors") for n in "ab")
    assert first.content_hash == second.content_hash


REFUSED = {
    "unknown method": (("--method", "magic"), 1, "unknown method 'magic'. Known: bi"),
    "unknown option": (("--method", "lora", "--set", "density=1"), 1, "density"),
    "unknown mask": (("--set", "mask=best"), 1, "unknown mask 'best'"),
    "no slot matches": (("--slot-names", "*.q_projj"), 1, "'q_proj' (2)"),
    "both kinds of data": (("--skill", "roman"), 2, "either --data FILE or --skill NAME"),
    "setting without value": (("--set", "rank"), 2, "is not KEY=VALUE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_message_and_no_file(base, data, tmp_path, case):
    options, code, fact = REFUSED[case]
    out = tmp_path / "x.safetensors"
    result = run("train", "--base", base, "--data", data, "--device", "cpu", "-o", out, *options)
    assert result.exit_code == code
    assert fact in result.stderr
    assert result.stderr.count("Error: ") == 1
    assert not out.exists()


def test_every_bad_line_of_the_data_is_named(base, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\nnonsense\n')
    result = run("train", "--base", base, "--data", data, "-o", tmp_path / "x")
    assert result.exit_code == 1
    assert "line 2" in result.stderr
    assert "line 3" in result.stderr


def test_methods_lists_every_option_with_its_meaning():
    described = json.loads(run("methods", "--json").stdout)
    assert {"lora", "rslora", "shira"} <= described.keys()
    for method, options in described.items():
        for option in options:
            assert option["meaning"], f"{method}: {option['name']} is not documented"


def test_methods_of_one():
    from edge_lora.methods.masks import MASKS

    result = run("methods", "shira")
    assert "density\t0.01" in result.stdout
    (mask,) = [line for line in result.stdout.splitlines() if line.startswith("shira\tmask")]
    assert set(MASKS) <= set(mask.replace(",", " ").replace(".", " ").split())
    assert run("methods", "magic").exit_code == 1


@pytest.mark.parametrize("place", ["none/x.safetensors", "."])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(place, data, tmp_path):
    out = tmp_path / place
    result = run("train", "--base", "never-loaded", "--data", data, "-o", out)
    assert result.exit_code == 1
    assert f"'{out}'" in result.stderr
    assert "loading" not in result.stderr


def test_an_unknown_option_is_refused_before_the_base_is_loaded(data, tmp_path):
    options = ("--method", "lora", "--set", "rnk=4", "-o", tmp_path / "x.safetensors")
    result = run("train", "--base", "never-loaded", "--data", data, *options)
    assert result.exit_code == 1
    assert "'rnk'" in result.stderr
    assert "loading" not in result.stderr
