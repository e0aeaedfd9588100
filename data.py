"""Image sets as tensors: decoded once, resized to a square, kept as uint8 (N, 3, S, S).

    data = load("shapes")                                  # drawn by shapes.py, no download
    data = load("imagenet", num_classes=100, size=224)     # folders; cached after the first time
    data = load("cifar10", download=True)

A resize to a square is the paper's only pre-processing, so there is nothing left to do per epoch
but to slice: `feed.Feed` hands out minibatches in [0, 1] on the device.
"""

import hashlib
import json
import math
import os
import random
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

import shapes
from common import UserError, checksum, locked, replacing, write
from feed import ImageSet, ahead, map_images

TEST_SHARE = 0.1  # of every class, where a folder has no val/: "ten percent", as in the paper
SIZES = {"shapes": 64, "cifar10": 32, "cifar100": 32}  # default sides; folders: the paper's 224
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
MAX_SIDE = 4096  # of the images that are fed: beyond it nothing trains, and memory ends
CACHE_VERSION = 2  # change it when the same files would give other pixels

Array = np.ndarray[Any, Any]


class Data(NamedTuple):
    """A training and a test set, the class names, and a hash of what the sets hold."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    fingerprint: str


def load(
    source: str,
    *,
    size: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    download: bool = False,
    skip_bad_images: bool = False,
    cache_dir: str | Path | None = None,
) -> Data:
    """Load "shapes", "cifar10", "cifar100", or a folder of images as a `Data`.

    size: the square's side, default 64 for shapes, 32 for CIFAR, 224 for folders. num_classes:
    keep so many classes, drawn with `seed`, which also draws the test part of a folder that has no
    val/. cache_dir: where decoded folders are kept, and where CIFAR lies.
    Raises UserError for anything that the user can mend.
    """
    size = size or SIZES.get(source, 224)
    if not 1 <= size <= MAX_SIDE:
        raise UserError(f"--size {size} is out of range: from 1 to {MAX_SIDE}")
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    if source == "shapes":
        return _load_shapes(size, num_classes, seed)
    if source in ("cifar10", "cifar100"):
        return _load_cifar(source, size, num_classes, seed, download, cache)
    return _load_folder(Path(source), size, num_classes, seed, skip_bad_images, cache)


def default_cache_dir() -> Path:
    """Give the folder for decoded sets: $XDG_CACHE_HOME/mtlat, or ~/.cache/mtlat."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtlat"


def choose_classes(names: list[str], num_classes: int | None, seed: int) -> list[str]:
    """Keep `num_classes` of the sorted names, drawn with the seed; all of them for None."""
    if num_classes is None:
        return names
    if not 2 <= num_classes <= len(names):
        raise UserError(
            f"--classes {num_classes}: the set has {len(names)}; keep 2 or more of them"
        )
    return sorted(random.Random(f"classes {seed}").sample(names, num_classes))


def _keep_classes(images: Tensor, labels: Tensor, names: list[str], kept: list[str]) -> ImageSet:
    number = {names.index(name): i for i, name in enumerate(kept)}
    rows = [i for i, label in enumerate(labels.tolist()) if label in number]
    return ImageSet(images[rows], torch.tensor([number[int(labels[i])] for i in rows]))


def _load_shapes(size: int, num_classes: int | None, seed: int) -> Data:
    kept = choose_classes(list(shapes.NAMES), num_classes, seed)
    parts: dict[str, ImageSet] = {}
    for name, numbers in shapes.NUMBERS.items():
        images, labels = shapes.draw_shapes(numbers, size, seed)
        parts[name] = _keep_classes(images, labels, list(shapes.NAMES), kept)
    digest = hashlib.sha256()
    for part in parts.values():
        digest.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
    return Data(**parts, classes=kept, fingerprint=digest.hexdigest())


