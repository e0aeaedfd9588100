"""The method against an independent NumPy reference, and the invariants that the paper promises.

No test here takes an argument that Hypothesis does not draw, so that test_mutations.py can run the
whole file on a broken copy of mtlat.py.
"""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.transforms import v2

import mtlat

seeds = st.integers(0, 2**31)
batches = st.integers(1, 7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, 3, 8, 8, generator=seeded(seed), dtype=dtype)


def soft_labels(seed: int, batch: int, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, classes, generator=seeded(seed + 1), dtype=dtype).softmax(1)


def network(classes: int, *, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    middle: nn.Module = nn.BatchNorm2d(4) if norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), middle, nn.Tanh(), nn.Flatten(), nn.Linear(144, classes)
    )


def some_draws(seed: int, batch: int, classes: int, epsilon_max: float = 0.3) -> mtlat.Draws:
    return mtlat.draw(
        batch, classes, alpha=0.4, epsilon_max=epsilon_max, generator=seeded(seed + 2)
    )


# ---------------------------------------------------------------- Algorithm 1 in NumPy, float64


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_algorithm1(weight, bias, couples, lam1, lam2, epsilon, target):
    """Algorithm 1 on the model softmax(W x + b), whose gradients have closed forms.

    With p = softmax(W x + b), the cross-entropy's gradient is (p - y) W in x, and in W and b the
    mean over the batch of (p - y) x and of p - y.
    """
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = couples
    l1, l2, e = lam1[:, None], lam2[:, None], epsilon[:, None]
    x_mix1, y_mix1 = l1 * x1 + (1 - l1) * x2, l1 * y1 + (1 - l1) * y2
    x_mix2, y_mix2 = l2 * x3 + (1 - l2) * x4, l2 * y3 + (1 - l2) * y4
    gradient = (softmax(x_mix2 @ weight.T + bias) - target) @ weight
    x_mtlat = x_mix2 - e * np.sign(gradient)
    y_mtlat = (1 - e) * y_mix2 + e * target
    losses, weight_gradient, bias_gradient = [], 0, 0
    for x, y in ((x_mix1, y_mix1), (x_mtlat, y_mtlat)):
        p = softmax(x @ weight.T + bias)
        losses.append(-(y * np.log(p)).sum(1).mean())
        weight_gradient = weight_gradient + (p - y).T @ x / len(x)
        bias_gradient = bias_gradient + (p - y).mean(0)
    return losses, weight_gradient, bias_gradient


@given(seeds, batches, st.integers(2, 5), st.booleans())
def test_algorithm1_is_the_numpy_one(seed, batch, classes, soft_target):
    random = np.random.default_rng(seed)
    linear = nn.Linear(6, classes, dtype=torch.float64)
    couples = [
        (random.uniform(size=(batch, 6)), random.dirichlet(np.ones(classes), batch))
        for _ in range(4)
    ]
    lam1, lam2, epsilon = random.uniform(size=(3, batch))
    target = random.integers(classes, size=batch)
    one_hot = np.eye(classes)[target]
    draws = mtlat.Draws(
        *map(torch.tensor, (lam1, lam2, epsilon, one_hot if soft_target else target))
    )
    pairs = [(torch.tensor(x), torch.tensor(y)) for x, y in couples]
    losses = mtlat.algorithm1(linear, *pairs, draws)
    (losses.mixup + losses.tlat).backward()
    parameters = [p.detach().numpy() for p in linear.parameters()]
    expected, weight, bias = numpy_algorithm1(*parameters, couples, lam1, lam2, epsilon, one_hot)
    exact = {"rtol": 0, "atol": 1e-10}
    assert_close([losses.mixup.item(), losses.tlat.item()], expected, **exact)
    assert_close(linear.weight.grad, torch.tensor(weight), **exact)
    assert_close(linear.bias.grad, torch.tensor(bias), **exact)


