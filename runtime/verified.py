"""Hash a bundle's files once per device, and again whenever one of them was touched.

Hashing half a gigabyte takes longer than a swap, so a note in the user's cache remembers which
files (by size, modification time and inode) were found equal to the manifest. ``edge-lora verify``
always hashes.
"""

from __future__ import annotations

import json
from pathlib import Path

from edge_lora.bundle import Manifest, verify_files
from edge_lora.runtime.cache import cache_folder, cache_key, store_bytes


def verify_once(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError if a file differs from the manifest; hash only if one was touched."""
    note = cache_folder("verified") / cache_key(str(folder.resolve()))
    stamp = _stamp(folder, manifest)
    try:
        if stamp is not None and json.loads(note.read_text()) == stamp:
            return
    except (OSError, ValueError):
        pass
    verify_files(folder, manifest)
    store_bytes(note, json.dumps(stamp).encode())  # as it was before the hashing


def _stamp(folder: Path, manifest: Manifest) -> list[list[object]] | None:
    stamp: list[list[object]] = []
    for name, record in sorted(manifest.files.items()):
        try:
            stat = (folder / name).lstat()
        except OSError:
            return None
        stamp.append(
            [name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.sha256]
        )
    return stamp
