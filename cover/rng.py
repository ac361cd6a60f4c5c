"""Counter-based random numbers: each is a pure function of (seed, epoch, sample index, name, element).

No generator holds a state, so a sample is drawn the same whatever the batch it is in, the number of workers, the
device or the order of the draws; a resumed run needs nothing but its seed and position. Every number is made by
integer hashing (the finaliser of splitmix64, Steele et al. 2014) and single float operations that IEEE rounds in
one way only, which is what makes all devices agree bit for bit.
"""

import hashlib
from functools import cache
from math import prod

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_TABLE_BITS = 16


def _signed(value: int) -> int:
    """The 64-bit pattern of a Python int as the int64 that torch holds."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own copies the sign bit of int64."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's bijection of int64, every output bit depending on every input bit; overwrites `x`."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(_FACTORS[0]))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(_FACTORS[1]))
    return x.bitwise_xor_(_shift(x, 31))


@cache
def _normal_table(device: torch.device) -> Tensor:
    """Quantiles of the normal distribution, 2^16 steps of equal probability and their end, float32; made on the CPU."""
    steps = 2**_TABLE_BITS
    # the ends would be infinite: they take the median of the outermost half step, 4.5 standard deviations
    probability = (torch.arange(steps + 1, dtype=torch.float64) / steps).clamp(0.25 / steps, 1 - 0.25 / steps)
    return torch.special.ndtri(probability).float().to(device)


class Draws:
    """The random numbers of a batch of samples.

    Args:
        seed: of the run, any int.
        epoch: int64 [B], the epoch in which each sample is drawn.
        index: int64 [B], the index of each sample in its data set.
        device: where the numbers are made; default that of `index`.

    Raises:
        TypeError, ValueError: `epoch` and `index` are not int64 [B], the same B.
    """

    def __init__(self, seed: int, epoch: Tensor, index: Tensor, device: torch.device | str | None = None):
        for name, x in (("epoch", epoch), ("index", index)):
            if x.dtype != torch.int64:
                raise TypeError(f"Draws: `{name}` must be int64, got {x.dtype}")
            if x.dim() != 1 or x.shape != index.shape:
                raise ValueError(f"Draws: `{name}` must be [B] like `index` {list(index.shape)}, got {list(x.shape)}")
        self.device = index.device if device is None else torch.device(device)
        key = torch.full(index.shape, _signed(seed), dtype=torch.int64, device=self.device)
        for part in (epoch, index):
            key = _mix(_mix(key + _signed(_GOLDEN)) ^ part.to(self.device))
        self._key = key

    def _bits(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """64 random bits per element, int64 [B, *shape]."""
        label = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        key = _mix(self._key ^ _signed(label))
        counter = torch.arange(prod(shape), device=key.device).mul_(_signed(_GOLDEN))
        return _mix(key[:, None] ^ counter).unflatten(1, shape) if shape else _mix(key)

    def uniform(self, name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers from `low` (included) to `high`, float32 [B, *shape], in 2^24 steps.

        `name` says what is drawn: draws of different names are independent, the same name gives the same numbers.
        """
        return _shift(self._bits(name, shape), 40).float().mul_(2.0**-24).mul_(high - low).add_(low)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Numbers of a normal distribution (mean 0, standard deviation 1, cut off at 4.5), float32 [B, *shape].

        Interpolated in a table of quantiles: logarithm and cosine differ in their last bit between devices.
        """
        bits = self._bits(name, shape)
        table = _normal_table(bits.device)
        step = _shift(bits, 64 - _TABLE_BITS)
        within = _shift(bits << _TABLE_BITS, 40).float().mul_(2.0**-24)
        low = table[step]
        return (table[step + 1] - low).mul_(within).add_(low)
