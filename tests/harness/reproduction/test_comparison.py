"""Test paper.json, and the comparison of results with it.

The results are numbers written by hand and the numbers of the paper itself.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from corruptions import CORRUPTIONS
from harness.benchmark import metrics, tables
from harness.benchmark.paired import Difference
from harness.reproduction import comparison, paper, report
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
        "m", {"clean": score(clean / 100, 1), **own}, means, math.nan, {}, findings, {}
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
def test_the_papers_own_numbers_have_its_signs(table: int, arch: str) -> None:
    """Check the signs, which without per-image outcomes are all undecided."""
    rows = comparison.compare(table, arch, as_ours(table, arch))
    signs = [e.paper_sign for row in rows for n, e in row.entries.items() if e.paper_sign]
    assert comparison.count_verdicts(rows) == {"undecided": len(signs)}
    assert all(e.sign == (e.paper_sign or "") for row in rows[1:]
               for n, e in row.entries.items() if n not in paper.MEANS)  # fmt: skip
    header, *lines = comparison.comparison_table(rows)
    place = header.index("paper", 3)
    assert len(lines) == 1 + 24 + 2
    for line in lines[1:20]:
        assert line[place - 1].replace("(", "").replace(")", "") == line[place]


def test_a_network_that_is_right_for_no_image_has_no_spread_over_seeds() -> None:
    rows = as_ours(1, "resnet50")
    wrong = make_row(0, dict.fromkeys(rows["mtlat"][0].scores.keys() - {"clean"}, math.nan))
    several = {method: [row[0], wrong] for method, row in rows.items()}
    entry = comparison.compare(1, "resnet50", several)[2].entries["fog"]
    assert math.isnan(entry.mean) and math.isnan(entry.spread)


def decided(value: float, p: float = 1e-9) -> Difference:
    """Return a difference that is decided."""
    return Difference(value, value - 0.01, value + 0.01, p, np.tile([-0.01, 0.01], 50))


def with_differences(
    table: int, arch: str, sense: int = 1, p: float = 1e-9
) -> list[comparison.Compared]:
    """Compare the paper's own numbers, with decided differences of its signs times `sense`."""
    ours = as_ours(table, arch)
    base = ours["standard"][0]
    for method, (row,) in ours.items():
        if method != "standard":
            scores = {
                n: s._replace(difference=decided(sense * (metrics.table_value(n, s)
                                                 - metrics.table_value(n, base.scores[n])), p))
                for n, s in row.scores.items()
            }  # fmt: skip
            means = {n: decided(v - base.means[n], p) for n, v in row.means.items() if base.means}
            ours[method] = [row._replace(scores=scores, mean_differences=means)]
    return comparison.compare(table, arch, ours)


@pytest.mark.parametrize("sense, verdict", [(1, "agrees"), (-1, "contradicts")])
def test_decided_differences_agree_or_contradict(sense: int, verdict: str) -> None:
    rows = with_differences(1, "resnet50", sense)
    assert comparison.count_verdicts(rows) == {verdict: 2 * 25}
    counts = (50, 0) if verdict == "agrees" else (0, 50)
    said = comparison.conclusion(rows)
    assert said == (
        f"Of 50 signs of the paper, decided as in the paper: {counts[0]};"
        f" decided against it: {counts[1]}; undecided: 0"
    )
    (answer,) = comparison.answers(rows)
    assert answer.startswith(f"M-TLAT against standard: clean accuracy {60 * sense:+.1f} points")
    higher, lower = (24, 0) if sense > 0 else (0, 24)
    assert answer.endswith(
        f"Robustness is higher under {higher} of 24 perturbations (decided under {higher}),"
        f" and lower under {lower} (decided under {lower})."
    )
    both = comparison.answers([*rows, *(row._replace(arch="other") for row in rows)])
    names = [text.partition(" against")[0] for text in both]
    assert names == ["M-TLAT (resnet50)", "M-TLAT (other)"]


def test_p_values_are_corrected_for_the_25_scores_of_a_row_and_not_for_its_means() -> None:
    p = 0.0019  # decided if multiplied by 25, and not if multiplied by 27
    _, *rows = with_differences(1, "resnet50", p=p)
    for row in rows:
        for name, entry in row.entries.items():
            assert entry.difference and entry.difference.adjusted == pytest.approx(
                p if name in paper.MEANS else 25 * p
            )
    assert comparison.count_verdicts(rows) == {"agrees": 2 * 25}


