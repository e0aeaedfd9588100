#!/usr/bin/env python3
"""Train an image classifier with M-TLAT, or with one of the trainings that the paper compares.

python train.py --arch resnet50                        # the embedded set, on any machine
python train.py --data IMAGENET --classes 100 --amp bf16 --channels-last
python train.py --resume runs/mtlat/last.pt            # go on where it was stopped
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from common import (
    Parser,
    UserError,
    check_logits,
    count_correct,
    find_device,
    load_checkpoint,
    load_model,
    locked,
    number,
    run,
    save_checkpoint,
    start_model,
    versions,
    write,
)
from methods import METHODS
from mtlat import Pair, draw

# The paper's recipe, and the one for the embedded set, whose network must learn on two CPU cores
# in minutes and so keeps its first learning rate for longer.
PAPER = {"epochs": 90, "batch_size": 256, "lr": 0.002, "milestones": (30, 60, 80)}
SHAPES = {"epochs": 3, "batch_size": 32, "lr": 0.0007, "milestones": (2, 2.67)}

# ---------------------------------------------------------------------------- the training


@dataclass
class Run:
    """Everything that a training needs from one epoch to the next."""

    args: argparse.Namespace
    classes: list[str]
    fingerprint: str
    train: data.Feed
    test: data.Feed
    model: nn.Module
    normalize: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: list[dict[str, Any]]


def minibatch_size(args: argparse.Namespace) -> int:
    """Images per minibatch: the batch, or, where two losses share it, half of it each."""
    return int(args.batch_size // (1 if args.whole_batches else METHODS[args.method].terms))


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    """The learning rate after `progress` epochs: gamma for every milestone passed."""
    return float(args.lr * args.gamma ** sum(progress >= m for m in args.milestones))


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    fused = not args.device.startswith("mps")
    common: dict[str, Any] = {"lr": args.lr, "weight_decay": args.wd, "fused": fused}
    if args.opt == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=args.momentum, **common)
    kind = torch.optim.AdamW if args.opt == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **common)


def load_images(args: argparse.Namespace) -> data.Data:
    """Load the images that these settings name."""
    return data.load(
        args.data, size=args.size, num_classes=args.classes, seed=args.data_seed,
        download=args.download, skip_bad_images=args.skip_bad_images, cache_dir=args.cache_dir,
    )  # fmt: skip


def prepare(args: argparse.Namespace, checkpoint: dict[str, Any] | None, sets: data.Data) -> Run:
    """Make or restore the model and its optimizer, for these images."""
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    count, size = len(sets.train.labels), minibatch_size(args)
    if not 0 < size <= count:
        raise UserError(f"--batch-size {args.batch_size} makes minibatches of {size}, and there are"
                        f" {count} training images: choose another")  # fmt: skip
    torch.manual_seed(args.seed)
    if checkpoint is None:
        model, normalize = start_model(args.arch, len(sets.classes), args.weights)
    else:
        if checkpoint["fingerprint"] != sets.fingerprint:
            raise UserError(
                f"--data {args.data} is not the set that {args.resume} was trained on, or has other"
                " pixels now: restore it, or start anew in another --output-dir"
            )
        model, normalize = load_model(checkpoint), checkpoint["normalize"]
    device = torch.device(args.device)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    feeds = data.Feed(sets.train, device), data.Feed(sets.test, device)
    if checkpoint is None:  # not again, as a look changes what some layers remember
        check_logits(f"--arch {args.arch}", model, feeds[0](torch.arange(size))[0],
                     len(sets.classes))  # fmt: skip
    optimizer = make_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log = []
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        log = checkpoint["log"]
    if args.compile:
        model.compile()
    return Run(
        args, sets.classes, sets.fingerprint, *feeds, model, normalize, optimizer, scaler, log
    )


def minibatches(run: Run, generator: torch.Generator) -> Iterator[list[Pair]]:
    """One epoch of steps: for each, the method's minibatches, every one in an order of its own."""
    size = minibatch_size(run.args)
    couples = METHODS[run.args.method].couples
    orders = [torch.randperm(len(run.train), generator=generator) for _ in range(couples)]
    for start in range(0, len(run.train) - size + 1, size):
        pairs = []
        for order in orders:
            x, y = run.train(order[start : start + size])
            if run.args.channels_last:
                x = x.to(memory_format=torch.channels_last)
            pairs.append((x, F.one_hot(y, len(run.classes)).to(x.dtype)))
        yield pairs


