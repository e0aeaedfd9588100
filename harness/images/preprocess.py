"""Preprocessing: how an image of any shape becomes a square, in training and in evaluation.

"squash" resizes the whole image to the square, as the paper does. "center-crop" resizes its shorter
side, and cuts out the center, as ImageNet-C was made.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image

from corruptions.transform import center_crop, walk_images
from harness.errors import UserError

# (256, 224): the shorter side is resized to 256/224 of the square's side. None: squash.
Crop = tuple[int, int] | None
CROPS: Mapping[str, Crop] = {"squash": None, "center-crop": (256, 224)}  # by name


def resize_side(crop: Crop, size: int) -> int | None:
    """Return the length of the resized shorter side for squares of `size`; None for squash."""
    return round(size * crop[0] / crop[1]) if crop else None


def make_square(image: Image.Image, size: int, resize: int | None) -> Image.Image:
    """Make an image a square, bilinear and antialiased.

    Args:
        image: of any shape.
        size: side of the square in pixels.
        resize: what `resize_side` returns.
    """
    if resize is None:
        return image.resize((size, size), Image.Resampling.BILINEAR)
    return center_crop(image, resize, size)


def kind(crop: Crop) -> str:
    """Return the name of a preprocessing in --preprocess."""
    return "center-crop" if crop else "squash"


def describe(crop: Crop, size: int) -> str:
    """Name a preprocessing with its sides in pixels, as cells and results store it."""
    return f"center-crop {resize_side(crop, size)}->{size}" if crop else "squash"


def tree_crop(tree: Path) -> Crop:
    """Return how the images of an --imagenet-c folder were prepared before they were corrupted.

    `python -m corruptions` notes the size in settings.json, and crops at 224 px alone. The
    published ImageNet-C and Tiny-ImageNet-C have no such file, and the latter has images of 64 px,
    which are not cropped.
    """
    try:
        size = json.loads((tree / "settings.json").read_bytes())["size"]
    except FileNotFoundError:
        size = _first_side(tree)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{tree / 'settings.json'} is damaged: write the tree again") from None
    return CROPS["center-crop" if size == 224 else "squash"]


def _first_side(tree: Path) -> int:
    """Return the width of the first image that is found in a folder; 224 if there is none."""
    for path in walk_images(tree):
        with suppress(OSError), Image.open(path) as image:
            return image.width
    return 224


def choose_crop(asked: str | None, tree: Path | None, own: Mapping[str, Crop]) -> Crop:
    """Choose the one preprocessing of all images of an evaluation.

    Args:
        asked: --preprocess, if it is given: it decides, also against the models.
        tree: --imagenet-c, if it is given: clean images are prepared as those of the tree.
        own: the preprocessing of each model that has one, by its name. Unless `asked` is given, all
            must match the tree, or each other if there is no tree.

    Raises:
        UserError: two of them contradict each other.
    """
    first = next(iter(own), "")
    chosen = tree_crop(tree) if tree else own.get(first)
    if asked and tree and asked != kind(chosen):
        raise UserError(
            f"--preprocess {asked}: the images of --imagenet-c {tree} were prepared by"
            f" {kind(chosen)}, and clean images must be, too: leave it out"
        )
    if asked:
        return CROPS[asked]
    for name, crop in own.items():  # of a tree, only the kind is known
        differs = kind(crop) != kind(chosen) if tree else crop != chosen
        if differs:
            raise UserError(
                f"{name} expects the preprocessing {_words(crop)}, and"
                f" {f'--imagenet-c {tree} has' if tree else f'{first} expects'}"
                f" {_words(chosen)}: choose one for all with --preprocess {kind(chosen)}"
            )
    return chosen


def _words(crop: Crop) -> str:
    return describe(crop, crop[1] if crop else 0)
