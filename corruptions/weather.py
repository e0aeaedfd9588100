"""ImageNet-C's four weather corruptions: snow, frost, fog, brightness.

`corruptions.registry` has the conventions. Given the same fields, the results are the original's.
For `frost` this requires the original's photographs.
"""

import torch
from torch import Tensor

from corruptions.blur import interleave, magick_motion_blur, zoom_axis
from corruptions.frost import FrostDir, frost_textures
from corruptions.rng import Fields, Size, Stream

# Mean and standard deviation of the flake noise, its zoom factor, the threshold below which it is
# set to 0, radius and standard deviation of the motion blur in px, share of the original colors.
SNOW = {
    224: (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    64: (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    32: (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
}


def draw_snow(stream: Stream, severity: int, size: Size, profile: int) -> Fields:
    """Draw `noise`: standard normal, float32 (B, H, W); and `angle`: float32 (B,), in degrees.

    The angle is in [-135, -45): flakes fall downwards, so the one-sided path of the blur points up.
    """
    return stream.normal(*size), stream.uniform().mul_(90).sub_(135)


def snow(
    images: Tensor, severity: int, noise: Tensor, angle: Tensor, *, profile: int = 224
) -> Tensor:
    """Whiten the image, then add a snow layer and its copy rotated by 180 degrees.

    The snow layer is truncated to 8 bits twice. It is computed in the dtype of `noise`, so that
    float64 noise, such as the original's, rounds in the same direction as in the original.
    """
    mean, spread, factor, threshold, radius, sigma, own = SNOW[profile][severity - 1]
    flakes = _zoom(noise * spread + mean, factor)
    flakes = flakes.masked_fill_(flakes < threshold, 0).clamp_(0, 1).mul_(255).floor_()
    layer = magick_motion_blur(flakes[:, None], int(radius), sigma, angle).float()
    pixels = images.float()
    red, green, blue = pixels.unbind(1)
    white = (0.299 * red + 0.587 * green + 0.114 * blue).mul_(1.5).add_(255 / 2)
    white = torch.maximum(pixels, white[:, None]).mul_(1 - own).add_(pixels.mul_(own))
    return white.add_(layer).add_(layer.flip(2, 3)).clamp_(0, 255)


def _zoom(planes: Tensor, factor: float) -> Tensor:
    """Enlarge (B, H, W) planes bilinearly about their center and keep the size."""
    for axis in (1, 2):
        first, part = zoom_axis(planes.shape[axis], factor)
        behind = torch.from_numpy(first).to(planes.device)
        share = torch.from_numpy(part).to(planes.device, planes.dtype)
        if axis == 1:
            share = share[:, None]
        near = planes.index_select(axis, behind) * (1 - share)
        far = planes.index_select(axis, behind + 1) * share
        planes = near + far
    return planes


# Weights of the image and of the frost.
FROST = {
    224: ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    64: ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    32: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
}


def draw_frost(
    stream: Stream, severity: int, size: Size, profile: int, *, frost_dir: FrostDir = None
) -> Fields:
    """Draw `which` of the five textures, and `top` and `left` of the crop in px: int64 (B,).

    As in the original, the last row and column of a texture are never used. `frost_dir` is as for
    `frost_source`.
    """
    uniform = stream.uniform(3)
    textures = frost_textures(frost_dir, size, profile, uniform.device)
    which = (uniform[:, 0] * len(textures.heights)).long()
    top = uniform[:, 1] * (textures.heights[which] - size[0])
    left = uniform[:, 2] * (textures.widths[which] - size[1])
    return which, top.long(), left.long()


def frost(
    images: Tensor,
    severity: int,
    which: Tensor,
    top: Tensor,
    left: Tensor,
    *,
    profile: int = 224,
    frost_dir: FrostDir = None,
) -> Tensor:
    """Add a crop of a frost texture. `frost_dir` is as for `frost_source`."""
    own, added = FROST[profile][severity - 1]
    height, width = images.shape[2:]
    textures = frost_textures(frost_dir, (height, width), profile, images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    starts = textures.starts[which][:, None] + rows * textures.widths[which][:, None]
    crops = textures.pixels.unfold(1, width, 1)[:, left[:, None] + starts]
    return images.float().mul_(own).add_(crops.transpose(0, 1), alpha=added).clamp_(0, 255)


# Maximum density of the fog, and decay of its amplitude from level to level.
FOG = {
    224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
}


def draw_fog(stream: Stream, severity: int, size: Size, profile: int) -> Fields:
    """Draw the `displacements` of the plasma: uniform in [-1, 1), float32 (B, n * n - 1).

    n is the smallest power of two that is at least the longer side. The order is the original's:
    levels from coarse to fine, and in each level the centers, the upper edges and the left edges,
    row by row.
    """
    side = 1 << (max(size) - 1).bit_length()
    return (stream.uniform(side * side - 1).mul_(2).sub_(1),)


def fog(images: Tensor, severity: int, displacements: Tensor, *, profile: int = 224) -> Tensor:
    """Add a plasma fractal, then rescale to the brightest value of the image."""
    density, decay = FOG[profile][severity - 1]
    height, width = images.shape[2:]
    plasma = _plasma(displacements, decay)[:, None, :height, :width]
    pixels = images.float()
    brightest = pixels.amax((1, 2, 3), keepdim=True)
    pixels.add_(plasma, alpha=255 * density)
    return pixels.mul_(brightest / (brightest + 255 * density)).clamp_(0, 255)


def _plasma(displacements: Tensor, decay: float) -> Tensor:
    """Compute plasma fractals, (B, n, n) in [0, 1], by the diamond-square algorithm on a torus.

    The amplitude falls by the square of `decay` per level, because the original applies the decay
    twice. Each level interleaves the grid points with the centers and edges of their cells.
    """
    grid = displacements.new_zeros(len(displacements), 1, 1)
    used, amplitude = 0, 100.0**2
    while used < displacements.shape[1]:
        cells = grid.shape[1]
        count = 3 * cells * cells
        moves = displacements[:, used : used + count].view(-1, 3, cells, cells) * amplitude
        right, down = grid.roll(-1, 2), grid.roll(-1, 1)
        across = grid + right
        center = (across + across.roll(-1, 1)).mul_(0.25).add_(moves[:, 0])
        upper = (center + center.roll(1, 1)).add_(across).mul_(0.25).add_(moves[:, 1])
        left = (center + center.roll(1, 2)).add_(grid + down).mul_(0.25).add_(moves[:, 2])
        even, odd = interleave(grid, upper), interleave(left, center)
        grid = torch.stack((even, odd), 2).view(-1, 2 * cells, 2 * cells)
        used, amplitude = used + count, amplitude / decay**2
    low, high = grid.amin((1, 2), keepdim=True), grid.amax((1, 2), keepdim=True)
    return grid.sub_(low).div_(high - low)


# Amount added to the V channel of HSV, as a share of full scale.
BRIGHTNESS = {
    224: (0.1, 0.2, 0.3, 0.4, 0.5),
    64: (0.1, 0.2, 0.3, 0.4, 0.5),
    32: (0.05, 0.1, 0.15, 0.2, 0.3),
}


def brightness(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Raise the V channel of HSV, the maximum of R, G and B, and keep hue and saturation.

    All three channels are scaled by the same factor. Black has no hue and becomes gray.
    """
    pixels = images.float()
    value = pixels.amax(1, keepdim=True)
    raised = (value + 255 * BRIGHTNESS[profile][severity - 1]).clamp_(max=255)
    return torch.where(value > 0, pixels * (raised / value), raised).clamp_(max=255)
