"""The configuration of a training: command line, defaults, and what a resumed run may change."""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from harness.checkpoints import load_checkpoint, load_weights
from harness.cli import check_saved, number, option, parse_options
from harness.cnn import CONVOLUTIONS
from harness.devices import resolve_device
from harness.errors import UserError
from harness.files import file_name
from harness.images.cache import default_cache_dir
from harness.images.datasets import MAX_SIDE, SIZES
from harness.images.preprocess import CROPS
from harness.models import check_name
from harness.training.manifold import INPUT, METHODS_THAT_MIX
from harness.training.methods import ATTACK, METHODS, MIXING
from mtlat import ALPHA, EPSILON_MAX

# The paper's recipe, and that of the embedded set, which `cnn4` learns in a minute on two cores. So
# few updates need the first learning rate for longer, and `start_as_identity` for deep networks.
PAPER_RECIPE = {"arch": "resnet50", "epochs": 90, "batch_size": 256, "lr": 0.002,
                "milestones": (30, 60, 80)}  # fmt: skip
SHAPES_RECIPE = {"arch": "cnn4", "epochs": 8, "batch_size": 32, "lr": 0.002,
                 "milestones": (5.33, 7.12)}  # fmt: skip

# Settings of older checkpoints, which lack them.
EARLIER = {"preprocess": "squash", "mean": None, "std": None, "mix_at": [INPUT], "augment": "no",
           "schedule": "step", "warmup_epochs": 0.0, "ema": None, "clip_grad": None}  # fmt: skip
# What a resumed run may change, and keeps unless it is given.
KEPT = {"data", "cache_dir", "output_dir", "epochs", "milestones"}


def _recipe(name: str) -> str:
    return f"(default: {PAPER_RECIPE[name]}, the paper's; for shapes {SHAPES_RECIPE[name]})"


