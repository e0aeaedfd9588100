"""Procedural frost textures, and ImageNet-C's frost photographs from a folder.

ImageNet-C overlays five photographs of frost whose authors are not stated, so none is shipped.
The procedural textures have the same statistics (mean, spread, quantiles, spectrum, tint). A folder
with the photographs (frost1.png to frost3.png, frost4.jpg, frost5.jpg) gives the original's pixels.
"""

import math
import os
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from corruptions.rng import Size, Stream

FrostDir = str | PathLike[str] | None

FROST_DIR = "MTLAT_FROST_DIR"  # environment variable with the path of the folder
PICTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")

# Factors by which the original scripts for smaller images resize the photographs.
_SHRINK = {224: 1.0, 64: 0.3, 32: 0.2}


class Textures(NamedTuple):
    """Textures in one tensor, prepared for crops of one size."""

    pixels: Tensor  # uint8 (3, N): RGB, all textures flattened row by row
    starts: Tensor  # int64 (T,), index of the first pixel of each texture
    heights: Tensor  # int64 (T,)
    widths: Tensor  # int64 (T,)


def frost_source(frost_dir: FrostDir = None) -> str:
    """Return "procedural", or the absolute path of the folder with the photographs.

    If `frost_dir` is None, the folder is read from the environment variable MTLAT_FROST_DIR. If
    that is not set, the textures are procedural.
    """
    folder = frost_dir if frost_dir is not None else os.environ.get(FROST_DIR) or None
    return "procedural" if folder is None else str(Path(folder).resolve())


def frost_textures(frost_dir: FrostDir, size: Size, profile: int, device: torch.device) -> Textures:
    """Load or generate the five textures, scaled for the profile and larger than `size`.

    They are kept on `device`.

    Raises:
        FileNotFoundError: a photograph is missing.
        ValueError: a photograph cannot be read.
    """
    source = frost_source(frost_dir)
    scales = tuple(
        max(_SHRINK[profile], (size[0] + 1) / picture.shape[1], (size[1] + 1) / picture.shape[2])
        for picture in _pictures(source)
    )
    return _textures(source, scales, device)


@lru_cache(maxsize=4)
def _textures(source: str, scales: tuple[float, ...], device: torch.device) -> Textures:
    """Scale the textures and concatenate them."""
    pictures = _pictures(source)
    scaled = [_resize(picture, scale) for picture, scale in zip(pictures, scales, strict=True)]
    areas = [picture[0].numel() for picture in scaled]
    shapes = torch.tensor([picture.shape[1:] for picture in scaled], device=device)
    return Textures(
        torch.cat([picture.flatten(1) for picture in scaled], 1).to(device),
        torch.tensor([0, *areas[:-1]], device=device).cumsum(0),
        *shapes.unbind(1),
    )


@lru_cache(maxsize=2)
def _pictures(source: str) -> tuple[Tensor, ...]:
    """Generate the five textures, or read them from the folder `source`, uint8 (3, H, W)."""
    if source == "procedural":  # photograph 3 is a copy of 2
        return tuple(_texture(number, _LOOKS[look]) for number, look in enumerate((1, 2, 2, 4, 5)))
    return tuple(_read(Path(source) / name) for name in PICTURES)


