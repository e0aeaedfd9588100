"""The five attacks of the M-TLAT paper's benchmark.

Laugros, Caplier and Ospici, "Addressing Neural Network Robustness with Mixup and Targeted
Labeling Adversarial Training", 2020 (arXiv:2008.08384), section 4.1 and Table 1. Needs mtlat.py.

    x_adv = pgd(model, x, y)
    accuracy = (model(x_adv).argmax(1) == y).float().mean()

Everywhere: the model maps pixels to logits (B, N) and normalises inside (`mtlat.Normalize`); x is
(B, ...) float32 or float64, pixels in [0, 1]; y is (B,) int64. x_adv is a new tensor like x, in
[0, 1], without a graph. Attacks run in eval mode, in full precision (no autocast, no TF32), take
the gradient of the input alone, and leave modes, parameters, their .grad and running statistics
as they were; a model that is no nn.Module is called as it is. No image's result depends on the
images beside it, but for the model's rounding. Passes are counted per image: F forward, B backward
to the input. Bad input raises ValueError or TypeError with the value, the rule and the fix.

What the paper leaves open, what is done here, how to do otherwise
 1. PGD steps by 2.5 epsilon / steps, 0.01 here (Madry et al.). Otherwise: `step_size`.
 2. PGD starts at random in its ball, as its reference does. Otherwise: `random_start=False`.
 3. PGD LL approaches the class least likely for the clean image, be it the true one, and its last
    iterate counts, though an earlier one may have fooled the model. Otherwise: `target`.
 4. MI-FGSM steps by epsilon / steps from the image itself, away from the true label (Dong et al.).
 5. CW2 keeps an image only if it is wrong by more than the confidence, and gives the others back
    unchanged, as the original does: at confidence 50 a high score can mean that the attack failed,
    not that the model is robust, so `cw2_result` tells. Rounds, constants and Adam's step are the
    original's. Otherwise: `rounds`, `const_range`, `step_size`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mtlat import Model, check_images, check_values, frozen, log_odds

__all__ = ["ATTACKS", "Attack", "CW2Result", "broken_gradients", "cw2", "cw2_result"]
__all__ += ["full_precision", "mi_fgsm", "pgd", "pgd_ll", "sign_noise"]


def pgd(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float = 0.04, steps: int = 10,
    step_size: float | None = None, restarts: int = 1, random_start: bool = True,
    start: Tensor | None = None, target: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Attack by projected gradient descent, L-infinity (Madry et al., ICLR 2018; paper: "PGD").

        x_0     = x + epsilon start                       clipped to [x - epsilon, x + epsilon]
        x_{t+1} = x_t + step_size sign(grad L(x_t, y))    and to [0, 1], both

    start: where the runs start, in units of epsilon, in [-1, 1], x.shape or (restarts, *x.shape).
        Drawn uniformly if None, where `generator` lives; then an image's start depends on its place
        in the batch. Give the starts where a result must not.
    target: classes (B,) int64 to approach, down L(x_t, target), in place of leaving y.
    restarts: runs from other starts, for the images that none has yet led to a wrong class; an
        image keeps the run that ends with the largest margin of a wrong class over y.

    Returns the last iterate. Takes `steps` F and B a run, and with restarts one F more for each, of
    the images that are still in it.
    """
    step = _check_steps(epsilon, steps, step_size, 2.5)
    _check_number("restarts", restarts, 1, "1 is a single run", whole=True)
    if restarts > 1 and start is None and not random_start:
        raise ValueError(f"restarts is {restarts}, random_start False: equal runs; change either")
    with _attacking(model, x, y) as (model, x, y):
        aim = y if target is None else _check_labels("target", target, x)
        offsets = epsilon * _starts(x, restarts, random_start, start, generator)
        step = step if target is None else -step
        x_adv = _climb(model, x, aim, offsets[0], epsilon, steps, step)
        if restarts == 1:
            return x_adv
        margin = _final_margin(model, x_adv, y)
        for offset in offsets[1:]:
            left = (margin <= 0).nonzero().squeeze(1)
            if not len(left):
                break
            end = _climb(model, x[left], aim[left], offset[left], epsilon, steps, step)
            found = _final_margin(model, end, y[left])
            better = found > margin[left]
            x_adv[left[better]], margin[left[better]] = end[better], found[better]
        return x_adv