@dataclass(frozen=True)
class TrainConfig:
    """All options of train.py, with every default filled in."""

    # fmt: off
    method: str = option("mtlat",
        "; ".join(f"{name}: {m.description}" for name, m in METHODS.items()),
        group="method", choices=tuple(METHODS))
    alpha: float = option(ALPHA, "mixing weights: lambda ~ Beta(alpha, alpha)",
        type=number(float, 1e-30, 1e30))
    epsilon_max: float = option(EPSILON_MAX, "size of the attack: epsilon ~ U[0, epsilon_max], for"
        " pixels in [0, 1]", flags=("--eps-max",), type=number(float, 0, 1))
    attack_steps: int = option(1, "iterations of the attack; the paper takes one",
        type=number(int, 1))
    mix_at: list[str] = option(None, "where mixup and mtlat mix: input (the images), or submodules"
        " as model.named_modules() calls them, whose outputs are then mixed (Manifold Mixup); every"
        " step draws one of the names; layers before it process twice as many images (default:"
        " input, the paper's)", nargs="+", metavar="NAME")

    data: str = option("shapes", "shapes (embedded), cifar10, cifar100, or a folder with"
        " train/CLASS/*.jpg and val/CLASS/*.jpg; of a folder with CLASS/*.jpg alone, ten percent"
        " are held out as test set", group="data", flags=("--data-dir",), metavar="SET",
        may_change=True)
    size: int = option(None, "side of the square that images are resized to (default: 224, the"
        " paper's; for shapes and CIFAR 32)", type=number(int, 8, MAX_SIDE))
    preprocess: str = option("squash", "how images become squares; squash: resize the whole image,"
        " as in the paper; center-crop: resize the shorter side to 8/7 of --size and cut out the"
        " center, as ImageNet-C", choices=tuple(CROPS))
    augment: str = option("no", "flip-crop: flip training images with probability 1/2, and shift"
        " them by up to an eighth of their side, filled with black; the paper has none",
        choices=("no", "flip-crop"))
    classes: int | None = option(None, "keep K classes, drawn with --data-seed (default: all)",
        type=number(int, 2), metavar="K")
    data_seed: int = option(0, "seed of the classes that are kept, of the test part of"
        " CLASS/*.jpg, and of the shapes; apart from --seed, so that several trainings can use the"
        " same images", type=number(int, 0, 2**32 - 1), metavar="N")
    download: bool = option(False, "download CIFAR if it is missing", may_change=True)
    skip_bad_images: bool = option(False, "leave out and count unreadable image files, instead of"
        " stopping")
    cache_dir: str = option(str(default_cache_dir()), "where decoded images and CIFAR are kept",
        metavar="DIR", may_change=True)

    arch: str = option(None, "a torchvision classifier, timm:NAME, a small network of"
        f" harness/cnn.py ({', '.join(CONVOLUTIONS)}), or your own as module:callable, which runs"
        f" its code {_recipe('arch')}", group="model", flags=("-a", "--model"))
    weights: str | None = option(None, "start from a checkpoint, which also gives the default of"
        " --arch; from a state dict in a .pt, .pth or .safetensors file; or from weights of"
        " that name in torchvision (downloaded; DEFAULT: the best) or timm (DEFAULT alone); the"
        " last layer is replaced if the classes differ (default: random weights)",
        metavar="NAME_OR_PATH")
    mean: list[float] | None = option(None, "normalize the model's input with this mean of pixels"
        " in [0, 1], and --std; the checkpoint keeps both (default: as --weights; timm:NAME: as"
        " timm; otherwise none)", type=number(float, 0, 1), nargs=3, metavar="M")
    std: list[float] | None = option(None, "its standard deviation (default: as for --mean)",
        type=number(float, 0, above=True), nargs=3, metavar="S")

    epochs: int = option(None, "passes over the training set; with --resume, more of them extend"
        f" a run, even a finished one {_recipe('epochs')}", group="optimization",
        type=number(int, 1), may_change=True)
    batch_size: int = option(None, "images in the losses of a step, over all processes; two losses"
        " take half each, 128 + 128 of 256, see --whole-batches; a mixed image counts once"
        f" {_recipe('batch_size')}", flags=("-b",), type=number(int, 1))
    whole_batches: bool = option(False, "give each of two losses a whole batch, 256 + 256, so that"
        " all methods make equally many updates: the other reading of the paper")
    opt: str = option("adam", "optimizer", choices=("adam", "adamw", "sgd"))
    lr: float = option(None, f"learning rate {_recipe('lr')}", flags=("--learning-rate",),
        type=number(float, 0, above=True))
    wd: float = option(1e-4, "weight decay", flags=("--weight-decay",), type=number(float, 0))
    momentum: float = option(0.9, "momentum of --opt sgd", type=number(float, 0, 1))
    milestones: list[float] = option(None, "epochs after which the learning rate is multiplied by"
        " --gamma; the defaults scale with --epochs; where a resumed run changes them or --epochs,"
        f" the new schedule holds from its next epoch on {_recipe('milestones')}",
        type=number(float, 0), nargs="*", metavar="EPOCH", may_change=True)
    gamma: float = option(0.1, "see --milestones", type=number(float, 0, 1))
    schedule: str = option("step", "schedule of the learning rate; step: see --milestones; cosine:"
        " from --lr to 0 along half a cosine", choices=("step", "cosine"))
    warmup_epochs: float = option(0.0, "raise the learning rate from a hundredth of --lr to --lr in"
        " these epochs; a cosine begins after them", type=number(float, 0),
        metavar="EPOCHS")
    clip_grad: float | None = option(None, "clip the norm of each step's gradient to this"
        " value (default: no clipping)", type=number(float, 0, above=True), metavar="NORM")
    ema: float | None = option(None, "test and save an exponential moving average of the weights"
        " with this decay, such as 0.999 (default: the weights themselves)",
        type=number(float, 0, 1), metavar="DECAY")

    seed: int = option(0, "seed of initial weights, shuffling and random draws", group="running",
        type=number(int, 0, 2**32 - 1))
    deterministic: bool = option(False, "compute the same bits on a GPU every time, but slower")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...", may_change=True)
    amp: str = option("no", "mixed precision; bf16 is many times slower than float32 on a CPU"
        " without instructions for it", choices=("no", "bf16", "fp16"))
    compile: bool = option(False, "compile the model with torch.compile")
    channels_last: bool = option(False, "store images and weights in PyTorch's channels-last"
        " memory format")
    sync_bn: bool = option(False, "let BatchNorm see the images of all processes, not only its own"
        " (on CUDA)")
    resume: str | None = option(None, "continue from this checkpoint; auto: from last.pt of"
        " --output-dir, or from best.pt if that is missing, or from the start if both are, with"
        " the options in the folder's args.json if it has one, apart from --device, --download"
        " and --print-freq",
        metavar="PATH", may_change=True)
    output_dir: str = option(None, "for log and checkpoints (default: runs/ARCH-METHOD, or the"
        " folder of --resume PATH)",
        metavar="DIR", may_change=True)
    print_freq: int = option(10, "steps between two reports of the losses", flags=("-p",),
        type=number(int, 1), metavar="STEPS", may_change=True)
    # fmt: on

    @property
    def minibatch_size(self) -> int:
        """Images per minibatch: the batch, or, where two losses share it, half of it each."""
        return self.batch_size // (1 if self.whole_batches else METHODS[self.method].terms)

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate after `progress` epochs of --schedule."""
        if progress < self.warmup_epochs:
            return self.lr * (0.01 + 0.99 * progress / self.warmup_epochs)
        if self.schedule == "cosine":
            share = (progress - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return self.lr * (1 + math.cos(math.pi * share)) / 2
        return self.lr * self.gamma ** sum(progress >= m for m in self.milestones)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "TrainConfig":
        """Restore the configuration from the settings of a checkpoint."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})


