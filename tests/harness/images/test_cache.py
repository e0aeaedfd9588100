"""Decode folders of which the decoding is interrupted, or for which the disk has no room."""

import errno
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch

from harness.errors import UserError
from harness.images import cache
from harness.images.datasets import Dataset, load_dataset

SIDE = 8
EACH = 3 * SIDE**2  # bytes of an image
NOTE_BYTES = cache.NOTE_BYTES
Decoded = list[str]
Interrupt = Callable[..., None]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    """Note the files that are decoded, one at a time, and how far it came after every third."""
    names: Decoded = []
    decode = cache.decode

    def spy(path: Path, *settings: Any) -> Any:
        names.append(f"{path.parent.name}/{path.name}")
        return decode(path, *settings)

    monkeypatch.setattr(cache, "decode", spy)
    monkeypatch.setattr(cache, "prefetch", lambda function, items, **_: map(function, items))
    monkeypatch.setattr(cache, "NOTE_BYTES", 3 * EACH)
    return names


def load(folder: Path, cache_dir: Path, **settings: Any) -> Dataset:
    return load_dataset(str(folder), size=SIDE, cache_dir=cache_dir, **settings)


@pytest.fixture
def interrupt(
    folder: Path, tmp_path: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> Interrupt:
    """Return a function that loads the folder, and interrupts it before it decodes file `count`."""

    def run(count: int, **settings: Any) -> None:
        def interrupted(path: Path, *rest: Any) -> Any:
            if len(decoded) == count:
                raise KeyboardInterrupt
            return spy(path, *rest)

        spy = cache.decode
        decoded.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cache, "decode", interrupted)
            load(folder, tmp_path / "cache", **settings)
        decoded.clear()

    return run


def files(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("count", [3, 8, 9, 26])
def test_a_decoding_goes_on_where_it_was_interrupted(
    folder: Path,
    tmp_path: Path,
    decoded: Decoded,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    bad: bool,
    interrupt: Interrupt,
) -> None:
    broken = ["class0/0.png", "class0/5.png"] if bad else []  # before and after the first note
    for name in broken:
        (folder / name).write_bytes(b"no image")
    whole = load(folder, tmp_path / "whole", skip_bad_images=bad)
    expected = list(decoded)
    interrupt(count, skip_bad_images=bad)
    noted = count // 3 * 3
    rest = (len(whole.train.labels) + 4 * bad - noted) * EACH
    room = namedtuple("room", "total free")(10**9, max(3 * EACH, rest))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: room)
    decoded.clear()
    again = load(folder, tmp_path / "cache", skip_bad_images=bad)
    skipped = [name for name in expected[:noted] if name in broken]  # looked at again
    assert decoded == skipped + expected[noted:]
    for one, other in zip((again.train, again.test), (whole.train, whole.test), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert (again.fingerprint, again.paths) == (whole.fingerprint, whole.paths)
    assert files(tmp_path / "cache") == {"", ".u8", ".json"}  # "" is that of .lock


def test_an_interruption_before_the_first_note_leaves_nothing(
    tmp_path: Path, interrupt: Interrupt
) -> None:
    interrupt(2)
    assert files(tmp_path / "cache") == {""}


def test_a_small_set_gets_no_note_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Interrupt
) -> None:
    monkeypatch.setattr(cache, "NOTE_BYTES", NOTE_BYTES)
    interrupt(26)
    assert files(tmp_path / "cache") == {""}


@pytest.mark.parametrize(
    "damage",
    ["pixels", "end", "part", "note", "no note", "count", "number", "type", "version", "depth"],
)
def test_a_damaged_part_is_decoded_again(
    folder: Path, tmp_path: Path, decoded: Decoded, damage: str, interrupt: Interrupt
) -> None:
    whole = load(folder, tmp_path / "whole")
    interrupt(10)
    (part,), (note,) = ((tmp_path / "cache").glob(f"*.{kind}") for kind in ("part", "note"))
    content = part.read_bytes()
    assert len(content) >= 9 * EACH
    match damage:
        case "pixels":
            part.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
        case "end":
            part.write_bytes(content[: 9 * EACH - 1])
        case "part":
            part.unlink()
        case "note":
            note.write_text(note.read_text()[:-1])
        case "no note":
            note.unlink()
        case "count":
            note.write_text(note.read_text().replace(", 9,", ", 6,"))
        case "number":
            note.write_text(note.read_text().replace(", 9,", f", {10**30},"))
        case "type":
            note.write_text(note.read_text().replace(", 9,", ', "9",'))
        case "version":
            note.write_text(note.read_text().replace(PIL.__version__, "1.0"))
        case "depth":
            note.write_text("[" * 100_000)
    decoded.clear()
    assert torch.equal(load(folder, tmp_path / "cache").train.images, whole.train.images)
    assert len(decoded) == len(whole.train.labels) + len(whole.test.labels)


