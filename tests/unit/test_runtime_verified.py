"""Bundles are hashed once per device, and again when a file was touched."""

import dataclasses
import hashlib
import os

import pytest

from edge_lora.bundle import FileRecord, Manifest, StoredSlot
from edge_lora.errors import BundleError
from edge_lora.runtime import verified
from edge_lora.slots import Slot, SlotTable


@pytest.fixture(autouse=True)
def hashed(tmp_path, monkeypatch):
    """Use a cache of our own, and count how often files are hashed."""
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path / "cache"))
    calls, verify_files = [], verified.verify_files

    def counting(folder, manifest):
        calls.append(folder)
        verify_files(folder, manifest)

    monkeypatch.setattr(verified, "verify_files", counting)
    return calls


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "bundle"
    made.mkdir()
    (made / "weights.bin").write_bytes(b"12345678")
    return made


@pytest.fixture
def manifest():
    record = FileRecord(8, hashlib.sha256(b"12345678").hexdigest())
    return Manifest("b", "f", "generic", SlotTable([]), {}, (), (), {"weights.bin": record})


def test_hashed_once(folder, manifest, hashed):
    for _ in range(3):
        verified.verify_once(folder, manifest)
    assert len(hashed) == 1


def test_hashed_again_when_touched(folder, manifest, hashed):
    verified.verify_once(folder, manifest)
    os.utime(folder / "weights.bin", ns=(1, 1))
    verified.verify_once(folder, manifest)
    assert len(hashed) == 2


def test_a_changed_file_is_refused_every_time(folder, manifest, hashed):
    verified.verify_once(folder, manifest)
    (folder / "weights.bin").write_bytes(b"1234567x")
    os.utime(folder / "weights.bin", ns=(1, 1))
    for _ in range(2):
        with pytest.raises(BundleError, match=r"weights\.bin has sha256"):
            verified.verify_once(folder, manifest)
    assert len(hashed) == 3


def test_a_replaced_file_of_equal_size_and_time_is_noticed(folder, manifest, hashed):
    path = folder / "weights.bin"
    verified.verify_once(folder, manifest)
    stat = path.stat()
    other = folder / "other"
    other.write_bytes(b"1234567x")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)  # another inode
    with pytest.raises(BundleError, match="changed after export"):
        verified.verify_once(folder, manifest)


def test_a_missing_file_is_refused(folder, manifest):
    verified.verify_once(folder, manifest)
    (folder / "weights.bin").unlink()
    with pytest.raises(BundleError, match="missing"):
        verified.verify_once(folder, manifest)


def test_another_manifest_for_the_same_files_is_not_trusted(folder, manifest, hashed):
    verified.verify_once(folder, manifest)
    other = dataclasses.replace(manifest, files={"weights.bin": FileRecord(8, "0" * 64)})
    with pytest.raises(BundleError):
        verified.verify_once(folder, other)


@pytest.mark.parametrize("note", [b"", b"junk{", b"[]", b"\xff\xfe"])
def test_a_damaged_note_means_hashing_again(folder, manifest, hashed, note, tmp_path):
    verified.verify_once(folder, manifest)
    (kept,) = (tmp_path / "cache" / "verified").iterdir()
    kept.write_bytes(note)
    verified.verify_once(folder, manifest)
    assert len(hashed) == 2


def test_another_place_of_a_weight_is_not_trusted(folder, hashed):
    values = b"1234"
    digest = hashlib.sha256(values).hexdigest()
    slot = Slot("w", (1, 1), "F32", digest)
    place = StoredSlot("weights.bin", 0, "oi", "w")
    record = FileRecord(8, hashlib.sha256(b"12345678").hexdigest())
    first = Manifest("b", "f", "generic", SlotTable([slot]), {"w": place}, (), (),
                     {"weights.bin": record})  # fmt: skip
    verified.verify_once(folder, first)
    other = dataclasses.replace(first, stored={"w": dataclasses.replace(place, offset=4)})
    for _ in range(2):
        with pytest.raises(BundleError, match="w: the bytes in"):
            verified.verify_once(folder, other)
    verified.verify_once(folder, first)
    assert len(hashed) == 3
