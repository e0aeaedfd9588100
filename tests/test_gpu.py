"""What only a GPU can show."""

import pytest
import torch
from bench import open_bench
from tiny import image_folder, states_equal
from torch.testing import assert_close

import common
import train
from attacks import ATTACKS
from feed import Feed, ImageSet
from methods import METHODS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("flags", ["", "--amp bf16 --channels-last", "--amp fp16", "--opt sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_gpu(tmp_path, method, flags):
    folder = image_folder(tmp_path / "set")
    argv = ["--arch", "tiny:convnet", "--data", str(folder), "--size", "12", "--device", "cuda",
            "-b", "6", "--cache-dir", str(tmp_path / "cache"), "--method", method,
            "--output-dir", str(tmp_path / "out"), *flags.split()]  # fmt: skip
    args, _ = train.parse_args(argv)
    run = train.prepare(args, None, train.load_images(args))
    totals = torch.zeros(METHODS[method].terms, device="cuda")
    batches = train.minibatches(run, torch.Generator().manual_seed(0))
    train.take_step(run, *next(batches), totals)  # the first one checks values and loads kernels
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            train.take_step(run, *next(batches), totals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert totals.isfinite().all() and not states_equal(before, run.model.state_dict())


def test_feed_from_pinned_memory_gives_what_is_on_the_device():
    images = ImageSet(torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40))
    whole, piecewise = (Feed(images, torch.device("cuda")) for _ in range(2))
    piecewise.images, piecewise.labels = images[:2]
    orders = [torch.randperm(40)[:7] for _ in range(30)]
    for ours, theirs in zip(whole.ahead(orders), piecewise.ahead(orders), strict=True):
        assert ours[0].is_cuda and theirs[0].is_cuda
        assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("flags", ["", "--amp bf16 --channels-last --compile"])
def test_training_goes_as_on_the_cpu(tmp_path, flags):
    """All that is drawn comes from the CPU; a linear model has no BatchNorm that would diverge."""
    folder, logs = image_folder(tmp_path / "set"), []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        train.main(["--arch", "tiny:linear", "--data", str(folder), "--size", "12", "-b", "6",
                    "--epochs", "3", "--cache-dir", str(tmp_path / "cache"), "--device", device,
                    "--output-dir", str(out), *flags.split()])  # fmt: skip
        log = common.load_checkpoint(out / "last.pt")["log"]
        logs.append([(row["loss1"], row["loss2"]) for row in log])
    assert_close(logs[1], logs[0], rtol=2e-2, atol=0)


def test_scores_are_those_of_the_cpu(tmp_path, tmp_path_factory, monkeypatch):
    """But for the image or two that rounding moves over a boundary."""
    for bench in open_bench(tmp_path, tmp_path_factory, monkeypatch):
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
