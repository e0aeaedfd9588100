"""Run the original ImageNet-C corruptions, unmodified, with current versions of their dependencies.

The package imagenet-c 0.0.3 contains the functions that made ImageNet-C. The package
imagecorruptions 1.1.2 contains the frost photographs, which are missing from the wheel of
imagenet-c. `requirements-dev.txt` says how to install them.

The original uses some interfaces that no longer exist. They are replaced at run time, and only in
the namespace of the reference module: NumPy's `fromstring`, scikit-image's `multichannel`,
`pkg_resources`, and ImageMagick. ImageMagick's motion blur is computed here from its definition, in
16-bit pixels.

    raw = original(image, "fog", 3, seed=7)   # uint8 (224, 224, 3) -> float64, before truncation
    drawn = draws(image, "fog", 3, seed=7)    # the random numbers that this call consumes
"""

import importlib
import importlib.util
import io
import math
import os
import sys
import types
import warnings
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

PACKAGES = ("imagenet_c", "imagecorruptions", "cv2", "skimage")
MISSING = ", ".join(name for name in PACKAGES if importlib.util.find_spec(name) is None)
SKIP = f"not installed: {MISSING} (see requirements-dev.txt)"

_SHOT = (60, 25, 12, 5, 3)
_GLASS = ((1, 2), (2, 1), (2, 3), (3, 2), (4, 2))  # largest offset, passes
_ELASTIC = (24.4, 48.8, 4.88, 4.88, 4.88)  # affine jitter, px
_FROST_SIZES = ((600, 900), (315, 560), (315, 560), (350, 527), (495, 660))


def frost_dir() -> str:
    """Return the folder of the original frost photographs."""
    spec = importlib.util.find_spec("imagecorruptions")
    assert spec is not None and spec.origin is not None
    return os.path.join(os.path.dirname(spec.origin), "frost")


def magick_motion_blur(pixels: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """Blur a uint8 (H, W[, 3]) image as ImageMagick 6 Q16 does, with its truncation to 8 bits."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = math.radians(angle)
    height, width = pixels.shape[:2]
    total = np.zeros(pixels.shape)
    for step, weight in zip(steps, weights, strict=True):
        right = math.ceil(step * math.cos(radians) - 0.5)
        down = math.ceil(step * math.sin(radians) - 0.5)
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        total += weight * 257.0 * pixels[rows][:, columns]
    return np.clip(np.floor(np.floor(total + 0.5) / 257), 0, 255).astype(np.uint8)


class _Wand:
    """Replacement for wand.image.Image, the base class of the original's motion blur image."""

    def __init__(self, blob: bytes) -> None:
        self.pixels = np.asarray(Image.open(io.BytesIO(blob)))
        self.wand = self

    def make_blob(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()


def _blur_wand(wand: _Wand, radius: float, sigma: float, angle: float) -> None:
    wand.pixels = magick_motion_blur(wand.pixels, radius, sigma, angle)


class _Namespace(types.ModuleType):
    """A view of a module in which some names are replaced."""

    def __init__(self, module: types.ModuleType, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _stand_ins() -> dict[str, types.ModuleType]:
    """Build the modules that the original imports and that no longer exist."""
    ndimage = importlib.import_module("scipy.ndimage")
    library = types.SimpleNamespace(MagickMotionBlurImage=_blur_wand)
    contents: dict[str, dict[str, Any]] = {
        "pkg_resources": {"resource_filename": None},
        "scipy.ndimage.interpolation": {"map_coordinates": ndimage.map_coordinates},
        "wand": {},
        "wand.image": {"Image": _Wand},
        "wand.api": {"library": library},
        "wand.color": {},
    }
    modules = {}
    for name, names in contents.items():
        modules[name] = types.ModuleType(name)
        modules[name].__dict__.update(names)
    modules["wand"].__dict__.update(
        {name: modules[f"wand.{name}"] for name in ("image", "api", "color")}
    )
    return modules


@cache
def _reference() -> Any:
    """Import the original module and install the replacements in it."""
    importlib.import_module("cv2").setNumThreads(1)
    filters, util, color = (
        importlib.import_module(f"skimage.{name}") for name in ("filters", "util", "color")
    )
    missing = {name: mod for name, mod in _stand_ins().items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: Any = importlib.import_module("imagenet_c.corruptions")
    finally:
        for name in missing:
            del sys.modules[name]

    def gaussian(image: np.ndarray, sigma: float, multichannel: bool = False, **rest: Any) -> Any:
        channel_axis = -1 if multichannel else None
        return filters.gaussian(image, sigma, channel_axis=channel_axis, **rest)

    def random_noise(image: np.ndarray, **rest: Any) -> Any:
        return util.random_noise(image, rng=module.generator, **rest)

    folder = frost_dir()
    module.resource_filename = lambda _, path: os.path.join(folder, os.path.basename(path))
    module.np = _Namespace(np, float_=np.float64, fromstring=np.frombuffer)
    module.gaussian = gaussian
    module.sk = types.SimpleNamespace(
        util=types.SimpleNamespace(random_noise=random_noise), color=color
    )
    return module


def original(image: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Corrupt a uint8 (224, 224, 3) image; return the float64 values before their truncation."""
    module = _reference()
    state = np.random.get_state()  # noqa: NPY002 - the original draws from the global generator
    np.random.seed(seed)  # noqa: NPY002
    module.generator = np.random.default_rng(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            corrupted = getattr(module, name)(Image.fromarray(image), severity)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return np.asarray(corrupted).astype(np.float64)


def draws(image: np.ndarray, name: str, severity: int, seed: int = 0) -> dict[str, Any]:
    """Draw the random numbers that `original` consumes, in its order and its (H, W, 3) layout."""
    height, width = image.shape[:2]
    legacy, modern = np.random.RandomState(seed), np.random.default_rng(seed)
    if name == "gaussian_noise":
        return {"noise": legacy.normal(size=image.shape)}
    if name == "shot_noise":
        return {"counts": legacy.poisson(image / 255.0 * _SHOT[severity - 1])}
    if name == "impulse_noise":
        return {"flip": modern.random(image.shape), "salt": modern.random(image.shape)}
    if name == "glass_blur":  # rows and columns from last to first, then (dx, dy)
        jump, passes = _GLASS[severity - 1]
        rows, columns = height - 2 * jump, width - 2 * jump
        return {"offsets": legacy.randint(-jump, jump, size=(passes, rows, columns, 2))}
    if name == "motion_blur":
        return {"angle": legacy.uniform(-45, 45)}
    if name == "snow":
        return {"noise": legacy.normal(size=(height, width)), "angle": legacy.uniform(-135, -45)}
    if name == "frost":
        texture = legacy.randint(5)
        room = [
            full - side for full, side in zip(_FROST_SIZES[texture], (height, width), strict=True)
        ]
        return {"texture": texture, "top": legacy.randint(room[0]), "left": legacy.randint(room[1])}
    if name == "fog":  # per level: centers, top edges, left edges
        cells = [2**level for level in range(8) for _ in range(3)]
        return {"displacements": [legacy.uniform(-1, 1, (n, n)) for n in cells]}
    if name == "elastic_transform":
        jitter = _ELASTIC[severity - 1]
        fields = {"moves": legacy.uniform(-jitter, jitter, size=(3, 2))}
        return fields | {key: legacy.uniform(-1, 1, (height, width)) for key in ("x", "y")}
    return {}
