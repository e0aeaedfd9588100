"""Convolutions that leave out products with padding, for images smaller than a network expects.

At 32 px the last stage of a ResNet has a single pixel, and eight of the nine taps of its 3x3
kernels see only padding. On a CPU they take half of a training step.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class _SkippingConv2d(nn.Conv2d):
    """Along each axis on which the output has one pixel, use only the taps that see the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W), with the result of `nn.Conv2d` up to rounding."""
        if x.device.type != "cpu":  # where the gain has not been measured
            return super().forward(x)
        weight, padding = self.weight, [int(width) for width in self.padding]
        for axis, (pad, step) in enumerate(zip(padding, self.stride, strict=True)):
            size, taps = x.shape[2 + axis], weight.shape[2 + axis]
            if pad < taps and 0 <= size + 2 * pad - taps < step:  # tap i sees pixel i - pad
                seen = min(taps - pad, size)
                weight = weight.narrow(2 + axis, pad, seen)
                x = x.narrow(2 + axis, 0, seen)
                padding[axis] = 0
        return F.conv2d(x, weight, self.bias, self.stride, padding, groups=self.groups)


def skip_padding(model: nn.Module) -> nn.Module:
    """Let the convolutions of a model leave out products with padding, and return the model.

    The model keeps its parameters, and computes the same logits and gradients up to rounding.
    """
    for layer in model.modules():
        if type(layer) is nn.Conv2d and not isinstance(layer.padding, str):
            if any(layer.padding) and set(layer.dilation) == {1} and layer.padding_mode == "zeros":
                layer.__class__ = _SkippingConv2d  # keeps parameters, hooks and names
    return model
