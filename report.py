"""From the finished cells of evaluate.py to tables.

    report = aggregate(lines, {"standard": hash, "mtlat": hash}, baseline="standard")
    print(text(report))

A line is one finished cell, a dict: `model` (its hash), `perturbation`, `severity` (or None), `n`
and `correct` images of `total` in the test set, and what else cells.py measured.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attacks import ATTACKS
from corruptions import CORRUPTIONS
from sanity import doubts

Line = dict[str, Any]

TABLES = {  # title -> columns, in the paper's order
    "ImageNet-C's corruptions": [n for n, c in CORRUPTIONS.items() if c.family != "paper"],
    "The paper's corruptions": [n for n, c in CORRUPTIONS.items() if c.family == "paper"],
    "Adversarial attacks": list(ATTACKS),
}
COLUMNS = {n: CORRUPTIONS[n].column if n in CORRUPTIONS else ATTACKS[n].column
           for names in TABLES.values() for n in names}  # fmt: skip
CHECK = "check_"  # before the names of the sanity checks' cells
SUPPLEMENT = "cw2_0"  # the smallest adversarial step: CW2 at confidence 0
MISSING = "-"

# ---------------------------------------------------------------------------- aggregation


class Score(NamedTuple):
    """How a model does under one perturbation; accuracies in [0, 1], means over severities."""

    accuracy: float
    low: float  # 95 % interval of the accuracy
    high: float
    n: int
    robustness: float  # accuracy / clean accuracy, NaN if that is 0
    sign: str  # + - or nothing, against the baseline, of the two decimals that are printed
    by_severity: tuple[float, ...]  # accuracies


class Row(NamedTuple):
    """One model of the report."""

    model: str
    scores: dict[str, Score]  # "clean" and every perturbation that is complete
    means: dict[str, float]  # of R, by title of TABLES and "All corruptions", where complete
    relative_mce: float  # in per cent of the baseline's, NaN if there is none
    smallest_step: float | None  # median L2 of CW2 at confidence 0, of the images that are right
    findings: dict[str, list[str]]  # by perturbation: why its score may mean something else


class Report(NamedTuple):
    rows: list[Row]
    baseline: str
    total: int  # images in the test set, of which a score has n
    notes: list[str]


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Give the 95 % confidence interval of a share (Wilson, JASA 1927), equation 4."""
    z2 = 1.959963984540054**2  # the normal distribution's 97.5 % point, squared
    share = correct / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the bound is the share itself, and must not miss it by a rounding.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def aggregate(lines: Iterable[Line], models: Mapping[str, str], baseline: str) -> Report:
    """Make the report of these models (name -> hash) from the lines; of equal ones the last counts.

    A model's clean cell must be there; a perturbation counts if all its severities are. The
    interval of a mean over severities is that of n images, not of n images a severity: they are
    the same images.
    """
    cells = {(line["model"], line["perturbation"], line["severity"]): line for line in lines}
    measured = {name: _scores(cells, digest) for name, digest in models.items()}
    rows = []
    for name, digest in models.items():
        own, other = measured[name], measured[baseline]
        signed = {
            key: score._replace(sign=sign(key, printed(key, score), printed(key, other[key])))
            if name != baseline and key in other
            else score
            for key, score in own.items()
        }
        by_name = {line["perturbation"]: line for line in cells.values() if line["model"] == digest}
        step = by_name.get(SUPPLEMENT, {}).get("l2")
        mce = _relative_mce(own, other)
        rows.append(Row(name, signed, _means(own), mce, step, _findings(by_name)))
    total = max((line["total"] for line in cells.values()), default=0)
    return Report(rows, baseline, total, _notes(rows, list(cells.values())))


def severities(name: str) -> tuple[int | None, ...]:
    """The severities that a perturbation has cells for.

    (None,) for attacks, and for the paper's four, whose strength the paper draws for every image.
    """
    graded = name in CORRUPTIONS and CORRUPTIONS[name].family != "paper"
    return CORRUPTIONS[name].severities if graded else (None,)


def _scores(cells: Mapping[tuple[str, str, int | None], Line], digest: str) -> dict[str, Score]:
    clean = cells[digest, "clean", None]
    scores: dict[str, Score] = {}
    for name in ("clean", *COLUMNS):
        found = [cells[key] for s in severities(name) if (key := (digest, name, s)) in cells]
        if len(found) == len(severities(name)):
            shares = tuple(line["correct"] / line["n"] for line in found)
            accuracy, n = math.fsum(shares) / len(shares), min(line["n"] for line in found)
            ratio = _ratio(accuracy, clean["correct"] / clean["n"])
            scores[name] = Score(accuracy, *wilson(accuracy * n, n), n, ratio, "", shares)
    return scores


