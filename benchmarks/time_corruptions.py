"""Time the fifteen ImageNet-C corruptions, and compare with the original if it is installed.

    python benchmarks/time_corruptions.py --batch 32 --size 224 --repeats 5
    python benchmarks/time_corruptions.py --batch 256 --memory
    python benchmarks/time_corruptions.py --batch 256 --device cuda

The benchmark uses one thread. On a CPU it reports CPU time, which other processes disturb least. On
a GPU it reports wall time with synchronization. Runs of ours and of the original alternate for each
setting. The benchmark takes the median of the repeats, then the mean over the five severities.

The original (imagenet-c 0.0.3, see requirements-dev.txt) takes one image of 224 px at a time. NumPy
code replaces its ImageMagick motion blur, so motion blur and snow are not compared with the real
library. No other part is replaced.
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
from clock import seconds
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from corruptions import CORRUPTIONS, SEVERITIES, corrupt, frost_source  # noqa: E402

NAMES = [name for name, entry in CORRUPTIONS.items() if entry.family != "paper"]


def pictures(batch: int, size: int, device: torch.device) -> Tensor:
    """Generate uint8 (batch, 3, size, size) images of soft shapes and noise, repeating eight."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(8, 3, 12, 12, generator=generator)
    soft = F.interpolate(shapes, size=(size, size), mode="bicubic", align_corners=False)
    grain = 0.05 * torch.randn(8, 3, size, size, generator=generator)
    eight = ((soft + grain) * 255).clamp_(0, 255).byte()
    return eight.repeat(-(-batch // 8), 1, 1, 1)[:batch].to(device)


def load_original(size: int, device: torch.device) -> Any:
    """Return the module that runs the original package. Print the reason if there is none."""
    if device.type != "cpu" or size != 224:
        print("the original is not timed: it needs --device cpu and --size 224")
        return None
    try:
        import imagenet_c_oracle as oracle
    except ImportError as error:
        print(f"the original is not timed: {error}")
        return None
    if oracle.MISSING:
        print(f"the original is not timed: {oracle.SKIP}")
        return None
    return oracle


def measure(
    images: Tensor, names: list[str], repeats: int, oracle: Any
) -> dict[str, tuple[float, float | None]]:
    """Time the corruptions, averaged over the severities.

    Args:
        images: uint8 (B, 3, H, W). The original takes only the first one.
        names: names of the corruptions.
        repeats: number of timed runs per setting.
        oracle: as returned by `load_original`.

    Returns:
        For each name, ms per image of ours and of the original, or None without the original.
    """
    picture = images[0].permute(1, 2, 0).cpu().numpy()
    ours: dict[tuple[str, int], list[float]] = {}
    theirs: dict[tuple[str, int], list[float]] = {}
    for repeat in range(repeats + 1):  # the first one warms up and is dropped
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
    """Run a corruption at all severities and measure the peak memory in GiB.

    On CUDA this is the peak of the allocator, elsewhere the peak of the process.
    """
    torch.set_num_threads(1)
    images = pictures(batch, size, device)
    for severity in SEVERITIES:
        corrupt(images, name, severity)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_memory(names: list[str], batch: int, size: int, device: torch.device) -> None:
    """Print the peak memory of each corruption, measured in a separate process."""
    print(f"{'corruption':<18} {'peak GiB':>9}")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in names:
            print(f"{name:<18} {pool.submit(peak_gib, name, batch, size, device).result():9.2f}")


def print_times(times: dict[str, tuple[float, float | None]]) -> None:
    """Print a row per corruption, the sum over corruptions and the mean over all settings."""
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
    """Run the benchmark from the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="images per call (32)")
    parser.add_argument("--size", type=int, default=224, help="side in pixels (224)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per setting (5)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="torch device (cpu)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="NAME",
        help="corruptions to time (all 15)",
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory, not times")
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
