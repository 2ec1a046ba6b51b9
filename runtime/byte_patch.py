"""Bytes that differ, where and which: a patch that knows nothing of any layout."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_lora.atomic import replacing
from edge_lora.errors import UnsupportedError

Bytes = NDArray[np.uint8]
_OFFSET = np.dtype(np.uint32)


@dataclass(frozen=True)
class Piece:
    """Bytes of one block that an adapter changes.

    Attributes:
        slot: Whose weight it is.
        block: Number of the slot's block.
        offsets: Of the bytes, (n,) uint32, ascending; None: the whole block.
        new: What they become, (n,).
    """

    slot: str
    block: int
    offsets: NDArray[np.uint32] | None
    new: Bytes

    @classmethod
    def between(cls, slot: str, block: int, base: Bytes, packed: Bytes) -> Piece:
        """Return what turns ``base`` into ``packed``, of equal size, in as few bytes as it can."""
        differs = base != packed
        count = int(np.count_nonzero(differs))
        if count * (1 + _OFFSET.itemsize) > base.size or base.size > np.iinfo(_OFFSET).max:
            return cls(slot, block, None, packed.copy())
        return cls(slot, block, np.flatnonzero(differs).astype(_OFFSET), packed[differs])

    @property
    def where(self) -> NDArray[np.uint32] | slice:
        """What of the block it changes."""
        return slice(None) if self.offsets is None else self.offsets

    def fits(self, block: Bytes) -> bool:
        """Whether it changes nothing outside ``block``."""
        if self.offsets is None:
            return self.new.size == block.size
        return bool(self.new.size == self.offsets.size and (self.offsets < block.size).all())


@dataclass(frozen=True)
class BytePatch:
    """What one adapter, or a weighted sum of them, changes in the engine's memory.

    Attributes:
        pieces: At most one for each block.
        changed: How many codes, or values, differ from the base's.
        rounding_error: See ``SwapStats``.
    """

    pieces: tuple[Piece, ...]
    changed: int
    rounding_error: float

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        offsets = sum(p.offsets.nbytes for p in self.pieces if p.offsets is not None)
        return offsets + sum(piece.new.nbytes for piece in self.pieces)

    def save(self, path: str) -> None:
        """Write to a cache file, atomically."""
        buffer = io.BytesIO()
        arrays: dict[str, NDArray[np.generic]] = {
            "slots": np.array([piece.slot for piece in self.pieces], str),
            "blocks": np.array([piece.block for piece in self.pieces], np.int64),
            "facts": np.array([self.changed, self.rounding_error], np.float64),
        }
        for i, piece in enumerate(self.pieces):
            arrays[f"new{i}"] = piece.new
            if piece.offsets is not None:
                arrays[f"offsets{i}"] = piece.offsets
        np.savez(buffer, allow_pickle=False, **arrays)
        data = buffer.getvalue()
        with replacing(Path(path)) as part:
            part.write_bytes(hashlib.sha256(data).digest() + data)

    @classmethod
    def load(cls, path: str) -> BytePatch:
        """Read what ``save`` wrote; raises UnsupportedError if it is damaged."""
        data = Path(path).read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise UnsupportedError(f"the cached patch '{path}' is damaged")
        arrays = np.load(io.BytesIO(data[32:]), allow_pickle=False)
        names = zip(arrays["slots"].tolist(), arrays["blocks"].tolist(), strict=True)
        pieces = tuple(
            Piece(slot, block, arrays.get(f"offsets{i}"), arrays[f"new{i}"])
            for i, (slot, block) in enumerate(names)
        )
        changed, error = arrays["facts"].tolist()
        return cls(pieces, int(changed), error)
