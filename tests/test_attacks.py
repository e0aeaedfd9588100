"""Test the attacks against closed forms, loops over images, and the claims of their docstrings."""

import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import attacks
from attacks import cw2, cw2_result, mi_fgsm, pgd, pgd_ll
from harness.benchmark.checks import broken_gradients, sign_noise
from tests.support.method import seeds
from tests.support.victims import Linear, away, images, labels, lead, network


class Counting(nn.Module):
    """Wrap a model and count the images of its forward passes and of its backward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x * 1
            x.register_hook(self._back)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(x)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


# Closed forms


@given(seeds, st.floats(0, 0.3))
def test_pgd_and_mi_fgsm_reach_the_corner_of_the_box(seed: int, epsilon: float) -> None:
    model, x, y = Linear(seed), images(seed), labels(seed, classes=2)
    corner = (x + epsilon * away(model, y)).clamp(0, 1)
    assert_close(pgd(model, x, y, epsilon=epsilon), corner)
    assert_close(pgd(model, x, y, epsilon=epsilon, steps=1, random_start=False), corner)
    assert_close(mi_fgsm(model, x, y, epsilon=epsilon), corner)
    unlikely = model(x).argmin(1)
    corner = (x - epsilon * away(model, unlikely)).clamp(0, 1)
    assert_close(pgd_ll(model, x, y, epsilon=epsilon), corner)
    assert_close(pgd(model, x, y, epsilon=epsilon, target=unlikely), corner)


def test_default_steps_are_the_guides_and_the_originals() -> None:
    model, x, y = Linear(), 0.3 + 0.4 * images(0), labels(0, classes=2)
    for attack, reach in ((pgd, 2.5), (pgd_ll, 2.5), (mi_fgsm, 1.0)):
        for epsilon, steps in ((0.04, 10), (0.08, 5)):
            curved: dict[str, Any] = {} if attack is mi_fgsm else {"random_start": False}
            default = attack(network(), x, y, epsilon=epsilon, steps=steps, **curved)
            step = reach * epsilon / steps
            given = attack(network(), x, y, epsilon=epsilon, steps=steps, step_size=step, **curved)
            assert torch.equal(default, given)
    assert_close(mi_fgsm(model, x, y, steps=1, step_size=0.01), x + 0.01 * away(model, y))


@pytest.mark.parametrize("confidence", [0.0, 2.0])
def test_cw2_finds_the_distance_of_the_hyperplane(confidence: float) -> None:
    model, x = Linear(), 0.3 + 0.4 * images(1, batch=4)
    y = model(x).argmax(1)
    exact = (confidence - lead(model, x, y)) / model.slope.detach().norm()
    fine: dict[str, Any] = {"steps": 150, "step_size": 0.004}
    for settings, tolerance in (({}, 0.05), (fine, 0.005)):
        result = cw2_result(model, x, y, confidence=confidence, **settings)
        assert result.reached.all()
        assert (result.l2 >= exact).all()
        assert_close(result.l2, exact, rtol=tolerance, atol=0)


# References that loop over single images


def reference_linf(
    model: nn.Module, x: Tensor, aim: Tensor, start: Tensor, epsilon: float, step: float,
    steps: int, decay: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute PGD, or MI-FGSM if decay is above 0, from the formulas, one image at a time.

    A negative step approaches the class `aim`.
    """
    out = []
    for image, label, offset in zip(x, aim, start, strict=True):
        moved = torch.minimum(torch.maximum(image + epsilon * offset, image * 0), image * 0 + 1)
        momentum = torch.zeros_like(image)
        for _ in range(steps):
            leaf = moved.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(leaf[None]), label[None]), leaf)
            momentum = decay * momentum + slope / slope.abs().sum()
            delta = (moved + step * momentum.sign() - image).clamp(-epsilon, epsilon)
            moved = (image + delta).clamp(0, 1)
        out.append(moved)
    return torch.stack(out)


@pytest.mark.parametrize("epsilon", [0.04, 0.3])
def test_pgd_is_its_formula(epsilon: float) -> None:
    model, x, y = network(), images(2), labels(2)
    start = 2 * images(3) - 1
    step = epsilon / 4
    expected = reference_linf(model, x, y, start, epsilon, step, 10)
    assert_close(pgd(model, x, y, epsilon=epsilon, start=start), expected)
    expected = reference_linf(model, x, y, 0 * start, epsilon, 0.02, 3)
    found = pgd(model, x, y, epsilon=epsilon, steps=3, step_size=0.02, random_start=False)
    assert_close(found, expected)
    unlikely = model(x).argmin(1)
    expected = reference_linf(model, x, unlikely, start, epsilon, -step, 10)
    assert_close(pgd_ll(model, x, y, epsilon=epsilon, start=start), expected)


