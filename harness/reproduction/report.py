"""The output of reproduce.py: tables.json, tables.md, and report.html with its figures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.benchmark import plots
from harness.benchmark.metrics import Results, aggregate
from harness.benchmark.registry import COLUMNS
from harness.benchmark.store import read_cells
from harness.benchmark.tables import (
    align_columns,
    format_tables,
    margin_table,
    markdown_rows,
    to_markdown,
    to_plain,
)
from harness.checkpoints import load_checkpoint
from harness.errors import UserError
from harness.files import atomic_write, file_name
from harness.images import embedded
from harness.images.datasets import Dataset
from harness.images.loader import BatchLoader
from harness.models import restore_model
from harness.reproduction.comparison import (
    Compared,
    answers,
    compare,
    comparison_caption,
    comparison_markdown,
    comparison_table,
    conclusion,
    count_verdicts,
    orders,
    orders_table,
    orders_to_plain,
)
from harness.reproduction.mechanism import average, follow_all, mechanism_section
from harness.reproduction.page import Block, Code, Figure, Section, Table, Text, render_page
from harness.reproduction.paper import BASELINE, methods_of_table
from harness.reproduction.plan import EvalTask, ReproduceConfig
from harness.training.config import TrainConfig
from harness.training.methods import METHODS

VERSIONS = ("hardware", "python", "torch", "torchvision", "revision")
STEP_IMAGES = 32  # of a minibatch, of which plot_step shows one mix


class Trained(NamedTuple):
    """Log and settings read from a training's checkpoint."""

    log: list[dict[str, Any]]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Trained":
        """Read the last checkpoint in a folder of train.py."""
        checkpoint = load_checkpoint(folder / "last.pt")
        return cls(checkpoint["log"], checkpoint["settings"])

    def epoch(self, images: int) -> tuple[int, int]:
        """Return the updates in an epoch of that many images, and the images that losses see."""
        config = TrainConfig.from_settings(self.settings)
        steps = images // config.minibatch_size
        return steps, steps * config.minibatch_size * METHODS[config.method].terms

    def minutes(self, images: int) -> float:
        """Return the time spent on the steps, for a training set of that many images."""
        _, seen = self.epoch(images)
        # A rate of 0.0 was below 0.05: a run that was suspended for hours.
        return float(sum(seen / max(row["images_per_second"], 0.05) for row in self.log) / 60)


class Evaluated(NamedTuple):
    """Results of an evaluation of one architecture and one seed, for some tables."""

    folder: Path
    arch: str
    seed: int
    tables: list[int]
    models: dict[str, Path]  # the trainings' folders, by method
    digests: dict[str, str]  # of the networks, by method
    results: Results  # a row for each method
    minutes: float


def read_evaluation(task: EvalTask, data: Dataset) -> Evaluated:
    """Read the results of evaluate.py. Raise `UserError` unless it tested the images of `data`."""
    written = json.loads((task.folder / "results.json").read_text())
    if written["data"] != data.test_fingerprint:
        raise UserError(
            f"{task.folder} was measured on other images than the run began with: restore them and"
            " delete that folder, or choose another --output-dir"
        )
    digests = {method: written["weights"][path.name] for method, path in task.models.items()}
    cells = read_cells(task.folder / "cells.jsonl")
    # Its notes also tell of the images and the models, such as one that guesses.
    results = aggregate(cells, digests, BASELINE)._replace(notes=written["notes"])
    making = {(c["perturbation"], c["severity"]): c["seconds_making"] for c in cells}
    seconds = sum(making.values()) + sum(cell["seconds"] for cell in cells)
    return Evaluated(
        task.folder, task.arch, task.seed, task.tables, task.models, digests, results, seconds / 60
    )


def compare_all(found: Sequence[Evaluated]) -> list[list[Compared]]:
    """Compare every table of every architecture with the paper's, over the seeds."""
    tables = sorted({(table, one.arch) for one in found for table in one.tables})
    compared = []
    for table, arch in tables:
        seeds = [one for one in found if table in one.tables and one.arch == arch]
        rows = {
            method: [row for one in seeds for row in one.results.rows if row.model == method]
            for method in methods_of_table(table)
            if method in seeds[0].models
        }
        compared.append(compare(table, arch, rows))
    return compared


