#!/usr/bin/env python3
"""Reproduce the paper's tables with one command, and print them beside the paper's numbers.

python reproduce.py                                    # a small network on the embedded dataset
python reproduce.py --scale small --data IMAGES --tables 1 2 --seeds 3
python reproduce.py --scale paper --data IMAGENET --dry-run        # what it would run, how long

Finished work is not repeated: a run that was stopped continues when it is started again.
"""

import signal
import subprocess
import sys
from pathlib import Path

import train
from evaluate import check_corruptions
from harness.benchmark.config import parse_eval_config
from harness.benchmark.registry import choose_perturbations
from harness.benchmark.store import read_cells
from harness.cli import format_command
from harness.errors import UserError, deferred_signals, run_script
from harness.images.datasets import Dataset
from harness.models import build_model, check_name, count_correct
from harness.reproduction.estimate import Meter, time_second_call
from harness.reproduction.plan import (
    EvalTask,
    ReproduceConfig,
    TrainTask,
    command,
    make_plan,
    parse_reproduce_config,
)
from harness.reproduction.report import read_evaluation, write_report
from harness.training.config import TrainConfig, parse_train_config, schedule_change

ROOT = Path(__file__).resolve().parent
STOPPED = (130, 143)  # exit codes of a script that Ctrl-C or SIGTERM has ended
GRACE = 10.0  # seconds that an interrupted child has to end by itself

Progress = tuple[int, TrainConfig]  # finished epochs of a training, and its configuration


def reproduce(config: ReproduceConfig) -> None:
    """Run what is not finished, and write the report. With --dry-run, only estimate the times."""
    tasks = list(make_plan(config))
    trainings = [task for task in tasks if isinstance(task, TrainTask)]
    evaluations = [task for task in tasks if isinstance(task, EvalTask)]
    data = train.load_data(parse_train_config(trainings[0].argv)[0])
    progress = {task.folder: read_progress(task, data) for task in trainings}
    for evaluation in evaluations:
        refuse_other_limit(evaluation, config.limit, len(data.test.labels))
    for arch in [config.surrogate, *config.archs]:  # a wrong name ends it now, not after hours
        check_name(arch)
        if ":" in arch:  # may be the user's own code
            build_model(arch, len(data.classes))
    for evaluation in evaluations:  # also frost's photographs, if MTLAT_FROST_DIR names some
        check_corruptions(parse_eval_config(evaluation.argv), data.test.images.shape[-1])
    if config.dry_run:
        list_tasks(config, tasks, progress, data)
        return
    found = []
    for task in tasks:  # after each, the images are compared: they may have changed meanwhile
        if isinstance(task, EvalTask):
            run_task(task)
            found.append(read_evaluation(task, data))
        elif is_finished(progress[task.folder]):
            print(f"finished: {task.folder}")
        else:
            run_task(task)
            read_progress(task, data)
    whole = f"{format_command(['python', *sys.argv])}  # runs:"
    commands = [whole, *(command(task, ROOT) for task in tasks)]
    write_report(config, commands, [task.folder for task in trainings], found, data)


def read_progress(task: TrainTask, data: Dataset) -> Progress:
    """Read how many epochs of a training are finished, and its configuration.

    Like train.py it refuses other settings or images; unlike train.py also another schedule.
    """
    config, checkpoint = parse_train_config(task.argv)
    if checkpoint and checkpoint["fingerprint"] != data.fingerprint:
        raise UserError(
            f"{task.folder} was trained on other images than those of --data {config.data}:"
            " choose another --output-dir, or delete that folder"
        )
    if checkpoint and (changed := schedule_change(config, checkpoint)):
        raise UserError(
            f"{task.folder} was trained by another schedule ({changed}): choose another"
            " --output-dir"
        )
    return len(checkpoint["log"]) if checkpoint else 0, config


def refuse_other_limit(task: EvalTask, limit: int, images: int) -> None:
    """Raise `UserError` if an evaluation was begun with another --limit; 0 is all images."""
    for cell in read_cells(task.folder / "cells.jsonl"):
        begun = cell.get("limit") or 0
        if begun != (limit if limit < images else 0):
            raise UserError(
                f"{task.folder} was begun with --limit {begun}, and not {limit}: give that one, or"
                " delete that folder"
            )


def is_finished(progress: Progress) -> bool:
    """Return whether all epochs of a training are finished, and last.pt has not been removed."""
    done, config = progress
    return done == config.epochs and Path(config.output_dir, "last.pt").exists()


def run_task(task: TrainTask | EvalTask) -> None:
    """Run a script. If it fails, exit with its code; it has printed why."""
    print(f"\n$ {command(task, ROOT)}", flush=True)
    child = None
    try:
        with deferred_signals():
            child = subprocess.Popen([sys.executable, str(ROOT / task.script), *task.argv])
        code = child.wait()
    except KeyboardInterrupt as interrupt:
        if child is None:
            raise
        # The terminal interrupts the child too; SIGTERM comes to this process alone.
        if interrupt.args:
            child.terminate()
        try:
            code = child.wait(timeout=GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # or a second signal
            child.terminate()
            code = child.wait()
        if code not in STOPPED:
            raise
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    if code in STOPPED:  # the child has printed it
        sys.exit(code)
    if code:
        how = f"exit code {code} of" if code > 0 else (
            f"killed by signal {-code}{' (is memory full?)' * (code == -9)}; what was finished is"
            " kept, run reproduce.py again to continue; the command was"
        )  # fmt: skip
        print(f"error: {how}: {command(task, ROOT)}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def list_tasks(
    config: ReproduceConfig, tasks: list[TrainTask | EvalTask], progress: dict[Path, Progress],
    data: Dataset,
) -> None:  # fmt: skip
    """Print every task with an estimate of its time."""
    meter, total = Meter(data, config.device, time_epoch), 0.0
    for task in tasks:
        if isinstance(task, TrainTask):
            done, settings = progress[task.folder]
            left = settings.epochs - done
            seconds = meter.training(settings, left) if left else 0.0
            note = f"{done} of {settings.epochs} epochs are done" if left else "finished"
        else:
            cells = read_cells(task.folder / "cells.jsonl")
            finished = {(c["label"], c["perturbation"], c["severity"]) for c in cells}
            names = ["clean"] if task.tables == [3] else choose_perturbations([], [])
            labels = {path.name: task.arch for path in task.models.values()}
            seconds = meter.evaluation(labels, config.surrogate, names, config.limit, finished)
            done, note = len(finished), f"{len(finished)} cells are done"
        total += seconds
        remark = f"  # {note}" if done else ""
        print(f"{format_duration(seconds)}  {command(task, ROOT)}{remark}")
    print(f"{format_duration(total)}  in all, on {config.device}")


def time_epoch(config: TrainConfig, data: Dataset) -> tuple[float, float]:
    """Time a training step and the test of one image, in seconds, on a small dataset."""
    training = train.build(config, data, None)
    steps = len(data.train.labels) // config.minibatch_size
    seconds = time_second_call(lambda: train.train_one_epoch(config, training, 0))
    loader = training.test_loader
    testing = time_second_call(
        lambda: count_correct(training.model, loader.in_order(config.batch_size))
    )
    return seconds / steps, testing / len(loader)


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60:4}:{minutes % 60:02}:{seconds:02}"


def main(argv: list[str] | None = None) -> None:
    reproduce(parse_reproduce_config(argv, __doc__))


if __name__ == "__main__":
    run_script(main)
