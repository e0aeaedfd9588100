"""Which cue of the embedded set a network follows: the shape, or the grating.

Accuracies on images without one of the cues say what a network can use. Images whose grating is
another class's say what it does use: is the prediction the shape's class, or the grating's?
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harness.benchmark.plots import plot_shares
from harness.checkpoints import load_checkpoint
from harness.images.embedded import AMPLITUDE, INDICES, NAMES, draw_shapes
from harness.models import compute_logits, restore_model
from harness.reproduction.page import Figure, Section, Table, Text

SHIFT = 3  # of the gratings: the class of the other grating
BATCH = 250
HEADINGS = ("both cues", "no grating", "no shape", "exchanged:\nas the shape",
            "exchanged:\nas the grating")  # fmt: skip


class Cues(NamedTuple):
    """Shares of the test images in [0, 1]; each of the ten classes would get 0.1 by chance."""

    both: float  # accuracy with both cues
    shape: float  # accuracy without gratings
    grating: float  # accuracy without shapes
    follows_shape: float  # predictions of the shape's class, where the grating is another class's
    follows_grating: float  # predictions of that other class


def measure_cues(model: nn.Module, size: int, amplitude: float = AMPLITUDE) -> Cues:
    """Measure which cue a network follows, on the embedded set's test images. Sets eval mode.

    Args:
        model: of the ten classes of the embedded set.
        size: side of the images in pixels.
        amplitude: of the gratings.
    """

    def predict(shapes: bool = True, amplitude: float = amplitude, shift: int = 0) -> Tensor:
        images, _ = draw_shapes(
            INDICES["test"], size, shapes=shapes, amplitude=amplitude, shift=shift
        )
        parts = (part.float() / 255 for part in images.split(BATCH))
        return torch.cat([compute_logits(model, part).argmax(1) for part in parts])

    model.eval()
    labels = torch.tensor(INDICES["test"]) % len(NAMES)
    exchanged = predict(shift=SHIFT)
    found = [
        predict() == labels, predict(amplitude=0.0) == labels, predict(shapes=False) == labels,
        exchanged == labels, exchanged == (labels + SHIFT) % len(NAMES),
    ]  # fmt: skip
    return Cues(*(right.double().mean().item() for right in found))


def measure_all(folders: Mapping[str, Path], size: int) -> dict[str, Cues]:
    """Measure the networks in the checkpoints of these training folders, by name."""
    return {
        name: measure_cues(restore_model(load_checkpoint(folder / "last.pt")), size)
        for name, folder in folders.items()
    }


def mechanism_section(cues: Mapping[str, Cues], path: Path) -> Section:
    """Show which cue each network follows; the figure is written to `path`."""
    plot_shares({name: dict(zip(HEADINGS, row, strict=True)) for name, row in cues.items()}, path)
    header = ["training", *(heading.replace("\n", " ") for heading in HEADINGS)]
    rows = [[name, *(f"{100 * value:.1f} %" for value in row)] for name, row in cues.items()]
    return Section("Why: the cue that each network follows", [
        Text(
            "Each class of the embedded set has a robust cue, its shape, and a brittle one, the"
            " orientation of a faint grating. The paper (section 5.4) argues that training with"
            " targeted attacks makes networks rely less on brittle cues. Here this can be measured:"
            " what remains of the accuracy without the grating or without the shape, and what a"
            " network says of an image whose grating is another class's."
        ),
        Figure(path, "Accuracy with both cues, without gratings, without shapes; and predictions"
               " where gratings are exchanged between classes: the class of the shape, or of the"
               " grating"),
        Table("The cue that each network follows", [header, *rows], fold=True),
    ])  # fmt: skip
