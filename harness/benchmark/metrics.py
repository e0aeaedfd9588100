"""From finished cells to scores: accuracy, robustness R, intervals, means.

results = aggregate(cells, {"standard": digest, "mtlat": digest}, baseline="standard")
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from corruptions import CORRUPTIONS
from harness.benchmark import paired
from harness.benchmark.attack_registry import ATTACKS
from harness.benchmark.checks import failed_checks
from harness.benchmark.mce import ALEXNET_ERRORS, corrupted_accuracy, mce, relative_mce
from harness.benchmark.paired import Array, Difference
from harness.benchmark.registry import CHECK, COLUMNS, PERTURBATIONS, SUPPLEMENT, TABLES
from harness.benchmark.store import Cell

CONFIDENCES = (0, 10, 20, 30, 40, 50)
VOID_SHARE = 0.05  # CW2 is void if it reaches no larger share of the baseline's right images


class Score(NamedTuple):
    """A model's result under one perturbation; accuracies in [0, 1], means over severities."""

    accuracy: float
    low: float  # 95 % interval of the accuracy
    high: float
    n: int
    robustness: float  # R = accuracy / clean accuracy, NaN if that is 0
    sign: str  # + - or nothing, against the baseline, of the numbers as printed
    by_severity: tuple[float, ...]  # accuracies
    r_low: float = math.nan  # 95 % interval of R
    r_high: float = math.nan
    difference: Difference | None = None  # of R to the baseline's; of clean accuracy for "clean"

    @property
    def decided_sign(self) -> str:
        """The sign, in parentheses where the difference is not decided."""
        decided = self.difference is not None and self.difference.decided
        return self.sign if decided or not self.sign else f"({self.sign})"


class ModelScores(NamedTuple):
    """All results of one model."""

    model: str
    scores: dict[str, Score]  # "clean" and every perturbation that is complete
    means: dict[str, float]  # of R, by title of TABLES and "All corruptions", where complete
    relative_mce: float  # in percent of the baseline's, NaN if there is none
    cw2: dict[str, float]  # "gave_up", "at_0", "l2": see `_describe_cw2`
    findings: dict[str, list[str]]  # by perturbation: why its score may mean something else
    mean_differences: Mapping[str, Difference]  # of `means`, to the baseline's
    void: frozenset[str] = frozenset()  # perturbations whose scores mean nothing here
    corrupted_accuracy: float = math.nan  # mean over ImageNet-C's fifteen, NaN if one is missing
    mce: float = math.nan  # in percent of AlexNet's published errors
    supplement: Mapping[str, Score] = MappingProxyType({})  # of attacks beside the paper's


class Results(NamedTuple):
    """The results of several models on the same test images."""

    rows: list[ModelScores]
    baseline: str
    total: int  # images in the test set, of which a score has n
    notes: list[str]


Outcomes = dict[str, Array]  # by perturbation, for each image the share of severities that is right
Severities = Mapping[str, tuple[int | None, ...]]  # by perturbation
Cells = Mapping[tuple[str, str, int | None], Cell]  # by model, perturbation, severity


