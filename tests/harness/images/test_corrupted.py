"""Test that the published layouts of corrupted images give each test image its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import evaluate
from harness.benchmark.store import read_cells
from harness.errors import UserError
from harness.images import corrupted
from harness.images.corrupted import find_corruption, open_corrupted
from harness.images.datasets import Dataset
from harness.images.loader import ImageSet
from tests.support.tiny import image_folder

CLASSES = ["zebra", "ant", "mouse"]  # not sorted, so that labels of arrays differ from ours
COUNT = 12


class Cifar:
    """CIFAR-10 with a few images, whose colors tell their classes."""

    classes = CLASSES

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        random = np.random.default_rng(train)
        self.targets = random.permutation(np.arange(COUNT) % 3).tolist()
        self.data = random.integers(0, 99, (COUNT, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Write a small CIFAR-10-C: severity s makes image i the color 20 s + i."""
    folder, labels = tmp_path / "C", Cifar(tmp_path, False, False).targets
    folder.mkdir()
    colors = 20 * np.repeat(np.arange(1, 6), COUNT) + np.tile(np.arange(COUNT), 5)
    images = np.broadcast_to(colors[:, None, None, None], (5 * COUNT, 32, 32, 3))
    np.save(folder / "fog.npy", images.astype(np.uint8))
    np.save(folder / "labels.npy", np.tile(np.array(labels), 5))
    return folder


def clean(kept: list[str]) -> Dataset:
    """Make a dataset of the test images of some classes, as datasets.py does."""
    targets = Cifar(Path(), False, False).targets
    rows = [i for i, k in enumerate(targets) if CLASSES[k] in kept]
    labels = torch.tensor([sorted(kept).index(CLASSES[targets[i]]) for i in rows])
    test = ImageSet(torch.zeros(len(rows), 3, 32, 32, dtype=torch.uint8), labels)
    return Dataset(test, test, sorted(kept), [f"cifar10/{i}" for i in rows], "", "", "test")


@pytest.mark.parametrize("kept", [CLASSES, ["ant", "zebra"]])
def test_an_array_gives_each_image_its_own(published: Path, kept: list[str]) -> None:
    place, test = find_corruption(published, "fog", "weather"), clean(kept)
    assert place == published / "fog.npy"
    assert find_corruption(published, "snow", "weather") is None
    numbers = [int(path.split("/")[1]) for path in test.paths]
    for severity in (1, 5):
        chosen = [1, 4, 3]
        read = open_corrupted(place, severity, test, chosen, 32)
        for image, i in zip(read(chosen), chosen, strict=True):
            assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
            assert image.unique().tolist() == [20 * severity + numbers[i]]
        (small,) = open_corrupted(place, severity, test, chosen, 16)([4])
        assert small.shape == (3, 16, 16) and small.unique().tolist() == [
            20 * severity + numbers[4]
        ]


def test_arrays_stay_on_the_disk(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, load = [], corrupted._load_array
    monkeypatch.setattr(
        corrupted, "_load_array", lambda path: (found.append(load(path)), found[-1])[1]
    )
    open_corrupted(published / "fog.npy", 1, clean(CLASSES), [0], 32)
    assert len(found) == 2
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in found)


