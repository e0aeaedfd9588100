"""Counter-based random numbers: every value is a pure function of what it is for.

A value depends on (seed, corruption name, severity, image number, call number, position) and on
nothing else, so the same picture comes out whatever the batch size, the order of the images, the
number of threads or the device. Nothing is stored and nothing is consumed: a 64-bit key is hashed
per image, and a keyed scramble of the position gives 32 random bits. All of it is 32-bit integer
tensor arithmetic, which wraps the same way on every device.

The scramble is the two-multiplication integer hash of C. Wellons, "Hash function prospector"
(constants 0x21f0aaad, 0xd35a2d97; shifts 16, 15, 15), with half of the key added before it and half
between its two rounds, so that two keys give unrelated sequences and not shifted copies of one.
"""

import hashlib
import math
import struct

import torch
from torch import Tensor

_GOLDEN = -1640531527  # 0x9e3779b9 as a signed word: spreads neighbouring positions apart
_ROUND_1 = 0x21F0AAAD
_ROUND_2 = 0xD35A2D97 - 2**32
_WORDS = 6  # key words per call: two 64-bit image keys, three words each


def _fold(words: Tensor, shift: int, scratch: Tensor) -> None:
    """Xor `words` in place with itself shifted right by `shift`, zeros shifted in."""
    torch.bitwise_right_shift(words, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)  # int32 shifts copies of the sign in
    words.bitwise_xor_(scratch)


def _scramble(words: Tensor, key: Tensor) -> Tensor:
    """Map int32 `words` in place through the bijection that `key` (broadcast) selects."""
    scratch = torch.empty_like(words)
    _fold(words, 16, scratch)
    words.mul_(_ROUND_1).add_(key)
    _fold(words, 15, scratch)
    words.mul_(_ROUND_2)
    _fold(words, 15, scratch)
    return words


class Stream:
    """Random numbers for one corruption of the images numbered `index`.

    Args:
        seed: any integer.
        name: the corruption's name.
        severity: 1 to 5, or None for one drawn per image.
        index: int64 (B,), the images' numbers in their set; its device is the device of the draws.

    Each method returns (B, *shape) and is one call: the n-th call of a stream always gives the same
    numbers for the same image. Bits, uniforms and integers are equal on all devices, normals up to
    the rounding of `torch.erfinv`.
    """

    def __init__(self, seed: int, name: str, severity: int | None, index: Tensor) -> None:
        self._purpose = (seed, name, severity)
        self._low, self._high = index.contiguous().view(torch.int32).view(len(index), 2).unbind(1)
        self._calls = 0

    def _keys(self) -> tuple[Tensor, Tensor]:
        """Hash the next call's two int32 key words of every image, each (B, 1)."""
        text = repr((*self._purpose, self._calls))
        digest = hashlib.blake2b(text.encode(), digest_size=4 * _WORDS).digest()
        words = torch.tensor(struct.unpack(f"<{_WORDS}i", digest), dtype=torch.int32)
        words = words.to(self._low.device).view(3, 2, 1, 1)
        self._calls += 1
        keys = _scramble(self._low[:, None] + words[0], words[1])
        keys = _scramble(keys.add_(self._high[:, None]), words[2])
        return keys[0], keys[1]

    def bits(self, *shape: int) -> Tensor:
        """Draw int32 words, all 2^32 values equally likely."""
        first, second = self._keys()
        count = math.prod(shape)
        position = torch.arange(count, dtype=torch.int32, device=first.device).mul_(_GOLDEN)
        return _scramble(position + first, second).view(len(first), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Draw float32 in [0, 1), multiples of 2^-24, all equally likely."""
        words = self.bits(*shape)
        return words.bitwise_right_shift_(8).bitwise_and_(2**24 - 1).float().mul_(2.0**-24)

    def normal(self, *shape: int) -> Tensor:
        """Draw float32 standard normals: the quantile of a 24-bit uniform, within +-5.4."""
        centred = self.uniform(*shape).mul_(2.0).sub_(1.0 - 2.0**-24)  # exact, symmetric, not +-1
        return torch.erfinv(centred, out=centred).mul_(math.sqrt(2.0))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw int32 in [low, high), high excluded; at most 2^16 values, equal within 2^-8 parts.

        The product below is one float32 rounding of u * n with u <= 1 - 2^-24, which never reaches
        n, so the result is in range and the same everywhere.
        """
        return self.uniform(*shape).mul_(high - low).to(torch.int32).add_(low)
