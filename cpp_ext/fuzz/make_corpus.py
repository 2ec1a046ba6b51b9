"""Write a small adapter of every form and kind of values: what the fuzzer starts from."""

import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edge_lora import (
    Adapter,
    BaseIdentity,
    Block,
    Bottleneck,
    Delta,
    Dense,
    LowRank,
    RowScale,
    Sparse,
    codebook,
)
from edge_lora.codebook import Group, encode
from edge_lora.forms import Form, values_of
from edge_lora.index_codec import expand_lines

IN, OUT = 6, 32


def main(folder: Path) -> None:
    """Write one file for each form and kind of values, and one with all forms that add."""
    folder.mkdir(parents=True, exist_ok=True)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        for name, forms in adapters_of(np.dtype(dtype)).items():
            write(forms, folder / f"{name}.{np.dtype(dtype).name}.safetensors")
    for bits in codebook.BITS:
        for group in ("tensor", "row", 5):
            for name, forms in adapters_of(np.dtype(np.float32)).items():
                coded = tuple(coded_form(form, bits, group) for form in forms)
                write(coded, folder / f"{name}.{bits}-bit-{group}.safetensors")


def adapters_of(dtype: np.dtype) -> dict[str, tuple[Form, ...]]:
    """Return the forms of one slot, by what they are there for."""
    some = np.arange(3, dtype=np.uint32) * 2
    lines = expand_lines(some, IN)

    def ones(*shape: int) -> NDArray[np.floating]:
        return np.ones(shape, dtype)

    forms: dict[str, Form] = {
        "low_rank": LowRank(ones(2, IN), ones(2, OUT), 0.5),
        "nested": LowRank(ones(3, IN), ones(3, OUT), 0.5, (1, 3), (0.5, 0.2)),
        "sparse": Sparse(some, ones(3)),
        "lines": Sparse(lines, ones(lines.size)),
        "rows": Block("row", some, ones(3, IN)),
        "columns": Block("col", some, ones(3, OUT)),
        "dense": Dense(ones(OUT, IN)),
        "row_scale": RowScale(ones(OUT), 0.5),
        "column_scale": RowScale(ones(IN), 0.5, "col"),
    }
    return {name: (form,) for name, form in forms.items()} | {
        "all": tuple(forms.values()),
        "set": (Sparse(some, ones(3), mode="set"),),
        "bottleneck": (Bottleneck(ones(2, IN), ones(OUT, 2), 1.0, "gelu"),),
        "sequential": (
            Bottleneck(ones(2, OUT), ones(OUT, 2), 1.0, "none", "sequential", ones(2), ones(OUT)),
        ),
    }


def coded_form(form: Form, bits: int, group: Group) -> Form:
    """Return the form with its values in codes."""
    return replace(form, **{n: encode(v, bits, group) for n, v in values_of(form).items()})


def write(forms: tuple[Form, ...], path: Path) -> None:
    """Write an adapter of one slot."""
    deltas = {"w": Delta((OUT, IN), "F32", forms)}
    Adapter("fuzz", "fuzz", BaseIdentity("0"), deltas).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
