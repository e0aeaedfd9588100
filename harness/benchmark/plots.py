"""Figures: scores and their differences, training curves, a step of M-TLAT, perturbed images."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import colormaps, rcdefaults, rcParams
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from harness.benchmark.metrics import Results, wilson
from harness.benchmark.paired import Difference
from harness.benchmark.registry import COLUMNS, TABLES
from harness.benchmark.tables import measured_tables
from harness.errors import escape_unprintable
from harness.files import atomic_path
from harness.models import compute_logits
from mtlat import ALPHA, EPSILON_MAX, Draws, draw, frozen, mixup, target_labels, targeted_fgsm

DPI = 150  # of the figures: the report shows them at their size in inches
GRAY = "#9aa0a6"
PALETTE = ("#1f6feb", "#d1495b", "#2a9d63", "#e09f3e", "#7b4ea3", "#17a2b8", "#8c5a3c", "#e377c2")
_FONTS: Any = {k: v for k, v in rcParams.items() if k.startswith("font.") and k != "font.size"}
rcdefaults()  # a matplotlibrc may ask for LaTeX, another size, or images upside down
rcParams.update(_FONTS)  # the default one may lack the letters of the class names
rcParams["text.parse_math"] = False  # a $ in the name of a class or a model is a $


class Tile(NamedTuple):
    """One image of a contact sheet."""

    title: str
    image: Tensor  # (3, S, S) in [0, 1]
    predicted: str
    right: bool


def plot_robustness(results: Results, path: Path) -> None:
    """Plot R per perturbation as grouped bars, in the tables' order, with 95 % intervals.

    What was not measured, or is void, has no place.
    """
    places: dict[str, float] = {}
    known = {n for row in results.rows for n, s in row.scores.items() if n not in row.void}
    for gap, title in enumerate(measured_tables(results)):
        for name in TABLES.get(title, []):
            if name in known:
                places[name] = len(places) + 0.7 * gap
    figure = _figure(13, 4.5)
    axes = figure.subplots()
    width = 0.8 / len(results.rows)
    colors = _colors([row.model for row in results.rows], results.baseline)
    for i, row in enumerate(results.rows):
        left = (i - (len(results.rows) - 1) / 2) * width
        scores = {n: s for n, s in row.scores.items() if n in places}
        bars = {places[n] + left: s for n, s in scores.items() if not math.isnan(s.robustness)}
        low = [max(0.0, s.robustness - s.r_low) for s in bars.values()]
        high = [max(0.0, s.r_high - s.robustness) for s in bars.values()]
        axes.bar(list(bars), [s.robustness for s in bars.values()], width, color=colors[row.model],
                 label=_legend(row.model), yerr=(low, high),
                 error_kw={"lw": 0.6, "ecolor": "#444444"})  # fmt: skip
        zeros = [place for place, s in bars.items() if not s.accuracy]
        axes.plot(zeros, [0] * len(zeros), ls="", marker="o", ms=4, color=colors[row.model],
                  clip_on=False, zorder=3)  # fmt: skip
    axes.axhline(1, color="#444444", lw=0.8, ls=":")
    axes.set_xticks(list(places.values()), [COLUMNS[name] for name in places], rotation=45,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axes.set_xlim(-0.7, max(places.values(), default=0) + 0.7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("R = accuracy / clean accuracy, 95 % intervals", fontsize=9)
    _finish(figure, path)


def plot_differences(
    compared: Mapping[str, Mapping[str, Difference | None]], baseline: str, path: Path,
    paper: Mapping[str, float] | None = None, shown: Sequence[str] = (),
) -> None:  # fmt: skip
    """Plot the differences of R to the baseline with their paired 95 % intervals.

    Args:
        compared: for each model, its differences by perturbation. Filled marks are decided.
        baseline: its name.
        path: the PNG file to write.
        paper: the paper's differences by perturbation, drawn as diamonds.
        shown: all models of the figures beside this one, whose colors it takes.
    """
    names = [n for n in COLUMNS if any(d.get(n) for d in compared.values())]
    row = max(0.27, 0.09 * len(compared))  # in inches
    figure = _figure(10, 0.8 + row * max(4, len(names)))
    axes = figure.subplots()
    colors = _colors(shown or [baseline, *compared], baseline)
    for i, (model, differences) in enumerate(compared.items()):
        shift = (i - (len(compared) - 1) / 2) * 0.8 / len(compared)
        style: dict[str, Any] = {"color": colors[model], "marker": "o", "ms": 5, "ls": ""}
        axes.plot([], [], **style, label=_legend(model))  # the legend's mark is a filled one
        for y, name in enumerate(names):
            if found := differences.get(name):
                axes.plot([found.low, found.high], [y + shift] * 2, color=colors[model], lw=1.6)
                fill = colors[model] if found.decided else "white"
                axes.plot(found.value, y + shift, **style, mfc=fill)
    if paper:
        places = [(paper[name], y) for y, name in enumerate(names) if name in paper]
        diamonds: dict[str, Any] = {"marker": "D", "ms": 4.5, "mfc": "none", "ls": ""}
        axes.plot(*zip(*places, strict=True), **diamonds, color="#222222", label="the paper")
    axes.axvline(0, color="#444444", lw=0.9)
    axes.set_yticks(range(len(names)), [COLUMNS[name] for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    end = "\n" if len(baseline) > 30 else " "
    label = f"R minus the R of {baseline};{end}paired 95 % intervals; hollow: not decided (Holm)"
    axes.set_xlabel(label, fontsize=9)
    _finish(figure, path)


def plot_shares(shares: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Plot shares in [0, 1] as bars: a group per quantity, a bar per model."""
    groups = list(next(iter(shares.values())))
    figure, colors, width = _figure(9, 3.4), _colors(list(shares)), 0.8 / len(shares)
    axes = figure.subplots()
    for i, (model, values) in enumerate(shares.items()):
        x = [place + (i - (len(shares) - 1) / 2) * width for place in range(len(groups))]
        bars = axes.bar(x, list(values.values()), width, color=colors[model], label=_legend(model))
        axes.bar_label(bars, fmt="{:.0%}", fontsize=8)
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(figure, path)


