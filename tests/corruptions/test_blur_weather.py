"""Test blurs and weather without the original: invariants, random draws and statistics.

The expected statistics are those of the original over many seeds, for a constant gray input of 128
at 224 px, from the tables of its definition. Each test states the sampling error that it allows.
"""

import math
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from corruptions import blur, corrupt, digital, weather
from corruptions.frost import FROST_DIR, PICTURES, frost_source, frost_textures
from corruptions.rng import Stream
from tests.support import imagenet_c_oracle as oracle
from tests.support.originals import SEVERITIES

MODULES: dict[str, ModuleType] = {
    **dict.fromkeys(("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"), blur),
    **dict.fromkeys(("snow", "frost", "fog", "brightness"), weather),
}
CPU = torch.device("cpu")
sides = st.integers(16, 48)
severities = st.sampled_from(SEVERITIES)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def procedural_frost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FROST_DIR, raising=False)


def draw(name: str, severity: int, size: tuple[int, int], profile: int, numbers: Tensor) -> Any:
    drawing = getattr(MODULES[name], f"draw_{name}", None)
    stream = Stream(0, name, severity, numbers)
    return drawing(stream, severity, size, profile) if drawing else ()


def run(name: str, images: Tensor, severity: int, profile: int = 224) -> Tensor:
    """Draw the fields for indices from 0, apply the corruption, and return the raw result."""
    size = (images.shape[2], images.shape[3])
    fields = draw(name, severity, size, profile, torch.arange(len(images)))
    out: Tensor = getattr(MODULES[name], name)(images, severity, *fields, profile=profile)
    return out


