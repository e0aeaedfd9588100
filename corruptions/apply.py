"""Corrupt batches of images: check the arguments, draw, apply, and truncate to uint8."""

import difflib
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corruptions.registry import ALL_CORRUPTIONS, MIN_SIDE, PROFILES, Corruption
from corruptions.rng import Stream

# Many results are integers up to float rounding (constant areas, full white). Truncation must not
# lower them by a level on any device. The guard is larger than float32's error there. Of the other
# results, it raises only one in 4096 to the next integer. (To uint8 through int is faster.)
_TRUNCATION_GUARD = 2.0**-12
# Images of 224 x 224 px per chunk. A CPU takes few, so that the temporaries stay in the cache and
# their memory is reused.
_CHUNK = {"cpu": 4}
_CHUNK_ELSEWHERE = 64


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
    """Corrupt a batch of images. The draws depend only on `seed`, `name`, `severity` and `index`.

    Args:
        images: RGB (B, 3, H, W), sides of at least `MIN_SIDE`; uint8, or floating point in [0, 1],
            which is rounded to the 1/255 grid first. Not modified.
        name: a key of `CORRUPTIONS` or `VALIDATION_CORRUPTIONS`.
        severity: 1 to 5. For the paper's four also None: an amount in the range, drawn per image.
        seed: any integer.
        index: indices of the images in the dataset, integers (B,). None means 0 to B - 1, so each
            call with the same seed repeats the same draws: a single image always has those of
            image 0. For images that come one at a time, pass their indices, or use `Corrupt`.
        profile: parameter set: 224, 64, 32, or "auto" for the one nearest to the shorter side.
        options: keyword-only arguments of the corruption's functions, such as `bounds`.

    Returns:
        A new tensor of the same shape, dtype and device, on the 1/255 grid.

    Raises:
        TypeError, ValueError, FileNotFoundError: a wrong argument; no photograph of frost.
    """
    entry, severity = _check_name(name, severity)
    seed = _check_integer("seed", seed)
    pixels = _check_images(images)
    numbers = _check_index(index, pixels)
    profile = _check_profile(profile, pixels)
    drawn, applied = _sort_options(name, entry, options)
    height, width = pixels.shape[2:]
    out = torch.empty_like(pixels)
    chunk = _CHUNK.get(pixels.device.type, _CHUNK_ELSEWHERE) * 224 * 224 // (height * width) or 1
    for part in (slice(start, start + chunk) for start in range(0, len(pixels), chunk)):
        fields: tuple[Tensor, ...] = ()
        if entry.draw is not None:
            if "images" in drawn:
                drawn["images"] = pixels[part]
            stream = Stream(seed, "".join(name), severity, numbers[part])  # a plain str
            fields = entry.draw(stream, severity, (height, width), profile, **drawn)
        with torch.autocast(pixels.device.type, enabled=False):
            raw = entry.function(pixels[part], severity, *fields, profile=profile, **applied)
        out[part] = raw if raw.dtype == torch.uint8 else raw.add_(_TRUNCATION_GUARD).int()
    return out if images.dtype == torch.uint8 else out.to(images.dtype).div_(255)


# A compiled caller would trace the NumPy code of shot_noise, and get other tables from it.
corrupt = torch.compiler.disable(corrupt)


def _check_integer(what: str, value: Any) -> int:
    """Return an integer argument as an int, or raise TypeError."""
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{what} must be an integer, got {value!r}") from None


def _check_name(name: str, severity: int | None) -> tuple[Corruption, int | None]:
    """Look up the corruption and check that it has this severity."""
    entry = ALL_CORRUPTIONS.get(name) if isinstance(name, str) else None  # a list has no hash
    if entry is None:
        close = difflib.get_close_matches(str(name), ALL_CORRUPTIONS)
        known = ", ".join(ALL_CORRUPTIONS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"one of {known}"
        raise ValueError(f"unknown corruption {name!r}; {hint}")
    if severity is None and entry.family == "paper":
        return entry, None
    severity = _check_integer("severity", severity)
    if severity not in entry.severities:
        raise ValueError(f"severity must be one of {entry.severities}, got {severity}")
    return entry, severity


def _check_images(images: Tensor) -> Tensor:
    """Check shape, dtype and range. Return the pixels as uint8."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
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
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # allows a resize's rounding, refuses NaN
            raise ValueError(
                f"floating-point images must lie in [0, 1], got values from {low} to {high}; "
                "divide by 255 or pass uint8, and corrupt before any normalization"
            )
    return images.float().mul(255).round_().to(torch.uint8)


def _check_index(index: Tensor | Sequence[int] | None, pixels: Tensor) -> Tensor:
    """Return the indices of the images as int64 (B,) on the device of the pixels."""
    if index is None:
        return torch.arange(len(pixels), device=pixels.device)
    try:
        numbers = torch.as_tensor(index, device=pixels.device)
    except (TypeError, ValueError, RuntimeError):  # of other things, or above int64
        raise TypeError(f"index must contain integers below 2**63, got {index!r:.50}") from None
    if numbers.shape != (len(pixels),):
        raise ValueError(
            f"index must have shape ({len(pixels)},), one per image, got {tuple(numbers.shape)}"
        )
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        if len(numbers):  # an empty list has no integer dtype
            raise TypeError(f"index must contain integers, got {numbers.dtype}")
    return numbers.long()


def _check_profile(profile: int | str, pixels: Tensor) -> int:
    """Resolve "auto" to the profile nearest to the shorter side, the larger one in a tie."""
    if profile == "auto":
        side = min(pixels.shape[2:])
        return min(PROFILES, key=lambda known: abs(known - side))
    if profile not in PROFILES:
        raise ValueError(f"profile must be 'auto' or one of {PROFILES}, got {profile!r}")
    return int(profile)


def _sort_options(
    name: str, entry: Corruption, options: dict[str, Any]
) -> tuple[dict[str, Any], ...]:
    """Split `options` into the options of the draw function and of the applying function."""
    drawn = inspect.getfullargspec(entry.draw).kwonlyargs if entry.draw else []
    applied = inspect.getfullargspec(entry.function).kwonlyargs
    known = {*drawn, *applied} - {"images", "profile"}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"{name} has no option {unknown[0]!r}; options: {sorted(known) or 'none'}")
    given = {"images": None, **options}  # `corrupt` sets the images of each chunk
    return tuple({key: given[key] for key in keys if key in given} for keys in (drawn, applied))
