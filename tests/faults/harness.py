"""Run a script in its own process, inject a fault, and read the files that the script leaves.

The parent process has imported everything and computed nothing, so that a fork starts a script in
milliseconds.
"""

import contextlib
import ctypes
import ctypes.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from PIL import Image

import evaluate
import reproduce
import train
from harness import checkpoints, errors
from harness.benchmark import plots, store
from tests.support.tiny import image_folder

torch.set_num_threads(1)
SIGNALS = {signal.SIGTERM, signal.SIGINT}
Sabotage = Callable[[], None]


class Script(NamedTuple):
    """A script under test: its main function, its flags, and functions that read its results."""

    name: str
    main: Callable[[list[str]], None]
    argv: list[str]  # relative to the folder that it runs in; the output folder is out/
    result: Callable[[Path], Any]  # the result, which must be bit-identical
    finished: Callable[[Path], list[Any]]  # finished epochs or cells, never to be lost


class Ended(NamedTuple):
    code: int  # the exit code, or the negative signal number
    text: str


class Failure(Exception):
    """A script violates its guarantees."""


def check(holds: object, *facts: object) -> None:
    if not holds:
        raise Failure(" | ".join(map(str, facts)))


# ---------------------------------------------------------------------------- processes


def start(script: Script, folder: Path, sabotage: Sabotage | None = None) -> int:
    """Start the script in this folder and return the process id, which is also the group id."""
    Path(f"{folder}.log").write_text("")

    def prepare() -> None:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open(f"{folder}.log", os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(log, stream)
        if sabotage:
            sabotage()

    pid = fork(lambda: script.main(script.argv), prepare)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # the child was faster
        os.setpgid(pid, pid)
    return pid


def fork(main: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> int:
    """Run a script's main function in a forked process and return the process id.

    Signals must reach the script and not the code around it. During the fork, signals are recorded
    and raised again afterwards. They are not blocked, because any thread may receive one. Their
    usual handlers are not used, because Python discards exceptions of handlers during a fork.
    """
    held: list[int] = []
    before = {n: signal.signal(n, lambda n, _: held.append(n)) for n in SIGNALS}
    pid = os.fork()
    if not pid:

        def obeying() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                for number in held:
                    signal.raise_signal(number)
                main()
            finally:
                signal.signal(signal.SIGINT, lambda *_: None)

        leave(lambda: (prepare(), errors.run_script(obeying)))
    for number, handler in before.items():
        signal.signal(number, handler)
    for number in held:
        signal.raise_signal(number)
    return pid


def leave(what: Callable[[], object]) -> NoReturn:
    """Call a function and end the process with its exit code, or 70 after a traceback."""
    code = 70
    try:
        what()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(pid: int, folder: Path) -> Ended:
    _, status = os.waitpid(pid, 0)
    text = Path(f"{folder}.log").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    check("Traceback" not in text and code != 70, "the script ended with a traceback", folder, text)
    return Ended(code, text)


def run(script: Script, folder: Path, sabotage: Sabotage | None = None) -> Ended:
    """Run the script until it ends."""
    folder.mkdir(exist_ok=True)
    return end(start(script, folder, sabotage), folder)


def kill(pid: int) -> None:
    """Send SIGKILL to the process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def refused(ended: Ended, message: str) -> None:
    """Check that the script ended with exit code 2 and one error line with this message."""
    said = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    check(ended.code == 2 and len(said) == 1 and message in said[0], message, ended)


# ---------------------------------------------------------------------------- fault injection


class Forks:
    """Replacement of `subprocess` in reproduce.py, which forks the child processes."""

    TimeoutExpired = subprocess.TimeoutExpired

    class Popen:
        def __init__(self, command: list[str]) -> None:
            main = {"train.py": train.main, "evaluate.py": evaluate.main}[Path(command[1]).name]
            self.pid = fork(lambda: main(command[2:]))

        def wait(self, timeout: float | None = None) -> int:
            end = time.monotonic() + (timeout or 1e9)
            while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired("", timeout or 0)
                time.sleep(0.005)
            return os.waitstatus_to_exitcode(found[1])

        def terminate(self) -> None:
            os.kill(self.pid, signal.SIGTERM)


class Events:
    """Count the calls of `os.fsync` and `os.replace`, and kill the process at the n-th one.

    These calls are the moments at which files are written.
    """

    def __init__(self, last: int = 0, how: str = "") -> None:
        self.count, self.last, self.how = 0, last, how

    def __call__(self) -> None:
        fsync, replace = os.fsync, os.replace

        def counted(call: Callable[..., None], *args: Any) -> None:
            self.count += 1
            if self.count == self.last:
                if self.how == "torn" and call is fsync:
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                if self.how == "after":
                    call(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            call(*args)
            with contextlib.suppress(OSError):
                Path("events").write_text(str(self.count))

        os.fsync = lambda *args: counted(fsync, *args)
        os.replace = lambda *args: counted(replace, *args)


class Disk(NamedTuple):
    """Operations on a small disk."""

    limit: Callable[[], None]  # call this in the process that is to find it full
    enlarge: Callable[[], None]
    protect: Callable[[], bool]  # make it read-only; False if impossible, as for root


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Disk]:
    """Mount a file system of this size at the folder, or approximate it without the permission."""
    folder.mkdir(exist_ok=True)
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)

    def mount(flags: int, options: str) -> bool:
        return not libc.mount(b"none", bytes(folder), b"tmpfs", flags, options.encode())

    mounted = mount(0, f"size={size}")
    read_only, remount = 1, 32

    def limit() -> None:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def enlarge() -> None:
        check(not mounted or mount(remount, f"size={1 << 26}"), "the small disk cannot be enlarged")

    def protect() -> bool:
        folder.chmod(0o555)
        return mount(remount | read_only, "") if mounted else os.geteuid() != 0

    try:
        yield Disk(limit, enlarge, protect)
    finally:
        if mounted:
            libc.umount2(bytes(folder), 2)
        else:
            folder.chmod(0o755)


# ---------------------------------------------------------------------------- script results

NO_TIMES = {"seconds", "seconds_making", "seconds_left", "images_per_second", "versions"}


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in NO_TIMES}


def trained(out: Path) -> Any:
    kept = []
    for name in ("best.pt", "last.pt"):
        checkpoint = checkpoints.load_checkpoint(out / name)
        checkpoint["log"] = [without_times(row) for row in checkpoint["log"]]
        kept.append({k: v for k, v in checkpoint.items() if k != "settings"})
    table = [line.split(",")[:5] for line in (out / "log.csv").read_text().splitlines()]
    return [*kept, table, sorted(path.name for path in out.iterdir())]


def epochs(out: Path) -> list[Any]:
    last = out / "last.pt"
    rows = checkpoints.load_checkpoint(last)["log"] if last.exists() else []
    return [without_times(row) for row in rows]


def lines(out: Path) -> list[Any]:
    path = out / "cells.jsonl"
    return [without_times(line) for line in store.read_cells(path)]


def measured(out: Path) -> Any:
    results = json.loads((out / "results.json").read_text())
    return [sorted(map(str, lines(out))), results["rows"]]


def reproduced(out: Path) -> Any:
    tables = json.loads((out / "tables.json").read_text())
    return [tables, *(epochs(path.parent) for path in sorted(out.glob("*/last.pt")))]


def no_pictures() -> None:
    """Replace the drawing of figures, which takes most of the time."""
    plots._finish = lambda figure, path: Image.new("L", (9, 9)).save(path, "PNG")


def scripts(root: Path) -> list[Script]:
    """Fill a folder with the inputs of the scripts, and return the scripts."""
    image_folder(root / "set", each=20, side=16)
    fixed = ["--cache-dir", "cache", "--device", "cpu"]
    training = ["--arch", "tests.support.tiny:convnet", "--data", str(root / "set"), "--size", "16"]
    training += ["--epochs", "4", "-b", "12", *fixed, "--output-dir", "out"]
    train_script = Script("train", train.main, [*training, "--resume", "auto"], trained, epochs)
    check(run(train_script, root / "model").code == 0, (root / "model.log").read_text())
    evaluation = [str(root / "model" / "out" / "last.pt"), *fixed, "--output-dir", "out"]
    evaluation += ["--only", "noise", "pgd_0.04", "--skip", "checks", "--dump-images", "0"]
    whole = [
        "--archs",
        "tests.support.tiny:convnet",
        "--surrogate",
        "tests.support.tiny:linear",
        "--epochs",
        "2",
    ]
    whole += ["--data", str(root / "set"), "--size", "16", "--batch-size", "12", *fixed]
    whole += ["--output-dir", "out"]
    return [
        train_script,
        Script("evaluate", evaluate.main, evaluation, measured, lines),
        Script("reproduce", reproduce.main, whole, reproduced, epochs),
    ]
