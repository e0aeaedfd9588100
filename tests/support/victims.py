"""Provide models to attack, with images and labels."""

import torch
from torch import Tensor, nn


def images(seed: int, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return noise images in which a tenth of the values is 0 and a tenth is 1."""
    x = torch.rand(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (x * 1.25 - 0.125).clamp(0, 1)


def labels(seed: int, batch: int = 3, classes: int = 4) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))


def network(dtype: torch.dtype = torch.float64, gain: float = 1.0) -> nn.Sequential:
    """Return a network in eval mode with BatchNorm, dropout and large weights.

    BatchNorm and dropout make the output depend on the mode. The large weights make the loss
    strongly curved, so that the result of an attack depends on its steps.
    """
    torch.manual_seed(7)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 4),
    ).to(dtype)  # fmt: skip
    for name, factor in {
        "0.weight": 4,
        "5.weight": 4,
        "7.weight": 4 * gain,
        "7.bias": gain,
    }.items():
        net.get_parameter(name).data *= factor
    return net.eval()


class Linear(nn.Module):
    """Linear model of two classes, for which the result of each attack has a closed form.

    Logit 1 minus logit 0 is the dot product of x - 1/2 and `slope`.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        slope = torch.randn(108, generator=generator, dtype=torch.float64)
        self.slope = nn.Parameter(slope)

    def forward(self, x: Tensor) -> Tensor:
        lead = (x.flatten(1) - 0.5) @ self.slope
        return torch.stack([0.3 - lead / 2, 0.3 + lead / 2], 1)


def away(model: Linear, y: Tensor) -> Tensor:
    """Return, for each image, the sign of the input gradient of the loss for label y."""
    return ((1 - 2 * y)[:, None] * model.slope.detach().sign()).view(-1, 3, 6, 6)


def lead(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return, for each image, the largest wrong logit minus the logit of the label."""
    logits = model(x).detach().tolist()
    rows = zip(logits, y.tolist(), strict=True)
    return x.new_tensor([max(r[:k] + r[k + 1 :]) - r[k] for r, k in rows])
