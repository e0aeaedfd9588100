"""Run every command of the README and of docs/usage.md, with appended flags that make it small."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import evaluate
import reproduce
import train
from harness.benchmark import plots, registry
from harness.images import embedded
from harness.training.methods import METHODS
from tests.support.tiny import image_folder

ROOT = Path(train.__file__).parent
MAINS = {"train.py": train.main, "evaluate.py": evaluate.main, "reproduce.py": reproduce.main}
TRAINING = "--arch tiny:convnet --size 32 --epochs 1 -b 8 --device cpu"
RECIPE = (
    "--archs tiny:convnet --surrogate tiny:linear --size 32 --classes 3 --epochs 1"
    " --surrogate-epochs 1 --batch-size 8 --limit 3 --methods mtlat --device cpu"
)
EVALUATION = "--limit 6 --device cpu --dump-images 1 --only fog mi_fgsm_0.04"
# Flags that are appended to each command. The order matters, because some commands use the results
# of earlier ones. None means that another test runs the command, or that it runs the tests.
ADDED: dict[str, str | None] = {
    "python -m pytest": None,
    "python reproduce.py": RECIPE,
    "python train.py": "--epochs 1 -b 12",
    "python reproduce.py --scale paper --data IMAGENET --dry-run": RECIPE,
    "python reproduce.py --scale small --data IMAGES --tables 1 2 --seeds 3": RECIPE + " --seeds 1",
    "python train.py --data IMAGES --amp bf16 --channels-last": TRAINING + " --output-dir runs/own",
    "python train.py --data IMAGES --amp bf16 --channels-last --method standard": TRAINING
    + " --output-dir runs/base",
    "python train.py --data IMAGES --method standard --arch vgg11_bn --lr 1e-4"
    " --output-dir runs/vgg": TRAINING,
    # test_evaluate_cli.py: test_torchvisions_models_with_their_weights
    "python evaluate.py torchvision:resnet50 --weights DEFAULT --data IMAGENET"
    " --imagenet-c IMAGENET_C": None,
    "python evaluate.py runs/resnet50-standard/last.pt runs/resnet50-mtlat/last.pt": (
        "--limit 6 --device cpu --only fog --output-dir runs/first"
    ),
    "python evaluate.py runs/resnet50-standard/last.pt runs/resnet50-mtlat/last.pt"
    " --surrogate runs/vgg/last.pt": EVALUATION,
    "python evaluate.py package.module:make_model --mean .5 .5 .5 --std .2 .2 .2 --data IMAGES": (
        EVALUATION + " --size 32 --output-dir runs/third"
    ),
    # test_evaluate_cli.py: test_a_plain_state_dict_is_evaluated_with_its_architecture
    "python evaluate.py my/resnet18.pth --arch resnet18 --mean .5 .5 .5 --std .2 .2 .2"
    " --data IMAGES": None,
    # test_distributed.py
    "torchrun --nproc-per-node=4 --max-restarts=3 train.py --data IMAGES --resume auto": None,
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST train.py"
    " ...": None,
    "torchrun --nproc-per-node=4 evaluate.py runs/resnet50-standard/last.pt"
    " runs/resnet50-mtlat/last.pt": None,
    "python -m tests.faults.run": None,  # run by CI
    "python benchmarks/time_step.py": None,  # test_benchmarks.py
    "python -m corruptions IMAGE --out sheet.png": "",
    "python -m corruptions DIR --out DIR_C": "",
}


def commands() -> set[str]:
    """Return the commands in indented blocks and in backticks, which may include line breaks."""
    text = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/usage.md"))
    found = re.findall(r"^    (\S[^\n]*)", text, re.MULTILINE)
    found += re.findall(r"(?<!`)`((?:python|pip|torchrun)\s[^`]*)`", text)
    parts = [part.split(" # ")[0] for line in found for part in re.split(r" && |; ", line)]
    spaced = [re.sub(r"\s+", " ", part).strip() for part in parts]
    return {part for part in spaced if part.startswith(("python ", "torchrun "))}


def test_every_command_is_known_here() -> None:
    assert commands() == set(ADDED)


def test_the_manual_has_a_row_for_every_method() -> None:
    text = (ROOT / "docs" / "usage.md").read_text()
    assert re.findall(r"^\| `(\w[\w-]*)` \|", text, re.MULTILINE) == list(METHODS)


def call(task: Any) -> None:
    MAINS[task.script](task.argv)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # networks too small for their images
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_folder(tmp_path / "images", each=10, side=32)
    few = image_folder(tmp_path / "few", classes=2, each=1, side=32)
    places = {
        "IMAGENET": str(images), "IMAGES": str(images), "DIR": str(few), "DIR_C": "out_c",
        "IMAGE": str(next(images.glob("*/*.png"))), "package.module:make_model": "tiny:convnet",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "INDICES", {"train": range(40), "test": range(50, 80)})
    monkeypatch.setattr(registry, "SAMPLE", 3)
    monkeypatch.setattr(reproduce, "run_task", call)
    monkeypatch.setattr(plots, "DPI", 12)
    for method in ("standard", "mtlat"):
        out = f"runs/resnet50-{method}"
        argv = f"--data {images} --method {method} {TRAINING} --output-dir {out}"
        train.main(shlex.split(argv))
    for command, added in ADDED.items():
        if added is None:
            continue
        _, script, *argv = [places.get(w, w) for w in shlex.split(f"{command} {added}")]
        if script == "-m":
            monkeypatch.setattr(sys, "argv", argv)
            monkeypatch.delitem(sys.modules, f"{argv[0]}.__main__", raising=False)
            runpy.run_module(argv[0], run_name="__main__", alter_sys=False)
        else:
            MAINS[script](argv)
    for made in ("reproduce/demo/report.html", "reproduce/small/report.html", "own/best.pt",
                 "evaluate/resnet50-*/results.tex", "third/results.md"):  # fmt: skip
        assert [path.stat().st_size > 0 for path in (tmp_path / "runs").glob(made)] == [True]
    assert (tmp_path / "sheet.png").exists() and (tmp_path / "out_c" / "fog" / "5").is_dir()
