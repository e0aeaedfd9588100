"""Test the plan, the repeated runs and the output of reproduce.py, with very small networks."""

import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import evaluate
import reproduce
import train
from harness.benchmark import plots, registry, store
from harness.checkpoints import load_checkpoint
from harness.cli import build_parser
from harness.errors import UserError
from harness.images import embedded
from harness.models import restore_model
from harness.reproduction import estimate, mechanism, plan, report
from harness.reproduction.plan import EvalTask, TrainTask
from harness.training.config import TrainConfig, parse_train_config
from harness.training.methods import METHODS
from tests.support.tiny import image_folder

CALLS: list[str] = []


def in_process(task: TrainTask | EvalTask) -> None:
    CALLS.append(task.folder.name)
    {"train.py": train.main, "evaluate.py": evaluate.main}[task.script](task.argv)


def draw_nothing(*given: Any) -> None:
    (path,) = (g for g in given if isinstance(g, Path))
    Image.new("RGB", (2, 2)).save(path, format="PNG")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a folder of images, and make the scripts run in this process without figures."""
    monkeypatch.setattr(reproduce, "run_task", in_process)
    monkeypatch.setattr(registry, "SAMPLE", 3)
    monkeypatch.setattr(embedded, "INDICES", {"train": range(20), "test": range(20, 40)})
    for name in ("robustness", "severities", "images", "curves", "step"):
        monkeypatch.setattr(plots, f"plot_{name}", draw_nothing)
    CALLS.clear()
    yield image_folder(tmp_path / "images", each=20, side=16)


def argv(images: Path, *more: str) -> list[str]:
    return [
        "--scale", "small", "--data", str(images), "--size", "16", "--archs", "tiny:convnet",
        "--surrogate", "tiny:linear", "--epochs", "1", "--batch-size", "8", "--device", "cpu",
        "--cache-dir", str(images.parent / "cache"), "--output-dir", str(images.parent / "out"),
        "--methods", "mtlat", *more,
    ]  # fmt: skip


def tables(images: Path) -> Any:
    return json.loads((images.parent / "out" / "tables.json").read_text())


# ---------------------------------------------------------------------------- the plan


PAPERS = ["standard", "mixup", "tlat", "mtlat", "iat", "fgsm", "target-fgsm", "ls"]


def planned(*options: str) -> list[TrainTask | EvalTask]:
    return list(plan.make_plan(plan.parse_reproduce_config([*options, "--output-dir", "out"])))


def names(tasks: list[TrainTask | EvalTask]) -> list[str]:
    return [task.folder.name for task in tasks]


def test_the_demo_is_standard_and_mtlat_and_their_surrogate() -> None:
    tasks = planned()
    assert names(tasks) == [
        "cnn6-standard-seed0", "cnn4-standard-seed0", "cnn4-mtlat-seed0", "evaluation-cnn4-seed0",
    ]  # fmt: skip
    surrogate, standard = (build_parser(TrainConfig).parse_args(task.argv) for task in tasks[:2])
    assert (surrogate.arch, surrogate.lr, surrogate.epochs) == ("cnn6", 2e-3, 8)
    assert (standard.arch, standard.lr, standard.size) == ("cnn4", 2e-3, 32)
    assert standard.whole_batches
    assert tasks[-1].argv[-1] == "out/evaluation-cnn4-seed0"
    assert plan.parse_reproduce_config([]).output_dir == "runs/reproduce/demo"


def test_the_networks_of_one_seed_are_evaluated_before_the_next_seed() -> None:
    archs = "--archs", "cnn4", "resnet18"
    runs = [n for n in names(planned("--seeds", "2", "--methods", "standard", *archs))
            if n.startswith("evaluation")]  # fmt: skip
    assert runs == [f"evaluation-{arch}-seed{n}" for n in (0, 1) for arch in archs[1:]]


def test_every_script_gets_the_images_the_cache_and_the_device() -> None:
    for task in planned("--tables", "1", "3", "--cache-dir", "cache", "--device", "cpu"):
        given = dict(pairwise(task.argv))
        found = given["--data"], given["--cache-dir"], given["--device"]
        assert found == ("shapes", "cache", "cpu")


def test_the_paper_scale_is_the_papers_experiment() -> None:
    tasks = planned("--scale", "paper", "--data", "imagenet")
    assert names(tasks) == [
        "vgg16_bn-standard-seed0", *(f"resnet50-{method}-seed0" for method in PAPERS),
        "evaluation-resnet50-seed0", "clean-resnet50-seed0",
        *(f"resnext50_32x4d-{method}-seed0" for method in ("standard", "mtlat", "iat")),
        "evaluation-resnext50_32x4d-seed0",
    ]  # fmt: skip
    surrogate, settings = (parse_train_config(tasks[n].argv)[0] for n in (0, 4))
    assert (surrogate.arch, surrogate.lr, surrogate.epochs) == ("vgg16_bn", 1e-4, 90)
    assert (settings.method, settings.lr, settings.milestones) == ("mtlat", 0.002, [30, 60, 80])
    assert (settings.epochs, settings.batch_size, settings.size) == (90, 256, 224)
    assert (settings.classes, settings.amp, settings.channels_last) == (100, "bf16", True)
    first, clean, second = (task for task in tasks if isinstance(task, EvalTask))
    assert list(first.models) == ["standard", "mixup", "tlat", "mtlat", "iat"]
    assert list(clean.models) == ["standard", "tlat", "fgsm", "target-fgsm", "ls"]
    assert list(second.models) == ["standard", "mtlat", "iat"]
    last = [f"out/resnet50-{method}-seed0/last.pt" for method in first.models]
    assert first.argv[:7] == [*last, "--surrogate", "out/vgg16_bn-standard-seed0/last.pt"]
    assert "--surrogate" not in clean.argv and "clean" in clean.argv


def test_a_method_that_the_paper_lacks_is_in_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "own", METHODS["fgsm"])
    parse = runpy.run_path(plan.__file__)["parse_reproduce_config"]
    with pytest.raises(UserError, match=r"argument --methods: invalid choice: 'own' \(choose from"):
        parse(["--methods", "own"])


def test_the_small_scale_trains_small_networks_on_small_images() -> None:
    tasks = planned("--scale", "small", "--data", "x")
    surrogate, *runs = [parse_train_config(t.argv)[0] for t in tasks if isinstance(t, TrainTask)]
    assert (surrogate.arch, surrogate.lr) == ("vgg11_bn", 1e-4)
    assert [run.method for run in runs] == PAPERS
    assert {(run.arch, run.lr) for run in runs} == {("resnet18", 1e-3)}
    for run in (surrogate, *runs):
        assert (run.epochs, run.batch_size, run.size) == (30, 64, 64)
        assert run.whole_batches


def test_flags_override_the_recipe_but_not_the_surrogates_rate() -> None:
    options = "--lr 0.5 --epochs 7 --surrogate-epochs 3 --seeds 2 --tables 2 --limit 9"
    options += " --archs resnet18 resnet18 --train-flags=--whole-batches"
    tasks = planned("--scale", "small", "--data", "x", *options.split())
    runs = [build_parser(TrainConfig).parse_args(t.argv) for t in tasks if isinstance(t, TrainTask)]
    assert [(r.arch, r.method, r.seed) for r in runs] == [
        ("vgg11_bn", "standard", 0),
        *(("resnet18", method, n) for n in (0, 1) for method in ("standard", "mixup", "tlat")),
    ]  # fmt: skip
    assert {(r.whole_batches, r.data) for r in runs} == {(True, "x")}
    assert [(r.epochs, r.lr) for r in runs] == [(3, 1e-4)] + 6 * [(7, 0.5)]
    evaluations = [t.argv for t in tasks if isinstance(t, EvalTask)]
    assert [words[words.index("--limit") + 1] for words in evaluations] == ["9", "9"]
    assert not any("--limit" in t.argv for t in planned("--limit", "0"))
    assert names(planned("--tables", "all")) == [
        "cnn6-standard-seed0", *(f"cnn4-{method}-seed0" for method in PAPERS),
        "evaluation-cnn4-seed0", "clean-cnn4-seed0",
    ]  # fmt: skip
    assert "cnn4-mixup-seed0" in names(planned("--methods", "mixup"))
    clean = [f"cnn4-{m}-seed0" for m in ("standard", "tlat", "fgsm", "target-fgsm", "ls")]
    assert set(names(planned("--tables", "3"))) == {*clean, "clean-cnn4-seed0"}  # no surrogate
    alone = {"cnn4-standard-seed0", "cnn4-fgsm-seed0", "clean-cnn4-seed0"}
    assert set(names(planned("--methods", "fgsm"))) == alone  # of Table 3


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--opt 'sgd", '"--opt \'sgd": No closing quotation; quote as in a shell'),
        ("--output-dir=x", "itself sets --output-dir of train.py; use its own --output-dir"),
        ("--seed 1", "itself sets --seed of train.py; use its own --seeds"),
        ("--amp no -b 9", "itself sets --batch-size of train.py; use its own --batch-size"),
        ("--learning-rate 1", "itself sets --lr of train.py; use its own --lr"),
        ("--arch cnn4", "itself sets --arch of train.py; use its own --archs"),
        ("--resume auto", "itself sets --resume of train.py; leave it out"),
    ],
)
def test_train_flags_do_not_repeat_what_the_plan_sets(flags: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^--train-flags.*{said}$"):
        planned(f"--train-flags={flags}")


# ---------------------------------------------------------------------------- the run


def test_a_run_ends_with_tables_and_a_report_and_is_not_done_again(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--data", "my images"])
    reproduce.main(argv(images, "--tables", "1"))
    said = capsys.readouterr().out
    out = images.parent / "out"
    trained = [
        "tiny-linear-standard-seed0", "tiny-convnet-standard-seed0", "tiny-convnet-mtlat-seed0"
    ]  # fmt: skip
    evaluation = "evaluation-tiny-convnet-seed0"
    assert [*trained, evaluation] == CALLS
    assert (out / evaluation / "differences.png").stat().st_size > 0
    results = json.loads((out / evaluation / "results.json").read_text())
    for row, theirs in zip(tables(images)["rows"], results["rows"], strict=True):
        assert row["paper_arch"] == "resnet50" and theirs["model"].endswith(
            f"{row['method']}-seed0"
        )
        for name, score in theirs["scores"].items():
            number = score["accuracy"] * 100 if name == "clean" else score["robustness"]
            assert row["entries"][name]["values"] == [pytest.approx(number)]
            assert row["entries"][name]["sign"] == score["sign"]
        assert len(row["entries"]) == 1 + 24 + 2
    verdicts = tables(images)["verdicts"]
    assert sum(verdicts.values()) == 25 and "Of 25 signs of the paper, " in said
    assert "M-TLAT against standard: clean accuracy" in said and str(out / "report.html") in said
    markdown = (out / "tables.md").read_text()
    assert "Table 1, tiny:convnet beside the paper's resnet50" in markdown
    assert all(f"--output-dir {out / name}" in markdown for name in [*trained, evaluation])
    # The 54 training images are 6 whole minibatches of 8, and M-TLAT has two losses.
    assert f"| {trained[1]} | 1 | 6 | 48 |\n| {trained[2]} | 1 | 6 | 96 |" in markdown
    html = (out / "report.html").read_text()
    assert all(name in html for name in [*trained, evaluation])
    assert f"One mix of two training images in a step of M-TLAT, by {trained[2]}" in html
    assert results["weights"]["tiny-convnet-mtlat-seed0"] in html
    for page in (markdown, unescape(html)):  # as a shell takes it
        assert "python reproduce.py --data 'my images'  # runs:\npython " in page
    assert [path.name for path in sorted(out.glob("*.png"))] == [
        "curves-tiny-convnet.png", "differences-tiny-convnet-table1.png",
        "robustness-tiny-convnet.png", "severities-tiny-convnet.png", "step.png",
    ]  # fmt: skip

    # A second run repeats no training. Then some cells and one training are deleted and made again.
    before = (out / "tables.json").read_bytes()
    CALLS.clear()
    reproduce.main(argv(images, "--tables", "1"))
    assert CALLS == [evaluation] and (out / "tables.json").read_bytes() == before
    assert capsys.readouterr().out.count("finished: ") == len(trained)
    path = out / evaluation / "cells.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]) + "{")
    (out / trained[2] / "last.pt").unlink()
    CALLS.clear()
    reproduce.main(argv(images, "--tables", "1"))
    assert CALLS == [trained[2], evaluation] and (out / "tables.json").read_bytes() == before

    # More tables add rows. Fewer tables do not change the other results in the folder.
    marks = (out / "report.html").read_text().count("diamonds")
    reproduce.main(argv(images, "tlat", "--tables", "all"))
    assert (out / "report.html").read_text().count("diamonds") == marks > 0  # in Table 1 alone
    both = [(row["table"], row["method"]) for row in tables(images)["rows"]]
    assert both == [(1, "standard"), (1, "mtlat"), (2, "standard"), (2, "tlat"),
                    (3, "standard"), (3, "tlat")]  # fmt: skip
    (clean,) = tables(images)["rows"][5]["entries"].values()
    assert clean["mean"] == pytest.approx(tables(images)["rows"][3]["entries"]["clean"]["mean"])
    reproduce.main(argv(images, "--tables", "1"))
    assert (out / "tables.json").read_bytes() == before


def test_the_demonstration_says_which_cue_each_network_follows(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanism, "INDICES", embedded.INDICES)
    embedded_set = ["--scale", "demo", "--data", "shapes"]
    chosen = ["--methods", "standard", "tlat", "--tables", "3", "--train-flags=--data-seed 5"]
    draw, asked = mechanism.draw_cues, []

    def draw_cues(size: int, amplitude: float, seed: int) -> dict[str, torch.Tensor]:
        asked.append((size, amplitude, seed))
        return draw(size, amplitude, seed)

    monkeypatch.setattr(mechanism, "draw_cues", draw_cues)
    reproduce.main([*argv(images), *embedded_set, *chosen])
    assert asked == [(16, embedded.AMPLITUDE, 5)]
    drawn, out = draw(16, seed=5), images.parent / "out"
    for name in ("tiny-convnet-standard-seed0", "tiny-convnet-tlat-seed0"):
        model = restore_model(load_checkpoint(out / name / "last.pt"))
        cues = mechanism.average(mechanism.follow_cues(model, drawn))._asdict()
        assert tables(images)["cues"][name] == pytest.approx(cues)
    page = (out / "report.html").read_text()
    assert "Why: the cue that each network follows" in page and (out / "cues.png").exists()
    compared = r"tlat-seed0 predicts the exchanged grating&#39;s class \w+ .*standard-seed0"
    assert re.search(compared, page)


def test_seeds_train_on_the_same_images_and_are_averaged(images: Path) -> None:
    archs = "--archs", "tiny:convnet", "tiny:smooth"  # Table 3 has one alone
    reproduce.main(argv(images, "--tables", "3", "--methods", "tlat", "--seeds", "2", *archs))
    assert [p.name for p in (images.parent / "out").glob("curves*")] == ["curves-tiny-convnet.png"]
    assert len(CALLS) == 2 * (2 + 1)  # clean accuracy needs no surrogate
    settings = [json.loads((images.parent / "out" / name / "args.json").read_text())
                for name in ("tiny-convnet-tlat-seed0", "tiny-convnet-tlat-seed1")]  # fmt: skip
    assert [s["seed"] for s in settings] == [0, 1] and {s["data_seed"] for s in settings} == {0}
    standard, tlat = (row["entries"]["clean"] for row in tables(images)["rows"])
    assert len(standard["values"]) == len(tlat["values"]) == 2
    assert tlat["mean"] == pytest.approx(sum(tlat["values"]) / 2) and tlat["spread"] is not None
    assert not [*(images.parent / "out").glob("clean-*/images.png")]
    (order,) = tables(images)["orders"]
    assert order["ours"] == {"standard": standard["mean"], "tlat": tlat["mean"]}
    html = (images.parent / "out" / "report.html").read_text()
    assert "tiny:convnet on 3 classes" in html and "1 epoch, 2 seeds." in html


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_another_limit_is_refused_before_anything_is_trained(
    images: Path, more: tuple[str, ...]
) -> None:
    options = argv(images, "--tables", "3", "--methods", "standard", "--limit")
    reproduce.main([*options, "4"])
    assert "54 training and 4 test images of" in (images.parent / "out/report.html").read_text()
    CALLS.clear()
    with pytest.raises(UserError, match=r"clean-tiny-convnet-seed0 was begun with --limit 4, and "):
        reproduce.main([*options, "5", "--methods", "tlat", *more])
    assert CALLS == []
    reproduce.main([*options, "4", *more])


def test_runs_of_other_settings_or_images_are_refused_in_a_line(images: Path) -> None:
    folder = images.parent / "out" / "tiny-linear-standard-seed0"
    train.main([
        *("--data", str(images), "--size", "16", "--epochs", "1", "--batch-size", "8"),
        *("--arch", "tiny:linear", "--method", "standard", "--device", "cpu", "--lr", "1e-4"),
        *("--cache-dir", str(images.parent / "cache"), "--output-dir", str(folder)),
        "--whole-batches",
    ])  # fmt: skip
    with pytest.raises(UserError, match=r"--lr is 0\.5, but .*tiny-linear.* was begun with"):
        reproduce.main(argv(images, "--surrogate-lr", "0.5"))
    changed = (
        r"tiny-linear.* another schedule \(from epoch 2 on, .* of 2 epochs \(before: .* of 1\)\)"
    )
    with pytest.raises(UserError, match=changed):
        reproduce.main([*argv(images), "--epochs", "2"])
    other = image_folder(images.parent / "other", each=21, side=16)
    with pytest.raises(UserError, match=r"tiny-linear.*was trained on other images than"):
        reproduce.main([*argv(images), "--data", str(other)])
    assert CALLS == []
    reproduce.main(argv(images, "--tables", "3", "--methods", "standard"))
    assert CALLS == ["tiny-convnet-standard-seed0", "clean-tiny-convnet-seed0"]
    html = (images.parent / "out" / "report.html").read_text()
    assert "Beside the paper" in html and "What M-TLAT changes" not in html  # which has no figure


@pytest.mark.parametrize(
    ("changed", "said"),
    [("tiny-convnet-mtlat-seed0", "trained"), ("evaluation-tiny-convnet-seed0", "measured")],
)
def test_images_that_change_during_the_run_get_into_no_report(
    images: Path, monkeypatch: pytest.MonkeyPatch, changed: str, said: str
) -> None:
    def run_task(task: TrainTask | EvalTask) -> None:
        if task.folder.name == changed:
            for path in (images / "class0").iterdir():
                Image.new("RGB", (16, 16), "white").save(path)
        in_process(task)

    monkeypatch.setattr(reproduce, "run_task", run_task)
    with pytest.raises(UserError, match=f"{changed} was {said} on other images than"):
        reproduce.main(argv(images, "--seeds", "2"))
    assert CALLS[-1] == changed  # at once, and not after the trainings of another seed
    assert not (images.parent / "out" / "report.html").exists()


def test_one_process_alone_reproduces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="start it without torchrun"):
        planned()


def test_a_script_on_another_drive_is_named_by_its_whole_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = planned()[0]
    assert plan.command(task, Path.cwd() / "here").startswith("python here/train.py --data shapes")

    def refuse(path: object) -> None:
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr("os.path.relpath", refuse)
    assert plan.command(task, Path("/there")).startswith("python /there/train.py --data shapes")


# ---------------------------------------------------------------------------- child processes


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> TrainTask:
    """Return a training task whose script is this code."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "GRACE", 0.3)
    (tmp_path / "train.py").write_text(f"import os, signal, sys, time\n{code}\n")
    return TrainTask(tmp_path / "run", ["--lr", "0.1"])


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt(SIGTERM), as `run_script` does."""

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_child_starts_ends_the_child(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            children.append(self)
            signal.raise_signal(number)  # before the caller has the child

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with sigterm_raises(), pytest.raises(KeyboardInterrupt):
        reproduce.run_task(child(tmp_path, monkeypatch, "time.sleep(60)"))
    assert children[0].poll() is not None


def test_a_child_is_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    task = child(tmp_path, monkeypatch, "print(sys.argv[1:])")
    with os.fdopen(os.dup(1), "w") as pipe, contextlib.redirect_stdout(pipe):  # which is buffered
        reproduce.run_task(task)
    said = capfd.readouterr()
    assert (
        said.out == f"\n$ python {os.path.relpath(tmp_path)}/train.py --lr 0.1\n['--lr', '0.1']\n"
    )
    assert said.err == ""


@pytest.mark.parametrize(
    "code, ends, told",
    [
        ("sys.exit(2)", 2, "error: exit code 2 of: python "),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: killed by signal 9 (is memory full?);"
         " what was finished is kept, run reproduce.py again to continue; the command was:"
         " python "),
        ("os.kill(os.getpid(), signal.SIGABRT)", 134, "error: killed by signal 6; what was"),
        ("sys.exit(130)", 130, ""),
        ("sys.exit(143)", 143, ""),
        ("os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5); sys.exit(130)", 130, ""),
    ],
)  # fmt: skip
def test_a_childs_end_is_that_of_the_run(
    code: str, ends: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    task = child(tmp_path, monkeypatch, code)
    monkeypatch.setattr(reproduce, "GRACE", 60)
    with pytest.raises(SystemExit) as caught:
        reproduce.run_task(task)
    said = capfd.readouterr().err
    assert (
        caught.value.code == ends and said.startswith(told) and len(said.splitlines()) == bool(told)
    )


def test_a_child_that_has_not_heard_of_the_interrupt_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late"
    code = f"os.kill(os.getppid(), signal.SIGINT); time.sleep(5); open({str(late)!r}, 'w')"
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_task(child(tmp_path, monkeypatch, code))
    assert not late.exists()


@pytest.mark.parametrize("first", ["", "os.kill(os.getppid(), signal.SIGINT); time.sleep(1)"])
def test_a_child_is_ended_at_once_by_a_signal_that_it_does_not_get(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "ended"
    code = f"""if True:
        {first}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(open({str(note)!r}, "w").close()))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    """
    task = child(tmp_path, monkeypatch, code)
    monkeypatch.setattr(reproduce, "GRACE", 60)
    with sigterm_raises(), pytest.raises(KeyboardInterrupt):
        started = time.monotonic()
        reproduce.run_task(task)
    assert note.exists() and time.monotonic() - started < 30


def test_the_exit_code_is_that_of_the_signal_which_the_run_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """if True:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    """
    with pytest.raises(SystemExit, match=r"^130$"):
        reproduce.run_task(child(tmp_path, monkeypatch, code))


# ---------------------------------------------------------------------------- the estimates


def test_a_dry_run_counts_the_cells_of_each_evaluation(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def count(meter: object, models: Any, surrogate: str, names: list[str], *rest: Any) -> float:
        asked.append((models, surrogate, *rest))
        return 60.0 * len(names)

    monkeypatch.setattr(estimate.Meter, "evaluation", count)
    monkeypatch.setattr(estimate.Meter, "training", lambda *_: 1.0)
    reproduce.main(argv(images, "tlat", "--tables", "all", "--limit", "5", "--dry-run"))
    rows = [("standard", "tlat", "mtlat"), ("standard", "tlat")]  # by the labels in cells.jsonl
    assert asked == [
        ({f"tiny-convnet-{m}-seed0": "tiny:convnet" for m in row}, "tiny:linear", 5, set())
        for row in rows
    ]
    *_, full, clean, total = capsys.readouterr().out.splitlines()
    assert full.startswith(f"   0:{len(registry.choose_perturbations([], []))}:00  python ")
    assert clean.startswith("   0:01:00  python ") and "--only clean" in clean
    assert total.startswith(f"   0:{1 + len(registry.choose_perturbations([], []))}:04")


def test_a_dry_run_writes_nothing_and_knows_what_is_finished(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reproduce.main(argv(images, "--dry-run"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 1 + 1 and CALLS == [] and not (images.parent / "out").exists()
    assert all("python" in line for line in lines[:-1]) and "in all, on cpu" in lines[-1]
    surrogate = next(plan.make_plan(plan.parse_reproduce_config(argv(images))))
    in_process(surrogate)
    capsys.readouterr()
    reproduce.main(argv(images, "--dry-run"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("   0:00:00") and lines[0].endswith("# finished")
    assert not any(line.endswith("finished") for line in lines[1:])


def test_a_dry_run_estimates_the_epochs_that_are_left(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reproduce.read_progress
    monkeypatch.setattr(reproduce, "read_progress", lambda *given: (1, read(*given)[1]))
    monkeypatch.setattr(estimate.Meter, "training", lambda meter, config, epochs: 60.0 * epochs)
    reproduce.main(argv(images, "--epochs", "3", "--dry-run"))
    line, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith("   0:02:00  python ") and line.endswith("  # 1 of 3 epochs are done")


def test_the_passes_are_those_that_the_attacks_say() -> None:
    expected = {
        "pgd_0.04": 10, "pgd_ll_0.04": 10, "mi_fgsm_0.04": 10, "mi_fgsm_0.08": 10,
        "check_clean": 1, "check_pgd_0": 1, "check_fgsm_0.04": 1, "check_sign_noise_0.04": 0,
        "check_pgd_0.16": 10, "check_pgd_0.04_50_steps": 60,  # 10, then 50 on the rest
    }  # fmt: skip
    assert {name: estimate.count_passes(name) for name in expected} == expected
    assert estimate.count_passes("cw2") == 40


def test_names_with_slashes_make_no_folders(images: Path) -> None:
    config = plan.parse_reproduce_config(argv(images))
    config = replace(config, archs=["timm:hf-hub:ORG/NAME"])
    tasks = list(plan.make_plan(config))
    assert {task.folder.parent for task in tasks} == {Path(config.output_dir)}
    assert any("timm-hf-hub-ORG-NAME" in task.folder.name for task in tasks)


def test_estimates_are_the_measured_passes_times_their_number(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SAMPLE", 3)
    args = plan.parse_reproduce_config(argv(images))
    settings, _ = parse_train_config(next(plan.make_plan(args)).argv)
    meter = estimate.Meter(train.load_data(settings), "cpu", reproduce.time_epoch)
    assert len(meter.data.test.labels) == 6
    monkeypatch.setattr(meter, "_forward", {"a": 1.0}.__getitem__)
    monkeypatch.setattr(meter, "_gradient", {"a": 100.0, "s": 1e4}.__getitem__)
    fog = {("fog", severity): 1e6 for severity in range(1, 6)}
    monkeypatch.setattr(meter, "_corrupt", lambda *key: fog[key])
    cost = meter.evaluation({"x": "a", "y": "a"}, "s", ["fog"], None, set())
    assert cost == 6 * 5 * (2 * 1 + 1e6)
    done = {("x", "fog", s) for s in (1, 2, 3, 4, 5)} | {("y", "fog", s) for s in (1, 2)}
    assert meter.evaluation({"x": "a", "y": "a"}, "s", ["fog"], 4, done) == 4 * 3 * (1 + 1e6)
    assert meter.evaluation({"x": "a"}, "s", ["pgd_0.04"], None, set()) == 6 * (1 + 10 * 100)
    assert meter.evaluation({"x": "a"}, "s", ["mi_fgsm_0.04"], None, set()) == 6 * (1 + 10 * 1e4)
    assert meter.evaluation({"x": "a"}, "s", ["check_pgd_0"], None, set()) == 3 * (1 + 100)
    assert meter.evaluation({"x": "a"}, "s", ["pgd_0.04"], None, {("x", "pgd_0.04", None)}) == 0
    assert meter.evaluation({"x": "a"}, "s", ["check_pgd_0"], 2, set()) == 2 * (1 + 100)
    assert meter.evaluation({"x": "a"}, "s", ["pgd_0.04"], 99, set()) == 6 * (1 + 10 * 100)
    both, black = {"x": "a", "y": "a"}, "mi_fgsm_0.04"  # whose images are made once for both
    assert meter.evaluation(both, "s", [black], None, set()) == 6 * (2 + 10 * 1e4)
    assert meter.evaluation(both, "s", [black], None, {(m, black, None) for m in both}) == 0
    few: list[tuple[int, int]] = []

    def time_epoch(config: TrainConfig, data: Any) -> tuple[float, float]:
        few.append((len(data.train.labels), len(data.test.labels)))
        return 2.0, 5.0

    timed = estimate.Meter(meter.data, "cpu", time_epoch)
    assert timed.training(settings, 3) == 3 * (6 * 2.0 + 6 * 5.0)  # 54 images, 6 steps; 6 test
    pairs = replace(settings, method="mtlat", batch_size=4, whole_batches=False)  # of two images
    assert timed.training(pairs, 3) == 3 * (27 * 2.0 + 6 * 5.0)
    assert few == [(2 * 8, 6), (2 * 2, 4)]  # two steps, and a batch of test images
    meter.known["tiny:linear", "standard", 8] = 7.0
    assert meter.training(settings, 3) == 21.0
    for seconds in (61.6, 62.4):
        assert reproduce.format_duration(3 * 3600 + seconds) == "   3:01:02"


def test_the_times_of_a_training_follow_from_its_log() -> None:
    # An epoch has 8 steps of two minibatches of 8 images. At 16 images per second it takes
    # 8 * 2 * 8 / 16 = 8 s.
    settings = {"batch_size": 16, "whole_batches": False, "method": "mtlat"}
    log = [{"images_per_second": 16.0}, {"images_per_second": 16.0}]
    assert report.Trained(log, settings).minutes(67) == pytest.approx(16 / 60)
    suspended = [{"images_per_second": 0.0}]  # rounded, of less than 0.05
    assert report.Trained(suspended, settings).minutes(67) == pytest.approx(8 * 2 * 8 / 0.05 / 60)


def test_the_minutes_of_an_evaluation_count_the_making_of_images_once(tmp_path: Path) -> None:
    digests = {"standard-seed0": "a", "mtlat-seed0": "b"}
    notes = ["standard-seed0 is not significantly above chance"]
    written = {"data": "images", "weights": digests, "notes": notes}
    (tmp_path / "results.json").write_text(json.dumps(written))
    cell = {"perturbation": "clean", "severity": None, "correct": 1, "n": 2, "total": 2}
    store.append_cells(tmp_path / "cells.jsonl", [
        {**cell, "model": digest, "seconds_making": 30.0, "seconds": seconds}
        for digest, seconds in {"a": 60.0, "b": 90.0}.items()
    ])  # fmt: skip
    models = {"standard": Path("standard-seed0"), "mtlat": Path("mtlat-seed0")}
    task, data = EvalTask(tmp_path, [], "tiny", 0, [1], models), SimpleNamespace()
    data.test_fingerprint = "images"
    found = report.read_evaluation(task, data)  # type: ignore[arg-type]
    assert found.minutes == pytest.approx((30 + 60 + 90) / 60)
    assert found.results.notes == notes


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the scripts as processes with figures, and check an interrupted and resumed run.

    The run that it is compared with is of this process, where nothing has to be imported again.
    """
    folder = image_folder(tmp_path / "images", each=20, side=16)
    command = [sys.executable, reproduce.__file__, *argv(folder, "--tables", "1")]
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parent / "support"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as in this process
    }  # fmt: skip
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    cells_file = tmp_path / "out" / "evaluation-tiny-convnet-seed0" / "cells.jsonl"
    while not cells_file.exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.count("stopped") == 1 and "Traceback" not in err
    subprocess.run(command, env=environment, check=True, capture_output=True)
    first = (tmp_path / "out" / "tables.json").read_bytes()
    os.rename(tmp_path / "out", tmp_path / "interrupted")
    monkeypatch.setattr(reproduce, "run_task", in_process)
    reproduce.main(command[2:])
    assert (tmp_path / "out" / "tables.json").read_bytes() == first
    assert torch.load(tmp_path / "out" / "tiny-convnet-mtlat-seed0" / "last.pt", weights_only=True)


