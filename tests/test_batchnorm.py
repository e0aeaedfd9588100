"""Test that the training attack is Eq. 5 if BatchNorm makes images of a minibatch interact."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from harness.training.methods import METHODS
from mtlat import Draws, targeted_fgsm
from tests.support.method import soft_labels

CLASSES = 5
TOWARD = ["tlat", "mtlat", "target-fgsm", "ls"]  # attack toward the target
AWAY = ["iat", "fgsm"]  # attack away from the true label


class Recorder(nn.Module):
    """Wrap a network and record the images that it is called with."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return self.body(x)


def trained_network(x: Tensor, y: Tensor) -> nn.Module:
    """Train a network with BatchNorm until it is certain of many of these images, not of all."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES),
    ).to(x.dtype)  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[::2]), y[::2]).backward()
        optimizer.step()
    p_true = network(x).softmax(1).gather(1, y[:, None])
    assert (p_true > 0.99).float().mean() > 0.4 and (p_true < 0.9).float().mean() > 0.05
    return network


def cross_entropy_sign(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the sign of the input gradient of the summed cross-entropy, in the model's mode."""
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0].sign()


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    """Return noise images with a weak mark of their class, and the class indices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(count) % CLASSES
    x[torch.arange(count), 0, y] = (x[torch.arange(count), 0, y] + 0.4).clamp(0, 1)
    return x, y


@pytest.mark.parametrize("method", [*TOWARD, *AWAY])
def test_every_training_attack_follows_the_sum_of_cross_entropies(method):
    x, y = images()
    network = trained_network(x, y)
    one_hot = nn.functional.one_hot(y, CLASSES).double()
    orders = [torch.randperm(len(x), generator=torch.Generator().manual_seed(k)) for k in range(4)]
    couples = METHODS[method].minibatches
    pairs = [(x[order], one_hot[order]) for order in orders[:couples]]
    ones, epsilon = torch.ones(len(x)).double(), torch.full((len(x),), 0.01, dtype=torch.float64)
    draws = Draws(ones, ones, epsilon, torch.randint(CLASSES, (len(x),)))
    recorder = Recorder(network)
    recorder.train()
    assert len(list(METHODS[method].losses(recorder, pairs, draws, 1))) == 2
    _, attacked, x_adv = recorder.seen  # loss 1, attack, loss 2; both lambdas are 1
    network.train()
    if method in AWAY:
        labels = pairs[2 if method == "iat" else 1][1].argmax(1)
        expected = attacked + 0.01 * cross_entropy_sign(network, attacked, labels)
        expected = expected.clamp(0, 1) if method == "iat" else expected
    else:
        expected = attacked - 0.01 * cross_entropy_sign(network, attacked, draws.target)
    assert_close(x_adv, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_soft_and_one_hot_targets_share_a_batch(steps):
    x, y = images()
    network = trained_network(x, y)
    target = nn.functional.one_hot(y, CLASSES).double()
    target[::2] = soft_labels(0, 20, CLASSES, torch.float64)
    expected = x
    for _ in range(steps):
        step = 0.01 * min(1, 2.5 / steps) * cross_entropy_sign(network, expected, target)
        expected = (expected - step).clamp(x - 0.01, x + 0.01)
    assert_close(targeted_fgsm(network, x, target, 0.01, steps=steps), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_keeps_the_sign_as_well_as_cross_entropy_does(dtype):
    x, y = images()
    network = trained_network(x, y)
    expected = cross_entropy_sign(network, x, y)
    low, x = network.to(dtype), x.to(dtype)
    of_cross_entropy = cross_entropy_sign(low, x, y)
    of_attack = (x - targeted_fgsm(low, x, y, 0.25)).sign()
    wrong, wrong_cross_entropy = (
        (sign != expected).double().mean() for sign in (of_attack, of_cross_entropy)
    )
    assert wrong < wrong_cross_entropy + 1e-3


@pytest.mark.parametrize("scale", [1, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certainty_leaves_no_image_behind(scale, dtype):
    """Check that all images move without BatchNorm, however certain the model is of any image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).to(dtype)
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.mul_(scale).clamp_(-1000, 1000)
    x = images()[0].to(dtype)
    y = model(x).argmax(1)
    for target in (y, nn.functional.one_hot(y, CLASSES).to(dtype)):
        x_adv = targeted_fgsm(model, x, target, 0.25)
        assert ((x_adv - x).abs() > 0.1).double().mean() > 0.99
