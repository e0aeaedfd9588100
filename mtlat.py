"""M-TLAT: train on mixed images, and on mixed images attacked towards a random class.

Laugros, Caplier and Ospici, "Addressing Neural Network Robustness with Mixup and Targeted
Labeling Adversarial Training", 2020 (arXiv:2008.08384). One file, torch only: copy it.

    loss = F.cross_entropy(model(x), y)                     # before
    loss = mtlat_loss(model, x, y, num_classes=100)         # after; pixels of x in [0, 1]

Paper        Code                Paper        Code                  Paper         Code
Eq. 1        mixup               Eq. 5        targeted_fgsm         "Require"     draw, Draws
Eq. 4, 6     tlat                Algorithm 1  algorithm1            L             cross_entropy

Everywhere: x is (B, ...) float, pixels in [0, 1]; y and y_target are class indices (B,) int64 or
distributions (B, N) float; lam and epsilon are a float or (B,), in [0, 1]; N counts the classes.
Bad input raises ValueError or TypeError with the value, the rule and the fix.

Readings of the paper: what it leaves open, what is done here, how to do otherwise
 1. lambda, epsilon and the target are drawn per image, as Algorithm 1 is written for one set of
    couples. `per_batch=True` draws one pair of lambdas and one epsilon for the minibatch.
 2. The target is uniform over all classes, as printed. Otherwise: give `algorithm1` your `Draws`.
 3. `mtlat_loss` makes the four couples of one minibatch: itself and three random permutations.
    Otherwise: give `algorithm1` four independent minibatches.
 4. x_mtlat is not clipped to [0, 1], as Eq. 5 is printed. `clip=True` clips it.
 5. The attack runs in the mode the caller set (BatchNorm in training mode takes the batch's
    statistics) and moves no running statistics. Otherwise: call `tlat` in eval mode.
 6. Each loss has its own forward pass, so each half its own batch statistics, and the losses are
    summed. Otherwise: concatenate both halves for one forward pass and double its cross-entropy.
 7. x_mtlat is a constant in loss2, since sign has no slope; sign(0) = 0 leaves a pixel alone.
 8. epsilon is one number for image and label: normalise inside the model, by `Normalize`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]  # pixels (B, ...) -> logits (B, N)
Pair = tuple[Tensor, Tensor]  # (x, y)
Numbers = Tensor | float  # one per image (B,), or one for all

__all__ = ["Draws", "Losses", "Normalize", "algorithm1", "attack_loss", "cross_entropy", "draw"]
__all__ += ["frozen", "log_odds", "mixup", "mtlat_loss", "targeted_fgsm", "tlat"]


def mixup(
    x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, lam: Numbers, *, num_classes: int = 0
) -> Pair:
    """Eq. 1: mix two images, and their labels alike; lam is the weight of the first.

    Returns x_mix like x1 and y_mix (B, N). Two labels of class indices need `num_classes`.
    """
    check_images(x1, x2)
    y1, y2 = _distributions(x1, y1, y2, num_classes=num_classes)
    lam_x, lam_y = _per_image("lam", lam, x1), _per_image("lam", lam, y1)
    return lam_x * x1 + (1 - lam_x) * x2, lam_y * y1 + (1 - lam_y) * y2


def targeted_fgsm(
    model: Model, x: Tensor, y_target: Tensor, epsilon: Numbers,
    *, away: bool = False, steps: int = 1, clip: bool = False,
) -> Tensor:  # fmt: skip
    """Eq. 5: x - epsilon sign(grad_x L(x, y_target)), a step that makes the target likelier.

    `away` steps away from it: with the true label, the untargeted FGSM. `steps` > 1 is iterative
    (the paper's future work): steps of 2.5 epsilon / steps, epsilon at most, each projected back
    into the epsilon-ball. `clip` ends in [0, 1]. Takes `steps` forward and input-only backward
    passes; returns a detached tensor; leaves the model as it was.
    """
    check_images(x)
    if steps < 1:
        raise ValueError(f"steps is {steps}; the attack takes at least 1")
    epsilon = _per_image("epsilon", epsilon, x)
    step = epsilon * min(1.0, 2.5 / steps) * (-1 if away else 1)
    x_adv = x = x.detach()
    with frozen(model) as bare, torch.enable_grad():
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = attack_loss(bare(x_adv), y_target)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = (x_adv.detach() - step * gradient.sign()).clamp(x - epsilon, x + epsilon)
    return x_adv.clamp(0, 1) if clip else x_adv


def tlat(
    model: Model, x: Tensor, y: Tensor, y_target: Tensor, epsilon: Numbers, **attack: Any
) -> Pair:
    """Eq. 4, and Eq. 6 where (x, y) is mixed: the attacked image, labelled partly as its target.

    Returns x_adv = targeted_fgsm(..., **attack) and y_adv = (1-epsilon) y + epsilon y_target.
    """
    x_adv = targeted_fgsm(model, x, y_target, epsilon, **attack)
    y, y_target = _distributions(x, y, y_target, model=model)
    epsilon = _per_image("epsilon", epsilon, y)
    return x_adv, (1 - epsilon) * y + epsilon * y_target


class Draws(NamedTuple):
    """The random numbers of a step of Algorithm 1, one per image, (B,) each."""

    lam1: Tensor
    lam2: Tensor
    epsilon: Tensor
    target: Tensor


def draw(
    batch_size: int, num_classes: int, *, alpha: float, epsilon_max: float, per_batch: bool = False,
    generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Draws:  # fmt: skip
    """Algorithm 1, "Require": lam1, lam2 ~ Beta(alpha, alpha), epsilon ~ U[0, epsilon_max],
    target uniform over the classes. Drawn where the generator lives, returned on `device`.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; Beta(alpha, alpha) needs alpha > 0 (paper: 0.4)")
    if not 0 <= epsilon_max <= 1:
        raise ValueError(f"epsilon_max is {epsilon_max}; it must lie in [0, 1] (paper: 0.025)")
    if batch_size < 1 or num_classes < 2:
        raise ValueError(f"{batch_size} images, {num_classes} classes: 1 and 2 are the fewest")
    home = device if generator is None else generator.device
    u = torch.rand(9, 1 if per_batch else batch_size, generator=generator, device=home)
    target = torch.randint(num_classes, (batch_size,), generator=generator, device=home)
    drawn = _beta(alpha, u[:4]), _beta(alpha, u[4:8]), epsilon_max * u[8], target
    return Draws(*(t.expand(batch_size).to(device or home) for t in drawn))


class Losses(NamedTuple):
    """The two terms of Algorithm 1's loss, scalar means over the batch."""

    mixup: Tensor
    tlat: Tensor


def algorithm1(
    model: Model, pair1: Pair, pair2: Pair, pair3: Pair, pair4: Pair, draws: Draws, **attack: Any
) -> Losses:
    """Algorithm 1 as printed: four couples in, loss1 and loss2 out; their sum trains the model.

    `attack` is steps and clip of `targeted_fgsm`. Where all labels are class indices, the model is
    asked for N, with two images.
    """
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = pair1, pair2, pair3, pair4
    lam1, lam2, epsilon, target = draws
    y1, y2, y3, y4 = _distributions(x1, y1, y2, y3, y4, model=model)
    x_mix1, y_mix1 = mixup(x1, y1, x2, y2, lam1)
    loss1 = cross_entropy(model(x_mix1), y_mix1)
    x_mix2, y_mix2 = mixup(x3, y3, x4, y4, lam2)
    x_mtlat, y_mtlat = tlat(model, x_mix2, y_mix2, target, epsilon, **attack)
    loss2 = cross_entropy(model(x_mtlat), y_mtlat)
    return Losses(loss1, loss2)


def mtlat_loss(
    model: Model, x: Tensor, y: Tensor, *, num_classes: int, alpha: float = 0.4,
    epsilon_max: float = 0.025, per_batch: bool = False, generator: torch.Generator | None = None,
    **attack: Any,
) -> Tensor:  # fmt: skip
    """loss1 + loss2 of one minibatch and three permutations of it: the line for a training loop.

    Returns a scalar. Costs 8/3 of the plain step; BatchNorm's running statistics move twice.
    """
    (y,) = _distributions(x, y, num_classes=num_classes)
    draws = draw(len(x), num_classes, alpha=alpha, epsilon_max=epsilon_max, per_batch=per_batch,
                 generator=generator, device=x.device)  # fmt: skip
    home = x.device if generator is None else generator.device
    orders = torch.rand(3, len(x), generator=generator, device=home).argsort().to(x.device)
    pair2, pair3, pair4 = ((x[order], y[order]) for order in orders)
    losses = algorithm1(model, (x, y), pair2, pair3, pair4, draws, **attack)
    return losses.mixup + losses.tlat


class Normalize(nn.Module):
    """(x - mean) / std per channel of x (B, C, H, W); one number per channel, kept as buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not (len(mean) == len(std) > 0 and all(s > 0 for s in std)):
            raise ValueError(f"mean {mean} and std {std}: one of each per channel, every std > 0")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """L: the mean over the batch of -sum_k y_k log softmax(logits)_k, in float32 at least."""
    _check_fit(logits, y)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), y if y.ndim == 1 else y.to(wide))


def attack_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return a scalar whose gradient is a positive multiple of that of the batch's summed L.

    Cross-entropy's own gradient vanishes in float32 where p_y rounds to 1. That of the log-odds
    does not: for a class y it is cross-entropy's divided by 1 - p_y. Each image is weighted by its
    1 - p_y, since BatchNorm in training mode lets every image move every other image's logits. The
    weights are divided by the largest of the batch, and kept large enough for a backward pass in
    the logits' dtype. Soft labels have no such limit and keep the cross-entropy.
    """
    _check_fit(logits, y)
    limits = torch.finfo(logits.dtype)
    floor = math.log(limits.tiny * limits.eps) / 2  # half of its exponents, the other half is left
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = log_odds(logits, y if y.ndim == 1 else y.argmax(1))
    log_weight = F.logsigmoid(loss.detach())  # log(1 - p_y)
    if y.ndim == 2:
        one_hot = y.amax(1) == 1
        soft = -(y.to(logits.dtype) * logits.log_softmax(1)).sum(1)
        loss, log_weight = torch.where(one_hot, loss, soft), log_weight.where(one_hot, 0)
    return ((log_weight - log_weight.amax()).clamp_min(floor).exp() * loss).sum()


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Compute -log(p_y / (1 - p_y)) per image, (B,): logsumexp of the other logits minus logit y.

    One image alone is attacked alike by this and by L: the two gradients differ by a positive
    factor.
    """
    own = y[:, None]
    return logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)


@contextmanager
def frozen(model: Model) -> Iterator[Model]:
    """Let gradients reach the input alone, and keep BatchNorm's running statistics as they are.

    `torch.autograd.grad` skips the weights anyway, but a compiled model only if they are frozen.
    Training-mode BatchNorm goes on using the batch's statistics; it just does not remember them.
    Gives what to call: of DistributedDataParallel its module, as it awaits gradients of weights.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    on: list[tuple[Any, str]] = [(p, "requires_grad") for m in modules for p in m.parameters(False)]
    on += [(m, "track_running_stats") for m in modules if m.training]
    on = [(owner, flag) for owner, flag in on if getattr(owner, flag, False)]
    try:
        for owner, flag in on:
            setattr(owner, flag, False)
        yield model
    finally:
        for owner, flag in on:
            setattr(owner, flag, True)


def _beta(alpha: float, u: Tensor) -> Tensor:
    """Beta(alpha, alpha) from four rows of uniforms: exact, no rejection, no underflow.

    Ulrich (1984): (1 + sqrt(1 - u^(2 / (2a - 1))) cos(2 pi v)) / 2 ~ Beta(a, a) for a > 1/2. With
    a = alpha + 1 it is G1 / (G1 + G2) of two Gamma(a), and G u^(1/alpha) ~ Gamma(alpha).
    """
    log_u = torch.log(1 - u)  # 1 - u is in (0, 1]
    radius = torch.sqrt(-torch.expm1(log_u[0] * (2 / (2 * alpha + 1))))
    b = (1 + radius * torch.cos(2 * math.pi * u[1])) / 2
    return torch.sigmoid(torch.logit(b) + (log_u[2] - log_u[3]) / alpha)


def _distributions(
    x: Tensor, *labels: Tensor, num_classes: int = 0, model: Model | None = None
) -> list[Tensor]:
    """The labels of images x as checked (B, N); N is given, or a label's, or the model's."""
    n = num_classes or next((y.shape[1] for y in labels if y.ndim == 2), 0)
    if not n:
        if model is None:
            raise ValueError("class indices need num_classes=N; or give distributions (B, N)")
        with frozen(model) as bare, torch.no_grad():
            n = bare(x[:2]).shape[1]
    for y in labels:
        if y.shape not in {(len(x),), (len(x), n)}:
            wanted = f"({len(x)},) or ({len(x)}, {n})"
            raise ValueError(f"labels have shape {tuple(y.shape)}; these images need {wanted}")
        if y.dtype != torch.int64 if y.ndim == 1 else not y.is_floating_point():
            raise TypeError(f"labels are {y.dtype}; give int64 indices or float distributions")
        if y.ndim == 1:
            check_values("class indices", y, 0, n - 1, "count the classes from 0")
        else:
            check_values("label weights", y, 0, 1, "give probabilities, not logits")
            check_values("sums of label weights", y.sum(1), 1, 1, "divide each row by its sum")
    wide = torch.promote_types(x.dtype, torch.float32)
    return [F.one_hot(y, n).to(wide) if y.ndim == 1 else y for y in labels]


def _check_fit(logits: Tensor, y: Tensor) -> None:
    """Raise if the logits are not (B, N), or the labels (B,) or (B, N) are not theirs."""
    if logits.ndim != 2 or y.shape not in {logits.shape, logits.shape[:1]}:
        given, made = tuple(y.shape), tuple(logits.shape)
        raise ValueError(f"labels {given}, logits {made}; the model's N must be yours")
    if y.ndim == 1:
        check_values("labels", y, 0, logits.shape[1] - 1, "the model's N must be yours")


def _per_image(name: str, value: Numbers, like: Tensor) -> Tensor:
    """A float, or one number per image (B,), shaped to multiply `like` (B, ...)."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.shape not in {(), (len(like),)}:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give a float or ({len(like)},)")
    check_values(name, value, 0, 1, "it is a share of the label and of the pixels' range")
    return value.view(-1, *[1] * (like.ndim - 1))


def check_images(*images: Tensor) -> None:
    """Raise if images (B, ...) are no float pixels in [0, 1], all of one shape."""
    for x in images:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            kind = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"images are {kind}; give floating point: x.float() / 255")
        if x.shape != images[0].shape:
            raise ValueError(f"images {tuple(images[0].shape)} do not match {tuple(x.shape)}")
        check_values("pixels", x, 0, 1, "normalise inside the model, see Normalize")


_asked: set[str] = set()


def check_values(name: str, values: Tensor, low: int, high: int, fix: str) -> None:
    """Raise if values leave [low, high]; off the CPU at the first call only, as it stalls a GPU."""
    if not values.numel():
        raise ValueError(f"{name}: none; rule: at least one image; fix: leave out empty batches")
    place = f"{name} {values.device.type}"
    if values.device.type == "cpu" or place not in _asked:
        _asked.add(place)
        least, most = (v.item() for v in values.detach().aminmax())
        if not (low - 1e-3 <= least and most <= high + 1e-3):  # rounding passes, NaN does not
            raise ValueError(f"{name}: {least:g} to {most:g}; rule: [{low}, {high}]; fix: {fix}")