def _read(path: Path) -> Tensor:
    """Read a photograph as uint8 (3, H, W)."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in the frost folder {path.parent}, which must contain "
            f"{', '.join(PICTURES)}; for procedural frost, name no folder and unset {FROST_DIR}"
        )
    try:
        with Image.open(path) as picture:
            if min(picture.size) < 2:
                raise ValueError("it is less than 2 pixels wide or high")
            pixels = np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's
        raise ValueError(f"cannot read {path} ({error}); replace the file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _resize(picture: Tensor, scale: float) -> Tensor:
    """Resize uint8 (3, H, W) bilinearly, bit for bit like OpenCV's 8-bit arithmetic.

    Pixel centers are aligned, and there is no antialiasing. Weights have 11 bits. The vertical pass
    drops 4 bits of the horizontal sums and 16 bits of each product before it rounds.
    """
    left, right = _weigh_neighbors(picture.int(), 2, scale)
    above, below = _weigh_neighbors((left + right) >> 4, 1, scale)
    return (((above >> 16) + (below >> 16) + 2) >> 2).to(torch.uint8)


def _weigh_neighbors(values: Tensor, axis: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the pixels before and behind each place of a resized axis, times 11-bit weights."""
    side = values.shape[axis]
    length = math.ceil(side * scale) if scale > 1 else round(side * scale)
    position = torch.arange(length, dtype=torch.float64, device=values.device)
    position = ((position + 0.5) / scale - 0.5).clamp(0, side - 1).float()
    first = position.long().clamp(max=side - 2)
    share = position - first
    if axis == 1:
        share = share[:, None]
    near = (2048 * (1 - share)).round().int() * values.index_select(axis, first)
    far = (2048 * share).round().int() * values.index_select(axis, first + 1)
    return near, far


SIDE = 512  # side of a procedural texture in px
_RADII = (0.5, 1, 2, 4, 8, 16, 32, 64, 112, 150)  # spatial frequencies in cycles per 224 px
_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


class _Look(NamedTuple):
    """Statistics of one photograph, and parameters of the crystals in its procedural texture."""

    power: tuple[float, ...]  # log10 of the luma variance per frequency bin at _RADII
    levels: tuple[tuple[int, ...], ...]  # values of R, G and B at _PERCENTILES
    crystals: int
    longest: float  # longest stem in px
    branches: int  # per side of a stem
    lean: tuple[float, float, float] = (0, 0, 0)  # degrees that mix R, G, B with a second field


_LOOKS = {
    1: _Look(
        power=(2.5, 0.95, 0.2, -0.62, -1.46, -2.04, -2.29, -2.57, -3.32, -4.03),
        levels=(
            (20, 31, 40, 57, 74, 95, 127, 150, 190),
            (100, 116, 123, 137, 148, 160, 178, 190, 215),
            (118, 134, 141, 155, 166, 176, 191, 202, 225),
        ),
        lean=(35, 0, -22),
        crystals=1400,
        longest=60,
        branches=10,
    ),
    2: _Look(
        power=(1.9, 0.82, -0.1, -0.53, -0.88, -1.23, -1.9, -2.41, -3.32, -4.3),
        levels=(
            (100, 138, 162, 189, 204, 216, 230, 241, 252),
            (102, 140, 165, 193, 209, 221, 235, 245, 254),
            (107, 146, 172, 202, 218, 231, 244, 250, 255),
        ),
        crystals=900,
        longest=110,
        branches=14,
    ),
    4: _Look(
        power=(2.1, 0.84, -0.2, -0.46, -0.75, -1.1, -1.4, -1.88, -2.69, -3.45),
        levels=(
            (40, 69, 91, 120, 138, 155, 183, 218, 245),
            (50, 84, 105, 135, 153, 170, 199, 234, 252),
            (58, 92, 115, 147, 165, 183, 214, 249, 255),
        ),
        crystals=1400,
        longest=60,
        branches=10,
    ),
    5: _Look(
        power=(2.55, 1.08, 0.56, 0.32, -0.22, -0.79, -1.36, -1.93, -2.31, -2.48),
        levels=(
            (20, 34, 48, 79, 107, 140, 195, 233, 252),
            (30, 45, 60, 91, 119, 151, 203, 238, 254),
            (38, 57, 72, 104, 131, 161, 211, 243, 255),
        ),
        crystals=420,
        longest=130,
        branches=26,
    ),
}


