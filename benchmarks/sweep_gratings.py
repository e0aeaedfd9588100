r"""Train with gratings of several amplitudes, and measure which cue the networks follow.

    python benchmarks/sweep_gratings.py FOLDER                          # the table of the docs
    python benchmarks/sweep_gratings.py FOLDER --amplitudes 0.03 --seeds 0 1 2

Images, checkpoints and results stay in FOLDER; the same command goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torchvision.io import write_png

from harness.benchmark.tables import markdown_rows
from harness.checkpoints import load_checkpoint
from harness.images.embedded import INDICES, NAMES, draw_shapes
from harness.models import restore_model
from harness.reproduction.mechanism import average, follow_cues

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "--arch resnet18 --size 32 -b 32 --whole-batches --lr 1e-3 --device cpu".split()
MEASURED = ["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression", "pgd_ll_0.04"]


def write_images(folder: Path, amplitude: float, size: int = 32) -> None:
    """Write the embedded set with gratings of this amplitude as a folder of PNG files."""
    if (folder / "complete").exists():
        return
    for part, indices in INDICES.items():
        images, labels = draw_shapes(indices, size, amplitude=amplitude)
        for index, image, label in zip(indices, images, labels.tolist(), strict=True):
            path = folder / {"train": "train", "test": "val"}[part] / NAMES[label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(image, str(path))
    (folder / "complete").touch()


def run(script: str, *arguments: str) -> None:
    """Run one of the scripts."""
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def measure(root: Path, amplitude: float, seed: int, methods: list[str], epochs: int) -> None:
    """Train each method on one set, and evaluate them together."""
    images, out = root / f"images-{amplitude}", root / f"amplitude-{amplitude}-seed{seed}"
    write_images(images, amplitude)
    cache = ["--cache-dir", str(root / "cache")]
    for method in methods:
        run(
            "train.py",
            "--data",
            str(images),
            "--method",
            method,
            "--epochs",
            str(epochs),
            *RECIPE,
            "--seed",
            str(seed),
            "--resume",
            "auto",
            "--output-dir",
            str(out / method),
            *cache,
        )
    run("evaluate.py", *(str(out / method / "last.pt") for method in methods), "--only", *MEASURED,
        "--skip", "checks", "--dump-images", "0", "--device", "cpu", *cache,
        "--output-dir", str(out / "evaluation"))  # fmt: skip


def rows(
    root: Path, amplitudes: list[float], seeds: list[int], methods: list[str]
) -> Iterator[list[str]]:
    """Yield the table: a header, then a row per amplitude, seed and method."""
    yield ["amplitude", "seed", "method", "clean", "no grating", "no shape", "follows the shape",
           "follows the grating", *MEASURED]  # fmt: skip
    for amplitude in amplitudes:
        for seed in seeds:
            out = root / f"amplitude-{amplitude}-seed{seed}"
            results = json.loads((out / "evaluation" / "results.json").read_text())["rows"]
            for method, row in zip(methods, results, strict=True):
                model = restore_model(load_checkpoint(out / method / "last.pt"))
                cues = average(follow_cues(model, 32, amplitude=amplitude))
                scores = [row["scores"][name]["robustness"] for name in MEASURED]
                numbers = [f"{value:.2f}" for value in (*cues, *scores)]
                yield [str(amplitude), str(seed), method, *numbers]


def main() -> None:
    """Train, evaluate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--amplitudes", type=float, nargs="+", default=[0.0, 0.02, 0.03, 0.04, 0.05]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=["standard", "mtlat"])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    for amplitude in args.amplitudes:
        for seed in args.seeds:
            measure(args.folder, amplitude, seed, args.methods, args.epochs)
    print(
        *markdown_rows(list(rows(args.folder, args.amplitudes, args.seeds, args.methods))), sep="\n"
    )


if __name__ == "__main__":
    main()
