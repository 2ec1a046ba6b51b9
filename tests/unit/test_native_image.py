"""An image through long lives: whatever was done, the base comes back to the bit."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_lora import Block, LowRank, Sparse, native, reference
from edge_lora.errors import BundleError, EdgeLoraError

sys.path.insert(0, str(Path(__file__).parent))
from native_images import Packed, adapter_file, image_of

SHAPES = {"a": (32, 40), "b": (17, 300)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return slots of several layouts and adapters of several forms over one or both."""
    folder = tmp_path_factory.mktemp("world")
    slots = {
        "a": Packed(folder, SHAPES["a"], ("panels", "oi"), "oi", 1, "a"),
        "b": Packed(folder, SHAPES["b"], ("shuffled",), "io", 2, "b"),
    }
    rng = np.random.default_rng(3)

    def low_rank(slot):
        out_features, in_features = SHAPES[slot]
        a, b = rng.standard_normal((2, in_features)), rng.standard_normal((2, out_features))
        return LowRank(a.astype(np.float16), b.astype(np.float16), 0.1)

    def sparse(slot, mode="add"):
        size = int(np.prod(SHAPES[slot]))
        indices = np.sort(rng.choice(size, size // 5, replace=False)).astype(np.uint32)
        return Sparse(indices, rng.standard_normal(indices.size).astype(np.float32), 1.0, mode)

    def rows(slot):
        values = rng.standard_normal((2, SHAPES[slot][1])).astype(np.float32)
        return Block("row", np.array([0, 3], np.uint32), values)

    forms = {
        "low": {"a": [low_rank("a")], "b": [low_rank("b")]},
        "sparse": {"a": [sparse("a")], "b": [sparse("b")]},
        "half": {"b": [rows("b")]},
        "mixed": {"a": [low_rank("a"), sparse("a")], "b": [sparse("b")]},
        "set": {"a": [sparse("a", "set")]},
    }
    files = {n: adapter_file(folder, f, SHAPES, name=n) for n, f in forms.items()}
    return slots, forms, files


def wanted_of(world, parts):
    slots, forms, _ = world
    terms = {"a": [], "b": []}
    for name, weight in parts:
        for slot, these in forms[name].items():
            terms[slot] += [(form, weight) for form in these]
    return {
        name: reference.apply(slot.weight, terms[name]) if terms[name] else slot.weight
        for name, slot in slots.items()
    }


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("swap"), st.sampled_from(["low", "sparse", "half", "mixed", "set"])),
        st.tuples(st.just("base"), st.none()),
        st.tuples(
            st.just("compose"),
            st.lists(
                st.tuples(
                    st.sampled_from(["low", "sparse", "half", "mixed"]),
                    st.sampled_from([0.5, 1.0, -2.0]),
                ),
                min_size=1,
                max_size=3,
            ),
        ),
        st.tuples(st.just("refuse"), st.none()),
        st.tuples(st.just("reload"), st.sampled_from(["low", "sparse", "mixed"])),
    ),
    max_size=12,
)


@given(STEPS, st.integers(1, 3))
@settings(max_examples=25)
def test_any_life(world, tmp_path_factory, steps, threads):
    slots, _, files = world
    image = image_of(*slots.values(), threads=threads)
    before = {name: slot.blocks() for name, slot in slots.items()}
    sha, resident = image.sha256(), {}
    path = tmp_path_factory.getbasetemp() / "patch"
    parts = []
    try:
        for kind, what in steps:
            match kind:
                case "swap":
                    parts = [(what, 1.0)]
                    if what not in resident:
                        resident[what] = image.compile([(files[what], 1.0)])
                    image.swap(resident[what])
                case "base":
                    parts = []
                    image.swap(None)
                case "compose":
                    parts = what
                    image.swap(image.compile([(files[n], w) for n, w in parts]))
                case "refuse":
                    with pytest.raises(EdgeLoraError):
                        image.compile([(files["set"], 1.0), (files["low"], 1.0)])
                case "reload":
                    parts = [(what, 1.0)]
                    image.compile([(files[what], 1.0)]).save(str(path))
                    image.swap(image.load_patch(str(path)))
            for name, wanted in wanted_of(world, parts).items():
                for weight in slots[name].weights():
                    assert weight.tobytes() == wanted.tobytes()
    finally:
        image.swap(None)
    assert image.sha256() == sha
    for name, blocks in before.items():
        for block, (_, _, now) in zip(blocks, slots[name].places, strict=True):
            assert block.tobytes() == now.tobytes()


def test_calls_from_many_threads_take_turns(world):
    slots, _, files = world
    image = image_of(*slots.values())
    sha = image.sha256()
    patches = [image.compile([(files[n], 1.0)]) for n in ("low", "sparse", "mixed")]
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(30):
                match rng.integers(3):
                    case 0:
                        image.swap(patches[rng.integers(3)])
                    case 1:
                        image.compile([(files["half"], 1.0)])
                    case _:
                        image.swap(None)
        except EdgeLoraError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    image.swap(None)
    assert image.sha256() == sha


def test_a_patch_outlives_its_adapter_and_is_freed_after_its_image(world):
    slots, _, files = world
    image = image_of(*slots.values())
    patch = image.compile([(files["low"], 1.0)])
    image.swap(patch)
    image.swap(None)
    del image
    assert patch.changed == sum(int(np.prod(shape)) for shape in SHAPES.values())


def test_poke(world):
    slots, _, _ = world
    image = image_of(*slots.values())
    old = image.poke("a", 41, 7.0)
    assert old == slots["a"].weight[1, 1]
    assert all(weight[1, 1] == 7.0 for weight in slots["a"].weights())
    assert image.differing_slots() == ["a"]
    assert image.poke("a", 41, old) == 7.0
    assert image.differing_slots() == []
    with pytest.raises(EdgeLoraError, match="no value"):
        image.poke("a", 32 * 40, 0.0)


def test_a_weight_file_that_was_cut_changes_nothing(tmp_path):
    slot = Packed(tmp_path, (16, 30))
    image = image_of(slot)
    one = LowRank(np.ones((1, 30), np.float32), np.ones((1, 16), np.float32))
    patch = image.compile([(adapter_file(tmp_path, {"w": [one]}, {"w": (16, 30)}), 1.0)])
    image.swap(patch)
    before = slot.blocks()[0]
    os.truncate(slot.path, 100)
    with pytest.raises(BundleError, match="changed after export"):
        image.swap(None)
    assert image.active is patch
    np.testing.assert_array_equal(slot.blocks()[0], before)
    with pytest.raises(BundleError, match="changed after export"):
        native.Image(1).add_slot("w", 30, 16, str(slot.path), 12, "io")
