"""Corruptions in data loading: image files, and a transform like those of torchvision's `v2`."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import functional as F

from corruptions.apply import corrupt
from corruptions.registry import MIN_SIDE

# The suffixes of files that count as images.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")

_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image: Image.Image) -> Image.Image:
    """Load an opened image file as upright RGB, 8 bits per channel.

    Raises:
        ValueError: the file has 16 or 32 bits per pixel, and an unknown value range; or more
            pixels than Pillow's limit, since it may be meant to exhaust memory; or is a program.
        OSError, SyntaxError: the file is damaged.
    """
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        size = f"{image.width} x {image.height}"
        raise ValueError(f"has {size} pixels, too many to be safe: shrink it")
    if image.format == "EPS":  # whatever its suffix; Pillow would let Ghostscript run it
        raise ValueError("is a PostScript program, which is not run: save the image as PNG")
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF raises nearly every kind, and the pixels are readable
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith(("I", "F")):  # gray, which convert() would cut off at 255
        values = np.asarray(image)
        least, most = values.min(), values.max()
        if image.mode == "F" or least < 0 or most >= 2**16 or 0 < most < 256:
            raise ValueError(
                f"more than 8 bits per pixel, unknown value range (up to {most:g}): save it with 8"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies even RGB


def center_crop(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Resize the shorter side to `resize` px, and cut out the center, `size` (up to `resize`) px.

    Resizing is bilinear and antialiased.
    """
    short = min(image.size)
    if max(image.size) > 1000 * short:  # as a whole, it might not fit into memory
        left, top = ((side - short * size / resize) / 2 for side in image.size)
        box = (left, top, image.width - left, image.height - top)
        return image.resize((size, size), Image.Resampling.BILINEAR, box)
    cut: Image.Image = F.center_crop(F.resize(image, [resize]), [size, size])
    return cut


def list_classes(root: Path) -> dict[str, list[str]]:
    """List the image files below each class folder, both sorted."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    return {name: sorted(walk_images(root / name)) for name in names if not name.startswith(".")}


def are_folders(path: Path) -> Iterator[bool]:
    """Yield for each visible entry whether it is a folder; nothing if `path` is not a folder."""
    if path.is_dir():
        with os.scandir(path) as entries:
            yield from (os.path.isdir(entry.path) for entry in entries if entry.name[0] != ".")


def has_only_folders(path: Path) -> bool:
    """Return whether a folder has visible entries, and all of them are folders."""
    content = are_folders(path)
    return next(content, False) and all(content)


def walk_images(root: Path) -> Iterator[str]:
    """Yield the image files below a folder. Read a folder once, however many links lead to it.

    The paths have forward slashes even on Windows, because their order decides splits and draws.
    Leaves out hidden files and folders, such as thumbnails. Raises OSError where a folder cannot be
    read.
    """
    seen = set()
    for folder, inside, files in os.walk(root, onerror=_raise, followlinks=True):
        # Sorted, so that it is read under the same name everywhere.
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            inside.clear()
            continue
        seen.add(real)
        for file in files:
            if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."):
                yield os.path.join(folder, file).replace(os.sep, "/")


def _raise(error: OSError) -> NoReturn:
    raise error


class Corrupt(nn.Module):
    """Corrupt an image or a batch of images, with new draws for each call and each image.

    The draws follow from torch's global random number generator. A `DataLoader` seeds it in each
    worker and epoch. `CorruptedDataset` fixes the draws by the index of the image instead.

    Args:
        name, severity, profile, options: as for `corrupt`.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `corrupt`.
    """

    def __init__(
        self, name: str, severity: int | None, *, profile: int | str = "auto", **options: Any
    ) -> None:
        super().__init__()
        self.name, self.severity = name, severity
        self.options = {"profile": profile, **options}
        if {"seed", "index"} & options.keys():
            raise TypeError("seed and index are arguments of each call, not of Corrupt")
        black = torch.zeros(1, 3, MIN_SIDE, MIN_SIDE, dtype=torch.uint8, device="cpu")
        corrupt(black, name, severity, **self.options)  # checks the arguments before the first call

    def forward(
        self, image: Any, *, seed: int | None = None, index: Tensor | Sequence[int] | None = None
    ) -> Any:
        """Return the corrupted image or batch.

        Args:
            image: an RGB PIL image, a NumPy array (H, W, 3) or (B, H, W, 3), or a tensor
                (3, H, W) or (B, 3, H, W). Arrays and tensors are uint8, or floating point in
                [0, 1]. Not modified.
            seed: as for `corrupt`. Default: drawn.
            index: as for `corrupt`.

        Returns:
            The same kind of image, with the same shape and dtype.

        Raises:
            TypeError, ValueError, FileNotFoundError: as `corrupt`.
        """
        pixels = _to_tensor(image)
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        batch = pixels if pixels.ndim == 4 else pixels[None]
        result = corrupt(batch, self.name, self.severity, seed=seed, index=index, **self.options)
        result = result.view_as(pixels)
        if isinstance(image, Tensor):
            return result.as_subclass(type(image))
        array = np.ascontiguousarray(result.movedim(-3, -1).numpy())
        return Image.fromarray(array) if isinstance(image, Image.Image) else array

    def extra_repr(self) -> str:
        """Return the arguments for `repr`."""
        options = (f"{key}={value!r}" for key, value in self.options.items())
        return ", ".join([repr(self.name), repr(self.severity), *options])


def _to_tensor(image: Any) -> Tensor:
    """Check the kind and the shape. Return the pixels as a tensor (3, H, W) or (B, 3, H, W)."""
    if isinstance(image, Tensor):
        pixels, axis = image.as_subclass(Tensor), -3
    elif isinstance(image, np.ndarray | Image.Image):
        pixels, axis = torch.from_numpy(np.array(image, order="C")), -1
    else:
        raise TypeError(
            f"image must be a PIL image, a NumPy array or a tensor, got {type(image).__name__}"
        )
    picture = isinstance(image, Image.Image)
    if pixels.ndim not in (3, 4) or pixels.shape[axis] != 3 or (picture and image.mode != "RGB"):
        kind = f"{image.mode} image" if picture else type(image).__name__
        raise ValueError(
            "image must be an RGB PIL image, an array (H, W, 3) or (B, H, W, 3), or a tensor"
            f" (3, H, W) or (B, 3, H, W), got {kind} of shape {tuple(pixels.shape)};"
            " corruptions.transform.upright_rgb converts PIL images"
        )
    return pixels.movedim(axis, -3)


class CorruptedDataset(Dataset[Any]):
    """Corrupt the images of a dataset, with draws that are fixed by their indices.

    Sample i has the image `corruption(image, seed=seed, index=[i])` in each epoch and worker.

    Args:
        dataset: map-style dataset. A sample is an image, or a tuple or list that begins with one.
        corruption: the corruption.
        seed: as for `corrupt`.
        transform: function of a corrupted image, such as a normalization. Default: none.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        corruption: Corrupt,
        *,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.dataset, self.corruption = dataset, corruption
        self.seed, self.transform = seed, transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]  # -1 is the last image, and has its draws
        sample = self.dataset[index]
        image, *rest = sample if isinstance(sample, tuple | list) else [sample]
        image = self.corruption(image, seed=self.seed, index=[index])
        if self.transform is not None:
            image = self.transform(image)
        if not isinstance(sample, tuple | list):
            return image
        named = getattr(sample, "_make", type(sample))  # of a namedtuple
        return named([image, *rest])
