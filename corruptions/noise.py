"""ImageNet-C's noise corruptions: gaussian_noise, shot_noise, impulse_noise, speckle_noise.

`corruptions.registry` has the conventions. Given the same fields, the results are the original's.
"""

from functools import cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from corruptions.rng import Fields, Size, Stream

# Standard deviation of the noise, as a share of full scale.
GAUSSIAN_NOISE = {
    224: (0.08, 0.12, 0.18, 0.26, 0.38),
    64: (0.04, 0.08, 0.12, 0.15, 0.18),
    32: (0.04, 0.06, 0.08, 0.09, 0.10),
}


def draw_gaussian_noise(stream: Stream, severity: int, size: Size, profile: int) -> Fields:
    """Draw `noise`: standard normal, float32 (B, 3, H, W)."""
    return (stream.normal(3, *size),)


def gaussian_noise(images: Tensor, severity: int, noise: Tensor, *, profile: int = 224) -> Tensor:
    """Add independent normal noise."""
    scale = GAUSSIAN_NOISE[profile][severity - 1]
    return torch.add(images, noise, alpha=255 * scale).clamp_(0, 255)


# Photons at full scale. Fewer photons mean more noise.
SHOT_NOISE = {
    224: (60, 25, 12, 5, 3),
    64: (250, 100, 50, 30, 15),
    32: (500, 250, 100, 75, 50),
}


def draw_shot_noise(
    stream: Stream, severity: int, size: Size, profile: int, *, images: Tensor
) -> Fields:
    """Draw `counts`: Poisson-distributed photons for the pixels of `images`, int32 (B, 3, H, W).

    The rate of a pixel x is x / 255 times the photons at full scale. One 32-bit word per value is
    used twice. Its low bits select a slot of the rate's alias table, and the whole word decides
    between the two counts of the slot (A. J. Walker, ACM TOMS 3, 1977). The probabilities are exact
    to the resolution of the words.
    """
    thresholds, aliases = (
        torch.from_numpy(table).to(images.device)
        for table in _poisson_tables(SHOT_NOISE[profile][severity - 1])
    )
    slots = thresholds.shape[1]
    words = stream.bits(3, *size).flatten()
    slot = words.bitwise_and(slots - 1)
    cell = slot.add(images.flatten(), alpha=slots)
    # Each is several times as fast as the usual: `index_select` for indexing, arithmetic for
    # `torch.where`, comparing into numbers for converting booleans.
    limits = thresholds.view(-1).index_select(0, cell)
    accepted = torch.lt(words, limits, out=torch.empty_like(words))
    alias = aliases.view(-1).index_select(0, cell)
    return (slot.sub_(alias).mul_(accepted).add_(alias).view(images.shape),)


def shot_noise(images: Tensor, severity: int, counts: Tensor, *, profile: int = 224) -> Tensor:
    """Convert the photon `counts` of the pixels to values. `images` are not used."""
    return counts.float().mul_(255 / SHOT_NOISE[profile][severity - 1]).clamp_(0, 255)


@cache
def _poisson_tables(full_scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Build the alias tables of Poisson(full_scale * x / 255) for the 256 pixel values x.

    Returns int32 (256, slots) thresholds and aliases. A word w with slot k gives the count k if w
    is below thresholds[x, k], else aliases[x, k]. Counts beyond the table have a probability
    below 2^-40.
    """
    slots = 1 << (full_scale + 8 * isqrt(full_scale) + 8).bit_length()
    rates = full_scale * np.arange(256)[:, None] / 255
    ratios = rates / np.arange(1, slots)  # p(k) / p(k - 1)
    share = np.cumprod(np.hstack([np.exp(-rates), ratios]), axis=1)
    share *= slots / share.sum(axis=1, keepdims=True)
    keep = np.ones_like(share)
    aliases = np.tile(np.arange(slots), (256, 1))
    rows, settled = np.arange(256), np.zeros(share.shape, dtype=bool)
    for _ in range(slots - 1):  # the richest slot of each row fills up its poorest
        poor = np.where(settled, np.inf, share).argmin(axis=1)
        rich = np.where(settled, -np.inf, share).argmax(axis=1)
        keep[rows, poor], aliases[rows, poor] = share[rows, poor], rich
        share[rows, rich] -= 1 - share[rows, poor]
        settled[rows, poor] = True
    thresholds = np.clip(np.rint(keep * 2.0**32) - 2**31, -(2**31), 2**31 - 1)
    return thresholds.astype(np.int32), aliases.astype(np.int32)


# Share of the values that are set to 0 or 255.
IMPULSE_NOISE = {
    224: (0.03, 0.06, 0.09, 0.17, 0.27),
    64: (0.01, 0.02, 0.05, 0.08, 0.14),
    32: (0.01, 0.02, 0.03, 0.05, 0.07),
}


def draw_impulse_noise(stream: Stream, severity: int, size: Size, profile: int) -> Fields:
    """Draw `flip` and `salt`: uniform in [0, 1), float32 (B, 3, H, W)."""
    return stream.uniform(3, *size), stream.uniform(3, *size)


def impulse_noise(
    images: Tensor, severity: int, flip: Tensor, salt: Tensor, *, profile: int = 224
) -> Tensor:
    """Set values where `flip` is at most the share: to 255 where `salt` <= 0.5, otherwise to 0."""
    share = IMPULSE_NOISE[profile][severity - 1]
    pixels = images.float()
    changed = torch.le(flip, share, out=torch.empty_like(pixels))  # see `draw_shot_noise`
    extremes = torch.le(salt, 0.5, out=torch.empty_like(pixels)).mul_(255)
    return extremes.sub_(pixels).mul_(changed).add_(pixels)


# Standard deviation of the noise, as a share of the pixel value.
SPECKLE_NOISE = {
    224: (0.15, 0.2, 0.35, 0.45, 0.6),
    64: (0.15, 0.2, 0.25, 0.3, 0.35),
    32: (0.06, 0.1, 0.12, 0.16, 0.2),
}

draw_speckle_noise = draw_gaussian_noise


def speckle_noise(images: Tensor, severity: int, noise: Tensor, *, profile: int = 224) -> Tensor:
    """Add normal noise in proportion to the pixel."""
    scale = SPECKLE_NOISE[profile][severity - 1]
    return torch.addcmul(images, images, noise, value=scale).clamp_(0, 255)
