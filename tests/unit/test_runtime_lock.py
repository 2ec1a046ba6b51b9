import signal
import sys
import threading
import time

import pytest

from edge_lora.runtime.lock import ReadWriteLock


def test_readers_share_and_a_writer_is_alone():
    lock, inside, most, torn = ReadWriteLock(), [0], [0], []
    guard = threading.Lock()

    def read():
        for _ in range(200):
            with lock.shared():
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                with guard:
                    inside[0] -= 1

    def write():
        for _ in range(50):
            with lock.exclusive():
                torn.append(inside[0])

    threads = [threading.Thread(target=t) for t in (read, read, read, write, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert torn == [0] * 100


def test_a_waiting_writer_goes_before_later_readers():
    lock, order = ReadWriteLock(), []
    first = threading.Event()

    def write():
        with lock.exclusive():
            order.append("writer")

    def late_read():
        with lock.shared():
            order.append("late reader")

    with lock.shared():
        writer = threading.Thread(target=write)
        writer.start()
        while not lock._queue:
            first.wait(0.001)
        reader = threading.Thread(target=late_read)
        reader.start()
        while len(lock._queue) < 2:
            first.wait(0.001)
        assert order == []
    writer.join(5)
    reader.join(5)
    assert order == ["writer", "late reader"]


class Interrupt(BaseException):
    """What a signal raises."""


def take(lock, how):
    with lock.shared() if how == "shared" else lock.exclusive():
        pass


def interrupted_at(use, moment):
    """Call ``use``; raise at the ``moment``-th begin or end of a function, where signals come.

    Returns whether there were so many.
    """
    count = [0]

    def trace(frame, event, arg):
        if event in ("call", "return"):
            count[0] += 1
            if count[0] == moment:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        use()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def within(seconds, use):
    """Call ``use`` in this thread; fail instead of waiting for ever."""

    def fail(*_):
        raise AssertionError("the lock is held by nobody and cannot be had")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        use()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("how", ["shared", "exclusive"])
@pytest.mark.parametrize("then", ["shared", "exclusive"])
def test_an_interrupt_at_any_moment_loses_no_release(how, then):
    for moment in range(1, 200):
        lock = ReadWriteLock()
        if not interrupted_at(lambda lock=lock: take(lock, how), moment):
            break
        within(5, lambda lock=lock: take(lock, then))
        within(5, lambda lock=lock: take(lock, "exclusive"))
        assert not lock._queue
        assert not lock._readers
        assert lock._writer is None
    assert moment > 5


def test_signals_while_runs_follow_each_other_lose_no_release():
    lock, stop = ReadWriteLock(), time.monotonic() + 0.5

    def interrupt(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupts = 0
    try:
        while time.monotonic() < stop:
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4 + interrupts % 7 * 3e-5)
                while True:
                    take(lock, "shared")
            except Interrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 50
    assert not lock._mutex.locked()
    within(5, lambda: take(lock, "exclusive"))
