"""Test tables and figures on cells that are written by hand."""

import csv
import io
import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from scipy.stats import binomtest

from corruptions import CORRUPTIONS
from harness.benchmark import mce, metrics, plots, registry, tables
from harness.benchmark.attack_registry import ATTACKS
from harness.benchmark.paired import Difference, pack
from harness.benchmark.store import Cell
from harness.reproduction.paper import PAPER_ROWS
from tests.support.figures import collect_figures

FIFTEEN, FOUR, FIVE, VALIDATION = registry.TABLES.values()


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 50)


def line(model: str, name: str, correct: int, severity: int | None = None, **more: Any) -> Cell:
    common: Cell = {
        "n": 100,
        "total": 100,
        "limit": None,
        "seed": 0,
        "device": "cpu",
        "versions": {},
    }
    cell = {"model": model, "perturbation": name, "severity": severity, "correct": correct}
    return common | cell | more


def corruption(model: str, name: str, *correct: int) -> list[Cell]:
    return [line(model, name, c, severity) for severity, c in enumerate(correct, 1)]


# The expected values are computed by hand, for 100 test images.
# A: 80 clean images correct, and on average 48 under each of the fifteen, so R = 0.60.
# B: 50 clean images correct, and on average 35, so R = 0.70. B loses 15 images where A loses 32, so
# its relative mCE is 15 / 32 = 47 %.
# The paper's four: A has 59, 59, 40 and 80, so R is 0.7375 twice, 0.50 and 1.00, with mean 0.744.
# The mean of all nineteen is (15 x 0.6 + 2.975) / 19 = 0.63. B has 37 each, so R = 0.74, which
# prints the same as 0.7375. The mean of all nineteen is (15 x 0.7 + 4 x 0.74) / 19 = 0.71.
# The Wilson intervals of 80 and 50 of 100 are 71.1 to 86.7 and 40.4 to 59.6.
A, B = "aaaa", "bbbb"
CELLS = [
    line(A, "clean", 80), line(B, "clean", 50),
    *(x for name in FIFTEEN for x in corruption(A, name, 70, 60, 50, 40, 20)),
    *(x for name in FIFTEEN for x in corruption(B, name, 45, 40, 35, 30, 25)),
    line(A, "occlusion", 59), line(A, "color_distortion", 59),
    line(A, "translation", 40), line(A, "rotation", 80), *(line(B, name, 37) for name in FOUR),
    line(A, "pgd_0.04", 0), line(A, "pgd_ll_0.04", 8), line(B, "pgd_0.04", 5),
    line(A, "cw2", 80, right=80, reached=16, misclassified=72, margin=12.25, l2=3.0),
]  # fmt: skip
TABLES = """\
ImageNet-C's corruptions: R = accuracy / clean accuracy, mean of five severities; n = 100 test \
images; + and - against alpha
model  clean %      95 %  {}  mean  corrupted %   mCE  rel. mCE
alpha     80.0  71 to 87  {}  0.60         48.0  67 %     100 %
beta   50.0(-)  40 to 60  {}  0.70         35.0  84 %      47 %

The paper's corruptions: R = accuracy / clean accuracy; n = 100 test images; + and - against alpha
model  clean %      95 %  Obstru  Color    Trans      Rot  mean  mean of 19
alpha     80.0  71 to 87    0.74   0.74     0.50     1.00  0.74        0.63
beta   50.0(-)  40 to 60    0.74   0.74  0.74(+)  0.74(-)  0.74        0.71

Adversarial attacks: R = accuracy / clean accuracy; n = 100 test images; + and - against alpha
model  clean %      95 %      PGD  PGD LL    CW2  MI FGSM 0.04  MI FGSM 0.08  mean  \
CW2 gave up  CW2 at 0  L2
alpha     80.0  71 to 87     0.00    0.10  1.00!             -             -     -  \
       80 %         -   -
beta   50.0(-)  40 to 60  0.10(+)       -      -             -             -     -  \
          -         -   -
! alpha, CW2: the attack gave up on 80.0 % of the images that the model gets right, and these \
count as right; with any margin above 0 it fooled the model on 90.0 % (median margin 12.2)

note: unpaired: some cells have no per-image outcomes, so nothing is decided there

note: corrupted % is the mean accuracy under the fifteen corruptions; mCE averages the error \
under each, divided by AlexNet's (Hendrycks and Dietterich, 2019), and is comparable with \
published ones only for ImageNet at 224 px

note: clean accuracies differ by more than their intervals (alpha 80.0 %, beta 50.0 %): compare \
robustness only at comparable clean accuracy
"""


def make(lines: list[Cell] = CELLS, baseline: str = "alpha") -> metrics.Results:
    return metrics.aggregate(lines, {"alpha": A, "beta": B}, baseline)


