"""Test that convolutions which skip products with padding compute what nn.Conv2d computes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from harness.benchmark.fusion import fuse_for_inference
from harness.skip_padding import skip_padding

SIDES = st.integers(1, 5)


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, and the gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((weights * y).sum(), [x, *layer.parameters()])]


@given(
    size=st.tuples(SIDES, SIDES),
    kernel=st.tuples(SIDES, SIDES),
    stride=st.tuples(SIDES, SIDES),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_conv2d(
    size: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int], **options: Any
) -> None:
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, kernel, padding=padding, **options).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    for expected, actual in zip(
        gradients(plain, x), gradients(skip_padding(copy.deepcopy(plain)), x), strict=True
    ):
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"dilation": 2}]
)
def test_other_convolutions_stay_as_they_are(options: dict[str, Any]) -> None:
    layer = skip_padding(nn.Conv2d(3, 4, 3, **options))
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("prepare", [skip_padding, "fuse"])
def test_the_last_stage_of_a_resnet_uses_the_center_alone(
    prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 32 px, also after the fusion of layers, whose search for layers goes by their class."""
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=5).eval(), torch.rand(2, 3, 32, 32)
    expected = model(x)
    fast = fuse_for_inference(model, x) if prepare == "fuse" else prepare(copy.deepcopy(model))
    assert any(isinstance(m, nn.BatchNorm2d) for m in fast.modules()) == (prepare != "fuse")
    kernels: list[tuple[int, ...]] = []
    convolve = F.conv2d

    def record(x: torch.Tensor, weight: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        kernels.append(tuple(weight.shape[2:]))
        return convolve(x, weight, *args, **keywords)

    monkeypatch.setattr(F, "conv2d", record)
    assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
    assert kernels.count((1, 1)) == 3 + 3  # of layer4; the others are shortcuts
    assert kernels.count((2, 2)) == 1  # the first of layer4 sees 2 x 2 pixels
