"""Ctrl-C and a service manager's SIGTERM, for a command that works through a stream."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any


class Stop:
    """SIGINT and SIGTERM end a stream between two lines, so that its report comes.

    They end the wait for lines at once, but nothing that is being computed, unless they come twice.
    """

    def __init__(self) -> None:
        self._is_asked = self._is_waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        """Take over both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as for a script's background jobs
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def lines(self, chunks: Iterator[list[str]]) -> Iterator[Iterable[str]]:
        """Yield the lines that arrive together, up to that at which a signal asks to stop."""
        while not self._is_asked:
            self._is_waiting = True
            try:
                lines = next(chunks, None)
            finally:
                self._is_waiting = False
            if lines is None:
                return
            yield takewhile(lambda _: not self._is_asked, lines)

    def _ask(self, *_: object) -> None:
        is_again, self._is_asked = self._is_asked, True
        if self._is_waiting or is_again:
            raise KeyboardInterrupt
