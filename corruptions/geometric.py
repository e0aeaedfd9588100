"""The M-TLAT paper's four corruptions: occlusion, color_distortion, translation, rotation.

Section 4.1 of Laugros, Caplier and Ospici (2020) gives the ranges below. The first author's public
benchmark code of that year gives the sampling: uniform, integers with both ends included,
independent signs. Lengths are in px at a side of 224 and scale with the shorter side.

The paper chose each range so that a standard ResNet-50 loses 5 points of accuracy at the low end
and 30 at the high end. `corruptions.calibrate` does the same for another model. Severities 1 to 5
are five evenly spaced amounts from end to end. Severity None draws an amount for each image
uniformly.

`draw_NAME` has an option `bounds`, which replaces the range. `NAME` ignores `severity` and
`profile`. `corruptions.registry` has the other conventions.
"""

import math
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from corruptions.blur import interleave, take_pixels, wide_float
from corruptions.rng import Fields, Size, Stream

Bounds = tuple[float, float]  # low and high end of a range


def _check_bounds(bounds: Bounds, largest: float) -> Bounds:
    """Return the bounds. Raise ValueError unless they are a range from 0 to `largest`."""
    with suppress(TypeError, ValueError):  # not two numbers
        low, high = bounds
        if 0 <= low <= high <= largest:
            return bounds
    raise ValueError(f"bounds must satisfy 0 <= low <= high <= {largest:g}, got {bounds}")


def _amount(stream: Stream, severity: int | None, bounds: Bounds) -> Tensor:
    """Draw float32 (B,) uniformly from `bounds`, or return the amount of the severity."""
    low, high = bounds
    share = stream.uniform()
    if severity is not None:
        share.fill_((severity - 1) / 4)
    return share.mul_(high - low).add_(low)


def _whole(stream: Stream, severity: int | None, bounds: Bounds) -> Tensor:
    """Draw integers, int32 (B,), both ends included, or return the amount of the severity."""
    low, high = (math.floor(bound + 0.5) for bound in bounds)
    if severity is None:  # each integer has an interval of length 1
        return _amount(stream, None, (low, high + 1)).int().clamp_(max=high)
    return _amount(stream, severity, (low, high)).add_(0.5).int()


def _length(stream: Stream, severity: int | None, bounds: Bounds, size: Size) -> Tensor:
    """Draw lengths in px, int32 (B,), from `bounds` in px at a side of 224."""
    low, high = (bound * min(size) / 224 for bound in _check_bounds(bounds, 224))
    return _whole(stream, severity, (low, high))


def _sign(stream: Stream) -> Tensor:
    """Draw -1 or 1, int32 (B,)."""
    return stream.integers(0, 2).mul_(2).sub_(1)


# Side of the square in px.
OCCLUSION: Bounds = (60, 127)


def draw_occlusion(
    stream: Stream,
    severity: int | None,
    size: Size,
    profile: int,
    *,
    bounds: Bounds = OCCLUSION,
    grey: float | None = None,
) -> Fields:
    """Draw the square's `side`, `top` and `left` in px, int32 (B,), and its `grey`, float32 (B,).

    All positions inside the image are equally likely.

    Args:
        grey: gray value in [0, 1]. Default: drawn uniformly from [0, 1).
    """
    if grey is not None and not 0 <= grey <= 1:
        raise ValueError(f"grey must be a share of full scale, from 0 to 1, got {grey}")
    side = _length(stream, severity, bounds, size)
    top, left = (stream.uniform().mul_(length + 1 - side).int() for length in size)
    level = stream.uniform()
    return side, top, left, level if grey is None else level.fill_(grey)


def occlusion(
    images: Tensor,
    severity: int | None,
    side: Tensor,
    top: Tensor,
    left: Tensor,
    grey: Tensor,
    *,
    profile: int = 224,
) -> Tensor:
    """Cover a square with a gray value."""
    row, column = _pixel_grid(images)
    side, top, left = side[:, None, None], top[:, None, None], left[:, None, None]
    inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return torch.where(inside[:, None], 255 * grey[:, None, None, None], images.float())


# Amount added to one channel, as a share of full scale.
COLOR_DISTORTION: Bounds = (0.08, 0.30)


