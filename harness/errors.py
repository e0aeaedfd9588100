"""Errors that the user can fix, and how a script ends."""

import ctypes
import errno
import io
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn
from urllib.error import URLError

import torch

from harness import distributed


class UserError(Exception):
    """An error that the user can fix. A script prints it as one line and exits with code 2."""


def escape_unprintable(text: str) -> str:
    """Escape unprintable characters, so that a file name prints on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def downloading(option: str, what: str, place: str | os.PathLike[str]) -> Iterator[None]:
    """Raise `UserError` if the block's download of `what` to `place` fails or came damaged."""
    try:
        yield
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        damage = "invalid hash", "PytorchStreamReader", "loading state_dict"
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in damage):
            raise
        raise UserError(
            f"{option}: {what} came damaged, or its file in {place} is ({first_line(error)}):"
            " remove the file, and start again"
        ) from None
    except (URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{option}: cannot download {what} ({reason}): check the network, or put the file into"
            f" {place}"
        ) from None


def retain_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, instead of returning large blocks.

    The kernel clears every page that it hands out again, which took VGG-11 a fifth of its time on
    two cores. Has no effect without glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option:
        set_option(-4, 0)  # M_MMAP_MAX
        set_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run_script(
    main: Callable[[], None], how_to_resume: str = "run it again to continue"
) -> NoReturn:
    """Run a script's main function and exit with its code.

    Args:
        main: parses the command line and does the work.
        how_to_resume: what the message of an interrupted run tells the user to do.

    The exit code is 0; or 2 after a `UserError` or an error such as a full disk, 130 after Ctrl-C,
    143 after SIGTERM, and then one line on stderr says what happened. Any other exception shows its
    traceback.
    """
    retain_freed_memory()
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # no file of the run may get the number of a closed stream
    os.close(nowhere)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no file name may end the run
            stream.reconfigure(errors="backslashreplace")
    code, message = 0, ""
    if hasattr(signal, "SIGCHLD"):  # where it is ignored, every child seems to end with code 0
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    report = sys.unraisablehook
    sys.unraisablehook = partial(_repeat_interrupt, report)
    try:
        with distributed.process_group():
            main()
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        code = 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
        message = f"stopped; what was finished is kept, {how_to_resume}"
    except Exception as error:
        code, message = 2, _describe(error, how_to_resume)
        if not message:
            raise
    finally:
        sys.unraisablehook = report
    signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun stops all processes when one fails
    if code and distributed.is_first_error():
        with suppress(OSError):  # stderr may be a file on the full disk
            print(("error: " if code == 2 else "\n") + escape_unprintable(message), file=sys.stderr)
    _discard_unwritable()
    signal.signal(signal.SIGTERM, previous)
    sys.exit(code)


def _discard_unwritable() -> None:
    """Discard what stdout and stderr cannot write: Python would try again, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of the CPU or of the accelerator is full."""
    said = str(error) if isinstance(error, RuntimeError) else ""  # torch's outside its CUDA cache
    words = (
        "DefaultCPUAllocator", "out of memory",  # of a CPU; of MPS, CUDA and NCCL
        "ALLOC_FAILED", "ALLOCATION_FAILED", "Failed to CUDA calloc",  # cuBLAS, cuFFT; cuDNN; NCCL
    )  # fmt: skip
    in_words = any(word in said for word in words)
    full = getattr(error, "errno", None) == errno.ENOMEM
    return full or in_words or isinstance(error, torch.OutOfMemoryError | MemoryError)


def is_explained(error: Exception) -> bool:
    """Return whether `run_script` explains this error in a line, such as full memory."""
    return bool(_describe(error, ""))


def _describe(error: Exception, how_to_resume: str) -> str:
    """Describe in one line an error that the user can fix; nothing for any other."""
    if isinstance(error, distributed.PeerLostError):
        return (
            f"another process of the job has ended or hangs ({error}); what was finished is kept,"
            f" {how_to_resume}"
        )
    if isinstance(error, UserError | distributed.LaunchError):
        return str(error)
    if out_of_memory(error):
        return "out of memory: lower --batch-size or --size; train.py can also take --amp bf16"
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return "no more threads can be started: raise the limit of processes or of memory (ulimit)"
    if isinstance(error, BrokenPipeError):
        return f"the output pipe was closed; what was finished is kept, {how_to_resume}"
    if isinstance(error, OSError):
        replaced = error.filename2  # by a temporary file, `filename`, whose name says nothing
        message = f"{replaced or error.filename or 'disk'}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += f"; free some space: what was finished is kept, {how_to_resume}"
        if error.filename and error.errno in (errno.EACCES, errno.EPERM):
            message += "; close it in other programs" if replaced else ""
            message += "; change its permissions, or name another place (see --help)"
        return message
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile: {first_line(error)}; leave the flag out"
    operation, found, _ = str(error).partition(" does not have a deterministic implementation")
    if isinstance(error, RuntimeError) and found:
        return (
            f"--deterministic: {operation} has no deterministic implementation; leave the flag out,"
            " or choose another --arch"
        )
    return ""


def _raise_interrupt(number: int, _: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


def _repeat_interrupt(report: Callable[[Any], object], ignored: Any) -> None:
    """Interrupt the main thread again where Python ignored it, in a destructor or a callback."""
    if not isinstance(ignored.exc_value, KeyboardInterrupt):
        report(ignored)
        return
    number = ignored.exc_value.args[0] if ignored.exc_value.args else signal.SIGINT
    # After the destructor; by a signal, because that also ends a sleep and a wait for a process.
    timer = threading.Timer(0.01, os.kill, [os.getpid(), number])
    timer.daemon = True
    timer.start()


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM at the end of the block, such as one that starts a process.

    An exception in the midst of that would leave a child behind that nobody waits for.
    """
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for signum in received:
            signal.raise_signal(signum)
