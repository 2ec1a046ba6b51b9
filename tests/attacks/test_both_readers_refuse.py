"""Hostile files, given to the NumPy reader and to the compiled core: both refuse the same ones."""

import hashlib
import json
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_lora import Adapter, LowRank
from edge_lora.errors import AdapterFileError

sys.path.insert(0, str(Path(__file__).parent))
import hostile_coded as coded
import hostile_files as files
import hostile_kinds as kinds

native = pytest.importorskip("edge_lora.native", exc_type=ImportError)

READERS = {"numpy": Adapter.load, "core": native.AdapterFile}
SOUND = {**files.SOUND, **coded.SOUND, **kinds.SOUND}
HOSTILE = {
    **files.HOSTILE,
    **{f"codes: {name}": blob for name, blob in coded.HOSTILE.items()},
    **{f"kinds: {name}": blob for name, blob in kinds.HOSTILE.items()},
}


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(case, read, tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(AdapterFileError) as caught:
        read(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", SOUND)
def test_sound_and_equal(case, tmp_path):
    path = tmp_path / "sound.safetensors"
    path.write_bytes(SOUND[case])
    adapter, core = Adapter.load(path), native.AdapterFile(str(path))
    (slot,) = adapter.deltas
    stacked = core.low_rank(slot)
    only_low_rank = all(isinstance(form, LowRank) for form in adapter.deltas[slot].forms)
    assert (stacked is not None) == only_low_rank


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "dangling link", "proc"])
def test_not_a_plain_file(kind, read, tmp_path):
    path = tmp_path / "x"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
        case "proc":
            path = Path("/proc/self/environ")
    with pytest.raises(AdapterFileError, match=path.name):
        read(str(path))


def test_sparse_file_that_claims_terabytes(read, tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2) + b"{}")
        file.truncate(1 << 40)
    with pytest.raises(AdapterFileError, match="bytes"):
        read(str(path))


def test_a_link_to_a_sound_file_is_read(read, tmp_path):
    (tmp_path / "sound").write_bytes(files.SOUND["sparse"])
    (tmp_path / "link").symlink_to("sound")
    read(str(tmp_path / "link"))


def test_core_keeps_what_it_checked(tmp_path):
    """The file may change or shrink after it was opened: what was checked is what is used."""
    path = tmp_path / "a"
    path.write_bytes(files.SOUND["low rank"])
    core = native.AdapterFile(str(path))
    before = core.low_rank("w")
    os.truncate(path, 0)
    np.testing.assert_array_equal(core.low_rank("w")[0], before[0])


def test_many_tensors(read, tmp_path):
    """A header of 100,000 tensors that belong to nothing is refused in reasonable time."""
    outer = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    path = tmp_path / "many"
    path.write_bytes(files.file_of(outer, b"", files.inner_of(b"", [], slots={})))
    start = time.perf_counter()
    with pytest.raises(AdapterFileError):
        read(str(path))
    assert time.perf_counter() - start < 30, "not linear in the number of tensors"


def accepted(path):
    """Return for each reader whether it takes the file."""
    found = []
    for read in READERS.values():
        try:
            read(str(path))
            found.append(True)
        except AdapterFileError:
            found.append(False)
    return found


def test_random_damage(tmp_path):
    """Whatever a few flipped bytes do, both readers agree on whether the file is sound."""
    rng = np.random.default_rng(5)
    path = tmp_path / "damaged"
    for blob in SOUND.values():
        for _ in range(40):
            damaged = np.frombuffer(blob, np.uint8).copy()
            at = rng.integers(0, damaged.size, 2)
            damaged[at] = rng.integers(0, 256, 2)
            path.write_bytes(damaged.tobytes())
            numpy, core = accepted(path)
            assert numpy == core, damaged.tobytes()


ODD = [
    0,
    1,
    2,
    3,
    4,
    5,
    16,
    -1,
    2**32,
    2**64,
    0.5,
    -0.0,
    1e300,
    None,
    True,
    "",
    "row",
    "add",
    [],
    {},
]


def edit(holder, rng):
    """Replace, drop or double one thing somewhere in a header, and maybe another."""
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key = keys[rng.integers(len(keys))]
    if isinstance(holder[key], dict | list) and rng.random() < 0.8:
        edit(holder[key], rng)
    elif rng.random() < 0.2:
        del holder[key]
    elif isinstance(holder, list) and rng.random() < 0.3:
        holder.insert(key, holder[key])
    else:
        holder[key] = ODD[rng.integers(len(ODD))]


def test_random_edits_behind_the_hash(tmp_path):
    """Headers that say something else, tensors of other bytes: both readers agree again."""
    rng, path, sound = np.random.default_rng(7), tmp_path / "edited", 0
    for blob in SOUND.values():
        size = 8 + int.from_bytes(blob[:8], "little")
        for _ in range(30):
            outer, data = json.loads(blob[8:size]), np.frombuffer(blob[size:], np.uint8).copy()
            inner = json.loads(outer.pop("__metadata__")["edge_lora"])
            if data.size and rng.random() < 0.5:
                data[rng.integers(data.size)] = rng.integers(256)
            else:
                edit(inner.get(("slots", "codebooks")[rng.integers(2)], {}), rng)
            inner["tensors_sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
            path.write_bytes(files.file_of(outer, data.tobytes(), inner))
            numpy, core = accepted(path)
            assert numpy == core, path.read_bytes()
            sound += core
    assert 100 < sound < 0.9 * 30 * len(SOUND)
