"""Fused adapters in 8-bit weights, patched in place.

A packed 8-bit weight is no permutation of its codes: kernels add sums and scales of their own. So
an adapter's new codes are packed by the engine itself, in a second program, and the bytes that come
out differently are the patch. What rounding to the codes takes from the adapter is reported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from edge_lora.adapter import Adapter
from edge_lora.errors import UnsupportedError
from edge_lora.runtime.adapters import LoadedAdapter, Parts, PatchPool
from edge_lora.runtime.byte_patch import BytePatch, Bytes, Piece
from edge_lora.runtime.cache import cache_key
from edge_lora.runtime.engines import Arrays, Engine, image_key
from edge_lora.runtime.merging import merge
from edge_lora.runtime.raw_weights import RawWeights, rounded
from edge_lora.runtime.switching import Prepared

_FLIPPED = np.uint8(0x11)  # in both halves of a byte, should it hold two codes
Blocks = Mapping[str, Sequence[Bytes]]
"""Slot -> the memory that the engine computes from."""
Applied = tuple[Piece, Bytes]
"""What is written there, and the base's bytes under it."""


class PackingEngine(Engine, Protocol):
    """An engine that packs weights on demand."""

    def require_same_unpacked(self, feeds: Arrays) -> None:
        """Refuse packed weights with which one run gives other outputs than others do."""

    def blocks(self) -> Blocks:
        """Return the memory of every slot, writable."""

    def packed_with(self, weights: Arrays) -> AbstractContextManager[Blocks]:
        """Return the memory that every slot would have with other raw values for some."""


class QuantisedWeights:
    """The engine's own 8-bit weights, patched in place."""

    def __init__(self, raw: RawWeights, engine: PackingEngine, budget: int | None) -> None:
        """Remember what every slot's memory holds now: the base.

        Args:
            raw: The base's codes and scales.
            engine: Freshly opened.
            budget: Most bytes of compiled patches; None: no limit.
        """
        self._raw, self._engine = raw, engine
        self._blocks = engine.blocks()
        self._base = {slot: _digest(blocks) for slot, blocks in self._blocks.items()}
        key = image_key(raw.manifest, engine)
        self._pool = PatchPool(self, key, budget, LoadedAdapter.read)
        self._active: list[Applied] = []
        self._damaged = False

    def compile(self, parts: list[tuple[Adapter, float]]) -> BytePatch:
        """Pack the base with ``parts`` in a second program, and keep what differs."""
        made = rounded(self._raw, merge(parts, self._raw.manifest, self._raw.base))
        pieces = []
        with self._engine.packed_with(made.raw) as packed:
            for slot in made.raw:
                pairs = zip(self._base_blocks(slot), packed[slot], strict=True)
                pieces += [_piece(slot, i, *pair) for i, pair in enumerate(pairs)]
        found = tuple(piece for piece in pieces if piece.new.size)
        return BytePatch(found, made.changed, made.rounding_error)

    def load_patch(self, path: str) -> BytePatch:
        """Read a patch saved for the same base and engine; every offset is checked."""
        patch = BytePatch.load(path)
        for piece in patch.pieces:
            blocks = self._blocks.get(piece.slot, ())
            if piece.block >= len(blocks) or not piece.fits(blocks[piece.block]):
                raise UnsupportedError(f"the cached patch '{path}' is of another image")
        return patch

    def prepare(self, parts: Parts) -> Prepared:
        """Compile the patch; see ``FusedWeights``."""
        patch = self._pool.get(parts)
        return Prepared(patch.changed, patch.rounding_error)

    def swap(self, parts: Parts) -> int:
        """Exchange bytes in place; see ``FusedWeights``."""
        patch = self._pool.get(parts) if parts else BytePatch((), 0, 0.0)
        before = self._active
        after = [(piece, self._base_bytes(piece)) for piece in patch.pieces]
        try:
            self._active = after
            self._take_out(before)
            self._put_in(after)
        except BaseException:  # an interrupt, too: half of a swap is no adapter's weights
            self._damaged = True  # unless all of this is done
            self._active = before
            self._take_out(after)
            self._take_out(before)
            self._put_in(before)
            self._damaged = False
            raise
        return sum(piece.new.size for piece, _ in (*before, *after))

    def keep(self, parts: Parts) -> None:
        """Pin the compiled patch."""
        self._pool.pin(parts)

    def forget(self, adapter: LoadedAdapter) -> None:
        """Drop its compiled patches from memory."""
        self._pool.drop(adapter)

    @property
    def nbytes(self) -> int:
        """Bytes of the compiled patches."""
        return self._pool.nbytes

    @property
    def damaged(self) -> bool:
        """Whether a swap failed, and so did putting the saved bytes back."""
        return self._damaged

    def poke(self, name: str, index: int, value: float) -> float:
        """Flip bits around one weight of a slot, for self-tests; a second call flips them back.

        Which bytes hold the weight is the kernel's business, so an eighth of the slot's memory
        changes: the one that lies as far into it as ``index`` into the slot.
        """
        block, size = self._blocks[name][0], math.prod(self._raw.manifest.slots[name].shape)
        start = 8 * index // size * block.size // 8
        block[start : start + block.size // 8 + 1] ^= _FLIPPED
        return value

    def differing_slots(self) -> list[str]:
        """Slots whose memory is not what it was when the program was opened."""
        return [s for s, blocks in self._blocks.items() if _digest(blocks) != self._base[s]]

    def sha256(self) -> str:
        """Digest of the engine's memory, as packed."""
        return cache_key({slot: _digest(blocks) for slot, blocks in self._blocks.items()})

    def close(self) -> None:
        """Let go of the engine's memory."""
        self._blocks = {}
        self._active = []

    def _take_out(self, applied: Sequence[Applied]) -> None:
        for piece, base in applied:
            self._block(piece)[piece.where] = base

    def _put_in(self, applied: Sequence[Applied]) -> None:
        for piece, _ in applied:
            self._block(piece)[piece.where] = piece.new

    def _block(self, piece: Piece) -> Bytes:
        return self._blocks[piece.slot][piece.block]

    def _base_blocks(self, slot: str) -> list[Bytes]:
        """Return a slot's memory as it is without the active adapters."""
        return [self._base_block(slot, i) for i in range(len(self._blocks[slot]))]

    def _base_block(self, slot: str, number: int) -> Bytes:
        block = self._blocks[slot][number].copy()
        for piece, base in self._active:
            if (piece.slot, piece.block) == (slot, number):
                block[piece.where] = base
        return block

    def _base_bytes(self, piece: Piece) -> Bytes:
        return self._base_block(piece.slot, piece.block)[piece.where]


def _piece(slot: str, block: int, base: Bytes, packed: Bytes) -> Piece:
    if base.size != packed.size:
        raise UnsupportedError(
            f"{slot}: the engine packs other values into {packed.size} bytes, not {base.size}"
        )
    return Piece.between(slot, block, base, packed)


def _digest(blocks: Sequence[Bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()
