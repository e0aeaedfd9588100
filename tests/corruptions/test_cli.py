"""Test the command line of `corruptions`: the contact sheet and the folder of corrupted images."""

import errno
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from corruptions import SEVERITIES, __main__, corrupt, frost_source
from harness.images.folders import list_folder

ONLY = ["--only", "gaussian_noise", "frost", "saturate"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Create a folder of two classes with three images of different shapes and formats."""
    generator = np.random.default_rng(0)
    for name, shape in (("cat/b.png", (40, 50)), ("cat/a.png", (33, 32)), ("dog/c.bmp", (32, 70))):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    return tmp_path / "source"


def read(path: Path) -> torch.Tensor:
    """Read an image file as a (3, H, W) tensor."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_sheet_has_a_tile_for_every_setting(source: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    __main__.main([str(source / "cat/b.png"), "--out", str(sheet), "--size", "32", *ONLY])
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    height, width = round(1.5 * 150), round(1.5 * 150)  # size of a tile on the sheet
    assert pixels.shape[:2] == (3 * height + 45, 7 * width)
    tiles = pixels[45:, width:].reshape(3, height, 6, width, 3).swapaxes(1, 2)
    assert tiles.std(axis=(2, 3, 4)).min() > 5  # no tile is empty
    for row in range(3):
        assert np.abs(tiles[row, 0] - tiles[0, 0]).mean() < 4  # the clean image comes first
        assert np.abs(tiles[row, 5] - tiles[row, 0]).mean() > 10


@pytest.mark.parametrize(
    ("cause", "code"), [(OSError(errno.ENOSPC, "full"), 2), (KeyboardInterrupt(), 130)]
)
def test_the_exit_code_is_the_same_where_the_message_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: BaseException, code: int
) -> None:
    """Check a closed pipe. Where something is left to write, closing it fails, as at Python's exit.

    A full disk fails in the same way.
    """
    monkeypatch.setattr(__main__, "write_tree", Mock(side_effect=cause))
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", closed := Mock(wraps=stream))
        with pytest.raises(SystemExit) as end:
            __main__.main([str(source), "--out", str(tmp_path / "out")])
    assert end.value.code == code and closed.write.called


def test_closed_streams_do_not_end_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    __main__.main([str(source), "--out", str(tmp_path / "tree"), "--size", "32", *ONLY])
    sys.stdout.close()
    sys.stderr.close()
    assert len(list((tmp_path / "tree").rglob("*.JPEG"))) == 3 * 3 * 5


def test_images_are_listed_as_evaluate_lists_them(tmp_path: Path) -> None:
    seen = ("b/z.png", "b/mid/y.png", "b/a.png", "a/x.png")
    for name in (*seen, ".cache/c.png", "b/.thumbnails/a.png", "b/._a.png"):  # the last are hidden
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    listed = list_folder(tmp_path, None, 0, hold_out=False).parts["test"]
    assert {file.path for file in listed} == set(seen) and len(listed) == len(seen)
    assert __main__.find_images(tmp_path) == [tmp_path / file.path for file in listed]


def test_images_are_read_as_train_reads_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gray = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    eight, sixteen = (__main__.load(tmp_path / f"{n}.png", 32) for n in ("gray", "gray16"))
    assert torch.equal(eight, sixteen)
    Image.fromarray(gray.astype(np.float32) / 255).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: more than 8 bits"):
        __main__.load(tmp_path / "float.tif", 32)
    for low, high in ((0, 65536), (-1, 300), (0, 255)):
        wide = np.linspace(low, high, 32 * 32).reshape(32, 32).astype(np.int32)
        Image.fromarray(wide).save(tmp_path / "wide.tif")
        with pytest.raises(ValueError, match=r"wide\.tif: more than 8 bits"):
            __main__.load(tmp_path / "wide.tif", 32)
    (source / ".hidden").mkdir()
    Image.fromarray(gray).save(source / "dog" / "d.gif")
    out = tmp_path / "out"
    __main__.main([str(source), "--out", str(out), "--size", "32", "--only", "fog"])
    assert (out / "fog" / "1" / "dog" / "d.JPEG").exists() and not list(out.rglob(".hidden"))
    broken = source / "dog" / "e.png"
    broken.write_bytes((tmp_path / "gray.png").read_bytes()[:40])
    with pytest.raises(SystemExit):
        __main__.main([str(source), "--out", str(tmp_path / "new"), "--size", "32"])
    assert f"{broken}: " in capsys.readouterr().err


