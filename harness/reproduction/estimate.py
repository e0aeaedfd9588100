"""Estimates of how long trainings and evaluations take here, from a few steps of each kind."""

import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attacks import full_precision, pgd
from corruptions import CORRUPTIONS, corrupt
from harness.benchmark import registry
from harness.benchmark.fusion import fuse_for_inference
from harness.benchmark.registry import PERTURBATIONS
from harness.images.datasets import Dataset
from harness.images.loader import ImageSet
from harness.models import build_model, compute_logits
from harness.training.config import TrainConfig

STEPS = 2  # of a training that are timed, after as many untimed ones
IMAGES = 32  # on which passes and corruptions are timed


@cache
def count_passes(name: str) -> int:
    """Count the forward-backward passes of an attack or a check per image, at most."""
    passes = 0

    def linear_model(x: Tensor) -> Tensor:
        nonlocal passes
        passes += len(x) if x.requires_grad else 0
        return x.flatten(1)[:, :3] + 1e-3 * x.mean((1, 2, 3))[:, None]

    attack = PERTURBATIONS[name].attack
    assert attack is not None
    x = torch.full((1, 3, 2, 2), 0.5)
    x[0, 0, 0, 0] = 0.9  # the model is right: attacks skip an image that it gets wrong
    attack.function(linear_model, x, torch.tensor([0]), **attack.keywords)
    return passes


def time_second_call(work: Callable[[], Any]) -> float:
    """Time the second call of `work`, in seconds; the first one warms up.

    `work` must return a CPU value, so that the device has finished.
    """
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _first(part: ImageSet, count: int) -> ImageSet:
    return ImageSet(part.images[:count], part.labels[:count])


class Meter:
    """Estimates times in seconds; what it needs it measures once.

    Args:
        data: the dataset.
        device: where everything will run.
        time_epoch: returns the seconds of a training step and of testing one image, from the
            configuration and a small dataset. It is a script's function, so it is passed in.
    """

    def __init__(
        self, data: Dataset, device: str,
        time_epoch: Callable[[TrainConfig, Dataset], tuple[float, float]],
    ) -> None:  # fmt: skip
        self.data, self.device, self.time_epoch = data, device, time_epoch
        self.known: dict[Any, float] = {}  # seconds of an epoch
        self._forward, self._gradient = cache(self._time_forward), cache(self._time_gradient)
        self._corrupt = cache(self._time_corruption)

    def training(self, config: TrainConfig, epochs: int) -> float:
        """Estimate the time of that many epochs of train.py."""
        key = config.arch, config.method, config.batch_size
        if key not in self.known:
            size, train, test = config.minibatch_size, self.data.train, self.data.test
            few = self.data._replace(
                train=_first(train, STEPS * size), test=_first(test, config.batch_size)
            )
            per_step, per_image = self.time_epoch(config, few)
            steps = len(train.labels) // size
            self.known[key] = steps * per_step + len(test.labels) * per_image
        return epochs * self.known[key]

    def evaluation(
        self, models: Mapping[str, str], surrogate: str, names: list[str], limit: int | None,
        done: Collection[tuple[str, str, int | None]],
    ) -> float:  # fmt: skip
        """Estimate the time of the cells of evaluate.py that are not done.

        Args:
            models: architectures by label.
            surrogate: its architecture.
            names: the perturbations.
            limit: as --limit; 0 or None: all test images.
            done: the finished cells: label, perturbation and severity.
        """
        total = len(self.data.test.labels)
        count, seconds = min(limit or total, total), 0.0
        for name in names:
            entry = PERTURBATIONS[name]
            images = min(registry.SAMPLE, count) if entry.sampled else count
            for severity in entry.severities:
                left = [a for label, a in models.items() if (label, name, severity) not in done]
                each = sum(self._forward(arch) for arch in left)
                if entry.box == "white-box":
                    each += count_passes(name) * sum(self._gradient(arch) for arch in left)
                elif left and entry.box == "black-box":
                    each += count_passes(name) * self._gradient(surrogate)
                elif left and name in CORRUPTIONS:
                    each += self._corrupt(name, severity)
                seconds += images * each
        return seconds

    def _batch(self) -> Tensor:
        return self.data.test.images[:IMAGES].to(self.device).float().div_(255)

    def _model(self, arch: str) -> nn.Module:
        model = build_model(arch, len(self.data.classes)).to(self.device).eval()
        with full_precision():  # as in evaluate.py: TF32 would make fused networks seem to differ
            return fuse_for_inference(model, self._batch())

    def _time_forward(self, arch: str) -> float:
        model, x = self._model(arch), self._batch()
        with full_precision():
            return time_second_call(lambda: compute_logits(model, x).sum().item()) / len(x)

    def _time_gradient(self, arch: str) -> float:
        model, x = self._model(arch), self._batch()
        y = self.data.test.labels[: len(x)].to(self.device)
        return time_second_call(lambda: pgd(model, x, y, steps=2).sum().item()) / (2 * len(x))

    def _time_corruption(self, name: str, severity: int | None) -> float:
        x = self._batch()
        return time_second_call(lambda: corrupt(x, name, severity).sum().item()) / len(x)
