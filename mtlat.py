"""M-TLAT: train on mixed images, and on mixed images attacked towards a random class.

Laugros, Caplier and Ospici, "Addressing Neural Network Robustness with Mixup and Targeted
Labeling Adversarial Training", 2020 (arXiv:2008.08384). One file, torch only: copy it. Comments
that begin with "Reading" mark what the paper leaves open, and the alternative, if any.

    loss = F.cross_entropy(model(x), y)                     # before
    loss = mtlat_loss(model, x, y, num_classes=100)         # after; pixels of x in [0, 1]

Paper          Code                Paper      Code             Paper      Code
Algorithm 1    algorithm1          Eq. 1      mixup            Eq. 5      targeted_fgsm
"Require"      Draws, draw         Eq. 4, 6   target_labels    L          cross_entropy

Shapes: images x are (B, ...), floating point, in [0, 1]; labels y are distributions over N classes,
(B, N); a target is class indices (B,) or distributions (B, N); lam and epsilon are a float or (B,),
in [0, 1]. A model is an nn.Module that returns logits (B, N), an object with `.logits`, or a tuple
or list that begins with logits; or a function that calls no DDP and no BatchNorm in training mode.
Bad images, labels and ranges raise ValueError or TypeError with value, rule and fix. On a GPU each
check of values stops after it has passed once. Keep images in float32: bfloat16 rounds the attack.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

Model = Callable[[Tensor], Any]  # see "Shapes"
Pair = tuple[Tensor, Tensor]  # (x, y)
Numbers = Tensor | float  # one per image (B,), or one for all

ALPHA, EPSILON_MAX = 0.4, 0.025  # the paper's
__all__ = ["Draws", "Normalize", "algorithm1", "cross_entropy", "draw", "mixup", "mtlat_loss"]
__all__ += ["target_labels", "targeted_fgsm"]


class Draws(NamedTuple):
    """The random numbers of one step of Algorithm 1, one per image, (B,) each."""

    lam1: Tensor
    lam2: Tensor
    epsilon: Tensor
    target: Tensor  # class indices; or distributions, (B, N)


def algorithm1(
    model: Model, pair1: Pair, pair2: Pair, pair3: Pair, pair4: Pair, draws: Draws,
    *, steps: int = 1, clip: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield loss1 and loss2 of Algorithm 1, scalars. Train on their sum.

    Call loss1.backward() before asking for loss2: then only one minibatch's activations are kept.

    Args:
        pair1, pair2, pair3, pair4: couples of images and labels; steps, clip: see `targeted_fgsm`.
    """
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = pair1, pair2, pair3, pair4
    lam1, lam2, epsilon, target = draws  # "Require"
    x_mix1, y_mix1 = mixup(x1, y1, x2, y2, lam1)  # Eq. 1
    # Reading 1: each loss has its own forward pass, so BatchNorm uses the statistics of its images
    # alone. Otherwise: concatenate x_mix1 and x_mtlat, and double the cross-entropy of the whole.
    yield cross_entropy(model(x_mix1), y_mix1)  # loss1
    x_mix2, y_mix2 = mixup(x3, y3, x4, y4, lam2)  # Eq. 1
    # Reading 2: epsilon is the same number in the pixels and in the label, so pixels are in [0, 1]
    # and normalization belongs inside the model (`Normalize`).
    x_mtlat = targeted_fgsm(model, x_mix2, target, epsilon, steps=steps, clip=clip)  # Eq. 5
    y_mtlat = target_labels(y_mix2, target, epsilon)  # Eq. 6
    yield cross_entropy(model(x_mtlat), y_mtlat)  # loss2


