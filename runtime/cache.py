"""Derived files in the user's cache folder: layouts, compiled patches, notes of verified bundles.

Everything here can be made again; losing it costs time, never correctness. A file appears whole or
not at all. ``EDGE_LORA_CACHE`` names another folder.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import platformdirs

PATCH_BUDGET_BYTES = 1 << 30  # compiled patches are the only large files; oldest go first


def cache_folder(kind: str) -> Path:
    """Return (and make) the folder for one kind of derived file.

    Where the user's cache cannot be written, as on a read-only system, a temporary folder of this
    process stands in.
    """
    root = os.environ.get("EDGE_LORA_CACHE") or platformdirs.user_cache_dir("edge-lora")
    folder = Path(root) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        folder = Path(_temporary_root()) / kind
        folder.mkdir(exist_ok=True)
    return folder


@lru_cache(maxsize=1)
def _temporary_root() -> str:
    root = tempfile.mkdtemp(prefix="edge-lora-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def cache_key(*parts: object) -> str:
    """Return a file name that is the sha256 of ``parts``, which must be JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def store_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; a full disk or a read-only cache is passed over."""
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(part, path)
        except OSError:
            Path(part).unlink(missing_ok=True)
    except OSError:
        return


def trim(folder: Path, budget_bytes: int = PATCH_BUDGET_BYTES) -> None:
    """Remove the files of ``folder`` that were used longest ago until the rest fits the budget."""
    entries = sorted(
        ((e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in os.scandir(folder)), reverse=True
    )
    total = 0
    for _, size, path in entries:
        total += size
        if total > budget_bytes:
            Path(path).unlink(missing_ok=True)
