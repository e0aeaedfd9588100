#!/usr/bin/env python3
"""Train an image classifier with M-TLAT, or with a method that the paper compares it with.

python train.py                                        # the embedded dataset, in a minute
python train.py --data IMAGENET --classes 100 --amp bf16 --channels-last
python train.py --resume runs/resnet50-mtlat/last.pt   # continue where it was stopped
python train.py --resume runs/resnet50-mtlat/last.pt --epochs 120   # or extend a finished run
torchrun --nproc-per-node=4 train.py ...               # on four GPUs, or in four processes
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from harness import distributed
from harness.checkpoints import check_savable, save_checkpoint
from harness.cli import format_command
from harness.cnn import start_as_identity
from harness.devices import autocast, require_same_on_all_ranks
from harness.errors import UserError, first_line, is_explained, run_script
from harness.files import atomic_write, lock_folder
from harness.images.datasets import SIZES, Dataset, load_dataset
from harness.images.folders import require_outside
from harness.images.loader import BatchLoader, to_device
from harness.images.preprocess import CROPS
from harness.models import (
    MeanStd,
    compute_logits,
    count_correct,
    create_model,
    restore_model,
    split_arch,
)
from harness.training.augment import flip_crop
from harness.training.average import build_average
from harness.training.checks import check_batch_size, check_model, restore_optimizer
from harness.training.config import TrainConfig, parse_train_config, schedule_change
from harness.training.log import describe_weights, header, log_csv, log_line, trained_with
from harness.training.manifold import draw_layer, losses_at
from harness.training.methods import METHODS
from mtlat import Draws, Pair, draw

LOWER_RATE = "start again with a lower --lr in another --output-dir; the epochs before are kept"


@dataclass
class Training:
    """Everything that a training carries from one epoch to the next."""

    data: Dataset
    train_loader: BatchLoader
    test_loader: BatchLoader
    model: nn.Module
    normalize: MeanStd | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: list[dict[str, Any]]
    average: AveragedModel | None = None  # of the weights

    @property
    def tested(self) -> nn.Module:
        """The model that is tested and saved: with --ema, the average."""
        return self.average.module if self.average else self.model


# ---------------------------------------------------------------- building and restoring


def load_data(config: TrainConfig) -> Dataset:
    """Load the dataset that the configuration names, in one process of each machine first."""
    with distributed.local_rank_zero_first():
        return load_dataset(
            config.data, size=config.size, num_classes=config.classes, seed=config.data_seed,
            download=config.download, skip_bad_images=config.skip_bad_images,
            cache_dir=config.cache_dir, crop=CROPS[config.preprocess],
        )  # fmt: skip


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the configuration names."""
    # After an overflow a fused step of SGD leaves its new momentum uninitialized.
    overflows = config.opt == "sgd" and config.amp == "fp16"
    real = all(p.is_floating_point() for p in model.parameters() if p.requires_grad)
    fused = real and not config.device.startswith("mps") and not overflows
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.wd, "fused": fused}
    if config.opt == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)
    kind = torch.optim.AdamW if config.opt == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **common)


def new_model(config: TrainConfig, classes: list[str]) -> tuple[nn.Module, MeanStd | None]:
    """Create the model of a new run, and return the normalization in front of it, too."""
    given = (config.mean, config.std) if config.mean and config.std else None
    model, normalize = create_model(config.arch, classes, config.weights, normalize=given)
    check_savable(f"--arch {config.arch}", model)
    made_here = split_arch(config.arch)[0] == "torchvision"  # your own may have weights
    if config.data == "shapes" and made_here and config.weights is None:
        start_as_identity(model)
    return model, normalize