def write_report(
    config: ReproduceConfig, commands: list[str], trainings: list[Path],
    found: Sequence[Evaluated], data: Dataset,
) -> None:  # fmt: skip
    """Print our tables beside the paper's, and write everything into the output folder.

    Args:
        config: of the reproduction.
        commands: the run's own, then those that it ran.
        trainings: the trainings' folders.
        found: the evaluations.
        data: the images.
    """
    out, tables = Path(config.output_dir), compare_all(found)
    rows = [row for table in tables for row in table]
    trained = {folder: Trained.read(folder) for folder in trainings}
    updates = _updates_table(trained, data)
    for table in tables:
        print("", comparison_caption(table), *align_columns(comparison_table(table)), sep="\n")
    if found_orders := orders(rows):
        print("", *align_columns(orders_table(found_orders)), sep="\n")
    print("", *align_columns(updates), "", *answers(rows), f"{conclusion(rows)}.", sep="\n")
    recipe = asdict(config)
    for name in ("output_dir", "cache_dir", "device"):
        del recipe[name]
    outcomes = {}
    if config.data == "shapes" and len(data.classes) == len(embedded.NAMES):
        folders = {path.name: path for one in found for path in one.models.values()}
        seed = next(iter(trained.values())).settings["data_seed"]
        outcomes = follow_all(folders, config.size, seed=seed)
    facts = {
        "format": 2, "recipe": recipe, "images": data.fingerprint, "rows": to_plain(rows),
        "verdicts": count_verdicts(rows), "orders": orders_to_plain(found_orders),
        "cues": to_plain({name: average(each) for name, each in outcomes.items()}),
    }  # fmt: skip
    atomic_write(out / "tables.json", json.dumps(facts, indent=1) + "\n")
    atomic_write(out / "tables.md", _markdown(config, commands, tables, updates, found))
    title = f"M-TLAT, reproduced at the scale “{config.scale}”"
    sections = _make_sections(config, commands, tables, trained, found, data)
    if outcomes:
        baselines = {
            path.name: one.models[BASELINE].name
            for one in found for method, path in one.models.items() if method != BASELINE
        }  # fmt: skip
        sections.insert(1, mechanism_section(outcomes, baselines, out / "cues.png"))
    lead = "\n\n".join([*answers(rows), f"{conclusion(rows)}.", _describe(config, found, data)])
    filled = [section for section in sections if section.blocks]
    atomic_write(out / "report.html", render_page(title, lead, filled))
    print(f"report: {out / 'report.html'}")


def _describe(config: ReproduceConfig, found: Sequence[Evaluated], data: Dataset) -> str:
    """Describe what was run, and how far it is from the paper's experiment."""
    side = data.train.images.shape[-1]
    illustration = ""
    if config.data == "shapes":
        illustration = (
            " The images are drawn by the code, and built to contain what the paper describes: they"
            " illustrate how the method works, and prove nothing about photographs."
        )
    archs = ", ".join(dict.fromkeys(one.arch for one in found))
    tested = min(config.limit or len(data.test.labels), len(data.test.labels))
    return (
        "Robustness R is the accuracy under a perturbation divided by clean accuracy. Differences"
        " are paired by image, and decided if they are significant at 5 % after Holm's correction."
        " The names are abbreviated as in the paper: Obstru is occlusion."
        f"\n\n{archs} on {len(data.classes)} classes of {config.data}:"
        f" {len(data.train.labels)} training and {tested} test images of"
        f" {side}x{side}, {_count(config.epochs, 'epoch')}, {_count(config.seeds, 'seed')}."
        f"{illustration} The paper trains ResNet-50 and ResNeXt-50 for 90 epochs on 100 classes of"
        " ImageNet at 224x224. The further an experiment is from that, the less its numbers can be"
        " expected to equal the paper's."
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number > 1)}"


def _markdown(
    config: ReproduceConfig, commands: list[str], tables: list[list[Compared]],
    updates: list[list[str]], found: Sequence[Evaluated],
) -> str:  # fmt: skip
    """Format the tables beside the paper's, our full ones, and the commands."""
    blocks = [f"# Scale {config.scale}", *comparison_markdown(tables)]
    blocks += ["\n".join(markdown_rows(updates))]
    for one in found:
        if one.tables != [3]:
            blocks += [f"## {one.arch}, seed {one.seed}", to_markdown(one.results).rstrip()]
    return "\n\n".join([*blocks, "```\n" + "\n".join(commands) + "\n```"]) + "\n"


# ---------------------------------------------------------------------------- the page


def _make_sections(
    config: ReproduceConfig, commands: list[str], tables: list[list[Compared]],
    trained: Mapping[Path, Trained], found: Sequence[Evaluated], data: Dataset,
) -> list[Section]:  # fmt: skip
    """Make the parts of report.html: the answer, the tables, the details."""
    out, first = Path(config.output_dir), [one for one in found if one.seed == 0]
    full = [one for one in first if one.tables != [3]]
    rows = [row for table in tables for row in table]
    beside: list[Block] = [
        Table(comparison_caption(t), comparison_table(t), fold=True) for t in tables
    ]
    if found_orders := orders(rows):
        beside.append(Table("Methods in the order of the paper", orders_table(found_orders)))
    curves: list[Block] = []
    for arch in dict.fromkeys(one.arch for one in first):
        folders = {m: path for one in first if one.arch == arch for m, path in one.models.items()}
        path = out / f"curves-{file_name(arch)}.png"
        plots.plot_curves({m: trained[folder].log for m, folder in folders.items()}, path)
        curves.append(Figure(path, f"{arch}, seed 0: losses and clean accuracy by epoch"))
    return [
        Section("What M-TLAT changes", list(_answer_figures(tables, full, out))),
        Section("Beside the paper", beside),
        *(Section(f"{one.arch}, seed 0", list(_measured(one, out))) for one in full),
        Section("Training curves", curves),
        Section("One step of M-TLAT", [_step(list(trained), data, out / "step.png")]),
        Section("Images", [
            Figure(one.folder / "images.png", f"{one.arch}: test images under every perturbation,"
                   " with the standard network's predictions")
            for one in full
        ]),
        Section("Provenance", list(_provenance(commands, trained, found, data))),
    ]  # fmt: skip