def plot_severities(results: Results, path: Path) -> None:
    """Plot accuracy against severity, with 95 % intervals, for what was measured of the fifteen."""
    measured = {name for row in results.rows for name in row.scores}
    names = [name for name in next(iter(TABLES.values())) if name in measured]
    columns, lines = max(1, min(5, len(names))), max(1, math.ceil(len(names) / 5))
    figure = _figure(max(4.4, 2.2 * columns), 1 + 1.9 * lines)
    colors = _colors([row.model for row in results.rows], results.baseline)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(COLUMNS[name], fontsize=10)
        for row in results.rows:
            if score := row.scores.get(name):
                y = [row.scores["clean"].accuracy, *score.by_severity]
                low, high = zip(*(wilson(share * score.n, score.n) for share in y), strict=True)
                color = colors[row.model]
                axes.plot(range(len(y)), y, color=color, marker="o", ms=3, label=_legend(row.model))
                axes.fill_between(range(len(y)), low, high, color=color, alpha=0.15, lw=0)
        axes.set_ylim(0, 1.04)  # shows a marker at 1 as a whole
        axes.set_xticks(range(6), ["0", *"12345"])
        axes.grid(alpha=0.3)
    for axes in panels[::columns]:  # not of the figure, where a long legend would cover it
        axes.set_ylabel("accuracy", fontsize=10)
    figure.supxlabel("severity (0: clean)", fontsize=10)
    _finish(figure, path)


