"""Test the draws of the noise corruptions, with exact Poisson tables, and of elastic_transform."""

import numpy as np
import pytest
import torch
from scipy import stats

from corruptions import CORRUPTIONS, Stream, corrupt
from corruptions.noise import SHOT_NOISE, _poisson_tables

# Mean and standard deviation of the original's raw result on constant 128 at 224 px, for the
# severities 1 to 5.
MOMENTS = {
    "gaussian_noise": (
        (128.00, 20.39),
        (128.00, 30.58),
        (128.00, 45.64),
        (127.98, 63.06),
        (127.91, 80.81),
    ),
    "shot_noise": (
        (127.98, 23.32),
        (127.99, 36.08),
        (127.71, 51.22),
        (124.76, 73.45),
        (120.25, 87.99),
    ),
    "impulse_noise": (
        (127.99, 22.02),
        (127.97, 31.20),
        (127.95, 38.25),
        (127.88, 52.59),
        (127.82, 66.26),
    ),
}


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", MOMENTS)
def test_moments_on_grey_are_the_original_s(name: str, severity: int) -> None:
    images, entry = torch.full((4, 3, 224, 224), 128, dtype=torch.uint8), CORRUPTIONS[name]
    mean, spread = MOMENTS[name][severity - 1]
    means, spreads = [], []
    for start in (0, 4, 8, 12):
        stream = Stream(0, name, severity, torch.arange(start, start + 4))
        given = {"images": images} if name == "shot_noise" else {}
        assert entry.draw is not None
        fields = entry.draw(stream, severity, (224, 224), 224, **given)
        raw = entry.function(images, severity, *fields).double()
        means += raw.mean((1, 2, 3)).tolist()
        spreads += raw.std((1, 2, 3)).tolist()
    error = spread / np.sqrt(raw[0].numel())  # of one image's mean, for independent values
    assert np.mean(means) == pytest.approx(mean, abs=error + 0.02)  # 4 errors of the mean of 16
    assert np.std(means) == pytest.approx(error, rel=0.6)
    rare = 4e-3 if name == "impulse_noise" else 0.0  # few values determine its deviation
    assert np.mean(spreads) == pytest.approx(spread, rel=2e-3 + rare)


@pytest.mark.parametrize("full_scale", sorted({c for row in SHOT_NOISE.values() for c in row}))
def test_poisson_tables_are_exact(full_scale: int) -> None:
    """Check that the fraction of random words that gives each count is its probability."""
    thresholds, aliases = _poisson_tables(full_scale)
    slots = thresholds.shape[1]
    kept = (thresholds.astype(np.float64) + 2**31) / 2**32
    for pixel in (0, 1, 2, 40, 127, 128, 254, 255):
        mass = kept[pixel] + np.bincount(aliases[pixel], 1 - kept[pixel], slots)
        exact = stats.poisson.pmf(np.arange(slots), full_scale * pixel / 255) * slots
        np.testing.assert_allclose(mass, exact, rtol=0, atol=slots * 2.0**-32 + 1e-9)
    assert stats.poisson.sf(slots - 1, full_scale) < 2.0**-40


@pytest.mark.parametrize(("profile", "full_scale"), [(224, 25), (64, 100), (32, 250)])
@pytest.mark.parametrize("pixel", [3, 100, 255])
def test_photon_counts_are_poisson(pixel: int, profile: int, full_scale: int) -> None:
    images = torch.full((8, 3, 64, 64), pixel, dtype=torch.uint8)
    draw = CORRUPTIONS["shot_noise"].draw
    assert draw is not None
    stream = Stream(1, "shot_noise", 2, torch.arange(8))
    (counts,) = draw(stream, 2, (64, 64), profile, images=images)
    seen = np.bincount(counts.flatten().numpy())
    expected = stats.poisson.pmf(np.arange(len(seen)), full_scale * pixel / 255) * counts.numel()
    common = expected > 10
    rest = [seen[~common].sum()], [counts.numel() - expected[common].sum()]
    chi2 = stats.chisquare(np.append(seen[common], rest[0]), np.append(expected[common], rest[1]))
    assert chi2.pvalue > 1e-4


@pytest.mark.parametrize("name", MOMENTS)
def test_noise_is_independent(name: str) -> None:
    """Check independence of images, seeds, severities, channels and neighboring pixels."""
    images = torch.full((2, 3, 128, 128), 128, dtype=torch.uint8)
    base = corrupt(images, name, 3)
    other_seed, other_severity = corrupt(images, name, 3, seed=1), corrupt(images, name, 4)
    pairs = [
        (base[0], base[1]),
        (base[0], other_seed[0]),
        (base[0], other_severity[0]),
        (base[0, 0], base[0, 1]),
        (base[0, :, :, 1:], base[0, :, :, :-1]),
        (base[0, :, 1:], base[0, :, :-1]),
    ]
    for one, other in pairs:
        sample = np.stack([one.flatten().numpy(), other.flatten().numpy()]).astype(float)
        assert abs(np.corrcoef(sample)[0, 1]) * np.sqrt(sample.shape[1]) < 4


@pytest.mark.parametrize(
    ("severity", "profile", "jitter"),
    [(1, 224, 24.4), (2, 224, 48.8), (5, 224, 4.88), (2, 64, 3.84), (3, 32, 1.92)],
)
def test_elastic_draws_are_uniform(severity: int, profile: int, jitter: float) -> None:
    """Check that draws fill their range, with the mean and deviation of a uniform variable."""
    draw = CORRUPTIONS["elastic_transform"].draw
    assert draw is not None
    stream = Stream(0, "elastic_transform", severity, torch.arange(500))
    moves, along_x, along_y = draw(stream, severity, (20, 30), profile)
    assert moves.shape == (500, 3, 2) and along_x.shape == along_y.shape == (500, 20, 30)
    for field in (moves / jitter, along_x, along_y):
        error = 1 / np.sqrt(3 * field.numel())
        assert -1 <= field.min() < -0.995 and 0.995 < field.max() <= 1
        assert abs(field.mean()) < 4 * error
        assert field.std() == pytest.approx(3**-0.5, abs=4 * error)
    correlation = np.corrcoef(along_x.flatten(), along_y.flatten())[0, 1]
    assert abs(correlation) * np.sqrt(along_x.numel()) < 4