def test_a_part_longer_than_its_note_is_cut(
    folder: Path, tmp_path: Path, interrupt: Interrupt
) -> None:
    whole = load(folder, tmp_path / "whole")
    interrupt(10)
    (part,) = (tmp_path / "cache").glob("*.part")
    part.write_bytes(part.read_bytes()[: 9 * EACH] + bytes(40 * EACH))
    assert torch.equal(load(folder, tmp_path / "cache").train.images, whole.train.images)


def test_files_that_were_away_for_a_while_are_not_left_out(
    folder: Path, tmp_path: Path, interrupt: Interrupt
) -> None:
    content = (folder / "class0/0.png").read_bytes()
    stat = (folder / "class0/0.png").stat()
    (folder / "class0/0.png").write_bytes(bytes(len(content)))
    os.utime(folder / "class0/0.png", ns=(0, stat.st_mtime_ns))
    interrupt(10, skip_bad_images=True)
    (folder / "class0/0.png").write_bytes(content)
    os.utime(folder / "class0/0.png", ns=(0, stat.st_mtime_ns))
    assert len(load(folder, tmp_path / "cache", skip_bad_images=True).train.labels) == 27


@pytest.mark.parametrize("moment", ["pixels_path", "atomic_write", "replace"])
def test_nothing_is_decoded_again_after_the_last_image(
    folder: Path, tmp_path: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Interrupt while the stamps are compared, the manifest is written, and the file is renamed."""
    monkeypatch.setattr(cache, "NOTE_BYTES", 5 * EACH)  # not at the end
    place = {"pixels_path": cache.Files, "atomic_write": cache, "replace": cache.os}[moment]
    function = getattr(place, moment)

    def interrupted(*arguments: Any) -> Any:
        ended = len(decoded) == 27 and not str(arguments[0]).endswith(".note")
        if ended and not (moment == "replace" and ".part" not in str(arguments[0])):
            raise KeyboardInterrupt
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(folder, tmp_path / "cache")
    assert len(decoded) == 27
    again = load(folder, tmp_path / "cache")
    assert len(decoded) == 30 and len(again.train.labels) == 27  # the test images are left
    assert files(tmp_path / "cache") == {"", ".u8", ".json"}


def test_full_memory_does_not_discard_a_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Interrupt
) -> None:
    interrupt(10)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(cache.mmap, "mmap", full)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            load(folder, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.part"))) == 1


def test_machines_without_locks_write_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Interrupt
) -> None:
    monkeypatch.setattr("harness.files.fcntl", None)
    monkeypatch.setattr(cache.platform, "node", lambda: "here")
    interrupt(10)
    assert len(list((tmp_path / "cache").glob("*.u8.here.part"))) == 1


def test_a_bad_file_leaves_no_part(folder: Path, tmp_path: Path, decoded: Decoded) -> None:
    sorted(folder.rglob("*.*"))[20].write_bytes(b"no image")
    with pytest.raises(UserError, match="not a usable image"):
        load(folder, tmp_path / "cache")
    assert len(decoded) > 3 and not list((tmp_path / "cache").glob("*.part"))
    assert not list((tmp_path / "cache").glob("*.note"))


def test_a_folder_that_changes_while_it_is_read_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = cache.decode

    def change(path: Path, *settings: Any) -> Any:
        os.utime(path, (1, 1))
        return decode(path, *settings)

    monkeypatch.setattr(cache, "decode", change)
    with pytest.raises(UserError, match="changed while it was read; start again"):
        load(folder, tmp_path / "cache")
    assert files(tmp_path / "cache") == {""}


def test_a_disk_that_does_not_keep_what_is_written_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cache.atomic_write
    monkeypatch.setattr(cache, "atomic_write", lambda path, content: write(path, content[:9]))
    with pytest.raises(UserError, match="differs from what was written: is the disk full or"):
        load(folder, tmp_path / "cache")


def test_a_disk_without_room_is_refused_before_anything_is_decoded(
    folder: Path, tmp_path: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total free")
    free = 27 * EACH  # what the training part takes
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(10**9, free - 1))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "other.u8.part").write_bytes(bytes(2_000_000))
    said = r"takes 5.18e-06 GB, .* choose another --cache-dir, .* decodings \(0\.002 GB\)"
    with pytest.raises(UserError, match=said):
        load(folder, tmp_path / "cache")
    assert not decoded
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(0, 0))  # is not known
    load(folder, tmp_path / "unknown")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(10**9, free))
    load(folder, tmp_path / "cache")


def test_a_checksum_by_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 5
    expected = cache.checksum_pixels(content, "train")
    for piece in (1, 255, 256, 1279, 1280):
        monkeypatch.setattr(cache, "PIECE", piece)
        assert cache.checksum_pixels(content, "train") == expected == cache.zlib.crc32(content)
    assert cache.checksum_pixels(b"", "train") == 0
