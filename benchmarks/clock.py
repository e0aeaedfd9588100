"""Timer of the benchmarks."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(work: Callable[[], Any], device: torch.device, threads: int = 1) -> float:
    """Time one call, including the work that it starts on an accelerator.

    Args:
        work: the call.
        device: device on which `work` computes.
        threads: number of CPU threads that `work` uses.

    Returns:
        Seconds. On one CPU thread this is CPU time, which other processes disturb least. Otherwise
        it is wall time.
    """
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = clock()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - start
