"""What does not fit the graph is named, with the size that it must have or may have at most."""

import numpy as np
import pytest

from edge_lora.bundle import TensorSpec
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.input_check import check_inputs

SPECS = {"x": TensorSpec("x", "float32", ("batch", 3, "channels"))}
LARGEST = {"batch": 4}


def x(*shape, dtype=np.float32):
    return {"x": np.zeros(shape, dtype)}


def test_any_size_up_to_the_largest_fits():
    for batch in (0, 1, 4):
        check_inputs(x(batch, 3, 99), SPECS, LARGEST)
    check_inputs(x(5, 3, 1), SPECS)
    check_inputs({}, SPECS, LARGEST, partial=True)


@pytest.mark.parametrize(
    ("inputs", "fact"),
    [
        (x(5, 3, 1), r"input 'x' is \(5, 3, 1\): batch may be at most 4"),
        (x(5, 2, 1), r"input 'x' is \(5, 2, 1\), must be \('batch', 3, 'channels'\)"),
        (x(1, 3), r"input 'x' is \(1, 3\), must be"),
        (x(1, 3, 1, dtype=np.float64), "input 'x' is float64, must be float32"),
        ({}, "input 'x' is missing"),
        ({**x(1, 3, 1), "y": np.zeros(1)}, "no such input 'y'; known: x"),
    ],
)
def test_what_does_not_fit_is_named(inputs, fact):
    with pytest.raises(UnsupportedError, match=fact):
        check_inputs(inputs, SPECS, LARGEST)
