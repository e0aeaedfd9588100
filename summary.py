"""What reproduce.py leaves: tables.json, tables.md, and report.html with its figures."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data
import figures
import page
import paper
import report
import train
from cells import read_cells
from common import load_checkpoint, load_model, write
from feed import Feed
from methods import METHODS

VERSIONS = ("hardware", "python", "torch", "torchvision", "revision")
STEP_IMAGES = 32  # of which draw_step shows one couple


class Trained(NamedTuple):
    """What a training's checkpoint says of it."""

    log: list[dict[str, Any]]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Trained":
        checkpoint = load_checkpoint(folder / "last.pt")
        return cls(checkpoint["log"], checkpoint["settings"])

    def minutes(self, images: int) -> float:
        """Time spent on the steps, of a training set of so many images."""
        size = train.minibatch_size(argparse.Namespace(**self.settings))
        seen: int = images // size * size * METHODS[self.settings["method"]].terms
        return float(sum(seen / row["images_per_second"] for row in self.log) / 60)


class Evaluated(NamedTuple):
    """What an evaluation of one architecture and one seed has measured, for these tables."""

    folder: Path
    arch: str
    seed: int
    tables: list[int]
    models: dict[str, Path]  # the trainings' folders, by method
    weights: dict[str, str]  # hashes of the networks, by method
    report: report.Report  # a row for each method
    minutes: float


def read_evaluation(
    folder: Path, arch: str, seed: int, tables: list[int], models: dict[str, Path]
) -> Evaluated:
    """Read what evaluate.py has left in its folder; models: the trainings' folders by method."""
    known = json.loads((folder / "results.json").read_text())["weights"]
    weights = {method: known[path.name] for method, path in models.items()}
    lines = read_cells(folder / "cells.jsonl")
    made = report.aggregate(lines, weights, paper.BASELINE)
    making = {(x["perturbation"], x["severity"]): x["seconds_making"] for x in lines}
    seconds = sum(making.values()) + sum(line["seconds"] for line in lines)
    return Evaluated(folder, arch, seed, tables, models, weights, made, seconds / 60)


def compare_all(found: Sequence[Evaluated]) -> list[list[paper.Compared]]:
    """Every table of every architecture beside the paper's, over the seeds."""
    tables = sorted({(table, one.arch) for one in found for table in one.tables})
    compared = []
    for table, arch in tables:
        seeds = [one for one in found if table in one.tables and one.arch == arch]
        rows = {
            method: [row for one in seeds for row in one.report.rows if row.model == method]
            for method in paper.methods_of(table)
            if method in seeds[0].models
        }
        compared.append(paper.compare(table, arch, rows))
    return compared


def write_report(
    args: argparse.Namespace, commands: list[str], trainings: list[Path],
    found: Sequence[Evaluated], sets: data.Data,
) -> None:  # fmt: skip
    """Print our tables beside the paper's, and write everything into the output folder."""
    out, tables = Path(args.output_dir), compare_all(found)
    flat = [row for table in tables for row in table]
    claims = paper.claims(flat)
    for table in tables:
        print("", paper.caption(table), *report.aligned(paper.grid(table)), sep="\n")
    print("", *report.aligned(paper.claims_grid(claims)), "", sep="\n")
    print(f"{paper.conclusion(flat)}.")
    agree, total = paper.agreement(flat)
    recipe = {k: v for k, v in vars(args).items() if k not in ("output_dir", "cache_dir", "device")}
    facts = {
        "format": 1, "recipe": recipe, "images": sets.fingerprint, "rows": report.plain(flat),
        "signs": {"agree": agree, "of": total}, "claims": paper.plain_claims(claims),
    }  # fmt: skip
    write(out / "tables.json", json.dumps(facts, indent=1) + "\n")
    write(out / "tables.md", markdown(args, commands, tables, claims, found))
    title = f"M-TLAT, reproduced at the scale “{args.scale}”"
    sections = make_sections(args, commands, tables, trainings, found, sets)
    write(out / "report.html", page.page(title, describe(args, sets, flat), sections))
    print(f"report: {out / 'report.html'}")


def describe(args: argparse.Namespace, sets: data.Data, rows: list[paper.Compared]) -> str:
    """What was run, and how far it is from the paper's experiment."""
    side = sets.train.images.shape[-1]
    return (
        f"{', '.join(args.archs)} on {len(sets.classes)} classes of {args.data}:"
        f" {len(sets.train.labels)} training and {len(sets.test.labels)} test images of"
        f" {side}x{side}, {args.epochs} epochs, {args.seeds} seed{'s' * (args.seeds > 1)}. The"
        " paper trains ResNet-50 and ResNeXt-50 for 90 epochs on 100 classes of ImageNet at"
        " 224x224: the further from that, the less its numbers can be expected; its signs are the"
        f" claim.\n\n{paper.conclusion(rows)}."
    )


