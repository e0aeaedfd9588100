"""The configuration of an evaluation: the command line of evaluate.py."""

import os
from dataclasses import MISSING, dataclass
from functools import cached_property
from pathlib import Path

from corruptions import MIN_SIDE
from harness.benchmark.registry import (
    COLUMNS,
    GROUPS,
    PERTURBATIONS,
    Perturbation,
    choose_perturbations,
    supplementary,
)
from harness.cli import number, option, parse_options
from harness.devices import resolve_device
from harness.errors import UserError, escape_unprintable
from harness.images.cache import default_cache_dir
from harness.images.corrupted import find_corruption
from harness.images.datasets import MAX_SIDE
from harness.images.preprocess import CROPS
from harness.models import LIBRARIES


def _short_name(path: str) -> str:
    """Return the folder of a training's checkpoint, and the stem of any other file."""
    file = Path(os.path.abspath(path))
    return file.parent.name if file.stem in ("last", "best") else file.stem


@dataclass(frozen=True)
class EvalConfig:
    """All options of evaluate.py. `baseline` is a label, see `labels`."""

    # fmt: off
    models: list[str] = option(MISSING, "a checkpoint of train.py; a state dict of --arch in a .pt,"
        " .pth or .safetensors file; torchvision:ARCH or timm:NAME, with --weights; or your own"
        " module:callable, which runs its code, as does a checkpoint of such a model; each model"
        " is a row of the tables",
        group="models", nargs="+", metavar="MODEL")
    surrogate: str | None = option(None, "the model that the black-box attacks are made on, trained"
        " on the same images (the paper: a VGG); without one they are left out", metavar="MODEL")
    baseline: str = option(None, "the row that + and - refer to (default: the first)",
        metavar="MODEL")
    arch: str | None = option(None, "the architecture of models that are plain state dicts, as in"
        " train.py")
    weights: str | None = option(None, "weights of torchvision:ARCH (DEFAULT: the best) or"
        " timm:NAME (DEFAULT alone), downloaded", metavar="NAME")
    mean: list[float] | None = option(None, "normalize the input of a module:callable or a state"
        " dict by this mean and --std", type=number(float, 0, 1), nargs=3, metavar="M")
    std: list[float] | None = option(None, "see --mean", type=number(float, 0, above=True), nargs=3,
        metavar="S")
    imagenet_classes: Path | None = option(None, "names of the outputs of models that are not"
        " checkpoints of train.py, a line each, in their order: a wnid, or the name of a class"
        " folder; the other outputs are left out (default: one output for each class)", type=Path,
        metavar="FILE")

    data: str | None = option(None, "as in train.py, or a test set alone: val/CLASS/*.jpg,"
        " test/CLASS/*.jpg or CLASS/*.jpg (default: what the first checkpoint was trained on)",
        group="images", flags=("--data-dir",), metavar="SET")
    size: int | None = option(None, "side of the square that images are resized to (default: that"
        " of the first model that has one, otherwise as in train.py)",
        type=number(int, MIN_SIDE, MAX_SIDE))
    preprocess: str | None = option(None, "squash or center-crop, as in train.py (default: as the"
        " images of --imagenet-c; otherwise the models' own)", choices=tuple(CROPS))
    cache_dir: str = option(str(default_cache_dir()), "where decoded images and CIFAR are kept",
        metavar="DIR")
    limit: int | None = option(None, "test on N images, where possible equally many of each class,"
        " drawn with --seed (default: all)", type=number(int, 1), metavar="N")
    imagenet_c: Path | None = option(None, "read the corruptions that are there as"
        " DIR/corruption/severity/class/file or DIR/family/corruption/..., like ImageNet-C and"
        " Tiny-ImageNet-C, or as DIR/corruption.npy, like CIFAR-10-C, instead of computing them",
        type=Path, metavar="DIR")

    only: list[str] = option(None, f"measure only these groups ({', '.join(GROUPS)}), these"
        f" perturbations ({', '.join(COLUMNS)}), or clean, which is always measured (default: all"
        " but validation)",
        group="perturbations", nargs="+", metavar="NAME")
    skip: list[str] = option(None, "leave these out", nargs="+", metavar="NAME")
    attack: list[str] = option(None, "add your own attacks, x_adv = callable(model, x, y), which"
        " are always measured; this runs their code", nargs="+", metavar="NAME=module:callable")
    epsilon: list[float] = option(None, "add the paper's PGD, PGD LL and MI-FGSM with these sizes,"
        " beside the paper's own", type=number(float, 0, 1, above=True), nargs="+", metavar="E")

    batch_size: int = option(100, "images at a time; changes nothing but speed and memory,"
        " and the draws of an --attack",
        group="running", flags=("-b",), type=number(int, 1))
    seed: int = option(0, "seed of all draws", type=number(int, 0, 2**32 - 1))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    output_dir: str | None = option(None, "folder of the finished cells, from which an interrupted"
        " run continues, and of tables and figures (default: runs/evaluate/MODELS-DIGEST, with a"
        " digest of what decides the scores: weights, images, --seed, --limit, ...; runs that"
        " differ only in --only, --skip, --attack or --epsilon share it)",
        metavar="DIR")
    dump_images: int = option(4, "plot N images under every perturbation of the tables that is"
        " computed here, with the first model's predictions", type=number(int, 0, 100), metavar="N")
    # fmt: on

    @property
    def specs(self) -> list[str]:
        """All models of the command line, the surrogate last, each once."""
        return list(dict.fromkeys([*self.models, *filter(None, [self.surrogate])]))

    @property
    def labels(self) -> dict[str, str]:
        """The name of each model in the report: a checkpoint's folder, if that tells them apart."""
        names = [_short_name(spec) if is_file(spec) else spec for spec in self.models]
        names = names if len(set(names)) == len(names) else self.models
        return dict(zip(self.models, map(escape_unprintable, names), strict=True))

    @cached_property
    def supplement(self) -> dict[str, Perturbation]:
        """The rows of --attack and --epsilon."""
        return supplementary(self.attack, self.epsilon, self.seed)

    @property
    def registry(self) -> dict[str, Perturbation]:
        """The registry with the supplement, which never replaces the paper's rows."""
        return self.supplement | PERTURBATIONS

    @property
    def perturbations(self) -> list[str]:
        """The names of what is measured, in order."""
        papers = [name for name in self.supplement if name in PERTURBATIONS]
        only = [*self.only, *papers] if self.only else []
        added = [
            name
            for name, entry in self.supplement.items()
            if name not in papers and (name in self.others or entry.box not in self.skip)
        ]
        return choose_perturbations(only, self.skip) + added

    @property
    def others(self) -> dict[str, str]:
        """The attacks of others: module:callable by name."""
        return dict(text.split("=", 1) for text in self.attack)

    def uses_gradient(self, spec: str) -> bool:
        """Return whether a built-in attack uses this model's gradient. --attack does not count."""
        boxes = {self.registry[n].box for n in self.perturbations if n not in self.others}
        return (spec in self.models and "white-box" in boxes) or (
            spec == self.surrogate and "black-box" in boxes
        )

    def find_corruption(self, name: str) -> Path | None:
        """Return the folder or the array of a corruption below --imagenet-c, if there is one."""
        entry = self.registry[name]
        if self.imagenet_c is None or len(entry.severities) == 1:
            return None
        return find_corruption(self.imagenet_c, name, entry.group)


