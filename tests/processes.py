"""Jobs of several processes, as torchrun starts them, that stay for several calls."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import parallel

# A server that has imported everything forks a process in no time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "evaluate"])


def open_store() -> dist.TCPStore:
    """What torchrun keeps for its processes."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def environment(rank: int, world: int, port: int) -> None:
    """What torchrun tells a process, and the folder and the threads of these tests."""
    os.chdir(Path(__file__).parent)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _answer(rank: int, world: int, port: int, calls: Any, answers: Any) -> None:
    """Answer the calls (function, arguments) of the test, one after the other."""
    environment(rank, world, port)
    try:
        with parallel.job():
            for function, arguments in iter(calls.get, None):
                answers.put((rank, function(*arguments), ""))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


class Job:
    """Processes that are one job, and stay for several calls: to start them costs more."""

    def __init__(self, world: int, store: dist.TCPStore | None = None) -> None:
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
        """What each process answers; the first failure of one ends the job."""
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
