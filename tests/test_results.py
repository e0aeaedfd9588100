"""Make the tables of results/ again from the cells beside them, and recount them by other code."""

import base64
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import make_tables
import numpy as np
import pytest
from scipy import stats

import evaluate
from harness.benchmark import plots
from harness.benchmark.registry import COLUMNS
from harness.benchmark.store import append_cells, read_cells
from harness.errors import UserError

RESULTS = Path(evaluate.__file__).parent / "results"
# M-TLAT of 6 epochs against `standard` of 12, and two t tests.
IN_NO_TABLE = {
    "+0.058 (+0.034 to +0.081)", "+0.100 (+0.076 to +0.124)", "+0.050 (+0.029 to +0.071)",
    "+1.1 (-2.0 to +4.3)", "+4.1 (+1.9 to +6.2)", "+1.1 (-0.2 to +2.5)", "-2.5 (-5.4 to +0.5)",
    "-1.5 (-2.0 to -1.0)", "-3.4 (-4.2 to -2.6)",
}  # fmt: skip
PAIR, SINGLE = ("standard", "mtlat"), ("standard-0", "mtlat-0")


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 12)


@pytest.mark.parametrize(
    "name, arch",
    [("tiny20", "resnet18"), ("tiny20/epochs12", "resnet18"), ("tiny20/augmented12", "resnet18"),
     ("tiny20/epochs20", "resnet18"), ("tiny20/augmented20", "resnet18"), ("tiny50", "resnet18"),
     ("tiny50/epochs20", "resnet18"), ("tiny50/vgg", "resnet18"),
     ("resnext20", "resnext50_32x4d")],
)  # fmt: skip
def test_the_tables_are_made_from_the_cells(name: str, arch: str, tmp_path: Path) -> None:
    for file in (RESULTS / name).glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    make_tables.make_tables(tmp_path, arch)
    assert (tmp_path / "tables.md").read_text() == (RESULTS / name / "tables.md").read_text()
    assert (tmp_path / "differences.png").stat().st_size > 0


@pytest.mark.parametrize("page", ["tiny20", "tiny50", "resnext20", "../docs/evidence"])
def test_every_interval_of_the_pages_stands_in_a_table(page: str) -> None:
    tables = "".join(path.read_text() for path in RESULTS.glob("**/tables.md"))
    path = RESULTS / page / "README.md" if (RESULTS / page).is_dir() else RESULTS / f"{page}.md"
    found = re.findall(r"[+-]?[\d.]+ \([+-][\d.]+ to [+-][\d.]+\)", path.read_text())
    assert len(found) > 3
    missing = {interval for interval in found if interval not in tables}
    assert missing == (IN_NO_TABLE if page == "../docs/evidence" else set())


def test_the_networks_of_table_3_are_compared_by_mcnemar_and_holm() -> None:
    clean = [x for x in read_cells(RESULTS / "tiny50/cells.jsonl") if x["perturbation"] == "clean"]
    right = {x["label"]: np.frombuffer(base64.b64decode(x["hits"]), "uint8") for x in clean}
    value, p = {}, {}
    for method in ("fgsm", "target-fgsm", "ls"):
        for base in ("standard", "tlat"):
            first, second = (np.unpackbits(right[f"{m}-0"]) for m in (method, base))
            won, lost = int((first > second).sum()), int((first < second).sum())
            value[f"{method}-0 - {base}-0"] = f"{(won - lost) / clean[0]['n']:+.3f}"
            p[f"{method}-0 - {base}-0"] = stats.binomtest(won, lost + won).pvalue
    text = (RESULTS / "tiny50" / "tables.md").read_text()
    header, _, row = text.split("**Networks of Table 3; ")[1].splitlines()[2:5]
    titles, cells = ([x.strip() for x in line.strip("|").split("|")] for line in (header, row))
    printed = dict(zip(titles[4:], cells[4:], strict=True))
    assert {title: cell.strip("*").split()[0] for title, cell in printed.items()} == value
    assert {title for title, cell in printed.items() if "**" in cell} == decided_by_holm(p)
    assert "| fgsm-0 - standard-0" not in text.split("**The other networks; ")[1]


def test_the_levels_are_means_of_the_images_outcomes() -> None:
    found = robustness_of("tiny50")
    measured = [title for title in COLUMNS.values() if ("mtlat", title) in found]
    expected = {title: [f"{np.mean(found[m, title]):.3f}" for m in PAIR] for title in measured}
    assert len(expected) == 23
    lines = (RESULTS / "tiny50" / "tables.md").read_text().split("means over the seeds; ")[1]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines()]
    printed = {row[1]: row[2:4] for row in rows[:34] if len(row) > 4}
    assert {title: printed[title] for title in expected} == expected
    attacks = [title for title in measured if title.startswith(("PGD", "MI FGSM"))]
    assert len(attacks) == 4
    mean = [f"{np.mean([found[method, x] for x in attacks]):.3f}" for method in PAIR]
    assert printed["mean of four attacks"] == mean