def markdown(
    args: argparse.Namespace, commands: list[str], tables: list[list[paper.Compared]],
    claims: list[paper.Claim], found: Sequence[Evaluated],
) -> str:  # fmt: skip
    """The tables beside the paper's, our full ones, and the commands that made them."""
    blocks = [f"# Scale {args.scale}", f"{paper.conclusion([r for t in tables for r in t])}."]
    for table in tables:
        blocks += [f"**{paper.caption(table)}**", "\n".join(report.piped(paper.grid(table)))]
    blocks += ["\n".join(report.piped(paper.claims_grid(claims)))]
    for one in found:
        if one.tables != [3]:
            blocks += [f"## {one.arch}, seed {one.seed}", report.markdown(one.report).rstrip()]
    return "\n\n".join([*blocks, "```\n" + "\n".join(commands) + "\n```"]) + "\n"


# ---------------------------------------------------------------------------- the page


def make_sections(
    args: argparse.Namespace, commands: list[str], tables: list[list[paper.Compared]],
    trainings: list[Path], found: Sequence[Evaluated], sets: data.Data,
) -> list[page.Section]:  # fmt: skip
    """The parts of report.html."""
    out, first = Path(args.output_dir), [one for one in found if one.seed == 0]
    full = [one for one in first if one.tables != [3]]
    trained = {folder.name: Trained.read(folder) for folder in trainings}
    beside: list[page.Block] = [page.Table(paper.caption(t), paper.grid(t)) for t in tables]
    claims = paper.claims([row for table in tables for row in table])
    beside.append(page.Table("Orders that the paper argues with", paper.claims_grid(claims)))
    curves: list[page.Block] = []
    for arch in args.archs:
        folders = {m: path for one in first if one.arch == arch for m, path in one.models.items()}
        path = out / f"curves-{arch.replace(':', '-')}.png"
        figures.draw_curves({m: trained[folder.name].log for m, folder in folders.items()}, path)
        curves.append(page.Figure(path, f"{arch}, seed 0: losses and clean accuracy by epoch"))
    return [
        page.Section("Beside the paper", beside),
        *(page.Section(f"{one.arch}, seed 0", list(measured(one, out))) for one in full),
        page.Section("Training curves", curves),
        page.Section("One step of M-TLAT", [step(trainings, sets, out / "step.png")]),
        page.Section("Images", [
            page.Figure(one.folder / "images.png", f"{one.arch}: test images under every"
                        " perturbation, and what the standard network takes them for")
            for one in full
        ]),
        page.Section("How it was made", list(provenance(commands, trained, found, sets))),
    ]  # fmt: skip


def measured(one: Evaluated, out: Path) -> Iterator[page.Block]:
    """The tables and the figures of an evaluation."""
    for title in report.shown(one.report):
        notes = report.remarks(one.report, title)
        yield page.Table(report.caption(one.report, title), report.grid(one.report, title), notes)
    if one.report.notes:
        yield page.Text("\n\n".join(one.report.notes))
    arch = one.arch.replace(":", "-")
    bars, lines = out / f"robustness-{arch}.png", out / f"severities-{arch}.png"
    figures.draw_robustness(one.report, bars)
    yield page.Figure(bars, "Robustness with 95 % intervals")
    figures.draw_severities(one.report, lines)
    yield page.Figure(lines, "Accuracy against severity; 0 is clean")


def step(trainings: Sequence[Path], sets: data.Data, path: Path) -> page.Block:
    """One step of M-TLAT on training images, by the network trained with it, if there is one."""
    folder = next((f for f in trainings if "-mtlat-" in f.name), trainings[-1])
    index = torch.linspace(0, len(sets.train.labels) - 1, STEP_IMAGES).long()
    x, y = Feed(sets.train, torch.device("cpu"))(index)
    figures.draw_step(load_model(load_checkpoint(folder / "last.pt")), x, y, sets.classes, path)
    return page.Figure(path, f"One couple of a step of M-TLAT on training images, by {folder.name}")


def provenance(
    commands: list[str], trained: Mapping[str, "Trained"], found: Sequence[Evaluated],
    sets: data.Data,
) -> Iterator[page.Block]:  # fmt: skip
    """Commands, versions, hashes and times."""
    yield page.Code("\n".join(commands))
    weights = {one.models[m].name: digest for one in found for m, digest in one.weights.items()}
    rows = [["training", "epochs", "clean %", "minutes", "weights", *VERSIONS]]
    for name, run in trained.items():
        clean, size = 100 * run.log[-1]["clean_accuracy"], len(sets.train.labels)
        numbers = [str(len(run.log)), f"{clean:.1f}", f"{run.minutes(size):.1f}"]
        rows.append([name, *numbers, weights.get(name, "surrogate"),
                     *(run.settings[key] for key in VERSIONS)])  # fmt: skip
    yield page.Table(
        "Trainings: clean accuracy on the whole test set; minutes without the tests after every"
        " epoch; weights: the hash in cells.jsonl", rows,
    )  # fmt: skip
    times = [[one.folder.name, f"{one.minutes:.1f}"] for one in found]
    yield page.Table("Evaluations: minutes", [["evaluation", "minutes"], *times])
    yield page.Text(f"The images have the hash {sets.fingerprint}.")
