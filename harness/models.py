"""Models: built by name, started from weights, restored from checkpoints, checked."""

import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from harness.checkpoints import adapt_state, check_savable, describe_misfit, load_weights
from harness.cnn import CONVOLUTIONS, build_cnn
from harness.errors import UserError, downloading, first_line, is_explained, out_of_memory
from mtlat import Model, Normalize, frozen, logits_of

MeanStd = tuple[list[float], list[float]]  # per channel
LIBRARIES = ("torchvision:", "timm:")  # prefixes of models with published weights
AUXILIARY = ("googlenet", "inception_v3")  # would return several outputs in training


class Published(NamedTuple):
    """Published weights of a network, and the images that they expect."""

    state: Callable[[], Mapping[str, Tensor]]  # returns the tensors; may download them
    outputs: list[str]  # names of the classes; of timm's models their numbers
    normalize: MeanStd
    size: int
    crop: tuple[int, int] | None  # as in harness.images.preprocess
    resampling: str


def build_model(arch: str, num_classes: int, normalize: MeanStd | None = None) -> nn.Module:
    """Build a classifier with random weights.

    Args:
        arch: a torchvision classifier's name, alone or as `torchvision:NAME`; `timm:NAME`, also
            `timm:hf-hub:ORG/NAME`; a small network of `harness.cnn`; or `module:callable`, which is
            called with `num_classes`.
        num_classes: number of logits.
        normalize: mean and standard deviation, for a model that expects normalized input. Images
            have pixels in [0, 1] everywhere in this project.

    Raises:
        UserError: there is no such model, or it is not a `torch.nn.Module`.
    """
    library, name = split_arch(arch)
    if arch in CONVOLUTIONS:
        model = build_cnn(arch, num_classes)
    elif library == "timm":
        model = _create_timm(arch, num_classes=num_classes)
    elif library == "torchvision":
        check_name(arch)
        extra = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        model = torchvision.models.get_model(name, num_classes=num_classes, **extra)
    else:
        model = import_callable("--arch ", arch, num_classes=num_classes)(num_classes=num_classes)
        if not isinstance(model, nn.Module):
            raise UserError(f"--arch {arch} made a {type(model).__name__}; give a torch.nn.Module")
    return nn.Sequential(Normalize(*normalize), model) if normalize else model


def split_arch(arch: str) -> tuple[str, str]:
    """Split an architecture into its library, or the user's own module, and the name there."""
    library, _, name = (arch if ":" in arch else f"torchvision:{arch}").partition(":")
    return library, name


def check_name(arch: str) -> None:
    """Raise `UserError` if an architecture, as in `build_model`, cannot exist.

    Nothing is built, and no code of the user's own runs.
    """
    library, name = split_arch(arch)
    known, advice = [name], ""  # of your own modules and of the Hub, nothing is known
    if library == "torchvision":
        known = torchvision.models.list_models(module=torchvision.models)
        known += [] if ":" in arch else CONVOLUTIONS
        advice = "; for your own use --arch module:callable"
    elif library == "timm":
        try:
            timm = importlib.import_module("timm")
        except ModuleNotFoundError:
            raise UserError(f"--arch {arch}: run pip install timm to use its models") from None
        if ":" not in name:
            known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, 3) or known[:3])
        raise UserError(
            f"--arch {arch}: {library} has no such classifier; close names: {close}{advice}"
        )


def _create_timm(arch: str, **keywords: Any) -> Any:
    """Create a model of timm. Of `timm:hf-hub:ORG/NAME`, the Hub's configuration is downloaded."""
    check_name(arch)
    try:
        return importlib.import_module("timm").create_model(split_arch(arch)[1], **keywords)
    except Exception as error:  # of timm, of the Hub's client, or of the network
        if out_of_memory(error):
            raise
        raise UserError(f"--arch {arch}: timm cannot create it ({first_line(error)})") from None


@cache
def _timm_config(arch: str) -> dict[str, Any]:
    """Read what timm knows of a model: its weights, and the images of its tests."""
    with torch.random.fork_rng(devices=[]):
        model = _create_timm(arch)
    images = importlib.import_module("timm.data").resolve_data_config(
        model=model, use_test_size=True
    )
    return {**model.pretrained_cfg, **images, **{k: list(images[k]) for k in ("mean", "std")}}


