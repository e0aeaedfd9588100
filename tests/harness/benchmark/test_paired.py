"""Test the paired intervals: coverage, a bootstrap, closed forms, and degenerate cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtri  # the normal quantile

from harness.benchmark import paired


def draw_outcomes(random, n, clean, kept, severities=1, shared=0.6):
    """Draw the outcomes of two models whose images are hard or easy for both.

    Each image has a difficulty that both models share. `clean` and `kept` are the models' clean
    accuracies, and the shares of the right images that stay right under a perturbation.
    """
    found = []
    easy = random.standard_normal(n)
    for accuracy, share in zip(clean, kept, strict=True):
        skill = math.sqrt(shared) * easy + math.sqrt(1 - shared) * random.standard_normal(n)
        c = skill > ndtri(1 - accuracy)
        a = np.zeros(n)
        for _ in range(severities):
            noise = math.sqrt(shared) * easy + math.sqrt(1 - shared) * random.standard_normal(n)
            a += (noise > ndtri(1 - share * accuracy)) / severities
        found += [a, c.astype(float)]
    return found


def true_difference(kept):
    return kept[0] - kept[1]


@pytest.mark.parametrize(
    "n, clean, kept, severities",
    [
        (1000, (0.7, 0.8), (0.6, 0.5), 1),
        (500, (0.5, 0.5), (0.8, 0.8), 5),
        (2500, (0.9, 0.4), (0.3, 0.9), 1),
    ],
)
def test_95_percent_of_the_intervals_cover_the_difference(n, clean, kept, severities):
    random = np.random.default_rng(0)
    covered = rejected = 0
    for _ in range(2000):
        a, c, b, d = draw_outcomes(random, n, clean, kept, severities)
        found = paired.compare_robustness(a, c, b, d)
        covered += found.low <= true_difference(kept) <= found.high
        rejected += found.p < 0.05
    assert 0.94 <= covered / 2000 <= 0.96
    if kept[0] == kept[1]:
        assert 0.04 <= rejected / 2000 <= 0.06  # the p-value's rate of false decisions


def test_pairing_makes_the_interval_narrower():
    random = np.random.default_rng(1)
    a, c, b, d = draw_outcomes(random, 2000, (0.7, 0.7), (0.6, 0.5), 5, shared=0.9)
    together = paired.compare_robustness(a, c, b, d)
    apart = paired.compare_robustness(a, c, *(x[random.permutation(2000)] for x in (b, d)))
    assert together.high - together.low < 0.7 * (apart.high - apart.low)
    assert apart.value == pytest.approx(together.value)


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Resample images one by one, which shares no code with the module."""
    random = np.random.default_rng(2)
    a, c, b, d = draw_outcomes(random, 800, (0.7, 0.75), (0.6, 0.5), 5)
    found = paired.compare_robustness(a, c, b, d)
    own = paired.robustness_interval(a, c)
    differences, ratios = [], []
    for _ in range(4000):
        i = random.integers(800, size=800)
        ratios.append(a[i].mean() / c[i].mean())
        differences.append(ratios[-1] - b[i].mean() / d[i].mean())
    assert np.quantile(differences, (0.025, 0.975)) == pytest.approx(found[1:3], abs=0.005)
    assert np.quantile(ratios, (0.025, 0.975)) == pytest.approx(own, abs=0.005)


def widened(error, *images):
    """Return half of a 95 % interval that imagined images widen, by their shares of the value."""
    return 1.959964 * math.sqrt(error**2 + sum(share**2 for share in images))


