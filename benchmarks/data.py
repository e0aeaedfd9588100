"""Time the feeding of images beside torchvision's ImageFolder and PyTorch's DataLoader.

    python benchmarks/data.py                            # 1,000 JPEG files, 224 px, batch 128

Makes a folder of JPEG files of about the size of ImageNet's, then takes, in turn, over the same
files: the one-off decode of data.py beside the loader's first epoch, and later epochs of each,
shuffled; `--epochs` of either. Medians of images/s. The loader decodes, resizes and converts to
float in as many processes as there are cores, as its users do; its first epoch includes starting
them.

With --larger GIB it shows instead that a set larger than memory is fed at a steady rate: it writes
a file of that size and feeds from it in random order. Limit the memory from outside, for example

    systemd-run --scope -p MemoryMax=1500M python benchmarks/data.py --larger 6
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

import data
from common import keep_freed_memory
from feed import Feed, map_images

SIDES = (400, 500)  # ImageNet's median image, in pixels


def make_files(root: Path, count: int) -> None:
    """Write JPEG pictures of soft shapes and grain, of about 110 kB, in ten classes."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        soft = torch.rand(1, 3, 12, 15, generator=generator)
        picture = interpolate(soft, SIDES, mode="bicubic") + 0.04 * torch.randn(
            1, 3, *SIDES, generator=generator
        )
        pixels = (255 * picture[0].clamp(0, 1)).byte().permute(1, 2, 0)
        folder = root / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.jpg", quality=90)


def rate(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Images per second of going through these batches."""
    start = time.perf_counter()
    count = sum(len(y) for _, y in batches)
    return count / (time.perf_counter() - start)


def loader_epochs(root: Path, args: argparse.Namespace) -> Callable[[], float]:
    """Epochs of ImageFolder and DataLoader; workers live on from one epoch to the next."""
    steps = [v2.ToImage(), v2.Resize((args.size, args.size)), v2.ToDtype(torch.float32, scale=True)]
    images = torchvision.datasets.ImageFolder(str(root), v2.Compose(steps))
    loader = DataLoader(
        images, args.batch, shuffle=True, num_workers=os.cpu_count() or 1, persistent_workers=True
    )
    return lambda: rate(iter(loader))


def feed_epochs(root: Path, cache: Path, args: argparse.Namespace) -> Callable[[], float]:
    """Epochs of data.py's feed, as train.py asks for them."""
    sets = data.load(str(root), size=args.size, cache_dir=cache)
    feed = Feed(sets.train, torch.device("cpu"))
    return lambda: rate(feed.ahead(torch.randperm(len(feed)).split(args.batch)))


def compare(args: argparse.Namespace) -> None:
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
        ours()  # brings the file into memory
        later = [(ours(), theirs()) for _ in range(args.epochs)]
    print(f"{args.images} files of {SIDES[1]} x {SIDES[0]} px, to {args.size} px, batch"
          f" {args.batch}, {os.cpu_count()} cores; images/s")  # fmt: skip
    print(f"{'':22}{'data.py':>10}{'DataLoader':>12}{'ratio':>8}")
    for title, pairs in (("first time (decode)", first), ("every later epoch", later)):
        fed, loaded = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{title:22}{fed:10.0f}{loaded:12.0f}{fed / loaded:8.2f}")


def feed_larger(args: argparse.Namespace) -> None:
    """Feed one epoch of random pixels from a file, and print the rate of every tenth of it."""
    each = 3 * args.size * args.size
    count = int(args.larger * 2**30 / each)
    with tempfile.NamedTemporaryFile() as file:
        block = np.random.default_rng(0).bytes(64 * each)
        for _ in range(count // 64 + 1):
            file.write(block)
        file.truncate(count * each)
        file.flush()
        os.fsync(file.fileno())
        feed = Feed(map_images(Path(file.name), [0] * count, args.size), torch.device("cpu"))
        batches = list(torch.randperm(count).split(args.batch))
        print(f"{count} images of {args.size} px, {args.larger} GiB, batch {args.batch}; images/s:")
        tenth = len(batches) // 10
        print(*(f"{rate(feed.ahead(batches[i * tenth : (i + 1) * tenth])):.0f}" for i in range(10)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"resident memory at most {peak:.2f} GiB, pages of the file among it")


def main(argv: list[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, default=1000, help="files (1000)")
    add("--size", type=int, default=224, help="side in pixels (224)")
    add("--batch", type=int, default=128, help="(128)")
    add("--epochs", type=int, default=3, help="of which the median is taken (3)")
    add("--larger", type=float, metavar="GIB", help="feed a set of this size from disk instead")
    args = parser.parse_args(argv)
    keep_freed_memory()  # as the scripts do
    (feed_larger if args.larger else compare)(args)


if __name__ == "__main__":
    main()
