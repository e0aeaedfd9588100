"""Test that the scripts exit with code 2 and one line for invalid input, and change no file."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import evaluate
import reproduce
import train
from harness import errors
from tests.support.world import BAD_IMAGES, EVALUATE, REPRODUCE, TRAIN, build


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("world"))


def files(world: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in world.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def left(world: Path) -> dict[Path, bytes]:
    """Return the files of the world as the last test left them."""
    return files(world)


@pytest.fixture
def unchanged(
    world: Path, left: dict[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Run the test in the world folder, and check its files afterwards.

    No file may change. New files may appear only in the cache, except for lock files.
    """
    monkeypatch.chdir(world)
    yield
    before, after = left.copy(), files(world)
    left.clear()
    left.update(after)
    assert {path: after.get(path) for path in before} == before
    assert all(path.name == ".lock" or path.parts[-2] == "cache" for path in after.keys() - before)


TRAIN_CASES = [
    ("--epochs 0", "0 is out of range: from 1"), ("--epochs x", "'x' is not of type int"),
    ("--epochs 1.5", "'1.5' is not of type int"), ("--epochs", "expected one argument"),
    ("--batch-size 0", "out of range"), ("--batch-size 1", "makes minibatches of 0"),
    ("-b 100", "minibatches of 50, and there are 27"), ("-b -3", "out of range"),
    ("--batch-size 1e9", "'1e9' is not of type int"),
    ("--lr 0", "argument --lr/--learning-rate: 0 is out of range: above 0"),
    ("--lr nan", "nan is out of range"), ("--lr inf", "inf is out of range"),
    ("--lr -1", "out of range"), ("--lr fast", "'fast' is not of type float"),
    ("--wd -1", "out of range"),
    ("--momentum 2", "from 0 to 1"), ("--gamma 1.1", "from 0 to 1"), ("--gamma nan", "nan is out"),
    ("--milestones 1 x", "'x' is not of type float"), ("--milestones -1", "out of range"),
    ("--alpha 0", "from 1e-30"), ("--alpha 1e39", "to 1e+30"), ("--alpha nan", "out of range"),
    ("--epsilon-max 1.1", "from 0 to 1"), ("--epsilon-max -0.1", "from 0 to 1"),
    ("--attack-steps 0", "from 1 up"), ("--size 7", "from 8 to 4096"),
    ("--size 1000000000", "from 8 to 4096"), ("--classes 1", "from 2"),
    ("--classes 4", "--classes 4: the dataset has 3"), ("--seed -1", "from 0"),
    ("--seed 4294967296", "out of range"), ("--data-seed x", "'x' is not of type int"),
    ("--print-freq 0", "from 1"), ("--method mlat", "invalid choice: 'mlat'"),
    ("--opt adagrad", "invalid choice"), ("--amp half", "invalid choice"),
    ("--amp fp16", "--amp fp16 takes many times longer on a CPU: leave it out"),
    ("--warmup-epochs 2 --epochs 2", "--warmup-epochs is 2, and must be below --epochs"),
    ("--schedule cosine --milestones 1", "--milestones has no effect with --schedule cosine"),
    ("--schedule cosine --gamma 0.1", "--gamma has no effect with --schedule cosine: leave it out"),
    ("--momentum 0.9", "--momentum has no effect with --opt adam: leave it out"),
    ("--method mixup --attack-steps 3", "--attack-steps has no effect with --method mixup"),
    ("--method standard --epsilon-max 0.1", "--epsilon-max has no effect with --method standard"),
    ("--method tlat --alpha 1", "--alpha has no effect with --method tlat: leave it out"),
    ("--resume run/last.pt --momentum 0.9", "--momentum has no effect with --opt adam: leave it"),
    ("--device abacus", "--device abacus"), ("--device cuda:99", "--device cuda:99"),
    ("--device meta", "--device meta"), ("--device", "expected one argument"),
    ("--batch 26", "unrecognized arguments: --batch"), ("--verbose", "unrecognized arguments"),
    ("more", "unrecognized arguments: more"),
    ("--arch resnet", "torchvision has no such classifier; close names: resnet"),
    ("--arch cnn5", "close names: cnn6, cnn4"),
    ("--arch nowhere:net", "No module named 'nowhere'"), ("--arch tiny:", "--arch tiny:"),
    ("--arch :net", "--arch :net"), ("--arch tiny:nothing", "has no attribute 'nothing'"),
    ("--arch argparse:Namespace", "made a Namespace; give a torch.nn.Module"),
    ("--arch os:getcwd", "--arch os:getcwd"), ("--arch os:name", "is not a callable object"),
    ("--arch tiny:states_equal", "missing a required argument"),
    ("--arch world:Picky", "Picky fails on images (13, 3, 16, 16): AssertionError"),
    ("--arch world:detached", "--arch world:detached has no gradient: let its weights"),
    ("--arch world:still", "--arch world:still has no gradient"),
    ("--arch world:probe", "probe gives no gradient for the images, which --method mtlat needs"),
    ("--arch world:Extra", "--arch world:Extra: _extra_state of its state dict is a dict, and a"),
    ("--arch world:sparse", "sparse: graph of its state dict is a Tensor, and a checkpoint keeps"),
    ("--arch world:Axes", "Axes fails on images (13, 3, 16, 16): Dimension out of range"),
    ("--arch world:TwoFaced", "world:TwoFaced in eval mode fails on images (2, 3, 16, 16): the"),
    ("--arch world:lazy", "world:lazy: 1.weight has no shape yet; run one forward pass first"),
    ("--method standard --arch world:Writing", "world:Writing changes its input in place: let it"),
    ("--arch world:Locked --ema 0.9", "--ema: --arch world:Locked cannot be copied (cannot pickle"),
    ("--arch world:Volume --channels-last", "--channels-last: required rank 4 tensor to use chan"),
    ("--arch world:Extra --weights state.pt", "Extra: _extra_state of its state dict is a dict,"),
    ("--weights numbered.pt", "numbered.pt is neither a checkpoint of train.py nor a state dict"),
    ("--arch world:weight_normed --ema 0.9", "--ema: --arch world:weight_normed cannot be copied"),
    ("--arch world:scripted", "--arch world:scripted is TorchScript"),
    ("--arch world:exported", "--arch world:exported has no eval mode, like programs of"),
    ("--arch inception_v3", "inception_v3 fails on images"),
    ("--arch resnet18 -b 2", "resnet18 fails on images (1, 3, 16, 16): Expected more than 1 value"),
    ("--weights nothing", "for --arch tiny:convnet (it has none: name a file)"),
    ("--weights DEFAULT --arch cnn4", "for --arch cnn4 (it has none: name a file)"),
    ("--weights BEST --arch alexnet", "for --arch alexnet (DEFAULT names the best)"),
    *((f"--arch tiny:convnet --weights {kind}.pt", f"{kind}.pt is neither a checkpoint of train.py")
      for kind in ("meta", "sparse")),
    ("--weights file", "file is not a checkpoint of train.py, or is damaged"),
    ("--weights other-arch.pt", "other-arch.pt does not fit --arch tiny:convnet with 3"),
    ("--data other --arch world:fixed --weights run/last.pt",
     "6.bias is (3,), and must be (2,); if it has other outputs, let --arch use num_classes"),
    ("--data shapes --preprocess center-crop", "shapes are squares already; leave it out"),
    ("--weights set", "set: Is a directory"), ("--weights flipped.pt", "(checksum of "),
    ("--data nowhere", "--data nowhere: no such folder"), ("--data file", "no such folder"),
    ("--data no-classes", "holds 0 class folders"), ("--data one-class", "holds 1 class folders"),
    ("--data empty-class", "class 'hollow' has no image"), ("--data only-train", "but no val/"),
    ("--data only-val", "but no train/"), ("--data unequal", "only one has 'class2'"),
    ("--data loop -b 2", "self.png: not a usable image"), ("--data loops", "self"),
    ("--data set/class0", "holds 0 class folders"),
    ("--data cifar10 --cache-dir empty", "cifar10 is not in empty (Dataset not found or corrup"),
    *((f"--data bad/{name} -b 2", message) for name, (_, message) in BAD_IMAGES.items()),
    ("--cache-dir file", "file: File exists"), ("--output-dir file", "file: File exists"),
    ("--output-dir run", "run holds an earlier run: continue it with --resume run/last.pt"),
    ("--output-dir run --resume other-run.pt", "other-run.pt: No such file"),
    ("--resume run", "run: Is a directory"), ("--resume file/last.pt", "Not a directory"),
    ("--resume run/last.pt --lr 3", "--lr is 3.0, but the run in run was begun with 0.002"),
    ("--resume run/last.pt --arch tiny:linear", "--arch is tiny:linear, but the run in run was"),
    ("--resume run/last.pt --data other", "--data other differs from the dataset that run/last.pt"),
    ("--resume run/last.pt --output-dir evaluation/cells.jsonl", "File exists"),
    *((f"--resume {name}.pt", message) for name, message in {
        "empty": "not a checkpoint of train.py, or is damaged", "text": "or is damaged",
        "cut": "or is damaged", "flipped": "or is damaged (checksum of ",
        "pickle": "or is damaged", "legacy": "or is damaged",
        "code": "nor a state dict (it holds posix.mkdir): save model.state_dict()",
        "numpy": "nor a state dict (it holds numpy", "module": "nor a state dict (it holds torch",
        "script": "nor a state dict (Cannot use ``weights_only=True`` with TorchScript",
        "safetensors": "or is damaged",
        "hdf5": "or is damaged", "bomb": "or is damaged (it is a zip bomb of ",
        "state": "not a checkpoint of this version", "list": "not a checkpoint of this version",
        "lightning": "not a checkpoint of this version", "old": "not a checkpoint of this version",
        "no-model": "its model is missing", "no-arch": "its arch is missing",
        "no-classes": "its classes is missing", "no-log": "its log is missing",
        "int-classes": "its classes is int", "no-settings": "no-settings.pt has no setting",
        "nowhere": "nowhere.pt: No such file or directory",
        "number-names": "its classes is damaged", "log-words": "its log is damaged",
        "log-text": "its log is damaged", "keys": "its model is damaged",
        "std": "its normalize is damaged", "mean": "its normalize is damaged",
        "setting-data": "setting-data.pt: its setting data cannot be 5: restore it",
        "setting-classes": "classes cannot be 'x'", "setting-preprocess": "cannot be ['x']",
        "setting-epochs": "epochs cannot be '2'", "setting-lr": "lr cannot be nan",
        "setting-milestones": "milestones cannot be ['--help']", "setting-method": "cannot be 'x'",
        "setting-deterministic": "cannot be 'no'", "setting-arch": "arch cannot be None",
    }.items()),
    ("--resume misfit.pt --output-dir new", "weights do not fit tiny:linear"),
    ("--resume unknown-arch.pt --output-dir new", "--arch resnet5: torchvision has no such"),
]  # fmt: skip