def test_near_0_imagined_images_widen_the_interval():
    random = np.random.default_rng(3)
    c = d = (random.random(400) < 0.7).astype(float)
    a, b = np.zeros(400), np.zeros(400)
    a[np.flatnonzero(c)[:3]] = 1
    found = paired.compare_robustness(a, c, b, d)
    resampled = [a[i].mean() / c[i].mean() for i in random.integers(400, size=(4000, 400))]
    half = widened(np.std(resampled), 1 / c.sum(), 1 / c.sum())
    assert found.high - found.value == pytest.approx(half, rel=0.03)
    assert found.low < 0 < found.value - 1.7 * np.std(resampled)  # three images decide little
    assert found.p == 0.25 > 2 * np.mean(np.array(resampled) <= 0)  # of a sign test, 3 to 0
    clean, b[-1] = np.arange(400) < 50.0, 1  # R of the second is 1 of 50: nearly that of the first
    found = paired.compare_robustness(a, np.ones(400), b, clean)
    assert found.p > stats.binomtest(3, 4, 400 / 450).pvalue > 0.3  # that of the delta method
    b[-1] = 0
    a[np.flatnonzero(c)[:60]] = 1
    assert paired.compare_robustness(a, c, b, d).p < 0.001
    low, high = paired.robustness_interval(b, c)  # of a single model none is right: a count of 0
    assert low == 0 and high == pytest.approx(widened(0, 1 / c.sum(), 1 / c.sum()))


def test_near_1_imagined_images_widen_the_interval():
    random = np.random.default_rng(3)
    c = (random.random(400) < 0.7).astype(float)
    a = c.copy()
    a[np.flatnonzero(c)[:3]] = 0
    resampled = [a[i].mean() / c[i].mean() for i in random.integers(400, size=(4000, 400))]
    half = widened(np.std(resampled), 1 / c.sum(), 1 / c.sum())
    low, high = paired.robustness_interval(a, c)
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)
    assert paired.compare_robustness(a, c, c, c)[1:3] == pytest.approx((low - 1, high - 1))


@pytest.mark.parametrize("kept", [0.002, 0.998])
def test_intervals_of_few_right_or_lost_images_cover_robustness(kept):
    """Two of 1,000 are expected, and in 13 % of the draws there is none."""
    random, c, covered = np.random.default_rng(10), np.ones(1000), 0
    for _ in range(500):
        low, high = paired.robustness_interval((random.random(1000) < kept) * 1.0, c)
        covered += low <= kept <= high
    assert covered / 500 >= 0.94


def test_intervals_of_nearly_equal_models_cover_the_difference_of_accuracies():
    """Only 0.7 images are expected to differ, and in half of the draws none does."""
    random, c, covered = np.random.default_rng(11), np.ones(1000), 0
    for _ in range(500):
        found = paired.compare_accuracy(c, (random.random(1000) > 0.0007) * 1.0)
        covered += found.low <= 0.0007 <= found.high
    assert covered / 500 >= 0.94


def test_influences_sum_to_nothing_and_predict_the_loss_of_an_image():
    random = np.random.default_rng(4)
    a, c, b, d = draw_outcomes(random, 300, (0.7, 0.8), (0.6, 0.5), 5)
    found = paired.compare_robustness(a, c, b, d)
    assert found.influence.mean() == pytest.approx(0, abs=1e-12)
    for i in range(5):
        without = paired.compare_robustness(*(np.delete(x, i) for x in (a, c, b, d)))
        assert 299 * (found.value - without.value) == pytest.approx(found.influence[i], rel=0.02)


def test_clean_accuracies_are_compared_by_mcnemar():
    c, d = np.zeros(100), np.zeros(100)
    c[:30], d[20:60] = 1, 1  # 20 right by the first alone, 30 by the second alone
    found = paired.compare_accuracy(c, d)
    assert found.value == pytest.approx(-0.1)
    assert found.p == pytest.approx(stats.binomtest(20, 50).pvalue)
    assert paired.compare_accuracy(c, c).p == 1


