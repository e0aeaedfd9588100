"""Test that a new process, as started on macOS and Windows, computes the same as this one."""

import multiprocessing

import pytest
import torch

from attacks import pgd
from corruptions import ALL_CORRUPTIONS, corrupt
from mtlat import mtlat_loss
from tests.support.tiny import smooth


def compute(_: int) -> list[bytes]:
    """Return the results of the public functions on seeded images, as bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, y = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    model, x = smooth(4), images / 255
    found = [corrupt(images, name, 3, seed=1) for name in ALL_CORRUPTIONS]
    generator = torch.Generator().manual_seed(2)
    found.append(pgd(model, x, y, epsilon=0.04, generator=generator))
    mtlat_loss(model, x, y, num_classes=4, generator=generator).backward()
    found += [p.grad for p in model.parameters()]
    return [values.numpy().tobytes() for values in found]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_fresh_process_computes_the_same(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    with multiprocessing.get_context(method).Pool(1) as pool:
        (found,) = pool.map(compute, [0])
    assert found == compute(0)