def draw_color_distortion(
    stream: Stream,
    severity: int | None,
    size: Size,
    profile: int,
    *,
    bounds: Bounds = COLOR_DISTORTION,
) -> Fields:
    """Draw `channel`: int32 (B,), in 0..2; and `amount`: float32 (B,), a share of full scale."""
    return stream.integers(0, 3), _amount(stream, severity, _check_bounds(bounds, 1))


def color_distortion(
    images: Tensor, severity: int | None, channel: Tensor, amount: Tensor, *, profile: int = 224
) -> Tensor:
    """Add a constant to one channel and clip at full scale."""
    chosen = torch.arange(3, device=images.device) == channel[:, None]
    added = 255 * amount[:, None] * chosen
    return (images + added[:, :, None, None]).clamp_(0, 255)


# Shift along each axis in px.
TRANSLATION: Bounds = (15, 62)


def draw_translation(
    stream: Stream, severity: int | None, size: Size, profile: int, *, bounds: Bounds = TRANSLATION
) -> Fields:
    """Draw `down` and `right` in px: int32 (B,), with independent lengths and signs."""
    down, right = (_length(stream, severity, bounds, size) for _ in size)
    return down.mul_(_sign(stream)), right.mul_(_sign(stream))


def translation(
    images: Tensor, severity: int | None, down: Tensor, right: Tensor, *, profile: int = 224
) -> Tensor:
    """Shift the image. Uncovered pixels are 0."""
    row, column = _pixel_grid(images)
    return _fetch(images, row - down[:, None, None], column - right[:, None, None])


# Angle in degrees.
ROTATION: Bounds = (8, 40)


def draw_rotation(
    stream: Stream, severity: int | None, size: Size, profile: int, *, bounds: Bounds = ROTATION
) -> Fields:
    """Draw `angle`: int32 (B,), in degrees, with a random sign."""
    return (_whole(stream, severity, _check_bounds(bounds, 180)).mul_(_sign(stream)),)


def rotation(
    images: Tensor,
    severity: int | None,
    angle: Tensor,
    *,
    profile: int = 224,
    bilinear: bool = False,
) -> Tensor:
    """Rotate the image counterclockwise about its center. Uncovered pixels are 0.

    Args:
        bilinear: interpolate bilinearly instead of taking the nearest pixel. The nearest is
            found with 16 fraction bits, like Pillow's, which also rounds the center: up to 0.3 % of
            an image's pixels, halfway between two, differ from Pillow's.
    """
    if not isinstance(bilinear, bool):
        raise TypeError(f"bilinear must be True or False, got {bilinear!r}")
    height, width = images.shape[2:]
    radians = torch.deg2rad(angle.to(wide_float(images.device)))[:, None, None]
    sine, cosine = radians.sin(), radians.cos()
    row, column = _pixel_grid(images)
    if bilinear:
        sine, cosine = sine.float(), cosine.float()
        x, y = column.float() + 0.5 - width / 2, row.float() + 0.5 - height / 2
        x, y = cosine * x - sine * y, sine * x + cosine * y
        grid = interleave(x * (2 / width), y * (2 / height))
        return F.grid_sample(images.float(), grid, "bilinear", "zeros", align_corners=False)
    whole = torch.int32 if 2 * max(height, width) + min(height, width) < 2**15 else torch.int64
    sine, cosine = (part.mul(2**16).round_().to(whole) for part in (sine, cosine))
    x, y = 2 * column + 1 - width, 2 * row + 1 - height  # twice the distance from the center
    source_column = (cosine * x - sine * y + (width << 16)).bitwise_right_shift_(17)
    source_row = (sine * x + cosine * y + (height << 16)).bitwise_right_shift_(17)
    return _fetch(images, source_row, source_column)


def _pixel_grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row indices, int32 (H, 1), and the column indices, int32 (W,)."""
    height, width = images.shape[2:]
    row = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    return row, torch.arange(width, dtype=torch.int32, device=images.device)


def _fetch(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Gather pixels at whole coordinates that broadcast to (B, H, W), as float32, 0 outside."""
    height, width = images.shape[2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return take_pixels(images, flat.flatten(1)).float().mul_(inside[:, None])
