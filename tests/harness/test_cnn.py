"""Test the small networks."""

import pytest
import torch
from torch import nn

from harness.models import build_model


@pytest.mark.parametrize("name, widths", [
    ("cnn4", [24, 48, 96, 96]),
    ("cnn6", [24, 24, 48, 48, 96, 96]),
])  # fmt: skip
@pytest.mark.parametrize("size", [16, 33])
def test_a_small_network_halves_the_resolution_twice(
    name: str, widths: list[int], size: int
) -> None:
    model = build_model(name, 5)
    sides = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[1:])))
    assert model(torch.rand(2, 3, size, size)).shape == (2, 5)
    half, quarter = size // 2, size // 4
    levels = {24: size, 48: half, 96: quarter}
    assert sides == [(width, levels[width], levels[width]) for width in widths]