def random_images(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def grey(count: int, level: int = 128) -> Tensor:
    return torch.full((count, 3, 224, 224), level, dtype=torch.uint8)


# ------------------------------------------------------------------ properties


@pytest.mark.parametrize("name", MODULES)
@given(height=sides, width=sides, severity=severities, profile=st.sampled_from((224, 64, 32)))
def test_raw_result_does_not_depend_on_the_batch(
    name: str, height: int, width: int, severity: int, profile: int
) -> None:
    images = random_images(height * width, 3, 3, height, width)
    before = images.clone()
    together = run(name, images, severity, profile)
    assert together.dtype == torch.float32 and together.shape == images.shape
    assert together.min() >= 0 and together.max() <= 255
    assert torch.equal(images, before)
    fields = draw(name, severity, (height, width), profile, torch.tensor([2]))
    alone = getattr(MODULES[name], name)(images[2:], severity, *fields, profile=profile)
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("name", MODULES)
def test_raw_result_does_not_depend_on_the_threads(name: str) -> None:
    images, threads = random_images(0, 5, 3, 97, 131), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(name, images, 3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"])
def test_constant_image_stays(name: str, severity: int) -> None:
    gain = {4: 1.012975, 5: 1.010786}.get(severity, 1) if name == "defocus_blur" else 1
    images = torch.arange(0, 256, 17, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 40, 40)
    # In the original, the first Gaussian of glass blur lowers some gray values by one level.
    lost = 1 if name == "glass_blur" else 0
    difference = run(name, images, severity) - (images * gain).clamp(max=255)
    assert difference.max() <= 2e-3 and difference.min() >= -lost - 2e-3


@pytest.mark.parametrize("name", [name for name in MODULES if name != "frost"])
def test_grey_image_stays_grey(name: str) -> None:
    images = random_images(1, 2, 1, 40, 40).expand(-1, 3, -1, -1)
    result = run(name, images, 3)
    assert (result - result[:, :1]).abs().max() < 1e-3


@given(
    height=sides,
    width=sides,
    row=st.sampled_from(blur.MOTION_BLUR[224]),
    angle=st.floats(-360, 360),
)
def test_motion_blur_of_any_angle_and_shape(
    height: int, width: int, row: tuple[int, float], angle: float
) -> None:
    image = random_images(height, height, width, 3)
    expected = oracle.magick_motion_blur(image.numpy(), *row, angle)
    planes = image.permute(2, 0, 1)[None].double()
    actual = blur.magick_motion_blur(planes, *row, torch.tensor([angle], dtype=torch.float64))
    assert torch.equal(actual[0].permute(1, 2, 0).byte(), torch.from_numpy(expected))


@pytest.mark.parametrize("offset", [(0, 1), (1, 0), (1, 1), (1, -2), (-1, -1)])
def test_glass_blur_follows_the_longest_chains(offset: tuple[int, int]) -> None:
    """Check chains of copies as long as the image, where all pixels copy from the same side."""
    height, width, jump = 24, 37, 2
    inner = (1, 2, 2, height - 2 * jump, width - 2 * jump)
    offsets = torch.tensor(offset).view(1, 1, 2, 1, 1).expand(inner)
    expected = np.arange(height * width).reshape(height, width)
    for _ in range(2):
        for y in range(height - jump, jump, -1):
            for x in range(width - jump, jump, -1):
                expected[y, x] = expected[y + offset[0], x + offset[1]]
    actual = blur._glass_sources(offsets, jump, height, width)
    assert torch.equal(actual.view(height, width), torch.from_numpy(expected))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_treats_each_axis_by_itself(severity: int) -> None:
    column = random_images(2, 1, 3, 45, 1)
    oblong, square = (
        blur.zoom_blur(column.expand(-1, -1, -1, width), severity) for width in (61, 45)
    )
    torch.testing.assert_close(oblong[..., :45], square, rtol=0, atol=1e-3)
    turned = blur.zoom_blur(column.transpose(2, 3).expand(-1, -1, 61, -1), severity)
    torch.testing.assert_close(turned.transpose(2, 3), oblong, rtol=0, atol=1e-3)


def test_fog_of_oblong_image_is_a_crop() -> None:
    images = random_images(3, 2, 3, 64, 64)
    images[:, :, 0, 0] = 255  # so that the crop has the same maximum
    fields = draw("fog", 3, (64, 64), 224, torch.arange(2))
    whole = weather.fog(images, 3, *fields)
    part = weather.fog(images[:, :, :40, :56], 3, *fields)
    assert torch.equal(part, whole[:, :, :40, :56])


def test_snow_falls_twice_turned_by_half() -> None:
    result = run("snow", torch.zeros(2, 3, 40, 40, dtype=torch.uint8), 4)
    assert result.std() > 10
    assert torch.equal(result, result.flip(2, 3))


def test_snow_truncates_float64_noise_as_the_original_does() -> None:
    noise = torch.full((1, 64, 64), -9.0, dtype=torch.float64)
    noise[:, :32] = (201 / 255 - 1e-9 - 0.1) / 0.3  # flakes in the upper half, just below level 201
    black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    result = weather.snow(black, 1, noise, torch.tensor([-90.0]))
    assert result[0, :, 0].unique().tolist() == pytest.approx([127.5 * (1 - 0.8) + 200])


# ------------------------------------------------------------------ frost textures


def test_frost_crops_stay_off_the_last_row_and_column() -> None:
    textures = frost_textures(None, (512, 40), 224, CPU)
    which, top, left = draw("frost", 1, (510, 40), 224, torch.arange(2000))
    assert top.unique().tolist() == [0, 1]
    assert left.min() == 0 and left.max() == 512 - 40 - 1
    shares = which.bincount() / 2000
    assert len(shares) == 5 and (shares - 0.2).abs().max() < 5 * math.sqrt(0.16 / 2000)
    assert textures.heights.min() == 513  # enlarged so that there is more than one crop


def test_frost_is_the_crop_of_the_picture(tmp_path: Path) -> None:
    pictures = [random_images(number, 3, 60 + number, 50) for number in range(5)]
    for name, picture in zip(PICTURES, pictures, strict=True):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / name, "PNG")
    images = random_images(9, 5, 3, 20, 30)
    which, top, left = torch.tensor([4, 0, 1, 2, 3]), torch.arange(5), torch.arange(5) + 10
    actual = weather.frost(images, 5, which, top, left, frost_dir=tmp_path)
    for i in range(5):
        crop = pictures[which[i]][:, top[i] : top[i] + 20, left[i] : left[i] + 30]
        expected = (0.6 * images[i] + 0.75 * crop).clamp(max=255)
        torch.testing.assert_close(actual[i], expected)
    stream = Stream(0, "frost", 5, torch.arange(1000))
    which, top, left = weather.draw_frost(stream, 5, (20, 30), 224, frost_dir=tmp_path)
    assert (top - which).max() == 60 - 20 - 1 and left.max() == 50 - 30 - 1


def test_frost_source_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (32, 32)
    assert frost_source() == "procedural"
    assert frost_source(tmp_path) == str(tmp_path.resolve())
    with pytest.raises(FileNotFoundError, match=r"no frost1\.png"):
        frost_textures(tmp_path, size, 224, CPU)
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"not a picture")
    monkeypatch.setenv(FROST_DIR, str(tmp_path))
    assert frost_source() == str(tmp_path.resolve())
    with pytest.raises(ValueError, match=r"cannot read .*frost1\.png"):
        frost_textures(None, size, 224, CPU)
    for size_of_picture in ((1, 9), (9, 1)):
        Image.new("RGB", size_of_picture).save(tmp_path / "frost1.png")
        with pytest.raises(ValueError, match=r"frost1\.png \(it is less than 2 pixels"):
            frost_textures(None, size, 224, CPU)
    for error in (ValueError, Image.DecompressionBombError):
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", Mock(side_effect=error("damaged")))
            with pytest.raises(ValueError, match=r"cannot read .*frost1\.png \(damaged\)"):
                frost_textures(None, size, 224, CPU)
    monkeypatch.setenv(FROST_DIR, "")
    assert frost_source() == "procedural"


