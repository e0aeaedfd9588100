"""Manifold Mixup (Verma et al., 2019) with TLAT on top, which the paper names as future work.

Hidden representations are mixed instead of images. Both images of a mix share one perturbation
delta, and the attack follows the gradient through the mixed forward pass at delta = 0:

    x3 - epsilon sign(grad_delta L), x4 - epsilon sign(grad_delta L)

At the input this is Algorithm 1: lam (x3 + delta) + (1 - lam) (x4 + delta) = x_mix + delta.
"""

import difflib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError, is_explained
from harness.models import compute_logits
from harness.training.methods import Method
from mtlat import Draws, Pair, cross_entropy, frozen, target_labels, targeted_fgsm

INPUT = "input"  # names the images themselves, which `mtlat.mixup` mixes
METHODS_THAT_MIX = ("mixup", "mtlat")
_ANOTHER = ": name another submodule"


def draw_layer(names: list[str], generator: torch.Generator) -> str:
    """Draw one of the names, uniformly. Takes no random number if there is only one."""
    if len(names) == 1:
        return names[0]
    return names[int(torch.randint(len(names), (), generator=generator))]


def losses_at(
    name: str, method: Method, model: nn.Module, pairs: list[Pair], draws: Draws, steps: int
) -> Iterator[Tensor]:
    """Yield the losses of a step that mixes at the named place.

    Args:
        name: `INPUT`, or the name of a submodule, at whose output a method of `METHODS_THAT_MIX`
            mixes.
        method, model, pairs, draws, steps: as in `harness.training.methods`.
    """
    if name == INPUT:
        yield from method.losses(model, pairs, draws, steps)
        return
    (x1, y1), (x2, y2), *others = pairs
    logits = mixed_logits(model, name, x1, x2, draws.lam1)
    yield cross_entropy(logits, _mix(y1, y2, draws.lam1))
    if others:
        (x3, y3), (x4, y4) = others
        lam, epsilon, target = draws.lam2, draws.epsilon, draws.target
        with frozen(model):
            delta = targeted_fgsm(
                lambda delta: mixed_logits(model, name, x3 + delta, x4 + delta, lam),
                torch.zeros_like(x3), target, epsilon, steps=steps,
            )  # fmt: skip
        logits = mixed_logits(model, name, x3 + delta, x4 + delta, lam)
        yield cross_entropy(logits, target_labels(_mix(y3, y4, lam), target, epsilon))  # Eq. 6


def mixed_logits(model: nn.Module, name: str, x1: Tensor, x2: Tensor, lam: Tensor) -> Any:
    """Return the model's output for images that are mixed inside the model, x1 with x2.

    Args:
        model: calls the submodule once in a forward pass.
        name: a submodule, whose output is one tensor with the batch in its first dimension.
        x1, x2: images (B, ...).
        lam: weights of the first ones (B,).

    Raises:
        UserError: the model or the submodule is not of that kind.
    """
    calls = []

    def mix(module: nn.Module, args: Any, hidden: Any) -> Tensor:
        calls.append(module)
        if len(calls) > 1:
            raise UserError(f"--mix-at {name}: a forward pass calls it more than once{_ANOTHER}")
        if not isinstance(hidden, Tensor) or hidden.shape[:1] != (2 * len(x1),):
            found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UserError(
                f"--mix-at {name}: its output for {2 * len(x1)} images is {found}, and must be one"
                f" tensor with the batch first{_ANOTHER}"
            )
        first, second = hidden.chunk(2)
        return _mix(first, second, lam)

    # Reading: both images of a mix are in one batch up to the place where they are mixed. BatchNorm
    # before it normalizes them by the same statistics, and updates the running ones once per loss,
    # as behind it. Otherwise: pass x1 and x2 one after the other.
    with model.get_submodule(name).register_forward_hook(mix):
        output = model(torch.cat([x1, x2]))
    if not calls:
        raise UserError(f"--mix-at {name}: a forward pass does not call it{_ANOTHER}")
    return output


def _mix(first: Tensor, second: Tensor, lam: Tensor) -> Tensor:
    """Mix tensors (B, ...), computed in the precision of `lam` (B,) at least."""
    lam = lam.to(torch.promote_types(first.dtype, lam.dtype)).view(-1, *[1] * (first.ndim - 1))
    return (lam * first + (1 - lam) * second).to(first.dtype)


def check_mix_at(names: list[str], model: nn.Module, x: Tensor, num_classes: int) -> None:
    """Raise `UserError` unless the model can mix images x (B, ...) at each of the names."""
    known = [name for name, _ in model.named_modules()]
    for name in names:
        if name == INPUT:
            continue
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, known, 3) or known[1:4])
            raise UserError(f"--mix-at {name}: no such submodule; close names: {INPUT}, {close}")
        try:
            with frozen(model):
                lam = torch.ones(len(x), device=x.device)
                shape = compute_logits(partial(mixed_logits, model, name, x2=x, lam=lam), x).shape
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            if is_explained(error):
                raise
            shape = None
        if shape != (len(x), num_classes):
            raise UserError(
                f"--mix-at {name}: mixing there halves the batch, and the model then fails, for"
                " example because a shortcut goes around the submodule: name the block with both"
            )
