"""The random numbers that torch draws on the CPU, in NumPy, to the bit.

Some adapter files name only the seed of a random matrix. torch's CPU generator is the Mersenne
Twister with its classic seeding; a uniform fp32 number takes the low 24 bits of one output.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_DIGITS = 24  # bits of an fp32 significand


class TorchGenerator:
    """Draws what ``torch.Generator("cpu").manual_seed(seed)`` draws."""

    def __init__(self, seed: int) -> None:
        """Seed it; torch keeps the low 32 bits."""
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator

    def uniform(self, shape: tuple[int, ...], bound: float) -> NDArray[np.float32]:
        """Return what ``torch.empty(shape).uniform_(-bound, bound, generator=self)`` fills in."""
        raw = self._bits.random_raw(int(np.prod(shape))) & ((1 << _DIGITS) - 1)
        limit = float(np.float32(bound))
        unit = raw.astype(np.float64) / (1 << _DIGITS)
        return (unit * (2 * limit) - limit).astype(np.float32).reshape(shape)
