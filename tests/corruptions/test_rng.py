"""Test the counter-based random stream.

The tests compare it with a slow reference, check that it is a pure function of its arguments, and
check its statistics with fixed seeds.
"""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from corruptions import Stream

INDEX = torch.arange(4)


def make(
    seed: int = 0, name: str = "fog", severity: int | None = 3, index: Tensor = INDEX
) -> Stream:
    """Return a stream with default arguments, each of which can be changed."""
    return Stream(seed, name, severity, index)


def words_of(text: str) -> list[int]:
    """Hash the text of a purpose to six 32-bit words."""
    return list(struct.unpack("<6I", hashlib.blake2b(text.encode(), digest_size=24).digest()))


def scramble(word: int, key: int) -> int:
    """Mix one 32-bit word with Python's unbounded integers."""
    word ^= word >> 16
    word = (word * 0x21F0AAAD + key) % 2**32
    word ^= word >> 15
    word = word * 0xD35A2D97 % 2**32
    return word ^ word >> 15


@pytest.mark.parametrize("number", [0, 1, 7, 2**31, 2**32 + 5, 2**62 + 1, -3])
@pytest.mark.parametrize("purpose", [(0, "fog", 3), (-5, "rotation", None), (2**70, "snow", 1)])
def test_bits_equal_reference(number: int, purpose: tuple[int, str, int | None]) -> None:
    stream = Stream(*purpose, torch.tensor([number]))
    low, high = number % 2**32, (number >> 32) % 2**32
    for call in range(2):
        words = words_of(repr((*purpose, call)))
        first, second = (
            scramble(
                (scramble((low + words[i]) % 2**32, words[2 + i]) + high) % 2**32, words[4 + i]
            )
            for i in (0, 1)
        )
        expected = [
            scramble((position * 0x9E3779B9 + first) % 2**32, second) for position in range(40)
        ]
        actual = stream.bits(5, 8)
        assert actual.dtype == torch.int32 and actual.shape == (1, 5, 8)
        assert [word % 2**32 for word in actual.flatten().tolist()] == expected


@pytest.mark.parametrize("method", ["bits", "uniform", "normal"])
def test_values_depend_on_the_image_number_alone(method: str) -> None:
    shape = (3, 61, 67)
    index = torch.tensor([9, 4, 2**40, 0, 9])
    together = getattr(make(index=index), method)(*shape)
    for row, number in zip(together, index, strict=True):
        alone = getattr(make(index=number[None]), method)(*shape)[0]
        assert torch.equal(row, alone)
    smaller = getattr(make(index=index), method)(50)
    if method != "normal":  # the position matters, not the number of draws
        assert torch.equal(smaller, together.flatten(1)[:, :50])


def test_every_part_of_the_purpose_matters() -> None:
    base = make()
    first, second = base.bits(1000), base.bits(1000)
    others = [
        second,
        make(seed=1).bits(1000),
        make(name="snow").bits(1000),
        make(severity=4).bits(1000),
        make(severity=None).bits(1000),
        make(index=INDEX + 4).bits(1000),
        make(index=INDEX + 2**32).bits(1000),
    ]
    assert torch.equal(first, make().bits(1000))
    for i, one in enumerate([first, *others]):
        for other in others[i:]:
            assert (one == other).float().mean() < 1e-3


def test_streams_are_uncorrelated_at_every_shift() -> None:
    """Check that neighboring seeds, severities, images and calls share no sequence of numbers."""
    count = 2**15
    base = make()
    rows = [base.normal(count), base.normal(count), make(seed=1).normal(count)]
    rows += [make(severity=4).normal(count), make(index=INDEX + 4).normal(count)]
    spectra = np.fft.rfft(torch.cat(rows).double().numpy())
    for i, one in enumerate(spectra):
        for other in spectra[i + 1 :]:
            correlation = np.fft.irfft(one * other.conj()) / count
            assert np.abs(correlation).max() * math.sqrt(count) < 6.2
        own = np.fft.irfft(one * one.conj())[1:] / count
        assert np.abs(own).max() * math.sqrt(count) < 6.2


