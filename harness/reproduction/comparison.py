"""Our numbers beside the paper's, and what they decide.

    rows = compare(1, "resnet18", {"standard": [scores], "iat": [scores], "mtlat": [scores]})
    print(comparison_caption(rows), *align_columns(comparison_table(rows)), conclusion(rows))

Each method has one `ModelScores` per seed. Clean accuracies are in percent, all else is R. A sign
of the paper has one of four verdicts: our difference is decided and has the same sign ("agrees") or
the opposite one ("contradicts"), it is "undecided", or the score is "void".
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, NamedTuple

from harness.benchmark.metrics import ModelScores, score_differences, sign, table_value
from harness.benchmark.paired import Difference, combine_seeds, decide, subtract, uncorrected
from harness.benchmark.tables import MISSING, answer, markdown_rows, to_plain
from harness.reproduction.paper import ATTACKS_TITLE, BASELINE, HEADINGS, MEANS, PAPER_ROWS, Printed

AGREES, CONTRADICTS, UNDECIDED, VOID = "agrees", "contradicts", "undecided", "void"
WITHOUT = ", without CW2"  # a mean of the attacks, where CW2 is void


class Entry(NamedTuple):
    """One of our numbers beside the paper's."""

    values: list[float]  # one per seed
    mean: float
    spread: float  # sample standard deviation, NaN for one seed
    sign: str  # of the mean, against the baseline's mean
    doubted: bool  # whether an attack check failed, or CW2 gave up on an image
    by_seed: list[Difference]  # to the baseline; empty for the baseline and where unpaired
    difference: Difference | None  # their mean, after Holm's correction
    paper: float | None
    paper_sign: str | None
    verdict: str  # one of the four above; empty where the paper has no sign


class Compared(NamedTuple):
    """A row of one of our tables beside the paper's row."""

    table: int
    arch: str
    paper_arch: str
    method: str
    entries: dict[str, Entry]
    void: frozenset[str]  # see `ModelScores`


class Order(NamedTuple):
    """Two methods, the better one in the paper first, and our difference between them."""

    text: str
    arch: str
    name: str  # of the numbers, as in `HEADINGS`
    entries: dict[str, Entry]  # of both methods
    difference: Difference | None
    verdict: str


def compare(table: int, arch: str, measured: Mapping[str, Sequence[ModelScores]]) -> list[Compared]:
    """Put our numbers beside those of one of the paper's tables.

    Differences are averaged over the seeds, and their p-values corrected by Holm's method for the
    number of comparisons of the row.

    Args:
        table: 1, 2 or 3.
        arch: ours. One that the paper's table lacks stands beside its ResNet-50.
        measured: the scores of each seed, by method; with the baseline. A perturbation counts where
            every seed of the method and of the baseline has it, and the mean of the attacks where
            all leave out the same void ones.
    """
    known = {row.arch for row in PAPER_ROWS if row.table == table}
    paper_arch = arch if arch in known else "resnet50"
    base = [_numbers(row) for row in measured[BASELINE]]
    mixed = len({row.void for seeds in measured.values() for row in seeds}) > 1
    names = [name for name in HEADINGS if not (mixed and name == ATTACKS_TITLE)]
    compared = []
    for method, seeds in measured.items():
        void = frozenset().union(*(row.void for row in seeds))
        theirs = _paper_scores(table, paper_arch, method, void)
        ours = [_numbers(row) for row in seeds]
        paired = [{**score_differences(row), **row.mean_differences} for row in seeds]
        wanted = names if table < 3 else ["clean"]
        shown = [n for n in wanted if all(n in row for row in (*ours, *base))]
        by_seed = {n: [d[n] for d in paired] if all(n in d for d in paired) else [] for n in shown}
        combined = {n: combine_seeds(d) if d else None for n, d in by_seed.items()}
        entries = {}
        for name, difference in decide(combined, MEANS).items():
            values = [row[name] for row in ours]
            mean, other = fmean(values), fmean(row[name] for row in base)
            spread = stdev(values) if len(values) > 1 and not math.isnan(mean) else math.nan
            value, paper_sign = theirs.get(name, (None, None))
            entries[name] = Entry(
                values, mean, spread, sign(name, mean, other),
                doubted=any(name in row.findings for row in seeds),
                by_seed=by_seed[name], difference=difference, paper=value, paper_sign=paper_sign,
                verdict=_verdict(difference, paper_sign, name in void),
            )  # fmt: skip
        compared.append(Compared(table, arch, paper_arch, method, entries, void))
    return compared


