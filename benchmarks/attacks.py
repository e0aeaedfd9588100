"""Time the five attacks, torchattacks' beside them where it is installed, and count CW2's passes.

    python benchmarks/attacks.py --batch 16 --size 64 --repeats 3
    python benchmarks/attacks.py --batch 128 --size 224 --arch resnet50 --device cuda

One thread. On a CPU the figures are CPU time, which other work on the machine disturbs least; on a
GPU wall time with synchronisation. Our runs and torchattacks' (3.5.1, see requirements-oracle.txt)
alternate, on the same untrained model, images and settings, and medians are taken over the repeats.
Its CW has one constant and no search, so that it stands beside one round of ours; and it ends when
the batch's loss rises, so that the ratio is that of the times per forward pass.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from timing import seconds
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attacks import ATTACKS, cw2

Run = Callable[[], Tensor]


def theirs(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """torchattacks with the settings of ATTACKS[name]."""
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
    """ATTACKS[name]; of CW2 a single round."""
    entry = ATTACKS[name]
    once: dict[str, Any] = {"rounds": 1} if name == "cw2" else {}
    return lambda: entry.function(model, x, y, **entry.keywords, **once)


def passes(work: Run, model: nn.Module, batch: int) -> float:
    """Count the forward passes of one call, per image."""
    counts = [0]
    hook = model.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    work()
    hook.remove()
    return sum(counts) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="resnet18", help="a torchvision classifier")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = torchvision.models.get_model(args.arch, num_classes=100).eval().to(device)
    x = torch.rand(args.batch, 3, args.size, args.size).to(device)
    with torch.no_grad():
        y = model(x).argmax(1)
    rivals = [ours]
    if importlib.util.find_spec("torchattacks"):
        rivals.append(theirs)
    print(f"{args.arch}, {args.batch} images at {args.size} px, {device}; ratio: of ms per pass")
    print(f"{'':14}{'ours':>12}{'':>8}{'torchattacks':>20}")
    print(f"{'':14}" + f"{'ms/image':>12}{'passes':>8}" * len(rivals) + f"{'ratio':>8}")
    for name in ATTACKS:
        runs = [rival(name, model, x, y) for rival in rivals]
        counts = [passes(run, model, args.batch) for run in runs]  # which warms up as well
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
        print(f"cw2 in full, confidence {confidence:g}: {count:.0f} passes (a plain search: 360)")


if __name__ == "__main__":
    main()
