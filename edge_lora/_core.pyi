"""The compiled core as Python sees it: types in, types out (cpp_ext/bindings/python.cc).

Every failure raises ``edge_lora.errors.NativeError`` subclasses as mapped in ``edge_lora.native``.
Addresses are plain integers of memory in this process; whoever passes one keeps it alive.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Stored = Literal["oi", "io"]

def abi_version() -> int: ...
def cpu_features() -> str:
    """Stable name of what the kernels may use here, for cache keys ("x86_64 avx2 avx512f")."""

def allocator_status() -> str:
    """Return "registered", "not registered", or why the engine refused our allocator."""

def live_blocks() -> list[tuple[int, int, bool]]:
    """(address, bytes, reserved) of every block the engine holds from us, by address."""

def allocator_stats() -> dict[str, int]:
    """reserved_bytes, runtime_bytes, cached_bytes, hits, misses."""

class AdapterFile:
    """An adapter file, opened, fully validated and decoded; immutable."""

    def __init__(self, path: str) -> None: ...
    @property
    def header(self) -> str:
        """The edge_lora JSON header."""
    @property
    def nbytes(self) -> int: ...
    def at_rank(self, rank: int) -> AdapterFile:
        """The same adapter with every low-rank form cut by ``LowRank.at_rank``; shares the bytes.

        Raises:
            UnsupportedError: If a form was not trained to work at that rank; lists the ranks that
                all forms know.
        """
    def low_rank(self, slot: str) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """All low-rank forms of a slot stacked for an unfused run; None if it has other forms.

        Returns a (in_features, rank) and b (rank, out_features), fp32, each form's scale and the
        adapter's alpha folded into b.
        """

class Layout:
    """Where element (in k, out n) of a weight lies in a block: a permutation with padding."""

    @staticmethod
    def plain(in_features: int, out_features: int, stored: Stored) -> Layout: ...
    @staticmethod
    def probe_values(in_features: int, out_features: int, stored: Stored) -> NDArray[np.float32]:
        """A weight whose every value names its own position (bit patterns of normal floats)."""
    @staticmethod
    def from_probe(address: int, nbytes: int, in_features: int, out_features: int) -> Layout:
        """Read the layout off a block in which the engine packed ``probe_values``."""
    @staticmethod
    def from_bytes(data: bytes) -> Layout: ...
    def to_bytes(self) -> bytes: ...
    @property
    def elements(self) -> int:
        """Elements a block must have to hold it, padding included."""
    @property
    def line(self) -> int:
        """Outputs that lie side by side for one input (16 in a packed fp32 weight; 1 if none)."""

class Patch:
    """One adapter, or a weighted sum of them, compiled against one image."""

    @property
    def nbytes(self) -> int: ...
    @property
    def changed(self) -> int:
        """Values whose bits differ from the base (0: no effect).

        Low-rank and row-scale parts count all values of the slot, or none where the delta is zero.
        """
    @property
    def slots(self) -> list[str]: ...
    def save(self, path: str) -> None:
        """Write to a cache file, atomically; refused while the patch is in (it holds the base)."""

class SwapStats:
    @property
    def ms(self) -> float: ...
    @property
    def bytes(self) -> int:
        """Bytes of weights written."""

class Image:
    """The engine's packed weights of one session, patchable in place."""

    def __init__(self, threads: int) -> None: ...
    def add_slot(
        self, name: str, in_features: int, out_features: int, file: str, offset: int, stored: Stored
    ) -> None:
        """Declare a slot and where its pristine fp32 weight lies on disk (opened, kept, pread)."""
    def add_alias(self, name: str, alias: str) -> None:
        """Let adapters call a slot (tied weights) by another name too."""
    def add_place(self, name: str, layout: Layout, address: int, nbytes: int) -> bool:
        """Bind a block to the slot if it holds exactly its pristine weight under ``layout``.

        Every value is compared. A slot may have several places (tied weights).

        Returns:
            Whether it is bound; if not, it holds something else.
        """
    def compile(self, parts: list[tuple[AdapterFile, float]]) -> Patch:
        """Compile base + sum of weight * adapter. Reads, never writes, the image."""
    def load_patch(self, path: str) -> Patch:
        """Read a patch saved for an equal image; every offset is checked."""
    def swap(self, patch: Patch | None) -> SwapStats:
        """Take the active patch out and put ``patch`` in (None: the base), as one step."""
    @property
    def active(self) -> Patch | None: ...
    @property
    def damaged(self) -> bool:
        """Whether a swap failed and could not be undone.

        The weights are then a mixture: every later call but ``close`` raises, and the engine must
        not be run any more.
        """
    def poke(self, name: str, index: int, value: float) -> float:
        """Exchange one value (flat index in (out, in)) in all its places, for self-tests.

        Returns the old value.
        """
    def differing_slots(self) -> list[str]:
        """Slots whose bytes are not the pristine weight's (empty: the base, to the bit)."""
    def sha256(self) -> str:
        """Over all places' bytes in slot order."""
    def merged(self, name: str) -> NDArray[np.float32]:
        """The weight now in use, (out_features, in_features)."""
    def close(self) -> None: ...
