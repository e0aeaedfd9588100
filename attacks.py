"""The five attacks of the M-TLAT paper's benchmark.

Laugros, Caplier and Ospici, "Addressing Neural Network Robustness with Mixup and Targeted
Labeling Adversarial Training", 2020 (arXiv:2008.08384), section 4.1 and Table 1. Needs mtlat.py.

    x_adv = pgd(model, x, y)
    accuracy = (model(x_adv).argmax(1) == y).float().mean()

In every attack, `model` is as in mtlat.py and normalizes inside (`mtlat.Normalize`), x is (B, ...)
float32 or float64 in [0, 1], and y is (B,) int64. x_adv is a new tensor like x, in [0, 1], without
a graph. Attacks run in eval mode and in full precision (no autocast, no TF32). Call eval() yourself
on modules that a function or a Python list hides. Attacks compute the gradient of the input alone,
and leave modes, parameters, .grad and running statistics unchanged. During an attack, use no model
in another thread: the attack sets the precision of the whole process. Do not attack a sharded model
by CW2, or by PGD with restarts: the number of their forward passes depends on the images, and every
process must make all of them. Except for PGD's random starts, an image's result does not depend on
the rest of the batch, up to the model's rounding. Costs are per image: F forward passes, B backward
passes to the input. Bad images, labels and ranges raise ValueError or TypeError with the value, the
rule and the fix.

What the paper leaves open, the reading taken here, and the option for another one:
 1. PGD's step is 2.5 epsilon / steps, here 0.01 (Madry et al.). Otherwise: `step_size`.
 2. PGD starts at a random point of its ball, as its reference does. Otherwise: `random_start`.
 3. PGD LL approaches the class that is least likely for the clean image, even if it is the true
    class. Its last iterate counts, even if an earlier one fooled the model. Otherwise: `target`.
 4. MI-FGSM's step is epsilon / steps, from the image, away from the true label (Dong et al.).
 5. CW2 returns an image unchanged if it cannot make it wrong by more than the confidence. So does
    the original, whose settings are the defaults. At confidence 50 a high score can mean that the
    attack failed, not that the model is robust: `cw2_result` tells.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlat import Model, check_images, check_values, frozen, grad_of, log_odds_against, logits_of

__all__ = ["CW2Result", "cw2", "cw2_result", "full_precision", "mi_fgsm", "pgd", "pgd_ll"]


def pgd(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float = 0.04, steps: int = 10,
    step_size: float | None = None, restarts: int = 1, random_start: bool = True,
    start: Tensor | None = None, target: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Attack by projected gradient descent, L-infinity (Madry et al., ICLR 2018; paper: "PGD").

        x_0     = x + epsilon start                       clipped to [x - epsilon, x + epsilon]
        x_{t+1} = x_t + step_size sign(grad L(x_t, y))    and to [0, 1], both

    Args:
        epsilon, steps, step_size: radius of the ball, number and length of the steps.
        restarts: number of runs. Each has another start, and attacks images that none has fooled.
            An image keeps the run that ends with the largest margin of a wrong class over y.
        random_start: start at a random point of the ball instead of at x.
        start: starts in units of epsilon, in [-1, 1], x.shape, or (restarts, *x.shape) for several
            runs. Those drawn from `generator` depend on the image's place in the batch.
        target: class indices (B,) to approach, descending L(x_t, target), instead of leaving y.

    Returns the last iterate. Costs `steps` F and B per run, and with restarts one more F per run.
    """
    step = _check_steps(epsilon, steps, step_size, 2.5)
    check_number("restarts", restarts, 1, "1 is a single run", whole=True)
    if restarts > 1 and start is None and not random_start:
        raise ValueError(f"restarts is {restarts}, random_start False: equal runs; change either")
    with attack_mode(model, x, y) as (model, x, y):
        aim = y if target is None else _check_labels("targets", target, x)
        offsets = epsilon * draw_starts(x, restarts, random_start, start, generator)
        step = step if target is None else -step
        if restarts == 1:
            return _climb(model, x, aim, offsets[0], epsilon, steps, step)
        x_adv, margin = x.clone(), x.new_full((len(x),), -math.inf)
        for offset in offsets:
            left = (margin <= 0).nonzero().squeeze(1)
            if not len(left):
                break
            end = _climb(model, x[left], aim[left], offset[left], epsilon, steps, step)
            with torch.no_grad():
                found = _margin(logits_of(model(end.clone()), y[left]), y[left]).to(margin.dtype)
            better = found > margin[left]
            x_adv[left[better]], margin[left[better]] = end[better], found[better]
        return x_adv


