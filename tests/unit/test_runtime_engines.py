"""What an engine that is not installed says."""

import sys

import pytest

from edge_lora.errors import EngineUnavailableError
from edge_lora.runtime import open_bundle


def test_a_missing_engine_names_the_next_command(tmp_path, monkeypatch):
    for name in ("executorch_engine", "program_memory"):
        monkeypatch.delitem(sys.modules, f"edge_lora.runtime.engines.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "edge_lora_executorch", None)
    (tmp_path / "model.pte").write_bytes(b"any")
    with pytest.raises(EngineUnavailableError) as caught:
        open_bundle(tmp_path / "model.pte")
    for text in ("edge_lora_executorch is missing", "pip install 'edge-lora[executorch]'"):
        assert text in str(caught.value)