EVALUATE_CASES = [
    ("run/last.pt", "run/last.pt is named twice: name each model once"),
    ("nowhere.pt", "nowhere.pt: No such file"),
    ("set", "set: Is a directory"), ("file", "file is not a checkpoint"),
    ("nowhere:net", "No module named 'nowhere'"), ("argparse:Namespace", "give a torch.nn.Module"),
    ("torchvision:resnet18", "torchvision:resnet18 needs --weights NAME; DEFAULT takes"),
    ("torchvision:resnet5 --weights DEFAULT", "no such classifier; close names: resnet50, resnet"),
    *((f"torchvision:{name} --weights DEFAULT", f"torchvision:{name}: torchvision has no such clas")
      for name in ("raft_small", "fcn_resnet50", "r3d_18", "quantized_resnet18", "cnn4")),
    ("torchvision:resnet18 --weights BEST", "--weights BEST: no such file, and no such weights"),
    ("--only fogg", "close names: fog"), ("--only", "expected at least one argument"),
    ("--only zz", "groups: noise, blur, weather"),
    ("--weights DEFAULT",
     "--weights DEFAULT is for torchvision:ARCH and timm:NAME: name such a model, or leave"),
    ("--mean 0 0 0 --std 1 1 1", "are for module:callable"),
    ("--skip snoww", "close names: snow"),
    ("--only fog --skip weather", "leave nothing to measure: skip less, or give"),
    ("--baseline mtlat", "--baseline mtlat is not one of the models"),
    ("--mean 0 0 0", "--mean and --std belong together"), ("--mean 0 0", "expected 3 arguments"),
    ("--mean 2 0 0 --std 1 1 1", "from 0 to 1"), ("--std 1 1 nan", "nan is out of range"),
    ("--std 0 1 1", "out of range: above 0"), ("--batch-size x", "'x' is not of type int"),
    ("--data nowhere", "--data nowhere: no such folder"), ("--device abacus", "--device abacus: "),
    ("--surrogate nowhere/last.pt", "nowhere/last.pt: No such file"),
    ("--surrogate file", "is not a checkpoint of train.py"),
    ("--size 15", "from 16"), ("--size 100000", "from 16 to 4096"), ("--limit 0", "from 1"),
    ("--batch-size 0", "from 1"), ("--seed -1", "from 0"), ("--dump-images -1", "from 0"),
    ("--dump-images 101", "from 0 to 100"), ("--device meta", "--device meta"),
    ("--imagenet-c nowhere", "no such folder"),
    ("--imagenet-c empty", "has no folder or .npy file of a corruption to score"),
    ("--imagenet-c file", "no such folder"), ("--data other", "was trained on other classes"),
    ("--data bad/cut.jpg", "truncated"), ("--data one-class", "holds 1 class folders"),
    ("--surrogate cut.pt", "or is damaged"), ("bomb.pt", "it is a zip bomb of "),
    ("--surrogate nan.pt", "logits that are not finite"),
    ("--data cifar10 --cache-dir empty", "or download it by train.py --data cifar10 --download"),
    ("--output-dir file", "file: File exists"), ("--cache-dir file", "file: File exists"),
    ("code.pt", "nor a state dict (it holds posix.mkdir): save model.state_dict()"),
    ("world:lazy --data set --size 16", "world:lazy: 1.weight has no shape yet; run one forward"),
    ("world:exported --data set --size 16", "world:exported has no eval mode, like programs of"),
    ("flipped.pt", "or is damaged (checksum of"), ("no:where.pt", "no:where.pt: No such file or"),
    ("number-names.pt", "its classes is damaged"), ("keys.pt", "its model is damaged"),
    ("std.pt", "its normalize is damaged"),
    *((f"setting-{name}.pt", f"its setting {name} cannot be")
      for name in ("data", "classes", "preprocess", "data_seed", "skip_bad_images")),
    ("no-model.pt", "its model is missing"), ("misfit.pt", "do not fit tiny:linear"),
    ("nan.pt", "returns logits that are not finite"),
    ("state.pt", "state.pt is a plain state dict: name its architecture with --arch"),
    ("state.pt --arch tiny:convnet --data other --size 16",
     "must be (2,); if it has other outputs, name them by --imagenet-classes"),
    ("state.pt --arch tiny:linear", "state.pt does not fit --arch tiny:linear with 3"),
    ("set", "set: Is a directory; name the file in it"),
    ("list.pt", "list.pt is neither a checkpoint of train.py nor a state dict: save model.state"),
    ("--cache-dir both --output-dir both", "both: choose another for one"),
    ("--output-dir evaluation --seed 1", "another run (seed: 0, now 1): choose another"),
    ("--output-dir cells-digit", "cells.jsonl: line 2 is damaged; delete it"),
    ("--output-dir cells-half", "line 1 is damaged"),
    ("--output-dir cells-unsigned", "cells.jsonl: line 3 is damaged; delete it"),
    *((f"--output-dir cells-{name}", "line 1 is damaged; delete it and start again")
      for name in ("text", "list", "joined", "bytes", "deep")),
]  # fmt: skip

