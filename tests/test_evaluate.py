"""Test the cells of evaluate.py: their scores, and resuming a run that was stopped."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import evaluate
import train
from attacks import cw2_result, mi_fgsm, pgd, pgd_ll
from corruptions import ALL_CORRUPTIONS, Stream, corrupt
from harness import distributed
from harness.benchmark import measure, paired, plots, registry, store, subjects
from harness.benchmark.attack_registry import ATTACKS
from harness.benchmark.checks import CHECKS
from harness.errors import UserError
from harness.files import lock_folder
from harness.images import embedded
from tests.support.bench import CLASSES, SIDE, Bench


def replace_attack(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    """Replace the function of a registered attack."""
    entry = registry.PERTURBATIONS[name]
    assert entry.attack is not None
    replaced = entry._replace(attack=entry.attack._replace(function=function))
    monkeypatch.setitem(registry.PERTURBATIONS, name, replaced)


def by_cell(lines: list[Any], model: str) -> dict[tuple[str, int | None], Any]:
    return {(x["perturbation"], x["severity"]): x for x in lines if x["label"] == model}


# ---------------------------------------------------------------------------- scores


def test_all_cells_against_one_image_at_a_time(bench: Bench) -> None:
    """Check every count of evaluate.py, which uses batches, by a loop over single images."""
    chosen = ["--only", *registry.GROUPS, "--seed", "3"]  # with validation
    lines = bench.run("--batch-size", "7", *chosen, *bench.surrogate)
    (standard, mtlat, vgg), sets = bench.networks(), bench.sets()
    cells_of = {name: by_cell(lines, name) for name in ("standard", "mtlat")}
    assert len(lines) == 2 * (1 + 5 * (15 + 3) + 4 + 5 + 1 + 1 + len(CHECKS))

    def start(name: str, number: int) -> Tensor:
        return Stream(3, name, None, torch.tensor([number])).uniform(3, SIDE, SIDE) * 2 - 1

    images, labels = sets.test.images, sets.test.labels
    count: dict[str, Any] = {name: dict.fromkeys(table, 0) for name, table in cells_of.items()}
    alone: set[tuple[str, int | None]] = {("gaussian_noise", 5), ("fog", 5), ("rotation", None)}
    for kind, entry in ALL_CORRUPTIONS.items():
        # The severity of the paper's four corruptions is drawn for each image, as in the paper.
        for severity in (None,) if entry.family == "paper" else range(1, 6):
            together = corrupt(images, kind, severity, seed=3)
            for name, model in (("standard", standard), ("mtlat", mtlat)):
                hits = model(together.float() / 255).argmax(1) == labels
                count[name][kind, severity] = int(hits.sum()) * ((kind, severity) not in alone)
    for i, (x, y) in enumerate(zip(torch.split(images, 1), torch.split(labels, 1), strict=True)):
        clean = x.float() / 255
        shared: dict[tuple[str, int | None], Tensor] = {
            key: corrupt(x, *key, seed=3, index=[i]).float() / 255 for key in alone
        }
        shared["clean", None] = clean
        for e in (0.04, 0.08):
            shared[f"mi_fgsm_{e}", None] = mi_fgsm(vgg, clean, y, epsilon=e)
        for name, model in (("standard", standard), ("mtlat", mtlat)):
            own = {
                "pgd_0.04": pgd(model, clean, y, start=start("pgd_0.04", i)),
                "pgd_ll_0.04": pgd_ll(model, clean, y, start=start("pgd_ll_0.04", i)),
                "cw2": cw2_result(model, clean, y, rounds=1).x_adv,
            }
            for key, image in (
                shared | {(kind, None): image for kind, image in own.items()}
            ).items():
                count[name][key] += int(model(image).argmax(1) == y)
    for name, table in cells_of.items():
        for key, line in table.items():
            if key[0].startswith("check_") or key[0] == registry.SUPPLEMENT:
                assert line["n"] == 6
            else:
                assert (line["correct"], line["n"]) == (count[name][key], 30), key
    # The toy networks are not trivial: noise and attacks change some predictions, but not all.
    assert len({x["correct"] for x in lines}) > 8
    scores = bench.results()["rows"][1]["scores"]
    counts = [count["mtlat"]["fog", severity] for severity in range(1, 6)]
    ratio = sum(counts) / 5 / count["mtlat"]["clean", None]
    assert scores["fog"]["robustness"] == pytest.approx(ratio)


def test_the_same_command_gives_the_same_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "my model.pt"])
    for out in ("one", "two"):
        bench.run("--only", "noise", "pgd_0.04", out=out)
    one, two = (bench.root / out / "results.json" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert json.loads(one.read_text())["command"] == "evaluate.py 'my model.pt'"


@pytest.mark.slow
def test_threads_and_batches_change_hardly_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that counts differ by at most one image in a hundred.

    Threads and batches change the order of the sums in a convolution, and thereby its rounding.
    The images are gratings alone, which the network learns in an epoch.
    """
    gratings = functools.partial(embedded.draw_shapes, shapes=False, amplitude=0.2)
    monkeypatch.setattr(embedded, "draw_shapes", gratings)
    common = ["--size", "32", "--device", "cpu", "--output-dir"]
    recipe = ["--method", "standard", "--epochs", "1", "-b", "32", "--lr", "1e-2"]
    train.main(["--arch", "tiny:convnet", *recipe, *common, str(tmp_path / "model")])
    command = [str(tmp_path / "model" / "last.pt"), "--limit", "100", "--dump-images", "0"]
    command += ["--only", "noise", "blur", "pgd_0.04", "cw2", "--skip", "checks", *common]
    counts, threads = [], torch.get_num_threads()
    try:
        for number, batch in ((1, 100), (2, 7)):
            torch.set_num_threads(number)
            out = tmp_path / str(batch)
            evaluate.main([*command, str(out), "--batch-size", str(batch)])
            lines = store.read_cells(out / "cells.jsonl")
            counts.append({(x["perturbation"], x["severity"]): x["correct"] for x in lines})
    finally:
        torch.set_num_threads(threads)
    one, two = counts
    assert one.keys() == two.keys() and len(set(one.values())) > 10
    assert all(abs(one[key] - two[key]) <= 1 for key in one), counts


