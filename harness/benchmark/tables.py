"""Results as tables: for the terminal, in Markdown, LaTeX, CSV and JSON."""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from harness.benchmark.metrics import CONFIDENCES, Results, robustness, score_differences, wilson
from harness.benchmark.paired import Difference
from harness.benchmark.registry import COLUMNS, PERTURBATIONS, SAMPLE, TABLES

MISSING = "-"
CLEAN = "Clean accuracy"
SUPPLEMENTARY = "Supplementary attacks"
# What Markdown would take for a backslash escape, a table's border, HTML, code, a link, an entity,
# or emphasis. An underscore within a word is none, and asterisks set cells in bold.
MARKUP = re.compile(r"\\(?=[!-/:-@\[-`{-~])|[|<`\[]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")
SIGN = re.compile(r"(?<=\d)(\(?[+-]\)?)(!?)$")  # 0.83+ or 0.83(-)!

CSV_COLUMNS = [
    *("model", "perturbation", "severity", "n", "accuracy", "low", "high", "R", "R low", "R high"),
    *("sign", "difference", "difference low", "difference high", "p (Holm)", "decided"),
]


def table_cells(results: Results, title: str) -> list[list[str]]:
    """Format one of `measured_tables` as text: a header, then a row for each model.

    The supplementary attacks are the rows of their table, because there may be many.
    """
    if title == SUPPLEMENTARY:
        return supplementary_cells(results)
    summaries = {
        "ImageNet-C's corruptions": ["mean", "corrupted %", "mCE", "rel. mCE"],
        "The paper's corruptions": ["mean", "mean of 19"],
        "Adversarial attacks": ["mean", "CW2 gave up", "CW2 at 0", "L2"],
        CLEAN: [],
    }.get(title, ["mean"])  # fmt: skip
    names = TABLES.get(title, [])
    table = [["model", "clean %", "95 %", *(COLUMNS[name] for name in names), *summaries]]
    for row in results.rows:
        clean, corrupted = row.scores["clean"], 100 * row.corrupted_accuracy
        cells = [row.model, f"{100 * clean.accuracy:.1f}{clean.decided_sign}"]
        cells.append(f"{100 * clean.low:.0f} to {100 * clean.high:.0f}")
        for name in names:
            mark = "!" if name in row.findings else ""
            score = row.scores.get(name)
            cells.append(_number(score.robustness, score.decided_sign + mark) if score else MISSING)
        values = {
            "mean": _number(row.means.get(title, math.nan)),
            "corrupted %": MISSING if math.isnan(corrupted) else f"{corrupted:.1f}",
            "mCE": _number(row.mce, "%"),
            "rel. mCE": _number(row.relative_mce, "%"),
            "mean of 19": _number(row.means.get("All corruptions", math.nan)),
            "CW2 gave up": _number(100 * row.cw2.get("gave_up", math.nan), "%"),
            "CW2 at 0": _number(row.cw2.get("at_0", math.nan)),
            "L2": _number(row.cw2.get("l2", math.nan)),
        }
        table.append(cells + [values[heading] for heading in summaries])
    return table


def supplementary_cells(results: Results) -> list[list[str]]:
    """Format R and its interval of the attacks beside the paper's: two columns for each model."""
    table = [["attack", *(text for row in results.rows for text in (row.model, "95 %"))]]
    for name in dict.fromkeys(name for row in results.rows for name in row.supplement):
        cells = [name]
        for row in results.rows:
            if score := row.supplement.get(name):
                low, high = _number(score.r_low), _number(score.r_high)
                cells += [_number(score.robustness), f"{low} to {high}"]
            else:
                cells += [MISSING, MISSING]
        table.append(cells)
    return table


def margin_table(results: Results) -> list[list[str]]:
    """Format the shares of right images on which CW2 reached each margin; [] without CW2."""
    keys = [f"margin_{confidence}" for confidence in CONFIDENCES]
    rows = [
        [row.model, *(f"{100 * row.cw2[key]:.0f} %" for key in keys)]
        for row in results.rows
        if keys[0] in row.cw2
    ]
    return [["model", *(f"by {confidence}" for confidence in CONFIDENCES)], *rows] if rows else []


