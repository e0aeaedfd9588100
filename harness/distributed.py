"""Helpers for running under torchrun. In a single process every function is a no-op.

    with process_group():                    # join the job for the time of the block
        rows = shard_rows(len(batch))        # this rank's rows of a minibatch
        sum_gradients(parameters)            # in place, over all ranks

Gradients are summed here, once a step after its last backward pass, instead of by torch's
DistributedDataParallel. That wrapper would also see the attack's backward pass, it broadcasts
buffers between the two forward passes of a step, which breaks BatchNorm's backward pass on CUDA,
and it prefixes every name in a checkpoint. The price: communication does not overlap with
computation.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from itertools import zip_longest
from threading import Timer, current_thread, main_thread
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist  # lacks most names in some builds of torch
from torch import Tensor, nn

# Longer than any batch takes. It ends a job in which a process hangs. A process that dies is
# noticed at once, by its closed connections and by torchrun.
TIMEOUT = timedelta(minutes=30)
PATIENCE = 10.0  # seconds before a process says that it waits for the others

T = TypeVar("T")


class PeerLostError(Exception):
    """Another process of the job has ended, or hangs."""


class LaunchError(Exception):
    """The environment names a job of several processes, but not this one's place in it."""


class _Job(NamedTuple):
    rank: int = 0
    world_size: int = 1
    store: Any = None  # torchrun's key-value store, which all processes see


_job = _Job()


def rank() -> int:
    """Return the rank of this process. Rank 0 prints and writes files."""
    return _job.rank


def world_size() -> int:
    """Return the number of processes of the job."""
    return _job.world_size


def local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _job.world_size > 1 else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the job that torchrun started, if there is one. Ranks above 0 print nothing."""
    global _job
    with ExitStack() as stack:
        if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
            with _peer_errors(), _deadly_signals():
                try:
                    int(os.environ.get("LOCAL_RANK", ""))
                    joined = dist.rendezvous("env://", timeout=TIMEOUT)  # type: ignore[attr-defined]
                    store, rank, world_size = next(joined)
                except ValueError:  # RANK or another variable is missing, or no number
                    raise LaunchError(
                        f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not all of torchrun's"
                        " variables are set: start with torchrun, or unset WORLD_SIZE"
                    ) from None
                store = _fresh_store(store, rank, world_size)
                nccl = torch.cuda.is_available() and dist.is_nccl_available()  # Windows has none
                backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
                )
            _job = _Job(rank, world_size, store)
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w", errors="backslashreplace"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
        yield
    if _job.world_size > 1:  # not after an error: the others may be in the middle of an exchange
        dist.destroy_process_group()
        _job = _Job()


@contextmanager
def _deadly_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process, and say after a while what it waits for.

    torch waits for the other processes in C++, where no handler of Python runs. Handlers belong to
    the main thread; in another one they stay as they are.
    """
    said = (
        "waiting for the other processes (WORLD_SIZE is {WORLD_SIZE}, and this is RANK {RANK}):"
        " start them, or unset WORLD_SIZE"
    )
    note = Timer(PATIENCE, lambda: print(said.format_map(os.environ), file=sys.stderr, flush=True))
    note.daemon = True
    note.start()
    numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is signal.SIG_IGN else signal.SIG_DFL)
        yield
    finally:
        note.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _fresh_store(store: Any, rank: int, world_size: int) -> Any:
    """Return a part of the store that is new at every start: torchrun keeps it over its restarts.

    Rank 0 names the part. What another rank reads may be the name of an earlier start, so it stores
    a random key under the name, and reads the name again until rank 0 has set that key.
    """
    if rank == 0:
        start = os.urandom(8).hex()
        store.set("start", start)
        for other in range(1, world_size):
            store.set(store.get(f"{start} {other}").decode(), "")
    else:
        key = os.urandom(8).hex()
        while not store.check([key]):
            start = store.get("start").decode()
            store.set(f"{start} {rank}", key)
            time.sleep(0.1)
    return dist.PrefixStore(start, store)  # type: ignore[attr-defined]


