import threading

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
