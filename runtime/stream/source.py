"""Lines of text as they arrive, from a pipe or from the end of a growing file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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


def lines_of_growing(path: Path) -> Iterator[list[str]]:
    """Yield the lines of a file, and those that are appended to it later; never ends.

    A file that was cut short, or replaced by another, is read from its start.
    """
    while True:
        with path.open("rb", buffering=0) as file:
            rest = b""
            while not _is_other(file.fileno(), path, file.tell()):
                data = file.read(CHUNK_BYTES)
                if not data:
                    time.sleep(POLL_S)
                    continue
                lines, rest = _split(rest + data)
                if lines:
                    yield lines


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
