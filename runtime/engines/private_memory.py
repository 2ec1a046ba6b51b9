"""Move a mapped memory file into private memory of this process, under the same addresses.

A memory file is shared: what a forked process writes there, its parent computes with. And it has no
huge pages where the system does not give it any, plain memory has: patches touch weights all over,
every run reads all of them, and on pages of 4 KiB both wait for the processor to look up addresses.
Whoever mapped the file sees the same bytes at the same place.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.errors import UnsupportedError

HUGE = 2 << 20
_CHUNK = 16 * HUGE  # how much lies twice in memory while it is moved
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2


@dataclass(frozen=True)
class Mapped:
    """A part of a file in this process: addresses [start, end) hold the file from ``offset``."""

    start: int
    end: int
    offset: int


def mappings_of(handle: int) -> list[Mapped]:
    """Return where this process has mapped an open file, by address."""
    status = os.fstat(handle)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, where, inode, *_ = line.split(maxsplit=5)
        if inode == str(status.st_ino) and where == device:
            start, end = (int(address, 16) for address in span.split("-"))
            found.append(Mapped(start, end, int(offset, 16)))
    return found


def block_at(mapped: Sequence[Mapped], offset: int, size: int) -> NDArray[np.uint8]:
    """Return the memory under which ``size`` bytes of a file from ``offset`` are mapped.

    Raises:
        UnsupportedError: If no part holds all of them.
    """
    for part in mapped:
        if part.offset <= offset and offset + size <= part.offset + part.end - part.start:
            address = part.start + offset - part.offset
            return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    raise UnsupportedError(f"{size} bytes of the engine's packed weights are mapped nowhere")


def move_to_private_memory(handle: int, mapped: Sequence[Mapped]) -> None:
    """Put plain memory with the same bytes under the addresses of ``mapped``, and empty the file.

    Nobody may write there meanwhile; who maps the file elsewhere sees no more of it. Pages are huge
    where the system gives such to memory that asks.

    Raises:
        UnsupportedError: If some of it cannot be moved; the file is as it was, use it no more.
    """
    for start, end in _runs(mapped):
        edges = sorted({start, end, *range(-(-start // _CHUNK) * _CHUNK, end, _CHUNK)})
        for low, high in itertools.pairwise(edges):
            if not _move(low, high - low):
                raise UnsupportedError(
                    f"{high - low} bytes of the engine's packed weights cannot be moved into "
                    f"private memory: {os.strerror(ctypes.get_errno())}"
                )
    punch = _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE
    for part in mapped:
        _libc.fallocate(handle, punch, part.offset, part.end - part.start)


def _runs(mapped: Sequence[Mapped]) -> Iterator[tuple[int, int]]:
    """Yield address ranges without gaps."""
    start = end = 0
    for part in sorted(mapped, key=lambda part: part.start):
        if part.start != end:
            if end:
                yield start, end
            start = part.start
        end = part.end
    if end:
        yield start, end


def _move(address: int, size: int) -> bool:
    """Replace one range; huge pages are moved whole between addresses alike modulo 2 MiB."""
    room = _libc.mmap(
        None,
        size + 2 * HUGE,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        -1,
        0,
    )
    if room == _FAILED:
        return False
    copy = room + (address - room) % HUGE
    _libc.madvise(copy, size, mmap.MADV_HUGEPAGE)
    ctypes.memmove(copy, address, size)
    moved = _libc.mremap(copy, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, address)
    _libc.munmap(room, copy - room)
    _libc.munmap(copy + size, room + size + 2 * HUGE - copy - size)
    if moved == _FAILED:
        _libc.munmap(copy, size)
    return bool(moved == address)


_libc = ctypes.CDLL(None, use_errno=True)
_FAILED = ctypes.c_void_p(-1).value
_size, _address, _int = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
_libc.mmap.restype = _libc.mremap.restype = _address
_libc.mmap.argtypes = [_address, _size, _int, _int, _int, ctypes.c_long]
_libc.mremap.argtypes = [_address, _size, _size, _int, _address]
_libc.munmap.argtypes = [_address, _size]
_libc.madvise.argtypes = [_address, _size, _int]
_libc.fallocate.argtypes = [_int, _int, ctypes.c_int64, ctypes.c_int64]