def _ratio(accuracy: float, clean: float) -> float:
    return accuracy / clean if clean else math.nan


def printed(name: str, score: Score) -> float:
    """The number that the tables show: clean accuracy in per cent, otherwise R."""
    return 100 * score.accuracy if name == "clean" else score.robustness


def sign(name: str, own: float, base: float) -> str:
    """+ or - or nothing: whether a number of the tables is above the baseline's, as printed."""
    own, base = (round(value, 1 if name == "clean" else 2) for value in (own, base))
    return "+" if own > base else "-" if own < base else ""


def _means(scores: Mapping[str, Score]) -> dict[str, float]:
    wanted = {**TABLES, "All corruptions": list(CORRUPTIONS)}
    return {
        title: math.fsum(scores[name].robustness for name in names) / len(names)
        for title, names in wanted.items()
        if scores.keys() >= set(names)
    }


def _relative_mce(own: Mapping[str, Score], base: Mapping[str, Score]) -> float:
    """The accuracy lost to a corruption, over what the baseline loses; mean, in per cent.

    Hendrycks and Dietterich, ICLR 2019, section 4.2, with the named baseline for AlexNet.
    """
    names = next(iter(TABLES.values()))
    if not own.keys() & base.keys() >= {"clean", *names}:
        return math.nan
    lost = [[s["clean"].accuracy - s[name].accuracy for name in names] for s in (own, base)]
    if min(lost[1]) <= 0:  # a baseline that loses nothing measures nothing
        return math.nan
    return 100 * math.fsum(a / b for a, b in zip(*lost, strict=True)) / len(names)


def _findings(cells: Mapping[str, Line]) -> dict[str, list[str]]:
    """What speaks against taking an attack's score at face value, by attack."""
    found: dict[str, list[str]] = {}
    shares = {name: line["correct"] / line["n"] for name, line in cells.items()}
    checks = {key.removeprefix(CHECK): v for key, v in shares.items() if key.startswith(CHECK)}
    whole = {key: v for key, v in shares.items() if key == "clean" or key in ATTACKS}
    few = cells.get(f"{CHECK}clean", {"n": 0, "broken": 0})
    said = doubts(whole) + [f"{doubt} (of {few['n']} images)" for doubt in doubts(checks)]
    if few["broken"]:
        said.append(f"the gradient is zero or NaN for {few['broken']} of {few['n']} images")
    if said:
        found["pgd_0.04"] = said
    if (line := cells.get("cw2")) and (right := line["right"]) and line["reached"] < right:
        gave_up, wrong = 1 - line["reached"] / right, line["misclassified"] / right
        found["cw2"] = [
            f"gave up on {100 * gave_up:.1f} % of the images that are right without it, which count"
            f" as they are; fooled, if by less than its confidence, on {100 * wrong:.1f} % (median"
            f" margin {line['margin']:.1f})"
        ]
    return found


def _notes(rows: Sequence[Row], lines: Sequence[Line]) -> list[str]:
    notes = []
    clean = [(row.scores["clean"], row.model) for row in rows]
    (worst, last), (best, first) = min(clean), max(clean)
    if worst.high < best.low:
        notes.append(
            f"clean accuracies differ by more than their intervals allow ({first}"
            f" {100 * best.accuracy:.1f} %, {last} {100 * worst.accuracy:.1f} %): robustness scores"
            " may only be compared at comparable clean accuracy"
        )
    if limits := {(line["limit"], line["seed"]) for line in lines if line.get("limit")}:
        limit, seed = min(limits)
        notes.append(f"tested on {limit} images, as many of each class, drawn with seed {seed}")
    notes += [
        f"{row.model}: the smallest adversarial step (CW2 at confidence 0), of the images that are"
        f" right, has a median length of {row.smallest_step:.3f} (L2)"
        for row in rows
        if row.smallest_step is not None
    ]
    if len({str((line.get("device"), line.get("versions"))) for line in lines}) > 1:
        notes.append("the cells come from several devices or versions: see cells.jsonl")
    return notes


# ---------------------------------------------------------------------------- tables


