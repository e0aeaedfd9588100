"""Compare the attacks with torchattacks and foolbox on the same model, images and settings.

The tests were written for these versions:

    pip install torchattacks==3.5.1 foolbox==3.3.4
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from attacks import cw2_result, mi_fgsm, pgd, pgd_ll
from tests.support.libraries import library
from tests.support.victims import images, labels, lead, network

SAME: list[Any] = [(pgd, 1.0), (pgd_ll, 1.0), (mi_fgsm, 1.0), (mi_fgsm, 0.5)]


def case(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, 48 images and their labels, of which at least half are its predictions."""
    model, x, y = network(dtype), images(20, 48, dtype), labels(20, 48)
    y[::2] = model(x[::2]).argmax(1)
    return model, x, y


def correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    return int((lead(model, x, y) <= 0).sum())


def torchattacks_images(
    attack: Any, decay: float, model: nn.Module, x: Tensor, y: Tensor
) -> Tensor:
    torchattacks = library("torchattacks")
    if attack is mi_fgsm:
        theirs = torchattacks.MIFGSM(model, eps=0.08, alpha=0.008, steps=10, decay=decay)
    else:
        theirs = torchattacks.PGD(model, eps=0.08, alpha=0.02, steps=10, random_start=False)
    if attack is pgd_ll:
        theirs.set_mode_targeted_by_label(quiet=True)
        y = model(x).argmin(1)
    found: Tensor = theirs(x, y)
    return found


def our_images(attack: Any, decay: float, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    settings = {"decay": decay} if attack is mi_fgsm else {"random_start": False}
    found: Tensor = attack(model, x, y, epsilon=0.08, **settings)
    return found


@pytest.mark.parametrize(("attack", "decay"), SAME)
def test_torchattacks_makes_the_same_images(attack: Any, decay: float) -> None:
    model, x, y = case()
    theirs = torchattacks_images(attack, decay, model, x, y)
    assert_close(our_images(attack, decay, model, x, y), theirs)
    assert (theirs - x).abs().max() > 0.079


@pytest.mark.parametrize(("attack", "decay"), SAME)
def test_torchattacks_makes_the_same_images_in_float32(attack: Any, decay: float) -> None:
    """Check that only pixels with a gradient near zero differ, where rounding decides the sign."""
    model, x, y = case(torch.float32)
    theirs = torchattacks_images(attack, decay, model, x, y)
    ours = our_images(attack, decay, model, x, y)
    assert ((ours - theirs).abs() > 1e-6).double().mean() < 1e-3
    assert correct(model, ours, y) == correct(model, theirs, y)


def test_torchattacks_makes_the_same_images_from_a_random_start() -> None:
    torchattacks = library("torchattacks")
    model, x, y = case()
    torch.manual_seed(3)
    theirs = torchattacks.PGD(model, eps=0.08, alpha=0.02, steps=10, random_start=True)(x, y)
    torch.manual_seed(3)
    start = torch.empty_like(x).uniform_(-0.08, 0.08) / 0.08
    assert_close(pgd(model, x, y, epsilon=0.08, start=start), theirs)


@pytest.mark.filterwarnings("ignore")
def test_foolbox_makes_the_same_pgd() -> None:
    foolbox = library("foolbox")
    model, x, y = case()
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=10, random_start=False).run(
        foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device),
        x, foolbox.criteria.Misclassification(y), epsilon=0.08,
    )  # fmt: skip
    assert_close(pgd(model, x, y, epsilon=0.08, random_start=False), theirs)


@pytest.mark.parametrize("confidence", [0.0, 4.0, 1e3])
@pytest.mark.filterwarnings("ignore")
def test_cw2_reaches_what_foolboxs_does_and_no_farther(confidence: float) -> None:
    foolbox = library("foolbox")
    model, x, y = case()
    x, y = x[:16], y[:16]
    theirs = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=9, steps=40, stepsize=0.01, confidence=confidence,
        initial_const=1e-3, abort_early=False,
    ).run(
        foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device),
        x, foolbox.criteria.Misclassification(y),
    )  # fmt: skip
    ours = cw2_result(model, x, y, confidence=confidence)
    reached = theirs.flatten(1).any(1)  # foolbox returns black images where it fails
    assert torch.equal(ours.reached, reached)
    assert reached.any() == (confidence < 1e3)
    distances = (theirs - x).flatten(1).norm(dim=1)[reached]
    assert ours.l2[reached].sum() <= 1.01 * distances.sum()


def test_cw2_is_as_strong_as_torchattackss() -> None:
    """Check that CW2 is at least as strong as the attack of torchattacks.

    That attack has a single constant and accepts an image at any margin.
    """
    torchattacks = library("torchattacks")
    model, x, y = case()
    theirs = torchattacks.CW(model, c=1, kappa=0, steps=40, lr=0.01)(x, y)
    ours = cw2_result(model, x, y, confidence=0.0)
    assert correct(model, ours.x_adv, y) <= correct(model, theirs, y)
    both = ours.reached & (lead(model, theirs, y) > 0)
    assert ours.l2[both].mean() <= (theirs - x).flatten(1).norm(dim=1)[both].mean()
