"""A mapped memory file moves into private memory, under the same addresses."""

import ctypes
import mmap
import os
import sys
from dataclasses import replace

import numpy as np
import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.engines.private_memory import block_at, mappings_of, move_to_private_memory

if sys.platform != "linux":
    pytest.skip("memory files are Linux's", allow_module_level=True)
SIZE = 5 << 20  # more than a huge page, and no multiple of one


@pytest.fixture
def handle():
    found = os.memfd_create("test")
    os.truncate(found, SIZE)
    yield found
    os.close(found)


def test_bytes_and_addresses_stay_and_the_file_is_emptied(handle):
    engine = np.frombuffer(mmap.mmap(handle, SIZE), np.uint8)
    wanted = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    engine[:] = wanted
    (part,) = mappings_of(handle)
    assert (part.start, part.offset) == (engine.ctypes.data, 0)
    move_to_private_memory(handle, [part])
    np.testing.assert_array_equal(engine, wanted)
    assert os.fstat(handle).st_blocks == 0
    block = block_at([part], 4096, 100)
    block[:] = 7  # what is written here, the engine reads
    assert (engine[4096:4196] == 7).all()
    np.testing.assert_array_equal(engine[4196:], wanted[4196:])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_writes_for_itself(handle):
    engine = np.frombuffer(mmap.mmap(handle, SIZE), np.uint8)
    engine[:] = 1
    move_to_private_memory(handle, mappings_of(handle))
    if (child := os.fork()) == 0:
        engine[:] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert (engine == 1).all()


def test_what_cannot_be_moved_is_refused(handle):
    engine = np.frombuffer(mmap.mmap(handle, SIZE), np.uint8)
    engine[:] = 1
    (part,) = mappings_of(handle)
    crooked = replace(part, start=part.start + 1, end=part.start + 1 + mmap.PAGESIZE)
    with pytest.raises(UnsupportedError, match="cannot be moved into private memory"):
        move_to_private_memory(handle, [crooked])
    assert (engine == 1).all()


def test_parts_side_by_side_move_together(handle):
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    room = mmap.mmap(-1, SIZE)
    address = np.frombuffer(room, np.uint8).ctypes.data
    fixed, shared, both = 0x10, 1, 3
    for i, offset in enumerate((SIZE - page, 0)):  # their order in the file is another one
        size = page if i == 0 else SIZE - page
        place = ctypes.c_void_p(address + i * page)
        found = libc.mmap(place, ctypes.c_size_t(size), both, shared | fixed, handle,
                          ctypes.c_long(offset))  # fmt: skip
        assert found == address + i * page
    memory = np.frombuffer(room, np.uint8)
    wanted = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    memory[:] = wanted
    parts = mappings_of(handle)
    assert [part.offset for part in parts] == [SIZE - page, 0]
    move_to_private_memory(handle, parts)
    np.testing.assert_array_equal(memory, wanted)
    np.testing.assert_array_equal(block_at(parts, 0, 10), wanted[page : page + 10])
    np.testing.assert_array_equal(block_at(parts, SIZE - 10, 10), wanted[page - 10 : page])


def test_what_is_mapped_nowhere_is_refused(handle):
    with pytest.raises(UnsupportedError, match="mapped nowhere"):
        block_at(mappings_of(handle), 0, 10)
