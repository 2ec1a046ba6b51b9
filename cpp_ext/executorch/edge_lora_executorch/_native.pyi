"""ExecuTorch as edge_lora uses it: types in, types out (cpp_ext/executorch/bindings/python.cc).

Every failure raises ``edge_lora.errors.EdgeLoraError`` subclasses as mapped in
``edge_lora.native``: BundleError for a damaged program, UnsupportedError for one that needs what
is not here, NativeError else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

version: str
"""Of ExecuTorch, as built against."""

class Program:
    """The method ``forward`` of a program; runs of many threads take turns."""

    def __init__(self, pte: NDArray[np.uint8], packed_fd: int = -1, threads: int = 1) -> None:
        """Load a program.

        A file that is cut, or damaged in the part that ExecuTorch checks, is refused. The graphs
        inside that XNNPACK compiles are believed, and damage there can end the process: compare
        the file's digest with the manifest's first.

        Args:
            pte: The bytes of the file, at a multiple of 16, usually a private and writable
                mapping. Kept alive, not copied: operators that are not delegated to XNNPACK see
                what is written there later.
            packed_fd: A memory file (``os.memfd_create``) for the weights that XNNPACK packs; the
                caller may close it at once. Weights that it holds already (of the same program)
                are used as they are, patches included. Programs over the same file share its
                weights, others never do. -1: weights are packed out of reach.
            threads: ExecuTorch has one pool per process, so programs with several threads must
                agree on their number while they are open. 1 does without the pool.
        """

    @staticmethod
    def open_probed(
        pte: NDArray[np.uint8],
        slots: Sequence[tuple[str, int, int, int]],
        packed_fd: int,
        threads: int = 1,
    ) -> Program:
        """Load a program, and learn on the way how XNNPACK packs fp32 weights on this CPU.

        Costs hardly more than a load. ``layouts`` of the result has the answer; one slot of each
        shape is enough. The result computes as if it had been opened without probing.

        Args:
            pte: As above, writable. Is as before when this returns or raises.
            slots: (key, offset, in_features, out_features): the sha256 in hex and the place in
                ``pte`` of each raw weight.
            packed_fd: An empty memory file; of no use any more after an error.
            threads: As above.

        Raises:
            UnsupportedError: If a weight is not packed, or not as a permutation.
        """

    @property
    def inputs(self) -> list[tuple[str, tuple[int, ...]]]:
        """NumPy's dtype ("" if it has none) and the largest shape, by position."""
    @property
    def outputs(self) -> list[tuple[str, tuple[int, ...]]]: ...
    @property
    def layouts(self) -> list[bytes]:
        """For ``edge_lora.native.Layout.from_bytes``, one per slot of ``open_probed``."""
    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run on contiguous arrays, read in place where the program was exported for it.

        The results are the caller's. The global lock is released meanwhile.
        """
    def packed(self) -> NDArray[np.uint8]:
        """The file of packed weights, shared and writable; outlives the program."""
    def entries(self) -> dict[str, tuple[int, int]]:
        """Where weights lie in ``packed()``: name -> (offset, bytes); empty if none was packed.

        The name is the key of the raw weight; if it has a bias, the bias's key follows. Equal
        weights with equal biases share one entry.
        """
    def close(self) -> None:
        """Free the program and let its file's memory go, once no run is left."""