def test_arrays_of_other_test_images_are_refused(published: Path) -> None:
    place, labels, test = published / "fog.npy", published / "labels.npy", clean(CLASSES)
    right = np.load(labels)
    swapped = np.tile(np.roll(right[:COUNT], 1), 5)
    late = np.concatenate([right[: 4 * COUNT], swapped[4 * COUNT :]])  # wrong at severity 5 alone
    short = right.reshape(5, COUNT)[:, :-1].flatten()
    indices = np.tile(np.arange(COUNT), 5)
    for wrong in (swapped, late, short, right[: 4 * COUNT], right // 2, np.sort(right),
                  right[::-1], right[0], indices):  # fmt: skip
        np.save(labels, wrong)
        np.save(place, np.zeros((wrong.size, 32, 32, 3), np.uint8))
        with pytest.raises(UserError, match=r"labels.npy .* 5 times the labels of the .* cifar10"):
            open_corrupted(place, 1, test, [0], 32)
    np.save(labels, right)
    np.save(place, np.zeros((5 * COUNT, 32, 32, 3), np.uint8))
    rest = ImageSet(test.test.images[1:], test.test.labels[1:])
    fewer = test._replace(paths=test.paths[1:], test=rest)
    with pytest.raises(UserError, match=r"5 times the labels"):
        open_corrupted(place, 1, fewer, [0], 32)
    np.save(place, np.zeros((5 * COUNT, 32, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"is float32 \(60, 32, .* must be uint8 \(60, 32, 32, 3\)"):
        open_corrupted(place, 1, test, [0], 32)
    np.save(place, np.zeros((50, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"is uint8 \(50, 32.*60 labels .* uint8 \(60, 32, 32, 3\)"):
        open_corrupted(place, 1, test, [0], 32)
    np.savez(published / "other.npz", np.zeros((60, 32, 32, 3), np.uint8))
    damaged = [place.read_bytes().replace(*change) for change in ((b"}", b"{"), (b"(50", b"(05"))]
    for content in (b"hello", (published / "other.npz").read_bytes(), *damaged):
        place.write_bytes(content)
        with pytest.raises(UserError, match=r"fog.npy is not an array"):
            open_corrupted(place, 1, test, [0], 32)
    labels.unlink()
    np.save(place, np.zeros((60, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"labels.npy is missing; the layout is NAME.npy and"):
        open_corrupted(place, 1, test, [0], 32)


def test_images_whose_names_differ_only_in_their_suffix_are_refused(tmp_path: Path) -> None:
    (tmp_path / "fog" / "1" / "ant").mkdir(parents=True)
    (tmp_path / "fog" / "1" / "ant" / "a.JPEG").touch()
    data = clean(["ant"])._replace(paths=["ant/a.png", "ant/a.jpg"])
    with pytest.raises(UserError, match="two images of --data differ only in their suffix"):
        open_corrupted(tmp_path / "fog", 1, data, [0, 1], 32)


def scores(out: Path) -> dict[tuple[str, int | None], int]:
    return {
        (c["perturbation"], c["severity"]): c["correct"] for c in read_cells(out / "cells.jsonl")
    }


def run(out: Path, *options: str) -> dict[tuple[str, int | None], int]:
    argv = ["tiny:normed", "--device", "cpu", "--cache-dir", "cache", "--dump-images", "0"]
    evaluate.main([*argv, "--output-dir", str(out), *options])
    return scores(out)


def test_cifar_is_scored_with_the_published_arrays(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    monkeypatch.chdir(tmp_path)
    test = Cifar(tmp_path, False, False)
    blocks = [np.roll(test.data, s, axis=0) for s in range(5)]  # severity 1: the clean images
    np.save(published / "fog.npy", np.concatenate(blocks))
    torch.manual_seed(0)
    found = run(
        tmp_path / "out", "--data", "cifar10", "--imagenet-c", "C", "--only", "fog", "-b", "5"
    )
    assert found["fog", 1] == found["clean", None]
    cells = read_cells(tmp_path / "out" / "cells.jsonl")
    assert {c["imagenet_c"] for c in cells if c["severity"]} == {str(published / "fog.npy")}
    assert {c["n"] for c in cells} == {COUNT} and {c["preprocess"] for c in cells} == {"squash"}


def test_tiny_imagenet_c_is_scored_without_resizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a tree of 64 px with the names of the test images, and extra/ of validation ones."""
    monkeypatch.chdir(tmp_path)
    root = image_folder(tmp_path / "val", each=4, side=64)
    for name in ("brightness", "extra/speckle_noise"):
        for severity in range(1, 6):
            for path in root.rglob("*.png"):
                target = tmp_path / "C" / name / str(severity) / path.relative_to(root)
                target = target.with_suffix(".JPEG")  # which Pillow recognizes by its content
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    options = ["--data", str(root), "--imagenet-c", "C", "--size", "64"]
    torch.manual_seed(0)
    found = run(tmp_path / "out", *options, "--only", "brightness", "speckle_noise")
    assert len(set(found.values())) == 1 and len(found) == 11
    cells: list[Any] = read_cells(tmp_path / "out" / "cells.jsonl")
    assert {c["preprocess"] for c in cells} == {"squash"}
    assert {c["imagenet_c"] for c in cells} == {
        None, str(tmp_path / "C" / "brightness"), str(tmp_path / "C" / "extra" / "speckle_noise")
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "results.json").read_text())["preprocess"] == "squash"
    Image.new("RGB", (64, 64)).save(root / "class0" / "new.png")
    with pytest.raises(UserError, match=r"brightness.1 lacks 1 of the 13 .* class0/new; the lay"):
        run(tmp_path / "other", *options, "--only", "brightness")