def _paper_scores(table: int, arch: str, method: str, void: frozenset[str]) -> dict[str, Printed]:
    """Return the paper's row, with the mean of the attacks without what is void in ours."""
    # The baseline stands in Table 1 alone, and is Table 2's too.
    ordered = sorted(PAPER_ROWS, key=lambda row: row.table != table)
    found = (row.scores for row in ordered if (row.arch, row.method) == (arch, method))
    scores = dict(next(found, {}))
    if ATTACKS_TITLE in scores:
        kept = [scores[name].value for name in MEANS[ATTACKS_TITLE] if name not in void]
        scores[ATTACKS_TITLE] = Printed(fmean(kept), None)
    return scores


def _numbers(row: ModelScores) -> dict[str, float]:
    """Return our numbers by the names of `HEADINGS`, as tables show them."""
    return {**{name: table_value(name, s) for name, s in row.scores.items()}, **row.means}


def _verdict(difference: Difference | None, paper_sign: str | None, void: bool = False) -> str:
    if not paper_sign:
        return ""
    if void:
        return VOID
    if difference is None or not difference.decided:
        return UNDECIDED
    return AGREES if (difference.value > 0) == (paper_sign == "+") else CONTRADICTS


def count_verdicts(rows: Iterable[Compared]) -> Counter[str]:
    """Count the verdicts on the paper's signs."""
    return Counter(e.verdict for row in rows for e in row.entries.values() if e.verdict)


def orders(rows: Sequence[Compared]) -> list[Order]:
    """Compare pairs of methods in the paper's order. Its means are computed from its numbers."""
    table_3 = [row for row in PAPER_ROWS if row.table == 3]
    table_3.sort(key=lambda row: -row.scores["clean"].value)
    wanted = [
        (1, "mean R under the 19 corruptions", "All corruptions", "mtlat", "iat"),
        (1, "mean R under the attacks", ATTACKS_TITLE, "mtlat", "iat"),
        *((3, "clean accuracy", "clean", a.method, b.method) for a, b in pairwise(table_3)),
    ]
    found = []
    for arch in dict.fromkeys(row.arch for row in rows):
        for table, text, name, better, worse in wanted:
            own = [row for row in rows if (row.table, row.arch) == (table, arch)]
            ours = {row.method: row.entries for row in own}
            entries = {m: ours[m][name] for m in (better, worse) if name in ours.get(m, {})}
            if len(entries) == 2:
                difference = _subtract_seeds(entries, better, worse, accuracy=name == "clean")
                verdict = _verdict(difference, "+")
                text += WITHOUT if name == ATTACKS_TITLE and any(row.void for row in own) else ""
                found.append(Order(text, arch, name, entries, difference, verdict))
    return found


def _subtract_seeds(
    entries: Mapping[str, Entry], better: str, worse: str, *, accuracy: bool
) -> Difference | None:
    """Compare two methods by their differences to the baseline, in the paper never the worse."""
    second = entries[worse].by_seed
    first = [None] * len(second) if better == BASELINE else entries[better].by_seed
    if not second or len(first) != len(second):
        return None
    found = [subtract(a, b, accuracy=accuracy) for a, b in zip(first, second, strict=True)]
    return uncorrected(combine_seeds(found))


# ---------------------------------------------------------------------------- text


def comparison_table(rows: Sequence[Compared]) -> list[list[str]]:
    """Format the rows of one table as text: a line per perturbation, columns per method.

    The columns of a method are ours, the paper's, and the verdict. The baseline has the first two.
    """
    header, names = [""], [n for n in HEADINGS if any(n in row.entries for row in rows)]
    void = any(row.void for row in rows)
    titles = HEADINGS | ({ATTACKS_TITLE: f"mean of 4{WITHOUT}"} if void else {})
    lines = [[titles[name]] for name in names]
    for row in rows:
        signed = any(entry.verdict for entry in row.entries.values())
        header += [row.method, "paper", "verdict"] if signed else [row.method, "paper"]
        for name, line in zip(names, lines, strict=True):
            entry = row.entries.get(name)
            line += [format_entry(name, entry), _format_paper(name, entry)]
            if signed:
                line.append(entry.verdict if entry and entry.verdict else MISSING)
    return [header, *lines]


