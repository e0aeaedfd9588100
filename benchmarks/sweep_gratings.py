"""Train with gratings of several amplitudes, and measure which cue the networks follow.

    python benchmarks/sweep_gratings.py FOLDER                  # all methods, three seeds: hours
    python benchmarks/sweep_gratings.py FOLDER --amplitudes 0.03 --seeds 5

The images are read from a folder. So their order is another one than in the demonstration, and the
learning rate falls earlier, after 2.67, 5.33 and 7.11 epochs. Everything else is equal. Images,
checkpoints and results stay in FOLDER; the same command goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torchvision.io import write_png

from harness.benchmark.tables import markdown_rows
from harness.cli import Parser, number
from harness.errors import UserError, run_script
from harness.images.embedded import INDICES, NAMES, draw_shapes
from harness.reproduction.mechanism import average, follow_all
from harness.reproduction.plan import RECIPES, TrainTask, make_plan, parse_reproduce_config
from harness.training.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
SIZE = RECIPES["demo"]["size"]
MEASURED = ["gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression", "pgd_ll_0.04"]


def write_images(folder: Path, amplitude: float) -> None:
    """Write the embedded set with gratings of this amplitude as a folder of PNG files."""
    if (folder / "complete").exists():
        return
    for part, indices in INDICES.items():
        images, labels = draw_shapes(indices, SIZE, amplitude=amplitude)
        for index, image, label in zip(indices, images, labels.tolist(), strict=True):
            path = folder / {"train": "train", "test": "val"}[part] / NAMES[label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(image, str(path))
    (folder / "complete").touch()


def run(script: str, *arguments: str) -> None:
    """Run one of the scripts. If it fails, exit with its code, as it has printed why."""
    code = subprocess.run([sys.executable, str(ROOT / script), *arguments]).returncode
    if code < 0:  # then it has printed nothing
        raise UserError(f"signal {-code} has killed {script}: run the same command again")
    if code:
        sys.exit(code)


def plan_trainings(argv: list[str]) -> list[TrainTask]:
    """Return the trainings of this command line of reproduce.py, without the surrogate's."""
    config = parse_reproduce_config(argv)
    tasks = [task for task in make_plan(config) if isinstance(task, TrainTask)]
    return [task for task in tasks if not task.folder.name.startswith(f"{config.surrogate}-")]


def measure(root: Path, amplitude: float, methods: list[str], seeds: int) -> list[dict[str, Any]]:
    """Train and evaluate all methods and seeds on one set.

    Returns:
        Per network its method, the shares of `Cues`, and R under what is `MEASURED`.
    """
    images, out = root / f"images-{amplitude}", root / f"amplitude-{amplitude}"
    write_images(images, amplitude)
    common = ["--data", str(images), "--cache-dir", str(root / "cache"), "--device", "cpu"]
    argv = [*common, "--methods", *methods, "--seeds", str(seeds), "--output-dir", str(out)]
    trainings = plan_trainings(argv)
    for task in trainings:
        run("train.py", *task.argv)
    networks = [str(task.folder / "last.pt") for task in trainings]
    run("evaluate.py", *networks, *common, "--only", *MEASURED, "--skip", "checks",
        "--dump-images", "0", "--output-dir", str(out / "evaluation"))  # fmt: skip
    results = json.loads((out / "evaluation" / "results.json").read_text())["rows"]
    scores = {row["model"]: row["scores"] for row in results}
    cues = follow_all({task.folder.name: task.folder for task in trainings}, SIZE, amplitude)
    return [
        {"method": name.split("-", 1)[1].rsplit("-", 1)[0], **average(cues[name])._asdict()}
        | {each: scores[name][each]["robustness"] for each in MEASURED}
        for name in cues
    ]


def summarize(amplitude: float, networks: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield a row per method: the means over the seeds, and their standard deviations."""
    for method in dict.fromkeys(network["method"] for network in networks):
        seeds = [network for network in networks if network["method"] == method]
        cells = []
        for column in list(seeds[0])[1:]:
            values = [network[column] for network in seeds]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        yield [str(amplitude), method, *cells]


def main() -> None:
    """Train, evaluate, and print the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--amplitudes", type=number(float, 0), nargs="+", default=[0.0, 0.02, 0.03, 0.04, 0.05],
        help="of the gratings (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)"
    )
    parser.add_argument(
        "--seeds", type=number(int, 1), default=3, help="how many (default: %(default)s)"
    )
    args = parser.parse_args()
    table = [["amplitude", "method", "clean", "no grating", "no shape", "follows the shape",
              "follows the grating", *MEASURED]]  # fmt: skip
    for amplitude in args.amplitudes:
        networks = measure(args.folder, amplitude, args.methods, args.seeds)
        table += summarize(amplitude, networks)
    print(*markdown_rows(table), sep="\n")


if __name__ == "__main__":
    run_script(main)
