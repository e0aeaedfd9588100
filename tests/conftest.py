"""Configure Hypothesis, seed PyTorch before each test, and skip slow and GPU tests by default."""

import gc
import os
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# torch is imported by what runs in a process that tests: under `-n`, the first one runs no test.

# The default profile is `dev`; HYPOTHESIS_PROFILE or --hypothesis-profile selects another one.
# There is no deadline, because the first call of torch takes seconds.
for name, examples in {"dev": 20, "ci": 100, "thorough": 1000}.items():
    hypothesis.settings.register_profile(
        name, max_examples=examples, deadline=None, derandomize=name != "thorough"
    )
# A shell makes its background processes ignore SIGINT, and a CI job may be one. Some tests
# send SIGINT, so restore its default handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU unless `-m gpu` asks for it: the other tests compare bits with a CPU's."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collectstart() -> None:
    """Keep the garbage collector from the objects of imported modules, here and in the tests.

    There are half a million, which stay: going through them took a fifth of the time of an import.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the garbage collector look for what the tests leave, and for nothing older."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests unless -m names them, and skip GPU tests if there is no GPU."""
    import torch

    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run the tests in one thread, and in an empty folder, not beside runs/ of earlier scripts.

    The tensors are small: a second thread does not help, and slows the tests down on shared cores.
    """
    import torch

    torch.set_num_threads(1)
    os.fsync = os.fstat  # as strict, and no disk is waited for: no test cuts its power
    os.chdir(tmp_path_factory.mktemp("current"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tests.support.tiny import image_folder

    return image_folder(tmp_path / "set")


@pytest.fixture
def go(folder: Path, tmp_path: Path):
    """Return a function that runs train.py in this process.

    There are 27 training images, 3 test images and two steps per epoch.
    """
    import train
    from harness.checkpoints import load_checkpoint

    def run(*flags: str, out: str = "out", method: str = "mtlat") -> dict:
        argv = [
            "--arch", "tiny:convnet", "--data", str(folder), "--size", "12", "--epochs", "2",
            "--batch-size", "26", "--cache-dir", str(tmp_path / "cache"), "--device", "cpu",
            "--method", method, "--output-dir", str(tmp_path / out), *flags,
        ]  # fmt: skip
        train.main(argv)
        return load_checkpoint(tmp_path / out / "last.pt")

    return run


@pytest.fixture
def bench(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Any:
    from tests.support.bench import open_bench

    return open_bench(tmp_path, tmp_path_factory, monkeypatch)