def _answer_figures(
    tables: list[list[Compared]], full: Sequence[Evaluated], out: Path
) -> Iterator[Block]:
    """Plot the differences of R to the standard training, with the paper's beside them."""
    shown = {one.arch: [row.model for row in one.results.rows] for one in full}
    for table in tables:
        rows = {row.method: row for row in table}
        compared = {
            m: {n: e.difference for n, e in row.entries.items() if e.difference}
            for m, row in rows.items() if m != BASELINE
        }  # fmt: skip
        if any(COLUMNS.keys() & differences.keys() for differences in compared.values()):
            arch = file_name(table[0].arch)
            path = out / f"differences-{arch}-table{table[0].table}.png"
            papers = paper_differences(rows)
            plots.plot_differences(compared, BASELINE, path, papers, shown[table[0].arch])
            caption = f"{table[0].arch}: R minus the R of the standard training, with paired 95 %"
            caption += " intervals" + ("; diamonds: M-TLAT's in the paper" if papers else "")
            yield Figure(path, caption)


def paper_differences(rows: Mapping[str, Compared]) -> dict[str, float]:
    """Return by how much the paper's M-TLAT differs from its standard training."""
    if not {BASELINE, "mtlat"} <= rows.keys():
        return {}
    own, base = (
        {n: e.paper for n, e in rows[m].entries.items() if e.paper is not None and n != "clean"}
        for m in ("mtlat", BASELINE)
    )
    return {name: own[name] - base[name] for name in own.keys() & base.keys()}


def _measured(one: Evaluated, out: Path) -> Iterator[Block]:
    """Yield the tables and the figures of an evaluation."""
    for caption, cells, notes in format_tables(one.results):
        yield Table(caption, cells, notes, fold=True)
    if margins := margin_table(one.results):
        yield Table(
            "Share of correctly classified images on which CW2 at confidence 50 made a wrong class"
            " lead by at least this margin; larger logits make that easier", margins, fold=True,
        )  # fmt: skip
    yield Text("\n\n".join(one.results.notes))
    arch = file_name(one.arch)
    bars, lines = out / f"robustness-{arch}.png", out / f"severities-{arch}.png"
    plots.plot_robustness(one.results, bars)
    yield Figure(bars, "Robustness with 95 % intervals")
    plots.plot_severities(one.results, lines)
    yield Figure(lines, "Accuracy against severity; 0 is clean")


def _step(trainings: Sequence[Path], data: Dataset, path: Path) -> Block:
    """Plot one step of M-TLAT on training images, by a network trained with it, if there is one."""
    folder = next((f for f in trainings if "-mtlat-" in f.name), trainings[-1])
    index = torch.linspace(0, len(data.train.labels) - 1, STEP_IMAGES).long()
    x, y = BatchLoader(data.train, torch.device("cpu"))(index)
    plots.plot_step(restore_model(load_checkpoint(folder / "last.pt")), x, y, data.classes, path)
    return Figure(path, f"One mix of two training images in a step of M-TLAT, by {folder.name}")


def _provenance(
    commands: list[str], trained: Mapping[Path, Trained], found: Sequence[Evaluated], data: Dataset
) -> Iterator[Block]:
    """Yield commands, versions, digests and times."""
    yield Code("\n".join(commands))
    digests = {one.models[m]: digest for one in found for m, digest in one.digests.items()}
    rows = [["training", "epochs", "clean %", "minutes", "weights", *VERSIONS]]
    for folder, run in trained.items():
        clean, images = 100 * run.log[-1]["clean_accuracy"], len(data.train.labels)
        numbers = [str(len(run.log)), f"{clean:.1f}", f"{run.minutes(images):.1f}"]
        rows.append([folder.name, *numbers, digests.get(folder, "surrogate"),
                     *(run.settings[key] for key in VERSIONS)])  # fmt: skip
    yield Table("Trainings: updates of the weights, and images that the losses saw",
                _updates_table(trained, data))  # fmt: skip
    yield Table(
        "Trainings: clean accuracy on the whole test set; minutes without the tests after every"
        " epoch; weights: the digest in cells.jsonl", rows,
    )  # fmt: skip
    times = [[one.folder.name, f"{one.minutes:.1f}"] for one in found]
    yield Table("Evaluations: minutes", [["evaluation", "minutes"], *times])
    yield Text(f"The images have the fingerprint {data.fingerprint}.")


def _updates_table(trained: Mapping[Path, Trained], data: Dataset) -> list[list[str]]:
    """List how often each training updated its weights, and how many images its losses saw."""
    table = [["training", "epochs", "updates", "images seen"]]
    for folder, run in trained.items():
        epochs = len(run.log)
        steps, seen = run.epoch(len(data.train.labels))
        table.append([folder.name, str(epochs), f"{epochs * steps:,}", f"{epochs * seen:,}"])
    return table
