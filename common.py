"""What the scripts share: mistakes, safe files, the command line, models and checkpoints."""

import argparse
import ctypes
import difflib
import errno
import importlib
import inspect
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor, nn

import parallel
from mtlat import Normalize, frozen

try:
    import fcntl
except ImportError:  # Windows, where nothing tells that a folder is in use
    fcntl = None  # type: ignore[assignment]

CHECKPOINT_FORMAT = "mtlat checkpoint 1"
CHECKPOINT_FIELDS = {
    "arch": str, "classes": list, "size": int, "fingerprint": str, "model": dict, "log": list,
    "settings": dict, "optimizer": dict, "scaler": dict, "normalize": tuple | list | None,
}  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend: the scripts print it as one line and exit with code 2."""


# ---------------------------------------------------------------------------- files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file that takes the path's place only when it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.unfinished")
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


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Make the folder, and keep every other run out of it until the end of this one, however ended.

    The system takes the lock back from a process that dies. What such a one left unfinished is
    removed. wait: for the other run's end, instead of raising UserError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as file:
        if _lock(file, folder, wait):
            for stale in folder.glob(".*.unfinished"):
                stale.unlink()
        yield


def _lock(file: Any, folder: Path, wait: bool) -> bool:
    """Lock the file; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(
                f"another run is writing into {folder}: wait for its end, or choose another"
                " --output-dir"
            ) from None
        print(f"waiting for another run, which writes into {folder}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            return False
        raise
    return True


def checksum(record: dict[str, Any], before: int = 0) -> int:
    """CRC-32 of plain values, after that of other bytes: tells damage, not a forgery."""
    return zlib.crc32(json.dumps(record).encode(), before)


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
    """Turn "auto" into the accelerator there is, or the CPU; check any other name.

    Of several processes, each gets a GPU of its own.
    """
    processes = parallel.world()
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found and (processes == 1 or found.type == "cuda") else "cpu"
    if processes > 1 and name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: {processes} processes run on cuda, one GPU each, or cpu")
    try:
        if processes > 1 and name == "cuda":
            name = f"cuda:{parallel.local_rank()}"
            torch.cuda.set_device(name)
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def refuse_differences(*found: Any) -> None:
    """Stop unless all processes of the job found the same."""
    if any(other != found for other in parallel.gather(found)):
        raise UserError(
            "the processes of the job find different images or weights: every machine needs the"
            " same files, and --output-dir in a folder that all share"
        )


def printable(text: str) -> str:
    """The text in one line: what has no glyph as its escape; names of files may hold it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _stop(number: int, _: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor; it would return large blocks.

    The system clears every page that it gives out again, which took VGG-11 a fifth of its time on
    two cores. Elsewhere than with Linux's usual C library nothing is changed.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option:
        blocks_of_their_own, kept_at_the_end = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
        set_option(blocks_of_their_own, 0)
        set_option(kept_at_the_end, 2**31 - 1)


def run(main: Callable[[], None], go_on: str = "start again to go on") -> NoReturn:
    """Run a script's main function; a mistake of the user's ends in one line and exit code 2.

    SIGTERM and Ctrl-C end in one line as well, with 143 and 130. go_on: how to take up what was
    interrupted.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no name of a file shall end the run
            stream.reconfigure(errors="backslashreplace")
    code = 2
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with parallel.job():
            main()
            sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)
        sys.exit(0)
    except KeyboardInterrupt as stop:
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        message = f"stopped; what was finished is kept, {go_on}"
    except parallel.PeerLost as lost:
        message = f"another process of the job has ended or hangs ({lost}); what was finished is"
        message += f" kept, {go_on}"
    except UserError as error:
        message = str(error)
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory: lower --batch-size or --size, or try --amp bf16"
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        message = f"--deterministic: {operation} cannot; leave it out, or choose another --arch"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest goes nowhere
        message = f"nobody reads the output any more; what was finished is kept, {go_on}"
    except OSError as error:
        message = f"{error.filename or 'the disk'}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += f"; make room, what was finished is kept, {go_on}"
    signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun stops all when one has failed
    if parallel.first_complaint():
        print(("error: " if code == 2 else "\n") + printable(message), file=sys.stderr)
    signal.signal(signal.SIGTERM, before)
    sys.exit(code)


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
            inspect.signature(make).bind(num_classes=num_classes)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"--arch {arch}: {error}") from None
        model: nn.Module = make(num_classes=num_classes)
        if not isinstance(model, nn.Module):
            raise UserError(f"--arch {arch} made a {type(model).__name__}; give a torch.nn.Module")
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
    """Read a checkpoint of train.py, to the CPU; nothing in it is ever executed.

    The file is a zip archive, whose checksums PyTorch writes but does not compare.
    """
    try:
        with open(path, "rb") as file:
            if damaged := zipfile.ZipFile(file).testzip():
                raise ValueError(f"checksum of {damaged}")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises nearly every kind on a damaged file
        reason = str(error).split("\n")[0][:80] or type(error).__name__
        raise UserError(
            f"{path} is no checkpoint of train.py, or damaged ({reason}): restore or remove it"
        ) from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of train.py")
    for name, kind in CHECKPOINT_FIELDS.items():
        if not isinstance(checkpoint.get(name, ...), kind):
            found = type(checkpoint[name]).__name__ if name in checkpoint else "missing"
            raise UserError(f"{path} is not a checkpoint of train.py: its {name} is {found}")
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
        hits = [(model(x).argmax(1) == y).sum() for x, y in batches]
    return int(torch.stack(hits).sum()) if hits else 0


def check_logits(name: str, model: nn.Module, x: Tensor, classes: int) -> Tensor:
    """The model's logits for images x; UserError if it makes none, or they mean nothing."""
    try:
        with torch.no_grad(), frozen(model):
            logits: Tensor = model(x)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} fails on images {tuple(x.shape)}: {reason}") from None
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (len(x), classes):
        raise UserError(
            f"{name} gives {shape}; for {len(x)} images of the data's {classes} classes it must"
            f" give logits {(len(x), classes)}"
        )
    if not logits.isfinite().all():
        raise UserError(f"{name} gives logits that are not finite")
    return logits
