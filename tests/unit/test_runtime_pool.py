"""Compiled patches under a byte budget: eviction, the way back from disk, damage."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_lora import Adapter, BaseIdentity, Delta, Sparse
from edge_lora.errors import AdapterFileError
from edge_lora.runtime.adapters import LoadedAdapter, PatchPool
from edge_lora.runtime.adapters import load as load_file

sys.path.insert(0, str(Path(__file__).parent))
from native_images import Packed, image_of

SHAPE = (32, 24)


def load(folder, name, count, seed=0):
    rng = np.random.default_rng(seed)
    index = np.sort(rng.choice(SHAPE[0] * SHAPE[1], count, replace=False)).astype(np.uint32)
    delta = Delta(SHAPE, "F32", (Sparse(index, rng.standard_normal(count).astype(np.float32)),))
    path = folder / f"{name}.safetensors"
    Adapter(name, "test", BaseIdentity("0"), {"w": delta}).save(path)
    return load_file(path, name)


class CountingImage:
    """An image that counts what is compiled and what is read from disk."""

    def __init__(self, image):
        self.image, self.compiled, self.read = image, 0, 0

    def compile(self, parts):
        self.compiled += 1
        return self.image.compile(parts)

    def load_patch(self, path):
        patch = self.image.load_patch(path)
        self.read += 1
        return patch


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "patches"


@pytest.fixture
def slot(tmp_path):
    return Packed(tmp_path, SHAPE)


@pytest.fixture
def image(slot):
    return CountingImage(image_of(slot))


@pytest.fixture
def adapters(tmp_path):
    return [load(tmp_path, name, 40, seed) for seed, name in enumerate("abc")]


def pool_of(image, key, budget):
    return PatchPool(image, key, budget, LoadedAdapter.open)


def size_of(image, adapter):
    return pool_of(image, "size", None).get([(adapter, 1.0)]).nbytes


def test_without_a_budget_everything_stays(image, adapters):
    pool = pool_of(image, "k", None)
    patches = [pool.get([(a, 1.0)]) for a in adapters]
    assert pool.nbytes == sum(p.nbytes for p in patches) > 0
    assert [pool.get([(a, 1.0)]) for a in adapters] == patches
    assert (image.compiled, image.read) == (3, 0)


def test_the_least_recently_used_goes_first_and_comes_back_from_disk(image, adapters):
    a, b, c = ([(adapter, 1.0)] for adapter in adapters)
    pool = pool_of(image, "k", 2 * size_of(image, adapters[0]))
    image.compiled = 0
    first = pool.get(a)
    kept = pool.get(b)
    pool.get(a)  # now b is the oldest
    pool.get(c)
    assert pool.get(a) is first
    assert (image.compiled, image.read) == (3, 0)
    again = pool.get(b)
    assert again is not kept
    assert (image.compiled, image.read) == (3, 1)
    assert (again.nbytes, again.changed) == (kept.nbytes, kept.changed)


def test_a_patch_from_disk_does_what_the_compiled_one_did(slot, image, adapters):
    before = slot.blocks()
    parts = [(adapters[0], 0.5), (adapters[1], -2.0)]
    image.image.swap(pool_of(image, "k", None).get(parts))
    compiled = slot.blocks()
    image.image.swap(None)
    image.image.swap(pool_of(image, "k", None).get(parts))
    assert image.read == 1
    assert [x.tobytes() for x in slot.blocks()] == [x.tobytes() for x in compiled]
    assert [x.tobytes() for x in compiled] != [x.tobytes() for x in before]
    image.image.swap(None)
    assert [x.tobytes() for x in slot.blocks()] == [x.tobytes() for x in before]


DAMAGE = {
    "empty": lambda blob: b"",
    "truncated": lambda blob: blob[: len(blob) // 2],
    "one bit": lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]),
    "junk": lambda blob: b"\xff" * len(blob),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_file_is_made_anew(image, adapters, cache, damage):
    parts = [(adapters[0], 1.0)]
    pool_of(image, "k", None).get(parts)
    (file,) = cache.iterdir()
    sound = file.read_bytes()
    file.write_bytes(DAMAGE[damage](sound))
    pool_of(image, "k", None).get(parts)
    assert (image.compiled, image.read) == (2, 0)
    assert file.read_bytes() == sound


def test_patches_of_another_image_or_weight_are_not_taken(image, adapters):
    for key, weight in (("k", 1.0), ("other", 1.0), ("k", 0.5)):
        pool_of(image, key, None).get([(adapters[0], weight)])
    assert (image.compiled, image.read) == (3, 0)


def test_a_cache_that_cannot_be_written_costs_a_compilation(image, adapters, cache, monkeypatch):
    cache.mkdir(parents=True)
    name = pool_of(image, "k", None).key([(adapters[0], 1.0)])
    (cache / name).mkdir()  # in the way of the file
    patch = pool_of(image, "k", None).get([(adapters[0], 1.0)])
    assert patch.changed == 40


def test_a_file_that_changed_since_it_was_loaded_is_refused(image, adapters, tmp_path):
    loaded = adapters[0]
    load(tmp_path, "a", 40, seed=99)
    with pytest.raises(AdapterFileError, match=r"a\.safetensors' changed since it was loaded"):
        pool_of(image, "k", None).get([(loaded, 1.0)])
    loaded.path.unlink()
    with pytest.raises(AdapterFileError, match="does not exist"):
        pool_of(image, "k", None).get([(loaded, 1.0)])


@pytest.mark.parametrize("budget", [0, 1500, 4000])
def test_the_budget_holds_after_any_walk(budget, tmp_path):
    slot = Packed(tmp_path, SHAPE)
    adapters = [load(tmp_path, str(i), 10 + 30 * i, i) for i in range(5)]

    class Walk(RuleBasedStateMachine):
        @initialize()
        def start(self):
            self.image = image_of(slot)
            self.pool, self.newest = pool_of(self.image, "k", budget), None

        @rule(pick=st.integers(0, 4), weight=st.sampled_from([1.0, 0.5]), swap=st.booleans())
        def get(self, pick, weight, swap):
            parts = [(adapters[pick], weight)]
            self.newest = self.pool.get(parts)
            assert self.newest.changed == 10 + 30 * pick
            if swap:
                self.image.swap(self.newest)

        @rule(pick=st.integers(0, 4))
        def drop(self, pick):
            if self.pool.nbytes:
                self.pool.drop(adapters[pick])

        @invariant()
        def within_budget(self):
            beside = self.newest.nbytes if self.newest else 0
            assert self.pool.nbytes <= max(budget, beside)

        def teardown(self):
            self.image.swap(None)
            assert self.image.differing_slots() == []
            self.image.close()

    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Walk, settings=settings(max_examples=20, stateful_step_count=20, deadline=None)
    )