def test_checks_take_a_few_images_and_their_own_attacks(bench: Bench) -> None:
    table = by_cell(bench.run("--only", "pgd_0.04", models="mtlat"), "mtlat")
    (_, model, _), sets = bench.networks(), bench.sets()
    few = measure.choose_images(sets.test.labels, 6, 0)
    x, y = sets.test.images[few].float() / 255, sets.test.labels[few]

    def start(name: str, runs: int) -> Tensor:
        stream = Stream(0, f"check_{name}", None, few)
        return (stream.uniform(runs, 3, SIDE, SIDE) * 2 - 1).transpose(0, 1)

    trials: list[tuple[str, dict[str, Any]]] = [
        ("pgd_0.02", {"epsilon": 0.02}), ("fgsm_0.04", {"steps": 1, "random_start": False}),
        ("pgd_0.04_5_restarts", {"restarts": 5}),
    ]  # fmt: skip
    for name, settings in trials:
        runs = settings.get("restarts", 1)
        if "random_start" not in settings:
            settings["start"] = start(name, runs).squeeze(0)
        x_adv = pgd(model, x, y, **settings)
        assert table[f"check_{name}", None]["correct"] == int((model(x_adv).argmax(1) == y).sum())
    begin = start("pgd_0.04_50_steps", 1).squeeze(0)
    runs = [pgd(model, x, y, steps=steps, start=begin) for steps in (10, 50)]
    right = [model(x_adv).argmax(1) == y for x_adv in runs]
    assert table["check_pgd_0.04_50_steps", None]["correct"] == int((right[0] & right[1]).sum())
    assert table["check_clean", None]["broken"] == 0
    assert table["check_pgd_0", None]["correct"] == table["check_clean", None]["correct"]


