#!/usr/bin/env python3
"""Measure how much of its accuracy a classifier keeps under corruptions and attacks.

python evaluate.py runs/standard/last.pt runs/mtlat/last.pt --surrogate runs/vgg/last.pt
python evaluate.py torchvision:resnet50 --weights DEFAULT --data IMAGENET --imagenet-c IMAGENET_C
python evaluate.py package.module:make_model --mean .5 .5 .5 --std .2 .2 .2 --data cifar10
torchrun --nproc-per-node=4 evaluate.py ...            # on four GPUs, or processes
"""

import argparse
import difflib
import hashlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

import data
import figures
import parallel
import report
from attacks import broken_gradients, full_precision
from cells import (
    GROUPS,
    Run,
    Subject,
    append_cells,
    choose_images,
    measure,
    perturb,
    prediction_path,
    read_cells,
    refuse_others,
    simplify,
)
from common import (
    Parser,
    UserError,
    build_model,
    check_logits,
    find_device,
    load_checkpoint,
    load_model,
    locked,
    number,
    printable,
    refuse_differences,
    run,
    start_model,
    versions,
    write,
)
from corruptions import CORRUPTIONS, MIN_SIDE, corrupt, frost_source
from feed import Feed
from report import Line

SHEET_SEVERITY = 3  # of the corruptions in the contact sheet

# ---------------------------------------------------------------------------- models


def load_subjects(
    args: argparse.Namespace, classes: list[str], checkpoints: dict[str, Any]
) -> dict[str, Subject]:
    """Make every model that the command line names, by the name it has there."""
    subjects = {}
    for spec in named(args):
        if spec in checkpoints:
            own = checkpoints[spec]["classes"]
            if own != classes:
                raise UserError(
                    f"{spec} was trained on other classes ({len(own)}: {' '.join(own[:3])} ...)"
                    f" than the test images are of ({len(classes)}: {' '.join(classes[:3])} ...)"
                )
            module = load_model(checkpoints[spec])
        elif spec.startswith("torchvision:"):
            arch, weights = spec.removeprefix("torchvision:"), args.weights
            try:
                known = torchvision.models.get_model_weights(arch)[weights].meta["categories"]
            except (ValueError, KeyError):
                known = classes  # what is wrong with the name, start_model says
            module, _ = start_model(arch, len(known), weights)
        else:
            normalize = (args.mean, args.std) if args.mean else None
            module = build_model(spec, len(classes), normalize)
        module.to(args.device).eval()
        digest = hashlib.sha256(repr(module).encode())
        for name, value in module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        label = args.labels.get(spec, spec)
        subjects[spec] = Subject(label, module, digest.hexdigest()[:16])
    return subjects


def inspect(subject: Subject, x: Tensor, y: Tensor, classes: int) -> list[str]:
    """Refuse a model whose numbers would mean nothing; warn of one that attacks may fail on."""
    label, _, _ = subject
    if any(module.training for module in subject.module.modules()):
        raise UserError(f"{label} does not obey eval(): its modules must take over train(False)")
    first, second = (check_logits(label, subject.module, x, classes) for _ in range(2))
    if not torch.allclose(first, second, 1e-4, 1e-4):
        raise UserError(f"{label} gives other logits for the same images again: it must not draw")
    warnings = []
    if first.min() >= 0 and torch.allclose(first.sum(1), first.new_ones(len(x))):
        warnings.append(f"{label} gives probabilities, not logits: attacks on it are too weak")
    if broken := int(broken_gradients(subject.module, x, y).sum()):
        warnings.append(
            f"{label}: the gradient is zero or NaN for {broken} of the first {len(x)} images, and"
            " attacks cannot move them"
        )
    return warnings


def load_images(args: argparse.Namespace, first: dict[str, Any]) -> data.Data:
    """Load the images that the command line names, or else the first checkpoint was trained on."""
    trained = first.get("settings", {})
    if not (args.data or trained.get("data")):
        raise UserError("--data is missing: only a checkpoint of train.py knows its images")
    with parallel.one_first():
        return data.load(
            args.data or trained["data"], size=args.size or first.get("size"),
            num_classes=trained.get("classes"), seed=trained.get("data_seed", args.seed),
            cache_dir=args.cache_dir, skip_bad_images=trained.get("skip_bad_images", False),
        )  # fmt: skip


