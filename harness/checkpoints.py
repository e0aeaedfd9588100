"""Checkpoints of train.py: tensors and plain values in one file, read without running code."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError
from harness.files import atomic_write

FORMAT = "mtlat checkpoint 1"
FIELDS = {
    "arch": str, "classes": list, "size": int, "fingerprint": str, "model": dict, "log": list,
    "settings": dict, "optimizer": dict, "scaler": dict, "normalize": tuple | list | None,
}  # fmt: skip


def save_checkpoint(paths: list[Path], **content: Any) -> None:
    """Write one checkpoint to several paths in turn. `content` holds tensors and plain values."""
    buffer = io.BytesIO()  # a full disk raises OSError here, and aborts inside torch.save
    torch.save({"format": FORMAT, **content}, buffer)
    for path in paths:
        atomic_write(path, buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of train.py onto the CPU. Nothing in the file is executed.

    Args:
        path: a file that `save_checkpoint` wrote.

    Returns:
        Its content, with at least `FIELDS`.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of train.py.
    """
    try:
        with open(path, "rb") as file:
            # The file is a zip archive whose checksums PyTorch writes but does not compare.
            if damaged := zipfile.ZipFile(file).testzip():
                raise ValueError(f"checksum of {damaged}")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises nearly every kind on a damaged file
        reason = str(error).split("\n")[0][:80] or type(error).__name__
        raise UserError(
            f"{path} is not a checkpoint of train.py, or is damaged ({reason}): restore or remove"
            " it"
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of train.py")
    for name, kind in FIELDS.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            found = type(checkpoint[name]).__name__ if name in checkpoint else "missing"
            raise UserError(f"{path} is not a checkpoint of train.py: its {name} is {found}")
    return checkpoint
