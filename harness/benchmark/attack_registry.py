"""The registry of the paper's five attacks, in its order."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor

from attacks import cw2, mi_fgsm, pgd, pgd_ll


class Attack(NamedTuple):
    """One row of a registry: x_adv = function(model, x, y, **keywords)."""

    function: Callable[..., Tensor]
    keywords: dict[str, Any]  # what the name promises; the function's defaults are the rest
    description: str
    column: str = ""  # heading in the benchmark's table
    box: Literal["white-box", "black-box"] = "white-box"  # black-box: the model is the surrogate
    random: bool = True  # whether it draws a start, and takes `start`


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "pgd_0.04": Attack(
            pgd, {"epsilon": 0.04, "steps": 10},
            "projected gradient descent away from the true class", "PGD",
        ),
        "pgd_ll_0.04": Attack(
            pgd_ll, {"epsilon": 0.04, "steps": 10},
            "projected gradient descent towards the least likely class", "PGD LL",
        ),
        "cw2": Attack(
            cw2, {"confidence": 50.0, "steps": 40},
            "the nearest image (L2) wrong by a margin of logits above 50", "CW2", random=False,
        ),
        "mi_fgsm_0.04": Attack(
            mi_fgsm, {"epsilon": 0.04, "steps": 10},
            "momentum iterative FGSM on the surrogate", "MI FGSM 0.04", "black-box", False,
        ),
        "mi_fgsm_0.08": Attack(
            mi_fgsm, {"epsilon": 0.08, "steps": 10},
            "momentum iterative FGSM on the surrogate", "MI FGSM 0.08", "black-box", False,
        ),
    }
)  # fmt: skip
