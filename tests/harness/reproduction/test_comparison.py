"""Test paper.json, and the comparison of results with it.

The results are numbers written by hand and the numbers of the paper itself.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from corruptions import CORRUPTIONS
from harness.benchmark import metrics, tables
from harness.reproduction import comparison, paper
from harness.training.methods import METHODS

TRANSCRIPTION = Path(__file__).parents[2] / "support" / "paper_tables.json"
FULL = [row for row in paper.PAPER_ROWS if row.table < 3]


def make_row(
    clean: float, scores: dict[str, float], doubted: Sequence[str] = ()
) -> metrics.ModelScores:
    """Return a row of our results with these numbers."""

    def score(accuracy: float, robustness: float) -> metrics.Score:
        return metrics.Score(accuracy, 0, 1, 100, robustness, "", (accuracy,))

    own = {name: score(clean / 100 * r, r) for name, r in scores.items() if name not in paper.MEANS}
    means = {name: r for name, r in scores.items() if name in paper.MEANS}
    findings = {name: ["doubt"] for name in doubted}
    return metrics.ModelScores(
        "m", {"clean": score(clean / 100, 1), **own}, means, math.nan, None, findings
    )


def as_ours(table: int, arch: str) -> dict[str, list[metrics.ModelScores]]:
    """Return the rows of a table of the paper in the form of our results."""
    rows = {}
    for method in paper.methods_of_table(table):
        found = [r for r in paper.PAPER_ROWS if (r.arch, r.method) == (arch, method)]
        (theirs, *_) = [r for r in found if r.table == table] or found
        numbers = {name: printed.value for name, printed in theirs.scores.items()}
        rows[method] = [make_row(numbers.pop("clean"), numbers)]
    return rows


def test_paper_json_has_the_papers_rows() -> None:
    assert {(r.table, r.arch, r.method) for r in paper.PAPER_ROWS} == {
        *((1, a, m) for a in ("resnet50", "resnext50_32x4d") for m in ("standard", "iat", "mtlat")),
        *((2, "resnet50", m) for m in ("mixup", "tlat")),
        *((3, "resnet50", m) for m in ("standard", "fgsm", "target-fgsm", "ls", "tlat")),
    }
    for row in FULL:
        assert row.scores.keys() == set(paper.HEADINGS) and row.method in METHODS
    assert paper.methods_of_table(2) == ["standard", "mixup", "tlat"]


def test_paper_json_is_what_another_reader_took_from_the_tables() -> None:
    theirs = json.loads(TRANSCRIPTION.read_text())
    columns = json.loads(Path(paper.__file__).with_name("paper.json").read_text())["columns"]
    by_key = {(row["table"], row["arch"], row["method"]): row for row in theirs}
    assert by_key.keys() == {(row.table, row.arch, row.method) for row in FULL}
    for row in FULL:
        expected = by_key[row.table, row.arch, row.method]
        cells = {"clean": expected["clean"], **expected["scores"]}
        assert cells.keys() == {"clean", *columns}
        for name, cell in cells.items():
            own = row.scores[name]
            assert (own.value, own.sign or "") == (
                float(cell.rstrip("+-")),
                cell.lstrip("0123456789."),
            )
    clean = {row.method: row.scores["clean"].value for row in paper.PAPER_ROWS if row.table == 3}
    assert clean == {"standard": 73.3, "fgsm": 65.8, "target-fgsm": 68.3, "ls": 67.1, "tlat": 69.4}


@pytest.mark.parametrize("row", FULL, ids=lambda row: f"{row.arch}-{row.method}")
def test_the_papers_signs_follow_from_its_scores(row: paper.PaperRow) -> None:
    (base,) = (r for r in FULL if r.arch == row.arch and r.method == "standard")
    for name, (value, sign) in row.scores.items():
        if name not in paper.MEANS:
            expected = None if row is base else metrics.sign(name, value, base.scores[name].value)
            assert sign == expected, name


@pytest.mark.parametrize("table, arch", [(1, "resnet50"), (1, "resnext50_32x4d"), (2, "resnet50")])
def test_the_papers_own_numbers_agree_with_it(table: int, arch: str) -> None:
    rows = comparison.compare(table, arch, as_ours(table, arch))
    assert comparison.agreement(rows) == (2 * 25, 2 * 25)
    header, *lines = comparison.comparison_table(rows)
    assert len(lines) == 1 + 24 + 2 and not any("NO" in line for line in lines)
    place = header.index("paper", 3)
    assert [line[place - 1] for line in lines[1:20]] == [line[place] for line in lines[1:20]]


def test_the_papers_own_numbers_are_in_the_papers_orders() -> None:
    rows = [
        row
        for table, arch in sorted({(row.table, row.arch) for row in paper.PAPER_ROWS})
        for row in comparison.compare(table, arch, as_ours(table, arch))
    ]  # fmt: skip
    claims = comparison.claims(rows)
    assert [claim.holds for claim in claims] == [True] * 7
    assert list(claims[3].entries) == ["standard", "tlat", "target-fgsm", "ls", "fgsm"]
    assert comparison.conclusion(rows).startswith(
        "150 of 150 signs"
    ) and " 7 of 7 " in comparison.conclusion(rows)


# Each method has two seeds. Fog: standard has 0.40 and 0.42, with mean 0.41. mtlat has 0.50 and
# 0.60, with mean 0.55 and standard deviation 0.1 / sqrt 2. Occlusion: 0.704 and 0.696 both print as
# 0.70. One seed has no PGD score.
STANDARD = [
    make_row(80.0, {"fog": 0.40, "occlusion": 0.704, "pgd_0.04": 0.1}),
    make_row(82.0, {"fog": 0.42, "occlusion": 0.704}),
]
MTLAT = [
    make_row(79.0, {"fog": 0.50, "occlusion": 0.696, "pgd_0.04": 0.2}, ["fog"]),
    make_row(79.0, {"fog": 0.60, "occlusion": 0.696, "pgd_0.04": 0.2}),
]


def test_seeds_are_averaged_and_signs_are_those_of_the_means() -> None:
    base, row = comparison.compare(1, "tiny", {"standard": STANDARD, "mtlat": MTLAT})
    assert (row.arch, row.paper_arch) == ("tiny", "resnet50")
    assert row.entries.keys() == base.entries.keys() - {"pgd_0.04"} == {"clean", "fog", "occlusion"}
    fog = row.entries["fog"]
    assert fog.values == [0.50, 0.60] and fog.mean == pytest.approx(0.55)
    assert fog.spread == pytest.approx(0.1 / math.sqrt(2)) and fog.doubted
    assert (fog.sign, fog.paper, fog.paper_sign, fog.agrees) == ("+", 0.59, "+", True)
    assert comparison.format_entry("fog", fog) == "0.55 ± 0.07+!"
    occlusion, clean = row.entries["occlusion"], row.entries["clean"]
    assert (occlusion.sign, occlusion.agrees, clean.sign, clean.agrees) == ("", False, "-", False)
    assert clean.mean == pytest.approx(79.0)
    assert base.entries["fog"].agrees is None and comparison.agreement([base, row]) == (1, 3)
    table = comparison.comparison_table([base, row])
    assert table[0] == ["", "standard", "paper", "mtlat", "paper", "agrees"]
    assert table[2] == ["Fog", "0.41 ± 0.01", "0.48", "0.55 ± 0.07+!", "0.59+", "yes"]
    assert table[3] == ["Obstru", "0.70 ± 0.00", "0.74", "0.70 ± 0.00", "0.75+", "NO"]
    assert comparison.comparison_caption([base, row]) == (
        "Table 1, tiny beside the paper's resnet50: clean accuracy, then R; mean ± sample standard"
        " deviation of 2 seeds; !: an attack check failed"
    )


def test_one_seed_has_no_spread() -> None:
    (row,) = comparison.compare(1, "resnet50", {"standard": STANDARD[:1]})
    assert comparison.format_entry("clean", row.entries["clean"]) == "80.0"
    assert comparison.comparison_caption([row]).endswith("resnet50: clean accuracy, then R")
    assert tables.to_plain(row.entries["clean"])["spread"] is None


def test_an_order_needs_two_methods_and_a_tie_keeps_it() -> None:
    def orders(**clean: float) -> list[tuple[bool | None, list[str]]]:
        rows = {method.replace("_", "-"): [make_row(c, {})] for method, c in clean.items()}
        return [
            (c.holds, c.missing) for c in comparison.claims(comparison.compare(3, "tiny", rows))
        ]

    everything = {"standard": 70.0, "tlat": 60.0, "target_fgsm": 60.0, "ls": 50.0, "fgsm": 40.0}
    assert orders(**everything) == [(True, [])]
    assert orders(**everything | {"ls": 39.0}) == [(False, [])]
    assert orders(standard=70, tlat=71) == [(False, ["target-fgsm", "ls", "fgsm"])]
    assert orders(standard=70)[0][0] is None
    claims = comparison.claims(
        comparison.compare(1, "tiny", {"standard": STANDARD, "mtlat": MTLAT})
    )
    assert [claim.holds for claim in claims] == [None, None, False]
    assert comparison.claims_table(claims)[3][2:] == [
        "mtlat 79.0 ± 0.0, standard 81.0 ± 1.4", "mtlat 73.9, standard 73.3", "NO"
    ]  # fmt: skip
    assert "not run: mtlat, iat" in comparison.claims_table(claims)[1][2]


def test_the_means_are_over_all_nineteen_and_all_five() -> None:
    assert paper.MEANS["All corruptions"] == list(CORRUPTIONS) and len(CORRUPTIONS) == 19
    (mtlat,) = (r for r in FULL if (r.arch, r.method) == ("resnet50", "mtlat"))
    # The sums are computed by hand: 12.82 over nineteen scores, 3.36 over five.
    assert mtlat.scores["All corruptions"].value == pytest.approx(12.82 / 19)
    assert mtlat.scores[paper.ATTACKS_TITLE].value == pytest.approx(3.36 / 5)
