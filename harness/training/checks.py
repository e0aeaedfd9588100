"""Checks before the first epoch, so that a training does not fail after it."""

from typing import Any

import torch
from torch import Tensor, nn

from harness import distributed
from harness.devices import autocast
from harness.errors import UserError, first_line, is_explained
from harness.models import check_logits, set_mode
from harness.training.config import TrainConfig
from harness.training.manifold import check_mix_at
from harness.training.methods import METHODS
from mtlat import logits_of, targeted_fgsm


def check_batch_size(config: TrainConfig, images: int) -> None:
    """Raise `UserError` unless every process gets images of every minibatch."""
    size, processes = config.minibatch_size, distributed.world_size()
    message = f"--batch-size {config.batch_size} makes minibatches of {size}"
    if not 0 < size <= images:
        fix = "lower it" if size else "raise it"
        raise UserError(f"{message}, and there are {images} training images: {fix}")
    if size < 2 * processes > 2:
        raise UserError(
            f"{message}, and each of {processes} processes needs 2 images: raise it, or start fewer"
        )


def restore_optimizer(path: str, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore the state of an optimizer from that in the checkpoint `path`.

    All options but the learning rate are those of the run's settings. Raises `UserError` unless the
    state has the shapes of the weights: a fused step writes into its memory without comparing them.
    """
    try:
        groups = optimizer.state_dict()["param_groups"]
        for group, before in zip(groups, saved["param_groups"], strict=True):
            group["lr"] = float(before["lr"])  # which changes with the epochs
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        adam = not isinstance(optimizer, torch.optim.SGD)
        for weight, state in optimizer.state.items():
            if adam and state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"it has {', '.join(state)}")
            for name, value in state.items():
                if value is not None and value.shape != (() if name == "step" else weight.shape):
                    raise ValueError(f"{name} has the shape {tuple(value.shape)}")
                state[name] = value if value is None else value.clone()  # none shares memory
    except Exception as error:  # torch raises many kinds
        if is_explained(error):
            raise
        raise UserError(
            f"{path}: its optimizer does not fit the model ({first_line(error)}): restore the file"
        ) from None


def check_model(config: TrainConfig, model: nn.Module, x: Tensor, num_classes: int) -> None:
    """Raise `UserError` unless the configuration's method can train the model on images x."""
    name = f"--arch {config.arch}"
    if config.channels_last:
        x, name = x.to(memory_format=torch.channels_last), f"{name} with --channels-last"
    if config.amp != "no":
        name += f" with --amp {config.amp}"
    with autocast(x.device, config.amp):
        check_trainable(name, model, x, num_classes, config.method)
        check_mix_at(config.mix_at, model, x, num_classes)


def check_trainable(name: str, model: nn.Module, x: Tensor, num_classes: int, method: str) -> None:
    """Raise `UserError` unless a method can train the model on images x (B, ...).

    The model must return logits (B, N), and give the gradients that the method needs. Runs it on x,
    on two images and on one, and attacks the two if the method does. Leaves it in training mode.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError(
            f"{name} is TorchScript, which can only be evaluated here: give the nn.Module itself"
        )
    check_logits(name, model, x, num_classes)
    set_mode(name, model, training=False)  # in which BatchNorm's running statistics stay
    few = x[:2]
    for batch in (few, x[:1]):  # the last batch of a test may have one image
        check_logits(f"{name} in eval mode", model, batch, num_classes)
    labels = torch.zeros(len(few), dtype=torch.int64, device=x.device)
    if not logits_of(model(few), labels).requires_grad:
        raise UserError(
            f"{name} has no gradient: let its weights require one, and do not detach its logits"
        )
    set_mode(name, model, training=True)
    if "attack_steps" in METHODS[method].options:
        try:
            targeted_fgsm(model, few, labels, 0.0)
        except Exception as error:  # a forward or backward pass may be any Python
            if is_explained(error):
                raise
            raise UserError(
                f"{name} gives no gradient for the images, which --method {method} needs"
                f" ({first_line(error)}): no torch.no_grad() or detach() in forward, and"
                " checkpoint(use_reentrant=False)"
            ) from None
