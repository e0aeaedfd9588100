"""The eight training methods of the paper's tables, each as the losses of one step.

Every method has the signature of `standard` and yields its losses one after the other, so that the
first one's activations are freed before the second one's are made:

    for loss in METHODS["mtlat"].losses(model, pairs, draws, steps):
        loss.backward()

Args of every method:
    model: maps images (B, ...) in [0, 1] to logits (B, N).
    pairs: as many minibatches (x, y) as the method needs, y distributions (B, N).
    draws: the random numbers of the step, one of each per image.
    steps: iterations of the attack; the paper takes one.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mtlat import Draws, Model, Pair, algorithm1, cross_entropy, mixup, target_labels, targeted_fgsm


def standard(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the cross-entropy."""
    ((x, y),) = pairs
    yield cross_entropy(model(x), y)


def mixup_only(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the cross-entropy of mixed images (Zhang et al., 2018)."""
    x_mix, y_mix = mixup(*pairs[0], *pairs[1], draws.lam1)
    yield cross_entropy(model(x_mix), y_mix)


def tlat_only(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the losses of clean images, and of attacked images labeled by Eq. 4."""
    yield from standard(model, pairs[:1], draws, steps)
    x, y = pairs[1]
    x_tlat = targeted_fgsm(model, x, draws.target, draws.epsilon, steps=steps)
    yield cross_entropy(model(x_tlat), target_labels(y, draws.target, draws.epsilon))


def mtlat(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the losses of Algorithm 1."""
    pair1, pair2, pair3, pair4 = pairs
    return algorithm1(model, pair1, pair2, pair3, pair4, draws, steps=steps)


def iat(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the losses of Interpolated Adversarial Training (Lamb et al., 2019), divided by 2 each.

    arXiv:1906.06784. The attack is that of `fgsm`, clipped to [0, 1]. Each attacked image is mixed
    with its neighbor, 0 with 1, 1 with 0, 2 with 3, and so on, by a lambda of its own. The order of
    a minibatch is random, and processes never divide a pair. The last image of an odd minibatch is
    mixed with the one before it.
    """
    x_mix, y_mix = mixup(*pairs[0], *pairs[1], draws.lam1)
    yield cross_entropy(model(x_mix), y_mix) / 2
    x, y = pairs[2]
    x_adv = targeted_fgsm(model, x, y, draws.epsilon, away=True, steps=steps, clip=True)
    i = torch.arange(len(x), device=x.device)
    neighbor = torch.where(i ^ 1 < len(x), i ^ 1, i - 1)
    x_mix, y_mix = mixup(x_adv, y, x_adv[neighbor], y[neighbor], draws.lam2)
    yield cross_entropy(model(x_mix), y_mix) / 2


def fgsm(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the losses of clean images, and of images attacked away from their true class."""
    yield from standard(model, pairs[:1], draws, steps)
    x, y = pairs[1]
    x_adv = targeted_fgsm(model, x, y, draws.epsilon, away=True, steps=steps)
    yield cross_entropy(model(x_adv), y)


def target_fgsm(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the losses of clean images, and of images attacked towards a target, true label."""
    yield from standard(model, pairs[:1], draws, steps)
    x, y = pairs[1]
    x_adv = targeted_fgsm(model, x, draws.target, draws.epsilon, steps=steps)
    yield cross_entropy(model(x_adv), y)


def label_smoothing(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Yield the losses of `target_fgsm`, the attacked images' labels smoothed by epsilon.

    As the paper prints it, the true class has 1 - epsilon and every other class epsilon / N, which
    sums to 1 - epsilon / N.
    """
    yield from standard(model, pairs[:1], draws, steps)
    x, y = pairs[1]
    x_adv = targeted_fgsm(model, x, draws.target, draws.epsilon, steps=steps)
    epsilon = draws.epsilon[:, None]
    yield cross_entropy(model(x_adv), (1 - epsilon) * y + epsilon / y.shape[1] * (1 - y))


class Method(NamedTuple):
    """A training method: its losses, and what a step of it draws and sums."""

    losses: Callable[[Model, list[Pair], Draws, int], Iterator[Tensor]]
    minibatches: int  # that a step draws
    terms: int  # losses that a step sums
    description: str
    options: tuple[str, ...]  # of train.py, that change its losses


MIXING, ATTACK = ("alpha",), ("epsilon_max", "attack_steps")
METHODS = {
    "standard": Method(standard, 1, 1, "cross-entropy", ()),
    "mixup": Method(mixup_only, 2, 1, "mixed images", MIXING),
    "tlat": Method(tlat_only, 2, 2, "clean images, and images attacked towards a target that is"
                   " part of their label", ATTACK),
    "mtlat": Method(mtlat, 4, 2, "mixed images, and mixed images attacked as in tlat: Algorithm 1",
                    MIXING + ATTACK),
    "iat": Method(iat, 3, 2, "mixed images, and attacked images that are then mixed",
                  MIXING + ATTACK),
    "fgsm": Method(fgsm, 2, 2, "clean images, and images attacked away from their true class",
                   ATTACK),
    "target-fgsm": Method(target_fgsm, 2, 2, "clean images, and images attacked towards a target,"
                          " with the true label", ATTACK),
    "ls": Method(label_smoothing, 2, 2, "as target-fgsm, with labels smoothed by epsilon", ATTACK),
}  # fmt: skip
