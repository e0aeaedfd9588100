"""What the scripts share: mistakes, safe files, the command line, models and checkpoints."""

import argparse
import difflib
import errno
import importlib
import io
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor, nn

from mtlat import Normalize

CHECKPOINT_FORMAT = "mtlat checkpoint 1"
CHECKPOINT_FIELDS = {
    "arch": str, "classes": list, "size": int, "fingerprint": str, "model": dict, "log": list,
    "settings": dict,
}  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend: the scripts print it as one line and exit with code 2."""


# ---------------------------------------------------------------------------- files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file that takes the path's place only when it is whole and on disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes | memoryview | str) -> None:
    """Replace a file by this content, or leave it as it was."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


# ---------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help, and ends wrong usage in one line, like every other mistake."""

    class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=self._Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """Make an argparse type: a number from low (without it, if `above`) to high."""
    rule = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high < math.inf else " up")

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not low <= value <= high or (above and value == low) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {rule}")
        return value

    return convert


def find_device(name: str) -> str:
    """Turn "auto" into the accelerator there is, or the CPU; check any other name."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function; a mistake of the user's ends in one line and exit code 2."""
    try:
        main()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept, start again to go on", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "out of memory on the device: lower --batch-size, or try --amp bf16"
    except OSError as error:
        message = f"{error.filename or 'the disk'}: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            message += "; make room and start again, what was finished is kept"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def versions(device: str) -> dict[str, str]:
    """What a number depends on besides the settings."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        revision = ""
    cuda = device.startswith("cuda")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of torch's own, refused by weights_only
        "torchvision": torchvision.__version__,
        "revision": revision or "unknown",
        "hardware": torch.cuda.get_device_name(device)
        if cuda
        else f"{device} {platform.machine()}",
    }


# ---------------------------------------------------------------------------- models


def build_model(
    arch: str, num_classes: int, normalize: tuple[list[float], list[float]] | None = None
) -> nn.Module:
    """Make a torchvision classifier, or call `module:callable` with num_classes=N.

    normalize: mean and std for models that expect normalised input (pixels here are in [0, 1]).
    """
    if ":" in arch:
        module, _, name = arch.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")  # modules in the current folder, as with python -m
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--arch {arch}: {error}") from None
        model: nn.Module = make(num_classes=num_classes)
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if arch not in known:
            close = ", ".join(difflib.get_close_matches(arch, known, 3) or known[:3])
            raise UserError(
                f"--arch {arch}: torchvision has no such classifier; close: {close}; your own:"
                " --arch module:callable"
            )
        # These two would give several outputs in training.
        several = arch in ("googlenet", "inception_v3")
        extra = {"aux_logits": False, "init_weights": True} if several else {}
        model = torchvision.models.get_model(arch, num_classes=num_classes, **extra)
    return nn.Sequential(Normalize(*normalize), model) if normalize else model


def start_model(arch: str, num_classes: int, weights: str | None) -> tuple[nn.Module, Any]:
    """Make the model that a fresh run starts from; also give its normalisation, or None.

    weights: a checkpoint of train.py, or the name of torchvision's weights for this arch. A head
    for another number of classes stays as it was initialised.
    """
    if weights is None:
        return build_model(arch, num_classes), None
    if os.path.exists(weights):
        checkpoint = load_checkpoint(weights)
        state, normalize = checkpoint["model"], checkpoint["normalize"]
        model = build_model(arch, num_classes, normalize)
    else:
        try:
            entry = torchvision.models.get_model_weights(arch)[weights]
        except (ValueError, KeyError):
            raise UserError(
                f"--weights {weights}: no such file, nor weights of torchvision's for --arch {arch}"
                " (DEFAULT names the best)"
            ) from None
        preset = entry.transforms()
        normalize = (list(preset.mean), list(preset.std))
        model = build_model(arch, num_classes, normalize)
        state = {f"1.{name}": value for name, value in entry.get_state_dict().items()}
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("0.")}
    own = model.state_dict()
    head = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if own.keys() != state.keys() or len({state[k].shape[0] for k in head}) > 1:
        raise UserError(f"--weights {weights} are of another arch than --arch {arch}")
    model.load_state_dict({k: own[k] if k in head else value for k, value in state.items()})
    print(f"weights from {weights}" + (f"; new: {', '.join(head)}" if head else ""))
    return model, normalize


def save_checkpoint(paths: list[Path], **content: Any) -> None:
    """Write one checkpoint to these paths in turn; content holds tensors and plain types only."""
    buffer = io.BytesIO()  # a full disk is an OSError here, and a crash inside torch.save
    torch.save({"format": CHECKPOINT_FORMAT, **content}, buffer)
    for path in paths:
        write(path, buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of train.py, to the CPU; nothing in it is ever executed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises nearly every kind on a damaged file
        reason = str(error).split("\n")[0][:80] or type(error).__name__
        raise UserError(f"{path} is no checkpoint of train.py, or damaged ({reason})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of train.py")
    for name, kind in CHECKPOINT_FIELDS.items():
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{path} is damaged: its {name} is no {kind.__name__}")
    return checkpoint


def load_model(checkpoint: dict[str, Any]) -> nn.Module:
    """Make the model of a checkpoint, on the CPU."""
    classes, normalize = checkpoint["classes"], checkpoint["normalize"]
    model = build_model(checkpoint["arch"], len(classes), normalize)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise UserError(f"the checkpoint's weights do not fit {checkpoint['arch']}") from None
    return model


def count_correct(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
    """How many images' largest logit is their class; the model is put into eval mode."""
    model.eval()
    with torch.no_grad():
        return int(torch.stack([(model(x).argmax(1) == y).sum() for x, y in batches]).sum())
