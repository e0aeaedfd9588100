"""Test train.py: methods against NumPy, settings, options and weights."""

import json
import math
import shutil
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._inductor.exc import InductorError
from torch.testing import assert_close

import evaluate
import train
from harness import checkpoints, models
from harness.errors import UserError, run_script
from harness.reproduction.plan import RECIPES
from harness.training.config import TrainConfig, parse_train_config
from harness.training.methods import ATTACK, METHODS, Method
from mtlat import Draws, algorithm1
from tests.support.method import softmax
from tests.support.tiny import convnet, read_log, states_equal

ROOT = Path(train.__file__).parent


# ---------------------------------------------------------------- the methods


def numpy_losses(method, weight, bias, pairs, draws, classes):
    """Return the expected losses of each method for the model softmax(W x + b)."""
    lam1, lam2, epsilon = (d.numpy()[:, None] for d in draws[:3])
    target = np.eye(classes)[draws.target.numpy()]

    def loss(x, y):
        return -(y * np.log(softmax(x @ weight.T + bias))).sum(1).mean()

    def step(x, y):  # epsilon times the sign of the gradient of the loss for label y
        return epsilon * np.sign((softmax(x @ weight.T + bias) - y) @ weight)

    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = pairs
    x12, y12 = lam1 * x1 + (1 - lam1) * x2, lam1 * y1 + (1 - lam1) * y2
    x34, y34 = lam2 * x3 + (1 - lam2) * x4, lam2 * y3 + (1 - lam2) * y4
    x_iat = np.clip(x3 + step(x3, y3), 0, 1)
    swap = [1, 0, 3, 2, 5, 4, 5] if len(x1) == 7 else [1, 0, 1]
    smooth = np.where(y2 == 1, 1 - epsilon, epsilon / classes)
    return {
        "standard": [loss(x1, y1)],
        "mixup": [loss(x12, y12)],
        "tlat": [loss(x1, y1), loss(x2 - step(x2, target), (1 - epsilon) * y2 + epsilon * target)],
        "mtlat": [
            loss(x12, y12),
            loss(x34 - step(x34, target), (1 - epsilon) * y34 + epsilon * target),
        ],
        "iat": [
            loss(x12, y12) / 2,
            loss(
                lam2 * x_iat + (1 - lam2) * x_iat[swap],
                lam2 * y3 + (1 - lam2) * y3[swap],
            ) / 2,
        ],
        "fgsm": [loss(x1, y1), loss(x2 + step(x2, y2), y2)],
        "target-fgsm": [loss(x1, y1), loss(x2 - step(x2, target), y2)],
        "ls": [loss(x1, y1), loss(x2 - step(x2, target), smooth)],
    }[method]  # fmt: skip


@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("method", METHODS)
def test_method_is_the_numpy_one(method, count):
    generator = np.random.default_rng(0)
    linear = nn.Linear(6, 4, dtype=torch.float64)
    pairs = [
        (generator.uniform(size=(count, 6)), np.eye(4)[generator.integers(4, size=count)])
        for _ in range(4)
    ]
    lam1, lam2, epsilon = torch.tensor(generator.uniform(size=(3, count)))
    draws = Draws(lam1, lam2, epsilon, torch.arange(count) % 4)
    entry = METHODS[method]
    tensors = [(torch.tensor(x), torch.tensor(y)) for x, y in pairs[: entry.minibatches]]
    losses = [loss.item() for loss in entry.losses(linear, tensors, draws, 1)]
    weights = [p.detach().numpy() for p in linear.parameters()]
    assert len(losses) == entry.terms
    assert_close(losses, numpy_losses(method, *weights, pairs, draws, 4), rtol=0, atol=1e-10)
    with pytest.raises((IndexError, ValueError)):  # all minibatches are used
        list(entry.losses(linear, tensors[:-1], draws, 1))


