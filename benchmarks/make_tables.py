"""Make the tables and the figure of a folder of measurements from its cells alone.

    python benchmarks/make_tables.py results/tiny50 [--arch resnet18]

reads cells.jsonl, whose labels are METHOD-SEED, and writes tables.md and differences.png there.
M-TLAT with a seed is compared with `standard` of that seed, and every other network with both of
its own seed (of seed 0 where one of them lacks it), in R and in accuracy under the perturbation. A
method with several seeds is also compared over these. Networks with clean accuracy alone are Table
3's, and are compared with `standard` and with TLAT. If there is a surrogate-2.jsonl, it holds the
black-box attacks made on a surrogate of seed 2. The networks of seed 1 take theirs from it, since
the surrogate of cells.jsonl has their initial weights.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import stats

from corruptions import CORRUPTIONS
from harness.benchmark import paired, plots, tables
from harness.benchmark.metrics import Results, aggregate, read_outcomes, score_differences
from harness.benchmark.paired import Array, Difference
from harness.benchmark.registry import COLUMNS, GROUPS, PERTURBATIONS, TABLES
from harness.benchmark.store import Cell, read_cells
from harness.cli import Parser
from harness.errors import UserError, run_script
from harness.files import atomic_write
from harness.reproduction import comparison
from harness.reproduction.paper import methods_of_table
from harness.reproduction.report import paper_differences

MEANS = {
    "mean of the noises": GROUPS["noise"],
    "mean of the blurs": GROUPS["blur"],
    "mean of ImageNet-C's": TABLES["ImageNet-C's corruptions"],
    "mean of the paper's": TABLES["The paper's corruptions"],
    "mean of the nineteen": list(CORRUPTIONS),
    "mean of four attacks": [name for name in TABLES["Adversarial attacks"] if name != "cw2"],
}
ROWS = {"clean": "clean accuracy", **{title: title for title in MEANS}, **COLUMNS}
NOTE = (
    "95 % intervals; bold where decided, means of several perturbations without Holm's correction"
)
PAIR = ("standard", "mtlat")

Differences = dict[str, Difference | None]


class Measured:
    """The cells of some networks, which all saw the same images."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.digests = {cell["label"]: cell["model"] for cell in cells}
        by_key = {(c["model"], c["perturbation"], c["severity"]): c for c in cells}
        severities = {name: PERTURBATIONS[name].severities for name in ("clean", *COLUMNS)}
        self.hits = {
            (label, name): found
            for label, digest in self.digests.items()
            for name, found in read_outcomes(by_key, digest, severities).items()
        }

    def score(self, *names: str) -> Results:
        """Compute the results of these networks; the first one is the baseline."""
        return aggregate(self.cells, {name: self.digests[name] for name in names}, names[0])

    def outcomes(self, label: str, name: str) -> Array:
        """Return for each image the share of right predictions under a perturbation or a mean."""
        found: Array = np.mean([self.hits[label, each] for each in MEANS.get(name, [name])], 0)
        return found

    def has(self, labels: Iterable[str], names: Iterable[str]) -> bool:
        """Return whether these networks have all outcomes under these perturbations."""
        return self.hits.keys() >= set(itertools.product(labels, names))

    def level(self, labels: Sequence[str], name: str, accuracy: bool) -> str:
        """Format clean accuracy or R, the mean of these networks; or accuracies in percent."""
        names = MEANS.get(name, [name] if name in COLUMNS else [])
        if not self.has(labels, names):
            return "-"
        clean, values = (
            np.array([self.outcomes(label, each).mean() for label in labels])
            for each in ("clean", name)
        )
        if accuracy:
            return f"{100 * np.mean(values):.1f}"
        return f"{np.mean(clean if name == 'clean' else values / clean):.3f}"

    def perturbations(self, first: str, second: str) -> Differences:
        """Compute the differences of clean accuracy and R, with Holm's correction."""
        return dict(score_differences(self.score(second, first).rows[1]))

    def differ(self, first: str, second: str) -> Differences:
        """Add the differences under measured groups of perturbations, without Holm's correction."""
        found = self.perturbations(first, second)
        for title, names in MEANS.items():
            if self.has((first, second), names):
                a, c = self.outcomes(first, title), self.outcomes(first, "clean")
                b, d = self.outcomes(second, title), self.outcomes(second, "clean")
                found[title] = paired.uncorrected(paired.compare_robustness(a, c, b, d))
        return found

    def differ_in_accuracy(self, first: str, second: str) -> Differences:
        """Do as `differ` for accuracies instead of R."""
        names = [*self.perturbations(first, second), *MEANS]
        found = {
            name: paired.compare_accuracy(*(self.outcomes(x, name) for x in (first, second)))
            for name in names
            if self.has((first, second), MEANS.get(name, [name]))
        }
        return paired.decide(found, MEANS)

    def table(
        self, levels: Mapping[str, Sequence[str]], columns: Mapping[str, Differences],
        *, accuracy: bool = False,
    ) -> str:  # fmt: skip
        """Format levels, and differences by their title, bold where decided."""
        lines = [["", *levels, *columns]]
        for name, title in ROWS.items():
            row = [differences.get(name) for differences in columns.values()]
            if any(row):
                shown = [self.level(labels, name, accuracy) for labels in levels.values()]
                lines.append([title, *shown, *(_format(found, accuracy) for found in row)])
        return "\n".join(tables.markdown_rows(lines))


