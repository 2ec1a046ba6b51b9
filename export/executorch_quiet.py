"""Hold back what ExecuTorch prints, warns and logs; keep it for the message if something fails."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator

_NATIVE_LINE = re.compile(r"^\[[\w.]+:\d+\] .*$", re.MULTILINE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let only exceptions out of what runs inside, Python's own side of it.

    ExecuTorch also configures the root logger when it is imported, which is for programs to do.
    """
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)


@contextlib.contextmanager
def native_log() -> Iterator[list[str]]:
    """Divert what the C++ runtime writes to stderr, by itself or through Python's.

    Yields its lines, complete after the block.
    """
    lines: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file, io.StringIO() as text:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(text):
                yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            written = file.read().decode(errors="replace") + text.getvalue()
            lines += _NATIVE_LINE.findall(written)
