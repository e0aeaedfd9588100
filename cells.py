"""The cells of the benchmark: which there are, how one is measured, and the file they are kept in.

A cell is one model under one perturbation at one severity; a `Line` is what came of it. Images are
corrupted and attacked by the batch, and what does not depend on the model is made once for all.
"""

import argparse
import copy
import io
import json
import math
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import data
import parallel
from attacks import ATTACKS, Attack, broken_gradients, cw2, cw2_result, pgd_ll
from common import UserError, checksum, write
from corruptions import CORRUPTIONS, Stream, corrupt
from feed import Feed
from report import CHECK, SUPPLEMENT, Line, severities
from sanity import CHECKS

SAMPLE = 200  # images that the sanity checks and the supplement take

_CW2 = ATTACKS["cw2"]
# All that takes a model's gradient. For an accuracy, CW2 need not search the nearest image (one
# round tells whom it reaches), nor attack what the model gets wrong anyway.
GRADIENT: dict[str, Attack] = {
    **ATTACKS,
    "cw2": _CW2._replace(keywords=_CW2.keywords | {"rounds": 1}),
    CHECK + "clean": Attack(broken_gradients, {}, "clean images with their gradients"),
    **{CHECK + name: attack for name, attack in CHECKS.items()},
    SUPPLEMENT: _CW2._replace(keywords=_CW2.keywords | {"confidence": 0.0}),
}
# What --only and --skip can name, in the order of the work: groups, and the perturbations in them.
GROUPS: dict[str, list[str]] = defaultdict(list)
for _name in (*CORRUPTIONS, *ATTACKS):
    GROUPS[CORRUPTIONS[_name].family if _name in CORRUPTIONS else ATTACKS[_name].box].append(_name)
GROUPS["checks"] = [name for name in GRADIENT if name.startswith(CHECK)]
GROUPS["supplement"] = [SUPPLEMENT]

Batch = tuple[Tensor, Tensor, Tensor]  # image numbers, images in [0, 1], classes; on the device


class Subject(NamedTuple):
    """A model, its name in the report, and a hash of all that it computes with."""

    label: str
    module: nn.Module
    digest: str


def simplify(model: Subject, x: Tensor) -> Subject:
    """Fold layers of a model into others: the same logits of images like x, in less time.

    What torch.fx cannot follow, or what moves the logits of x by more than rounding, stays as it
    is. The model must be in eval mode.
    """
    module = model.module
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        logits = module(x)
        for fold in (fuse, partial(_fold_pooling, x=x)):  # fuse: BatchNorm into convolutions
            with suppress(Exception):  # a forward pass may be any Python
                folded: nn.Module = fold(module)
                if torch.allclose(folded(x), logits, 1e-4, 1e-4):
                    module = folded.requires_grad_(False)
    return model._replace(module=module)


