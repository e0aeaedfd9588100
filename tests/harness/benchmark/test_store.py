"""Test the file of finished cells. tests/harness/test_damaged_files.py damages its lines."""

from pathlib import Path
from typing import Any

import pytest

from harness.benchmark.store import append_cells, read_cells
from harness.errors import UserError

CELLS: list[dict[str, Any]] = [{"model": "a", "correct": 1}, {"model": "é", "correct": 2}]


def test_cells_are_read_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    assert read_cells(path) == [] and not path.exists()
    for cell in CELLS:
        append_cells(path, [cell])
    assert read_cells(path) == CELLS


@pytest.mark.parametrize("lost", [b"", bytes(3)])  # zeros: a lost page, after a power failure
@pytest.mark.parametrize("kept", [1, 20, -1])
def test_only_the_run_that_has_the_lock_cuts_off_an_unfinished_line(
    kept: int, lost: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "cells.jsonl"
    append_cells(path, CELLS[:1])
    finished = path.read_bytes()
    append_cells(path, CELLS[1:])
    unfinished = finished + lost + path.read_bytes()[len(finished) :][:kept]
    path.write_bytes(unfinished)
    assert read_cells(path) == CELLS[:1] and path.read_bytes() == unfinished
    assert read_cells(path, repair=True) == CELLS[:1] and path.read_bytes() == finished
    append_cells(path, CELLS[1:])
    assert read_cells(path, repair=True) == CELLS


@pytest.mark.parametrize("content", ["a token without a newline", '{"a": 1}\n[2', "1\n{"])
def test_a_file_of_another_program_is_refused_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"cells\.jsonl: line . is damaged"):
        read_cells(path, repair=True)
    assert path.read_text() == content
