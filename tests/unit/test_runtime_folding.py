"""A linear branch beside a layer, and the layer with the branch inside: the same map."""

import numpy as np
import pytest

from edge_lora import Bottleneck
from edge_lora.errors import UnsupportedError
from edge_lora.reference import apply
from edge_lora.runtime.folding import fold_bias, fold_bottleneck


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("biases", [True, False])
def test_folding_keeps_the_map(placement, biases):
    weight, bias, x = draw(5, 7), draw(5), draw(9, 7)
    form = Bottleneck(
        draw(3, 7 if placement == "parallel" else 5), draw(5, 3), 0.6, "none", placement,
        draw(3) if biases else None, draw(5) if biases else None,
    )  # fmt: skip
    y = x @ weight.T + bias
    middle = (x if placement == "parallel" else y) @ form.down.T
    middle = middle + form.down_bias if biases else middle
    branch = middle @ form.up.T + (form.up_bias if biases else 0)
    changed = apply(weight, [(fold_bottleneck(form, weight), 1.0)])
    found = x @ changed.T + bias + fold_bias(form, bias)
    np.testing.assert_allclose(found, y + 0.6 * branch, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh"])
def test_an_activation_is_no_linear_map(act):
    with pytest.raises(UnsupportedError, match=f"'{act}' is no linear map"):
        fold_bottleneck(Bottleneck(draw(3, 7), draw(5, 3), act=act), draw(5, 7))