def test_the_tables_are_those_worked_out_by_hand() -> None:
    headings = [CORRUPTIONS[name].column for name in FIFTEEN]
    columns = [max(len(h), 7) for h in headings]
    rows = [
        "  ".join(cell.rjust(w) for cell, w in zip(cells, columns, strict=True))
        for cells in (headings, ["0.60"] * 15, ["0.70(+)"] * 15)
    ]
    assert tables.to_text(make()) == TABLES.format(*rows)


def test_mce_is_alexnets_where_the_errors_are() -> None:
    errors = dict(mce.ALEXNET_ERRORS)
    assert list(errors) and set(errors) == set(FIFTEEN)
    assert mce.mce({name: 1 - error for name, error in errors.items()}) == pytest.approx(100)
    assert mce.mce({name: 1 - error / 2 for name, error in errors.items()}) == pytest.approx(50)
    # ResNet-50 of torchvision has, at 224 px, 29.29 % under gaussian_noise: CE 79.77 (published).
    assert 100 * (1 - 0.2929) / errors["gaussian_noise"] == pytest.approx(79.77, abs=0.01)
    # The published errors in percent, written down a second time so that a slip in one shows.
    printed = {
        "gaussian_noise": 88.6, "shot_noise": 89.4, "impulse_noise": 92.3,
        "defocus_blur": 82.0, "glass_blur": 82.6, "motion_blur": 78.6, "zoom_blur": 79.8,
        "snow": 86.7, "frost": 82.7, "fog": 81.9, "brightness": 56.5,
        "contrast": 85.3, "elastic_transform": 64.6, "pixelate": 71.8, "jpeg_compression": 60.7,
    }  # fmt: skip
    assert {k: 100 * error for k, error in errors.items()} == pytest.approx(printed, abs=0.051)
    made = tables.to_plain(make())["rows"][1]
    assert made["corrupted_accuracy"] == pytest.approx(0.35)
    assert made["mce"] == pytest.approx(100 * np.mean([0.65 / error for error in errors.values()]))


def test_a_relative_mce_that_does_not_exist_is_explained() -> None:
    note = "rel. mCE is -: alpha does not lose accuracy under every one of the fifteen"
    assert note not in tables.to_text(make())
    gains = [*CELLS, *corruption(A, "fog", 80, 80, 80, 80, 80)]
    row, _ = tables.table_cells(make(gains), next(iter(registry.TABLES)))[1:]
    assert row[-3:] == ["50.1", "65 %", "-"]
    for text in (tables.to_text, tables.to_markdown, tables.to_latex):
        assert note in text(make(gains))
    few = [x for x in CELLS if x["perturbation"] != "fog"]
    few += corruption(A, "snow", 80, 80, 80, 80, 80)  # no loss, and fog is missing
    need = "corrupted %, mCE and rel. mCE are -: they need all fifteen corruptions"
    assert need in tables.to_text(make(few)) and need not in tables.to_text(make())


@pytest.mark.parametrize(
    ("name", "own", "base", "expected"),
    [
        ("clean", 80.04, 80.0, ""), ("clean", 80.06, 80.0, "+"), ("clean", 79.94, 80.0, "-"),
        ("fog", 0.804, 0.8, ""), ("fog", 0.806, 0.8, "+"), ("fog", 0.794, 0.8, "-"),
    ],
)  # fmt: skip
def test_signs_are_those_of_the_printed_numbers(
    name: str, own: float, base: float, expected: str
) -> None:
    assert metrics.sign(name, own, base) == expected


def test_the_order_of_the_lines_does_not_matter_but_for_the_last_of_equal_cells() -> None:
    assert make(CELLS[::-1]).rows == make().rows
    assert make([line(A, "clean", 1), *CELLS]) == make()
    assert make([*CELLS, line(A, "clean", 1)]) != make()


def test_the_baseline_is_the_one_named() -> None:
    alpha, beta = make(baseline="beta").rows
    assert (alpha.scores["clean"].sign, beta.scores["clean"].sign) == ("+", "")
    assert {alpha.scores[name].sign for name in FIFTEEN} == {"-"}
    assert alpha.relative_mce == pytest.approx(100 * 32 / 15)


def test_a_perturbation_without_one_of_its_severities_is_not_scored() -> None:
    fog = (A, "fog", 5)
    made = make([c for c in CELLS if (c["model"], c["perturbation"], c["severity"]) != fog])
    alpha, beta = made.rows
    assert "fog" not in alpha.scores and "fog" in beta.scores and "frost" in alpha.scores
    first, second, *_ = registry.TABLES
    assert first not in alpha.means and second in alpha.means
    place = 3 + FIFTEEN.index("fog")
    assert [row[place] for row in tables.table_cells(made, first)] == ["Fog", "-", "0.70"]
    assert beta.relative_mce != beta.relative_mce  # NaN: alpha has no score to compare with


