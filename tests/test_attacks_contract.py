"""Test what every attack guarantees for any model: bounds, no side effects, seeds, errors."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from attacks import cw2, cw2_result, mi_fgsm, pgd, pgd_ll
from harness.benchmark.attack_registry import ATTACKS
from harness.benchmark.checks import broken_gradients, sign_noise
from tests.support.method import seeds
from tests.support.victims import Linear, images, labels, lead, network

LINF: list[Callable[..., Tensor]] = [pgd, pgd_ll, mi_fgsm, sign_noise]
BRIEF: dict[Callable[..., Tensor], dict[str, Any]] = {
    pgd: {"steps": 3}, pgd_ll: {"steps": 3}, mi_fgsm: {"steps": 3}, sign_noise: {},
    cw2: {"steps": 6, "rounds": 3, "confidence": 3.0}, broken_gradients: {},
}  # fmt: skip
every_attack = pytest.mark.parametrize("attack", list(BRIEF))


# Bounds


@given(seeds, st.floats(0, 1), st.integers(1, 12), st.floats(0, 2) | st.none())
def test_ball_and_range_hold(
    seed: int, epsilon: float, steps: int, step_size: float | None
) -> None:
    model, x, y = network(torch.float32), images(seed, dtype=torch.float32), labels(seed)
    settings = {"epsilon": epsilon, "steps": steps, "step_size": step_size}
    for attack in LINF:
        chosen = {"epsilon": epsilon} if attack is sign_noise else settings
        x_adv = attack(model, x, y, **chosen)
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert (x_adv - x).abs().max() <= epsilon + 1e-7


@given(seeds, st.floats(0, 20))
def test_cw2_stays_in_range(seed: int, confidence: float) -> None:
    model, x, y = network(torch.float32), images(seed, dtype=torch.float32), labels(seed)
    x_adv = cw2(model, x, y, confidence=confidence, steps=8, rounds=2)
    assert x_adv.dtype == x.dtype and x_adv.min() >= 0 and x_adv.max() <= 1


@given(seeds)
def test_pgd_ll_approaches_the_least_likely_class(seed: int) -> None:
    model, x, y = network(), images(seed), labels(seed)
    target, start = model(x).argmin(1), 2 * images(seed + 1) - 1
    found = pgd_ll(model, x, y, start=start.clone().requires_grad_())
    assert not found.requires_grad
    assert torch.equal(found, pgd(model, x, y, target=target, start=start))
    assert torch.equal(found, pgd_ll(model, x, (y + 1) % 4, start=start))  # for any y


@given(seeds)
def test_a_batch_is_its_images_one_by_one(seed: int) -> None:
    model, x, y, start = network(), images(seed, 4), labels(seed, 4), 2 * images(seed + 1, 4) - 1
    for attack, settings in BRIEF.items():
        extra = {"start": start} if attack in (pgd, pgd_ll, sign_noise) else {}
        together = attack(model, x, y, **settings, **extra)
        alone = [
            attack(model, x[i : i + 1], y[i : i + 1], **settings,
                   **{name: value[i : i + 1] for name, value in extra.items()})
            for i in range(4)
        ]  # fmt: skip
        assert_close(together, torch.cat(alone))


# Side effects

BACKENDS: Any = torch.backends
UNITS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
FULL = {"matmul": "highest", "cudnn": False} | dict.fromkeys(UNITS, "ieee")


def precisions() -> dict[str, Any]:
    """Return PyTorch's precision settings, the two older ones first.

    A setting that PyTorch refuses to read is None.
    """
    found: dict[str, Any] = {"matmul": None, "cudnn": None}
    with suppress(RuntimeError):
        found["matmul"] = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        found["cudnn"] = BACKENDS.cudnn.allow_tf32
    return found | {name: attrgetter(name)(BACKENDS).fp32_precision for name in UNITS}


class Witness(nn.Module):
    """Wrap a model and record the modes and settings of each forward pass."""

    def __init__(self, model: nn.Module, error: Exception | None = None) -> None:
        super().__init__()
        self.model, self.error = model, error
        self.seen: list[tuple[bool, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((
            any(module.training for module in self.modules()),
            torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
            precisions() != FULL,
            any(parameter.requires_grad for parameter in self.parameters()),
        ))  # fmt: skip
        if self.error is not None:
            raise self.error
        logits: Tensor = self.model(x)
        return logits


def snapshot(model: nn.Module) -> list[Any]:
    """Return everything that an attack must not change, in comparable form."""
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [tensor.tolist() for tensor in model.state_dict().values()],
        precisions(),
    ]


def half_frozen() -> nn.Module:
    """Return a network in a mixed state.

    Only its BatchNorm is in eval mode. One parameter is frozen, and one has a gradient.
    """
    net = network().train()
    net[1].eval()
    net.get_parameter("0.weight").requires_grad_(False)
    net.get_parameter("5.bias").grad = torch.ones(16, dtype=torch.float64)
    return net


@every_attack
def test_the_model_and_the_images_are_left_as_they_were(attack: Callable[..., Tensor]) -> None:
    model, x, y = Witness(half_frozen()), images(0).requires_grad_(), labels(0)
    before, x_before = snapshot(model), x.detach().clone()
    found = attack(model, x, y, **BRIEF[attack])
    assert snapshot(model) == before
    assert torch.equal(x.detach(), x_before) and x.grad is None
    assert x._version == y._version == 0
    assert not found.requires_grad and found.data_ptr() != x.data_ptr()
    assert attack is sign_noise or model.seen
    assert not any(any(call) for call in model.seen)


@every_attack
def test_a_model_may_return_an_object_with_logits(attack: Callable[..., Tensor]) -> None:
    class Packed(Witness):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(x))

    found = attack(Packed(network()), images(0), labels(0), **BRIEF[attack])
    assert_close(found, attack(network(), images(0), labels(0), **BRIEF[attack]), rtol=0, atol=0)


def test_a_function_must_not_hide_a_module_in_training_mode() -> None:
    net = network().train()
    with pytest.raises(TypeError, match=r"hides BatchNorm2d.*give an nn\.Module"):
        pgd(lambda x: net(x), images(0), labels(0))
    assert_close(pgd(lambda x: net.eval()(x), images(0), labels(0), random_start=False),
                 pgd(net, images(0), labels(0), random_start=False))  # fmt: skip


@pytest.mark.parametrize("attack", [partial(pgd, restarts=2), partial(cw2_result, confidence=0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_may_have_another_precision_than_the_images(
    attack: Callable[..., Any], dtype: torch.dtype
) -> None:
    net = network().to(dtype)
    for images_dtype in (torch.float32, torch.float64):
        x = images(0).to(images_dtype)
        found = attack(lambda x: net(x.to(dtype)), x, labels(0))
        x_adv = found if isinstance(found, Tensor) else found.x_adv
        assert x_adv.dtype == images_dtype and not torch.equal(x_adv, x)


def test_cw2_refuses_logits_in_which_its_gradients_overflow() -> None:
    with pytest.raises(TypeError, match=r"float16.*model\.float\(\)"):
        cw2(lambda x: network()(x).half(), images(0), labels(0))


@pytest.mark.parametrize("excess", [2e-6, -2e-6])
def test_pixels_outside_by_rounding_are_attacked_from_the_border(excess: float) -> None:
    border = images(0).clone()
    border[:, :, 0, 0] = float(excess > 0)
    outside = border.clone()
    outside[:, :, 0, 0] += excess
    expected = cw2_result(network(), border, labels(0), confidence=0)
    found = cw2_result(network(), outside, labels(0), confidence=0)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert pgd(network(), outside, labels(0)).amax() <= 1


def test_modes_come_back_after_an_error() -> None:
    model = Witness(half_frozen(), RuntimeError("no"))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no"):
        pgd(model, images(0), labels(0))
    assert snapshot(model) == before


@pytest.mark.parametrize(("owner", "name", "value", "unreadable"), [
    (BACKENDS.cuda.matmul, "allow_tf32", True, {}),
    (BACKENDS.cudnn, "allow_tf32", False, {}),
    (BACKENDS, "fp32_precision", "tf32", {}),
    (BACKENDS.cudnn.rnn, "fp32_precision", "ieee", {"cudnn": None}),
    (BACKENDS.cuda.matmul, "fp32_precision", "tf32", {}),
])  # fmt: skip
def test_precision_is_full_and_comes_back(
    owner: Any, name: str, value: object, unreadable: dict[str, None]
) -> None:
    """Check that attacks use full precision and restore the settings.

    This includes the older settings. A model that reads one of them raises if the two kinds differ.
    """
    seen, old, untouched = [], getattr(owner, name), precisions()

    def model(x: Tensor) -> Tensor:
        seen.append(precisions())
        return x.flatten(1)[:, :4]

    try:
        setattr(owner, name, value)
        before = precisions()
        pgd(model, images(0), labels(0), steps=1)
        assert precisions() == before != untouched
        assert seen == [FULL | unreadable]
    finally:
        setattr(owner, name, old)
        for unit in UNITS:  # the old settings also change some of these
            attrgetter(unit)(BACKENDS).fp32_precision = untouched[unit]
        assert precisions() == untouched


@every_attack
def test_surrounding_modes_change_nothing(attack: Callable[..., Tensor]) -> None:
    model, x, y = Witness(network(torch.float32)), images(1, dtype=torch.float32), labels(1)

    def run() -> Tensor:
        return attack(model, x.clone(), y.clone(), **BRIEF[attack])

    torch.manual_seed(0)
    expected = run()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products on some CPUs
    try:
        for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
            with mode:
                torch.manual_seed(0)
                assert torch.equal(run(), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert not any(any(call) for call in model.seen)


# Starting points


def test_the_start_is_uniform_in_the_ball_and_the_generators() -> None:
    x, y = 0.3 + 0.4 * images(0, batch=64), labels(0, batch=64, classes=2)

    def started(seed: int, images: Tensor = x) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pgd(Linear(), images, y, steps=1, step_size=0.0, generator=generator) - images

    offset = started(0) / 0.04
    assert torch.equal(started(0), started(0)) and not torch.equal(started(0), started(1))
    assert torch.equal(started(0, x.to(memory_format=torch.channels_last)), started(0))
    quantiles = offset.flatten().quantile(torch.linspace(0, 1, 5, dtype=x.dtype))
    assert_close(quantiles, torch.linspace(-1, 1, 5, dtype=x.dtype), rtol=0, atol=0.03)
    noise = sign_noise(Linear(), x, y, start=offset) - x
    assert_close(noise, 0.04 * offset.sign())
    assert abs((noise > 0).double().mean() - 0.5) < 0.03


def test_a_given_start_is_taken_in_units_of_epsilon() -> None:
    x, y, start = 0.3 + 0.4 * images(0), labels(0), 2 * images(1) - 1
    still: dict[str, Any] = {"steps": 1, "step_size": 0.0, "epsilon": 0.2}
    for attack in (pgd, pgd_ll):
        assert_close(attack(network(), x, y, start=start, **still), x + 0.2 * start)
        assert torch.equal(attack(network(), x, y, random_start=False, **still), x)


def test_a_restart_is_for_images_that_no_run_has_fooled_yet() -> None:
    model, x = network(), images(3, batch=12)
    y = model(x).argmax(1)
    starts = torch.stack([2 * images(seed, batch=12) - 1 for seed in (10, 11, 12)])
    size = {"epsilon": 0.05, "steps": 1, "step_size": 0.02}
    for attack in (pgd, pgd_ll):
        best = attack(model, x, y, **size, restarts=3, start=starts)
        runs = [attack(model, x, y, **size, start=start) for start in starts]
        margins = torch.stack([lead(model, run, y) for run in runs])
        fooled = margins > 0
        kept = torch.where(fooled.any(0), fooled.int().argmax(0), margins.argmax(0)).tolist()
        assert len(set(kept)) == 3 and 0 < fooled.any(0).sum() < 12
        assert all(torch.equal(best[i], runs[k][i]) for i, k in enumerate(kept))


# Numerical limits


@given(seeds)
def test_a_sure_model_is_attacked_like_the_same_model_unsure(seed: int) -> None:
    """Check attacks on a model that is certain of its predictions.

    Cross-entropy in float32 has no gradient if the probability of the true class is 1.
    """
    x = images(seed, dtype=torch.float32)
    plain, sure = network(torch.float32), network(torch.float32, gain=1024.0)
    y = plain(x).argmax(1)
    start = images(seed + 1, dtype=torch.float32) - 0.5  # so that steps must reach the border
    assert not broken_gradients(sure, x, y).any()
    runs: list[tuple[Callable[..., Tensor], dict[str, Any]]]
    runs = [(pgd, {"start": start}), (pgd, {"start": start, "target": 0 * y + 3}), (mi_fgsm, {})]
    for attack, settings in runs:
        found = attack(sure, x, y, epsilon=0.2, **settings)
        assert (found - x).abs().flatten(1).amax(1).min() > 0.19


class Blind(nn.Module):
    """A model whose gradient is zero for dark images and NaN for white images."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        lead = mean.clamp_min(0.25) * 1e-3
        lead = lead + torch.where(mean == 1, 0 * (1 - mean).sqrt(), 0.0)
        return torch.stack([lead, -lead], 1)