MAY_CHANGE = {field.name for field in fields(TrainConfig) if field.metadata["may_change"]}


def parse_train_config(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Parse the command line of train.py.

    Returns:
        The configuration, and the checkpoint to continue from, if there is one.

    Raises:
        UserError: wrong usage, a setting that a resumed run must not change, or an output folder
            that holds another run.
    """
    values, given = parse_options(TrainConfig, argv, description)
    if "arch" not in given:
        values["arch"] = _default_arch(values["weights"], values["data"])
    folder = values["output_dir"] or f"runs/{file_name(values['arch'])}-{values['method']}"
    auto, begun = values["resume"] == "auto", Path(folder, "args.json")
    path = checkpoint = None
    if auto:
        path = _latest(folder)
    elif values["resume"]:
        path = Path(values["resume"])
    if path:
        checkpoint = load_checkpoint(path)
        values = _resumed(values, given, checkpoint["settings"], path) | {"resume": str(path)}
        if values["epochs"] < len(checkpoint["log"]):
            raise UserError(
                f"--epochs {values['epochs']} is fewer than the {len(checkpoint['log'])} that"
                f" {path} has: raise it, or choose another --output-dir to start again"
            )
    elif auto and begun.exists():  # its first epoch was interrupted
        values = _resumed(values, given, _read_settings(begun), begun)
    else:
        values = _with_defaults(values) | {"output_dir": folder}
    last = _latest(values["output_dir"])
    if last and not (path and last.samefile(path)):
        raise UserError(
            f"{values['output_dir']} holds an earlier run: continue it with --resume {last}, or"
            " choose another --output-dir"
        )
    values["device"] = resolve_device(values["device"])
    check_name(values["arch"])
    _check_combinations(values, given)
    return TrainConfig(**values), checkpoint


def _default_arch(weights: str | None, data: str) -> Any:
    """Return the architecture of the checkpoint --weights, or that of the dataset's recipe."""
    if not (weights and os.path.exists(weights)):
        return _recipe_of(data)["arch"]
    arch = load_weights(weights).get("arch")
    if arch is None:
        raise UserError(
            f"--weights {weights} is a plain state dict: name its architecture with --arch"
        )
    return arch


def _check_combinations(values: dict[str, Any], given: set[str]) -> None:
    """Raise `UserError` for settings that exclude each other, or were given in vain."""
    uses = {  # option: another one, and its values with which the first has an effect
        "milestones": ("schedule", ["step"]), "gamma": ("schedule", ["step"]),
        "momentum": ("opt", ["sgd"]),
        **{option: ("method", [name for name, m in METHODS.items() if option in m.options])
           for option in MIXING + ATTACK},
    }  # fmt: skip
    for name, (other, needed) in uses.items():
        if name in given and values[other] not in needed:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} has no effect with --{other} {values[other]}: leave it out")
    if (values["mean"] is None) != (values["std"] is None):
        raise UserError("--mean and --std belong together: give both, or neither")
    if values["sync_bn"] and not values["device"].startswith("cuda"):
        raise UserError(
            f"--sync-bn works on CUDA, not on {values['device']}: leave it out, or use a GPU"
        )
    if values["amp"] == "fp16" and values["device"] == "cpu":
        raise UserError("--amp fp16 takes many times longer on a CPU: leave it out, or use a GPU")
    if values["warmup_epochs"] >= values["epochs"]:
        raise UserError(
            f"--warmup-epochs is {values['warmup_epochs']:g}, and must be below --epochs"
            f" ({values['epochs']}): lower it, or raise --epochs"
        )
    if values["mix_at"] != [INPUT]:
        if values["method"] not in METHODS_THAT_MIX:
            raise UserError(
                f"--mix-at needs a method that mixes before it attacks, not {values['method']}:"
                f" choose {' or '.join(METHODS_THAT_MIX)}, or leave it out"
            )
        if values["compile"]:  # compiled code does not see hooks that are added later
            raise UserError("--mix-at does not work with --compile: leave one of them out")


