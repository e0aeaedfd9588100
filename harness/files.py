"""Files that survive crashes: atomic writes, folder locks, checksums."""

import errno
import hashlib
import json
import os
import platform
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]


def file_name(text: str) -> str:
    """Replace ":" and "/" by "-", so that a model's name can be part of a file name."""
    return re.sub("[:/]", "-", text)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` once the block ends without an error.

    The content is on disk before it replaces the old file, so that a crash leaves one of the two.
    """
    # With the machine's name, because several may write one folder of a file system without locks.
    temporary = path.with_name(f".{path.name}.{platform.node()}.unfinished")
    try:
        temporary.unlink(missing_ok=True)  # writing would follow a link of that name
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file as a whole, or leave the old one unchanged."""
    with atomic_path(path) as temporary:
        if isinstance(content, str):  # a file's name may hold what UTF-8 cannot encode
            content = content.encode(errors="backslashreplace")
        temporary.write_bytes(content)


@contextmanager
def lock_folder(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Create a folder and hold its lock: only one run at a time writes into it.

    The operating system releases the lock of a process that dies, whose temporary files are then
    removed. On Windows, and on file systems without locks, nothing is locked or removed, and the
    block gets False instead of True.

    Args:
        folder: created with its parents if it does not exist.
        wait: wait for the other run to end instead of raising.

    Raises:
        UserError: another run holds the lock, and `wait` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:  # "wb" would empty a file that a link leads to
        locked = _lock(file, folder, wait)
        if locked:
            for stale in folder.glob(".*.unfinished"):
                stale.unlink()
        yield locked


def _lock(file: Any, folder: Path, wait: bool) -> bool:
    """Lock the file. Returns False where the system or the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"another run is writing into {folder}: wait until it ends, or choose another"
                " --output-dir"
            ) from None
        print(f"waiting for another run that writes into {folder}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            return False
        raise
    return True


def digest(facts: list[Any]) -> str:
    """Compute the SHA-256 of plain values, 64 hex digits."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def checksum(record: dict[str, Any], start: int = 0) -> int:
    """Compute the CRC-32 of a record of plain values, continuing from `start`.

    Detects damage, not forgery.
    """
    return zlib.crc32(json.dumps(record).encode(), start)