def test_broken_gradients_are_found_and_poison_nothing() -> None:
    x = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.5, 1.0)])
    y = torch.zeros(3, dtype=torch.int64)
    assert broken_gradients(Blind(), x, y).tolist() == [True, False, True]
    partly = Linear()
    partly.slope.data[::2] = 0
    assert not broken_gradients(partly, images(0), labels(0, classes=2)).any()
    for x_adv in (pgd(Blind(), x, y, random_start=False), mi_fgsm(Blind(), x, y)):
        moved = (x_adv - x).abs().flatten(1).amax(1)
        assert_close(moved, torch.tensor([0.0, 0.04, 0.0]))
    result = cw2_result(Blind(), x, y, confidence=0.0)
    assert torch.equal(result.x_adv, x) and not result.reached.any()
    tied = cw2_result(lambda x: 0 * x.flatten(1)[:, :2], x, y, confidence=0.0)
    assert not tied.misclassified.any() and not tied.reached.any()


def test_momentum_outlives_a_gradient_of_zero() -> None:
    x, y = torch.full((1, 3, 4, 4), 0.26), torch.zeros(1, dtype=torch.int64)
    assert_close(mi_fgsm(Blind(), x, y), x - 0.04)  # zero gradient below 0.25
    assert_close(pgd(Blind(), x, y, step_size=0.004, random_start=False), x - 0.012)


