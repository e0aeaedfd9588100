"""Datasets as tensors: decoded once, made square, kept as uint8 (N, 3, S, S).

    data = load_dataset("shapes")                                  # the embedded set, no download
    data = load_dataset("imagenet", num_classes=100, size=224)     # a folder; cached when decoded
    data = load_dataset("cifar10", download=True)

Making images square is the only preprocessing. An epoch gathers minibatches and converts them to
float; --augment of train.py changes them there.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from harness.errors import UserError, downloading, first_line
from harness.files import digest
from harness.images import embedded
from harness.images.cache import Files, cached_checksum, decode_cached, default_cache_dir
from harness.images.folders import File, Listing, choose_classes, list_folder
from harness.images.loader import ImageSet
from harness.images.preprocess import Crop, resize_side

SIZES = {"shapes": 32, "cifar10": 32, "cifar100": 32}  # default sides; folders: the paper's 224
MAX_SIDE = 4096  # above it nothing trains, and memory runs out


class Dataset(NamedTuple):
    """A training and a test set, the class names, and hashes of what the sets hold."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    paths: list[str]  # of the test images: CLASS/FILE, or SOURCE/INDEX for shapes and CIFAR
    # Digests that identify the dataset. Folder: `fingerprint` covers both parts ("" if the training
    # part was never decoded), `test_fingerprint` the test part. Shapes and CIFAR: both cover both
    # parts, by pixels (shapes) or by labels (CIFAR, whose pixels torchvision checks).
    fingerprint: str
    test_fingerprint: str
    origin: str  # of the test images, in words
    held_out: bool = False  # whether the test part is a share of a folder of class folders

    @property
    def test_files(self) -> str:
        """A digest of the test images' paths, 16 hex digits; their size does not change it."""
        text = "\n".join(self.paths).encode(errors="surrogateescape")
        return hashlib.sha256(text).hexdigest()[:16]


def load_dataset(
    source: str,
    *,
    size: int | None = None,
    crop: Crop = None,
    num_classes: int | None = None,
    seed: int = 0,
    download: bool = False,
    skip_bad_images: bool = False,
    cache_dir: str | Path | None = None,
    test_only: bool = False,
    hold_out: bool = True,
) -> Dataset:
    """Load a dataset.

    Args:
        source: "shapes" (the embedded set), "cifar10", "cifar100", or a folder of images.
        size: side of the square in pixels; default 32 for shapes and CIFAR, 224 for folders.
        crop: preprocessing of a folder's images; default squash.
        num_classes: keep that many classes, drawn with `seed`; default all.
        seed: of the classes, of the shapes, and of the test part of a folder without val/.
        download: download CIFAR if it is missing.
        skip_bad_images: leave out unreadable files of a folder instead of raising.
        cache_dir: where decoded folders are kept, and CIFAR; default `default_cache_dir()`.
        test_only: of a folder, leave the training part empty: it is not decoded.
        hold_out: of a folder, as in `list_folder`.

    Raises:
        UserError: wrong size, crop or num_classes; missing data, wrong layout, unreadable image.
    """
    size = size or SIZES.get(source, 224)
    if not 1 <= size <= MAX_SIDE:
        raise UserError(f"--size {size} is out of range: from 1 to {MAX_SIDE}")
    if crop and source in SIZES:
        raise UserError(
            f"--preprocess center-crop: the images of {source} are squares already; leave it out"
        )
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    if source == "shapes":
        return _load_shapes(size, num_classes, seed)
    if source in SIZES:
        return _load_cifar(source, size, num_classes, seed, download, cache)
    root, side = Path(source), resize_side(crop, size)
    listing = list_folder(root, num_classes, seed, test_only=test_only, hold_out=hold_out)
    sources = {
        part: Files(part, root, files, size, side, skip_bad_images, cache)
        for part, files in listing.parts.items()
    }
    return _load_folder(listing, sources, test_only)


