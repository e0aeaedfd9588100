"""Provide small networks, images and labels for the tests of the training method."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

seeds = st.integers(0, 2**31)
batches = st.integers(1, 7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, 3, 8, 8, generator=seeded(seed), dtype=dtype)


def soft_labels(seed: int, batch: int, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, classes, generator=seeded(seed + 1), dtype=dtype).softmax(1)


def network(classes: int, *, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    middle: nn.Module = nn.BatchNorm2d(4) if norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), middle, nn.Tanh(), nn.Flatten(), nn.Linear(144, classes)
    )


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
