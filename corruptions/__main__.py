"""Draw a contact sheet of one picture, or write an ImageNet-C-style tree of a folder of classes.

    python -m corruptions IMAGE --out sheet.png     every corruption by every severity
    python -m corruptions DIR --out DIR_C           DIR_C/name/severity/class/file

An interrupted tree goes on where it stopped when the same command is given again.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as F
from tqdm import tqdm

from corruptions import CORRUPTIONS, SEVERITIES, corrupt, frost_source

_BATCH = 64  # pictures held at a time
# ImageNet-C's files went through JPEG once more after their corruption.
_PUBLISHED = {"format": "JPEG", "quality": 85, "optimize": True}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m corruptions", description="Write corrupted pictures."
    )
    parser.add_argument("source", type=Path, help="a picture, or a folder of class folders")
    parser.add_argument("--out", type=Path, required=True, help="the sheet's file, or the tree")
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        help="side in px (224): at 224 scaled to 256 and cropped as ImageNet-C, else scaled to fit",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (0)")
    parser.add_argument("--only", nargs="+", choices=CORRUPTIONS, metavar="NAME", help="not all 19")
    parser.add_argument("--png", action="store_true", help="lossless files, not ImageNet-C's JPEG")
    parser.add_argument("--device", default="cpu", help="torch device to compute on (cpu)")
    parser.add_argument("--frost-dir", help="folder of ImageNet-C's frost pictures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Draw the sheet of a picture, write the tree of a folder; what is wrong takes one line."""
    args = parse_args(argv)
    args.only = args.only or list(CORRUPTIONS)
    try:
        if args.source.is_dir():
            write_tree(args)
        elif args.source.is_file():
            draw_sheet(args)
        else:
            raise ValueError(f"{args.source} is no picture and no folder of class folders")
    except (OSError, RuntimeError, ValueError, Image.DecompressionBombError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


def load(path: str | Path, size: int) -> Tensor:
    """Read a picture as uint8 (3, size, size).

    At 224 as ImageNet-C was made: the shorter side to 256, bilinear, then the middle. At others
    as Tiny-ImageNet-C: resized to the square.
    """
    with Image.open(path) as file:
        picture = file.convert("RGB")
    if size == 224:
        picture = F.center_crop(F.resize(picture, [256]), [224, 224])
    pixels: Tensor = F.pil_to_tensor(F.resize(picture, [size, size]))
    return pixels


def apply(
    args: argparse.Namespace, images: Tensor, name: str, severity: int, index: list[int]
) -> Tensor:
    """Corrupt the images numbered `index` as the command line asks."""
    options = {"frost_dir": args.frost_dir} if name == "frost" else {}
    corrupted = corrupt(
        images.to(args.device), name, severity, seed=args.seed, index=index, **options
    )
    return corrupted.cpu()


def draw_sheet(args: argparse.Namespace) -> None:
    """Draw one picture under all corruptions: a row for each, a column for each severity."""
    picture = load(args.source, args.size)[None]
    rows = []
    for name in tqdm(args.only):
        tiles = [apply(args, picture, name, severity, [0]) for severity in SEVERITIES]
        rows.append(torch.cat([picture, *tiles], dim=3))
    sheet = torch.cat(rows, dim=2)[0].permute(1, 2, 0).numpy()
    height, width = (side / args.size for side in sheet.shape[:2])  # in tiles
    figure = Figure((1.5 * width + 1.5, 1.5 * height + 0.3), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    left, top = 1.5 / figure.get_figwidth(), 1 - 0.3 / figure.get_figheight()
    axes.set_position((left, 0, 1 - left, top))
    axes.imshow(sheet, aspect="auto")
    middles = [args.size * (tile + 0.5) for tile in range(max(len(rows), 6))]
    axes.set_yticks(middles[: len(rows)], args.only)
    axes.set_xticks(middles[:6], ["clean", *map(str, SEVERITIES)])
    axes.set_frame_on(False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.savefig(args.out)


def write_tree(args: argparse.Namespace) -> None:
    """Write out/name/severity/class/file for all pictures, those that exist already apart."""
    paths = [Path(path) for path, _ in ImageFolder(args.source).samples]
    suffix = ".png" if args.png else ".JPEG"
    targets = [path.relative_to(args.source).with_suffix(suffix) for path in paths]
    if len(set(targets)) < len(targets):
        raise ValueError(f"two pictures of {args.source} differ in their suffix only; rename one")
    check_settings(args)
    with tqdm(total=len(paths) * len(args.only) * len(SEVERITIES), unit="file") as bar:
        for start in range(0, len(paths), _BATCH):
            batch = range(start, min(start + _BATCH, len(paths)))
            images: Tensor | None = None
            for name in args.only:
                for severity in SEVERITIES:
                    folder = args.out / name / str(severity)
                    missing = [i for i in batch if not (folder / targets[i]).exists()]
                    if missing and images is None:
                        images = torch.stack([load(paths[i], args.size) for i in batch])
                    if missing and images is not None:
                        chosen = images[torch.tensor(missing) - start]
                        corrupted = apply(args, chosen, name, severity, missing)
                        for i, image in zip(missing, corrupted, strict=True):
                            save(image, folder / targets[i], png=args.png)
                    bar.update(len(batch))


def check_settings(args: argparse.Namespace) -> None:
    """Note in the tree how its pixels are made; refuse to go on with a tree made otherwise."""
    settings = {
        "source": str(args.source.resolve()),
        "size": args.size,
        "seed": args.seed,
        "frost": frost_source(args.frost_dir),
        "png": args.png,
    }
    note = args.out / "settings.json"
    if note.exists():
        if (found := json.loads(note.read_text())) != settings:
            raise ValueError(f"{args.out} was begun with {found}; choose another --out")
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings, indent=2) + "\n")


def save(image: Tensor, path: Path, *, png: bool) -> None:
    """Write uint8 (3, H, W) to a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    options = {"format": "PNG"} if png else _PUBLISHED
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(unfinished, **options)
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()
