"""Nineteen common image corruptions as batched tensor operations, seeded per image, on any device.

Fifteen corruptions come from ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019). Given its random numbers and frost
photographs they give its pixels, some up to rounding. Four come from the M-TLAT paper (Laugros et
al., 2020, section 4.1). Three are for tuning hyper-parameters: `VALIDATION_CORRUPTIONS`.

    from corruptions import CORRUPTIONS, corrupt
    foggy = corrupt(images, "fog", 3, seed=0, index=indices)

`corruptions.registry` says which functions a corruption has. They also accept random numbers from
any other source, for example those of the original implementation.
"""

from corruptions.apply import corrupt
from corruptions.calibration import calibrate
from corruptions.frost import frost_source
from corruptions.registry import (
    ALL_CORRUPTIONS,
    CORRUPTIONS,
    MIN_SIDE,
    PROFILES,
    SEVERITIES,
    VALIDATION_CORRUPTIONS,
    Corruption,
)
from corruptions.rng import Stream
from corruptions.transform import Corrupt, CorruptedDataset

__all__ = [
    "ALL_CORRUPTIONS",
    "CORRUPTIONS",
    "MIN_SIDE",
    "PROFILES",
    "SEVERITIES",
    "VALIDATION_CORRUPTIONS",
    "Corrupt",
    "CorruptedDataset",
    "Corruption",
    "Stream",
    "calibrate",
    "corrupt",
    "frost_source",
]
