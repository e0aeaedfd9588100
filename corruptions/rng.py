"""Counter-based random numbers: each value is a pure function of its purpose.

A value depends only on (seed, corruption name, severity, image index, call number, position).
Therefore the batch size, the order of the images and the number of threads do not change it. There
is no generator state. A 64-bit key is hashed for each image, and a keyed hash of the position gives
32 random bits. This arithmetic uses 32-bit integer tensors, which wrap around in the same way on
every device.

The hash is the two-multiplication integer hash of C. Wellons, "Hash function prospector" (constants
0x21f0aaad, 0xd35a2d97; shifts 16, 15, 15). Half of the key is added before it and half between its
two rounds, so that two keys give unrelated sequences and not shifted copies of one sequence.
"""

import hashlib
import math
import struct

import torch
from torch import Tensor

Size = tuple[int, int]  # height and width in px
Fields = tuple[Tensor, ...]  # what a corruption draws, (B, ...) each

_GOLDEN = -1640531527  # 0x9e3779b9 as a signed word, to spread neighboring positions
_ROUND_1 = 0x21F0AAAD
_ROUND_2 = 0xD35A2D97 - 2**32


def _fold(words: Tensor, shift: int, scratch: Tensor) -> None:
    """Xor `words` in place with itself shifted right by `shift`, filling with zeros."""
    torch.bitwise_right_shift(words, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)  # int32 fills with the sign bit
    words.bitwise_xor_(scratch)


def _scramble(words: Tensor, key: Tensor) -> Tensor:
    """Hash int32 `words` in place by the bijection that `key` (broadcast) selects."""
    scratch = torch.empty_like(words)
    _fold(words, 16, scratch)
    words.mul_(_ROUND_1).add_(key)
    _fold(words, 15, scratch)
    words.mul_(_ROUND_2)
    _fold(words, 15, scratch)
    return words


class Stream:
    """Random number stream for one purpose, such as a corruption of a batch of images.

    Each method returns (B, *shape) and counts as one call. The n-th call of a stream always returns
    the same numbers for the same image. Bits, uniforms and integers are equal on all devices.
    Normals are equal up to the rounding of `torch.erfinv`.

    Args:
        seed: any integer.
        name: of the corruption, or of another purpose.
        severity: 1 to 5, or None where there is none: amounts drawn per image, attacks.
        index: indices of the images in the dataset, int64 (B,). The draws are on its device.
    """

    def __init__(self, seed: int, name: str, severity: int | None, index: Tensor) -> None:
        self._purpose = (seed, name, severity)
        self._low, self._high = index.contiguous().view(torch.int32).view(len(index), 2).unbind(1)
        self._calls = 0

    def _keys(self) -> tuple[Tensor, Tensor]:
        """Compute the two int32 key words of each image for the next call, each (B, 1)."""
        text = repr((*self._purpose, self._calls))
        digest = hashlib.blake2b(text.encode(), digest_size=24).digest()
        numbers = struct.unpack("<6i", digest)  # three words for each of the two keys
        words = torch.tensor(numbers, dtype=torch.int32, device=self._low.device).view(3, 2, 1, 1)
        self._calls += 1
        keys = _scramble(self._low[:, None] + words[0], words[1])
        keys = _scramble(keys.add_(self._high[:, None]), words[2])
        return keys[0], keys[1]

    def bits(self, *shape: int) -> Tensor:
        """Draw int32 words. All 2^32 values are equally likely."""
        first, second = self._keys()
        count = math.prod(shape)
        position = torch.arange(count, dtype=torch.int32, device=first.device).mul_(_GOLDEN)
        return _scramble(position + first, second).view(len(first), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Draw float32 in [0, 1). All multiples of 2^-24 are equally likely."""
        words = self.bits(*shape)
        return words.bitwise_right_shift_(8).bitwise_and_(2**24 - 1).float().mul_(2.0**-24)

    def normal(self, *shape: int) -> Tensor:
        """Draw float32 standard normals as quantiles of a 24-bit uniform, within +-5.42."""
        centered = self.uniform(*shape).mul_(2.0).sub_(1.0 - 2.0**-24)  # exact, symmetric, not +-1
        return torch.erfinv(centered, out=centered).mul_(math.sqrt(2.0))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw int32 in [low, high).

        high - low is at most 2^16. Up to this limit the probabilities of the values are equal to
        within a relative 2^-8. The product below is one float32 rounding of u * n with
        u <= 1 - 2^-24. It never reaches n, so the result is in the range and equal on all devices.
        """
        return self.uniform(*shape).mul_(high - low).to(torch.int32).add_(low)
