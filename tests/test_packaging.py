"""The package as it is installed: every module imports, and the light ones are light."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import edge_lora

HEAVY = ["torch", "onnx", "onnxruntime", "transformers", "executorch"]
IMPORT = """
import {module}
"""
HELP = """
import contextlib, io
from edge_lora.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])
"""
PROBE = """
import json, sys, time
start = time.process_time()
{action}
ms = (time.process_time() - start) * 1e3
print(json.dumps([ms, [name for name in {heavy!r} if name in sys.modules]]))
"""


def module_names():
    names = [found.name for found in pkgutil.walk_packages(edge_lora.__path__, "edge_lora.")]
    return [n for n in names if not n.startswith("edge_lora.tests") and "__main__" not in n]


def probe(action, limit_ms):
    """Return (milliseconds of processor time, heavy modules loaded), the best of fresh processes.

    Processor time of one thread, and the best of ten: other work on this machine does not count.
    """
    script = PROBE.format(action=action, heavy=HEAVY)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    best, loaded = float("inf"), set()
    for _ in range(10):
        result = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        ms, found = json.loads(result.stdout)
        loaded.update(found)
        best = min(best, ms)
        if best < limit_ms:
            break
    return best, loaded


def test_all_parts_are_found_by_their_installed_names():
    names = module_names()
    for expected in ("edge_lora.export", "edge_lora.runtime", "edge_lora.methods", "edge_lora.cli"):
        assert expected in names


@pytest.mark.torch
@pytest.mark.ort
def test_every_module_imports():
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    script = f"import importlib\nfor name in {module_names()!r}:\n    importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["edge_lora", "edge_lora.runtime", "edge_lora.cli"])
def test_light_imports_are_fast_and_bring_nothing_heavy(module):
    """Against the import of NumPy, which most of it is: this machine may be slow, or busy."""
    numpy_ms, _ = probe(IMPORT.format(module="numpy"), 0)
    ms, loaded = probe(IMPORT.format(module=module), 3 * numpy_ms)
    assert not loaded
    assert ms < 3 * numpy_ms, f"import {module} takes {ms:.0f} ms, NumPy {numpy_ms:.0f}"


def test_help_is_fast():
    ms, loaded = probe(HELP, 300)
    assert not loaded
    assert ms < 300, f"--help takes {ms:.0f} ms"


def test_the_links_for_type_checkers_are_there():
    package = Path(__file__).parent.parent / "edge_lora"
    for name in ("export", "runtime"):
        assert (package / name / "__init__.py").is_file()
