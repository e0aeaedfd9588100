"""Test the paper's four corruptions: slow references, ranges of the draws, and the calibration."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from corruptions import CORRUPTIONS, Stream, calibrate, calibration, corrupt, geometric

SIZE = (30, 41)


def picture(height: int = 30, width: int = 41) -> Tensor:
    """Draw one uint8 noise image without zeros, so that uncovered pixels can be identified."""
    generator = torch.Generator().manual_seed(5)
    shape = (1, 3, height, width)
    return torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)


def draw(
    name: str, severity: int | None, count: int = 4000, size: tuple[int, int] = (224, 224)
) -> list[np.ndarray]:
    """Draw the random fields of `count` images."""
    function = CORRUPTIONS[name].draw
    assert function is not None
    stream = Stream(0, name, severity, torch.arange(count))
    return [field.numpy() for field in function(stream, severity, size, 224)]


# ------------------------------------------------------------------ applying


def test_occlusion_covers_exactly_its_square() -> None:
    image = picture()
    fields = torch.tensor([9]), torch.tensor([21]), torch.tensor([32]), torch.tensor([0.5])
    expected = image[0].float()
    for row in range(21, 30):
        for column in range(32, 41):
            expected[:, row, column] = 127.5
    assert torch.equal(geometric.occlusion(image, None, *fields)[0], expected)


def test_color_distortion_leaves_black_black_in_the_other_channels() -> None:
    black = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    raw = geometric.color_distortion(black, None, torch.tensor([1]), torch.tensor([0.2]))
    assert raw.amax((0, 2, 3)).tolist() == pytest.approx([0, 51, 0])


def test_color_distortion_adds_to_one_channel() -> None:
    image = picture()
    raw = geometric.color_distortion(image, None, torch.tensor([2]), torch.tensor([0.2]))
    expected = image.float()
    expected[:, 2] = (expected[:, 2] + 51).clamp(max=255)
    torch.testing.assert_close(raw, expected)


@pytest.mark.parametrize(("down", "right"), [(4, -7), (-29, 0), (30, 3), (0, -60)])
def test_translation_moves_every_pixel(down: int, right: int) -> None:
    image = picture()
    expected = torch.zeros(3, *SIZE)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            if 0 <= row - down < SIZE[0] and 0 <= column - right < SIZE[1]:
                expected[:, row, column] = image[0, :, row - down, column - right]
    raw = geometric.translation(image, None, torch.tensor([down]), torch.tensor([right]))
    assert torch.equal(raw[0], expected)


@pytest.mark.parametrize("angle", [8, -8, 17, 40, -33, 90, 180, 0])
@pytest.mark.parametrize("size", [(224, 224), (30, 41), (16, 40_000)])
def test_nearest_rotation_is_pillow(angle: int, size: tuple[int, int]) -> None:
    image = picture(*size)
    raw = geometric.rotation(image, None, torch.tensor([angle]))[0].permute(1, 2, 0).numpy()
    expected = Image.fromarray(image[0].permute(1, 2, 0).numpy()).rotate(angle)
    differ = (raw != np.asarray(expected)).any(axis=2)
    assert differ.mean() < 2e-3  # sources on the edge between two pixels


@pytest.mark.parametrize("angle", [8, -25, 40])
def test_bilinear_rotation_interpolates(angle: int) -> None:
    """Check a linear ramp: each pixel has the value of the ramp at its source position."""
    row, column = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = (row + 2 * column).to(torch.uint8).expand(1, 3, -1, -1)
    raw = geometric.rotation(image, None, torch.tensor([angle]), bilinear=True)[0, 0]
    radians = np.deg2rad(angle)
    x, y = column - 31.5, row - 31.5
    source_x = np.cos(radians) * x - np.sin(radians) * y + 31.5
    source_y = np.sin(radians) * x + np.cos(radians) * y + 31.5
    inside = (source_x > 0) & (source_x < 63) & (source_y > 0) & (source_y < 63)
    torch.testing.assert_close(raw[inside], (source_y + 2 * source_x)[inside], rtol=0, atol=2e-3)
    outside = (source_x < -1) | (source_x > 64) | (source_y < -1) | (source_y > 64)
    assert inside.sum() > 2000 and outside.sum() > 50 and (raw[outside] == 0).all()


# ------------------------------------------------------------------ drawing


def assert_uniform(values: np.ndarray, low: int, high: int) -> None:
    """Check that all integers from low to high occur, about equally often."""
    counts = np.bincount(values - low, minlength=high - low + 1)
    expected = len(values) / len(counts)
    assert len(counts) == high - low + 1 and counts.min() > 0
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_ranges_are_the_paper_s_with_both_ends() -> None:
    side, top, left, grey = draw("occlusion", None, 20000)
    assert_uniform(side, 60, 127)
    for place in (top, left):  # uniform over the free space, never outside the image
        assert place.min() == 0 and (place + side).max() == 224
        assert np.mean(place / (224 - side)) == pytest.approx(0.5, abs=0.01)
    assert grey.min() >= 0 and grey.max() < 1 and grey.mean() == pytest.approx(0.5, abs=0.01)
    channel, amount = draw("color_distortion", None, 20000)
    assert_uniform(channel, 0, 2)
    assert amount.min() == pytest.approx(0.08, abs=1e-3)
    assert amount.max() == pytest.approx(0.30, abs=1e-3)
    assert amount.mean() == pytest.approx(0.19, abs=2e-3)
    down, right = draw("translation", None, 20000)
    (angle,) = draw("rotation", None, 20000)
    for values, low, high in ((down, 15, 62), (right, 15, 62), (angle, 8, 40)):
        assert_uniform(np.abs(values), low, high)
        assert np.mean(values > 0) == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.03
    assert abs(np.corrcoef(np.abs(down), np.abs(right))[0, 1]) < 0.03


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_severities_are_five_equal_steps(severity: int) -> None:
    step = severity - 1
    assert set(draw("occlusion", severity)[0]) == {[60, 77, 94, 110, 127][step]}
    np.testing.assert_allclose(draw("color_distortion", severity)[1], 0.08 + 0.055 * step, 1e-6)
    for values in draw("translation", severity):
        length = [15, 27, 39, 50, 62][step]
        assert set(values) == {-length, length}
    assert set(draw("rotation", severity)[0]) == {-8 - 8 * step, 8 + 8 * step}


def test_lengths_scale_with_the_shorter_side() -> None:
    size = (112, 300)
    side, top, left, _ = draw("occlusion", None, 4000, size)
    assert (side.min(), side.max()) == (30, 64)
    assert (top + side).max() == 112 and (left + side).max() > 295
    assert set(np.abs(draw("translation", 5, 10, size)[1])) == {31}
    assert set(np.abs(draw("rotation", 5, 10, size)[0])) == {40}


def test_options_reach_the_draws() -> None:
    image = torch.zeros(5, 3, 224, 224, dtype=torch.uint8)
    grey = corrupt(image, "occlusion", None, grey=0.5, bounds=(10, 10))
    assert set(grey.flatten().tolist()) == {0, 127} and (grey > 0).sum() == 5 * 3 * 10 * 10
    image = picture(64, 64)
    smooth = corrupt(image, "rotation", 3, bilinear=True)
    assert not torch.equal(smooth, corrupt(image, "rotation", 3))
    assert torch.equal(corrupt(image, "rotation", None, bounds=(0, 0)), image)


# ------------------------------------------------------------------ calibrating


def brittle(threshold: float, measure: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a two-class model that fails where the measured change exceeds a threshold."""

    def model(images: Tensor) -> Tensor:
        assert images.dtype == torch.float32 and images.max() <= 1
        failed = (measure(images) > threshold).float()
        return torch.stack([1 - failed, failed], dim=1)

    return model


