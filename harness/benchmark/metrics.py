"""From finished cells to scores: accuracy, robustness R, intervals, means, relative mCE.

results = aggregate(cells, {"standard": digest, "mtlat": digest}, baseline="standard")
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from corruptions import CORRUPTIONS
from harness.benchmark.attack_registry import ATTACKS
from harness.benchmark.checks import failed_checks
from harness.benchmark.registry import CHECK, COLUMNS, PERTURBATIONS, SUPPLEMENT, TABLES
from harness.benchmark.store import Cell


class Score(NamedTuple):
    """A model's result under one perturbation; accuracies in [0, 1], means over severities."""

    accuracy: float
    low: float  # 95 % interval of the accuracy
    high: float
    n: int
    robustness: float  # accuracy / clean accuracy, NaN if that is 0
    sign: str  # + - or nothing, against the baseline, of the two decimals that are printed
    by_severity: tuple[float, ...]  # accuracies


class ModelScores(NamedTuple):
    """All results of one model."""

    model: str
    scores: dict[str, Score]  # "clean" and every perturbation that is complete
    means: dict[str, float]  # of R, by title of TABLES and "All corruptions", where complete
    relative_mce: float  # in percent of the baseline's, NaN if there is none
    smallest_step: float | None  # median L2 of CW2 at confidence 0, over images that are right
    findings: dict[str, list[str]]  # by perturbation: why its score may mean something else


class Results(NamedTuple):
    """The results of several models on the same test images."""

    rows: list[ModelScores]
    baseline: str
    total: int  # images in the test set, of which a score has n
    notes: list[str]


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a proportion (Wilson, JASA 1927), equation 4."""
    z2 = 1.959963984540054**2  # the normal distribution's 97.5 % point, squared
    share = correct / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the bound is the proportion itself, and must not miss it by a rounding.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def aggregate(cells: Iterable[Cell], models: Mapping[str, str], baseline: str) -> Results:
    """Compute the scores of several models from finished cells.

    The interval of a mean over severities is that of n images, not of n images per severity: they
    are the same images.

    Args:
        cells: finished cells; of equal ones the last counts. Every model needs its clean cell. A
            perturbation counts if all its severities are there.
        models: digests by name.
        baseline: the name of the model that signs and the relative mCE refer to.
    """
    by_key = {(cell["model"], cell["perturbation"], cell["severity"]): cell for cell in cells}
    measured = {name: _scores(by_key, digest) for name, digest in models.items()}
    rows = []
    for name, digest in models.items():
        own, other = measured[name], measured[baseline]
        signed = {
            key: score._replace(
                sign=sign(key, table_value(key, score), table_value(key, other[key]))
            )
            if name != baseline and key in other
            else score
            for key, score in own.items()
        }
        by_name = {c["perturbation"]: c for c in by_key.values() if c["model"] == digest}
        step = by_name.get(SUPPLEMENT, {}).get("l2")
        mce = _relative_mce(own, other)
        rows.append(ModelScores(name, signed, _means(own), mce, step, _findings(by_name)))
    total = max((cell["total"] for cell in by_key.values()), default=0)
    return Results(rows, baseline, total, _notes(rows, list(by_key.values())))


def _scores(cells: Mapping[tuple[str, str, int | None], Cell], digest: str) -> dict[str, Score]:
    clean = cells[digest, "clean", None]
    scores: dict[str, Score] = {}
    for name in ("clean", *COLUMNS):
        severities = PERTURBATIONS[name].severities
        found = [cells[key] for s in severities if (key := (digest, name, s)) in cells]
        if len(found) == len(severities):
            shares = tuple(cell["correct"] / cell["n"] for cell in found)
            accuracy, n = math.fsum(shares) / len(shares), min(cell["n"] for cell in found)
            ratio = robustness(accuracy, clean["correct"] / clean["n"])
            scores[name] = Score(accuracy, *wilson(accuracy * n, n), n, ratio, "", shares)
    return scores


def robustness(accuracy: float, clean: float) -> float:
    """Compute R = accuracy / clean accuracy; NaN where that is 0."""
    return accuracy / clean if clean else math.nan


def table_value(name: str, score: Score) -> float:
    """Return the number that tables show: clean accuracy in percent, otherwise R."""
    return 100 * score.accuracy if name == "clean" else score.robustness


def sign(name: str, own: float, base: float) -> str:
    """Return + or - or nothing: a table's number against the baseline's, both as printed."""
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
    """Average, in percent, the accuracy lost to a corruption over what the baseline loses to it.

    Hendrycks and Dietterich, ICLR 2019, section 4.2, with the named baseline instead of AlexNet.
    """
    names = next(iter(TABLES.values()))
    if not own.keys() & base.keys() >= {"clean", *names}:
        return math.nan
    lost = [[s["clean"].accuracy - s[name].accuracy for name in names] for s in (own, base)]
    if min(lost[1]) <= 0:  # against a baseline that loses nothing, there is no ratio
        return math.nan
    return 100 * math.fsum(a / b for a, b in zip(*lost, strict=True)) / len(names)


def _findings(cells: Mapping[str, Cell]) -> dict[str, list[str]]:
    """Collect the warnings that qualify each attack's score."""
    found: dict[str, list[str]] = {}
    shares = {name: cell["correct"] / cell["n"] for name, cell in cells.items()}
    checks = {key.removeprefix(CHECK): v for key, v in shares.items() if key.startswith(CHECK)}
    whole = {key: v for key, v in shares.items() if key == "clean" or key in ATTACKS}
    few = cells.get(f"{CHECK}clean", {"n": 0, "broken": 0})
    said = failed_checks(whole) + [f"{c} (on {few['n']} images)" for c in failed_checks(checks)]
    if few["broken"]:
        said.append(f"the gradient is zero or NaN for {few['broken']} of {few['n']} images")
    if said:
        found["pgd_0.04"] = said
    if (cell := cells.get("cw2")) and (right := cell["right"]) and cell["reached"] < right:
        gave_up, wrong = 1 - cell["reached"] / right, cell["misclassified"] / right
        found["cw2"] = [
            f"the attack gave up on {100 * gave_up:.1f} % of the images that the model gets right,"
            " and these count as right; it fooled the model by less than its confidence on"
            f" {100 * wrong:.1f} % (median margin {cell['margin']:.1f})"
        ]
    return found


def _notes(rows: Sequence[ModelScores], cells: Sequence[Cell]) -> list[str]:
    """Collect the remarks that hold for all tables."""
    notes = []
    clean = [(row.scores["clean"], row.model) for row in rows]
    (worst, last), (best, first) = min(clean), max(clean)
    if worst.high < best.low:
        notes.append(
            f"clean accuracies differ by more than their intervals ({first}"
            f" {100 * best.accuracy:.1f} %, {last} {100 * worst.accuracy:.1f} %): compare"
            " robustness only at comparable clean accuracy"
        )
    if limits := {(cell["limit"], cell["seed"]) for cell in cells if cell.get("limit")}:
        limit, seed = min(limits)
        notes.append(f"tested on {limit} images, as many of each class, drawn with seed {seed}")
    notes += [
        f"{row.model}: the smallest adversarial step (CW2 at confidence 0) has a median length of"
        f" {row.smallest_step:.3f} (L2), over images that the model gets right"
        for row in rows
        if row.smallest_step is not None
    ]
    if len({str((cell.get("device"), cell.get("versions"))) for cell in cells}) > 1:
        notes.append("the cells come from several devices or versions: see cells.jsonl")
    return notes