def test_mtlat_loss_takes_the_four_couples_from_the_minibatch():
    """One-hot images show how they were mixed: with y the same, y_mix equals x_mix."""
    n = 6
    seen = []

    def model(x):
        seen.append(x.detach())
        return x @ (4 * torch.eye(n) + torch.arange(n))

    options = {"num_classes": n, "alpha": 0.7, "epsilon_max": 0.2}
    loss = mtlat.mtlat_loss(model, torch.eye(n), torch.arange(n), generator=seeded(3), **options)
    x_mix1, x_mix2, x_mtlat = seen
    draws = mtlat.draw(n, n, alpha=0.7, epsilon_max=0.2, generator=seeded(3))
    for x_mix, lam in ((x_mix1, draws.lam1), (x_mix2, draws.lam2)):
        assert_close(x_mix.sum(1), torch.ones(n))
        assert ((x_mix > 1e-6).sum(1) <= 2).all()
        assert ((x_mix > 1e-6).sum(1) == 2).sum() >= 2
        largest = torch.maximum(lam, 1 - lam)
        assert_close(x_mix.amax(1)[x_mix.amax(1) < 1], largest[x_mix.amax(1) < 1])
    assert_close((x_mix2 - x_mtlat).abs().amax(1), draws.epsilon)
    epsilon = draws.epsilon[:, None]
    y_mtlat = (1 - epsilon) * x_mix2 + epsilon * torch.eye(n)[draws.target]
    expected = [
        -(y * model(x).log_softmax(1)).sum(1).mean()
        for x, y in ((x_mix1, x_mix1), (x_mtlat, y_mtlat))
    ]
    assert_close(loss, sum(expected))


def test_mixup_is_torchvisions():
    x, y = images(0, 5), torch.arange(5)
    other_x, other_y = v2.MixUp(alpha=1.0, num_classes=5)(x, y)
    lam = other_y[0, 0].item()
    assert 0.01 < lam < 0.99
    mixed = mtlat.mixup(x, y, x.roll(1, 0), y.roll(1, 0), lam, num_classes=5)
    assert_close(mixed, (other_x, other_y))


# ---------------------------------------------------------------- invariants


@given(seeds, batches, st.integers(2, 5))
def test_soft_labels_are_distributions(seed, batch, classes):
    x, draws = images(seed, batch), some_draws(seed, batch, classes, epsilon_max=1.0)
    hard = torch.randint(classes, (batch,), generator=seeded(seed))
    for y in (hard, soft_labels(seed, batch, classes)):
        _, y_mix = mtlat.mixup(x, y, x, y.flip(0), draws.lam1, num_classes=classes)
        _, y_adv = mtlat.tlat(network(classes), x, y, draws.target, draws.epsilon)
        for label in (y_mix, y_adv):
            assert label.shape == (batch, classes)
            assert (label >= 0).all()
            assert_close(label.sum(1), torch.ones(batch))


@given(seeds, batches, st.integers(1, 4), st.booleans(), st.booleans())
def test_perturbation_stays_within_epsilon(seed, batch, steps, clip, away):
    x, draws = images(seed, batch), some_draws(seed, batch, 4)
    options = {"steps": steps, "clip": clip, "away": away}
    x_adv = mtlat.targeted_fgsm(network(4), x, draws.target, draws.epsilon, **options)
    moved = (x_adv - x).abs().flatten(1).amax(1)
    assert (moved <= draws.epsilon + 1e-6).all()  # 1e-6: float32's rounding of x - epsilon
    assert (moved > 0.9 * draws.epsilon).all() or clip
    assert not clip or (0 <= x_adv.min() and x_adv.max() <= 1)
    assert x_adv.dtype == x.dtype and not x_adv.requires_grad


@given(seeds, st.integers(1, 5))
def test_steps_go_to_the_corner_of_the_ball_for_a_linear_model(seed, steps):
    """Two classes, logits W x: the way towards class t is the sign of W_t - W_other, everywhere."""
    linear = nn.Linear(12, 2).double()
    x = torch.rand(4, 12, generator=seeded(seed), dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0])
    towards = (linear.weight[target] - linear.weight[1 - target]).sign().detach()
    for sign, away in ((1, False), (-1, True)):
        x_adv = mtlat.targeted_fgsm(linear, x, target, 0.1, steps=steps, away=away)
        assert_close(x_adv, x + sign * 0.1 * towards, rtol=0, atol=1e-12)


