"""The models under test: loaded from the command line, checked, and named by a digest."""

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from harness.benchmark.checks import broken_gradients
from harness.benchmark.config import EvalConfig
from harness.benchmark.fusion import fuse_for_inference
from harness.errors import UserError, escape_unprintable, first_line, is_explained
from harness.images.preprocess import CROPS, Crop
from harness.models import (
    LIBRARIES,
    check_logits,
    create_model,
    find_weights,
    restore_model,
    set_mode,
    split_arch,
)
from mtlat import logits_of

# A normalization layer as torch 2.11 prints it. Later versions print whether it has a bias, too.
OLD_NORM = re.compile(r"((?:Batch|Group|Instance|Layer)Norm\w*\(.*affine=(True|False))(?!, bias)")
WNID = re.compile(r"n\d{8}\b")  # of a class of ImageNet, and the name of its folder


class Subject(NamedTuple):
    """A model under test."""

    label: str  # its name in the report
    module: nn.Module
    digest: str  # 16 hex digits, of its state dict, repr and module:callable, not of the code


class Restricted(nn.Module):
    """A model restricted to some of its outputs, in the order of the classes."""

    def __init__(self, model: nn.Module, rows: list[int], count: int) -> None:
        super().__init__()
        self.model, self.count = model, count
        self.rows = nn.Buffer(torch.tensor(rows))

    def forward(self, x: Tensor) -> Tensor:
        return _select(self.model(x), x, self.rows, self.count)

    def extra_repr(self) -> str:
        return f"outputs={self.count}"


@torch.fx.wrap  # torch.fx calls it as it is, so that the layers of the model can be fused
def _select(output: Any, x: Tensor, rows: Tensor, count: int) -> Tensor:
    logits = logits_of(output, rows.new_zeros(len(x)))
    if logits.shape[1] != count:
        raise ValueError(f"it has {logits.shape[1]} outputs, and {count} have names")
    return logits[:, rows]


def restrict(
    name: str, model: nn.Module, outputs: list[str], classes: list[str], *, given: bool
) -> nn.Module:
    """Restrict a model to the outputs of the classes. They are found by their names.

    `given` says whether --imagenet-classes names the outputs. If not, outputs that are as many as
    the classes but have other names are assumed to be in the order of `classes`.

    Raises:
        UserError: a class is not the name of one output.
    """
    if outputs == classes:
        return model
    unclear = next((k for k in classes if outputs.count(k) != 1), None)
    if unclear is None:
        return Restricted(model, [outputs.index(k) for k in classes], len(outputs))
    if len(outputs) == len(classes) and not given:
        return model
    raise UserError(
        f"{'--imagenet-classes names' if given else f'{name} has'} {len(outputs)} outputs, and the"
        f" dataset's {len(classes)} classes cannot be found among them: {outputs.count(unclear)}"
        f" have the name {unclear!r}; give --imagenet-classes FILE with a line for each output, the"
        " name of its class folder (a wnid)"
    )