def is_file(spec: str) -> bool:
    """Return whether a model's name is a path, even of a file that does not exist."""
    suffixes = (".pt", ".pth", ".safetensors")
    return os.path.exists(spec) or ":" not in spec or spec.endswith(suffixes)


def parse_eval_config(argv: list[str] | None = None, description: str | None = None) -> EvalConfig:
    """Parse and check the command line of evaluate.py."""
    values, _ = parse_options(EvalConfig, argv, description)
    values |= {name: values[name] or [] for name in ("only", "skip", "attack", "epsilon")}
    config = EvalConfig(**values)
    config.perturbations  # noqa: B018  # raises for unknown names
    for model in config.models:
        if config.models.count(model) > 1:
            raise UserError(f"{model} is named twice: name each model once")
    labels = config.labels
    baseline = config.baseline or config.models[0]
    baseline = labels.get(baseline, baseline)  # it may be a label already
    if baseline not in labels.values():
        known = ", ".join(labels.values())
        raise UserError(f"--baseline {baseline} is not one of the models: {known}")
    zoo = [s for s in config.specs if not is_file(s) and s.startswith(LIBRARIES)]
    if zoo and not config.weights:
        raise UserError(f"{zoo[0]} needs --weights NAME; DEFAULT takes the best published ones")
    if config.weights and os.path.exists(config.weights):
        raise UserError(
            f"--weights {config.weights}: name the file itself as a model, with --arch if it"
            " is a plain state dict"
        )
    if config.weights and not zoo:
        raise UserError(
            f"--weights {config.weights} is for torchvision:ARCH and timm:NAME: name such a"
            " model, or leave it out"
        )
    if (config.mean is None) != (config.std is None):
        raise UserError("--mean and --std belong together: give both, or neither")
    if config.mean and not config.arch and all(is_file(s) or s in zoo for s in config.specs):
        raise UserError(
            "--mean and --std are for module:callable and --arch; other models know theirs"
        )
    if config.imagenet_c and not config.imagenet_c.is_dir():
        raise UserError(f"--imagenet-c {config.imagenet_c}: no such folder")
    if config.imagenet_c and not any(map(config.find_corruption, config.perturbations)):
        raise UserError(
            f"--imagenet-c {config.imagenet_c} has no folder or .npy file of a corruption to score;"
            " the paper's four are always computed"
        )
    return EvalConfig(**values | {"baseline": baseline, "device": resolve_device(config.device)})