def test_a_model_that_is_never_right_has_no_robustness() -> None:
    made = make([line(B, "clean", 0), *(x for x in CELLS if x != line(B, "clean", 50))])
    row = tables.table_cells(made, "Adversarial attacks")[2]
    assert row[1:4] == ["0.0(-)", "0 to 4", "-"]
    assert json.loads(json.dumps(tables.to_plain(made), allow_nan=False))["rows"][1]["means"]


@pytest.mark.parametrize("n", [1, 7, 100, 1000, 50_000])
@pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.5, 1])
def test_intervals_are_wilsons(n: int, share: float) -> None:
    correct = round(share * n)
    low, high = metrics.wilson(correct, n)
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert [low, high] == pytest.approx([expected.low, expected.high])
    assert 0 <= low <= correct / n <= high <= 1


def paired(lines: list[Cell]) -> list[Cell]:
    """Add per-image outcomes: the first images are right, as many as the cell says."""
    return [x | {"hits": pack(torch.arange(x["n"]) < x["correct"])} for x in lines]


def test_paired_outcomes_decide_signs() -> None:
    made = make(paired(CELLS))
    alpha, beta = made.rows
    assert not any(score.difference for score in alpha.scores.values())
    fog = beta.scores["fog"].difference
    assert fog and fog.value == pytest.approx(0.1) and fog.low < 0.1 < fog.high
    assert fog.p < fog.adjusted == 1 and not fog.decided
    clean = beta.scores["clean"].difference
    assert clean and clean.value == pytest.approx(-0.3)
    assert clean.p == pytest.approx(2 * 0.5**30)  # McNemar: of 30 discordant images, all 30
    assert clean.adjusted == pytest.approx(21 * clean.p)  # the smallest of 21
    assert beta.scores["clean"].decided_sign == "-"
    assert beta.scores["occlusion"].difference and not beta.scores["occlusion"].decided_sign
    rotation = beta.scores["rotation"].difference
    assert rotation and rotation.value == pytest.approx(-0.26) and rotation.decided
    mean = beta.mean_differences["ImageNet-C's corruptions"]
    assert mean.value == pytest.approx(0.1) and mean.low < 0.1 < mean.high
    assert tables.answers(made) == [
        "beta against alpha: clean accuracy -30.0 points (decided). Robustness is higher under 19"
        " of 20 perturbations (decided under 1), and lower under 1 (decided under 1)."
    ]
    text = tables.to_text(made)
    assert "(Holm's correction for 21)" in text and "unpaired" not in text
    flat = {(r["model"], r["perturbation"], r["severity"]): r
            for r in csv.DictReader(io.StringIO(tables.to_csv(made)))}  # fmt: skip
    columns = ("difference", "difference low", "difference high", "p (Holm)")
    assert [flat["beta", "rotation", ""][key] for key in columns] == [
        f"{value:.6f}" for value in (-0.26, rotation.low, rotation.high, rotation.adjusted)
    ]
    assert flat["beta", "fog", "mean"]["difference"] == "0.100000"
    assert flat["beta", "rotation", ""]["decided"] == "yes"
    assert flat["beta", "fog", "mean"]["decided"] == "no"
    assert flat["beta", "fog", "1"]["decided"] == flat["alpha", "fog", "mean"]["decided"] == ""


def test_the_correction_is_that_of_each_model() -> None:
    lines = [line(model, "clean", 80) for model in "abc"]
    lines += [line(model, "rotation", 40) for model in "ab"]
    made = metrics.aggregate(paired(lines), dict(zip("abc", "abc", strict=True)), "a")
    clean, rotation = (
        tables.table_caption(made, t) for t in (tables.CLEAN, "The paper's corruptions")
    )
    assert "(Holm's correction for up to 2)" in clean and "up to 2)" in rotation


def test_a_caption_says_on_how_many_images_where_some_were_scored_on_fewer() -> None:
    lines = [line("a", "clean", 80), line("a", "rotation", 20, n=50), line("a", "occlusion", 70)]
    few, mixed = (metrics.aggregate(some, {"a": "a"}, "a") for some in (lines[:2], lines))
    captions = [tables.table_caption(made, "The paper's corruptions") for made in (few, mixed)]
    assert captions[0].endswith("; n = 50 of 100 test images")
    assert captions[1].endswith("; n = 50 or 100 test images")


def test_black_box_attacks_from_several_surrogates_are_noted() -> None:
    clean = [line(A, "clean", 80), line(B, "clean", 80)]
    for second, noted in (("s", False), ("t", True)):
        attacked = [line(m, "mi_fgsm_0.04", 40, surrogate=s) for m, s in ((A, "s"), (B, second))]
        assert ("the same surrogate" in tables.to_text(make(paired(clean + attacked)))) == noted


def test_a_difference_of_zero_is_neither_higher_nor_lower() -> None:
    zero, higher = (Difference(value, -1, 1, 0.5, np.zeros(2)) for value in (0.0, 0.1))
    said = tables.answer("beta", "alpha", {"fog": zero, "frost": zero, "snow": higher})
    assert re.findall(r"(higher|lower) under (\d)", said) == [("higher", "1"), ("lower", "0")]


