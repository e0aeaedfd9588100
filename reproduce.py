#!/usr/bin/env python3
"""Make the paper's tables again, from one command, and print them beside the paper's numbers.

python reproduce.py                                    # a small network on the embedded set
python reproduce.py --scale small --data IMAGES --tables 1 2 --seeds 3
python reproduce.py --scale paper --data IMAGENET --dry-run        # what it would run, how long

What is finished is never done again: stopped at any moment and started again, it goes on.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data
import estimate
import paper
import summary
import train
from cells import read_cells
from common import Parser, UserError, build_model, find_device, number, run
from corruptions import MIN_SIDE
from evaluate import choose_cells
from methods import METHODS
from settings import parse_args as training_args

# What each scale runs. None leaves it to train.py, whose defaults for folders are the paper's:
# learning rate 0.002, divided by 10 after 30, 60 and 80 of 90 epochs. With Adam, the surrogate, a
# VGG, learns at 1e-4 and not at 1e-3; the paper does not say how its VGG was trained.
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {
        "data": "shapes", "classes": None, "size": 32,
        "archs": ["resnet18"], "epochs": 5, "batch_size": 32, "lr": 1e-3,
        "surrogate": "vgg11_bn", "surrogate_epochs": 1, "surrogate_lr": 1e-4,
        "limit": 100, "tables": [1], "methods": ["standard", "mtlat"], "train_flags": "",
    },
    "small": {
        "data": None, "classes": None, "size": 64,
        "archs": ["resnet18"], "epochs": 30, "batch_size": 64, "lr": 1e-3,
        "surrogate": "vgg11_bn", "surrogate_epochs": None, "surrogate_lr": 1e-4,
        "limit": 0, "tables": [1, 2, 3], "methods": None, "train_flags": "",
    },
    "paper": {
        "data": None, "classes": 100, "size": 224,
        "archs": ["resnet50", "resnext50_32x4d"], "epochs": 90, "batch_size": 256, "lr": None,
        "surrogate": "vgg16_bn", "surrogate_epochs": None, "surrogate_lr": 1e-4,
        # The precision and the memory layout are ours; the paper names none.
        "limit": 0, "tables": [1, 2, 3], "methods": None,
        "train_flags": "--amp bf16 --channels-last",
    },
}  # fmt: skip


STOPPED = (130, 143)  # exit codes of a script that Ctrl-C or SIGTERM has ended
GRACE = 10.0  # seconds that an interrupted child has to end by itself


class Training(NamedTuple):
    """A run of train.py, into its folder."""

    folder: Path
    argv: list[str]
    script: str = "train.py"


class Evaluation(NamedTuple):
    """A run of evaluate.py on the trainings of one architecture and one seed."""

    folder: Path
    argv: list[str]
    arch: str
    seed: int
    tables: list[int]  # [3]: of clean accuracies alone
    models: dict[str, Path]  # folders by method, the baseline first
    script: str = "evaluate.py"


# ---------------------------------------------------------------------------- the plan


def folder_of(args: argparse.Namespace, arch: str, method: str, seed: int) -> Path:
    return Path(args.output_dir, f"{arch.replace(':', '-')}-{method}-seed{seed}")


def plan(args: argparse.Namespace) -> Iterator[Training | Evaluation]:
    """Everything there is to do, in order: a seed's tables are done before the next seed begins.

    Tables 2 and 3 are of the first architecture, as the paper's are of ResNet-50 alone.
    """
    surrogate = train_one(args, args.surrogate, paper.BASELINE, 0)
    yield surrogate
    for seed in range(args.seeds):
        for arch in args.archs:
            tables = args.tables if arch == args.archs[0] else [t for t in args.tables if t == 1]
            chosen = {method for table in tables for method in methods_of(args, table)}
            for method in METHODS:
                if method in chosen:
                    yield train_one(args, arch, method, seed)
            if scored := [table for table in tables if table < 3]:
                yield evaluate_all(args, arch, seed, scored, surrogate.folder)
            if 3 in tables:
                yield evaluate_all(args, arch, seed, [3], None)


def methods_of(args: argparse.Namespace, table: int) -> list[str]:
    """The rows of a table that are wanted; always the baseline, which the signs refer to."""
    wanted = args.methods or METHODS
    return [m for m in paper.methods_of(table) if m in wanted or m == paper.BASELINE]


def train_one(args: argparse.Namespace, arch: str, method: str, seed: int) -> Training:
    """How one network is trained."""
    own = arch == args.surrogate
    folder = folder_of(args, arch, method, seed)
    settings = {
        "data": args.data, "classes": args.classes, "size": args.size, "arch": arch,
        "method": method, "seed": seed,
        "epochs": (own and args.surrogate_epochs) or args.epochs,
        "batch-size": args.batch_size, "lr": args.surrogate_lr if own else args.lr,
        "cache-dir": args.cache_dir, "device": args.device, "resume": "auto", "output-dir": folder,
    }  # fmt: skip
    return Training(folder, flags(settings) + shlex.split(args.train_flags))


def evaluate_all(
    args: argparse.Namespace, arch: str, seed: int, tables: list[int], surrogate: Path | None
) -> Evaluation:
    """How the networks of one seed are measured; without a surrogate, their clean accuracy alone.

    What the folder holds of other methods stays there, so their networks are named too.
    """
    kind = "evaluation" if surrogate else "clean"
    methods = {method for table in tables for method in methods_of(args, table)}
    folder = Path(args.output_dir, f"{kind}-{arch.replace(':', '-')}-seed{seed}")
    there = {line["label"] for line in read_cells(folder / "cells.jsonl")}
    folders = {method: folder_of(args, arch, method, seed) for method in METHODS}
    models = {m: path for m, path in folders.items() if m in methods or path.name in there}
    settings = {
        "surrogate": surrogate / "last.pt" if surrogate else None, "data": args.data,
        "limit": args.limit or None, "cache-dir": args.cache_dir, "device": args.device,
        "output-dir": folder,
    }  # fmt: skip
    argv = [*(str(path / "last.pt") for path in models.values()), *flags(settings)]
    argv += [] if surrogate else ["--only", "clean", "--dump-images", "0"]
    wanted = {method: path for method, path in models.items() if method in methods}
    return Evaluation(folder, argv, arch, seed, tables, wanted)


def flags(settings: dict[str, Any]) -> list[str]:
    given = {name: value for name, value in settings.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def command(task: Training | Evaluation) -> str:
    """The task as one would type it here."""
    script = os.path.relpath(Path(__file__).with_name(task.script))
    return f"python {shlex.join([script, *task.argv])}"


# ---------------------------------------------------------------------------- the run


def epochs_done(task: Training, sets: data.Data) -> tuple[int, argparse.Namespace]:
    """How many epochs of a training are finished, and its settings.

    What is there under other settings or on other images is refused, as train.py does.
    """
    settings, checkpoint = training_args(task.argv)
    if checkpoint and checkpoint["fingerprint"] != sets.fingerprint:
        raise UserError(
            f"{task.folder} was trained on other images than those of --data {settings.data}:"
            " choose another --output-dir"
        )
    return len(checkpoint["log"]) if checkpoint else 0, settings


def call(task: Training | Evaluation) -> None:
    """Run a script, and end with its exit code if it fails; it has said why."""
    print(f"\n$ {command(task)}", flush=True)
    script = str(Path(__file__).with_name(task.script))
    child = subprocess.Popen([sys.executable, script, *task.argv])
    try:
        code = child.wait()
    except KeyboardInterrupt as stop:
        # The terminal has interrupted the child too; one that has not heard of it is told.
        if stop.args:  # SIGTERM, which comes to this process alone
            child.terminate()
        try:
            code = child.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            child.terminate()
            code = child.wait()
        if code not in STOPPED:
            raise
    if code in STOPPED:  # the child has said so
        sys.exit(code)
    if code:
        print(f"error: exit code {code} of: {command(task)}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def reproduce(args: argparse.Namespace) -> None:
    """Train and measure what is not finished, or tell how long it would take; then report."""
    tasks = list(plan(args))
    trainings = [task for task in tasks if isinstance(task, Training)]
    evaluations = [task for task in tasks if isinstance(task, Evaluation)]
    sets = train.load_images(training_args(trainings[0].argv)[0])
    state = {task.folder: epochs_done(task, sets) for task in trainings}
    for arch in [args.surrogate, *args.archs]:  # a wrong name ends it now, not after hours
        with torch.device("cpu" if ":" in arch else "meta"):  # where weights cost nothing
            build_model(arch, len(sets.classes))
    if args.dry_run:
        list_tasks(args, tasks, state, sets)
        return
    for task in tasks:
        done, settings = state.get(task.folder, (0, args))
        if isinstance(task, Training) and done == settings.epochs:
            print(f"finished: {task.folder}")
        else:
            call(task)
    found = [
        summary.read_evaluation(task.folder, task.arch, task.seed, task.tables, task.models)
        for task in evaluations
    ]
    commands, folders = [command(task) for task in tasks], [task.folder for task in trainings]
    summary.write_report(args, commands, folders, found, sets)


def list_tasks(
    args: argparse.Namespace, tasks: list[Training | Evaluation],
    state: dict[Path, tuple[int, argparse.Namespace]], sets: data.Data,
) -> None:  # fmt: skip
    """Print every task with the time that it will take."""
    meter, total = estimate.Meter(sets, args.device), 0.0
    for task in tasks:
        if isinstance(task, Training):
            done, settings = state[task.folder]
            left = settings.epochs - done
            seconds = meter.training(settings, left) if left else 0.0
            note = "finished" if not left else f"{done} of {settings.epochs} epochs are done"
        else:
            lines = read_cells(task.folder / "cells.jsonl")
            done_cells = {(x["label"], x["perturbation"], x["severity"]) for x in lines}
            names = ["clean"] if task.tables == [3] else choose_cells([], [])
            labels = {path.name: task.arch for path in task.models.values()}
            seconds = meter.evaluation(labels, args.surrogate, names, args.limit, done_cells)
            note = f"{len(done_cells)} cells are done"
        total += seconds
        print(f"{spell(seconds)}  {command(task)}" + f"  # {note}" * (not note.startswith("0 ")))
    print(f"{spell(total)}  in all, on {args.device}")


def spell(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:4}:{minutes % 60:02}:{seconds:02}"


# ---------------------------------------------------------------------------- the command line


def default(name: str) -> str:
    values = {scale: recipe[name] for scale, recipe in RECIPES.items()}
    texts = {scale: " ".join(v) if isinstance(v, list) else v for scale, v in values.items()}
    told = [f"{scale}: {'-' if v in (None, '') else v}" for scale, v in texts.items()]
    return f"({', '.join(told)})"


def build_parser() -> Parser:
    parser = Parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("what is reproduced").add_argument
    add("--scale", choices=RECIPES, default="demo", help="the recipe that all else overrides")
    add("--tables", nargs="+", choices=("1", "2", "3", "all"), metavar="N",
        help="the paper's tables: 1: standard, iat, mtlat; 2: mixup, tlat; 3: clean accuracy of"
        " fgsm, target-fgsm, ls, tlat; or all (default: all; demo: standard and mtlat of Table 1)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD",
        help="keep these rows of the tables, and standard, which the signs refer to (default: all)")
    add("--seeds", type=number(int, 1), default=1, metavar="N",
        help="train every row with seeds 0 to N - 1, and print mean and spread")
    add("--dry-run", action="store_true",
        help="list what would be run, with the time it will take, from a few measured steps")

    add = parser.add_argument_group("the recipe").add_argument
    add("--data", metavar="SET", help=f"as in train.py {default('data')}")
    add("--classes", type=number(int, 2), metavar="K", help=f"as in train.py {default('classes')}")
    add("--size", type=number(int, MIN_SIDE), help=f"side of the images {default('size')}")
    add("--archs", nargs="+", metavar="ARCH",
        help=f"as --arch of train.py; Tables 2 and 3 take the first {default('archs')}")
    add("--epochs", type=number(int, 1), help=f"as in train.py {default('epochs')}")
    add("--batch-size", type=number(int, 1), help=f"as in train.py {default('batch_size')}")
    add("--lr", type=number(float, 0, above=True),
        help=f"as in train.py, not for the surrogate {default('lr')}")
    add("--surrogate", metavar="ARCH",
        help=f"the network that black-box attacks are made on {default('surrogate')}")
    add("--surrogate-epochs", type=number(int, 1),
        help=f"if others than --epochs {default('surrogate_epochs')}")
    add("--surrogate-lr", type=number(float, 0, above=True),
        help=f"its learning rate {default('surrogate_lr')}")
    add("--limit", type=number(int, 0), metavar="N",
        help=f"test on N images, 0: on all, as in evaluate.py {default('limit')}")
    add("--train-flags", metavar="FLAGS",
        help=f"more flags of train.py, as in --train-flags=\"--amp bf16\" {default('train_flags')}")

    add = parser.add_argument_group("running").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--cache-dir", metavar="DIR", help="as in train.py")
    add("--output-dir", metavar="DIR",
        help="for trainings, measurements and the report (default: runs/reproduce/SCALE)")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line with the recipe filled in."""
    args = build_parser().parse_args(argv)
    recipe = dict(RECIPES[args.scale])
    if args.methods:
        recipe["tables"] = [1, 2, 3]
    if args.tables:
        recipe["methods"] = None
        every = "all" in args.tables
        args.tables = [t for t in (1, 2, 3) if every or str(t) in args.tables]
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data is None:
        raise UserError(f"--scale {args.scale} needs --data DIR: a folder of images, see train.py")
    if args.surrogate in args.archs:
        raise UserError(f"--surrogate {args.surrogate} is one of --archs: choose another network")
    args.archs = list(dict.fromkeys(args.archs))
    args.output_dir = args.output_dir or f"runs/reproduce/{args.scale}"
    args.device = find_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    reproduce(parse_args(argv))


if __name__ == "__main__":
    run(main)
