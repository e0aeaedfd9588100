"""Compare blurs and weather with the original, given the original's random numbers.

There are three references: the published package, if it is installed; values stored from it; and
the slow functions below for 64 and 32 px, written from the definitions with NumPy, SciPy and
Matplotlib. Frost needs the original photographs, from MTLAT_FROST_DIR or from the package
imagecorruptions.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import ndimage
from torch import Tensor

from corruptions import blur, weather
from corruptions.frost import FROST_DIR, PICTURES, frost_textures
from tests.support import imagenet_c_oracle as oracle
from tests.support.originals import GOLDEN, SEVERITIES, golden_image, patterned_image, to_tensor

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        blur.defocus_blur,
        blur.glass_blur,
        blur.motion_blur,
        blur.zoom_blur,
        weather.snow,
        weather.frost,
        weather.fog,
        weather.brightness,
    )
}
# Largest allowed difference of raw values, in levels. For motion blur see `assert_close`.
TOLERANCE = 1e-3


def frost_folder() -> str:
    """Return the folder of the original photographs, or skip the test."""
    folder = os.environ.get(FROST_DIR)
    if folder is None and importlib.util.find_spec("imagecorruptions") is not None:
        folder = oracle.frost_dir()
    if folder is None:
        pytest.skip(f"no original frost pictures: set {FROST_DIR} or install imagecorruptions")
    return folder


def options_of(name: str) -> dict[str, str]:
    return {"frost_dir": frost_folder()} if name == "frost" else {}


def fields_of(name: str, drawn: dict[str, Any]) -> list[Tensor]:
    """Convert the original's random numbers for one image to our fields for a batch of one."""
    if name == "glass_blur":  # from the last pixel to the first, then (dx, dy)
        return [torch.from_numpy(drawn["offsets"][:, ::-1, ::-1, ::-1].copy()).movedim(3, 1)[None]]
    if name == "fog":
        levels = [np.ravel(level) for level in drawn["displacements"]]
        return [torch.from_numpy(np.concatenate(levels)).float()[None]]
    return [torch.as_tensor(value)[None] for value in drawn.values()]


def apply(image: np.ndarray, name: str, severity: int, drawn: dict[str, Any], **rest: Any) -> Any:
    """Run our function with fields drawn by NumPy and return the raw (H, W, 3) result."""
    raw = FUNCTIONS[name](to_tensor(image), severity, *fields_of(name, drawn), **rest)
    assert raw.dtype == torch.float32 and raw.shape == (1, 3, *image.shape[:2])
    return raw[0].permute(1, 2, 0).double().numpy()