def test_nothing_is_said_of_robustness_where_no_perturbation_is_compared() -> None:
    clean = Difference(0.012, 0, 1, 0.5, np.zeros(2))
    said = tables.answer("beta", "alpha", {"clean": clean, "fog": None})
    assert said == "beta against alpha: clean accuracy +1.2 points (not decided)."


def test_outcomes_of_fewer_images_than_the_clean_ones_are_not_paired() -> None:
    lines = [line(A, "clean", 80), line(B, "clean", 50)]
    lines += [line(m, "rotation", 40, n=50) for m in (A, B)]
    lines += [line(m, "translation", 40) for m in (A, B)]
    scores = make(paired(lines)).rows[1].scores
    assert scores["rotation"].difference is None and scores["translation"].difference


def test_a_model_that_is_never_right_has_no_cw2() -> None:
    lines = [line(m, "clean", 0) for m in (A, B)]
    lines += [line(m, "cw2", 0, right=0) for m in (A, B)]  # and so no "reached"
    assert not make(lines).rows[0].void and "CW2 is void" not in tables.to_text(make(lines))


def test_cw2_is_void_where_it_gives_up_on_the_baseline() -> None:
    others = [line(m, name, 40) for m in (A, B) for name in ATTACKS if name != "cw2"]
    clean = [line(A, "clean", 80), line(B, "clean", 80)]
    hopeless, fair = (
        [line(A, "cw2", 80 - reached, right=80, reached=reached, misclassified=80, margin=1.0)]
        for reached in (4, 5)
    )
    mtlat = [line(B, "cw2", 20, right=80, reached=60, misclassified=80, margin=1.0)]
    alpha, beta = make(paired(clean + others + hopeless + mtlat)).rows
    assert alpha.void == beta.void == {"cw2"} and beta.scores["cw2"].difference is None
    assert (alpha.means["Adversarial attacks"], beta.means["Adversarial attacks"]) == (0.5, 0.5)
    text = tables.to_text(make(paired(clean + others + hopeless + mtlat)))
    assert "CW2 is void" in text and "of 4 perturbations" in text and "unpaired" not in text
    assert tables.margin_table(make(paired(clean + others + fair + mtlat))) == []
    deciles = [5.0 * i for i in range(11)]  # the margins are uniform from 0 to 50
    fair[0]["margin_deciles"] = deciles
    assert tables.margin_table(make(paired(clean + others + fair + mtlat))) == [
        ["model", "by 0", "by 10", "by 20", "by 30", "by 40", "by 50"],
        ["alpha", "100 %", "80 %", "60 %", "40 %", "20 %", "0 %"],
    ]
    alpha, beta = make(paired(clean + others + fair + mtlat)).rows
    assert not alpha.void and beta.scores["cw2"].difference
    assert beta.means["Adversarial attacks"] == pytest.approx((4 * 0.5 + 0.25) / 5)


def test_the_mean_of_the_only_group_that_was_measured_is_compared() -> None:
    names = [name for name, entry in CORRUPTIONS.items() if entry.family == "paper"]
    lines = [line(m, "clean", 80) for m in (A, B)]
    lines += [line(A, name, 40) for name in names] + [line(B, name, 60) for name in names]
    _, beta = make(paired(lines)).rows
    assert beta.mean_differences["The paper's corruptions"].value == pytest.approx(0.25)


def test_findings_stand_beside_the_score() -> None:
    checks = {"clean": 80, "pgd_0": 79, "fgsm_0.04": 1, "pgd_0.04": 2, "pgd_0.5": 30}
    made = make([
        *CELLS,
        *(line(A, f"check_{name}", c, broken=3 if name == "clean" else None)
          for name, c in checks.items()),
        line(A, "mi_fgsm_0.04", 70), line(B, "mi_fgsm_0.04", 4),
        line(A, "cw2_0", 20, right=80, reached=60, l2=0.125),
    ])  # fmt: skip
    alpha, beta = made.rows
    found = "\n".join(alpha.findings["pgd_0.04"])
    for words in ("epsilon 0 changes", "single step", "epsilon 0.5 should", "3 of 100 images"):
        assert words in found
    assert "another model" not in found and found.count("(on 100 images)") == 3
    assert ["another model" in said for said in beta.findings["pgd_0.04"]] == [True]
    few = [line(A, "clean", 80), line(A, "pgd_0.04", 0), line(A, "check_pgd_0.5", 30)]
    alone = metrics.aggregate(few, {"alpha": A}, "alpha")
    assert "(on 100 images)" in alone.rows[0].findings["pgd_0.04"][0]  # without the clean check
    marked = tables.table_cells(made, "Adversarial attacks")[1:]
    assert [row[3] for row in marked] == ["0.00!", "0.10(+)!"]
    assert marked[0][-3:] == ["80 %", "0.25", "0.12"] and marked[1][-3:] == ["-"] * 3


