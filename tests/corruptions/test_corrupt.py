"""Test the contract of `corrupt` for all corruptions, and properties of each of them."""

import enum
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import corruptions
from corruptions import (
    ALL_CORRUPTIONS,
    CORRUPTIONS,
    MIN_SIDE,
    VALIDATION_CORRUPTIONS,
    Stream,
    apply,
    corrupt,
    digital,
    frost,
    noise,
)

NAMES = list(ALL_CORRUPTIONS)
IMAGENET_C = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur
zoom_blur snow fog frost brightness contrast elastic_transform pixelate jpeg_compression""".split()
PAPER = ["occlusion", "color_distortion", "translation", "rotation"]
VALIDATION = ["speckle_noise", "gaussian_blur", "saturate"]
RANDOM = [name for name, entry in ALL_CORRUPTIONS.items() if entry.draw]

names, seeds = st.sampled_from(NAMES), st.integers(0, 2**63)
severities, sides = st.integers(1, 5), st.integers(MIN_SIDE, 48)


def pictures(batch: int = 3, height: int = 32, width: int = 32) -> Tensor:
    """Draw a batch of uint8 images with smooth areas, edges and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    smooth[:, :, height // 3 : height // 2] = torch.rand(batch, 3, 1, 1, generator=generator)
    noise = 0.04 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 1).mul(255).to(torch.uint8)


def harm(name: str, severity: int, images: Tensor) -> float:
    """Return the mean absolute change of the images, in levels."""
    return (corrupt(images, name, severity).float() - images).abs().mean().item()


# ------------------------------------------------------------------ the registry


def test_registry_is_complete_ordered_and_read_only() -> None:
    assert [*IMAGENET_C, *PAPER] == list(CORRUPTIONS)
    assert list(VALIDATION_CORRUPTIONS) == VALIDATION and [*CORRUPTIONS, *VALIDATION] == NAMES
    families = [entry.family for entry in CORRUPTIONS.values()]
    counts = {"noise": 3, "blur": 4, "weather": 4, "digital": 4, "paper": 4}
    assert families == [family for family, count in counts.items() for _ in range(count)]
    assert {entry.family for entry in VALIDATION_CORRUPTIONS.values()} == {"validation"}
    assert len({entry.column for entry in ALL_CORRUPTIONS.values()}) == 22
    assert {entry.severities for entry in ALL_CORRUPTIONS.values()} == {(1, 2, 3, 4, 5)}
    drawless = "defocus_blur zoom_blur brightness contrast pixelate jpeg_compression".split()
    drawless += ["gaussian_blur", "saturate"]
    assert [name for name in NAMES if name not in RANDOM] == drawless
    with pytest.raises(TypeError):
        CORRUPTIONS["fog"] = CORRUPTIONS["snow"]  # type: ignore[index]


# ------------------------------------------------------------------ the contract


@pytest.mark.parametrize("name", RANDOM)
def test_fields_may_be_float64_like_those_of_the_original(name: str) -> None:
    entry, images = ALL_CORRUPTIONS[name], pictures()
    options = {"images": images} if name == "shot_noise" else {}
    stream = Stream(0, name, 3, torch.arange(3))
    fields = entry.draw(stream, 3, (32, 32), 32, **options)  # type: ignore[misc]
    wide = [field.double() if field.is_floating_point() else field for field in fields]
    one, other = (entry.function(images, 3, *f, profile=32).float() for f in (fields, wide))
    assert (one - other).abs().mean() < 0.05


@given(names, severities, seeds, sides, sides, st.integers(0, 4))
def test_shape_and_dtype_are_kept_and_the_input_is_unchanged(
    name: str, severity: int, seed: int, height: int, width: int, batch: int
) -> None:
    images = pictures(batch, height, width)
    before, version = images.clone(), images._version
    result = corrupt(images, name, severity, seed=seed)
    assert result.shape == images.shape and result.dtype == torch.uint8
    assert result.data_ptr() != images.data_ptr() or batch == 0
    assert images._version == version and torch.equal(images, before)


