"""Nineteen common corruptions of images, batched, seeded per image, on any device.

The fifteen of ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", ICLR 2019) with the original's pixels, and the four of the
M-TLAT paper (Laugros, Caplier and Ospici, 2020, section 4.1).

    from corruptions import CORRUPTIONS, corrupt
    fogged = corrupt(images, "fog", 3, seed=0, index=numbers)

Each random corruption is two functions of its family's file: `draw_NAME` draws its random fields
from a `Stream`, `NAME` applies them, and takes any others as well, the original's for instance.
"""

import difflib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corruptions import blur, digital, geometric, noise, weather
from corruptions.calibration import calibrate
from corruptions.frost import frost_source
from corruptions.rng import Stream

__all__ = [
    "CORRUPTIONS",
    "MIN_SIDE",
    "PROFILES",
    "SEVERITIES",
    "Corruption",
    "Stream",
    "calibrate",
    "corrupt",
    "frost_source",
]

PROFILES = (224, 64, 32)  # sides in pixels: ImageNet-C, Tiny-ImageNet-C, CIFAR-10-C
SEVERITIES = (1, 2, 3, 4, 5)
MIN_SIDE = 16

# Many results are integers but for float rounding (constant areas, full white): truncation must not
# take a level from them, on any device. The guard is above float32's error there, and lifts only
# one in 4096 of the other results over an integer.
_TRUNCATION_GUARD = 2.0**-12
# Images of 224 x 224 px worked on at a time: on a CPU so few that the temporaries stay in the cache
# and their memory is used again.
_CHUNK = {"cpu": 4}
_CHUNK_ELSEWHERE = 64


class Corruption(NamedTuple):
    """One corruption: how to apply and to draw it, and where it stands in the benchmark."""

    function: Callable[..., Tensor]  # (images, severity, *fields, profile=) -> raw float32
    draw: Callable[..., tuple[Tensor, ...]] | None  # (stream, severity, size, profile) -> fields
    family: str  # noise, blur, weather, digital or paper
    severities: tuple[int, ...]
    column: str  # heading in the benchmark's table
    description: str


def _registry(*rows: tuple[str, Callable[..., Tensor], str, str]) -> Mapping[str, Corruption]:
    """Complete the rows (family, function, column, description), names and draws by convention."""
    entries = {}
    for family, function, column, description in rows:
        name = function.__name__
        draw = getattr(sys.modules[function.__module__], f"draw_{name}", None)
        entries[name] = Corruption(function, draw, family, SEVERITIES, column, description)
    return MappingProxyType(entries)


CORRUPTIONS = _registry(
    ("noise", noise.gaussian_noise, "Gauss", "normal noise, as of a sensor in low light"),
    ("noise", noise.shot_noise, "Shot", "Poisson noise of photon counts"),
    ("noise", noise.impulse_noise, "Impul", "single values black or white"),
    ("blur", blur.defocus_blur, "Defoc", "a lens out of focus"),
    ("blur", blur.glass_blur, "Glass", "seen through frosted glass"),
    ("blur", blur.motion_blur, "Motio", "a camera that moves"),
    ("blur", blur.zoom_blur, "Zoom", "a camera that moves forward"),
    ("weather", weather.snow, "Snow", "falling snow"),
    ("weather", weather.fog, "Fog", "a cloud of plasma noise"),
    ("weather", weather.frost, "Frost", "ice crystals on the lens"),
    ("weather", weather.brightness, "Brigh", "brighter, colours kept"),
    ("digital", digital.contrast, "Contr", "every channel pulled towards its mean"),
    ("digital", digital.elastic_transform, "Elast", "an affine map and smooth displacements"),
    ("digital", digital.pixelate, "Pixel", "shrunk, then enlarged by repetition"),
    ("digital", digital.jpeg_compression, "JPEG", "strong JPEG compression"),
    ("paper", geometric.occlusion, "Occlu", "a grey square at a random place"),
    ("paper", geometric.color_distortion, "Color", "a constant added to one channel"),
    ("paper", geometric.translation, "Trans", "moved along both axes"),
    ("paper", geometric.rotation, "Rotat", "turned about the centre"),
)