@pytest.mark.parametrize(
    "name, shown",
    [("<!-- x", r"\<!-- x"), (r"a\|b", r"a\\\|b"), ("`x`", r"\`x\`"), 
     ("[x](a.com)", r"\[x](a.com)"), ("&lt;b", r"\&lt;b"), ("_x_", r"\_x\_"),
     (r"r\udcfcn a_b R&D -", r"r\udcfcn a_b R&D -")],
)  # fmt: skip
def test_markdown_shows_the_names_of_models_as_they_are(name: str, shown: str) -> None:
    results = metrics.aggregate(CELLS, {name: A, "beta": B}, name)
    results = results._replace(notes=[f"{name} guesses"])
    text = tables.to_markdown(results)
    assert f"\n| {shown} | " in text and f"against {shown}" in text and f"*{shown} gu" in text
    assert text.count(name) == text.count(shown) * (name in shown)


def test_names_of_models_may_have_any_character(tmp_path: Path) -> None:
    names = {"alpha": A, r"r|x_^~{1\n": B}
    made = metrics.aggregate(CELLS, names, "alpha")
    rows = [row for row in tables.to_markdown(made).splitlines() if row.startswith("|")]
    assert all(row.replace(r"\|", "").count("|") == rows[0].count("|") for row in rows[:4])
    escaped = r"r\textbar{}x\_\textasciicircum{}\textasciitilde{}\{1\textbackslash{}n"
    assert escaped in tables.to_latex(made)
    odd = metrics.aggregate(CELLS, {"alpha": A, "[x]<1>": B}, "alpha")
    assert "\n{[}x]\\textless{}1\\textgreater{} & " in tables.to_latex(odd)
    star = metrics.aggregate(CELLS, {"alpha": A, "*x": B}, "alpha")
    assert "\n{*}x & " in tables.to_latex(star)
    hidden = metrics.aggregate(CELLS, {"alpha": A, "_beta": B}, "alpha")
    shown = metrics.aggregate(CELLS, {"alpha": A, "beta": B}, "alpha")
    for name, results in (("hidden", hidden), ("shown", shown)):
        plots.plot_robustness(results, tmp_path / f"{name}.png")
    widths = [np.ptp(np.nonzero(dark_columns(tmp_path / f"{n}.png"))) for n in ("hidden", "shown")]
    assert widths[0] >= widths[1]  # of the legend


def dark_columns(path: Path) -> np.ndarray:
    """Return which columns are not white in the first rows that are not: a figure's legend."""
    dark = np.asarray(Image.open(path).convert("L")) < 200
    top = int(dark.any(1).argmax())
    return dark[top : top + int((~dark[top:].any(1)).argmax())].any(0)


def test_notes_on_a_subset_and_on_mixed_versions() -> None:
    part = [x | {"total": 5000, "limit": 100, "seed": 4} for x in CELLS]
    assert "n = 100 of 5000 test images" in tables.to_text(make(part))
    said = "tested on 100 images, where possible equally many of each class, drawn with seed 4"
    assert said in tables.to_text(make(part))
    alone = [x | {"total": 5000, "limit": 1, "seed": 4} for x in CELLS]
    assert "tested on 1 image, where" in tables.to_text(make(alone))
    last = tables.to_latex(make(part)).split(r"\begin{table}")[-1]
    assert tables.to_latex(make(part)).count("drawn with seed 4") == last.count("with seed 4") == 1
    assert "versions" not in tables.to_text(make())
    assert "several devices or versions" in tables.to_text(
        make([*part, CELLS[0] | {"device": "x"}])
    )


def test_a_table_without_scores_is_not_printed() -> None:
    lines = [line(A, "clean", 80), line(B, "clean", 80), line(B, "pgd_0.04", 0)]
    for form in (tables.to_text, tables.to_markdown, tables.to_latex):
        assert [title in form(make(lines)) for title in registry.TABLES] == [
            False,
            False,
            True,
            False,
        ]
        assert not any(title in form(make(lines[:2])) for title in registry.TABLES)


def test_clean_accuracy_alone_has_a_table() -> None:
    made = make([line(A, "clean", 80), line(B, "clean", 75)])
    assert tables.to_text(made).splitlines()[:4] == [
        "Clean accuracy; n = 100 test images; + and - against alpha",
        "model  clean %      95 %",
        "alpha     80.0  71 to 87",
        "beta   75.0(-)  66 to 82",
    ]
    alone = metrics.aggregate([line(A, "clean", 80)], {"alpha": A}, "alpha")
    assert tables.to_text(alone).startswith("Clean accuracy; n = 100 test images\n")
    assert "| beta | 75.0(-) | 66 to 82 |" in tables.to_markdown(made)
    assert r"\begin{tabular}{lrr}" in tables.to_latex(made)


