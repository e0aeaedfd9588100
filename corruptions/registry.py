"""The registry: the nineteen corruptions in the paper's order, and three for validation.

Each family has a file, with the tables of parameters of severities 1 to 5 for three profiles, sides
in pixels: 224 (ImageNet-C), 64 (Tiny-ImageNet-C) and 32 (CIFAR-10-C). They are those of the
original scripts (Hendrycks and Dietterich, ICLR 2019).

`NAME(images, severity, *fields, profile=)` corrupts uint8 (B, 3, H, W) images, and returns the raw
result of the same shape: uint8, or float32 in [0, 255] up to rounding. The fields are random
numbers. Where NAME takes any, `draw_NAME(stream, severity, size, profile)` draws them for B images
of `size` (H, W), in NAME's order, and its docstring has their names, dtypes and shapes
(`draw_shot_noise` takes `images=`, too). `corrupt` checks the arguments, draws, adds 1/4096 and
truncates. So about one in 4,096 of the values that are not integers is a level higher than the
original's. `corruptions.apply` says why.
"""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from corruptions import blur, digital, geometric, noise, weather

PROFILES = (224, 64, 32)  # sides in pixels: ImageNet-C, Tiny-ImageNet-C, CIFAR-10-C
SEVERITIES = (1, 2, 3, 4, 5)
MIN_SIDE = 16


class Corruption(NamedTuple):
    """Functions of one corruption, and its place in the benchmark."""

    function: Callable[..., Tensor]  # (images, severity, *fields, profile=) -> raw
    draw: Callable[..., tuple[Tensor, ...]] | None  # (stream, severity, size, profile) -> fields
    family: str  # noise, blur, weather, digital, paper or validation
    severities: tuple[int, ...]
    column: str  # column heading in the benchmark's tables
    description: str


def _registry(*rows: tuple[str, Callable[..., Tensor], str, str]) -> Mapping[str, Corruption]:
    """Build the registry. Names and draw functions follow from the function names."""
    entries = {}
    for family, function, column, description in rows:
        name = function.__name__
        draw = getattr(sys.modules[function.__module__], f"draw_{name}", None)
        entries[name] = Corruption(function, draw, family, SEVERITIES, column, description)
    return MappingProxyType(entries)


CORRUPTIONS = _registry(
    ("noise", noise.gaussian_noise, "Gauss", "Gaussian noise, as from a sensor in low light"),
    ("noise", noise.shot_noise, "Shot", "Poisson noise of photon counts"),
    ("noise", noise.impulse_noise, "Impul", "single values set to black or white"),
    ("blur", blur.defocus_blur, "Defocus", "lens out of focus"),
    ("blur", blur.glass_blur, "Glass", "view through frosted glass"),
    ("blur", blur.motion_blur, "Motion", "moving camera"),
    ("blur", blur.zoom_blur, "Zoom", "camera moving forward"),
    ("weather", weather.snow, "Snow", "falling snow"),
    ("weather", weather.fog, "Fog", "cloud of plasma noise"),
    ("weather", weather.frost, "Frost", "ice crystals on the lens"),
    ("weather", weather.brightness, "Bright", "higher brightness with the same hue and saturation"),
    ("digital", digital.contrast, "Contr", "each channel blended with its mean"),
    ("digital", digital.elastic_transform, "Elastic", "affine map and smooth displacements"),
    ("digital", digital.pixelate, "Pixelate", "shrinking, then enlarging by repetition"),
    ("digital", digital.jpeg_compression, "Jpeg", "strong JPEG compression"),
    ("paper", geometric.occlusion, "Obstru", "gray square at a random position"),
    ("paper", geometric.color_distortion, "Color", "constant added to one channel"),
    ("paper", geometric.translation, "Trans", "shift along both axes"),
    ("paper", geometric.rotation, "Rot", "rotation about the center"),
)

# ImageNet-C's corruptions for tuning hyper-parameters. No mean over corruptions contains them.
# Its fourth, spatter, is left out, because its pixels depend on OpenCV's edge detector and on its
# approximate distance transform.
VALIDATION_CORRUPTIONS = _registry(
    ("validation", noise.speckle_noise, "Speckle", "noise in proportion to the pixel value"),
    ("validation", blur.gaussian_blur, "Gauss blur", "Gaussian blur"),
    ("validation", digital.saturate, "Saturate", "weaker or stronger saturation"),
)

ALL_CORRUPTIONS = MappingProxyType({**CORRUPTIONS, **VALIDATION_CORRUPTIONS})
