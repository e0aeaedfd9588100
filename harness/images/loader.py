"""Minibatches of an image set that lies in memory or in a memory-mapped file."""

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

from harness import distributed
from harness.errors import UserError, out_of_memory

PREFETCH = 8  # minibatches that a thread gathers ahead: two steps of four


class ImageSet(NamedTuple):
    """Images uint8 (N, 3, S, S), in memory or in a memory-mapped file, and labels int64 (N,)."""

    images: Tensor
    labels: Tensor
    mapping: mmap.mmap | None = None  # of the file


def map_images(path: Path, labels: list[int], size: int) -> ImageSet:
    """Memory-map a file of uint8 pixels as an image set.

    Args:
        path: N * 3 * size * size bytes.
        labels: the N class indices.
        size: side of the images in pixels.

    Raises:
        UserError: the file system maps no files.
    """
    mapping = None
    if labels:  # an empty file cannot be mapped
        with open(path, "rb") as file:
            try:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                if out_of_memory(error):
                    raise
                raise UserError(
                    f"{path}: its file system maps no files into memory ({error.strerror}): choose"
                    " a --cache-dir on another one"
                ) from None
    images = np.frombuffer(mapping or b"", np.uint8).reshape(len(labels), 3, size, size)
    with warnings.catch_warnings(action="ignore"):  # that torch has no read-only tensors
        return ImageSet(torch.from_numpy(images), torch.tensor(labels).long(), mapping)


class BatchLoader:
    """Loads minibatches of an image set: uint8 in storage, float32 in [0, 1] on the device.

    On CUDA, a set that takes less than a quarter of the free memory moves to the GPU as a whole,
    because training and test set are loaded before a step needs its memory. Otherwise a thread
    gathers minibatches into pinned memory ahead. On other devices the calling thread gathers them.
    """

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.device = device
        self.images, self.labels, self.mapping = images
        if device.type == "cuda" and self.images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = self.images.to(device)
        self.labels = self.labels.to(self.images.device)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Load the images of these indices, int64 (B,).

        Returns images float32 (B, 3, S, S) in [0, 1], and class indices int64 (B,), on the device.
        """
        return self._send(self._gather(index))

    def prefetch(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what a call returns for each index tensor. For CUDA, gather host images ahead."""
        if self.device.type != "cuda" or self.images.device.type == "cuda":
            yield from map(self, indices)  # a second thread would compete with the step's
        else:
            yield from map(self._send, prefetch(self._gather, indices, threads=1, window=PREFETCH))

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's batches of all images in order."""
        batches = torch.arange(len(self)).split(batch_size)
        return self.prefetch(distributed.shard_batches(batches))

    def _gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        if self.mapping and hasattr(self.mapping, "madvise") and self.images.device.type == "cpu":
            # Read whole images at once, and nothing else: the kernel's read-ahead would load other
            # images, and evict pages where memory is short.
            size = self.images[0].nbytes
            for start in (size * index).tolist():
                page = start - start % mmap.PAGESIZE
                self.mapping.madvise(mmap.MADV_WILLNEED, page, start + size - page)
        if self.device.type == "cpu":
            x = torch.empty(len(index), *self.images.shape[1:])
            for target, i in zip(x, index.tolist(), strict=True):
                target.copy_(self.images[i]).div_(255)  # while it is in the CPU's cache
            return x, self.labels[index]
        index = to_device(index, self.images.device)
        x, y = self.images.index_select(0, index), self.labels[index]
        if self.device.type == "cuda" and x.device.type == "cpu":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y

    def _send(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.device.type == "cpu":
            return batch
        x, y = (to_device(tensor, self.device) for tensor in batch)
        return x.float().div_(255), y


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; on CUDA without waiting for work in progress."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def prefetch(
    function: Callable[[Any], Any], items: Iterable[Any], *, threads: int, window: int
) -> Iterator[Any]:
    """Map a function over items in threads, in order.

    Args:
        function, items: as for `map`.
        threads: number of worker threads.
        window: how many results to compute ahead of what has been asked for, at most.
    """
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