@pytest.mark.parametrize(
    "names, lines",
    [(["fog"], 1), (["fog", "frost", "snow"], 1), (FIFTEEN[:7], 2), (FIFTEEN, 3)],
)
def test_severities_have_a_panel_for_each_measured_corruption(
    names: list[str], lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = collect_figures(monkeypatch)
    cells = [x for name in names for x in corruption(A, name, 70, 60, 50, 40, 20)]
    cells += [x for name in names for x in corruption(B, name, 45, 40, 35, 30, 25)]
    plots.plot_severities(
        make([line(A, "clean", 80), line(B, "clean", 50), *cells]), tmp_path / "f"
    )
    with Image.open(tmp_path / "f") as image:
        assert image.height == pytest.approx(plots.DPI * (1 + 1.9 * lines), abs=0.6 * plots.DPI)
    (figure,) = drawn
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title() for axes in panels]
    assert titles == [registry.COLUMNS[name] for name in FIFTEEN if name in names]
    for axes in panels:
        assert {curve.get_color(): [round(100 * y) for y in curve.get_ydata()]
                for curve in axes.lines} == {
            plots.GRAY: [80, 70, 60, 50, 40, 20], plots.PALETTE[0]: [50, 45, 40, 35, 30, 25],
        }  # fmt: skip
        corners = axes.collections[0].get_paths()[0].vertices
        last = corners[corners[:, 0] == 5, 1]
        assert (last.min(), last.max()) == pytest.approx(metrics.wilson(20, 100))


def test_no_caveat_where_the_intervals_overlap() -> None:
    close = [line(A, "clean", 80), line(B, "clean", 75)]
    assert "comparable" not in tables.to_text(make(close))
    assert "comparable" in tables.to_text(make([line(A, "clean", 80), line(B, "clean", 60)]))


def test_all_formats_hold_the_same_numbers() -> None:
    made = make()
    flat = list(csv.DictReader(io.StringIO(tables.to_csv(made))))
    by_key = {(r["model"], r["perturbation"], r["severity"]): r for r in flat}
    assert len(by_key) == len(flat) == 2 * (1 + 6 * 15 + 4) + 4
    assert by_key["beta", "fog", "mean"]["R"] == "0.700000"
    assert by_key["beta", "translation", ""]["R"] == "0.740000"
    assert by_key["beta", "translation", ""]["sign"] == "+"
    assert by_key["alpha", "fog", "5"]["accuracy"] == "0.200000"
    assert by_key["alpha", "fog", "5"]["R"] == "0.250000"
    interval = binomtest(20, 100).proportion_ci(method="wilson")
    assert float(by_key["alpha", "fog", "5"]["low"]) == pytest.approx(interval.low, abs=1e-6)
    assert float(by_key["alpha", "fog", "5"]["high"]) == pytest.approx(interval.high, abs=1e-6)
    measured = tables.measured_tables(made)
    grids = [row for title in measured for row in tables.table_cells(made, title)]
    markdown = [
        [cell.strip() for cell in text.strip("|").split("|")]
        for text in tables.to_markdown(made).splitlines()
        if text.startswith("|") and "---" not in text
    ]  # fmt: skip
    latex = [
        re.sub(r"\\|\$", "", text.removesuffix(r" \\")).split(" & ")
        for text in tables.to_latex(made).splitlines() if text.endswith(r"\\")
    ]  # fmt: skip
    assert markdown == grids and latex == grids
    assert tables.to_latex(made).count(r"\begin{tabular}") == 3
    assert not re.search(r"(?<!\\)[%#_]", tables.to_latex(made))
    tree = json.loads(json.dumps(tables.to_plain(made), allow_nan=False))
    assert tree["rows"][1]["scores"]["rotation"]["robustness"] == pytest.approx(0.74)


@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x4d"])
def test_cells_with_the_papers_scores_give_the_papers_table(arch: str) -> None:
    rows = {row.method: row.scores for row in PAPER_ROWS if (row.table, row.arch) == (1, arch)}
    n, lines = 10**6, []
    for model, scores in rows.items():
        accuracy = scores["clean"].value / 100
        lines.append(line(model, "clean", round(n * accuracy), n=n))
        for name in (*FIFTEEN, *FOUR, *FIVE):
            correct = round(n * accuracy * scores[name].value)
            lines += [line(model, name, correct, s, n=n, right=n, reached=n)
                      for s in registry.PERTURBATIONS[name].severities]  # fmt: skip
    made = metrics.aggregate(lines, {model: model for model in rows}, "standard")
    for row in made.rows:
        assert {k: s.sign for k, s in row.scores.items()} == {
            k: rows[row.model][k].sign or "" for k in ("clean", *FIFTEEN, *FOUR, *FIVE)
        }
    for title in tables.measured_tables(made):
        names = registry.TABLES[title]
        for model, _, _, *cells in tables.table_cells(made, title)[1:]:
            printed = [rows[model][name] for name in names]
            expected = [f"{value:.2f}{f'({sign})' if sign else ''}" for value, sign in printed]
            assert [cell.rstrip("!") for cell in cells[: len(names)]] == expected


