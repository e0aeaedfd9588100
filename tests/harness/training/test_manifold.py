"""Test Manifold Mixup: Algorithm 1 at the input, a NumPy reference behind it, and train.py."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import train
from harness.checkpoints import load_checkpoint
from harness.errors import UserError
from harness.training.config import parse_train_config
from harness.training.manifold import check_mix_at, draw_layer, losses_at, mixed_logits
from harness.training.methods import METHODS
from mtlat import Draws, algorithm1
from tests.support.method import images, network, seeded, soft_labels, softmax
from tests.support.tiny import Wrapped, convnet, states_equal

N = 4


def made(count: int = 6, *, shape: tuple[int, ...] = (3, 8, 8)) -> tuple[list[Any], Draws]:
    """Return four minibatches and the draws of a step, in float64."""
    pairs = [
        (torch.rand(count, *shape, generator=seeded(k), dtype=torch.float64),
         soft_labels(k, count, N, torch.float64)) for k in range(4)
    ]  # fmt: skip
    lam1, lam2, epsilon = torch.rand(3, count, generator=seeded(9), dtype=torch.float64)
    return pairs, Draws(lam1, lam2, 0.1 * epsilon, torch.arange(count) % N)


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("steps", [1, 3])
def test_the_generic_path_at_the_input_is_algorithm_1(steps: int) -> None:
    pairs, draws = made()
    found = []
    for generic in (True, False):
        model = nn.Sequential(nn.Identity(), *network(N)).double()  # the outputs of "0" are images
        if generic:
            losses = losses_at("0", METHODS["mtlat"], model, pairs, draws, steps)
        else:
            losses = algorithm1(model, *pairs, draws, steps=steps)
        loss1, loss2 = losses
        (loss1 + loss2).backward()
        found.append((loss1, loss2, [p.grad for p in model.parameters()], model.state_dict()))
    assert_close(*found, rtol=0, atol=1e-12)
    assert found[0][3]["2.num_batches_tracked"] == 2


@pytest.mark.parametrize("name", METHODS)
def test_at_the_input_the_losses_are_those_of_the_method_and_no_more(name: str) -> None:
    pairs, draws = made()
    method, model = METHODS[name], network(N).double()
    given = method, model, pairs[: method.minibatches], draws, 1
    expected = list(method.losses(*given[1:]))
    assert len(expected) == method.terms
    assert_close(list(losses_at("input", *given)), expected, rtol=0, atol=0)


def numpy_losses(
    weights: list[np.ndarray], pairs: list[Any], draws: Draws
) -> tuple[list[float], list[np.ndarray]]:
    """Return both losses, and the gradients of their sum, of W2 (lam h3 + (1 - lam) h4) + b2.

    The hidden representations are h = tanh(W1 x + b1).
    """
    w1, b1, w2, b2 = weights
    lam1, lam2, epsilon = (d.numpy()[:, None] for d in draws[:3])
    target = np.eye(N)[draws.target.numpy()]

    def forward(xa: np.ndarray, xb: np.ndarray, lam: np.ndarray) -> tuple[np.ndarray, ...]:
        ha, hb = np.tanh(xa @ w1.T + b1), np.tanh(xb @ w1.T + b1)
        mixed = lam * ha + (1 - lam) * hb
        return ha, hb, mixed, softmax(mixed @ w2.T + b2)

    def hidden(xa: np.ndarray, xb: np.ndarray, y: np.ndarray, lam: np.ndarray) -> Any:
        """Return the gradients of each image's loss to the inputs of both tanh."""
        ha, hb, _, p = forward(xa, xb, lam)
        back = (p - y) @ w2
        return lam * back * (1 - ha**2), (1 - lam) * back * (1 - hb**2)

    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = ((x.numpy(), y.numpy()) for x, y in pairs)
    da, db = hidden(x3, x4, target, lam2)
    delta = -epsilon * np.sign(da @ w1 + db @ w1)
    y = (1 - epsilon) * (lam2 * y3 + (1 - lam2) * y4) + epsilon * target
    losses, gradients = [], [np.zeros_like(w) for w in weights]
    for xa, xb, label, lam in (
        (x1, x2, lam1 * y1 + (1 - lam1) * y2, lam1),
        (x3 + delta, x4 + delta, y, lam2),
    ):
        _, _, mixed, p = forward(xa, xb, lam)
        losses.append(-(label * np.log(p)).sum(1).mean())
        da, db = hidden(xa, xb, label, lam)
        parts = da.T @ xa + db.T @ xb, (da + db).sum(0), (p - label).T @ mixed, (p - label).sum(0)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient += part / len(xa)
    return losses, gradients


