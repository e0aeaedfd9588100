"""Write a contact sheet of one image, or an ImageNet-C-style tree of a folder of class folders.

    python -m corruptions IMAGE --out sheet.png     every corruption at every severity
    python -m corruptions DIR --out DIR_C           DIR_C/name/severity/class/file

`evaluate.py --imagenet-c DIR_C` scores models on such a tree. For the test images of a folder with
train/ and val/, DIR is its val/: the files are found by class and name.

To resume an interrupted tree, run the same command again.
"""

import argparse
import errno
import hashlib
import itertools
import json
import math
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F
from tqdm import tqdm

from corruptions import CORRUPTIONS, MIN_SIDE, SEVERITIES, corrupt, frost_source
from corruptions.frost import FROST_DIR
from corruptions.transform import SUFFIXES, center_crop, has_only_folders, list_classes, upright_rgb

_BATCH = 64  # images in memory at a time
# ImageNet-C's published files were compressed as JPEG again after the corruption.
_PUBLISHED = {"format": "JPEG", "quality": 85, "optimize": True}


class _Parser(argparse.ArgumentParser):
    """Argument parser that prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see --help)")


def _fail(message: str, code: int = 2) -> NoReturn:
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)  # of file names
    try:
        print(("error: " if code == 2 else "\n") + line, file=sys.stderr)
    except OSError:  # on the full disk: Python would try again, and exit with code 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    sys.exit(code)


def _whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Make an argparse type that accepts whole numbers from `low` to `high`."""
    rule = f"from {low} up" if high == math.inf else f"from {low} to {high}"

    def convert(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {rule}")
        return int(text)

    return convert


def _path(text: str) -> Path:
    if not text:  # such as an unset variable of a shell, and not the current folder
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return Path(text)


def _device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).cpu()  # fails on "meta", too
        return torch.device(name)
    except (AssertionError, ImportError, RuntimeError):  # ImportError: a vendor's
        raise argparse.ArgumentTypeError(
            f"{name!r} is not a device of this machine: choose cpu, cuda, mps, ..."
        ) from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = _Parser(
        prog="python -m corruptions",
        description="Write a contact sheet of one image, or a tree like ImageNet-C of a folder.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=_path, help="an image file, or a folder of class folders")
    parser.add_argument(
        "--out", type=_path, required=True,
        help="file of the contact sheet, or folder of the tree that evaluate.py --imagenet-c reads",
    )  # fmt: skip
    parser.add_argument(
        "--size",
        type=_whole(MIN_SIDE, 2**14),
        default=224,
        help="side of the output images in pixels (default: 224); at 224 the images are resized to "
        "256 and cropped as for ImageNet-C, at other sizes they are resized to the square",
    )
    parser.add_argument("--seed", type=_whole(0), default=0, help="seed of all draws (default: 0)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=list(CORRUPTIONS),
        help="corruptions to apply (default: the nineteen of the benchmark); may name those for "
        "validation, too",
    )  # fmt: skip
    parser.add_argument(
        "--png",
        action="store_true",
        help="write the tree as lossless PNG files instead of ImageNet-C's JPEG",
    )
    parser.add_argument("--device", type=_device, default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--frost-dir",
        type=_path,
        help="folder with ImageNet-C's frost photographs "
        f"(default: ${FROST_DIR}, or textures that are drawn)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the sheet or the tree. Print an error as one line and exit with code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    args = parse_args(argv)
    try:
        for name in args.only:  # raises for unknown names and sizes, before anything is written
            apply(args, torch.zeros(1, 3, args.size, args.size, dtype=torch.uint8), name, 1, [0])
        if args.source.is_dir():
            write_tree(args)
        elif args.source.is_file():
            check_sheet(args.out, args.source)
            draw_sheet(args)
        else:
            raise ValueError(
                f"{args.source} is neither an image file nor a folder; "
                "pass an image or a folder of class folders"
            )
    except OSError as error:
        name = error.filename2 or error.filename  # filename2 is what could not be replaced
        message = f"{name}: {error.strerror}" if name else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += "; free some space, and run the same command again: what was written is kept"
        _fail(message)
    except (MemoryError, RuntimeError) as error:  # torch's texts may have many lines
        line = str(error).partition("\n")[0] or type(error).__name__
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        _fail("out of memory: lower --size" if full or "DefaultCPUAllocator" in line else line)
    except ValueError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped; what was written is kept: run the same command again", 130)


def load(path: str | Path, size: int) -> Tensor:
    """Load an image as upright uint8 (3, size, size).

    For 224 it is prepared as for ImageNet-C: the shorter side is resized to 256 (bilinear), and the
    center is cropped. For other sizes it is resized to the square, as for Tiny-ImageNet-C.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            picture = upright_rgb(file)
    except MemoryError:
        raise  # not the file's fault
    except Exception as error:  # Pillow raises nearly every kind on a broken file, without its name
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from None
    if size == 224:
        picture = center_crop(picture, 256, 224)
    pixels: Tensor = F.pil_to_tensor(F.resize(picture, [size, size]))
    return pixels


def apply(
    args: argparse.Namespace, images: Tensor, name: str, severity: int, index: list[int]
) -> Tensor:
    """Corrupt uint8 images (B, 3, H, W) as the command line says, and return them on the CPU.

    The other arguments are those of `corrupt`.
    """
    options = {"frost_dir": args.frost_dir} if name == "frost" else {}
    corrupted = corrupt(
        images.to(args.device), name, severity, seed=args.seed, index=index, **options
    )
    return corrupted.cpu()


def check_sheet(out: Path, source: Path) -> None:
    """Create the sheet's folder. Raise ValueError unless it can be an image file of its own."""
    with _plotting() as new_figure:
        known = new_figure().canvas.get_supported_filetypes()
    if out.is_dir() or out.suffix[1:].lower() not in known:
        raise ValueError(
            f"--out {out} is not the name of an image file; choose one that ends with .png, as the "
            "source is one image"
        )
    if out.exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the source itself; name another file")
    out.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _plotting() -> Iterator[Any]:
    """Yield Matplotlib's Figure, without a notebook's backend and the user's matplotlibrc."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib.figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield matplotlib.figure.Figure


def draw_sheet(args: argparse.Namespace) -> None:
    """Write a contact sheet of one image: a row per corruption and a column per severity."""
    picture = load(args.source, args.size)[None]
    rows = []
    for name in tqdm(args.only):
        tiles = [apply(args, picture, name, severity, [0]) for severity in SEVERITIES]
        rows.append(torch.cat([picture, *tiles], dim=3))
    sheet = torch.cat(rows, dim=2)[0].permute(1, 2, 0).numpy()
    height, width = (side / args.size for side in sheet.shape[:2])  # in tiles
    with _plotting() as new_figure:
        figure = new_figure((1.5 * width + 1.5, 1.5 * height + 0.3), dpi=150)
        left, top = 1.5 / figure.get_figwidth(), 1 - 0.3 / figure.get_figheight()
        axes = figure.add_axes((left, 0, 1 - left, top))
        axes.imshow(sheet, aspect="auto")
        middles = [args.size * (tile + 0.5) for tile in range(max(len(rows), 6))]
        axes.set_yticks(middles[: len(rows)], args.only)
        axes.set_xticks(middles[:6], ["clean", *map(str, SEVERITIES)])
        axes.set_frame_on(False)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        with _replacing(args.out) as unfinished:
            figure.savefig(unfinished, format=args.out.suffix[1:])


def write_tree(args: argparse.Namespace) -> None:
    """Write out/name/severity/class/file for all images. Existing files are skipped."""
    paths = find_images(args.source)
    suffix = ".png" if args.png else ".JPEG"
    targets = [path.relative_to(args.source).with_suffix(suffix) for path in paths]
    if len(set(targets)) < len(targets):
        raise ValueError(f"two images in {args.source} differ only in their suffix; rename one")
    check_settings(args, targets)
    with tqdm(total=len(paths) * len(args.only) * len(SEVERITIES), unit="file") as bar:
        for start in range(0, len(paths), _BATCH):
            batch = range(start, min(start + _BATCH, len(paths)))
            images: Tensor | None = None
            for name, severity in itertools.product(args.only, SEVERITIES):
                folder = args.out / name / str(severity)
                missing = [i for i in batch if not (folder / targets[i]).exists()]
                if missing:
                    if images is None:
                        images = torch.stack([load(paths[i], args.size) for i in batch])
                    chosen = images[torch.tensor(missing) - start]
                    corrupted = apply(args, chosen, name, severity, missing)
                    for i, image in zip(missing, corrupted, strict=True):
                        save(image, folder / targets[i], png=args.png)
                bar.update(len(batch))


def find_images(source: Path) -> list[Path]:
    """List the images of all class folders. Raise ValueError if there are no such folders."""
    found = list_classes(source)  # in evaluate.py's order: an image's draws depend on its place
    if not found:
        raise ValueError(f"{source} has no class folders; the layout is DIR/class/file")
    if nested := [name for name in found if has_only_folders(source / name)]:
        part = source / min(nested, key=lambda name: name.lower().startswith("train"))
        raise ValueError(
            f"{part} holds only folders, so it is no class; the layout is DIR/class/file: give "
            f"{part} as DIR"
        )
    if empty := [name for name, files in found.items() if not files]:
        raise ValueError(f"{source / empty[0]} has no images ({', '.join(SUFFIXES)})")
    return [Path(file) for files in found.values() for file in files]


def check_settings(args: argparse.Namespace, targets: list[Path]) -> None:
    """Save the settings of the tree. Raise ValueError if it was begun with others.

    The list of files is one of the settings, since an image's draws depend on its place in it.
    """
    names = "\n".join(target.with_suffix("").as_posix() for target in targets)
    settings = {
        "source": str(args.source.resolve()),
        "size": args.size,
        "seed": args.seed,
        "frost": frost_source(args.frost_dir),
        "png": args.png,
        "images": f"{len(targets)}, {hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}",
    }
    if args.out.is_file():
        raise ValueError(f"--out {args.out} is a file; name a folder, as the source is a folder")
    if args.out.resolve().is_relative_to(args.source.resolve()):
        raise ValueError(f"--out {args.out} is in the source; name a folder beside {args.source}")
    note = args.out / "settings.json"
    if not note.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), _replacing(note) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n")
            _link(unfinished, note)
    try:
        found = json.loads(note.read_text())
        same = {"images": settings["images"], **found} == settings  # older trees have none
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{note} is damaged; choose another --out") from None
    if not same:
        raise ValueError(f"{args.out} was begun with {found}; use these settings or another --out")


def _link(unfinished: Path, path: Path) -> None:
    """Give a file a second name. Unlike a rename, this raises FileExistsError if the name is taken.

    Does nothing where the file system has no hard links.
    """
    try:
        os.link(unfinished, path)
    except FileExistsError:  # another command that began at the same time
        raise
    except OSError:
        pass


def save(image: Tensor, path: Path, *, png: bool) -> None:
    """Write an image, uint8 (3, H, W) on the CPU, atomically, and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"format": "PNG"} if png else _PUBLISHED
    with _replacing(path) as unfinished:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(unfinished, **options)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the file to write, which takes the name `path` once it is complete."""
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")  # two may write one tree
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
