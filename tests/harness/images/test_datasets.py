"""Test the datasets (the embedded one, folders with their cache, CIFAR) and the batch loader."""

import copy
import hashlib
import itertools
import mmap
import ntpath
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.testing import assert_close

import train
from corruptions import transform
from corruptions.transform import list_classes, walk_images
from harness.errors import UserError
from harness.files import lock_folder
from harness.images import cache, datasets, embedded, folders
from harness.images.loader import BatchLoader, ImageSet, map_images, prefetch
from harness.training.config import parse_train_config
from mtlat import EPSILON_MAX
from tests.support.tiny import image_folder, states_equal


def load(source: Path, tmp_path: Path, **options) -> datasets.Dataset:
    return datasets.load_dataset(
        str(source), cache_dir=tmp_path / "cache", **{"size": 12, **options}
    )


def content(sets: datasets.Dataset) -> tuple:
    return *sets.train[:2], *sets.test[:2], sets.classes, sets.fingerprint


# ---------------------------------------------------------------- the embedded dataset


def test_shapes_are_the_same_pixels_on_every_machine():
    images, labels = embedded.draw_shapes(range(20), 64)
    assert images.shape == (20, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.tolist() == [*range(10)] * 2
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest[:16] == "9c81e115ee105935"
    alone = embedded.draw_shapes(range(13, 14), 64)[0]
    assert torch.equal(alone[0], images[13])
    other = embedded.draw_shapes(range(20), 64, seed=1)[0]
    assert (other != images).flatten(1).any(1).all()


def match_gratings(images: torch.Tensor) -> torch.Tensor:
    """Return the correlation (N, 10) of images in [0, 1] with the grating of every class."""
    gratings = np.stack([embedded._grating(k, images.shape[-1]) for k in range(10)])
    return images.double().mean(1).flatten(1) @ torch.from_numpy(gratings).flatten(1).T


def test_the_color_and_the_clutter_do_not_tell_the_class():
    """Check that least squares on means, minima and maxima of the channels is at chance."""
    (x, y), (x_test, y_test) = (
        embedded.draw_shapes(indices, 32, amplitude=0)
        for indices in (range(1000), range(2000, 2500))
    )

    def features(images: torch.Tensor) -> torch.Tensor:
        z = images.double() / 255
        return torch.cat(
            [z.mean((2, 3)), z.amin((2, 3)), z.amax((2, 3)), z[:, :1, 0, 0] * 0 + 1], 1
        )

    weights = torch.linalg.lstsq(features(x), torch.nn.functional.one_hot(y, 10).double()).solution
    assert (features(x_test) @ weights).argmax(1).eq(y_test).double().mean() < 0.16
    assert match_gratings(x_test / 255).argmax(1).eq(y_test).double().mean() < 0.16


def test_the_grating_tells_the_class_and_an_attack_of_the_stated_size_exchanges_it():
    """Check the gratings with their matched filters, which are the best detector of them."""
    images, y = embedded.draw_shapes(range(200), 32)
    assert match_gratings(images / 255).argmax(1).eq(y).all()
    images, y = embedded.draw_shapes(range(200), 32, shift=3)
    assert match_gratings(images / 255).argmax(1).eq((y + 3) % 10).all()
    images, y = embedded.draw_shapes(range(200), 32, shapes=False)
    own, other = (
        np.stack([embedded._grating(k, 32) for k in ks])
        for ks in (y.tolist(), ((y + 3) % 10).tolist())
    )
    direction = torch.from_numpy(np.sign(other - own))[:, None]
    flipped = []
    for step in (0.4, 0.62, 0.85):  # in amplitudes
        found = match_gratings(images / 255 + step * embedded.AMPLITUDE * direction)
        rows = torch.arange(len(y))
        flipped.append((found[rows, (y + 3) % 10] > found[rows, y]).double().mean().item())
    assert flipped[0] < 0.2 and 0.4 < flipped[1] < 0.65 and flipped[2] > 0.85
    assert 0.62 * embedded.AMPLITUDE <= 0.75 * EPSILON_MAX < 0.62 * (embedded.AMPLITUDE + 0.01)


def test_shapes_lie_where_their_function_is_positive():
    """Check the areas of the shapes, in units of the radius, by formulas where they exist."""
    v, u = np.mgrid[-1.2:1.2:600j, -1.2:1.2:600j]
    areas = {
        "bar": 2 * 0.6,
        "disc": np.pi * 0.85**2,
        "flower": np.pi * (0.68**2 + 0.3**2 / 2),
        "plus": 4 * 0.95 * 0.28 * 2 - (2 * 0.28) ** 2,
        "ring": np.pi * (0.95**2 - 0.55**2),
        "square": (2 * 0.72) ** 2,
        "star": 10 * 0.5 * 1 * 0.4 * np.sin(np.pi / 5),
        "triangle": 3 * np.sqrt(3) / 4,
    }
    for name in embedded.NAMES:
        inside = embedded._inside(name, u, v) > 0
        area = inside.mean() * 2.4**2
        assert 0.5 < area < 2.5
        if name in areas:
            assert area == pytest.approx(areas[name], rel=0.02), name
        assert not inside[0].any() and not inside[:, -1].any()


def test_clutter_has_the_spectrum_of_natural_images():
    field = embedded._clutter(np.random.RandomState(0), 40, 64)
    power = (abs(np.fft.fft2(field)) ** 2).mean(0)
    slope = np.polyfit(np.log(np.arange(2, 30)), np.log(power[0, 2:30]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.15)
    assert field.std(axis=(1, 2)) == pytest.approx(1)


def test_shapes_set(monkeypatch):
    parts = {"train": range(40), "test": range(1_000_000, 1_000_020)}
    monkeypatch.setattr(embedded, "INDICES", parts)
    sets = datasets.load_dataset("shapes", size=16)
    assert sets.classes == list(embedded.NAMES)
    assert len(sets.train.labels) == 40 and len(sets.test.labels) == 20
    assert sets.train.images.shape == (40, 3, 16, 16)
    some = datasets.load_dataset("shapes", size=16, num_classes=3, seed=5)
    assert (
        len(some.classes) == 3
        and some.classes != datasets.load_dataset("shapes", num_classes=3).classes
    )
    assert sets.paths[1] == "shapes/1000001"
    for path, image in zip(some.paths, some.test.images, strict=True):
        number = int(path.removeprefix("shapes/"))
        drawn = embedded.draw_shapes(range(number, number + 1), 16, seed=5)[0]
        assert torch.equal(image, drawn[0])
    assert len(some.train.labels) == 12 and some.train.labels.unique().tolist() == [0, 1, 2]
    prints = [
        sets,
        some,
        datasets.load_dataset("shapes", size=16, seed=1),
        datasets.load_dataset("shapes", size=17),
    ]
    assert len({s.fingerprint for s in prints}) == 4


# ---------------------------------------------------------------- folders


def test_ten_percent_of_every_class_are_held_out(folder, tmp_path):
    sets = load(folder, tmp_path)
    assert sets.classes == ["class0", "class1", "class2"]
    assert torch.bincount(sets.train.labels).tolist() == [9, 9, 9]
    assert torch.bincount(sets.test.labels).tolist() == [1, 1, 1]
    everything = torch.cat([sets.train.images, sets.test.images])
    expected = {
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in folder.rglob("*.png")
    }
    assert {image.numpy().tobytes() for image in everything} == expected
    again, other = load(folder, tmp_path), load(folder, tmp_path, seed=1)
    assert sets.fingerprint == again.fingerprint != other.fingerprint
    assert_close(again.test[:2], sets.test[:2])


def empty_files(root: Path, each: int) -> None:
    """Create files named as images in two class folders."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for n in range(each):
            (root / name / f"{n}.png").touch()


@pytest.mark.parametrize(("each", "held_out"), [(2, 1), (14, 1), (16, 2), (24, 2)])
def test_the_held_out_tenth_is_rounded_and_never_empty(tmp_path, each, held_out):
    empty_files(tmp_path, each)
    parts = folders.list_folder(tmp_path, None, 0).parts
    assert {part: len(files) for part, files in parts.items()} == {
        "train": 2 * (each - held_out), "test": 2 * held_out,
    }  # fmt: skip


def test_hidden_folders_are_not_classes(folder, tmp_path):
    shutil.copytree(folder / "class0", folder / ".hidden")
    assert load(folder, tmp_path).classes == ["class0", "class1", "class2"]


def test_hidden_images_are_left_out(folder, tmp_path):
    before = load(folder, tmp_path).fingerprint
    picture = next((folder / "class0").iterdir())
    (folder / "class0" / ".thumbnails").mkdir()
    for name in (f".thumbnails/{picture.name}", f"._{picture.name}"):
        shutil.copy(picture, folder / "class0" / name)
    assert load(folder, tmp_path).fingerprint == before


def test_a_folder_that_cannot_be_read_is_not_left_out(folder, monkeypatch):
    (folder / "class0" / "deep").mkdir()
    scan = os.scandir

    def fail(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(PermissionError, match="deep"):
        list(walk_images(folder))


def test_files_have_the_same_order_on_windows(monkeypatch):
    """Sort by the path with "/", and not with a backslash, which comes after the digits."""
    found = [("C:\\set\\cat", ["1"], ["10.png"]), ("C:\\set\\cat\\1", [], ["2.png"])]
    windows = SimpleNamespace(walk=lambda *_, **__: found, path=ntpath, sep="\\")
    monkeypatch.setattr(transform, "os", windows)
    files = sorted(walk_images(Path("C:\\set\\cat")))
    assert files == ["C:/set/cat/1/2.png", "C:/set/cat/10.png"]


def test_a_folder_is_decoded_at_the_papers_224_pixels_unless_asked(folder, tmp_path):
    sets = load(folder, tmp_path, size=None)
    assert sets.train.images.shape[1:] == sets.test.images.shape[1:] == (3, 224, 224)


def test_an_image_may_be_one_pixel(folder, tmp_path):
    found = load(folder, tmp_path, size=1)
    assert found.test.images.shape[1:] == (3, 1, 1)


def test_train_and_val(tmp_path):
    root = tmp_path / "split"
    for part in ("train", "val"):
        image_folder(root / part, each=4 if part == "train" else 2)
    sets = load(root, tmp_path)
    assert len(sets.train.labels) == 12 and len(sets.test.labels) == 6
    (root / "val" / "class1").rename(root / "val" / "other")
    with pytest.raises(UserError, match="need the same classes; only one has 'class1'"):
        load(root, tmp_path)
    (root / "val").rename(root / "elsewhere")
    with pytest.raises(UserError, match="has train/CLASS but no val/CLASS"):
        load(root, tmp_path)


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("TRAIN", "Valid"), ("train", "validation")]
)
def test_the_parts_have_several_names(tmp_path, train, test):
    image_folder(tmp_path / "set" / train, each=4)
    image_folder(tmp_path / "set" / test, each=2)
    (tmp_path / "set" / train / "readme.txt").touch()
    sets = load(tmp_path / "set", tmp_path)
    assert sets.classes == ["class0", "class1", "class2"]
    assert len(sets.train.labels) == 12 and len(sets.test.labels) == 6
    assert sets.origin == f"all of {tmp_path / 'set' / test}"
    image_folder(tmp_path / "set" / "val", each=3)  # the first of the known names is taken
    assert len(load(tmp_path / "set", tmp_path).test.labels) == 9


def test_the_same_one_of_train_and_its_capitalized_name_is_taken_in_any_order(
    tmp_path, monkeypatch
):
    names = ("train", "Train", "val")
    for name in names:
        empty_files(tmp_path / name, each=1)
    # The order of a folder's entries depends on the file system.
    for order in (names, names[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda self, order=order: map(self.joinpath, order))
        parts = folders.list_folder(tmp_path, None, 0).parts
        assert [file.path for file in parts["train"]] == ["Train/a/0.png", "Train/b/0.png"]


def test_a_class_may_be_named_like_a_part(folder, tmp_path):
    (folder / "class0").rename(folder / "train")
    assert load(folder, tmp_path).classes == ["class1", "class2", "train"]


def test_class_folders_that_hold_only_folders_are_refused(tmp_path):
    for part in ("learning", "checking"):
        image_folder(tmp_path / "set" / part)
        (tmp_path / "set" / part / ".DS_Store").touch()
    message = r"checking holds folders alone, and no images \(layout: train/CLASS/\*.jpg and val"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "set", tmp_path)
    (tmp_path / "set" / "checking" / "list.txt").touch()  # Tiny ImageNet's classes have such files
    (tmp_path / "set" / "learning" / "list.txt").touch()
    assert load(tmp_path / "set", tmp_path).classes == ["checking", "learning"]


def test_classes_are_drawn_with_the_seed(tmp_path):
    folder = image_folder(tmp_path / "set", classes=8, each=2)
    chosen = [load(folder, tmp_path, num_classes=4, seed=s).classes for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(chosen[0]) and len(chosen[0]) == 4
    with pytest.raises(UserError, match="--classes 9: the dataset has 8"):
        load(folder, tmp_path, num_classes=9)


def test_the_cache_is_used_while_nothing_changes(folder, tmp_path, monkeypatch):
    first = copy.deepcopy(content(load(folder, tmp_path)))  # the mapped file is truncated below
    calls = []
    decode = cache.decode
    monkeypatch.setattr(cache, "decode", lambda *args: calls.append(args) or decode(*args))
    assert states_equal(content(load(folder, tmp_path)), first)
    monkeypatch.chdir(folder.parent)
    load(Path(folder.name), tmp_path)
    assert not calls
    os.utime(folder / "class0" / "0.png", (1, 1))
    load(folder, tmp_path)
    assert 1 <= len(calls) <= 27  # only one of the two parts is decoded again
    del calls[:]
    load(folder, tmp_path, size=13)
    assert len(calls) == 30
    del calls[:]
    for pixels in (tmp_path / "cache").glob("*.u8"):
        pixels.write_bytes(pixels.read_bytes()[:-1])
    assert states_equal(content(load(folder, tmp_path)), first)
    assert len(calls) == 30
    del calls[:]
    for manifest in (tmp_path / "cache").glob("*.json"):
        manifest.write_text(manifest.read_text()[:10])
    assert states_equal(content(load(folder, tmp_path)), first)
    assert len(calls) == 30


def test_a_file_of_another_size_is_decoded_again_even_if_its_time_is_the_same(folder, tmp_path):
    path = folder / load(folder, tmp_path).paths[0]
    before = path.stat()
    Image.new("RGB", (12, 12)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size != before.st_size
    assert not load(folder, tmp_path).test.images[0].any()


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_pixels_are_another_dataset(folder, tmp_path, part):
    before = load(folder, tmp_path)
    tested = {folder / path for path in before.paths}
    path = next(p for p in folder.rglob("*.png") if (p in tested) == (part == "test"))
    os.utime(path, (1, 1))
    touched = load(folder, tmp_path)
    assert (touched.fingerprint, touched.test_fingerprint) == (
        before.fingerprint,
        before.test_fingerprint,
    )
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    after = load(folder, tmp_path)
    assert after.fingerprint != before.fingerprint
    assert (after.test_fingerprint != before.test_fingerprint) == (part == "test")


def test_images_that_another_run_decodes_are_waited_for(folder, tmp_path, capsys):
    """Check that the second run of two enters when the first has left, and reads its images."""
    order, decoded = [], load(folder, tmp_path).fingerprint
    for path in (tmp_path / "cache").glob("*.json"):
        path.rename(path.with_suffix(".kept"))

    def second():
        assert load(folder, tmp_path).fingerprint == decoded
        order.append("second")

    thread = threading.Thread(target=second)
    with lock_folder(tmp_path / "cache"):
        thread.start()
        said, end = "", time.monotonic() + 60
        while "waiting for another run" not in said and time.monotonic() < end:
            said += capsys.readouterr().err
            time.sleep(0.01)
        time.sleep(0.3)
        for path in (tmp_path / "cache").glob("*.kept"):
            path.rename(path.with_suffix(".json"))
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.u8")}
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"] and "waiting for another run" in said
    assert all(path.stat().st_mtime_ns == written for path, written in times.items())


def test_a_fault_of_the_disk_is_not_cached_as_a_bad_image(folder, tmp_path, monkeypatch):
    real, calls = cache.Image.open, iter(range(99))

    def faulty(path):
        if next(calls) == 3:
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    with monkeypatch.context() as broken, pytest.raises(OSError, match="Input/output"):
        broken.setattr(cache.Image, "open", faulty)
        load(folder, tmp_path, skip_bad_images=True)
    assert len(load(folder, tmp_path, skip_bad_images=True).train.labels) == 27


def test_the_training_part_is_not_decoded_for_a_test(folder, tmp_path, monkeypatch):
    calls = []
    decode = cache.decode
    monkeypatch.setattr(cache, "decode", lambda *args: calls.append(args) or decode(*args))
    part = load(folder, tmp_path, test_only=True)
    assert len(calls) == len(part.test.labels) == 3
    assert len(part.train.labels) == 0 and part.fingerprint == ""
    whole = load(folder, tmp_path)
    assert whole.test_fingerprint == part.test_fingerprint != whole.fingerprint
    assert load(folder, tmp_path, test_only=True).fingerprint == whole.fingerprint
    assert len(calls) == 30
    image_folder(tmp_path / "split" / "train", each=4)
    image_folder(tmp_path / "split" / "val", each=2)
    split, alone = load(tmp_path / "split", tmp_path), tmp_path / "split" / "val"
    again = load(alone, tmp_path, test_only=True, hold_out=False)
    assert split.test_fingerprint == again.test_fingerprint
    (alone / "class1" / "1.png").rename(alone / "class1" / "2.png")  # in the same order
    assert split.test_fingerprint != load(tmp_path / "split", tmp_path).test_fingerprint


def test_a_crash_while_decoding_leaves_no_cache(folder, tmp_path, monkeypatch):
    def crash(*args):
        raise MemoryError

    monkeypatch.setattr(cache, "decode", crash)
    with pytest.raises(MemoryError):
        load(folder, tmp_path)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_no_class_loses_all_its_images_where_bad_ones_are_skipped(tmp_path):
    root = tmp_path / "set"
    for part in ("train", "val"):
        image_folder(root / part, each=2)
    for part, taken in (("val", "test"), ("train", "train")):
        whole = [path.read_bytes() for path in sorted((root / part / "class1").iterdir())]
        for path in (root / part / "class1").iterdir():
            path.write_bytes(b"no image")
        with pytest.raises(UserError, match=rf"'class1' has no readable image for the {taken} p"):
            load(root, tmp_path, skip_bad_images=True)
        for path, data in zip(sorted((root / part / "class1").iterdir()), whole, strict=True):
            path.write_bytes(data)
    assert len(load(root, tmp_path, skip_bad_images=True).train.labels) == 6


def test_the_default_cache_needs_no_home_directory(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.default_cache_dir() == tmp_path / "mtlat"
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert cache.default_cache_dir() == Path("elsewhere/mtlat")


def test_bad_images_stop_or_are_skipped_and_counted(tmp_path, capsys):
    folder = image_folder(tmp_path / "images", each=20)  # of which two or more are tested
    (folder / "class1" / "broken.jpg").write_bytes(b"no image")
    (folder / "class2" / "empty.png").write_bytes(b"")
    whole = (folder / "class0" / "0.png").read_bytes()
    (folder / "class0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"(broken\.jpg|empty\.png|cut\.png): not a usable image"):
        load(folder, tmp_path)
    for _ in range(2):
        sets = load(folder, tmp_path, skip_bad_images=True)
        assert len(sets.train.labels) + len(sets.test.labels) == 60
        assert sum(int(line.split()[2]) for line in capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(UserError, match="not a usable image"):  # though it is in the cache
        load(folder, tmp_path)
    for seed in range(9):  # in most of these draws, a bad image is in the test part
        sets = load(folder, tmp_path, skip_bad_images=True, seed=seed)
        for path, image in zip(sets.paths, sets.test.images, strict=True):
            expected = np.asarray(Image.open(folder / path)).transpose(2, 0, 1)
            assert np.array_equal(image, expected)


def test_images_are_resized_as_pillow_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 41, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    found = cache.decode(tmp_path / "x.png", 16)
    assert found.dtype == np.uint8 and np.array_equal(found.transpose(1, 2, 0), expected)


def test_pixels_of_an_unknown_range_are_refused(tmp_path):
    gray = np.linspace(0, 255, 256).reshape(16, 16)
    Image.fromarray(gray.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray((gray / 255).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(gray.astype(np.uint16)).save(tmp_path / "dark.png")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "black.png")
    assert not cache.decode(tmp_path / "black.png", 16).any()  # of any range
    for name in ("int.tif", "float.tif", "dark.png"):
        assert "more than 8 bits per pixel" in cache.decode(tmp_path / name, 16)


def test_folders_behind_links_are_read(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    few = load(folder, tmp_path)
    (name, *_) = few.classes
    moved.mkdir()
    for file in list((folder / name).iterdir())[::2]:
        file.rename(moved / file.name)
    (folder / name / "more").symlink_to(moved)
    assert len(load(folder, tmp_path).train.labels) == len(few.train.labels)


def test_what_several_links_lead_to_is_read_once(folder, tmp_path):
    before = load(folder, tmp_path)
    (folder / "class0" / "loop").symlink_to(folder / "class0")
    assert states_equal(content(load(folder, tmp_path)), content(before))
    (tmp_path / "more").mkdir()
    for name in "ab":
        (folder / "class1" / name).symlink_to(tmp_path / "more")
    (folder / "class1" / "0.png").rename(tmp_path / "more" / "0.png")
    files = list_classes(folder)["class1"]
    assert len(files) == 10 and str(folder / "class1" / "a" / "0.png") in files


def test_a_set_larger_than_the_memory_is_mapped(tmp_path):
    path, count, size = tmp_path / "huge", 2**17, 4096
    with open(path, "wb") as file:
        file.truncate(count * 3 * size**2)  # 6 TiB, of which the disk stores nothing
    try:
        images, _, mapping = map_images(path, [0] * count, size)
    finally:
        path.unlink()
    assert images.shape == (count, 3, size, size) and images[-1, 2, -1, -1] == 0
    del images
    mapping.close()


def test_folders_that_cannot_serve(folder, tmp_path):
    cases = {
        "no such folder": tmp_path / "nowhere",
        "holds 0 class folders": tmp_path / "empty",
        "class 'lone' has no image for the train part: it needs 2 or more, because one is held":
            tmp_path / "lone",
        "class 'b' has no image for the train part": tmp_path / "hollow",
        "class 'class0' has no image for the test part: add one": tmp_path / "parts",
    }  # fmt: skip
    for part, empty in (("train", "none"), ("val", "class0")):
        image_folder(tmp_path / "parts" / part)
        for file in (tmp_path / "parts" / part).glob(f"{empty}/*"):
            file.unlink()
    (tmp_path / "empty").mkdir()
    image_folder(tmp_path / "lone", each=3)
    (tmp_path / "lone" / "lone").mkdir()
    (folder / "class0" / "0.png").rename(tmp_path / "lone" / "lone" / "0.png")
    for name in "ab":
        (tmp_path / "hollow" / name).mkdir(parents=True)
    (folder / "class0" / "1.png").rename(tmp_path / "hollow" / "a" / "0.png")
    (folder / "class0" / "2.png").rename(tmp_path / "hollow" / "a" / "1.png")
    for message, root in cases.items():
        with pytest.raises(UserError, match=message):
            load(root, tmp_path)


# ---------------------------------------------------------------- CIFAR and the batch loader


def test_cifar(tmp_path, monkeypatch):
    class Fake:
        classes = ("zebra", "ant", "mouse")

        def __init__(self, root, train, download):
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            n = 9 if train else 6
            self.data = np.arange(n * 32 * 32 * 3).reshape(n, 32, 32, 3).astype(np.uint8)
            self.targets = [k % 3 for k in range(n)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    with pytest.raises(
        UserError, match=r"cifar10 is not in .*: name its .* train.py --data cifar10 --download"
    ):
        datasets.load_dataset("cifar10", cache_dir=tmp_path)
    sets = datasets.load_dataset("cifar10", cache_dir=tmp_path, download=True)
    assert sets.classes == ["ant", "mouse", "zebra"]
    assert sets.train.labels.tolist() == [2, 0, 1] * 3  # in the order of the sorted names
    assert sets.train.images[0, 2, 0, 1] == 5
    assert sets.paths == [f"cifar10/{i}" for i in range(6)]
    small = datasets.load_dataset("cifar10", cache_dir=tmp_path, download=True, size=8)
    assert small.test.images.shape[-1] == 8 and small.fingerprint != sets.fingerprint
    two = datasets.load_dataset("cifar10", cache_dir=tmp_path, download=True, num_classes=2)
    assert two.paths == [f"cifar10/{i}" for i in range(6) if Fake.classes[i % 3] in two.classes]
    assert len(two.classes) == 2 and len(two.paths) == len(two.test.labels) == 4
    pairs = [
        datasets.load_dataset(
            "cifar10", cache_dir=tmp_path, download=True, num_classes=2, seed=seed
        )
        for seed in range(9)
    ]
    assert len({sets.fingerprint for sets in pairs}) == len({(*s.classes,) for s in pairs}) == 3


def test_a_failed_download_of_cifar_names_the_network(tmp_path, monkeypatch):
    def offline(root, train, download):
        assert download
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    said = r"--download: cannot download cifar10 \(no network\): check the network, or put the file"
    places = "--cache-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")
    config, _ = parse_train_config(["--data", "cifar10", "--download", *places])
    with pytest.raises(UserError, match=f"{said} into {tmp_path}"):
        train.load_data(config)


def test_the_loader_gives_every_image_once_in_the_unit_range():
    images = torch.arange(7 * 3 * 4).reshape(7, 3, 2, 2).to(torch.uint8) * 3
    feed = BatchLoader(ImageSet(images, torch.arange(7)), torch.device("cpu"))
    batches = list(feed.in_order(3))
    assert [len(y) for _, y in batches] == [3, 3, 1] and len(feed) == 7
    assert torch.cat([y for _, y in batches]).tolist() == [*range(7)]
    assert_close(torch.cat([x for x, _ in batches]), images / 255)
    x, y = feed(torch.tensor([5, 1, 5]))
    assert y.tolist() == [5, 1, 5] and x.dtype == torch.float32
    assert_close(x, images[[5, 1, 5]] / 255)


def test_the_loader_reads_ahead_what_it_will_take_and_nothing_else(folder, tmp_path):
    sets = load(folder, tmp_path, size=100)  # 30,000 bytes, not a multiple of the page size
    assert sets.train.images.is_contiguous() and len(sets.train.mapping) == 27 * 30_000
    asked = []

    class Mapping:
        def madvise(self, option, start, length):
            sets.train.mapping.madvise(option, start, length)
            asked.append((option, start, start + length))

    feed = BatchLoader(sets.train._replace(mapping=Mapping()), torch.device("cpu"))
    numbers = torch.tensor([26, 0, 13])
    x, y = feed(numbers)
    assert_close(x, sets.train.images[numbers] / 255)
    assert torch.equal(y, sets.train.labels[numbers])
    assert len(asked) == 3
    for n, (option, start, stop) in zip(numbers.tolist(), asked, strict=True):
        assert option == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        assert 0 <= n * 30_000 - start < mmap.PAGESIZE and stop == (n + 1) * 30_000


def test_prefetch_keeps_order_bounds_and_errors():
    began, rest = [], threading.Event()

    def slow(n):
        began.append(n)
        rest.wait()
        if n == 6:
            raise ValueError(f"no {n}")
        return n * n

    threads = threading.active_count()
    results = prefetch(slow, itertools.count(), threads=2, window=3)
    rest.set()
    assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
    assert set(began) <= set(range(4 + 3))
    assert [next(results) for _ in range(2)] == [16, 25]
    with pytest.raises(ValueError, match="no 6"):
        next(results)
    results = prefetch(slow, range(4), threads=1, window=2)
    assert next(results) == 0 and threading.active_count() == threads + 1
    results.close()
    assert threading.active_count() == threads  # no thread outlives its iterator
    assert [*prefetch(slow, range(3), threads=1, window=9)] == [0, 1, 4]


def test_nothing_is_held_out_of_a_test_part_alone(folder, tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "val").symlink_to(folder)
    listing = folders.list_folder(tmp_path / "only", None, 0, test_only=True)
    assert len(listing.parts["test"]) == 30 and not listing.held_out


def test_the_files_of_both_parts_are_in_the_order_of_their_names(folder):
    parts = folders.list_folder(folder, None, 0).parts.values()
    assert all(list(files) == sorted(files) for files in parts)


def test_an_image_without_its_shape_and_its_grating_is_clutter():
    empty, _ = embedded.draw_shapes(range(10), 32, shapes=False, amplitude=0)
    grated, _ = embedded.draw_shapes(range(10), 32, shapes=False)
    assert (empty.int() - grated.int()).abs().max() <= 255 * embedded.AMPLITUDE + 1