def draw(
    batch_size: int, num_classes: int, *, alpha: float, epsilon_max: float, per_batch: bool = False,
    generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Draws:  # fmt: skip
    """Draw lam1, lam2 ~ Beta(alpha, alpha), epsilon ~ U[0, epsilon_max], and a uniform target.

    With `per_batch` all images share lam1, lam2 and epsilon. `generator` is of the CPU or of CUDA,
    by default torch's global one of `device`. Returns on `device`, by default the generator's.
    """
    if not 1e-30 <= alpha <= 1e30:  # float32 holds these
        raise ValueError(f"alpha is {alpha}; it must lie in [1e-30, 1e30] (paper: 0.4)")
    if not 0 <= epsilon_max <= 1:
        raise ValueError(f"epsilon_max is {epsilon_max}; it must lie in [0, 1] (paper: 0.025)")
    if batch_size < 1 or num_classes < 2:
        raise ValueError(f"{batch_size} images, {num_classes} classes: need at least 1 and 2")
    home = torch.device(device or "cpu") if generator is None else generator.device
    home = torch.device("cpu") if home.type == "mps" else home  # MPS draws no gamma variates
    # Reading 3: Algorithm 1 shows one set of couples, so every image has lambdas and an epsilon of
    # its own. Otherwise: `per_batch`.
    size = 1 if per_batch else batch_size
    # Beta(a, a) = G1 / (G1 + G2) with G1, G2 ~ Gamma(a), and Gamma(a) = Gamma(a + 1) U^(1/a). In
    # logarithms, because Gamma(a) underflows for small a.
    kind: Any = {"dtype": torch.float32, "device": home}  # whatever torch's default dtype is
    gamma = torch._standard_gamma(torch.full((2, 2, size), alpha + 1.0, **kind), generator)
    u = torch.rand(2, 2, size, generator=generator, **kind)
    log_g1, log_g2 = gamma.log() + torch.log1p(-u) / alpha  # 1 - u is in (0, 1]
    lam1, lam2 = torch.sigmoid(log_g1 - log_g2)
    epsilon = epsilon_max * torch.rand(size, generator=generator, **kind)
    # Reading 4: the target may be any class, including those of the mixed images, as printed.
    target = torch.randint(num_classes, (batch_size,), generator=generator, device=home)
    return Draws(*(t.expand(batch_size).to(device or home) for t in (lam1, lam2, epsilon, target)))


def mixup(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, lam: Numbers) -> Pair:
    """Mix two images and their labels, Eq. 1. `lam` is the weight of the first."""
    check_images(x1, x2)
    check_labels(x1, y1, y2)
    lam_x, lam_y = _per_image("lam", lam, x1), _per_image("lam", lam, y1)
    return lam_x * x1 + (1 - lam_x) * x2, lam_y * y1 + (1 - lam_y) * y2


def targeted_fgsm(
    model: Model, x: Tensor, target: Tensor, epsilon: Numbers,
    *, away: bool = False, steps: int = 1, clip: bool = False,
) -> Tensor:  # fmt: skip
    """Attack images by one step towards their target, Eq. 5: x - epsilon sign(grad_x L(x, target)).

    Args:
        model: see "Shapes", above. Its parameters, their gradients and BatchNorm's running
            statistics stay as they are.
        epsilon: size of the step, of pixels in [0, 1].
        away: step away from `target`; with the true label this is the untargeted FGSM.
        steps: above 1, the attack is iterative (the paper's future work): each step has the size
            min(epsilon, 2.5 epsilon / steps), and ends in the epsilon-ball around x.
        clip: clip the result to [0, 1], see Reading 7.

    Returns the attacked images, detached. Costs `steps` forward and input-only backward passes.
    """
    check_images(x)
    if steps < 1:
        raise ValueError(f"steps is {steps}; the attack takes at least 1")
    epsilon = _per_image("epsilon", epsilon, x).detach()
    step = epsilon * min(1.0, 2.5 / steps) * (-1 if away else 1)
    x_adv = x = x.detach()  # Reading 5: x_mtlat is constant in loss2, as sign has gradient 0
    # Reading 6: the attack runs in the mode that the caller set. In training mode BatchNorm uses
    # the batch's statistics, without updating the running ones. Otherwise: set eval mode for it.
    with frozen(model), torch.enable_grad():
        for _ in range(steps):
            copy = x_adv.clone().requires_grad_()  # in case the model changes it under no_grad
            gradient = grad_of(attack_loss(model(copy), target), copy)  # its sign is that of L's
            x_adv = (x_adv - step * gradient.sign()).clamp(x - epsilon, x + epsilon)
    # Reading 7: the result may leave [0, 1] by epsilon, as Eq. 5 is printed.
    return x_adv.clamp(0, 1) if clip else x_adv


def target_labels(y: Tensor, target: Tensor, epsilon: Numbers) -> Tensor:
    """Label attacked images partly as their target, Eq. 4 and 6: (1-epsilon) y + epsilon target."""
    check_labels(y, y)
    check_labels(y, target, num_classes=y.shape[1])
    target = F.one_hot(target, y.shape[1]).to(y.dtype) if target.ndim == 1 else target
    epsilon = _per_image("epsilon", epsilon, y)
    return (1 - epsilon) * y + epsilon * target


def cross_entropy(logits: Any, y: Tensor) -> Tensor:
    """Compute L: the batch mean of -sum_k y_k log softmax(logits)_k, in float32 at least."""
    logits = logits_of(logits, y)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), y if y.ndim == 1 else y.to(wide))


