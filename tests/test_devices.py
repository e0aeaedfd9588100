"""What must hold on a GPU, seen without one: on the meta device, whose tensors have no values.

Whatever would wait for a GPU (it asks for a value) or mixes devices raises an error there. Apple's
GPUs have no float64.
"""

from contextlib import nullcontext

import pytest
import torch
from tiny import convnet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtlat
import train
from attacks import ATTACKS
from corruptions import CORRUPTIONS, blur, corrupt, geometric
from feed import Feed, ImageSet
from methods import METHODS

META = torch.device("meta")


class Everything(set):
    def __contains__(self, _):
        return True


@pytest.fixture(autouse=True)
def _later(monkeypatch):
    """Values are asked for at the first call only; this is a later one. Nor is there autocast."""
    monkeypatch.setattr(mtlat, "_asked", Everything())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


class NoFloat64(TorchDispatchMode):
    """Refuses what Apple's GPUs cannot hold, off the CPU."""

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


@pytest.mark.parametrize("flags", ["", "--channels-last --opt sgd --attack-steps 2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_asks_for_no_value(method, flags):
    argv = ["--arch", "tiny:convnet", "--device", "cpu", "-b", "8", "--method", method]
    args, _ = train.parse_args([*argv, *flags.split()])
    args.device = "mps"  # for an optimizer that is not fused
    images = ImageSet(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.zeros(40).long())
    feed, model = Feed(images, META), convnet(3).to(META)
    run = train.Run(
        args, list("abc"), "", feed, feed, model, None, train.make_optimizer(args, model),
        torch.amp.GradScaler("cpu", enabled=False), [],
    )  # fmt: skip
    totals = torch.zeros(METHODS[method].terms, device=META)
    with NoFloat64():
        batches = list(train.minibatches(run, torch.Generator()))
        assert len(batches) > 1
        for pairs, draws in batches:
            assert {tensor.device for tensor in tree_leaves((pairs, draws))} == {META}
            train.take_step(run, pairs, draws, totals)
    assert {p.grad.device for p in model.parameters()} == {META}


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("apple", [False, True])
def test_corruptions_stay_on_their_device(monkeypatch, name, apple):
    monkeypatch.setattr(torch, "equal", lambda *_: True)  # glass blur asks when its swaps are done
    if apple:
        for module in (blur, geometric):
            monkeypatch.setattr(module, "wide_float", lambda device: torch.float32)
    for side in (224, 64, 32):
        images = torch.zeros(3, 3, side, side, dtype=torch.uint8, device=META)
        with NoFloat64() if apple else nullcontext():
            out = corrupt(images, name, 3, seed=1)
        assert (out.device, out.shape, out.dtype) == (META, images.shape, images.dtype)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "cw2"])
def test_attacks_ask_for_no_value(name):
    """But CW2, which leaves out what it has reached."""
    attack, x = ATTACKS[name], torch.rand(4, 3, 8, 8, device=META)
    model = nn.Sequential(mtlat.Normalize([0.5] * 3, [0.2] * 3), convnet(3)).to(META)
    with NoFloat64():
        x_adv = attack.function(model, x, torch.zeros(4).long().to(META), **attack.keywords)
    assert (x_adv.device, x_adv.dtype, x_adv.shape) == (META, x.dtype, x.shape)