def import_callable(option: str, spec: str, *args: Any, **keywords: Any) -> Any:
    """Import `module:callable`, which runs the module's code.

    Args:
        option: what precedes it on the command line, for messages.
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
        raise UserError(f"{option}{spec}: {error}") from None
    return function


def find_weights(arch: str, name: str) -> Published:
    """Find published weights of an architecture. Downloads no weights.

    Args:
        arch: a classifier of torchvision or of timm, as in `build_model`.
        name: DEFAULT, or a name that torchvision gives to weights of this architecture.

    Raises:
        UserError: there are no such weights.
    """
    check_name(arch)
    if arch.startswith("timm:"):
        return _find_in_timm(arch, name)
    model = arch.removeprefix("torchvision:")
    try:
        entry = torchvision.models.get_model_weights(model)[name]
    except (ValueError, KeyError) as error:
        known = isinstance(error, KeyError)  # the architecture; its weights are not
        raise UserError(
            f"--weights {name}: no such file, and no such weights in torchvision for --arch {arch}"
            f" ({'DEFAULT names the best' if known else 'it has none: name a file'})"
        ) from None
    preset = entry.transforms()
    (resize,), (size,) = preset.resize_size, preset.crop_size
    normalize = list(preset.mean), list(preset.std)
    if model in AUXILIARY:  # torchvision's, with weights, renormalize their input to this
        normalize = [0.5] * 3, [0.5] * 3
    return Published(
        partial(_download, model, entry, name), entry.meta["categories"], normalize, size,
        (resize, size), preset.interpolation.value,
    )  # fmt: skip


def _find_in_timm(arch: str, name: str) -> Published:
    """Find the weights that timm's configuration of a model names."""
    known = _timm_config(arch)
    if name != "DEFAULT":
        raise UserError(
            f"--weights {name}: no such file; timm's weights are --weights DEFAULT, or a part of"
            f" the model's name, as in {arch}.TAG"
        )
    if not any(known.get(key) for key in ("url", "hf_hub_id", "file")):
        raise UserError(f"--weights {name}: timm has no weights for --arch {arch}")
    size = known["input_size"][1]
    squash = known["crop_mode"] == "squash"
    return Published(
        lambda: _create_timm(arch, pretrained=True).state_dict(),
        [str(k) for k in range(known["num_classes"])], (known["mean"], known["std"]), size,
        None if squash else (math.floor(size / known["crop_pct"]), size),  # as timm rounds
        known["interpolation"],
    )  # fmt: skip


def _download(model: str, entry: torchvision.models.WeightsEnum, name: str) -> Mapping[str, Tensor]:
    """Return the state dict of torchvision's network, from its cache or from the network.

    The network renames old keys as it loads them. What only trains, auxiliary heads, is left out.
    """
    place = f"{torch.hub.get_dir()}/checkpoints"
    with downloading(f"--weights {name}", entry.url, place), torch.random.fork_rng(devices=[]):
        state = torchvision.models.get_model(model, weights=entry).state_dict()
    return {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}


def create_model(
    arch: str, classes: list[str] | None, weights: str | None = None, *,
    normalize: MeanStd | None = None, new_head: bool = True,
) -> tuple[nn.Module, MeanStd | None]:  # fmt: skip
    """Build a model with random weights, with those of a file, or with published ones.

    Args:
        arch: as in `build_model`.
        classes: names of the classes; None for those of the published weights.
        weights: a file that `load_weights` reads, a name for `find_weights`, or None for random
            weights.
        normalize: mean and standard deviation; None for those of the weights, or, where they name
            none, those of timm's configuration.
        new_head: leave the head random, and print its keys, if the loaded one has another number of
            classes or a checkpoint names other classes. If False, all weights must fit.

    Returns:
        The model, and the mean and standard deviation that it normalizes with, or None.

    Raises:
        UserError: the weights do not exist or do not fit.
    """
    content = _read_weights(arch, weights) if weights is not None else {}
    names: list[str] = content["outputs"] if classes is None else classes
    if normalize is None and "normalize" in content:
        normalize = content["normalize"]
    elif normalize is None and arch.startswith("timm:"):
        normalize = _timm_config(arch)["mean"], _timm_config(arch)["std"]
    network = build_model(arch, len(names))
    if weights is not None:
        check_savable(f"--arch {arch}", network)
        own = network.state_dict()
        state = adapt_state(content["model"], own)
        misfits, head = _differing(state, own), set()
        if new_head and (misfits or content.get("classes", names) != names):
            # The head is what has another shape in this network with one class more.
            head = _differing(build_model(arch, len(names) + 1).state_dict(), own) & own.keys()
        if (key := min(misfits - head, default=None)) is not None:  # it may be ""
            raise UserError(
                f"{weights} does not fit --arch {arch} with {len(names)} classes: its {key} is"
                f" {describe_misfit(key, state, own, len(names), new_head)}"
            )
        network.load_state_dict({**state, **{key: own[key] for key in head}})
        if new_head:
            new = f"; new: {', '.join(sorted(head))}" if head else ""
            raw = normalize is None and "normalize" not in content
            note = "; without --mean and --std it gets pixels in [0, 1]" if raw else ""
            print(f"weights from {weights}{new}{note}")
    return nn.Sequential(Normalize(*normalize), network) if normalize else network, normalize


