"""Results as tables: for the terminal, in Markdown, LaTeX, CSV and JSON."""

import csv
import io
import math
import re
from collections.abc import Iterator
from typing import Any

from harness.benchmark.metrics import Results, robustness, wilson
from harness.benchmark.registry import COLUMNS, PERTURBATIONS, TABLES

MISSING = "-"


def table_cells(results: Results, title: str) -> list[list[str]]:
    """Format one of TABLES as text: a header, then a row for each model."""
    extra = {"ImageNet-C's corruptions": ["rel. mCE"], "The paper's corruptions": ["mean of 19"]}
    columns = [*(COLUMNS[name] for name in TABLES[title]), "mean", *extra.get(title, [])]
    table = [["model", "clean %", "95 %", *columns]]
    for row in results.rows:
        clean = row.scores["clean"]
        cells = [row.model, f"{100 * clean.accuracy:.1f}{clean.sign}"]
        cells.append(f"{100 * clean.low:.0f} to {100 * clean.high:.0f}")
        for name in TABLES[title]:
            mark = "!" if name in row.findings else ""
            score = row.scores.get(name)
            cells.append(_number(score.robustness, score.sign + mark) if score else MISSING)
        means = {
            "mean": _number(row.means.get(title, math.nan)),
            "rel. mCE": _number(row.relative_mce, "%"),
            "mean of 19": _number(row.means.get("All corruptions", math.nan)),
        }
        table.append(cells + [means[key] for key in table[0][len(cells) :]])
    return table


def measured_tables(results: Results) -> list[str]:
    """List the titles of the tables that hold a score."""
    measured = {name for row in results.rows for name in row.scores}
    return [title for title, names in TABLES.items() if measured & set(names)]


def _number(value: float, suffix: str = "") -> str:
    if math.isnan(value):
        return MISSING
    return f"{value:.0f} %" if suffix == "%" else f"{value:.2f}{suffix}"


def table_caption(results: Results, title: str) -> str:
    """Describe a table's numbers in one line."""
    scores = [row.scores for row in results.rows]
    counts = sorted({s.n for own in scores for k, s in own.items() if k in TABLES[title]})
    images = " or ".join(map(str, counts))
    if counts[-1] < results.total:
        images += f" of {results.total}"
    graded = any(len(PERTURBATIONS[name].severities) > 1 for name in TABLES[title])
    mean = ", mean of five severities" if graded else ""
    return (
        f"{title}: R = accuracy / clean accuracy{mean}; n = {images} test images; + and - against"
        f" {results.baseline}"
    )


def table_notes(results: Results, title: str) -> list[str]:
    """List the warnings that qualify a table's scores."""
    return [
        f"! {row.model}, {COLUMNS[name]}: {finding}"
        for row in results.rows
        for name in TABLES[title]
        for finding in row.findings.get(name, [])
    ]


def align_columns(table: list[list[str]]) -> list[str]:
    """Format a table's lines for the terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def markdown_rows(table: list[list[str]]) -> list[str]:
    """Format a table's lines in Markdown."""
    header, *rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def to_text(results: Results) -> str:
    """Format all tables for the terminal."""
    blocks = []
    for title in measured_tables(results):
        rows = align_columns(table_cells(results, title))
        notes = table_notes(results, title)
        blocks.append("\n".join([table_caption(results, title), *rows, *notes]))
    return "\n\n".join(blocks + [f"note: {note}" for note in results.notes]) + "\n"


def to_markdown(results: Results) -> str:
    """Format all tables in Markdown."""
    blocks = []
    for title in measured_tables(results):
        table = markdown_rows(table_cells(results, title))
        notes = [f"- {line}" for line in table_notes(results, title)]
        caption = f"**{table_caption(results, title)}**"
        blocks.append("\n".join([caption, "", *table, "", *notes]).rstrip())
    return "\n\n".join(blocks + [f"*{note}*" for note in results.notes]) + "\n"


def to_latex(results: Results) -> str:
    """Format all tables in LaTeX, for an \\input; the last one's caption has the notes."""
    blocks = []
    titles = measured_tables(results)
    for title in titles:
        rows = [
            " & ".join(re.sub(r"([+-])(!?)$", r"$\1$\2", _escape(cell)) for cell in row) + r" \\"
            for row in table_cells(results, title)
        ]
        columns = "l" + "r" * (rows[0].count("&"))
        notes = [*table_notes(results, title), *(results.notes if title == titles[-1] else [])]
        caption = _escape(". ".join([table_caption(results, title), *notes]))
        blocks.append("\n".join([
            r"\begin{table}", r"\centering", r"\small", rf"\begin{{tabular}}{{{columns}}}",
            r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}",
            rf"\caption{{{caption}.}}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _escape(content: str) -> str:
    return re.sub(r"([%_&#$])", r"\\\1", content)


def to_csv(results: Results) -> str:
    """Format all scores as CSV: a row per model, perturbation and severity, and for their mean."""
    sink = io.StringIO()
    out = csv.writer(sink, lineterminator="\n")
    out.writerow(["model", "perturbation", "severity", "n", "accuracy", "low", "high", "R", "sign"])
    for row in results.rows:
        for name, s in row.scores.items():
            several = len(s.by_severity) > 1
            for severity, share in enumerate(s.by_severity if several else (), 1):
                ratio = robustness(share, row.scores["clean"].accuracy)
                numbers = _digits(share, *wilson(share * s.n, s.n), ratio)
                out.writerow([row.model, name, severity, s.n, *numbers, ""])
            numbers = _digits(s.accuracy, s.low, s.high, s.robustness)
            out.writerow([row.model, name, "mean" if several else "", s.n, *numbers, s.sign])
    return sink.getvalue()


def to_plain(value: Any) -> Any:
    """Convert nested named tuples to dicts, lists and numbers that JSON can hold; NaN to None."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _digits(*values: float) -> Iterator[str]:
    return ("" if math.isnan(value) else f"{value:.6f}" for value in values)