def test_zero_gradient_leaves_the_pixel():
    x = images(0, 2)
    x_adv = mtlat.targeted_fgsm(lambda x: x[:, 0, 0, :3], x, torch.tensor([0, 1]), 0.1)
    assert (x_adv != x).flatten(1).sum(1).tolist() == [3, 3]


def test_identities():
    x, y, other, other_y = images(0, 4), soft_labels(0, 4, 3), images(9, 4), soft_labels(9, 4, 3)
    assert_close(mtlat.mixup(x, y, other, other_y, 1.0), (x, y), rtol=0, atol=0)
    assert_close(mtlat.mixup(x, y, other, other_y, 0.0), (other, other_y), rtol=0, atol=0)
    lam = torch.tensor([0.1, 0.3, 0.8, 0.9])
    swapped = mtlat.mixup(other, other_y, x, y, 1 - lam)
    assert_close(mtlat.mixup(x, y, other, other_y, lam), swapped)
    target = torch.tensor([0, 1, 2, 0])
    assert_close(mtlat.tlat(network(3), x, y, target, 0.0), (x, y), rtol=0, atol=0)
    assert_close(mtlat.tlat(network(3), x, y, target, 1.0)[1], torch.eye(3)[target])


@given(seeds)
def test_batch_is_one_by_one(seed):
    """For a model that treats images alone, and for losses: the batch's mean is the mean of one."""
    model, n = network(4, norm=False).double(), 5
    pairs = [
        (images(seed + k, n, torch.float64), soft_labels(seed + k, n, 4, torch.float64))
        for k in range(4)
    ]
    draws = some_draws(seed, n, 4)
    together = mtlat.algorithm1(model, *pairs, draws)
    single = [
        mtlat.algorithm1(
            model, *((x[i : i + 1], y[i : i + 1]) for x, y in pairs),
            mtlat.Draws(*(d[i : i + 1] for d in draws)),
        )
        for i in range(n)
    ]  # fmt: skip
    assert_close(together.mixup, torch.stack([s.mixup for s in single]).mean())
    assert_close(together.tlat, torch.stack([s.tlat for s in single]).mean())


def test_class_indices_are_one_hot_distributions():
    model, n = network(4), 5
    pairs = [(images(k, n), torch.randint(4, (n,), generator=seeded(k))) for k in range(4)]
    wide = [(x, torch.eye(4)[y]) for x, y in pairs]
    draws = some_draws(0, n, 4)
    statistics = model[1].running_mean.clone()
    indices = mtlat.algorithm1(model, *pairs, draws)
    assert_close(indices, mtlat.algorithm1(model, *wide, draws))
    assert not torch.equal(statistics, model[1].running_mean)
    both = [
        mtlat.tlat(model, images(0, n), y, t, 0.1)
        for y in (pairs[0][1], wide[0][1])
        for t in (draws.target, torch.eye(4)[draws.target])
    ]
    for other in both[1:]:
        assert_close(other, both[0], rtol=0, atol=0)


# ---------------------------------------------------------------- the draws


def test_lambda_follows_beta():
    """Kolmogorov-Smirnov where float32 resolves lambda: it rounds what is within 6e-8 of 1."""
    for alpha in (0.01, 0.1, 0.2, 0.4, 1.0, 2.5, 100.0):
        draws = mtlat.draw(40000, 3, alpha=alpha, epsilon_max=0, generator=seeded(7))
        for lam in (draws.lam1, draws.lam2):
            assert ((lam >= 0) & (lam <= 1)).all()
            near_0 = lam.double().sort().values.numpy()
            near_1 = (1 - lam.double()).sort().values.numpy()
            for tail in (near_0, near_1):
                grid = np.geomspace(1e-6, 0.5, 400)
                empirical = np.searchsorted(tail, grid, side="right") / len(tail)
                distance = abs(empirical - scipy.stats.beta.cdf(grid, alpha, alpha)).max()
                assert distance < scipy.stats.kstwo.isf(1e-4, len(tail)), alpha