# Statistics of the photographs 1, 2, 2, 4 and 5: mean and standard deviation of R, G and B; the
# standard deviation of the luma within a crop, and of the mean luma between crops; exponent of the
# power spectrum; mean absolute difference of the luma between horizontal neighbors.
PHOTOGRAPHS = (
    ((77.7, 149.1, 165.7), (26.9, 16.5, 15.3), 15.5, 9.6, -1.35, 7.6),
    ((200.8, 205.4, 214.5), (21.4, 22.1, 22.6), 19.4, 6.4, -1.9, 7.9),
    ((200.8, 205.4, 214.5), (21.4, 22.1, 22.6), 19.4, 6.4, -1.9, 7.9),
    ((137.6, 152.8, 165.2), (28.5, 28.5, 29.9), 26.4, 6.2, -1.48, 13.2),
    ((112.4, 123.4, 134.8), (44.4, 43.3, 41.7), 35, 8.6, -1.86, 17.4),
)
# Exponents of the drawn textures' spectra from 100 to 150 cycles. Another drawing changes the frost
# of every user. Those of the photographs are -6.0, -8.6, -8.6, -5.9 and -1.5.
FINEST = (-5.05, -6.59, -6.49, -5.09, -1.30)


@pytest.mark.parametrize("number", range(5))
def test_procedural_frost_has_the_statistics_of_the_photographs(number: int) -> None:
    mean, spread, within, between, exponent, step = PHOTOGRAPHS[number]
    textures = frost_textures(None, (224, 224), 224, CPU)
    start = int(textures.starts[number])
    pixels = textures.pixels[:, start : start + 512 * 512].view(3, 512, 512).double()
    assert pixels.mean((1, 2)).tolist() == pytest.approx(mean, abs=1)
    assert pixels.std((1, 2)).tolist() == pytest.approx(spread, abs=1)
    luma = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    crops = luma.unfold(0, 224, 36).unfold(1, 224, 36).reshape(-1, 224, 224)
    assert float(crops.std((1, 2)).mean()) == pytest.approx(within, rel=0.2)
    assert float(crops.mean((1, 2)).std()) == pytest.approx(between, rel=0.6)
    assert exponent_of(crops, 4, 100) == pytest.approx(exponent, abs=0.15)
    assert exponent_of(crops[::9], 100, 150) == pytest.approx(FINEST[number], abs=0.05)
    assert float(luma.diff(dim=1).abs().mean()) == pytest.approx(step, rel=0.35)