def pgd_ll(
    model: Model, x: Tensor, y: Tensor, *, target: Tensor | None = None, **settings: Any
) -> Tensor:
    """Attack towards the least likely class (Kurakin et al., ICLR 2017; paper: "PGD LL").

    target: argmin_k logit_k of the clean image, (B,) int64. Found here if None, by one F more than
        `pgd` takes; whoever has the clean logits gives `logits.argmin(1)`.
    settings: those of `pgd`.
    """
    if target is None:
        with _attacking(model, x, y) as (bare, clean, labels), torch.no_grad():
            target = _logits(bare, clean, labels).argmin(1)
    return pgd(model, x, y, target=target, **settings)


def mi_fgsm(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float = 0.04, steps: int = 10,
    step_size: float | None = None, decay: float = 1.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Attack by momentum iterative FGSM (Dong et al., CVPR 2018; paper: "MI_FGSM").

        g_{t+1} = decay g_t + d / ||d||_1,  d = grad L(x_t, y)      g_0 = 0, x_0 = x
        x_{t+1} = x_t + step_size sign(g_{t+1})                     clipped as in `pgd`

    model: the surrogate; make the images once, and score every model under attack on them.
    generator: taken for the signature that the attacks share; nothing is drawn.

    Returns the last iterate. Takes `steps` F and B.
    """
    step = _check_steps(epsilon, steps, step_size, 1.0)
    _check_number("decay", decay, 0, "the original's is 1")
    with _attacking(model, x, y) as (model, x, y):
        return _climb(model, x, y, torch.zeros_like(x), epsilon, steps, step, decay)


class CW2Result(NamedTuple):
    """What CW2 made of each image: (B,), and x_adv like x."""

    x_adv: Tensor  # the nearest image found that is wrong by more than the confidence; x if none
    reached: Tensor  # bool, whether one was found; the attack gave up where False
    misclassified: Tensor  # bool, whether any iterate was wrong at all
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

        minimise ||x' - x||^2 + const max(0, confidence - margin(x')),   x' = (tanh(w) + 1) / 2

    over w, by Adam(step_size) from x afresh in each round. An image's first const is the largest:
    what that does not reach is given up, in a ninth of the time. The others' const is bisected, on
    a log scale. (The original climbs from the smallest by tens, then bisects: it reaches the same
    images, no nearer.) Iterates 0 to steps - 1 are judged, the first of them once for all rounds;
    an image reached there has nothing to gain and leaves.

    Report `reached` beside an accuracy. At confidence 0, the median of l2 is the informative
    number: the length of the smallest step that fools the model.
    generator: taken for the signature that the attacks share; nothing is drawn.

    Takes 1 + rounds (steps - 1) F and 1 + rounds (steps - 2) B at most, 352 and 343, but 40 and 39
    for an image given up, and 1 and 1 for one that is reached at once.
    """
    _check_number("confidence", confidence, 0, "it is a margin of logits (paper: 50)")
    _check_number("steps", steps, 2, "the first iterate is the image (paper: 40)", whole=True)
    _check_number("step_size", step_size, 0, "it is Adam's learning rate (original: 0.01)")
    _check_number("rounds", rounds, 1, "1 tells whom the largest const reaches", whole=True)
    least, most = const_range
    _check_number("const_range[0]", least, 1e-12, "it is a weight above 0 (original: 0.001)")
    _check_number("const_range[1]", most, least, "give (smallest, largest)")
    with _attacking(model, x, y) as (model, x, y):
        w = torch.atanh((2 * x - 1) * 0.999999).requires_grad_()  # finite at black and white
        margin = _margin(_logits(model, _pixels(w), y), y)
        (slope,) = torch.autograd.grad(margin.sum(), w)
        w, margin = w.detach(), margin.detach()
        reached = margin > confidence
        image, distance = torch.where(_spread(reached, x), _pixels(w), x), torch.zeros_like(margin)
        low, high = torch.full_like(margin, least), torch.full_like(margin, most)
        const, left = high.clone(), (~reached).nonzero().squeeze(1)
        distance[left] = math.inf
        for _ in range(rounds):
            if not len(left):
                break
            image[left], distance[left], margin[left], hit = _cw2_round(
                model, w[left], slope[left], y[left], const[left],
                (image[left], distance[left], margin[left]), confidence, steps, step_size,
            )  # fmt: skip
            high[left[hit]], low[left[~hit]] = const[left[hit]], const[left[~hit]]
            left = left[low[left] < high[left]]  # whom the largest const misses has no range left
            const = (low * high).sqrt()
        l2 = (image - x).flatten(1).norm(dim=1)
        return CW2Result(image, distance < math.inf, margin > 0, margin, l2)


def sign_noise(
    model: Model, x: Tensor, y: Tensor, *, epsilon: float = 0.04, start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Move every value by +-epsilon at random, to [0, 1]: what an attack of that size must beat.

    start: numbers as `pgd` takes them, whose signs are taken. Takes no passes.
    """
    _check_number("epsilon", epsilon, 0, "it is a share of the pixels' range (paper: 0.04)", 1)
    with _attacking(model, x, y) as (model, x, y):
        return (x + epsilon * _starts(x, 1, True, start, generator)[0].sign()).clamp(0, 1)


def broken_gradients(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Tell of each image whether its input gradient is all zero, or not finite: (B,) bool.

    Such an image's score says nothing, for no attack here knows where to move it. Takes 1 F, 1 B.
    """
    with _attacking(model, x, y) as (model, x, y):
        gradient = _gradient(model, x, y).flatten(1)
        return (gradient == 0).all(1) | ~gradient.isfinite().all(1)


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
            "projected gradient descent away from the true class", "PGD 0.04",
        ),
        "pgd_ll_0.04": Attack(
            pgd_ll, {"epsilon": 0.04, "steps": 10},
            "projected gradient descent towards the least likely class", "PGD LL 0.04",
        ),
        "cw2": Attack(
            cw2, {"confidence": 50.0, "steps": 40},
            "the nearest image (L2) wrong by a margin of logits above 50", "CW2", random=False,
        ),
        "mi_fgsm_0.04": Attack(
            mi_fgsm, {"epsilon": 0.04, "steps": 10},
            "momentum iterative FGSM on the surrogate", "MI-FGSM 0.04", "black-box", False,
        ),
        "mi_fgsm_0.08": Attack(
            mi_fgsm, {"epsilon": 0.08, "steps": 10},
            "momentum iterative FGSM on the surrogate", "MI-FGSM 0.08", "black-box", False,
        ),
    }
)  # fmt: skip


