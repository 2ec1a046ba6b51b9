"""A command whose packages are not installed says how to install them."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from edge_lora.cli import COMMANDS, main

WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
from edge_lora.cli import main
main({arguments!r}, prog_name="edge-lora")
"""
TORCH = ("torch", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


def run_without(blocked, *arguments):
    code = WITHOUT.format(blocked=blocked, arguments=arguments)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train", "--skill", "roman", "-o", "x.safetensors"), "train"),
        (("export", "-o", "x"), "train,export"),
    ],
    ids=["train", "export"],
)
def test_a_missing_package_is_one_message(arguments, extra, tmp_path):
    arguments = [str(tmp_path / a) if a.startswith("x") else a for a in arguments]
    found = run_without(TORCH, *arguments)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert found.stderr.count(f"pip install 'edge-lora[{extra}]'") == 1


def test_run_without_its_tokenizer_package(tmp_path):
    (tmp_path / "bundle.json").touch()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    found = run_without((*TORCH, "tokenizers"), "run", str(tmp_path), "--prompt", "x")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert found.stderr.count("pip install tokenizers") == 1


def test_a_missing_module_of_our_own_is_a_bug_and_stays_one(monkeypatch):
    monkeypatch.setitem(COMMANDS, "methods", "edge_lora.cli.gone")
    result = CliRunner().invoke(main, ["methods"])
    assert isinstance(result.exception, ModuleNotFoundError)
