"""Inject faults into the scripts, start them again, and compare with a run without faults.

    python -m tests.faults.run --rounds 50         # 50 kills of each script

After every fault, the script must either end with a bit-identical result or report the error in one
line. Finished epochs and cells must not be lost.
"""

import argparse
import fcntl
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import reproduce
import train
from harness.images import cache
from tests.faults.harness import (
    Events,
    Failure,
    Forks,
    check,
    end,
    kill,
    no_pictures,
    refused,
    run,
    scripts,
    small_disk,
    start,
)
from tests.support.tiny import states_equal

LIVES = 4  # kills of one run before it may finish


class Whole(NamedTuple):
    """A run without faults."""

    folder: Path
    result: Any
    seconds: float
    events: int  # see `Events`


def prepared(sabotage: Callable[[], None] | None = None) -> Callable[[], None]:
    """Return a function that prepares the process of a script and injects the fault."""

    def prepare() -> None:
        no_pictures()
        reproduce.subprocess = Forks  # type: ignore[assignment]
        if sabotage:
            sabotage()

    return prepare


class Bench:
    """The scripts, their runs without faults, and a random generator."""

    def __init__(self, root: Path, rounds: int, seed: int) -> None:
        self.root, self.rounds, self.chance = root, rounds, random.Random(seed)
        self.scripts = {script.name: script for script in scripts(root)}
        self.wholes: dict[str, Whole] = {}

    def whole(self, name: str) -> Whole:
        """Return the run of the script without faults."""
        if name not in self.wholes:
            self.wholes[name] = self.run_whole(name)
        return self.wholes[name]

    def run_whole(self, name: str) -> Whole:
        script, folder, clock = self.scripts[name], self.root / f"{name}-whole", time.monotonic()
        ended = run(script, folder, prepared(Events()))
        check(ended.code == 0, ended)
        seconds = time.monotonic() - clock
        events = int((folder / "events").read_text())
        return Whole(folder, script.result(folder / "out"), seconds, events)

    def fresh(self, name: str, *, like: str = "") -> Path:
        """Create a folder to run in, empty or with a copy of the files of a run without faults."""
        folder = self.root / f"{name}-{len(list(self.root.iterdir()))}"
        if like:
            shutil.copytree(self.whole(like).folder, folder)
        else:
            folder.mkdir()
        return folder

    def finishes(self, name: str, folder: Path) -> None:
        """Run the script again and check that its result is that of a run without faults."""
        script = self.scripts[name]
        ended = run(script, folder, prepared())
        check(ended.code == 0, folder, ended)
        result = script.result(folder / "out")
        check(states_equal(result, self.whole(name).result), "the result is different", folder)

    def killed_once(self, name: str, folder: Path, sabotage: Callable[[], None] | None) -> None:
        """Run until a kill, by the fault or at a random time, and check that nothing was lost."""
        script = self.scripts[name]
        before = script.finished(folder / "out")
        pid = start(script, folder, prepared(sabotage))
        if not sabotage:
            time.sleep(self.chance.uniform(0, 1.1 * self.whole(name).seconds))
            kill(pid)
        ended = end(pid, folder)
        check(ended.code in (0, -signal.SIGKILL), folder, ended)
        after = script.finished(folder / "out")
        check(after[: len(before)] == before, "finished work was lost", folder)


# ---------------------------------------------------------------------------- faults


def kills_at_random(bench: Bench) -> None:
    for name in bench.scripts:
        for done in range(0, bench.rounds, LIVES):
            folder = bench.fresh(name)
            for _ in range(min(LIVES, bench.rounds - done)):
                bench.killed_once(name, folder, None)
            bench.finishes(name, folder)


def kills_while_writing(bench: Bench) -> None:
    """Kill the script while it writes a file, and right after that."""
    for name in ("train", "evaluate"):
        moments = [
            (n + 1, how) for n in range(bench.whole(name).events) for how in ("torn", "after")
        ]
        for n, how in bench.chance.sample(moments, min(bench.rounds, len(moments))):
            folder = bench.fresh(name)
            bench.killed_once(name, folder, Events(n, how))
            bench.finishes(name, folder)


