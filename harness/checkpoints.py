"""Checkpoints of train.py: tensors and plain values in one file, read without running code."""

import io
import os
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from harness.errors import UserError, first_line, out_of_memory
from harness.files import atomic_write
from mtlat import Normalize

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


def check_savable(name: str, model: nn.Module) -> None:
    """Raise `UserError` unless the state dict's values are dense tensors, and none is lazy."""
    for key, value in model.state_dict().items():
        if nn.parameter.is_lazy(value):
            raise UserError(f"{name}: {key} has no shape yet; run one forward pass first")
        if not _is_dense(value):
            raise UserError(
                f"{name}: {key} of its state dict is a {type(value).__name__}, and a checkpoint"
                " keeps dense tensors alone: register one as a buffer"
            )
        if any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True)):
            raise UserError(
                f"{name}: {key} is an expanded tensor, into which no checkpoint can be loaded:"
                " register its .clone()"
            )


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of train.py onto the CPU. Nothing in the file is executed.

    Returns at least `FIELDS`. Raises `UserError` if the file is missing, damaged, or not a
    checkpoint of train.py.
    """
    return _checked(path, _read(path, only_zip=True))


def load_weights(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of train.py, or the state dict of any network, onto the CPU.

    The file was written by `save_checkpoint`, `torch.save` or safetensors. A state dict may lie
    under "state_dict" or "model", or under any name if it is the only one. The names of its tensors
    stay: see `adapt_state`.

    Returns the checkpoint as `load_checkpoint` does, or {"model": state dict} without "format".
    Raises `UserError` if the file is missing or damaged, or holds neither.
    """
    content = _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read(path)
    if isinstance(content, dict) and "format" in content:
        return _checked(path, content)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    inner = content.values() if isinstance(content, dict) and not _is_state(content) else [content]
    found = [value for value in inner if _is_state(value)]
    if len(found) != 1:
        raise UserError(
            f"{path} is neither a checkpoint of train.py nor a state dict: save model.state_dict()"
        )
    return {"model": found[0]}


def _is_state(value: Any) -> bool:
    """Return whether a value is a state dict, with at least one tensor, and dense ones alone."""
    pairs = value.items() if isinstance(value, dict) else []
    return bool(pairs) and all(isinstance(k, str) and _is_dense(v) for k, v in pairs)


def _is_dense(value: Any) -> bool:
    """Return whether a value is a tensor that can be copied into a weight."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized or value.is_meta:
        return False
    return value.layout == torch.strided


def adapt_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the names of `own`, the network's state dict.

    Removes what wrappers put before every name, such as DistributedDataParallel, torch.compile and
    a LightningModule, and the counter of an AveragedModel. What stands behind another layer of an
    nn.Sequential is not wrapped, and keeps its names. Adds BatchNorm's num_batches_tracked where it
    is missing, as in files of PyTorch before 0.4.1.
    """
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    state = {k: v for k, v in state.items() if k != "n_averaged" or k in own}
    prefix = ""
    for part in next(iter(state), "").split("."):
        inner = {k.removeprefix(prefix): v for k, v in state.items()}
        if inner.keys() & own.keys():
            return counters | inner
        prefix += f"{part}."
        if part.isdigit() or not all(k.startswith(prefix) for k in state):
            break
    return state


def describe_misfit(
    key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor], num_classes: int,
    new_head: bool,
) -> str:  # fmt: skip
    """Describe a name or shape in which a state dict differs from `own`, and how to mend it.

    `new_head` is as in `harness.models.create_model`: whether a head of other classes is replaced.
    """
    here, there = (tuple(d[key].shape) if key in d else "missing" for d in (state, own))
    fix = ""
    if state.keys().isdisjoint(own):
        fix = f"; no name fits, such as {min(state)}: if layers around the network were saved, let"
        fix += " --arch build them, too"
    elif there[:1] == (num_classes,) != here[:1] and there[1:] == here[1:]:
        means = "let --arch use num_classes" if new_head else "name them by --imagenet-classes"
        fix = f"; if it has other outputs, {means}"
    return f"{here}, and must be {there}{fix}"


def _read(path: str | Path, *, only_zip: bool = False) -> Any:
    """Read what torch.save wrote, plain values alone. Files of PyTorch before 1.6 are not zip."""
    try:
        file = open(path, "rb")
    except OSError as error:
        fix = "; name the file in it" * isinstance(error, IsADirectoryError)
        raise UserError(f"{path}: {error.strerror or error}{fix}") from None
    intact = False
    try:
        # torch.load warns of TorchScript, and then refuses it.
        with file, warnings.catch_warnings(action="ignore", category=UserWarning):
            if only_zip or zipfile.is_zipfile(file):
                # A zip archive has checksums, which PyTorch writes but does not compare.
                archive = zipfile.ZipFile(file)
                unpacked = sum(part.file_size for part in archive.infolist())
                if unpacked > 20 * os.stat(path).st_size:  # torch compresses at most some text
                    raise ValueError(f"it is a zip bomb of {unpacked / 1e6:.0f} MB")
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged}")
                intact = True
            file.seek(0)
            with safe_globals([Namespace]):  # of argparse: the options of many training scripts
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind on a damaged file
        if out_of_memory(error):
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))  # a class that is not a tensor's
        reason = f"it holds {refused[1]}" if refused else first_line(error).split(". ")[0]
        kind = "nor a state dict" if intact else "or is damaged"
        fix = "save model.state_dict()" if intact else "restore or remove it"
        raise UserError(
            f"{path} is not a checkpoint of train.py, {kind} ({reason}): {fix}"
        ) from None


def _read_safetensors(path: str | Path) -> Any:
    try:
        return import_module("safetensors.torch").load_file(path)
    except ImportError:
        raise UserError(f"{path}: run pip install safetensors to read it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # safetensors has an error class of its own
        if out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged ({first_line(error)})") from None


def _checked(path: str | Path, checkpoint: Any) -> dict[str, Any]:
    """Return the checkpoint. Raise `UserError` if it is not one of train.py."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this version of train.py: train again, or use"
            " the version that wrote it"
        )
    for name, kind in FIELDS.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            found = type(checkpoint[name]).__name__ if name in checkpoint else "missing"
            raise UserError(f"{path} is not a checkpoint of train.py: its {name} is {found}")
    accuracies = [isinstance(r, dict) and r.get("clean_accuracy") for r in checkpoint["log"]]
    good = {
        "model": _is_state(checkpoint["model"]),
        "classes": all(isinstance(name, str) for name in checkpoint["classes"]),
        "log": all(isinstance(accuracy, float) for accuracy in accuracies),
        "normalize": _is_normalization(checkpoint["normalize"]),
    }
    if damaged := next((name for name in good if not good[name]), ""):
        raise UserError(f"{path} is not a checkpoint of train.py: its {damaged} is damaged")
    return checkpoint


def _is_normalization(value: Any) -> bool:
    """Return whether a value is a mean and a standard deviation, or empty for none."""
    try:
        return not value or bool(Normalize(*value))
    except Exception:  # tensors and large integers raise kinds of their own
        return False
