"""Test requirements of GPUs without a GPU, on the meta device, whose tensors have no values.

On the meta device, an operation raises an error if it needs a value, for which it would wait on a
GPU, or if it mixes devices. Another requirement is that Apple's GPUs have no float64.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtlat
import train
from corruptions import ALL_CORRUPTIONS, blur, corrupt, digital, geometric
from harness.benchmark.attack_registry import ATTACKS
from harness.images.datasets import Dataset
from harness.images.loader import BatchLoader, ImageSet
from harness.training.config import parse_train_config
from harness.training.methods import METHODS
from tests.support.tiny import convnet

META = torch.device("meta")


class Everything(set):
    def __contains__(self, _):
        return True


@pytest.fixture(autouse=True)
def _later(monkeypatch):
    """Simulate a later call, and replace autocast.

    Values are checked at the first call only. The meta device has no autocast.
    """
    monkeypatch.setattr(mtlat, "_checked", Everything())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


class NoFloat64(TorchDispatchMode):
    """Raise for float64 tensors on the meta device, because Apple's GPUs have no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, out)):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                assert leaf.dtype != torch.float64, f"{func} makes float64"
        return out


def test_the_stand_in_refuses_what_it_must():
    x = torch.rand(2, 3, device=META)
    for wrong in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x + torch.rand(2, 3)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wrong()
    with NoFloat64(), pytest.raises(AssertionError, match="float64"):
        x.double()


def test_values_off_the_cpu_are_read_until_they_were_right_once(monkeypatch):
    """Give wrong values twice, as after a mended `try`: only right ones end the checks."""
    monkeypatch.setattr(mtlat, "_checked", set())
    read = []

    class Elsewhere:
        device = META

        def __init__(self, *values):
            self.values = torch.tensor(values)

        def numel(self):
            return self.values.numel()

        def detach(self):
            read.append(self.values)
            return self.values

    def check(*values):
        mtlat.check_values("shares", Elsewhere(*values), 0, 1, "")

    for _ in range(2):
        with pytest.raises(ValueError, match="shares: 0 to 255"):
            check(0.0, 255.0)
    check(0.0, 1.0)
    check(0.0, 255.0)
    assert len(read) == 3


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_the_loss_is_on_the_device_of_the_images_wherever_numbers_are_drawn(generator, monkeypatch):
    if generator is None:  # torch 2.11 has no gamma variates on the meta device
        monkeypatch.setattr(torch, "_standard_gamma", lambda alpha, _: torch.empty_like(alpha))
    model, x, y = convnet(3).to(META), torch.rand(8, 3, 8, 8, device=META), torch.zeros(8).long()
    draws = mtlat.draw(8, 3, alpha=0.4, epsilon_max=0.1, generator=generator, device=META)
    assert {drawn.device for drawn in draws} == {META}
    state = generator and generator.get_state()
    with NoFloat64():
        loss = mtlat.mtlat_loss(model, x, y.to(META), num_classes=3, generator=generator)
        loss.backward()
    assert loss.device == META
    assert generator is None or not torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("flags", ["", "--channels-last --opt sgd --attack-steps 2"])
@pytest.mark.parametrize("method", [*METHODS, "mtlat --mix-at 2 --augment flip-crop --clip-grad 1"])
def test_an_epoch_asks_for_no_value_but_the_losses_that_are_printed(monkeypatch, method, flags):
    argv = ["--arch", "tiny:convnet", "--device", "cpu", "-b", "8", "--method", *method.split()]
    if "attack_steps" not in METHODS[method.split()[0]].options:
        flags = flags.replace("--attack-steps 2", "")
    config = parse_train_config([*argv, *flags.split()])[0]
    config = replace(config, device="mps")  # without fused Adam
    images = ImageSet(torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.zeros(16).long())
    loader, model = BatchLoader(images, META), convnet(3).to(META)
    training = train.Training(
        Dataset(images, images, list("abc"), [], "", "", ""), loader, loader, model, None,
        train.build_optimizer(config, model), torch.amp.GradScaler("cpu", enabled=False), [],
    )  # fmt: skip
    read = []

    def reading(losses):
        read.append(losses)
        return [0.0] * len(losses)

    monkeypatch.setattr(train, "mean_losses", reading)
    with NoFloat64():
        train.train_one_epoch(config, training, 0)
    steps = 16 // config.minibatch_size
    assert steps > 1 and len(read) == -(-steps // config.print_freq)
    assert {tensor.device for tensor in read} == {META}
    assert {p.grad.device for p in model.parameters()} == {META}


@pytest.mark.parametrize("name", ALL_CORRUPTIONS)
@pytest.mark.parametrize("apple", [False, True])
def test_corruptions_stay_on_their_device(monkeypatch, name, apple):
    monkeypatch.setattr(torch, "equal", lambda *_: True)  # glass blur asks whether it is done
    if apple:
        for module in (blur, digital, geometric):
            monkeypatch.setattr(module, "wide_float", lambda device: torch.float32)
    for side in (224, 64, 32):
        images = torch.zeros(3, 3, side, side, dtype=torch.uint8, device=META)
        with NoFloat64() if apple else nullcontext():
            out = corrupt(images, name, 3, seed=1)
        assert (out.device, out.shape, out.dtype) == (META, images.shape, images.dtype)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "cw2"])
def test_attacks_ask_for_no_value(name):
    """Check all attacks but CW2, which needs values to drop the images that it has reached."""
    attack, x = ATTACKS[name], torch.rand(4, 3, 8, 8, device=META)
    model = nn.Sequential(mtlat.Normalize([0.5] * 3, [0.2] * 3), convnet(3)).to(META)
    with NoFloat64():
        x_adv = attack.function(model, x, torch.zeros(4).long().to(META), **attack.keywords)
    assert (x_adv.device, x_adv.dtype, x_adv.shape) == (META, x.dtype, x.shape)
