"""Import the libraries that only some tests need."""

import warnings
from typing import Any

import pytest


def library(name: str) -> Any:
    """Import a library without its warnings, or skip the test if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")
