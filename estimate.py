"""How long trainings and measurements will take here, from a few steps and passes of each kind."""

import argparse
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import data
import train
from attacks import full_precision, pgd
from cells import GRADIENT, GROUPS, SAMPLE, Subject, simplify
from common import build_model, count_correct
from corruptions import CORRUPTIONS, corrupt
from feed import ImageSet
from report import severities

STEPS = 2  # of a training that are timed, after as many untimed ones
IMAGES = 32  # that passes and corruptions are timed on

Cell = tuple[str, str, int | None]  # label, perturbation, severity


class Counter(nn.Module):
    """A linear model that counts the images it sees with a gradient to come."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x) if x.requires_grad else 0
        return x.flatten(1)[:, :3] + 1e-3 * x.mean((1, 2, 3))[:, None]


@cache
def passes(name: str) -> int:
    """Forward passes with a backward one to the image that an attack or a check takes, at most."""
    model, attack = Counter(), GRADIENT[name]
    x = torch.full((1, 3, 2, 2), 0.5)
    x[0, 0, 0, 0] = 0.9  # class 0 is right: who is wrong already costs nothing
    attack.function(model, x, torch.tensor([0]), **attack.keywords)
    return model.seen


def seconds_of(work: Callable[[], Any]) -> float:
    """How long work takes when it is done for the second time; it ends with a number on the CPU."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Meter:
    """Times what is asked of it, each kind once; all times in seconds."""

    def __init__(self, sets: data.Data, device: str) -> None:
        self.sets, self.device = sets, device
        self.known: dict[Any, float] = {}

    def timed(self, key: Any, work: Callable[[], float]) -> float:
        if key not in self.known:
            self.known[key] = work()
        return self.known[key]

    def training(self, settings: argparse.Namespace, epochs: int) -> float:
        """So many epochs of train.py with these settings."""
        return epochs * self.timed(
            (settings.arch, settings.method, settings.batch_size), lambda: self._epoch(settings)
        )

    def _epoch(self, settings: argparse.Namespace) -> float:
        size, batch = train.minibatch_size(settings), settings.batch_size
        few = [
            ImageSet(part.images[:count], part.labels[:count])
            for part, count in ((self.sets.train, STEPS * size), (self.sets.test, batch))
        ]
        run = train.prepare(settings, None, self.sets._replace(train=few[0], test=few[1]))
        steps = len(self.sets.train.labels) // size
        step = seconds_of(lambda: train.train_epoch(run, 0)) / (len(run.train) // size)
        test = seconds_of(lambda: count_correct(run.model, run.test.in_order(batch)))
        return steps * step + test * len(self.sets.test.labels) / len(run.test)

    def evaluation(
        self, models: Mapping[str, str], surrogate: str, names: list[str], limit: int | None,
        done: Collection[Cell],
    ) -> float:  # fmt: skip
        """The cells of evaluate.py that are not done; models: their architectures by label."""
        total = len(self.sets.test.labels)
        count, seconds = min(limit or total, total), 0.0
        for name in names:
            images = min(SAMPLE, count) if name in GROUPS["checks"] else count
            white_box = name in GRADIENT and GRADIENT[name].box == "white-box"
            for severity in severities(name):
                left = [a for label, a in models.items() if (label, name, severity) not in done]
                each = sum(self._forward(arch) for arch in left)
                if white_box:
                    each += passes(name) * sum(self._gradient(arch) for arch in left)
                elif left and name in GRADIENT:
                    each += passes(name) * self._gradient(surrogate)
                elif left and name in CORRUPTIONS:
                    each += self._corrupt(name, severity)
                seconds += images * each
        return seconds

    def _batch(self) -> Tensor:
        return self.sets.test.images[:IMAGES].to(self.device).float().div_(255)

    def _model(self, arch: str) -> nn.Module:
        model = build_model(arch, len(self.sets.classes)).to(self.device).eval()
        return simplify(Subject(arch, model, ""), self._batch()).module

    def _forward(self, arch: str) -> float:
        return self.timed(("forward", arch), lambda: self._measure_forward(arch))

    def _measure_forward(self, arch: str) -> float:
        model, x = self._model(arch), self._batch()
        with torch.no_grad(), full_precision():
            return seconds_of(lambda: model(x).sum().item()) / len(x)

    def _gradient(self, arch: str) -> float:
        return self.timed(("gradient", arch), lambda: self._measure_gradient(arch))

    def _measure_gradient(self, arch: str) -> float:
        model, x = self._model(arch), self._batch()
        y = self.sets.test.labels[: len(x)].to(self.device)
        return seconds_of(lambda: pgd(model, x, y, steps=2).sum().item()) / (2 * len(x))

    def _corrupt(self, name: str, severity: int | None) -> float:
        x = self._batch()
        return self.timed(
            (name, severity),
            lambda: seconds_of(lambda: corrupt(x, name, severity).sum().item()) / len(x),
        )
