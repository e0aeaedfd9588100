"""Time the five attacks, compare with torchattacks if installed, and count the passes of CW2.

    python benchmarks/time_attacks.py --batch 16 --size 64 --repeats 3
    python benchmarks/time_attacks.py --batch 128 --size 224 --arch resnet50 --device cuda

The benchmark uses one thread, and keeps freed memory as the scripts do. On a CPU it reports CPU
time, which other processes disturb least. On a GPU it reports wall time with synchronization. Runs
of our attacks and of torchattacks (3.5.1, see requirements-dev.txt) alternate on the same untrained
model, images and settings. The benchmark reports the medians of the repeats.

The CW attack of torchattacks has one constant and no search, so it is compared with one round of
ours. It stops when the loss of the batch rises, so the ratio compares times per forward pass.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from clock import seconds
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attacks import cw2, full_precision
from harness.benchmark.attack_registry import ATTACKS
from harness.cli import Parser, number
from harness.devices import resolve_device
from harness.errors import run_script
from harness.models import build_model

Run = Callable[[], Tensor]


def theirs(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """Return a call of the torchattacks version, with the settings of `ATTACKS[name]`.

    Args:
        name: a key of `ATTACKS`.
        model: maps images to logits.
        x: images, float32 (B, 3, H, W) in [0, 1].
        y: class indices, int64 (B,).
    """
    torchattacks: Any = importlib.import_module("torchattacks")
    keywords = ATTACKS[name].keywords
    if name == "cw2":
        attack = torchattacks.CW(model, c=1, kappa=keywords["confidence"], steps=40, lr=0.01)
        return lambda: attack(x, y)
    epsilon, steps = keywords["epsilon"], keywords["steps"]
    if name.startswith("mi"):
        attack = torchattacks.MIFGSM(model, epsilon, epsilon / steps, steps, decay=1.0)
        return lambda: attack(x, y)
    attack = torchattacks.PGD(model, epsilon, 2.5 * epsilon / steps, steps, random_start=True)
    if name.startswith("pgd_ll"):
        attack.set_mode_targeted_least_likely(quiet=True)
    return lambda: attack(x, y)


def ours(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """Return a call of our attack, with the arguments of `theirs`. CW2 runs a single round."""
    entry = ATTACKS[name]
    once: dict[str, Any] = {"rounds": 1} if name == "cw2" else {}
    return lambda: entry.function(model, x, y, **entry.keywords, **once)


def passes(work: Run, model: nn.Module, batch: int) -> float:
    """Count the forward passes per image in one call of `work` on `batch` images."""
    counts = [0]
    hook = model.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    work()
    hook.remove()
    return sum(counts) / batch


@full_precision()  # for the other package's attacks too
def main(argv: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="resnet18", help="torchvision classifier (resnet18)")
    parser.add_argument("--batch", type=number(int, 1), default=16, help="number of images (16)")
    parser.add_argument("--size", type=number(int, 1), default=64, help="side in pixels (64)")
    parser.add_argument(
        "--repeats", type=number(int, 1), default=3, help="timed runs of each attack (3)"
    )
    parser.add_argument("--device", type=resolve_device, default="cpu", help="torch device (cpu)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = build_model(args.arch, 100).eval().to(device)
    x = torch.rand(args.batch, 3, args.size, args.size).to(device)
    with torch.no_grad():
        y = model(x).argmax(1)
    rivals = [ours]
    if importlib.util.find_spec("torchattacks"):
        rivals.append(theirs)
    print(f"{args.arch}, {args.batch} images of {args.size} px, {device}; ratio: time per pass")
    print(f"{'':14}{'ours':>12}{'':>8}{'torchattacks':>20}")
    print(f"{'':14}" + f"{'ms/image':>12}{'passes':>8}" * len(rivals) + f"{'ratio':>8}")
    for name in ATTACKS:
        runs = [rival(name, model, x, y) for rival in rivals]
        counts = [passes(run, model, args.batch) for run in runs]  # this also warms up
        times = [[seconds(run, device) for run in runs] for _ in range(args.repeats)]
        middle = [1e3 * median(column) / args.batch for column in zip(*times, strict=True)]
        row = "".join(f"{ms:12.1f}{count:8.0f}" for ms, count in zip(middle, counts, strict=True))
        each = [ms / count for ms, count in zip(middle, counts, strict=True)]
        print(
            f"{name:14}{row}" + (f"{each[0] / each[1]:8.2f}" if len(each) > 1 else ""), flush=True
        )
    for confidence in (0.0, 50.0):
        search = partial(cw2, model, x[:2], y[:2], confidence=confidence)
        count = passes(search, model, 2)
        print(f"full cw2, confidence {confidence:g}: {count:.0f} passes (at most 1 + 9 x 39 = 352)")


if __name__ == "__main__":
    run_script(main, "run it again")