def test_calibration_finds_where_accuracy_falls() -> None:
    """Check 100 images: the model fails on image k when more than k % of its pixels are black."""
    images = torch.full((100, 3, 64, 64), 200, dtype=torch.uint8)
    images[:, 1] = torch.arange(100)[:, None, None]  # the tolerance, encoded in the image
    labels = torch.zeros(100, dtype=torch.int64)

    def hidden(pictures: Tensor) -> Tensor:
        tolerance = pictures[:, 1].amax((1, 2)) * 255 / 100
        return (pictures[:, 0] == 0).float().mean((1, 2)) - tolerance

    low, high = calibrate(brittle(0.0, hidden), images, labels, "translation", batch_size=33)
    for end, loss in ((low, 0.05), (high, 0.30)):
        kept = (1 - round(end * 64 / 224) / 64) ** 2  # both axes move
        assert 1 - kept == pytest.approx(loss, abs=0.04)
    looser = calibrate(brittle(0.0, hidden), images, labels, "translation", losses=(0.30, 0.60))
    assert looser[0] == high and looser[1] > high
    assert corrupt(images, "translation", None, bounds=(low, high)).shape == images.shape


@pytest.mark.parametrize("name", calibration._SEARCH)
def test_each_end_is_the_smallest_amount_with_its_loss(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = torch.zeros(20, 3, 16, 16), torch.zeros(20, dtype=torch.int64)
    largest, steps = calibration._SEARCH[name]
    for step in range(1, steps + 1):
        smallest = largest * step / steps
        right = lambda *given, smallest=smallest: 20 - (given[-1] >= smallest)  # noqa: E731
        monkeypatch.setattr(calibration, "_correct", right)
        ends = calibrate(torch.nn.Identity(), images, labels, name, losses=(0.05, 0.05))
        assert ends == (smallest, smallest)  # which costs exactly one of the twenty


def test_calibration_does_not_depend_on_the_batches() -> None:
    """Check that each image has its own draw in any batch.

    The draw selects the channel, and the model fails only on images that become redder.
    """
    images = torch.full((100, 3, 32, 32), 60, dtype=torch.uint8)
    images[:, 2] = torch.arange(100)[:, None, None]  # the tolerance, encoded in the image
    labels = torch.zeros(100, dtype=torch.int64)
    model = brittle(60 / 255, lambda pictures: (pictures[:, 0] - pictures[:, 2])[:, 0, 0])
    ranges = {
        calibrate(model, images, labels, "color_distortion", losses=(0.1, 0.2), batch_size=size)
        for size in (7, 30, 100)
    }
    assert len(ranges) == 1


def test_calibration_refuses_what_it_cannot_find() -> None:
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(4, dtype=torch.int64)
    immune = brittle(1.0, lambda pictures: pictures[:, 0, 0, 0])
    with pytest.raises(
        ValueError, match=r"rotation costs this model about 0\.000 of accuracy at m"
    ):
        calibrate(immune, images, labels, "rotation")
    with pytest.raises(ValueError, match="got 'fog'"):
        calibrate(immune, images, labels, "fog")
    with pytest.raises(ValueError, match=r"got 4 and shape \(3,\)"):
        calibrate(immune, images, labels[:3], "rotation")
    with pytest.raises(ValueError, match=r"got 4 and shape \(4, 1\)"):
        calibrate(immune, images, labels[:, None], "rotation")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        calibrate(immune, images, labels, "rotation", batch_size=0)
    with pytest.raises(ValueError, match=r"losses.*\(0.3, 0.05\)"):
        calibrate(immune, images, labels, "rotation", losses=(0.3, 0.05))


def test_a_rotation_that_costs_most_below_90_degrees_is_calibrated() -> None:
    """Check a model that looks for the corners of a square, which 90 degrees restore."""
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    images[20:, :, 4:28, 4:28] = 255
    labels = torch.arange(40) // 20

    def model(x: Tensor) -> Tensor:
        corners = x[:, 0, [5, 5, 26, 26], [5, 26, 5, 26]].sum(1)
        return torch.stack([torch.ones_like(corners), corners], 1)

    def accuracy(angle: float) -> float:
        turned = corrupt(images, "rotation", 1, bounds=(angle, angle)).float() / 255
        return (model(turned).argmax(1) == labels).float().mean().item()

    assert accuracy(90) == 1
    low, high = calibrate(model, images, labels, "rotation")
    assert low <= high < 45 and 1 - accuracy(high) >= 0.3
    with pytest.raises(
        ValueError, match=r"rotation costs this model about 0\.500 of accuracy at mo"
    ):
        calibrate(model, images, labels, "rotation", losses=(0.05, 0.6))


def test_a_loss_of_exactly_5_points_is_5_points() -> None:
    """Check 20 images of which 19 are right, and one of these is lost: 0.95 - 0.90 < 0.05."""
    images = torch.full((20, 3, 32, 32), 100, dtype=torch.uint8)
    labels = (torch.arange(20) == 19).long()
    images[0] = 160  # the brighter image is lost where its color shows

    def shown(x: Tensor) -> Tensor:
        pixel = x[:, :, 0, 0]
        return (pixel.amax(1) - pixel.amin(1)) * (pixel.median(1).values > 0.5)

    model = brittle(0.1, shown)
    search = partial(calibrate, model, labels=labels, name="color_distortion", losses=(0.05, 0.05))
    low, high = search(images=images)
    assert low == high and 0.1 < low < 0.11
    assert search(images=images.double() / 255) == (low, high)  # the model gets float32


@pytest.mark.parametrize(
    ("name", "largest", "finest"),
    [("occlusion", 224, 1.0), ("color_distortion", 1, 0.005), ("translation", 224, 1.0),
     ("rotation", 90, 1.0)],
)  # fmt: skip
def test_the_ends_are_where_the_losses_are(
    monkeypatch: pytest.MonkeyPatch, name: str, largest: float, finest: float
) -> None:
    """Check the bounds with a model whose accuracy is known at every amount.

    The model misclassifies image i from the amount `lost_from[i]` on.
    """
    count = 100
    lost_from = largest * (torch.arange(count).double() + 0.4) / count
    lost_from[0] = 1e-4 * largest
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    amounts: list[float] = []

    def made(x: Tensor, kind: str, severity: int, **options: object) -> Tensor:
        low, high = options["bounds"]
        assert (kind, options["seed"], low) == (name, 3, high) and 0 <= low <= largest
        assert options["index"].tolist() == x[:, 0, 0, 0].tolist()
        amounts.append(low)
        return x

    def model(x: Tensor) -> Tensor:
        number = (255 * x[:, 0, 0, 0]).double()
        assert torch.allclose(number, number.round(), atol=1e-4)
        lost = lost_from[number.round().long()] <= amounts[-1]
        return torch.stack([~lost, lost], 1).float()

    monkeypatch.setattr(calibration, "corrupt", made)
    labels = torch.zeros(count, dtype=torch.int64)
    search = partial(calibrate, model, name=name, seed=3)
    steps = math.ceil(math.log2(largest / finest))
    for losses in ({}, {"losses": (0.05, 0.05)}, {"losses": (0.25, 0.75)}):
        ends = search(images, labels, **losses)
        for end, loss in zip(ends, losses.get("losses", (0.05, 0.30)), strict=True):
            least = lost_from[round(count * loss) - 1].item()  # smallest amount with this loss
            assert least <= end <= least + finest
            assert end * 2**steps / largest == pytest.approx(round(end * 2**steps / largest))
    lost_from[25:] = math.inf  # the loss is at most a quarter
    assert search(images, labels, losses=(0.05, 0.25))[1] >= lost_from[24]
    with pytest.raises(ValueError, match="losses must satisfy 0 < low"):
        search(images, labels, losses=(0.0, 0.25))
    assert search(images[:1], labels[:1], losses=(0.5, 1.0))[0] <= finest
