"""Test file locking and error messages that the tests of the scripts do not cover."""

import contextlib
import errno
import fcntl
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from harness.benchmark.store import append_cells
from harness.checkpoints import load_weights
from harness.errors import UserError, out_of_memory, run_script
from harness.files import atomic_path, atomic_write, lock_folder
from harness.images import loader
from harness.training import average


def test_a_lock_keeps_others_out_and_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with lock_folder(out):
        (out / "mine.tmp").touch()
        with atomic_path(out / "last.pt") as unfinished:
            unfinished.touch()
            with pytest.raises(UserError, match=r"another run is writing into .*out: wait"):
                with lock_folder(out):
                    pass
            unfinished.rename(out / ".old.unfinished")
            unfinished.touch()
    with lock_folder(out):
        assert sorted(path.name for path in out.iterdir()) == [".lock", "last.pt", "mine.tmp"]


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_two_machines_write_one_file(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a file system without locks, such as Lustre often is."""

    def refuse(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "pixels"
    with lock_folder(tmp_path), atomic_path(path) as first:
        first.write_text("one")
        monkeypatch.setattr(platform, "node", lambda: "another")
        with lock_folder(tmp_path), atomic_path(path) as second:
            second.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one" and len(list(tmp_path.iterdir())) == 2


def test_links_in_a_folder_from_others_lead_no_write_out_of_it(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.write_text("of another program")
    folder.mkdir()
    for name in (".lock", f".last.pt.{platform.node()}.unfinished", "last.pt"):
        (folder / name).symlink_to(outside)
    atomic_write(folder / "last.pt", b"12345")
    with lock_folder(folder):
        assert outside.read_text() == "of another program"
    assert (folder / "last.pt").read_bytes() == b"12345"
    assert not (folder / "last.pt").is_symlink()


def test_the_whole_content_is_on_disk_before_a_file_is_replaced_or_a_cell_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the order of the calls, because a test cannot cut the power."""
    done: list[Any] = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda *_: done.append("replaced"))
    atomic_write(tmp_path / "last.pt", b"12345")
    append_cells(tmp_path / "cells.jsonl", [{"correct": 1}])
    assert done == [5, "replaced", (tmp_path / "cells.jsonl").stat().st_size]


@pytest.mark.parametrize("cause", [lambda: torch.empty(10**15), lambda: bytearray(2**62)])
def test_too_little_memory_is_said_in_a_line(
    cause: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_script(lambda: cause() and None)
    said = "error: out of memory: lower --batch-size or --size; train.py can also take --amp bf16\n"
    assert end.value.code == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "cause, code", [(OSError(errno.ENOSPC, "full"), 2), (KeyboardInterrupt(signal.SIGTERM), 143)]
)
def test_the_exit_code_is_the_same_where_a_stream_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, name: str, cause: BaseException, code: int
) -> None:
    """Check a closed pipe. Where something is left to write, closing it fails, as at Python's exit.

    A full disk fails in the same way.
    """

    def main() -> None:
        with contextlib.suppress(BrokenPipeError):
            print("epoch 1", file=stream)
        raise cause

    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, name, closed := Mock(wraps=stream))
        with pytest.raises(SystemExit) as end:
            run_script(main)
    assert end.value.code == code and closed.write.called == (name == "stderr")


def test_a_closed_pipe_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        run_script(Mock(side_effect=BrokenPipeError))
    assert capsys.readouterr().err == (
        "error: the output pipe was closed; what was finished is kept, run it again to continue\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_destructor_ends_the_script(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bar:
        def __del__(self) -> None:
            signal.raise_signal(number)

    reached = []

    def main() -> None:
        Bar()  # Python ignores an exception in its destructor
        reached.append("after")
        time.sleep(9)
        reached.append("end")

    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 128 + number and reached == ["after"]
    assert time.monotonic() - started < 8  # in the midst of the sleep
    assert capsys.readouterr().err == (
        "\nstopped; what was finished is kept, run it again to continue\n"
    )


def test_other_errors_in_a_destructor_are_reported_as_before_the_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bar:
        def __del__(self) -> None:
            raise LookupError

    reported: list[Any] = []
    hook = lambda ignored: reported.append(ignored.exc_type)  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)
    with pytest.raises(SystemExit, match=r"^0$"):
        run_script(lambda: Bar() and None)
    assert reported == [LookupError] and sys.unraisablehook is hook


def test_what_pytorch_cannot_repeat_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Check the message for an operation that has no deterministic implementation.

    On CUDA, the pooling of VGG is one. On a CPU, `put_` is one.
    """
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(SystemExit, match=r"^2$"):
            run_script(lambda: torch.zeros(4).put_(torch.arange(2), torch.ones(2)))
    finally:
        torch.use_deterministic_algorithms(False)
    said = capsys.readouterr().err
    assert (
        said == "error: --deterministic: put_ has no deterministic implementation; "
        "leave the flag out, or choose another --arch\n"
    )
    with pytest.raises(RuntimeError, match="size"):  # any other RuntimeError is raised unchanged
        run_script(lambda: torch.zeros(4) + torch.zeros(5))


def test_text_that_utf_8_cannot_encode_is_escaped(tmp_path: Path) -> None:
    """Check the name of a folder of Latin-1, which Python reads as surrogates."""
    atomic_write(tmp_path / "tables.md", "caf\udce9, é\n")
    assert (tmp_path / "tables.md").read_bytes() == "caf\\udce9, é\n".encode()


@pytest.mark.parametrize("words", [
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you",
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried",
    "MPS backend out of memory (MPS allocated: 4.35 GB, other allocations: 1.00 MB)",
    "CUDA error: out of memory",  # of a context, a kernel, or pinned memory
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "NCCL error in: f.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    "NCCL error in: f.cpp:1, unhandled cuda error\nLast error:\nFailed to CUDA calloc 8 bytes",
])  # fmt: skip
def test_the_words_of_every_platform_for_full_memory_are_known(words: str) -> None:
    assert out_of_memory(RuntimeError(words)) and not out_of_memory(ValueError(words))
    assert out_of_memory(torch.AcceleratorError(words))
    assert not out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_does_not_fit_into_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save({"weight": torch.zeros(2)}, tmp_path / f"weights{suffix}")
    for module, name in ((torch, "load"), (safetensors, "load_file")):
        monkeypatch.setattr(module, name, Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        load_weights(tmp_path / f"weights{suffix}")


def test_what_has_no_memory_is_not_blamed_on_the_flag(
    go: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average, "AveragedModel", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        go("--ema", "0.9")
    to = torch.nn.Module.to

    def full(module: torch.nn.Module, *args: Any, **keywords: Any) -> Any:
        if "memory_format" in keywords:
            raise torch.OutOfMemoryError
        return to(module, *args, **keywords)

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        go("--channels-last", out="other")


def test_a_cache_that_cannot_be_mapped_is_not_written_again(
    go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go("--epochs", "1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.u8")}
    full = Mock(side_effect=OSError(errno.ENOMEM, "Cannot allocate memory"))
    monkeypatch.setattr(loader.mmap, "mmap", full)
    with pytest.raises(OSError, match="Cannot allocate"):
        go("--epochs", "1", out="other")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.u8")}
    assert before and after == before
