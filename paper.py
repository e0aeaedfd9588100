"""The paper's numbers, which paper.json holds, and ours beside them.

    rows = compare(1, "resnet18", {"standard": [row], "iat": [row], "mtlat": [row]})
    print(caption(rows), *aligned(grid(rows)), conclusion(rows), sep="\\n")

A row is one `report.Row` for each seed. Clean accuracies are in per cent, all else is R.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from corruptions import CORRUPTIONS
from report import COLUMNS, MISSING, TABLES, Row, printed, sign

BASELINE = "standard"  # the row that signs refer to
ATTACKED = "Adversarial attacks"
MEANS = {  # names of the means, as `Row.means` has them, and what they are over
    "All corruptions": list(CORRUPTIONS),
    ATTACKED: TABLES[ATTACKED],
}
HEADINGS = {  # the lines of a table, in order, and what they are called
    "clean": "clean %",
    **{name: COLUMNS[name] for name in CORRUPTIONS},
    "All corruptions": "mean of 19",
    **{name: COLUMNS[name] for name in TABLES[ATTACKED]},
    ATTACKED: "mean of 5",
}


class Printed(NamedTuple):
    """A number of the paper's, and the sign beside it: + - or nothing; None in rows without."""

    value: float
    sign: str | None


class PaperRow(NamedTuple):
    table: int
    arch: str
    method: str
    scores: dict[str, Printed]  # "clean", perturbations, and MEANS


class Entry(NamedTuple):
    """A number of ours beside the paper's."""

    values: list[float]  # one for each seed
    mean: float
    spread: float  # sample standard deviation, NaN of one seed
    sign: str  # of the mean, against the baseline's mean
    doubted: bool  # whether a check speaks against it
    paper: float | None
    paper_sign: str | None
    agrees: bool | None  # whether the signs do, None where the paper has none


class Compared(NamedTuple):
    """A row of a table beside the paper's row."""

    table: int
    arch: str
    paper_arch: str
    method: str
    entries: dict[str, Entry]


class Claim(NamedTuple):
    """An order of methods in the paper, best first; our numbers have it, or not."""

    text: str
    arch: str
    name: str  # of the numbers, as in `HEADINGS`
    entries: dict[str, Entry]  # by method, in the paper's order, of those that were run
    missing: list[str]  # methods that were not
    holds: bool | None  # None where fewer than two were run


def read_paper() -> list[PaperRow]:
    """Read paper.json, and add the means that the paper does not print."""
    content = json.loads(Path(__file__).with_name("paper.json").read_text())
    rows = []
    for row in content["rows"]:
        columns = ["clean", *content["columns"]] if "scores" in row else ["clean"]
        cells = [row["clean"], *row.get("scores", "").split()]
        scores = {}
        for name, cell in zip(columns, cells, strict=True):
            value, mark = re.fullmatch(r"([\d.]+)([+-]?)", cell).groups()  # type: ignore[union-attr]
            signed = row["method"] != BASELINE and "scores" in row
            scores[name] = Printed(float(value), mark if signed else None)
        for name, names in MEANS.items():
            if scores.keys() >= set(names):
                scores[name] = Printed(fmean(scores[n].value for n in names), None)
        rows.append(PaperRow(row["table"], row["arch"], row["method"], scores))
    return rows


PAPER = read_paper()


def methods_of(table: int) -> list[str]:
    """The methods of one of the paper's tables; the baseline, which Table 2 leaves out, first."""
    return list(dict.fromkeys([BASELINE, *(r.method for r in PAPER if r.table == table)]))


# ---------------------------------------------------------------------------- comparison


def compare(table: int, arch: str, measured: Mapping[str, Sequence[Row]]) -> list[Compared]:
    """Put rows of ours, one for each seed by method, beside those of one of the paper's tables.

    An architecture that the paper's table lacks stands beside its ResNet-50. `measured` holds the
    baseline. A perturbation counts where every seed of the row and of the baseline has it.
    """
    known = {row.arch for row in PAPER if row.table == table}
    paper_arch = arch if arch in known else "resnet50"
    compared = []
    for method, seeds in measured.items():
        # The baseline stands in Table 1 alone, and is Table 2's too.
        theirs: dict[str, Printed] = next(
            (row.scores for row in sorted(PAPER, key=lambda row: row.table != table)
             if (row.arch, row.method) == (paper_arch, method)), {},
        )  # fmt: skip
        entries = {}
        for name in HEADINGS if table < 3 else ["clean"]:
            own = [_number(row, name) for row in seeds]
            base = [_number(row, name) for row in measured[BASELINE]]
            if None not in (*own, *base):
                doubted = any(name in row.findings for row in seeds)
                entries[name] = _entry(
                    name, [x for x in own if x is not None], [x for x in base if x is not None],
                    doubted, theirs.get(name),
                )  # fmt: skip
        compared.append(Compared(table, arch, paper_arch, method, entries))
    return compared


def _number(row: Row, name: str) -> float | None:
    if name in MEANS:
        return row.means.get(name)
    return printed(name, row.scores[name]) if name in row.scores else None


def _entry(
    name: str, values: list[float], base: list[float], doubted: bool, theirs: Printed | None
) -> Entry:
    mean = fmean(values)
    mark = sign(name, mean, fmean(base))
    value, paper_sign = theirs or (None, None)
    agrees = None if paper_sign is None else mark == paper_sign
    spread = stdev(values) if len(values) > 1 else math.nan
    return Entry(values, mean, spread, mark, doubted, value, paper_sign, agrees)


