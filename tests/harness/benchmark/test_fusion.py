"""Test what is changed in a model for inference."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

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
