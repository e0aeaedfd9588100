"""Compare the validation corruptions with references in NumPy, SciPy and the standard library."""

import colorsys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from corruptions import PROFILES, SEVERITIES, VALIDATION_CORRUPTIONS, corrupt
from corruptions.blur import GAUSSIAN_BLUR
from corruptions.digital import SATURATE
from corruptions.noise import SPECKLE_NOISE

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (20, 27, 3))
IMAGE[:4], IMAGE[4:8, :, 0] = RANDOM.integers(0, 256, (4, 27, 1)), 255  # gray and full red
IMAGE[0, :3] = np.array([[0], [1], [255]])
PIXELS = torch.from_numpy(IMAGE).to(torch.uint8).permute(2, 0, 1)[None]
SETTINGS = [(profile, severity) for profile in PROFILES for severity in SEVERITIES]


def assert_close(name: str, setting: tuple[int, int], fields: tuple, expected: np.ndarray) -> None:
    """Compare the raw result with a reference in [0, 1] that is not clipped yet."""
    profile, severity = setting
    expected = np.clip(expected, 0, 1) * 255
    function = VALIDATION_CORRUPTIONS[name].function
    raw = function(PIXELS, severity, *fields, profile=profile)[0].permute(1, 2, 0)
    assert raw.dtype == torch.float32
    np.testing.assert_allclose(raw.numpy(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_speckle_noise_grows_with_the_pixel(setting: tuple[int, int]) -> None:
    scale = SPECKLE_NOISE[setting[0]][setting[1] - 1]
    noise = RANDOM.normal(size=IMAGE.shape)
    field = torch.from_numpy(noise).float().permute(2, 0, 1)[None]
    expected = IMAGE / 255 + IMAGE / 255 * scale * noise
    assert_close("speckle_noise", setting, (field,), expected)


def test_speckle_noise_draws_standard_normals_of_its_own() -> None:
    gray = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)
    noise = (corrupt(gray, "speckle_noise", 1, profile=224) + 0.5 - gray) / (100 * 0.15)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    gaussian = corrupt(gray, "gaussian_noise", 1, profile=224)
    pair = torch.stack([noise.flatten(), gaussian.flatten().float()])
    assert abs(pair.corrcoef()[0, 1]) < 0.03


@pytest.mark.parametrize("setting", SETTINGS)
def test_gaussian_blur_is_that_of_scipy(setting: tuple[int, int]) -> None:
    sigma = GAUSSIAN_BLUR[setting[0]][setting[1] - 1]
    expected = gaussian_filter(IMAGE / 255, (sigma, sigma, 0), mode="nearest", truncate=4.0)
    assert_close("gaussian_blur", setting, (), expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_saturate_changes_the_saturation_of_hsv(setting: tuple[int, int]) -> None:
    factor, added = SATURATE[setting[0]][setting[1] - 1]
    expected = np.empty(IMAGE.shape)
    for place in np.ndindex(IMAGE.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*IMAGE[place] / 255)
        saturation = min(max(saturation * factor + added, 0.0), 1.0)
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, value)
    assert_close("saturate", setting, (), expected)
