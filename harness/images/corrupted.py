"""The corrupted test images of --imagenet-c, in the layouts in which they are published.

ImageNet-C, Tiny-ImageNet-C: DIR/NAME/SEVERITY/CLASS/file, or a folder above NAME: its family, extra
CIFAR-10-C, CIFAR-100-C: DIR/NAME.npy, uint8 (50000, 32, 32, 3), and DIR/labels.npy, (50000,): the
test images in order, at severity 1, then at severity 2, and so on
"""

from collections.abc import Callable, Iterable, Iterator
from os.path import splitext
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from corruptions import SEVERITIES
from corruptions.transform import list_classes
from harness.errors import UserError
from harness.images.cache import decode_all
from harness.images.datasets import Dataset

LABELS = "labels.npy"
_LAYOUT = "the layout is DIR/corruption/severity/class/file, with the names of --data"
ARRAYS = ("cifar10", "cifar100")  # values of --data whose corrupted images are published as arrays


def find_corruption(root: Path, name: str, family: str) -> Path | None:
    """Return the folder or the array of a corruption below --imagenet-c, if there is one."""
    folders = (root / name, root / family / name, root / "extra" / name)
    array = root / f"{name}.npy"
    return next((place for place in folders if place.is_dir()), array if array.is_file() else None)


def require_severities(place: Path) -> None:
    """Raise `UserError` if the folder of a corruption lacks one of a severity."""
    for severity in SEVERITIES if place.suffix != ".npy" else ():
        if not (place / str(severity)).is_dir():
            raise UserError(f"--imagenet-c: {place} lacks the folder {severity}; {_LAYOUT}")


def require_source(place: Path, source: str) -> None:
    """Raise `UserError` if a corruption is an array, and --data not a set that arrays exist of."""
    if place.suffix == ".npy" and source not in ARRAYS:
        raise UserError(f"--imagenet-c: {place} is scored with --data {' or '.join(ARRAYS)}")


def open_corrupted(
    place: Path, severity: int, data: Dataset, chosen: list[int], size: int
) -> Callable[[Iterable[int]], Iterator[Tensor]]:
    """Find the corrupted images of the chosen test images.

    Args:
        place: what `find_corruption` returns.
        severity: 1 to 5.
        data: the clean images.
        chosen: indices of the test images that are evaluated.
        size: side in pixels to which the corrupted images are resized.

    Returns:
        A function of some of these indices. It yields their images, uint8 (3, size, size) each.

    Raises:
        UserError: an image is missing, or of another test set; on reading, an image is unreadable.
    """
    if place.suffix != ".npy":
        folder = place / str(severity)
        files = _find_files(folder, data, chosen)
        return lambda indices: _decode(folder, [files[i] for i in indices], size)
    images, rows = _map_array(place, data)
    block = images[severity - 1]
    return lambda indices: (
        resize(torch.from_numpy(block[rows[i]].transpose(2, 0, 1).copy()), [size, size])
        for i in indices
    )


def _decode(folder: Path, paths: list[str], size: int) -> Iterator[Tensor]:
    """Stream image files: the whole of ImageNet-C does not fit into memory."""
    for path, image in decode_all(folder, paths, size):
        if isinstance(image, str):
            raise UserError(f"{folder / path}: {image}; fetch the file again")
        yield torch.from_numpy(image)


def _find_files(folder: Path, data: Dataset, chosen: list[int]) -> dict[int, str]:
    """Find the file of each chosen test image below the folder, by the image's index.

    Files are found by the names of the test images without their suffixes, so that a tree that also
    holds training images gives the scores of the test images.
    """
    found = list_classes(folder)
    paths = [path for name in data.classes for path in found.get(name, [])]
    files = [Path(path).relative_to(folder).as_posix() for path in paths]
    there = {splitext(file)[0]: file for file in files}
    names = {i: splitext(data.paths[i])[0] for i in chosen}
    if missing := [name for name in names.values() if name not in there]:
        raise UserError(
            f"--imagenet-c: {folder} lacks {len(missing)} of the {len(names)} test images, such as"
            f" {missing[0]}; {_LAYOUT}"
        )
    if len(set(names.values())) < len(names):
        raise UserError(
            "--imagenet-c: two images of --data differ only in their suffix: rename one"
        )
    return {i: there[name] for i, name in names.items()}


def _map_array(place: Path, data: Dataset) -> tuple[Any, list[int]]:
    """Map an array into memory, and check that its labels are those of the test images.

    Returns:
        The images (5, N, 32, 32, 3), and the row of each test image among the N of a severity. The
        test images are fewer than N if only some classes are kept.
    """
    images, labels = (_load_array(path) for path in (place, place.with_name(LABELS)))
    if images.dtype != np.uint8 or images.shape != (labels.size, 32, 32, 3):
        raise UserError(
            f"--imagenet-c: {place} is {images.dtype} {images.shape}; with the {labels.size} labels"
            f" of {LABELS} it must be uint8 {(labels.size, 32, 32, 3)}"
        )
    rows = [int(path.split("/")[1]) for path in data.paths]
    source = data.paths[0].split("/")[0]
    if not _same_labels(labels, rows, data.test.labels.tolist()):
        raise UserError(
            f"--imagenet-c: {place.with_name(LABELS)} are not {len(SEVERITIES)} times the labels of"
            f" the test images of --data {source}: name the folder that belongs to it"
        )
    return images.reshape(len(SEVERITIES), -1, 32, 32, 3), rows


def _load_array(path: Path) -> Any:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(
            f"--imagenet-c: {path} is missing; the layout is NAME.npy and {LABELS}"
        ) from None
    except (ValueError, SyntaxError, TokenError) as error:
        raise UserError(f"--imagenet-c: {path} is not an array ({error}); fetch it again") from None


def _same_labels(published: Any, rows: list[int], labels: list[int]) -> bool:
    """Return whether the labels repeat, and match those of the test images one to one."""
    count = published.size // len(SEVERITIES)
    if published.shape != (count * len(SEVERITIES),) or max(rows) >= count:
        return False
    blocks = published.reshape(len(SEVERITIES), count)
    repeated = bool((blocks == blocks[0]).all())
    values = blocks[0][rows].tolist()
    pairs = set(zip(values, labels, strict=True))
    one_to_one = len(pairs) == len(set(values)) == len(set(labels))
    complete = int(np.isin(blocks[0], values).sum()) == len(labels)  # no other row has a value
    return repeated and one_to_one and complete