@pytest.mark.parametrize(("decay", "gain"), [(0.5, 1.0), (1.0, 1.0), (0.5, 1e-9)])
def test_mi_fgsm_is_its_formula(decay: float, gain: float) -> None:
    """Check MI-FGSM also for very small gradients.

    A lower limit of their norm would reduce the weight of the first gradients.
    """
    model, x, y = network(gain=gain), images(4), labels(4)
    expected = reference_linf(model, x, y, 0 * x, 0.3, 0.05, 8, decay)
    found = mi_fgsm(model, x, y, epsilon=0.3, steps=8, step_size=0.05, decay=decay)
    assert_close(found, expected)
    without = pgd(model, x, y, epsilon=0.3, steps=8, step_size=0.05, random_start=False)
    assert (found - without).abs().max() > 0.01  # the momentum matters here


def reference_cw2(
    model: nn.Module, image: Tensor, y: int, confidence: float, const: float, steps: int
) -> tuple[Tensor, float, float]:
    """Compute one round of CW2 for one image from the formulas.

    Returns the nearest successful image, its squared distance, and the largest margin.
    """
    w = torch.atanh((2 * image - 1) * 0.999999).requires_grad_()
    origin = ((torch.tanh(w) + 1) / 2).detach()
    found, nearest, best = image, math.inf, -math.inf
    first = second = torch.zeros_like(image)
    for step in range(1, steps + 1):
        moved = (torch.tanh(w) + 1) / 2
        logits = model(moved[None])[0]
        margin = torch.cat([logits[:y], logits[y + 1 :]]).max() - logits[y]
        distance = ((moved - origin) ** 2).sum()
        best = max(best, margin.item())
        if margin > confidence and distance < nearest:
            found, nearest = moved.detach(), distance.item()
        loss = distance + const * max(0 * margin, confidence - margin)
        (gradient,) = torch.autograd.grad(loss, w)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        w = (w - 0.01 * update).detach().requires_grad_()
    return found, nearest, best


@pytest.mark.parametrize("const", [0.01, 1.0, 1e5])
def test_a_round_of_cw2_is_its_formula(const: float) -> None:
    model, x, y = network(), images(5, batch=5), labels(5, batch=5)
    confidence, steps = 6.0, 25
    found = cw2_result(model, x, y, confidence=confidence, steps=steps, rounds=1,
                       const_range=(const / 2, const))  # fmt: skip
    rows = [reference_cw2(model, image, int(k), confidence, const, steps)
            for image, k in zip(x, y, strict=True)]  # fmt: skip
    assert_close(found.x_adv, torch.stack([row[0] for row in rows]), rtol=1e-6, atol=1e-6)
    assert found.reached.tolist() == [row[1] < math.inf for row in rows]
    assert_close(found.margin, x.new_tensor([row[2] for row in rows]))
    assert found.misclassified.tolist() == [row[2] > 0 for row in rows]
    assert const == 0.01 or found.reached.any()


def search(
    model: nn.Module, image: Tensor, y: int, confidence: float, consts: Generator[float, bool]
) -> float:
    """Return the smallest distance that six rounds find.

    `consts` yields the constant of each round and receives whether the round succeeded.
    """
    const, nearest = next(consts), math.inf
    for _ in range(6):
        _, distance, _ = reference_cw2(model, image, y, confidence, const, 40)
        nearest = min(nearest, distance)
        const = consts.send(distance < math.inf)
    return math.sqrt(nearest)


def originals_consts() -> Generator[float, bool]:
    """Yield the constants of the original: the smallest, times ten until success, then bisected."""
    low, high, const = 0.0, math.inf, 1e-3
    while True:
        low, high = (low, const) if (yield const) else (const, high)
        const = 10 * const if high == math.inf else (low + high) / 2


def our_consts() -> Generator[float, bool]:
    """Yield the constants of our attack: the largest, then bisected on a log scale."""
    low, high, const = 1e-3, 1e2, 1e2
    while True:
        low, high = (low, const) if (yield const) else (const, high)
        const = math.sqrt(low * high)


def test_cw2_searches_as_it_says_and_better_than_the_original() -> None:
    model, x, y = network(), images(6, batch=6), labels(6, batch=6)
    found = cw2_result(model, x, y, confidence=4.0, rounds=6, const_range=(1e-3, 1e2))
    ours, originals = (
        x.new_tensor([search(model, image, int(k), 4.0, consts())
                      for image, k in zip(x, y, strict=True)])
        for consts in (our_consts, originals_consts)
    )  # fmt: skip
    assert found.reached.tolist() == ours.isfinite().tolist() == originals.isfinite().tolist()
    assert 0 < found.reached.sum() < 6
    assert_close(found.l2[found.reached], ours[found.reached], rtol=1e-5, atol=0)
    assert ours[found.reached].sum() < originals[found.reached].sum()


