"""Make the tables of results/ again from the cells beside them, and recount them by other code."""

import base64
import json
import shutil
from collections import defaultdict
from pathlib import Path

import make_tables
import numpy as np
import pytest

import evaluate
from harness.benchmark.registry import COLUMNS

RESULTS = Path(evaluate.__file__).parent / "results"


@pytest.mark.parametrize("name", ["tiny20", "tiny50"])
def test_the_tables_are_made_from_the_cells(name: str, tmp_path: Path) -> None:
    for file in (RESULTS / name).glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    make_tables.make_tables(tmp_path)
    assert (tmp_path / "tables.md").read_text() == (RESULTS / name / "tables.md").read_text()
    assert (tmp_path / "differences.png").stat().st_size > 0


def test_the_levels_are_means_of_the_images_outcomes() -> None:
    shares = defaultdict(list)
    for line in (RESULTS / "tiny50" / "cells.jsonl").read_text().splitlines():
        cell = json.loads(line)
        if "hits" in cell:
            hits = np.frombuffer(base64.b64decode(cell["hits"]), "uint8")
            hits = np.unpackbits(hits, count=cell["n"])
            shares[cell["label"], cell["perturbation"]].append(hits.mean())
    expected = {}
    for name, title in COLUMNS.items():
        for method in ("standard", "mtlat"):
            labels = [f"{method}-{seed}" for seed in range(3)]
            if all((label, name) in shares for label in labels):
                each = [np.mean(shares[x, name]) / shares[x, "clean"][0] for x in labels]
                expected.setdefault(title, []).append(f"{np.mean(each):.3f}")
    assert len(expected) == 23
    lines = (RESULTS / "tiny50" / "tables.md").read_text().split("means over the seeds; ")[1]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines()]
    printed = {row[1]: row[2:4] for row in rows[:32] if len(row) > 4}
    assert {title: printed[title] for title in expected} == expected
