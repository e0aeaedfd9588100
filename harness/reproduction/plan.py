"""The plan of a reproduction: its recipes, its command line, and the scripts that it runs."""

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from corruptions import MIN_SIDE
from harness import distributed
from harness.benchmark.store import read_cells
from harness.cli import format_command, number, option, parse_options
from harness.devices import resolve_device
from harness.errors import UserError
from harness.files import file_name
from harness.images.datasets import MAX_SIDE, SIZES
from harness.reproduction.paper import BASELINE, methods_of_table
from harness.training.config import SHAPES_RECIPE, TrainConfig
from harness.training.methods import METHODS

# What each scale runs. Where `data` is None, --data is required; where `methods` is, all are
# trained. None leaves any other setting to train.py, whose defaults for folders are the paper's:
# learning rate 0.002, divided by 10 after 30, 60 and 80 of 90 epochs. With --whole-batches all
# methods make the same number of updates; with --train-flags "" those of two losses make twice as
# many, as in the paper. The surrogate, a VGG, learns with Adam at 1e-4, and does not at 1e-3.
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {
        "data": "shapes", "classes": None, "size": SIZES["shapes"],
        # A ResNet or a VGG needs many more updates than there is time for. With these networks and
        # epochs, the standard training reaches 98.8 % or more with three seeds.
        "archs": [SHAPES_RECIPE["arch"]],
        **{name: SHAPES_RECIPE[name] for name in ("epochs", "batch_size", "lr")},
        "surrogate": "cnn6", "surrogate_lr": SHAPES_RECIPE["lr"],
        "limit": 0, "tables": [1], "methods": ["standard", "mtlat"],
        "train_flags": "--whole-batches --channels-last",
    },
    "small": {
        "data": None, "classes": None, "size": 64,
        "archs": ["resnet18"], "epochs": 30, "batch_size": 64, "lr": 1e-3,
        "surrogate": "vgg11_bn", "surrogate_lr": 1e-4,
        "limit": 0, "tables": [1, 2, 3], "methods": None, "train_flags": "--whole-batches",
    },
    "paper": {
        "data": None, "classes": 100, "size": 224,
        "archs": ["resnet50", "resnext50_32x4d"], "epochs": 90, "batch_size": 256, "lr": None,
        "surrogate": "vgg16_bn", "surrogate_lr": 1e-4,
        # The precision and the memory layout are ours; the paper names none.
        "limit": 0, "tables": [1, 2, 3], "methods": None,
        "train_flags": "--amp bf16 --channels-last",
    },
}  # fmt: skip

IN_TABLES = tuple(m for m in METHODS if any(m in methods_of_table(table) for table in (1, 2, 3)))


def _default(name: str) -> str:
    """Describe the values of one setting in all recipes, for --help."""
    values = {scale: recipe[name] for scale, recipe in RECIPES.items()}
    texts = {scale: " ".join(v) if isinstance(v, list) else v for scale, v in values.items()}
    parts = [f"{scale}: {'-' if v in (None, '') else v}" for scale, v in texts.items()]
    return f"({', '.join(parts)})"


