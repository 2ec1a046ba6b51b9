"""A cache inside the graph belongs to one decoder until anybody else runs."""

import threading
from contextlib import contextmanager

import numpy as np

from edge_lora.runtime.kv_static import StaticCache

LENGTH = 16


class Remembering:
    """A graph whose logits are the sum of all tokens that its cache holds."""

    def __init__(self):
        self.cache = np.full(LENGTH, 1000)  # what is behind the last token must not matter
        self.runs, self.fed = 0, []
        self._turn = threading.RLock()

    @contextmanager
    def alone(self):
        with self._turn:
            yield

    def value(self, array):
        return array

    numpy = value

    def run_values(self, feeds):
        self.runs += 1
        (start,), ids = feeds["start"], feeds["input_ids"][0]
        self.fed.append((int(start), ids.tolist()))
        self.cache[start : start + ids.size] = ids
        sums = self.cache[: start + ids.size].cumsum()[start:]
        return {"logits": sums[None, :, None].astype(np.float32)}


def step(cache, engine, tokens):
    ids = np.array([tokens], np.int64)
    return float(cache.run(engine, ids, np.ones_like(ids), {})[0, 0])


def test_each_token_runs_once():
    engine, cache = Remembering(), StaticCache(LENGTH)
    assert step(cache, engine, [1, 2, 3]) == 6
    assert step(cache, engine, [1, 2, 3, 4]) == 10
    assert engine.fed == [(0, [1, 2, 3]), (3, [4])]
    assert (cache.filled, cache.rebuilds) == (4, 0)


def test_a_run_of_another_takes_the_cache_away():
    engine, one, two = Remembering(), StaticCache(LENGTH), StaticCache(LENGTH)
    step(one, engine, [1, 2, 3])
    assert step(two, engine, [5]) == 5
    assert step(one, engine, [1, 2, 3, 4]) == 10
    assert engine.fed[-1] == (0, [1, 2, 3, 4])
    assert (one.rebuilds, two.rebuilds) == (1, 0)
    assert step(two, engine, [5, 6]) == 11
    assert two.rebuilds == 1


def test_a_cleared_cache_is_filled_again():
    engine, cache = Remembering(), StaticCache(LENGTH)
    cache.clear()
    assert cache.rebuilds == 0
    step(cache, engine, [1, 2])
    cache.clear()
    assert step(cache, engine, [1, 2, 3]) == 6
    assert (engine.fed[-1], cache.rebuilds) == ((0, [1, 2, 3]), 1)


def test_threads_never_read_each_others_cache():
    engine = Remembering()
    wrong = []

    def decode(first):
        cache, tokens = StaticCache(LENGTH), [first]
        for token in range(1, 12):
            if step(cache, engine, tokens) != sum(tokens):
                wrong.append(tokens)
            tokens = [*tokens, token]

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