def comparison_caption(rows: Sequence[Compared]) -> str:
    """Describe the numbers of `comparison_table` in one line."""
    first = rows[0]
    entries = [entry for row in rows for entry in row.entries.values()]
    seeds = max(len(entry.values) for entry in entries)
    spread = f"mean ± sample standard deviation of {seeds} seeds"
    spread = spread if seeds > 1 else "one seed: the verdicts are about these networks alone"
    mark = "; !: an attack check failed" if any(entry.doubted for entry in entries) else ""
    if any(row.void & row.entries.keys() for row in rows):
        mark += f"; void: CW2 gave up on nearly all images that {BASELINE} gets right"
    what = "clean accuracy" if first.table == 3 else "clean accuracy, then R"
    return (
        f"Table {first.table}, {first.arch} beside the paper's {first.paper_arch}: {what}"
        f"; {spread}; + and - against standard, in parentheses where undecided{mark}"
    )


def format_entry(name: str, entry: Entry | None) -> str:
    """Format our number as the tables print it."""
    if entry is None or math.isnan(entry.mean):
        return MISSING
    spread = "" if math.isnan(entry.spread) else f" ± {_rounded(name, entry.spread)}"
    mark = entry.sign
    if mark and not (entry.difference and entry.difference.decided):
        mark = f"({mark})"
    return f"{_rounded(name, entry.mean)}{spread}{mark}{'!' if entry.doubted else ''}"


def _format_paper(name: str, entry: Entry | None) -> str:
    if entry is None or entry.paper is None:
        return MISSING
    return _rounded(name, entry.paper) + (entry.paper_sign or "")


def _rounded(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "clean" else f"{value:.2f}"


def orders_table(found: Sequence[Order]) -> list[list[str]]:
    """Format the orders as text: a header, then a row for each."""
    table = [["quantity", "model", "ours", "paper", "difference, 95 %", "verdict, uncorrected"]]
    for order in found:
        ours, theirs = [], []
        for method, entry in order.entries.items():
            ours.append(f"{method} {format_entry(order.name, entry._replace(sign=''))}")
            theirs.append(f"{method} {_format_paper(order.name, entry._replace(paper_sign=''))}")
        difference = format_difference(order.difference, points=order.name == "clean")
        numbers = [", ".join(ours), ", ".join(theirs), difference]
        table.append([order.text, order.arch, *numbers, order.verdict])
    return table


def format_difference(difference: Difference | None, *, points: bool = False) -> str:
    """Format a difference with its interval; of accuracies in percentage points, if wanted."""
    if difference is None:
        return "unpaired"
    value, low, high = (f"{100 * n:+.1f}" if points else f"{n:+.3f}" for n in difference[:3])
    return f"{value}{' points' * points} ({low} to {high})"


def conclusion(rows: Sequence[Compared]) -> str:
    """Say in one sentence what our numbers decide of the paper's signs."""
    counts = count_verdicts(rows)
    if not counts:
        return "The paper prints no signs beside these numbers"
    void = f"; void: {counts[VOID]}" if counts[VOID] else ""
    return (
        f"Of {sum(counts.values())} signs of the paper, decided as in the paper: {counts[AGREES]};"
        f" decided against it: {counts[CONTRADICTS]}; undecided: {counts[UNDECIDED]}{void}"
    )


def answers(rows: Sequence[Compared]) -> list[str]:
    """Say for M-TLAT, per architecture, what it changes against the standard training."""
    found = [row for row in rows if (row.table, row.method) == (1, "mtlat")]
    said = []
    for row in found:
        name = f"M-TLAT ({row.arch})" if len(found) > 1 else "M-TLAT"
        differences = {n: e.difference for n, e in row.entries.items() if n not in MEANS}
        said.append(answer(name, BASELINE, differences))
    return said


def comparison_markdown(tables: Sequence[Sequence[Compared]]) -> Iterator[str]:
    """Yield the answers, the tables beside the paper's, and the orders, in Markdown."""
    rows = [row for table in tables for row in table]
    yield from answers(rows)
    yield f"{conclusion(rows)}."
    for table in tables:
        yield f"**{comparison_caption(table)}**"
        yield "\n".join(markdown_rows(comparison_table(table)))
    if found := orders(rows):
        yield "\n".join(markdown_rows(orders_table(found)))


def orders_to_plain(found: Sequence[Order]) -> list[dict[str, Any]]:
    """Convert the orders for JSON, without what the tables hold already."""
    plain: list[dict[str, Any]] = to_plain([
        {
            "text": order.text, "arch": order.arch, "verdict": order.verdict,
            "ours": {m: e.mean for m, e in order.entries.items()},
            "paper": {m: e.paper for m, e in order.entries.items()},
            "difference": order.difference and order.difference[:4],
        }
        for order in found
    ])  # fmt: skip
    return plain
