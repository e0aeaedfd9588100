"""Calibrate the ranges of the paper's four corruptions for another model, as the paper did."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from corruptions.apply import corrupt

# Upper end and precision of the search, in px at 224, shares of full scale, px at 224, degrees.
_SEARCH = {
    "occlusion": (224.0, 1.0),
    "color_distortion": (1.0, 0.005),
    "translation": (224.0, 1.0),
    "rotation": (90.0, 1.0),
}


def calibrate(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    name: str,
    *,
    losses: tuple[float, float] = (0.05, 0.30),
    seed: int = 0,
    batch_size: int = 128,
) -> tuple[float, float]:
    """Search for the range of a corruption that costs the model 5 to 30 points of accuracy.

    The paper says "5 %" and "30 %", which are read as points: its ResNet-50, with R from 0.68 to
    0.78 on these four at 73.3 % clean accuracy, loses 16 to 23 points on average over a range.

    Args:
        model: in eval mode; maps float32 (B, 3, H, W) in [0, 1] to logits (B, classes).
        images, labels: uint8 (N, 3, H, W), or floating point in [0, 1], and int64 (N,).
        name: occlusion, color_distortion, translation or rotation.
        losses: losses of accuracy at the ends of the range, as shares of all images.

    Returns:
        (low, high), in the units of `corruptions.geometric`, for `corrupt(..., bounds=...)`. Each
        end is the smallest amount with its loss, to one px, one degree or 0.005 of full scale.

    Raises:
        ValueError: an argument is invalid, or the corruption costs less than `losses[1]`.
    """
    if name not in _SEARCH:
        raise ValueError(f"name must be one of {', '.join(_SEARCH)}, got {name!r}")
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"pass images and as many labels, got {len(images)} and {len(labels)}")
    if not 0 < losses[0] <= losses[1]:
        raise ValueError(f"losses must satisfy 0 < low <= high, got {losses}")
    largest, precision = _SEARCH[name]
    accuracy = partial(_accuracy, model, images, labels, name, seed, batch_size)
    clean, worst = accuracy(0.0), accuracy(largest)
    if clean - worst < losses[1]:
        raise ValueError(
            f"{name} costs this model at most {clean - worst:.3f} of accuracy, less than "
            f"losses[1] = {losses[1]}; lower `losses`"
        )
    low, high = (
        _bisect(lambda amount: clean - accuracy(amount), loss, largest, precision)
        for loss in losses
    )
    return low, high


@torch.no_grad()
def _accuracy(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, name: str, seed: int,
    batch_size: int, amount: float,
) -> float:  # fmt: skip
    """Compute the accuracy on images that are all corrupted by exactly `amount`."""
    correct = 0
    for index in torch.arange(len(images)).split(batch_size):
        part = slice(int(index[0]), int(index[-1]) + 1)
        bounds = (amount, amount)
        corrupted = corrupt(images[part], name, 1, seed=seed, index=index, bounds=bounds)
        if corrupted.dtype == torch.uint8:
            corrupted = corrupted.float().div_(255)
        correct += int((model(corrupted).argmax(1) == labels[part]).sum())
    return correct / len(images)


def _bisect(
    lost: Callable[[float], float], wanted: float, largest: float, precision: float
) -> float:
    """Bisect for the smallest amount that costs at least `wanted` accuracy, up to `precision`."""
    low, high = 0.0, largest
    while high - low > precision:
        middle = (low + high) / 2
        if lost(middle) < wanted:
            low = middle
        else:
            high = middle
    return high