def _fold_pooling(module: nn.Module, x: Tensor) -> nn.Module:
    """Have a Linear take each pixel once that an adaptive pooling before it repeats.

    VGG's first one takes 7 x 7 pixels, whatever the images' size: at 64 px they are made of 2 x 2.
    """
    called: list[tuple[str, torch.Size]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: called.append((name, inputs[0].shape))

    kinds = nn.AdaptiveAvgPool2d, nn.Linear
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        module(x)
    finally:
        for hook in hooks:
            hook.remove()
    for (name, shape), (following, _) in pairwise(called):
        pool, linear = layers[name], layers[following]
        if isinstance(pool, nn.AdaptiveAvgPool2d) and isinstance(linear, nn.Linear):
            single = torch.eye(shape[2] * shape[3]).to(linear.weight).view(-1, 1, *shape[2:])
            share = pool(single).flatten(1)  # of each pixel, in each that the pooling makes
            if share.shape[0] < share.shape[1]:
                module = copy.deepcopy(module)
                module.set_submodule(name, nn.Identity())
                weight = linear.weight.unflatten(1, (-1, share.shape[1])) @ share.T
                module.get_submodule(following).weight = nn.Parameter(weight.flatten(1))
    return module


@dataclass
class Run:
    """Everything that the cells are measured with."""

    args: argparse.Namespace
    classes: list[str]
    feed: Feed
    chosen: Tensor  # numbers of the test images that count
    models: list[Subject]
    surrogate: Subject | None
    facts: dict[str, Any]  # what decides every number
    setup: dict[str, Any]  # what else every line says
    least_likely: dict[str, Tensor] = field(default_factory=dict)  # by model, of every test image

    def decided_by(self, name: str) -> dict[str, Any]:
        """What a cell's numbers depend on, besides the model, the perturbation and its severity."""
        black_box = name in GROUPS["black-box"] and self.surrogate
        folder = self.official(name)
        return {
            **self.facts,
            "surrogate": black_box.digest if black_box else None,
            "imagenet_c": str(folder.resolve()) if folder else None,
        }

    def official(self, name: str) -> Path | None:
        """DIR/name or DIR/family/name of --imagenet-c DIR, as the published archives unpack."""
        root = self.args.imagenet_c
        if root is None or len(severities(name)) == 1:
            return None
        places = (root / name, root / CORRUPTIONS[name].family / name)
        return next((place for place in places if place.is_dir()), None)

    def images_of(self, name: str) -> Tensor:
        """The numbers of the test images that a cell takes."""
        if name not in (*GROUPS["checks"], SUPPLEMENT):
            return self.chosen
        return self.pick(SAMPLE)

    def pick(self, count: int) -> Tensor:
        """The numbers of some of the chosen images, as many of each class."""
        labels = self.feed.labels.cpu()[self.chosen]
        return self.chosen[choose_images(labels, count, self.args.seed)]


# ---------------------------------------------------------------------------- images


def choose_images(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Places of `limit` images, as many of each class as can be, drawn with the seed; sorted.

    All of them for None, or where there are no more.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # class by class, at random within
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    tie = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    return order[(rank + tie).argsort()[:limit]].sort().values


def batches(run: Run, name: str, severity: int | None) -> Iterator[Batch]:
    """The clean images that a cell takes, or the corrupted ones of --imagenet-c.

    Of several processes, each takes some of the batches, which are those of one process.
    """
    folder = run.official(name)
    if folder is not None:
        yield from _official_batches(run, folder / str(severity))
    else:
        mine = parallel.mine(torch.split(run.images_of(name), run.args.batch_size))
        for numbers, (x, y) in zip(mine, run.feed.ahead(mine), strict=True):
            yield numbers.to(run.feed.device), x, y


def _official_batches(run: Run, folder: Path) -> Iterator[Batch]:
    """The files of FOLDER/class/, streamed, for the whole of ImageNet-C fits in no memory."""
    found = data.list_classes(folder) if folder.is_dir() else {}
    if lacking := [name for name in run.classes if not found.get(name)]:
        raise UserError(
            f"--imagenet-c: {folder} has no images of class {lacking[0]!r}; the layout is"
            " DIR/corruption/severity/class/file, with the classes of --data"
        )
    files = [
        data.File(os.path.relpath(path, folder), label)
        for label, name in enumerate(run.classes)
        for path in found[name]
    ]
    labels, device = torch.tensor([file.label for file in files]), run.feed.device
    chosen = choose_images(labels, run.args.limit, run.args.seed)
    mine = parallel.mine(torch.split(chosen, run.args.batch_size))
    wanted = [files[i] for numbers in mine for i in numbers.tolist()]
    decoded = data.decode_all(folder, wanted, run.facts["size"])
    for numbers in mine:
        pixels = []
        for file, image in islice(decoded, len(numbers)):
            if isinstance(image, str):
                raise UserError(f"{folder / file.path}: {image}; fetch the file again")
            pixels.append(image)
        x = torch.from_numpy(np.stack(pixels)).to(device).float().div_(255)
        yield numbers.to(device), x, labels[numbers].to(device)


def perturb(
    run: Run, name: str, severity: int | None, victim: Subject | None, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Perturb a batch, and give what there is to report of each image besides.

    victim: whose gradient an attack takes. Every draw is a function of (seed, name, severity, image
    number): no result depends on the batch, but for rounding.
    """
    numbers, x, y = batch
    if victim is None:
        if name in CORRUPTIONS and run.official(name) is None:
            x = corrupt(x, name, severity, seed=run.args.seed, index=numbers)
        return x, {}
    function, settings, model = GRADIENT[name].function, GRADIENT[name].keywords, victim.module
    if function is broken_gradients:
        return x, {"broken": broken_gradients(model, x, y)}
    if function is cw2:
        with torch.no_grad():
            right = model(x).argmax(1) == y
        image, found = x.clone(), {"right": right}
        if right.any():
            result = cw2_result(model, x[right], y[right], **settings)
            image[right], l2 = result.x_adv, torch.where(result.reached, result.l2, torch.nan)
            found |= result._asdict() | {"l2": l2}
            del found["x_adv"]
        return image, found
    extra: dict[str, Any] = {}
    if GRADIENT[name].random:
        shape = (settings.get("restarts", 1), *x.shape[1:])
        start = Stream(run.args.seed, name, None, numbers).uniform(*shape)
        extra["start"] = start.mul_(2).sub_(1).transpose(0, 1).squeeze(0)  # one run: x.shape
    if function is pgd_ll and victim.digest in run.least_likely:
        extra["target"] = run.least_likely[victim.digest][numbers]
    return function(model, x, y, **settings, **extra), {}


# ---------------------------------------------------------------------------- measuring


def measure(
    run: Run, name: str, severity: int | None, models: list[Subject], bar: Any
) -> list[Line]:
    """Measure a cell of each of these models; `bar` is told of every image done."""
    white_box = name in GRADIENT and GRADIENT[name].box == "white-box"
    maker = run.surrogate if name in GRADIENT else None
    found: list[list[dict[str, Tensor]]] = [[] for _ in models]  # of each batch, image by image
    seconds = [0.0] * (len(models) + 1)  # for each model, and for the making
    clock = _now(run)
    for batch in batches(run, name, severity):
        y = batch[2]
        about: dict[str, Tensor] = {}
        if not white_box:
            images, _ = perturb(run, name, severity, maker, batch)
        seconds[-1], clock = seconds[-1] + _now(run) - clock, _now(run)
        for i, model in enumerate(models):
            if white_box:
                images, about = perturb(run, name, severity, model, batch)
            with torch.no_grad():
                logits = model.module(images)
            about = {**about, "hit": logits.argmax(1) == y, "least_likely": logits.argmin(1)}
            found[i].append({key: values.cpu() for key, values in about.items()})
            seconds[i], clock = seconds[i] + _now(run) - clock, _now(run)
            bar.update(len(y))
    done = sum(len(about["hit"]) for batches in found for about in batches)
    seconds = [max(times) for times in zip(*parallel.gather(seconds), strict=True)]
    lines = [
        _line(run, name, severity, model, parallel.collect(about), (seconds[i], seconds[-1]))
        for i, (model, about) in enumerate(zip(models, found, strict=True))
    ]
    bar.update(sum(line["n"] for line in lines) - done)  # by the other processes
    return lines


def _line(
    run: Run, name: str, severity: int | None, model: Subject,
    batches: list[dict[str, Tensor]], seconds: tuple[float, float],
) -> Line:  # fmt: skip
    """Sum up what was found of each image of a cell, and keep what is asked of single images."""
    keys = dict.fromkeys(key for about in batches for key in about)
    values = {key: torch.cat([b[key] for b in batches if key in b]) for key in keys}
    right, least_likely = values.pop("hit"), values.pop("least_likely")
    if name == "clean":
        of_all = torch.zeros(len(run.feed), dtype=torch.int64)
        of_all[run.chosen] = least_likely
        run.least_likely[model.digest] = of_all.to(run.feed.device)
    if run.args.save_predictions and parallel.rank() == 0:
        _save(prediction_path(run, model, name, severity), right)
    return {
        "model": model.digest, "label": model.label, "perturbation": name,
        "severity": severity, "n": len(right), "correct": int(right.sum()),
        **{key: _summary(found) for key, found in values.items()},
        "seconds": round(seconds[0], 3), "seconds_making": round(seconds[1], 3),
        **run.decided_by(name), **run.setup,
    }  # fmt: skip


def _now(run: Run) -> float:
    if run.feed.device.type != "cpu":
        torch.accelerator.synchronize(run.feed.device)
    return time.perf_counter()


def _summary(values: Tensor) -> int | float | None:
    """How many, or the median of those that have a value."""
    if values.dtype == torch.bool:
        return int(values.sum())
    median = values.nanmedian().item()
    return None if math.isnan(median) else round(median, 6)


# ---------------------------------------------------------------------------- files


def prediction_path(run: Run, model: Subject, name: str, severity: int | None) -> Path:
    """Where --save-predictions keeps which images of a cell were right, bool (n,)."""
    file = name if severity is None else f"{name}_{severity}"
    return Path(run.args.output_dir, "predictions", model.digest, f"{file}.npy")


def _save(path: Path, right: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, right.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, buffer.getbuffer())


def read_cells(path: Path) -> list[Line]:
    """Read the finished cells; a last line that a crash left unfinished is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    lines = []
    for i, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            if line.pop("crc") != checksum(line):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path}: line {i} is damaged; delete it and start again") from None
        lines.append(line)
    return lines


def append_cells(path: Path, lines: list[Line]) -> None:
    """Add finished cells, and have them on disk before the next is begun."""
    with open(path, "ab") as file:
        for line in lines:
            file.write(json.dumps({**line, "crc": checksum(line)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def refuse_others(run: Run, path: Path, lines: list[Line]) -> None:
    """Stop if a finished cell is of another run than this one."""
    digests = {model.digest for model in run.models}
    for line in lines:
        wanted = run.decided_by(line["perturbation"])
        other = [f"{k}: {line.get(k)}, now {v}" for k, v in wanted.items() if line.get(k) != v]
        if line["model"] not in digests:
            other.append(f"model: {line['label']} of weights {line['model']}, now not among them")
        if other:
            raise UserError(
                f"{path} holds results of another run ({other[0]}): choose another --output-dir, or"
                " delete that file"
            )
