"""evaluate.py and cells.py: the benchmark on networks of one layer and images of 16 pixels."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import cells
import data
import evaluate
import figures
from attacks import ATTACKS, cw2_result, mi_fgsm, pgd, pgd_ll
from common import UserError, save_checkpoint
from corruptions import CORRUPTIONS, Stream, corrupt
from sanity import CHECKS

CLASSES = ["blue", "green", "red"]
SIDE = 16
NETS = '''
import torch
from torch import nn

class Net(nn.Sequential):
    """Linear in the means of patches: class k for much of colour 2 - k, with noise in it."""

    def __init__(self, num_classes, seed=0, sharp=20.0):
        layer = nn.Linear(48, num_classes)
        super().__init__(nn.AvgPool2d(4), nn.Flatten(), layer)
        pattern = torch.eye(3).flip(0).repeat_interleave(16, 1)[:num_classes]
        noise = torch.randn(3, 48, generator=torch.Generator().manual_seed(seed))[:num_classes]
        layer.weight.data = sharp / 16 * (pattern + 0.3 * noise)
        layer.bias.data.zero_()

def net(num_classes): return Net(num_classes)
def four(num_classes): return Net(num_classes, 4)
class Stuck(Net):
    def train(self, mode=True): return super().train(True)
class Noisy(Net):
    def forward(self, x): return super().forward(x) + torch.rand(len(x), 3)
class Broken(Net):
    def forward(self, x): return super().forward(x) / 0
class Soft(Net):
    def forward(self, x): return super().forward(x).softmax(1)
class Flat(Net):
    def forward(self, x): return super().forward(x.detach().round()) + 0 * x.sum()
class Two(Net):
    def forward(self, x): return super().forward(x)[:, :2]
class Pair(Net):
    def forward(self, x): return super().forward(x), x
class Big(Net):
    def forward(self, x): return super().forward(x.view(len(x), 3, 99, 99))
'''


class Bench:
    """A folder with images, checkpoints and network code, where evaluate.py runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tinynets.py").write_text(NETS)
        random = np.random.RandomState(0)
        for part, count in (("train", 1), ("val", 10)):
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    pixels = random.randint(60, 196, (SIDE, SIDE, 3)) + random.randint(-30, 30, 3)
                    pixels[..., 2 - label] += 35
                    path = root / "images" / part / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        sets = self.sets()
        for name, seed, sharp in (("standard", 0, 20.0), ("mtlat", 1, 4.0), ("vgg", 2, 20.0)):
            self.checkpoint(name, sets.fingerprint, seed, sharp)

    def sets(self) -> data.Data:
        return data.load(str(self.root / "images"), size=SIDE, cache_dir=self.root / "cache")

    def checkpoint(
        self, name: str, fingerprint: str, seed: int, sharp: float, **changes: Any
    ) -> str:
        import tinynets  # type: ignore[import-not-found]

        path = self.root / name / "last.pt"
        path.parent.mkdir(exist_ok=True)
        settings = {"data": str(self.root / "images"), "classes": None, "seed": 0}
        settings |= {"skip_bad_images": False}
        content = {
            "arch": "tinynets:net", "normalize": None, "classes": CLASSES, "size": SIDE,
            "fingerprint": fingerprint, "settings": settings,
            "model": tinynets.Net(3, seed, sharp).state_dict(), "log": [],
            "optimizer": {}, "scaler": {},
        }  # fmt: skip
        save_checkpoint([path], **(content | changes))
        return str(path)

    def argv(self, *options: str, out: str = "out", models: str = "standard mtlat") -> list[str]:
        named = [str(self.root / m / "last.pt") if ":" not in m else m for m in models.split()]
        fixed = ["--cache-dir", str(self.root / "cache"), "--device", "cpu"]
        return [*named, *fixed, "--output-dir", str(self.root / out), *options]

    def run(self, *options: str, out: str = "out", models: str = "standard mtlat") -> list[Any]:
        """Evaluate, and give the lines without what differs from run to run."""
        evaluate.main(self.argv(*options, out=out, models=models))
        return self.lines(out)

    def lines(self, out: str) -> list[Any]:
        lines = cells.read_cells(self.root / out / "cells.jsonl")
        vague = {"seconds", "seconds_making", "versions"}
        return [{k: v for k, v in line.items() if k not in vague} for line in lines]

    def results(self, out: str = "out") -> Any:
        return json.loads((self.root / out / "results.json").read_text())

    @property
    def surrogate(self) -> list[str]:
        return ["--surrogate", str(self.root / "vgg" / "last.pt")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost such small images a hundred times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    sys.path.insert(0, str(root))
    return Bench(root)


@pytest.fixture
def bench(shared: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The shared bench with an output folder of the test's own, and without figures."""
    for name in ("draw_robustness", "draw_severities", "draw_images"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(cells, "SAMPLE", 6)
    copy = object.__new__(Bench)
    copy.root = tmp_path
    for entry in shared.root.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return copy


def models(bench: Bench) -> tuple[Any, Any, Any, data.Data]:
    import tinynets

    sets = bench.sets()
    return *(tinynets.Net(3, k, sharp) for k, sharp in enumerate((20.0, 4.0, 20.0))), sets


def by_cell(lines: list[Any], model: str) -> dict[tuple[str, int | None], Any]:
    return {(x["perturbation"], x["severity"]): x for x in lines if x["label"] == model}


# ---------------------------------------------------------------------------- the numbers


def test_all_cells_against_one_image_at_a_time(bench: Bench) -> None:
    """Every count is what a loop over the images gives, whatever batch evaluate.py takes."""
    lines = bench.run("--batch-size", "7", "--seed", "3", *bench.surrogate)
    standard, mtlat, vgg, sets = models(bench)
    cells_of = {name: by_cell(lines, name) for name in ("standard", "mtlat")}
    assert len(lines) == 2 * (1 + 5 * 19 + 5 + 1 + len(CHECKS))

    def start(name: str, number: int) -> Tensor:
        return Stream(3, name, None, torch.tensor([number])).uniform(3, SIDE, SIDE) * 2 - 1

    images, labels = sets.test.images, sets.test.labels
    count: dict[str, Any] = {name: dict.fromkeys(table, 0) for name, table in cells_of.items()}
    alone = {(kind, 5) for kind in ("gaussian_noise", "fog", "jpeg_compression", "rotation")}
    for kind in CORRUPTIONS:
        for severity in range(1, 6):
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
            if key[0].startswith("check_"):
                assert line["n"] == 6
            else:
                assert (line["correct"], line["n"]) == (count[name][key], 30), key
    # The toy is no constant: something is hurt by noise, and by attacks, and not everything is.
    assert len({x["correct"] for x in lines}) > 8
    scores = bench.results()["rows"][1]["scores"]
    counts = [count["mtlat"]["fog", severity] for severity in range(1, 6)]
    ratio = sum(counts) / 5 / count["mtlat"]["clean", None]
    assert scores["fog"]["robustness"] == pytest.approx(ratio)


def test_checks_take_a_few_images_and_their_own_attacks(bench: Bench) -> None:
    table = by_cell(bench.run("--only", "pgd_0.04", models="mtlat"), "mtlat")
    _, model, _, sets = models(bench)
    few = cells.choose_images(sets.test.labels, 6, 0)
    x, y = sets.test.images[few].float() / 255, sets.test.labels[few]

    def start(name: str, runs: int) -> Tensor:
        stream = Stream(0, f"check_{name}", None, few)
        return (stream.uniform(runs, 3, SIDE, SIDE) * 2 - 1).transpose(0, 1)

    trials: list[tuple[str, dict[str, Any]]] = [
        ("pgd_0.02", {"epsilon": 0.02}), ("fgsm_0.04", {"steps": 1, "random_start": False}),
        ("pgd_0.04_50_steps", {"steps": 50}), ("pgd_0.04_5_restarts", {"restarts": 5}),
    ]  # fmt: skip
    for name, settings in trials:
        runs = settings.get("restarts", 1)
        if "random_start" not in settings:
            settings["start"] = start(name, runs).squeeze(0)
        x_adv = pgd(model, x, y, **settings)
        assert table[f"check_{name}", None]["correct"] == int((model(x_adv).argmax(1) == y).sum())
    assert table["check_clean", None]["broken"] == 0
    assert table["check_pgd_0", None]["correct"] == table["check_clean", None]["correct"]


def test_cw2_in_one_round_reaches_whom_nine_rounds_reach(bench: Bench) -> None:
    line = by_cell(bench.run("--only", "cw2", "--skip", "checks"), "standard")["cw2", None]
    model, _, _, sets = models(bench)
    x, y = sets.test.images.float() / 255, sets.test.labels
    for confidence in (50.0, 10.0):
        nine = cw2_result(model, x, y, confidence=confidence)
        one = cw2_result(model, x, y, confidence=confidence, rounds=1)
        assert torch.equal(nine.reached, one.reached)
        assert torch.equal(model(nine.x_adv).argmax(1) == y, model(one.x_adv).argmax(1) == y)
        assert 0 < int(one.reached.sum()) or confidence == 50
    one = cw2_result(model, x, y, rounds=1)
    assert line["reached"] == int(one.reached.sum())
    assert line["misclassified"] == int(one.misclassified.sum())
    assert line["margin"] == pytest.approx(one.margin.median().item(), abs=1e-4)


def test_the_supplement_is_the_smallest_adversarial_step(bench: Bench) -> None:
    table = by_cell(bench.run("--only", "supplement", models="standard"), "standard")
    model, _, _, sets = models(bench)
    few = cells.choose_images(sets.test.labels, 6, 0)
    x, y = sets.test.images[few].float() / 255, sets.test.labels[few]
    result = cw2_result(model, x, y, confidence=0.0)
    assert table["cw2_0", None]["l2"] == pytest.approx(result.l2[result.reached].median().item())
    assert "cw2_0" not in evaluate.choose_cells([], [])


def test_images_are_made_once_for_all_models(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def corrupting(images: Tensor, name: str, severity: int, **settings: Any) -> Tensor:
        made.append((name, severity))
        return corrupt(images, name, severity, **settings)

    monkeypatch.setattr(cells, "corrupt", corrupting)
    attack = ATTACKS["mi_fgsm_0.04"]

    def spy(*args: Any, **settings: Any) -> Tensor:
        made.append(("mi_fgsm", 0))
        return attack.function(*args, **settings)

    monkeypatch.setitem(cells.GRADIENT, "mi_fgsm_0.04", attack._replace(function=spy))
    bench.run("--only", "fog", "mi_fgsm_0.04", "-b", "20", "--dump-images", "0", *bench.surrogate)
    assert sorted(made) == sorted([*(("fog", s) for s in range(1, 6)), ("mi_fgsm", 0)] * 2)


def test_clean_logits_give_the_least_likely_class(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known from the clean cell, or, where an earlier run measured that, found anew: no matter."""
    targets = []
    attack = ATTACKS["pgd_ll_0.04"]

    def spy(*args: Any, target: Tensor | None = None, **settings: Any) -> Tensor:
        targets.append(target)
        return pgd_ll(*args, target=target, **settings)

    monkeypatch.setattr(cells, "pgd_ll", spy)
    monkeypatch.setitem(cells.GRADIENT, "pgd_ll_0.04", attack._replace(function=spy))
    once = bench.run("--only", "pgd_ll_0.04", "--skip", "checks", out="once")
    bench.run("--only", "fog", out="twice")
    assert bench.run("--only", "pgd_ll_0.04", "--skip", "checks", out="twice")[-2:] == once[-2:]
    assert [target is None for target in targets] == [False, False, True, True] or targets


# ---------------------------------------------------------------------------- going on


def test_killed_and_started_again(bench: Bench) -> None:
    """SIGKILL in the middle, a torn last line: the same cells to the bit, none measured twice."""
    options = ["--only", "noise", "white-box", "--dump-images", "0", "--limit", "24"]
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


def test_a_model_can_be_added_to_finished_results(bench: Bench) -> None:
    one = bench.run("--only", "fog", models="standard")
    both = bench.run("--only", "fog", models="standard mtlat")
    assert both[: len(one)] == one
    assert {x["label"] for x in both[len(one) :]} == {"mtlat"}
    assert both == one + bench.run("--only", "fog", models="mtlat", out="alone")


def test_a_damaged_line_is_named(bench: Bench) -> None:
    bench.run("--only", "fog")
    path = bench.root / "out" / "cells.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-9], *lines[3:]]) + "\n")
    with pytest.raises(UserError, match="line 3 is damaged"):
        bench.run("--only", "fog")


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


def test_other_weights_frost_or_models_are_another_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run("--only", "frost", models="standard vgg")
    with pytest.raises(UserError, match=r"another run .model: vgg"):
        bench.run("--only", "frost", models="standard mtlat")
    monkeypatch.setattr(evaluate, "frost_source", lambda: "/elsewhere")
    with pytest.raises(UserError, match="frost: procedural, now /elsewhere"):
        bench.run("--only", "frost", models="standard vgg")


# ---------------------------------------------------------------------------- which cells


def test_cells_are_named_by_name_and_by_group() -> None:
    choose = evaluate.choose_cells
    every = choose([], [])
    assert every[0] == "clean" and len(every) == len(set(every)) == 1 + 19 + 5 + 1 + len(CHECKS)
    assert choose(["blur"], []) == ["clean", *(n for n in CORRUPTIONS if n.endswith("blur"))]
    assert choose(["pgd_0.04"], ["checks"]) == ["clean", "pgd_0.04"]
    assert set(choose(["cw2"], [])) == {"clean", "cw2", *cells.GROUPS["checks"]}
    assert choose(["mi_fgsm_0.08", "fog"], []) == ["clean", "fog", "mi_fgsm_0.08"]
    others = [group for group in cells.GROUPS if group != "noise"]
    assert choose([], others) == choose(["noise"], [])
    assert choose(["noise"], ["shot_noise"]) == ["clean", "gaussian_noise", "impulse_noise"]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 99))
def test_the_subset_has_as_many_of_each_class_as_can_be(
    labels: list[int], limit: int, seed: int
) -> None:
    y = torch.tensor(labels)
    chosen = cells.choose_images(y, limit, seed)
    assert len(chosen) == min(limit, len(y)) and sorted(set(chosen.tolist())) == chosen.tolist()
    had, taken = torch.bincount(y, minlength=5), torch.bincount(y[chosen], minlength=5)
    assert bool((taken <= had).all())
    most = int(taken.max())
    assert bool(((taken >= most - 1) | (taken == had)).all())
    assert torch.equal(chosen, cells.choose_images(y, limit, seed))


def test_the_subset_is_drawn_with_the_seed() -> None:
    y = torch.arange(300) % 3
    first, second = (cells.choose_images(y, 100, seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    # The place that is left over goes to no class in particular.
    assert (
        len({int(torch.bincount(y[cells.choose_images(y, 100, s)]).argmax()) for s in range(20)})
        == 3
    )


def test_a_limited_run_scores_the_same_images_as_the_whole(bench: Bench) -> None:
    options = ["--only", "gaussian_noise", "pgd_0.04", "--skip", "checks", "--save-predictions"]
    bench.run(*options, out="whole")
    lines = bench.run(*options, "--limit", "12", out="few")
    chosen = cells.choose_images(bench.sets().test.labels, 12, 0).numpy()
    assert {(x["n"], x["total"], x["limit"]) for x in lines} == {(12, 30, 12)}
    for x in lines:
        name = x["perturbation"] + (f"_{x['severity']}" if x["severity"] else "")
        few, whole = (
            np.load(bench.root / out / "predictions" / x["model"] / f"{name}.npy")
            for out in ("few", "whole")
        )
        assert few.dtype == bool and few.tolist() == whole[chosen].tolist()
        assert x["correct"] == few.sum()
    for file in ("results.json", "results.md", "results.tex"):
        assert "12 images, as many of each class" in (bench.root / "few" / file).read_text()
    assert bench.run(*options, "--limit", "30", out="whole")[0]["limit"] is None


def test_predictions_asked_for_later_are_made_later(bench: Bench) -> None:
    once = bench.run("--only", "fog")
    assert not (bench.root / "out" / "predictions").exists()
    twice = bench.run("--only", "fog", "--save-predictions")
    assert twice == 2 * once
    assert len(list((bench.root / "out" / "predictions").glob("*/*.npy"))) == len(once)
    assert bench.run("--only", "fog", "--save-predictions") == twice


@pytest.mark.parametrize("layout", ["{name}", "noise/{name}"])
def test_official_files_give_what_was_written(bench: Bench, layout: str) -> None:
    """The corrupted images as files: the same counts as made by the batch, and only these names."""
    sets = bench.sets()
    for severity in range(1, 6):
        images = corrupt(sets.test.images, "shot_noise", severity, seed=0)
        folder = bench.root / "c" / layout.format(name="shot_noise") / str(severity)
        for i, (image, label) in enumerate(zip(images, sets.test.labels, strict=True)):
            path = folder / CLASSES[label] / f"{i % 10}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        (folder / "purple").mkdir()  # a class that the data has not
    options = ["--only", "shot_noise", "fog", "--limit", "15", "-b", "4", "--dump-images", "1"]
    made = bench.run(*options, out="made")
    official = bench.run(*options, "--imagenet-c", str(bench.root / "c"), out="read")
    for ours, theirs in zip(made, official, strict=True):
        none, source = ours.pop("imagenet_c"), theirs.pop("imagenet_c") or ""
        assert ours == theirs and none is None
        assert source.endswith("shot_noise") == (ours["perturbation"] == "shot_noise")
    with pytest.raises(UserError, match=r"imagenet_c: None, now .*shot_noise"):
        bench.run(*options, "--imagenet-c", str(bench.root / "c"), out="made")
    last = bench.root / "c" / layout.format(name="shot_noise") / "5"
    (last / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"red.0.png: not a readable image.*fetch the file again"):
        bench.run("--only", "shot_noise", "--imagenet-c", str(bench.root / "c"), out="broken")
    last.rename(last.with_name("6"))
    with pytest.raises(
        UserError, match=r"5 has no images of class 'blue'.*DIR/corruption/severity"
    ):
        bench.run("--only", "shot_noise", "--imagenet-c", str(bench.root / "c"), out="broken")


# ---------------------------------------------------------------------------- models


def test_torchvisions_models_with_their_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: state)
    options = ["--data", str(bench.root / "images"), "--size", "32", "--weights", "DEFAULT"]
    with pytest.raises(UserError, match=r"gives \(16, 1000\); .* data's 3 classes"):
        bench.run(*options, models="torchvision:squeezenet1_1")
    with pytest.raises(UserError, match="no such file, nor weights of torchvision's"):
        bench.run(*options[:-1], "V9", models="torchvision:squeezenet1_1")
    monkeypatch.setattr(evaluate, "inspect", lambda *_: [])
    lines = bench.run(
        *options, "--only", "fog", "--dump-images", "0", models="torchvision:squeezenet1_1"
    )
    assert {line["label"] for line in lines} == {"torchvision:squeezenet1_1"}


def test_own_models_and_their_normalisation(bench: Bench) -> None:
    data_of = ["--data", str(bench.root / "images"), "--size", "16", "--only", "brightness"]
    plain = bench.run(*data_of, models="tinynets:net standard")
    rows = bench.results()["rows"]
    assert len(plain) == 6 and rows[0]["scores"] == rows[1]["scores"]  # the same weights: once
    shift = ["--mean", "0.9", "0.5", "0", "--std", "1", "2", "1"]
    with pytest.raises(UserError, match="another run"):
        bench.run(*data_of, *shift, models="tinynets:net mtlat")
    bench.run(*data_of, *shift, out="shifted", models="tinynets:net standard")
    shifted = bench.results("shifted")["rows"]
    accuracy = [row["scores"]["clean"]["accuracy"] for row in (*rows, *shifted)]
    assert accuracy[0] == accuracy[1] == accuracy[3] != accuracy[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Stuck", "does not obey eval"), ("Noisy", "other logits for the same images again"),
        ("Broken", "not finite"), ("Two", r"gives \(16, 2\).*data's 3 classes"),
        ("Pair", "gives tuple; "), ("Big", r"fails on images \(16, 3, 16, 16\)"),
    ],
)  # fmt: skip
def test_models_whose_numbers_would_mean_nothing_are_refused(
    bench: Bench, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=f"^tinynets:{name} .*{message}|^tinynets:{name} {message}"):
        bench.run(models=f"standard tinynets:{name}")
    assert not (bench.root / "out").exists()


def test_models_that_attacks_may_fail_on_are_marked(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run("--only", "brightness", models="standard tinynets:Soft tinynets:Flat")
    said = capsys.readouterr()
    for text in (said.err, said.out, (bench.root / "out" / "results.md").read_text()):
        assert "tinynets:Soft gives probabilities, not logits" in text
        assert "tinynets:Flat: the gradient is zero or NaN for 16 of the first 16 images" in text
        assert "standard gives" not in text


def test_checkpoints_that_may_have_seen_the_test_images_are_marked(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.checkpoint("foreign", "0123", 3, 20.0)
    bench.checkpoint("larger", bench.sets().fingerprint, 3, 20.0, size=64)
    bench.run("--only", "brightness", "--size", "16", models="standard foreign larger")
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["foreign", "larger"]
    assert all("may have seen test images" in line for line in said)
    bench.run("--only", "fog", "--surrogate", bench.argv(models="standard")[0], out="same")
    assert "standard is the surrogate" in capsys.readouterr().err


def test_rows_are_named_by_folder_unless_two_share_it(bench: Bench) -> None:
    label = evaluate.parse_args(bench.argv()).labels
    assert list(label.values()) == ["standard", "mtlat"]
    (bench.root / "other").mkdir()
    (bench.root / "other" / "mtlat").symlink_to(bench.root / "mtlat")
    label = evaluate.parse_args(bench.argv(models="mtlat other/mtlat tinynets:net")).labels
    assert list(label) == list(label.values())


# ---------------------------------------------------------------------------- the command line


def test_baseline_seed_and_images_change_what_they_say(bench: Bench) -> None:
    first = bench.run("--only", "gaussian_noise", "pgd_0.04", out="a")
    bench.run("--only", "gaussian_noise", "pgd_0.04", "--baseline", "mtlat", out="b")
    signs = {
        out: [
            "".join(s["sign"] for s in row["scores"].values()) for row in bench.results(out)["rows"]
        ]
        for out in "ab"
    }
    assert signs["a"][1] and signs["a"] == ["", signs["b"][0].translate(str.maketrans("+-", "-+"))]
    other = bench.run("--only", "gaussian_noise", "--seed", "1", "--save-predictions", out="c")
    assert [x["seed"] for x in other] == [1] * len(other) != [x["seed"] for x in first]
    bench.run("--only", "gaussian_noise", "--save-predictions", out="a")
    files = [sorted((bench.root / out / "predictions").glob("*/*.npy")) for out in "ac"]
    assert any(np.load(p).tolist() != np.load(q).tolist() for p, q in zip(*files, strict=True))


def test_pictures_are_drawn_of_every_perturbation(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[Any] = []
    monkeypatch.setattr(figures, "draw_images", lambda drawn, path: sheets.append((drawn, path)))
    bench.run("--skip", "checks", "--dump-images", "2", *bench.surrogate, models="standard")
    ((drawn, path),) = sheets
    assert path == bench.root / "out" / "images.png" and len(drawn) == 2
    model, _, vgg, sets = models(bench)
    numbers = cells.choose_images(sets.test.labels, 2, 0)
    for sheet, number in zip(drawn, numbers.tolist(), strict=True):
        image, y = sets.test.images[number : number + 1], sets.test.labels[number : number + 1]
        tiles = dict(zip(["clean", *CORRUPTIONS, *ATTACKS], sheet, strict=True))
        expected = {
            "clean": image.float() / 255,
            "fog": corrupt(image, "fog", 3, index=[number]).float() / 255,
            "mi_fgsm_0.08": mi_fgsm(vgg, image.float() / 255, y, epsilon=0.08),
        }
        for name, picture in expected.items():
            assert torch.allclose(tiles[name].image, picture[0])
            guess = int(model(picture).argmax(1))
            assert tiles[name].predicted == CLASSES[guess] and tiles[name].right == (guess == y)
        titles = [tiles[name].title for name in ("clean", "fog", "mi_fgsm_0.08")]
        assert titles == [f"clean: {CLASSES[y]}", "Fog 3", "MI-FGSM 0.08"]
    bench.run("--skip", "checks", "--dump-images", "0", *bench.surrogate, models="standard")
    assert len(sheets) == 1


def test_without_a_surrogate_black_boxes_are_left_out_and_said_to_be(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = bench.run("--only", "pgd_0.04", "black-box", "--skip", "checks")
    assert {x["perturbation"] for x in lines} == {"clean", "pgd_0.04"}
    assert "the black-box attacks are left out: they need --surrogate" in capsys.readouterr().out


def test_other_classes_are_refused(bench: Bench) -> None:
    fingerprint = bench.sets().fingerprint
    bench.checkpoint("renamed", fingerprint, 0, 20.0, classes=["blue", "green", "pink"])
    bench.checkpoint("fewer", fingerprint, 0, 20.0, classes=["blue", "green"])
    for name, count in (("renamed", 3), ("fewer", 2)):
        other = str(bench.root / name / "last.pt")
        message = rf"{name}.last.pt was trained on other classes \({count}: blue green"
        with pytest.raises(UserError, match=message):
            bench.run(models=f"standard {name}")
        with pytest.raises(UserError, match=message):
            bench.run("--surrogate", other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "fogg"], "no perturbation or group is called 'fogg'; close: fog"),
        (["--skip", "wether"], "close: weather"), (["--only", "zz"], "close: noise, blur, weather"),
        (["--only", "fog", "--skip", "weather"], "leave nothing to measure"),
        (["--baseline", "best"], "--baseline best is none of the models: standard, mtlat"),
        (["--weights", "DEFAULT"], "torchvision:ARCH and --weights NAME need each other"),
        (["--mean", "0", "0", "0"], "--mean and --std need each other"),
        (["--mean", "0", "0", "0", "--std", "1", "1", "1"], "are for module:callable"),
        (["--imagenet-c", "nowhere"], "--imagenet-c nowhere: no such folder"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--surrogate", "nowhere/last.pt"], "nowhere/last.pt: No such file"),
        (["--surrogate", __file__], "is no checkpoint of train.py"),
        (["--device", "abacus"], "--device abacus: "), (["--limit", "0"], "out of range: from 1"),
        (["--size", "15"], "out of range: from 16"), (["--batch-size", "x"], "'x' is no int"),
        (["--std", "0", "1", "1"], "out of range: above 0"), (["--dump-images", "-1"], "from 0"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_in_one_line(bench: Bench, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        bench.run(*options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (bench.root / "out").exists()


def test_more_wrong_usage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a model is named twice"):
        bench.run(models="standard standard")
    with pytest.raises(UserError, match="--data is missing"):
        bench.run(models="tinynets:net")
    with pytest.raises(UserError, match=r"--weights .* name the checkpoint itself as a model"):
        bench.run("--weights", __file__, models="torchvision:resnet18")
    with pytest.raises(UserError, match="need each other"):
        bench.run(models="torchvision:resnet18")
    small = bench.checkpoint("small", "0", 0, 20.0, size=12)
    with pytest.raises(UserError, match="--size 12: the corruptions need images of 16 px or more"):
        evaluate.main([small, *bench.argv(models="")])
    empty = bench.root / "empty"
    for part in ("train", "val"):
        for name in CLASSES:
            (empty / part / name).mkdir(parents=True)
    with pytest.raises(UserError, match="has no image for the train part"):
        bench.run("--data", str(empty))
    monkeypatch.setenv("MTLAT_FROST_DIR", str(bench.root / "empty"))
    with pytest.raises(UserError, match=r"^frost: "):
        bench.run()


def test_the_script_prints_one_line_and_exits_with_2(bench: Bench) -> None:
    script = [sys.executable, str(Path(evaluate.__file__)), "nowhere.pt"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: nowhere.pt: No such file or directory\n"


def test_help_states_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = evaluate.build_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for action in parser._actions:
        assert action.dest in text.replace("-", "_")
    args = parser.parse_args(["model"])
    for name, value in vars(args).items():
        if isinstance(value, int | str) and name != "cache_dir":
            assert f"(default: {value})" in text, name
