"""Test that the memory of a long run does not grow from step to step or from cell to cell."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluate
import train
from harness import distributed
from harness.errors import retain_freed_memory
from tests.support.bench import Bench
from tests.support.tiny import image_folder

STATUS = Path("/proc/self/status")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STATUS.exists(), reason="no /proc to read the memory from"),
]
MIB = 2**20


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return 1024 * int(STATUS.read_text().partition("VmRSS:")[2].split()[0])


def after_each(call: Callable[..., Any], noted: list[int]) -> Callable[..., Any]:
    def noting(*args: Any) -> Any:
        result = call(*args)
        noted.append(resident())
        return result

    return noting


@pytest.mark.parametrize("method", ["mtlat", "iat"])
def test_a_thousand_steps(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retain_freed_memory()
    noted: list[int] = []
    # Called once per step, after its backward passes.
    reduce = after_each(distributed.sum_gradients, noted)
    monkeypatch.setattr(distributed, "sum_gradients", reduce)
    folder = image_folder(tmp_path / "set", each=1250 // 3, side=12)
    train.main(["--arch", "tiny:convnet", "--data", str(folder), "--size", "12", "--device", "cpu",
                "-b", "8", "--epochs", "4", "--cache-dir", str(tmp_path / "cache"), "--method",
                method, "--output-dir", str(tmp_path / "out")])  # fmt: skip
    assert len(noted) > 1000
    print(f"{method}: {noted[200] / MIB:.1f} MiB after 200 steps, {noted[-1] / MIB:.1f} after all")
    assert max(noted[200:]) - noted[200] < 4 * MIB


def test_a_whole_benchmark(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    retain_freed_memory()
    noted: list[int] = []
    monkeypatch.setattr(evaluate, "append_cells", after_each(evaluate.append_cells, noted))
    bench.run(*bench.surrogate, out="first")  # allocates textures, tables and caches
    bench.run(*bench.surrogate, out="second")
    whole = len(noted) // 2
    print(f"{noted[whole] / MIB:.1f} MiB, after {whole} cells {noted[-1] / MIB:.1f}")
    assert whole > 90 and max(noted[whole:]) - noted[whole] < 8 * MIB
