"""The recipe of the shipped adapters: it names things that exist, and it trains."""

import json
from dataclasses import asdict
from importlib.resources import files

import pytest

from edge_lora.adapter import Adapter
from edge_lora.demo import recipe as recipes
from edge_lora.demo.recipe import RECIPES, Recipe
from edge_lora.demo.skills import SKILLS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


class Letters:
    """One token per character."""

    eos_token_id = 0
    pad_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) % 127 + 1 for letter in text]

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(chr(int(i) - 1) for i in row if int(i)) for row in rows]


def test_every_skill_has_a_recipe():
    assert RECIPES.keys() == SKILLS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_there_is_enough_data(name):
    recipe = RECIPES[name]
    assert len(SKILLS[name].generate(recipe.seed, recipe.examples)) == recipe.examples
    held_out = SKILLS[name].generate(recipes.HELD_OUT_SEED, recipes.HELD_OUT_EXAMPLES, "held-out")
    assert len(held_out) == recipes.HELD_OUT_EXAMPLES


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_adapter_is_the_one_that_the_recipe_and_the_report_describe(name):
    folder = files("edge_lora.demo") / "adapters"
    report = json.loads((folder / "report.json").read_text())[name]
    adapter = Adapter.load(str(folder / f"{name}.safetensors"))
    recipe = asdict(RECIPES[name])
    assert adapter.name == name
    assert adapter.method == recipe["method"]
    assert adapter.provenance["recipe"] == recipe
    assert {key: report[key] for key in recipe} == recipe
    assert adapter.base.fingerprint == report["base_fingerprint"]
    assert len((folder / f"{name}.safetensors").read_bytes()) == report["file_bytes"]
    assert report["exact_match_adapted"] >= 0.9 > report["exact_match_base"]


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_give_an_adapter_and_the_base_back(tiny_llama, name):
    before = {key: value.clone() for key, value in tiny_llama.state_dict().items()}
    recipe = Recipe(
        name, RECIPES[name].method, RECIPES[name].config, batch_size=4, examples=20,
        calibration_batches=2,
    )  # fmt: skip
    adapter = recipes.train_skill(tiny_llama, Letters(), recipe, steps=2)
    assert adapter.name == name
    assert adapter.provenance["recipe"]["seed"] == 0
    after = tiny_llama.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_batched_answers_equal_one_by_one(tiny_llama):
    """Left padding must not change what the model says."""
    prompts = ["7:", "a longer prompt:", "12:"]
    together = recipes.answers(tiny_llama, Letters(), prompts, batch_size=3)
    alone = [recipes.answers(tiny_llama, Letters(), [prompt])[0] for prompt in prompts]
    assert together == alone


def test_accuracy_counts_exact_answers(tiny_llama):
    from edge_lora.demo.skills import Example

    prompts = ["7:", "12:"]
    found = recipes.answers(tiny_llama, Letters(), prompts)
    examples = [Example("7:", found[0]), Example("12:", "never this")]
    assert recipes.accuracy(tiny_llama, Letters(), examples) == 0.5