def _read_weights(arch: str, weights: str) -> dict[str, Any]:
    """Read a file or published weights: the "model" without normalization, and what is known."""
    if not os.path.exists(weights):
        published = find_weights(arch, weights)
        return {"model": published.state(), **published._asdict()}
    content = load_weights(weights)
    if content.get("normalize"):  # the network is the second part of what `build_model` makes
        pairs = content["model"].items()
        content["model"] = {k.removeprefix("1."): v for k, v in pairs if k.startswith("1.")}
    return content


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Return the names that only one of two state dicts has, or that differ in their shapes."""
    shapes = [{name: value.shape for name, value in state.items()} for state in (one, other)]
    return {name for name, _ in shapes[0].items() ^ shapes[1].items()}


def restore_model(checkpoint: dict[str, Any]) -> nn.Module:
    """Build the model of a checkpoint of train.py, with its weights, on the CPU."""
    classes, normalize = checkpoint["classes"], checkpoint["normalize"]
    model = build_model(checkpoint["arch"], len(classes), normalize)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise UserError(
            f"the checkpoint's weights do not fit {checkpoint['arch']}: restore the code of the"
            " network that was trained"
        ) from None
    return model


def set_mode(name: str, model: nn.Module, *, training: bool) -> None:
    """Set the model to training or eval mode. Raise `UserError` if it has no modes."""
    try:
        model.train() if training else model.eval()
    except NotImplementedError:
        fix = "give the nn.Module that was exported"
        raise UserError(f"{name} has no eval mode, like programs of torch.export; {fix}") from None


def compute_logits(model: Model, x: Tensor) -> Tensor:
    """Compute the logits (B, N) of images x (B, ...), without a graph.

    Raises TypeError or ValueError unless the model returns them alone, as `.logits`, or first in a
    tuple or list.
    """
    with torch.no_grad():
        return logits_of(model(x), torch.zeros(len(x), dtype=torch.int64, device=x.device))


def is_right(logits: Tensor, y: Tensor) -> Tensor:
    """Return a bool mask (B,) of correct top-1 predictions. An image with a NaN logit is wrong."""
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def count_correct(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
    """Count correct predictions. Sets the model to eval mode."""
    model.eval()
    return int(sum(is_right(compute_logits(model, x), y).sum() for x, y in batches))


def check_logits(name: str, model: nn.Module, x: Tensor, num_classes: int) -> Tensor:
    """Return the model's logits (B, N) for images x, checked.

    Args:
        name: how the user calls the model.
        x: images (B, 3, S, S) float32 in [0, 1], on the model's device.
        num_classes: N.

    Raises:
        UserError: the model fails on x or changes it, or its output is not such finite logits.
    """
    seen = x.clone()
    try:
        with frozen(model):
            logits = compute_logits(model, x)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        if is_explained(error):
            raise
        raise UserError(f"{name} fails on images {tuple(x.shape)}: {first_line(error)}") from None
    if not torch.equal(x, seen):
        raise UserError(f"{name} changes its input in place: let it begin with x = x.clone()")
    if logits.shape != (len(x), num_classes):
        raise UserError(
            f"{name} returns {tuple(logits.shape)}; for {len(x)} images of the dataset's"
            f" {num_classes} classes it must return logits {(len(x), num_classes)}: let it use"
            " num_classes or, in evaluate.py, name its outputs by --imagenet-classes"
        )
    if not logits.isfinite().all():
        raise UserError(f"{name} returns logits that are not finite")
    return logits
