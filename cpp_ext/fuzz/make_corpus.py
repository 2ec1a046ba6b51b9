"""Write a small adapter of every form and dtype into a folder: what the fuzzer starts from."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from edge_lora import Adapter, BaseIdentity, Block, Delta, Dense, LowRank, Sparse
from edge_lora.index_codec import expand_lines

IN, OUT = 6, 32


def main(folder: Path) -> None:
    """Write one file for each form and dtype, and one with all forms that add."""
    folder.mkdir(parents=True, exist_ok=True)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        some = np.arange(3, dtype=np.uint32) * 2
        lines = expand_lines(some, IN)
        forms = {
            "low_rank": LowRank(np.ones((2, IN), dtype), np.ones((2, OUT), dtype), 0.5),
            "sparse": Sparse(some, np.ones(3, dtype)),
            "lines": Sparse(lines, np.ones(lines.size, dtype)),
            "rows": Block("row", some, np.ones((3, IN), dtype)),
            "columns": Block("col", some, np.ones((3, OUT), dtype)),
            "dense": Dense(np.ones((OUT, IN), dtype)),
        }
        chosen = {name: (form,) for name, form in forms.items()}
        chosen["set"] = (Sparse(some, np.ones(3, dtype), mode="set"),)
        chosen["all"] = tuple(forms.values())
        for name, these in chosen.items():
            deltas = {"w": Delta((OUT, IN), "F32", these)}
            path = folder / f"{name}.{np.dtype(dtype).name}.safetensors"
            Adapter(name, "fuzz", BaseIdentity("0"), deltas, 1.0).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
