"""Folders of images: which files belong to which class and to which part, train or test."""

import random
from pathlib import Path
from typing import NamedTuple

from corruptions.transform import are_folders, has_only_folders, list_classes
from harness.errors import UserError

TEST_SHARE = 0.1  # of every class, where a folder has no val/: "ten percent", as in the paper
PARTS = {  # names of their folders, in any case; the first one that is there is taken
    "train": ("train", "training"),
    "test": ("val", "valid", "validation", "test", "testing"),
}
LAYOUT = "layout: train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg"


class File(NamedTuple):
    """An image file of a dataset, and its class index."""

    path: str  # relative to the dataset's folder, with forward slashes
    label: int


class Listing(NamedTuple):
    """The files of a dataset."""

    classes: list[str]
    parts: dict[str, list[File]]  # "train" and "test"
    test_folder: Path  # that holds the class folders of the test part
    held_out: bool  # whether the test part is a share of these class folders


def choose_classes(names: list[str], num_classes: int | None, seed: int) -> list[str]:
    """Draw `num_classes` of the sorted class names with the seed. None keeps all."""
    if num_classes is None:
        return names
    if not 2 <= num_classes <= len(names):
        raise UserError(
            f"--classes {num_classes}: the dataset has {len(names)} classes; keep 2 or more of them"
        )
    return sorted(random.Random(f"classes {seed}").sample(names, num_classes))


def list_folder(
    root: Path, num_classes: int | None, seed: int, *, test_only: bool = False,
    hold_out: bool = True,
) -> Listing:  # fmt: skip
    """List the files of a dataset in a fixed order.

    Args:
        root: holds train/CLASS/* and val/CLASS/*, or CLASS/* alone. `PARTS` lists other names.
        num_classes: keep that many classes, drawn with the seed; None keeps all.
        seed: of these draws.
        test_only: the test part alone is needed: val/ or test/ may be there without train/.
        hold_out: of CLASS/* alone, ten percent of every class are the test part, drawn with the
            seed; otherwise all images are.

    Raises:
        UserError: the folder has another layout, or a class lacks images.
    """
    folders = _find_parts(root, test_only)
    found = {part: list_classes(folder) for part, folder in folders.items()}
    for part, by_class in found.items():
        for name in by_class:
            folder = folders[part] / name
            if has_only_folders(folder):  # they are the classes, or parts
                raise UserError(f"{folder} holds folders alone, and no images ({LAYOUT})")
    if "train" in found and found["train"].keys() != found["test"].keys():
        odd = sorted(found["train"].keys() ^ found["test"].keys())
        names = " and ".join(f"{folder.name}/" for folder in folders.values())
        raise UserError(f"{root}: {names} need the same classes; only one has {odd[0]!r}")
    if len(found["test"]) < 2:
        raise UserError(
            f"{root} holds {len(found['test'])} class folders; a classifier needs at least 2"
            f" ({LAYOUT})"
        )
    hold_out = hold_out and folders["test"] == root
    classes = choose_classes(sorted(found["test"]), num_classes, seed)
    parts: dict[str, list[File]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        lists = {part: by_class[name] for part, by_class in found.items()}
        if hold_out:
            lists = _hold_out(lists["test"], f"split {seed} {name}")
        for part, files in lists.items():
            if not files and not (test_only and part == "train"):
                rule = ": it needs 2 or more, because one is held out" if hold_out else ": add one"
                raise UserError(f"{root}: class {name!r} has no image for the {part} part{rule}")
            parts[part] += [File(Path(file).relative_to(root).as_posix(), label) for file in files]
    return Listing(classes, parts, folders["test"], hold_out)


def require_outside(data: Path, cache_dir: str, output_dir: str) -> None:
    """Raise `UserError` unless a run writes to another folder than its images and their cache."""
    parts = _find_parts(data, True)
    cache, out = Path(cache_dir).resolve(), Path(output_dir).resolve()
    if cache == out:  # both are locked
        raise UserError(f"--cache-dir and --output-dir are both {out}: choose another for one")
    for part in parts.values():
        for option, folder in (("--cache-dir", cache), ("--output-dir", out)):
            if part.resolve() in folder.parents:
                raise UserError(
                    f"{option} {folder} lies in {part}, whose folders are classes: choose one"
                    " outside"
                )


def _find_parts(root: Path, test_only: bool) -> dict[str, Path]:
    """Find the folders of the training and the test part. All of CLASS/* alone is the test part."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder, and not shapes, cifar10 or cifar100")
    there = {path.name.lower(): path for path in sorted(root.iterdir(), reverse=True)}
    folders: dict[str, Path] = {}
    for part, names in PARTS.items():
        places = (there[name] for name in names if name in there)
        if found := next((place for place in places if any(are_folders(place))), None):
            folders[part] = found
    if len(folders) == 1 and not (test_only and "test" in folders):
        (one,) = folders.values()
        lacking = "val" if "train" in folders else "train"
        raise UserError(
            f"{root} has {one.name}/CLASS but no {lacking}/CLASS: add it, or give --data {one}, of"
            " which train.py holds out ten percent of every class as test set"
        )
    return folders or {"test": root}


def _hold_out(files: list[str], word: str) -> dict[str, list[str]]:
    """Split the files of one class into train and test; `word` seeds the draw."""
    shuffled = list(files)
    random.Random(word.encode(errors="surrogateescape")).shuffle(shuffled)
    cut = max(1, round(TEST_SHARE * len(shuffled)))
    return {"train": sorted(shuffled[cut:]), "test": sorted(shuffled[:cut])}