def test_lambda_follows_beta_by_the_plain_test():
    for alpha in (0.4, 1.0, 4.0):
        lam = mtlat.draw(20000, 3, alpha=alpha, epsilon_max=0, generator=seeded(3)).lam1
        assert (
            scipy.stats.kstest(lam.double().numpy(), scipy.stats.beta(alpha, alpha).cdf).pvalue
            > 1e-3
        )


def test_epsilon_and_target_are_uniform_and_all_draws_independent():
    draws = mtlat.draw(40000, 7, alpha=0.4, epsilon_max=0.025, generator=seeded(1))
    assert 0 <= draws.epsilon.min() and draws.epsilon.max() <= 0.025
    uniform = scipy.stats.uniform(0, 0.025).cdf
    assert scipy.stats.kstest(draws.epsilon.double().numpy(), uniform).pvalue > 1e-3
    assert draws.target.dtype == torch.int64
    assert scipy.stats.chisquare(torch.bincount(draws.target, minlength=7).numpy()).pvalue > 1e-3
    columns = torch.stack([d.double() for d in draws])
    neighbours = torch.cat([columns, columns.roll(1, 1)])
    off_diagonal = torch.corrcoef(neighbours) - torch.eye(8, dtype=torch.float64)
    assert off_diagonal.abs().max() < 5 / math.sqrt(40000)