def test_losses_one_after_the_other_have_the_gradient_of_algorithm1():
    pairs = [(torch.rand(6, 3, 12, 12), torch.eye(3).repeat(2, 1)) for _ in range(4)]
    draws = Draws(*torch.rand(3, 6), torch.tensor([0, 1, 2, 0, 1, 2]))
    gradients = []
    for sequential in (True, False):
        torch.manual_seed(0)
        model = convnet(3)
        model[5].p = 0.0
        if sequential:
            for loss in METHODS["mtlat"].losses(model, pairs, draws, 1):
                loss.backward()
        else:
            loss1, loss2 = algorithm1(model, *pairs, draws)
            (loss1 + loss2).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_close(*gradients)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(go, method, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my images"])
    first = go(method=method)
    assert first["settings"]["command"] == "train.py --data 'my images'"  # as a shell takes it
    assert len(first["log"]) == 2 and first["settings"]["method"] == method
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        ".lock", "args.json", "best.pt", "last.pt", "log.csv",
    ]  # fmt: skip
    rows = read_log(tmp_path / "out")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (rows[0]["loss2"] == "") == (METHODS[method].terms == 1)
    model = models.restore_model(first)
    assert model(torch.rand(2, 3, 12, 12)).shape == (2, 3)


# ---------------------------------------------------------------- an epoch


def test_the_log_has_the_mean_of_each_loss(go):
    """Check against the cross-entropy of all images, which an epoch of three steps sees once."""
    flags = "--arch tiny:linear --epochs 1 -b 18 --lr 1e-12 --epsilon-max 0".split()
    found = go(*flags, method="target-fgsm")
    args, _ = parse_train_config(["--resume", found["settings"]["output_dir"] + "/last.pt"])
    images, labels, _ = train.load_data(args).train
    logits = models.restore_model(found)(images / 255)
    expected = pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert [found["log"][0][name] for name in ("loss1", "loss2")] == [expected] * 2


def test_the_log_has_every_loss_of_a_method_of_your_own(go, monkeypatch, tmp_path, capsys):
    def losses(*step):
        return (weight * next(METHODS["standard"].losses(*step)) for weight in (1, 2, 4))

    monkeypatch.setitem(METHODS, "fgsm", Method(losses, 1, 3, "", ATTACK))
    go("--arch", "tiny:linear", "--epochs", "1", method="fgsm")
    (row,) = read_log(tmp_path / "out")
    assert float(row["loss3"]) == pytest.approx(4 * float(row["loss1"]))
    assert f"loss3 {float(row['loss3']):.4f}  clean accuracy" in capsys.readouterr().out


def test_the_log_has_the_speed_of_training_and_the_time_that_is_left(go, monkeypatch):
    now = 100.0

    def take(seconds, result):
        nonlocal now
        now += seconds
        return result

    def train_one_epoch(config, training, epoch):
        return take(10 + 10 * epoch, [0.5, 0.25])

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(train, "count_correct", lambda *_: take(2, 0))
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    go("--epochs", "3")
    log = go("--epochs", "5", "--resume", "auto")["log"]
    # Two losses of two steps of 13 images in 10, 20, 30, 40, 50 s.
    assert [row["images_per_second"] for row in log] == [5.2, 2.6, 1.7, 1.3, 1.0]
    # The mean epoch has taken 12 s, then 17 s, and 42 s after resuming.
    assert [row["seconds_left"] for row in log] == [24, 17, 0, 42, 0]


def test_an_epoch_may_be_shorter_than_a_tick_of_the_clock_of_windows(go, monkeypatch):
    """There, before Python 3.13, time.monotonic stands still for 16 ms."""
    clocks = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter)
    monkeypatch.setattr(train, "time", clocks)
    assert all(row["images_per_second"] > 0 for row in go()["log"])


def test_the_best_checkpoint_is_the_first_of_the_highest_accuracy(go, tmp_path, monkeypatch):
    correct = iter([1, 3, 2, 3])
    monkeypatch.setattr(train, "count_correct", lambda *_: next(correct))
    last = go("--epochs", "4")
    assert [row["clean_accuracy"] for row in last["log"]] == [1 / 3, 1, 2 / 3, 1]
    best = checkpoints.load_checkpoint(tmp_path / "out" / "best.pt")
    assert best["log"] == last["log"][:2]


