"""Compare noise and digital corruptions with the original, given the original's random numbers.

There are three references: the published package, if it is installed; values stored from it; and
the slow functions below for 64 and 32 px, which are written from the definitions with NumPy, SciPy
and Pillow.
"""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.testing import assert_close

from corruptions import CORRUPTIONS, corrupt, jpeg
from corruptions.jpeg import round_trip
from tests.support import imagenet_c_oracle as oracle
from tests.support.originals import GOLDEN, SEVERITIES, golden_image, patterned_image, to_tensor

NAMES = [name for name, entry in CORRUPTIONS.items() if entry.family in ("noise", "digital")]
# Largest allowed difference of raw values, in levels. OpenCV 4 rounds coordinates to 1/32 px.
TOLERANCE = dict.fromkeys(NAMES, 1e-3) | {
    "elastic_transform": 0.05,
    "pixelate": 0.0,
    "jpeg_compression": 0.0,
}


def apply(image: np.ndarray, name: str, severity: int, drawn: dict[str, Any], **rest: Any) -> Any:
    """Run our function with fields drawn by NumPy and return the raw (H, W, 3) result."""
    fields = []
    for value in drawn.values():
        field = np.asarray(value)
        field = field.astype(np.float32) if field.dtype == np.float64 else field
        fields.append(to_tensor(field) if field.shape == image.shape else torch.tensor(field)[None])
    raw = CORRUPTIONS[name].function(to_tensor(image), severity, *fields, **rest)
    exact = name in ("pixelate", "jpeg_compression")
    assert raw.dtype == (torch.uint8 if exact else torch.float32) and raw.shape == (
        1,
        3,
        *image.shape[:2],
    )
    return raw[0].permute(1, 2, 0).double().numpy()


@pytest.mark.skipif(bool(oracle.MISSING), reason=oracle.SKIP)
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_published_package(name: str, severity: int) -> None:
    for seed, image in enumerate((golden_image(), patterned_image(224, 224))):
        expected = oracle.original(image, name, severity, seed)
        actual = apply(image, name, severity, oracle.draws(image, name, severity, seed))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_stored_values(name: str, severity: int) -> None:
    image, stored = golden_image(), GOLDEN["corruptions"][f"{name}_{severity}"]
    raw = apply(image, name, severity, oracle.draws(image, name, severity))
    at_positions = raw[tuple(np.transpose(GOLDEN["positions"]))]
    np.testing.assert_allclose(at_positions, stored["values"], rtol=0, atol=TOLERANCE[name] + 5e-5)
    assert np.floor(raw + 2.0**-12).mean() == pytest.approx(stored["mean"], abs=0.01)


# ------------------------------------------------------------------ references, by definition

SMALL = {  # parameters for 64 px and 32 px, transcribed from the tables of the original
    ("gaussian_noise", 64): (0.04, 0.08, 0.12, 0.15, 0.18),
    ("gaussian_noise", 32): (0.04, 0.06, 0.08, 0.09, 0.10),
    ("shot_noise", 64): (250, 100, 50, 30, 15),
    ("shot_noise", 32): (500, 250, 100, 75, 50),
    ("impulse_noise", 64): (0.01, 0.02, 0.05, 0.08, 0.14),
    ("impulse_noise", 32): (0.01, 0.02, 0.03, 0.05, 0.07),
    ("contrast", 64): (0.4, 0.3, 0.2, 0.1, 0.05),
    ("contrast", 32): (0.75, 0.5, 0.4, 0.3, 0.15),
    ("elastic_transform", 64): (
        (0, 0, 5.12),
        (3.2, 19.2, 3.84),
        (6.4, 5.12, 3.84),
        (6.4, 1.92, 1.92),
        (10.24, 1.92, 1.28),
    ),
    ("elastic_transform", 32): (
        (0, 0, 2.56),
        (1.6, 6.4, 2.24),
        (2.56, 1.92, 1.92),
        (3.2, 1.28, 1.6),
        (3.2, 0.96, 0.96),
    ),
    ("pixelate", 64): (57, 51, 44, 38, 32),
    ("pixelate", 32): (30, 28, 27, 24, 20),
    ("jpeg_compression", 64): (65, 58, 50, 40, 25),
    ("jpeg_compression", 32): (80, 65, 58, 50, 40),
}


def reference(image: np.ndarray, name: str, value: Any, drawn: dict[str, Any]) -> Any:
    """Corrupt an (S, S, 3) image in float64 and return the raw result in [0, 255]."""
    unit = image / 255.0
    if name == "gaussian_noise":
        return 255 * np.clip(unit + value * drawn["noise"], 0, 1)
    if name == "shot_noise":
        return 255 * np.clip(drawn["counts"] / value, 0, 1)
    if name == "impulse_noise":
        hit, salt = drawn["flip"] <= value, drawn["salt"] <= 0.5
        return np.where(hit, np.where(salt, 255, 0), image)
    if name == "contrast":
        mean = unit.mean(axis=(0, 1))
        return 255 * np.clip((unit - mean) * value + mean, 0, 1)
    if name == "elastic_transform":
        return reference_elastic(unit, *value, *drawn.values())
    if name == "pixelate":
        return pillow_pixelate(image, value, value).astype(float)
    return pillow_jpeg(image, value).astype(float)