def _read_settings(path: Path) -> dict[str, Any]:
    """Read the settings that a run writes before its first epoch."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: remove it to start again")
    return settings


def _resumed(
    values: dict[str, Any], given: set[str], saved: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Combine the command line of a resumed run with its settings, which are from `path`."""
    saved = {**EARLIER, **saved}
    if saved.get("cache_dir") == "":  # earlier versions took it for the default
        saved["cache_dir"] = values["cache_dir"]
    for name in sorted(given - MAY_CHANGE):
        if values[name] != saved.get(name):
            raise UserError(
                f"--{name.replace('_', '-')} is {values[name]}, but the run in {path.parent} was"
                f" begun with {saved.get(name)}: leave it out, or start again without --resume in"
                " another --output-dir"
            )
    kept = (values.keys() - MAY_CHANGE) | (KEPT - given)
    if missing := sorted(kept - saved.keys()):
        raise UserError(
            f"{path} has no setting {missing[0]}: another version of train.py wrote it; continue"
            " with that one"
        )
    check_saved(TrainConfig, {name: saved[name] for name in kept}, path)
    values = values | {name: saved[name] for name in kept}
    defaults = _default_milestones(saved["data"], saved["epochs"])
    if "milestones" not in given and saved["milestones"] == defaults:
        values["milestones"] = _default_milestones(saved["data"], values["epochs"])
    return values if "output_dir" in given else values | {"output_dir": str(path.parent)}


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that depend on the dataset."""
    data = values["data"]
    defaults = {**_recipe_of(data), "mix_at": [INPUT], "size": SIZES.get(data, 224)}
    defaults["milestones"] = _default_milestones(data, values["epochs"] or defaults["epochs"])
    return {name: defaults.get(name) if v is None else v for name, v in values.items()}


def _recipe_of(data: str) -> dict[str, Any]:
    return SHAPES_RECIPE if data == "shapes" else PAPER_RECIPE


def _default_milestones(data: str, epochs: int) -> list[float]:
    """Scale the milestones of the dataset's recipe to the number of epochs."""
    recipe = _recipe_of(data)
    return [epochs * (milestone / recipe["epochs"]) for milestone in recipe["milestones"]]


def schedule_change(config: TrainConfig, checkpoint: dict[str, Any]) -> str:
    """Describe how a resumed run changes the schedule of its checkpoint, or return nothing."""
    saved, epoch = checkpoint["settings"], len(checkpoint["log"]) + 1
    if (config.epochs, config.milestones) == (saved["epochs"], saved["milestones"]):
        return ""
    cosine = config.schedule == "cosine"
    before, now = (
        "a cosine" if cosine else "--milestones " + (" ".join(f"{m:g}" for m in each) or "(none)")
        for each in (saved["milestones"], config.milestones)
    )
    return (
        f"from epoch {epoch} on, the learning rate ({config.learning_rate(epoch - 1):.1e}) follows"
        f" {now} of {config.epochs} epochs (before: {before} of {saved['epochs']})"
    )


def _latest(folder: str) -> Path | None:
    """Find the checkpoint to continue from: last.pt, or best.pt if there is no last.pt.

    That is so after a crash in the first epoch, or where a damaged last.pt was removed.
    """
    files = (Path(folder, name) for name in ("last.pt", "best.pt"))
    return next(filter(Path.exists, files), None)
