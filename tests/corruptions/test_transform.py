"""Test `Corrupt` and `CorruptedDataset`: kinds of images, draws, and workers of a DataLoader."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import functional, v2

from corruptions import Corrupt, CorruptedDataset, corrupt
from corruptions.transform import center_crop, has_only_folders, upright_rgb

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (6, 3, 20, 24), dtype=torch.uint8, generator=GENERATOR)
ARRAYS = IMAGES.permute(0, 2, 3, 1).numpy()
NOISE = Corrupt("gaussian_noise", 3)


class Samples(Dataset[Any]):
    """The same gray image under each index, with a transform and a label, in any process."""

    def __init__(self, transform: Any = None) -> None:
        self.transform = transform or v2.Identity()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(torch.full((3, 16, 16), 128, dtype=torch.uint8)), 10 * index


def as_array(image: Any) -> np.ndarray:
    """Return any kind of image as an array (..., H, W, 3)."""
    return image.movedim(-3, -1).numpy() if isinstance(image, Tensor) else np.asarray(image)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(ARRAYS[0]),
        ARRAYS[0],
        np.flip(ARRAYS[:2], 2),  # has a negative stride
        IMAGES[0],
        IMAGES[:2],
        IMAGES[:2].to(memory_format=torch.channels_last),
        IMAGES[0].double() / 255,
        tv_tensors.Image(IMAGES[0]),
    ],
)
def test_each_kind_of_image_comes_back_as_that_kind(image: Any) -> None:
    before = np.array(as_array(image))
    batch = torch.from_numpy(before).reshape(-1, 20, 24, 3).permute(0, 3, 1, 2)
    index = [7, 8][: len(batch)]
    result = NOISE(image, seed=5, index=index)
    assert type(result) is type(NOISE(image)) and isinstance(result, type(image))
    assert as_array(result).dtype == before.dtype
    assert not isinstance(result, np.ndarray) or result.flags.c_contiguous
    expected = corrupt(batch, "gaussian_noise", 3, seed=5, index=index)
    assert np.array_equal(as_array(result), as_array(expected).reshape(before.shape))
    assert np.array_equal(as_array(image), before)


def test_each_call_and_each_image_has_its_own_draws_that_follow_from_the_global_seed() -> None:
    gray = Samples()[0][0]
    first, second, batch = NOISE(gray), NOISE(gray), NOISE(gray.expand(2, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in (first, second, *batch)}) == 4
    torch.manual_seed(1)
    first = NOISE(gray)
    torch.manual_seed(1)
    assert torch.equal(NOISE(gray), first)


def test_it_works_in_a_pipeline_of_torchvision() -> None:
    steps = [v2.Resize((32, 32)), Corrupt("fog", 2), v2.RandomChoice([NOISE]), v2.ToImage()]
    result = v2.Compose(steps)(Image.fromarray(ARRAYS[0]))
    assert isinstance(result, tv_tensors.Image) and result.shape == (3, 32, 32)
    assert repr(NOISE) == "Corrupt('gaussian_noise', 3, profile='auto')"


def test_options_reach_the_corruption() -> None:
    wide = Corrupt("translation", None, bounds=(30, 30), profile=64)
    expected = corrupt(IMAGES, "translation", None, bounds=(30, 30), profile=64, seed=2)
    assert torch.equal(wide(IMAGES, seed=2), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("fogg", 3), {}, ValueError, "fogg.*fog"),
        (("fog", 6), {}, ValueError, "severity.*got 6"),
        (("fog", 3), {"profile": 7}, ValueError, "profile.*got 7"),
        (("fog", 3), {"bounds": (0, 1)}, TypeError, "fog has no option 'bounds'"),
        (("fog", 3), {"seed": 1}, TypeError, "seed and index are arguments of each call"),
        (("occlusion", 3), {"bounds": (100, 5)}, ValueError, r"bounds.*\(100, 5\)"),
        (("frost", 3), {"frost_dir": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_invalid_settings_are_refused_at_once(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Corrupt(*arguments, **options)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("a.png", TypeError, "image must be a PIL image, .*, got str"),
        (Image.fromarray(ARRAYS[0]).convert("L"), ValueError, r"got L image of shape \(20, 24\)"),
        (Image.fromarray(ARRAYS[0]).convert("RGBA"), ValueError, r"\(20, 24, 4\); .*upright"),
        (Image.fromarray(ARRAYS[0]).convert("HSV"), ValueError, "got HSV image .*upright"),
        # Of this, .convert("RGB") would cut off all values at 255.
        (Image.fromarray(ARRAYS[0, ..., 0] * np.uint16(257)), ValueError, "I;16 image .*upright"),
        (IMAGES[0].permute(1, 2, 0), ValueError, r"got Tensor of shape \(20, 24, 3\)"),
        (IMAGES[0].numpy(), ValueError, r"got ndarray of shape \(3, 20, 24\)"),
        (IMAGES[None], ValueError, r"of shape \(1, 6, 3, 20, 24\)"),
        (IMAGES[0].float(), ValueError, "divide by 255"),
    ],
)
def test_other_images_are_refused(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NOISE(image)


# ------------------------------------------------------------------ a dataset and its workers


class Sample(NamedTuple):
    image: Tensor
    label: int


@pytest.mark.parametrize("kind", [Sample._make, list, tuple])
def test_a_sample_keeps_its_kind(kind: Any) -> None:
    sample = kind([IMAGES[0], 7])
    found = CorruptedDataset([sample], NOISE)[0]  # type: ignore[arg-type]
    assert type(found) is type(sample) and found[1] == 7 and not torch.equal(found[0], IMAGES[0])


def test_a_dataset_has_the_draws_of_its_indices() -> None:
    fixed = CorruptedDataset(Samples(), NOISE, seed=4, transform=v2.functional.invert)
    expected = corrupt(Samples()[0][0].expand(8, -1, -1, -1), "gaussian_noise", 3, seed=4)
    samples = list(fixed)  # stops at the end
    assert len(samples) == 8 and [label for _, label in samples] == [10 * i for i in range(8)]
    assert torch.equal(torch.stack([image for image, _ in samples]), 255 - expected)
    assert torch.equal(fixed[-1][0], fixed[7][0])
    plain = CorruptedDataset(IMAGES, NOISE)  # images without labels
    assert torch.equal(plain[2], corrupt(IMAGES, "gaussian_noise", 3)[2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # fork, Python 3.12
@pytest.mark.parametrize(
    "method",
    [
        "fork",
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_draw_anew_and_fix_what_is_fixed(method: str) -> None:
    both = ConcatDataset([Samples(NOISE), CorruptedDataset(Samples(), NOISE, seed=4)])
    loader = DataLoader(both, 2, num_workers=2, multiprocessing_context=method)
    epochs = [torch.cat([images for images, _ in loader]) for _ in range(2)]
    drawn = torch.cat([images[:8] for images in epochs])
    assert len(drawn.unique(dim=0)) == 16
    expected = corrupt(Samples()[0][0].expand(8, -1, -1, -1), "gaussian_noise", 3, seed=4)
    assert all(torch.equal(images[8:], expected) for images in epochs)


def test_the_transform_and_the_dataset_can_be_pickled() -> None:
    fixed = CorruptedDataset(Samples(), Corrupt("rotation", None, bounds=(9, 9)), seed=4)
    again = pickle.loads(pickle.dumps(fixed))
    assert torch.equal(again[5][0], fixed[5][0])


def stored(kind: str, exif: Any) -> Image.Image:
    """Open an image file of 24 x 20 pixels in memory with this EXIF."""
    sink = io.BytesIO()
    Image.fromarray(ARRAYS[0]).save(sink, kind, exif=exif)
    return Image.open(io.BytesIO(sink.getvalue()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(stored(kind, exif)))
    assert np.array_equal(np.asarray(upright_rgb(stored(kind, exif))), expected)
    assert expected.shape == ((24, 20, 3) if 5 <= orientation <= 8 else (20, 24, 3))


def test_damaged_exif_does_not_make_an_image_unreadable() -> None:
    head, quarter = b"Exif\0\0II*\0\x08\0\0\0\2\0", struct.pack("<HHII", 0x0112, 3, 1, 6)
    negative = struct.pack("<HHIi", 0x0100, 9, 1, -1)  # a width that cannot be written back
    found = upright_rgb(stored("PNG", head + quarter + negative + bytes(4)))
    assert np.array_equal(np.asarray(found), np.rot90(ARRAYS[0], -1))
    found = upright_rgb(stored("PNG", b"Exif\0\0no TIFF file"))
    assert np.array_equal(np.asarray(found), ARRAYS[0])


@pytest.mark.parametrize("width, height", [(40, 30), (31, 77), (28, 28), (32, 32), (3, 2999)])
def test_the_center_is_cropped_as_torchvision_does(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = functional.center_crop(functional.resize(image, [32]), [28, 28])
    assert np.array_equal(np.asarray(center_crop(image, 32, 28)), np.asarray(expected))


@pytest.mark.parametrize("axis", [0, 1])
def test_of_a_very_narrow_image_only_the_center_is_resized(
    axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = np.linspace(0, 255, 4)[:, None, None] + np.zeros((4, 4003, 3))
    ramp[:, 2002:] /= 2  # the center differs from what is beside it
    image = Image.fromarray(ramp.swapaxes(0, axis).round().astype(np.uint8))
    expected = functional.center_crop(functional.resize(image, [32]), [28, 28])
    monkeypatch.setattr(functional, "resize", None)
    difference = np.asarray(center_crop(image, 32, 28)).astype(int) - np.asarray(expected)
    assert abs(difference).max() <= 8  # half a pixel of the ramp and of the step
    assert np.asarray(expected).std() > 40


@pytest.mark.parametrize(("largest", "shown"), [(0, 0), (1, None), (255, None), (256, 1)])
def test_values_of_16_bits_are_known_by_those_above_8_bits(largest: int, shown: int | None) -> None:
    """Smaller ones may be of either range, unless all are black."""
    image = Image.fromarray(np.full((4, 4), largest, np.uint16))
    if shown is None:
        with pytest.raises(ValueError):
            upright_rgb(image)
    else:
        assert np.asarray(upright_rgb(image)).tolist() == [[[shown] * 3] * 4] * 4


def test_a_folder_with_a_file_among_folders_is_a_class(tmp_path: Path) -> None:
    for i in range(20):  # the file system may list the file first, but hardly ever does
        (tmp_path / str(i)).mkdir()
    (tmp_path / ".hidden").touch()
    assert has_only_folders(tmp_path)
    assert not has_only_folders(tmp_path / "0")  # which is empty
    (tmp_path / "image.png").touch()
    assert not has_only_folders(tmp_path)
