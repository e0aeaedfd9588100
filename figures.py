"""The figures of a report: robustness as bars, accuracy against severity, and the images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common import replacing
from corruptions import CORRUPTIONS
from mtlat import Draws, draw, frozen, mixup, tlat
from report import COLUMNS, TABLES, Report, severities, wilson

ALPHA, EPSILON_MAX = 0.4, 0.025  # the paper's
GREY, PALETTE = "#9aa0a6", ("#1f6feb", "#d1495b", "#2a9d63", "#e09f3e", "#7b4ea3", "#17a2b8")


class Tile(NamedTuple):
    """A picture of the contact sheet."""

    title: str
    image: Tensor  # (3, S, S) in [0, 1]
    predicted: str
    right: bool


def draw_robustness(report: Report, path: Path) -> None:
    """Robustness per perturbation as grouped bars, in the tables' order, with 95 % intervals."""
    places: dict[str, float] = {}
    for gap, names in enumerate(TABLES.values()):
        places |= {name: len(places) + i + 0.7 * gap for i, name in enumerate(names)}
    figure = _figure(13, 4.5)
    axes = figure.subplots()
    width, colours = (
        0.8 / len(report.rows),
        _colours([row.model for row in report.rows], report.baseline),
    )
    for i, row in enumerate(report.rows):
        left = (i - (len(report.rows) - 1) / 2) * width
        bars = [(places[n] + left, s) for n, s in row.scores.items() if n in places and s.accuracy]
        x = [place for place, _ in bars]
        y = [s.robustness for _, s in bars]
        low = [s.robustness * (1 - s.low / s.accuracy) for _, s in bars]
        high = [s.robustness * (s.high / s.accuracy - 1) for _, s in bars]
        axes.bar(x, y, width, color=colours[row.model], label=row.model,
                 yerr=(low, high), error_kw={"lw": 0.6, "ecolor": "#444444"})  # fmt: skip
    axes.axhline(1, color="#444444", lw=0.8, ls=":")
    axes.set_xticks(list(places.values()), [COLUMNS[name] for name in places], rotation=45,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axes.set_xlim(-0.7, max(places.values()) + 0.7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("R = accuracy / clean accuracy, 95 % intervals")
    _finish(figure, axes, path)


def draw_severities(report: Report, path: Path) -> None:
    """Accuracy against severity for ImageNet-C's fifteen, with 95 % intervals; 0 is clean."""
    figure, colours = (
        _figure(11, 6.6),
        _colours([row.model for row in report.rows], report.baseline),
    )
    panels = list(figure.subplots(3, 5, sharex=True, sharey=True).flat)
    graded = [name for name in CORRUPTIONS if len(severities(name)) > 1]
    for axes, name in zip(panels, graded, strict=True):
        axes.set_title(COLUMNS[name], fontsize=10)
        for row in report.rows:
            if name in row.scores:
                score = row.scores[name]
                y = [row.scores["clean"].accuracy, *score.by_severity]
                low, high = zip(*(wilson(share * score.n, score.n) for share in y), strict=True)
                colour = colours[row.model]
                axes.plot(range(len(y)), y, color=colour, marker="o", ms=3, label=row.model)
                axes.fill_between(range(len(y)), low, high, color=colour, alpha=0.15, lw=0)
        axes.set_ylim(0, 1)
        axes.set_xticks(range(6), ["0", *"12345"])
        axes.grid(alpha=0.3)
    figure.supxlabel("severity (0: clean)", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    _finish(figure, panels[0], path)


def draw_curves(logs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """The losses and the clean accuracy after every epoch, from the logs of train.py."""
    figure, colours = _figure(9, 3.6), _colours(list(logs))
    losses, accuracy = figure.subplots(1, 2)
    for name, log in logs.items():
        epochs = [row["epoch"] for row in log]
        style: dict[str, Any] = {"color": colours[name], "marker": "o", "ms": 3}
        losses.plot(epochs, [row["loss1"] for row in log], **style)
        if log and log[0]["loss2"] is not None:
            losses.plot(epochs, [row["loss2"] for row in log], ls="--", **style)
        accuracy.plot(epochs, [100 * row["clean_accuracy"] for row in log], label=name, **style)
    losses.set_ylabel("loss1, and dashed loss2")
    accuracy.set_ylabel("clean accuracy, %")
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _finish(figure, accuracy, path)


def draw_step(
    model: nn.Module, x: Tensor, y: Tensor, classes: list[str], path: Path, seed: int = 0
) -> None:
    """One step of M-TLAT: two images, their mix, the perturbation, x_mtlat and its label.

    x: (B, 3, S, S) in [0, 1], B at least 4; y: (B,) int64. The draws are those of a training with
    this seed; of the B couples the one is shown where most classes are seen and most evenly mixed.
    """
    if len(x) < 4:
        raise ValueError(f"{len(x)} images; the picture of a step is chosen from 4 or more")
    generator = torch.Generator().manual_seed(seed)
    draws = draw(len(x), len(classes), alpha=ALPHA, epsilon_max=EPSILON_MAX, generator=generator)
    draws = Draws(*(numbers.to(x.device) for numbers in draws))
    x4, y4 = x.roll(1, 0), y.roll(1, 0)
    x_mix, y_mix = mixup(x, y, x4, y4, draws.lam2, num_classes=len(classes))
    x_mtlat, y_mtlat = tlat(model, x_mix, y_mix, draws.target, draws.epsilon)
    with frozen(model), torch.no_grad():
        towards = draws.target[:, None]
        before, after = (model(z).softmax(1).gather(1, towards)[:, 0] for z in (x_mix, x_mtlat))
    several = [len({int(y[i]), int(y4[i]), int(draws.target[i])}) for i in range(len(x))]
    lam, epsilon = draws.lam2.tolist(), draws.epsilon.tolist()
    i = max(range(len(x)), key=lambda i: (several[i], -abs(lam[i] - 0.5)))
    target = classes[draws.target[i]]
    change = (x_mtlat - x_mix)[i] / (2 * epsilon[i]) + 0.5
    shown = {
        f"x3: {classes[y[i]]}": x[i],
        f"x4: {classes[y4[i]]}": x4[i],
        f"x_mix2 = {lam[i]:.2f} x3 + {1 - lam[i]:.2f} x4": x_mix[i],
        f"step of {epsilon[i]:.4f} to {target}, enlarged": change,
        f"x_mtlat: {target} {100 * before[i]:.0f} % -> {100 * after[i]:.0f} %": x_mtlat[i],
    }
    figure = _figure(8, 5.4)
    *panels, last = figure.subplots(2, 3).flat
    for axes, (title, image) in zip(panels, shown.items(), strict=True):
        axes.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    named = dict.fromkeys([int(y[i]), int(y4[i]), int(draws.target[i])])
    bars = last.barh([classes[k] for k in named], [float(y_mtlat[i, k]) for k in named])
    last.bar_label(bars, fmt="%.3f")
    last.set_title("y_mtlat", fontsize=9)
    _finish(figure, None, path)


def draw_images(sheets: Sequence[Sequence[Tile]], path: Path) -> None:
    """A sheet of five columns for each image: clean, perturbed, and what they are taken for."""
    columns = min(2, len(sheets))
    rows = math.ceil(len(sheets) / columns)
    tall = math.ceil(max(map(len, sheets)) / 5)
    figure = _figure(6.4 * columns, 1.62 * tall * rows)
    blocks = figure.subfigures(rows, columns, squeeze=False, wspace=0.04, hspace=0.03).flat
    for block, sheet in zip(blocks, sheets, strict=False):
        panels = list(block.subplots(tall, 5, squeeze=False).flat)
        for axes in panels:
            axes.axis("off")
        for axes, tile in zip(panels, sheet, strict=False):
            axes.imshow(tile.image.permute(1, 2, 0).numpy())
            axes.set_title(tile.title, fontsize=7, pad=2)
            colour = "#2a9d63" if tile.right else "#d1495b"
            axes.text(0.5, -0.03, tile.predicted, color=colour, fontsize=7, ha="center", va="top",
                      transform=axes.transAxes)  # fmt: skip
    _finish(figure, None, path)


def _figure(width: float, height: float) -> Figure:
    return Figure((width, height), dpi=150, layout="constrained")


def _colours(names: Sequence[str], baseline: str | None = None) -> dict[str, str]:
    """The baseline, or else the first, in grey, the others in colours."""
    grey = baseline or next(iter(names), "")
    others = [name for name in names if name != grey]
    return {grey: GREY, **{name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}}


def _finish(figure: Figure, labelled: Any, path: Path) -> None:
    """Write the figure, with a legend of what is labelled in these axes."""
    if labelled and (found := labelled.get_legend_handles_labels())[0]:
        figure.legend(*found, loc="outside upper center", ncols=6, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
