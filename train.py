#!/usr/bin/env python3
"""Train an image classifier with M-TLAT, or with one of the trainings that the paper compares.

python train.py --arch resnet50                        # the embedded set, on any machine
python train.py --data IMAGENET --classes 100 --amp bf16 --channels-last
python train.py --resume runs/mtlat/last.pt            # go on where it was stopped
torchrun --nproc-per-node=4 train.py ...               # on four GPUs, or processes
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
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import parallel
from common import (
    UserError,
    check_logits,
    count_correct,
    load_model,
    locked,
    refuse_differences,
    run,
    save_checkpoint,
    start_model,
    versions,
    write,
)
from feed import Feed, send
from methods import METHODS
from mtlat import Draws, Pair, draw
from settings import parse_args, refuse_overwriting


@dataclass
class Run:
    """Everything that a training needs from one epoch to the next."""

    args: argparse.Namespace
    classes: list[str]
    fingerprint: str
    train: Feed
    test: Feed
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
    with parallel.one_first():
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
    if size < 2 * parallel.world() > 2:
        raise UserError(f"--batch-size {args.batch_size} makes minibatches of {size}, and each of"
                        f" {parallel.world()} processes needs 2 of them: raise it")  # fmt: skip
    torch.manual_seed(args.seed)
    log = []
    if checkpoint is None:
        model, normalize = start_model(args.arch, len(sets.classes), args.weights)
    else:
        if checkpoint["fingerprint"] != sets.fingerprint:
            raise UserError(
                f"--data {args.data} is not the set that {args.resume} was trained on, or has other"
                " pixels now: restore it, or start anew in another --output-dir"
            )
        model, normalize, log = load_model(checkpoint), checkpoint["normalize"], checkpoint["log"]
    refuse_differences(sets.fingerprint, log)
    parallel.copy_from_first(list(model.state_dict().values()))
    device = torch.device(args.device)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    feeds = Feed(sets.train, device), Feed(sets.test, device)
    if checkpoint is None:  # not again, as a look changes what some layers remember
        some = torch.arange(size)[parallel.share(size)]
        check_logits(f"--arch {args.arch}", model, feeds[0](some)[0], len(sets.classes))
    optimizer = make_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    if args.compile:
        model.compile()
    return Run(
        args, sets.classes, sets.fingerprint, *feeds, model, normalize, optimizer, scaler, log
    )


def minibatches(run: Run, generator: torch.Generator) -> Iterator[tuple[list[Pair], Draws]]:
    """One epoch of steps: for each, the method's minibatches, every one in an order of its own.

    Every process draws the whole step and takes its rows, so that what is drawn for an image does
    not depend on how many there are.
    """
    args, device, classes = run.args, run.train.device, len(run.classes)
    size, couples = minibatch_size(args), METHODS[args.method].couples
    rows = parallel.share(size)
    orders = [torch.randperm(len(run.train), generator=generator) for _ in range(couples)]
    starts = range(0, len(run.train) - size + 1, size)
    batches = run.train.ahead(order[i : i + size][rows] for i in starts for order in orders)
    for _ in starts:
        pairs = []
        for x, y in islice(batches, couples):
            if args.channels_last:
                x = x.to(memory_format=torch.channels_last)
            pairs.append((x, F.one_hot(y, classes).to(x.dtype)))
        draws = draw(size, classes, alpha=args.alpha, epsilon_max=args.epsilon_max,
                     generator=generator)  # fmt: skip
        yield pairs, Draws(*(send(drawn[rows], device) for drawn in draws))


def take_step(run: Run, pairs: list[Pair], draws: Draws, totals: Tensor) -> None:
    """Move the weights by one step, and add its losses to the totals; on CUDA, without waiting."""
    args, method = run.args, METHODS[run.args.method]
    share = len(draws.target) / minibatch_size(args)  # of the step's images, in this process
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    run.optimizer.zero_grad()
    losses = method.losses(run.model, pairs, draws, args.attack_steps)
    for term in range(method.terms):
        with torch.autocast(run.train.device.type, dtype, enabled=dtype is not None):
            loss = share * next(losses)
        run.scaler.scale(loss).backward()
        totals[term] += loss.detach()
    parallel.add_up([p.grad for p in run.model.parameters() if p.grad is not None])
    run.scaler.step(run.optimizer)
    run.scaler.update()


def train_epoch(run: Run, epoch: int) -> list[float]:
    """One pass over the training set; give the mean of each loss.

    Every random number is a function of the seed and the epoch, so nothing random need be saved.
    """
    args = run.args
    digest = hashlib.sha256(f"{args.seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    torch.manual_seed(int.from_bytes(digest[7:14]) + parallel.rank())  # for dropout
    steps = len(run.train) // minibatch_size(args)
    totals = torch.zeros(METHODS[args.method].terms, device=run.train.device)
    run.model.train()
    title = f"epoch {epoch + 1}/{args.epochs}"
    bar = tqdm(minibatches(run, generator), title, steps, leave=False, disable=None)
    for step, (pairs, draws) in enumerate(bar, 1):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch + (step - 1) / steps)
        take_step(run, pairs, draws, totals)
        if step % args.print_freq == 0 or step == steps:
            shares = parallel.gather((totals / step).tolist())
            means = [sum(terms) for terms in zip(*shares, strict=True)]
            if not math.isfinite(sum(means)):
                raise UserError(
                    f"the loss became {sum(means)} in epoch {epoch + 1} before step {step + 1}:"
                    f" lower --lr ({args.lr}); {args.output_dir} keeps the epochs before"
                )
            bar.set_postfix_str(" ".join(f"loss{i} {m:.3f}" for i, m in enumerate(means, 1)))
    # Each process has its own running statistics of BatchNorm, of its share of every minibatch.
    statistics = [b for name, b in run.model.named_buffers() if "running_" in name]
    parallel.add_up(statistics)
    for statistic in statistics:
        statistic.div_(parallel.world())
    return means


def train(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    """Train from the checkpoint, or from the start, to the last epoch."""
    run = prepare(args, checkpoint, load_images(args))
    with locked(Path(args.output_dir)) if parallel.rank() == 0 else nullcontext():
        refuse_overwriting(args, checkpoint)  # another run may have ended meanwhile
        train_epochs(run)


def train_epochs(run: Run) -> None:
    """Do what is left to do, and keep a checkpoint after every epoch."""
    args, out, log = run.args, Path(run.args.output_dir), run.log
    settings = {**vars(args), **versions(args.device), "processes": parallel.world(),
                "command": " ".join(sys.argv)}  # fmt: skip
    if parallel.rank() == 0:
        write(out / "args.json", json.dumps(settings, indent=2) + "\n")
        if log:
            write(out / "log.csv", log_csv(log))  # whatever became of it
    print(describe(run), flush=True)
    started, first = time.monotonic(), len(log)
    for epoch in range(first, args.epochs):
        clock = time.monotonic()
        losses = train_epoch(run, epoch)
        seconds = time.monotonic() - clock
        size, terms = minibatch_size(args), METHODS[args.method].terms
        correct = parallel.gather(count_correct(run.model, run.test.in_order(args.batch_size)))
        score = sum(correct) / len(run.test)
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
        if parallel.rank() == 0:
            save(run, out, settings)
    print(
        f"clean accuracy {100 * log[-1]['clean_accuracy']:.1f} % on {len(run.test)} images\n"
        f"checkpoint: {out / 'last.pt'}\nnext: python evaluate.py {out / 'last.pt'}"
    )


def save(run: Run, out: Path, settings: dict[str, Any]) -> None:
    """Write what a run keeps; last.pt comes last: what a crash leaves undone, is done again."""
    write(out / "log.csv", log_csv(run.log))
    scores = [row["clean_accuracy"] for row in run.log]
    best = scores[-1] > max(scores[:-1], default=-1)
    save_checkpoint(
        [out / "best.pt"] * best + [out / "last.pt"],
        arch=run.args.arch, normalize=run.normalize, classes=run.classes, size=run.args.size,
        fingerprint=run.fingerprint, model=run.model.state_dict(), log=run.log, settings=settings,
        optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
    )  # fmt: skip


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


def main(argv: list[str] | None = None) -> None:
    train(*parse_args(argv, __doc__))


if __name__ == "__main__":
    run(main, "add --resume auto to go on")