def _texture(number: int, look: _Look) -> Tensor:
    """Generate crystals and match the spectrum and the levels of the photograph.

    Both are matched twice, because matching one changes the other.
    """
    stream = Stream(0, "frost texture", None, torch.tensor([number], device="cpu"))
    field = np.log1p(2 * _crystals(look, stream))
    field = field / field.std() + 0.1 * _numbers(stream.normal(SIDE, SIDE))
    tint = _color(_numbers(stream.normal(SIDE, SIDE)), look.power)
    for _ in range(2):
        field = _level(_color(field, look.power), look.levels[1])
    spread = (field - field.mean()) / field.std()
    planes = [
        _level(math.cos(turn) * spread + math.sin(turn) * tint / tint.std(), levels)
        for levels, turn in zip(look.levels, map(math.radians, look.lean), strict=True)
    ]
    return torch.from_numpy(np.rint(np.stack(planes)).astype(np.uint8))


def _numbers(draws: Tensor) -> np.ndarray:
    """Convert the draws of the first image to float64."""
    return draws[0].double().numpy()


def _crystals(look: _Look, stream: Stream) -> np.ndarray:
    """Draw bent stems with branches at about 60 degrees on both sides, on a (SIDE, SIDE) torus."""
    row, column, heading, length, bend, weight = _numbers(stream.uniform(6, look.crystals, 1))
    along = np.linspace(0, 1, look.branches)
    heading = 2 * math.pi * heading + (bend - 0.5) * along
    length = look.longest * (0.12 + 0.88 * length**2)
    step = length / look.branches
    stem = SIDE * (column + 1j * row) + step * np.cumsum(np.exp(1j * heading), 1)
    turn, reach, glow = _numbers(stream.uniform(3, 2, look.crystals, look.branches))
    tilt = heading + np.array([[[-1]], [[1]]]) * math.pi / 3 * (0.75 + 0.5 * turn)
    span = 0.45 * length * (1 - along) * np.minimum(1, 0.3 + 3 * along) * (0.25 + 0.75 * reach)
    dots = np.linspace(0, 1, 16)
    branch = stem[..., None] + (span * np.exp(1j * tilt))[..., None] * dots
    light = ((weight + 0.3) * span * (glow + 0.3))[..., None] * (1 - 0.7 * dots) / len(dots)
    dots = np.linspace(0, 1, 8, endpoint=False)
    spine = stem[..., None] + (step * np.exp(1j * heading))[..., None] * dots
    shine = ((weight + 0.3) * 1.5 * step * (1 - along))[..., None] / len(dots)
    return _stamp(
        np.concatenate((branch.ravel(), spine.ravel())),
        np.concatenate((light.ravel(), np.broadcast_to(shine, spine.shape).ravel())),
    )


def _stamp(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Add weighted points x + iy to a (SIDE, SIDE) torus, each split among its four pixels."""
    row, column = np.floor(points.imag).astype(int), np.floor(points.real).astype(int)
    down, right = points.imag - row, points.real - column
    total = np.zeros(SIDE * SIDE)
    for i, vertical in ((0, 1 - down), (1, down)):
        for j, horizontal in ((0, 1 - right), (1, right)):
            pixels = (row + i) % SIDE * SIDE + (column + j) % SIDE
            total += np.bincount(pixels, weights * vertical * horizontal, SIDE * SIDE)
    return total.reshape(SIDE, SIDE)


def _color(field: np.ndarray, power: tuple[float, ...]) -> np.ndarray:
    """Scale the spectrum of a periodic field, ring by ring, to `power` at _RADII. Keep phases."""
    spectrum = np.fft.rfft2(field)
    radius = SIDE * np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    ring = np.rint(radius).astype(int)
    have = np.bincount(ring.ravel(), np.abs(spectrum.ravel()) ** 2) / np.bincount(ring.ravel())
    want = np.interp(np.log(np.maximum(radius, 1) * 224 / SIDE), np.log(_RADII), power)
    spectrum *= np.sqrt(10**want / have[ring])
    spectrum[0, 0] = 0
    return np.fft.irfft2(spectrum, s=field.shape)


def _level(field: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Match the histogram to `levels` at _PERCENTILES by mapping the values by rank."""
    rank = np.empty(field.size)
    rank[field.ravel().argsort()] = np.linspace(0, 100, field.size)
    values: np.ndarray = PchipInterpolator(_PERCENTILES, levels)(rank)
    return values.reshape(field.shape)