def test_seeds_are_combined_by_both_variances():
    random = np.random.default_rng(5)
    seeds = [
        paired.compare_robustness(*draw_outcomes(random, 1000, (0.7, 0.7), (0.6, share), 5))
        for share in (0.5, 0.52, 0.48)
    ]
    images = np.mean([one.influence for one in seeds], axis=0).var(ddof=1) / 1000
    assert paired.combine_seeds(seeds)[:4] == pytest.approx(combined_in_closed_form(seeds, images))
    assert paired.combine_seeds(seeds[:1]) is seeds[0]
    of_other_images = [seeds[0], seeds[1]._replace(influence=seeds[1].influence[:-1])]
    images = (seeds[0].influence.var(ddof=1) / 1000 + seeds[1].influence[:-1].var(ddof=1) / 999) / 4
    expected = combined_in_closed_form(of_other_images, images)
    assert paired.combine_seeds(of_other_images)[:4] == pytest.approx(expected)


def combined_in_closed_form(seeds, images):
    """Compute the mean of the seeds, its t interval and its p-value.

    `images` is the variance of the mean that comes from the choice of the images.
    """
    values = [one.value for one in seeds]
    between = np.var(values, ddof=1) / len(seeds)
    error = math.sqrt(between + images)
    freedom = (between + images) ** 2 / (between**2 / (len(seeds) - 1))
    mean, half = np.mean(values), stats.t.ppf(0.975, freedom) * error
    return mean, mean - half, mean + half, 2 * stats.t.sf(abs(mean) / error, freedom)


def test_models_are_compared_through_a_third_as_they_are_directly():
    random = np.random.default_rng(7)
    a, c, b, d = draw_outcomes(random, 500, (0.7, 0.8), (0.6, 0.5), 5)
    e, f = draw_outcomes(random, 500, (0.6,), (0.7,), 5)
    first, second = paired.compare_robustness(a, c, e, f), paired.compare_robustness(b, d, e, f)
    direct = paired.compare_robustness(a, c, b, d)
    assert paired.subtract(first, second)[:4] == pytest.approx(direct[:4])
    opposite = paired.compare_robustness(e, f, b, d)
    assert paired.subtract(None, second)[:4] == pytest.approx(opposite[:4])


def test_accuracies_are_compared_through_a_third_by_mcnemars_test_too():
    """So few images differ that the normal p-value would decide what the exact one does not."""
    c, d, third = np.arange(200) < 150, np.arange(200) < 145, np.arange(200) % 2
    c, d = c.astype(float), d.astype(float)
    direct = paired.compare_accuracy(c, d)
    assert direct.p == 0.0625 and direct.low < 0  # 2 of the 32 outcomes of five coins
    opposite = paired.subtract(None, paired.compare_accuracy(d, c))
    assert opposite[:4] == pytest.approx(direct[:4])
    both = (paired.compare_accuracy(each, third) for each in (c, d))
    assert paired.subtract(*both, accuracy=True)[:4] == pytest.approx(direct[:4])
    few = paired.compare_robustness(c * (np.arange(200) < 3), c, third, c)
    assert paired.subtract(None, few).p == few.p


def test_intervals_over_seeds_cover_the_difference():
    """Seeds differ by training, and share the images."""
    random, covered = np.random.default_rng(6), 0
    for _ in range(400):
        easy = random.standard_normal(500)
        seeds = []
        for _ in range(3):
            share = np.clip(random.normal(0.5, 0.03), 0, 1)
            a, c, b, d = (
                (easy + random.standard_normal(500) > math.sqrt(2) * ndtri(1 - p)) * 1.0
                for p in (0.7 * share, 0.7, 0.7 * 0.5, 0.7)
            )
            seeds.append(paired.compare_robustness(a, c, b, d))
        found = paired.combine_seeds(seeds)
        covered += found.low <= 0 <= found.high
    assert covered / 400 >= 0.94


