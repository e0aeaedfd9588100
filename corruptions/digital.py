"""ImageNet-C's digital corruptions: contrast, elastic_transform, pixelate, jpeg, saturate.

`corruptions.registry` has the conventions. Given the same fields, the results are the original's:
`saturate` up to rounding, and `elastic_transform` within the error that it states.
"""

import warnings
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torchvision.transforms.v2.functional import jpeg

from corruptions.blur import interleave, wide_float
from corruptions.jpeg import round_trip
from corruptions.rng import Fields, Size, Stream

# Share of the contrast that remains.
CONTRAST = {
    224: (0.4, 0.3, 0.2, 0.1, 0.05),
    64: (0.4, 0.3, 0.2, 0.1, 0.05),
    32: (0.75, 0.5, 0.4, 0.3, 0.15),
}


def contrast(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Blend each channel with its own mean over the image."""
    left = CONTRAST[profile][severity - 1]
    pixels = images.shape[2] * images.shape[3]
    mean = images.sum((2, 3), keepdim=True).float().div_(pixels)  # an integer sum is exact
    return torch.add(mean * (1 - left), images, alpha=left).clamp_(0, 255)


# Displacement before smoothing (alpha), sigma of the smoothing and affine jitter, as shares of the
# side. At 224 the original takes 244 px for the side, a typo that affects the published images.
ELASTIC_TRANSFORM = {
    224: (
        (2, 0.7, 0.1),
        (2, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    ),
    64: ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
    32: ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
}


def _elastic_lengths(severity: int, profile: int) -> list[float]:
    """Return alpha, sigma and jitter in px."""
    side = 244 if profile == 224 else profile
    return [side * share for share in ELASTIC_TRANSFORM[profile][severity - 1]]


def draw_elastic_transform(stream: Stream, severity: int, size: Size, profile: int) -> Fields:
    """Draw the affine jitter and the displacements before smoothing, all float32.

    `moves`: (B, 3, 2), the moves of three points as (x, y) in px; `along_x` and `along_y`:
    (B, H, W), uniform in [-1, 1).
    """
    jitter = _elastic_lengths(severity, profile)[2]
    fields = ((jitter, (3, 2)), (1, size), (1, size))
    return tuple(stream.uniform(*shape).mul_(2 * most).sub_(most) for most, shape in fields)


def elastic_transform(
    images: Tensor,
    severity: int,
    moves: Tensor,
    along_x: Tensor,
    along_y: Tensor,
    *,
    profile: int = 224,
) -> Tensor:
    """Warp by a random affine map, then by smooth random displacements, both bilinearly.

    Given the same fields, the result is within 0.01 of a level of the original's. With OpenCV 4 and
    older, which round the affine map's coordinates to 1/32 px, the difference is up to 4 levels.
    """
    alpha, sigma, _ = _elastic_lengths(severity, profile)
    height, width = images.shape[2:]
    rows = torch.arange(height, dtype=torch.float32, device=images.device)[:, None]
    columns = torch.arange(width, dtype=torch.float32, device=images.device)
    warped = _sample(images.float(), *_undo_affine(columns, rows, moves), align_corners=True)
    if alpha == 0:
        return warped.clamp_(0, 255)
    # In float64, because torch.set_float32_matmul_precision may let float32 products be rounded.
    wide = wide_float(images.device)
    down, right = (_smoothing(side, sigma).to(images.device, wide) for side in (height, width))
    x, y = ((alpha * (down @ f.to(wide) @ right.T)).float() for f in (along_x, along_y))
    return _sample(warped, x.add_(columns), y.add_(rows), align_corners=False).clamp_(0, 255)


def _undo_affine(x: Tensor, y: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Map output pixels (x, y) to their sources under the affine map that moves three points.

    The points are the center plus (q, q), (q, -q) and (-q, -q). q is a third of the shorter side.
    """
    height, width = y.shape[0], x.shape[0]
    arm = min(height, width) // 3
    corner_x, corner_y = width // 2 - arm, height // 2 - arm
    first, second, third = moves.to(x.dtype)[:, :, :, None, None].unbind(1)
    xx, yx = ((second - third) / (2 * arm)).unbind(1)  # extra move per step to the right
    xy, yy = ((first - second) / (2 * arm)).unbind(1)  # extra move per step down
    xx, yy = xx + 1, yy + 1
    x, y = x - corner_x - third[:, 0], y - corner_y - third[:, 1]
    determinant = xx * yy - xy * yx
    return (
        (yy * x - xy * y) / determinant + corner_x,
        (xx * y - yx * x) / determinant + corner_y,
    )


def _sample(images: Tensor, x: Tensor, y: Tensor, *, align_corners: bool) -> Tensor:
    """Sample float32 (B, C, H, W) bilinearly at pixel coordinates (B, H, W), reflecting borders.

    If `align_corners`, borders are reflected about the centers of the edge pixels (OpenCV's
    reflect101), else about the edges of the image (SciPy's reflect).
    """
    height, width = images.shape[2:]
    if align_corners:
        grid = interleave(x * (2 / (width - 1)), y * (2 / (height - 1))).sub_(1)
    else:
        grid = interleave((2 * x + 1) / width, (2 * y + 1) / height).sub_(1)
    return F.grid_sample(images, grid, "bilinear", "reflection", align_corners)


@lru_cache(maxsize=10)  # both sides of an image at the five severities
def _smoothing(size: int, sigma: float) -> Tensor:
    """Build the float64 (size, size) matrix of a Gaussian cut at 3 sigma with mirrored borders."""
    matrix = gaussian_filter1d(np.eye(size), sigma, axis=0, mode="reflect", truncate=3)
    return torch.from_numpy(matrix)


# Side of the small image, as a share of the full side.
PIXELATE = {
    224: (0.6, 0.5, 0.4, 0.3, 0.25),
    64: (0.9, 0.8, 0.7, 0.6, 0.5),
    32: (0.95, 0.9, 0.85, 0.75, 0.65),
}


def pixelate(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Shrink with a box filter and enlarge by repeating pixels.

    Bit for bit like Pillow, for images up to twice as tall as wide. (For taller ones, Pillow 13
    gives some values that are a level higher or lower.)
    """
    share = PIXELATE[profile][severity - 1]
    (height, width), device = images.shape[2:], images.device
    h, w = int(height * share), int(width * share)
    small = _box(_box(images.reshape(-1, width), w).view(-1, height), h)  # (h, wBC)
    small = small.view(h, w, -1).permute(1, 2, 0).reshape(w, -1)  # (w, BCh)
    wide = small.index_select(0, _nearest(w, width, device)).t().contiguous()  # (BCh, W)
    tall = wide.view(-1, h, width).index_select(1, _nearest(h, height, device))  # (BC, H, W)
    return tall.view_as(images)


def _nearest(size: int, full: int, device: torch.device) -> Tensor:
    """Return which of `size` pixels is repeated at each of `full` places, int64 (full,)."""
    places = (np.arange(full) + 0.5) * (size / full)  # Pillow's rounding, where two are as near
    return torch.from_numpy(places.astype(np.int64)).to(device)


def _box(planes: Tensor, size: int) -> Tensor:
    """Shrink the last axis of uint8 planes (N, W) with Pillow's 8-bit BOX filter, to (size, N).

    Rows are gathered instead of pixels, because whole rows are copied many times as fast.
    """
    sources, weights = (part.to(planes.device) for part in _box_taps(planes.shape[1], size))
    rows = planes.new_zeros(planes.shape[1] + 1, len(planes))
    rows[:-1] = planes.t()
    total = torch.zeros(size, len(planes), dtype=torch.int16, device=planes.device)
    for source in sources:
        total += rows.index_select(0, source)
    return total.int().mul_(weights[:, None]).add_(1 << 21).bitwise_right_shift_(22).byte()


@cache
def _box_taps(full: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the sources, int64 (n, size), and the neighbors' 22-bit weights, int32 (size,).

    Pillow averages up to n neighbors. It counts a pixel fully or not at all: a source that does not
    count is `full`, behind the last pixel. As in Pillow, comparisons use double precision.
    """
    scale = full / size
    center = (np.arange(size) + 0.5) * scale
    pixel = np.arange(full)[:, None]
    place = (pixel - center + 0.5) / scale
    first, end = (center - scale / 2 + 0.5).astype(int), (center + scale / 2 + 0.5).astype(int)
    members = (pixel >= first) & (pixel < end) & (place > -0.5) & (place <= 0.5)
    count = members.sum(axis=0)
    steps = np.arange(count.max())[:, None]
    sources = np.where(steps < count, members.argmax(axis=0) + steps, full)
    return torch.from_numpy(sources), torch.from_numpy(np.floor(2**22 / count + 0.5)).int()


# Quality, 1 to 100.
JPEG_COMPRESSION = {
    224: (25, 18, 15, 10, 7),
    64: (65, 58, 50, 40, 25),
    32: (80, 65, 58, 50, 40),
}


def jpeg_compression(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Encode as JPEG (4:2:0) and decode, bit for bit like Pillow.

    On a CPU this uses torchvision's codec, which is several times faster there. Other devices use
    `corruptions.jpeg`, because the CUDA codec keeps the chroma at full resolution.
    """
    quality = JPEG_COMPRESSION[profile][severity - 1]
    if images.device.type != "cpu":
        return round_trip(images, quality).byte()
    # The codec interleaves the channels of each image, which takes longer.
    interleaved = images.new_empty(len(images), *images.shape[2:], 3)
    for channel in range(3):
        interleaved[..., channel] = images[:, channel]
    with warnings.catch_warnings():  # torchvision's transform calls its own deprecated codec
        warnings.simplefilter("ignore", DeprecationWarning)
        result: Tensor = jpeg(interleaved.permute(0, 3, 1, 2), quality)
    return result


# Factor of the saturation of HSV, and what is added to it.
SATURATE = {
    224: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    64: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
    32: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}


def saturate(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Change the saturation of HSV, and keep hue and value.

    Each channel lies below the maximum of R, G and B by saturation times value times a share that
    the hue decides. Gray has no hue and counts as red, as in the original.
    """
    factor, added = SATURATE[profile][severity - 1]
    pixels = images.float()
    value = pixels.amax(1, keepdim=True)
    spread = value - pixels.amin(1, keepdim=True)
    red = torch.tensor([0.0, 1.0, 1.0], device=images.device)[:, None, None]
    share = torch.where(spread > 0, (value - pixels) / spread, red)
    depth = (spread * factor).add_(value, alpha=added)
    return value - share.mul_(torch.minimum(depth, value))