def train_epoch(run: Run, epoch: int) -> list[float]:
    """One pass over the training set; give the mean of each loss.

    Every random number is a function of the seed and the epoch, so nothing random need be saved.
    """
    args, method, device = run.args, METHODS[run.args.method], run.train.device
    digest = hashlib.sha256(f"{args.seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    torch.manual_seed(int.from_bytes(digest[7:14]))  # for dropout
    size = minibatch_size(args)
    steps = len(run.train) // size
    totals = torch.zeros(method.terms, device=device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    knobs = {"alpha": args.alpha, "epsilon_max": args.epsilon_max, "generator": generator}
    run.model.train()
    batches = minibatches(run, generator)
    bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, leave=False, disable=None)
    for step, pairs in enumerate(bar, 1):
        draws = draw(size, len(run.classes), **knobs, device=device)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch + (step - 1) / steps)
        run.optimizer.zero_grad()
        losses = method.losses(run.model, pairs, draws, args.attack_steps)
        for term in range(method.terms):
            with autocast:
                loss = next(losses)
            run.scaler.scale(loss).backward()
            totals[term] += loss.detach()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if step % args.print_freq == 0 or step == steps:
            means: list[float] = (totals / step).tolist()
            if not math.isfinite(sum(means)):
                raise UserError(
                    f"the loss became {sum(means)} in epoch {epoch + 1} before step {step + 1}:"
                    f" lower --lr ({args.lr}); {args.output_dir} keeps the epochs before"
                )
            bar.set_postfix_str(" ".join(f"loss{i} {m:.3f}" for i, m in enumerate(means, 1)))
    return means


