"""Checks of attack scores: attacks to run beside the benchmark's, and rules to compare them by.

High accuracy under attack may mean a robust model, a masked gradient, or an attack that is too
weak. The checks follow Carlini et al. 2019, "On Evaluating Adversarial Robustness", section 3.

    accuracy = {"clean": ...} | {name: ... for name in CHECKS}    # of one model, on the same images
    print(*failed_checks(accuracy), sep="\\n")
"""

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from attacks import attack_mode, check_number, draw_starts, input_gradient, pgd
from harness.benchmark.attack_registry import Attack
from harness.models import compute_logits
from mtlat import Model

EPSILONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.5)


def sign_noise(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float = 0.04, start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Move every value by +epsilon or -epsilon at random: an attack of that size must do better.

    `start` is as in `attacks.pgd`; its signs are used. Costs no passes.
    """
    check_number("epsilon", epsilon, 0, "it is a share of the pixels' range (paper: 0.04)", 1)
    with attack_mode(model, x, y) as (model, x, y):
        return (x + epsilon * draw_starts(x, 1, True, start, generator)[0].sign()).clamp(0, 1)


def broken_gradients(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Return a mask (B,) of images whose input gradient is all zero or not finite.

    White-box attacks find no direction there, so their score means nothing. Costs 1 F, 1 B.
    """
    with attack_mode(model, x, y) as (model, x, y):
        gradient = input_gradient(model, x, y).flatten(1)
        return (gradient == 0).all(1) | ~gradient.isfinite().all(1)


def pgd_longer(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float, steps: int, start: Tensor | None = None
) -> Tensor:
    """Attack by PGD in a fifth of the steps, then in all steps those images that are still right.

    An image counts as fooled if either run fools it. The model is in eval mode, `steps` is a
    multiple of 5, and the rest is as in `attacks.pgd`. Returns x_adv like x.
    """
    x_adv = pgd(model, x, y, epsilon=epsilon, steps=steps // 5, start=start)
    left = compute_logits(model, x_adv).argmax(1) == y
    if left.any():
        again = None if start is None else start[left]
        x_adv[left] = pgd(model, x[left], y[left], epsilon=epsilon, steps=steps, start=again)
    return x_adv


# Costs 84 forward and 82 backward passes per image, and 94 and 90 more where PGD does not fool the
# model: for a few hundred images.
CHECKS: Mapping[str, Attack] = MappingProxyType({
    "pgd_0": Attack(pgd, {"epsilon": 0.0, "steps": 1}),
    "sign_noise_0.04": Attack(sign_noise, {"epsilon": 0.04}),
    "fgsm_0.04": Attack(pgd, {"epsilon": 0.04, "steps": 1, "random_start": False}, random=False),
    **{f"pgd_{e}": Attack(pgd, {"epsilon": e}) for e in EPSILONS},
    "pgd_0.04_50_steps": Attack(pgd_longer, {"epsilon": 0.04, "steps": 50}),
    "pgd_0.04_5_restarts": Attack(pgd, {"epsilon": 0.04, "restarts": 5}),
})  # fmt: skip

# (A, B, slack, what it means if accuracy under A exceeds accuracy under B by more than the slack)
_RULES = (
    ("pgd_0", "clean", 0.0, "an attack with epsilon 0 changes the accuracy"),
    ("clean", "pgd_0", 0.0, "an attack with epsilon 0 changes the accuracy"),
    ("pgd_0.04", "sign_noise_0.04", 0.0, "random noise is the stronger attack"),
    ("pgd_0.04", "fgsm_0.04", 0.0, "a single step is the stronger attack"),
    ("pgd_0.04", "mi_fgsm_0.04", 0.0, "an attack made on another model is the stronger one"),
    ("pgd_0.04", "pgd_0.04_50_steps", 0.02, "ten steps are too few"),
    ("pgd_0.04", "pgd_0.04_5_restarts", 0.02, "one start is too few"),
    *((f"pgd_{b}", f"pgd_{a}", 0.02, "the attack with the larger epsilon is weaker")
      for a, b in pairwise(EPSILONS)),
    ("pgd_0.5", "nothing", 0.02, "epsilon 0.5 should be enough to fool any model"),
)  # fmt: skip


def failed_checks(accuracy: Mapping[str, float]) -> list[str]:
    """List in sentences what these accuracies say of a masked gradient or a weak attack.

    Args:
        accuracy: shares in [0, 1] on the same images, by name: "clean", keys of `CHECKS` and of
            `ATTACKS`. Rules whose names are missing are not applied.

    Raises:
        ValueError: an accuracy is not in [0, 1].
    """
    for name, share in accuracy.items():
        if not 0 <= share <= 1:
            raise ValueError(f"accuracy of {name} is {share}; it must be in [0, 1]")
    known = {**accuracy, "nothing": 0.0}
    other = {name: f", {share:.3f} under {name}" for name, share in accuracy.items()}
    return [
        f"accuracy {known[a]:.3f} under {a}{other.get(b, '')}: {reason}"
        for a, b, slack, reason in _RULES
        if a in known and b in known and known[a] > known[b] + slack
    ]
