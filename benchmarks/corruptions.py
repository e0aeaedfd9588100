"""Time the fifteen ImageNet-C corruptions, and the original's beside them where it is installed.

    python benchmarks/corruptions.py --batch 32 --size 224 --repeats 5
    python benchmarks/corruptions.py --batch 256 --memory
    python benchmarks/corruptions.py --batch 256 --device cuda

One thread. On a CPU the figures are CPU time, which other work on the machine disturbs least; on a
GPU wall time with synchronisation. Ours and the original's runs alternate, setting by setting, and
medians are taken over the repeats, the means over the five severities of those. The original
(imagenet-c 0.0.3, see requirements-oracle.txt) takes one image at a time at 224 px; of its parts
only ImageMagick's motion blur is replaced, by NumPy code, so that motion blur and snow are not
measured against the real library.
"""

import argparse
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from timing import seconds
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from corruptions import CORRUPTIONS, SEVERITIES, corrupt, frost_source  # noqa: E402

NAMES = [name for name, entry in CORRUPTIONS.items() if entry.family != "paper"]


def pictures(batch: int, size: int, device: torch.device) -> Tensor:
    """Make uint8 (batch, 3, size, size) pictures of soft shapes and fine grain, eight different."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(8, 3, 12, 12, generator=generator)
    soft = F.interpolate(shapes, size=(size, size), mode="bicubic", align_corners=False)
    grain = 0.05 * torch.randn(8, 3, size, size, generator=generator)
    eight = ((soft + grain) * 255).clamp_(0, 255).byte()
    return eight.repeat(-(-batch // 8), 1, 1, 1)[:batch].to(device)


def load_original(size: int, device: torch.device) -> Any:
    """Return the runner of the original package, or None with the reason printed."""
    if device.type != "cpu" or size != 224:
        print("without the original: it runs on the CPU and at 224 px only")
        return None
    try:
        import imagenet_c_oracle as oracle
    except ImportError as error:
        print(f"without the original: {error}")
        return None
    if oracle.MISSING:
        print(f"without the original: {oracle.SKIP}")
        return None
    return oracle


def measure(
    images: Tensor, names: list[str], repeats: int, oracle: Any
) -> dict[str, tuple[float, float | None]]:
    """Return ms per image of ours and of the original (or None), mean over the severities."""
    picture = images[0].permute(1, 2, 0).cpu().numpy()
    ours: dict[tuple[str, int], list[float]] = {}
    theirs: dict[tuple[str, int], list[float]] = {}
    for repeat in range(repeats + 1):  # the first fills caches and is dropped
        for name in names:
            for severity in SEVERITIES:
                run = partial(corrupt, images, name, severity, seed=repeat)
                took = 1000 * seconds(run, images.device) / len(images)
                ours.setdefault((name, severity), []).append(took)
                if oracle is not None:
                    run = partial(oracle.original, picture, name, severity, seed=repeat)
                    took = 1000 * seconds(run, images.device)
                    theirs.setdefault((name, severity), []).append(took)

    def average(times: dict[tuple[str, int], list[float]], name: str) -> float:
        return mean(median(times[name, severity][1:]) for severity in SEVERITIES)

    return {
        name: (average(ours, name), average(theirs, name) if theirs else None) for name in names
    }


def peak_gib(name: str, batch: int, size: int, device: torch.device) -> float:
    """Run all severities once; return the peak of the process, or of the GPU's allocations."""
    torch.set_num_threads(1)
    images = pictures(batch, size, device)
    for severity in SEVERITIES:
        corrupt(images, name, severity)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_memory(names: list[str], batch: int, size: int, device: torch.device) -> None:
    """Print the peak memory of each corruption, measured in a process of its own."""
    print(f"{'corruption':<18} {'peak GiB':>9}")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in names:
            print(f"{name:<18} {pool.submit(peak_gib, name, batch, size, device).result():9.2f}")


def print_times(times: dict[str, tuple[float, float | None]]) -> None:
    """Print the table, the sum over the corruptions and the mean over all settings."""
    print(f"{'corruption':<18} {'ms/image':>9} {'images/s':>9} {'original':>9} {'ratio':>7}")
    total = sum(ours for ours, _ in times.values())
    known = [theirs for _, theirs in times.values() if theirs is not None]
    rows = dict(times)
    rows["sum"] = total, sum(known) if known else None
    rows[f"mean of {len(SEVERITIES) * len(times)}"] = (
        total / len(times),
        mean(known) if known else None,
    )
    for name, (ours, theirs) in rows.items():
        beside = "" if theirs is None else f" {theirs:9.2f} {theirs / ours:7.1f}"
        print(f"{name:<18} {ours:9.2f} {1000 / ours:9.0f}{beside}")


def main(argv: list[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="images per call (32)")
    parser.add_argument("--size", type=int, default=224, help="side in pixels (224)")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the median (5)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, ... (cpu)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "1 thread"
    print(f"torch {torch.__version__}, {args.device} ({where}), frost: {frost_source()}")
    print(f"batch {args.batch}, {args.size} x {args.size} px")
    if args.memory:
        print_memory(args.only, args.batch, args.size, args.device)
        return
    oracle = load_original(args.size, args.device)
    images = pictures(args.batch, args.size, args.device)
    print_times(measure(images, args.only, args.repeats, oracle))


if __name__ == "__main__":
    main()