def test_a_difference_is_printed_with_its_lower_and_then_its_upper_bound() -> None:
    difference = Difference(0.125, -0.25, 0.5, 0.4, np.zeros(2))
    order = comparison.Order("a mean", "tiny", "fog", {}, difference, "")
    for name, printed in (
        ("All corruptions", "+0.125 (-0.250 to +0.500)"),
        ("clean", "+12.5 points (-25.0 to +50.0)"),
    ):
        assert comparison.orders_table([order._replace(name=name)])[1][4] == printed


def test_the_papers_differences_are_its_mtlat_minus_its_standard() -> None:
    rows = {row.method: row for row in comparison.compare(1, "resnet50", as_ours(1, "resnet50"))}
    found = report.paper_differences(rows)
    assert found.keys() == paper.HEADINGS.keys() - {"clean"}
    assert found["fog"] == pytest.approx(0.59 - 0.48)


def test_the_papers_own_numbers_are_in_the_papers_orders() -> None:
    keys = sorted({(row.table, row.arch) for row in paper.PAPER_ROWS})
    rows = [row for table, arch in keys for row in with_differences(table, arch)]
    found = comparison.orders(rows)
    assert [order.verdict for order in found] == ["agrees"] * 8
    assert list(found[3].entries) == ["tlat", "target-fgsm"]
    assert found[0].difference and found[0].difference.value == pytest.approx(
        found[0].entries["mtlat"].mean - found[0].entries["iat"].mean
    )
    assert len(comparison.orders_table(found)) == 9


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
    assert (fog.sign, fog.paper, fog.paper_sign, fog.verdict) == ("+", 0.59, "+", "undecided")
    assert comparison.format_entry("fog", fog) == "0.55 ± 0.07(+)!"
    occlusion, clean = row.entries["occlusion"], row.entries["clean"]
    assert (occlusion.sign, clean.sign, clean.mean) == ("", "-", pytest.approx(79.0))
    assert base.entries["fog"].verdict == ""
    assert comparison.count_verdicts([base, row]) == {"undecided": 3}
    table = comparison.comparison_table([base, row])
    assert table[0] == ["", "standard", "paper", "mtlat", "paper", "verdict"]
    assert table[2] == ["Fog", "0.41 ± 0.01", "0.48", "0.55 ± 0.07(+)!", "0.59+", "undecided"]
    assert comparison.comparison_caption([base, row]) == (
        "Table 1, tiny beside the paper's resnet50: clean accuracy, then R; mean ± sample standard"
        " deviation of 2 seeds; + and - against standard, in parentheses where undecided;"
        " !: an attack check failed"
    )


def test_a_mean_over_seeds_is_decided_by_all_of_them() -> None:
    """Check that two seeds that agree decide, and two that contradict each other do not."""

    def fog(*values: float) -> comparison.Entry:
        seeds = [make_row(80.0, {"fog": 0.4 + value}) for value in values]
        own = [
            seed._replace(scores=seed.scores | {
                "fog": seed.scores["fog"]._replace(difference=decided(value))})
            for seed, value in zip(seeds, values, strict=True)
        ]  # fmt: skip
        base = [make_row(80.0, {"fog": 0.4})] * len(values)
        return comparison.compare(1, "tiny", {"standard": base, "mtlat": own})[1].entries["fog"]

    assert (fog(0.2, 0.2, 0.201).verdict, fog(-0.2, -0.2, -0.201).verdict) == (
        "agrees",
        "contradicts",
    )
    assert fog(0.2, -0.1, 0.3).verdict == "undecided"
    three = fog(0.2, 0.2, 0.201).difference
    assert three and three.value == pytest.approx(0.601 / 3)


def test_a_seed_without_paired_outcomes_leaves_the_mean_undecided() -> None:
    first, second = MTLAT
    fog = first.scores["fog"]._replace(difference=decided(0.1))
    paired = first._replace(scores=first.scores | {"fog": fog})
    rows = comparison.compare(1, "tiny", {"standard": STANDARD, "mtlat": [paired, second]})
    entry = rows[1].entries["fog"]
    assert entry.difference is None and entry.verdict == "undecided"


