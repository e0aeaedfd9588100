"""Create a folder for tests of evaluate.py: tiny images, and tiny networks with checkpoints."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

import evaluate
from harness.benchmark import plots, registry, store
from harness.checkpoints import save_checkpoint
from harness.images import datasets

CLASSES = ["blue", "green", "red"]
SIDE = 16
NETS = '''
import types

import torch
from torch import nn

class Net(nn.Sequential):
    """A noisy linear layer on patch means: color 2 - k raises the logit of class k."""

    def __init__(self, num_classes, seed=0, sharp=20.0):
        layer = nn.Linear(48, num_classes)
        super().__init__(nn.AvgPool2d(4), nn.Flatten(), layer)
        pattern = torch.eye(3).flip(0).repeat_interleave(16, 1)[:num_classes]
        noise = torch.randn(3, 48, generator=torch.Generator().manual_seed(seed))[:num_classes]
        layer.weight.data = sharp / 16 * (pattern + 0.3 * noise)
        layer.bias.data.zero_()

def net(num_classes): return Net(num_classes)
class Normed(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self[1].mean = nn.Buffer(torch.zeros(1))
def four(num_classes): return Net(num_classes, 4)
class Stuck(Net):
    def train(self, mode=True): super().train(mode)[1].train(); return self
class Noisy(Net):
    def forward(self, x): return super().forward(x) + torch.rand(len(x), 3)
class Broken(Net):
    def forward(self, x): return super().forward(x) / 0
class Soft(Net):
    def forward(self, x): return super().forward(x).softmax(1)
class Flat(Net):
    def forward(self, x): return super().forward(x.detach().round()) + 0 * x.sum()
class Detached(Net):
    def forward(self, x): return super().forward(x).detach()
class Hollow(Net):
    def forward(self, x):
        empty = (x.std((2, 3)).amax(1) < 0.1)[:, None]
        return torch.where(empty, float("nan"), super().forward(x))
class Torn(Net):
    def forward(self, x):
        bright = (x.mean((1, 2, 3)) > 0.65)[:, None] & torch.tensor([True, False, False])
        return super().forward(x).masked_fill(bright, float("nan"))
class Squeezed(Net):
    def forward(self, x): return super().forward(x).squeeze()
class Blue(Net):
    def forward(self, x): return 0 * super().forward(x) + torch.tensor([1.0, 0.0, 0.0])
class Half(Net):
    def forward(self, x): return super().forward(x).half()
class Writing(Net):
    def forward(self, x): return super().forward(x.mul_(8).round_().div_(8))
class Asserting(Net):
    def forward(self, x):
        assert not torch.is_grad_enabled(), "inference only"
        return super().forward(x)
class Full(Net):
    def forward(self, x):
        if torch.is_grad_enabled(): raise torch.OutOfMemoryError
        return super().forward(x)
class Exact(Net):
    def forward(self, x):
        if x.sum() < 0 or torch.backends.cudnn.allow_tf32:  # torch.fx cannot trace this
            raise AssertionError("TF32")
        return super().forward(x)
class Scaled(Net):
    """A network with a number that neither its layers nor its weights show."""

    def __init__(self, num_classes, factor): super().__init__(num_classes); self.factor = factor
    def forward(self, x): return self.factor * super().forward(x)
class drawn(nn.Linear):
    """A layer with random weights, whose repr names an address that differs each time."""

    def __init__(self, num_classes): super().__init__(768, num_classes); self.act = lambda x: x
    def extra_repr(self): return f"act={self.act}"
    def forward(self, x): return super().forward(x.flatten(1))
def up(num_classes): return Scaled(num_classes, 1.0)
def down(num_classes): return Scaled(num_classes, -1.0)
class Two(Net):
    def forward(self, x): return super().forward(x)[:, :2]
class Pair(Net):
    def forward(self, x): return super().forward(x), x
class Object(Net):
    def forward(self, x): return types.SimpleNamespace(loss=None, logits=super().forward(x))
class Text(Net):
    def forward(self, x): return "logits"
class Many(Net):
    """The outputs of `net` among two others, which are always the largest."""

    def __init__(self, num_classes): super().__init__(3)
    def forward(self, x):
        blue, green, red = super().forward(x).unbind(1)
        return torch.stack([1e3 + red, red, blue, 1e3 + green, green], 1)
class Linear5(Net):
    def __init__(self, num_classes): super().__init__(3); self[2] = nn.Linear(48, num_classes)
class Big(Net):
    def forward(self, x): return super().forward(x.view(len(x), 3, 99, 99))
'''


class Bench:
    """A folder with images, checkpoints and network code, in which evaluate.py runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tinynets.py").write_text(NETS)
        random = np.random.RandomState(0)
        for part, count in (("train", 1), ("val", 10)):
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    pixels = random.randint(60, 196, (SIDE, SIDE, 3)) + random.randint(-30, 30, 3)
                    pixels[..., 2 - label] += 35
                    path = root / "images" / part / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        sets = self.sets()
        for name, seed, sharp in (("standard", 0, 20.0), ("mtlat", 1, 4.0), ("vgg", 2, 20.0)):
            self.checkpoint(name, sets.fingerprint, seed, sharp)

    def sets(self) -> datasets.Dataset:
        return datasets.load_dataset(
            str(self.root / "images"), size=SIDE, cache_dir=self.root / "cache"
        )

    def checkpoint(
        self, name: str, fingerprint: str, seed: int, sharp: float, **changes: Any
    ) -> str:
        import tinynets  # type: ignore[import-not-found]

        path = self.root / name / "last.pt"
        path.parent.mkdir(exist_ok=True)
        settings = {"data": str(self.root / "images"), "classes": None, "seed": 0}
        settings |= {"skip_bad_images": False}
        content = {
            "arch": "tinynets:net", "normalize": None, "classes": CLASSES, "size": SIDE,
            "fingerprint": fingerprint, "settings": settings,
            "model": tinynets.Net(3, seed, sharp).state_dict(), "log": [],
            "optimizer": {}, "scaler": {},
        }  # fmt: skip
        save_checkpoint([path], **(content | changes))
        return str(path)

    def argv(self, *options: str, out: str = "out", models: str = "standard mtlat") -> list[str]:
        named = [str(self.root / m / "last.pt") if ":" not in m else m for m in models.split()]
        fixed = ["--cache-dir", str(self.root / "cache"), "--device", "cpu"]
        return [*named, *fixed, "--output-dir", str(self.root / out), *options]

    def run(self, *options: str, out: str = "out", models: str = "standard mtlat") -> list[Any]:
        """Run evaluate.py and return its cells without the fields that differ between runs."""
        evaluate.main(self.argv(*options, out=out, models=models))
        return self.lines(out)

    def lines(self, out: str) -> list[Any]:
        lines = store.read_cells(self.root / out / "cells.jsonl")
        vague = {"seconds", "seconds_making", "versions"}
        return [{k: v for k, v in line.items() if k not in vague} for line in lines]

    def results(self, out: str = "out") -> Any:
        return json.loads((self.root / out / "results.json").read_text())

    @property
    def surrogate(self) -> list[str]:
        return ["--surrogate", str(self.root / "vgg" / "last.pt")]

    def networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return the networks `standard`, `mtlat` and `vgg`."""
        import tinynets

        standard, mtlat, vgg = (tinynets.Net(3, k, s) for k, s in enumerate((20.0, 4.0, 20.0)))
        return standard, mtlat, vgg


def open_bench(
    tmp_path: Path, factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """Return the shared bench with an output folder for this test only, and without figures."""
    if not _ROOTS:
        _ROOTS.append(factory.mktemp("bench"))
        sys.path.insert(0, str(_ROOTS[0]))
        Bench(_ROOTS[0])
    for name in ("plot_differences", "plot_robustness", "plot_severities", "plot_images"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.setattr(registry, "SAMPLE", 6)
    bench = object.__new__(Bench)
    bench.root = tmp_path
    for entry in _ROOTS[0].iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return bench


_ROOTS: list[Path] = []
