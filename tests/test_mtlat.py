"""Test the method against an independent NumPy reference, and check the invariants of the paper.

Hypothesis draws every argument of these tests, so that test_mutations.py can run the whole file on
a faulty copy of mtlat.py.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torchvision.transforms import v2

import mtlat
from tests.support.method import batches, images, network, seeded, seeds, soft_labels, softmax


def some_draws(seed: int, batch: int, classes: int, epsilon_max: float = 0.3) -> mtlat.Draws:
    return mtlat.draw(
        batch, classes, alpha=0.4, epsilon_max=epsilon_max, generator=seeded(seed + 2)
    )


# ---------------------------------------------------------------- Algorithm 1 in NumPy, float64


def numpy_algorithm1(weight, bias, couples, lam1, lam2, epsilon, target):
    """Compute Algorithm 1 for the model softmax(W x + b), whose gradients have closed forms.

    With p = softmax(W x + b), the gradient of the cross-entropy with respect to x is (p - y) W.
    With respect to W and b, it is the mean over the batch of (p - y) x and of p - y.
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
    loss1, loss2 = mtlat.algorithm1(linear, *pairs, draws)
    (loss1 + loss2).backward()
    parameters = [p.detach().numpy() for p in linear.parameters()]
    expected, weight, bias = numpy_algorithm1(*parameters, couples, lam1, lam2, epsilon, one_hot)
    exact = {"rtol": 0, "atol": 1e-10}
    assert_close([loss1.item(), loss2.item()], expected, **exact)
    assert_close(linear.weight.grad, torch.tensor(weight), **exact)
    assert_close(linear.bias.grad, torch.tensor(bias), **exact)


def test_mtlat_loss_takes_the_four_couples_from_the_minibatch():
    """Check how images are mixed, with one-hot images that show the weights of the mix.

    The labels are equal to the images, so that y_mix equals x_mix.
    """
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
    one_hot = torch.eye(5)
    mixed = mtlat.mixup(x, one_hot, x.roll(1, 0), one_hot.roll(1, 0), lam)
    assert_close(mixed, (other_x, other_y))


# ---------------------------------------------------------------- invariants


@given(seeds, batches, st.integers(2, 5))
def test_soft_labels_are_distributions(seed, batch, classes):
    x, draws = images(seed, batch), some_draws(seed, batch, classes, epsilon_max=1.0)
    hard = torch.randint(classes, (batch,), generator=seeded(seed))
    for y in (torch.eye(classes)[hard], soft_labels(seed, batch, classes)):
        _, y_mix = mtlat.mixup(x, y, x, y.flip(0), draws.lam1)
        y_adv = mtlat.target_labels(y, draws.target, draws.epsilon)
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
    assert (moved <= draws.epsilon + 1e-6).all()  # 1e-6 allows for float32 rounding
    assert (moved > 0.9 * draws.epsilon).all() or clip
    assert not clip or (0 <= x_adv.min() and x_adv.max() <= 1)
    assert x_adv.dtype == x.dtype and not x_adv.requires_grad


@given(seeds, st.integers(1, 5))
def test_steps_go_to_the_corner_of_the_ball_for_a_linear_model(seed, steps):
    """Check the attack on a model of two classes with the logits W x.

    The direction toward class t is the sign of W_t - W_other for every x.
    """
    linear = nn.Linear(12, 2).double()
    x = torch.rand(4, 12, generator=seeded(seed), dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0])
    towards = (linear.weight[target] - linear.weight[1 - target]).sign().detach()
    for sign, away in ((1, False), (-1, True)):
        x_adv = mtlat.targeted_fgsm(linear, x, target, 0.1, steps=steps, away=away)
        assert_close(x_adv, x + sign * 0.1 * towards, rtol=0, atol=1e-12)


