"""Several processes as one, started by torchrun; for a process alone every function does nothing.

    with job():                              # joins the others, for the time of the block
        rows = share(len(batch))             # this process's part of a minibatch
        add_up(gradients)                    # in place, over all processes

Gradients are added here, in one exchange after a step's last backward pass, and not by torch's
DistributedDataParallel: that wrapper would see the attack's backward pass too, broadcasts buffers
between the two forward passes of a step, which breaks BatchNorm's backward pass on CUDA, and puts
a prefix before every name in a checkpoint. What it would gain is to exchange while computing.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Longer than any batch takes. It ends a job where a process hangs; one that dies is noticed at
# once, by its closed connections and by torchrun.
PATIENCE = timedelta(minutes=30)

T = TypeVar("T")


class PeerLost(Exception):
    """Another process of the job has ended, or hangs."""


class _Job(NamedTuple):
    rank: int = 0
    world: int = 1
    store: Any = None  # keys and values that all processes see, kept by torchrun


_job = _Job()


def rank() -> int:
    """The number of this process; process 0 prints and writes."""
    return _job.rank


def world() -> int:
    """How many processes there are."""
    return _job.world


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _job.world > 1 else 0


@contextmanager
def job() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; all but process 0 fall silent."""
    global _job
    with ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            with _others():
                store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
                store = _fresh(store, rank)
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world, timeout=PATIENCE
                )
            _job = _Job(rank, world, store)
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
        yield
    if _job.world > 1:  # not after an error: the others may be in the middle of an exchange
        dist.destroy_process_group()
        _job = _Job()


def _fresh(store: Any, rank: int) -> Any:
    """A part of the store that is new at every start: torchrun keeps one for all its restarts.

    Process 0 names the part; a name that this process was given once is of an earlier start.
    """
    if rank == 0:
        store.set("start", os.urandom(8).hex())
    while store.add(f"{(start := store.get('start').decode())} {rank}", 1) > 1:
        time.sleep(0.1)
    return dist.PrefixStore(start, store)


def first_complaint() -> bool:
    """Whether no process of the job has asked this before: of several errors, one is the cause."""
    if _job.world == 1:
        return True
    try:
        return bool(_job.store.add("complaints", 1) == 1)
    except RuntimeError:  # the store went with the process that kept it
        return True


@contextmanager
def _others() -> Iterator[None]:
    """Tell the errors of an exchange from others."""
    try:
        yield
    except RuntimeError as error:
        # "[file:line] what happened. what might be done about it"
        raise PeerLost(str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0]) from error


@contextmanager
def one_first() -> Iterator[None]:
    """Let one process of each machine through first: what it stores, the others find."""
    ready = f"ready {os.environ.get('GROUP_RANK')}"
    with _others():
        while local_rank() and not _job.store.check([ready]):
            time.sleep(0.1)
    yield
    if _job.world > 1:
        with _others():
            _job.store.set(ready, "")


def share(count: int) -> slice:
    """This process's rows of a minibatch of `count`; rows 2i and 2i + 1 stay together."""
    pairs = max(count // 2, 1)
    start, stop = (2 * (pairs * r // _job.world) for r in (_job.rank, _job.rank + 1))
    return slice(start, stop if _job.rank < _job.world - 1 else count)


def mine(batches: Sequence[T]) -> Sequence[T]:
    """This process's batches, each left whole: of N processes, every Nth."""
    return batches[_job.rank :: _job.world]


def gather(thing: T) -> list[T]:
    """What each process gives, in order, for every process: plain values, or tensors on the CPU."""
    things: list[Any] = [thing]
    if _job.world > 1:
        things *= _job.world
        with _others():
            dist.all_gather_object(things, thing)
    return things


def collect(batches: list[T]) -> list[T]:
    """What all processes made of the batches that `mine` gave them, in the order of these."""
    rounds = zip_longest(*gather(batches))
    return [batch for batches in rounds for batch in batches if batch is not None]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, which give tensors of equal shapes."""
    if _job.world > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _others():
            dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by that of process 0."""
    if _job.world > 1:
        with _others():
            for tensor in tensors:
                dist.broadcast(tensor, 0)
