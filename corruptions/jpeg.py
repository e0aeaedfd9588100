"""JPEG encoding and decoding in integer tensor arithmetic, with the pixels of libjpeg-turbo.

This is baseline JPEG with the defaults of Pillow and torchvision: 4:2:0 chroma, the slow integer
DCT in both directions, and chroma upsampling with a triangle filter. Entropy coding is omitted,
because it is lossless. The result equals Pillow's bit for bit at every quality and for widths of 5
and more, on every device. There is no loop over images.

Constants: ITU-T T.81 (quantization tables, Annex K), JFIF 1.02 (color), libjpeg (fixed point).
"""

import torch
from torch import Tensor

Table = tuple[tuple[int, ...], ...]  # 8 x 8

# ITU-T T.81, tables K.1 and K.2. Each row is one vertical frequency.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(((99,) * 8,) * 4),
)

# First four columns of the one-dimensional DCT, one row per frequency. The other columns mirror
# them, with the opposite sign in odd rows. The values are sqrt(8) * 2^12 times the orthonormal
# DCT-II, rounded as by multiplying out libjpeg's factorization into 13-bit constants.
_DCT = (
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)
_FORWARD = tuple(
    (*row, *((-1) ** k * value for value in reversed(row))) for k, row in enumerate(_DCT)
)
_INVERSE = tuple(zip(*_FORWARD, strict=True))


def round_trip(images: Tensor, quality: int) -> Tensor:
    """Encode RGB images, uint8 (B, 3, H, W), as JPEG of `quality` 1 to 100, and decode them.

    Returns:
        RGB, int32 (B, 3, H, W) in 0..255.
    """
    height, width = images.shape[2:]
    luma, chroma = _from_rgb(images)
    # libjpeg pads blocks with columns before it halves the chroma, and with rows afterwards.
    chroma = _halve(_extend(_extend(chroma, 3, 16), 2, 2))
    luma = _code(_extend(_extend(luma, 3, 8), 2, 8), _LUMINANCE, quality)
    chroma = _code(_extend(chroma, 2, 8), _CHROMINANCE, quality)
    chroma = _double(chroma[:, :, : (height + 1) // 2, : (width + 1) // 2])
    return _to_rgb(luma[:, :, :height, :width], chroma[:, :, :height, :width])


def _from_rgb(images: Tensor) -> tuple[Tensor, Tensor]:
    """Convert RGB to int32 luma (B, 1, H, W) and chroma (B, 2, H, W) with 16 fraction bits."""
    red, green, blue = torch.split(images.int(), 1, dim=1)
    luma = (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471)
    offset = (128 << 16) + 32767
    cb = (32768 * blue).sub_(red, alpha=11059).sub_(green, alpha=21709).add_(offset)
    cr = (32768 * red).sub_(green, alpha=27439).sub_(blue, alpha=5329).add_(offset)
    return _round_shift(luma, 16), torch.cat([cb, cr], dim=1).bitwise_right_shift_(16)


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    """Convert luma (B, 1, H, W) and chroma (B, 2, H, W) to RGB (B, 3, H, W) in 0..255."""
    cb, cr = torch.split(chroma - 128, 1, dim=1)
    rgb = torch.cat([91881 * cr, (-22554 * cb).sub_(cr, alpha=46802), 116130 * cb], dim=1)
    return _round_shift(rgb, 16).add_(luma).clamp_(0, 255)


def _extend(planes: Tensor, dim: int, multiple: int) -> Tensor:
    """Repeat the last row (dim 2) or column (dim 3) until the size is a multiple of `multiple`."""
    size = planes.shape[dim]
    if size % multiple == 0:
        return planes
    index = torch.arange(-(-size // multiple) * multiple, device=planes.device)
    return planes.index_select(dim, index.clamp_(max=size - 1))


def _halve(planes: Tensor) -> Tensor:
    """Average 2 x 2 pixels, rounding ties down and up alternately along a row."""
    columns = planes[..., ::2] + planes[..., 1::2]
    total = columns[..., ::2, :] + columns[..., 1::2, :]
    total[..., ::2].add_(1)
    total[..., 1::2].add_(2)
    return total.bitwise_right_shift_(2)


def _double(planes: Tensor) -> Tensor:
    """Upsample both axes by two: 3/4 of the near sample plus 1/4 of the far one, ends repeated.

    Ties are rounded up and down alternately along a row.
    """
    total = _interleave(_interleave(planes, 2), 3)
    total[..., ::2].add_(8)
    total[..., 1::2].add_(7)
    return total.bitwise_right_shift_(4)


def _interleave(planes: Tensor, dim: int) -> Tensor:
    """Double dimension `dim`: 3 times each sample plus the previous, then the next one."""
    size = planes.shape[dim]
    near = 3 * planes
    before = torch.cat([planes.narrow(dim, 0, 1), planes.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([planes.narrow(dim, 1, size - 1), planes.narrow(dim, size - 1, 1)], dim)
    return torch.stack([before.add_(near), after.add_(near)], dim + 1).flatten(dim, dim + 1)


def _code(planes: Tensor, table: Table, quality: int) -> Tensor:
    """Encode and decode planes (B, C, H, W) in 8 x 8 blocks with a quantization table."""
    batch, channels, height, width = planes.shape
    grid = planes.reshape(batch * channels, height // 8, 8, width // 8, 8)
    blocks = grid.permute(2, 4, 0, 1, 3).contiguous() - 128  # the position in the block first
    blocks = _transform(_transform(blocks, _FORWARD, 1, 11), _FORWARD, 0, 15)
    blocks = _quantize(blocks, table, quality)
    blocks = _transform(_transform(blocks, _INVERSE, 0, 11), _INVERSE, 1, 18)
    return blocks.add_(128).clamp_(0, 255).permute(2, 3, 0, 4, 1).reshape(planes.shape)


def _transform(blocks: Tensor, table: Table, dim: int, bits: int) -> Tensor:
    """Multiply dimension `dim` of int32 `blocks` by the 8 x 8 `table` and divide by 2^bits."""
    out = torch.empty_like(blocks)
    sources = blocks.unbind(dim)
    for weights, target in zip(table, out.unbind(dim), strict=True):
        torch.mul(sources[0], weights[0], out=target)
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            target.add_(source, alpha=weight)
    return _round_shift(out, bits)


def _quantize(coefficients: Tensor, table: Table, quality: int) -> Tensor:
    """Quantize and dequantize int32 (8, 8, ...) of 8 times the DCT.

    Ties round away from zero. Float32 is exact here: dividend and divisor are below 2^16, and the
    0.5 keeps every quotient away from integers, so that an inexact division suffices.
    """
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = torch.tensor(table, device=coefficients.device)[:, :, None, None, None]
    steps = steps.mul_(scale).add_(50).div_(100, rounding_mode="floor").clamp_(1, 255).float()
    exact = coefficients.float()
    levels = exact.abs().add_(4 * steps + 0.5).div_(8 * steps).floor_().copysign_(exact)
    return levels.mul_(steps).int()


def _round_shift(values: Tensor, bits: int) -> Tensor:
    """Divide in place by 2^bits, rounding halves up."""
    return values.add_(1 << (bits - 1)).bitwise_right_shift_(bits)
