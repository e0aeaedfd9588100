"""Provide images for comparisons with the original corruptions, and stored original values."""

import json
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
SEVERITIES = (1, 2, 3, 4, 5)


def golden_image() -> np.ndarray:
    """Build the uint8 (224, 224, 3) image to which the stored values belong, from its formula."""
    row, column, channel = np.ogrid[:224, :224, :3]
    values: np.ndarray = row * row // 29 + 3 * column + 40 * channel + (row * column) // 64
    return (values % 256).astype(np.uint8)


def patterned_image(height: int, width: int) -> np.ndarray:
    """Build a uint8 (height, width, 3) image with smooth areas, edges, noise, black and white."""
    generator = np.random.default_rng(0)
    smooth: np.ndarray = ndimage.gaussian_filter(
        generator.normal(size=(height, width, 3)), (6, 6, 0.5)
    )
    image: np.ndarray = 128 + 90 * smooth / smooth.std() + generator.normal(size=smooth.shape) * 8
    image[: height // 4, : width // 3] = 255
    image[-height // 5 :, width // 2 :] = 0
    return image.clip(0, 255).astype(np.uint8)


def to_tensor(image: np.ndarray) -> Tensor:
    """Convert an (H, W, 3) array to a (1, 3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