def score_differences(row: ModelScores) -> dict[str, Difference]:
    """Return the differences of a model to the baseline by perturbation, "clean" included."""
    return {name: s.difference for name, s in row.scores.items() if s.difference}


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a proportion (Wilson, JASA 1927), equation 4."""
    z2 = 1.959963984540054**2  # the normal distribution's 97.5 % point, squared
    share = correct / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the bound is the proportion itself, and must not miss it by a rounding.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def aggregate(
    cells: Iterable[Cell], models: Mapping[str, str], baseline: str, supplement: Iterable[str] = ()
) -> Results:
    """Compute the scores of several models from finished cells.

    Differences to the baseline are paired by image, and their p-values are corrected for the number
    of perturbations by Holm's method, clean accuracy included.

    Args:
        cells: finished cells; of equal ones the last counts. Every model needs its clean cell. A
            perturbation counts if all its severities are there.
        models: digests by name.
        baseline: the name of the model that signs and the relative mCE refer to.
        supplement: names of attacks beside the paper's. Their scores have intervals, and stand
            apart: they take no part in differences, Holm's correction and means.
    """
    by_key = {(cell["model"], cell["perturbation"], cell["severity"]): cell for cell in cells}
    severities = {name: PERTURBATIONS[name].severities for name in ("clean", *COLUMNS)}
    others: Severities = {name: (None,) for name in supplement if name not in COLUMNS}
    outcomes = {n: read_outcomes(by_key, d, {**severities, **others}) for n, d in models.items()}
    measured = {n: _scores(by_key, d, outcomes[n], severities) for n, d in models.items()}
    accuracies = {n: {k: s.accuracy for k, s in own.items()} for n, own in measured.items()}
    void = _void(by_key, models[baseline])
    rows = []
    for name, digest in models.items():
        by_name = {c["perturbation"]: c for c in by_key.values() if c["model"] == digest}
        compared = {}
        if name != baseline:
            compared = _differences(outcomes[name], outcomes[baseline], void)
        own = _compare(measured[name], measured[baseline], compared)
        means = {
            title: fmean(own[key].robustness for key in keys)
            for title, keys in _groups(void).items()
            if keys and own.keys() >= set(keys)
        }
        rows.append(ModelScores(
            name, own, means, relative_mce(accuracies[name], accuracies[baseline]),
            _describe_cw2(by_name), _findings(by_name), void=void,
            mean_differences={title: d for title, d in compared.items() if title not in own},
            corrupted_accuracy=corrupted_accuracy(accuracies[name]), mce=mce(accuracies[name]),
            supplement=_scores(by_key, digest, outcomes[name], others),
        ))  # fmt: skip
    total = max(cell["total"] for cell in by_key.values())
    labels = {digest: name for name, digest in models.items()}  # a cell's may be an earlier run's
    shown = [{**c, "label": labels[c["model"]]} for c in by_key.values() if c["model"] in labels]
    return Results(rows, baseline, total, _notes(rows, baseline, shown))


def read_outcomes(cells: Cells, digest: str, severities: Severities) -> Outcomes:
    """Read the per-image outcomes of a model, where its cells have them for the same images."""
    found: Outcomes = {}
    for name, own in severities.items():
        keys = [(digest, name, s) for s in own]
        if all("hits" in cells.get(key, ()) for key in keys):
            hits = [paired.unpack(cells[key]["hits"], cells[key]["n"]) for key in keys]
            if {len(h) for h in hits} == {len(found.get("clean", hits[0]))}:
                found[name] = np.mean(hits, axis=0)
    return found


def _scores(
    cells: Cells, digest: str, outcomes: Outcomes, severities: Severities
) -> dict[str, Score]:
    """Score a model, without signs, where its cells of all severities are there."""
    clean = cells[digest, "clean", None]
    base = clean["correct"] / clean["n"]
    scores: dict[str, Score] = {}
    for name, own in severities.items():
        found = [cells[digest, name, s] for s in own if (digest, name, s) in cells]
        if len(found) < len(own):
            continue
        shares = tuple(cell["correct"] / cell["n"] for cell in found)
        accuracy, n = fmean(shares), min(cell["n"] for cell in found)
        low, high = wilson(accuracy * n, n)
        r = robustness(accuracy, base)
        if name == "clean":
            r_low, r_high = r, r  # by definition
        elif name in outcomes and "clean" in outcomes and accuracy > 0:
            r_low, r_high = paired.robustness_interval(outcomes[name], outcomes["clean"])
        else:
            r_low, r_high = robustness(low, base), robustness(high, base)
        scores[name] = Score(accuracy, low, high, n, r, "", shares, r_low, r_high)
    return scores


def _differences(own: Outcomes, other: Outcomes, void: frozenset[str]) -> dict[str, Difference]:
    """Compare a model with the baseline under every perturbation, and in the means of R."""
    if "clean" not in own or "clean" not in other:
        return {}
    c, d = own["clean"], other["clean"]
    found: dict[str, Difference | None] = {"clean": paired.compare_accuracy(c, d)}
    shared = [name for name in COLUMNS if name in own and name in other and name not in void]
    found |= {name: paired.compare_robustness(own[name], c, other[name], d) for name in shared}
    corrected = paired.decide(found)
    for title, names in _groups(void).items():
        if set(names) <= set(shared):
            a, b = (np.mean([o[name] for name in names], axis=0) for o in (own, other))
            corrected[title] = paired.compare_robustness(a, c, b, d)
    return {name: difference for name, difference in corrected.items() if difference}


def _compare(
    own: Mapping[str, Score], other: Mapping[str, Score], differences: Mapping[str, Difference]
) -> dict[str, Score]:
    """Add signs and differences to the scores of a model."""
    return {
        name: score._replace(
            sign=sign(name, table_value(name, score), table_value(name, other.get(name, score))),
            difference=differences.get(name),
        )
        for name, score in own.items()
    }


def _groups(void: frozenset[str]) -> dict[str, list[str]]:
    """List what each mean of R averages, without what is void."""
    wanted = {**TABLES, "All corruptions": list(CORRUPTIONS)}
    return {title: [n for n in names if n not in void] for title, names in wanted.items()}


def _void(cells: Cells, baseline: str) -> frozenset[str]:
    """Return "cw2" if the attack gave up on nearly all images that the baseline gets right.

    CW2 at confidence 50 then measures the scale of the baseline's logits, and not its robustness.
    """
    cell = cells.get((baseline, "cw2", None))
    if cell and cell["right"] and cell.get("reached", 0) <= VOID_SHARE * cell["right"]:
        return frozenset({"cw2"})
    return frozenset()


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


def _findings(cells: Mapping[str, Cell]) -> dict[str, list[str]]:
    """Collect the warnings that qualify each attack's score."""
    found: dict[str, list[str]] = {}
    shares = {name: cell["correct"] / cell["n"] for name, cell in cells.items()}
    checks = {key.removeprefix(CHECK): v for key, v in shares.items() if key.startswith(CHECK)}
    whole = {key: v for key, v in shares.items() if key == "clean" or key in ATTACKS}
    few = max((cell["n"] for key, cell in cells.items() if key.startswith(CHECK)), default=0)
    said = failed_checks(whole) + [f"{c} (on {few} images)" for c in failed_checks(checks)]
    if (clean := cells.get(f"{CHECK}clean")) and clean["broken"]:
        said.append(f"the gradient is zero or NaN for {clean['broken']} of {clean['n']} images")
    if said:
        found["pgd_0.04"] = said
    if (cell := cells.get("cw2")) and (right := cell["right"]) and cell["reached"] < right:
        gave_up, wrong = 1 - cell["reached"] / right, cell["misclassified"] / right
        found["cw2"] = [
            f"the attack gave up on {100 * gave_up:.1f} % of the images that the model gets right,"
            " and these count as right; with any margin above 0 it fooled the model on"
            f" {100 * wrong:.1f} % (median margin {round(cell['margin'], 1) + 0:.1f})"
        ]
    return found


