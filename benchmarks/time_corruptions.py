"""Time the fifteen ImageNet-C corruptions, and compare with published packages, if installed.

    python benchmarks/time_corruptions.py --batch 32 --size 224 --repeats 5
    python benchmarks/time_corruptions.py --batch 256 --memory
    python benchmarks/time_corruptions.py --batch 256 --device cuda

The benchmark uses one thread, and keeps freed memory as the scripts do (not with --memory). On a
CPU it reports CPU time, which other processes disturb least. On a GPU it reports wall time with
synchronization. Runs of ours and of the packages alternate for each setting. The benchmark takes
the median of the repeats, then the mean over the five severities.

The packages take one image at a time. In the original (imagenet-c 0.0.3, see requirements-dev.txt),
NumPy code replaces the ImageMagick motion blur, so motion blur and snow are not compared with the
real library. No other part is replaced. imagecorruptions-imaug (1.1.5, the fastest in 2026) and
imagecorruptions install the same module: use an environment without the latter.
"""

import argparse
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
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

from corruptions import CORRUPTIONS, MIN_SIDE, SEVERITIES, corrupt, frost_source  # noqa: E402
from harness.cli import Parser, number  # noqa: E402
from harness.devices import resolve_device  # noqa: E402
from harness.errors import run_script  # noqa: E402

NAMES = [name for name, entry in CORRUPTIONS.items() if entry.family != "paper"]


def pictures(batch: int, size: int, device: torch.device) -> Tensor:
    """Generate uint8 (batch, 3, size, size) images of soft shapes and noise, repeating eight."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(8, 3, 12, 12, generator=generator)
    soft = F.interpolate(shapes, size=(size, size), mode="bicubic", align_corners=False)
    grain = 0.05 * torch.randn(8, 3, size, size, generator=generator)
    eight = ((soft + grain) * 255).clamp_(0, 255).byte()
    return eight.repeat(-(-batch // 8), 1, 1, 1)[:batch].to(device)


def load_packages(size: int, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Return functions (picture, name, severity) by package. Print why a package is not there."""
    if device.type != "cpu" or size != 224:
        print("the packages are not timed: they need --device cpu and --size 224")
        return {}
    found: dict[str, Callable[..., Any]] = {}
    try:
        import imagenet_c_oracle as oracle

        if oracle.MISSING:
            raise ImportError(oracle.SKIP)
        found["original"] = oracle.original
    except ImportError as error:
        print(f"the original is not timed: {error}")
    try:
        version("imagecorruptions-imaug")
        import cv2
        from imagecorruptions import corrupt as imaug

        cv2.setNumThreads(1)
        found["imaug"] = lambda picture, name, severity: imaug(picture, severity, name)
    except ImportError as error:
        print(f"imagecorruptions-imaug is not timed: {error}")
    return found


def measure(
    images: Tensor, names: list[str], repeats: int, packages: dict[str, Callable[..., Any]]
) -> dict[str, dict[str, float]]:
    """Time the corruptions, averaged over the severities.

    Args:
        images: uint8 (B, 3, H, W). The packages take only the first one.
        names: names of the corruptions.
        repeats: number of timed runs per setting.
        packages: as returned by `load_packages`.

    Returns:
        For each name, ms per image of "ours" and of each package.
    """
    picture = images[0].permute(1, 2, 0).contiguous().cpu().numpy()
    took: dict[tuple[str, str, int], list[float]] = {}
    for repeat in range(repeats + 1):  # the first one warms up and is dropped
        for name in names:
            for severity in SEVERITIES:
                run = partial(corrupt, images, name, severity, seed=repeat)
                ms = 1000 * seconds(run, images.device) / len(images)
                took.setdefault(("ours", name, severity), []).append(ms)
                for package, function in packages.items():
                    ms = 1000 * seconds(partial(function, picture, name, severity), images.device)
                    took.setdefault((package, name, severity), []).append(ms)
    return {
        name: {
            package: mean(median(took[package, name, severity][1:]) for severity in SEVERITIES)
            for package in ("ours", *packages)
        }
        for name in names
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


def print_times(times: dict[str, dict[str, float]]) -> None:
    """Print a row per corruption, the sum over corruptions and the mean over all settings."""
    columns = list(next(iter(times.values())))
    total = {column: sum(row[column] for row in times.values()) for column in columns}
    average = {column: value / len(times) for column, value in total.items()}
    rows = times | {"sum": total, f"mean of {len(SEVERITIES) * len(times)}": average}
    heading = "".join(f" {package:>9} {'ratio':>7}" for package in columns[1:])
    print(f"{'corruption':<18} {'ms/image':>9} {'images/s':>9}{heading}")
    for name, row in rows.items():
        ours = row["ours"]
        beside = "".join(f" {row[p]:9.2f} {row[p] / ours:7.1f}" for p in columns[1:])
        print(f"{name:<18} {ours:9.2f} {1000 / ours:9.0f}{beside}")


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=number(int, 1), default=32, help="images per call (32)")
    parser.add_argument(
        "--size", type=number(int, MIN_SIDE), default=224, help="side in pixels (224)"
    )
    parser.add_argument(
        "--repeats", type=number(int, 1), default=5, help="timed runs per setting (5)"
    )
    parser.add_argument("--device", type=resolve_device, default="cpu", help="torch device (cpu)")
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
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "1 thread"
    print(f"torch {torch.__version__}, {args.device} ({where}), frost: {frost_source()}")
    print(f"batch {args.batch}, {args.size} x {args.size} px")
    if args.memory:
        print_memory(args.only, args.batch, args.size, device)
        return
    packages = load_packages(args.size, device)
    images = pictures(args.batch, args.size, device)
    print_times(measure(images, args.only, args.repeats, packages))


if __name__ == "__main__":
    run_script(main, "run it again")
