"""``inspect``: how values are stored, and other people's files."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edge_lora import Adapter, BaseIdentity, Delta, LowRank, RowScale
from edge_lora.cli import main
from edge_lora.interop.gguf import to_gguf
from edge_lora.interop.gguf_names import GgufBase
from edge_lora.interop.peft_export import to_peft
from edge_lora.quantise import quantise

SLOT = "model.layers.0.mlp.up_proj.weight"


def inspect(path, *options):
    result = CliRunner().invoke(main, ["inspect", str(path), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def facts(path, *options):
    return json.loads(inspect(path, "--json", *options))


@pytest.fixture
def adapter():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((8, n)).astype(np.float32) for n in (48, 96))
    delta = Delta((96, 48), "F32", (LowRank(a, b, 2.0),))
    return Adapter("mine", "lora", BaseIdentity(""), {SLOT: delta})


def test_bits_groups_ranks_and_what_stays_exact(adapter, tmp_path):
    (form,) = adapter.deltas[SLOT].forms
    nested = LowRank(form.a, form.bt, 2.0, (2, 4, 8), (1.0, 1.5, 2.0))
    forms = (nested, RowScale(np.ones(96, np.float32)))
    made = Adapter("mine", "x", adapter.base, {SLOT: Delta((96, 48), "F32", forms)})
    path = quantise(made, 2, "row").save(tmp_path / "x.safetensors")
    found = facts(path, "--slots")
    assert found["forms"] == {"low_rank r8 ranks 2,4,8 2-bit/row": 1, "row_scale row float32": 1}
    assert found["storage"] == {"2-bit/row": 8 * (48 + 96), "float32": 96}
    assert found["values"] == 8 * (48 + 96) + 96
    assert found["slots"][0]["storage"] == [
        {"a": "2-bit/row", "bt": "2-bit/row"},
        {"values": "float32"},
    ]
    assert "[a 2-bit/row, bt 2-bit/row, values float32]" in inspect(path, "--slots")


def test_a_peft_folder(adapter, tmp_path):
    found = facts(to_peft(adapter, tmp_path / "peft"), "--slots")
    assert (found["kind"], found["type"], found["imports"]) == ("peft", "LORA", "yes")
    assert found["forms"] == {"low_rank r8 float32": 1}
    assert found["slots"][0]["slot"] == SLOT


def test_a_peft_folder_that_cannot_be_imported_says_why(adapter, tmp_path):
    folder = to_peft(adapter, tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    found = facts(folder, "--slots")
    assert found["type"] == "LORA"
    assert str(folder) in found["imports"]
    assert found["slots"] == []


def test_a_peft_folder_without_config_is_named_as_one(adapter, tmp_path):
    folder = to_peft(adapter, tmp_path / "peft")
    (folder / "adapter_config.json").unlink()
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 1
    assert "adapter_config.json" in result.stderr


def test_a_gguf_adapter(adapter, tmp_path):
    path = to_gguf(adapter, tmp_path / "x.gguf", GgufBase(8))
    found = facts(path, "--slots")
    assert (found["kind"], found["adapter.type"]) == ("gguf", "lora")
    assert found["adapter.lora.alpha"] == 16
    assert found["slots"][0] == {"tensor": "blk.0.ffn_up.weight.lora_a", "shape": [8, 48]}
    assert "general.architecture: llama" in inspect(path)
