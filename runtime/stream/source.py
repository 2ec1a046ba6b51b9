"""Lines of text as they arrive, from a pipe or from the end of a growing file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from edge_lora.errors import UnsupportedError

CHUNK_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 24  # a wide line of a million series; more is no CSV
POLL_S = 0.1


def lines_of(descriptor: int) -> Iterator[list[str]]:
    """Yield the lines that arrived together, without their ends; waits for more until the end.

    Args:
        descriptor: Of an open file or pipe. Bytes that are no UTF-8 become U+FFFD.

    Raises:
        UnsupportedError: If a line is longer than 16 MiB.
    """
    rest = b""
    while data := os.read(descriptor, CHUNK_BYTES):
        lines, rest = _split(rest + data)
        if lines:
            yield lines
    if rest:
        yield [_text(rest)]


def lines_of_growing(
    path: Path, on_restart: Callable[[], None] = lambda: None
) -> Iterator[list[str]]:
    """Yield the lines of a file, and those that are appended to it later; never ends.

    Args:
        path: A file that was cut short is read from its start. One that was replaced by another is
            read to its end before that.
        on_restart: Is called before a file is read from its start again.
    """
    while True:
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:  # moved away a moment ago
            time.sleep(POLL_S)
            continue
        with file:
            yield from _until_other(file, path)
        on_restart()


def _until_other(file: FileIO, path: Path) -> Iterator[list[str]]:
    """Yield the lines of an open file until there is another at ``path``."""
    rest, is_other = b"", False
    while True:
        data = file.read(CHUNK_BYTES)
        if data:
            lines, rest = _split(rest + data)
            if lines:
                yield lines
        elif is_other:  # and what was written before it was replaced is read
            break
        else:
            is_other = _is_other(file.fileno(), path, file.tell())
            if not is_other:
                time.sleep(POLL_S)
    if rest:
        yield [_text(rest)]


def _split(data: bytes) -> tuple[list[str], bytes]:
    """Return the whole lines, and what begins the next one."""
    *lines, rest = data.split(b"\n")
    if len(rest) > LONGEST_LINE_BYTES:
        raise UnsupportedError(
            f"a line is longer than {LONGEST_LINE_BYTES:,} bytes; this is no CSV: {rest[:40]!r} …"
        )
    return [_text(line) for line in lines], rest


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "replace")


def _is_other(descriptor: int, path: Path, position: int) -> bool:
    """Whether the file at ``path`` is not the open one any more, or shorter than what was read."""
    ours = os.fstat(descriptor)
    try:
        now = path.stat()
    except OSError:  # moved away, and nothing in its place yet
        return False
    return (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino) or now.st_size < position