def assert_close(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Compare raw values. Motion blur gives integers: one in 2,000 may differ by one level."""
    if name == "motion_blur":
        difference = np.abs(actual - expected)
        assert difference.max() <= 1 and (difference > 0).mean() <= 5e-4
    else:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(bool(oracle.MISSING), reason=oracle.SKIP)
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_published_package(name: str, severity: int) -> None:
    image, options = patterned_image(224, 224), options_of(name)
    expected = oracle.original(image, name, severity, seed=severity)
    drawn = oracle.draws(image, name, severity, seed=severity)
    assert_close(name, apply(image, name, severity, drawn, **options), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_stored_values(name: str, severity: int) -> None:
    image, stored = golden_image(), GOLDEN["corruptions"][f"{name}_{severity}"]
    drawn = oracle.draws(image, name, severity)
    raw = apply(image, name, severity, drawn, **options_of(name))
    at_positions = raw[tuple(np.transpose(GOLDEN["positions"]))]
    atol = 1 if name == "motion_blur" else TOLERANCE + 5e-5
    np.testing.assert_allclose(at_positions, stored["values"], rtol=0, atol=atol)
    assert np.floor(raw + 1 / 1024).mean() == pytest.approx(stored["mean"], abs=0.05)


# ------------------------------------------------------------------ references, by definition


def slow_defocus(image: np.ndarray, radius: float, sigma: float) -> np.ndarray:
    reach, half = (8, 1) if radius <= 8 else (int(radius), 2)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (x**2 + y**2 <= radius**2).astype(float)
    kernel /= kernel.sum()
    kernel = ndimage.gaussian_filter(kernel, sigma, mode="mirror", radius=half)
    blurred: np.ndarray = ndimage.correlate(image * 1.0, kernel[..., None], mode="mirror")
    return blurred


def slow_glass(
    image: np.ndarray, sigma: float, jump: int, passes: int, *, offsets: np.ndarray
) -> np.ndarray:
    def smooth(unit: np.ndarray) -> np.ndarray:
        soft: np.ndarray = ndimage.gaussian_filter(
            unit, (sigma, sigma, 0), mode="nearest", truncate=4
        )
        return 255 * soft

    pixels = np.floor(smooth(image / 255)).astype(np.uint8)
    height, width = image.shape[:2]
    assert len(offsets) == passes
    for moves in offsets:
        for i, y in enumerate(range(height - jump, jump, -1)):
            for j, x in enumerate(range(width - jump, jump, -1)):
                dx, dy = moves[i, j]
                pixels[y, x] = pixels[y + dy, x + dx]
    return smooth(pixels / 255)


def slow_motion(image: np.ndarray, radius: int, sigma: float, *, angle: float) -> np.ndarray:
    return oracle.magick_motion_blur(image, radius, sigma, angle).astype(float)


def zoom_in(image: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the central square of an (S, S, C) image with SciPy and crop the result."""
    side = len(image)
    crop = math.ceil(side / factor)
    first = (side - crop) // 2
    centre = image[first : first + crop, first : first + crop]
    large: np.ndarray = ndimage.zoom(centre, (factor, factor, 1), order=1)
    first = (len(large) - side) // 2
    return large[first : first + side, first : first + side]


def slow_zoom(image: np.ndarray, last: float) -> np.ndarray:
    factors = 1 + 0.01 * np.arange(round((last - 1) / 0.01) + 1)
    if last == 1.25:
        factors[-1] = np.nextafter(1.25, 2)  # as numpy.arange gives: one more pixel at 32 px
    total = sum(zoom_in(image.astype(float), factor) for factor in factors)
    return (image + total) / (len(factors) + 1)


def slow_snow(image: np.ndarray, *row: float, noise: np.ndarray, angle: float) -> np.ndarray:
    mean, spread, factor, threshold, radius, sigma, own = row
    flakes = zoom_in((mean + spread * noise)[..., None], factor)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    layer = oracle.magick_motion_blur((255 * flakes).astype(np.uint8), radius, sigma, angle) / 255
    unit = image / 255
    gray = unit @ [0.299, 0.587, 0.114]
    white = own * unit + (1 - own) * np.maximum(unit, gray[..., None] * 1.5 + 0.5)
    return 255 * np.clip(white + layer + np.rot90(layer, 2), 0, 1)


def slow_frost(
    image: np.ndarray, own: float, added: float, *, texture: int, top: int, left: int
) -> np.ndarray:
    cv2, side = pytest.importorskip("cv2"), len(image)
    picture: np.ndarray = cv2.imread(str(Path(frost_folder()) / PICTURES[texture]))[..., ::-1]
    picture = cv2.resize(picture, (0, 0), fx=SHRINK[side], fy=SHRINK[side])
    crop = picture[top : top + side, left : left + side]
    return np.clip(own * image.astype(float) + added * crop, 0, 255)


def slow_fog(
    image: np.ndarray, density: float, decay: float, *, displacements: list[np.ndarray]
) -> np.ndarray:
    side = len(image)
    plasma, step, amplitude = np.zeros((side, side)), side, 100.0
    moves = iter(displacements)
    while step >= 2:
        half = step // 2
        for down, right in ((half, half), (0, half), (half, 0)):  # centers, upper and left edges
            field = next(moves)
            near = (
                ((-half, -half), (-half, half), (half, -half), (half, half))
                if down and right
                else ((-half, 0), (half, 0), (0, -half), (0, half))
            )
            for (i, j), move in np.ndenumerate(field):
                y, x = i * step + down, j * step + right
                around = [plasma[(y + a) % side, (x + b) % side] for a, b in near]
                plasma[y, x] = np.mean(around) + amplitude**2 * move
        step, amplitude = half, amplitude / decay
    plasma = (plasma - plasma.min()) / (plasma.max() - plasma.min())
    unit = image / 255
    brightest = unit.max()
    foggy = (unit + density * plasma[..., None]) * brightest / (brightest + density)
    result: np.ndarray = 255 * np.clip(foggy, 0, 1)
    return result


def slow_brightness(image: np.ndarray, added: float) -> np.ndarray:
    hsv = rgb_to_hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    rgb: np.ndarray = hsv_to_rgb(hsv)
    return 255 * rgb


SHRINK = {64: 0.3, 32: 0.2}
SMALL: dict[tuple[Callable[..., np.ndarray], int], Any] = {  # transcribed from the original
    (slow_defocus, 64): ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    (slow_defocus, 32): ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    (slow_glass, 64): ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    (slow_glass, 32): ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    (slow_motion, 64): ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    (slow_motion, 32): ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    (slow_zoom, 64): ((1.06,), (1.11,), (1.15,), (1.2,), (1.25,)),
    (slow_zoom, 32): ((1.06,), (1.11,), (1.15,), (1.2,), (1.25,)),
    (slow_snow, 64): (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    (slow_snow, 32): (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    (slow_frost, 64): ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    (slow_frost, 32): ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    (slow_fog, 64): ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    (slow_fog, 32): ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    (slow_brightness, 64): ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    (slow_brightness, 32): ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
}


def small_draws(slow: Callable[..., np.ndarray], side: int, row: Any) -> dict[str, Any]:
    """Draw the inputs of the reference and of our function, in the layout of the original."""
    generator = np.random.default_rng(side)
    if slow is slow_glass:
        _, jump, passes = row
        shape = (passes, side - 2 * jump, side - 2 * jump, 2)
        return {"offsets": generator.integers(-jump, jump, shape)}
    if slow is slow_motion:
        return {"angle": generator.uniform(-45, 45)}
    if slow is slow_snow:
        return {"noise": generator.normal(size=(side, side)), "angle": generator.uniform(-135, -45)}
    if slow is slow_frost:
        textures = frost_textures(frost_folder(), (side, side), side, torch.device("cpu"))
        texture = int(generator.integers(5))
        room = textures.heights[texture] - side, textures.widths[texture] - side
        top, left = (int(generator.integers(int(free))) for free in room)
        return {"texture": texture, "top": top, "left": left}
    if slow is slow_fog:
        cells = [2**level for level in range(side.bit_length() - 1) for _ in range(3)]
        return {"displacements": [generator.uniform(-1, 1, (count, count)) for count in cells]}
    return {}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("slow", "side"), SMALL)
def test_equals_reference_of_small_profiles(
    slow: Callable[..., np.ndarray], side: int, severity: int
) -> None:
    name = slow.__name__.removeprefix("slow_")
    name = name if name in FUNCTIONS else f"{name}_blur"
    image, row = patterned_image(side, side), SMALL[slow, side][severity - 1]
    drawn = small_draws(slow, side, row)
    actual = apply(image, name, severity, drawn, profile=side, **options_of(name))
    assert_close(name, actual, np.clip(slow(image, *row, **drawn), 0, 255))
