"""Test what is checked before the first epoch, and would otherwise end a training after it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train
from harness.checkpoints import check_savable
from harness.errors import UserError
from harness.training.checks import check_trainable
from harness.training.config import parse_train_config
from harness.training.methods import METHODS
from tests.support import world
from tests.support.tiny import Wrapped, image_folder, linear


class Views(nn.Linear):
    """A network that needs contiguous images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(len(x), -1))


class Squeezes(nn.Linear):
    """A network that drops the batch's axis of a single image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3)).squeeze())


class Expands(nn.Module):
    """A network whose buffer shares one number among three."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network, self.mask = linear(num_classes), nn.Buffer(torch.ones(1).expand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * self.mask)


def put(logits: Tensor) -> Tensor:
    """Copy logits into float32 through a mask, which fails where they are bfloat16."""
    filled = torch.zeros(logits.shape)
    filled[torch.ones(len(logits), dtype=torch.bool)] = logits
    return filled


def views(num_classes: int) -> nn.Module:
    return Views(768, num_classes)


def squeezes(num_classes: int) -> nn.Module:
    return Squeezes(3, num_classes)


def puts(num_classes: int) -> nn.Module:
    return Wrapped(linear(num_classes), put)


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "set", each=11, side=16)
    flags = "--data set --size 16 --epochs 1 -b 10 --device cpu --cache-dir cache --output-dir out"
    return flags.split()


@pytest.mark.parametrize(
    ("network", "flags", "said"),
    [
        ("views", "--channels-last", "views with --channels-last fails on images"),
        ("puts", "--amp bf16", "puts with --amp bf16 fails on images"),
        ("squeezes", "", r"squeezes in eval mode fails on images \(1, 3, 16, 16\): .*shape \(3,\)"),
        ("Expands", "", r"mask is an expanded tensor.*register its \.clone\(\)"),
    ],
)
def test_a_network_that_would_fail_later_is_refused(
    argv: list[str], network: str, flags: str, said: str
) -> None:
    argv += ["--arch", f"{__name__}:{network}"]
    if flags:
        train.main([*argv, "--output-dir", "without"])
    with pytest.raises(UserError, match=said):
        train.main([*argv, *flags.split()])


def test_a_buffer_may_share_no_number_between_two_places() -> None:
    model, twice = nn.Module(), torch.ones(3).expand(2, 3)
    model.register_buffer("mask", twice[:1])  # of stride 0, but one row alone
    check_savable("m", model)
    model.mask = twice
    with pytest.raises(UserError, match=r"^m: mask is an expanded tensor"):
        check_savable("m", model)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-b 1", "-b 1 makes minibatches of 0, and there are 30 training images: raise it"),
        ("-b 62", "-b 62 makes minibatches of 31, and there are 30 training images: lower it"),
        ("-b 60", ""),
    ],
)
def test_a_minibatch_has_an_image_and_no_more_than_there_are(
    argv: list[str], flags: str, said: str
) -> None:
    argv += ["--arch", "tiny:linear", *flags.split()]
    if said:
        with pytest.raises(UserError, match=said.replace("-b", "--batch-size")):
            train.main(argv)
    else:
        train.main(argv)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--cache-dir out", "--cache-dir and --output-dir are both .*out: choose another"),
        ("--output-dir set/runs/x", "--output-dir .*x lies in set, whose folders are classes: cho"),
        ("--cache-dir set/cache", "--cache-dir .*cache lies in set, whose folders are classes"),
        ("--data both --output-dir both/val/x", "--output-dir .*x lies in both/val, whose folders"),
        ("--data both --cache-dir both/train/x", "--cache-dir .*x lies in both/train, whose fold"),
    ],
)
def test_folders_that_would_wait_for_each_other_or_become_classes_are_refused(
    argv: list[str], flags: str, said: str
) -> None:
    folders = Path("set"), Path("both", "train"), Path("both", "val")
    for part in folders[1:]:
        image_folder(part, side=16)
    with pytest.raises(UserError, match=said):
        train.main([*argv, "--arch", "tiny:linear", *flags.split()])
    assert not Path("out").exists()
    assert [len(list(folder.iterdir())) for folder in folders] == [3, 3, 3]


def test_a_method_without_an_attack_needs_no_gradient_of_the_images() -> None:
    check_trainable("m", world.probe(3), torch.rand(4, 3, 16, 16), 3, "standard")


def test_a_method_with_a_single_loss_may_attack(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "mtlat", METHODS["mtlat"]._replace(terms=1))
    assert parse_train_config([*argv, "--attack-steps", "2"])[0].attack_steps == 2
    with pytest.raises(UserError, match="m gives no gradient for the images"):
        check_trainable("m", world.probe(3), torch.rand(4, 3, 16, 16), 3, "mtlat")