def test_a_limit_above_the_number_of_images_means_all(images: Path) -> None:
    options = argv(images, "--tables", "3", "--methods", "standard", "--limit")
    for limit in ("99", "0", "6", "99"):  # there are 6
        reproduce.main([*options, limit])
    (cell,) = store.read_cells(images.parent / "out" / "clean-tiny-convnet-seed0" / "cells.jsonl")
    assert cell["n"] == 6 and cell["limit"] is None


def test_an_epoch_is_timed_for_each_step_and_each_image(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((12.0, 30.0, 26.0, 30.0))  # of 6 steps, and of 6 test images; then of 13 steps
    monkeypatch.setattr(reproduce, "time_second_call", lambda work: next(times))
    args = plan.parse_reproduce_config(argv(images))
    settings, _ = parse_train_config(next(plan.make_plan(args)).argv)
    data = train.load_data(settings)
    assert reproduce.time_epoch(settings, data) == (2.0, 5.0)
    halves = replace(settings, method="mtlat", whole_batches=False)
    assert reproduce.time_epoch(halves, data) == (2.0, 5.0)


def test_of_two_calls_the_second_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, costs = [0.0], iter((100.0, 7.0))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(costs)

    assert estimate.time_second_call(work) == 7


def test_a_pass_is_timed_for_each_image(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed, corrupted = [], []

    def time_work(work: Any) -> float:
        timed.append(work())
        return 12.0

    def corrupt(x: torch.Tensor, *given: Any) -> torch.Tensor:
        corrupted.append(given)
        return x

    monkeypatch.setattr(estimate, "time_second_call", time_work)
    monkeypatch.setattr(estimate, "corrupt", corrupt)
    args = plan.parse_reproduce_config(argv(images))
    settings, _ = parse_train_config(next(plan.make_plan(args)).argv)
    meter = estimate.Meter(train.load_data(settings), "cpu", reproduce.time_epoch)
    for _ in range(2):
        assert meter._forward("tiny:linear") == 12 / 6  # of 6 images
        assert meter._gradient("tiny:linear") == 12 / (2 * 6)  # two steps
        assert meter._corrupt("fog", 4) == 12 / 6
    assert len(timed) == 3 and corrupted == [("fog", 4)]  # each once
    assert not meter._model("tiny:convnet").training