def signals(bench: Bench) -> None:
    for name in bench.scripts:
        for number in (signal.SIGTERM, signal.SIGINT):
            for _ in range(max(2, bench.rounds // 10)):
                folder = bench.fresh(name)
                whole = bench.whole(name)
                pid = start(bench.scripts[name], folder, prepared())
                time.sleep(bench.chance.uniform(0, 0.7 * whole.seconds))
                (os.kill if number == signal.SIGTERM else os.killpg)(pid, number)
                ended = end(pid, folder)
                check(ended.code in (0, 128 + number), folder, ended)
                check(ended.code == 0 or "stopped; what was finished is kept" in ended.text, ended)
                bench.finishes(name, folder)


def damaged_files(bench: Bench) -> None:
    """Truncate each file that a later run reads, or flip one of its bits."""
    for name, pattern in (("train", "out/last.pt"), ("train", "cache/*.u8"),
                          ("train", "cache/*.json"), ("train", "out/[al]*[vn]"),
                          ("evaluate", "out/cells.jsonl"), ("evaluate", "cache/*.u8")):  # fmt: skip
        for _ in range(max(2, bench.rounds // 5)):
            folder = bench.fresh(name, like=name)
            path = bench.chance.choice(sorted(folder.glob(pattern)))
            if path.parent.name == "cache":  # a finished run does not read it
                shutil.rmtree(folder / "out")
            content = bytearray(path.read_bytes())
            place = bench.chance.randrange(len(content))
            if bench.chance.random() < 0.5:
                del content[place:]
            else:
                content[place] ^= 1 << bench.chance.randrange(8)
            path.write_bytes(content)
            ended = run(bench.scripts[name], folder, prepared())
            if ended.code:
                refused(ended, "damaged")
                check(path.read_bytes() == content, "a damaged file was overwritten", path)
                shutil.copy(bench.whole(name).folder / path.relative_to(folder), path)
            bench.finishes(name, folder)


def two_at_once(bench: Bench) -> None:
    for name in ("train", "evaluate"):
        script = bench.scripts[name]
        for _ in range(max(1, bench.rounds // 10)):
            folder = bench.fresh(name)
            first, second = (start(script, folder, prepared()) for _ in range(2))
            codes = sorted(end(pid, folder).code for pid in (first, second))
            check(codes[0] == 0 and codes[1] in (0, 2), codes, folder)
            bench.finishes(name, folder)
        folder = bench.fresh(name)
        (folder / "out").mkdir()
        with open(folder / "out" / ".lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            refused(run(script, folder, prepared()), "another run is writing into out")
        bench.finishes(name, folder)


def filling(limit: Callable[[], None]) -> Callable[[], None]:
    """Return a function that limits the disk, whose free space is not known before it is full."""

    def fill() -> None:
        cache.shutil.disk_usage = lambda _: SimpleNamespace(total=0, free=0)  # type: ignore
        limit()

    return fill


def full_and_read_only_disks(bench: Bench) -> None:
    for name in ("train", "evaluate"):
        whole = bench.whole(name).folder
        for part in ("out", "cache"):
            used = sum(path.stat().st_size for path in (whole / part).rglob("*") if path.is_file())
            for share in [0.3] if bench.rounds < 10 else [0, 0.2, 0.4, 0.6, 0.8]:
                folder = bench.fresh(name)
                with small_disk(folder / part, max(4096, int(share * used))) as disk:
                    limited = prepared(filling(disk.limit))
                    refused(run(bench.scripts[name], folder, limited), "free some space")
                    disk.enlarge()
                    bench.finishes(name, folder)
            folder = bench.fresh(name)
            with small_disk(folder / part, 1 << 20) as disk:
                if disk.protect():
                    refused(run(bench.scripts[name], folder, prepared()), f"{part}/.lock")


def clock_set_back(bench: Bench) -> None:
    def back() -> None:
        real, calls = time.time, iter(range(10**9))
        time.time = lambda: real() - 3600 * next(calls)

    for name in ("train", "evaluate"):
        folder = bench.fresh(name)
        bench.killed_once(name, folder, None)
        for path in folder.rglob("*"):
            os.utime(path, (2**32, 2**32))
        ended = run(bench.scripts[name], folder, prepared(back))
        check(ended.code == 0, ended)
        bench.finishes(name, folder)


def data_that_change(bench: Bench) -> None:
    script = bench.scripts["train"]
    picture = bench.root / "set" / "class0" / "0.png"
    before = picture.read_bytes()

    def repaint() -> None:
        new = picture.with_suffix(".new")  # so that no process reads half an image
        Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(new, "png")
        os.replace(new, picture)

    def while_decoding() -> None:
        decode, calls = cache.decode, iter(range(10**9))

        def late(*args: Any) -> Any:
            if next(calls) == 5:
                repaint()
            return decode(*args)

        cache.decode = late

    def while_training(then: Callable[[], None]) -> Callable[[], None]:
        def sabotage() -> None:
            train_one_epoch = train.train_one_epoch

            def late(config: Any, training: Any, epoch: int) -> Any:
                if epoch == 2:
                    repaint()
                    then()
                return train_one_epoch(config, training, epoch)

            train.train_one_epoch = late

        return sabotage

    folder = bench.fresh("train")
    refused(run(script, folder, while_decoding), "changed while it was read; start again")
    picture.write_bytes(before)
    ended = run(script, folder, while_training(lambda: None))
    check(ended.code == 0, ended)
    result = script.result(folder / "out")
    check(states_equal(result, bench.whole("train").result), "old and new images were mixed")
    picture.write_bytes(before)
    bench.finishes("train", folder)
    folder = bench.fresh("train")
    dies = while_training(lambda: os.kill(os.getpid(), signal.SIGKILL))
    check(run(script, folder, dies).code == -signal.SIGKILL, "the process was not killed")
    refused(run(script, folder), "differs from the dataset that out/last.pt was trained on")
    picture.write_bytes(before)
    bench.finishes("train", folder)


FAULTS = [
    kills_at_random, kills_while_writing, signals, damaged_files, two_at_once,
    full_and_read_only_disks, clock_set_back, data_that_change,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50, help="kills of each script (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default: 0)")
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="faults to inject (default: all)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.rounds, args.seed)
        for fault in FAULTS:
            if fault.__name__ in args.only:
                clock = time.monotonic()
                try:
                    fault(bench)
                except Failure as failure:
                    sys.exit(f"{fault.__name__}: {failure}")
                print(f"{fault.__name__}: ok, {time.monotonic() - clock:.1f} s", flush=True)


if __name__ == "__main__":
    main()