def exponent_of(maps: Tensor, low: int, high: int) -> float:
    """Fit the exponent of the power spectrum of (N, 224, 224) maps from `low` to `high` cycles."""
    window = torch.hann_window(224, periodic=False, dtype=torch.float64)
    centred = (maps - maps.mean((1, 2), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(centred).abs().square().mean(0)
    cycles = torch.fft.fftfreq(224, 1 / 224)
    ring = torch.hypot(cycles[:, None], cycles).round().long().flatten()
    radial = (ring.bincount(power.flatten()) / ring.bincount())[low:high]
    return float(np.polyfit(np.log(np.arange(low, high)), radial.log().numpy(), 1)[0])


# ------------------------------------------------------------------ statistics of the draws

# Mean and standard deviation of the raw result on gray 128, and the standard deviation of the mean
# between seeds.
WEATHER = {
    "snow": (
        (173.2, 16.4, 0.5),
        (203.5, 22.2, 0.6),
        (202.5, 23.7, 1.4),
        (217.4, 24.2, 1.5),
        (237.2, 15.8, 0.8),
    ),
    "frost": (  # 384 crops of the photographs
        (193.5, 11.8, 15.3),
        (201.4, 17.4, 22.6),
        (203.5, 20.8, 26.1),
        (195.4, 21.3, 26.5),
        (199.4, 22.1, 29.0),
    ),
    "fog": (
        (79.8, 14.1, 7.3),
        (76.6, 15.1, 7.8),
        (73.5, 17.4, 8.7),
        (73.5, 18.8, 7.7),
        (72.0, 19.8, 6.6),
    ),
}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", WEATHER)
def test_weather_on_grey(name: str, severity: int) -> None:
    count = 128 if name == "frost" else 32  # the photographs differ the most
    mean, spread, between = WEATHER[name][severity - 1]
    result = run(name, grey(count), severity)
    means = result.mean((1, 2, 3))
    assert float(means.mean()) == pytest.approx(mean, abs=4 * between / math.sqrt(count) + 0.1)
    assert float(result.std((1, 2, 3)).mean()) == pytest.approx(spread, rel=0.12)
    assert float(means.std()) == pytest.approx(between, rel=0.5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_layer_on_black(severity: int) -> None:
    layer = (0.0142, 0.0393, 0.0402, 0.0620, 0.0620)[severity - 1]
    own = weather.SNOW[224][severity - 1][-1]
    result = run("snow", grey(16, 0), severity) - 127.5 * (1 - own)
    assert float(result.mean()) / (2 * 255) == pytest.approx(layer, rel=0.05)


@pytest.mark.parametrize(
    ("decay", "between", "within", "exponent"),
    [
        (2, 0.097, 0.150, -5),
        (1.7, 0.089, 0.164, -4.7),
        (1.5, 0.075, 0.175, -4.2),
        (1.4, 0.064, 0.18, -3.8),
    ],
)
def test_plasma(decay: float, between: float, within: float, exponent: float) -> None:
    count = 64
    (moves,) = draw("fog", 1, (224, 224), 224, torch.arange(count))
    maps = weather._plasma(moves, decay)
    assert maps.shape == (count, 256, 256)
    assert torch.equal(maps.amin((1, 2)), torch.zeros(count))
    assert torch.equal(maps.amax((1, 2)), torch.ones(count))
    crops = maps[:, :224, :224].double()
    means = crops.mean((1, 2))
    assert float(means.mean()) == pytest.approx(0.5, abs=4 * between / math.sqrt(count))
    assert float(means.std()) == pytest.approx(between, rel=4 / math.sqrt(2 * count))
    assert float(crops.std((1, 2)).mean()) == pytest.approx(within, rel=0.08)
    assert exponent_of(crops, 3, 50) == pytest.approx(exponent, abs=0.25)


@pytest.mark.parametrize(
    ("jump", "mean", "deviation", "itself"),
    [
        (1, (-0.51, -0.50), (0.50, 0.50), 0.245),
        (2, (-0.73, -0.73), (1.06, 1.34), 0.085),
        (3, (-0.81, -0.84), (1.80, 2.16), 0.041),
        (4, (-0.92, -0.91), (2.47, 3.01), 0.023),
    ],
)
def test_glass_displacement_of_one_pass(
    jump: int, mean: tuple[float, float], deviation: tuple[float, float], itself: float
) -> None:
    offsets = Stream(0, "glass_blur", 1, torch.arange(4)).integers(
        -jump, jump, 1, 2, 224 - 2 * jump, 224 - 2 * jump
    )
    source = blur._glass_sources(offsets, jump, 224, 224).view(-1, 224, 224)
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    moved = torch.stack((source // 224 - y, source % 224 - x))[:, :, 20:-20, 20:-20].double()
    assert moved.mean((1, 2, 3)).tolist() == pytest.approx(mean, abs=0.06)
    assert moved.std((1, 2, 3)).tolist() == pytest.approx(deviation, rel=0.03)
    assert float((moved == 0).all(0).double().mean()) == pytest.approx(itself, abs=0.01)


@pytest.mark.parametrize(("name", "low", "high"), [("motion_blur", -45, 45), ("snow", -135, -45)])
def test_directions_fill_their_range(name: str, low: float, high: float) -> None:
    angles = draw(name, 2, (16, 16), 224, torch.arange(4000))[-1]
    assert low <= angles.min() < low + 0.3 and high - 0.3 < angles.max() < high
    assert float(angles.mean()) == pytest.approx((low + high) / 2, abs=4 * 26 / math.sqrt(4000))


def test_zoom_blur_of_bands_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (2, 3, 41, 37), dtype=torch.uint8, generator=torch.Generator())
    whole = blur.zoom_blur(images, 3)
    blur._zoom_matrix.cache_clear()
    monkeypatch.setattr(blur, "ZOOM_BAND", 300)  # eight rows
    assert torch.equal(blur.zoom_blur(images, 3), whole)
    assert blur._zoom_matrix.cache_info().misses == 6


def test_images_of_many_sizes_keep_little_memory() -> None:
    before = digital._smoothing.cache_info().misses
    for side in range(20, 50):
        corrupt(torch.zeros(1, 3, side, side + 1, dtype=torch.uint8), "elastic_transform", 2)
    cache = digital._smoothing.cache_info()
    assert cache.misses - before > 10 >= cache.currsize  # severity 1 has no smoothing


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "zoom_blur", "fog", "brightness"])
def test_change_grows_with_severity(name: str) -> None:
    image = torch.arange(224, dtype=torch.float32)
    picture = (128 + 60 * torch.sin(image / 5) * torch.cos(image[:, None] / 9)).byte()
    images = picture.expand(4, 3, 224, 224)
    change = [float((run(name, images, s) - images).abs().mean()) for s in (1, 3, 5)]
    assert change[0] < change[1] < change[2]


def test_benchmark_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "time_corruptions.py"))
    script["main"]("--only fog zoom_blur --size 32 --batch 3 --repeats 1".split())
    lines = capsys.readouterr().out.splitlines()
    table = {line[:18].strip(): float(line[18:28]) for line in lines[-4:]}
    assert list(table) == ["fog", "zoom_blur", "sum", "mean of 10"]
    assert table["sum"] == pytest.approx(table["fog"] + table["zoom_blur"], abs=0.011)
    assert table["mean of 10"] == pytest.approx(table["sum"] / 2, abs=0.011)


