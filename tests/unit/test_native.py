"""native.py: the mapping of errors, and what is said where the core is missing or stale."""

import subprocess
import sys

import pytest

from edge_lora import errors, native


def test_codes_become_errors():
    for code, kind in (
        (1, errors.AdapterFileError),
        (2, errors.AdapterMismatchError),
        (3, errors.UnsupportedError),
        (4, errors.BundleError),
        (5, errors.NativeError),
        (8, errors.NativeError),
    ):
        error = native.error_for("text", code)
        assert type(error) is kind
        assert str(error) == "text"
        assert getattr(error, "code", code) == code


IMPORT = """
try:
    import edge_lora.native
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            "import sys; sys.modules['edge_lora._core'] = None",
            "compiled core not found (edge_lora._core). Build it with: pip install -e .",
        ),
        (
            "import edge_lora, sys, unittest.mock as m; core = m.MagicMock(abi_version=lambda: 0); "
            "sys.modules['edge_lora._core'] = edge_lora._core = core",
            "compiled core has ABI version 0, these Python sources expect 1",
        ),
    ],
    ids=["missing", "stale"],
)
def test_what_is_said_without_a_fitting_core(prepare, message):
    command = [sys.executable, "-c", prepare + "\n" + IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"EngineUnavailableError {message}")


def test_features_name_the_machine():
    assert native.cpu_features().split()[0] in ("x86_64", "aarch64", "riscv64")


def test_a_path_that_is_not_text():
    with pytest.raises(errors.AdapterFileError, match="nowhere"):
        native.AdapterFile("/nowhere/é")
