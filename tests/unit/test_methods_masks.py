"""Masks: how many, where, and by which score."""

import numpy as np
import pytest
import torch

from edge_lora.methods.attached import slot_seed
from edge_lora.methods.masks import LINE, MASKS, choose


@pytest.fixture
def weight():
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def gradient():
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_count_order_and_range(mask, density, weight, gradient):
    positions = choose(mask, weight, density, seed=5, gradient=gradient).numpy()
    assert (np.diff(positions) > 0).all()
    assert positions[0] >= 0
    assert positions[-1] < weight.numel()
    wanted = round(density * weight.numel())
    if mask.startswith("line"):
        wanted = max(1, round(wanted / LINE)) * LINE
    if mask == "struct":
        assert abs(len(positions) - wanted) <= 48 + 48  # within a row, plus the diagonal at 1 %
    else:
        assert len(positions) == wanted


@pytest.mark.parametrize("mask", [m for m in sorted(MASKS) if m.startswith("line")])
def test_lines_are_16_outputs_of_one_input(mask, weight, gradient):
    chosen = np.zeros((64, 48), bool)
    chosen.reshape(-1)[choose(mask, weight, 0.1, 0, gradient).numpy()] = True
    per_line = chosen.reshape(4, LINE, 48).sum(1)
    assert set(per_line.flatten().tolist()) == {0, LINE}


@pytest.mark.parametrize(
    ("mask", "score"),
    [
        ("wm", lambda w, g: np.abs(w)),
        ("grad", lambda w, g: np.abs(g)),
        ("snip", lambda w, g: np.abs(w * g)),
    ],
)
def test_scored_masks_take_the_best(mask, score, weight, gradient):
    scores = score(weight.numpy(), gradient.numpy())
    best = np.sort(np.argsort(-scores, axis=None)[:100])
    assert choose(mask, weight, 100 / 3072, 0, gradient).tolist() == best.tolist()
    lines = scores.reshape(4, LINE, 48).sum(1)
    best_lines = np.sort(np.argsort(-lines, axis=None)[:10])
    chosen = choose(f"line-{mask}", weight, 160 / 3072, 0, gradient).numpy()
    rows, columns = chosen // 48, chosen % 48
    assert np.unique(rows // LINE * 48 + columns).tolist() == best_lines.tolist()


def test_random_masks_follow_the_seed(weight):
    first, again, other = (choose("rand", weight, 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    overlap = len(np.intersect1d(first.numpy(), other.numpy())) / len(first)
    assert overlap < 0.25  # 0.1 expected by chance


def test_slots_have_seeds_of_their_own():
    assert slot_seed(0, "a") == slot_seed(0, "a")
    assert len({slot_seed(0, "a"), slot_seed(0, "b"), slot_seed(1, "a")}) == 3


def test_struct_is_whole_rows_and_the_diagonal(weight):
    chosen = np.zeros((64, 48), bool)
    chosen.reshape(-1)[choose("struct", weight, 0.1, 0).numpy()] = True
    assert chosen[np.arange(48), np.arange(48)].all()
    assert set(chosen.sum(1).tolist()) <= {0, 1, 48}
    assert (chosen.sum(1) == 48).sum() == (307 - 48) // 48


def test_floor_reaches_every_output(weight):
    piled = weight.clone()
    piled[:4] *= 100
    rows = set((choose("wm", piled, 0.05, 0) // 48).tolist())
    spread = set((choose("wm", piled, 0.05, 0, floor=0.5) // 48).tolist())
    assert rows <= {0, 1, 2, 3}
    assert spread == set(range(64))