def _describe_cw2(cells: Mapping[str, Cell]) -> dict[str, float]:
    """Describe CW2 beyond its score, where it was measured.

    "gave_up" is the share of right images on which the attack at confidence 50 gave up, and
    "margin_20" the share on which the wrong class led by at least 20; "at_0" is R at confidence 0,
    where an image is lost if any iterate is wrong; "l2" is the median length of the smallest step
    that fools the model. The last two are of the sample that the checks take.
    """
    found = {}
    if (cell := cells.get("cw2")) and cell["right"]:
        found["gave_up"] = 1 - cell["reached"] / cell["right"]
        if deciles := cell.get("margin_deciles"):
            below = np.interp(CONFIDENCES, deciles, np.linspace(0, 1, 11))
            found |= {f"margin_{c}": 1 - float(b) for c, b in zip(CONFIDENCES, below, strict=True)}
    if (cell := cells.get(SUPPLEMENT)) and cell["right"]:
        found["at_0"] = 1 - cell["reached"] / cell["right"]
        if cell.get("l2") is not None:
            found["l2"] = cell["l2"]
    return found


def _notes(rows: Sequence[ModelScores], baseline: str, cells: Sequence[Cell]) -> list[str]:
    """Collect the remarks that hold for all tables."""
    notes = []
    others = [row for row in rows if row.model != baseline]
    compared = [s for row in others for name, s in row.scores.items() if name not in row.void]
    if any(score.difference is None for score in compared if score.sign):
        notes.append("unpaired: some cells have no per-image outcomes, so nothing is decided there")
    if len({cell["surrogate"] for cell in cells if cell.get("surrogate")}) > 1:
        notes.append("under MI FGSM, compare only networks that the same surrogate attacked")
    if any(row.void for row in rows):
        notes.append(
            f"CW2 is void: at confidence 50 it gave up on nearly all images that {baseline} gets"
            " right, so that its R measures the scale of the logits, and not robustness; the mean"
            " of the attacks leaves it out"
        )
    if not all(math.isnan(row.mce) for row in rows):
        notes.append(
            "corrupted % is the mean accuracy under the fifteen corruptions; mCE averages the error"
            " under each, divided by AlexNet's (Hendrycks and Dietterich, 2019), and is comparable"
            " with published ones only for ImageNet at 224 px"
        )
        if all(math.isnan(row.relative_mce) for row in rows):
            notes.append(
                f"rel. mCE is -: {baseline} does not lose accuracy under every one of the fifteen"
                " corruptions, and the ratio to its losses needs that"
            )
    elif any(name in row.scores for row in rows for name in ALEXNET_ERRORS):
        notes.append("corrupted %, mCE and rel. mCE are -: they need all fifteen corruptions")
    ordered = sorted(rows, key=lambda row: row.scores["clean"].accuracy)
    worst, best = (row.scores["clean"] for row in (ordered[0], ordered[-1]))
    if worst.high < best.low:
        notes.append(
            f"clean accuracies differ by more than their intervals ({ordered[-1].model}"
            f" {100 * best.accuracy:.1f} %, {ordered[0].model} {100 * worst.accuracy:.1f} %):"
            " compare robustness only at comparable clean accuracy"
        )
    if limits := {(cell["limit"], cell["seed"]) for cell in cells if cell.get("limit")}:
        n, seed = min(limits)
        notes.append(
            f"tested on {n} image{'s' * (n > 1)}, where possible equally many of each class, drawn"
            f" with seed {seed}"
        )
    for model in dict.fromkeys(cell["label"] for cell in cells if cell.get("nan")):
        names = dict.fromkeys(
            c["perturbation"] for c in cells if c["label"] == model and "nan" in c
        )
        notes.append(f"logits of {model} are NaN under {', '.join(names)}: such images are wrong")
    if len({str((cell.get("device"), cell.get("versions"))) for cell in cells}) > 1:
        notes.append("the cells come from several devices or versions: see cells.jsonl")
    return notes