def train(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    """Train from the checkpoint, or from the start, to the last epoch."""
    run = prepare(args, checkpoint, load_images(args))
    with locked(Path(args.output_dir)):
        refuse_overwriting(args, checkpoint)  # another run may have ended meanwhile
        train_epochs(run)


def train_epochs(run: Run) -> None:
    """Do what is left to do, and keep a checkpoint after every epoch."""
    args, out, log = run.args, Path(run.args.output_dir), run.log
    settings = {**vars(args), **versions(args.device), "command": " ".join(sys.argv)}
    write(out / "args.json", json.dumps(settings, indent=2) + "\n")
    print(describe(run), flush=True)
    started, first = time.monotonic(), len(log)
    for epoch in range(first, args.epochs):
        clock = time.monotonic()
        losses = train_epoch(run, epoch)
        seconds = time.monotonic() - clock
        size, terms = minibatch_size(args), METHODS[args.method].terms
        score = count_correct(run.model, run.test.in_order(args.batch_size)) / len(run.test)
        per_epoch = (time.monotonic() - started) / (epoch + 1 - first)
        log.append({
            "epoch": epoch + 1,
            "lr": learning_rate(args, epoch),
            "loss1": losses[0],
            "loss2": losses[-1] if terms > 1 else None,
            "clean_accuracy": score,
            "images_per_second": round(len(run.train) // size * size * terms / seconds, 1),
            "seconds_left": round(per_epoch * (args.epochs - epoch - 1)),
        })  # fmt: skip
        print(log_line(log[-1], args.epochs), flush=True)
        # last.pt comes last: what a crash before it leaves undone, a resumed run does again.
        write(out / "log.csv", log_csv(log))
        best = score > max((row["clean_accuracy"] for row in log[:-1]), default=-1)
        save_checkpoint(
            [out / "best.pt"] * best + [out / "last.pt"],
            arch=args.arch, normalize=run.normalize, classes=run.classes, size=args.size,
            fingerprint=run.fingerprint, model=run.model.state_dict(), log=log, settings=settings,
            optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
        )  # fmt: skip
    print(
        f"clean accuracy {100 * log[-1]['clean_accuracy']:.1f} % on {len(run.test)} images\n"
        f"checkpoint: {out / 'last.pt'}\nnext: python evaluate.py {out / 'last.pt'}"
    )


def log_csv(log: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    rows = csv.DictWriter(text, log[0], lineterminator="\n")
    rows.writeheader()
    rows.writerows(log)
    return text.getvalue()


def log_line(row: dict[str, Any], epochs: int) -> str:
    losses = "  ".join(f"{k} {row[k]:.4f}" for k in ("loss1", "loss2") if row[k] is not None)
    minutes, seconds = divmod(row["seconds_left"], 60)
    return (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  lr {row['lr']:.1e}  {losses}"
        f"  clean accuracy {100 * row['clean_accuracy']:5.1f} %"
        f"  {row['images_per_second']:.0f} images/s  {minutes}:{seconds:02} left"
    )


def describe(run: Run) -> str:
    args, method, size = run.args, METHODS[run.args.method], minibatch_size(run.args)
    steps = len(run.train) // size
    return (
        f"{args.arch} by {args.method} ({method.description}) on {args.device}, into"
        f" {args.output_dir}\n"
        f"{args.data}: {len(run.train)} training and {len(run.test)} test images of"
        f" {args.size}x{args.size}, set {run.fingerprint[:16]}\n"
        f"{len(run.classes)} classes: {' '.join(run.classes)}\n"
        f"{steps} steps per epoch, {method.couples} x {size} images drawn for each:"
        f" {steps * method.couples * size} per epoch"
    )


# ---------------------------------------------------------------------------- the command line

# What a resumed run may change: where it runs and what it prints, never what it computes.
MAY_MOVE = {"data", "cache_dir", "output_dir"}
MAY_CHANGE = MAY_MOVE | {"resume", "device", "print_freq", "download"}


on_off = argparse.BooleanOptionalAction


def both(name: str) -> str:
    return f"(default: {PAPER[name]}, the paper's; for shapes {SHAPES[name]})"


def add_experiment_flags(parser: Parser) -> None:
    """What is trained on what."""
    # fmt: off
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="mtlat",
        help="; ".join(f"{name}: {m.description}" for name, m in METHODS.items()))
    add("--alpha", type=number(float, 0, above=True), default=0.4,
        help="lambda ~ Beta(alpha, alpha)")
    add("--epsilon-max", "--eps-max", type=number(float, 0, 1), default=0.025,
        help="epsilon ~ U[0, epsilon_max], in pixels of [0, 1]")
    add("--attack-steps", type=number(int, 1), default=1,
        help="iterations of the attack; the paper takes one")

    add = parser.add_argument_group("data").add_argument
    add("--data", "--data-dir", default="shapes", metavar="SET",
        help="shapes (embedded), cifar10, cifar100, or a folder with train/CLASS/*.jpg and"
        " val/CLASS/*.jpg; of one with CLASS/*.jpg alone ten percent are held out as test set")
    add("--size", type=number(int, 8, data.MAX_SIDE),
        help="side of the square that images are resized to (default: 224, the paper's; for shapes"
        " 64, for CIFAR 32)")
    add("--classes", type=number(int, 2), metavar="K",
        help="keep K classes, drawn with --data-seed (default: all)")
    add("--data-seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N",
        help="of the classes kept, the test part of CLASS/*.jpg, and the shapes; apart from --seed,"
        " so that several trainings can see the same images")
    add("--download", action=on_off, default=False, help="fetch CIFAR if it is not there")
    add("--skip-bad-images", action=on_off, default=False,
        help="leave out and count the files that are no images, instead of stopping")
    add("--cache-dir", default=str(data.default_cache_dir()), metavar="DIR",
        help="where decoded folders are kept, and CIFAR")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", "--model", default="resnet50",
        help="a torchvision classifier, or your own as module:callable, which runs its code")
    add("--weights", metavar="NAME_OR_PATH",
        help="start from a checkpoint, or from torchvision's weights of that name (downloaded), the"
        " head being new if the number of classes differs (default: random weights)")
    # fmt: on


def add_training_flags(parser: Parser) -> None:
    """How it is trained, and where."""
    # fmt: off
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=number(int, 1), help=f"passes over the training set {both('epochs')}")
    add("-b", "--batch-size", type=number(int, 1),
        help="images that the losses of a step see together: two losses share them, 128 + 128 of"
        f" 256, see --whole-batches {both('batch_size')}")
    add("--whole-batches", action=on_off, default=False,
        help="give each of two losses a whole batch, 256 + 256: the other reading of the paper")
    add("--opt", choices=("adam", "adamw", "sgd"), default="adam", help="optimizer")
    add("--lr", "--learning-rate", type=number(float, 0, above=True),
        help=f"learning rate {both('lr')}")
    add("--wd", "--weight-decay", type=number(float, 0), default=1e-4, help="weight decay")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of --opt sgd")
    add("--milestones", type=number(float, 0), nargs="*", metavar="EPOCH",
        help="epochs after which the learning rate is multiplied by --gamma; the defaults move in"
        f" proportion with --epochs {both('milestones')}")
    add("--gamma", type=number(float, 0, 1), default=0.1, help="see --milestones")

    add = parser.add_argument_group("running").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="of the weights, the orders and the draws")
    add("--deterministic", action=on_off, default=False,
        help="the same bits on a GPU too, but slower (a CPU repeats itself anyway)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--amp", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    add("--compile", action=on_off, default=False, help="torch.compile the model")
    add("--channels-last", action=on_off, default=False, help="memory layout of images and weights")
    add("--resume", metavar="PATH",
        help="go on from this checkpoint; auto: from last.pt of --output-dir, if there is one")
    add("--output-dir", metavar="DIR", help="(default: runs/METHOD)")
    add("-p", "--print-freq", type=number(int, 1), default=10, metavar="STEPS",
        help="how often the losses are read and shown")
    # fmt: on


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add_experiment_flags(parser)
    add_training_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The settings with every default filled in, and the checkpoint to go on from, if any."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))  # without defaults: what the user typed
    path = Path(args.resume or "")
    if args.resume == "auto":
        path = Path(args.output_dir or f"runs/{args.method}") / "last.pt"
    if args.resume and (args.resume != "auto" or path.exists()):
        checkpoint = load_checkpoint(path)
        saved = checkpoint["settings"]
        for name in given.keys() - MAY_CHANGE:
            if given[name] != saved.get(name):
                raise UserError(
                    f"--{name.replace('_', '-')} is {given[name]}, but {path} was trained with"
                    f" {saved.get(name)}: leave it out, or start anew in another --output-dir"
                )
        kept = (vars(args).keys() - MAY_CHANGE) | (MAY_MOVE - given.keys())
        if lacking := sorted(kept - saved.keys()):
            raise UserError(f"{path} says nothing of {lacking[0]}: another version of train.py made"
                            " it, and can go on with it")  # fmt: skip
        vars(args).update({name: saved[name] for name in kept})
        args.output_dir = args.output_dir if "output_dir" in given else str(path.parent)
        args.resume = str(path)
    else:
        checkpoint = None
        recipe: dict[str, Any] = SHAPES if args.data == "shapes" else PAPER
        for name in ("epochs", "batch_size", "lr"):
            if getattr(args, name) is None:
                setattr(args, name, recipe[name])
        if args.milestones is None:
            shares = [milestone / recipe["epochs"] for milestone in recipe["milestones"]]
            args.milestones = [args.epochs * share for share in shares]
        args.size = args.size or data.SIZES.get(args.data, 224)
        args.output_dir = args.output_dir or f"runs/{args.method}"
    refuse_overwriting(args, checkpoint)
    args.device = find_device(args.device)
    return args, checkpoint


def refuse_overwriting(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    last = Path(args.output_dir) / "last.pt"
    if last.exists() and not (checkpoint and last.samefile(args.resume)):
        raise UserError(
            f"{args.output_dir} holds an earlier run: add --resume auto to go on with it, or choose"
            " another --output-dir"
        )


def main(argv: list[str] | None = None) -> None:
    train(*parse_args(argv))


if __name__ == "__main__":
    run(main, "add --resume auto to go on")