# The registry


def test_the_registry_is_the_papers() -> None:
    assert list(ATTACKS) == ["pgd_0.04", "pgd_ll_0.04", "cw2", "mi_fgsm_0.04", "mi_fgsm_0.08"]
    assert [entry.function for entry in ATTACKS.values()] == [pgd, pgd_ll, cw2, mi_fgsm, mi_fgsm]
    ball = {"epsilon": 0.04, "steps": 10}
    assert [entry.keywords for entry in ATTACKS.values()] == [
        ball, ball, {"confidence": 50.0, "steps": 40}, ball, {"epsilon": 0.08, "steps": 10},
    ]  # fmt: skip
    black = [name for name, entry in ATTACKS.items() if entry.box == "black-box"]
    assert black == ["mi_fgsm_0.04", "mi_fgsm_0.08"]
    assert len({entry.column for entry in ATTACKS.values()}) == 5
    with pytest.raises(TypeError):
        ATTACKS["pgd_0.04"] = ATTACKS["cw2"]  # type: ignore[index]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_entry_does_what_its_name_says(name: str) -> None:
    entry, x = ATTACKS[name], 0.3 + 0.4 * images(0)
    model: nn.Module = Linear()
    y = model(x).argmax(1)
    x_adv = entry.function(model, x, y, **entry.keywords)
    if name == "cw2":
        assert torch.equal(x_adv, cw2(model, x, y, confidence=50.0, steps=40))
        assert entry.keywords["confidence"] == 50.0
    else:
        size = float(name.rpartition("_")[2])
        assert_close((x_adv - x).abs(), torch.full_like(x, size))
    model = network()  # nonlinear, so that the result depends on the start
    first, again = (entry.function(model, x, y, **entry.keywords) for _ in range(2))
    assert torch.equal(first, again) != entry.random
    if entry.random:
        entry.function(model, x, y, start=torch.zeros_like(x), **entry.keywords)


