"""Decoding of image files, once; the pixels are kept in one memory-mapped file per part."""

import errno
import json
import mmap
import os
import platform
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from corruptions.transform import upright_rgb
from harness.errors import UserError, first_line, out_of_memory
from harness.files import atomic_write, checksum, digest, lock_folder
from harness.images.folders import File
from harness.images.loader import ImageSet, map_images, prefetch
from harness.images.preprocess import make_square

VERSION = 2  # increase it when the same files would give other pixels
NOTE_BYTES = 2**28  # of pixels between two notes of how far the decoding has come
PIECE = 2**26  # bytes of which a checksum is computed at a time

Array = np.ndarray[Any, Any]


def default_cache_dir() -> Path:
    """Return the default folder for decoded datasets: $XDG_CACHE_HOME/mtlat, or ~/.cache/mtlat.

    Without a home directory, as in some containers, it is in the folder of temporary files.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtlat"
    except RuntimeError:
        return Path(tempfile.gettempdir(), "mtlat")


class Files(NamedTuple):
    """The image files of one part of a dataset, and what else decides their pixels."""

    part: str  # "train" or "test", for messages
    root: Path  # the dataset's folder
    files: list[File]  # paths relative to it
    size: int  # side of the square in pixels
    resize: int | None  # as in `make_square`
    skip_bad_images: bool  # leave out unreadable files instead of raising
    cache_dir: Path  # where the pixels are kept

    def pixels_path(self) -> Path:
        """Name the cache file by a hash of everything that decides the pixels."""
        facts = [VERSION, str(self.root.resolve()), self.size, self.skip_bad_images]
        facts += [self.resize] if self.resize else []  # squashed ones keep their old names
        facts += [(*file, *_stamp(self.root / file.path)) for file in self.files]
        return self.cache_dir / f"{digest(facts)[:32]}.u8"


def decode_cached(source: Files) -> tuple[ImageSet, list[File], int]:
    """Return image files as a memory-mapped image set, decoded now or by an earlier run.

    A file is known by its name, size and modification time: another of equal size and time in its
    place is not noticed. A cache file without a manifest, or with a wrong checksum, is decoded
    again.

    Returns the image set, its files without those that were left out, and the checksum of its
    pixels and labels.
    """
    part, pixels = source.part, source.pixels_path()
    manifest = pixels.with_suffix(".json")
    found = _read_cache(pixels, manifest, part)
    if found is None:
        with lock_folder(source.cache_dir, wait=True) as locked:
            found = _read_cache(pixels, manifest, part)  # another run may have made it meanwhile
            if found is None:
                _fill_cache(source, pixels, manifest, locked)
                found = _read_cache(pixels, manifest, part)
    if found is None:
        raise UserError(f"{pixels} differs from what was written: is the disk full or faulty?")
    images, record = found
    skipped = set(record["skipped"])
    if skipped:
        tqdm.write(f"decoding {part}: {len(skipped)} bad images skipped, listed in {manifest}")
    return images, [file for file in source.files if file.path not in skipped], record["crc"]


def _fill_cache(source: Files, pixels: Path, manifest: Path, locked: bool) -> None:
    """Decode the files, and give the finished pixels their name after the manifest is there."""
    # Without locks, another machine may write here, too.
    unfinished = Path(f"{pixels}.part" if locked else f"{pixels}.{platform.node()}.part")
    note = unfinished.with_suffix(".note")
    record = _write_pixels(unfinished, note, source)
    if pixels != source.pixels_path():
        note.unlink(missing_ok=True)
        unfinished.unlink()
        raise UserError(f"{source.root} changed while it was read; start again")
    atomic_write(manifest, json.dumps(record))
    os.replace(unfinished, pixels)
    note.unlink(missing_ok=True)


def cached_checksum(source: Files) -> int | None:
    """Return the checksum that `decode_cached` returned in an earlier run, or None.

    Nothing is decoded, and the cached pixels are not read.
    """
    try:
        crc: int = json.loads(source.pixels_path().with_suffix(".json").read_bytes())["crc"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return crc


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and modification time; zeros for a file that `decode` will complain about."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def _write_pixels(unfinished: Path, note: Path, source: Files) -> dict[str, Any]:
    """Decode the files into one file. Returns the manifest, whose checksum covers both.

    After every `NOTE_BYTES` of pixels, and at the end, the note says how far the decoding has come.
    If it is interrupted, it continues there.
    """
    files, size = source.files, source.size
    each = 3 * size**2
    done, skipped, crc = _read_note(unfinished, note, source)
    written = (done - len(skipped)) * each
    try:
        with open(unfinished, "r+b" if done else "wb") as sink:
            sink.truncate(written)  # what the note does not cover takes room, too
            sink.seek(written)
            _require_space(source.cache_dir, source.part, len(files) * each - written)
            left = [file.path for file in files[done:]]
            decoded = decode_all(source.root, left, size, source.resize)
            bar = tqdm(decoded, f"decoding {source.part}", len(files), unit="img", disable=None,
                       initial=done)  # fmt: skip
            for path, image in bar:
                done += 1
                if not isinstance(image, str):
                    sink.write(image)
                    crc = zlib.crc32(image, crc)
                elif source.skip_bad_images:
                    skipped.append(path)
                else:
                    note.unlink(missing_ok=True)  # a repaired folder has another cache file
                    raise UserError(
                        f"{source.root / path}: {image}; repair or remove the file (train.py leaves"
                        " such files out with --skip-bad-images, and evaluate.py then does for its"
                        " networks)"
                    )
                if done % max(1, NOTE_BYTES // each) == 0 or done == len(files):
                    sink.flush()
                    os.fsync(sink.fileno())
                    atomic_write(note, json.dumps([PIL.__version__, done, skipped, crc]))
    except BaseException:
        if not note.exists():
            unfinished.unlink(missing_ok=True)
        raise
    bad = set(skipped)
    labels = [file.label for file in files if file.path not in bad]
    record = {"shape": [len(labels), 3, size, size], "labels": labels, "skipped": skipped}
    return {**record, "crc": checksum(record, crc)}


def _read_note(unfinished: Path, note: Path, source: Files) -> tuple[int, list[str], int]:
    """Return how many files an interrupted decoding has read, the skipped ones, and a checksum."""
    try:
        version, done, skipped, crc = json.loads(note.read_bytes())
        size = (done - len(skipped)) * 3 * source.size**2
        with open(unfinished, "rb") as file:
            pixels = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        again = (decode(source.root / path, source.size, source.resize) for path in skipped)
        if (
            version == PIL.__version__
            and all(isinstance(image, str) for image in again)  # the disk was not just away
            and checksum_pixels(pixels, source.part) == crc
        ):
            return done, skipped, crc
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        if out_of_memory(error):  # otherwise there is no note, or a damaged one
            raise
    return 0, [], 0


def _require_space(folder: Path, part: str, size: int) -> None:
    """Raise `UserError` unless the disk has room for the pixels. Say where many of them go."""
    disk = shutil.disk_usage(folder)
    if 0 < disk.total and disk.free < size:  # a file system that does not know says 0
        begun = sum(path.stat().st_size for path in folder.glob("*.part"))
        raise UserError(
            f"decoding {part} takes {size / 1e9:.3g} GB, and {folder} has {disk.free / 1e9:.3g} GB"
            " of free space: choose another --cache-dir, or a smaller --size, or remove *.part"
            f" there, which are of interrupted decodings ({begun / 1e9:.3g} GB)"
        )
    if size > 1e9:  # a decoding of minutes, which has no progress bar without a terminal
        print(f"decoding {part}: {size / 1e9:.1f} GB into {folder}", file=sys.stderr, flush=True)


def checksum_pixels(pixels: mmap.mmap | bytes, part: str) -> int:
    """Compute the CRC-32 of mapped pixels by pieces, between which the user can interrupt."""
    crc, content = 0, memoryview(pixels)
    with tqdm(total=len(content), desc=f"checking {part}", unit="B", unit_scale=True, delay=2,
              leave=False, disable=None) as bar:  # fmt: skip
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            crc = zlib.crc32(piece, crc)
            bar.update(len(piece))
    return crc


def _read_cache(pixels: Path, manifest: Path, part: str) -> tuple[ImageSet, dict[str, Any]] | None:
    """Map the pixels and read their manifest. Returns None if they are missing or damaged."""
    try:
        record = json.loads(manifest.read_bytes())
        crc = record.pop("crc")
        images = map_images(pixels, record["labels"], record["shape"][-1])
        if checksum(record, checksum_pixels(images.mapping or b"", part)) == crc:
            return images, {**record, "crc": crc}
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        if out_of_memory(error):  # the cache may be good
            raise
    return None


def usable_cores() -> int:
    """Count the cores that this process may use, which may be fewer than the machine has."""
    limited = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1


def decode_all(
    root: Path, paths: list[str], size: int, resize: int | None = None
) -> Iterator[tuple[str, Array | str]]:
    """Yield each path below `root` with what `decode` returns for it, in order.

    Threads suffice, because Pillow decodes and resizes outside Python's lock. The window keeps only
    a few images per core in memory.
    """
    cores = usable_cores()
    with warnings.catch_warnings():  # set before the threads start: the filter is the process's
        warnings.filterwarnings("ignore", module=r"PIL\b")
        pixels = prefetch(
            lambda path: decode(root / path, size, resize), paths, threads=cores, window=16 * cores
        )
        yield from zip(paths, pixels, strict=True)


def decode(path: Path, size: int, resize: int | None = None) -> Array | str:
    """Read one image file as an upright RGB square.

    Args:
        path: the file.
        size, resize: as in `make_square`.

    Returns:
        uint8 (3, size, size), or one line that says why the file cannot be used.
    """
    try:
        with Image.open(path) as image:
            square = make_square(upright_rgb(image), size, resize)
            return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
    except Exception as error:  # Pillow raises nearly every kind on a broken file, without errno
        own = getattr(error, "errno", None) in (None, errno.ENOENT, errno.ELOOP, errno.EISDIR)
        if not own or out_of_memory(error):
            raise  # a fault of the disk, of permissions or memory, which must not be cached
        return f"not a usable image ({first_line(error)})"