def test_the_seed_draws_the_initial_weights(go):
    still = "--arch tiny:linear --epochs 1 --lr 1e-12".split()
    first, second = (go(*still, "--seed", seed, out=seed)["model"] for seed in "01")
    assert not torch.allclose(first["2.weight"], second["2.weight"], atol=1e-3)


def test_a_minibatch_may_be_the_whole_training_set(go):
    assert len(go("-b", "54")["log"]) == 2
    with pytest.raises(UserError, match="minibatches of 28, and there are 27 training images"):
        go("-b", "56", out="more")


# ---------------------------------------------------------------- settings


def test_the_defaults_are_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder without earlier runs
    args, checkpoint = parse_train_config(["--data", "somewhere"])
    assert checkpoint is None
    assert (args.method, args.arch, args.opt) == ("mtlat", "resnet50", "adam")
    assert (args.lr, args.wd, args.batch_size, args.epochs, args.size) == (
        0.002,
        1e-4,
        256,
        90,
        224,
    )
    assert (args.alpha, args.epsilon_max, args.attack_steps) == (0.4, 0.025, 1)
    rates = [args.learning_rate(epoch) for epoch in (0, 29.9, 30, 59.9, 60, 79.9, 80, 89.9)]
    assert rates == pytest.approx([2e-3] * 2 + [2e-4] * 2 + [2e-5] * 2 + [2e-6] * 2)
    assert args.minibatch_size == 128
    assert replace(args, whole_batches=True).minibatch_size == 256
    assert replace(args, method="standard").minibatch_size == 256
    assert replace(args, method="mixup").minibatch_size == 256  # draws two, and has one loss


def test_the_defaults_for_the_embedded_images_are_the_demonstrations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _ = parse_train_config([])
    demo = RECIPES["demo"]
    assert (args.data, [args.arch], args.size) == (demo["data"], demo["archs"], demo["size"])
    same = ("epochs", "batch_size", "lr")
    assert [getattr(args, name) for name in same] == [demo[name] for name in same]
    assert args.output_dir == "runs/cnn4-mtlat"
    other, _ = parse_train_config(["--arch", "resnet50"])
    assert (other.arch, other.output_dir) == ("resnet50", "runs/resnet50-mtlat")