def test_benchmark_prints_each_package_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "time_corruptions.py"))
    rows = {"fog": {"ours": 2.0, "a": 4.0, "b": 1.0}, "snow": {"ours": 2.0, "a": 8.0, "b": 3.0}}
    script["print_times"](rows)
    head, fog, _, total, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["corruption", "ms/image", "images/s", "a", "ratio", "b", "ratio"]
    assert fog == ["fog", "2.00", "500", "4.00", "2.0", "1.00", "0.5"]
    assert total == ["sum", "4.00", "250", "12.00", "3.0", "4.00", "1.0"]


def test_every_texture_of_frost_is_cropped_everywhere() -> None:
    stream = Stream(0, "frost", 3, torch.arange(2000))
    which, top, left = weather.draw_frost(stream, 3, (224, 224), 224)
    textures = frost_textures(None, (224, 224), 224, torch.device("cpu"))
    for texture in range(5):
        chosen = which == texture
        assert 330 < chosen.sum() < 470
        for place, sides in ((top, textures.heights), (left, textures.widths)):
            share = place[chosen] / (sides[texture] - 224)
            assert 0.45 < share.mean() < 0.55 and share.min() < 0.03 and share.max() > 0.97


@pytest.mark.parametrize("side", [32, 33, 64, 65])
def test_the_plasma_covers_the_image(side: int) -> None:
    images = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    fogged = corrupt(images, "fog", 5)
    assert fogged.shape == images.shape and fogged[0, 0, :, -1].float().std() > 1


def test_fog_is_rescaled_to_the_brightest_value_of_all_channels():
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 200  # whose other channels are black, and are lightened too
    (moves,) = weather.draw_fog(Stream(0, "fog", 1, torch.tensor([0])), 1, (32, 32), 32)
    assert (weather.fog(red.to(torch.uint8), 1, moves, profile=32)[:, 1:].amax() > 20).item()