def grid(report: Report, title: str) -> list[list[str]]:
    """One of TABLES as text: a header, then a row for each model."""
    extra = {"ImageNet-C's corruptions": ["rel. mCE"], "The paper's corruptions": ["mean of 19"]}
    columns = [*(COLUMNS[name] for name in TABLES[title]), "mean", *extra.get(title, [])]
    table = [["model", "clean %", "95 %", *columns]]
    for row in report.rows:
        clean = row.scores["clean"]
        cells = [row.model, f"{100 * clean.accuracy:.1f}{clean.sign}"]
        cells.append(f"{100 * clean.low:.0f} to {100 * clean.high:.0f}")
        for name in TABLES[title]:
            doubt = "!" if name in row.findings else ""
            score = row.scores.get(name)
            cells.append(_number(score.robustness, score.sign + doubt) if score else MISSING)
        means = {
            "mean": _number(row.means.get(title, math.nan)),
            "rel. mCE": _number(row.relative_mce, "%"),
            "mean of 19": _number(row.means.get("All corruptions", math.nan)),
        }
        table.append(cells + [means[key] for key in table[0][len(cells) :]])
    return table


def shown(report: Report) -> list[str]:
    """The titles of the tables that hold a score."""
    measured = {name for row in report.rows for name in row.scores}
    return [title for title, names in TABLES.items() if measured & set(names)]


def _number(value: float, suffix: str = "") -> str:
    if math.isnan(value):
        return MISSING
    return f"{value:.0f} %" if suffix == "%" else f"{value:.2f}{suffix}"


def caption(report: Report, title: str) -> str:
    """What a table's numbers are."""
    counts = sorted({s.n for r in report.rows for k, s in r.scores.items() if k in TABLES[title]})
    images = " or ".join(map(str, counts))
    if counts[-1] < report.total:
        images += f" of {report.total}"
    graded = any(len(severities(name)) > 1 for name in TABLES[title])
    mean = ", mean of five severities" if graded else ""
    return (
        f"{title}: R = accuracy / clean accuracy{mean}; n = {images} test images; + and - against"
        f" {report.baseline}"
    )


def remarks(report: Report, title: str) -> list[str]:
    """What must be said beside a table's scores."""
    return [
        f"! {row.model}, {COLUMNS[name]}: {finding}"
        for row in report.rows
        for name in TABLES[title]
        for finding in row.findings.get(name, [])
    ]


def aligned(table: list[list[str]]) -> list[str]:
    """The lines of a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def piped(table: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    header, *rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def text(report: Report) -> str:
    """The tables for a terminal."""
    blocks = []
    for title in shown(report):
        rows = aligned(grid(report, title))
        blocks.append("\n".join([caption(report, title), *rows, *remarks(report, title)]))
    return "\n\n".join(blocks + [f"note: {note}" for note in report.notes]) + "\n"


def markdown(report: Report) -> str:
    """The tables in Markdown."""
    blocks = []
    for title in shown(report):
        table = piped(grid(report, title))
        said = [f"- {line}" for line in remarks(report, title)]
        blocks.append("\n".join([f"**{caption(report, title)}**", "", *table, "", *said]).rstrip())
    return "\n\n".join(blocks + [f"*{note}*" for note in report.notes]) + "\n"


def latex(report: Report) -> str:
    """The tables in LaTeX, to be \\input; the last one's caption has the notes."""
    blocks = []
    titles = shown(report)
    for title in titles:
        rows = [
            " & ".join(re.sub(r"([+-])(!?)$", r"$\1$\2", _escape(cell)) for cell in row) + r" \\"
            for row in grid(report, title)
        ]
        columns = "l" + "r" * (rows[0].count("&"))
        said = [*remarks(report, title), *(report.notes if title == titles[-1] else [])]
        blocks.append("\n".join([
            r"\begin{table}", r"\centering", r"\small", rf"\begin{{tabular}}{{{columns}}}",
            r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}",
            rf"\caption{{{_escape('. '.join([caption(report, title), *said]))}.}}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _escape(content: str) -> str:
    return re.sub(r"([%_&#$])", r"\\\1", content)


def flat(report: Report) -> str:
    """All scores as CSV: a line for each model, perturbation and severity, and for their mean."""
    sink = io.StringIO()
    out = csv.writer(sink, lineterminator="\n")
    out.writerow(["model", "perturbation", "severity", "n", "accuracy", "low", "high", "R", "sign"])
    for row in report.rows:
        for name, s in row.scores.items():
            several = len(s.by_severity) > 1
            for severity, share in enumerate(s.by_severity if several else (), 1):
                ratio = _ratio(share, row.scores["clean"].accuracy)
                numbers = _digits(share, *wilson(share * s.n, s.n), ratio)
                out.writerow([row.model, name, severity, s.n, *numbers, ""])
            numbers = _digits(s.accuracy, s.low, s.high, s.robustness)
            out.writerow([row.model, name, "mean" if several else "", s.n, *numbers, s.sign])
    return sink.getvalue()


def plain(value: Any) -> Any:
    """The report as dicts, lists and numbers that JSON can hold."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _digits(*values: float) -> Iterator[str]:
    return ("" if math.isnan(value) else f"{value:.6f}" for value in values)
