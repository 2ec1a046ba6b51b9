"""An adapter that PEFT trained, in a live session: from its folder to the same outputs."""

import copy

import numpy as np
import pytest

from edge_lora import from_peft
from edge_lora.errors import AdapterFileError
from edge_lora.interop.base import BundleBase
from edge_lora.methods.model_base import ModelBase
from edge_lora.runtime import open_bundle

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TOLERANCE = 1e-4  # of the largest output: the parity of the exported base itself
CONFIGS = {
    "lora": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"], use_rslora=True,
        rank_pattern={"q_proj": 2}, init_lora_weights=False,
    ),
    "dora": lambda: peft.LoraConfig(
        r=4, target_modules=["v_proj"], use_dora=True, init_lora_weights=False
    ),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def session(bundle):
    with open_bundle(bundle, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_imported_adapter_gives_peft_s_outputs(
    kind, torch_model, bundle, session, feeds, tmp_path
):
    torch.manual_seed(3)
    live = peft.get_peft_model(copy.deepcopy(torch_model), CONFIGS[kind]()).eval()
    live.save_pretrained(tmp_path / "peft")
    path = from_peft(tmp_path / "peft", base=bundle).save(tmp_path / "ours.safetensors")
    with torch.no_grad():
        want = live(torch.from_numpy(feeds["input_ids"])).logits.numpy()
    before = session.run(feeds)["logits"]
    session.load_adapter(path, kind)
    with session.using(kind):
        found = session.run(feeds)["logits"]
    unfused = session.run(feeds, adapter=kind)["logits"] if kind == "lora" else found
    session.delete_adapter(kind)
    assert np.abs(want - before).max() > 100 * TOLERANCE * np.abs(want).max()
    assert np.abs(found - want).max() <= TOLERANCE * np.abs(want).max()
    assert np.abs(unfused - want).max() <= TOLERANCE * np.abs(want).max()
    assert session.run(feeds)["logits"].tobytes() == before.tobytes()


def test_a_bundle_and_its_model_are_the_same_base(torch_model, bundle, tmp_path):
    live = peft.get_peft_model(copy.deepcopy(torch_model), CONFIGS["dora"]())
    live.save_pretrained(tmp_path)
    ours, theirs = BundleBase(bundle), ModelBase(torch_model)
    for name in ours.slots:
        np.testing.assert_array_equal(ours.weight(name), theirs.weight(name))
    adapter = from_peft(tmp_path, bundle)
    assert adapter.content_hash == from_peft(tmp_path, theirs).content_hash
    assert not ours.slots.problems(adapter)


def test_only_the_model_knows_how_it_stores_a_square_layer(torch_model, bundle, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["q_proj"])
    peft.get_peft_model(copy.deepcopy(torch_model), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"q_proj\.weight: whether its layer .*ModelBase"):
        from_peft(tmp_path, bundle)
    adapter = from_peft(tmp_path, ModelBase(torch_model))
    assert not BundleBase(bundle).slots.problems(adapter)