# Where PyTorch may round float32 to TF32 or bfloat16 in multiplications.
_UNITS: tuple[Any, ...] = attrgetter(
    "cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"
)(torch.backends)  # fmt: skip


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 as float32: no TF32, no bfloat16.

    PyTorch keeps this twice, and raises where a model reads an old setting that differs from the
    new: both are set. Where they differ already, the old one cannot be read, and stays.
    """
    cudnn: Any = torch.backends.cudnn
    with ExitStack() as after:  # which restores the old ones first: they change the new
        for unit in _UNITS:
            after.callback(setattr, unit, "fp32_precision", unit.fp32_precision)
        with suppress(RuntimeError):
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        with suppress(RuntimeError):
            after.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        for unit in _UNITS:
            unit.fp32_precision = "ieee"
        yield


@contextmanager
def _attacking(model: Model, x: Tensor, y: Tensor) -> Iterator[tuple[Model, Tensor, Tensor]]:
    """Check x and y, and give what to call, and copies; the model is as an attack needs it."""
    if x.dtype not in {torch.float32, torch.float64}:
        raise TypeError(f"images are {x.dtype}; attacks need full precision: x.float(), in [0, 1]")
    if not len(x):
        raise ValueError(f"images have shape {tuple(x.shape)}; attack at least one")
    check_images(x)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [module.training for module in modules]
    try:
        for module in modules:  # not model.eval(): what it makes of that could not be taken back
            module.training = False
        with (
            frozen(model) as bare,
            full_precision(),
            torch.inference_mode(False),  # which switches gradients on, under no_grad as well
            torch.autocast(x.device.type, enabled=False),
        ):
            yield bare, x.detach().clone(), _check_labels("labels", y, x)
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def _climb(
    model: Model, x: Tensor, labels: Tensor, offset: Tensor, epsilon: float, steps: int,
    step: float, decay: float | None = None,
) -> Tensor:  # fmt: skip
    """The loop of PGD, and with `decay` of MI-FGSM; a negative step goes towards the labels."""
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    x_adv = (x + offset).clamp(low, high)
    momentum = torch.zeros_like(x)
    for _ in range(steps):
        direction = _gradient(model, x_adv, labels)
        if decay is not None:
            # The floor is for gradients of 0 alone: a surer surrogate's are tiny, but directions.
            norm = direction.abs().flatten(1).sum(1).clamp_min(1e-30)
            momentum = direction = decay * momentum + direction / _spread(norm, x)
        x_adv = (x_adv + step * direction.sign()).clamp(low, high)
    return x_adv


def _cw2_round(
    model: Model, w: Tensor, slope: Tensor, y: Tensor, const: Tensor,
    best: tuple[Tensor, Tensor, Tensor], confidence: float, steps: int, step_size: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One run of CW2's optimiser: improves (image, distance, margin), and tells who was reached."""
    image, distance, margin = best
    hit = torch.zeros_like(y, dtype=torch.bool)
    origin, w = _pixels(w), w.clone().requires_grad_()
    gradient = -_spread(const, w) * slope  # of the whole loss: at the origin distance has no slope
    adam = torch.optim.Adam([w], lr=step_size)
    for step in range(1, steps):
        w.grad = gradient
        adam.step()
        x_adv = _pixels(w)
        moved = (x_adv - origin).square().flatten(1).sum(1)
        wrong_by = _margin(_logits(model, x_adv, y), y)
        if step < steps - 1:  # nobody would judge where another update leads
            loss = moved + const * (confidence - wrong_by).clamp_min(0)
            (gradient,) = torch.autograd.grad(loss.sum(), w)
        x_adv, moved, wrong_by = x_adv.detach(), moved.detach(), wrong_by.detach()
        success = wrong_by > confidence
        closer = success & (moved < distance)
        image = torch.where(_spread(closer, x_adv), x_adv, image)
        distance = torch.where(closer, moved, distance)
        margin = torch.maximum(margin, wrong_by)
        hit |= success
    return image, distance, margin, hit


