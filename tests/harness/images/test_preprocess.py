"""Test the two ways to make images square, and the choice between them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corruptions.__main__ import load
from harness.errors import UserError
from harness.images import cache, datasets, preprocess
from harness.images.preprocess import CROPS, Crop, choose_crop, describe, resize_side
from tests.support.tiny import image_folder

SQUASH, CENTER = CROPS["squash"], CROPS["center-crop"]


@pytest.mark.parametrize("shape", [(451, 300), (300, 451), (224, 224), (60, 500)])
@pytest.mark.parametrize(("size", "crop"), [(224, CENTER), (64, SQUASH)])
def test_clean_images_are_those_of_the_tree(
    tmp_path: Path, shape: tuple[int, int], size: int, crop: Crop
) -> None:
    """Check that `python -m corruptions` and evaluate.py prepare an image in the same way."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer must rotate the image clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    clean = cache.decode(tmp_path / "x.png", size, resize_side(crop, size))
    assert np.array_equal(clean, load(tmp_path / "x.png", size).numpy())


def test_the_weights_decide_the_sides() -> None:
    assert [resize_side((232, 224), size) for size in (224, 112)] == [232, 116]
    assert describe((232, 224), 224) == "center-crop 232->224"
    assert describe(SQUASH, 64) == "squash" and describe(CENTER, 64) == "center-crop 73->64"


def test_one_preprocessing_is_chosen_or_the_mismatch_is_refused(tmp_path: Path) -> None:
    published, own = tmp_path / "published", tmp_path / "own"
    for tree in (published, own):
        tree.mkdir()
    (own / "settings.json").write_text(json.dumps({"size": 64}))
    resnet = {"resnet": (232, 224)}
    assert choose_crop(None, None, {}) == SQUASH
    assert choose_crop(None, None, resnet) == (232, 224)
    assert choose_crop("center-crop", None, resnet) == CENTER
    assert choose_crop("squash", None, resnet) == SQUASH
    assert choose_crop(None, published, resnet) == CENTER
    assert choose_crop(None, published, {}) == CENTER and choose_crop(None, own, {}) == SQUASH
    (own / "settings.json").write_text(json.dumps({"size": 224}))
    assert choose_crop(None, own, {}) == CENTER
    for asked, tree, models, message in (
        (None, published, {"a.pt": None}, "a.pt expects the preprocessing squash, and --image"),
        (None, None, resnet | {"a.pt": None}, "and resnet expects center-crop 232->224: "),
        (None, None, resnet | {"vgg": CENTER}, "vgg expects the preprocessing center-crop 256"),
        ("squash", published, {}, "--preprocess squash: the images of --imagenet-c"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            choose_crop(asked, tree, models)
    (own / "settings.json").unlink()  # as the published Tiny-ImageNet-C
    for side, crop in ((64, SQUASH), (224, CENTER)):
        path = own / "fog" / "1" / "class" / "x.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(path)
        assert choose_crop(None, own, {}) == crop
    for content in ("[]", "[" * 100_000):
        (own / "settings.json").write_text(content)
        with pytest.raises(UserError, match=r"settings.json is damaged"):
            choose_crop(None, own, {})


def test_crops_are_cached_apart(tmp_path: Path) -> None:
    root, where = image_folder(tmp_path / "set", side=40), tmp_path / "cache"
    sets = [
        datasets.load_dataset(str(root), size=32, crop=crop, cache_dir=where)
        for crop in (SQUASH, CENTER, (40, 32), SQUASH)
    ]
    assert len({s.test_fingerprint for s in sets}) == 3
    assert sets[0].test_fingerprint == sets[3].test_fingerprint
    path = root / sets[2].paths[0]
    cut = np.asarray(Image.open(path))[4:36, 4:36].transpose(2, 0, 1)
    assert np.array_equal(sets[2].test.images[0], cut)
    with pytest.raises(UserError, match="--preprocess center-crop: the images of shapes are"):
        datasets.load_dataset("shapes", crop=CENTER)


def test_the_shorter_side_is_rounded() -> None:
    assert preprocess.resize_side((256, 224), 32) == 37  # 36.57


def test_trees_are_cropped_at_224_alone(tmp_path: Path) -> None:
    for size in (64, 223, 225, 299):
        (tmp_path / "settings.json").write_text(f'{{"size": {size}}}')
        assert preprocess.tree_crop(tmp_path) is None
