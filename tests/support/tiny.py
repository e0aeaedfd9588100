"""Provide small networks and image folders for the tests."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck


def convnet(num_classes: int) -> nn.Module:
    """Return a network with BatchNorm and dropout that trains in milliseconds."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, num_classes),
    )  # fmt: skip


def residual(num_classes: int) -> nn.Module:
    """Return a network with one of each of torchvision's residual blocks."""
    plain = BasicBlock(8, 8, norm_layer=lambda n: nn.BatchNorm2d(n, affine=False))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), BasicBlock(8, 8), Bottleneck(8, 2), plain,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )  # fmt: skip


def counting(num_classes: int) -> nn.Module:
    """Return a network with a counter that is named like BatchNorm's statistics."""
    model = convnet(num_classes)
    model.register_buffer("running_steps", torch.tensor(3))
    return model


class waves(nn.Module):
    """A network with a complex weight."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(3, 1, 1, dtype=torch.complex64))
        self.network = convnet(num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network((x * self.turn).abs())


class Wrapped(nn.Module):
    """Return what `wrap` makes of the network's logits."""

    def __init__(self, network: nn.Module, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.network(x))


def linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))


def ranked(num_classes: int) -> nn.Module:
    """Return a network that differs between the processes of a job."""
    network = linear(num_classes)
    nn.init.constant_(network[2].bias, float(os.environ["RANK"]))
    return network


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def smooth(num_classes: int) -> nn.Module:
    """Return a float64 network in which the images of a batch do not affect each other."""
    layers = nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(Double(), *layers, nn.Linear(24, num_classes)).double()


class Dressed(nn.Module):
    """A network that returns an object with `.logits`, as those of Hugging Face do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = convnet(num_classes)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=None, logits=self.network(x))


def normed(num_classes: int) -> nn.Module:
    """Return a network whose first layer is a BatchNorm, which normalizes the images."""
    return nn.Sequential(nn.BatchNorm2d(3), linear(num_classes))


def image_folder(root: Path, classes: int = 3, each: int = 10, side: int = 12) -> Path:
    """Write root/CLASS/N.png, noise with a different color for each class, and return root."""
    random = np.random.default_rng(0)
    for k in range(classes):
        (root / f"class{k}").mkdir(parents=True)
        for n in range(each):
            pixels = random.integers(0, 120, (side, side, 3))
            pixels[..., k % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{k}" / f"{n}.png")
    return root


def states_equal(one: object, other: object) -> bool:
    """Return whether nested dicts and lists have bit-identical tensors and equal values."""
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


def read_log(out: Path) -> list[dict[str, str]]:
    """Read the log.csv of a training."""
    return list(csv.DictReader((out / "log.csv").read_text().splitlines()))