def is_first_error() -> bool:
    """Return True in the first process that calls this, so that only one error is printed."""
    if _job.world_size == 1:
        return True
    try:
        return bool(_job.store.add("errors", 1) == 1)
    except RuntimeError:  # the store ended with the process that kept it
        return True


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn the errors of a failed exchange into `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        own = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)  # of this process
        if own or any(w in str(error) for w in ("DefaultCPUAllocator", "ncclUnhandledCudaError")):
            raise
        # "[file:line] what happened. what might be done about it"
        raise PeerLostError(str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0]) from error


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block in one process of each machine first: the others find what it stored.

    All leave the block together, so that none waits in an exchange, which ends after `TIMEOUT`,
    while another machine decodes its images. Use it once per start of a job.
    """
    if local_rank():
        _wait_for([_job.rank - local_rank()])  # torchrun counts through one machine after the other
    yield
    if _job.world_size > 1:
        with _peer_errors():
            _job.store.set(f"done {_job.rank}", "")
        _wait_for(range(_job.world_size))


def _wait_for(ranks: Iterable[int]) -> None:
    """Wait, however long it takes, until these ranks have left the block."""
    keys = [f"done {rank}" for rank in ranks]
    with _peer_errors():
        while not _job.store.check(keys):
            if _job.store.check(["errors"]):
                raise PeerLostError("it has printed the reason")
            time.sleep(0.1)


def shard_rows(count: int) -> slice:
    """Return this rank's rows of a minibatch of `count`. Rows 2i and 2i + 1 stay together.

    IAT mixes these two.
    """
    pairs = max(count // 2, 1)
    start, stop = (2 * (pairs * r // _job.world_size) for r in (_job.rank, _job.rank + 1))
    return slice(start, stop if _job.rank < _job.world_size - 1 else count)


def shard_batches(batches: Sequence[T]) -> Sequence[T]:
    """Return this rank's batches, each left whole: every world_size-th of them."""
    return batches[_job.rank :: _job.world_size]


def all_gather(value: T) -> list[T]:
    """Return every rank's value, in the order of ranks: plain values, or tensors on the CPU."""
    values: list[Any] = [value]
    if _job.world_size > 1:
        values *= _job.world_size
        with _peer_errors():
            dist.all_gather_object(values, value)
    return values


def merge_batches(results: list[T]) -> list[T]:
    """Gather what every rank computed for its `shard_batches`, in the order of the batches."""
    rounds = zip_longest(*all_gather(results))
    return [result for results in rounds for result in results if result is not None]


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, which pass tensors of equal shapes."""
    if _job.world_size > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _peer_errors():
            dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the ranks.

    Ranks may use different submodules, as with LayerDrop: one without a gradient adds zeros. Where
    no rank has one it stays None, so that the optimizer leaves the parameter alone.
    """
    trained = [p for p in parameters if p.requires_grad]
    if _job.world_size > 1 and trained:
        lacking = [i for i, p in enumerate(trained) if p.grad is None]
        users = trained[0].new_ones(len(trained))  # summed with the gradients, in one exchange
        for i in lacking:
            trained[i].grad = torch.zeros_like(trained[i])
            users[i] = 0
        all_reduce_sum([users, *(p.grad for p in trained if p.grad is not None)])
        counts = users.tolist() if lacking else []  # reading them waits for the device
        for i in lacking:
            if not counts[i]:
                trained[i].grad = None


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by that of rank 0."""
    if _job.world_size > 1:
        with _peer_errors():
            for tensor in tensors:  # as bytes: gloo lacks int16, float8 and others
                content = tensor.detach().contiguous().view(-1).view(torch.uint8)
                dist.broadcast(content, 0)
                tensor.detach().copy_(content.view(tensor.dtype).view_as(tensor))


def average_running_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over the processes, each of which saw its own rows."""
    statistics = [
        buffer
        for name, buffer in model.named_buffers()
        if "running_" in name and buffer.is_floating_point()
    ]
    all_reduce_sum(statistics)
    for statistic in statistics:
        statistic.div_(_job.world_size)