def test_void_scores_have_no_part_in_means_and_verdicts() -> None:
    scores = {name: 0.5 for name in paper.MEANS[paper.ATTACKS_TITLE]}
    rows = {
        method: [make_row(80.0, scores | {paper.ATTACKS_TITLE: 0.5})._replace(
            void=frozenset({"cw2"}))]
        for method in ("standard", "mtlat")
    }  # fmt: skip
    compared = comparison.compare(1, "resnet50", rows)
    assert compared[1].entries["cw2"].verdict == "void"
    assert comparison.conclusion(compared).endswith("; void: 1")
    (mtlat,) = (r for r in FULL if (r.arch, r.method) == ("resnet50", "mtlat"))
    four = [mtlat.scores[n].value for n in scores if n != "cw2"]
    mean = compared[1].entries[paper.ATTACKS_TITLE]
    assert mean.paper == pytest.approx(sum(four) / 4)
    assert comparison.comparison_table(compared)[-1][0] == "mean of 4, without CW2"
    # The baseline alone has no verdicts.
    assert comparison.comparison_table(compared[:1])[-1][0] == "mean of 4, without CW2"


def test_seeds_whose_means_leave_out_other_attacks_have_no_common_mean() -> None:
    scores = {name: 0.5 for name in paper.MEANS[paper.ATTACKS_TITLE]}
    five = make_row(80.0, scores | {paper.ATTACKS_TITLE: 0.5, "All corruptions": 0.7})
    four = five._replace(void=frozenset({"cw2"}))
    mixed, same = (
        comparison.compare(1, "resnet50", {m: [four, other] for m in ("standard", "mtlat", "iat")})
        for other in (five, four)
    )
    for row in mixed:
        assert paper.ATTACKS_TITLE not in row.entries and "All corruptions" in row.entries
    titles = [line[0] for line in comparison.comparison_table(mixed)]
    assert [title for title in titles if title.startswith("mean of")] == ["mean of 19"]
    assert [order.name for order in comparison.orders(mixed)] == ["All corruptions"]
    assert all(paper.ATTACKS_TITLE in row.entries for row in same)
    texts = [order.text for order in comparison.orders(same)]
    assert texts[:2] == ["mean R under the 19 corruptions", "mean R under the attacks, without CW2"]
    assert comparison.comparison_caption(same).endswith(
        "; void: CW2 gave up on nearly all images that standard gets right"
    )
    clean = [row._replace(entries={"clean": row.entries["clean"]}) for row in same]
    assert "void" not in comparison.comparison_caption(clean)


def test_one_seed_has_no_spread() -> None:
    (row,) = comparison.compare(1, "resnet50", {"standard": STANDARD[:1]})
    assert comparison.format_entry("clean", row.entries["clean"]) == "80.0"
    caption = comparison.comparison_caption([row])
    assert caption.endswith(
        "then R; one seed: the verdicts are about these networks alone; + and - against standard,"
        " in parentheses where undecided"
    )
    assert tables.to_plain(row.entries["clean"])["spread"] is None