def _over_seeds(columns: Sequence[Differences]) -> Differences:
    """Average the differences that every seed has, by name."""
    each = {name: [found for c in columns if (found := c.get(name))] for name in columns[0]}
    complete = {name: found for name, found in each.items() if len(found) == len(columns)}
    return paired.decide({n: paired.combine_seeds(found) for n, found in complete.items()}, MEANS)


def _format(difference: Difference | None, accuracy: bool) -> str:
    if difference is None:
        return "-"
    text = comparison.format_difference(difference, points=accuracy).replace(" points", "")
    return f"**{text}**" if difference.decided else text


def _say(results: Results) -> Iterator[str]:
    """Yield sentences on the differences to the baseline."""
    base, *others = results.rows
    for row, sentence in zip(others, tables.answers(results), strict=True):
        mce = f" Relative mCE: {row.relative_mce:.0f} % of {base.model}'s."
        yield sentence + ("" if math.isnan(row.relative_mce) else mce)


def _seeds_together(measured: Measured, arch: str, seeds: list[int], figure: Path) -> Iterator[str]:
    """Yield what all seeds of M-TLAT and `standard` decide together, and each alone; draw it."""
    levels = {method: [f"{method}-{seed}" for seed in seeds] for method in PAIR}
    pairs = [measured.score(*(f"{method}-{seed}" for method in PAIR)) for seed in seeds]
    rows = {method: [pair.rows[i] for pair in pairs] for i, method in enumerate(PAIR)}
    table = comparison.compare(1, arch, rows)
    columns, accuracies = (
        {f"seed {s}": differ(f"mtlat-{s}", f"standard-{s}") for s in seeds}
        for differ in (measured.differ, measured.differ_in_accuracy)
    )
    mean = _over_seeds([*columns.values()])
    single = {name: difference for name, difference in mean.items() if name in COLUMNS}
    paper = paper_differences({row.method: row for row in table})
    plots.plot_differences({"mtlat": single}, "standard", figure, paper)
    yield from comparison.comparison_markdown([table])
    if len(seeds) > 1:
        yield _by_seeds_alone(mean, columns)
        columns["mean over the seeds"] = mean
        accuracies["mean over the seeds"] = _over_seeds([*accuracies.values()])
    yield f"**Clean accuracy and R, means over the seeds; M-TLAT minus `standard`; {NOTE}**"
    yield measured.table(levels, columns)
    yield from _accuracies(measured, levels, accuracies)
    for pair in pairs:
        yield from _say(pair)
    again = {
        f"{m}-{seed} - {m}-{seeds[0]}": measured.differ(f"{m}-{seed}", f"{m}-{seeds[0]}")
        for m in PAIR
        for seed in seeds[1:]
    }
    if again:
        differ = len({cell.get("surrogate") for cell in measured.cells} - {None}) > 1
        attacked = " (surrogates of MI FGSM differ)" * differ
        yield f"**Trainings of one method with several seeds{attacked}; {NOTE}**"
        yield measured.table({}, again)


def _by_seeds_alone(mean: Differences, columns: Mapping[str, Differences]) -> str:
    """Say what a t test decides that takes nothing but one difference of each seed."""
    names, known = zip(*[(n, d) for n, d in mean.items() if d and n not in MEANS], strict=True)
    values = [[found.value for c in columns.values() if (found := c[n])] for n in names]
    p = stats.ttest_1samp(values, 0.0, axis=1).pvalue
    tested = paired.holm([d._replace(p=float(x)) for d, x in zip(known, p, strict=True)])
    decided = [ROWS[name] for name, d in zip(names, tested, strict=True) if d and d.decided]
    return (
        "The intervals add the variance between the seeds to that of the test images. A t test of"
        f" the {len(columns)} differences alone ({len(columns) - 1} degrees of freedom, Holm's"
        f" correction) decides {len(decided)} of {len(names)}: {', '.join(decided) or 'none'}."
    )


def _others(measured: Measured, arch: str, labels: list[str], seeds: list[int]) -> Iterator[str]:
    """Yield the tables of the networks of other methods, and of seeds that lack one of the pair."""
    for number in (1, 2, 3):
        methods = methods_of_table(number)
        names = [f"{method}-0" for method in methods]
        if {*names} <= measured.digests.keys():
            rows = measured.score(*names).rows
            alone = {method: [row] for method, row in zip(methods, rows, strict=True)}
            yield from comparison.comparison_markdown([comparison.compare(number, arch, alone)])
    clean = [x for x in labels if not any((x, name) in measured.hits for name in COLUMNS)]
    if clean:
        yield from _clean_alone(measured, clean)
    if not (labels := [label for label in labels if label not in clean]):
        return
    yield f"**The other networks; {NOTE}**"
    trained: dict[str, list[str]] = {}  # by method, the seeds that the pair has, too
    pairs = []
    for label in labels:
        method, _, seed = label.rpartition("-")
        if shared := seed in map(str, seeds):
            trained.setdefault(method, []).append(seed)
        pairs += [(label, f"{base}-{seed if shared else 0}") for base in PAIR]
    columns, accuracies = (
        {f"{x} - {base}": differ(x, base) for x, base in pairs}
        for differ in (measured.differ, measured.differ_in_accuracy)
    )
    levels = {label: [label] for label in labels}
    yield measured.table(levels, columns)
    yield from _accuracies(measured, levels, accuracies)
    for method, several in trained.items():
        if len(several) > 1:
            yield from _method_over_seeds(measured, method, several)