def test_the_largest_seeds_are_those_of_32_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _ = parse_train_config(["--seed", "4294967295", "--data-seed", "4294967295"])
    assert args.seed == args.data_seed == 2**32 - 1


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_cosine_and_the_warm_up_are_torchs(tmp_path, monkeypatch, warmup):
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", "12", "--lr", "0.4", "--warmup-epochs", str(warmup)]
    args, _ = parse_train_config([*flags, "--schedule", "cosine"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * (12 - warmup))
    if warmup:
        rising = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=10 * warmup)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, schedule], [30])
    for step in range(120):
        assert args.learning_rate(step / 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    step = replace(args, schedule="step", milestones=[6])
    rates = [step.learning_rate(epoch) for epoch in (0, 3, 5.9, 6, 11.9)]
    first = 0.004 if warmup else 0.4
    assert rates == pytest.approx([first, 0.4, 0.4, 0.04, 0.04])


def test_each_step_has_the_learning_rate_of_its_place_in_the_schedule(go, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def recorded(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    go("--arch", "tiny:linear", "--schedule", "cosine", "--lr", "0.01")
    expected = [0.01 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx(expected)


def test_the_gradient_is_clipped_after_it_is_summed(go, monkeypatch):
    norms, step = [], torch.optim.SGD.step

    def recorded(self, *args, **kwargs):
        parameters = self.param_groups[0]["params"]
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    go("--opt", "sgd", "--lr", "1e-9")
    free = norms.copy()
    limit = sum(free) / len(free)  # between them
    norms.clear()
    go("--opt", "sgd", "--lr", "1e-9", "--clip-grad", str(limit), out="clipped")
    assert min(free) < limit < max(free)
    assert norms == pytest.approx([min(norm, limit) for norm in free], rel=1e-4)


@pytest.mark.parametrize(("limit", "norm"), [(1.0, 1.0), (9.0, 5.0)])
def test_the_gradient_is_clipped_without_the_factor_of_the_scaler(tmp_path, limit, norm):
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.tensor([3.0, 4.0])).sum()).backward()
    args, _ = parse_train_config(["--output-dir", str(tmp_path), "--clip-grad", str(limit)])
    training = SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler, average=None)
    train.update_weights(args, training)
    assert (model.weight - before).norm().item() == pytest.approx(norm, rel=1e-4)


def test_the_average_of_the_weights_is_tested_and_saved(go, monkeypatch):
    steps, tested, count = [], [], train.count_correct
    step = torch.optim.Adam.step

    def recorded(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        steps.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return result

    def counted(model, batches):
        tested.append([p.detach().clone() for p in model.parameters()])
        return count(model, batches)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    monkeypatch.setattr(train, "count_correct", counted)
    found, plain = go("--ema", "0.75"), go(out="plain")
    expected = steps[0]
    for weights in steps[1 : len(steps) // 2]:
        expected = [0.75 * a + 0.25 * w for a, w in zip(expected, weights, strict=True)]
    model = models.restore_model(found)  # what evaluate.py loads
    assert_close(list(model.parameters()), expected)
    assert_close(tested[1], expected)
    assert states_equal(dict(found["trained"]), dict(plain["model"])) and "trained" not in plain
    assert not torch.equal(found["model"]["1.running_mean"], found["trained"]["1.running_mean"])


def test_a_counter_named_like_a_statistic_is_not_averaged(go):
    assert go("--arch", "tiny:counting")["model"]["running_steps"] == 3


def test_a_missing_compiler_is_named(capsys):
    def fail():
        raise InductorError(RuntimeError("No working C++ compiler found"), None)

    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(fail)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --compile: ") and line.endswith("found; leave the flag out")


def test_residual_blocks_begin_as_the_identity_with_the_embedded_set_alone(tmp_path):
    def scales(*flags):
        config = parse_train_config([*flags, "--device", "cpu"])[0]
        model, _ = train.new_model(config, list("abc"))
        state = model.state_dict()
        assert all(v.eq(1).all() for k, v in state.items() if k.endswith("bn1.weight"))
        last = ("bn3.weight",) if "resnet50" in config.arch else ("bn2.weight",)
        return {v for k in state if k.endswith(last) for v in state[k].tolist()}

    path = tmp_path / "weights.pt"
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), path)
    assert scales("--arch", "resnet18") == scales("--arch", "torchvision:resnet50") == {0}
    assert scales("--arch", "resnet18", "--data", "cifar10") == {1}
    assert scales("--arch", "resnet18", "--weights", str(path)) == {1}
    assert scales("--arch", "tiny:residual") == {1}  # it may have weights of its own


CHANGES = [
    "--alpha 3", "--epsilon-max 0.5", "--eps-max 0.5", "--attack-steps 3", "--size 9",
    "--classes 2", "--arch tiny:linear", "--epochs 1", "--batch-size 12", "-b 12",
    "--whole-batches", "--opt sgd", "--opt adamw --wd 9", "--opt sgd --momentum 0.1", "--lr 0.1",
    "--wd 1", "--milestones 1", "--milestones 1 --gamma 0.5", "--seed 3", "--data-seed 3",
    "--amp bf16", "--method tlat", "--preprocess center-crop", "--mix-at input 2",
    "--augment flip-crop", "--schedule cosine", "--warmup-epochs 1", "--ema 0.5",
    "--clip-grad 0.01 --opt sgd",
]  # fmt: skip


def test_each_option_changes_the_weights(go):
    weights = {"": go()["model"]}
    for number, change in enumerate(CHANGES):
        weights[change] = go(*change.split(), out=f"out{number}")["model"]
        for earlier, other in weights.items():
            alias = {earlier, change} in ({"--batch-size 12", "-b 12"},
                                          {"--epsilon-max 0.5", "--eps-max 0.5"})  # fmt: skip
            if earlier != change:
                assert states_equal(weights[change], other) == alias, (earlier, change)


def test_options_that_change_how_but_not_what(go, tmp_path, monkeypatch, capsys):
    compile_module, compiled = nn.Module.compile, []

    def compile_without_a_compiler(module, **options):
        compiled.append(module)
        return compile_module(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_without_a_compiler)
    recipe = "--opt", "sgd", "--lr", "0.1"  # Adam would enlarge the rounding of small gradients
    plain = go(*recipe)["model"]
    quiet = {
        "--no-skip-bad-images --no-download --print-freq 1": True,
        "--deterministic": True,
        "--channels-last": False,  # different rounding
        "--compile": False,
    }
    try:
        for number, (flags, exact) in enumerate(quiet.items()):
            other = go(*recipe, *flags.split(), out=f"out{number}")["model"]
            assert states_equal(plain, other) or not exact
            assert_close(dict(plain), dict(other), rtol=0, atol=1e-4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(compiled) == 1
    assert json.loads((tmp_path / "out" / "args.json").read_text())["seed"] == 0
    printed = capsys.readouterr().out
    assert "27 training and 3 test images of 12x12" in printed
    assert "2 steps per epoch, each draws 4 x 13 images: 104 per epoch" in printed
    assert f"next: python evaluate.py {tmp_path / 'out' / 'last.pt'}" in printed


def test_help_states_the_defaults_that_depend_on_other_options(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    filled_in = [field for field in fields(TrainConfig) if field.default is None]
    silent = {field.name for field in filled_in if "(default: " not in field.metadata["help"]}
    assert silent == {"resume"}
    assert "(default: 90, the paper's; for shapes" in text and "256 + 256" in text


def test_weights_start_a_fine_tuning(go, tmp_path, monkeypatch, capsys):
    source = go()
    same = go("--weights", str(tmp_path / "out" / "last.pt"), "--lr", "1e-12", out="same")
    assert_close(same["model"]["0.weight"], source["model"]["0.weight"])
    other = go(
        "--weights", str(tmp_path / "out" / "last.pt"), "--lr", "1e-12", "--classes", "2", out="two"
    )
    assert_close(other["model"]["0.weight"], source["model"]["0.weight"])
    assert other["model"]["6.weight"].shape == (2, 24)
    assert "new: 6.bias, 6.weight" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"last.pt does not fit --arch tiny:linear with 3 classes: its 0\.bias is"
    ):
        go(
            "--weights",
            str(tmp_path / "out" / "last.pt"),
            "--arch",
            "tiny:linear",
            out="wrong",
        )

    enum = torchvision.models.SqueezeNet1_1_Weights
    state = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(enum, "get_state_dict", lambda *args, **kwargs: state)
    model, normalize = models.create_model("squeezenet1_1", list("abc"), "DEFAULT")
    assert normalize == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_close(model[1].features[0].weight, state["features.0.weight"])
    assert model[1].classifier[1].weight.shape[0] == 3
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 64)
    normalised = (x - model[0].mean) / model[0].std
    assert_close(model.eval()(x), model[1](normalised))


def test_weights_that_saw_images_held_out_now_are_named(go, folder, tmp_path, capsys):
    """Of a folder CLASS/* alone another tenth is held out where images were added."""
    go("--epochs", "1")
    go("--epochs", "1", "--classes", "2", out="two")
    shutil.copytree(folder, tmp_path / "with val" / "train")
    shutil.copytree(folder, tmp_path / "with val" / "val")
    go("--epochs", "1", "--data", str(tmp_path / "with val"), out="whole")
    for kind in folder.iterdir():
        shutil.copytree(kind, tmp_path / "others" / f"other {kind.name}")
    go("--epochs", "1", "--data", str(tmp_path / "others"), out="other classes")

    def continue_from(name, out, *flags):
        path = tmp_path / name / "last.pt"
        return go("--weights", str(path), "--epochs", "1", *flags, out=out)["settings"]

    assert not continue_from("out", "same")["seen_before"]
    assert not continue_from("out", "larger", "--size", "16")["seen_before"]  # of the same files
    assert not continue_from("two", "three")["seen_before"]  # of the same files of two classes
    assert not continue_from("other classes", "own")["seen_before"]
    assert "warning" not in capsys.readouterr().err
    evaluation = ["--only", "clean", "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"]
    evaluate.main([str(tmp_path / "out" / "last.pt"), *evaluation, "--preprocess", "center-crop",
                   "--output-dir", str(tmp_path / "cropped")])  # fmt: skip
    said = capsys.readouterr().err
    assert "out was trained with another preprocessing, or on another folder" in said
    assert "may have seen" not in said and "into test/" not in said
    assert "whole/last.pt may have been" in continue_from("whole", "b")["seen_before"]
    reseeded = continue_from("out", "reseeded", "--data-seed", "1")["seen_before"]
    assert "the tenth that is held out changes with --data-seed" in reseeded
    for kind in folder.iterdir():
        shutil.copytree(kind, folder / kind.name / "more")
    seen = continue_from("out", "more")["seen_before"]
    assert "out/last.pt may have been trained on some of the test images" in seen
    assert "two/last.pt may have been" in continue_from("two", "more of two")["seen_before"]
    assert continue_from("more", "third")["seen_before"] == seen
    (tmp_path / "out" / "last.pt").unlink()
    assert go("--resume", "auto", "--epochs", "2", out="more")["settings"]["seen_before"] == seen
    assert f"warning: {seen}" in capsys.readouterr().err
    evaluate.main([str(tmp_path / "more" / "last.pt"), *evaluation, "--output-dir",
                   str(tmp_path / "scores")])  # fmt: skip
    assert f"more: {seen}" in capsys.readouterr().err
    evaluate.main([str(tmp_path / "more" / "last.pt"), *evaluation, "--preprocess", "center-crop",
                   "--output-dir", str(tmp_path / "cropped scores")])  # fmt: skip
    assert f"same file names; {seen}" in capsys.readouterr().err


def plain_files(folder: Path, state: dict) -> dict[str, Path]:
    """Write a state dict in every form that is read."""
    wrapped = {f"module.{name}": value for name, value in state.items()}
    lightning = {f"model.{name}": value for name, value in state.items()}
    forms = {"plain.pt": state, "wrapped.pth": wrapped, "nested.pt": {"model": state, "epoch": 3},
             "both.pt": {"state_dict": wrapped}, "l.ckpt": {"state_dict": lightning}}  # fmt: skip
    for name, content in forms.items():
        torch.save(content, folder / name)
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    return {name: folder / name for name in (*forms, "old.pth")}


def test_a_plain_state_dict_starts_a_fine_tuning(go, tmp_path, monkeypatch, capsys):
    state = go()["model"]
    counted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for name, path in plain_files(tmp_path, counted).items():
        model, normalize = models.create_model("tiny:convnet", list("abc"), str(path))
        assert normalize is None
        kept = {k: v for k, v in model.state_dict().items() if k in counted}
        assert len(kept) == len(state) - 1 and states_equal(kept, dict(counted)), name
    assert "both.pt; without --mean and --std it gets pixels in [0, 1]" in capsys.readouterr().out
    torch.save({k: v for k, v in state.items() if not k.startswith("6.")}, tmp_path / "headless.pt")
    model, _ = models.create_model("tiny:convnet", list("abc"), str(tmp_path / "headless.pt"))
    assert torch.equal(model[0].weight, state["0.weight"]) and model[6].weight.shape == (3, 24)
    assert "headless.pt; new: 6.bias, 6.weight" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"plain.pt is a plain state dict: name its arch.* --arch"):
        parse_train_config(["--weights", str(tmp_path / "plain.pt")])
    tuned = go("--weights", str(tmp_path / "wrapped.pth"), "--lr", "1e-12", out="tuned")
    assert_close(tuned["model"]["0.weight"], state["0.weight"])
    tensors = tmp_path / "x.safetensors"
    tensors.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        checkpoints.load_weights(tensors)
    fake = SimpleNamespace(load_file=lambda path: state if path == tensors else None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", fake)
    assert states_equal(checkpoints.load_weights(tensors), {"model": dict(state)})
    for error, said in (
        (RuntimeError("HeaderTooLarge\nmore"), r"x\.safetensors is damaged \(HeaderTooLarge\)$"),
        (FileNotFoundError(2, "No such file"), r"x\.safetensors: No such file$"),
    ):
        fake.load_file = Mock(side_effect=error)
        with pytest.raises(UserError, match=said):
            checkpoints.load_weights(tensors)
    for content in ({}, {"epoch": 3}, [1], {"model": {"w": 1.0}}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=r"neither a checkpoint of train\.py nor a state"):
            checkpoints.load_weights(tmp_path / "other.pt")


def test_a_checkpoint_gives_its_architecture_and_its_head_to_the_same_classes(go, tmp_path, capsys):
    source, last = go(), str(tmp_path / "out" / "last.pt")
    assert parse_train_config(["--weights", last, "--output-dir", "x"])[0].arch == "tiny:convnet"
    other = ["--weights", last, "--output-dir", "x", "--arch", "resnet18"]
    assert parse_train_config(other)[0].arch == "resnet18"
    for classes, same in ((source["classes"], True), (["class0", "class1", "dog"], False)):
        state = models.create_model("tiny:convnet", classes, last)[0].state_dict()
        assert torch.equal(state["6.weight"], source["model"]["6.weight"]) == same
        assert torch.equal(state["0.weight"], source["model"]["0.weight"])
        assert ("new: 6.bias, 6.weight" in capsys.readouterr().out) == (not same)


def test_the_normalization_of_the_command_line(go, tmp_path, capsys):
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    flags = ["--mean", *map(str, mean), "--std", *map(str, std)]
    made = go(*flags, "--epochs", "1")
    assert made["normalize"] == (mean, std)
    path = str(tmp_path / "out" / "last.pt")
    model, network = models.restore_model(made).eval(), convnet(3).eval()
    network.load_state_dict({k[2:]: v for k, v in made["model"].items() if k[:2] == "1."})
    x = torch.rand(2, 3, 12, 12)
    normalized = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert_close(model(x), network(normalized))
    # A fine-tuning keeps it, unless the command line has another.
    kept = go("--weights", path, "--lr", "1e-12", "--epochs", "1", out="kept")
    assert kept["normalize"] == (mean, std)
    other = [*flags[:5], "1", "1", "1"]
    changed = go("--weights", path, *other, "--lr", "1e-12", "--epochs", "1", out="changed")
    assert changed["normalize"] == (mean, [1.0, 1.0, 1.0])
    assert_close(changed["model"]["1.0.weight"], made["model"]["1.0.weight"])
    with pytest.raises(UserError, match=r"--std is \[1.0, 1.0, 1.0\], but .* was begun with \[0.5"):
        parse_train_config(["--resume", path, *other])
    assert parse_train_config(["--resume", path])[0].std == std
    with pytest.raises(UserError, match="--mean and --std belong together"):
        parse_train_config(flags[:4])
    torch.save(convnet(3).state_dict(), tmp_path / "plain.pt")
    capsys.readouterr()
    tuned = go("--weights", str(tmp_path / "plain.pt"), *flags, "--epochs", "1", out="plain")
    assert tuned["normalize"] == (mean, std)
    assert "not normalized" not in capsys.readouterr().out


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    message = r"--weights DEFAULT: cannot download https://.*squeezenet.*\(no network\): check the"
    with pytest.raises(UserError, match=message):
        models.create_model("squeezenet1_1", list("abc"), "DEFAULT")


def test_weights_whose_file_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "whole")
    whole, message = (tmp_path / "whole").read_bytes(), "https://.* came damaged, or its file in .*"
    for content in (b"", b"<html>", whole[: len(whole) // 2], whole[:-9]):
        (tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").write_bytes(content)
        with pytest.raises(UserError, match=f"--weights DEFAULT: {message}: remove the file"):
            models.create_model("squeezenet1_1", list("abc"), "DEFAULT")
    cut = Mock(side_effect=RuntimeError('invalid hash value (expected "b8a52dc0", got "e3b0c442")'))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", cut)
    with pytest.raises(UserError, match=message):
        models.create_model("squeezenet1_1", list("abc"), "DEFAULT")


def test_a_network_with_a_complex_weight_is_trained(go):
    found = go("--arch", "tiny:waves", "--epochs", "1")
    assert found["model"]["turn"].is_complex() and not found["model"]["turn"].eq(1).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_attack_takes_the_steps_that_are_asked_for(method):
    linear, entry, calls = nn.Linear(6, 4), METHODS[method], []
    linear.register_forward_hook(lambda *_: calls.append(1))
    pairs = [(torch.rand(4, 6), torch.eye(4)) for _ in range(entry.minibatches)]
    draws = Draws(*torch.rand(3, 4), torch.arange(4))
    attacks = "attack_steps" in entry.options
    for steps in (1, 3):
        calls.clear()
        list(entry.losses(linear, pairs, draws, steps))
        assert len(calls) == entry.terms + steps * attacks


@pytest.mark.parametrize("method", METHODS)
def test_the_options_of_a_method_change_its_losses(method):
    linear, entry = nn.Linear(6, 4), METHODS[method]
    pairs = [(torch.rand(4, 6), torch.eye(4)[torch.randperm(4)]) for _ in range(entry.minibatches)]
    draws = Draws(*torch.rand(3, 4), torch.randint(4, (4,)))
    lam, epsilon = {"lam1": draws.lam1 / 2, "lam2": draws.lam2 / 2}, {"epsilon": draws.epsilon / 2}
    usual, mixed, attacked = (
        [loss.item() for loss in entry.losses(linear, pairs, draws._replace(**change), 1)]
        for change in ({}, lam, epsilon)
    )
    assert (usual != mixed) == ("alpha" in entry.options)
    assert (usual != attacked) == ("epsilon_max" in entry.options)


def test_each_minibatch_of_a_step_follows_an_order_of_its_own(go, monkeypatch):
    steps, losses_at = [], train.losses_at

    def observed(layer, method, model, pairs, *rest):
        steps.append([x for x, _ in pairs])
        return losses_at(layer, method, model, pairs, *rest)

    monkeypatch.setattr(train, "losses_at", observed)
    go()
    assert len(steps) == 4  # two in each of two epochs
    epochs = [torch.cat(x) for half in (steps[:2], steps[2:]) for x in zip(*half, strict=True)]
    for i, order in enumerate(epochs):  # of four minibatches in each epoch
        assert len(order.unique(dim=0)) == len(order) == 26
        assert not any(torch.equal(order, other) for other in epochs[:i])


@pytest.mark.parametrize(
    ("flags", "kind", "defaults"),
    [
        ("", torch.optim.Adam, {"weight_decay": 0.25, "decoupled_weight_decay": False}),
        ("--opt adamw", torch.optim.AdamW, {"weight_decay": 0.25, "decoupled_weight_decay": True}),
        ("--opt sgd", torch.optim.SGD, {"weight_decay": 0.25, "momentum": 0.9}),
    ],
)
def test_the_optimizer_is_the_one_that_is_named(tmp_path, flags, kind, defaults):
    argv = ["--output-dir", str(tmp_path), "--wd", "0.25", "--lr", "0.5", *flags.split()]
    optimizer = train.build_optimizer(parse_train_config(argv)[0], nn.Linear(2, 1))
    assert type(optimizer) is kind and optimizer.defaults["lr"] == 0.5
    assert defaults.items() <= optimizer.defaults.items()


@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_an_overflow_in_the_first_step_is_survived(folder, tmp_path, opt):
    """A fused SGD would take what was in memory as its momentum: with --deterministic, NaN."""
    argv = ["--arch", "tiny:convnet", "--data", str(folder), "--size", "12", "-b", "6", "--device",
            "cpu", "--cache-dir", str(tmp_path / "cache"), "--deterministic", "--opt", opt,
            "--output-dir", str(tmp_path / "out")]  # fmt: skip
    config = replace(parse_train_config(argv)[0], amp="fp16")  # which is refused on a CPU
    try:
        training = train.build(config, train.load_data(config), None)
        training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-95)
        train.train_one_epoch(config, training, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert training.scaler.get_scale() == 2**5
    assert all(value.isfinite().all() for value in training.model.state_dict().values())


def test_deterministic_lets_torch_refuse_what_it_cannot_repeat(go):
    go("--epochs", "1", out="usual")
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        go("--epochs", "1", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
