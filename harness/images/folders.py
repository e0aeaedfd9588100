"""Folders of images: which files belong to which class and to which part, train or test."""

import os
import random
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError

TEST_SHARE = 0.1  # of every class, where a folder has no val/: "ten percent", as in the paper
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


class File(NamedTuple):
    """An image file of a dataset, and its class index."""

    path: str  # relative to the dataset's folder, with forward slashes
    label: int


def choose_classes(names: list[str], num_classes: int | None, seed: int) -> list[str]:
    """Draw `num_classes` of the sorted class names with the seed. None keeps all."""
    if num_classes is None:
        return names
    if not 2 <= num_classes <= len(names):
        raise UserError(
            f"--classes {num_classes}: the dataset has {len(names)} classes; keep 2 or more of them"
        )
    return sorted(random.Random(f"classes {seed}").sample(names, num_classes))


def list_classes(root: Path) -> dict[str, list[str]]:
    """List the image files below each class folder, both sorted."""
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


def list_folder(
    root: Path, num_classes: int | None, seed: int
) -> tuple[list[str], dict[str, list[File]]]:
    """List the files of a dataset in a fixed order.

    Args:
        root: holds train/CLASS/* and val/CLASS/*, or CLASS/*. In the latter case ten percent of
            every class are the test part, drawn with the seed.
        num_classes: keep that many classes, drawn with the seed; None keeps all.
        seed: of these draws.

    Returns:
        The class names, and the files of the parts "train" and "test".

    Raises:
        UserError: the folder has another layout, or a class lacks images.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder, and not shapes, cifar10 or cifar100")
    if (root / "train").is_dir() != (root / "val").is_dir():
        one, other = ("train", "val") if (root / "train").is_dir() else ("val", "train")
        raise UserError(
            f"{root} has {one}/ but no {other}/: add it, or give --data {root / one}, of which ten"
            " percent of every class will be the test set"
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
            lists = _hold_out(by_class[name], f"split {seed} {name}")
        for part, files in lists.items():
            if not files:
                raise UserError(f"{root}: class {name!r} has no image for the {part} part")
            parts[part] += [File(Path(file).relative_to(root).as_posix(), label) for file in files]
    return classes, parts


def _hold_out(files: list[str], word: str) -> dict[str, list[str]]:
    """Split the files of one class into train and test; `word` seeds the draw."""
    shuffled = list(files)
    random.Random(word.encode(errors="surrogateescape")).shuffle(shuffled)
    cut = max(1, round(TEST_SHARE * len(shuffled)))
    return {"train": sorted(shuffled[cut:]), "test": sorted(shuffled[:cut])}
