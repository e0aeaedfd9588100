"""The embedded dataset: one colored shape on clutter, under a faint grating.

The images are drawn from random numbers alone, and built to contain what the paper's section 5.4
describes (after Ilyas et al., NeurIPS 2019). Each class has two cues:

- a robust one: its shape, in a random place, size, angle and color;
- a brittle one: a fine grating over the whole image, with an orientation per class. It predicts the
  class perfectly, is hardly visible, and a perturbation of less than epsilon_max removes it.

The set illustrates how the method works. It proves nothing about photographs.

A shape is the region where a function of its own coordinates (u, v), scaled to radius 1, is
positive. Near the edge, the function is the distance to it.
"""

import colorsys
from typing import Any

import numpy as np
import torch
from torch import Tensor

INDICES = {"train": range(2000), "test": range(1_000_000, 1_001_000)}
NAMES = ("bar", "crescent", "disc", "flower", "half", "plus", "ring", "square", "star", "triangle")
CLUTTER, RADIUS = 0.12, (0.33, 0.45)
# An FGSM step of epsilon = 0.62 amplitudes turns a grating into another class's. The amplitude is
# the largest multiple of 0.01 at which a quarter of the draws from U[0, 0.025] reach that.
AMPLITUDE = 0.03  # of full scale
FREQUENCY = 0.25  # cycles per pixel

Array = Any  # NumPy float64


def _inside(name: str, u: Array, v: Array) -> Array:
    """Evaluate the function of a shape, positive inside, at coordinates (u, v)."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    match name:
        case "bar":
            return np.minimum(1 - abs(u), 0.3 - abs(v))
        case "crescent":
            return np.minimum(0.95 - r, np.hypot(u - 0.45, v) - 0.7)
        case "disc":
            return 0.85 - r
        case "flower":
            return 0.68 + 0.3 * np.cos(5 * angle) - r
        case "half":
            return np.minimum(1 - r, u + 0.15)
        case "plus":
            short, long = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
            return np.minimum(0.28 - short, 0.95 - long)
        case "ring":
            return np.minimum(0.95 - r, r - 0.55)
        case "square":
            return 0.72 - np.maximum(abs(u), abs(v))
        case "star":  # five tips at radius 1, five notches at radius 0.4
            fifth = 2 * np.pi / 5
            to_tip = abs((angle + fifth / 2) % fifth - fifth / 2)
            notch = 0.4 * np.exp(0.5j * fifth)
            edge = (1 - notch) / abs(1 - notch)
            return ((r * np.exp(1j * to_tip) - 1) * 1j / edge).real
        case _:  # triangle
            third = 2 * np.pi / 3
            return 0.5 - r * np.cos(angle % third - third / 2)


def _clutter(random: np.random.RandomState, count: int, size: int) -> Array:
    """Draw fields (count, size, size) of unit variance with a 1/f spectrum, like natural images."""
    noise = np.fft.rfft2(random.standard_normal((count, size, size)))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf  # removes the mean
    fields = np.fft.irfft2(noise / frequency, s=(size, size))
    return fields / fields.std(axis=(1, 2), keepdims=True)


def _grating(k: int, size: int) -> Array:
    """Compute the grating (size, size) of class k, of amplitude 1 and fixed phase."""
    row, column = np.mgrid[:size, :size]
    angle = np.pi * k / len(NAMES)
    return np.cos(2 * np.pi * FREQUENCY * (column * np.cos(angle) + row * np.sin(angle)))


def _draw_shape(name: str, size: int, random: np.random.RandomState) -> tuple[Array, Array]:
    """Draw one image (3, size, size) with random position, size, angle and colors.

    Returns:
        The image, and the same image without its shape, before rounding.
    """
    clutter, *tint = _clutter(random, 4, size)
    ground = random.uniform(0.3, 0.7) + random.uniform(-0.1, 0.1, 3)
    color = np.array(colorsys.hsv_to_rgb(random.uniform(), *random.uniform(0.5, 1, 2)))
    radius = random.uniform(*RADIUS) * size
    x, y = random.uniform(0.9 * radius, size - 0.9 * radius, 2)
    turn = np.exp(-2j * np.pi * random.uniform())
    row, column = np.mgrid[:size, :size] + 0.5
    place = turn * (column - x + 1j * (row - y)) / radius
    cover = np.clip(0.5 + radius * _inside(name, place.real, place.imag), 0, 1)
    ground = ground[:, None, None] + 0.05 * np.stack(tint)
    filled = color[:, None, None] + 0.05 * np.stack(tint)
    empty = ground + CLUTTER * clutter
    return empty * (1 - cover) + filled * cover, empty


def draw_shapes(
    indices: range, size: int, seed: int = 0, *,
    shapes: bool = True, amplitude: float = AMPLITUDE, shift: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw images of the embedded set.

    An image is a function of (seed, index, size) alone, on any version of any library: the stream
    of NumPy's legacy generator is frozen, and rounding to uint8 hides how float64 differs between
    machines.

    Args:
        indices: of the images; index modulo 10 is the class.
        size: side in pixels.
        seed: from 0 to 2**32 - 1.
        shapes: False leaves the shapes away.
        amplitude: of the gratings, 0 for none.
        shift: class k gets the grating of class k + shift, modulo 10.

    Returns:
        Images uint8 (N, 3, size, size), and labels int64 (N,), indices into `NAMES`, of the shapes.
    """
    count = len(NAMES)
    gratings = [amplitude * _grating((k + shift) % count, size) for k in range(count)]
    images, random = [], np.random.RandomState(0)
    for i in indices:
        random.seed([seed, i])  # faster than another generator
        drawn = _draw_shape(NAMES[i % count], size, random)
        pixels = drawn[0 if shapes else 1] + gratings[i % count]
        images.append(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    return torch.from_numpy(np.stack(images)), torch.tensor(indices) % count