def mtlat_loss(
    model: Model, x: Tensor, y: Tensor, *, num_classes: int, alpha: float = ALPHA,
    epsilon_max: float = EPSILON_MAX, per_batch: bool = False,
    generator: torch.Generator | None = None, steps: int = 1, clip: bool = False,
) -> Tensor:  # fmt: skip
    """Compute loss1 + loss2 of Algorithm 1 on one minibatch: the line for a training loop.

    Args:
        model, x: see "Shapes", above.
        y: class indices (B,) int64, or distributions (B, N), with N = num_classes.
        alpha, epsilon_max, per_batch, generator, steps, clip: see `draw` and `targeted_fgsm`.

    Returns a scalar. Costs 8/3 of a standard step with `steps` 1, and updates BatchNorm twice.
    """
    check_images(x)
    draws = draw(len(x), num_classes, alpha=alpha, epsilon_max=epsilon_max, per_batch=per_batch,
                 generator=generator, device=x.device)  # fmt: skip
    check_labels(x, y, num_classes=num_classes)
    y = F.one_hot(y, num_classes).to(x.dtype) if y.ndim == 1 else y
    if y.element_size() < 4:  # in half precision, the sums of mixed labels would not round to 1
        y = F.normalize(y.float(), p=1.0, dim=1)
    # Reading 8: the four couples are the minibatch and three random permutations of it. Otherwise:
    # give `algorithm1` four independent minibatches. (An image may be mixed with itself.)
    home = (generator or x).device
    keys = torch.rand(3, len(x), generator=generator, dtype=torch.float32, device=home)
    pair2, pair3, pair4 = ((x[order], y[order]) for order in keys.argsort().to(x.device))
    loss1, loss2 = algorithm1(model, (x, y), pair2, pair3, pair4, draws, steps=steps, clip=clip)
    return loss1 + loss2


class Normalize(nn.Module):
    """Layer that computes (x - mean) / std per channel of x (B, C, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        positive = all(s > 0 for s in std)
        if not (len(mean) == len(std) > 0 and positive and all(0 <= m <= 1 for m in mean)):
            rule = "one of each per channel, of pixels in [0, 1], every std > 0"
            raise ValueError(f"mean {mean} and std {std}: {rule}; divide by 255 if given in levels")
        columns = (torch.tensor(v, dtype=torch.get_default_dtype()) for v in (mean, std))
        self.mean, self.std = (nn.Buffer(column.view(-1, 1, 1)) for column in columns)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


# ---------------- The method ends here. What follows is numerics and input checks.

_checked: set[str] = set()  # kinds of values that were right once, see `check_values`


def attack_loss(logits: Any, y: Tensor) -> Tensor:
    """Compute a scalar whose gradient is a positive number times that of the batch's summed L.

    Where p_y rounds to 1, L's gradient vanishes in float32. That of the log-odds against y does
    not; times 1 - p_y, it is equal to L's. These weights matter in training mode, where BatchNorm
    lets every image change all logits. They are divided by the largest (hence the number), and
    clamped, so that no backward pass underflows. Images with soft labels take L itself.
    """
    logits = logits_of(logits, y)
    limits = torch.finfo(logits.dtype)
    floor = math.log(limits.tiny * limits.eps) / 2  # half of the exponents; gradients have the rest
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    y = (y if y.ndim == 2 else F.one_hot(y, logits.shape[1])).to(logits.dtype)
    hard = y.amax(1) == 1  # a single class
    log_odds = log_odds_against(logits, y.argmax(1))
    loss = torch.where(hard, log_odds, -(y * logits.log_softmax(1)).sum(1))
    log_weight = F.logsigmoid(log_odds.detach()).where(hard, 0)  # log(1 - p_y)
    return ((log_weight - log_weight.amax()).clamp_min(floor).exp() * loss).sum()


def grad_of(loss: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of a loss with respect to x. Raise if none reaches x."""
    gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        fix = "freeze weights by requires_grad_(False), not no_grad or detach; no inference_mode"
        raise TypeError(f"no gradient reaches the images; {fix}")
    return gradient


def logits_of(output: Any, y: Tensor) -> Tensor:
    """Return the logits in a model's output. Raise unless they are (B, N) and the labels fit."""
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) and logits else logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returns {type(logits).__name__}; give logits ({len(y)}, N)")
    if len(made := tuple(logits.shape)) != 2 or made[1] < 2:
        raise ValueError(f"the model returns shape {made}; logits are ({len(y)}, N), N above 1")
    check_labels(logits, y, num_classes=made[1], sums=False)  # Table 3's LS sums to less than 1
    return logits


