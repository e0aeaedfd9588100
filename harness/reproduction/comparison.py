"""Our numbers beside the paper's.

    rows = compare(1, "resnet18", {"standard": [scores], "iat": [scores], "mtlat": [scores]})
    print(comparison_caption(rows), *align_columns(comparison_table(rows)), conclusion(rows))

Each method has one `ModelScores` per seed. Clean accuracies are in percent, all else is R.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, NamedTuple

from harness.benchmark.metrics import ModelScores, sign, table_value
from harness.benchmark.tables import MISSING
from harness.reproduction.paper import (
    ATTACKS_TITLE,
    BASELINE,
    HEADINGS,
    MEANS,
    PAPER_ROWS,
    Printed,
)


class Entry(NamedTuple):
    """One of our numbers beside the paper's."""

    values: list[float]  # one per seed
    mean: float
    spread: float  # sample standard deviation, NaN for one seed
    sign: str  # of the mean, against the baseline's mean
    doubted: bool  # whether an attack check failed
    paper: float | None
    paper_sign: str | None
    agrees: bool | None  # whether the signs do; None where the paper has none


class Compared(NamedTuple):
    """A row of one of our tables beside the paper's row."""

    table: int
    arch: str
    paper_arch: str
    method: str
    entries: dict[str, Entry]


class Claim(NamedTuple):
    """An order of methods in the paper, best first, and whether our numbers have it."""

    text: str
    arch: str
    name: str  # of the numbers, as in `HEADINGS`
    entries: dict[str, Entry]  # by method, in the paper's order, of those that were run
    missing: list[str]  # methods that were not run
    holds: bool | None  # None where fewer than two were run


def compare(table: int, arch: str, measured: Mapping[str, Sequence[ModelScores]]) -> list[Compared]:
    """Put our numbers beside those of one of the paper's tables.

    Args:
        table: 1, 2 or 3.
        arch: ours. One that the paper's table lacks stands beside its ResNet-50.
        measured: the scores of each seed, by method; with the baseline. A perturbation counts where
            every seed of the method and of the baseline has it.
    """
    known = {row.arch for row in PAPER_ROWS if row.table == table}
    paper_arch = arch if arch in known else "resnet50"
    compared = []
    for method, seeds in measured.items():
        # The baseline stands in Table 1 alone, and is Table 2's too.
        theirs: dict[str, Printed] = next(
            (row.scores for row in sorted(PAPER_ROWS, key=lambda row: row.table != table)
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


def _number(row: ModelScores, name: str) -> float | None:
    if name in MEANS:
        return row.means.get(name)
    return table_value(name, row.scores[name]) if name in row.scores else None


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
    """Count the signs that agree with the paper's, and all signs."""
    found = [e.agrees for row in rows for e in row.entries.values() if e.agrees is not None]
    return sum(found), len(found)


def claims(rows: Sequence[Compared]) -> list[Claim]:
    """List the orders that the paper argues with, and whether our numbers have them."""
    found = []
    for arch in dict.fromkeys(row.arch for row in rows):
        for table, text, name, methods in (
            (1, "mean R under the 19 corruptions", "All corruptions", ["mtlat", "iat"]),
            (1, "mean R under the 5 attacks", ATTACKS_TITLE, ["mtlat", "iat"]),
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
    rows = sorted((r for r in PAPER_ROWS if r.table == 3), key=lambda r: -r.scores["clean"].value)
    return [row.method for row in rows]


# ---------------------------------------------------------------------------- text


def comparison_table(rows: Sequence[Compared]) -> list[list[str]]:
    """Format the rows of one table as text: a line per perturbation, columns per method.

    The columns of a method are ours, the paper's, and whether the signs agree. The baseline has the
    first two.
    """
    header, names = [""], [n for n in HEADINGS if any(n in row.entries for row in rows)]
    lines = [[HEADINGS[name]] for name in names]
    for row in rows:
        signed = any(entry.agrees is not None for entry in row.entries.values())
        header += [row.method, "paper", "agrees"] if signed else [row.method, "paper"]
        for name, line in zip(names, lines, strict=True):
            entry = row.entries.get(name)
            line += [format_entry(name, entry), _format_paper(name, entry)]
            line += [_yes(entry.agrees if entry else None)] if signed else []
    return [header, *lines]


def comparison_caption(rows: Sequence[Compared]) -> str:
    """Describe the numbers of `comparison_table` in one line."""
    first = rows[0]
    entries = [entry for row in rows for entry in row.entries.values()]
    seeds = max(len(entry.values) for entry in entries)
    spread = f"; mean ± sample standard deviation of {seeds} seeds" if seeds > 1 else ""
    mark = "; !: an attack check failed" if any(entry.doubted for entry in entries) else ""
    what = "clean accuracy" if first.table == 3 else "clean accuracy, then R"
    return (
        f"Table {first.table}, {first.arch} beside the paper's {first.paper_arch}: {what}"
        f"{spread}{mark}"
    )


def format_entry(name: str, entry: Entry | None) -> str:
    """Format our number as the tables print it."""
    if entry is None or math.isnan(entry.mean):
        return MISSING
    spread = "" if math.isnan(entry.spread) else f" ± {_rounded(name, entry.spread)}"
    return f"{_rounded(name, entry.mean)}{spread}{entry.sign}{'!' if entry.doubted else ''}"


def _format_paper(name: str, entry: Entry | None) -> str:
    if entry is None or entry.paper is None:
        return MISSING
    return _rounded(name, entry.paper) + (entry.paper_sign or "")


def _rounded(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "clean" else f"{value:.2f}"


def _yes(value: bool | None) -> str:
    return MISSING if value is None else "yes" if value else "NO"


def claims_table(found: Sequence[Claim]) -> list[list[str]]:
    """Format the claims as text: a header, then a row for each."""
    table = [["in the paper's order", "model", "ours", "paper", "holds"]]
    for claim in found:
        ours, theirs = [], []
        for method, entry in claim.entries.items():
            ours.append(f"{method} {format_entry(claim.name, entry._replace(sign=''))}")
            theirs.append(f"{method} {_format_paper(claim.name, entry._replace(paper_sign=''))}")
        absent = [f"not run: {', '.join(claim.missing)}"] if claim.missing else []
        numbers = [", ".join(ours + absent), ", ".join(theirs)]
        table.append([claim.text, claim.arch, *numbers, _yes(claim.holds)])
    return table


def conclusion(rows: Sequence[Compared]) -> str:
    """Say in one sentence how far our numbers and the paper's agree."""
    agree, total = agreement(rows)
    decided = [claim.holds for claim in claims(rows) if claim.holds is not None]
    return (
        f"{agree} of {total} signs agree with the paper's, and {sum(decided)} of"
        f" {len(decided)} orders"
    )


def claims_to_plain(found: Sequence[Claim]) -> list[dict[str, Any]]:
    """Convert the claims for JSON, without what the tables hold already."""
    return [
        {
            "text": claim.text, "arch": claim.arch, "missing": claim.missing, "holds": claim.holds,
            "ours": {m: e.mean for m, e in claim.entries.items()},
            "paper": {m: e.paper for m, e in claim.entries.items()},
        }
        for claim in found
    ]  # fmt: skip
