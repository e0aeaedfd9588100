"""Test that the benchmarks run, and that their counts agree with the work that is done."""

import sys
from pathlib import Path
from types import ModuleType

import make_tables
import pytest
import sweep_gratings
import time_attacks
import time_corruptions
import time_loading
import time_step
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from harness.errors import UserError
from tests.faults import run


class Operations(TorchDispatchMode):
    """Sum the operations of all multiplications that run, as given by PyTorch's table."""

    total = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        if count := flop_registry.get(call.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def parse(*flags: str) -> object:
    return time_step.build_parser().parse_args(
        ["--batch", "2", "--size", "8", "--classes", "5", *flags]
    )


@pytest.mark.parametrize("name", time_step.TRAININGS)
def test_a_step_does_the_arithmetic_that_is_counted_and_no_more(name: str) -> None:
    """Check the count with PyTorch's own count. The first layer has a small share of it here."""
    middle = [layer for _ in range(6) for layer in (nn.Conv2d(48, 48, 3, padding=1), nn.ReLU())]
    ends = nn.Conv2d(3, 48, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(ends[0], *middle, ends[1], nn.Linear(48, 5))
    args = parse()
    forward = 2 * 64 * 6 * 48 * 48 * 9 * 2  # six layers, two images
    with Operations() as operations:
        time_step.make_step(args, name, model)()
    passes = operations.total / forward
    assert time_step.counted_passes(name) == pytest.approx(passes, rel=0.01)


def test_kept_memory_is_that_of_the_largest_backward_pass() -> None:
    """Check the memory that autograd keeps for two Linear layers with a ReLU between them.

    The layers keep their inputs. The ReLU keeps its output, which is the input of the second layer.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 5))
    images, hidden, logits = 2 * 192, 2 * 40, 2 * 5
    least = 4 * (images + hidden)
    kept = {
        name: time_step.kept_bytes(time_step.make_step(parse(), name, model), model)
        for name in ("standard", "mtlat", "mtlat joined")
    }
    # The loss also keeps labels, log-probabilities and scalars.
    assert least < kept["standard"] <= least + 4 * (4 * logits + 16)
    assert kept["mtlat"] == pytest.approx(kept["standard"], abs=4 * 4 * logits)
    assert kept["mtlat joined"] == pytest.approx(2 * kept["standard"], abs=4 * 8 * logits)


def test_step_prints_each_method_beside_the_plain_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = {"standard": 3.0, "mtlat": 8.5}
    order: list[float] = []
    make = time_step.make_step

    def make_timed(args: object, name: str, model: nn.Module) -> object:
        work = make(args, name, model)
        work.seconds = ticks[name]
        return work

    def clock(work: object, *_: object) -> float:
        order.append(work.seconds)
        return work.seconds

    monkeypatch.setattr(time_step, "make_step", make_timed)
    monkeypatch.setattr(time_step, "seconds", clock)
    flags = "--arch squeezenet1_1 --size 32 --batch 2 --only mtlat --repeats 2"
    time_step.main(flags.split())
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert order == [3.0, 8.5] * 4
    assert rows["standard"][:5] == ["3000.0", "0.7", "1.00", "1.00", "1.00"]
    assert rows["mtlat"][:5] == ["8500.0", "0.5", "2.83", "2.67", "1.06"]
    assert torch.tensor(float(rows["mtlat"][5])) > 0


@pytest.mark.parametrize(
    "flags", ["--images 40 --batch 4 --epochs 1", "--larger 0.0005 --batch 16"]
)
def test_loading_is_timed(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    time_loading.main(["--size", "32", *flags.split()])
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["mtlat", "fgsm"])  # of Table 1, and of Table 3 alone
def test_the_sweep_trains_every_network_but_the_surrogate(method: str) -> None:
    tasks = sweep_gratings.plan_trainings(["--methods", method, "--output-dir", "out"])
    assert [task.folder.name for task in tasks] == ["cnn4-standard-seed0", f"cnn4-{method}-seed0"]


def test_the_sweep_says_that_a_script_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text("import os, sys; sys.argv[1:] or os.kill(os.getpid(), 9)")
    monkeypatch.setattr(sweep_gratings, "ROOT", tmp_path)
    sweep_gratings.run("train.py", "--ends")
    with pytest.raises(UserError, match=r"^signal 9 has killed train\.py: "):
        sweep_gratings.run("train.py")


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (time_step, "--batch 0", "--batch: 0"),
        (time_step, "--arch resnet", "--arch resnet: "),
        (time_step, "--device no", "--device no: "),
        (time_attacks, "--repeats 0", "--repeats: 0"),
        (time_attacks, "--arch resnet", "--arch resnet: "),
        (time_corruptions, "--size 15", "--size: 15"),
        (time_corruptions, "--device no", "--device no: "),
        (time_loading, "--larger nan", "--larger: nan"),
    ],
)
def test_nonsense_is_refused_in_one_line(script: ModuleType, flags: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"\A[^\n]*{named}[^\n]*\Z"):
        script.main(flags.split())


@pytest.mark.parametrize("script", [make_tables, sweep_gratings, run])
def test_help_prints_the_commands_on_lines_of_their_own(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        script.main()
    commands = [line for line in script.__doc__.splitlines() if line.startswith("    python ")]
    assert commands and set(commands) <= set(capsys.readouterr().out.splitlines())
