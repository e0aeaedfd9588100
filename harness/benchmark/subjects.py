"""The models under test: loaded from the command line, checked, and named by a digest."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.benchmark.checks import broken_gradients
from harness.benchmark.config import EvalConfig
from harness.benchmark.fusion import fuse_for_inference
from harness.errors import UserError
from harness.images.preprocess import CROPS, Crop
from harness.models import LIBRARIES, check_logits, create_model, find_weights, restore_model


class Subject(NamedTuple):
    """A model under test."""

    label: str  # its name in the report
    module: nn.Module
    digest: str  # of everything that it computes with


def expected_images(config: EvalConfig, checkpoints: dict[str, Any]) -> dict[str, tuple[int, Crop]]:
    """List the size and the preprocessing that each model expects, if it is known.

    Args:
        config: names the models.
        checkpoints: the loaded ones, by their name on the command line.

    Returns:
        (side of the square, preprocessing) by the names on the command line. Checkpoints of earlier
        versions expect squashed images.
    """
    expected: dict[str, tuple[int, Crop]] = {}
    for spec in config.specs:
        if spec in checkpoints:
            settings = checkpoints[spec]["settings"]
            crop = CROPS[settings.get("preprocess", "squash")]
            expected[spec] = checkpoints[spec]["size"], crop
        elif config.weights and spec.startswith(LIBRARIES):
            published = find_weights(spec, config.weights)
            expected[spec] = published.size, published.crop
    return expected


def resampling_warnings(config: EvalConfig) -> list[str]:
    """Warn of published weights whose images are not resized bilinearly, as all are here."""
    published = {s: config.weights for s in config.specs if s.startswith(LIBRARIES)}
    found = {s: find_weights(s, name).resampling for s, name in published.items() if name}
    return [
        f"the weights of {spec} expect {kind} resizing, and images are resized bilinearly here: its"
        " accuracy may differ a little from the published one"
        for spec, kind in found.items()
        if kind != "bilinear"
    ]


def load_subjects(
    config: EvalConfig, classes: list[str], files: dict[str, Any]
) -> dict[str, Subject]:
    """Load every model that the command line names.

    Args:
        config: names the models and the device.
        classes: of the test images.
        files: what `load_weights` returns of each file, by its name on the command line.

    Returns:
        The models in eval mode, by their names on the command line.

    Raises:
        UserError: a model does not exist, or was trained on other classes.
    """
    subjects = {}
    for spec in config.specs:
        module = _load_module(config, spec, classes, files.get(spec)).to(config.device).eval()
        digest = hashlib.sha256(repr(module).encode())
        for name, value in module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        label = config.labels.get(spec, spec)
        subjects[spec] = Subject(label, module, digest.hexdigest()[:16])
    return subjects


def _load_module(
    config: EvalConfig, spec: str, classes: list[str], checkpoint: dict[str, Any] | None
) -> nn.Module:
    normalize = (config.mean, config.std) if config.mean and config.std else None
    if checkpoint is None:
        if spec.startswith(LIBRARIES):
            return create_model(spec, None, config.weights, new_head=False)[0]
        return create_model(spec, classes, normalize=normalize)[0]
    if "format" not in checkpoint:
        if not config.arch:
            raise UserError(f"{spec} is a plain state dict: name its architecture with --arch")
        return create_model(config.arch, classes, spec, normalize=normalize, new_head=False)[0]
    own = checkpoint["classes"]
    if own != classes:
        raise UserError(
            f"{spec} was trained on other classes ({len(own)}: {' '.join(own[:3])} ...) than"
            f" those of the test images ({len(classes)}: {' '.join(classes[:3])} ...)"
        )
    return restore_model(checkpoint)


def inspect_subject(subject: Subject, x: Tensor, y: Tensor, num_classes: int) -> list[str]:
    """Check a model on a few images.

    Args:
        subject: the model.
        x: images (B, 3, S, S) in [0, 1].
        y: class indices (B,).
        num_classes: N.

    Returns:
        Warnings about a model on which attacks may fail.

    Raises:
        UserError: scores of this model would mean nothing.
    """
    label, module, _ = subject
    if any(layer.training for layer in module.modules()):
        raise UserError(f"{label} ignores eval(): its modules must adopt train(False)")
    first, second = (check_logits(label, module, x, num_classes) for _ in range(2))
    if not torch.allclose(first, second, 1e-4, 1e-4):
        raise UserError(
            f"{label} returns other logits for the same images the second time: it must not draw"
            " random numbers in eval mode"
        )
    warnings = []
    if first.min() >= 0 and torch.allclose(first.sum(1), first.new_ones(len(x))):
        warnings.append(f"{label} returns probabilities, not logits: attacks on it are too weak")
    if broken := int(broken_gradients(module, x, y).sum()):
        warnings.append(
            f"{label}: the gradient is zero or NaN for {broken} of the first {len(x)} images, and"
            " attacks cannot move them"
        )
    return warnings


def fuse_subject(subject: Subject, x: Tensor) -> Subject:
    """Fuse the model's layers for inference; its digest stays."""
    return subject._replace(module=fuse_for_inference(subject.module, x))
