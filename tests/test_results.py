"""Make the tables of results/ again from the cells beside them, and recount them by other code."""

import base64
import json
import shutil
from collections import defaultdict
from pathlib import Path

import make_tables
import numpy as np
import pytest
from scipy import stats

import evaluate
from harness.benchmark.registry import COLUMNS
from harness.benchmark.store import append_cells, read_cells

RESULTS = Path(evaluate.__file__).parent / "results"
PAIR, SINGLE = ("standard", "mtlat"), ("standard-0", "mtlat-0")


@pytest.mark.parametrize("name", ["tiny20", "tiny50"])
def test_the_tables_are_made_from_the_cells(name: str, tmp_path: Path) -> None:
    for file in (RESULTS / name).glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    make_tables.make_tables(tmp_path)
    assert (tmp_path / "tables.md").read_text() == (RESULTS / name / "tables.md").read_text()
    assert (tmp_path / "differences.png").stat().st_size > 0


def test_networks_with_clean_accuracy_alone_are_those_of_table_3(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "tiny50" / "cells.jsonl", tmp_path)
    taken = {"standard-1": "fgsm-0", "mtlat-1": "ls-0"}  # whose outcomes stand for theirs
    append_cells(tmp_path / "cells.jsonl", [
        cell | {"label": taken[cell["label"]], "model": taken[cell["label"]]}
        for cell in read_cells(tmp_path / "cells.jsonl")
        if cell["label"] in taken and cell["perturbation"] == "clean"
    ])  # fmt: skip
    make_tables.make_tables(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    header, _, row = text.split("**Networks of Table 3; ")[1].splitlines()[2:5]
    printed = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    # McNemar's p is 0.3, 5e-7, 0.006 and 0.15.
    assert printed["fgsm-0 - standard-0"] == "-0.008 (-0.023 to +0.007)"
    assert printed["fgsm-0 - tlat-0"] == "**-0.044 (-0.061 to -0.027)**"
    assert printed["ls-0 - standard-0"] == "**+0.024 (+0.007 to +0.040)**"
    assert printed["ls-0 - tlat-0 |"] == "-0.012 (-0.028 to +0.004) |"
    assert "| fgsm-0 - standard-0" not in text.split("**The networks of one seed; ")[1]


def test_the_levels_are_means_of_the_images_outcomes() -> None:
    found = robustness_of("tiny50")
    measured = [title for title in COLUMNS.values() if ("mtlat", title) in found]
    expected = {title: [f"{np.mean(found[m, title]):.3f}" for m in PAIR] for title in measured}
    assert len(expected) == 23
    lines = (RESULTS / "tiny50" / "tables.md").read_text().split("means over the seeds; ")[1]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines()]
    printed = {row[1]: row[2:4] for row in rows[:32] if len(row) > 4}
    assert {title: printed[title] for title in expected} == expected


def test_the_sentence_on_the_seeds_alone_is_a_t_test_with_holms_correction() -> None:
    found = robustness_of("tiny50")
    p = {title: stats.ttest_rel(found["mtlat", title], found["standard", title]).pvalue
         for method, title in found if method == "mtlat"}  # fmt: skip
    ranked = sorted(p, key=lambda title: p[title])
    steps = [p[title] * (len(p) - rank) for rank, title in enumerate(ranked)]
    decided = [t for i, t in enumerate(ranked) if max(steps[: i + 1]) < 0.05]
    text = (RESULTS / "tiny50" / "tables.md").read_text()
    listed = text.split(" correction) decides ")[1].split(".\n")[0]
    assert listed.startswith(f"{len(decided)} of {len(p)}: ")
    assert set(listed.split(": ")[1].split(", ")) == set(decided)


def test_a_single_seed_has_no_t_test(tmp_path: Path) -> None:
    cells = read_cells(RESULTS / "tiny20" / "cells.jsonl")
    append_cells(tmp_path / "cells.jsonl", [c for c in cells if c["label"] in SINGLE])
    make_tables.make_tables(tmp_path)
    assert "A t test" not in (tmp_path / "tables.md").read_text()


def robustness_of(name: str) -> dict[tuple[str, str], list[float]]:
    """Read clean accuracy and R of each seed, by method and column, from the cells alone."""
    shares = defaultdict(list)
    for line in (RESULTS / name / "cells.jsonl").read_text().splitlines():
        cell = json.loads(line)
        if "hits" in cell:
            hits = np.frombuffer(base64.b64decode(cell["hits"]), "uint8")
            hits = np.unpackbits(hits, count=cell["n"])
            shares[cell["label"], cell["perturbation"]].append(hits.mean())
    found = {}
    for method in PAIR:
        labels = [f"{method}-{seed}" for seed in range(3)]
        found[method, "clean accuracy"] = [shares[x, "clean"][0] for x in labels]
        for key, title in COLUMNS.items():
            if all((x, key) in shares for x in labels):
                found[method, title] = [
                    np.mean(shares[x, key]) / shares[x, "clean"][0] for x in labels
                ]
    return found