def test_all_steps_together_are_two_and_a_half_epsilon():
    x, iterates = torch.full((1, 4), 0.5, dtype=torch.float64), []

    def model(x):
        iterates.append((x - 0.5).abs().amax().item())
        return torch.stack([x.sum(1), -x.sum(1)], 1)

    mtlat.targeted_fgsm(model, x, torch.tensor([0]), 0.1, steps=5)
    assert_close(iterates, [0.0, 0.05, 0.1, 0.1, 0.1])


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
    assert_close(mtlat.targeted_fgsm(network(3), x, target, 0.0), x, rtol=0, atol=0)
    assert_close(mtlat.target_labels(y, target, 0.0), y, rtol=0, atol=0)
    assert_close(mtlat.target_labels(y, target, 1.0), torch.eye(3)[target])


@given(seeds)
def test_batch_is_one_by_one(seed):
    """Check that the losses of a batch are the means of the losses of single images.

    The images of a batch must not affect each other in the model.
    """
    model, n = network(4, norm=False).double(), 5
    pairs = [
        (images(seed + k, n, torch.float64), soft_labels(seed + k, n, 4, torch.float64))
        for k in range(4)
    ]
    draws = some_draws(seed, n, 4)
    together = torch.stack(list(mtlat.algorithm1(model, *pairs, draws)))
    single = [
        torch.stack(
            list(
                mtlat.algorithm1(
                    model,
                    *((x[i : i + 1], y[i : i + 1]) for x, y in pairs),
                    mtlat.Draws(*(d[i : i + 1] for d in draws)),
                )
            )
        )
        for i in range(n)
    ]
    assert_close(together, torch.stack(single).mean(0))


def test_class_indices_are_one_hot_distributions():
    model, n, x = network(4), 5, images(0, 5)
    y = torch.randint(4, (n,), generator=seeded(0))
    statistics = model[1].running_mean.clone()
    indices, wide = (
        mtlat.mtlat_loss(model, x, labels, num_classes=4, generator=seeded(1))
        for labels in (y, torch.eye(4)[y])
    )
    assert_close(indices, wide, rtol=0, atol=0)
    assert not torch.equal(statistics, model[1].running_mean)
    draws = some_draws(0, n, 4)
    for attack in (
        lambda t: mtlat.targeted_fgsm(model, x, t, 0.1),
        lambda t: mtlat.target_labels(soft_labels(0, n, 4), t, 0.1),
    ):
        assert_close(attack(torch.eye(4)[draws.target]), attack(draws.target), rtol=0, atol=0)


def test_loss1_is_finished_before_loss2_begins():
    """Check the order of the forward passes.

    A training step can then free the activations of the first minibatch before the second starts.
    """
    calls = []

    def model(x):
        calls.append(len(x))
        return x.flatten(1)[:, :3]

    pairs = [(images(k, 2), torch.eye(3)[:2]) for k in range(4)]
    losses = mtlat.algorithm1(model, *pairs, some_draws(0, 2, 3))
    assert calls == []
    next(losses)
    assert calls == [2]
    next(losses)
    assert calls == [2, 2, 2]


# ---------------------------------------------------------------- random draws


def test_lambda_follows_beta():
    """Check lambda by a Kolmogorov-Smirnov test on the range that float32 resolves.

    Float32 rounds values within 6e-8 of 1.
    """
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


def test_lambda_is_a_share_for_every_alpha_that_is_accepted():
    for alpha, where in ((1e-30, [0, 1]), (1e30, [0.5])):  # the limits of Beta(alpha, alpha)
        draws = mtlat.draw(1000, 3, alpha=alpha, epsilon_max=0.1, generator=seeded(0))
        for lam in (draws.lam1, draws.lam2):
            assert_close(lam.unique(), torch.tensor(where, dtype=torch.float32))
    for alpha in (9e-31, 1.05e30, math.inf):
        with pytest.raises(ValueError, match=r"alpha is .*in \[1e-30, 1e30\]"):
            mtlat.draw(1000, 3, alpha=alpha, epsilon_max=0.1)


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