def log_odds_against(logits: Tensor, y: Tensor) -> Tensor:
    """Compute log((1 - p_y) / p_y) per image, (B,). Its gradient is L's divided by 1 - p_y."""
    own = y[:, None]
    return logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Let gradients reach the input alone, and keep running statistics. Not thread-safe."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    weights = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    changes: list[Any] = [(m, "track_running_stats", False) for m in modules if m.training]
    ins = [m for m, *_ in changes if isinstance(m, nn.modules.instancenorm._InstanceNorm)]
    changes += [(m, b, None) for m in ins for b in ("running_mean", "running_var")]  # moved anyway
    # Compiled models compute the gradients of weights that require any, and DDP awaits them.
    changes += [(p, "requires_grad", False) for *_, p in weights if p.is_leaf]
    changes += [(m, "forward", m.module.__call__) for m in modules if isinstance(m, DDP)]
    # Lightning Fabric's hook raises in a backward pass that Fabric did not start, such as this.
    changes += [(m, "_register_backward_hook", lambda output: output) for m in modules]
    with ExitStack() as after:  # undoes the changes, the last one first

        @after.callback
        def follow() -> None:  # FSDP2 may have put other weights in their places
            for m, name, old in weights:
                if isinstance(new := getattr(m, name, None), nn.Parameter):
                    new.requires_grad_(old.requires_grad)

        if not modules:
            after.enter_context(nn.modules.module.register_module_forward_pre_hook(_refuse_hidden))
        for owner, name, value in changes:
            if (old := getattr(owner, name, None)) is not None:
                hides = callable(old) and name not in vars(owner)  # a method of the class
                after.callback(*((delattr, owner, name) if hides else (setattr, owner, name, old)))
                setattr(owner, name, value)
        yield


def _refuse_hidden(m: nn.Module, _: Any) -> None:
    """Raise if a function calls a module that `frozen` would have to change."""
    if isinstance(m, DDP) or (m.training and getattr(m, "track_running_stats", False)):
        raise TypeError(f"the model is a function that hides {type(m).__name__}: give an nn.Module")


def _per_image(name: str, value: Numbers, like: Tensor) -> Tensor:
    """Shape a float, or one number per image (B,), to multiply `like` (B, ...)."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.shape not in {(), (len(like),)}:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give a float or ({len(like)},)")
    check_values(name, value, 0, 1, "give a share, such as 8 / 255 for 8 levels")
    return value.view(-1, *[1] * (like.ndim - 1))


def check_images(*images: Tensor) -> None:
    """Raise unless all images (B, ...) are floating point, in [0, 1], and of one shape."""
    for x in images:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"images are {kind}; give a floating point tensor: x.float() / 255")
        if x.shape != images[0].shape:
            raise ValueError(f"images {tuple(images[0].shape)} do not match {tuple(x.shape)}")
        check_values("pixels", x, 0, 1, "divide by 255, or put Normalize inside the model")


def check_labels(x: Tensor, *labels: Tensor, num_classes: int = 0, sums: bool = True) -> None:
    """Raise unless labels are distributions (B, N) or, where N is given, class indices (B,)."""
    for y in labels:
        if not isinstance(y, Tensor):
            raise TypeError(f"labels are {type(y).__name__}; give a tensor of class indices")
        b, n = x.shape[:1].numel(), num_classes or labels[0].shape[-1:].numel()  # 1 without axes
        if y.shape not in ([(b,), (b, n)] if num_classes else [(b, n)]):
            rule = f"({b},) or ({b}, {n})" if num_classes else f"({b}, N)"
            rule = f"images or logits {tuple(x.shape)} need {rule}; is N right? Indices become"
            raise ValueError(f"labels have shape {tuple(y.shape)}; {rule} F.one_hot(y, N).float()")
        if not (y.dtype == torch.int64 if y.ndim == 1 else y.is_floating_point()):
            raise TypeError(f"labels are {y.dtype}; give int64 indices (B,), or float (B, N)")
        if y.ndim == 1:
            check_values("class indices", y, 0, n - 1, "count the classes from 0")
            continue
        check_values("label weights", y, 0, 1, "give probabilities, not logits")
        if sums:
            check_values("sums of labels", y.sum(1), 1, 1, "divide each row by its sum, in float32")


def check_values(name: str, values: Tensor, low: int, high: int, fix: str) -> None:
    """Raise unless all values are in [low, high]. On a GPU, look until they were right once."""
    if not values.numel():
        raise ValueError(f"{name}: none; rule: at least one image; fix: leave out empty batches")
    place = f"{name} {values.device.type}"
    if values.device.type == "cpu" or place not in _checked:  # reading a value stalls a GPU
        least, most = (v.item() for v in values.detach().aminmax())
        if not (low - 1e-3 <= least and most <= high + 1e-3):  # allows rounding, refuses NaN
            raise ValueError(f"{name}: {least:g} to {most:g}; rule: [{low}, {high}]; fix: {fix}")
        _checked.add(place)