def test_the_sentence_on_the_seeds_alone_is_a_t_test_with_holms_correction() -> None:
    found = robustness_of("tiny50")
    p = {title: stats.ttest_rel(found["mtlat", title], found["standard", title]).pvalue
         for method, title in found if method == "mtlat"}  # fmt: skip
    decided = decided_by_holm(p)
    text = (RESULTS / "tiny50" / "tables.md").read_text()
    listed = text.split(" correction) decides ")[1].split(".\n")[0]
    assert listed.startswith(f"{len(decided)} of {len(p)}: ")
    assert set(listed.split(": ")[1].split(", ")) == decided


def test_accuracies_over_the_seeds_have_the_stated_intervals() -> None:
    """Recount the differences, Welch's and Satterthwaite's intervals, and what Holm decides."""
    found: dict[str, tuple[float, float, float]] = {}
    p = {}
    for title, by_label in outcomes_of("tiny50").items():
        images = [by_label[f"mtlat-{s}"] - by_label[f"standard-{s}"] for s in range(3)]
        between = np.var([x.mean() for x in images], ddof=1) / 3
        within = np.mean(images, axis=0).var(ddof=1) / len(images[0])
        error, freedom = np.sqrt(between + within), 2 * (1 + within / between) ** 2
        value, half = np.mean(images), stats.t.ppf(0.975, freedom) * error
        found[title] = value, value - half, value + half
        p[title] = 2 * stats.t.sf(abs(value) / error, freedom)
    decided = decided_by_holm(p)
    assert (len(found), len(decided - {"clean accuracy"})) == (24, 19)
    text = (RESULTS / "tiny50" / "tables.md").read_text().split("**Accuracy under each ")[1]
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()[4:34]]
    printed = {row[1]: row[-2] for row in rows}
    for title, (value, low, high) in found.items():
        shown = f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        assert printed[title] == (f"**{shown}**" if title in decided else shown)
    assert "seeds: accuracy is higher under 22 of 23 perturbations (decided under 19)" in text


def test_a_single_seed_has_no_t_test(tmp_path: Path) -> None:
    cells = read_cells(RESULTS / "tiny20" / "cells.jsonl")
    kept = (*SINGLE, "standard-1")  # of seed 1 there is no M-TLAT yet
    append_cells(tmp_path / "cells.jsonl", [c for c in cells if c["label"] in kept])
    make_tables.make_tables(tmp_path, "resnet18")
    text = (tmp_path / "tables.md").read_text()
    assert "A t test" not in text and "over the seeds |" not in text and "Trainings of" not in text


def test_a_method_with_several_seeds_is_compared_with_the_pair_of_these(tmp_path: Path) -> None:
    """Networks of M-TLAT under the name of another method differ from `standard` as M-TLAT does."""
    cells = read_cells(RESULTS / "tiny20" / "augmented20" / "cells.jsonl")
    pair = [c for c in cells if c["label"] in {f"{m}-{s}" for m in PAIR for s in (0, 1)}]
    same = [{**c, "label": f"copy-{c['label'][-1]}"} for c in pair if "mtlat" in c["label"]]
    append_cells(tmp_path / "cells.jsonl", [*pair, *same])
    make_tables.make_tables(tmp_path, "resnet18")
    text = (tmp_path / "tables.md").read_text()
    by_seed = columns_of(text, "**The other networks; ")
    assert [*by_seed][3:] == [
        "copy-0 - standard-0", "copy-0 - mtlat-0", "copy-1 - standard-1", "copy-1 - mtlat-1"
    ]  # fmt: skip
    assert all(text.startswith("+0.000 ") for text in by_seed["copy-1 - mtlat-1"])
    together, expected = (
        columns_of(text, f"**{title}") for title in ("copy, means over the seeds 0 and 1;", "Clean")
    )
    assert together["copy - standard"] == expected["mean over the seeds"]
    assert together["copy"] == together["mtlat"] == expected["mtlat"]


