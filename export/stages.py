"""Progress on stderr: one line per stage, with its time."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from rich.console import Console

logger = logging.getLogger(__name__)


class Stages:
    """Names what the exporter is doing now and how long each stage took."""

    def __init__(self, is_shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not is_shown, highlight=False)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Show ``name`` with a spinner while the block runs."""
        start = time.perf_counter()
        with self.console.status(name):
            yield
        seconds = time.perf_counter() - start
        logger.debug("%s took %.2f s", name, seconds)
        self.console.print(f"  {name:<34}{seconds:7.1f} s")
