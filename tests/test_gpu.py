"""Test what can be tested on a GPU only."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import train
from harness import checkpoints
from harness.benchmark.attack_registry import ATTACKS
from harness.images.loader import BatchLoader, ImageSet
from harness.training.config import parse_train_config
from harness.training.methods import METHODS
from tests.support.bench import open_bench
from tests.support.tiny import image_folder, states_equal

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@pytest.mark.parametrize("flags", ["", "--amp bf16 --channels-last", "--amp fp16", "--opt sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_does_not_wait_for_the_gpu(tmp_path, monkeypatch, method, flags):
    folder = image_folder(tmp_path / "set")
    argv = ["--arch", "tiny:convnet", "--data", str(folder), "--size", "12", "--device", "cuda",
            "-b", "6", "--cache-dir", str(tmp_path / "cache"), "--method", method,
            "--output-dir", str(tmp_path / "out"), *flags.split()]  # fmt: skip
    config, _ = parse_train_config(argv)
    training = train.build(config, train.load_data(config), None)
    train.train_one_epoch(config, training, 0)  # the first step checks values and loads kernels
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    read = []

    def read_later(losses):
        read.append(losses)
        return [0.0] * len(losses)

    monkeypatch.setattr(train, "mean_losses", read_later)  # what waits on purpose
    try:
        torch.cuda.set_sync_debug_mode("error")
        train.train_one_epoch(config, training, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert read and all(losses.isfinite().all() for losses in read)
    assert not states_equal(before, training.model.state_dict())


def test_a_loader_from_pinned_memory_gives_what_is_on_the_device():
    images = ImageSet(torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40))
    whole, piecewise = (BatchLoader(images, torch.device("cuda")) for _ in range(2))
    piecewise.images, piecewise.labels = images[:2]
    orders = [torch.randperm(40)[:7] for _ in range(30)]
    for ours, theirs in zip(whole.prefetch(orders), piecewise.prefetch(orders), strict=True):
        assert ours[0].is_cuda and theirs[0].is_cuda
        assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # a hint of torch.compile's
@pytest.mark.parametrize("flags", ["", "--amp bf16 --channels-last --compile"])
def test_training_goes_as_on_the_cpu(tmp_path, flags):
    """Check that the losses agree with those on the CPU.

    All random numbers are drawn on the CPU. The model is linear, because results would diverge with
    BatchNorm.
    """
    folder, logs = image_folder(tmp_path / "set"), []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        train.main(["--arch", "tiny:linear", "--data", str(folder), "--size", "12", "-b", "6",
                    "--epochs", "3", "--cache-dir", str(tmp_path / "cache"), "--device", device,
                    "--output-dir", str(out), *flags.split()])  # fmt: skip
        log = checkpoints.load_checkpoint(out / "last.pt")["log"]
        logs.append([(row["loss1"], row["loss2"]) for row in log])
    assert_close(logs[1], logs[0], rtol=2e-2, atol=0)


def test_scores_are_those_of_the_cpu(tmp_path, tmp_path_factory, monkeypatch):
    """Check the counts, which may differ by the one or two images that rounding changes."""
    bench = open_bench(tmp_path, tmp_path_factory, monkeypatch)
    cpu, gpu = (
        {(line["label"], line["perturbation"], line["severity"]): line for line in lines}
        for lines in (
            bench.run("--device", device, *bench.surrogate, out=device)
            for device in ("cpu", "cuda")
        )
    )
    assert cpu.keys() == gpu.keys() and {name for _, name, _ in cpu} > set(ATTACKS)
    for cell, line in cpu.items():
        assert abs(gpu[cell]["correct"] - line["correct"]) <= 2, cell


@pytest.mark.parametrize("method", ["standard", "mtlat"])
def test_deterministic_trainings_have_the_same_bits(tmp_path, method):
    """Train twice in processes of their own, because cuBLAS reads its setting when it starts."""
    folder, states = image_folder(tmp_path / "set"), []
    for out in (tmp_path / "a", tmp_path / "b"):
        subprocess.run(
            [sys.executable, train.__file__, "--arch", "resnet18", "--data", folder, "--size", "32",
             "-b", "6", "--epochs", "2", "--cache-dir", tmp_path / "cache", "--method", method,
             "--device", "cuda", "--amp", "bf16", "--channels-last", "--deterministic",
             "--output-dir", out], check=True,
        )  # fmt: skip
        states.append(checkpoints.load_checkpoint(out / "last.pt")["model"])
    assert states_equal(*states)