def reference_elastic(
    unit: np.ndarray,
    alpha: float,
    sigma: float,
    _: float,
    moves: np.ndarray,
    along_x: np.ndarray,
    along_y: np.ndarray,
) -> np.ndarray:
    """Warp by the affine map that moves three points, then by smoothed displacements."""
    side = unit.shape[0]
    centre, arm = side // 2, side // 3
    points = np.array([[arm, arm], [arm, -arm], [-arm, -arm]]) + centre
    homogeneous = np.hstack([points + moves, np.ones((3, 1))])
    to_old = np.linalg.solve(homogeneous, points)  # rows x, y, 1 -> old x, y
    y, x = np.mgrid[:side, :side].astype(float)
    old = np.stack([x, y, np.ones_like(x)], axis=-1) @ to_old
    warped = [
        ndimage.map_coordinates(plane, old.transpose(2, 0, 1)[::-1], order=1, mode="mirror")
        for plane in unit.transpose(2, 0, 1)
    ]
    if alpha:
        dx, dy = (
            alpha * ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)
            for field in (along_x, along_y)
        )
        warped = [
            ndimage.map_coordinates(plane, (y + dy, x + dx), order=1, mode="reflect")
            for plane in warped
        ]
    stacked: np.ndarray = np.stack(warped, axis=-1)
    return 255 * stacked.clip(0, 1)


def pillow_pixelate(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink an image to height x width and enlarge it again with Pillow's box filter."""
    picture = Image.fromarray(image)
    small = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BOX))


def pillow_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Save an image as JPEG and read it back with Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def small_draws(image: np.ndarray, name: str, value: Any) -> dict[str, Any]:
    """Draw the inputs of the reference and of our function."""
    generator = np.random.default_rng(3)
    if name == "gaussian_noise":
        return {"noise": generator.normal(size=image.shape)}
    if name == "shot_noise":
        return {"counts": generator.poisson(image / 255 * value)}
    if name == "impulse_noise":
        return {"flip": generator.random(image.shape), "salt": generator.random(image.shape)}
    if name == "elastic_transform":
        fields = generator.uniform(-1, 1, size=(2, *image.shape[:2]))
        moves = value[2] * generator.uniform(-1, 1, size=(3, 2))
        return {"moves": moves, "along_x": fields[0], "along_y": fields[1]}
    return {}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("name", "side"), SMALL)
def test_equals_reference_of_small_profiles(name: str, side: int, severity: int) -> None:
    image, value = patterned_image(side, side), SMALL[name, side][severity - 1]
    drawn = small_draws(image, name, value)
    actual = apply(image, name, severity, drawn, profile=side)
    expected = reference(image, name, value, drawn)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_reflects_far_outside(severity: int) -> None:
    """Check displacements of several image sides, which are reflected many times."""
    image = patterned_image(64, 64)
    drawn = small_draws(image, "elastic_transform", (0, 0, 60.0 * severity))
    actual = apply(image, "elastic_transform", 5, drawn, profile=64)
    expected = reference(image, "elastic_transform", SMALL["elastic_transform", 64][4], drawn)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.2)


@pytest.mark.parametrize("quality", [3, 10, 49, 50, 75, 85, 95, 100])
@pytest.mark.parametrize("size", [(64, 64), (17, 47), (18, 34), (25, 22)])
def test_integer_jpeg_is_pillow_to_the_bit(quality: int, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(quality)
    binary = generator.integers(0, 2, (*size, 3), dtype=np.uint8) * 255
    noise = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    images = [patterned_image(*size), noise, binary]
    result = round_trip(torch.cat([to_tensor(image) for image in images]), quality)
    for image, ours in zip(images, result, strict=True):
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), pillow_jpeg(image, quality))


def test_codec_and_integer_jpeg_agree() -> None:
    image = to_tensor(patterned_image(224, 224))
    for severity, quality in enumerate((25, 18, 15, 10, 7), start=1):
        ours = corrupt(image, "jpeg_compression", severity)
        assert torch.equal(ours.int(), round_trip(image, quality))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_of_oblong_image_is_pillow(severity: int) -> None:
    image, share = patterned_image(75, 50), (0.9, 0.8, 0.7, 0.6, 0.5)[severity - 1]
    expected = pillow_pixelate(image, int(75 * share), int(50 * share))
    actual = apply(image, "pixelate", severity, {}, profile=64)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("side, severity", [(134, 4), (201, 1), (201, 4), (268, 1), (402, 4)])
def test_pixelate_repeats_the_pixel_that_pillow_does(side: int, severity: int) -> None:
    """Check sides at which a repeated pixel lies in the middle between two, up to rounding."""
    image, share = patterned_image(side, side), (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    expected = pillow_pixelate(image, int(side * share), int(side * share))
    actual = apply(image, "pixelate", severity, {}, profile=224)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("quality", [7, 50, 92])
def test_jpeg_needs_no_exactly_rounded_division(monkeypatch: pytest.MonkeyPatch, quality: int):
    """Divide by multiplying with the inverse, as some GPUs do, also where quotients are ties."""
    values, table = torch.arange(-(2**15) + 1, 2**15), jpeg._LUMINANCE
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = torch.tensor(table)[:, :, None].mul(scale).add(50).floor_divide(100).clamp(1, 255)
    levels = (2 * values.abs() + 8 * steps) // (16 * steps) * values.sign()
    div = torch.Tensor.div_

    def inverse(self: Tensor, other: Any, **keywords: Any) -> Tensor:
        inexact = isinstance(other, Tensor)
        return self.mul_(other.reciprocal()) if inexact else div(self, other, **keywords)

    monkeypatch.setattr(torch.Tensor, "div_", inverse)
    coefficients = values.int().expand(8, 8, -1)[:, :, None, None]
    made = jpeg._quantize(coefficients, table, quality)
    assert_close(made[:, :, 0, 0], (levels * steps).int(), rtol=0, atol=0)