@pytest.mark.parametrize("name", ["pgd_0.04", "pgd_ll_0.04", "check_pgd_0.08"])
def test_attacks_start_where_seed_name_and_number_say(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    starts: list[Tensor] = []

    def spy(_: Any, x: Tensor, y: Tensor, *, start: Tensor, **settings: Any) -> Tensor:
        starts.append(start)
        return x

    replace_attack(monkeypatch, name, spy)
    quick = [n for n in registry.GROUPS["checks"] if n != name]
    options = ["--only", name, "--skip", *quick, "--dump-images", "0", "--seed", "5", "-b", "4"]
    bench.run(*options, models="standard")
    drawn = torch.cat(starts)
    labels = bench.sets().test.labels
    numbers = measure.choose_images(labels, 6 if "check" in name else None, 5)
    expected = Stream(5, name, None, numbers).uniform(3, SIDE, SIDE) * 2 - 1
    assert torch.equal(drawn, expected)
    assert drawn.abs().max() <= 1 and -0.1 < drawn.mean() < 0.1


def test_cw2_in_one_round_reaches_whom_nine_rounds_reach(bench: Bench) -> None:
    line = by_cell(bench.run("--only", "cw2", "--skip", "checks"), "standard")["cw2", None]
    (model, _, _), sets = bench.networks(), bench.sets()
    x, y = sets.test.images.float() / 255, sets.test.labels
    for confidence in (50.0, 10.0):
        nine = cw2_result(model, x, y, confidence=confidence)
        one = cw2_result(model, x, y, confidence=confidence, rounds=1)
        assert torch.equal(nine.reached, one.reached)
        assert torch.equal(model(nine.x_adv).argmax(1) == y, model(one.x_adv).argmax(1) == y)
        assert 0 < int(one.reached.sum()) or confidence == 50
    right = model(x).argmax(1) == y
    one = cw2_result(model, x[right], y[right], rounds=1)
    assert line["right"] == int(right.sum()) and 0 < line["right"] < line["n"]
    assert line["correct"] == int((model(one.x_adv).argmax(1) == y[right]).sum())
    assert line["reached"] == int(one.reached.sum())
    assert line["misclassified"] == int(one.misclassified.sum())
    assert line["margin"] == pytest.approx(one.margin.median().item(), abs=1e-4)
    deciles = np.quantile(one.margin.detach().double(), np.linspace(0, 1, 11))
    assert line["margin_deciles"] == pytest.approx(deciles, abs=1e-3)


def test_the_distance_of_cw2_is_infinite_where_it_reaches_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"confidence": 0.0, "steps": 20, "rounds": 1}
    entry = registry.PERTURBATIONS["cw2"]
    assert entry.attack is not None
    milder = entry._replace(attack=entry.attack._replace(keywords=settings))
    monkeypatch.setitem(registry.PERTURBATIONS, "cw2", milder)
    options = ["--only", "cw2", "--skip", "checks", "supplement", "--dump-images", "0"]
    line = by_cell(bench.run(*options, models="standard"), "standard")["cw2", None]
    (model, _, _), sets = bench.networks(), bench.sets()
    x, y = sets.test.images.float() / 255, sets.test.labels
    right = model(x).argmax(1) == y
    result = cw2_result(model, x[right], y[right], **settings)
    assert 0.5 < line["reached"] / line["right"] < 1
    distances = torch.where(result.reached, result.l2, torch.inf)
    assert line["l2"] == pytest.approx(distances.median().item(), abs=1e-5)