def pgd_ll(
    model: Model, x: Tensor, y: Tensor, *, target: Tensor | None = None, **settings: Any
) -> Tensor:
    """Attack towards the least likely class (Kurakin et al., ICLR 2017; paper: "PGD LL").

    `target`, (B,) int64, is the clean image's least likely class; None takes one more F.
    `settings` are further arguments of `pgd`.
    """
    if target is None:
        with attack_mode(model, x, y) as (bare, clean, labels), torch.no_grad():
            target = logits_of(bare(clean), labels).argmin(1)
    return pgd(model, x, y, target=target, **settings)


def mi_fgsm(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float = 0.04, steps: int = 10,
    step_size: float | None = None, decay: float = 1.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Attack by momentum iterative FGSM (Dong et al., CVPR 2018; paper: "MI_FGSM").

        g_{t+1} = decay g_t + d / ||d||_1,  d = grad L(x_t, y)      g_0 = 0, x_0 = x
        x_{t+1} = x_t + step_size sign(g_{t+1})                     clipped as in `pgd`

    `model` is the surrogate: attack it once, and score all models on the images. `generator` is
    unused. Returns the last iterate. Costs `steps` F and B.
    """
    step = _check_steps(epsilon, steps, step_size, 1.0)
    check_number("decay", decay, 0, "the original's is 1")
    with attack_mode(model, x, y) as (model, x, y):
        return _climb(model, x, y, torch.zeros_like(x), epsilon, steps, step, decay)


class CW2Result(NamedTuple):
    """Per-image result of the CW2 attack: (B,) each, and x_adv like x."""

    x_adv: Tensor  # the nearest image found that is wrong by more than the confidence, otherwise x
    reached: Tensor  # bool, whether one was found; where False, the attack gave up
    misclassified: Tensor  # bool, whether any iterate was wrong
    margin: Tensor  # the largest margin of a wrong class over y at any iterate
    l2: Tensor  # Euclidean norm of x_adv - x over all its pixels


def cw2(model: Model, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """Attack by Carlini and Wagner's L2 method (IEEE S&P 2017; paper: "CW2"): see `cw2_result`."""
    return cw2_result(model, x, y, **settings).x_adv


def cw2_result(
    model: Model, x: Tensor, y: Tensor, *, confidence: float = 50.0, steps: int = 40,
    step_size: float = 0.01, rounds: int = 9, const_range: tuple[float, float] = (1e-3, 1e5),
    generator: torch.Generator | None = None,
) -> CW2Result:  # fmt: skip
    """Search the nearest image whose margin max_{k != y} logit_k - logit_y exceeds `confidence`.

        minimize ||x' - x||^2 + const max(0, confidence - margin(x')),   x' = (tanh(w) + 1) / 2

    over w, in each of `rounds` by `steps` iterates of Adam, of which the first is x. The first
    round uses the largest const: an image that it does not reach is given up. The const of the
    others is bisected on a log scale. (The original climbs to it by factors of ten, then bisects.)

    Report `reached` beside an accuracy. At confidence 0, the median of `l2` is the informative
    number: the length of the smallest step that fools the model. `generator` is unused. Costs at
    most 1 + rounds (steps - 1) F and 1 + rounds (steps - 2) B; 40 and 39 where it gives up.
    """
    check_number("confidence", confidence, 0, "it is a margin of logits (paper: 50)")
    check_number("steps", steps, 2, "the first iterate is the image (paper: 40)", whole=True)
    check_number("step_size", step_size, 0, "it is Adam's learning rate (original: 0.01)")
    check_number("rounds", rounds, 1, "1 tells what the largest const reaches", whole=True)
    least, most = const_range
    check_number("const_range[0]", least, 1e-12, "it is a weight (original: 0.001)")
    check_number("const_range[1]", most, least, "give (smallest, largest)", 1e15)
    with attack_mode(model, x, y) as (model, x, y):
        w = torch.atanh((2 * x - 1) * 0.999999).requires_grad_()  # finite at black and white
        logits = logits_of(model((torch.tanh(w) + 1) / 2), y)
        if logits.dtype == torch.float16:
            raise TypeError("logits are float16, where CW2's gradient overflows; use model.float()")
        margin = _margin(logits, y).to(x.dtype)
        slope = grad_of(margin.sum(), w)
        w, margin = w.detach(), margin.detach()
        reached = margin > confidence
        image = torch.where(_spread(reached, x), (torch.tanh(w) + 1) / 2, x)
        distance = torch.zeros_like(margin).masked_fill(~reached, math.inf)
        low, high = (torch.full_like(margin, const) for const in (least, most))
        const, left = high.clone(), (~reached).nonzero().squeeze(1)
        for _ in range(rounds):
            if not len(left):
                break
            image[left], distance[left], margin[left], hit = _cw2_round(
                model, w[left], slope[left], y[left], const[left],
                (image[left], distance[left], margin[left]), confidence, steps, step_size,
            )  # fmt: skip
            hits, misses = left[hit], left[~hit]
            high[hits], low[misses] = const[hits], const[misses]
            left = left[low[left] < high[left]]  # an image that the largest const missed leaves
            const = (low * high).sqrt()
        l2 = (image - x).flatten(1).norm(dim=1)
        return CW2Result(image, distance < math.inf, margin > 0, margin, l2)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 in float32 inside the block: no TF32, no bfloat16."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    # Where PyTorch may round float32 to TF32 or bfloat16 in multiplications.
    units = cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn
    # PyTorch raises when a model reads an old setting that differs from the new one: set both.
    with ExitStack() as after:  # restores the old settings first, because they change the new
        for unit in units:
            after.callback(setattr, unit, "fp32_precision", unit.fp32_precision)
        with suppress(RuntimeError):
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        with suppress(RuntimeError):
            after.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        for unit in units:
            unit.fp32_precision = "ieee"
        yield


@contextmanager
def attack_mode(model: Model, x: Tensor, y: Tensor) -> Iterator[tuple[Model, Tensor, Tensor]]:
    """Check x and y, and yield the model, in eval mode and frozen, and copies of x and y."""
    check_images(x)
    if x.dtype not in {torch.float32, torch.float64}:
        raise TypeError(f"images are {x.dtype}; attacks need full precision: x.float(), in [0, 1]")
    with ExitStack() as after:
        # Not model.eval(), which a model may override with lasting effects.
        for module in list(model.modules()) if isinstance(model, nn.Module) else []:
            after.callback(setattr, module, "training", module.training)
            module.training = False
        with (
            frozen(model),
            full_precision(),
            torch.inference_mode(False),  # which enables gradients, under no_grad too
            torch.autocast(x.device.type, enabled=False),
        ):
            # Pixels may be outside by rounding, where CW2's arctanh has no value.
            yield model, x.detach().clamp(0, 1), _check_labels("labels", y, x)


def _climb(
    model: Model, x: Tensor, labels: Tensor, offset: Tensor, epsilon: float, steps: int,
    step: float, decay: float | None = None,
) -> Tensor:  # fmt: skip
    """Run PGD, or with `decay` MI-FGSM. A negative step goes towards the labels."""
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    x_adv = (x + offset).clamp(low, high)
    momentum = torch.zeros_like(x)
    for _ in range(steps):
        direction = input_gradient(model, x_adv, labels)
        if decay is not None:
            # The floor is for zero gradients alone: tiny ones are still directions.
            norm = direction.abs().flatten(1).sum(1).clamp_min(1e-30)
            momentum = direction = decay * momentum + direction / _spread(norm, x)
        x_adv = (x_adv + step * direction.sign()).clamp(low, high)
    return x_adv


def _cw2_round(
    model: Model, w: Tensor, slope: Tensor, y: Tensor, const: Tensor,
    best: tuple[Tensor, Tensor, Tensor], confidence: float, steps: int, step_size: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run CW2's optimizer once. Returns improved (image, distance, margin), and what it reached."""
    image, distance, margin = best
    hit = torch.zeros_like(y, dtype=torch.bool)
    origin, w = (torch.tanh(w) + 1) / 2, w.clone().requires_grad_()
    gradient = -_spread(const, w) * slope  # of the whole loss: the distance has no slope at x
    adam = torch.optim.Adam([w], lr=step_size)
    for step in range(1, steps):
        w.grad = gradient
        adam.step()
        x_adv = (torch.tanh(w) + 1) / 2
        moved = (x_adv - origin).square().flatten(1).sum(1)
        output = model(x_adv.clone())  # the model may change its input in place
        wrong_by = _margin(logits_of(output, y), y).to(w.dtype)
        if step < steps - 1:  # the result of another update would not be judged
            loss = (moved + const * (confidence - wrong_by).clamp_min(0)).sum()
            gradient = grad_of(loss, w)
        x_adv, moved, wrong_by = x_adv.detach(), moved.detach(), wrong_by.detach()
        success = wrong_by > confidence
        closer = success & (moved < distance)
        image = torch.where(_spread(closer, x_adv), x_adv, image)
        distance = torch.where(closer, moved, distance)
        margin = torch.maximum(margin, wrong_by)
        hit |= success
    return image, distance, margin, hit


def draw_starts(
    x: Tensor, restarts: int, random: bool, start: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Return the starts of all runs in units of epsilon, (restarts, *x.shape)."""
    shape = (restarts, *x.shape)
    if start is None:
        if not random:
            return x.new_zeros(shape)
        home = x.device if generator is None else generator.device
        drawn = torch.empty(shape, dtype=x.dtype, device=home)
        return drawn.uniform_(-1, 1, generator=generator).to(x.device)
    wanted = tuple(x.shape) if restarts == 1 else shape
    made = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
    if made != wanted:
        raise ValueError(f"start is {made}; {restarts} runs need a tensor of shape {wanted}")
    check_values("start", start, -1, 1, "give it in units of epsilon")
    return start.detach().to(x).reshape(shape)


def input_gradient(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the summed log-odds against the labels, with respect to the pixels.

    In eval mode no image moves another's logits: the log-odds and the cross-entropy have gradients
    of the same direction, and only the former survives rounding when the model is certain.
    """
    x = x.detach().clone().requires_grad_()  # the model may change it without a gradient
    logits = logits_of(model(x), labels)
    return grad_of(log_odds_against(logits, labels).sum(), x)


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the margin of the best wrong class over y, (B,); above 0 is misclassified."""
    own = y[:, None]
    return logits.scatter(1, own, -math.inf).amax(1) - logits.gather(1, own).squeeze(1)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Shape values (B,) to broadcast over x (B, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _check_labels(name: str, y: Tensor, x: Tensor) -> Tensor:
    """Return a copy of the class indices, which autograd accepts even from inference mode."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{name} are {kind}; give int64 class indices: torch.as_tensor(y).long()")
    if y.shape != (len(x),):
        raise ValueError(f"{name} have shape {tuple(y.shape)}; these images need ({len(x)},)")
    return y.clone()


def _check_steps(epsilon: float, steps: int, step_size: float | None, reach: float) -> float:
    """Return the step's size, by default such that all steps together are `reach` epsilon long."""
    check_number("epsilon", epsilon, 0, "it is a share of the pixels' range (paper: 0.04)", 1)
    check_number("steps", steps, 1, "paper: 10", whole=True)
    step = reach * epsilon / steps if step_size is None else step_size
    check_number("step_size", step, 0, "`target` decides the direction")
    return step


def check_number(
    name: str, value: float, low: float, fix: str, high: float = math.inf, whole: bool = False
) -> None:
    """Raise unless the value is a number from low to high; `fix` ends the message."""
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
        kind = "an int" if whole else "a float"
        raise TypeError(f"{name} is {value!r}; rule: {kind} from {low:g} to {high:g}; {fix}")
    if not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} is {value}; rule: from {low:g} to {high:g}; {fix}")
