"""Intervals of robustness and of its differences, from per-image outcomes.

All models see the same images, so that their differences are paired. Outcomes are arrays (n,): for
each image the share of severities at which the model is right. With a and c the outcomes of a model
under a perturbation and on clean images, R = mean(a) / mean(c). To first order (the delta method),
image i moves R by 1/n of its influence (a_i - R c_i) / mean(c). A difference of two models has the
difference of their influences, its variance is the sample variance of these divided by n, and its
interval is the normal distribution's. An exact test's p may be above 0.05 where the interval
excludes 0, or below where it contains 0.

Simulation with 50 to 10,000 images and equal R: p-values below 0.002 came up at most about twice as
often as they should where one clean accuracy was at most twice the other. Where one model was right
for 900 clean images and the other for 50 it was up to 5 times, and for 180 and 10 up to 10 times.

Sources: delta method: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993. Two imagined
images (see `FEW`): Bonett and Price, British Journal of Mathematical and Statistical Psychology
2012. McNemar, Psychometrika 1947. Welch and Satterthwaite: Satterthwaite, Biometrics 1946. Holm,
Scandinavian Journal of Statistics 1979.
"""

import base64
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from torch import Tensor

Array = np.ndarray[Any, Any]  # (n,) float64

FEW = 10.0  # right, lost or differing images below which two imagined ones widen the interval
LEVEL = 0.05  # of decisions, after Holm's correction


class Difference(NamedTuple):
    """A difference of two models, its 95 % interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p: float
    influence: Array  # (n,) of the images
    adjusted: float = math.nan  # p after Holm's correction

    @property
    def decided(self) -> bool:
        """Whether the corrected p-value is below `LEVEL`."""
        return self.adjusted < LEVEL


def pack(hits: Tensor) -> str:
    """Encode bool (n,) as base64 of one bit per image."""
    return base64.b64encode(np.packbits(hits.numpy()).tobytes()).decode()


def unpack(text: str, n: int) -> Array:
    """Decode what `pack` encoded, as float64 (n,) of 0 and 1."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=n).astype(np.float64)


def robustness_interval(a: Array, c: Array) -> tuple[float, float]:
    """Compute the 95 % interval of R = mean(a) / mean(c); NaN where that does not exist.

    Where few images are right or lost it is widened as in `compare_robustness`, and begins at 0 or
    above.
    """
    if not c.any():
        return math.nan, math.nan
    more = [1 / c.mean()] * 2 if _few(a, c) else []
    _, low, high, *_ = _normal(float(a.mean() / c.mean()), _influence(a, c), more)
    return max(low, 0.0), high  # NaN stays


def compare_robustness(a: Array, c: Array, b: Array, d: Array) -> Difference | None:
    """Compare the R of two models on the same images.

    Args:
        a, c: outcomes of the first model, perturbed and clean.
        b, d: outcomes of the second model.

    Returns:
        R of the first minus R of the second; None if either clean accuracy is 0.

        Few means less than `FEW` images that are right (the sum of a), lost (of |c - a|) or
        different (of |a - b| or |c - a - d + b|). Where there are few, the interval is as wide as
        with two more images, one that only the first model gets right and one that only the second
        does, and p follows from it. But for whole outcomes of which few are right or lost, p is the
        largest of these: the delta method's without the two images, a sign test's of the right
        images if few are right, and one of the lost images if few are lost. A sign test counts the
        images that one model alone gets right, or loses, and expects them in the ratio of the clean
        accuracies, as if no image were right, or lost, under both.
    """
    if not (c.any() and d.any()):
        return None
    value = round(float(a.mean() / c.mean() - b.mean() / d.mean()), 12)  # 0 where R is equal
    influence = _influence(a, c) - _influence(b, d)
    plain = _normal(value, influence)
    few = _few(a, c) or _few(b, d)
    if not few and min(np.abs(a - b).sum(), np.abs(c - a - d + b).sum()) >= FEW:
        return plain
    found = _normal(value, influence, (1 / c.mean(), 1 / d.mean()))
    if not (few and _whole(a, c, b, d)):
        return found
    share = c.sum() / (c.sum() + d.sum())
    counted = [
        _sign_test(one, other, share)
        for one, other in ((a, b), (c - a, d - b))  # right, lost
        if min(np.abs(one).sum(), np.abs(other).sum()) < FEW
    ]
    return found._replace(p=max(plain.p, *counted))


def compare_accuracy(c: Array, d: Array) -> Difference:
    """Compare the accuracies of two models on the same images; of one severity by McNemar's p.

    Where few images differ, or few do not, the interval is widened as in `compare_robustness`.
    """
    differing = np.abs(c - d).sum()
    more = (1.0, 1.0) if min(differing, len(c) - differing) < FEW else ()
    found = _normal(float(c.mean() - d.mean()), c - d - (c - d).mean(), more)
    return found._replace(p=_sign_test(c, d)) if _whole(c, d) else found


