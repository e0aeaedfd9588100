"""Test which device a run computes on."""

import pytest
import torch

from harness import devices, distributed
from harness.errors import UserError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the second process of a machine have any device, and collect those that it tries."""
    tried: list[str] = []
    ones = torch.ones(1)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: tried.append(device) or ones)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: tried.append(f"set {device}"))
    monkeypatch.setattr(distributed, "local_rank", lambda: 1)
    return tried


@pytest.mark.parametrize("found, processes, chosen", [
    (None, 1, "cpu"), (None, 2, "cpu"), ("cuda", 1, "cuda"), ("cuda", 2, "cuda:1"),
    ("mps", 1, "mps"), ("mps", 2, "cpu"),  # which has one device, and gloo cannot send from it
])  # fmt: skip
def test_auto_takes_the_accelerator_that_every_process_can_have(
    found: str | None, processes: int, chosen: str, asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    accelerator = found and torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: accelerator)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    assert devices.resolve_device("auto") == chosen
    assert asked == ["set cuda:1"] * (chosen == "cuda:1") + [chosen]


@pytest.mark.parametrize("name, processes, chosen", [
    ("cpu", 1, "cpu"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda", 2, "cuda:1"),
    ("cuda:3", 1, "cuda:3"), ("mps", 1, "mps"), ("cuda:3", 2, None), ("mps", 2, None),
])  # fmt: skip
def test_a_named_device_is_taken_unless_processes_would_share_it(
    name: str, processes: int, chosen: str | None, asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    if chosen is None:
        with pytest.raises(UserError, match=f"--device {name}: 2 processes need cuda .* or cpu$"):
            devices.resolve_device(name)
    else:
        assert devices.resolve_device(name) == chosen == asked[-1]