def test_the_validation_corruptions_have_a_table_and_are_in_no_other_mean() -> None:
    extra = [line(A, name, 40, s) for name in VALIDATION for s in range(1, 6)]
    (with_them, _), (without, _) = make([*CELLS, *extra]).rows, make().rows
    title = "ImageNet-C's validation corruptions"
    assert with_them.means == {**without.means, title: 0.5}
    assert with_them.relative_mce == without.relative_mce
    header, row, _ = tables.table_cells(make([*CELLS, *extra]), title)
    assert header[3:] == ["Speckle", "Gauss blur", "Saturate", "mean"]
    assert row[3:] == ["0.50"] * 4


def test_supplementary_attacks_change_nothing_beside_their_own_rows() -> None:
    extra = [line(A, "mine", 40), line(A, "pgd_0.5", 0), line(B, "pgd_0.5", 10)]
    without = metrics.aggregate(paired(CELLS), {"alpha": A, "beta": B}, "alpha")
    names = ["pgd_0.04", "mine", "pgd_0.5", "unmeasured"]
    made = metrics.aggregate(paired([*CELLS, *extra]), {"alpha": A, "beta": B}, "alpha", names)
    bare = made._replace(rows=[row._replace(supplement={}) for row in made.rows])
    assert tables.to_plain(bare) == tables.to_plain(without)
    assert [list(row.supplement) for row in made.rows] == [["mine", "pgd_0.5"], ["pgd_0.5"]]
    assert tables.measured_tables(made)[-1] == "Supplementary attacks"
    assert tables.table_cells(made, "Supplementary attacks") == [
        ["attack", "alpha", "95 %", "beta", "95 %"],
        ["mine", "0.50", "0.39 to 0.61", "-", "-"],
        ["pgd_0.5", "0.00", "0.00 to 0.05", "0.20", "0.09 to 0.31"],
    ]


def test_attacks_without_a_cell_leave_their_mean_open() -> None:
    lines = [line(A, "clean", 80), line(B, "clean", 80)]
    lines += [line(A, name, 40, right=40, reached=40) for name in ATTACKS]
    alpha, beta = make(lines).rows
    assert alpha.means == {"Adversarial attacks": 0.5} and beta.means == {}


# ---------------------------------------------------------------------------- figures


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return {(int(r), int(g), int(b)) for r, g, b in np.unique(pixels, axis=0)}


def rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def test_a_model_has_its_color_from_the_figures_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, made = collect_figures(monkeypatch), make(paired(CELLS))
    compared = {"beta": metrics.score_differences(made.rows[1])}
    shown = ["alpha", "gamma", "beta"]
    plots.plot_differences(compared, "alpha", tmp_path / "figure.png", {}, shown)
    colors = {line.get_color() for line in drawn[0].axes[0].lines if line.get_label() == "beta"}
    assert colors == {plots.PALETTE[1]}


def test_notes_are_about_the_models_that_are_shown() -> None:
    cells = [*CELLS, line("cccc", "clean", 70, nan=3, label="other")]
    assert not any("NaN" in note for note in make(cells).notes)


def draw_differences(results: metrics.Results, path: Path) -> None:
    compared = {r.model: metrics.score_differences(r) for r in results.rows[1:]}
    plots.plot_differences({"other": {}, **compared}, "alpha", path, {"fog": 0.2})


