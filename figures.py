"""The figures of a report: robustness, severities, training curves, a step, and the images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor, nn

from common import printable, replacing
from corruptions import CORRUPTIONS
from mtlat import draw, frozen, mixup, tlat
from page import DPI
from report import COLUMNS, TABLES, Report, severities, wilson

ALPHA, EPSILON_MAX = 0.4, 0.025  # the paper's
GREY = "#9aa0a6"
PALETTE = ("#1f6feb", "#d1495b", "#2a9d63", "#e09f3e", "#7b4ea3", "#17a2b8", "#8c5a3c", "#e377c2")
rcParams["text.parse_math"] = False  # a $ in the name of a class or a model is a $


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
    axes.set_ylabel("R = accuracy / clean accuracy, 95 % intervals", fontsize=9)
    _finish(figure, path)


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
        axes.set_ylim(0, 1.04)  # a marker at 1 is seen whole
        axes.set_xticks(range(6), ["0", *"12345"])
        axes.grid(alpha=0.3)
    figure.supxlabel("severity (0: clean)", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    _finish(figure, path)


def draw_curves(logs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """The losses and the clean accuracy after every epoch, from the logs of train.py by name."""
    figure, colours = _figure(9, 3.6), _colours(list(logs))
    losses, accuracy = figure.subplots(1, 2)
    for name, log in logs.items():
        epochs = [row["epoch"] for row in log]
        style: dict[str, Any] = {"color": colours[name], "marker": "o", "ms": 3 * (len(log) < 30)}
        losses.plot(epochs, [row["loss1"] for row in log], **style)
        losses.plot(epochs, [row["loss2"] for row in log], ls="--", **style)
        accuracy.plot(epochs, [100 * row["clean_accuracy"] for row in log], label=name, **style)
    losses.set_ylabel("loss1, and loss2 (dashed)")
    accuracy.set_ylabel("clean accuracy, %")
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _finish(figure, path)


def draw_step(
    model: nn.Module, x: Tensor, y: Tensor, classes: list[str], path: Path, seed: int = 0
) -> None:
    """The attacked half of a step: two images, their mix, the perturbation, x_mtlat, its label.

    x: (B, 3, S, S) in [0, 1], B at least 4; y: (B,) int64; the model is attacked in the mode it is
    in. Of the B couples (an image and the one before it), with the draws of this seed, that one is
    shown where most can be seen: three classes, an even mix, a large epsilon.
    """
    if len(x) < 4:
        raise ValueError(f"{len(x)} images; the picture of a step is chosen from 4 or more")
    draws = draw(len(x), len(classes), alpha=ALPHA, epsilon_max=EPSILON_MAX,
                 generator=torch.Generator().manual_seed(seed), device=x.device)  # fmt: skip
    x4, y4 = x.roll(1, 0), y.roll(1, 0)
    x_mix2, y_mix2 = mixup(x, y, x4, y4, draws.lam2, num_classes=len(classes))
    x_mtlat, y_mtlat = tlat(model, x_mix2, y_mix2, draws.target, draws.epsilon)
    with frozen(model), torch.no_grad():
        before, after = (
            100 * model(images).softmax(1).gather(1, draws.target[:, None]).squeeze(1)
            for images in (x_mix2, x_mtlat)
        )
    couples = list(zip(y.tolist(), y4.tolist(), draws.target.tolist(), strict=True))
    seen = torch.minimum(draws.lam2, 1 - draws.lam2) * draws.epsilon
    i = max(range(len(x)), key=lambda i: (len(set(couples[i])), float(seen[i])))
    lam, epsilon = float(draws.lam2[i]), float(draws.epsilon[i])
    first, second, target = (_short(classes[k], 18) for k in couples[i])
    enlarged = (x_mtlat - x_mix2)[i] / (2 * epsilon) + 0.5
    shown = [
        (f"x3\n{first}", x[i]),
        (f"x4\n{second}", x4[i]),
        (f"x_mix2\n{lam:.2f} x3 + {1 - lam:.2f} x4", x_mix2[i]),
        (f"x_mtlat - x_mix2, {0.5 / epsilon:.0f} times as large\n"
         f"epsilon {epsilon:.4f}, towards {target}", enlarged),
        (f"x_mtlat\np({target}): {before[i]:.2f} % before, {after[i]:.2f} % now", x_mtlat[i]),
    ]  # fmt: skip
    figure = _figure(8, 6, 0.08)
    *panels, last = figure.subplots(2, 3).flat
    for axes, (title, image) in zip(panels, shown, strict=True):
        axes.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    last.set_title(f"y_mtlat\n{1 - epsilon:.4f} y_mix2 + {epsilon:.4f} y_target", fontsize=9)
    _draw_label(last, {classes[k]: float(y_mtlat[i, k]) for k in couples[i]})
    _finish(figure, path)


def _draw_label(axes: Any, shares: Mapping[str, float]) -> None:
    """A soft label as bars, each below its class's name."""
    axes.barh(range(len(shares)), list(shares.values()), 0.35, color=PALETTE[: len(shares)])
    for place, (name, share) in enumerate(shares.items()):
        axes.text(0, place - 0.26, f"{share:.4f}  {_short(name, 26)}", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(2.6, -0.8)
    axes.set_box_aspect(1)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_images(sheets: Sequence[Sequence[Tile]], path: Path) -> None:
    """A sheet of five columns for each image: clean, perturbed, and what they are taken for."""
    columns = min(2, len(sheets))
    rows = math.ceil(len(sheets) / columns)
    tall = math.ceil(max(map(len, sheets)) / 5)
    figure = _figure(6.4 * columns, 1.62 * tall * rows)
    blocks = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in blocks:
        axes.axis("off")
    # One axes for all tiles of a sheet, in inches: to lay out a hundred of them takes seconds.
    for axes, sheet in zip(blocks, sheets, strict=False):
        style = {"fontsize": 7, "ha": "center", "va": "center"}
        for i, tile in enumerate(sheet):
            left, top = 1.28 * (i % 5), 1.62 * (i // 5)
            extent = (left + 0.03, left + 1.25, top + 1.42, top + 0.2)
            axes.imshow(tile.image.permute(1, 2, 0).numpy(), extent=extent)
            axes.text(left + 0.64, top + 0.11, _short(tile.title, 20), **style)
            mark, colour = ("✓", "#1b7f4b") if tile.right else ("✗", "#c0392b")
            predicted = f"{mark} {_short(tile.predicted, 18)}"
            axes.text(left + 0.64, top + 1.51, predicted, color=colour, **style)
        axes.set(xlim=(0, 6.4), ylim=(1.62 * tall, 0))
    _finish(figure, path)


def _figure(width: float, height: float, pad: float = 0.04) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    return Figure((width, height), dpi=DPI, layout=layout)


def _colours(names: Sequence[str], baseline: str | None = None) -> dict[str, str]:
    """The baseline, or else the first, in grey, the others in colours."""
    grey = baseline or next(iter(names), "")
    others = [name for name in names if name != grey]
    return {grey: GREY, **{name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}}


def _short(name: str, most: int) -> str:
    name = printable(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _finish(figure: Figure, path: Path) -> None:
    """Write the figure, with one legend of all that is labelled, as many to a line as fit."""
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    found = {name: handle for pair in drawn for handle, name in zip(*pair, strict=True)}
    for columns in range(min(6, len(found)), 0, -1):
        legend = figure.legend(found.values(), found, loc="outside upper center", ncols=columns,
                               frameon=False)  # fmt: skip
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            # The height has room for one line of it.
            figure.set_figheight(figure.get_figheight() + box.height / DPI - 0.4)
            break
        legend.remove()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
