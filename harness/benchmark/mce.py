"""ImageNet-C's summaries of a model: accuracy under the fifteen corruptions, mCE, relative mCE.

Hendrycks and Dietterich, ICLR 2019, section 4.2. Every function takes accuracies in [0, 1] by name
of the perturbation, means over the severities, and returns NaN if one of the fifteen is missing.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from types import MappingProxyType

# AlexNet's top-1 errors on ImageNet-C at 224 px, means of the five severities, as published in
# hendrycks/robustness.
ALEXNET_ERRORS: Mapping[str, float] = MappingProxyType(
    {
        "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
        "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
        "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
        "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
        "pixelate": 0.717840, "jpeg_compression": 0.606500,
    }
)  # fmt: skip


def corrupted_accuracy(own: Mapping[str, float]) -> float:
    """Average the accuracy over the fifteen corruptions."""
    return fmean([own.get(name, math.nan) for name in ALEXNET_ERRORS])


def mce(own: Mapping[str, float]) -> float:
    """Compute the mCE: the mean, in percent, of the errors over AlexNet's published ones.

    AlexNet's are of ImageNet at 224 px. For other images, the mCE is not comparable with published
    ones.
    """
    return 100 * fmean([(1 - own.get(n, math.nan)) / e for n, e in ALEXNET_ERRORS.items()])


def relative_mce(own: Mapping[str, float], base: Mapping[str, float]) -> float:
    """Compute the relative mCE: the mean ratio of lost accuracy, own to baseline, in percent.

    The baseline replaces AlexNet, so that any dataset will do. Needs "clean" in both mappings. NaN
    if the baseline does not lose accuracy under each of the fifteen.
    """
    lost = [  # rounded, because the mean of five equal shares may differ from the share by 1e-16
        [round(s["clean"] - s.get(name, math.nan), 12) for name in ALEXNET_ERRORS]
        for s in (own, base)
    ]
    if not all(loss > 0 for loss in lost[1]):  # without a loss, or NaN, there is no ratio
        return math.nan
    return 100 * fmean([a / b for a, b in zip(*lost, strict=True)])