def test_holm_is_the_step_down_procedure():
    ps = [0.01, 0.04, 0.03, 0.005]
    made = [paired.Difference(0.1, 0, 0.2, p, np.zeros(2)) for p in ps]
    adjusted = [d.adjusted for d in paired.holm([made[0], None, *made[1:]]) if d]
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [d.decided for d in paired.holm(made)] == [True, False, False, True]
    assert not made[0].decided
    unknown = paired.holm(made)[3]._replace(p=math.nan)  # which was decided by another p
    assert [d.decided for d in paired.holm([made[0], unknown])] == [True, False]


def test_degenerate_cases_have_no_interval_or_an_undecided_one():
    zero, one, some = np.zeros(50), np.ones(50), np.arange(50) % 2.0
    assert paired.compare_robustness(zero, zero, some, one) is None  # never right when clean
    assert paired.compare_robustness(some, one, zero, zero) is None
    equal = paired.compare_robustness(some, one, some, one)
    assert (equal.value, equal.p) == (0, 1) and equal.low == -equal.high < 0
    assert not paired.holm([equal])[0].decided
    single = paired.compare_robustness(one[:1], one[:1], zero[:1], one[:1])
    assert single.value == 1 and math.isnan(single.low) and math.isnan(single.p)
    assert not paired.holm([single])[0].decided
    assert all(map(math.isnan, paired.robustness_interval(zero, zero)))
    assert all(map(math.isnan, paired.robustness_interval(one[:1], one[:1])))
    alone = paired.compare_accuracy(one[:1], zero[:1])
    assert alone.value == 1 and math.isnan(alone.low) and math.isnan(alone.high)
    for n in (2, 3, 5, 50):  # no fewer images decide than in a sign test
        opposed = paired.compare_robustness(zero[:n], one[:n], one[:n], one[:n])
        assert opposed.value == -1 and opposed.p >= 2 ** (1 - n)
        assert paired.combine_seeds([opposed, opposed]).p == pytest.approx(2 ** (1 - n))
    assert paired.holm([opposed])[0].decided


@given(st.integers(0, 100), st.integers(1, 300))
def test_outcomes_survive_packing(seed, n):
    hits = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    text = paired.pack(hits)
    assert len(text) <= n / 6 + 4
    assert np.array_equal(paired.unpack(text, n), hits.numpy())


def test_a_few_outcomes_of_either_model_widen_the_interval():
    c, a, b = np.zeros(400), np.zeros(400), np.zeros(400)
    c[:200], a[:100], b[:3] = 1, 1, 1
    error = np.std(2 * (a - b) - (0.5 - 0.015) * 2 * c, ddof=1) / 20
    for one, other in ((a, b), (b, a)):
        found = paired.compare_robustness(one, c, other, c)
        half = widened(error, 1 / 200, 1 / 200)
        assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half))


@pytest.mark.parametrize("lost", [False, True])
def test_a_few_images_decide_no_more_than_a_sign_test(lost):
    """Let one model be right, or wrong, for 8 images, and the other for none."""
    c, eight = np.ones(1000), np.arange(1000) < 8.0
    one, other = (c - eight, c) if lost else (eight * 1.0, c * 0)
    for first, second in ((one, other), (other, one)):
        found = paired.compare_robustness(first, c, second, c)
        assert found.p == 2 / 2**8 and min(abs(found.low), abs(found.high)) > 0


def test_of_few_lost_images_those_lost_are_counted():
    """The second model is right for half of the images when clean, and loses 8 of these.

    The first loses none, where two thirds of the losses would be its, if R were equal.
    """
    c, d = np.ones(1000), np.arange(1000) % 2.0
    found = paired.compare_robustness(c, c, d * (np.arange(1000) > 16), d)
    assert found.value == pytest.approx(8 / 500)
    error = np.std((1 - 0.984) * d - (d - d * (np.arange(1000) > 16)), ddof=1) * 2 / np.sqrt(1000)
    assert found.p == pytest.approx(2 * stats.norm.sf(8 / 500 / error)) and found.p > 1 / 3**8