def plot_curves(logs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot losses and clean accuracy per epoch, from the logs of train.py by name."""
    figure, colors = _figure(9, 3.6), _colors(list(logs))
    losses, accuracy = figure.subplots(1, 2)
    for name, log in logs.items():
        epochs = [row["epoch"] for row in log]
        style: dict[str, Any] = {"color": colors[name], "marker": "o", "ms": 3 * (len(log) < 30)}
        losses.plot(epochs, [row["loss1"] for row in log], **style)
        losses.plot(epochs, [row["loss2"] for row in log], ls="--", **style)
        percent = [100 * row["clean_accuracy"] for row in log]
        accuracy.plot(epochs, percent, **style, label=_legend(name))
    losses.set_ylabel("loss1, and loss2 (dashed)")
    accuracy.set_ylabel("clean accuracy, %")
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _finish(figure, path)


def plot_step(
    model: nn.Module, x: Tensor, y: Tensor, classes: list[str], path: Path, seed: int = 0
) -> None:
    """Plot the attacked half of a step: two images, their mix, the attack, x_mtlat, its label.

    Each image is mixed with the one before it. Of these B mixes, the one is shown where most can
    be seen: three classes, lambda near 1/2, a large epsilon.

    Args:
        model: attacked in the mode that it is in.
        x: images (B, 3, S, S) in [0, 1], B at least 4.
        y: class indices (B,) int64.
        classes: the class names.
        path: the PNG file to write.
        seed: of lambda, epsilon and the targets.

    Raises:
        ValueError: fewer than 4 images.
    """
    if len(x) < 4:
        raise ValueError(f"{len(x)} images; the mix that is shown is chosen from 4 or more")
    draws = draw(len(x), len(classes), alpha=ALPHA, epsilon_max=EPSILON_MAX,
                 generator=torch.Generator().manual_seed(seed), device=x.device)  # fmt: skip
    x4, y4 = x.roll(1, 0), y.roll(1, 0)
    one_hot, one_hot4 = (F.one_hot(labels, len(classes)).to(x.dtype) for labels in (y, y4))
    x_mix2, y_mix2 = mixup(x, one_hot, x4, one_hot4, draws.lam2)
    x_mtlat = targeted_fgsm(model, x_mix2, draws.target, draws.epsilon)
    y_mtlat = target_labels(y_mix2, draws.target, draws.epsilon)
    mixes = list(zip(y.tolist(), y4.tolist(), draws.target.tolist(), strict=True))
    i = _most_visible(mixes, draws)
    with frozen(model):
        before, after = (
            100 * compute_logits(model, images).softmax(1)[i, draws.target[i]]
            for images in (x_mix2, x_mtlat)
        )
    lam, epsilon = float(draws.lam2[i]), float(draws.epsilon[i])
    first, second, target = map(_short, (classes[k] for k in mixes[i]), (18, 18, 12))
    enlarged = (x_mtlat - x_mix2)[i] / (2 * epsilon) + 0.5
    tiles = [
        (f"x3\n{first}", x[i]),
        (f"x4\n{second}", x4[i]),
        (f"x_mix2\n{lam:.2f} x3 + {1 - lam:.2f} x4", x_mix2[i]),
        (f"x_mtlat - x_mix2, times {0.5 / epsilon:.0f}\n"
         f"epsilon {epsilon:.4f}, towards {target}", enlarged),
        (f"x_mtlat\np({target}): {before:.2f} %, then {after:.2f} %", x_mtlat[i]),
    ]  # fmt: skip
    label = {classes[k]: float(y_mtlat[i, k]) for k in mixes[i]}
    title = f"y_mtlat\n{1 - epsilon:.4f} y_mix2 + {epsilon:.4f} y_target"
    _plot_tiles(tiles, title, label, path)


def _plot_tiles(
    tiles: list[tuple[str, Tensor]], title: str, label: Mapping[str, float], path: Path
) -> None:
    """Plot five images with their titles, then a soft label: bars below the names of classes."""
    figure = _figure(8, 6, 0.08)
    *panels, last = figure.subplots(2, 3).flat
    for axes, (name, image) in zip(panels, tiles, strict=True):
        axes.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    last.set_title(title, fontsize=9)
    last.barh(range(len(label)), list(label.values()), 0.35, color=PALETTE[: len(label)])
    for place, (name, share) in enumerate(label.items()):
        last.text(0, place - 0.26, f"{share:.4f}  {_short(name, 26)}", fontsize=9)
    last.set_xlim(0, 1)
    last.set_ylim(2.6, -0.8)
    last.set_box_aspect(1)
    last.set_yticks([])
    last.tick_params(labelsize=8)
    last.spines[["top", "right"]].set_visible(False)
    _finish(figure, path)


def _most_visible(mixes: list[tuple[int, int, int]], draws: Draws) -> int:
    """Choose a mix of three different classes with lambda near 1/2 and a large epsilon."""
    visible = torch.minimum(draws.lam2, 1 - draws.lam2) * draws.epsilon
    return max(range(len(mixes)), key=lambda i: (len(set(mixes[i])), float(visible[i])))


def plot_images(sheets: Sequence[Sequence[Tile]], path: Path) -> None:
    """Plot a sheet of five columns for each image: clean and perturbed, with the predictions."""
    columns = min(2, len(sheets))
    rows = math.ceil(len(sheets) / columns)
    tall = math.ceil(max(map(len, sheets)) / 5)
    figure = _figure(6.4 * columns, 1.62 * tall * rows)
    blocks = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in blocks:
        axes.axis("off")
    # One axes for all tiles of a sheet, in inches: laying out a hundred axes takes seconds.
    for axes, sheet in zip(blocks, sheets, strict=False):
        style = {"fontsize": 7, "ha": "center", "va": "center"}
        for i, tile in enumerate(sheet):
            left, top = 1.28 * (i % 5), 1.62 * (i // 5)
            extent = (left + 0.03, left + 1.25, top + 1.42, top + 0.2)
            axes.imshow(tile.image.permute(1, 2, 0).numpy(), extent=extent)
            axes.text(left + 0.64, top + 0.11, _short(tile.title, 20), **style)
            mark, color = ("✓", "#1b7f4b") if tile.right else ("✗", "#c0392b")
            predicted = f"{mark} {_short(tile.predicted, 18)}"
            axes.text(left + 0.64, top + 1.51, predicted, color=color, **style)
        axes.set(xlim=(0, 6.4), ylim=(1.62 * tall, 0))
    _finish(figure, path)


def _figure(width: float, height: float, pad: float = 0.04) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    return Figure((width, height), dpi=DPI, layout=layout)


def _colors(names: Sequence[str], baseline: str | None = None) -> dict[str, Any]:
    """Assign gray to the baseline, or else to the first, and colors to the others."""
    gray = baseline or next(iter(names), "")
    others = [name for name in names if name != gray]
    palette: Sequence[Any] = PALETTE
    if len(others) > len(PALETTE):
        palette = colormaps["turbo"](torch.linspace(0, 1, len(others)).numpy())
    return {gray: GRAY, **dict(zip(others, palette, strict=False))}


def _short(name: str, most: int) -> str:
    name = escape_unprintable(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _legend(name: str) -> str:
    """Return a label for the legend, from which Matplotlib drops those that begin with "_"."""
    return f" {name}" if name.startswith("_") else name


def _finish(figure: Figure, path: Path) -> None:
    """Write the figure, with one legend of all labels, as many per line as fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font lacks: boxes
        drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
        found = {name: handle for pair in drawn for handle, name in zip(*pair, strict=True)}
        for columns in range(min(6, len(found)), 0, -1):
            legend = figure.legend(found.values(), found, loc="outside upper center", ncols=columns,
                                   frameon=False)  # fmt: skip
            box = legend.get_window_extent()
            if box.width <= figure.bbox.width or columns == 1:
                # The figure's height has room for one line of the legend.
                figure.set_figheight(figure.get_figheight() + box.height / DPI - 0.4)
                figure.set_figwidth(max(figure.get_figwidth(), box.width / DPI + 0.1))
                break
            legend.remove()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
