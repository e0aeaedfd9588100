"""Layers fused and laid out for inference: the same logits up to rounding, in less time."""

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from attacks import attack_mode, input_gradient
from harness.models import compute_logits


def fuse_for_inference(model: nn.Module, x: Tensor) -> nn.Module:
    """Fuse layers of a model in eval mode to run faster, and lay its weights out for the device.

    A change is kept if it runs, and on x changes logits by at most 1e-4 (absolute and relative) and
    input gradients by 10 % of their norm. A result that differs from `model` is frozen.

    `x` holds images (B, 3, S, S) in [0, 1], of the size that the model will be used with.
    """
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        logits, gradient, other = compute_logits(model, x), _gradient(model, x), 1 - x
        # `fuse` is torch's, of BatchNorm into convolutions.
        transforms: list[Callable[..., nn.Module]] = [fuse, partial(_fuse_pooling, x=other)]
        # Channels-last makes convolutions faster, on a CPU alone (pytorch#44943). A forward pass
        # that calls `view` on channels and pixels then raises.
        if x.device.type == "cpu":
            transforms.append(lambda m: copy.deepcopy(m).to(memory_format=torch.channels_last))
        for transform in transforms:
            with suppress(Exception):  # a forward pass may be any Python
                compute_logits(model, other)  # a copy must not use features remembered of x
                fused = transform(model)
                # torch.fx loses no_grad() and the backward pass of an autograd.Function.
                near = (_gradient(fused, x) - gradient).norm() <= 0.1 * gradient.norm()
                if near and torch.allclose(compute_logits(fused, x), logits, 1e-4, 1e-4):
                    model = fused.requires_grad_(False)
    return model


def _gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the gradient that attacks use; zeros where the model gives none."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with suppress(Exception), attack_mode(model, x, y) as (bare, images, labels):
        return input_gradient(bare, images, labels)
    return torch.zeros_like(x)


def _fuse_pooling(model: nn.Module, x: Tensor) -> nn.Module:
    """Fuse an adaptive pooling that repeats pixels into the Linear layer after it.

    VGG's first Linear layer takes 7 x 7 pixels, whatever the size of the images: at 64 px they are
    repetitions of 2 x 2.
    """
    called: list[tuple[nn.Module, torch.Size]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        called.append((layer, inputs[0].shape))

    kinds = nn.AdaptiveAvgPool2d, nn.Linear
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, kinds)}
    hooks = [layer.register_forward_pre_hook(record) for layer in names]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    for (pool, shape), (linear, _) in pairwise(called):
        if isinstance(pool, nn.AdaptiveAvgPool2d) and isinstance(linear, nn.Linear):
            pixels = shape[2] * shape[3]
            if pixels < pool(torch.empty(1, 1, *shape[2:])).numel():  # before eye's pixels² values
                single = torch.eye(pixels).to(linear.weight).view(-1, 1, *shape[2:])
                share = pool(single).flatten(1)  # of each pixel, in each value of the pooling
                model = copy.deepcopy(model)
                model.set_submodule(names[pool], nn.Identity())
                shape_in = len(linear.weight), -1, share.shape[1]
                weight = linear.weight.view(shape_in) @ share.T
                model.get_submodule(names[linear]).weight = nn.Parameter(weight.flatten(1))
    return model
