"""ImageNet-C's blur corruptions: defocus, glass, motion and zoom blur, and gaussian_blur.

`corruptions.registry` has the conventions. Given the same fields, the result of `glass_blur` is the
original's, and the others are equal to it up to rounding.
"""

import math
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from scipy.ndimage import gaussian_filter
from torch import Tensor

from corruptions.rng import Fields, Size, Stream

# Radius of the disk in px, and standard deviation in px of the Gaussian that smooths its edge.
DEFOCUS_BLUR = {
    224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
}


def defocus_blur(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Correlate with a smoothed disk. Borders are mirrored about the edge pixels."""
    kernel = torch.from_numpy(_disk(*DEFOCUS_BLUR[profile][severity - 1])).to(images.device)
    return _correlate(images.float(), kernel, "reflect").clamp_(0, 255)


@cache
def _disk(radius: float, sigma: float) -> np.ndarray:
    """Build the float32 disk kernel. At radius 8 and 10 it sums to more than 1.

    The original smooths the disk inside its array and mirrors the array at the border. Disks of
    radius 8 and 10 touch the border, and the mirrored values count twice. The published images
    have this gain.
    """
    reach = 8 if radius <= 8 else int(radius)
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    smooth: np.ndarray = gaussian_filter(disk, sigma, mode="mirror", radius=1 + (radius > 8))
    return smooth.astype(np.float32)


def _correlate(planes: Tensor, kernels: Tensor, border: str) -> Tensor:
    """Correlate (B, C, H, W) planes with odd square kernels (K, K) or (B, 1, K, K) by FFT.

    The spectra are multiplied by separate real operations. The rounding of a fused complex product
    depends on its place in memory, so the result would depend on the batch and the number of
    threads. A single plane is duplicated before the inverse transform for the same reason: MKL
    rounds a plane differently if it is the only one.
    """
    height, width = planes.shape[-2:]
    reach = kernels.shape[-1] // 2
    padded = F.pad(planes, (reach, reach, reach, reach), mode=border)
    size = [next_fast_len(side, real=True) for side in padded.shape[-2:]]
    image, kernel = torch.fft.rfft2(padded, s=size), torch.fft.rfft2(kernels, s=size)
    real = image.real * kernel.real + image.imag * kernel.imag  # by the conjugate: correlation
    imaginary = image.imag * kernel.real - image.real * kernel.imag
    spectrum = torch.complex(real, imaginary)
    if planes.shape[:2] == (1, 1):
        spectrum = spectrum.repeat(2, 1, 1, 1)
    full: Tensor = torch.fft.irfft2(spectrum, s=size)
    return full[: len(planes), :, :height, :width]


# Standard deviation of the Gaussians in px, largest offset d in px, number of passes.
GLASS_BLUR = {
    224: ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
}


def draw_glass_blur(stream: Stream, severity: int, size: Size, profile: int) -> Fields:
    """Draw `offsets`: int32 (B, passes, 2, H - 2 d, W - 2 d) in [-d, d).

    Element [b, p, :, i, j] is the (row, column) offset of the source of pixel (d + 1 + i,
    d + 1 + j). d is the offset in `GLASS_BLUR`.
    """
    _, jump, passes = GLASS_BLUR[profile][severity - 1]
    height, width = size
    return (stream.integers(-jump, jump, passes, 2, height - 2 * jump, width - 2 * jump),)


def glass_blur(images: Tensor, severity: int, offsets: Tensor, *, profile: int = 224) -> Tensor:
    """Blur, truncate, copy each pixel from a nearby one, and blur again.

    A pass visits the pixels from the last to the first and copies in place, so a pixel may copy a
    value that has already been overwritten. (The original intends a swap, but its swap of NumPy
    views only copies.) The first blur uses float64 where the device has it, and SciPy's order of
    additions, because in uniform areas the last bit decides the truncation.
    """
    sigma, jump, _ = GLASS_BLUR[profile][severity - 1]
    wide = images.to(wide_float(images.device))
    wide.div_(wide.new_full((), 255))  # of a plain 255 a GPU takes the inverse, which is rounded
    # One image at a time stays in a CPU's cache, which saves a third of the float64 blur.
    parts = wide.split(1 if images.device.type == "cpu" else max(1, len(images)))
    soft = torch.cat([_gaussian(part, sigma).mul_(255).to(torch.uint8) for part in parts])
    source = _glass_sources(offsets, jump, images.shape[2], images.shape[3])
    return _gaussian(take_pixels(soft, source).float(), sigma).clamp_(0, 255)


def _glass_sources(offsets: Tensor, jump: int, height: int, width: int) -> Tensor:
    """Trace each pixel through all passes to its source pixel, int32 (B, H * W).

    Later pixels are visited first. A pixel that copies from a later one gets the value that this
    one received, so copies form chains. A pixel that copies from an earlier one gets the old value.
    Pointer jumping finds the ends of all chains at once: links are doubled until none changes.
    """
    pixels = torch.arange(height * width, dtype=torch.int32, device=offsets.device)
    visited = (slice(jump + 1, height - jump + 1), slice(jump + 1, width - jump + 1))
    total = pixels.repeat(len(offsets), 1)
    for rows, columns in (pair.unbind(1) for pair in offsets.unbind(1)):
        copied = pixels.repeat(len(offsets), 1)
        copied.view(-1, height, width)[:, *visited] += rows * width + columns
        link = torch.maximum(copied, pixels)
        while not torch.equal(link, further := _take(link, link)):
            link = further
        total = _take(total, _take(copied, link))
    return total


def take_pixels(images: Tensor, source: Tensor) -> Tensor:
    """Gather pixels (B, C, H, W) at int32 positions (B, H * W), the same in all channels."""
    rows = images.flatten(2).flatten(0, 1)
    return _take(rows, source.repeat_interleave(images.shape[1], 0)).view_as(images)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Gather along the rows of (B, N) by int32 indices (B, N), faster than `Tensor.gather`."""
    first = torch.arange(len(rows), dtype=torch.int32, device=rows.device)[:, None] * rows.shape[1]
    return rows.flatten().index_select(0, (index + first).flatten()).view(index.shape)


def _gaussian(planes: Tensor, sigma: float) -> Tensor:
    """Blur (B, C, H, W) planes with radius 4 sigma and repeated edges, axis 2 first like SciPy."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 / sigma**2 * np.arange(-radius, radius + 1) ** 2)
    taps = (taps / taps.sum())[radius:]
    pair = torch.empty_like(planes)  # buffer: allocating it per tap costs as much as the sums
    for axis in (2, 3):
        side = planes.shape[axis]
        pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        padded = F.pad(planes, pad, mode="replicate")
        planes = planes * taps[0]
        for reach in range(radius, 0, -1):
            before = padded.narrow(axis, radius - reach, side)
            after = padded.narrow(axis, radius + reach, side)
            planes += torch.add(before, after, out=pair).mul_(taps[reach])
    return planes


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Stack two floating-point tensors along a new last axis, faster than `torch.stack`."""
    return torch.view_as_real(torch.complex(first, second))


def wide_float(device: torch.device) -> torch.dtype:
    """Return the widest floating-point dtype of the device: float32 on MPS, else float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# Radius in px, and standard deviation in px of the half Gaussian along the path.
MOTION_BLUR = {
    224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
}


def draw_motion_blur(stream: Stream, severity: int, size: Size, profile: int) -> Fields:
    """Draw `angle`: float32 (B,), degrees in [-45, 45). Positive angles point right and down."""
    return (stream.uniform().mul_(90).sub_(45),)


def motion_blur(images: Tensor, severity: int, angle: Tensor, *, profile: int = 224) -> Tensor:
    """Blur along a straight path in the direction `angle`, as ImageMagick does with 8 bits."""
    radius, sigma = MOTION_BLUR[profile][severity - 1]
    return magick_motion_blur(images.float(), radius, sigma, angle)


def magick_motion_blur(planes: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Apply the motion blur of ImageMagick 6.

    The path is one-sided: it has 2 radius + 1 taps and starts at the pixel itself. Edge pixels are
    repeated. ImageMagick rounds to 16 bits (257 steps per level); its PNG export truncates
    to 8 bits.

    Args:
        planes: floating point (B, C, H, W) in [0, 255].
        radius, sigma: as in `MOTION_BLUR`.
        angle: direction of the path, (B,), in degrees.

    Returns:
        The blurred planes, of the same shape and dtype, with integer values.
    """
    reach = 2 * radius
    steps = torch.arange(reach + 1, device=planes.device, dtype=wide_float(planes.device))
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights /= weights.sum()
    turn = torch.deg2rad(angle.to(steps.dtype))[:, None]
    right = torch.ceil(steps * turn.cos() - 0.5).long()
    down = torch.ceil(steps * turn.sin() - 0.5).long()
    side = 2 * reach + 1
    kernels = planes.new_zeros(len(planes), side * side)
    taps = weights.to(planes.dtype).expand(len(planes), -1)
    kernels.scatter_add_(1, (reach + down) * side + reach + right, taps)  # steps may coincide
    blurred = _correlate(planes, kernels.view(-1, 1, side, side), "replicate")
    return blurred.mul_(257).add_(0.5).floor_().div_(257).floor_().clamp_(0, 255)


# End (excluded) and step of the zoom factors that start at 1, as arguments of `numpy.arange`. By
# its rounding the ends 1.06 and 1.11 are included.
ZOOM_BLUR = {
    224: ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    64: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    32: ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
}
ZOOM_BAND = 2**16  # pixels of the image that are computed at a time


def zoom_blur(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Average the image and its enlargements by all factors.

    The image counts twice: as itself and as the factor 1. All enlargements together are one sparse
    matrix with four entries per factor and pixel. `embedding_bag` multiplies it with the planes,
    band by band, because the matrix of a large photograph has gigabytes.
    """
    end, step = ZOOM_BLUR[profile][severity - 1]
    height, width = images.shape[2:]
    planes = images.flatten(2).flatten(0, 1).float()
    table, rows = planes.T.contiguous(), max(1, ZOOM_BAND // width)
    bands = []
    for top in range(0, height, rows):
        pixels, weights = _zoom_matrix(end, step, height, width, top, top + rows, images.device)
        bands.append(F.embedding_bag(pixels, table, per_sample_weights=weights, mode="sum"))
    zoomed = torch.cat(bands) if len(bands) > 1 else bands[0]
    total = torch.stack(zoomed.unbind(1)).add_(planes)  # transposes faster than `.T.contiguous()`
    return total.div_(1 + pixels.shape[1] // 4).view(images.shape)


@lru_cache(maxsize=16)  # the five severities up to 440 px, or one up to 1000 px; at most 0.9 GB
def _zoom_matrix(
    end: float, step: float, height: int, width: int, top: int, bottom: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the sources and weights of each pixel of the sum, for rows from top to bottom.

    Both are (rows * W, 4 n), int32 and float32, with n the number of factors: up to 55 MB.
    """
    pixels, weights = [], []
    for factor in np.arange(1, end, step):
        row, down = (axis[top:bottom] for axis in zoom_axis(height, factor))
        column, right = zoom_axis(width, factor)
        for i, vertical in ((0, 1 - down), (1, down)):
            for j, horizontal in ((0, 1 - right), (1, right)):
                taken = (row[:, None] + i) * width + column + j
                weight = vertical[:, None] * horizontal
                pixels.append(taken.ravel().astype(np.int32))
                weights.append(weight.ravel().astype(np.float32))
    return (
        torch.from_numpy(np.stack(pixels, axis=1)).to(device),
        torch.from_numpy(np.stack(weights, axis=1)).to(device),
    )


def zoom_axis(side: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute the source coordinates of the pixels of an axis enlarged by `factor`, at least 1.

    As in the original, the central ceil(side / factor) pixels are stretched with aligned corners.
    The stretched length is rounded, and its central `side` pixels are kept.

    Returns:
        int64 (side,), the last source coordinate before each pixel, and float64 (side,), the
        distance from it in px.
    """
    crop = math.ceil(side / factor)
    length = round(crop * factor)
    position = (np.arange(side) + (length - side) // 2) * ((crop - 1) / (length - 1))
    first = np.minimum(position.astype(np.int64), crop - 2)
    return first + (side - crop) // 2, position - first


# Standard deviation in px.
GAUSSIAN_BLUR = {
    224: (1, 2, 3, 4, 6),
    64: (0.5, 0.75, 1, 1.25, 1.5),
    32: (0.4, 0.6, 0.7, 0.8, 1),
}


def gaussian_blur(images: Tensor, severity: int, *, profile: int = 224) -> Tensor:
    """Convolve with a Gaussian that is cut at 4 standard deviations. Edge pixels are repeated."""
    return _gaussian(images.float(), GAUSSIAN_BLUR[profile][severity - 1]).clamp_(0, 255)
