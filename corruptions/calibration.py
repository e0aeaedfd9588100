"""Find the ranges of the paper's four corruptions for another model, as the paper found them."""

from collections.abc import Callable

import torch
from torch import Tensor

import corruptions

# Where the search ends, and how finely it ends: px at 224, share of full scale, px, degrees.
_SEARCH = {
    "occlusion": (224.0, 1.0),
    "color_distortion": (1.0, 0.005),
    "translation": (224.0, 1.0),
    "rotation": (90.0, 1.0),
}


@torch.no_grad()
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
    """Find the range of `name` over which the model loses between 5 and 30 points of accuracy.

    Losses are of absolute accuracy: the robustness of the paper's own ResNet-50 on these four,
    0.68 to 0.78 at 73.3 % clean, is what a loss of 5 to 30 points leaves and not one of 5 to 30 %.

    Args:
        model: maps float32 images (B, 3, H, W) in [0, 1] to logits (B, classes); set it to
            evaluation mode first.
        images: uint8 (N, 3, H, W), or floating point in [0, 1].
        labels: int64 (N,).
        name: occlusion, color_distortion, translation or rotation.
        losses: what the two ends shall cost, as shares of all images.

    Returns:
        (low, high) in the units of `corruptions.geometric`, to be passed as
        `corrupt(..., bounds=...)`. Each end is the smallest amount that bisection finds to cost its
        loss: to one px, one degree, or 0.005 of full scale.

    Raises:
        ValueError: another name, no images, losses out of order, or more than the corruption takes.
    """
    if name not in _SEARCH:
        raise ValueError(f"only {', '.join(_SEARCH)} have a range to calibrate, got {name!r}")
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"need as many labels as images, got {len(images)} and {len(labels)}")
    if not 0 < losses[0] <= losses[1]:
        raise ValueError(f"losses must satisfy 0 < low <= high, got {losses}")

    def accuracy(amount: float) -> float:
        """Measure with every image corrupted by exactly `amount`."""
        correct = 0
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            index = torch.arange(len(images))[part]
            corrupted = corruptions.corrupt(
                images[part], name, 1, seed=seed, index=index, bounds=(amount, amount)
            )
            if corrupted.dtype == torch.uint8:
                corrupted = corrupted.float().div_(255)
            correct += int((model(corrupted).argmax(1) == labels[part]).sum())
        return correct / len(images)

    largest, step = _SEARCH[name]
    clean, worst = accuracy(0.0), accuracy(largest)
    if clean - worst < losses[1]:
        raise ValueError(
            f"{name} costs this model at most {clean - worst:.3f} of its accuracy, less than "
            f"{losses[1]}; lower `losses`"
        )
    ends = []
    for loss in losses:
        low, high = 0.0, largest
        while high - low > step:
            middle = (low + high) / 2
            if clean - accuracy(middle) < loss:
                low = middle
            else:
                high = middle
        ends.append(high)
    return ends[0], ends[1]