def test_tree_holds_what_corrupt_gives(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [str(source), "--out", str(out), "--size", "32", "--seed", "7", "--png", *ONLY]
    __main__.main(command)
    files = sorted(path for path in out.rglob("*.*") if path.is_file())
    assert len(files) == 3 * 5 * 3 + 1
    originals = [source / name for name in ("cat/a.png", "cat/b.png", "dog/c.bmp")]
    images = torch.stack([__main__.load(path, 32) for path in originals])
    for name in ONLY[1:]:
        for severity in SEVERITIES:
            expected = corrupt(images, name, severity, seed=7)
            for path, image in zip(("cat/a.png", "cat/b.png", "dog/c.png"), expected, strict=True):
                assert torch.equal(read(out / name / str(severity) / path), image)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["seed"] == 7 and settings["frost"] == frost_source()


def refused(command: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the command exits with code 2 and that its only line gives the reason."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        __main__.main(command)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x and "%|" not in x]
    assert exit_info.value.code == 2
    assert line.startswith("error: ") and reason in line, line


def test_tree_goes_on_where_it_stopped(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = [str(source), "--out", str(out), "--size", "32", *ONLY]
    __main__.main(command)
    kept, lost = out / "frost/3/cat/a.JPEG", out / "frost/3/cat/b.JPEG"
    pixels, stamp = read(lost), kept.stat().st_mtime_ns
    assert kept.read_bytes().startswith(b"\xff\xd8\xff")  # signature of a JPEG file
    lost.unlink()
    monkeypatch.setattr(__main__, "_BATCH", 2)  # the division into batches must not matter
    __main__.main(command)
    assert torch.equal(read(lost), pixels) and kept.stat().st_mtime_ns == stamp
    assert not list(out.rglob("*.tmp"))
    refused([*command, "--seed", "1"], "was begun with", capsys)
    settings = out / "settings.json"
    recorded = json.loads(settings.read_text())
    del recorded["images"]  # as a tree of an earlier version
    settings.write_text(json.dumps(recorded))
    __main__.main(command)
    settings.write_text("{}")
    refused(command, "was begun with", capsys)
    for damage in ("{", "[" * 100_000):
        settings.write_text(damage)
        refused(command, f"{settings} is damaged", capsys)


def test_a_failed_write_leaves_no_file_and_full_memory_is_a_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = [str(source), "--out", str(out), "--size", "32", *ONLY]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
        refused(command, "No space left on device; free some space, and run the same", capsys)
    assert not list(out.rglob("*.tmp"))
    monkeypatch.setattr(__main__, "upright_rgb", Mock(side_effect=MemoryError))
    refused(command, "out of memory: lower --size", capsys)


def test_a_failed_write_keeps_the_earlier_sheet(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fill(_: Image.Image, path: str, **__: Any) -> None:
        Path(path).write_bytes(b"half of a sheet")
        raise OSError(28, "No space left on device")

    sheet = tmp_path / "out" / "sheet.PNG"
    command = [str(source / "cat/b.png"), "--out", str(sheet), "--size", "32", *ONLY]
    __main__.main(command)
    before = sheet.read_bytes()
    monkeypatch.setattr(Image.Image, "save", fill)
    refused(command, "No space left on device; free some space, and run the same", capsys)
    assert sheet.read_bytes() == before and os.listdir(sheet.parent) == ["sheet.PNG"]


def test_an_interrupt_ends_in_a_line_and_loses_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [str(source), "--out", str(tmp_path / "out"), "--size", "32", *ONLY]
    draw, calls = __main__.apply, []

    def interrupt(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 6:  # three try the names out
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(__main__, "apply", interrupt)
        with pytest.raises(SystemExit) as exit_info:
            __main__.main(command)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err.endswith("was written is kept: run the same command again\n")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.JPEG")}
    __main__.main(command)
    assert written and all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_a_tree_of_other_files_is_not_continued(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(source), "--out", str(tmp_path / "out"), "--size", "32", *ONLY]
    __main__.main(command)
    (source / "cat/a.png").rename(source / "cat/z.png")  # now other images have other draws
    refused(command, "was begun with", capsys)
    inside = [str(source), "--out", str(source / "out"), "--size", "32", *ONLY]
    refused(inside, "is in the source", capsys)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_of_two_that_begin_a_tree_at_once_one_decides_the_settings(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], links: bool,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = [str(source), "--out", str(out), "--size", "32", *ONLY]
    if links:
        replacing = __main__._replacing

        def late(path: Path) -> Any:  # the other command begins and ends before this one writes
            monkeypatch.setattr(__main__, "_replacing", replacing)
            __main__.main([*command, "--seed", "7"])
            return replacing(path)

        monkeypatch.setattr(__main__, "_replacing", late)
        refused(command, "was begun with {", capsys)
        assert not list(out.rglob("*.tmp"))
    else:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(95, "Operation not supported")))
    __main__.main([*command, "--seed", "7"])
    assert json.loads((out / "settings.json").read_text())["seed"] == 7


def test_a_class_folder_without_images_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name would be missing in the tree, and evaluate.py would find other classes."""
    (source / "bird").mkdir()
    for _ in range(2):  # empty, and with a file that is no image
        refused([str(source), "--out", str(tmp_path / "out")], "bird has no images (.", capsys)
        (source / "bird" / "list.txt").touch()
    assert not (tmp_path / "out").exists()


def test_pictures_are_prepared_as_imagenet_c_s(tmp_path: Path) -> None:
    """Check the resizing of images.

    For 224 px, the shorter side is resized to 256 and the center is cropped. For other sizes, the
    whole image is resized to the square.
    """
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 401, 3), np.uint8))
    picture.save(path := tmp_path / "picture.png")
    scaled = picture.resize((int(256 * 401 / 300), 256), Image.Resampling.BILINEAR)
    expected = np.asarray(scaled)[16:240, 59:283]
    assert np.array_equal(__main__.load(path, 224).permute(1, 2, 0).numpy(), expected)
    expected = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(__main__.load(path, 64).permute(1, 2, 0).numpy(), expected)


def test_any_error_of_pillow_names_the_file(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Image.Image) -> None:
        raise TypeError

    monkeypatch.setattr(__main__, "upright_rgb", fail)
    command = [str(source / "cat/a.png"), "--out", str(source / "x.png")]
    refused(command, f"{source / 'cat/a.png'}: TypeError", capsys)


def test_a_line_break_in_a_name_does_not_hide_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a\n\x1b[31m.png"
    picture.write_text("no picture")
    refused([str(picture), "--out", str(tmp_path / "x.png")], r"a\n\x1b[31m.png: cannot", capsys)


def test_a_file_that_cannot_be_replaced_is_named(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Access is denied", str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    command = [str(source), "--out", str(out := tmp_path / "out"), "--size", "32", "--only", "fog"]
    refused(command, f"{out / 'settings.json'}: Access is denied", capsys)


def test_an_error_of_torch_is_its_first_line(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(source), "--out", str(source / "x")]
    for text, said in (("out of memory\n at line 1", "error: out of memory"), ("", "RuntimeError")):
        monkeypatch.setattr(__main__, "apply", Mock(side_effect=RuntimeError(text)))
        refused(command, said, capsys)
    for full in (RuntimeError("[enforce fail] DefaultCPUAllocator: no"), torch.OutOfMemoryError()):
        monkeypatch.setattr(__main__, "apply", Mock(side_effect=full))
        refused(command, "error: out of memory: lower --size", capsys)


def test_images_above_pillows_limit_are_refused_by_name(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = source / "cat/b.png"  # of 40 x 50 pixels
    command = [str(picture), "--out", str(source / "x.png"), "--size", "32"]
    for limit, said in ((1999, "has 50 x 40 pixels, too many to be safe"), (900, "bomb")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(action="error"):
            refused(command, f"{picture}: ", capsys)
            refused(command, said, capsys)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert __main__.load(picture, 32).shape == (3, 32, 32)


def test_a_very_narrow_image_is_cropped(tmp_path: Path) -> None:
    Image.new("RGB", (100_000, 1), (10, 20, 30)).save(tmp_path / "x.png")
    pixels = __main__.load(tmp_path / "x.png", 224)
    assert pixels.shape == (3, 224, 224) and pixels[:, 0, 0].tolist() == [10, 20, 30]


def test_file_names_need_not_be_utf_8(source: Path, tmp_path: Path) -> None:
    folder, out = source / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"\xff")
    (source / "dog").rename(folder)
    (folder / "c.bmp").rename(folder / os.fsdecode(b"\xfc.bmp"))
    for _ in range(2):
        __main__.main([str(source), "--out", str(out), "--size", "32", "--only", "fog"])
    assert (out / "fog" / "1" / folder.name / os.fsdecode(b"\xfc.JPEG")).exists()
    sheet = os.fsdecode(b"\xff.png")
    __main__.main([str(folder / os.fsdecode(b"\xfc.bmp")), "--out", str(tmp_path / sheet),
                   "--size", "32", "--only", "fog"])  # fmt: skip
    assert (tmp_path / sheet).exists()


def test_refusals(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = str(source / "cat/a.png"), ["--out", str(tmp_path / "x.png")]
    refused([str(source / "none.png"), *out], "is neither an image file nor a folder", capsys)
    for folder in ("nowhere", str(source)):
        rule = f"{folder}, which must contain frost1.png"
        refused([picture, *out, "--frost-dir", folder], rule, capsys)
    refused([picture, *out, "--only", "fogg"], "corruption 'fogg'; did you mean fog", capsys)
    refused([picture, *out, "--only"], "--only: expected at least one argument (see", capsys)
    for size in ("8", "0", "-1", "32.5", "x", "", "9" * 30):
        rule = f"argument --size: {size!r} is not a whole number from 16 to 16384 (see --help)"
        refused([picture, *out, f"--size={size}"], rule, capsys)
    refused([picture, *out, "--seed", "x"], "'x' is not a whole number from 0 up", capsys)
    for device in ("tpu9", "cuda:99", "meta", "hpu"):
        rule = f"argument --device: '{device}' is not a device of this machine: choose cpu"
        refused([picture, *out, "--device", device], rule, capsys)
    for empty in ([picture, "--out", ""], ["", *out], [picture, *out, "--frost-dir", ""]):
        refused(empty, ": it is empty; give a path (see --help)", capsys)
    refused([picture], "the following arguments are required: --out (see --help)", capsys)
    refused([picture, *out, "--siz", "32"], "unrecognized arguments: --siz", capsys)
    for name in ("sheet", "sheet.jpog", ""):
        refused([picture, "--out", str(tmp_path / name)], "choose one that ends with .png", capsys)
    before = (source / "cat/a.png").read_bytes()
    (tmp_path / "link.png").symlink_to(picture)
    for name in (picture, str(tmp_path / "link.png")):
        refused([picture, "--out", name, "--size", "32"], "is the source itself; name", capsys)
    assert (source / "cat/a.png").read_bytes() == before
    refused([picture, "--out", f"{picture}/x.png"], "a.png: File exists", capsys)
    refused([str(source), "--out", picture], "a.png is a file; name a folder", capsys)
    tree = [str(source), "--out", str(tmp_path / "tree"), "--only", "fog", "fogg"]
    refused(tree, "corruption 'fogg'; did you mean fog", capsys)
    assert not (tmp_path / "tree").exists()
    broken = source / "cat/broken.jpg"
    Image.open(source / "dog/c.bmp").save(broken, quality=100)
    for content, said in (
        (b"no picture", "cannot identify"),
        (broken.read_bytes()[:-999], "truncated"),
    ):
        broken.write_bytes(content)
        refused([str(broken), *out], said, capsys)
    broken.unlink()
    Image.open(picture).save(source / "cat/a.bmp")
    refused([str(source), "--out", str(tmp_path / "out")], "differ only in their suffix", capsys)
    (tmp_path / "empty").mkdir()
    refused([str(tmp_path / "empty"), *out], "empty has no class folders; the layout is", capsys)
    (tmp_path / "whole" / "test").mkdir(parents=True)  # may be an empty class
    source.rename(tmp_path / "whole" / "val")
    (tmp_path / "whole" / "val" / ".DS_Store").touch()
    whole = [str(tmp_path / "whole"), "--out", str(tmp_path / "out")]
    refused(
        whole, "val holds only folders, so it is no class; the layout is DIR/class/file", capsys
    )
    (tmp_path / "whole" / "val").rename(tmp_path / "whole" / "Validation")
    refused(whole, "Validation holds only folders, so it is no class", capsys)
    (tmp_path / "whole" / "Train" / "cat").mkdir(parents=True)
    refused(whole, f"give {tmp_path / 'whole' / 'Validation'} as DIR", capsys)  # the tested part