def test_of_few_right_images_the_right_ones_are_counted():
    """Eight are right by the one model, none by the other, which has half the clean accuracy."""
    c, d, eight = np.ones(1000), np.arange(1000) % 2.0, np.arange(1000) < 8.0
    for first, second in (((eight, c), (d * 0, d)), ((c * 0, c), (eight * d, d))):
        found = paired.compare_robustness(*first, *second)
        counts = int(first[0].sum()), int(second[0].sum())
        exact = stats.binomtest(counts[0], sum(counts), 2 / 3).pvalue
        assert found.p >= exact and paired.compare_robustness(*second, *first).p == found.p
        assert (found.p == exact) == (counts[0] == 8)  # of the other, the delta method's is larger


def test_accuracies_over_severities_are_compared_by_their_means():
    """One severity of five is lost for each of 20 images: a sign test would not see how little."""
    c, d = np.ones(200), 1 - 0.2 * (np.arange(200) < 20)
    d[40:52], c[40:52] = 1, 0
    found = paired.compare_accuracy(c, d)
    z = (c - d).mean() / ((c - d).std(ddof=1) / np.sqrt(200))
    assert found.value < 0 and found.p == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert paired.compare_accuracy(d, c).p == pytest.approx(found.p)
    assert paired.compare_accuracy(np.round(c), np.round(d)).p == 2 / 2**12


def test_differences_of_a_few_right_images_are_decided_wrongly_in_five_percent_at_most():
    """Equal models that are right for about four of 600 images."""
    random, c = np.random.default_rng(8), np.ones(600)
    pairs = (random.random((400, 2, 600)) < 0.007) * 1.0
    p = np.array([paired.compare_robustness(a, c, b, c).p for a, b in pairs])
    assert np.mean(p < 0.05) <= 0.05


def test_gains_do_not_make_losses_few():
    c, a = np.zeros(400), np.zeros(400)
    c[:200], a[100:300] = 1, 1  # 100 images are lost and 100 gained
    low, high = paired.robustness_interval(a, c)
    assert (low + high) / 2 == pytest.approx(1, abs=1e-12)  # of the delta method alone


def test_a_single_right_image_says_little():
    one = np.eye(10)[0]
    low, high = paired.robustness_interval(one, one)
    assert low == 0 and high == pytest.approx(1 + 1.959964 * math.sqrt(2))


def test_equal_robustness_is_no_difference_whatever_the_rounding():
    c, d = ((np.arange(30) < right).astype(float) for right in (20, 25))
    a, b = ((np.arange(30) < right).astype(float) for right in (16, 20))
    assert a.mean() / c.mean() != b.mean() / d.mean()  # both are 0.8
    assert paired.compare_robustness(a, c, b, d).value == 0


def test_few_right_images_decide_no_difference_of_models_with_other_clean_accuracies():
    """R is 0.02 for both. Eighteen and two right images are expected, and 0 of these 13 % often."""
    random, ps, covered = np.random.default_rng(9), [], 0
    for _ in range(400):
        u, v = random.random((2, 1000))
        a, c, b, d = ((x < p) * 1.0 for x, p in ((u, 0.018), (u, 0.9), (v, 0.002), (v, 0.1)))
        found = paired.compare_robustness(a, c, b, d)
        ps.append(found.p)
        covered += found.low <= 0 <= found.high
    assert np.mean(np.array(ps) < 0.05) <= 0.05 and covered / 400 >= 0.93


def test_no_differing_image_is_no_certainty():
    c, a = np.ones(1000), (np.arange(1000) < 600) * 1.0
    assert paired.compare_accuracy(a, a)[1:3] == pytest.approx((-0.00277, 0.00277), abs=1e-5)
    assert paired.compare_robustness(c * 0, c, c * 0, c).high == pytest.approx(0.00277, abs=1e-5)
    assert paired.robustness_interval(c, c)[0] == pytest.approx(1 - 0.00277, abs=1e-5)


