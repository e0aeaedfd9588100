#!/usr/bin/env python3
"""Measure how much of its accuracy a classifier keeps under corruptions and attacks.

python evaluate.py runs/resnet50-standard/last.pt runs/resnet50-mtlat/last.pt \\
    --surrogate runs/vgg/last.pt
python evaluate.py torchvision:resnet50 --weights DEFAULT --data IMAGENET --imagenet-c IMAGENET_C
python evaluate.py package.module:make_model --mean .5 .5 .5 --std .2 .2 .2 --data cifar10
torchrun --nproc-per-node=4 evaluate.py ...            # on four GPUs, or in four processes
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attacks import full_precision
from corruptions import ALL_CORRUPTIONS, MIN_SIDE, corrupt, frost_source
from harness import distributed
from harness.benchmark import plots, registry, subjects, tables
from harness.benchmark.config import EvalConfig, is_file, parse_eval_config
from harness.benchmark.measure import Evaluation, choose_images, measure, perturb, refuse_other_runs
from harness.benchmark.metrics import Results, aggregate, score_differences
from harness.benchmark.registry import COLUMNS
from harness.benchmark.store import Cell, append_cells, read_cells
from harness.benchmark.subjects import Subject
from harness.checkpoints import load_weights
from harness.cli import check_saved, format_command
from harness.devices import environment_info, require_same_on_all_ranks
from harness.errors import UserError, escape_unprintable, run_script
from harness.files import atomic_write, lock_folder
from harness.images.corrupted import require_severities, require_source
from harness.images.datasets import SIZES, Dataset, load_dataset
from harness.images.folders import require_outside
from harness.images.loader import BatchLoader
from harness.images.preprocess import Crop, choose_crop, describe, kind
from harness.models import compute_logits, is_right
from harness.training.config import TrainConfig

# Settings of a checkpoint's training that decide the images.
USED = ("data", "classes", "data_seed", "skip_bad_images", "preprocess")
SHEET_SEVERITY = 3  # of the corruptions in the contact sheet


# ---------------------------------------------------------------------------- preparation


def load_data(
    config: EvalConfig, checkpoints: dict[str, Any], expected: dict[str, tuple[int, Crop]]
) -> tuple[Dataset, Crop]:
    """Load the test images of --data, or those of the set that the first checkpoint was trained on.

    Of a folder that has only CLASS/*, the test images are the ten percent that the training of a
    checkpoint held out, or, without a checkpoint, all. Also returns the images' preprocessing.
    """
    known: list[dict[str, Any]] = [content["settings"] for content in checkpoints.values()]
    holding = [settings for settings in known if settings.get("held_out", True)]
    first = known[0] if known else {}
    trained = holding[0] if holding else first
    source = config.data or first.get("data")
    if not config.data and source and source not in SIZES and not Path(source).is_dir():
        raise UserError(f"{source}, the dataset of a checkpoint, is not there: name it with --data")
    if not source:
        raise UserError("--data is missing: only a checkpoint of train.py knows its images")
    for place in filter(None, map(config.find_corruption, config.perturbations)):
        require_source(place, source)
    if source in SIZES:  # whose images are squares
        crop = choose_crop(config.preprocess, None, {})
    else:
        own = {spec: crop for spec, (_, crop) in expected.items()}
        crop = choose_crop(config.preprocess, config.imagenet_c, own)
        require_outside(Path(source), config.cache_dir, config.output_dir or "runs")
    sizes = (size for size, _ in expected.values())
    with distributed.local_rank_zero_first():
        data = load_dataset(
            source, size=config.size or next(sizes, None), crop=crop,
            num_classes=trained.get("classes"), seed=trained.get("data_seed", config.seed),
            cache_dir=config.cache_dir, skip_bad_images=trained.get("skip_bad_images", False),
            test_only=True, hold_out=bool(holding),
        )  # fmt: skip
    return data, crop


def prepare(config: EvalConfig) -> tuple[Evaluation, list[str]]:
    """Load and check the images and the models. Also returns warnings for the user."""
    files = {spec: load_weights(spec) for spec in config.specs if is_file(spec)}
    checkpoints = {spec: content for spec, content in files.items() if "format" in content}
    for spec, content in checkpoints.items():
        check_saved(TrainConfig, {k: v for k, v in content["settings"].items() if k in USED}, spec)
    if config.arch and len(checkpoints) == len(files):
        raise UserError("--arch is for plain state dicts: these models name theirs, leave it out")
    if config.imagenet_classes and len(checkpoints) == len(config.specs):
        raise UserError("--imagenet-classes: checkpoints of train.py know theirs, leave it out")
    expected = subjects.expected_images(config, checkpoints)
    data, crop = load_data(config, checkpoints, expected)
    side, count = data.test.images.shape[-1], len(data.test.labels)
    check_corruptions(config, side)
    loaded = subjects.load_subjects(config, data.classes, files)
    facts = {
        "size": side, "preprocess": describe(crop, side), "data": data.test_fingerprint,
        "frost": None if config.find_corruption("frost") else frost_source(), "seed": config.seed,
        "limit": config.limit if config.limit and config.limit < count else None,
    }  # fmt: skip
    require_same_on_all_ranks(facts, [subject.digest for subject in loaded.values()])
    device = torch.device(config.device)
    run = Evaluation(
        config, data, BatchLoader(data.test, device),
        chosen=choose_images(data.test.labels, config.limit, config.seed),
        models=[loaded[spec] for spec in config.models],
        surrogate=loaded[config.surrogate] if config.surrogate else None,
        facts=facts,
        setup={"total": count, "origin": data.origin, "device": device.type,
               "versions": environment_info(config.device)},
    )  # fmt: skip
    x, y = run.loader(run.sample(16))
    warnings = []
    for spec, subject in loaded.items():
        attacked = config.uses_gradient(spec)
        warnings += subjects.inspect_subject(subject, x, y, len(data.classes), attacked=attacked)
    run.models = [subjects.fuse_subject(model, x) for model in run.models]
    if run.surrogate:
        run.surrogate = subjects.fuse_subject(run.surrogate, x)
    warnings += [
        f"{loaded[spec].label} expects the preprocessing {kind(own)}, not {kind(crop)}"
        for spec, (_, own) in expected.items()
        if kind(own) != kind(crop)
    ]
    warnings += [w for spec, c in checkpoints.items() if (w := foreign(loaded[spec], c, data))]
    warnings += subjects.normalization_warnings(config, files, loaded)
    return run, warnings + subjects.resampling_warnings(config) + run_warnings(run)


def foreign(subject: Subject, checkpoint: dict[str, Any], data: Dataset) -> str:
    """Return a warning if the checkpoint's training may have seen these test images, else ""."""
    settings = checkpoint["settings"]
    tested, seen = settings.get("test_fingerprint"), settings.get("seen_before", "")
    side, trained = data.test.images.shape[-1], checkpoint["size"]
    if side != trained:
        return (
            f"{subject.label} was trained at {trained} px, and the images have {side}: so it is not"
            " known whether it was trained on them"
        )
    if data.test_fingerprint == tested or data.fingerprint == checkpoint["fingerprint"]:
        return f"{subject.label}: {seen}" if seen else ""
    if tested is None and not data.fingerprint:
        return (
            f"{subject.label} may have seen test images: an earlier version of train.py wrote it,"
            " and the training images of --data are not in --cache-dir to compare"
        )
    if data.held_out and data.test_files == settings.get("test_files"):
        return (
            f"{subject.label} was trained with another preprocessing, or on another folder with the"
            f" same file names{seen and f'; {seen}'}"
        )
    advice = "; if it was trained on no image of the folder, move the class folders into test/"
    return (
        f"{subject.label} was trained on another dataset or preprocessing: it may have seen test"
        f" images{advice * data.held_out}"
    )


def check_corruptions(config: EvalConfig, side: int) -> None:
    """Raise `UserError` if images of this size cannot be corrupted, or frost has no textures."""
    if side < MIN_SIDE and ALL_CORRUPTIONS.keys() & set(config.perturbations):
        raise UserError(f"--size {side}: the corruptions need images of {MIN_SIDE} px or more")
    try:
        if "frost" in config.perturbations and not config.find_corruption("frost"):
            corrupt(torch.zeros(1, 3, side, side, dtype=torch.uint8), "frost", 1)
    except (OSError, ValueError) as error:
        raise UserError(f"frost: {error}") from None
    for place in filter(None, map(config.find_corruption, config.perturbations)):
        require_severities(place)


def run_warnings(run: Evaluation) -> list[str]:
    """List what the user should know of the perturbations and the surrogate."""
    config, warnings = run.config, []
    computed = (name for name in config.perturbations if not config.find_corruption(name))
    made = [name for name in computed if name in ALL_CORRUPTIONS]
    if config.imagenet_c and made:
        warnings.append(f"computed here, and not read from --imagenet-c: {', '.join(made)}")
    boxes = {config.registry[name].box for name in config.perturbations}
    if run.surrogate is None and "black-box" in boxes:
        warnings.append("the black-box attacks are left out: they need --surrogate")
    for model in run.models:
        if run.surrogate and model.digest == run.surrogate.digest:
            warnings.append(f"{model.label} is the surrogate: its black-box scores are white-box")
    return warnings


# ---------------------------------------------------------------------------- the run


@full_precision()  # scores are to be as exact as the attacks
def evaluate(config: EvalConfig) -> None:
    """Measure every cell that is not finished yet, then report on all that are."""
    run, warnings = prepare(config)
    chosen = f"{len(run.chosen)} of " * (len(run.chosen) < run.setup["total"])
    print(
        f"{chosen}{run.setup['total']} test images: {run.setup['origin']}; preprocessing:"
        f" {run.facts['preprocess']}"
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    with lock_folder(run.output_dir) if distributed.rank() == 0 else nullcontext():
        measure_all(run, warnings)


def measure_all(run: Evaluation, warnings: list[str]) -> None:
    """Measure and store cell after cell, then write the tables and figures."""
    out = run.output_dir
    path = out / "cells.jsonl"
    found = read_cells(path, repair=True) if distributed.rank() == 0 else []
    (cells, *_) = distributed.all_gather(found)
    refuse_other_runs(run, path, cells)
    if distributed.rank() == 0:
        atomic_write(out / "images.txt", list_images(run))
    work = unfinished(run, cells)
    total = sum(len(run.images_of(name)) * len(models) for name, _, models in work)
    with tqdm(total=total, unit="img", disable=None) as bar:
        for name, severity, models in work:
            title = name if severity is None else f"{name} {severity}"
            bar.set_description(title)
            new = measure(run, name, severity, models, bar)
            if distributed.rank() == 0:
                append_cells(path, new)
            cells += new
            shares = "  ".join(f"{c['label']} {100 * c['correct'] / c['n']:.1f} %" for c in new)
            seconds = new[0]["seconds_making"] + sum(cell["seconds"] for cell in new)
            bar.write(f"{title:26}{shares}  ({seconds:.1f} s)")
    if distributed.rank() == 0:
        write_results(run, cells, warnings, out)


def list_images(run: Evaluation) -> str:
    """List path and class of the images, a line each, in the order of the cells' `hits`.

    Cells of fewer images, the attack checks, take the lines that end with "sample".
    """
    data, sample = run.data, set(run.sample(registry.SAMPLE).tolist())
    labels, lines = data.test.labels.tolist(), []
    for i in run.chosen.tolist():
        fields = [data.paths[i], data.classes[labels[i]], *(["sample"] if i in sample else [])]
        lines.append("\t".join(map(escape_unprintable, fields)) + "\n")
    return "".join(lines)


def unfinished(run: Evaluation, cells: list[Cell]) -> list[tuple[str, int | None, list[Subject]]]:
    """List the cells that are left to measure, each with the models that lack it."""
    done = {(cell["model"], cell["perturbation"], cell["severity"]) for cell in cells}
    models = {model.digest: model for model in run.models}.values()
    work = []
    for name in run.config.perturbations:
        if run.config.registry[name].box == "black-box" and run.surrogate is None:
            continue
        for severity in run.config.registry[name].severities:
            missing = [m for m in models if (m.digest, name, severity) not in done]
            work += [(name, severity, missing)] if missing else []
    return work


def write_results(run: Evaluation, cells: list[Cell], warnings: list[str], out: Path) -> None:
    """Print the tables, and write them and the figures."""
    models = {model.label: model.digest for model in run.models}
    results = aggregate(cells, models, run.config.baseline, run.config.supplement)
    notes = [f"preprocessing: {run.facts['preprocess']}", *results.notes, *warnings]
    tested = torch.bincount(run.data.test.labels[run.chosen])
    largest = float(tested.max() / tested.sum())
    notes += chance_notes(results, run.data.classes, largest)
    results = results._replace(notes=[escape_unprintable(note) for note in notes])
    content = {
        "format": 1, "command": format_command(sys.argv), "classes": run.data.classes,
        "weights": models, **run.facts, **run.setup, **tables.to_plain(results),
        # R alone, as before the rows had intervals: these are in each model's "supplement".
        "supplementary": [[row[0], *row[1::2]] for row in tables.supplementary_cells(results)],
    }  # fmt: skip
    atomic_write(out / "results.json", json.dumps(content, indent=1) + "\n")
    atomic_write(out / "results.csv", tables.to_csv(results))
    atomic_write(out / "results.md", tables.to_markdown(results))
    atomic_write(out / "results.tex", tables.to_latex(results))
    compared = {row.model: score_differences(row) for row in results.rows}
    del compared[results.baseline]
    if any(COLUMNS.keys() & differences.keys() for differences in compared.values()):
        plots.plot_differences(compared, results.baseline, out / "differences.png")
    if any((COLUMNS.keys() & row.scores.keys()) - row.void for row in results.rows):
        plots.plot_robustness(results, out / "robustness.png")
    if next(iter(registry.TABLES)) in tables.measured_tables(results):
        plots.plot_severities(results, out / "severities.png")
    if run.config.dump_images:
        plots.plot_images(contact_sheets(run), out / "images.png")
    print(f"\n{tables.to_text(results)}\ntables and figures: {out}")


def chance_notes(results: Results, classes: list[str], largest: float) -> list[str]:
    """List the models whose clean accuracy is not significantly above the largest class's share."""
    return [
        f"{row.model} is not significantly above chance ({100 * largest:.1f} %, the share of the"
        " largest class): then R means nothing. A model that train.py did not write may have its"
        " outputs in another order than the classes,"
        f" {', '.join(classes[:3])}{' and so on' * (len(classes) > 3)}: see --imagenet-classes;"
        " or it may expect another normalization: see --mean"
        for row in results.rows
        if row.scores["clean"].low <= largest
    ]


def contact_sheets(run: Evaluation) -> list[list[plots.Tile]]:
    """Perturb some images in every way of this run, with the first model's predictions."""
    indices = run.sample(run.config.dump_images)
    batch, model = (indices.to(run.loader.device), *run.loader(indices)), run.models[0]
    sheets: list[list[plots.Tile]] = [[] for _ in indices]
    for name in ("clean", *(n for n in COLUMNS if n in run.config.perturbations)):
        entry = run.config.registry[name]
        if run.config.find_corruption(name) or (entry.box == "black-box" and not run.surrogate):
            continue
        severity = SHEET_SEVERITY if len(entry.severities) > 1 else None
        images, _ = perturb(run, name, severity, model, batch)
        logits = compute_logits(model.module, images)
        right = is_right(logits, batch[2])
        title = f"{COLUMNS.get(name, name)} {severity or ''}".strip()
        shown = zip(sheets, images, logits.argmax(1), batch[2], right, strict=True)
        for sheet, image, k, y, hit in shown:
            title = f"clean: {run.data.classes[y]}" if name == "clean" else title
            sheet.append(plots.Tile(title, image.cpu(), run.data.classes[k], bool(hit)))
    return sheets


def main(argv: list[str] | None = None) -> None:
    evaluate(parse_eval_config(argv, __doc__))


if __name__ == "__main__":
    run_script(main)