# Errors


@pytest.mark.parametrize(
    ("attack", "settings", "error", "message"),
    [
        (pgd, {"x": images(0).half()}, TypeError, r"float16; .*full precision: x\.float\(\)"),
        (pgd, {"x": 255 * images(0)}, ValueError, r"pixels: 0 to 255; rule: \[0, 1\].*Normalize"),
        (pgd, {"x": images(0) * torch.nan}, ValueError, "nan"),
        (mi_fgsm, {"x": images(0)[:0], "y": labels(0)[:0]}, ValueError, r"at least one image"),
        (pgd, {"y": labels(0).float()}, TypeError, r"labels are torch\.float32; give int64"),
        (cw2, {"y": labels(0, batch=2)}, ValueError, r"shape \(2,\); these images need \(3,\)"),
        (cw2, {"y": labels(0) + 9}, ValueError, r"class indices.*\[0, 3\].*from 0"),
        (pgd, {"start": 0 * images(0) + 1.5}, ValueError, r"start: 1\.5 to 1\.5; rule: \[-1, 1\]"),
        (cw2, {"steps": 2.5}, TypeError, "steps is 2.5; rule: an int from 2"),
        (pgd, {"target": labels(0).int()}, TypeError, r"targets are torch\.int32"),
        (pgd, {"restarts": 1.5}, TypeError, "restarts is 1.5; rule: an int"),
        (pgd_ll, {"target": labels(0) + 9}, ValueError, r"rule: \[0, 3\]"),
        (pgd, {"epsilon": 8}, ValueError, r"epsilon is 8; rule: from 0 to 1;.*0\.04"),
        (sign_noise, {"epsilon": -0.1}, ValueError, r"epsilon is -0\.1"),
        (mi_fgsm, {"epsilon": "0.04"}, TypeError, "epsilon is '0.04'; rule: a float"),
        (mi_fgsm, {"steps": 0}, ValueError, "steps is 0; rule: from 1"),
        (pgd, {"steps": 10.0}, TypeError, r"steps is 10\.0; rule: an int"),
        (pgd, {"step_size": -0.01}, ValueError, r"step_size is -0\.01.*target"),
        (pgd, {"step_size": float("inf")}, ValueError, "step_size is inf"),
        (pgd, {"restarts": True}, TypeError, "restarts is True"),
        (pgd, {"restarts": 0}, ValueError, "restarts is 0"),
        (pgd, {"restarts": 2, "random_start": False}, ValueError, "equal runs"),
        (pgd, {"start": images(0)[:1]}, ValueError,
         r"start is \(1, 3, 6, 6\); 1 runs need a tensor of shape \(3,"),
        (pgd, {"start": images(0), "restarts": 2}, ValueError, r"2 runs .* \(2, 3, 3, 6, 6\)"),
        (sign_noise, {"start": 2 * images(0)}, ValueError, "units of epsilon"),
        (mi_fgsm, {"decay": -1.0}, ValueError, r"decay is -1\.0"),
        (cw2, {"confidence": float("nan")}, ValueError, "confidence is nan"),
        (cw2, {"steps": 1}, ValueError, "steps is 1; rule: from 2"),
        (cw2, {"step_size": -1.0}, ValueError, r"step_size is -1\.0"),
        (cw2, {"rounds": 0}, ValueError, "rounds is 0"),
        (cw2, {"const_range": (0.0, 1.0)}, ValueError, r"const_range\[0\] is 0\.0"),
        (cw2, {"const_range": (1.0,)}, ValueError, "not enough values"),
        (cw2, {"const_range": (1.0, 1e25)}, ValueError, r"const_range\[1\] is 1e\+25; .*to 1e\+15"),
        (cw2, {"const_range": (1.0, 0.1)}, ValueError, r"const_range\[1\].*\(smallest, largest\)"),
        (pgd, {"model": nn.Flatten(0)}, ValueError,
         r"the model returns shape \(324,\); logits are \(3, N\)"),
        (pgd, {"model": nn.Flatten(2)}, ValueError, r"returns shape \(3, 3, 36\)"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_with_its_rule(
    attack: Callable[..., Tensor], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": network(), "x": images(0), "y": labels(0), **settings}
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    before, state = [t.clone() for t in tensors], snapshot(arguments["model"])
    with pytest.raises(error, match=message) as raised:
        attack(**arguments)
    assert raised.type is error and "\n" not in str(raised.value)
    assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)
    assert snapshot(arguments["model"]) == state
