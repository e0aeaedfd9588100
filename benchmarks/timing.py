"""How the benchmarks take the time of one call."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(work: Callable[[], Any], device: torch.device, threads: int = 1) -> float:
    """Time one call, and on an accelerator all that it set going there.

    On one thread of a CPU it is CPU time, which other work on the machine disturbs least.
    """
    clock = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = clock()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - start
