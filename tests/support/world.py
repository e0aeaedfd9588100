"""Build a folder with small runs of train.py and evaluate.py and with many invalid files."""

import io
import math
import os
import pickle
import threading
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import evaluate
import train
from harness.checkpoints import load_checkpoint
from tests.support.tiny import Wrapped, convnet, image_folder, linear

SIDE = 16
TRAIN = f"--arch tiny:convnet --data set --size {SIDE} --epochs 1 --batch-size 26".split()
TRAIN += "--cache-dir cache --device cpu --output-dir new".split()
EVALUATE = "run/last.pt --cache-dir cache --device cpu --output-dir new".split()
EVALUATE += "--dump-images 0 --only fog".split()
REPRODUCE = f"--data set --size {SIDE} --archs tiny:convnet --epochs 1".split()
REPRODUCE += "--surrogate tiny:linear --cache-dir cache --device cpu --batch-size 26".split()
REPRODUCE += "--output-dir unwritten".split()


def png(width: int = SIDE, height: int = SIDE, **options: Any) -> bytes:
    """Return the bytes of an image file with random pixels."""
    sink = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(sink, **{"format": "PNG", **options})
    return sink.getvalue()


def claimed(width: int, height: int) -> bytes:
    """Return the bytes of a small PNG file whose header states another size."""
    whole = bytearray(png())
    whole[16:24] = width.to_bytes(4) + height.to_bytes(4)
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4)
    return bytes(whole)


BAD_IMAGES = {
    "empty.jpg": (b"", "cannot identify image file"),
    "zeros.jpg": (bytes(1000), "cannot identify image file"),
    "text.png": (b"<html>not found</html>", "cannot identify image file"),
    "cut.jpg": (png(90, 90, format="JPEG")[:2000], "truncated"),
    "cut.png": (png()[:300], "truncated"),
    "half.gif": (png(format="GIF")[:60], "not a usable image"),
    "header.jpg": (png(format="JPEG")[:20], "not a usable image"),
    "flipped.png": (png().replace(b"IDAT", b"IDAU", 1), "not a usable image"),
    "huge.png": (claimed(50_000, 50_000), "decompression bomb"),
    "large.png": (claimed(10_000, 10_000), "has 10000 x 10000 pixels, too many to be safe"),
    "program.png": (png(format="EPS"), "PostScript program"),
    "none.png": (claimed(0, 16), "not a usable image"),
    "half.bmp": (png(format="BMP")[:200], "truncated"),
    "cut.webp": (png(format="WEBP")[:100], "not a usable image"),
}


def fixed(num_classes: int) -> nn.Module:
    """Return a network that ignores the number of classes."""
    return convnet(2)


def sparse(num_classes: int) -> nn.Module:
    """Return a network whose state dict holds a sparse tensor."""
    model = convnet(num_classes)
    model.register_buffer("graph", torch.eye(2).to_sparse())
    return model


class Picky(nn.Module):
    """A network that fails on every image, like one that needs another image size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def detached(num_classes: int) -> nn.Module:
    """Return a network whose logits have no gradient, like one of another library."""
    return Wrapped(linear(num_classes), Tensor.detach)


def still(num_classes: int) -> nn.Module:
    """Return a network none of whose weights requires a gradient."""
    return linear(num_classes).requires_grad_(False)


def probe(num_classes: int) -> nn.Module:
    """Return a network that has a gradient for its weights, and none for the images."""
    return nn.Sequential(Wrapped(nn.Identity(), Tensor.detach), linear(num_classes))


class Axes(Picky):
    """A network that takes the mean over an axis that images do not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(4)


class TwoFaced(nn.Module):
    """A network that returns a dictionary in eval mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = linear(num_classes)

    def forward(self, x: Tensor) -> Any:
        logits = self.network(x)
        return logits if self.training else {"logits": logits}


class Locked(TwoFaced):
    """A network that cannot be copied."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.lock = threading.Lock()


class Writing(Locked):
    """A network that changes its input."""

    def forward(self, x: Tensor) -> Any:
        return self.network(x.sub_(0.5))


class Volume(Locked):
    """A network with a 3-D convolution."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.unused = nn.Conv3d(1, 1, 1)


class Extra(nn.Linear):
    """A layer whose state dict holds more than tensors."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((1, 2)))

    def get_extra_state(self) -> Any:
        return {"scale": 1}


