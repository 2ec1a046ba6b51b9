"""A lock that many runs share and one swap holds alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class ReadWriteLock:
    """Shared for runs, exclusive for swaps; first come, first served, so neither side starves.

    Not re-entrant: a thread that holds it must not ask for it again. A reader that nobody keeps
    waiting takes it in a fraction of a microsecond: small graphs run in ten.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._condition = threading.Condition(self._mutex)
        self._queue: deque[object] = deque()  # tickets of those who wait, in order of arrival
        self._readers = 0
        self._writing = False
        self._reading = _Reading(self)

    def shared(self) -> AbstractContextManager[None]:
        """Hold the lock together with other readers."""
        return self._reading

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock alone."""
        with self._mutex:
            self._wait(lambda: not self._writing and self._readers == 0)
            self._writing = True
        try:
            yield
        finally:
            with self._mutex:
                self._writing = False
                self._condition.notify_all()

    def _begin_reading(self) -> None:
        with self._mutex:
            if self._writing or self._queue:
                self._wait(lambda: not self._writing)
            self._readers += 1

    def _end_reading(self) -> None:
        with self._mutex:
            self._readers -= 1
            if self._queue:
                self._condition.notify_all()

    def _wait(self, may_enter: Callable[[], bool]) -> None:
        """Wait for one's turn; the caller holds the mutex, and has the turn on return."""
        ticket = object()
        self._queue.append(ticket)
        try:
            self._condition.wait_for(lambda: self._queue[0] is ticket and may_enter())
        finally:
            self._queue.remove(ticket)
            self._condition.notify_all()


class _Reading(AbstractContextManager[None]):
    """The shared side: one object for all readers, as it keeps nothing of any of them."""

    def __init__(self, lock: ReadWriteLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock._begin_reading()

    def __exit__(self, *_: object) -> None:
        self._lock._end_reading()
