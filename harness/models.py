"""Models: built by name, started from weights, restored from checkpoints, checked."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from harness.checkpoints import load_weights
from harness.errors import UserError
from mtlat import Normalize, frozen

MeanStd = tuple[list[float], list[float]]  # per channel


def build_model(arch: str, num_classes: int, normalize: MeanStd | None = None) -> nn.Module:
    """Build a classifier with random weights.

    Args:
        arch: a torchvision classifier's name, or `module:callable`, which is called with
            `num_classes`.
        num_classes: number of logits.
        normalize: mean and standard deviation, for a model that expects normalized input. Images
            have pixels in [0, 1] everywhere in this project.

    Raises:
        UserError: there is no such model, or it is not a `torch.nn.Module`.
    """
    if ":" in arch:
        model = import_callable("--arch", arch, num_classes=num_classes)(num_classes=num_classes)
        if not isinstance(model, nn.Module):
            raise UserError(f"--arch {arch} made a {type(model).__name__}; give a torch.nn.Module")
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if arch not in known:
            close = ", ".join(difflib.get_close_matches(arch, known, 3) or known[:3])
            raise UserError(
                f"--arch {arch}: torchvision has no such classifier; close names: {close}; for"
                " your own use --arch module:callable"
            )
        # These two would return several outputs in training.
        several = arch in ("googlenet", "inception_v3")
        extra = {"aux_logits": False, "init_weights": True} if several else {}
        model = torchvision.models.get_model(arch, num_classes=num_classes, **extra)
    return nn.Sequential(Normalize(*normalize), model) if normalize else model


def import_callable(option: str, spec: str, *args: Any, **keywords: Any) -> Any:
    """Import `module:callable`, which runs the module's code.

    Args:
        option: what the command line calls it, for messages.
        spec: `module:callable`.
        args, keywords: what it will be called with. They are compared with its signature.

    Raises:
        UserError: it cannot be imported, or does not take these arguments.
    """
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules in the current folder, as with python -m
    try:
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(*args, **keywords)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{option} {spec}: {error}") from None
    return function


def find_weights(arch: str, name: str) -> torchvision.models.WeightsEnum:
    """Find torchvision's weights of that name for an architecture. Downloads nothing."""
    try:
        return torchvision.models.get_model_weights(arch)[name]
    except (ValueError, KeyError):
        raise UserError(
            f"--weights {name}: no such file, and no such weights in torchvision for --arch {arch}"
            " (DEFAULT names the best)"
        ) from None


def _download(entry: torchvision.models.WeightsEnum, name: str) -> Mapping[str, Tensor]:
    """Return the state dict of torchvision's weights, from its cache or from the network."""
    try:
        state: Mapping[str, Tensor] = entry.get_state_dict()
    except (URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--weights {name}: cannot download {entry.url} ({reason}): check the network, or put"
            f" the file into {torch.hub.get_dir()}/checkpoints"
        ) from None
    return state


def create_model(
    arch: str, classes: list[str], weights: str | None
) -> tuple[nn.Module, MeanStd | None]:
    """Build the model that a new run starts from.

    Args:
        arch: as in `build_model`.
        classes: names of the classes.
        weights: a file that `load_weights` reads, the name of torchvision's weights for `arch`, or
            None for random weights. The head keeps its random weights if it is for another number
            of classes, or if a checkpoint names other classes.

    Returns:
        The model, and the mean and standard deviation that it normalizes with, or None.

    Raises:
        UserError: the weights do not exist or do not fit.
    """
    if weights is None:
        return build_model(arch, len(classes)), None
    if os.path.exists(weights):
        content = load_weights(weights)
        state, normalize = content["model"], content.get("normalize")
        model = build_model(arch, len(classes), normalize)
    else:
        entry, content = find_weights(arch, weights), {}
        preset = entry.transforms()
        normalize = (list(preset.mean), list(preset.std))
        model = build_model(arch, len(classes), normalize)
        state = {f"1.{name}": value for name, value in _download(entry, weights).items()}
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("0.")}
    own = model.state_dict()
    state = _with_counters(state, own)
    head = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if own.keys() != state.keys() or len({state[k].shape[0] for k in head}) > 1:
        raise UserError(f"--weights {weights} are of another architecture than --arch {arch}")
    if not head and content.get("classes", classes) != classes:
        other = build_model(arch, len(classes) + 1, normalize).state_dict()
        head = sorted(k for k in own if own[k].shape != other[k].shape)
    model.load_state_dict({k: own[k] if k in head else value for k, value in state.items()})
    new = f"; new: {', '.join(head)}" if head else ""
    plain = content and "format" not in content
    print(f"weights from {weights}{new}{'; pixels in [0, 1] are not normalized' if plain else ''}")
    return model, normalize


def _with_counters(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add BatchNorm's counters of batches, which state dicts of PyTorch before 0.4.1 lack."""
    return {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | dict(state)


def load_plain(
    name: str, arch: str, num_classes: int, state: dict[str, Tensor], normalize: MeanStd | None
) -> nn.Module:
    """Build a model with the weights of a plain state dict.

    Args:
        name: how the user calls it.
        arch, num_classes, normalize: as in `build_model`.
        state: of the network itself, without the normalization.

    Raises:
        UserError: the weights do not fit.
    """
    model = build_model(arch, num_classes)
    own = model.state_dict()
    state = _with_counters(state, own)
    for key in sorted(own.keys() | state.keys()):
        here, there = (tuple(d[key].shape) if key in d else "missing" for d in (state, own))
        if here != there:
            raise UserError(
                f"{name} does not fit --arch {arch} with the dataset's {num_classes} classes: its"
                f" {key} is {here}, and must be {there}"
            )
    model.load_state_dict(state)
    return nn.Sequential(Normalize(*normalize), model) if normalize else model


def restore_model(checkpoint: dict[str, Any]) -> nn.Module:
    """Build the model of a checkpoint of train.py, with its weights, on the CPU."""
    classes, normalize = checkpoint["classes"], checkpoint["normalize"]
    model = build_model(checkpoint["arch"], len(classes), normalize)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise UserError(f"the checkpoint's weights do not fit {checkpoint['arch']}") from None
    return model


def count_correct(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
    """Count correct top-1 predictions. Sets the model to eval mode."""
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).sum() for x, y in batches]
    return int(torch.stack(hits).sum()) if hits else 0


def check_logits(name: str, model: nn.Module, x: Tensor, num_classes: int) -> Tensor:
    """Return the model's logits for images x, checked.

    Args:
        name: how the user calls the model.
        x: images (B, 3, S, S) float32 in [0, 1], on the model's device.
        num_classes: N.

    Returns:
        Logits (B, N).

    Raises:
        UserError: the model fails on x, or its output is not finite logits of that shape.
    """
    try:
        with torch.no_grad(), frozen(model):
            logits: Tensor = model(x)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} fails on images {tuple(x.shape)}: {reason}") from None
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (len(x), num_classes):
        raise UserError(
            f"{name} returns {shape}; for {len(x)} images of the dataset's {num_classes} classes"
            f" it must return logits {(len(x), num_classes)}"
        )
    if not logits.isfinite().all():
        raise UserError(f"{name} returns logits that are not finite")
    return logits
