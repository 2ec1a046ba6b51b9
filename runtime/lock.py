"""A lock that many runs share and one swap holds alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident


class ReadWriteLock:
    """Shared for runs, exclusive for swaps; first come, first served, so neither side starves.

    Not re-entrant: a thread that holds it must not ask for it again, and who took it gives it back.
    A reader that nobody keeps waiting takes it in a fraction of a microsecond: small graphs run in
    ten.

    A signal's exception (Ctrl-C) may come between taking the lock and the block that gives it
    back, or before that has begun. So holders are known by their thread: what one still seems to
    hold when it asks again was lost that way, and is given back then. Until then, others wait.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._condition = threading.Condition(self._mutex)
        self._queue: deque[object] = deque()  # tickets of those who wait, in order of arrival
        self._readers: set[int] = set()  # threads
        self._writer: int | None = None  # the thread that holds it alone
        self._reading = _Reading(self)

    def shared(self) -> AbstractContextManager[None]:
        """Hold the lock together with other readers."""
        return self._reading

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock alone."""
        me = get_ident()
        try:
            with self._mutex:
                self._give_back(me)
                self._wait(lambda: self._writer is None and not self._readers)
                self._writer = me
            yield
        finally:
            with self._mutex:
                self._give_back(me)

    def _begin_reading(self) -> None:
        me = get_ident()
        with self._mutex:
            if self._writer is not None or self._queue:
                self._give_back(me)
                self._wait(lambda: self._writer is None)
            self._readers.add(me)

    def _end_reading(self) -> None:
        me = get_ident()
        with self._mutex:
            self._readers.discard(me)
            if self._queue:
                self._condition.notify_all()

    def _give_back(self, thread: int) -> None:
        """Take away whatever a thread holds; the caller holds the mutex."""
        self._readers.discard(thread)
        if self._writer == thread:
            self._writer = None
        self._condition.notify_all()

    def _wait(self, may_enter: Callable[[], bool]) -> None:
        """Wait for one's turn; the caller holds the mutex, and has the turn on return."""
        ticket = object()
        try:
            self._queue.append(ticket)
            self._condition.wait_for(lambda: self._queue[0] is ticket and may_enter())
        finally:
            if ticket in self._queue:
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
