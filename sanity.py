"""Checks of an attack's score: the attacks to run beside it, and what their accuracies give away.

A high accuracy under attack may mean a robust model, or a masked gradient, or too weak an attack.
The checks follow Carlini et al. 2019, "On Evaluating Adversarial Robustness", section 3.

    accuracy = {"clean": ...} | {name: ... for name in CHECKS}    # of one model, on the same images
    print(*doubts(accuracy), sep="\\n")
"""

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from attacks import Attack, pgd, sign_noise
from mtlat import Model

__all__ = ["CHECKS", "doubts"]

EPSILONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.5)


def pgd_longer(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float, steps: int, start: Tensor | None = None
) -> Tensor:
    """Attack by PGD in a fifth of the steps, then in all of them the images it leaves right.

    So an image counts as fooled if either run fools it. The model must be in eval mode.
    """
    x_adv = pgd(model, x, y, epsilon=epsilon, steps=steps // 5, start=start)
    with torch.no_grad():
        left = model(x_adv).argmax(1) == y
    if left.any():
        again = None if start is None else start[left]
        x_adv[left] = pgd(model, x[left], y[left], epsilon=epsilon, steps=steps, start=again)
    return x_adv


# 84 F and 82 B per image, and 91 and 90 more for what PGD leaves right: for a few hundred images.
CHECKS: Mapping[str, Attack] = MappingProxyType(
    {
        "pgd_0": Attack(pgd, {"epsilon": 0.0, "steps": 1}, "PGD in a ball of no size"),
        "sign_noise_0.04": Attack(sign_noise, {"epsilon": 0.04}, "random signs"),
        "fgsm_0.04": Attack(
            pgd, {"epsilon": 0.04, "steps": 1, "random_start": False}, "FGSM", random=False
        ),
        **{f"pgd_{e}": Attack(pgd, {"epsilon": e}, "PGD in a ball of this size") for e in EPSILONS},
        "pgd_0.04_50_steps": Attack(
            pgd_longer, {"epsilon": 0.04, "steps": 50}, "PGD, then in five times the steps"
        ),
        "pgd_0.04_5_restarts": Attack(
            pgd, {"epsilon": 0.04, "restarts": 5}, "PGD from five starts, till one fools"
        ),
    }
)

# (A, B, slack, what it means if A leaves more accuracy than B and the slack)
_RULES = (
    ("pgd_0", "clean", 0.0, "an attack of no size changes the accuracy"),
    ("clean", "pgd_0", 0.0, "an attack of no size changes the accuracy"),
    ("pgd_0.04", "sign_noise_0.04", 0.0, "random noise is the stronger attack"),
    ("pgd_0.04", "fgsm_0.04", 0.0, "a single step is the stronger attack"),
    ("pgd_0.04", "mi_fgsm_0.04", 0.0, "an attack made on another model is the stronger one"),
    ("pgd_0.04", "pgd_0.04_50_steps", 0.02, "ten steps are too few"),
    ("pgd_0.04", "pgd_0.04_5_restarts", 0.02, "one start is too few"),
    *((f"pgd_{b}", f"pgd_{a}", 0.02, "the larger ball has the weaker attack")
      for a, b in pairwise(EPSILONS)),
    ("pgd_0.5", "nothing", 0.02, "half the pixels' range should be enough to fool any model"),
)  # fmt: skip


def doubts(accuracy: Mapping[str, float]) -> list[str]:
    """Say what these accuracies give away about a masked gradient or a weak attack, in sentences.

    accuracy: shares in [0, 1] on one set of images, by name: "clean", keys of CHECKS and ATTACKS.
        What is missing is not compared.
    """
    for name, share in accuracy.items():
        if not 0 <= share <= 1:
            raise ValueError(f"accuracy of {name} is {share}; it must be a share: in [0, 1]")
    known = {**accuracy, "nothing": 0.0}
    return [
        f"{a} leaves {known[a]:.3f} and {b} {known[b]:.3f}: {reason}"
        for a, b, slack, reason in _RULES
        if a in known and b in known and known[a] > known[b] + slack
    ]
