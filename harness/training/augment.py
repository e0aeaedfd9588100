"""The augmentation that --augment asks for; the paper has none."""

import torch
import torch.nn.functional as F
from torch import Tensor


def flip_crop(x: Tensor, u: Tensor) -> Tensor:
    """Pad each image with black, cut out a square of its own size, and flip it or not.

    Args:
        x: images (B, C, S, S). The padding is S // 8 on each side, as CIFAR's usual 4 of 32.
        u: random numbers (3, B) in [0, 1), of the row, of the column and of the flip.

    Returns:
        Images (B, C, S, S).
    """
    count, channels, side, _ = x.shape
    padding, pixels = side // 8, torch.arange(side, device=x.device)
    top, left = (u[:2] * (2 * padding + 1)).long().unsqueeze(2)
    rows = top + pixels
    columns = left + torch.where(u[2, :, None] < 0.5, pixels.flip(0), pixels)
    image = torch.arange(count, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return F.pad(x, [padding] * 4)[image, channel, rows[:, None, :, None], columns[:, None, None]]