def _load_cifar(
    source: str, size: int, num_classes: int | None, seed: int, download: bool, root: Path
) -> Data:
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    parts: dict[str, ImageSet] = {}
    for part in ("train", "test"):
        try:
            raw = dataset[source](root, train=part == "train", download=download)
        except RuntimeError:
            raise UserError(
                f"{source} is not in {root}: add --download, or name its folder with --cache-dir"
            ) from None
        images = torch.from_numpy(np.ascontiguousarray(raw.data.transpose(0, 3, 1, 2)))
        if size != images.shape[-1]:
            images = v2.functional.resize(images, [size, size])
        kept = choose_classes(sorted(raw.classes), num_classes, seed)
        parts[part] = _keep_classes(images, torch.tensor(raw.targets), raw.classes, kept)
    digest = hashlib.sha256(b"".join(parts[p].labels.numpy().tobytes() for p in parts))
    digest.update(f"{source} {size} {kept}".encode())
    return Data(**parts, classes=kept, fingerprint=digest.hexdigest())


class File(NamedTuple):
    """An image file of a set, and its class."""

    path: str  # relative to the set's folder, with forward slashes
    label: int


def _load_folder(
    root: Path, size: int, num_classes: int | None, seed: int, skip_bad: bool, cache: Path
) -> Data:
    classes, parts = _list_folder(root, num_classes, seed)
    sets: dict[str, ImageSet] = {}
    facts: list[Any] = [classes]
    for part, files in parts.items():
        sets[part], content = _decoded(root, files, size, skip_bad, cache, f"decoding {part}")
        if not len(sets[part].labels):
            raise UserError(f"{root}: no readable image in the {part} part; see --data in --help")
        facts += [part, [file.path for file in files], content]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Data(**sets, classes=classes, fingerprint=fingerprint)


def _list_folder(
    root: Path, num_classes: int | None, seed: int
) -> tuple[list[str], dict[str, list[File]]]:
    """The class names and, for "train" and "test", the files in a fixed order."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder, nor one of the sets {', '.join(SIZES)}")
    if (root / "train").is_dir() != (root / "val").is_dir():
        one, other = ("train", "val") if (root / "train").is_dir() else ("val", "train")
        raise UserError(
            f"{root} has {one}/ but no {other}/: add it, or give {root / one}, and ten percent of"
            " every class will be the test set"
        )
    split = (root / "train").is_dir()
    found = {part: list_classes(root / part) for part in ("train", "val")} if split else {}
    by_class = found["train"] if split else list_classes(root)
    if split and found["train"].keys() != found["val"].keys():
        odd = sorted(found["train"].keys() ^ found["val"].keys())
        raise UserError(f"{root}: train/ and val/ need the same classes; only one has {odd[0]!r}")
    if len(by_class) < 2:
        raise UserError(
            f"{root} holds {len(by_class)} class folders; a classifier needs at least 2 (layout:"
            " train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg)"
        )
    classes = choose_classes(sorted(by_class), num_classes, seed)
    parts: dict[str, list[File]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        if split:
            lists = {"train": found["train"][name], "test": found["val"][name]}
        else:
            files = list(by_class[name])
            word = f"split {seed} {name}".encode(errors="surrogateescape")
            random.Random(word).shuffle(files)
            cut = max(1, round(TEST_SHARE * len(files)))
            lists = {"train": sorted(files[cut:]), "test": sorted(files[:cut])}
        for part, files in lists.items():
            if not files:
                raise UserError(f"{root}: class {name!r} has no image for the {part} part")
            parts[part] += [File(Path(file).relative_to(root).as_posix(), label) for file in files]
    return classes, parts


def list_classes(root: Path) -> dict[str, list[str]]:
    """The sorted image files below each class folder."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    return {
        name: sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(root / name)
            for file in files
            if os.path.splitext(file)[1].lower() in SUFFIXES
        )
        for name in names
        if not name.startswith(".")
    }


