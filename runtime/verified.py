"""Check a bundle's content once per device, and again whenever a file or its manifest was touched.

Hashing half a gigabyte takes longer than a swap, so a note in the user's cache remembers which
files (by size, modification time and inode) were found equal to the manifest, and that every weight
lies where the manifest says. ``edge-lora verify`` always hashes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from edge_lora.bundle import Manifest, verify_files
from edge_lora.bundle_check import verify_slots
from edge_lora.bundle_program import program_record
from edge_lora.runtime.cache import cache_folder, cache_key, store_bytes


def verify_once(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError if a file or a slot's weight in it differs from the manifest.

    Hashes only if something was touched.
    """
    note = cache_folder("verified") / cache_key(str(folder.resolve()))
    stamp = _stamp(folder, manifest)
    try:
        if stamp is not None and json.loads(note.read_text()) == stamp:
            return
    except (OSError, ValueError):
        pass
    verify_files(folder, manifest)
    verify_slots(folder, manifest)
    store_bytes(note, json.dumps(stamp).encode())  # as it was before the hashing


def _stamp(folder: Path, manifest: Manifest) -> list[list[object]] | None:
    stamp: list[list[object]] = [["weights", _places(manifest)]]
    for name, record in sorted(manifest.files.items()):
        try:
            stat = (folder / name).lstat()
        except OSError:
            return None
        stamp.append(
            [name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.sha256]
        )
    return stamp


def _places(manifest: Manifest) -> str:
    """Return a digest of what every slot must hold, and of where it is said to lie."""
    slots = {slot.name: slot.sha256 for slot in manifest.slots.values()}
    stored = {name: asdict(place) for name, place in manifest.stored.items()}
    return cache_key(slots, stored, manifest.program and program_record(manifest.program))
