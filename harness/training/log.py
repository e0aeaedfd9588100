"""The log of a training: one row per epoch, as CSV, as a line, and the header that is printed."""

import csv
import io
import os
from typing import Any

from harness.checkpoints import load_weights
from harness.devices import environment_info
from harness.errors import escape_unprintable
from harness.images.datasets import Dataset
from harness.training.config import TrainConfig
from harness.training.methods import METHODS

Row = dict[str, Any]


def log_csv(log: list[Row]) -> str:
    """Format the epochs' rows as CSV with a header. Those of older versions may lack losses."""
    text = io.StringIO()
    rows = csv.DictWriter(text, log[-1], lineterminator="\n")
    rows.writeheader()
    rows.writerows(log)
    return text.getvalue()


def log_line(row: Row, epochs: int) -> str:
    """Format the row of one epoch for the terminal."""
    found = {name: mean for name, mean in row.items() if name.startswith("loss")}
    losses = "  ".join(f"{name} {mean:.4f}" for name, mean in found.items() if mean is not None)
    minutes, seconds = divmod(row["seconds_left"], 60)
    return (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  lr {row['lr']:.1e}  {losses}"
        f"  clean accuracy {100 * row['clean_accuracy']:5.1f} %"
        f"  {row['images_per_second']:.0f} images/s  {minutes}:{seconds:02} left"
    )


def header(config: TrainConfig, data: Dataset) -> str:
    """Describe a training before its first epoch: what is trained, on what, in how many steps."""
    method, size = METHODS[config.method], config.minibatch_size
    count = len(data.train.labels)
    steps = count // size
    return (
        f"{config.arch} by {config.method} ({method.description}) on {config.device}, output in"
        f" {config.output_dir}\n"
        f"{config.data}: {count} training and {len(data.test.labels)} test images of"
        f" {config.size}x{config.size}, fingerprint {data.fingerprint[:16]}\n"
        f"{len(data.classes)} classes: {' '.join(map(escape_unprintable, data.classes))}\n"
        f"{steps} steps per epoch, each draws {method.minibatches} x {size} images:"
        f" {steps * method.minibatches * size} per epoch"
    )


def describe_weights(config: TrainConfig, data: Dataset, checkpoint: dict[str, Any] | None) -> str:
    """Return a warning if --weights may have been trained on present test images, otherwise "".

    Of a folder CLASS/* alone a tenth is held out, which changes with --data-seed, and when images
    are added.

    Args:
        config: configuration of this training.
        data: its dataset.
        checkpoint: the one to resume from, whose stored warning is returned; None for a new run.
    """
    if checkpoint:
        return str(checkpoint["settings"].get("seen_before", ""))
    if not (data.held_out and config.weights and os.path.exists(config.weights)):
        return ""
    content = load_weights(config.weights)
    settings = content.get("settings", {})
    if found := settings.get("seen_before"):
        return str(found)
    files, pixels = settings.get("test_files"), settings.get("test_fingerprint")
    known = {*content.get("classes", [])}
    shared = data._replace(paths=[path for path in data.paths if path.split("/")[0] in known])
    held_out_then = shared.test_files == files if files else data.test_fingerprint == pixels
    if held_out_then or not known & {*data.classes}:
        return ""
    return (
        f"{config.weights} may have been trained on some of the test images: it was tested on"
        " others, since the tenth that is held out changes with --data-seed, and when images are"
        " added; put test images into val/CLASS"
    )


def trained_with(config: TrainConfig, checkpoint: dict[str, Any] | None) -> dict[str, str]:
    """Return what all epochs of a run were trained with, such as {"torch": "2.11.0, then 2.14.1"}.

    The checkpoint knows the versions of the epochs before. A finished run keeps its own.
    """
    now = environment_info(config.device)
    if checkpoint is None:
        return now
    before = {key: str(checkpoint["settings"].get(key, value)) for key, value in now.items()}
    if len(checkpoint["log"]) >= config.epochs:
        return before
    return {
        key: old if old.rpartition(", then ")[2] == now[key] else f"{old}, then {now[key]}"
        for key, old in before.items()
    }
