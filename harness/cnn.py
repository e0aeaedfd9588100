"""Small convolutional networks, which learn the embedded set in a minute on a CPU."""

from torch import nn

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
