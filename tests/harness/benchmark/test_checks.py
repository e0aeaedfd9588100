"""Test that each check of the attacks reports a finding exactly when it should."""

import pytest
import torch
from torch import Tensor

from attacks import pgd
from harness.benchmark.attack_registry import ATTACKS, Attack
from harness.benchmark.checks import (
    CHECKS,
    EPSILONS,
    broken_gradients,
    failed_checks,
    pgd_longer,
    sign_noise,
)
from tests.support.victims import Linear, images, network

# Accuracies of a model that pass every check.
CALM = {
    "clean": 0.9, "pgd_0": 0.9, "sign_noise_0.04": 0.88, "fgsm_0.04": 0.35, "mi_fgsm_0.04": 0.8,
    "pgd_0.01": 0.7, "pgd_0.02": 0.5, "pgd_0.04": 0.3, "pgd_0.08": 0.1, "pgd_0.16": 0.0,
    "pgd_0.5": 0.0, "pgd_0.04_50_steps": 0.29, "pgd_0.04_5_restarts": 0.285,
}  # fmt: skip


def test_a_calm_table_and_a_partial_one_raise_no_doubt() -> None:
    assert set(CALM) == {"clean", "mi_fgsm_0.04", *CHECKS}
    assert failed_checks(CALM) == []
    assert failed_checks({"pgd_0.04": 0.9}) == []


@pytest.mark.parametrize(
    ("name", "share", "reason"),
    [
        ("pgd_0", 0.89, "epsilon 0 changes"),
        ("pgd_0", 0.91, "epsilon 0 changes"),
        ("sign_noise_0.04", 0.29, "random noise"),
        ("fgsm_0.04", 0.29, "single step"),
        ("mi_fgsm_0.04", 0.29, "another model"),
        ("pgd_0.04_50_steps", 0.27, "steps are too few"),
        ("pgd_0.04_5_restarts", 0.27, "start is too few"),
        ("pgd_0.01", 0.47, "larger epsilon"),
        ("pgd_0.08", 0.33, "larger epsilon"),
        ("pgd_0.16", 0.13, "larger epsilon"),
    ],
)
def test_each_rule_speaks_alone(name: str, share: float, reason: str) -> None:
    (doubt,) = failed_checks({**CALM, name: share})
    assert reason in doubt and f"{share:.3f}" in doubt and name in doubt


def test_accuracy_must_fall_to_nothing() -> None:
    (doubt,) = failed_checks({"pgd_0.5": 0.03})
    assert "0.030" in doubt and "any model" in doubt
    assert failed_checks({"pgd_0.5": 0.02}) == []


def test_per_cent_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clean is 73\.3; it must be in"):
        failed_checks({"clean": 73.3})


def accuracies(model: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    def score(x: Tensor) -> float:
        return float((model(x).argmax(1) == y).double().mean())

    def attacked(entry: Attack) -> Tensor:
        return entry.function(model, x, y, **entry.keywords)

    return {"clean": score(x)} | {name: score(attacked(CHECKS[name])) for name in CHECKS}


class Stairs(Linear):
    """A linear classifier of inputs that are rounded to four levels, with zero gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((3 * x).round() / 3)


def test_a_masked_gradient_is_doubted_and_a_plain_one_not() -> None:
    torch.manual_seed(0)
    x = images(0, batch=40)
    for model, masked in ((Linear(), False), (Stairs(), True)):
        y = model(x).argmax(1)
        found = failed_checks(accuracies(model, x, y))
        assert any("any model" in doubt for doubt in found) == masked
        assert bool(found) == masked
        assert broken_gradients(model, x, y).all() == masked


def test_the_checks_are_the_guides() -> None:
    balls = {f"pgd_{e}": (pgd, {"epsilon": e}, True) for e in (0.01, 0.02, 0.04, 0.08, 0.16, 0.5)}
    assert {name: (c.function, c.keywords, c.random) for name, c in CHECKS.items()} == {
        "pgd_0": (pgd, {"epsilon": 0.0, "steps": 1}, True),
        "sign_noise_0.04": (sign_noise, {"epsilon": 0.04}, True),
        "fgsm_0.04": (pgd, {"epsilon": 0.04, "steps": 1, "random_start": False}, False),
        **balls,
        "pgd_0.04_50_steps": (pgd_longer, {"epsilon": 0.04, "steps": 50}, True),
        "pgd_0.04_5_restarts": (pgd, {"epsilon": 0.04, "restarts": 5}, True),
    }


def test_the_checks_contain_the_attack_that_they_check() -> None:
    assert CHECKS["pgd_0.04"].function is ATTACKS["pgd_0.04"].function
    assert 0.04 in EPSILONS and list(EPSILONS) == sorted(EPSILONS)


def test_the_longer_attack_goes_on_with_what_the_shorter_leaves_right() -> None:
    model, x = network(), images(0, batch=40)
    y = model(x).argmax(1)
    for start in (torch.zeros_like(x), 2 * images(1, batch=40) - 1):
        same = {"epsilon": 0.03, "start": start}
        short, long = (pgd(model, x, y, steps=steps, **same) for steps in (3, 15))
        left = model(short).argmax(1) == y
        assert 0 < left.sum() < 40
        found = pgd_longer(model, x, y, steps=15, **same)
        assert torch.equal(found, torch.where(left[:, None, None, None], long, short))
    assert pgd_longer(model, x, y, epsilon=0.03, steps=15).shape == x.shape  # draws its own starts


SLACK = {
    0.0: [("pgd_0", "clean"), ("clean", "pgd_0"), ("pgd_0.04", "sign_noise_0.04"),
          ("pgd_0.04", "fgsm_0.04"), ("pgd_0.04", "mi_fgsm_0.04")],
    0.02: [("pgd_0.04", "pgd_0.04_50_steps"), ("pgd_0.04", "pgd_0.04_5_restarts"),
           ("pgd_0.02", "pgd_0.01"), ("pgd_0.08", "pgd_0.04"), ("pgd_0.5", "nothing")],
}  # fmt: skip


@pytest.mark.parametrize("slack", SLACK)
def test_a_rule_speaks_just_above_its_slack(slack: float) -> None:
    for above, below in SLACK[slack]:
        base = {} if below == "nothing" else {below: 0.25}
        least = base.get(below, 0.0) + slack
        # These two must be equal: a little less is the other rule's finding.
        mirrored = {"pgd_0", "clean"} == {above, below}
        assert len(failed_checks({**base, above: least - 0.0005})) == mirrored
        assert len(failed_checks({**base, above: least + 0.0005})) == 1
