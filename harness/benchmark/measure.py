"""Measure models under one perturbation at one severity: a cell for each model.

Images are corrupted and attacked by the batch. What does not depend on the model is computed once
for all models.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks import cw2, cw2_result, pgd_ll
from corruptions import ALL_CORRUPTIONS, Stream, corrupt
from harness import distributed
from harness.benchmark import registry
from harness.benchmark.checks import broken_gradients
from harness.benchmark.config import EvalConfig
from harness.benchmark.paired import pack
from harness.benchmark.store import Cell
from harness.benchmark.subjects import Subject
from harness.errors import UserError
from harness.files import digest
from harness.images.corrupted import open_corrupted
from harness.images.datasets import Dataset
from harness.images.loader import BatchLoader
from harness.models import compute_logits, is_right

EARLIER = {"preprocess": "squash"}  # of cells that lack the fact
Batch = tuple[Tensor, Tensor, Tensor]  # indices, images in [0, 1], class indices; on the device


@dataclass
class Evaluation:
    """Everything that the cells are measured with."""

    config: EvalConfig
    data: Dataset
    loader: BatchLoader
    chosen: Tensor  # indices of the test images that count
    models: list[Subject]
    surrogate: Subject | None
    facts: dict[str, Any]  # what decides every number
    setup: dict[str, Any]  # what else every record says
    least_likely: dict[str, Tensor] = field(default_factory=dict)  # by model, of every test image

    def decided_by(self, name: str) -> dict[str, Any]:
        """Return what a cell depends on besides the model, the perturbation and its severity."""
        black_box = self.config.registry[name].box == "black-box"
        place = self.config.find_corruption(name)
        attacks = self.config.others
        return {
            **self.facts,
            **({"attack": attacks[name]} if name in attacks else {}),
            "surrogate": self.surrogate.digest if self.surrogate and black_box else None,
            "imagenet_c": str(place.resolve()) if place else None,
        }

    @property
    def output_dir(self) -> Path:
        """The folder of the results: --output-dir, or one that these models and images name."""
        if self.config.output_dir is not None:
            return Path(self.config.output_dir)
        tree = self.config.imagenet_c and str(self.config.imagenet_c.resolve())
        digests = sorted(model.digest for model in self.models)
        decided = [self.facts, digests, self.surrogate and self.surrogate.digest, tree]
        labels = re.sub(r"[^\w.-]+", "-", "-".join(sorted(model.label for model in self.models)))
        short = labels.encode()[:100].decode(errors="ignore")  # a file's name has 255 bytes at most
        return Path("runs/evaluate", f"{short}-{digest(decided)[:8]}")

    def images_of(self, name: str) -> Tensor:
        """Return the indices of the test images that a cell takes."""
        return self.sample(registry.SAMPLE) if self.config.registry[name].sampled else self.chosen

    def sample(self, count: int) -> Tensor:
        """Return the indices of `count` of the chosen images, equally many of each class."""
        labels = self.data.test.labels[self.chosen]
        return self.chosen[choose_images(labels, count, self.config.seed)]


# ---------------------------------------------------------------------------- images


def choose_images(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Draw `limit` of the images with these class indices (N,), equally many of each if possible.

    A limit of None, or of N or more, takes all. Returns sorted indices, int64 (min(limit, N),).
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # class by class, in random order within
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    tie = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    return order[(rank + tie).argsort()[:limit]].sort().values


def clean_batches(run: Evaluation, name: str, severity: int | None) -> Iterator[Batch]:
    """Yield this rank's batches of clean images, or of the corrupted ones of --imagenet-c."""
    place, chosen = run.config.find_corruption(name), run.images_of(name)
    mine = distributed.shard_batches(torch.split(chosen, run.config.batch_size))
    if place is None or severity is None:
        for indices, (x, y) in zip(mine, run.loader.prefetch(mine), strict=True):
            yield indices.to(run.loader.device), x, y
        return
    labels, device = run.data.test.labels, run.loader.device
    read = open_corrupted(place, severity, run.data, chosen.tolist(), run.facts["size"])
    images = read(i for indices in mine for i in indices.tolist())
    for indices in mine:
        x = torch.stack(list(islice(images, len(indices)))).to(device).float().div_(255)
        yield indices.to(device), x, labels[indices].to(device)