def combine_seeds(differences: Sequence[Difference]) -> Difference:
    """Average the differences of several seeds, trained apart and measured on the same images.

    The variance of the mean is s^2 / S, with s the standard deviation over the S seeds, plus the
    sample variance of the images' mean influences divided by n. The interval is a t interval with
    Welch's and Satterthwaite's degrees of freedom, infinite for the second term. The first contains
    a part of the second, so that the interval is too wide unless the seeds differ much. Simulation
    with three seeds, whose images' influences correlate by 0.2 (about as in `results/tiny50`):
    p-values below 0.002 came up 0.2, 1.2, 2.7, 5 and 9 times as often as they should where the
    variance between trainings was 0, 1, 2, 4 and 10 times that of one seed's images; with two seeds
    0.3, 2.6, 6, 13 and 23 times. The 95 % intervals covered the difference in 98, 97, 95, 94 and
    93 % of the draws, and with two seeds in 98, 95, 92, 90 and 87 %.

    Few images have no treatment of their own here: with the same five in each of three seeds p can
    be 0.4 times a sign test's, and where no image differs the interval has no width.
    """
    if len(differences) == 1:
        return differences[0]
    values = np.array([d.value for d in differences])
    mean, seeds = float(values.mean()), len(values)
    if len({len(d.influence) for d in differences}) == 1:
        influence = np.mean([d.influence for d in differences], axis=0)
        images = _standard_error(influence) ** 2
    else:  # of other images
        influence = np.zeros(1)
        images = sum(_standard_error(d.influence) ** 2 for d in differences) / seeds**2
    between = float(values.var(ddof=1)) / seeds
    error = math.sqrt(between + images)
    freedom = (seeds - 1) * (1 + images / between) ** 2 if between else math.inf
    return _normal(mean, influence, error=error, freedom=freedom)


def subtract(first: Difference | None, second: Difference, *, accuracy: bool = False) -> Difference:
    """Compare two models by their differences to a third one; None is the third one itself.

    With `accuracy`, they are differences of accuracies, whose p is McNemar's. Without it, few
    images have no treatment of their own here.
    """
    if first is None:
        value, low, high, p, influence, *_ = second
        return Difference(-value, -high, -low, p, -influence)
    if accuracy:  # a value and its influences are the outcomes' differences, from -1 to 1
        c, d = (np.rint(each.value + each.influence) for each in (first, second))
        return compare_accuracy(c, d)
    return _normal(first.value - second.value, first.influence - second.influence)


def uncorrected(difference: Difference | None) -> Difference | None:
    """Decide a difference by its own p-value, as the only comparison of its kind."""
    return difference and difference._replace(adjusted=difference.p)


def decide(
    differences: Mapping[str, Difference | None], means: Container[str] = ()
) -> dict[str, Difference | None]:
    """Correct these p-values for their number, and leave those of `means` uncorrected."""
    single = [name for name in differences if name not in means]
    corrected = dict(zip(single, holm([differences[name] for name in single]), strict=True))
    return {name: corrected.get(name, uncorrected(d)) for name, d in differences.items()}


def holm(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Correct the p-values of these differences for their number."""
    known = sorted((d.p, i, d) for i, d in enumerate(differences) if d and not math.isnan(d.p))
    corrected = [d and d._replace(adjusted=math.nan) for d in differences]  # stays where p is NaN
    largest = 0.0
    for rank, (p, i, difference) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = difference._replace(adjusted=largest)
    return corrected


def _influence(a: Array, c: Array) -> Array:
    """Compute by how much each image moves R, times n."""
    clean = c.mean()
    influence: Array = (a - a.mean() / clean * c) / clean
    return influence


def _standard_error(influence: Array) -> float:
    """Compute the standard error of a mean from the influences of its images."""
    return float(influence.std(ddof=1) / math.sqrt(len(influence))) if len(influence) > 1 else 0.0


def _normal(
    value: float, influence: Array, more: Sequence[float] = (), *, error: float | None = None,
    freedom: float = math.inf,
) -> Difference:  # fmt: skip
    """Make a difference with a t interval; from a single image nothing is known.

    `more` are the influences of imagined images, which add to the standard error. (Bonett and Price
    also add them to n, and to the estimate.)
    """
    error = _standard_error(influence) if error is None else error
    if len(influence) < 2 and error == 0:
        return Difference(value, math.nan, math.nan, math.nan, influence)
    error = math.hypot(error, *(each / len(influence) for each in more))
    half = float(stats.t.ppf(0.975, freedom)) * error
    if error:
        p = 2 * float(stats.t.sf(abs(value) / error, freedom))
    else:  # as in a sign test in which all images agree
        p = 2.0 ** (1 - len(influence)) if value else 1.0
    return Difference(value, value - half, value + half, p, influence)


def _sign_test(first: Array, second: Array, share: float = 0.5) -> float:
    """Compute the exact two-sided p-value of a sign test: McNemar's, where outcomes are 0 or 1."""
    more, less = int((first > second).sum()), int((first < second).sum())
    return float(stats.binomtest(more, more + less, share).pvalue) if more + less else 1.0


def _whole(*outcomes: Array) -> bool:
    """Return whether all outcomes are 0 or 1, those of one severity."""
    return not any(np.mod(each, 1).any() for each in outcomes)


def _few(a: Array, c: Array) -> bool:
    """Return whether R is so near 0 or 1 that its distribution is not normal."""
    return len(a) > 1 and float(min(a.sum(), np.abs(c - a).sum())) < FEW