def agreement(rows: Iterable[Compared]) -> tuple[int, int]:
    """How many of the signs agree with the paper's, of how many."""
    found = [e.agrees for row in rows for e in row.entries.values() if e.agrees is not None]
    return sum(found), len(found)


def claims(rows: Sequence[Compared]) -> list[Claim]:
    """The orders that the paper argues with, and whether our numbers are in them."""
    found = []
    for arch in dict.fromkeys(row.arch for row in rows):
        for table, text, name, methods in (
            (1, "mean R under the 19 corruptions", "All corruptions", ["mtlat", "iat"]),
            (1, "mean R under the 5 attacks", ATTACKED, ["mtlat", "iat"]),
            (1, "clean accuracy", "clean", ["mtlat", BASELINE]),
            (3, "Table 3: clean accuracy", "clean", _order_of_table_3()),
        ):
            ours = {r.method: r.entries for r in rows if (r.table, r.arch) == (table, arch)}
            if ours:
                there = {m: ours[m][name] for m in methods if name in ours.get(m, {})}
                missing = [m for m in methods if m not in there]
                means = [entry.mean for entry in there.values()]
                holds = all(a >= b for a, b in pairwise(means)) if len(means) > 1 else None
                found.append(Claim(text, arch, name, there, missing, holds))
    return found


def _order_of_table_3() -> list[str]:
    rows = sorted((r for r in PAPER if r.table == 3), key=lambda r: -r.scores["clean"].value)
    return [row.method for row in rows]


# ---------------------------------------------------------------------------- words


def grid(rows: Sequence[Compared]) -> list[list[str]]:
    """The rows of one table as text: a line for each perturbation, three columns for each method.

    Ours, the paper's, and whether the signs agree; the baseline has two columns.
    """
    header, names = [""], [n for n in HEADINGS if any(n in row.entries for row in rows)]
    lines = [[HEADINGS[name]] for name in names]
    for row in rows:
        signed = any(entry.agrees is not None for entry in row.entries.values())
        header += [row.method, "paper", "agrees"] if signed else [row.method, "paper"]
        for name, line in zip(names, lines, strict=True):
            entry = row.entries.get(name)
            line += [shown(name, entry), _theirs(name, entry)]
            line += [_yes(entry.agrees if entry else None)] if signed else []
    return [header, *lines]


def caption(rows: Sequence[Compared]) -> str:
    """What the numbers of `grid` are."""
    first = rows[0]
    entries = [entry for row in rows for entry in row.entries.values()]
    seeds = max(len(entry.values) for entry in entries)
    spread = f"; mean ± sample standard deviation of {seeds} seeds" if seeds > 1 else ""
    doubt = "; !: a check speaks against it" if any(entry.doubted for entry in entries) else ""
    means = "clean accuracy" if first.table == 3 else "clean accuracy, then R"
    return (
        f"Table {first.table}, {first.arch} beside the paper's {first.paper_arch}: {means}"
        f"{spread}{doubt}"
    )


def shown(name: str, entry: Entry | None) -> str:
    """Our number as the tables print it."""
    if entry is None or math.isnan(entry.mean):
        return MISSING
    spread = "" if math.isnan(entry.spread) else f" ± {_rounded(name, entry.spread)}"
    return f"{_rounded(name, entry.mean)}{spread}{entry.sign}{'!' if entry.doubted else ''}"


def _theirs(name: str, entry: Entry | None) -> str:
    if entry is None or entry.paper is None:
        return MISSING
    return _rounded(name, entry.paper) + (entry.paper_sign or "")


def _rounded(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "clean" else f"{value:.2f}"


def _yes(value: bool | None) -> str:
    return MISSING if value is None else "yes" if value else "NO"


def claims_grid(found: Sequence[Claim]) -> list[list[str]]:
    """The claims as text: a header, then a row for each."""
    table = [["in the paper's order", "model", "ours", "paper", "holds"]]
    for claim in found:
        ours, theirs = [], []
        for method, entry in claim.entries.items():
            ours.append(f"{method} {shown(claim.name, entry._replace(sign=''))}")
            theirs.append(f"{method} {_theirs(claim.name, entry._replace(paper_sign=''))}")
        absent = [f"not run: {', '.join(claim.missing)}"] if claim.missing else []
        numbers = [", ".join(ours + absent), ", ".join(theirs)]
        table.append([claim.text, claim.arch, *numbers, _yes(claim.holds)])
    return table


def conclusion(rows: Sequence[Compared]) -> str:
    """How far our numbers and the paper's agree, in a sentence."""
    agree, total = agreement(rows)
    decided = [claim.holds for claim in claims(rows) if claim.holds is not None]
    return (
        f"{agree} of {total} signs agree with the paper's, and {sum(decided)} of"
        f" {len(decided)} orders"
    )


def plain_claims(found: Sequence[Claim]) -> list[dict[str, Any]]:
    """The claims for JSON, without what the tables hold already."""
    return [
        {
            "text": claim.text, "arch": claim.arch, "missing": claim.missing, "holds": claim.holds,
            "ours": {m: e.mean for m, e in claim.entries.items()},
            "paper": {m: e.paper for m, e in claim.entries.items()},
        }
        for claim in found
    ]  # fmt: skip