def perturb(
    run: Evaluation, name: str, severity: int | None, model: Subject | None, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Corrupt or attack a batch: indices (B,), images (B, 3, S, S) float32 in [0, 1], classes (B,).

    Every draw is a function of (seed, name, severity, image index), so that no result depends on
    the batch, up to rounding. Only the draws of an --attack do. Only a white-box attack needs the
    tested model.

    Returns:
        Images like those of the batch, and results by name, (B,); CW2's except "right" are of the
        right images only.
    """
    indices, x, y = batch
    entry = run.config.registry[name]
    attack = entry.attack
    victim = run.surrogate if entry.box == "black-box" else model  # whose gradient the attack uses
    if attack is None or victim is None:
        if name in ALL_CORRUPTIONS and run.config.find_corruption(name) is None:
            x = corrupt(x, name, severity, seed=run.config.seed, index=indices)
        return x, {}
    settings = attack.keywords
    if attack.function is broken_gradients:
        return x, {"broken": broken_gradients(victim.module, x, y)}
    if attack.function is cw2:
        return _perturb_cw2(victim, x, y, settings)
    extra: dict[str, Any] = {}
    if attack.random:
        shape = (settings.get("restarts", 1), *x.shape[1:])
        start = Stream(run.config.seed, name, None, indices).uniform(*shape)
        extra["start"] = start.mul_(2).sub_(1).transpose(0, 1).squeeze(0)  # one run: x.shape
    if attack.function is pgd_ll and victim.digest in run.least_likely:
        extra["target"] = run.least_likely[victim.digest][indices]
    return attack.function(victim.module, x, y, **settings, **extra), {}


def _perturb_cw2(
    victim: Subject, x: Tensor, y: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attack by CW2 those images that the model gets right."""
    right = is_right(compute_logits(victim.module, x), y)
    images, found = x.clone(), {"right": right}
    if right.any():
        result = cw2_result(victim.module, x[right], y[right], **settings)
        images[right], l2 = result.x_adv, torch.where(result.reached, result.l2, torch.inf)
        found |= result._asdict() | {"l2": l2}
        del found["x_adv"]
    return images, found


# ---------------------------------------------------------------------------- measuring


def measure(
    run: Evaluation, name: str, severity: int | None, models: list[Subject], bar: Any
) -> list[Cell]:
    """Measure a cell of each of these models, and count the images in a progress bar.

    Returns the records, in the order of `models`.
    """
    white_box = run.config.registry[name].box == "white-box"
    found: list[list[dict[str, Tensor]]] = [[] for _ in models]  # of each batch, image by image
    making, spent = 0.0, [0.0] * len(models)  # seconds of the shared images, and of each model
    clock = _now(run)
    for batch in clean_batches(run, name, severity):
        y = batch[2]
        if not white_box:
            images, about = perturb(run, name, severity, None, batch)
        now = _now(run)
        making, clock = making + now - clock, now
        for i, model in enumerate(models):
            if white_box:
                images, about = perturb(run, name, severity, model, batch)
            logits = compute_logits(model.module, images)
            about = {**about, "hit": is_right(logits, y), "least_likely": logits.argmin(1),
                     "nan": logits.isnan().any(1)}  # fmt: skip
            found[i].append({key: values.cpu() for key, values in about.items()})
            now = _now(run)
            spent[i], clock = spent[i] + now - clock, now
            bar.update(len(y))
    done = sum(len(about["hit"]) for batches in found for about in batches)
    ranks = distributed.all_gather([making, *spent])
    making, *spent = map(max, zip(*ranks, strict=True))
    cells = [
        _make_cell(run, name, severity, model, distributed.merge_batches(batches), own, making)
        for model, batches, own in zip(models, found, spent, strict=True)
    ]
    bar.update(sum(cell["n"] for cell in cells) - done)  # by the other processes
    return cells


def _make_cell(
    run: Evaluation, name: str, severity: int | None, model: Subject,
    batches: list[dict[str, Tensor]], seconds: float, seconds_making: float,
) -> Cell:  # fmt: skip
    """Build the record of a cell, and keep each image's least likely class for PGD LL."""
    keys = dict.fromkeys(key for about in batches for key in about)
    values = {key: torch.cat([b[key] for b in batches if key in b]) for key in keys}
    right, least_likely = values.pop("hit"), values.pop("least_likely")
    if not values["nan"].any():
        del values["nan"]
    summary: dict[str, Any] = {key: _summarize(found) for key, found in values.items()}
    if len(margins := values.get("margin", torch.empty(0))):  # those that CW2 reaches
        deciles = margins.double().quantile(torch.linspace(0, 1, 11, dtype=torch.float64))
        summary["margin_deciles"] = [round(value, 3) for value in deciles.tolist()]
    if name == "clean":
        of_all = torch.zeros(len(run.loader), dtype=torch.int64)
        of_all[run.chosen] = least_likely
        run.least_likely[model.digest] = of_all.to(run.loader.device)
    return {
        "model": model.digest, "label": model.label, "perturbation": name,
        "severity": severity, "n": len(right), "correct": int(right.sum()), "hits": pack(right),
        **summary, "seconds": round(seconds, 3), "seconds_making": round(seconds_making, 3),
        **run.decided_by(name), **run.setup,
    }  # fmt: skip


def _now(run: Evaluation) -> float:
    """Return the time when the device has finished its work."""
    if run.loader.device.type != "cpu":
        torch.accelerator.synchronize(run.loader.device)
    return time.perf_counter()


def _summarize(values: Tensor) -> int | float | None:
    """Count booleans; of numbers take the median, NaN left out, or None if it is not finite."""
    if values.dtype == torch.bool:
        return int(values.sum())
    median = values.nanmedian().item()
    return round(median, 6) if math.isfinite(median) else None


def refuse_other_runs(run: Evaluation, path: Path, cells: list[Cell]) -> None:
    """Raise `UserError` if a finished cell is of another run than this one."""
    digests = {model.digest for model in run.models}
    for cell in cells:
        name = cell["perturbation"]
        if name not in run.config.registry:
            continue  # of an --attack or --epsilon that this run does not have
        wanted = {"attack": None} | run.decided_by(name) | {"n": len(run.images_of(name))}
        if cell.get("data") == run.data.fingerprint:  # which earlier versions stored
            wanted["data"] = run.data.fingerprint
        if wanted["frost"] is None:  # read from --imagenet-c: earlier versions stored the textures
            wanted["frost"] = cell.get("frost")
        found = {k: cell.get(k, EARLIER.get(k)) for k in wanted}
        other = [f"{k}: {found[k]}, now {v}" for k, v in wanted.items() if found[k] != v]
        if cell["model"] not in digests:
            other.append(f"model: {cell['label']} of digest {cell['model']}, now not among them")
        if other:
            reason = re.sub(r"([0-9a-f]{16})[0-9a-f]{48}", r"\1", other[0])  # of digests, a part
            raise UserError(
                f"{path} holds results of another run ({reason}): choose another --output-dir, or"
                " delete that file"
            )
