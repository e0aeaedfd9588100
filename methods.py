"""The eight trainings that the paper's tables compare, each as the losses of one step.

A training takes minibatches (x, y), y as distributions (B, N), and the step's draws, and yields its
losses one after the other, so that the first one's activations are gone before the second one's
are made:

    for loss in METHODS["mtlat"].losses(model, pairs, draws, attack_steps):
        loss.backward()
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mtlat import Draws, Model, Pair, cross_entropy, mixup, targeted_fgsm, tlat


def standard(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    ((x, y),) = pairs
    yield cross_entropy(model(x), y)


def mixup_only(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    x_mix, y_mix = mixup(*pairs[0], *pairs[1], draws.lam1)
    yield cross_entropy(model(x_mix), y_mix)


def tlat_only(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    yield from standard(model, pairs[:1], draws, steps)
    x_tlat, y_tlat = tlat(model, *pairs[1], draws.target, draws.epsilon, steps=steps)
    yield cross_entropy(model(x_tlat), y_tlat)


def mtlat(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    x_mix1, y_mix1 = mixup(*pairs[0], *pairs[1], draws.lam1)
    yield cross_entropy(model(x_mix1), y_mix1)
    x_mix2, y_mix2 = mixup(*pairs[2], *pairs[3], draws.lam2)
    x_mtlat, y_mtlat = tlat(model, x_mix2, y_mix2, draws.target, draws.epsilon, steps=steps)
    yield cross_entropy(model(x_mtlat), y_mtlat)


def iat(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """Interpolated Adversarial Training (Lamb et al., 2019), with this paper's FGSM as attack.

    An attacked image is mixed with its neighbour, 0 with 1, 2 with 3, ...: minibatches are drawn in
    random order, and several processes share one by the pair. An odd last one takes the one before.
    """
    x_mix, y_mix = mixup(*pairs[0], *pairs[1], draws.lam1)
    yield cross_entropy(model(x_mix), y_mix) / 2
    x, y = pairs[2]
    x_adv = targeted_fgsm(model, x, y, draws.epsilon, away=True, steps=steps, clip=True)
    i = torch.arange(len(x), device=x.device)
    neighbour = torch.where(i ^ 1 < len(x), i ^ 1, i - 1)
    x_mix, y_mix = mixup(x_adv, y, x_adv[neighbour], y[neighbour], draws.lam2)
    yield cross_entropy(model(x_mix), y_mix) / 2


def fgsm(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    yield from standard(model, pairs[:1], draws, steps)
    x, y = pairs[1]
    x_adv = targeted_fgsm(model, x, y, draws.epsilon, away=True, steps=steps)
    yield cross_entropy(model(x_adv), y)


def target_fgsm(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    yield from standard(model, pairs[:1], draws, steps)
    x, y = pairs[1]
    x_adv = targeted_fgsm(model, x, draws.target, draws.epsilon, steps=steps)
    yield cross_entropy(model(x_adv), y)


def label_smoothing(model: Model, pairs: list[Pair], draws: Draws, steps: int) -> Iterator[Tensor]:
    """As printed: 1 - epsilon on the true class, epsilon / N elsewhere; sums to 1 - epsilon / N."""
    yield from standard(model, pairs[:1], draws, steps)
    x, y = pairs[1]
    x_adv = targeted_fgsm(model, x, draws.target, draws.epsilon, steps=steps)
    epsilon = draws.epsilon[:, None]
    yield cross_entropy(model(x_adv), (1 - epsilon) * y + epsilon / y.shape[1] * (1 - y))


class Method(NamedTuple):
    losses: Callable[[Model, list[Pair], Draws, int], Iterator[Tensor]]
    couples: int  # minibatches that a step draws
    terms: int  # losses that a step sums
    description: str


METHODS = {
    "standard": Method(standard, 1, 1, "cross-entropy"),
    "mixup": Method(mixup_only, 2, 1, "mixed images"),
    "tlat": Method(tlat_only, 2, 2, "clean, and attacked towards a target that is in the label"),
    "mtlat": Method(mtlat, 4, 2, "mixed, and mixed then attacked as tlat: Algorithm 1"),
    "iat": Method(iat, 3, 2, "mixed, and attacked then mixed"),
    "fgsm": Method(fgsm, 2, 2, "clean, and attacked away from the true class"),
    "target-fgsm": Method(target_fgsm, 2, 2, "clean, and attacked towards a target, true label"),
    "ls": Method(label_smoothing, 2, 2, "as target-fgsm, labels smoothed by epsilon"),
}