def prepare(args: argparse.Namespace) -> tuple[Run, list[str]]:
    """Load the images and the models, and check them; also give what to be warned of."""
    checkpoints = {s: load_checkpoint(s) for s in named(args) if is_file(s)}
    first: dict[str, Any] = next(iter(checkpoints.values()), {})
    sets = load_images(args, first)
    side, count = sets.test.images.shape[-1], len(sets.test.labels)
    if side < MIN_SIDE:
        raise UserError(f"--size {side}: the corruptions need images of {MIN_SIDE} px or more")
    try:
        if "frost" in args.cells:
            corrupt(torch.zeros(1, 3, side, side, dtype=torch.uint8), "frost", 1)
    except (OSError, ValueError) as error:
        raise UserError(f"frost: {error}") from None
    subjects = load_subjects(args, sets.classes, checkpoints)
    facts = {
        "size": side, "data": sets.fingerprint, "frost": frost_source(), "seed": args.seed,
        "limit": args.limit if args.limit and args.limit < count else None,
    }  # fmt: skip
    refuse_differences(facts, [subject.digest for subject in subjects.values()])
    run = Run(
        args, sets.classes, Feed(sets.test, torch.device(args.device)),
        choose_images(sets.test.labels, args.limit, args.seed),
        [subjects[spec] for spec in args.models],
        subjects[args.surrogate] if args.surrogate else None,
        facts, {"total": count, "device": torch.device(args.device).type,
         "versions": versions(args.device)},
    )  # fmt: skip
    few = run.feed(run.pick(16))
    warnings = [w for s in subjects.values() for w in inspect(s, *few, len(run.classes))]
    run.models = [simplify(model, few[0]) for model in run.models]
    if run.surrogate:
        run.surrogate = simplify(run.surrogate, few[0])
        # Pixel by pixel VGGs are faster; ResNets are not, nor is float32 on CUDA (pytorch#44943).
        if args.device == "cpu":
            run.surrogate.module.to(memory_format=torch.channels_last)
    for spec, checkpoint in checkpoints.items():
        if checkpoint["fingerprint"] != sets.fingerprint or checkpoint["size"] != side:
            warnings.append(
                f"{subjects[spec].label} was trained on another image set, or at another size: it"
                " may have seen test images"
            )
    if args.imagenet_c:
        there = [name for name in args.cells if run.official(name)]
        if not there:
            raise UserError(
                f"--imagenet-c {args.imagenet_c} has no folder of a corruption to score"
            )
        if made := [name for name in args.cells if name in CORRUPTIONS and name not in there]:
            warnings.append(f"not in --imagenet-c, and made here: {', '.join(made)}")
    if run.surrogate is None and set(args.cells) & set(GROUPS["black-box"]):
        warnings.append("the black-box attacks are left out: they need --surrogate")
    for model in run.models:
        if run.surrogate and model.digest == run.surrogate.digest:
            warnings.append(f"{model.label} is the surrogate: its black-box scores are white-box")
    return run, warnings


# ---------------------------------------------------------------------------- the run


@full_precision()  # the scores shall be as exact as the attacks
def evaluate(args: argparse.Namespace) -> None:
    """Measure every cell that is not finished yet, then report on all that are."""
    run, warnings = prepare(args)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    with locked(Path(args.output_dir)) if parallel.rank() == 0 else nullcontext():
        measure_all(run, warnings)


def measure_all(run: Run, warnings: list[str]) -> None:
    out = Path(run.args.output_dir)
    path = out / "cells.jsonl"
    (lines, *_) = parallel.gather(read_cells(path) if parallel.rank() == 0 else [])
    refuse_others(run, path, lines)
    work = unfinished(run, lines)
    total = sum(len(run.images_of(name)) * len(models) for name, _, models in work)
    with tqdm(total=total, unit="img", disable=None) as bar:
        for name, severity, models in work:
            title = name if severity is None else f"{name} {severity}"
            bar.set_description(title)
            new = measure(run, name, severity, models, bar)
            if parallel.rank() == 0:
                append_cells(path, new)
            lines += new
            shares = "  ".join(f"{x['label']} {100 * x['correct'] / x['n']:.1f} %" for x in new)
            seconds = new[0]["seconds_making"] + sum(line["seconds"] for line in new)
            bar.write(f"{title:26}{shares}  ({seconds:.1f} s)")
    if parallel.rank() == 0:
        finish(run, lines, warnings, out)


