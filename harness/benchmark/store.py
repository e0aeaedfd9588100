"""The result store: finished cells as JSON lines, each with a checksum.

A cell is one model under one perturbation at one severity. Its record says how many of the images
were right, what else was measured, and everything that decides these numbers.
"""

import json
import os
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import checksum

Cell = dict[str, Any]


def read_cells(path: Path, *, repair: bool = False) -> list[Cell]:
    """Read the finished cells. Leaves out a last line that is unfinished.

    Args:
        path: the file; without one there are no cells.
        repair: cut off the unfinished line, which a crash left. Others may be writing it: only the
            run that has locked the folder may do this.

    Raises:
        UserError: a line is damaged.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    if rest.strip(b"\0")[:1] not in b"{":  # it is no cell that was being written
        lines.append(rest)
    cells = []
    for i, text in enumerate(lines, 1):
        try:
            cell = json.loads(text)
            if cell.pop("crc") != checksum(cell):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path}: line {i} is damaged; delete it and start again") from None
        cells.append(cell)
    if repair and rest:  # after the checks: the file may be of another program
        os.truncate(path, len(content) - len(rest))
    return cells


def append_cells(path: Path, cells: list[Cell]) -> None:
    """Append finished cells, and flush them to disk before the next one begins."""
    with open(path, "ab") as file:
        for cell in cells:
            file.write(json.dumps({**cell, "crc": checksum(cell)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
