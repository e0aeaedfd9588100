"""Each check speaks when it should and is silent otherwise."""

import pytest
import torch
from test_attacks import Linear, images
from torch import Tensor

from attacks import ATTACKS, Attack, broken_gradients
from sanity import CHECKS, EPSILONS, doubts

# Of a model whose accuracies give no reason to doubt them.
CALM = {
    "clean": 0.9, "pgd_0": 0.9, "sign_noise_0.04": 0.88, "fgsm_0.04": 0.35, "mi_fgsm_0.04": 0.8,
    "pgd_0.01": 0.7, "pgd_0.02": 0.5, "pgd_0.04": 0.3, "pgd_0.08": 0.1, "pgd_0.16": 0.0,
    "pgd_0.5": 0.0, "pgd_0.04_50_steps": 0.29, "pgd_0.04_5_restarts": 0.285,
}  # fmt: skip


def test_a_calm_table_and_a_partial_one_raise_no_doubt() -> None:
    assert set(CALM) == {"clean", "mi_fgsm_0.04", *CHECKS}
    assert doubts(CALM) == []
    assert doubts({"pgd_0.04": 0.9}) == []


@pytest.mark.parametrize(
    ("name", "share", "reason"),
    [
        ("pgd_0", 0.89, "no size"),
        ("pgd_0", 0.91, "no size"),
        ("sign_noise_0.04", 0.29, "random noise"),
        ("fgsm_0.04", 0.29, "single step"),
        ("mi_fgsm_0.04", 0.29, "another model"),
        ("pgd_0.04_50_steps", 0.27, "steps are too few"),
        ("pgd_0.04_5_restarts", 0.27, "start is too few"),
        ("pgd_0.01", 0.47, "larger ball"),
        ("pgd_0.08", 0.33, "larger ball"),
        ("pgd_0.16", 0.13, "larger ball"),
    ],
)
def test_each_rule_speaks_alone(name: str, share: float, reason: str) -> None:
    (doubt,) = doubts({**CALM, name: share})
    assert reason in doubt and f"{share:.3f}" in doubt and name in doubt


def test_accuracy_must_fall_to_nothing() -> None:
    (doubt,) = doubts({"pgd_0.5": 0.03})
    assert "0.030" in doubt and "any model" in doubt
    assert doubts({"pgd_0.5": 0.02}) == []


def test_per_cent_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clean is 73\.3; it must be a share"):
        doubts({"clean": 73.3})


def accuracies(model: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    def score(x: Tensor) -> float:
        return float((model(x).argmax(1) == y).double().mean())

    def attacked(entry: Attack) -> Tensor:
        return entry.function(model, x, y, **entry.keywords)

    return {"clean": score(x)} | {name: score(attacked(CHECKS[name])) for name in CHECKS}


class Stairs(Linear):
    """The linear classifier behind an input of four levels, which has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((3 * x).round() / 3)


def test_a_masked_gradient_is_doubted_and_a_plain_one_not() -> None:
    torch.manual_seed(0)
    x = images(0, batch=40)
    for model, masked in ((Linear(), False), (Stairs(), True)):
        y = model(x).argmax(1)
        found = doubts(accuracies(model, x, y))
        assert any("any model" in doubt for doubt in found) == masked
        assert bool(found) == masked
        assert broken_gradients(model, x, y).all() == masked


def test_the_checks_contain_the_attack_that_they_check() -> None:
    assert CHECKS["pgd_0.04"].function is ATTACKS["pgd_0.04"].function
    assert 0.04 in EPSILONS and list(EPSILONS) == sorted(EPSILONS)