def unfinished(run: Run, lines: list[Line]) -> list[tuple[str, int | None, list[Subject]]]:
    """The cells that are still to do, each with the models that lack it."""
    done = {(line["model"], line["perturbation"], line["severity"]) for line in lines}
    models = {model.digest: model for model in run.models}.values()
    work = []
    for name in run.args.cells:
        if name in GROUPS["black-box"] and run.surrogate is None:
            continue
        for severity in report.severities(name):
            lacking = [m for m in models if (m.digest, name, severity) not in done]
            if run.args.save_predictions:
                lacking = [m for m in models if m in lacking
                           or not prediction_path(run, m, name, severity).exists()]  # fmt: skip
            work += [(name, severity, lacking)] if lacking else []
    return work


def finish(run: Run, lines: list[Line], warnings: list[str], out: Path) -> None:
    """Print the tables, and write them and the figures."""
    models = {model.label: model.digest for model in run.models}
    made = report.aggregate(lines, models, run.args.baseline)
    made = made._replace(notes=[*made.notes, *warnings])
    head = {"format": 1, "command": " ".join(sys.argv), "classes": run.classes, "weights": models,
            **run.facts, **run.setup}  # fmt: skip
    write(out / "results.json", json.dumps({**head, **report.plain(made)}, indent=1) + "\n")
    write(out / "results.csv", report.flat(made))
    write(out / "results.md", report.markdown(made))
    write(out / "results.tex", report.latex(made))
    figures.draw_robustness(made, out / "robustness.png")
    figures.draw_severities(made, out / "severities.png")
    if run.args.dump_images:
        figures.draw_images(contact_sheet(run), out / "images.png")
    print(f"\n{report.text(made)}\ntables and figures: {out}")


def contact_sheet(run: Run) -> list[list[figures.Tile]]:
    """Some images, clean and under the run's perturbations, and what the first model sees there."""
    numbers = run.pick(run.args.dump_images)
    batch, model = (numbers.to(run.feed.device), *run.feed(numbers)), run.models[0]
    sheets: list[list[figures.Tile]] = [[] for _ in numbers]
    for name in ("clean", *(n for n in report.COLUMNS if n in run.args.cells)):
        black_box = name in GROUPS["black-box"]
        if run.official(name) or (black_box and not run.surrogate):
            continue
        victim = run.surrogate if black_box else model if name in GROUPS["white-box"] else None
        severity = SHEET_SEVERITY if len(report.severities(name)) > 1 else None
        images, _ = perturb(run, name, severity, victim, batch)
        with torch.no_grad():
            guesses = model.module(images).argmax(1)
        title = f"{report.COLUMNS.get(name, name)} {severity or ''}".strip()
        for sheet, image, guess, y in zip(sheets, images, guesses, batch[2], strict=True):
            title = f"clean: {run.classes[y]}" if name == "clean" else title
            sheet.append(figures.Tile(title, image.cpu(), run.classes[guess], bool(guess == y)))
    return sheets


# ---------------------------------------------------------------------------- the command line


def is_file(spec: str) -> bool:
    return os.path.exists(spec) or ":" not in spec


def named(args: argparse.Namespace) -> list[str]:
    """All models of the command line, each once."""
    return list(dict.fromkeys([*args.models, *filter(None, [args.surrogate])]))


def choose_cells(only: list[str], skip: list[str]) -> list[str]:
    """The perturbations of the run, in order; clean is always the first."""
    known = {**GROUPS, **{name: [name] for names in GROUPS.values() for name in names}}
    if only == ["clean"]:
        return only
    for word in [*only, *skip]:
        if word not in known:
            close = ", ".join(difflib.get_close_matches(word, known, 3)) or ", ".join(GROUPS)
            raise UserError(f"no perturbation or group is called {word!r}; close: {close}")
    wanted = {name for word in only or known for name in known[word]}
    if not only:
        wanted -= set(GROUPS["supplement"])
    elif wanted & set(GROUPS["white-box"]):
        wanted |= set(GROUPS["checks"])
    wanted -= {name for word in skip for name in known[word]}
    if not wanted:
        raise UserError("--only and --skip leave nothing to measure")
    return ["clean", *(name for names in GROUPS.values() for name in names if name in wanted)]


