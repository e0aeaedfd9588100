"""Every one of these faults in mtlat.py makes a test of test_mtlat.py or its sequel fail."""

import types
from pathlib import Path

import hypothesis
import pytest
import test_mtlat
import test_mtlat_model

import mtlat

SOURCE = Path(mtlat.__file__).read_text()
TESTS = [
    test
    for file in (test_mtlat, test_mtlat_model)
    for name, test in vars(file).items()
    if name.startswith("test_") and "compiled" not in name  # torch caches what it compiled
]

TESTS.sort(key=lambda test: hasattr(test, "hypothesis"))  # the quick ones first

# What goes wrong, the line, and what stands there instead.
MUTATIONS = [
    ("attacked away from the target", "(-1 if away else 1)", "(1 if away else -1)"),
    ("one sign changed", "(x_adv.detach() - step *", "(x_adv.detach() + step *"),
    ("lambda swapped in the images", "return lam_x * x1", "return (1 - lam_x) * x1"),
    ("lambda swapped in the labels", "lam_y * y1 + (1 - lam_y)", "(1 - lam_y) * y1 + lam_y"),
    ("1 - epsilon dropped", "(1 - epsilon) * y +", "y +"),
    ("target not in the label", "+ epsilon * y_target", "+ epsilon * y"),
    ("gradient flows through x_mtlat", "x_adv = x = x.detach()", "x_adv = x"),
    ("labels of the wrong pair", "mixup(x3, y3, x4, y4,", "mixup(x3, y1, x4, y2,"),
    ("one lambda for both pairs", "x4, y4, lam2", "x4, y4, lam1"),
    ("attacked the unmixed image", "tlat(model, x_mix2,", "tlat(model, x3,"),
    ("loss of the clean mix", "cross_entropy(model(x_mtlat)", "cross_entropy(model(x_mix2)"),
    ("loss1 twice", "return Losses(loss1, loss2)", "return Losses(loss1, loss1)"),
    ("loss2 forgotten", "losses.mixup + losses.tlat", "losses.mixup"),
    ("not back into the ball", ".clamp(x - epsilon, x + epsilon)", ""),
    ("always clipped", "x_adv.clamp(0, 1) if clip else x_adv", "x_adv.clamp(0, 1)"),
    ("never clipped", "return x_adv.clamp(0, 1) if clip else x_adv", "return x_adv"),
    ("no gradient under no_grad", ", torch.enable_grad():", ":"),
    ("weights not frozen", "setattr(owner, flag, False)", "pass"),
    ("weights left frozen", "setattr(owner, flag, True)", "pass"),
    ("statistics moved by the attack", "for m in modules if m.training]", "for m in ()]"),
    ("cross-entropy as attack loss", "logits.scatter(1, own, -math.inf)", "logits"),
    ("one-hot targets saturate", "y.amax(1) == 1", "y.amax(1) == 2"),
    ("soft targets hardened", "torch.where(one_hot, loss, soft)", "loss"),
    ("images not weighted by 1 - p_y", "log_weight = F.logsigmoid(loss.detach())",
     "log_weight = torch.zeros_like(loss)"),
    ("soft targets weighted", "log_weight.where(one_hot, 0)", "log_weight"),
    ("weights fall to zero", ".clamp_min(floor)", ""),
    ("Ulrich's exponent", "2 / (2 * alpha + 1)", "2 / (2 * alpha - 1)"),
    ("Beta(alpha + 1)", " + (log_u[2] - log_u[3]) / alpha", ""),
    ("one exponential lost", "(log_u[2] - log_u[3]) / alpha", "log_u[2] / alpha"),
    ("epsilon above its maximum", "epsilon_max * u[8]", "2 * epsilon_max * u[8]"),
    ("epsilon tied to lambda", "epsilon_max * u[8]", "epsilon_max * u[7]"),
    ("a class never targeted", "randint(num_classes,", "randint(num_classes - 1,"),
    ("lambda per batch", "1 if per_batch else batch_size", "1"),
    ("lambda per image", "1 if per_batch else batch_size", "batch_size"),
    ("no permutation", ".argsort().to(x.device)", ".argsort().sort().values"),
    ("sum instead of mean", "F.cross_entropy(logits", "len(y) * F.cross_entropy(logits"),
    ("pixels unchecked", 'check_values("pixels", x, 0, 1,', 'check_values("pixels", x, -9, 9,'),
]  # fmt: skip


# Failing is enough: no search for the smallest example, and no report of it.
BRIEF = hypothesis.settings(
    max_examples=20, database=None, derandomize=True, deadline=None,
    phases=[hypothesis.Phase.generate], report_multiple_bugs=False,
    verbosity=hypothesis.Verbosity.quiet,
)  # fmt: skip


def first_failure(source: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The first test that fails on this text of mtlat.py."""
    module = types.ModuleType("mtlat")
    module.__file__ = mtlat.__file__
    exec(compile(source, "mtlat.py", "exec"), module.__dict__)
    for file in (test_mtlat, test_mtlat_model):
        monkeypatch.setattr(file, "mtlat", module)
    for test in TESTS:
        if hasattr(test, "hypothesis"):  # a profile does not reach what is decorated already
            monkeypatch.setattr(test, "_hypothesis_internal_use_settings", BRIEF, raising=False)
        try:
            test()
        except (Exception, pytest.fail.Exception):
            return test.__name__
    return None


def test_the_unbroken_file_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_failure(SOURCE, monkeypatch) is None


@pytest.mark.parametrize("fault, line, broken", MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_fault_is_caught(
    fault: str, line: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SOURCE.count(line) == 1, "the line has changed: update this list"
    assert first_failure(SOURCE.replace(line, broken), monkeypatch), fault