def test_cw2_bisects_the_constant_on_a_log_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    threshold = torch.tensor([1e-9, 0.02, 70.0, 1e9], dtype=torch.float64)
    tried: list[list[float]] = []

    def reached_above_threshold(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        const, (image, distance, margin) = arguments[4], arguments[5]
        tried.append(const.tolist())
        hit = const > threshold[: len(const)]
        return image, torch.where(hit, 1.0, distance), margin, hit

    monkeypatch.setattr(attacks, "_cw2_round", reached_above_threshold)
    x = images(0, batch=4)
    y = Linear()(x).argmax(1)
    result = cw2_result(Linear(), x, y, rounds=12)
    assert result.reached.tolist() == [True, True, True, False]
    assert tried[0] == [1e5] * 4  # the largest first; images that it misses are dropped
    assert_close(tried[1], [10.0] * 3)
    assert_close(tried[2], [0.1, 0.1, 1000.0])
    assert [len(row) for row in tried[1:]] == [3] * 11
    for limit, last in zip([1e-3, 0.02, 70.0], tried[-1], strict=True):
        assert abs(math.log10(last / limit)) < 8 / 2**10


# Results of CW2


def test_cw2_result_is_true_of_its_images() -> None:
    model, x, y = network(), images(8, batch=16), labels(8, batch=16)
    result = cw2_result(model, x, y, confidence=7.0)
    reached = result.reached
    assert 0 < reached.sum() < 16
    assert torch.equal(result.x_adv[~reached], x[~reached])  # returned bit-identical
    assert (lead(model, result.x_adv, y)[reached] > 7.0).all()
    assert torch.equal(reached, result.margin > 7.0)
    assert torch.equal(result.misclassified, result.margin > 0)
    assert (result.misclassified & ~reached).any()  # fooled, but by a smaller margin
    assert_close(result.l2, (result.x_adv - x).flatten(1).norm(dim=1))
    assert torch.equal(cw2(model, x, y, confidence=7.0), result.x_adv)
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1


def test_cw2_of_a_model_that_changes_its_input_in_place() -> None:
    model, x, y = network(), images(8, batch=16), labels(8, batch=16)
    plain = cw2_result(lambda z: model((z - 0.5) / 0.2), x, y, confidence=0.0, steps=10)
    within = cw2_result(lambda z: model(z.sub_(0.5).div_(0.2)), x, y, confidence=0.0, steps=10)
    assert plain.reached.any() and within.x_adv.min() >= 0 and within.x_adv.max() <= 1
    for expected, found in zip(plain, within, strict=True):
        assert_close(found, expected)


def test_cw2_leaves_what_is_wrong_already_where_it_is() -> None:
    model, x = network(), images(9)
    y = model(x).argmin(1)
    result = cw2_result(model, x, y, confidence=0.0)
    assert result.reached.all()
    assert_close(result.x_adv, x, rtol=0, atol=1e-6)  # tanh space does not include 0 and 1


# Number of passes


@pytest.mark.parametrize(
    ("attack", "settings", "forwards", "backwards"),
    [
        (pgd, {}, 10, 10),
        (pgd, {"steps": 7, "random_start": False}, 7, 7),
        (pgd, {"steps": 4, "restarts": 3}, 5, 4),  # the first run succeeds on all
        (pgd, {"steps": 4, "restarts": 3, "epsilon": 0.0}, 15, 12),  # no run succeeds on any
        (pgd_ll, {}, 11, 10),
        (pgd_ll, {"target": torch.tensor([0, 1, 0])}, 10, 10),
        (mi_fgsm, {}, 10, 10),
        (cw2, {"confidence": 0.0}, 352, 343),
        (cw2, {"confidence": 1e4}, 40, 39),
        (cw2, {"confidence": 0.0, "steps": 5, "rounds": 3}, 13, 10),
        (broken_gradients, {}, 1, 1),
        (sign_noise, {}, 0, 0),
    ],
)
def test_passes_are_those_of_the_docstring(
    attack: Callable[..., Tensor], settings: dict[str, Any], forwards: int, backwards: int
) -> None:
    model, x = Counting(Linear()), 0.499 + 0.002 * images(0)
    y = model.model(x).argmax(1)
    attack(model, x, y, **settings)
    assert (model.forwards, model.backwards) == (3 * forwards, 3 * backwards)


def test_cw2_spends_a_single_pass_on_an_image_that_is_wrong_already() -> None:
    model, x = Counting(Linear()), images(0)
    cw2(model, x, model.model(x).argmin(1), confidence=0.0)
    assert (model.forwards, model.backwards) == (3, 3)
