"""Small things that the tests of the scripts share: a network and a folder of images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


def convnet(num_classes: int) -> nn.Module:
    """A network with BatchNorm and dropout that trains in milliseconds."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, num_classes),
    )  # fmt: skip


def linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def smooth(num_classes: int) -> nn.Module:
    """A network in float64 in which images do not see each other."""
    layers = nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(Double(), *layers, nn.Linear(24, num_classes)).double()


def normed(num_classes: int) -> nn.Module:
    """A network whose BatchNorm sees the images themselves."""
    return nn.Sequential(nn.BatchNorm2d(3), linear(num_classes))


def image_folder(root: Path, classes: int = 3, each: int = 10, side: int = 12) -> Path:
    """root/CLASS/N.png: each class has a colour of its own under noise."""
    random = np.random.default_rng(0)
    for k in range(classes):
        (root / f"class{k}").mkdir(parents=True)
        for n in range(each):
            pixels = random.integers(0, 120, (side, side, 3))
            pixels[..., k % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{k}" / f"{n}.png")
    return root


def states_equal(one: object, other: object) -> bool:
    """Nested dicts and lists hold the same tensors, bit for bit, and the same values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(states_equal(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(map(states_equal, one, other))
        )
    return one == other
