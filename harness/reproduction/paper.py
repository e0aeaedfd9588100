"""The paper's numbers, read from paper.json: clean accuracy in percent, otherwise R."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from corruptions import CORRUPTIONS
from harness.benchmark.registry import COLUMNS, TABLES

BASELINE = "standard"  # the row that signs refer to
ATTACKS_TITLE = "Adversarial attacks"
MEANS = {  # the means by their names in `ModelScores.means`, and what they average
    "All corruptions": list(CORRUPTIONS),
    ATTACKS_TITLE: TABLES[ATTACKS_TITLE],
}
HEADINGS = {  # the lines of a table, in order
    "clean": "clean %",
    **{name: COLUMNS[name] for name in CORRUPTIONS},
    "All corruptions": "mean of 19",
    **{name: COLUMNS[name] for name in TABLES[ATTACKS_TITLE]},
    ATTACKS_TITLE: "mean of 5",
}


class Printed(NamedTuple):
    """A number of the paper, and the sign beside it: + - or nothing; None in rows without signs."""

    value: float
    sign: str | None


class PaperRow(NamedTuple):
    """A row of one of the paper's tables."""

    table: int
    arch: str
    method: str
    scores: dict[str, Printed]  # "clean", perturbations, and MEANS


def _read_paper() -> list[PaperRow]:
    """Read paper.json, and add the means, which the paper does not print."""
    content = json.loads(Path(__file__).with_name("paper.json").read_text())
    rows = []
    for row in content["rows"]:
        full = "scores" in row  # Table 3 has clean accuracies alone, without signs
        columns = ["clean", *content["columns"]] if full else ["clean"]
        cells = [row["clean"], *row.get("scores", "").split()]
        signed = full and row["method"] != BASELINE
        scores = {}
        for name, cell in zip(columns, cells, strict=True):
            value, mark = re.fullmatch(r"([\d.]+)([+-]?)", cell).groups()  # type: ignore[union-attr]
            scores[name] = Printed(float(value), mark if signed else None)
        for name, names in MEANS.items():
            if scores.keys() >= set(names):
                scores[name] = Printed(fmean(scores[n].value for n in names), None)
        rows.append(PaperRow(row["table"], row["arch"], row["method"], scores))
    return rows


PAPER_ROWS = _read_paper()


def methods_of_table(table: int) -> list[str]:
    """List the methods of one of the paper's tables; the baseline, absent from Table 2, first."""
    return list(dict.fromkeys([BASELINE, *(r.method for r in PAPER_ROWS if r.table == table)]))
