"""Check that each of these faults, put into a copy of mtlat.py, makes a test of the method fail.

A fault replaces a function of the copy, its arguments or its result. The list of faults therefore
does not depend on how the code is written. tests/mutate.py changes the code itself, one place at a
time.
"""

import contextlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtlat
from tests import test_mtlat, test_mtlat_model

SOURCE = Path(mtlat.__file__).read_text()
TESTS = [
    test
    for file in (test_mtlat, test_mtlat_model)
    for name, test in vars(file).items()
    if name.startswith("test_") and "compiled" not in name  # torch caches compiled code
]
TESTS.sort(key=lambda test: hasattr(test, "hypothesis"))  # the fast tests first

Change = Callable[[Callable[..., Any]], Callable[..., Any]]
FAULTS: dict[str, tuple[str, Change]] = {}  # title -> (function, change)


def fault(title: str, function: str) -> Callable[[Change], Change]:
    """Register a change, which takes the correct function and returns the faulty one."""

    def register(change: Change) -> Change:
        FAULTS[title] = function, change
        return change

    return register


def replace_result(title: str, function: str, broken: Callable[..., Any]) -> None:
    """Register a fault that computes a wrong result from the correct one and the arguments."""

    def change(right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: broken(right(*args, **options), *args, **options)

    FAULTS[title] = function, change


def replace_arguments(title: str, function: str, broken: Callable[..., Any]) -> None:
    """Register a fault that calls the correct function with wrong arguments."""
    FAULTS[title] = function, lambda right: lambda *args, **options: broken(right, *args, **options)


def column(value: Any, like: Tensor) -> Any:
    return value.view(-1, *[1] * (like.ndim - 1)).to(like) if torch.is_tensor(value) else value


# The attack.
replace_arguments("attacked away from the target", "targeted_fgsm",
    lambda f, *a, away=False, **o: f(*a, away=not away, **o))  # fmt: skip
replace_result("one sign changed", "targeted_fgsm", lambda adv, model, x, *a, **o: 2 * x - adv)
replace_result("gradient flows through x_mtlat", "targeted_fgsm",
    lambda adv, model, x, *a, **o: x + (adv - x).detach())  # fmt: skip
replace_result("not attacked", "targeted_fgsm", lambda adv, model, x, *a, **o: x.detach().clone())
replace_result("always clipped", "targeted_fgsm", lambda adv, *a, **o: adv.clamp(0, 1))
replace_arguments("never clipped", "targeted_fgsm",
    lambda f, *a, clip=False, **o: f(*a, **o))  # fmt: skip
replace_arguments("one step whatever is asked for", "targeted_fgsm",
    lambda f, *a, steps=1, **o: f(*a, steps=min(steps, 1), **o))  # fmt: skip
replace_result("half as far", "targeted_fgsm", lambda adv, model, x, *a, **o: (adv + x) / 2)
# Mixing and the labels.
replace_result("lambda swapped in the images", "mixup",
    lambda out, x1, y1, x2, y2, lam: (x1 + x2 - out[0], out[1]))  # fmt: skip
replace_result("lambda swapped in the labels", "mixup",
    lambda out, x1, y1, x2, y2, lam: (out[0], y1 + y2 - out[1]))  # fmt: skip
replace_result("1 - epsilon dropped", "target_labels",
    lambda out, y, target, epsilon: out + column(epsilon, y) * y)  # fmt: skip
replace_result("target not in the label", "target_labels", lambda out, y, target, epsilon: y)
# Algorithm 1.
replace_arguments("labels of the wrong pair", "algorithm1",
    lambda f, model, p1, p2, p3, p4, draws, **o: f(
        model, p1, p2, (p3[0], p1[1]), (p4[0], p2[1]), draws, **o))  # fmt: skip
replace_arguments("one lambda for both pairs", "algorithm1",
    lambda f, *a, **o: f(*a[:5], a[5]._replace(lam2=a[5].lam1), **o))  # fmt: skip
replace_arguments("attacked the unmixed image", "algorithm1",
    lambda f, *a, **o: f(*a[:5], a[5]._replace(lam2=torch.ones_like(a[5].lam2)), **o))  # fmt: skip
replace_result("loss1 twice", "algorithm1", lambda losses, *a, **o: iter([next(losses)] * 2))
replace_result("loss2 first", "algorithm1", lambda losses, *a, **o: reversed(list(losses)))
replace_result("loss2 forgotten", "algorithm1",
    lambda losses, *a, **o: (loss * (1 - i) for i, loss in enumerate(losses)))  # fmt: skip
replace_result("sum instead of mean", "cross_entropy", lambda loss, logits, y: len(y) * loss)
# The model under attack.
FAULTS["weights not frozen"] = "frozen", lambda right: contextlib.nullcontext


@fault("weights left frozen", "frozen")
def _(right: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def frozen(model: Any) -> Any:
        with right(model) as bare:
            yield bare
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False)

    return frozen


# The attack's loss.
FAULTS["cross-entropy as attack loss"] = (
    "attack_loss",
    lambda right: lambda output, y: F.cross_entropy(mtlat.logits_of(output, y), y, reduction="sum"),
)
FAULTS["one-hot targets saturate"] = (
    "attack_loss",
    lambda right: (
        lambda logits, y: (
            right(logits, y) if y.ndim == 1 else F.cross_entropy(logits, y, reduction="sum")
        )
    ),
)
FAULTS["soft targets hardened"] = (
    "attack_loss",
    lambda right: lambda logits, y: right(logits, y if y.ndim == 1 else y.argmax(1)),
)
FAULTS["images not weighted by 1 - p_y"] = (
    "attack_loss",
    lambda right: (
        lambda output, y: (
            mtlat.log_odds_against(mtlat.logits_of(output, y).float(), y).sum()
            if y.ndim == 1
            else right(output, y)
        )
    ),
)
# The draws.
replace_result("Beta(1, 1)", "draw", lambda d, *a, **o: d._replace(lam1=torch.rand_like(d.lam1)))
replace_arguments("Beta(alpha + 1)", "draw",
    lambda f, *a, alpha, **o: f(*a, alpha=alpha + 1, **o))  # fmt: skip


replace_result("epsilon above its maximum", "draw",
    lambda d, *a, **o: d._replace(epsilon=2 * d.epsilon))  # fmt: skip
replace_result("epsilon tied to lambda", "draw", lambda d, *a, epsilon_max, **o: d._replace(
    epsilon=epsilon_max * d.lam1))  # fmt: skip
replace_result("a class never targeted", "draw",
    lambda d, batch, classes, **o: d._replace(target=d.target.clamp(max=classes - 2)))  # fmt: skip
replace_arguments("lambda per batch", "draw", lambda f, *a, per_batch=False, **o: f(
    *a, per_batch=True, **o))  # fmt: skip
replace_arguments("lambda per image", "draw", lambda f, *a, per_batch=False, **o: f(*a, **o))
replace_arguments("no permutation", "mtlat_loss", lambda f, model, x, y, **o: f(
    model, x[:1].expand_as(x), y[:1].expand_as(y), **o))  # fmt: skip
# The checks.
FAULTS["images unchecked"] = "check_images", lambda right: lambda *images: None
FAULTS["labels unchecked"] = "check_labels", lambda right: lambda *labels, **options: None
FAULTS["values unchecked"] = "check_values", lambda right: lambda *values: None

# A failure is enough: the example is neither minimized nor reported.
BRIEF = hypothesis.settings(
    max_examples=20, database=None, derandomize=True, deadline=None,
    phases=[hypothesis.Phase.generate], report_multiple_bugs=False,
    verbosity=hypothesis.Verbosity.quiet,
)  # fmt: skip


def copy_of_mtlat() -> types.ModuleType:
    module = types.ModuleType("mtlat")
    module.__file__ = mtlat.__file__
    exec(compile(SOURCE, "mtlat.py", "exec"), module.__dict__)
    return module


def first_failure(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Return the name of the first test that fails with this module as mtlat, or None."""
    for file in (test_mtlat, test_mtlat_model):
        monkeypatch.setattr(file, "mtlat", module)
    for test in TESTS:
        if hasattr(test, "hypothesis"):  # a profile does not affect a decorated test
            monkeypatch.setattr(test, "_hypothesis_internal_use_settings", BRIEF, raising=False)
        try:
            test()
        except (Exception, pytest.fail.Exception):
            return test.__name__
    return None


def test_the_unbroken_file_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_failure(copy_of_mtlat(), monkeypatch) is None


@pytest.mark.parametrize("title", FAULTS)
def test_fault_is_caught(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (name, change) = copy_of_mtlat(), FAULTS[title]
    setattr(module, name, change(getattr(module, name)))
    assert first_failure(module, monkeypatch), title