def assert_even(counts: np.ndarray) -> None:
    """Check equal frequencies by a two-sided chi-square test at a level of 1e-4 per side."""
    probability = stats.chisquare(counts.ravel()).pvalue
    assert 1e-4 < probability < 1 - 1e-4


@pytest.mark.parametrize("axis", ["positions", "images", "seeds"])
def test_uniforms_are_even(axis: str) -> None:
    """Check that every byte is uniform along an axis, alone and jointly with its neighbor."""
    if axis == "positions":
        values = make().uniform(2**17)[0]
    elif axis == "images":
        values = make(index=torch.arange(2**17)).uniform(1)[:, 0]
    else:
        values = torch.cat([make(seed=seed).uniform(2)[:, 1] for seed in range(2**11)])
    assert values.min() >= 0 and values.max() < 1
    words = (values * 2**24).to(torch.int64).numpy()
    assert_even(np.histogram(values.numpy(), 256, (0, 1))[0])
    for shift in (0, 8, 16):
        byte = words >> shift & 255
        assert_even(np.bincount(byte, minlength=256))
        high, low = byte[::2] >> 4, byte[1::2] >> 4
        assert_even(np.bincount(16 * high + low, minlength=256))


@pytest.mark.parametrize("part", ["position", "image", "image_high"])
def test_one_changed_bit_flips_half_of_the_word(part: str) -> None:
    """Check the avalanche property: an input bit flips each output bit half of the time."""
    base = torch.arange(4096) * 977
    for bit in range(0, 16, 3):
        if part == "position":
            words = make().bits(2**16)[0]
            one, other = words[base % 2**16], words[base % 2**16 ^ 1 << bit]
        else:
            shift = bit + (32 if part == "image_high" else 0)
            one = make(index=base).bits(1)[:, 0]
            other = make(index=base ^ 1 << shift).bits(1)[:, 0]
        flipped = (one ^ other).numpy().view(np.uint32)[:, None] >> np.arange(32) & 1
        assert np.abs(flipped.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(len(base))


def test_normals_are_normal() -> None:
    values = make().normal(3, 2**16).double().numpy()
    assert values.shape == (4, 3, 2**16)
    assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    deviation = math.sqrt(values.size)
    assert abs(values.mean()) * deviation < 4
    assert abs(values.var() - 1) * deviation / math.sqrt(2) < 4
    assert abs((values**4).mean() - 3) * deviation / math.sqrt(96) < 4
    assert 4.3 < np.abs(values).max() < 5.5


def test_normals_are_symmetric_to_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the smallest and the largest uniform give opposite and finite normals."""
    words = torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    monkeypatch.setattr(Stream, "bits", lambda self, *shape: words.clone())
    low, high, below, above = make().normal(4)
    assert low == -high and below == -above and -5.5 < low < -5 and -1e-6 < below < 0


@pytest.mark.parametrize(("low", "high"), [(-4, 4), (0, 3), (-2, 2), (60, 128), (0, 65536)])
def test_integers_are_even_and_within_bounds(low: int, high: int) -> None:
    values = make().integers(low, high, 2**16)
    assert values.dtype == torch.int32 and values.min() >= low and values.max() < high
    if high - low < 1000:
        assert_even(np.bincount(values.flatten().numpy() - low, minlength=high - low))


def test_integers_at_the_largest_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that rounding does not move the largest uniform to the excluded upper bound."""
    monkeypatch.setattr(Stream, "bits", lambda self, *shape: torch.full((4, *shape), -1).int())
    for count in [*range(1, 3000), 2**15 - 1, 2**15 + 1, 2**16 - 1, 2**16]:
        assert (make().integers(0, count, 1) == count - 1).all()


def test_empty_batch() -> None:
    assert make(index=torch.arange(0)).normal(3, 8, 8).shape == (0, 3, 8, 8)
