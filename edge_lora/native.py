"""The compiled core, and the only place that imports it.

Everything public of ``edge_lora._core`` is re-exported here; its stub ``_core.pyi`` documents it.
"""

from __future__ import annotations

from edge_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BundleError,
    EdgeLoraError,
    EngineUnavailableError,
    NativeError,
    UnsupportedError,
)

ABI_VERSION = 1
"""What these Python sources expect of the compiled core."""

_ERRORS: dict[int, type[EdgeLoraError]] = {
    1: AdapterFileError,
    2: AdapterMismatchError,
    3: UnsupportedError,
    4: BundleError,
}


def error_for(message: str, code: int) -> EdgeLoraError:
    """Return the exception for an ``el_status``; the compiled core calls this."""
    kind = _ERRORS.get(code)
    return kind(message) if kind else NativeError(message, code)


def library_path() -> str:
    """Return the file of the compiled core, for ``SessionOptions.register_custom_ops_library``."""
    return str(_core.__file__)


try:
    from edge_lora import _core
    from edge_lora._core import (
        AdapterFile,
        Image,
        Layout,
        Patch,
        SwapStats,
        abi_version,
        allocator_stats,
        allocator_status,
        cpu_features,
        live_blocks,
    )
except ImportError as error:
    raise EngineUnavailableError(
        "compiled core not found (edge_lora._core). Build it with: pip install -e ."
    ) from error

if abi_version() != ABI_VERSION:
    raise EngineUnavailableError(
        f"compiled core has ABI version {abi_version()}, these Python sources expect "
        f"{ABI_VERSION}: they are of different builds. Build again with: pip install -e ."
    )

__all__ = [
    "ABI_VERSION",
    "AdapterFile",
    "Image",
    "Layout",
    "Patch",
    "SwapStats",
    "abi_version",
    "allocator_stats",
    "allocator_status",
    "cpu_features",
    "error_for",
    "library_path",
    "live_blocks",
]
