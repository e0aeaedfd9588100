"""Feeding: minibatches of an image set, in memory or in a file, to the device."""

import mmap
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import parallel

AHEAD = 8  # minibatches that a thread gathers before they are asked for: two steps of four


class ImageSet(NamedTuple):
    """Images uint8 (N, 3, S, S), in memory or in a mapped file, and labels int64 (N,)."""

    images: Tensor
    labels: Tensor
    mapping: mmap.mmap | None = None  # of the file


def map_images(path: Path, labels: list[int], size: int) -> ImageSet:
    """The images of a file of bytes, which the system reads when they are asked for."""
    shape, mapping = (len(labels), 3, size, size), None
    images = np.empty(shape, np.uint8)
    if labels:  # nothing cannot be mapped
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        images = np.frombuffer(mapping, np.uint8).reshape(shape)
    with warnings.catch_warnings(action="ignore"):  # torch has no read-only tensors, and says so
        return ImageSet(torch.from_numpy(images), torch.tensor(labels).long(), mapping)


class Feed:
    """Minibatches of an image set: uint8 where the set lies, float in [0, 1] on the device.

    The set moves to the device whole if it takes at most half of the free memory there; otherwise
    a thread gathers each minibatch into pinned memory while the device computes.
    """

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.device = device
        self.images, self.labels, self.mapping = images
        if device.type == "cuda" and self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images = self.images.to(device)
        self.labels = self.labels.to(self.images.device)

    def __len__(self) -> int:
        return len(self.labels)

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 (B, 3, S, S) in [0, 1] and class indices int64 (B,) of these numbers."""
        return self._send(self._gather(index))

    def ahead(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """What a call gives for each of these indices, gathered before it is asked for."""
        if self.device.type != "cuda" or self.images.device.type == "cuda":
            yield from map(self, indices)  # a second thread would only compete with the step's
        else:
            yield from map(self._send, ahead(self._gather, indices, threads=1, window=AHEAD))

    def _gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        if self.mapping and hasattr(self.mapping, "madvise") and self.images.device.type == "cpu":
            # Read whole images at once, and nothing else: what is read ahead of page faults
            # belongs to other images, and would drive pages out where memory is short.
            size = self.images[0].nbytes
            for start in (size * index).tolist():
                page = start - start % mmap.PAGESIZE
                self.mapping.madvise(mmap.MADV_WILLNEED, page, start + size - page)
        if self.device.type == "cpu":
            x = torch.empty(len(index), *self.images.shape[1:])
            for place, number in zip(x, index.tolist(), strict=True):
                place.copy_(self.images[number]).div_(255)  # which finds it in the cache
            return x, self.labels[index]
        index = send(index, self.images.device)
        x, y = self.images.index_select(0, index), self.labels[index]
        if self.device.type == "cuda" and x.device.type == "cpu":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y

    def _send(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.device.type == "cpu":
            return batch
        x, y = (send(tensor, self.device) for tensor in batch)
        return x.float().div_(255), y

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order; of several processes, each takes its share of the batches."""
        starts = parallel.mine(range(0, len(self), batch_size))
        return self.ahead(torch.arange(i, min(i + batch_size, len(self))) for i in starts)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, where that is CUDA without waiting for what it still computes."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def ahead(
    function: Callable[[Any], Any], items: Iterable[Any], *, threads: int, window: int
) -> Iterator[Any]:
    """Map in threads, in order, at most `window` results ahead of what is asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