def _select_classes(images: Tensor, labels: Tensor, names: list[str], kept: list[str]) -> ImageSet:
    """Keep the images of the classes `kept`, and number these from 0."""
    new_label = {names.index(name): i for i, name in enumerate(kept)}
    rows = [i for i, label in enumerate(labels.tolist()) if label in new_label]
    return ImageSet(images[rows], torch.tensor([new_label[int(labels[i])] for i in rows]))


def _load_shapes(size: int, num_classes: int | None, seed: int) -> Dataset:
    kept = choose_classes(list(embedded.NAMES), num_classes, seed)
    parts: dict[str, ImageSet] = {}
    for name, indices in embedded.INDICES.items():  # "test" is last: its labels give the paths
        images, labels = embedded.draw_shapes(indices, size, seed)
        parts[name] = _select_classes(images, labels, list(embedded.NAMES), kept)
    pixels = hashlib.sha256()
    for part in parts.values():
        pixels.update(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
    fingerprint, drawn = pixels.hexdigest(), embedded.INDICES["test"]
    paths = [f"shapes/{i}" for i, k in zip(drawn, labels, strict=True) if embedded.NAMES[k] in kept]
    return Dataset(parts["train"], parts["test"], kept, paths, fingerprint, fingerprint, "shapes")


def _load_cifar(
    source: str, size: int, num_classes: int | None, seed: int, download: bool, root: Path
) -> Dataset:
    kind = getattr(torchvision.datasets, source.upper())
    parts: dict[str, ImageSet] = {}
    for part in ("train", "test"):  # "test" is last: its labels give the paths
        try:
            with downloading("--download", source, root):
                raw = kind(root, train=part == "train", download=download)
        except RuntimeError as error:
            raise UserError(
                f"{source} is not in {root} ({first_line(error)}): name its folder with"
                f" --cache-dir, or download it by train.py --data {source} --download"
            ) from None
        images = torch.from_numpy(np.ascontiguousarray(raw.data.transpose(0, 3, 1, 2)))
        images = v2.functional.resize(images, [size, size])
        kept = choose_classes(sorted(raw.classes), num_classes, seed)
        parts[part] = _select_classes(images, torch.tensor(raw.targets), raw.classes, kept)
    facts = b"".join(part.labels.numpy().tobytes() for part in parts.values())
    fingerprint = hashlib.sha256(facts + f"{source} {size} {kept}".encode()).hexdigest()
    paths = [f"{source}/{i}" for i, k in enumerate(raw.targets) if raw.classes[k] in kept]
    return Dataset(parts["train"], parts["test"], kept, paths, fingerprint, fingerprint, source)


def _load_folder(listing: Listing, sources: dict[str, Files], test_only: bool) -> Dataset:
    classes, folder = listing.classes, listing.test_folder
    if test_only:
        size = sources["train"].size
        nothing = torch.empty(0, 3, size, size, dtype=torch.uint8)
        train = ImageSet(nothing, torch.empty(0, dtype=torch.int64))
        train_crc = cached_checksum(sources["train"])
    else:
        train, _, train_crc = _decode_part(sources["train"], classes)
    test, kept, test_crc = _decode_part(sources["test"], classes)
    fingerprint = ""
    if train_crc is not None:
        names = {part: [file.path for file in files] for part, files in listing.parts.items()}
        facts = ["train", names["train"], train_crc, "test", names["test"], test_crc]
        fingerprint = digest([classes, *facts])
    paths = [(sources["test"].root / file.path).relative_to(folder).as_posix() for file in kept]
    test_fingerprint = digest([classes, paths, test_crc])
    origin = f"{'a tenth, held out,' if listing.held_out else 'all'} of {folder}"
    return Dataset(
        train, test, classes, paths, fingerprint, test_fingerprint, origin, listing.held_out
    )


def _decode_part(source: Files, classes: list[str]) -> tuple[ImageSet, list[File], int]:
    """Decode a part as `decode_cached` does. Raise `UserError` if a class has no image left."""
    images, kept, crc = decode_cached(source)
    left = {file.label for file in kept}
    for label, name in enumerate(classes):
        if label not in left:
            raise UserError(
                f"{source.root}: class {name!r} has no readable image for the {source.part} part:"
                " repair its files, or remove the class"
            )
    return images, kept, crc