def _decoded(
    root: Path, files: list[File], size: int, skip_bad: bool, cache: Path, title: str
) -> tuple[ImageSet, int]:
    """The files as a memory-mapped image set, decoded now or by an earlier run; and its checksum.

    The cache is named by a hash of everything that decides its pixels, so what changed makes a new
    one. Its manifest is written last: without it, or if its checksum is wrong, there is none.
    """
    stamps = [_stamp(root / file.path) for file in files]
    facts = [CACHE_VERSION, str(root.resolve()), size, skip_bad]
    facts += [(*file, *stamp) for file, stamp in zip(files, stamps, strict=True)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    pixels, manifest = cache / f"{key}.u8", cache / f"{key}.json"
    if (found := _read_cache(pixels, manifest)) is None:
        with locked(cache, wait=True):
            if _read_cache(pixels, manifest) is None:  # nobody made it meanwhile
                record = _write_pixels(pixels, root, files, size, skip_bad, title)
                if stamps != [_stamp(root / file.path) for file in files]:
                    raise UserError(f"{root} changed while it was read; start again")
                write(manifest, json.dumps(record))
            found = _read_cache(pixels, manifest)
        if found is None:
            raise UserError(f"{pixels} is not what was written: is there room on a sound disk?")
    images, record = found
    if record["skipped"]:
        tqdm.write(f"{title}: {len(record['skipped'])} bad images skipped, listed in {manifest}")
    return images, record["crc"]


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does: bytes and time; what cannot be read is decode's to tell."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _write_pixels(
    pixels: Path, root: Path, files: list[File], size: int, skip_bad: bool, title: str
) -> dict[str, Any]:
    """Decode the files into one; give the manifest, whose checksum is that of both."""
    labels: list[int] = []
    skipped: list[str] = []
    crc = 0
    with replacing(pixels) as temporary, open(temporary, "wb") as sink:
        for file, image in tqdm(
            decode_all(root, files, size), title, len(files), unit="img", disable=None
        ):
            if isinstance(image, str):
                if not skip_bad:
                    raise UserError(
                        f"{root / file.path}: {image}; mend or remove the file, or add"
                        " --skip-bad-images"
                    )
                skipped.append(file.path)
            else:
                sink.write(image)
                crc = zlib.crc32(image, crc)
                labels.append(file.label)
    record = {"shape": [len(labels), 3, size, size], "labels": labels, "skipped": skipped}
    return {**record, "crc": checksum(record, crc)}


def _read_cache(pixels: Path, manifest: Path) -> tuple[ImageSet, dict[str, Any]] | None:
    """The images, mapped, and their manifest; None if there are none, or they are damaged."""
    try:
        record = json.loads(manifest.read_bytes())
        crc = record.pop("crc")
        if pixels.stat().st_size != math.prod(record["shape"]):
            return None
        images = map_images(pixels, record["labels"], record["shape"][-1])
        if checksum(record, zlib.crc32(images.mapping or b"")) != crc:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        return None
    return images, {**record, "crc": crc}


def decode_all(root: Path, files: list[File], size: int) -> Iterator[tuple[File, Array | str]]:
    """Each file with its pixels (3, S, S), or with what is wrong with it, in order.

    Threads serve, because Pillow decodes and resizes outside Python's lock; the window keeps only
    a few images per core in memory. What Pillow warns of is no error here; the filter is set before
    the threads start, as it is the process's.
    """
    limited = hasattr(os, "sched_getaffinity")  # to some of the machine's cores
    cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        paths = (root / file.path for file in files)
        pixels = ahead(lambda path: decode(path, size), paths, threads=cores, window=16 * cores)
        yield from zip(files, pixels, strict=True)


def decode(path: Path, size: int) -> Array | str:
    """One file as upright RGB uint8 (3, size, size), or a line that says what is wrong with it.

    The whole image is resized to the square, bilinear and antialiased, as in Pillow. One above
    Pillow's limit of pixels is taken for an attack on memory, as Pillow advises.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                return f"has {image.width} x {image.height} pixels, too many to be safe: shrink it"
            ImageOps.exif_transpose(image, in_place=True)
            upright: Image.Image = image
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would cut off at 255
                upright = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if upright.mode != "RGB":  # even to its own mode convert() copies
                upright = upright.convert("RGB")
            resized = upright.resize((size, size), Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
    except MemoryError:
        raise  # no fault of the file's
    except Exception as error:  # Pillow raises nearly every kind on a broken file
        return f"not a readable image ({str(error) or type(error).__name__})"