def test_some_perturbations_on_one_surrogate_are_enough(tmp_path: Path) -> None:
    cells = read_cells(RESULTS / "tiny50" / "cells.jsonl")
    labels = {f"{method}-{seed}" for method in PAIR for seed in (1, 2)}
    names = {"clean", "mi_fgsm_0.04", "mi_fgsm_0.08"}
    few = [c for c in cells if c["label"] in labels and c["perturbation"] in names]
    append_cells(tmp_path / "cells.jsonl", few)
    (tmp_path / "tables.md").write_text("old")
    (tmp_path / "link").hardlink_to(tmp_path / "tables.md")
    make_tables.make_tables(tmp_path, "resnet18")
    assert (tmp_path / "link").read_text() == "old"  # replaced as a whole
    text = (tmp_path / "tables.md").read_text()
    assert "nan" not in text and "mean of" not in text.split("over the seeds |")[1]
    assert "**Trainings of one method with several seeds; 95 %" in text  # of one surrogate
    assert text.split("over the seeds |", 1)[1].count("MI FGSM 0.08") > 1


@pytest.mark.parametrize("file", ["cells.jsonl", "surrogate-2.jsonl"])
def test_networks_measured_on_different_images_are_not_compared(tmp_path: Path, file: str) -> None:
    for name in ("cells.jsonl", "surrogate-2.jsonl"):
        shutil.copy(RESULTS / "tiny20" / name, tmp_path)
    append_cells(tmp_path / file, [{**read_cells(tmp_path / file)[-1], "limit": 50}])
    with pytest.raises(UserError, match=r"of different images, .* None.* 515c.* 50, --seed"):
        make_tables.make_tables(tmp_path, "resnet18")
    assert not (tmp_path / "tables.md").exists()


def test_unfinished_perturbations_are_left_out(tmp_path: Path) -> None:
    cells = read_cells(RESULTS / "resnext20" / "cells.jsonl")
    lost = [c for c in cells if (c["label"], c["perturbation"]) == ("mtlat-0", "gaussian_noise")]
    append_cells(tmp_path / "cells.jsonl", [c for c in cells if c not in lost[1:]])
    make_tables.make_tables(tmp_path, "resnext50_32x4d")
    text = (tmp_path / "tables.md").read_text()
    assert "| mean of the blurs" in text and "| mean of the noises" not in text


def test_a_network_with_a_part_of_the_perturbations_has_no_mean(tmp_path: Path) -> None:
    cells = read_cells(RESULTS / "tiny20" / "cells.jsonl")
    names = {"clean", "gaussian_noise", "shot_noise"}
    few = [c for c in cells if c["label"] != "mixup-0" or c["perturbation"] in names]
    append_cells(tmp_path / "cells.jsonl", few)
    make_tables.make_tables(tmp_path, "resnet18")
    lines = (tmp_path / "tables.md").read_text().split("**The other networks; ")[1]
    (mean,) = [x for x in lines.splitlines()[:36] if x.startswith("| mean of the noises")]
    header = next(x for x in lines.splitlines() if "mixup-0 - standard-0" in x).split("|")
    assert mean.split("|")[header.index(" mixup-0 ")] == " - "


def columns_of(text: str, title: str) -> dict[str, list[str]]:
    """Read the columns of the table below a title, by their headings."""
    lines = text.split(title)[1].split("\n\n")[1].splitlines()
    header, _, *rows = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def decided_by_holm(p: dict[str, float]) -> set[str]:
    """Return what Holm's step-down procedure rejects at 5 %."""
    decided = set()
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        if p[name] * (len(p) - rank) >= 0.05:
            break
        decided.add(name)
    return decided


def outcomes_of(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Read the images' outcomes, means over severities, by column and network, without void CW2."""
    titles = {"clean": "clean accuracy", **COLUMNS}
    hits = defaultdict(lambda: defaultdict(list))
    for line in (RESULTS / name / "cells.jsonl").read_text().splitlines():
        cell = json.loads(line)
        if "hits" in cell and cell["perturbation"] in titles and cell.get("reached") != 0:
            bits = np.frombuffer(base64.b64decode(cell["hits"]), "uint8")
            found = np.unpackbits(bits, count=cell["n"])
            hits[titles[cell["perturbation"]]][cell["label"]].append(found)
    return {
        title: {label: np.mean(v, 0) for label, v in own.items()} for title, own in hits.items()
    }


def robustness_of(name: str) -> dict[tuple[str, str], list[float]]:
    """Read clean accuracy and R of each seed, by method and column, from the cells alone.

    Where CW2 reached no image, it is void and left out.
    """
    outcomes, found = outcomes_of(name), {}
    for method in PAIR:
        labels = [f"{method}-{seed}" for seed in range(3)]
        for title, own in outcomes.items():
            if own.keys() >= {*labels}:
                divisors = outcomes["clean accuracy"] if title in COLUMNS.values() else {}
                found[method, title] = [
                    own[x].mean() / (divisors[x].mean() if divisors else 1) for x in labels
                ]
    return found
