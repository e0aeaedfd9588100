"""Test the public functions with invalid input.

They must raise the documented exception with a message of one line, and change no argument. More
invalid input is in test_mtlat_model.py and in test_attacks_contract.py.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attacks
import mtlat
from harness import checkpoints, models
from harness.benchmark.checks import failed_checks
from harness.errors import UserError
from harness.images import datasets
from tests.support.tiny import linear
from tests.support.world import SIDE

X = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])
SOFT = torch.eye(3)[Y]
NET = linear(3)
NAN = float("nan")
U8 = (X * 255).to(torch.uint8)


def broken(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[7] = value
    return x


def mix(x: Any = X, y: Any = SOFT, lam: Any = 0.5) -> Any:
    return mtlat.mixup(x, y, X, SOFT, lam)


def loss(model: Any = NET, x: Any = X, y: Any = Y, num_classes: int = 3, **options: Any) -> Any:
    return mtlat.mtlat_loss(model, x, y, num_classes=num_classes, **options)


def step(x: Any = X, y: Any = Y, epsilon: Any = 0.1, model: Any = NET, **options: Any) -> Any:
    return mtlat.targeted_fgsm(model, x, y, epsilon, **options)


def drawn(batch: int = 4, classes: int = 3, alpha: float = 0.4, epsilon_max: float = 0.1) -> Any:
    return mtlat.draw(batch, classes, alpha=alpha, epsilon_max=epsilon_max)


def pgd(x: Any = X, y: Any = Y, model: Any = NET, **options: Any) -> Any:
    return attacks.pgd(model, x, y, **options)


def cw2(model: Any = NET, **options: Any) -> Any:
    return attacks.cw2(model, X, Y, **options)


def no_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        return NET(x)


def flat(x: Tensor) -> Tensor:
    return x.sum((1, 2, 3))


FUNCTION_CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (partial(mix, [1]), TypeError, "images are list; give a float.* tensor"),
    (partial(mix, U8), TypeError, "torch.uint8"),
    (partial(mix, X * 255), ValueError, "pixels: .* 254.* divide by 255"),
    (partial(mix, X - 1), ValueError, "pixels: -0.9"),
    (partial(mix, broken(X, NAN)), ValueError, "pixels: nan"),
    (partial(mix, X[:, :, :9]), ValueError, "do not match"),
    (partial(mix, X[:0], SOFT[:0]), ValueError, "pixels: none; rule: at least one"),
    (partial(loss, y=Y.float()), TypeError, "float32"),
    (partial(loss, y=Y.tolist()), TypeError, "labels are list; give a tensor"),
    (partial(loss, y=Y.numpy()), TypeError, "labels are ndarray; give a tensor"),
    (partial(loss, x=X.numpy()), TypeError, "images are ndarray; give a float.* tensor"),
    (partial(loss, away=True), TypeError, "unexpected keyword argument 'away'"),
    (partial(mix, y=SOFT[:2]), ValueError, r"labels have shape \(2, 3\)"),
    (partial(mix, y=2 * SOFT), ValueError, "probabilities"),
    (partial(mix, y=SOFT / 2), ValueError, "divide each row by its sum"),
    (partial(mix, y=broken(SOFT, NAN)), ValueError, "label weights: nan"),
    (partial(mix, y=SOFT.long()), TypeError, "int64"),
    (partial(mix, lam=NAN), ValueError, "lam: nan"),
    (partial(mix, lam=-0.1), ValueError, "lam: -0.1"),
    (partial(step, steps=0), ValueError, "at least 1"),
    (partial(step, epsilon=2), ValueError, "epsilon: 2 to 2"),
    (partial(step, epsilon=NAN), ValueError, "epsilon: nan"),
    (partial(step, U8), TypeError, "uint8"),
    (partial(step, y=Y + 1), ValueError, r"class indices: 1 to 3; rule: \[0, 2\]"),
    (partial(step, y=Y[:2]), ValueError, r"shape \(2,\); .*logits \(4, 3\) need \(4,\) or"),
    (partial(step, y=torch.eye(5)[Y]), ValueError, r"shape \(4, 5\); .*logits \(4, 3\) need"),
    (partial(step, y=4 * SOFT - 1), ValueError, "label weights: .*not logits"),
    (partial(step, y=broken(SOFT, NAN)), ValueError, "label weights: nan"),
    (partial(mtlat.cross_entropy, SOFT, SOFT.long()), TypeError, "int64; give int64 indices"),
    (partial(step, model=flat), ValueError, r"model returns shape \(4,\)"),
    (partial(drawn, alpha=0), ValueError, "alpha is 0"),
    (partial(drawn, alpha=NAN), ValueError, "alpha is nan"),
    (partial(drawn, epsilon_max=2), ValueError, "epsilon_max is 2"),
    (partial(drawn, epsilon_max=NAN), ValueError, "epsilon_max is nan"),
    (partial(step, y=Y.int()), TypeError, "labels are torch.int32; give int64 indices"),
    (partial(mix, y=SOFT[0, 0]), ValueError, r"shape \(\); .*\(4, 3, 16, 16\) need \(4, N\)"),
    (partial(mtlat.target_labels, SOFT[0, 0], Y[0], 0.1), ValueError, r"shape \(\); .*\(1, N\)"),
    (partial(mtlat.target_labels, SOFT, Y[0], 0.1), ValueError, r"shape \(\); .*\(4,\) or"),
    (partial(mtlat.target_labels, Y, Y, 0.1), ValueError, r"shape \(4,\); .*need \(4, N\)"),
    (partial(mtlat.target_labels, SOFT.tolist(), Y, 0.1), TypeError, "labels are list"),
    (partial(mtlat.target_labels, 2 * SOFT, Y, 0.1), ValueError, "probabilities"),
    (partial(mtlat.target_labels, SOFT, Y + 1, 0.1), ValueError, "class indices: 1 to 3"),
    (partial(pgd, x=X.numpy()), TypeError, "images are ndarray"),
    (partial(loss, num_classes=5), ValueError, r"shape \(4, 5\); .*logits \(4, 3\) need"),
    (partial(loss, num_classes=0), ValueError, "0 classes: need at least 1 and 2"),
    (partial(loss, x=X[:0], y=Y[:0]), ValueError, "at least one image"),
    (partial(loss, y=SOFT[:3]), ValueError, r"labels have shape \(3, 3\)"),
    (partial(mtlat.Normalize, [0.5], [NAN]), ValueError, "every std > 0"),
    (partial(mtlat.Normalize, [0.5, 0.5], [0.5, NAN]), ValueError, "every std > 0"),
    (partial(mtlat.Normalize, [NAN], [0.5]), ValueError, "pixels in"),
    (partial(mtlat.Normalize, [], []), ValueError, "one of each"),
    (partial(pgd, U8), TypeError, "uint8"),
    (partial(pgd, X[:0], Y[:0]), ValueError, "at least one"),
    (partial(pgd, broken(X, NAN)), ValueError, "pixels: nan"),
    (partial(pgd, y=Y.int()), TypeError, "int64"),
    (partial(pgd, y=Y.tolist()), TypeError, "labels are list; give int64"),
    (partial(pgd, y=Y.numpy()), TypeError, "labels are ndarray; give int64"),
    (partial(pgd, target=Y.tolist()), TypeError, "targets are list; give int64"),
    (partial(pgd, y=Y[:2]), ValueError, r"labels have shape \(2,\)"),
    (partial(pgd, y=Y + 1), ValueError, "class indices: 1 to 3"),
    (partial(pgd, y=SOFT), TypeError, "int64"),
    (partial(pgd, epsilon=-1), ValueError, "epsilon is -1"),
    (partial(pgd, steps=0), ValueError, "steps is 0"),
    (partial(pgd, epsilon=NAN), ValueError, "epsilon is nan"),
    (partial(pgd, target=Y + 3), ValueError, "class indices: 3 to 5"),
    (partial(pgd, start=[0.0] * 6), ValueError, "start is list; 1 runs need a tensor of shape"),
    (partial(cw2, confidence=-1), ValueError, "confidence is -1"),
    (partial(cw2, step_size=NAN), ValueError, "step_size is nan"),
    (partial(datasets.load_dataset, "nowhere"), UserError, "no such folder"),
    (partial(datasets.load_dataset, "shapes", size=-1), UserError, "--size -1 is out of range"),
    (partial(datasets.load_dataset, "shapes", size=10**9), UserError, "out of range"),
    (partial(datasets.load_dataset, "shapes", num_classes=11), UserError, "has 10 classes"),
    (partial(pgd, model=no_gradient), TypeError, "no gradient reaches the images; freeze"),
    (partial(cw2, model=no_gradient), TypeError, "no gradient reaches the images; freeze weights"),
    (partial(failed_checks, {"clean": NAN}), ValueError, "accuracy of clean is nan"),
    (partial(failed_checks, {"a": 1.5}), ValueError, r"accuracy of a is 1\.5"),
    (partial(models.build_model, "", 3), UserError, "torchvision has no such classifier"),
    (partial(checkpoints.load_checkpoint, ""), UserError, "No such file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "message"), FUNCTION_CASES, ids=[f"{c[2]}" for c in FUNCTION_CASES]
)
def test_functions(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    before = [t.clone() for t in (X, Y, SOFT, *NET.parameters())]
    with pytest.raises(kind) as error:
        call()
    assert error.type is kind
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert all(map(torch.equal, before, (X, Y, SOFT, *NET.parameters())))
