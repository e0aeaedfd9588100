"""Calibrate the ranges of the paper's four corruptions for another model, as the paper did."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from corruptions.apply import corrupt

# Upper end of the search, in px at 224, shares of full scale, px at 224, degrees; and its steps.
_SEARCH = {
    "occlusion": (224.0, 256),
    "color_distortion": (1.0, 256),
    "translation": (224.0, 256),
    "rotation": (90.0, 128),
}


def calibrate(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, name: str, *,
    losses: tuple[float, float] = (0.05, 0.30), seed: int = 0, batch_size: int = 128,
) -> tuple[float, float]:  # fmt: skip
    """Search for the range of a corruption that costs the model 5 to 30 points of accuracy.

    The paper says "5 %" and "30 %", which are read as points: its ResNet-50, with R from 0.68 to
    0.78 on these four at 73.3 % clean accuracy, loses 16 to 23 points on average over a range.

    Args:
        model: in eval mode; maps float32 (B, 3, H, W) in [0, 1] to logits (B, classes).
        images, labels: uint8 (N, 3, H, W), or floating point in [0, 1], and int64 (N,).
        name: occlusion, color_distortion, translation or rotation.
        losses: losses of accuracy at the ends of the range, as shares of all images.
        seed: of the draws, as in `corrupt`.
        batch_size: images at a time.

    Returns:
        (low, high), in the units of `corruptions.geometric`, for `corrupt(..., bounds=...)`. Each
        end is the smallest amount with its loss, to one px, one degree or 0.005 of full scale.

    Raises:
        ValueError: an argument is invalid, or the corruption costs less than `losses[1]`.
    """
    if name not in _SEARCH:
        raise ValueError(f"name must be one of {', '.join(_SEARCH)}, got {name!r}")
    if len(images) == 0 or labels.shape != (len(images),):
        shape = tuple(labels.shape)
        raise ValueError(f"pass images and as many labels, got {len(images)} and shape {shape}")
    if not 0 < losses[0] <= losses[1]:
        raise ValueError(f"losses must satisfy 0 < low <= high, got {losses}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    largest, steps = _SEARCH[name]
    correct = partial(_correct, model, images, labels, name, seed, batch_size)
    clean = correct(0.0)

    @cache
    def lost(step: int) -> float:
        return (clean - correct(largest * step / steps)) / len(images)  # one quotient: 5 % is 0.05

    coarse = range(steps // 16, steps + 1, steps // 16)  # all: 90 degrees may cost less than 45
    if (most := max(map(lost, coarse))) < losses[1]:
        raise ValueError(
            f"{name} costs this model about {most:.3f} of accuracy at most, less than "
            f"losses[1] = {losses[1]}; lower `losses`"
        )
    low, high = (_first(lost, coarse, loss) for loss in losses)
    return largest * low / steps, largest * high / steps


def _first(lost: Callable[[int], float], coarse: range, loss: float) -> int:
    """Return the smallest step with this loss, searched below the first coarse one that has it."""
    end = next(step for step in coarse if lost(step) >= loss)
    return bisect_left(range(end), loss, end - coarse.step + 1, key=lost)


@torch.no_grad()
def _correct(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, name: str, seed: int,
    batch_size: int, amount: float,
) -> int:  # fmt: skip
    """Count the right predictions on images that are all corrupted by exactly `amount`."""
    correct = 0
    for index in torch.arange(len(images)).split(batch_size):
        part = slice(int(index[0]), int(index[-1]) + 1)
        bounds = (amount, amount)
        corrupted = corrupt(images[part], name, 1, seed=seed, index=index, bounds=bounds)
        scale = 255 if corrupted.dtype == torch.uint8 else 1
        corrupted = corrupted.float().div_(scale)
        correct += int((model(corrupted).argmax(1) == labels[part]).sum())
    return correct