REPRODUCE_CASES = [
    ("--scale large", "invalid choice: 'large'"),
    ("--data nowhere", "--data nowhere: no such folder"),
    ("--scale paper", "--classes 100: the dataset has 3"),
    ("--tables 4", "invalid choice: '4'"), ("--methods mlat", "invalid choice: 'mlat'"),
    ("--methods mtlat --tables 2 3", "--methods mtlat: not in --tables 2 3; name"),
    ("--seeds 0", "0 is out of range: from 1 up"),
    ("--size 15", "15 is out of range: from 16 to 4096"),
    ("--archs", "expected at least one"),
    ("--archs tiny:linear", "--surrogate tiny:linear is one of --archs"),
    ("--archs resnet5", "--arch resnet5: torchvision has no such classifier; close names: resnet"),
    ("--surrogate regnet_y_400mf --archs resnet19", "--arch resnet19: torchvision"),
    ("--surrogate resnet19 --tables 3", "--arch resnet19: torchvision"),  # which trains none
    ("--archs tiny:missing", "--arch tiny:missing: module 'tiny' has no attribute"),
    ("--surrogate nowhere:net", "No module named 'nowhere'"), ("--surrogate-lr 0", "above 0"),
    ("--limit -1", "from 0"), ("--train-flags=--lrr", "unrecognized arguments: --lrr"),
    ("--train-flags=--epochs=x", "'x' is not of type int"), ("--device meta", "--device meta"),
    ("--device abacus", "--device abacus"),
    ("--epochs 0", "from 1"), ("--data one-class", "holds 1 class folders"),
    ("--data bad/cut.jpg", "truncated"), ("--output-dir foreign", "or is damaged"),
    ("--output-dir damaged", "line 1 is damaged"),
]  # fmt: skip

ALL = {train: TRAIN_CASES, evaluate: EVALUATE_CASES, reproduce: REPRODUCE_CASES}
ALWAYS = {train: TRAIN, evaluate: EVALUATE, reproduce: REPRODUCE}
CASES = [(script, case) for script, cases in ALL.items() for case in cases]


def refused(script: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the script with these flags, check how it ends, and return its one-line error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        errors.run_script(partial(script.main, argv))
    printed = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    assert ended.value.code == 2
    assert len(printed) == 1 and printed[0].startswith("error: "), printed
    return printed[0]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("script", "case"), CASES, ids=[f"{script.__name__} {case[0]}" for script, case in CASES]
)
def test_scripts(script: Any, case: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = case
    models = flags.split()[:1] if script is evaluate and flags[0] != "-" else []
    argv = [*models, *ALWAYS[script], *flags.split()[len(models) :]]
    if "--resume" in flags:
        argv = ["--cache-dir", "cache", *flags.split()]
    assert message in refused(script, argv, capsys)
    assert not os.path.exists("executed") and not os.path.exists("unwritten")


def test_the_small_scale_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--scale small needs --data DIR" in refused(reproduce, ["--scale", "small"], capsys)
