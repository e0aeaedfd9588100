"""Decode folders of which the decoding is interrupted, or for which the disk has no room."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import UserError
from harness.images import cache
from harness.images.datasets import Dataset, load_dataset

SIDE = 8
EACH = 3 * SIDE**2  # bytes of an image
Decoded = list[str]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    """Note the files that are decoded, one at a time, and how far it came after every third."""
    names: Decoded = []
    decode = cache.decode

    def spy(path: Path, *settings: Any) -> Any:
        names.append(path.name)
        return decode(path, *settings)

    monkeypatch.setattr(cache, "decode", spy)
    monkeypatch.setattr(cache, "prefetch", lambda function, items, **_: map(function, items))
    monkeypatch.setattr(cache, "NOTE_BYTES", 3 * EACH)
    return names


def load(folder: Path, cache_dir: Path, **settings: Any) -> Dataset:
    return load_dataset(str(folder), size=SIDE, cache_dir=cache_dir, **settings)


def interrupt_at(count: int, decoded: Decoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoding of file `count` be interrupted, once."""
    spy = cache.decode

    def interrupted(path: Path, *settings: Any) -> Any:
        if len(decoded) == count:
            monkeypatch.setattr(cache, "decode", spy)
            raise KeyboardInterrupt
        return spy(path, *settings)

    monkeypatch.setattr(cache, "decode", interrupted)


def files(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("count", [3, 8, 9, 26])
def test_a_decoding_goes_on_where_it_was_interrupted(
    folder: Path, tmp_path: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch, count: int,
    bad: bool,
) -> None:  # fmt: skip
    if bad:  # two training images, before the first note and before the second
        names = sorted(str(path) for path in folder.rglob("*.*"))
        for name in (names[0], names[5]):
            Path(name).write_bytes(b"no image")
    whole = load(folder, tmp_path / "whole", skip_bad_images=bad)
    expected = list(decoded)
    decoded.clear()
    interrupt_at(count, decoded, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "cache", skip_bad_images=bad)
    noted = count // 3 * 3
    rest = (len(whole.train.labels) + 4 * bad - noted) * EACH
    room = namedtuple("room", "total free")(10**9, max(3 * EACH, rest))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: room)
    decoded.clear()
    again = load(folder, tmp_path / "cache", skip_bad_images=bad)
    assert decoded == expected[noted:]
    for one, other in zip((again.train, again.test), (whole.train, whole.test), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert (again.fingerprint, again.paths) == (whole.fingerprint, whole.paths)
    assert files(tmp_path / "cache") == {"", ".u8", ".json"}  # "" is that of .lock


def test_an_interruption_before_the_first_note_leaves_nothing(
    folder: Path, tmp_path: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(2, decoded, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "cache")
    assert files(tmp_path / "cache") == {""}


@pytest.mark.parametrize("damage", ["pixels", "end", "part", "note", "no note", "count"])
def test_a_damaged_part_is_decoded_again(
    folder: Path, tmp_path: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    whole = load(folder, tmp_path / "whole")
    decoded.clear()
    interrupt_at(10, decoded, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "cache")
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
            note.write_text(note.read_text().replace("[9", "[6"))
    decoded.clear()
    assert torch.equal(load(folder, tmp_path / "cache").train.images, whole.train.images)
    assert len(decoded) == len(whole.train.labels) + len(whole.test.labels)


def test_a_bad_file_leaves_no_part(folder: Path, tmp_path: Path, decoded: Decoded) -> None:
    sorted(folder.rglob("*.*"))[20].write_bytes(b"no image")
    with pytest.raises(UserError, match="not a usable image"):
        load(folder, tmp_path / "cache")
    assert len(decoded) > 3 and not list((tmp_path / "cache").glob("*.part"))
    assert not list((tmp_path / "cache").glob("*.note"))


def test_a_disk_without_room_is_refused_before_anything_is_decoded(
    folder: Path, tmp_path: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total free")
    free = 27 * EACH  # what the training part takes
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(10**9, free - 1))
    with pytest.raises(UserError, match=r"decoding train takes .* choose another --cache-dir"):
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
