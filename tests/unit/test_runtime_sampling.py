import numpy as np
import pytest

from edge_lora.errors import UnsupportedError
from edge_lora.runtime.sampling import greedy, nucleus


def test_greedy_takes_the_first_of_equals():
    assert greedy(np.float32([[0, 2, 2], [3, 1, 0]])).tolist() == [1, 0]


def test_nucleus_draws_only_from_the_smallest_set_that_reaches_top_p():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(np.tile(p, (4000, 1))).astype(np.float32)
    drawn = np.bincount(nucleus(0.7, seed=1)(logits), minlength=4) / 4000
    assert drawn[2:].sum() == 0
    np.testing.assert_allclose(drawn[:2], [0.5 / 0.8, 0.3 / 0.8], atol=0.03)


def test_nucleus_of_everything_is_plain_sampling_and_repeats_with_its_seed():
    logits = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32)
    assert (nucleus(1.0, seed=3)(logits) == nucleus(1.0, seed=3)(logits)).all()
    assert (nucleus(1e-9, seed=3)(logits) == greedy(logits)).all()


@pytest.mark.parametrize(("top_p", "temperature"), [(0, 1), (1.1, 1), (0.5, 0), (float("nan"), 1)])
def test_impossible_settings_are_refused(top_p, temperature):
    with pytest.raises(UnsupportedError, match="top_p"):
        nucleus(top_p, temperature)