def lazy(num_classes: int) -> nn.Module:
    """Return a network whose weights have no shape before it is called."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def weight_normed(num_classes: int) -> nn.Module:
    """Return a network that copy.deepcopy refuses."""
    with warnings.catch_warnings(action="ignore"):  # of its deprecation
        return nn.Sequential(linear(num_classes), nn.utils.weight_norm(nn.Linear(num_classes, 3)))


def scripted(num_classes: int) -> nn.Module:
    """Return a program of TorchScript, whose BatchNorm cannot be told to keep its statistics."""
    with warnings.catch_warnings(action="ignore"):  # of its deprecation
        return torch.jit.script(convnet(num_classes))


def exported(num_classes: int) -> nn.Module:
    """Return a program of torch.export, which has no modes."""
    x, batch = torch.rand(2, 3, 16, 16), {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(linear(num_classes), (x,), dynamic_shapes=(batch,)).module()


class Evil:
    """An object that creates the folder `executed` when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def packed(archive: bytes) -> bytes:
    """Return the bytes of a zip archive whose parts are followed by zeros, and compressed."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as parts, zipfile.ZipFile(sink, "w", 8) as bomb:
        for name in parts.namelist():
            bomb.writestr(name, parts.read(name) + bytes(10**6))
    return sink.getvalue()


def checkpoints(whole: Path) -> dict[str, bytes]:
    """Return the contents of files that are damaged or are not a checkpoint of train.py."""

    def saved(content: Any, **options: Any) -> bytes:
        sink = io.BytesIO()
        torch.save(content, sink, **options)
        return sink.getvalue()

    raw, good = whole.read_bytes(), load_checkpoint(whole)
    key, weight = next(iter(good["model"].items()))
    weights = weight.numpy().tobytes()
    flipped = bytearray(raw)
    flipped[raw.index(weights)] ^= 1
    files = {
        "empty": b"", "text": b"weights", "cut": raw[: len(raw) // 2], "flipped": bytes(flipped),
        "pickle": pickle.dumps({"model": Evil()}), "code": saved({**good, "log": [Evil()]}),
        "module": saved(nn.Linear(2, 2)), "state": saved(good["model"]), "list": saved([1, 2]),
        "lightning": saved({"state_dict": good["model"], "epoch": 3}),
        "numpy": saved({**good, "log": [np.float64(1)]}), "old": saved({**good, "format": "v0"}),
        "legacy": saved(good, _use_new_zipfile_serialization=False),
        "safetensors": (2).to_bytes(8, "little") + b"{}", "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(99),
        "misfit": saved({**good, "arch": "tiny:linear"}),
        "other-arch": saved({**good, "arch": "tiny:linear", "model": linear(3).state_dict()}),
        "unknown-arch": saved({**good, "arch": "resnet5"}),
        "no-settings": saved({**good, "settings": {}}),
        "nan": saved({**good, "model": {k: v * np.nan for k, v in good["model"].items()}}),
        **{f"no-{key}": saved({k: v for k, v in good.items() if k != key})
           for key in ("model", "arch", "classes", "log")},
        "int-classes": saved({**good, "classes": 3}),
        "numbered": saved({0: torch.ones(2)}),
        "meta": saved({**good["model"], key: weight.to("meta")}),
        "sparse": saved({**good["model"], key: weight.to_sparse()}),
        "number-names": saved({**good, "classes": [1, 2, 3]}),
        "log-words": saved({**good, "log": ["x"]}), "keys": saved({**good, "model": {5: weight}}),
        "log-text": saved({**good, "log": [{**good["log"][0], "clean_accuracy": "x"}]}),
        "std": saved({**good, "normalize": ([0.5] * 3, [0.0] * 3)}),
        "mean": saved({**good, "normalize": (torch.ones(3, 2), torch.ones(3, 2))}),
        **{f"setting-{name}": saved({**good, "settings": {**good["settings"], name: value}})
           for name, value in {"data": 5, "classes": "x", "preprocess": ["x"], "epochs": "2",
                              "lr": math.nan, "milestones": ["--help"], "method": "x",
                              "deterministic": "no", "arch": None, "data_seed": "x",
                              "skip_bad_images": "no"}.items()},
        "script": bytes(scripted(3).save_to_buffer()), "bomb": packed(raw),
    }  # fmt: skip
    return files


def cells_files(good: bytes) -> dict[str, bytes]:
    first, second, *rest = good.splitlines(keepends=True)
    digit = bytearray(second)
    digit[digit.index(b'"correct": ') + 11] ^= 1
    return {
        "cells-digit": first + bytes(digit) + b"".join(rest), "cells-text": b"hello\n",
        "cells-list": b"[]\n", "cells-joined": first[:-1] + good[len(first) :],
        "cells-bytes": b"\xff\xfe\n", "cells-deep": b"[" * 100_000 + b"\n",
        "cells-half": first[:40] + b"\n" + second,
        "cells-unsigned": first + second + b'{"model": "ab"}\n' + b"".join(rest),
    }  # fmt: skip


def build(root: Path) -> Path:
    """Fill a folder with images, a training run, an evaluation and invalid files."""
    image_folder(root / "set", side=SIDE)
    (root / "file").write_text("a file")
    for name, (content, _) in BAD_IMAGES.items():
        image_folder(root / "bad" / name, classes=2, each=2, side=SIDE)
        (root / "bad" / name / "class0" / name).write_bytes(content)
    for name, classes in {"no-classes": 0, "one-class": 1, "empty-class": 2, "loop": 2}.items():
        image_folder(root / name, classes=classes, each=2, side=SIDE)
    (root / "no-classes").mkdir()
    (root / "empty-class" / "hollow").mkdir()
    (root / "loop" / "class0" / "self.png").symlink_to("self.png")
    (root / "loops").mkdir()
    (root / "loops" / "self").symlink_to("self")
    image_folder(root / "only-train" / "train", classes=2, each=2)
    image_folder(root / "only-val" / "val", classes=2, each=2)
    image_folder(root / "unequal" / "train", classes=2, each=2)
    image_folder(root / "unequal" / "val", classes=3, each=2)
    image_folder(root / "other", classes=2, each=20, side=SIDE)
    (root / "c" / "fog" / "1" / "class0").mkdir(parents=True)
    (root / "empty").mkdir()
    for folder, name in (
        ("foreign/tiny-linear-standard-seed0", "last.pt"),
        ("damaged/evaluation-tiny-convnet-seed0", "cells.jsonl"),
    ):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_text("hello\n")
    before = Path.cwd()
    os.chdir(root)
    try:
        train.main([*TRAIN, "--output-dir", "run"])
        evaluate.main([*EVALUATE, "--output-dir", "evaluation"])
    finally:
        os.chdir(before)
    for name, content in checkpoints(root / "run" / "last.pt").items():
        (root / f"{name}.pt").write_bytes(content)
    whole = (root / "evaluation" / "cells.jsonl").read_bytes()
    for name, content in cells_files(whole).items():
        (root / name).mkdir()
        (root / name / "cells.jsonl").write_bytes(content)
    return root