@dataclass(frozen=True)
class ReproduceConfig:
    """All options of reproduce.py, with the recipe filled in."""

    # fmt: off
    scale: str = option("demo", "the recipe; every other option replaces a part of it, given below"
        " for each scale (-: train.py's default)",
        group="what is reproduced", choices=tuple(RECIPES))
    tables: list[int] = option(None, "the paper's tables: 1: standard, iat, mtlat; 2: mixup, tlat;"
        " 3: clean accuracy of fgsm, target-fgsm, ls, tlat; or all (default: all; demo: standard"
        " and mtlat of Table 1)", nargs="+", choices=("1", "2", "3", "all"), metavar="N")
    methods: list[str] | None = option(None, "keep these rows of the tables, and standard, which"
        " the signs refer to (default: all)", nargs="+", choices=IN_TABLES, metavar="METHOD")
    seeds: int = option(1, "train every row with seeds 0 to N - 1, and print mean and standard"
        " deviation", type=number(int, 1), metavar="N")
    dry_run: bool = option(False, "decode the images, and list what would be run, with the"
        " time that it will take, estimated from a few steps")

    data: str = option(None, f"as in train.py; required where - stands {_default('data')}",
        group="the recipe", metavar="SET")
    classes: int | None = option(None, f"as in train.py {_default('classes')}",
        type=number(int, 2), metavar="K")
    size: int = option(None, f"side of the images {_default('size')}",
        type=number(int, MIN_SIDE, MAX_SIDE))
    archs: list[str] = option(None, "as --arch of train.py; Tables 2 and 3 take the first"
        f" {_default('archs')}", nargs="+", metavar="ARCH")
    epochs: int = option(None, f"as in train.py {_default('epochs')}", type=number(int, 1))
    batch_size: int = option(None, f"as in train.py {_default('batch_size')}",
        type=number(int, 1))
    lr: float | None = option(None, f"as in train.py, not for the surrogate {_default('lr')}",
        type=number(float, 0, above=True))
    surrogate: str = option(None, "the network that the black-box attacks use; another one needs"
        f" another --output-dir {_default('surrogate')}", metavar="ARCH")
    surrogate_epochs: int | None = option(None, "its epochs, if not --epochs", type=number(int, 1))
    surrogate_lr: float = option(None, f"its learning rate {_default('surrogate_lr')}",
        type=number(float, 0, above=True))
    limit: int = option(None, "test on N images, as --limit of evaluate.py; 0: on all"
        f" {_default('limit')}", type=number(int, 0), metavar="N")
    train_flags: str = option(None, "further options of train.py that every method has, as in"
        f" --train-flags=\"--amp bf16\" {_default('train_flags')}", type=str, metavar="FLAGS")

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...", group="running")
    cache_dir: str | None = option(None, "as in train.py", metavar="DIR")
    output_dir: str = option(None, "for trainings, evaluations and the report (default:"
        " runs/reproduce/SCALE)", metavar="DIR")
    # fmt: on


def parse_reproduce_config(
    argv: list[str] | None = None, description: str | None = None
) -> ReproduceConfig:
    """Parse the command line of reproduce.py, and fill in the recipe of its scale."""
    values, _ = parse_options(ReproduceConfig, argv, description)
    if distributed.world_size() > 1:
        raise UserError("reproduce.py runs as one process: start it without torchrun")
    scale, recipe = values["scale"], dict(RECIPES[values["scale"]])
    if others := set(values["methods"] or ()) - {BASELINE}:
        recipe["tables"] = [t for t in (1, 2, 3) if others & set(methods_of_table(t))]
    if values["tables"]:
        recipe["methods"] = None
        every = "all" in values["tables"]
        values["tables"] = [t for t in (1, 2, 3) if every or str(t) in values["tables"]]
    values |= {name: value for name, value in recipe.items() if values[name] is None}
    reached = {BASELINE, *(method for t in values["tables"] for method in methods_of_table(t))}
    if missing := [method for method in values["methods"] or () if method not in reached]:
        tables = " ".join(map(str, values["tables"]))
        raise UserError(
            f"--methods {' '.join(missing)}: not in --tables {tables}; name a table with it (see"
            " --help), or leave --tables out"
        )
    if values["data"] is None:
        raise UserError(f"--scale {scale} needs --data DIR: a folder of images, see train.py")
    if values["surrogate"] in values["archs"]:
        raise UserError(
            f"--surrogate {values['surrogate']} is one of --archs: choose another network"
        )
    values["archs"] = list(dict.fromkeys(values["archs"]))
    values["output_dir"] = values["output_dir"] or f"runs/reproduce/{scale}"
    values["device"] = resolve_device(values["device"])
    return ReproduceConfig(**values)


class TrainTask(NamedTuple):
    """A run of train.py."""

    folder: Path
    argv: list[str]
    script: str = "train.py"


class EvalTask(NamedTuple):
    """A run of evaluate.py on the trainings of one architecture and one seed."""

    folder: Path
    argv: list[str]
    arch: str
    seed: int
    tables: list[int]  # [3]: clean accuracies alone
    models: dict[str, Path]  # folders by method, the baseline first
    script: str = "evaluate.py"