def _starts(
    x: Tensor, restarts: int, random: bool, start: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """The starts of all runs in units of epsilon, (restarts, *x.shape): given, drawn, or zero."""
    shape = (restarts, *x.shape)
    if start is None:
        if not random:
            return x.new_zeros(shape)
        home = x.device if generator is None else generator.device
        drawn = torch.empty(shape, dtype=x.dtype, device=home)
        return drawn.uniform_(-1, 1, generator=generator).to(x.device)
    if start.shape != (x.shape if restarts == 1 else shape):
        wanted = tuple(x.shape if restarts == 1 else shape)
        raise ValueError(f"start has shape {tuple(start.shape)}; {restarts} runs need {wanted}")
    check_values("start", start, -1, 1, "give it in units of epsilon")
    return start.to(x).reshape(shape)


def _gradient(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the summed log-odds with respect to the pixels.

    In eval mode no image moves another's logits: its log-odds and its cross-entropy have gradients
    of the same direction, and only the former survives rounding when the model is certain.
    """
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_odds(_logits(model, x, labels), labels).sum(), x)
    return gradient


def _logits(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """The model's logits, found to be some, and to know the labels."""
    logits = model(x)
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        found = tuple(logits.shape)
        raise ValueError(f"the model gives shape {found}; logits are ({len(x)}, N), N at least 2")
    check_values("class indices", labels, 0, logits.shape[1] - 1, "count the classes from 0")
    return logits


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """By how much the best wrong class leads y, (B,); above 0 is misclassified."""
    own = y[:, None]
    return logits.scatter(1, own, -math.inf).amax(1) - logits.gather(1, own).squeeze(1)


@torch.no_grad()
def _final_margin(model: Model, x_adv: Tensor, y: Tensor) -> Tensor:
    return _margin(_logits(model, x_adv, y), y)


def _pixels(w: Tensor) -> Tensor:
    return (torch.tanh(w) + 1) / 2


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """(B,) shaped to broadcast over x (B, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _check_labels(name: str, y: Tensor, x: Tensor) -> Tensor:
    """A copy of the class indices; one that autograd takes, whatever mode y was made in."""
    if y.dtype != torch.int64:
        raise TypeError(f"{name} are {y.dtype}; give int64 class indices: y.long()")
    if y.shape != (len(x),):
        raise ValueError(f"{name} have shape {tuple(y.shape)}; these images need ({len(x)},)")
    return y.clone()


def _check_steps(epsilon: float, steps: int, step_size: float | None, reach: float) -> float:
    """Return the step's size: by default such that all steps together reach `reach` epsilon."""
    _check_number("epsilon", epsilon, 0, "it is a share of the pixels' range (paper: 0.04)", 1)
    _check_number("steps", steps, 1, "paper: 10", whole=True)
    step = reach * epsilon / steps if step_size is None else step_size
    _check_number("step_size", step, 0, "the direction is the attack's, or `target`'s")
    return step


def _check_number(
    name: str, value: float, low: float, fix: str, high: float = math.inf, whole: bool = False
) -> None:
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
        kind = "an int" if whole else "a float"
        raise TypeError(f"{name} is {value!r}; rule: {kind} from {low:g} to {high:g}; {fix}")
    if not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} is {value}; rule: from {low:g} to {high:g}; {fix}")