def measured_tables(results: Results) -> list[str]:
    """List the titles of the tables that hold a score; `CLEAN` if none of TABLES does."""
    measured = {name for row in results.rows for name in row.scores}
    measured |= {"cw2" for row in results.rows if row.cw2}  # CW2 at 0 has columns there
    titles = [title for title, names in TABLES.items() if measured & set(names)] or [CLEAN]
    return titles + [SUPPLEMENTARY] * any(row.supplement for row in results.rows)


def _number(value: float, suffix: str = "") -> str:
    if math.isnan(value):
        return MISSING
    return f"{value:.0f} %" if suffix == "%" else f"{value:.2f}{suffix}"


def table_caption(results: Results, title: str) -> str:
    """Describe a table's numbers in one line."""
    if title == SUPPLEMENTARY:
        counts = {s.n for row in results.rows for s in row.supplement.values()}
        images = _count_images(counts, results.total)
        return f"{title}: R = accuracy / clean accuracy, with 95 % intervals; n = {images}"
    scores = [row.scores for row in results.rows]
    names = TABLES.get(title, ["clean"])
    if not any(own.keys() & {*names} for own in scores):
        names = ["clean"]  # beside which CW2 at 0 was measured alone
    counts = {s.n for own in scores for name, s in own.items() if name in names}
    images = _count_images(counts, results.total)
    sampled = any("at_0" in row.cw2 for row in results.rows) and title == "Adversarial attacks"
    few = f"; CW2 at 0 and L2 (median of its steps): up to {SAMPLE} images" if sampled else ""
    graded = any(len(PERTURBATIONS[name].severities) > 1 for name in names)
    mean = ", mean of five severities" if graded else ""
    meaning = f": R = accuracy / clean accuracy{mean}" if title != CLEAN else ""
    compared = {sum(s.difference is not None for s in own.values()) for own in scores} - {0}
    decided = ""
    if compared:
        decided = (
            "; in parentheses where the paired difference is not decided at 95 % (Holm's correction"
            f" for {'up to ' * (len(compared) > 1)}{max(compared)})"
        )
    signs = f"; + and - against {results.baseline}{decided}" if len(scores) > 1 else ""
    return f"{title}{meaning}; n = {images}{few}{signs}"


def _count_images(counts: set[int], total: int) -> str:
    """Say on how many images scores were measured, and of how many."""
    whole = f" of {total}" if max(counts) < total else ""
    return f"{' or '.join(map(str, sorted(counts)))}{whole} test images"


def answer(model: str, baseline: str, differences: Mapping[str, Difference | None]) -> str:
    """Say in plain words how a model differs from the baseline.

    The differences are of clean accuracy ("clean") and of R by perturbation; None where unpaired.
    """
    clean = differences.get("clean")
    others = [d for name, d in differences.items() if name != "clean" and d]
    points = "not compared"
    if clean:
        decided = "decided" if clean.decided else "not decided"
        points = f"{100 * clean.value:+.1f} points ({decided})"
    said = f"{model} against {baseline}: clean accuracy {points}."
    return f"{said} Robustness is {count_sides(others)}." if others else said


def count_sides(differences: Sequence[Difference]) -> str:
    """Say under how many perturbations a model is higher and lower, and how many are decided."""
    higher = [d.decided for d in differences if d.value > 0]  # whether each is decided
    lower = [d.decided for d in differences if d.value < 0]
    return (
        f"higher under {len(higher)} of {len(differences)} perturbations (decided under"
        f" {sum(higher)}), and lower under {len(lower)} (decided under {sum(lower)})"
    )


def answers(results: Results) -> list[str]:
    """Say in plain words how each model differs from the baseline, where that is known."""
    return [
        answer(row.model, results.baseline, differences)
        for row in results.rows
        if (differences := score_differences(row))
    ]


def table_notes(results: Results, title: str) -> list[str]:
    """List the warnings that qualify a table's scores.

    Those of a table that is left out, because nothing but its checks was measured, stand below the
    first one.
    """
    measured = measured_tables(results)
    left_out = TABLES.keys() - set(measured) if title == measured[0] else set()
    names = [name for t in TABLES if t == title or t in left_out for name in TABLES[t]]
    return [
        f"! {row.model}, {COLUMNS[name]}: {finding}"
        for row in results.rows
        for name in names
        for finding in row.findings.get(name, [])
    ]