def test_an_order_needs_two_methods_and_paired_outcomes() -> None:
    rows = {m: [make_row(c, {})] for m, c in {"standard": 70.0, "tlat": 60.0, "ls": 50.0}.items()}
    compared = comparison.compare(3, "tiny", rows)
    assert comparison.conclusion(compared) == "The paper prints no signs beside these numbers"
    (first,) = comparison.orders(compared)
    assert list(first.entries) == ["standard", "tlat"] and first.verdict == "undecided"
    assert comparison.orders_table([first])[1] == [
        "clean accuracy", "tiny", "standard 70.0, tlat 60.0", "standard 73.3, tlat 69.4",
        "unpaired", "undecided",
    ]  # fmt: skip
    assert comparison.orders_to_plain([first]) == [{
        "text": "clean accuracy", "arch": "tiny", "verdict": "undecided",
        "ours": {"standard": 70.0, "tlat": 60.0}, "paper": {"standard": 73.3, "tlat": 69.4},
        "difference": None,
    }]  # fmt: skip
    for other, verdict in ((-10.0, "agrees"), (10.0, "contradicts")):
        (row,) = rows["tlat"]
        clean = row.scores["clean"]._replace(difference=decided(other))
        changed = rows | {"tlat": [row._replace(scores={"clean": clean})]}
        (first,) = comparison.orders(comparison.compare(3, "tiny", changed))
        assert first.verdict == verdict
        assert first.difference and first.difference.value == -other
        assert comparison.orders_table([first])[1][4].startswith(f"{-100 * other:+.1f} points (")
    assert comparison.orders(comparison.compare(3, "tiny", {"standard": rows["standard"]})) == []
    # An unpaired method is not taken for the baseline, which has no difference to itself either.
    better = rows["tlat"][0].scores["clean"]._replace(difference=decided(10.0))
    half = {"standard": rows["standard"], "target-fgsm": rows["ls"]}
    half["tlat"] = [rows["tlat"][0]._replace(scores={"clean": better})]
    (paired, unpaired) = comparison.orders(comparison.compare(3, "tiny", half))
    assert list(unpaired.entries) == ["tlat", "target-fgsm"]
    assert paired.difference and unpaired.difference is None


def test_the_means_are_over_all_nineteen_and_all_five() -> None:
    assert paper.MEANS["All corruptions"] == list(CORRUPTIONS) and len(CORRUPTIONS) == 19
    (mtlat,) = (r for r in FULL if (r.arch, r.method) == ("resnet50", "mtlat"))
    # The sums are computed by hand: 12.82 over nineteen scores, 3.36 over five.
    assert mtlat.scores["All corruptions"].value == pytest.approx(12.82 / 19)
    assert mtlat.scores[paper.ATTACKS_TITLE].value == pytest.approx(3.36 / 5)


def test_orders_without_a_number_are_valid_json() -> None:
    entries = comparison.compare(3, "tiny", {"standard": STANDARD})[0].entries
    entry = entries["clean"]._replace(mean=math.nan)
    order = comparison.Order("a mean", "tiny", "clean", {"standard": entry}, None, "undecided")
    (plain,) = comparison.orders_to_plain([order])
    assert plain["ours"] == {"standard": None} and json.dumps(plain, allow_nan=False)


def test_a_difference_of_clean_accuracy_alone_has_no_figure(tmp_path: Path) -> None:
    row = make_row(80.0, {})
    clean = row.scores["clean"]._replace(difference=decided(0.1))
    other = row._replace(scores={"clean": clean})
    table = comparison.compare(1, "tiny", {"standard": [row], "mtlat": [other]})
    assert table[1].entries["clean"].difference
    assert list(report._answer_figures([table], [], tmp_path)) == []


def test_a_failed_check_of_any_seed_marks_the_score() -> None:
    for own in (MTLAT, MTLAT[::-1]):
        row = comparison.compare(1, "tiny", {"standard": STANDARD, "mtlat": own})[1]
        assert row.entries["fog"].doubted and not row.entries["occlusion"].doubted


def test_a_score_that_is_void_for_any_seed_has_no_verdict() -> None:
    valid = make_row(80.0, {"cw2": 0.5})
    void = valid._replace(void=frozenset({"cw2"}))
    for seeds in ([valid, void], [void, valid]):
        row = comparison.compare(1, "resnet50", {m: seeds for m in ("standard", "mtlat")})[1]
        assert row.void == {"cw2"} and row.entries["cw2"].verdict == "void"


def test_the_orders_of_a_table_are_those_of_its_own_rows() -> None:
    rows = [row for table in (1, 2) for row in with_differences(table, "resnet50")]
    names = [order.name for order in comparison.orders(rows)]
    assert names == ["All corruptions", paper.ATTACKS_TITLE]  # and none of Table 3


def test_table_3_compares_clean_accuracies_alone() -> None:
    """The networks of the paper's Table 3 may have been evaluated for another table, too."""
    measured = {method: [make_row(70.0, {"fog": 0.5})] for method in ("standard", "tlat")}
    for row in comparison.compare(3, "resnet50", measured):
        assert list(row.entries) == ["clean"]
