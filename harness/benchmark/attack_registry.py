"""The registry of the paper's five attacks, in its order, and attacks of others."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attacks import attack_mode, cw2, mi_fgsm, pgd, pgd_ll
from harness.errors import UserError
from harness.models import import_callable
from mtlat import Model


class Attack(NamedTuple):
    """One row of a registry: x_adv = function(model, x, y, **keywords)."""

    function: Callable[..., Tensor]
    keywords: dict[str, Any]  # what the name promises; the function's defaults are the rest
    column: str = ""  # heading in the benchmark's table
    box: Literal["white-box", "black-box"] = "white-box"  # black-box: the model is the surrogate
    random: bool = True  # whether it draws a start, and takes `start`


ATTACKS: Mapping[str, Attack] = MappingProxyType({
    "pgd_0.04": Attack(pgd, {"epsilon": 0.04, "steps": 10}, "PGD"),
    "pgd_ll_0.04": Attack(pgd_ll, {"epsilon": 0.04, "steps": 10}, "PGD LL"),
    "cw2": Attack(cw2, {"confidence": 50.0, "steps": 40}, "CW2", random=False),
    **{f"mi_fgsm_{e}":
       Attack(mi_fgsm, {"epsilon": e, "steps": 10}, f"MI FGSM {e}", "black-box", random=False)
       for e in (0.04, 0.08)},
})  # fmt: skip


def load_attack(name: str, spec: str, seed: int) -> Attack:
    """Import an attack of others: a callable (model, x, y) -> x_adv.

    It gets the model in eval mode with frozen weights, copies of the images (B, 3, S, S) float32 in
    [0, 1], and of the class indices (B,) int64. torch's generator is seeded before every batch.
    `name` is its name in the report, and `spec` is `module:callable`.

    Raises:
        UserError: it cannot be imported, or does not take three arguments. The attack raises it
            unless x_adv has the shape, dtype and device of x, and finite pixels in [0, 1].
    """
    title = f"--attack {name}"
    function = import_callable(f"{title}=", spec, "model", "x", "y")

    def attack(model: Model, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(seed)
        with attack_mode(model, x, y) as (bare, images, labels):
            x_adv = function(bare, images, labels)
        if not isinstance(x_adv, Tensor):
            raise UserError(
                f"{title} returns {type(x_adv).__name__}; return x_adv, a tensor like x"
            )
        made, like = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (x_adv, x))
        if made != like:
            raise UserError(f"{title} returns {made}; x is {like}, and x_adv must be like it")
        low, high = (value.item() for value in x_adv.aminmax())
        if not 0 <= low <= high <= 1:  # refuses NaN
            raise UserError(f"{title} returns pixels from {low} to {high}; clip them to [0, 1]")
        return x_adv.detach()

    return Attack(attack, {}, random=False)