def format_tables(results: Results) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """Yield the caption, the cells and the notes of each of `measured_tables`, as text."""
    for title in measured_tables(results):
        cells, notes = table_cells(results, title), table_notes(results, title)
        yield table_caption(results, title), cells, notes


def align_columns(table: list[list[str]]) -> list[str]:
    """Format a table's lines for the terminal."""
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = []
    for name, *numbers in table:
        right = [cell.rjust(width) for cell, width in zip(numbers, others, strict=True)]
        lines.append("  ".join([name.ljust(first), *right]).rstrip())
    return lines


def escape_markdown(text: str) -> str:
    """Escape what Markdown would not show as it is: a model may have any name."""
    return MARKUP.sub(r"\\\g<0>", text)


def markdown_rows(table: list[list[str]]) -> list[str]:
    """Format a table's lines in Markdown."""
    header, *rows = ([escape_markdown(cell) for cell in row] for row in table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def to_text(results: Results) -> str:
    """Format all tables for the terminal."""
    blocks = []
    for caption, cells, notes in format_tables(results):
        blocks.append("\n".join([caption, *align_columns(cells), *notes]))
    return "\n\n".join([*blocks, *answers(results), *(f"note: {n}" for n in results.notes)]) + "\n"


def to_markdown(results: Results) -> str:
    """Format all tables in Markdown."""
    blocks = []
    for caption, cells, notes in format_tables(results):
        lines = [f"**{escape_markdown(caption)}**", "", *markdown_rows(cells), ""]
        lines += [f"- {escape_markdown(note)}" for note in notes]
        blocks.append("\n".join(lines).rstrip())
    blocks += map(escape_markdown, answers(results))
    return "\n\n".join([*blocks, *(f"*{escape_markdown(n)}*" for n in results.notes)]) + "\n"


def to_latex(results: Results) -> str:
    """Format all tables in LaTeX, for an \\input; the last one's caption has the notes."""
    blocks = []
    tables = list(format_tables(results))
    for i, (caption, cells, notes) in enumerate(tables, 1):
        rows = [
            " & ".join(re.sub(SIGN, r"$\1$\2", _escape(cell)) for cell in row) + r" \\"
            for row in cells
        ]
        columns = "l" + "r" * (rows[0].count("&"))
        if i == len(tables):
            notes = [*notes, *results.notes]
        described = _escape(". ".join([caption, *notes]))
        blocks.append("\n".join([
            r"\begin{table}", r"\centering", r"\small", rf"\begin{{tabular}}{{{columns}}}",
            r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}",
            rf"\caption{{{described}.}}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _escape(content: str) -> str:
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
             "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
             "[": "{[}", "*": "{*}"}  # which could belong to the \\ before it  # fmt: skip
    return re.sub(r"[\\~^<>|[*%_&#${}]", lambda m: marks.get(m[0], f"\\{m[0]}"), content)


def to_csv(results: Results) -> str:
    """Format all scores as CSV: a row per model, perturbation and severity, and for their mean."""
    sink = io.StringIO()
    out = csv.writer(sink, lineterminator="\n")
    out.writerow(CSV_COLUMNS)
    for row in results.rows:
        for name, s in {**row.scores, **row.supplement}.items():
            several = len(s.by_severity) > 1
            for severity, share in enumerate(s.by_severity if several else (), 1):
                ratio = robustness(share, row.scores["clean"].accuracy)
                numbers = _digits(share, *wilson(share * s.n, s.n), ratio)
                out.writerow([row.model, name, severity, s.n, *numbers, *[""] * 8])
            numbers = _digits(s.accuracy, s.low, s.high, s.robustness, s.r_low, s.r_high)
            cells = [row.model, name, "mean" if several else "", s.n, *numbers, s.sign]
            compared: list[str] = [""] * 5
            if d := s.difference:
                decided = "yes" if d.decided else "no"
                compared = [*_digits(d.value, d.low, d.high, d.adjusted), decided]
            out.writerow([*cells, *compared])
    return sink.getvalue()


def to_plain(value: Any) -> Any:
    """Convert nested named tuples to what JSON can hold: NaN to None, without NumPy arrays."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items() if not isinstance(v, np.ndarray)}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _digits(*values: float) -> Iterator[str]:
    return ("" if math.isnan(value) else f"{value:.6f}" for value in values)
