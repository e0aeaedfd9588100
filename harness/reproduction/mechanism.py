"""Which cue of the embedded set a network follows: the shape, or the grating.

Accuracies on images without one of the cues say what a network can use. Images whose grating is
another class's say what it does use: is the prediction the shape's class, or the grating's?
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness.benchmark.paired import Array, compare_accuracy, uncorrected
from harness.benchmark.plots import plot_shares
from harness.checkpoints import load_checkpoint
from harness.images.embedded import AMPLITUDE, INDICES, NAMES, draw_shapes
from harness.models import compute_logits, restore_model
from harness.reproduction.page import Figure, Section, Table, Text

SHIFT = 3  # of the gratings: the class of the other grating
BATCH = 250
HEADINGS = ("both cues", "no grating", "no shape", "exchanged:\nas the shape",
            "exchanged:\nas the grating")  # fmt: skip


Outcomes = dict[str, Array]  # of the test images, 0 or 1, (n,), by the fields of `Cues`


class Cues(NamedTuple):
    """Shares of the test images in [0, 1]; each of the ten classes would get 0.1 by chance."""

    both: float  # accuracy with both cues
    shape: float  # accuracy without gratings
    grating: float  # accuracy without shapes
    follows_shape: float  # predictions of the shape's class, where the grating is another class's
    follows_grating: float  # predictions of that other class


def draw_cues(size: int, amplitude: float = AMPLITUDE, seed: int = 0) -> dict[str, Tensor]:
    """Draw the test images with both cues, with one of them, and with exchanged gratings.

    Args:
        size: side in pixels.
        amplitude: of the gratings.
        seed: of the images, --data-seed.

    Returns:
        Images uint8 (N, 3, size, size) by "both", "shape", "grating" and "exchanged".
    """
    draw = partial(draw_shapes, INDICES["test"], size, seed)
    return {
        "both": draw(amplitude=amplitude)[0],
        "shape": draw(amplitude=0.0)[0],
        "grating": draw(amplitude=amplitude, shapes=False)[0],
        "exchanged": draw(amplitude=amplitude, shift=SHIFT)[0],
    }


def follow_cues(model: nn.Module, images: Mapping[str, Tensor]) -> Outcomes:
    """Find out for each test image of the embedded set which cue a network follows.

    Args:
        model: of the ten classes of the embedded set. Put into eval mode.
        images: of `draw_cues`.
    """

    def predict(name: str) -> Tensor:
        parts = (part.float() / 255 for part in images[name].split(BATCH))
        return torch.cat([compute_logits(model, part).argmax(1) for part in parts])

    model.eval()
    labels = torch.tensor(INDICES["test"]) % len(NAMES)
    exchanged = predict("exchanged")
    found = {
        **{name: predict(name) == labels for name in ("both", "shape", "grating")},
        "follows_shape": exchanged == labels,
        "follows_grating": exchanged == (labels + SHIFT) % len(NAMES),
    }
    return {name: right.double().numpy() for name, right in found.items()}


def average(outcomes: Outcomes) -> Cues:
    """Average the outcomes over the images."""
    return Cues(**{name: float(np.mean(right)) for name, right in outcomes.items()})


def follow_all(
    folders: Mapping[str, Path], size: int, amplitude: float = AMPLITUDE, seed: int = 0
) -> dict[str, Outcomes]:
    """Call `follow_cues` for the checkpoints of these training folders, by name."""
    images = draw_cues(size, amplitude, seed)
    return {
        name: follow_cues(restore_model(load_checkpoint(folder / "last.pt")), images)
        for name, folder in folders.items()
    }


def compare_gratings(outcomes: Mapping[str, Outcomes], baselines: Mapping[str, str]) -> list[str]:
    """Say how much more often each network follows the grating than its baseline does."""
    lines = []
    for name, baseline in baselines.items():
        pair = outcomes[name]["follows_grating"], outcomes[baseline]["follows_grating"]
        difference = uncorrected(compare_accuracy(*pair))
        assert difference is not None
        value, low, high = (100 * number for number in difference[:3])
        how = f"as often as {baseline}"
        if value:
            more = "more" if value > 0 else "less"
            how = f"{more} often than {baseline}, by {abs(value):.1f} points"
        verdict = "significant at 5 %" if difference.decided else "not significant at 5 %"
        lines.append(
            f"{name} predicts the exchanged grating's class {how} (paired 95 % interval of the"
            f" difference: {low:+.1f} to {high:+.1f} points; {verdict}, uncorrected)."
        )
    return lines


def mechanism_section(
    outcomes: Mapping[str, Outcomes], baselines: Mapping[str, str], path: Path
) -> Section:
    """Show which cue each network follows.

    Args:
        outcomes: of each network.
        baselines: the name of the network that a network is compared with, by its own name.
        path: where the figure is written.
    """
    cues = {name: average(each) for name, each in outcomes.items()}
    plot_shares({name: dict(zip(HEADINGS, row, strict=True)) for name, row in cues.items()}, path)
    compared = compare_gratings(outcomes, baselines)
    if compared:
        compared.append(
            "These intervals account for the choice of the test images only. Two trainings of one"
            " method can differ by more, even if only their rounding differs."
        )
    header = ["training", *(heading.replace("\n", " ") for heading in HEADINGS)]
    rows = [[name, *(f"{100 * value:.1f} %" for value in row)] for name, row in cues.items()]
    return Section("Why: the cue that each network follows", [
        Text(
            "Each class of the embedded set has a robust cue, its shape, and a brittle one, the"
            " orientation of a faint grating. The paper (section 5.4) argues that training with"
            " targeted attacks makes networks rely less on brittle cues. Here this can be measured:"
            " what remains of the accuracy without the grating or without the shape, and what a"
            " network predicts for an image whose grating is another class's."
        ),
        *map(Text, compared),
        Figure(path, "Accuracy with both cues, without gratings, without shapes; and predictions"
               " where gratings are exchanged between classes: the class of the shape, or of the"
               " grating"),
        Table("The cue that each network follows", [header, *rows], fold=True),
    ])  # fmt: skip