def build(config: TrainConfig, data: Dataset, checkpoint: dict[str, Any] | None) -> Training:
    """Build the model and the optimizer, or restore them from the checkpoint."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    check_batch_size(config, len(data.train.labels))
    torch.manual_seed(config.seed)
    log: list[dict[str, Any]] = checkpoint["log"] if checkpoint else []
    if checkpoint is None:
        model, normalize = new_model(config, data.classes)
    else:
        if checkpoint["fingerprint"] != data.fingerprint:
            raise UserError(
                f"--data {config.data} differs from the dataset that {config.resume} was trained on"
                " (other files or changed pixels): restore it, or choose another --output-dir to"
                " start again"
            )
        model, normalize = restore_model(checkpoint), checkpoint["normalize"]
    require_same_on_all_ranks(data.fingerprint, log)
    distributed.broadcast(list(model.state_dict().values()))
    device = torch.device(config.device)
    model.to(device)
    if config.channels_last:
        try:
            model.to(memory_format=torch.channels_last)
        except RuntimeError as error:  # of 3-D convolutions
            if is_explained(error):
                raise
            raise UserError(f"--channels-last: {first_line(error)}; leave the flag out") from None
    if config.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    loaders = BatchLoader(data.train, device), BatchLoader(data.test, device)
    average = build_average(config, model, checkpoint)
    if checkpoint is None:  # a resumed run keeps its buffers, which a forward pass may change
        rows = torch.arange(config.minibatch_size)[distributed.shard_rows(config.minibatch_size)]
        check_model(config, model, loaders[0](rows)[0], len(data.classes))
    optimizer = build_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    if checkpoint is not None:
        restore_optimizer(str(config.resume), optimizer, checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    if config.compile:
        model.compile()
    return Training(data, *loaders, model, normalize, optimizer, scaler, log, average)


# ---------------------------------------------------------------- the training loop


def train(config: TrainConfig, training: Training, facts: dict[str, str]) -> None:
    """Train the epochs that are left, and save a checkpoint after each.

    The checkpoints store `facts`: those of `trained_with`, and "seen_before" of `describe_weights`.
    """
    data, log, out = training.data, training.log, Path(config.output_dir)
    settings = asdict(config) | facts | {
        "processes": distributed.world_size(), "command": format_command(sys.argv),
        "held_out": data.held_out, "test_fingerprint": data.test_fingerprint,
        "test_files": data.test_files,
    }  # fmt: skip
    if distributed.rank() == 0:
        if log and not (out / "last.pt").exists():  # resumed from best.pt, or in a new folder
            save(config, training, settings)  # first: with args.json alone, --resume starts again
        atomic_write(out / "args.json", json.dumps(settings, indent=2) + "\n")
        if log:
            atomic_write(out / "log.csv", log_csv(log))  # in case it was lost
    print(header(config, data), flush=True)
    started, first = time.perf_counter(), len(log)
    for epoch in range(first, config.epochs):
        epoch_started = time.perf_counter()
        losses = train_one_epoch(config, training, epoch)
        seconds = time.perf_counter() - epoch_started
        batch = max(1, config.batch_size // distributed.world_size())  # as much memory as a step
        correct = count_correct(training.tested, training.test_loader.in_order(batch))
        for x, _ in islice(training.test_loader.in_order(batch), 1):  # the last update may diverge
            if not compute_logits(training.tested, x).isfinite().all():
                raise UserError(f"logits are not finite after epoch {epoch + 1}: {LOWER_RATE}")
        steps = len(data.train.labels) // config.minibatch_size
        images = len(losses) * steps * config.minibatch_size
        per_epoch = (time.perf_counter() - started) / (epoch + 1 - first)
        log.append({
            "epoch": epoch + 1,
            "lr": training.optimizer.param_groups[0]["lr"],
            "loss1": losses[0],
            "loss2": None,  # or that of the next line
            **{f"loss{i}": mean for i, mean in enumerate(losses[1:], 2)},
            "clean_accuracy": sum(distributed.all_gather(correct)) / len(data.test.labels),
            "images_per_second": round(images / seconds, 1),
            "seconds_left": round(per_epoch * (config.epochs - epoch - 1)),
        })  # fmt: skip
        if distributed.rank() == 0:
            save(config, training, settings)
        print(log_line(log[-1], config.epochs), flush=True)  # later, because the pipe may be closed
    last = out / "last.pt"
    print(
        f"clean accuracy {100 * log[-1]['clean_accuracy']:.1f} % on {len(data.test.labels)} images"
        f"\ncheckpoint: {last}\nnext: {format_command(['python', 'evaluate.py', str(last)])}"
    )


def train_one_epoch(config: TrainConfig, training: Training, epoch: int) -> list[float]:
    """Train for one epoch. Returns the mean of each loss.

    Random numbers follow from seed and epoch, dropout's also from the rank: no generator is saved.
    """
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    method, device = METHODS[config.method], training.train_loader.device
    digest = hashlib.sha256(f"{config.seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    torch.manual_seed(int.from_bytes(digest[7:14]) + distributed.rank())  # for dropout
    steps = len(training.train_loader) // config.minibatch_size
    totals = torch.zeros(method.terms, device=device)
    model.train()
    title = f"epoch {epoch + 1}/{config.epochs}"
    bar = tqdm(draw_steps(config, training, generator), title, steps, leave=False, disable=None)
    for step, (layer, pairs, draws) in enumerate(bar, 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(epoch + (step - 1) / steps)
        optimizer.zero_grad()
        share = len(draws.target) / config.minibatch_size  # of the images, in this process
        # With --method mtlat, mtlat.algorithm1's losses; with --mix-at, see training/manifold.py.
        losses = losses_at(layer, method, model, pairs, draws, config.attack_steps)
        for term in range(method.terms):
            with autocast(device, config.amp):
                loss = share * next(losses)
            scaler.scale(loss).backward()  # the gradients of loss1 and loss2 add up
            totals[term] += loss.detach()
        update_weights(config, training)
        if step % config.print_freq == 0 or step == steps:
            means = mean_losses(totals / step)
            if not math.isfinite(sum(means)):
                place = f"epoch {epoch + 1} before step {step + 1}"
                raise UserError(f"the loss became {sum(means)} in {place}: {LOWER_RATE}")
            bar.set_postfix_str(" ".join(f"loss{i} {m:.3f}" for i, m in enumerate(means, 1)))
    for averaged in filter(None, (model, training.average)):
        distributed.average_running_statistics(averaged)
    return means


def update_weights(config: TrainConfig, training: Training) -> None:
    """Take the optimizer's step with the gradients of all processes, and update --ema's average."""
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    distributed.sum_gradients(model.parameters())
    if config.clip_grad is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    if training.average:
        training.average.update_parameters(model)


def draw_steps(
    config: TrainConfig, training: Training, generator: torch.Generator
) -> Iterator[tuple[str, list[Pair], Draws]]:
    """Yield the layer that mixes, the minibatches and the random numbers of each step of an epoch.

    Each minibatch of a step follows a random order of its own. Every process draws the whole step
    and takes its rows, so that an image's draws do not depend on the number of processes.
    """
    loader, classes, size = training.train_loader, len(training.data.classes), config.minibatch_size
    minibatches, rows = METHODS[config.method].minibatches, distributed.shard_rows(size)
    orders = [torch.randperm(len(loader), generator=generator) for _ in range(minibatches)]
    starts = range(0, len(loader) - size + 1, size)
    batches = loader.prefetch(order[i : i + size][rows] for i in starts for order in orders)
    for _ in starts:
        pairs = []
        for x, y in islice(batches, minibatches):
            if config.augment == "flip-crop":
                u = torch.rand(3, size, generator=generator)[:, rows]
                x = flip_crop(x, to_device(u, loader.device))
            if config.channels_last:
                x = x.to(memory_format=torch.channels_last)
            pairs.append((x, F.one_hot(y, classes).to(x.dtype)))
        draws = draw(size, classes, alpha=config.alpha, epsilon_max=config.epsilon_max,
                     generator=generator)  # fmt: skip
        layer = draw_layer(config.mix_at, generator)
        yield layer, pairs, Draws(*(to_device(drawn[rows], loader.device) for drawn in draws))


def mean_losses(shares: Tensor) -> list[float]:
    """Sum each loss over the processes."""
    return [sum(terms) for terms in zip(*distributed.all_gather(shares.tolist()), strict=True)]


def save(config: TrainConfig, training: Training, settings: dict[str, Any]) -> None:
    """Write log.csv, best.pt if this epoch's clean accuracy is the highest so far, and last.pt.

    After a crash between the last two, a resumed run repeats the epoch. If it was the first one,
    the run continues from best.pt.
    """
    out, log = Path(config.output_dir), training.log
    atomic_write(out / "log.csv", log_csv(log))
    scores = [row["clean_accuracy"] for row in log]
    best = scores[-1] > max(scores[:-1], default=-1)
    trained = {"trained": training.model.state_dict()} if training.average else {}
    save_checkpoint(
        [out / "best.pt"] * best + [out / "last.pt"],
        arch=config.arch, normalize=training.normalize, classes=training.data.classes,
        size=config.size, fingerprint=training.data.fingerprint,
        model=training.tested.state_dict(), log=log, settings=settings, **trained,
        optimizer=training.optimizer.state_dict(), scaler=training.scaler.state_dict(),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    asked, _ = parse_train_config(argv, __doc__)
    if asked.data not in SIZES:  # before an output folder is made
        require_outside(Path(asked.data), asked.cache_dir, asked.output_dir)
    with lock_folder(Path(asked.output_dir)) if distributed.rank() == 0 else nullcontext():
        config, checkpoint = parse_train_config(argv)  # again: another run may have ended meanwhile
        unfinished = checkpoint if checkpoint and len(checkpoint["log"]) < config.epochs else None
        if unfinished and (changed := schedule_change(config, unfinished)):
            print(changed)
        data = load_data(config)
        if seen := describe_weights(config, data, checkpoint):
            print(f"warning: {seen}", file=sys.stderr)
        facts = {**trained_with(config, checkpoint), "seen_before": seen}
        train(config, build(config, data, checkpoint), facts)


if __name__ == "__main__":
    if any(word.startswith("--resume") for word in sys.argv):
        run_script(main)
    run_script(main, "add --resume auto to continue")
