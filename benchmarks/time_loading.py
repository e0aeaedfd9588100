"""Time image loading, and compare with torchvision's ImageFolder and PyTorch's DataLoader.

    python benchmarks/time_loading.py                    # 1,000 JPEG files, 224 px, batch 128

The benchmark writes a folder of JPEG files of about the size of ImageNet's. It then alternates
between two loaders on the same files: the BatchLoader of harness/images, for which all files are
decoded once in advance, and DataLoader. It compares the decoding with DataLoader's first epoch, and
later epochs of both in random order. The results are medians of images/s over `--epochs` of each.
DataLoader decodes, resizes and converts to float in one process per core, as is common. Its first
epoch includes the start of these processes.

With --larger GIB the benchmark shows instead that a dataset larger than memory loads at a steady
rate. It writes a file of that size and loads it in random order. Limit the memory from outside, for
example:

    systemd-run --scope -p MemoryMax=1500M python benchmarks/time_loading.py --larger 6
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.cli import Parser, number
from harness.errors import run_script
from harness.images import datasets
from harness.images.cache import usable_cores
from harness.images.loader import BatchLoader, map_images

SIDES = (400, 500)  # (H, W) of ImageNet's median image in px


def make_files(root: Path, count: int) -> None:
    """Write `count` JPEG files of soft shapes and noise, about 110 kB each, in ten classes."""
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        soft = torch.rand(1, 3, 12, 15, generator=generator)
        picture = interpolate(soft, SIDES, mode="bicubic") + 0.04 * torch.randn(
            1, 3, *SIDES, generator=generator
        )
        pixels = (255 * picture[0].clamp(0, 1)).byte().permute(1, 2, 0)
        folder = root / f"class{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.jpg", quality=90)


def rate(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Iterate over the batches and return the images per second."""
    start = time.perf_counter()
    count = sum(len(y) for _, y in batches)
    return count / (time.perf_counter() - start)


def loader_epochs(root: Path, args: argparse.Namespace) -> Callable[[], float]:
    """Return a function that times one epoch of ImageFolder and DataLoader. Its workers persist."""
    steps = [v2.ToImage(), v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)]
    images = torchvision.datasets.ImageFolder(str(root), v2.Compose(steps))
    loader = DataLoader(
        images, args.batch, shuffle=True, num_workers=usable_cores(), persistent_workers=True
    )
    return lambda: rate(iter(loader))


def feed_epochs(root: Path, cache: Path, args: argparse.Namespace) -> Callable[[], float]:
    """Decode the files, and return a function that times one epoch as train.py loads it."""
    sets = datasets.load_dataset(str(root), size=args.size, cache_dir=cache)
    feed = BatchLoader(sets.train, torch.device("cpu"))
    return lambda: rate(feed.prefetch(torch.randperm(len(feed)).split(args.batch)))


def compare(args: argparse.Namespace) -> None:
    """Time both loaders on the same files and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        make_files(root, args.images)
        first = []
        for i in range(args.epochs):
            start = time.perf_counter()
            ours = feed_epochs(root, Path(folder, f"cache {i}"), args)
            decode = args.images / (time.perf_counter() - start)
            theirs = loader_epochs(root, args)
            first.append((decode, theirs()))
        ours()  # warm up: the file is then in memory
        later = [(ours(), theirs()) for _ in range(args.epochs)]
    print(f"{args.images} files of {SIDES[1]} x {SIDES[0]} px, to {args.size} px, batch"
          f" {args.batch}, {usable_cores()} cores; images/s")  # fmt: skip
    print(f"{'':21}{'BatchLoader':>11}{'DataLoader':>12}{'ratio':>8}")
    for title, pairs in (("decode, first epoch", first), ("later epochs", later)):
        fed, loaded = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{title:22}{fed:10.0f}{loaded:12.0f}{fed / loaded:8.2f}")


def feed_larger(args: argparse.Namespace) -> None:
    """Load one epoch of random pixels from a file and print the rate of each tenth of it."""
    each = 3 * args.size * args.size
    count = int(args.larger * 2**30 / each)
    with tempfile.NamedTemporaryFile() as file:
        block = np.random.default_rng(0).bytes(64 * each)
        for _ in range(count // 64 + 1):
            file.write(block)
        file.truncate(count * each)
        file.flush()
        os.fsync(file.fileno())
        feed = BatchLoader(map_images(Path(file.name), [0] * count, args.size), torch.device("cpu"))
        batches = list(torch.randperm(count).split(args.batch))
        print(f"{count} images of {args.size} px, {args.larger} GiB, batch {args.batch}; images/s:")
        tenth = len(batches) // 10
        print(
            *(f"{rate(feed.prefetch(batches[i * tenth : (i + 1) * tenth])):.0f}" for i in range(10))
        )
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(f"peak resident memory: {peak:.2f} GiB, including mapped pages of the file")


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=number(int, 1), default=1000, help="number of files (1000)")
    add("--size", type=number(int, 1), default=224, help="side in pixels (224)")
    add("--batch", type=number(int, 1), default=128, help="images per minibatch (128)")
    add("--epochs", type=number(int, 1), default=3, help="timed epochs of each loader (3)")
    add(
        "--larger",
        type=number(float, 0, above=True),
        metavar="GIB",
        help="load a dataset of this size instead",
    )
    args = parser.parse_args(argv)
    (feed_larger if args.larger else compare)(args)


if __name__ == "__main__":
    run_script(main, "run it again")