def build_parser() -> Parser:
    parser = Parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("models").add_argument
    add("models", nargs="+", metavar="MODEL",
        help="a checkpoint of train.py, torchvision:ARCH, or your own module:callable, which runs"
        " its code, as does a checkpoint that was trained so; each is a row of the tables")
    add("--surrogate", metavar="MODEL",
        help="the model that the black-box attacks are made on: a VGG trained on the same images;"
        " without one they are left out")
    add("--baseline", metavar="MODEL", help="the row that + and - refer to (default: the first)")
    add("--weights", metavar="NAME", help="of torchvision:ARCH, downloaded; DEFAULT: the best")
    add("--mean", type=number(float, 0, 1), nargs=3, metavar="M",
        help="of a module:callable that expects normalised input, with --std")
    add("--std", type=number(float, 0, above=True), nargs=3, metavar="S", help="see --mean")

    add = parser.add_argument_group("images").add_argument
    add("--data", "--data-dir", metavar="SET",
        help="as in train.py (default: what the first checkpoint was trained on)")
    add("--size", type=number(int, MIN_SIDE, data.MAX_SIDE),
        help="side of the square that images are resized to (default: the first checkpoint's)")
    add("--cache-dir", default=str(data.default_cache_dir()), metavar="DIR",
        help="where decoded folders are kept, and CIFAR")
    add("--limit", type=number(int, 1), metavar="N",
        help="test on N images, as many of each class, drawn with --seed (default: all)")
    add("--imagenet-c", type=Path, metavar="DIR",
        help="read the corruptions that are there as DIR/corruption/severity/class/file, or"
        " DIR/family/corruption/..., instead of making them")

    add = parser.add_argument_group("perturbations").add_argument
    add("--only", nargs="+", metavar="NAME",
        help=f"measure these; by name, or by group: {', '.join(GROUPS)}; clean: nothing else"
        " (default: all but the supplement, which is CW2 at confidence 0 and takes long)")
    add("--skip", nargs="+", metavar="NAME", help="leave these out")

    add = parser.add_argument_group("running").add_argument
    add("-b", "--batch-size", type=number(int, 1), default=100,
        help="images at a time; changes nothing but speed and memory")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all draws")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--output-dir", default="runs/evaluation", metavar="DIR",
        help="for the finished cells, with which an interrupted run goes on, tables and figures")
    add("--save-predictions", action=argparse.BooleanOptionalAction, default=False,
        help="keep for each cell which images were right, as predictions/MODEL/CELL.npy")
    add("--dump-images", type=number(int, 0, 100), default=4, metavar="N",
        help="draw N images under every perturbation, with what the first model takes them for")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; adds the rows' labels and the perturbations to measure."""
    args = build_parser().parse_args(argv)
    args.cells = choose_cells(args.only or [], args.skip or [])
    if len(set(args.models)) < len(args.models):
        raise UserError("a model is named twice")
    labels = [Path(s).resolve().parent.name if is_file(s) else s for s in args.models]
    labels = labels if len(set(labels)) == len(labels) else args.models
    labels = [printable(label) for label in labels]
    args.labels = dict(zip(args.models, labels, strict=True))
    args.baseline = args.labels.get(args.baseline or args.models[0], args.baseline)
    if args.baseline not in labels:
        raise UserError(f"--baseline {args.baseline} is none of the models: {', '.join(labels)}")
    torchvision_named = [s for s in named(args) if not is_file(s) and s.startswith("torchvision:")]
    if bool(torchvision_named) != bool(args.weights):
        raise UserError("torchvision:ARCH and --weights NAME need each other; DEFAULT is the best")
    if args.weights and os.path.exists(args.weights):
        raise UserError(f"--weights {args.weights}: name the checkpoint itself as a model")
    if (args.mean is None) != (args.std is None):
        raise UserError("--mean and --std need each other")
    if args.mean and all(is_file(s) or s in torchvision_named for s in named(args)):
        raise UserError("--mean and --std are for module:callable; the other models know theirs")
    if args.imagenet_c and not args.imagenet_c.is_dir():
        raise UserError(f"--imagenet-c {args.imagenet_c}: no such folder")
    args.device = find_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    evaluate(parse_args(argv))


if __name__ == "__main__":
    run(main)
