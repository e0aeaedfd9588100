"""Hypothesis profiles, reproducible global generators, and which tests run by default."""

import os
import signal

import hypothesis
import pytest
import torch

# `dev` unless HYPOTHESIS_PROFILE or --hypothesis-profile says otherwise. Nothing has a deadline,
# because torch's first call takes seconds.
for name, examples in {"dev": 20, "ci": 100, "thorough": 1000}.items():
    hypothesis.settings.register_profile(
        name, max_examples=examples, deadline=None, derandomize=name != "thorough"
    )
# Shells have Ctrl-C ignored by what they start in the background, which a CI may be.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The tensors are small: a second thread gains nothing, and loses much where the cores are shared.
torch.set_num_threads(1)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow tests unless -m names them, and GPU tests where there is no GPU."""
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