def _method_over_seeds(measured: Measured, method: str, seeds: list[str]) -> Iterator[str]:
    """Yield what several seeds of a method decide together, against the pair of these seeds."""
    levels = {name: [f"{name}-{seed}" for seed in seeds] for name in (method, *PAIR)}
    columns, accuracies = (
        {
            f"{method} - {base}": _over_seeds(
                [differ(f"{method}-{seed}", f"{base}-{seed}") for seed in seeds]
            )
            for base in PAIR
        }
        for differ in (measured.differ, measured.differ_in_accuracy)
    )
    yield f"**{method}, means over the seeds {' and '.join(seeds)}; {NOTE}**"
    yield measured.table(levels, columns)
    yield from _accuracies(measured, levels, accuracies)


def _accuracies(
    measured: Measured, levels: Mapping[str, Sequence[str]], columns: Mapping[str, Differences]
) -> Iterator[str]:
    """Yield the differences in accuracy, and how many of them are decided."""
    yield f"**Accuracy under each perturbation in percent, differences in points; {NOTE}**"
    yield measured.table(levels, columns, accuracy=True)
    for title, differences in columns.items():
        found = [d for name, d in differences.items() if d and name in COLUMNS]
        yield f"{title}: accuracy is {tables.count_sides(found)}."


def _clean_alone(measured: Measured, labels: list[str]) -> Iterator[str]:
    """Yield how the networks of Table 3 differ in clean accuracy."""
    pairs = [(x, base) for x in labels for base in ("standard-0", "tlat-0")]
    found = paired.holm([measured.perturbations(*pair)["clean"] for pair in pairs])
    columns = {f"{x} - {y}": {"clean": d} for (x, y), d in zip(pairs, found, strict=True)}
    yield "**Networks of Table 3; 95 % intervals; bold where decided (Holm, over the row)**"
    yield measured.table({label: [label] for label in labels}, columns)


def _two_surrogates(cells: list[Cell], other: list[Cell]) -> Iterator[str]:
    """Yield how two networks of M-TLAT differ where either surrogate attacks both."""
    columns = {}
    for seed, found in ((1, cells), (2, other)):
        differences = Measured(found).perturbations("mtlat-1", "mtlat-0")
        columns[f"mtlat-1 - mtlat-0, surrogate of seed {seed}"] = {
            name: differences[name] for name in GROUPS["black-box"]
        }
    yield "**The same networks attacked on two surrogates; 95 % intervals; bold where decided**"
    yield Measured([]).table({}, columns)


def make_tables(folder: Path, arch: str) -> None:
    """Write the tables and the figure of a folder, whose networks have this architecture."""
    cells, other = read_cells(folder / "cells.jsonl"), read_cells(folder / "surrogate-2.jsonl")
    chosen = [(c["data"][:16], c["limit"], c["seed"]) for c in [*cells, *other]]
    images = ["{}, --limit {}, --seed {}".format(*facts) for facts in dict.fromkeys(chosen)]
    if len(images) > 1:
        raise UserError(
            f"{folder} has cells of different images, which cannot be compared image by image:"
            f" {' and '.join(images)}; keep those of one"
        )
    own = [c for c in other if c["label"].endswith("-1")]
    measured = Measured([*cells, *own])  # of equal cells the last counts
    labels = measured.digests
    found = ({label.removeprefix(f"{m}-") for label in labels} for m in PAIR)
    seeds = sorted(int(seed) for seed in set.intersection(*found) if seed.isdecimal())
    if not seeds:
        raise UserError(f"{folder}/cells.jsonl has no seed with both of {', '.join(PAIR)}")
    together = [f"{method}-{seed}" for method in PAIR for seed in seeds]
    alone = [label for label in labels if label not in together]
    blocks = [
        *_seeds_together(measured, arch, seeds, folder / "differences.png"),
        *_others(measured, arch, alone, seeds),
        *(_two_surrogates(cells, other) if other else []),
        tables.to_markdown(measured.score(*together, *alone)).rstrip(),
    ]
    atomic_write(folder / "tables.md", "\n\n".join(blocks) + "\n")


def main() -> None:
    """Write the tables of the folder that the command line names."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with cells.jsonl")
    parser.add_argument("--arch", default="resnet18", help="of the networks")
    args = parser.parse_args()
    make_tables(args.folder, args.arch)


if __name__ == "__main__":
    run_script(main)