def test_mixing_behind_a_hidden_layer_is_the_numpy_one() -> None:
    pairs, draws = made(7, shape=(5,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, N)).double()
    losses = list(losses_at("1", METHODS["mtlat"], model, pairs, draws, 1))
    sum(losses).backward()
    weights = [p.detach().numpy() for p in model.parameters()]
    expected, gradients = numpy_losses(weights, pairs, draws)
    assert_close([loss.item() for loss in losses], expected, rtol=0, atol=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert_close(parameter.grad.numpy(), gradient, rtol=0, atol=1e-12)
    (alone,) = losses_at("1", METHODS["mixup"], model, pairs[:2], draws, 1)
    assert alone.item() == pytest.approx(expected[0], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mix_keeps_the_dtype_of_the_representations_and_the_weights_of_the_labels(
    dtype: torch.dtype,
) -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Identity(), nn.Flatten())
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    x1, x2, lam = torch.zeros(3, 8).to(dtype), torch.ones(3, 8).to(dtype), torch.tensor([0.3, 0, 1])
    mixed_logits(model, "0", x1, x2, lam)
    assert_close(seen[0], (1 - lam)[:, None].expand(3, 8).to(dtype), rtol=0, atol=0)
    assert not model[0]._forward_hooks


# ---------------------------------------------------------------- the draws


def test_one_name_draws_nothing_and_several_are_drawn_equally() -> None:
    generator = seeded(3)
    before = generator.get_state()
    assert draw_layer(["a"], generator) == "a"
    assert torch.equal(generator.get_state(), before)
    drawn = [draw_layer(["a", "b", "c"], generator) for _ in range(300)]
    assert all(70 < drawn.count(name) < 130 for name in "abc")


# ---------------------------------------------------------------- models that cannot


class Odd(nn.Module):
    """A network with submodules at which representations cannot be mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.twice, self.flat = nn.Identity(), nn.ReLU(), nn.Flatten(0)
        self.recurrent, self.block = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, N)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.recurrent(x.mean((2, 3), keepdim=True).expand(-1, 3, 2, 2).flatten(2))
        hidden = self.flat(self.twice(self.norm(hidden[:, -1]))).view(-1, 8)
        return self.head(self.twice(hidden + self.block(hidden)))


@pytest.mark.parametrize(("name", "message"), [
    ("unuse", "unuse: no such submodule; close names: input, unused"),
    ("zzz", "zzz: no such submodule; close names: input, unused, twice, flat"),
    ("unused", "unused: a forward pass does not call it: name another submodule"),
    ("twice", "twice: a forward pass calls it more than once"),
    ("recurrent", "recurrent: its output for 10 images is tuple, and must be one tensor"),
    ("flat", r"flat: its output for 10 images is \(80,\), and must be one tensor with the batch"),
    ("block", "block: mixing there halves the batch, and the model then fails"),
])  # fmt: skip
def test_a_submodule_that_cannot_mix_is_refused(name: str, message: str) -> None:
    torch.manual_seed(0)
    model = Odd()
    check_mix_at(["input", "head"], model, images(0, 5), N)
    with pytest.raises(UserError, match=f"^--mix-at {message}"):
        check_mix_at(["input", name], model, images(0, 5), N)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.norm.num_batches_tracked == 0
    with pytest.raises(UserError, match="--mix-at block: mixing there"):  # 2 and 1 broadcast
        check_mix_at(["block"], model.eval(), images(0, 1), N)


def test_a_network_may_return_its_logits_first_in_a_tuple() -> None:
    model = Wrapped(convnet(N), lambda logits: (logits, None))
    check_mix_at(["network.1"], model, torch.rand(4, 3, 8, 8), N)


class Widened(nn.Module):
    """A network whose shortcut gets twice as wide if the batch of the block is halved."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(x)
        return torch.cat([hidden, x.view(len(hidden), -1)], 1)


def test_a_submodule_that_changes_the_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--mix-at block: mixing there"):
        check_mix_at(["block"], Widened(), torch.rand(5, 2), N)


class Large(nn.Linear):
    """A layer for which the memory is full at six inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_full_memory_is_not_taken_for_a_wrong_submodule() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        check_mix_at(["0"], nn.Sequential(Large(2, N)), torch.rand(5, 2), N)


# ---------------------------------------------------------------- train.py


def test_trainings_mix_where_they_are_told(go: Any) -> None:
    go = partial(go, "--batch-size", "12")  # four steps, so that each place is drawn
    plain = go(out="plain")
    assert plain["settings"]["mix_at"] == ["input"]
    places = {"input": ["input"], "0": ["0"], "0 2": ["0", "2"], "input 2": ["input", "2"]}
    found = {"plain": plain} | {k: go("--mix-at", *v, out=k) for k, v in places.items()}
    assert states_equal(found.pop("input")["model"], plain["model"])
    weights = [checkpoint["model"]["0.weight"] for checkpoint in found.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    for flags in ("--amp bf16 --channels-last --attack-steps 2", "--method mixup"):
        model = go("--mix-at", "input", "1", *flags.split(), out=flags)["model"]
        assert all(value.isfinite().all() for value in model.values())


def test_a_resumed_run_mixes_on(go: Any, tmp_path: Path, monkeypatch: Any) -> None:
    mix = ["--batch-size", "12", "--mix-at", "input", "1", "2"]
    straight = go(*mix, out="straight")
    train_one_epoch = train.train_one_epoch

    def stop(config: Any, training: Any, epoch: int) -> Any:
        if epoch:
            raise KeyboardInterrupt
        return train_one_epoch(config, training, epoch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_one_epoch", stop)
        go(*mix)
    last = str(tmp_path / "out" / "last.pt")
    with pytest.raises(UserError, match=r"--mix-at is \['1'\], but .* was begun with \['input'"):
        parse_train_config(["--resume", last, "--mix-at", "1"])
    train.main(["--resume", last, *mix])
    resumed = load_checkpoint(last)
    assert states_equal(resumed["model"], straight["model"])
    assert states_equal(resumed["optimizer"], straight["optimizer"])


def test_what_cannot_be_combined_is_refused(go: Any, tmp_path: Path) -> None:
    new = ["--output-dir", str(tmp_path / "new")]
    for flags, message in (
        (["--method", "tlat"], "method that mixes before it attacks, not tlat: choose mixup or mt"),
        (["--method", "iat"], "not iat"),
        (["--compile"], "--mix-at does not work with --compile"),
    ):
        with pytest.raises(UserError, match=message):
            parse_train_config([*new, "--mix-at", "input", "layer1", *flags])
        parse_train_config([*new, "--mix-at", "input", *flags])
    with pytest.raises(UserError, match=r"--mix-at layer1: no such submodule; close names: input"):
        go("--mix-at", "layer1")


def test_resnets_mix_at_their_layers_and_not_inside_of_a_shortcut() -> None:
    model, x = train.create_model("resnet18", list("abcd"), None)[0], torch.rand(2, 3, 32, 32)
    check_mix_at(["input", "conv1", "layer1", "layer2.0", "avgpool", "fc"], model, x, N)
    with pytest.raises(UserError, match=r"--mix-at layer1\.0\.conv1: mixing there"):
        check_mix_at(["layer1.0.conv1"], model, x, N)