def make_plan(config: ReproduceConfig) -> Iterator[TrainTask | EvalTask]:
    """Yield all tasks in order: the tables of one seed are finished before the next seed begins.

    Tables 2 and 3 use the first architecture, as the paper's use ResNet-50 alone.
    """
    surrogate = _train_task(config, config.surrogate, BASELINE, 0)
    if set(config.tables) != {3}:
        yield surrogate
    for seed in range(config.seeds):
        for arch in config.archs:
            tables = [t for t in config.tables if t == 1 or arch == config.archs[0]]
            chosen = {method for table in tables for method in _methods(config, table)}
            for method in METHODS:
                if method in chosen:
                    yield _train_task(config, arch, method, seed)
            if scored := [table for table in tables if table < 3]:
                yield _eval_task(config, arch, seed, scored, surrogate.folder)
            if 3 in tables:
                yield _eval_task(config, arch, seed, [3], None)


def _methods(config: ReproduceConfig, table: int) -> list[str]:
    """List the rows of a table that are wanted; always with the baseline."""
    wanted = config.methods or METHODS
    return [m for m in methods_of_table(table) if m in wanted or m == BASELINE]


def _folder(config: ReproduceConfig, arch: str, method: str, seed: int) -> Path:
    return Path(config.output_dir, f"{file_name(arch)}-{method}-seed{seed}")


def _train_task(config: ReproduceConfig, arch: str, method: str, seed: int) -> TrainTask:
    folder, epochs, lr = _folder(config, arch, method, seed), config.epochs, config.lr
    if arch == config.surrogate:
        epochs, lr = config.surrogate_epochs or epochs, config.surrogate_lr
    settings = {
        "data": config.data, "classes": config.classes, "size": config.size, "arch": arch,
        "method": method, "seed": seed, "epochs": epochs, "batch-size": config.batch_size, "lr": lr,
        "cache-dir": config.cache_dir, "device": config.device, "resume": "auto",
        "output-dir": folder,
    }  # fmt: skip
    return TrainTask(folder, _flags(settings) + _split_flags(config.train_flags, settings))


def _split_flags(text: str, settings: Iterable[str]) -> list[str]:
    """Split --train-flags into words. Raise `UserError` if one repeats what the plan sets."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--train-flags {text!r}: {error}; quote as in a shell") from None
    _, given = parse_options(TrainConfig, words, None)
    own = {field.name.replace("_", "-") for field in fields(ReproduceConfig)}
    for name in settings:
        if name.replace("-", "_") in given:
            found = [f"--{n}" for n in (name, f"{name}s") if n in own]
            fix = f"use its own {found[0]}" if found else "leave it out"
            raise UserError(f"--train-flags: reproduce.py itself sets --{name} of train.py; {fix}")
    return words


def _eval_task(
    config: ReproduceConfig, arch: str, seed: int, tables: list[int], surrogate: Path | None
) -> EvalTask:
    """Evaluate the networks of one seed; without a surrogate, their clean accuracy alone.

    Results of other methods stay in the folder, so their networks are named too.
    """
    kind = "evaluation" if surrogate else "clean"
    methods = {method for table in tables for method in _methods(config, table)}
    folder = Path(config.output_dir, f"{kind}-{file_name(arch)}-seed{seed}")
    there = {cell["label"] for cell in read_cells(folder / "cells.jsonl")}
    folders = {method: _folder(config, arch, method, seed) for method in METHODS}
    models = {m: path for m, path in folders.items() if m in methods or path.name in there}
    settings = {
        "surrogate": surrogate / "last.pt" if surrogate else None, "data": config.data,
        "limit": config.limit or None, "cache-dir": config.cache_dir, "device": config.device,
        "output-dir": folder,
    }  # fmt: skip
    argv = [*(str(path / "last.pt") for path in models.values()), *_flags(settings)]
    argv += [] if surrogate else ["--only", "clean", "--dump-images", "0"]
    wanted = {method: path for method, path in models.items() if method in methods}
    return EvalTask(folder, argv, arch, seed, tables, wanted)


def _flags(settings: dict[str, Any]) -> list[str]:
    given = {name: value for name, value in settings.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def command(task: TrainTask | EvalTask, root: Path) -> str:
    """Format the task as one would type it here; the scripts are in `root`."""
    script = str(root / task.script)
    with suppress(ValueError):  # on another drive of Windows
        script = os.path.relpath(script)
    return format_command(["python", script, *task.argv])
