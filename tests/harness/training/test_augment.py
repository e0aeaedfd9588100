"""Test the augmentation against torchvision's, image by image."""

from itertools import product

import torch
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as v2

from harness.training.augment import flip_crop
from tests.support.method import images, seeded


def test_flip_crop_is_torchvisions_for_every_shift_and_both_flips() -> None:
    x = images(0, 1).expand(18, -1, -1, -1).contiguous()  # of 8 pixels, padded by 1
    u = torch.tensor(list(product([0.0, 0.5, 0.99], [0.0, 0.5, 0.99], [0.49, 0.5]))).T
    found = flip_crop(x, u)
    for image, made, (top, left, flip) in zip(x, found, u.T.tolist(), strict=True):
        expected = v2.crop(v2.pad(image, [1] * 4), int(3 * top), int(3 * left), 8, 8)
        expected = v2.horizontal_flip(expected) if flip < 0.5 else expected
        assert_close(made, expected, rtol=0, atol=0)
    assert torch.equal(found[9], x[0]) and found.is_contiguous()


def test_each_image_has_its_own_numbers() -> None:
    x = torch.rand(300, 3, 32, 32, generator=seeded(0))
    u = torch.rand(3, 300, generator=seeded(1))
    found = flip_crop(x, u)
    for i in (0, 7, 299):
        assert torch.equal(flip_crop(x[i : i + 1], u[:, i : i + 1])[0], found[i])
    black = (found == 0).all(1).float().mean()  # on average 2.2 of 32 rows, and of columns
    assert 0.11 < black < 0.16
