"""Collect the figures that a test draws."""

from typing import Any

import pytest
from matplotlib.figure import Figure


def collect_figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which every figure is added when it is saved."""
    found: list[Any] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        found.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found
