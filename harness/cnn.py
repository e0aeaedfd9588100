"""Networks that learn the embedded set in minutes on a CPU: small ones, and residual ones."""

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

# Convolutions at the full, half and quarter resolution.
CONVOLUTIONS = {"cnn4": (1, 1, 2), "cnn6": (2, 2, 2)}
WIDTH = 24  # channels at the full resolution; twice as many at each further one


def build_cnn(name: str, num_classes: int) -> nn.Module:
    """Build 3x3 convolutions with BatchNorm and ReLU, a global average, and a linear layer.

    Args:
        name: one of `CONVOLUTIONS`.
        num_classes: number of logits.
    """
    layers: list[nn.Module] = []
    channels = 3
    for level, convolutions in enumerate(CONVOLUTIONS[name]):
        if level:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            width = WIDTH * 2**level
            conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers)


def start_as_identity(model: nn.Module) -> None:
    """Let each of torchvision's residual blocks begin as the identity.

    The scale of the last BatchNorm of every block becomes 0 (Goyal et al., 2017, arXiv:1706.02677,
    section 5.1). A ResNet-50 then learns the embedded set in the few updates of its recipe.
    """
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            if last.weight is not None:
                nn.init.zeros_(last.weight)