@given(seeds, batches)
def test_draws_repeat_with_the_generator(seed, batch):
    first, again, other = (
        mtlat.draw(batch, 9, alpha=0.4, epsilon_max=0.1, generator=seeded(s))
        for s in (seed, seed, seed + 1)
    )
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first.lam1, other.lam1)
    assert all(d.shape == (batch,) for d in first)
    x, y = images(seed, batch), torch.zeros(batch, dtype=torch.int64)
    losses = [
        mtlat.mtlat_loss(network(9), x, y, num_classes=9, generator=seeded(s)).item()
        for s in (seed, seed, seed + 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_per_batch_draws_one_lambda_and_one_epsilon():
    draws = mtlat.draw(50, 10, alpha=0.4, epsilon_max=0.1, per_batch=True, generator=seeded(0))
    assert all(d.shape == (50,) for d in draws)
    assert [len(d.unique()) for d in draws[:3]] == [1, 1, 1]
    assert len(draws.target.unique()) > 5
    seen = []

    def model(x):
        seen.append(x.detach())
        return x[:, :4]

    x = torch.eye(8)
    mtlat.mtlat_loss(model, x, torch.arange(8) % 4, num_classes=4, per_batch=True)
    assert len(seen[1].amax(1)[seen[1].amax(1) < 1].unique()) <= 1


# ---------------------------------------------------------------- what must stay as it was


class Recorder(nn.Module):
    """A network that records in which state it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(4)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        weights = any(p.requires_grad for p in self.parameters())
        self.calls.append((weights, self.training))
        return self.body(x)


def test_the_attack_leaves_the_model_alone():
    model = Recorder()
    model.body[0].bias.requires_grad_(False)
    model.body[4].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    marker = torch.ones_like(model.body[4].bias)
    model.body[4].bias.grad = marker.clone()
    x, target = images(0, 5), torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        quiet = mtlat.targeted_fgsm(model, x, target, 0.1, steps=2)
    loud = mtlat.targeted_fgsm(model, x, target, 0.1, steps=2)
    assert_close(quiet, loud, rtol=0, atol=0)
    assert model.calls == [(False, True)] * 4  # no weight could have a gradient; the mode is kept
    assert [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert_close(model.body[4].bias.grad, marker, rtol=0, atol=0)
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        mtlat.targeted_fgsm(model, images(0, 5)[:, :2], target, 0.1)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert model.body[1].track_running_stats


def test_the_attack_uses_the_mode_of_the_caller():
    model, x, target = network(4), images(0, 6), torch.tensor([0, 1, 2, 3, 0, 1])
    model[1].running_mean.fill_(0.7)
    model[1].running_var.fill_(9.0)
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))
    mtlat.targeted_fgsm(model, x, target, 0.1)
    mtlat.targeted_fgsm(model.eval(), x, target, 0.1)
    assert abs(seen[0]) < 1e-5 < 0.05 < abs(seen[1])


def test_the_losses_move_batchnorm_twice_and_reach_every_weight():
    model = network(4)
    mtlat.mtlat_loss(model, images(0, 5), torch.tensor([0, 1, 2, 3, 0]), num_classes=4).backward()
    assert model[1].num_batches_tracked == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@given(seeds, batches)
def test_inputs_are_untouched_and_x_adv_is_a_constant(seed, batch):
    x = images(seed, batch).requires_grad_()
    y, target = soft_labels(seed, batch, 4), torch.zeros(batch, dtype=torch.int64)
    copies, versions = (x.clone(), y.clone()), (x._version, y._version)
    x_adv, y_adv = mtlat.tlat(network(4), x, y, target, 0.1)
    assert not x_adv.requires_grad and x.grad is None
    mtlat.mtlat_loss(network(4), x.detach(), y, num_classes=4)
    assert (x._version, y._version) == versions
    assert_close((x, y), copies, rtol=0, atol=0)
    assert x_adv.data_ptr() != x.data_ptr() and y_adv.data_ptr() != y.data_ptr()


# ---------------------------------------------------------------- numerics


def test_attack_loss_has_the_sign_of_cross_entropy_and_survives_confidence():
    z = torch.randn(64, 5, generator=seeded(0), dtype=torch.float64)
    one_hot = torch.eye(5, dtype=torch.float64)[torch.arange(64) % 5]
    soft = soft_labels(0, 64, 5, torch.float64)
    logits = z.requires_grad_()
    for y, exact in ((torch.arange(64) % 5, one_hot), (one_hot, one_hot), (soft, soft)):
        (gradient,) = torch.autograd.grad(mtlat.attack_loss(logits, y).sum(), logits)
        expected = z.detach().softmax(1) - exact  # cross-entropy's
        if exact is one_hot:
            expected = expected / expected[one_hot == 1, None].abs()
        assert_close(gradient, expected)
    model = network(4, norm=False)
    with torch.no_grad():
        for weight in model[4].parameters():
            weight.mul_(3000)
    x = images(0, 16)
    y = model(x).argmax(1)  # so sure of it that float32 cross-entropy has no gradient
    x.requires_grad_()
    lost = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)[0]
    assert (lost.flatten(1) == 0).all(1).sum() > 8
    for target in (y, torch.eye(4)[y]):
        x_adv = mtlat.targeted_fgsm(model, x.detach(), target, 0.1)
        assert ((x_adv - x).abs() > 0.09).float().mean() > 0.99


def test_dtypes():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = network(4).to(dtype)
        x, y = images(0, 5, torch.float64).to(dtype), torch.tensor([0, 1, 2, 3, 0])
        loss = mtlat.mtlat_loss(model, x, y, num_classes=4, generator=seeded(0))
        loss.backward()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_gives_nearly_the_same_gradient():
    gradients = []
    x, y = images(0, 32), torch.arange(32) % 4
    for enabled in (False, True):
        model = network(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = mtlat.mtlat_loss(model, x, y, num_classes=4, generator=seeded(0))
        loss.backward()
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients)


def test_a_compiled_model_gives_the_same_and_is_compiled_for_attack_and_loss_only():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network(4), backend=backend, fullgraph=True)
    x, y = images(0, 6), torch.arange(6) % 4
    plain, losses = network(4), []
    for step in range(3):
        losses.append(mtlat.mtlat_loss(compiled, x, y, num_classes=4, generator=seeded(step)))
        expected = mtlat.mtlat_loss(plain, x, y, num_classes=4, generator=seeded(step))
        assert_close(losses[-1], expected)
        losses[-1].backward()
    assert len(graphs) == 2
    torch._dynamo.reset()


# ---------------------------------------------------------------- bad input, and the file itself


def test_bad_input_names_the_value_the_rule_and_the_fix():
    x, y, model = images(0, 4), torch.tensor([0, 1, 2, 3]), network(4)
    soft = soft_labels(0, 4, 4)
    knobs = {"alpha": 0.4, "epsilon_max": 0.1}

    def loss(x=x, y=y, **options):
        return mtlat.mtlat_loss(model, x, y, **{"num_classes": 4, **options})

    cases = [
        (
            lambda: loss(x * 2 - 1),
            ValueError,
            r"pixels: -0\.\d+ to 0\.\d+; rule: \[0, 1\].*Normalize",
        ),
        (lambda: loss(x * 255), ValueError, "pixels: .* to 25"),
        (lambda: loss(x * math.nan), ValueError, "pixels: nan to nan"),
        (lambda: loss((x * 255).byte()), TypeError, r"torch\.uint8.*x\.float\(\) / 255"),
        (lambda: loss(y=y - 1), ValueError, r"class indices: -1 to 2; rule: \[0, 3\]"),
        (lambda: loss(y=y + 1), ValueError, r"class indices: 1 to 4; rule: \[0, 3\]"),
        (lambda: loss(y=y.int()), TypeError, r"torch\.int32; give int64"),
        (lambda: loss(y=torch.eye(4).long()), TypeError, r"torch\.int64; give int64"),
        (lambda: loss(y=y[:3]), ValueError, r"shape \(3,\); these images need \(4,\) or \(4, 4\)"),
        (lambda: loss(y=soft[:, :3]), ValueError, r"shape \(4, 3\)"),
        (lambda: loss(y=soft * 0.9), ValueError, "sums of label weights: 0.9 to 0.9"),
        (lambda: loss(y=soft * 4 - 0.75), ValueError, "label weights: .*not logits"),
        (lambda: loss(alpha=0), ValueError, "alpha is 0"),
        (lambda: loss(alpha=math.nan), ValueError, "alpha is nan"),
        (lambda: loss(epsilon_max=8), ValueError, r"epsilon_max is 8; it must lie in \[0, 1\]"),
        (lambda: loss(epsilon_max=-0.1), ValueError, "epsilon_max is -0.1"),
        (lambda: loss(num_classes=1), ValueError, "class indices"),
        (lambda: loss(steps=0), ValueError, "steps is 0"),
        (lambda: loss(step=2), TypeError, "step"),
        (lambda: mtlat.mixup(x, y, x, y, 0.5), ValueError, "need num_classes=N"),
        (lambda: mtlat.mixup(x, soft, x[:3], soft, 0.5), ValueError, r"images \(4, .*\(3, "),
        (lambda: mtlat.mixup(x, soft, x, soft, 1.5), ValueError, "lam: 1.5 to 1.5"),
        (lambda: mtlat.mixup(x, soft, x, soft, torch.rand(3)), ValueError, r"lam has shape \(3,\)"),
        (lambda: mtlat.tlat(model, x, soft, y, -0.1), ValueError, "epsilon: -0.1"),
        (lambda: mtlat.tlat(model, x, soft, y, torch.rand(4, 1)), ValueError, "epsilon has shape"),
        (lambda: mtlat.draw(0, 4, **knobs), ValueError, "0 images, 4 classes"),
        (lambda: mtlat.draw(4, 1, **knobs), ValueError, "4 images, 1 classes"),
        (lambda: mtlat.Normalize([0.5], [0.0]), ValueError, "every std > 0"),
        (lambda: mtlat.Normalize([0.5, 0.5], [1.0]), ValueError, "one of each per channel"),
    ]
    for call, error, pattern in cases:
        with pytest.raises(error, match=pattern):
            call()


def test_normalize():
    normalize = mtlat.Normalize([0.1, 0.2, 0.3], [0.5, 1.0, 2.0])
    x = images(0, 2)
    expected = v2.functional.normalize(x, [0.1, 0.2, 0.3], [0.5, 1.0, 2.0])
    assert_close(normalize(x), expected)
    assert set(normalize.state_dict()) == {"mean", "std"}


def test_the_file_travels_alone():
    source = Path(mtlat.__file__).read_text()
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"math", "collections", "contextlib", "typing", "torch"}
    assert set(mtlat.__all__) <= set(vars(mtlat))