def corrupt(
    images: Tensor,
    name: str,
    severity: int | None,
    *,
    seed: int = 0,
    index: Tensor | Sequence[int] | None = None,
    profile: int | str = "auto",
    **options: Any,
) -> Tensor:
    """Corrupt a batch of images; the draws depend on (seed, name, severity, image number) alone.

    Args:
        images: RGB (B, 3, H, W), sides of at least `MIN_SIDE`; uint8, or floating point in [0, 1],
            which is rounded to the 1/255 grid first. Left untouched.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5; for the paper's four also None, which draws it for every image.
        seed: any integer.
        index: the images' numbers in their set, integers (B,); 0 to B - 1 if None.
        profile: whose parameters: 224, 64 or 32, or "auto" for the nearest to the shorter side.
        options: the keyword-only arguments of the corruption's own functions.

    Returns:
        A new tensor of the same shape, dtype and device, on the 1/255 grid.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    entry, severity = _check_name(name, severity)
    seed = _check_integer("seed", seed)
    pixels = _check_images(images)
    numbers = _check_index(index, pixels)
    profile = _check_profile(profile, pixels)
    draw_options, options = _sort_options(name, entry, options)
    height, width = pixels.shape[2:]
    out = torch.empty_like(pixels)
    chunk = _CHUNK.get(pixels.device.type, _CHUNK_ELSEWHERE) * 224 * 224 // (height * width)
    for start in range(0, len(pixels), max(1, chunk)):
        part = slice(start, start + max(1, chunk))
        fields: tuple[Tensor, ...] = ()
        if entry.draw is not None:
            if "images" in draw_options:
                draw_options["images"] = pixels[part]
            stream = Stream(seed, name, severity, numbers[part])
            fields = entry.draw(stream, severity, (height, width), profile, **draw_options)
        raw = entry.function(pixels[part], severity, *fields, profile=profile, **options)
        out[part] = raw.add_(_TRUNCATION_GUARD)
    return out if images.dtype == torch.uint8 else out.to(images.dtype).div_(255)


def _check_integer(what: str, value: Any) -> int:
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{what} must be an integer, got {value!r}") from None


def _check_name(name: str, severity: int | None) -> tuple[Corruption, int | None]:
    """Look the corruption up and check that it has this severity."""
    entry = CORRUPTIONS.get(name)
    if entry is None:
        close = difflib.get_close_matches(str(name), CORRUPTIONS)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(CORRUPTIONS)}"
        )
        raise ValueError(f"unknown corruption {name!r}: {hint}")
    if severity is None and entry.family == "paper":
        return entry, None
    severity = _check_integer("severity", severity)
    if severity not in entry.severities:
        raise ValueError(f"severity must be one of {entry.severities}, got {severity}")
    return entry, severity


def _check_images(images: Tensor) -> Tensor:
    """Check shape, dtype and range; return the pixels as uint8."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got shape {tuple(images.shape)}")
    if min(images.shape[2:]) < MIN_SIDE:
        raise ValueError(
            f"images must be at least {MIN_SIDE} px on each side, got {tuple(images.shape[2:])}"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point in [0, 1], got {images.dtype}")
    if images.numel():
        low, high = (bound.item() for bound in images.aminmax())
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise ValueError(
                f"floating-point images must lie in [0, 1], got values from {low} to {high}; "
                "divide by 255 or pass uint8, and corrupt before any normalisation"
            )
    return images.float().mul(255).round_().to(torch.uint8)


def _check_index(index: Tensor | Sequence[int] | None, pixels: Tensor) -> Tensor:
    """Return the image numbers as int64 (B,) on the pixels' device."""
    if index is None:
        return torch.arange(len(pixels), device=pixels.device)
    numbers = torch.as_tensor(index, device=pixels.device)
    if numbers.shape != (len(pixels),):
        raise ValueError(
            f"index must hold one number per image, {len(pixels)}, got shape {tuple(numbers.shape)}"
        )
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        if len(numbers):  # an empty list has no integer dtype
            raise TypeError(f"index must hold integers, got {numbers.dtype}")
    return numbers.long()


def _check_profile(profile: int | str, pixels: Tensor) -> int:
    """Resolve "auto" to the profile nearest to the shorter side, the larger of two as near."""
    if profile == "auto":
        side = min(pixels.shape[2:])
        return min(PROFILES, key=lambda known: abs(known - side))
    if profile not in PROFILES:
        raise ValueError(f"profile must be 'auto' or one of {PROFILES}, got {profile!r}")
    return int(profile)


def _sort_options(
    name: str, entry: Corruption, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `options` into those of the corruption's draw and those of its function.

    A draw that looks at the pixels has an argument `images`; its place is kept with None.
    """
    ours = {"images", "profile"}
    drawn, applied = (
        {
            parameter.name
            for parameter in (inspect.signature(half).parameters.values() if half else ())
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        for half in (entry.draw, entry.function)
    )
    known = (drawn | applied) - ours
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"{name} has no option {unknown[0]!r}; it has {sorted(known) or 'none'}")
    draw_options = {key: options.get(key) for key in drawn & (options.keys() | ours)}
    return draw_options, {key: options[key] for key in applied & options.keys()}
