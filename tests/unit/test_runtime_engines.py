"""What an engine that is not installed says."""

import sys

import pytest

from edge_lora.errors import EngineUnavailableError
from edge_lora.runtime import open_bundle


def test_an_engine_without_its_libraries_names_the_next_command(tmp_path, monkeypatch):
    for name in ("executorch_engine", "program_memory"):
        monkeypatch.delitem(sys.modules, f"edge_lora.runtime.engines.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "edge_lora_executorch", raising=False)
    (tmp_path / "edge_lora_executorch.py").write_text("raise ImportError('libxnnpack.so: gone')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.pte").write_bytes(b"any")
    with pytest.raises(EngineUnavailableError) as caught:
        open_bundle(tmp_path / "model.pte")
    for text in ("libxnnpack.so: gone", "pip install --force-reinstall 'edge-lora[executorch]'"):
        assert text in str(caught.value)


def test_a_missing_engine_names_the_next_command(tmp_path, monkeypatch):
    for name in ("executorch_engine", "program_memory"):
        monkeypatch.delitem(sys.modules, f"edge_lora.runtime.engines.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "edge_lora_executorch", None)
    (tmp_path / "model.pte").write_bytes(b"any")
    with pytest.raises(EngineUnavailableError) as caught:
        open_bundle(tmp_path / "model.pte")
    for text in ("edge_lora_executorch is missing", "pip install 'edge-lora[executorch]'"):
        assert text in str(caught.value)
