"""Test what is changed in a model for inference."""

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from attacks import attack_mode, input_gradient
from harness.benchmark import fusion
from harness.benchmark.fusion import fuse_for_inference


class Flattening(nn.Module):
    """Calls `view` on channels and pixels, which raises where they are stored channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.linear(y.view(len(y), -1))


def test_weights_are_channels_last_where_the_forward_pass_allows_it() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8)
    model = torchvision.models.resnet18(num_classes=5).eval()
    fast = fuse_for_inference(model, x)
    assert fast.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.conv1.weight.is_contiguous()
    refusing = Flattening().eval()
    expected = refusing(x)
    with pytest.raises(RuntimeError, match="view"):
        copy.deepcopy(refusing).to(memory_format=torch.channels_last)(x)
    assert_close(fuse_for_inference(refusing, x)(x), expected)


def test_a_change_of_the_logits_by_more_than_rounding_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fuse_wrongly(model: nn.Module) -> nn.Module:
        wrong = copy.deepcopy(model)
        wrong.get_parameter("linear.bias").data += 1e-3
        return wrong

    monkeypatch.setattr(fusion, "fuse", fuse_wrongly)
    model, x = Flattening().eval(), torch.rand(2, 3, 8, 8)
    nn.init.ones_(model.linear.bias)  # at logits near 1 the relative tolerance counts, too
    assert_close(fuse_for_inference(model, x)(x), model(x))


class Rounded(torch.autograd.Function):
    """Round, and pass the gradient on, as quantized networks do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Special(nn.Module):
    """A network with BatchNorm whose forward pass holds something that torch.fx loses."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.found = kind, {}
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)
        self.convs.register_forward_hook(lambda *given: self.found.update(y=given[2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "rounded":
            x = Rounded.apply(x)
        if self.kind == "no_grad":
            with torch.no_grad():
                constant = x.amax((1, 2, 3), keepdim=True)
            x = x / constant
        y = self.convs(x)
        y = self.found["y"] if "hook" in self.kind else y
        y = y.detach() if self.kind == "hook, no gradient" else y
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("kind", ["", "rounded", "no_grad", "hook"])
def test_logits_and_gradients_stay_those_of_the_model(kind: str) -> None:
    torch.manual_seed(0)
    model, x, other = Special(kind).eval(), torch.rand(4, 3, 8, 8), torch.rand(6, 3, 8, 8)
    y = torch.zeros(6, dtype=torch.int64)
    fused = fuse_for_inference(model, x)
    assert fused is not model or kind == "hook"
    assert_close(fused(other), model(other))
    with attack_mode(fused, other, y) as (bare, images, labels):
        made = input_gradient(bare, images, labels)
    with attack_mode(model, other, y) as (bare, images, labels):
        assert_close(made, input_gradient(bare, images, labels), rtol=1e-3, atol=1e-6)


def test_features_of_other_images_are_not_frozen_where_no_gradient_tells() -> None:
    torch.manual_seed(0)
    model = Special("hook, no gradient").eval()
    fused = fuse_for_inference(model, torch.rand(4, 3, 8, 8))
    other = torch.rand(4, 3, 8, 8)
    assert_close(fused(other), model(other))


def test_a_pooling_that_repeats_no_pixel_is_left_without_a_matrix_of_its_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 222 x 222 pixels, as of a small network at 224, it would take 10 GB."""
    matrix = Mock(side_effect=MemoryError)
    monkeypatch.setattr(torch, "eye", matrix)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
    x = torch.rand(2, 3, 9, 9)
    assert_close(fuse_for_inference(model, x)(x), model(x))
    matrix.assert_not_called()


def test_a_model_without_a_gradient_is_fused_too() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    model = Special("no_grad").eval()
    model.head.register_forward_hook(lambda *given: given[2].detach())
    fused = fuse_for_inference(model, x)
    assert fused is not model
    assert_close(fused(x), model(x))


class Scaling(nn.Module):
    """Return the input, and pass on `scale` times the gradient."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x + (1 - self.scale) * x.detach()


@pytest.mark.parametrize(("scale", "kept"), [(1.095, True), (1.105, False)])
def test_a_change_of_the_gradients_by_more_than_ten_percent_is_left_out(
    scale: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(fusion, "fuse", lambda model: nn.Sequential(Scaling(scale), model))
    fused = fuse_for_inference(Flattening().eval(), torch.rand(2, 3, 8, 8))
    assert any(isinstance(layer, Scaling) for layer in fused.modules()) == kept
