"""Start jobs of several processes, as torchrun does, and reuse them for several calls."""

import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness import distributed

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the fork server. It imports everything once, so that its processes start quickly.

    That includes what this file and the files of the tests import, whose functions they call.

    Before Python 3.13 it ignores this process's sys.path, so that the folders are in its
    environment while it starts.
    """
    SERVER.set_forkserver_preload(["train", "evaluate", "hypothesis", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]))
        multiprocessing.forkserver.ensure_running()


def open_store() -> dist.TCPStore:
    """Open the store that torchrun keeps for the processes of a job."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def environment(rank: int, world: int, port: int) -> None:
    """Set the variables that torchrun sets, and the current folder and threads of these tests."""
    os.chdir(Path(__file__).parent)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _answer(rank: int, world: int, port: int, calls: Any, answers: Any) -> None:
    """Run the calls (function, arguments) of the tests one after the other; send the results."""
    environment(rank, world, port)
    try:
        with distributed.process_group():
            for function, arguments in iter(calls.get, None):
                answers.put((rank, function(*arguments), ""))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


class Job:
    """A job of several processes, kept for several calls because starting it takes longer."""

    def __init__(self, world: int, store: dist.TCPStore | None = None) -> None:
        start_server()
        self.store = store or open_store()
        self.answers, self.failure = SERVER.Queue(), ""
        self.calls = [SERVER.Queue() for _ in range(world)]
        self.processes = [
            SERVER.Process(
                target=_answer, args=(r, world, self.store.port, self.calls[r], self.answers)
            )
            for r in range(world)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the result of each process. The first failure in any process ends the job."""
        assert not self.failure, f"the job has ended:\n{self.failure}"
        for calls in self.calls:
            calls.put((function, arguments))
        found = {}
        for _ in self.calls:
            rank, found[rank], self.failure = self.answers.get(timeout=120)
            assert not self.failure, self.failure
        return [found[rank] for rank in range(len(self.calls))]

    def end(self) -> None:
        for process, calls in zip(self.processes, self.calls, strict=True):
            calls.put(None)
            process.join(20)
            process.kill()