def _read_outputs(path: Path) -> list[str]:
    """Read the names of a model's outputs: of each line the wnid, or else the whole line."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--imagenet-classes {path} cannot be read: {error}") from None
    return [found[0] if (found := WNID.match(line)) else line for line in lines]


def expected_images(config: EvalConfig, checkpoints: dict[str, Any]) -> dict[str, tuple[int, Crop]]:
    """List the side in pixels and the preprocessing that each model expects, if they are known.

    Models are named as on the command line. Checkpoints of earlier versions expect squashed images.
    """
    expected: dict[str, tuple[int, Crop]] = {}
    for spec in config.specs:
        if checkpoint := checkpoints.get(spec):
            crop = CROPS[checkpoint["settings"].get("preprocess", "squash")]
            expected[spec] = checkpoint["size"], crop
        elif config.weights and spec.startswith(LIBRARIES):
            published = find_weights(spec, config.weights)
            expected[spec] = published.size, published.crop
    return expected


def resampling_warnings(config: EvalConfig) -> list[str]:
    """Warn of published weights whose images are not resized bilinearly, as all are here."""
    return [
        f"the weights of {spec} expect {kind} resizing, and images are resized bilinearly here: its"
        " accuracy may differ a little from the published one"
        for spec in config.specs
        if config.weights and spec.startswith(LIBRARIES)
        if (kind := find_weights(spec, config.weights).resampling) != "bilinear"
    ]


def normalization_warnings(
    config: EvalConfig, files: dict[str, Any], loaded: dict[str, Subject]
) -> list[str]:
    """Warn of models that seem to get pixels that are not normalized, or are normalized twice.

    Without --mean, models of timm are normalized as timm does, and your own code may do it.
    """
    if config.mean:
        return [
            f"{subject.label} has a layer with a mean of its own: if it normalizes, leave --mean"
            " and --std out, because they do it, too"
            for spec, subject in loaded.items()
            if "format" not in files.get(spec, {}) and not spec.startswith(LIBRARIES)
            if sum(name.endswith(".mean") for name in subject.module.state_dict()) > 1
        ]
    if not config.arch or split_arch(config.arch)[0] != "torchvision":
        return []
    return [
        f"{loaded[spec].label} gets pixels in [0, 1] as they are: if its training normalized them,"
        " give --mean and --std"
        for spec, content in files.items()
        if "format" not in content
    ]


def load_subjects(
    config: EvalConfig, classes: list[str], files: dict[str, Any]
) -> dict[str, Subject]:
    """Load every model in eval mode, by its name on the command line.

    `classes` are those of the test images, and `files` is what `load_weights` returns of each file.

    Raises:
        UserError: a model does not exist, or was trained on other classes.
    """
    subjects = {}
    for spec in config.specs:
        torch.manual_seed(config.seed)  # of weights that are random
        module = _load_module(config, spec, classes, files.get(spec)).to(config.device)
        set_mode(spec, module, training=False)
        layers = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module))  # addresses differ by process
        layers = OLD_NORM.sub(r"\1, bias=\2", layers)
        digest = hashlib.sha256((_own_code(config, spec, files.get(spec)) + layers).encode())
        for name, value in module.state_dict().items():
            if nn.parameter.is_lazy(value):
                raise UserError(f"{spec}: {name} has no shape yet; run one forward pass first")
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            else:  # of get_extra_state()
                digest.update(pickle.dumps(value, protocol=4))
        label = config.labels.get(spec, escape_unprintable(spec))
        subjects[spec] = Subject(label, module, digest.hexdigest()[:16])
    return subjects


def _own_code(config: EvalConfig, spec: str, content: dict[str, Any] | None) -> str:
    """Return the module:callable that makes a model; "" for the models of libraries.

    Two functions may make the same layers and weights, and compute with them differently.
    """
    arch = spec if content is None else content.get("arch") or config.arch or ""
    return arch if ":" in arch and not arch.startswith(LIBRARIES) else ""


def _load_module(
    config: EvalConfig, spec: str, classes: list[str], checkpoint: dict[str, Any] | None
) -> nn.Module:
    if checkpoint is not None and "format" in checkpoint:
        own = checkpoint["classes"]
        if own != classes:
            alone = [n for n in own if n not in classes] + [n for n in classes if n not in own]
            which = f"only one has {' '.join(alone[:5])}{' ...' * (len(alone) > 5)}"
            raise UserError(
                f"{spec} was trained on other classes than those of the test images"
                f" ({which if alone else 'the order differs'}): give --data with its classes"
            )
        return restore_model(checkpoint)
    normalize = (config.mean, config.std) if config.mean and config.std else None
    named = config.imagenet_classes
    outputs = _read_outputs(named) if named else classes
    if checkpoint is not None:
        if not config.arch:
            raise UserError(f"{spec} is a plain state dict: name its architecture with --arch")
        model, _ = create_model(config.arch, outputs, spec, normalize=normalize, new_head=False)
    elif spec.startswith(LIBRARIES):
        model, _ = create_model(spec, None, config.weights, new_head=False)
        outputs = outputs if named else find_weights(spec, config.weights or "").outputs
    else:
        model, _ = create_model(spec, outputs, normalize=normalize)
    return restrict(spec, model, outputs, classes, given=bool(named))


def inspect_subject(
    subject: Subject, x: Tensor, y: Tensor, num_classes: int, *, attacked: bool
) -> list[str]:
    """Check a model on images (B, 3, S, S) in [0, 1] with class indices (B,).

    `attacked` says whether an attack will use the model's gradient. Returns warnings about a model
    on which attacks may fail.

    Raises:
        UserError: it ignores eval(), its logits are wrong or random, or attacks get no gradient.
    """
    label, module, _ = subject
    if any(layer.training for layer in module.modules()):
        raise UserError(f"{label} ignores eval(): its modules must adopt train(False)")
    first, second = (check_logits(label, module, x, num_classes) for _ in range(2))
    check_logits(label, module, x[:1], num_classes)  # the last batch may have one image
    if not torch.allclose(first, second, 1e-4, 1e-4):
        raise UserError(
            f"{label} returns other logits for the same images the second time: it must not draw"
            " random numbers in eval mode"
        )
    if attacked and first.dtype == torch.float16:
        raise UserError(f"{label} returns float16 logits, too narrow for attacks: use float32")
    warnings = []
    if isinstance(module, Restricted) and module.count != num_classes:
        warnings.append(
            f"{label} has {module.count} outputs; only those of the {num_classes} classes count"
        )
    if first.min() >= 0 and torch.allclose(first.sum(1), first.new_ones(len(x))):
        warnings.append(f"{label} returns probabilities, not logits: attacks on it are too weak")
    if broken := _count_broken(subject, x, y, attacked):
        warnings.append(
            f"{label}: the gradient is zero or NaN for {broken} of {len(x)} sampled images, so"
            " attacks cannot change these, and the scores under attacks are too high"
        )
    return warnings


def _count_broken(subject: Subject, x: Tensor, y: Tensor, attacked: bool) -> int:
    """Count images with a broken gradient. Raise if attacks need one, and the model has none."""
    try:
        return int(broken_gradients(subject.module, x, y).sum())
    except Exception as error:  # a forward or backward pass may be any Python
        if attacked and is_explained(error):  # such as full memory
            raise
        if attacked:
            raise UserError(
                f"{subject.label} does not give the gradient with respect to the images, which"
                f" attacks need ({first_line(error)}): let it, or add --skip white-box black-box"
            ) from None
    return 0


def fuse_subject(subject: Subject, x: Tensor) -> Subject:
    """Fuse the model's layers for inference; its digest stays."""
    return subject._replace(module=fuse_for_inference(subject.module, x))