def test_the_bars_are_robustness_with_its_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, made = collect_figures(monkeypatch), make()
    plots.plot_robustness(made, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    bars = [container for container in axes.containers if hasattr(container, "errorbar")]
    assert [to_hex(bar[0].get_facecolor()) for bar in bars] == [plots.GRAY, plots.PALETTE[0]]
    for row, container in zip(made.rows, bars, strict=True):
        scores = {registry.COLUMNS[name]: s for name, s in row.scores.items() if name != "clean"}
        intervals = container.errorbar.lines[2][0].get_segments()
        assert len(container) == len(scores) >= 20
        for bar, interval in zip(container, intervals, strict=True):
            middle = bar.get_x() + bar.get_width() / 2
            nearest = int(np.argmin([abs(place - middle) for place in axes.get_xticks()]))
            score = scores.pop(ticks[nearest])
            assert bar.get_height() == pytest.approx(score.robustness)
            assert interval[:, 1] == pytest.approx([score.r_low, score.r_high], abs=1e-9)


def test_differences_are_drawn_with_the_papers_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, made = collect_figures(monkeypatch), make(paired(CELLS))
    draw_differences(made, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    found = metrics.score_differences(made.rows[1])
    names = [name for name in registry.COLUMNS if found.get(name)]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        registry.COLUMNS[name] for name in names
    ]
    # Without those of the legend alone; the last one marks 0.
    *of_beta, paper, _ = [line for line in axes.lines if len(line.get_xdata())]
    for i, name in enumerate(names):
        interval, point = of_beta[2 * i : 2 * i + 2]
        assert interval.get_xdata().tolist() == [found[name].low, found[name].high]
        assert point.get_xdata().tolist() == [found[name].value]
        assert [round(y) for y in (*interval.get_ydata(), *point.get_ydata())] == [i, i, i]
        assert (point.get_markerfacecolor() != "white") == found[name].decided
    assert len(of_beta) == 2 * len(names)
    assert {interval.get_color() for interval in of_beta[::2]} == {plots.PALETTE[1]}
    assert paper.get_xydata().tolist() == [[0.2, names.index("fog")]]


def test_no_two_of_many_models_have_one_color() -> None:
    for count in (1, len(plots.PALETTE) + 1, len(plots.PALETTE) + 2, 25):
        colors = plots._colors([f"m{i}" for i in range(count)], "m0")
        assert colors["m0"] == plots.GRAY and len({str(c) for c in colors.values()}) == count


def test_a_figure_is_as_wide_as_its_legend(tmp_path: Path) -> None:
    widths = []
    for name in ("beta", "runs/" + 90 * "b"):
        lines = [line(m, "fog", 40, s) for m in (A, B) for s in range(1, 6)]
        clean = [line(A, "clean", 80), line(B, "clean", 50)]
        made = metrics.aggregate([*clean, *lines], {"alpha": A, name: B}, "alpha")
        plots.plot_severities(made, tmp_path / "figure.png")
        dark = np.nonzero(dark_columns(tmp_path / "figure.png"))[0]
        with Image.open(tmp_path / "figure.png") as image:
            widths.append(image.width)
        assert dark.min() > 0 and dark.max() < widths[-1] - 1  # nothing is cut off
    assert widths[0] < widths[1]


def test_a_figure_without_scores_is_empty(tmp_path: Path) -> None:
    lines = [line(A, "clean", 0), line(B, "clean", 0), line(B, "pgd_0.04", 0)]
    plots.plot_robustness(make(lines), tmp_path / "figure.png")
    assert rgb(plots.PALETTE[0]) not in colours(tmp_path / "figure.png")


@pytest.mark.parametrize("count", [1, 3])
def test_the_sheet_shows_every_image(count: int, tmp_path: Path) -> None:
    shades = [[(40 * i + 8, 9 * j, 99) for j in range(6)] for i in range(count)]
    sheets = [
        [
            plots.Tile("", torch.tensor(s)[:, None, None].expand(3, 4, 4) / 255, "", True)
            for s in row
        ]
        for row in shades
    ]
    plots.plot_images(sheets, tmp_path / "sheet.png")
    assert {shade for row in shades for shade in row} <= colours(tmp_path / "sheet.png")


def test_the_sheet_marks_right_and_wrong_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = collect_figures(monkeypatch)
    tiles = [plots.Tile(n, torch.zeros(3, 4, 4), "cat", n == "fog") for n in ("fog", "snow")]
    plots.plot_images([tiles], tmp_path / "sheet.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["fog", "✓ cat", "snow", "✗ cat"]


def test_an_accuracy_over_severities_has_the_interval_of_its_images() -> None:
    fog = make().rows[0].scores["fog"]  # the five severities show the same 100 images
    assert (fog.low, fog.high) == metrics.wilson(48, 100)


@pytest.mark.parametrize(("baseline", "void"), [("alpha", {"cw2"}), ("beta", set())])
def test_cw2_is_void_by_the_named_baseline(
    baseline: str, void: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(m, "clean", 80) for m in (A, B)]
    for model, reached in ((A, 0), (B, 60)):
        lines.append(line(model, "cw2", 80 - reached, right=80, reached=reached,
                          misclassified=80, margin=1.0))  # fmt: skip
    made = make([*lines, *(line(m, "pgd_0.04", 8) for m in (A, B))], baseline)
    assert [row.void for row in made.rows] == [void, void]
    drawn = collect_figures(monkeypatch)
    plots.plot_robustness(made, tmp_path / "figure.png")
    ticks = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert ticks == ["PGD", *(["CW2"] if not void else [])]  # and nothing that was not measured


def test_a_baseline_that_loses_nothing_has_no_relative_mce_whatever_the_rounding() -> None:
    base = {"clean": 29 / 30} | {name: fmean([29 / 30] * 5) for name in mce.ALEXNET_ERRORS}
    own = {"clean": 29 / 30} | dict.fromkeys(mce.ALEXNET_ERRORS, 28 / 30)
    assert base["clean"] != base["fog"]
    assert math.isnan(mce.relative_mce(own, base))


def test_each_line_of_csv_has_a_cell_for_each_column() -> None:
    """Without outcomes of the images no difference is known."""
    for lines in (CELLS, paired(CELLS)):
        header, *rows = csv.reader(io.StringIO(tables.to_csv(make(lines))))
        assert rows and {len(row) for row in rows} == {len(header)}