def test_void_scores_alone_give_no_figure(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.PERTURBATIONS["cw2"]
    assert entry.attack is not None
    never = entry._replace(
        attack=entry.attack._replace(keywords={"confidence": 1e6, "steps": 2, "rounds": 1})
    )
    monkeypatch.setitem(registry.PERTURBATIONS, "cw2", never)
    monkeypatch.setattr(plots, "plot_robustness", lambda *_: pytest.fail("drawn without scores"))
    options = ["--only", "cw2", "--skip", "checks", "supplement", "--dump-images", "0"]
    line = by_cell(bench.run(*options, models="standard"), "standard")["cw2", None]
    assert line["reached"] == 0


def test_the_supplement_is_the_smallest_adversarial_step(bench: Bench) -> None:
    table = by_cell(bench.run("--only", "supplement", models="standard"), "standard")
    (model, _, _), sets = bench.networks(), bench.sets()
    few = measure.choose_images(sets.test.labels, 6, 0)
    x, y = sets.test.images[few].float() / 255, sets.test.labels[few]
    right = model(x).argmax(1) == y
    rounds = registry.SUPPLEMENT_ROUNDS
    result = cw2_result(model, x[right], y[right], confidence=0.0, rounds=rounds)
    assert table["cw2_0", None]["l2"] == pytest.approx(result.l2[result.reached].median().item())
    assert table["cw2_0", None]["reached"] == int(result.reached.sum())
    assert "cw2_0" in registry.choose_perturbations(["cw2"], [])
    (text,) = bench.root.glob("**/results.md")
    assert re.search(r"\| CW2 at 0 \| L2 \|\n.*\n\| standard .* \| \d\.\d\d \|\n", text.read_text())


def test_images_are_made_once_for_all_models(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def corrupting(images: Tensor, name: str, severity: int, **settings: Any) -> Tensor:
        made.append((name, severity))
        return corrupt(images, name, severity, **settings)

    monkeypatch.setattr(measure, "corrupt", corrupting)
    attack = ATTACKS["mi_fgsm_0.04"]

    def spy(*args: Any, **settings: Any) -> Tensor:
        made.append(("mi_fgsm", 0))
        return attack.function(*args, **settings)

    replace_attack(monkeypatch, "mi_fgsm_0.04", spy)
    bench.run("--only", "fog", "mi_fgsm_0.04", "-b", "20", "--dump-images", "0", *bench.surrogate)
    assert sorted(made) == sorted([*(("fog", s) for s in range(1, 6)), ("mi_fgsm", 0)] * 2)


def test_a_cell_has_the_seconds_of_its_model_and_of_making_its_images(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def taking(seconds: float, function: Any) -> Any:
        def timed(*args: Any, **settings: Any) -> Tensor:
            clock[0] += seconds
            result: Tensor = function(*args, **settings)
            return result

        return timed

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(measure, "corrupt", taking(5, corrupt))
    monkeypatch.setattr(measure, "compute_logits", taking(1, measure.compute_logits))

    def beside_a_faster_process(value: Any) -> list[Any]:
        times = bool(value) and isinstance(value[0], float)
        return [value, [seconds / 2 for seconds in value]] if times else [value]

    monkeypatch.setattr(distributed, "all_gather", beside_a_faster_process)
    bench.run("--only", "fog", "-b", "10", "--dump-images", "0")  # three batches of 10 images
    cells = store.read_cells(bench.root / "out" / "cells.jsonl")
    assert {(x["perturbation"], x["seconds"], x["seconds_making"]) for x in cells} == {
        ("clean", 3, 0), ("fog", 3, 15)
    }  # fmt: skip


def test_clean_logits_give_the_least_likely_class(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the least likely class is the same from both of its sources.

    It is known from the clean cell, unless an earlier run measured that cell. It is computed then.
    """
    targets = []

    def spy(*args: Any, target: Tensor | None = None, **settings: Any) -> Tensor:
        targets.append(target)
        return pgd_ll(*args, target=target, **settings)

    monkeypatch.setattr(measure, "pgd_ll", spy)
    replace_attack(monkeypatch, "pgd_ll_0.04", spy)
    options = ["--only", "pgd_ll_0.04", "--skip", "checks", "--dump-images", "0"]
    once = bench.run(*options, out="once")
    bench.run("--only", "fog", out="twice")
    assert bench.run(*options, out="twice")[-2:] == once[-2:]
    assert [target is None for target in targets] == [False, False, True, True]


# ---------------------------------------------------------------------------- resuming


def test_killed_and_started_again(bench: Bench) -> None:
    """Check resuming after SIGKILL and with an incomplete last line.

    The cells must be bit-identical to those of a run without interruption, and none may be measured
    twice.
    """
    options = ["--only", "noise", "pgd_0.04", "--dump-images", "0", "--limit", "24"]
    options += ["--skip", "checks"]  # the process would use more images for them
    whole = bench.run(*options, out="whole")
    script = str(Path(evaluate.__file__))
    command = [sys.executable, script, *bench.argv(*options, out="killed")]
    path = bench.root / "killed" / "cells.jsonl"
    with subprocess.Popen(command, cwd=bench.root, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 4):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finished = path.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and 4 <= finished < len(whole)
    torn = path.read_bytes()
    path.write_bytes(torn[: torn.rfind(b"\n") + 1] + torn[:50])
    kept = bench.lines("killed")
    assert kept == whole[:finished]
    resumed = bench.run(*options, out="killed")
    assert resumed[:finished] == kept

    def key(line: Any) -> tuple[Any, ...]:
        return line["perturbation"], str(line["severity"]), line["label"]

    assert sorted(resumed, key=key) == sorted(whole, key=key)
    before = path.read_bytes()
    bench.run(*options, out="killed")
    assert path.read_bytes() == before
    ours, theirs = (bench.results(out) for out in ("killed", "whole"))
    assert ours["rows"] == theirs["rows"]


def test_a_second_run_in_the_same_folder_is_refused(bench: Bench) -> None:
    with lock_folder(bench.root / "out"), pytest.raises(UserError, match="another run is writing"):
        bench.run("--only", "clean", models="standard")
    assert [path.name for path in (bench.root / "out").iterdir()] == [".lock"]


def test_a_model_can_be_added_to_finished_results(bench: Bench) -> None:
    one = bench.run("--only", "fog", models="standard")
    both = bench.run("--only", "fog", models="standard mtlat")
    assert both[: len(one)] == one
    assert {x["label"] for x in both[len(one) :]} == {"mtlat"}
    assert both == one + bench.run("--only", "fog", models="mtlat", out="alone")


def test_cells_name_the_surrogate_where_it_makes_the_images(bench: Bench) -> None:
    lines = bench.run("--only", "fog", "pgd_0.04", "mi_fgsm_0.04", *bench.surrogate)
    named = {line["perturbation"] for line in lines if line["surrogate"] is not None}
    assert named == {"mi_fgsm_0.04"}


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--seed", "1"], "seed: 0, now 1"), (["--limit", "9"], "limit: None, now 9"),
        (["--size", "17"], "size: 16, now 17"), (["--skip", "black-box"], "surrogate: "),
    ],
)  # fmt: skip
def test_results_of_another_run_are_refused(bench: Bench, options: list[str], fact: str) -> None:
    bench.run("--only", "fog", "mi_fgsm_0.04", *bench.surrogate)
    surrogate = [] if "black-box" in options else bench.surrogate
    with pytest.raises(UserError, match=rf"another run \({fact}.*another --output-dir, or delete"):
        bench.run("--only", "fog", *options, *surrogate)


def test_the_default_folder_is_named_by_what_it_holds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bench.root)

    def folder(*options: str, models: str = "standard", only: str = "clean") -> Path:
        capsys.readouterr()
        argv = bench.argv("--only", only, *options, models=models)
        at = argv.index("--output-dir")
        evaluate.main(argv[:at] + argv[at + 2 :])
        return Path(capsys.readouterr().out.rpartition("tables and figures: ")[2].strip())

    images = ["--data", str(bench.root / "images" / "val"), "--size", "16"]
    tree = bench.root / "tree"
    (tree / "fog").mkdir(parents=True)
    (tree / "settings.json").write_text('{"size": 16}')
    for severity in range(1, 6):
        (tree / "fog" / str(severity)).symlink_to(bench.root / "images" / "val")
    first = folder()
    assert first.parts[:-1] == ("runs", "evaluate") and first.name.startswith("standard-")
    others = {
        folder(models="mtlat"), folder(models="standard mtlat"), folder("--limit", "9"),
        folder("--size", "17"), folder("--seed", "1"), folder(*images, models="tinynets:net"),
        folder(*bench.surrogate, only="mi_fgsm_0.04"),
        folder("--imagenet-c", str(tree), only="fog"),
    }  # fmt: skip
    assert len(others | {first}) == 9
    assert folder(models="mtlat standard") in others
    assert folder("--imagenet-c", tree.name, only="fog") in others  # the same tree
    before = (first / "cells.jsonl").read_bytes()
    assert folder(only="rotation") == first == folder(only="fog")
    assert (first / "cells.jsonl").read_bytes().startswith(before)
    assert [cell["perturbation"] for cell in store.read_cells(first / "cells.jsonl")] == [
        "clean", "rotation", *["fog"] * 5
    ]  # fmt: skip


def test_cells_of_earlier_versions_are_kept(bench: Bench) -> None:
    """Check that cells which name their images by the fingerprint of both parts still count.

    Their images are squashed.
    """
    once = bench.run("--only", "fog", models="standard")
    path = bench.root / "out" / "cells.jsonl"
    cells = store.read_cells(path)
    assert {cell["data"] for cell in cells} == {bench.sets().test_fingerprint}
    path.unlink()
    for cell in cells:
        del cell["preprocess"]
    store.append_cells(path, [{**cell, "data": bench.sets().fingerprint} for cell in cells])
    again = bench.run("--only", "fog", models="standard")
    today = {key: once[0][key] for key in ("data", "preprocess")}
    assert [{**cell, **today} for cell in again] == once
    with pytest.raises(UserError, match=r"another run \(data: "):
        fresh = ["--cache-dir", str(bench.root / "fresh")]
        bench.run("--only", "fog", *fresh, models="standard")


@pytest.mark.parametrize("limit", ["12", "30"])
def test_the_outcomes_name_their_images(bench: Bench, limit: str) -> None:
    cells = bench.run("--only", "check_fgsm_0.04", "--limit", limit, models="standard")
    (model, _, _), root = bench.networks(), bench.root / "images" / "val"
    lines = (bench.root / "out" / "images.txt").read_text().splitlines()
    named = [line.split("\t") for line in lines]
    assert len(named) == int(limit)
    sets = bench.sets()
    places = [sets.paths.index(path) for path, *_ in named]
    predicted = model(sets.test.images[places].float() / 255).argmax(1)
    hits = [CLASSES[k] == name for k, (_, name, *_) in zip(predicted, named, strict=True)]
    assert all((root / path).parent.name == name for path, name, *_ in named)
    assert paired.unpack(cells[0]["hits"], cells[0]["n"]).tolist() == hits
    sample = [len(fields) == 3 and fields[2] == "sample" for fields in named]
    assert sum(sample) == cells[1]["n"] == 6
    x = sets.test.images[places][sample].float() / 255
    y = sets.test.labels[places][sample]
    right = model(pgd(model, x, y, steps=1, random_start=False)).argmax(1) == y
    assert paired.unpack(cells[1]["hits"], 6).tolist() == right.tolist()


def test_cells_of_other_images_are_refused(bench: Bench) -> None:
    """Check that cells which scored all files of --imagenet-c, as once, are not kept."""
    bench.run("--only", "fog", models="standard")
    path = bench.root / "out" / "cells.jsonl"
    cells = store.read_cells(path)
    path.unlink()
    store.append_cells(path, [*cells[:-1], {**cells[-1], "n": 300}])
    with pytest.raises(UserError, match=r"another run \(n: 300, now 30\)"):
        bench.run("--only", "fog", models="standard")


def test_other_weights_frost_or_models_are_another_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run("--only", "frost", models="standard vgg")
    with pytest.raises(UserError, match=r"another run .model: vgg"):
        bench.run("--only", "frost", models="standard mtlat")
    monkeypatch.setattr(evaluate, "frost_source", lambda: "/elsewhere")
    with pytest.raises(UserError, match="frost: procedural, now /elsewhere"):
        bench.run("--only", "frost", models="standard vgg")


class Branching(nn.Sequential):
    """A network whose forward pass torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_simplifying_leaves_the_logits_and_spares_layers() -> None:
    def layers() -> list[nn.Module]:
        return [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d((9, 7)),
                nn.Flatten(), nn.Dropout(), nn.Linear(252, 3)]  # fmt: skip

    x = torch.rand(5, 3, 8, 6)
    for kind in (nn.Sequential, Branching):
        model = kind(*layers())
        for _ in range(3):
            model(x + 1)  # so that the statistics are not the identity
        model.eval()
        subject = subjects.Subject("label", model, "digest")
        assert subjects.fuse_subject(subject, x)[::2] == ("label", "digest")
        simple = subjects.fuse_subject(subject, x).module
        assert_close(simple(x), model(x))
        found = [
            m for m in simple.modules() if isinstance(m, nn.BatchNorm2d | nn.AdaptiveAvgPool2d)
        ]
        assert [type(m) for m in found] == ([nn.BatchNorm2d] if kind is Branching else [])
        weights = {p.shape for p in simple.parameters()}
        assert (3, 4 * 6 * 4) in weights and (3, 252) not in weights
        assert not any(p.requires_grad for p in simple.parameters())
        assert any(isinstance(m, nn.AdaptiveAvgPool2d) for m in model.modules())  # unchanged


def test_a_model_that_cannot_be_simplified_keeps_its_layers() -> None:
    model = Branching(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(5, 3, 8, 8)
    kept = subjects.fuse_subject(subjects.Subject("", model, ""), x).module
    assert [type(layer) for layer in kept.children()] == [type(layer) for layer in model]
    assert_close(kept(x), model(x))


class Crossing(nn.Sequential):
    """A network in which not only the Linear layer uses the pooled pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self[0](x).sum((1, 2, 3))[:, None]


@pytest.mark.parametrize(("kind", "side"), [(nn.Sequential, 4), (nn.Sequential, 9), (Crossing, 12)])
def test_a_pooling_whose_pixels_are_needed_stays(kind: type[nn.Sequential], side: int) -> None:
    model = kind(nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(3 * side**2, 3)).eval()
    simple = subjects.fuse_subject(subjects.Subject("", model, ""), torch.rand(2, 3, 9, 9)).module
    assert any(isinstance(m, nn.AdaptiveAvgPool2d) for m in simple.modules())


def test_a_limited_run_knows_the_least_likely_class_of_its_own_images(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = []

    def spy(_: Any, x: Tensor, y: Tensor, *, target: Tensor, **settings: Any) -> Tensor:
        targets.append(target)
        return x

    monkeypatch.setattr(measure, "pgd_ll", spy)
    replace_attack(monkeypatch, "pgd_ll_0.04", spy)
    options = ["--only", "pgd_ll_0.04", "--skip", "checks", "--dump-images", "0", "--limit", "12"]
    bench.run(*options, models="standard")
    (model, _, _), sets = bench.networks(), bench.sets()
    chosen = measure.choose_images(sets.test.labels, 12, 0)
    expected = model(sets.test.images[chosen].float() / 255).argmin(1)
    assert torch.equal(torch.cat(targets), expected)


class Blind(nn.Module):
    """A model that predicts class 0, of which dark images have a NaN."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.mean((1, 2, 3))
        return torch.stack([torch.where(level < 0.1, float("nan"), level), level / 2], 1)


def test_cw2_takes_no_image_whose_logits_are_nan() -> None:
    x, y = torch.full((3, 3, 4, 4), 0.5), torch.tensor([0, 0, 1])
    x[0] = 0
    blind = subjects.Subject("blind", Blind().eval(), "")
    images, found = measure._perturb_cw2(blind, x, y, {"steps": 2})
    assert found["right"].tolist() == [False, True, False] and len(found["reached"]) == 1
    assert torch.equal(images[[0, 2]], x[[0, 2]])


def test_a_median_step_counts_the_images_that_no_step_fools() -> None:
    assert measure._summarize(torch.tensor([0.5, 1.0, 2.0, torch.inf])) == 1.0
    assert measure._summarize(torch.tensor([0.5, torch.inf, torch.inf])) is None
    assert measure._summarize(torch.tensor([0.5, torch.nan, 1.0, 2.0])) == 1.0


def test_a_model_that_names_the_largest_class_is_no_better_than_chance(bench: Bench) -> None:
    """Check a test set of unequal classes, in which such a model is often right."""
    images = bench.root / "unequal" / "test"
    for name, count in (("blue", 8), ("green", 1), ("red", 1)):
        (images / name).mkdir(parents=True)
        for i in range(count):
            shutil.copy(bench.root / "images" / "val" / name / f"{i}.png", images / name)
    options = ["--data", str(images.parent), "--size", "16", "--only", "clean"]
    for limit, share in (("10", "80.0"), ("3", "33.3")):  # 3: one image of each class
        bench.run(*options, "--limit", limit, models="tinynets:Blue", out=limit)
        notes = (bench.root / limit / "results.md").read_text()
        assert f"Blue is not significantly above chance ({share} %, the share of the larg" in notes
