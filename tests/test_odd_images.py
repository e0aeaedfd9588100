"""Test that unusual file names, formats, pixel modes and orientations of images are accepted."""

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from harness import errors
from harness.images import cache, datasets
from tests.support.tiny import image_folder
from tests.support.world import BAD_IMAGES, EVALUATE, SIDE, TRAIN, png


def test_odd_names_and_kinds_of_files_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check training, evaluation and printing, even to a terminal that supports only ASCII."""
    root = tmp_path / "set of\nimages"
    os.makedirs(root)
    for name in (b"a b", b"caf\xe9", b"new\nline", b"$x_{$", b"<b>&"):
        folder = os.path.join(os.fsencode(root), name)
        os.mkdir(folder)
        for i, kind in enumerate(("PNG", "GIF", "JPEG", "BMP", "WEBP", "TIFF")):
            path = os.path.join(folder, b"%d \n\xff.%s" % (i, kind.lower().encode()))
            Path(os.fsdecode(path)).write_bytes(png(SIDE + i, SIDE, format=kind))
        os.mkdir(os.path.join(folder, b"deep"))
        os.symlink(b"..", os.path.join(folder, b"deep", b"up"))  # a loop
    out = os.fsdecode(os.fsencode(tmp_path) + b"/r\xfcn")
    flags = ["--cache-dir", str(tmp_path / "cache")]
    sink = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink, encoding="ascii"))
    for script, argv in (
        (train, [*TRAIN, *flags, "--data", str(root), "-b", "8", "--output-dir", out]),
        (evaluate, [f"{out}/last.pt", *EVALUATE[1:], *flags, "--output-dir", f"{out}/evaluation",
                    "--dump-images", "2", "--batch-size", "3"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            errors.run_script(partial(script.main, argv))
        assert ended.value.code == 0
    assert rb"5 classes: $x_{$ <b>& a b caf\udce9 new" in sink.getvalue()
    assert rb"r\udcfcn" in Path(out, "evaluation", "results.md").read_bytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation: int, tmp_path: Path) -> None:
    """Check that an image stored in each of the EXIF orientations is decoded upright."""
    upright = np.zeros((SIDE, SIDE, 3), np.uint8)
    upright[:4, :8] = (255, 0, 0)
    upright[:, -3:] = (0, 0, 255)
    turns: dict[int, Callable[[Any], Any]] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    found = cache.decode(tmp_path / "x.png", SIDE)
    assert not isinstance(found, str)
    assert (found.transpose(1, 2, 0) == upright).all()


def test_kinds_of_pixels(tmp_path: Path) -> None:
    """Check that each mode gives the pixels of the RGB image, and an animation its first frame."""
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (SIDE, 1))
    grey = Image.fromarray(ramp)
    moving = [grey, Image.fromarray(255 - ramp)]
    cases: dict[str, tuple[Callable[[Path], None], int]] = {
        "l.png": (grey.save, 0), "rgb.png": (grey.convert("RGB").save, 0),
        "p.png": (grey.convert("P").save, 0), "rgba.png": (grey.convert("RGBA").save, 0),
        "16.png": (Image.fromarray(ramp.astype(np.uint16) * 257).save, 0),
        "16.tif": (Image.fromarray(ramp.astype(np.uint16) * 257).save, 0),
        "cmyk.jpg": (partial(grey.convert("CMYK").save, quality=100), 3),
        "l.jpg": (partial(grey.save, quality=100), 3),
        "moving.gif": (partial(moving[0].save, save_all=True, append_images=moving[1:]), 0),
    }  # fmt: skip
    for name, (save, tolerance) in cases.items():
        save(tmp_path / name)
        found = cache.decode(tmp_path / name, SIDE)
        assert not isinstance(found, str), found
        assert abs(found.astype(int) - ramp).max() <= tolerance, name


def test_bad_images_are_skipped_where_asked(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", classes=2, each=20, side=SIDE)
    for name, (content, _) in BAD_IMAGES.items():
        (root / "class0" / name).write_bytes(content)
    sets = datasets.load_dataset(str(root), size=SIDE, cache_dir=tmp_path, skip_bad_images=True)
    assert len(sets.train.labels) + len(sets.test.labels) == 40