@pytest.mark.parametrize("name", NAMES)
def test_every_severity_works_at_the_smallest_sides(name: str) -> None:
    """Check the parameters of every profile, including profiles for larger images."""
    for size in ((MIN_SIDE, MIN_SIDE), (MIN_SIDE, 57), (50, MIN_SIDE + 1)):
        images = pictures(2, *size)
        for profile in corruptions.PROFILES:
            for severity in (1, 2, 3, 4, 5):
                raw = corrupt(images.double() / 255, name, severity, profile=profile)
                assert raw.shape == images.shape and raw.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_is_the_same_on_the_grid(dtype: torch.dtype) -> None:
    images = pictures()
    for name in NAMES:
        result = corrupt(images.to(dtype) / 255, name, 2)
        assert result.dtype == dtype and result.min() >= 0 and result.max() <= 1
        grid = (images.to(dtype) / 255).float().mul(255).round().to(torch.uint8)
        assert torch.equal(result, corrupt(grid, name, 2).to(dtype) / 255)


@given(names, severities, seeds, st.permutations(range(6)), st.integers(1, 5))
def test_an_image_is_corrupted_alike_in_any_company(
    name: str, severity: int, seed: int, order: list[int], cut: int
) -> None:
    """Check split, single and permuted batches: the result depends on the image index only."""
    images = pictures(6, 33, 38)
    index = torch.tensor([5, 2**40, 0, 7, 1, 10**9])
    whole = corrupt(images, name, severity, seed=seed, index=index)
    permuted = corrupt(images[order], name, severity, seed=seed, index=index[order])
    assert torch.equal(permuted, whole[order])
    for part in (slice(None, cut), slice(cut, None), slice(cut, cut + 1)):
        alone = corrupt(images[part], name, severity, seed=seed, index=index[part].tolist())
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, threads = pictures(5, 224, 224), torch.get_num_threads()
    results = []
    for chunk in (1, 2, 5):
        monkeypatch.setitem(apply._CHUNK, "cpu", chunk)
        results.append(corrupt(images, name, 5))
    try:
        torch.set_num_threads(threads % 2 + 1)
        results.append(corrupt(images, name, 5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", NAMES)
def test_seed_index_and_severity_decide(name: str) -> None:
    images = pictures(4)
    result = corrupt(images, name, 4, seed=3)
    assert torch.equal(result, corrupt(images, name, 4, seed=3, index=range(4)))
    for other in (
        corrupt(images, name, 4, seed=4),
        corrupt(images, name, 4, seed=3, index=range(4, 8)),
    ):
        assert torch.equal(result, other) == (name not in RANDOM)
    assert not torch.equal(result, corrupt(images, name, 5, seed=3))


def test_global_generators_are_left_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    for name in NAMES:
        corrupt(pictures(2), name, 1)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == repr(np.random.get_state())  # noqa: NPY002


def rounded_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply float32 matrices as torch.set_float32_matmul_precision("medium") allows it."""
    if a.dtype == torch.float32:
        return torch.matmul(a.bfloat16().float(), b.bfloat16().float())
    return torch.matmul(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_surrounding_precision_and_device_do_not_matter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures()
    expected = corrupt(images, name, 3)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded_product)
    assert torch.equal(corrupt(images, name, 3), expected)
    monkeypatch.undo()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(corrupt(images, name, 3), expected)
    frost._textures.cache_clear()
    frost._pictures.cache_clear()
    with torch.device("meta"):  # as the default device
        assert torch.equal(corrupt(images, name, 3), expected)


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_does_not_matter(name: str) -> None:
    images = pictures(3, 34, 40)
    expected = corrupt(images, name, 3)
    wide = torch.zeros(6, 3, 34, 80, dtype=torch.uint8)
    wide[::2, :, :, ::2] = images
    for same in (images.to(memory_format=torch.channels_last), wide[::2, :, :, ::2]):
        assert not same.is_contiguous() and torch.equal(corrupt(same, name, 3), expected)


@pytest.mark.parametrize("name", ["shot_noise", "zoom_blur", "jpeg_compression"])
def test_a_compiled_caller_gets_the_same_images(name: str) -> None:
    def step(images: Tensor) -> Tensor:
        return corrupt(images, name, 3, seed=1) / 255

    torch.compiler.reset()
    assert torch.equal(torch.compile(step, backend="eager")(pictures()), step(pictures()))


def test_profile_is_the_nearest_to_the_shorter_side() -> None:
    for side, profile in ((16, 32), (47, 32), (48, 64), (143, 64), (144, 224), (300, 224)):
        images = pictures(1, side, side + 60)
        by_name = {known: corrupt(images, "contrast", 1, profile=known) for known in (32, 64)}
        assert not torch.equal(by_name[32], by_name[64])
        for name in ("pixelate", "gaussian_noise"):
            automatic = corrupt(images, name, 2)
            for known in corruptions.PROFILES:
                named = corrupt(images, name, 2, profile=known)
                assert torch.equal(automatic, named) == (known == profile)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_devices_agree(name: str) -> None:
    """Check that devices agree, except that rounding may change a few values by one level."""
    images = pictures(6, 224, 224)
    for severity in (1, 3, 5):
        here, there = (corrupt(part, name, severity) for part in (images, images.cuda()))
        change = (here.int() - there.cpu().int()).abs()
        assert there.is_cuda and change.max() <= 1 and (change > 0).float().mean() < 2e-3


@pytest.mark.parametrize("share", noise.IMPULSE_NOISE[224])
def test_impulse_noise_includes_both_limits(share: float) -> None:
    """A draw equal to the share changes the value. A salt of exactly one half makes it white."""
    image = torch.full((1, 3, 1, 4), 99, dtype=torch.uint8)
    limit, after = np.float32(share), np.nextafter(np.float32(share), np.float32(1))
    flip = torch.tensor([limit, limit, after, 0.0]).expand(image.shape)
    salt = torch.tensor([0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.5, 1.0])
    severity = 1 + noise.IMPULSE_NOISE[224].index(share)
    result = noise.impulse_noise(image, severity, flip, salt.expand(image.shape))
    assert result[0, 0, 0].tolist() == [255, 0, 99, 0]


def test_contrast_of_a_rectangle_is_about_its_mean() -> None:
    images = torch.randint(256, (2, 3, 20, 33), dtype=torch.uint8).double()
    mean = images.mean((2, 3), keepdim=True)
    raw = digital.contrast(images.to(torch.uint8), 3)
    torch.testing.assert_close(raw.double(), mean + 0.2 * (images - mean), rtol=0, atol=1e-4)


# ------------------------------------------------------------------ invalid arguments

GOOD = pictures(2)
UNIT = GOOD.float() / 255


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((GOOD, "motion_blurr", 1), {}, ValueError, "motion_blurr.*motion_blur"),
        ((GOOD, "x", 1), {}, ValueError, "'x'.*gaussian_noise.*rotation"),
        ((GOOD, None, 1), {}, ValueError, "unknown corruption None"),
        ((GOOD, ["fog"], 1), {}, ValueError, r"unknown corruption \['fog'\]; did you mean"),
        ((GOOD, "fog", 0), {}, ValueError, "severity.*1, 2, 3, 4, 5.*got 0"),
        ((GOOD, "fog", 6), {}, ValueError, "severity.*got 6"),
        ((GOOD, "fog", -1), {}, ValueError, "severity.*got -1"),
        ((GOOD, "fog", None), {}, TypeError, "severity.*None"),
        ((GOOD, "fog", 1.0), {}, TypeError, "severity.*1.0"),
        ((GOOD, "fog", 1), {"seed": 0.5}, TypeError, "seed.*0.5"),
        ((GOOD.numpy(), "fog", 1), {}, TypeError, "torch.Tensor.*ndarray"),
        ((GOOD[0], "fog", 1), {}, ValueError, r"\(B, 3, H, W\).*\(3, 32, 32\)"),
        ((GOOD[:, :1], "fog", 1), {}, ValueError, r"\(2, 1, 32, 32\)"),
        ((GOOD[..., :15], "fog", 1), {}, ValueError, r"16 px.*\(32, 15\)"),
        ((GOOD.int(), "fog", 1), {}, TypeError, "torch.int32"),
        ((GOOD.float(), "fog", 1), {}, ValueError, r"\[0, 1\]"),
        ((1.5 * UNIT, "fog", 1), {}, ValueError, r"\[0, 1\].*divide by 255"),
        ((UNIT - 0.5, "fog", 1), {}, ValueError, r"\[0, 1\]"),
        ((UNIT.masked_fill(UNIT > 0.9, torch.nan), "fog", 1), {}, ValueError, "nan"),
        ((UNIT.masked_fill(UNIT > 0.9, torch.inf), "fog", 1), {}, ValueError, "inf"),
        ((GOOD, "fog", 1), {"index": [1]}, ValueError, r"\(2,\), one per image.*\(1,\)"),
        ((GOOD, "fog", 1), {"index": [0.0, 1.0]}, TypeError, "integers.*float32"),
        ((GOOD, "fog", 1), {"index": [True, False]}, TypeError, "integers.*bool"),
        ((GOOD, "fog", 1), {"index": ["a", "b"]}, TypeError, r"integers.*\['a', 'b'\]"),
        ((GOOD, "fog", 1), {"index": [2**63, 1]}, TypeError, r"integers below 2\*\*63.*808, 1\]"),
        ((GOOD, "fog", 1), {"index": iter([5, 6])}, TypeError, "integers.*list_iterator"),
        ((GOOD, "fog", 1), {"profile": 100}, ValueError, "profile.*224, 64, 32.*100"),
        ((GOOD, "fog", 1), {"grey": 0.5}, TypeError, "fog has no option 'grey'.*none"),
        ((GOOD, "occlusion", 1), {"gray": 0.5}, TypeError, "'gray'.*bounds.*grey"),
        ((GOOD, "rotation", 1), {"bilinear": "no"}, TypeError, "bilinear.*'no'"),
        ((GOOD, "rotation", 1), {"bounds": 5}, ValueError, "bounds.*got 5"),
        ((GOOD, "rotation", 1), {"bounds": (1, 2, 3)}, ValueError, r"bounds.*\(1, 2, 3\)"),
        ((GOOD, "rotation", 1), {"bounds": ("1", "2")}, ValueError, r"bounds.*\('1', '2'\)"),
        ((GOOD, "rotation", 1), {"bounds": (9, 8)}, ValueError, r"bounds.*\(9, 8\)"),
        ((GOOD, "color_distortion", 1), {"bounds": (0, 2)}, ValueError, r"bounds.*\(0, 2\)"),
        ((GOOD, "occlusion", 1), {"bounds": (60, 300)}, ValueError, r"<= 224, got \(60, 300\)"),
        ((GOOD, "rotation", None), {"bounds": (8, 200)}, ValueError, r"<= 180, got \(8, 200\)"),
        ((GOOD, "translation", 1), {"bounds": (0, torch.inf)}, ValueError, r"bounds.*\(0, inf\)"),
        ((GOOD, "occlusion", 1), {"grey": 128}, ValueError, "grey.*from 0 to 1, got 128"),
        ((GOOD, "occlusion", 1), {"grey": torch.nan}, ValueError, "grey.*got nan"),
    ],
)
def test_refusals_name_the_value_and_the_rule(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        corrupt(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch_is_given_back(name: str) -> None:
    for dtype in (torch.uint8, torch.float32):
        empty = torch.zeros(0, 3, 40, 32, dtype=dtype)
        result = corrupt(empty, name, 1, index=[])
        assert result.shape == empty.shape and result.dtype == dtype
    with pytest.raises(ValueError, match=re.escape("(8, 32)")):
        corrupt(torch.zeros(0, 3, 8, 32, dtype=torch.uint8), name, 1)


# ------------------------------------------------------------------ the definitions


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("frost", "fog")])
def test_harm_rises_with_severity(name: str) -> None:
    """Check that the change of the images grows with the severity.

    If one parameter changes, the change must grow with every severity. If several parameters
    change, only some severities are compared. Frost and fog are left out: they mix the image with a
    bright or dull texture, so that the change depends on the image.
    """
    images = pictures(8, 224, 224)
    changes = [harm(name, severity, images) for severity in (1, 2, 3, 4, 5)]
    if name == "elastic_transform":  # severities 1 and 2 are affine maps, 3 to 5 are not
        assert changes[1] > changes[0] and changes[4] > changes[2]
    elif name == "saturate":  # severities 1 and 2 weaken the colors, 3 to 5 strengthen them
        assert changes[0] < changes[1] and changes[2] < changes[3] < changes[4]
    elif name in ("glass_blur", "snow"):
        assert changes[4] > changes[0]
    else:
        assert changes == sorted(changes) and changes[4] > 1.2 * changes[0]


@given(st.integers(0, 255), severities, sides, st.sampled_from(corruptions.PROFILES))
def test_blurs_leave_a_constant_image_alone(
    level: int, severity: int, side: int, profile: int
) -> None:
    """Check the blurs on constant images, with two exceptions.

    The kernels of defocus blur at 224 px and severities 4 and 5 sum to more than 1. Glass blur
    truncates an intermediate result.
    """
    images = torch.full((1, 3, side, 40), level, dtype=torch.uint8)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"):
        result = corrupt(images, name, severity, profile=profile).int()
        if name == "glass_blur":
            assert (result == result[0, 0, 0, 0]).all() and level - 1 <= result.max() <= level
        elif name != "defocus_blur" or profile != 224 or severity < 4:
            assert torch.equal(result, images.int())


@given(severities, seeds)
def test_gray_stays_gray(severity: int, seed: int) -> None:
    """Check that gray images stay gray.

    Noise is left out because it is independent per channel. Frost and color distortion are left
    out because they add color.
    """
    gray = pictures(2, 36, 32)[:, :1].expand(-1, 3, -1, -1)
    for name, entry in CORRUPTIONS.items():
        if entry.family != "noise" and name not in ("frost", "color_distortion"):
            result = corrupt(gray, name, severity, seed=seed)
            tolerance = 1 if name == "jpeg_compression" else 0
            assert (result.int() - result[:, :1].int()).abs().max() <= tolerance, name


def test_rounding_beyond_the_limits_is_allowed() -> None:
    """Check images that torchvision's resize of floating point has left beyond white and black."""
    inside = torch.rand(2, 3, 16, 16).mul(255).round() / 255
    outside = torch.where(inside > 0.5, inside + 9e-4, inside - 9e-4)
    inside8 = inside.mul(255).round().to(torch.uint8)
    assert torch.equal(corrupt(outside, "fog", 3), corrupt(inside8, "fog", 3).float().div(255))
    for beyond in (torch.full_like(inside, -0.002), torch.full_like(inside, 1.002), outside + 0.01):
        with pytest.raises(ValueError, match="must lie in"):
            corrupt(beyond, "fog", 3)


def test_the_type_of_a_name_does_not_decide() -> None:
    class Name(enum.StrEnum):
        FOG = "fog"

    images = torch.full((2, 3, 16, 16), 90, dtype=torch.uint8)
    for name in (np.str_("fog"), Name.FOG):
        assert torch.equal(corrupt(images, name, 3), corrupt(images, "fog", 3))


def test_the_default_dtype_does_not_matter_to_a_bilinear_rotation() -> None:
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = corrupt(images, "rotation", 3, bilinear=True)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(corrupt(images, "rotation", 3, bilinear=True), expected)
    finally:
        torch.set_default_dtype(torch.float32)