def test_few_differing_images_decide_no_difference_of_robustness():
    """Both lose the same 30 images, and the first is right for 50 images more when clean."""
    c, d = ((np.arange(2500) < right) * 1.0 for right in (1250, 1200))
    lost = np.arange(2500) < 30
    found = paired.compare_robustness(c * ~lost, c, d * ~lost, d)
    assert found.low < 0 < found.value and found.p > 0.05


def test_few_outcomes_of_several_severities_are_decided_as_the_interval_says():
    """Each of 15 images is right at one of five severities."""
    one, a = np.ones(1000), 0.2 * (np.arange(1000) < 15)
    for found in (
        paired.compare_robustness(a, one, 0 * one, one),
        paired.compare_robustness(one, one, one - a, one), paired.compare_accuracy(a, 0 * one),
    ):  # fmt: skip
        assert found.low < 0 < found.value and found.p > 0.05


@pytest.mark.parametrize("count", [9, 10])
def test_fewer_than_ten_images_are_few(count):
    c, some = np.ones(1000), (np.arange(1000) < count) * 1.0
    spread = np.std(some, ddof=1) / math.sqrt(1000)
    half = widened(spread, *[0.001, 0.001] * (count < 10))
    for outcomes in (some, c - some):
        _, high = paired.robustness_interval(outcomes, c)
        assert high - outcomes.mean() == pytest.approx(half)
    b = (np.arange(1000) >= 500) * 1.0
    for found in (
        paired.compare_accuracy(c, c - some),
        paired.compare_accuracy(c, some),
        paired.compare_robustness(b + some, c, b, c),
    ):
        assert found.high - found.value == pytest.approx(half)


def test_images_that_differ_both_ways_are_not_few():
    c, d = (np.arange(1000) < 20) * 1.0, (np.arange(1000) >= 980) * 1.0
    found = paired.compare_accuracy(c, d)
    assert found.high == pytest.approx(widened(np.std(c - d, ddof=1) / math.sqrt(1000)))


def test_two_images_are_few_too():
    low, high = paired.robustness_interval(np.ones(2), np.ones(2))
    assert low < 1 < high


def test_equally_few_right_images_do_not_mean_equal_robustness():
    """Four are right by each model alone, of which the second has half the clean accuracy."""
    n = np.arange(1000)
    c, d, a, b = (x * 1.0 for x in (n < 1000, n < 500, n < 4, (4 <= n) & (n < 8)))
    found = paired.compare_robustness(a, c, b, d)
    assert found.p == pytest.approx(stats.binomtest(4, 8, 2 / 3).pvalue) and found.p < 1


def test_where_few_are_right_and_few_are_lost_both_are_counted():
    """The second model is right for 9 images and loses none of these, where one is expected.

    The first is right for 180, also for these 9, and loses 18. Images that are right under both
    leave the second model none that it alone gets right, and say nothing about R.
    """
    n = np.arange(200)
    c, d, a, b = (x * 1.0 for x in (n < 180, n < 9, n < 162, n < 9))
    for one, other in (((a, c), (b, d)), ((b, d), (a, c))):
        found = paired.compare_robustness(*one, *other)
        assert found.p == 1 and found.low < 0 < found.high


def test_intervals_of_nearly_opposite_models_cover_the_difference_of_accuracies():
    """One image is expected at which the models do not differ, and in 37 % of the draws none is."""
    random, covered = np.random.default_rng(12), 0
    for _ in range(500):
        c, d = ((random.random(50) < share) * 1.0 for share in (0.99, 0.01))
        found = paired.compare_accuracy(c, d)
        covered += found.low <= 0.98 <= found.high
    assert covered / 500 >= 0.94
    opposed = paired.compare_accuracy(np.ones(1000), np.zeros(1000))
    assert opposed.low == pytest.approx(1 - widened(0, 0.001, 0.001))
