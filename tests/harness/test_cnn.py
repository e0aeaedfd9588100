"""Test the networks of the embedded set: small ones, and how residual ones begin."""

import pytest
import torch
import torchvision
from torch import nn

from harness.cnn import start_as_identity
from harness.models import build_model
from tests.support.tiny import residual, states_equal


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
            assert layer.bias is None  # the BatchNorm that follows would remove it
            layer.register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[1:])))
    assert model(torch.rand(2, 3, size, size)).shape == (2, 5)
    half, quarter = size // 2, size // 4
    levels = {24: size, 48: half, 96: quarter}
    assert sides == [(width, levels[width], levels[width]) for width in widths]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_first_weights_are_those_of_torchvisions_own_option(arch):
    made = []
    for option in ({}, {"zero_init_residual": True}):
        torch.manual_seed(0)
        made.append(torchvision.models.get_model(arch, num_classes=3, **option))
    start_as_identity(made[0])
    assert states_equal(made[0].state_dict(), made[1].state_dict())


def test_a_block_that_starts_as_identity_returns_its_input():
    model = residual(3).train()
    start_as_identity(model)
    x = torch.rand(4, 8, 5, 5)
    assert torch.equal(model[1](x), x) and torch.equal(model[2](x), x)
    assert not torch.equal(model[3](x), x)  # its BatchNorm has no scale
