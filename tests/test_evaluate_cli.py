"""Test the command line of evaluate.py: cells, images, models, options, and wrong usage."""

import pickle
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import evaluate
from attacks import mi_fgsm
from corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt
from harness.benchmark import config, measure, metrics, plots, registry, subjects
from harness.benchmark.attack_registry import ATTACKS
from harness.benchmark.checks import CHECKS
from harness.benchmark.fusion import fuse_for_inference
from harness.benchmark.paired import unpack
from harness.benchmark.store import append_cells, read_cells
from harness.checkpoints import FORMAT
from harness.errors import UserError
from harness.images.datasets import load_dataset
from harness.models import build_model, find_weights
from mtlat import Normalize
from tests.support.bench import CLASSES, Bench
from tests.support.tiny import Wrapped, image_folder, linear
from tests.support.world import Extra

# ---------------------------------------------------------------------------- choice of cells


def test_cells_are_named_by_name_and_by_group() -> None:
    choose = registry.choose_perturbations
    every = choose([], [])
    assert every[0] == "clean" and len(every) == len(set(every)) == 1 + 19 + 5 + 1 + 1 + len(CHECKS)
    assert choose(["clean"], []) == ["clean"]
    assert choose(["blur"], []) == ["clean", *(n for n in CORRUPTIONS if n.endswith("blur"))]
    assert choose(["pgd_0.04"], ["checks"]) == ["clean", "pgd_0.04"]
    assert set(choose(["cw2"], [])) == {
        "clean", "cw2", "cw2_0", *registry.GROUPS["checks"]
    }  # fmt: skip
    assert choose(["validation"], []) == ["clean", *VALIDATION_CORRUPTIONS]
    assert choose(["saturate", "fog"], []) == ["clean", "fog", "saturate"]
    assert choose(["mi_fgsm_0.08", "fog"], []) == ["clean", "fog", "mi_fgsm_0.08"]
    others = [group for group in registry.GROUPS if group != "noise"]
    assert choose([], others) == choose(["noise"], [])
    assert choose(["noise"], ["shot_noise"]) == ["clean", "gaussian_noise", "impulse_noise"]
    assert choose(["clean", "fog"], []) == ["clean", "fog"]


def test_checks_and_the_supplement_go_with_their_attacks() -> None:
    choose = registry.choose_perturbations
    checks = set(registry.GROUPS["checks"])
    assert not {*checks, "cw2_0"} & set(choose([], ["white-box"]))
    assert "cw2_0" not in choose([], ["cw2"]) and checks <= set(choose([], ["cw2"]))
    assert choose(["checks"], ["white-box"]) == ["clean", *registry.GROUPS["checks"]]
    assert choose(["supplement"], []) == ["clean", "cw2_0"]


@pytest.mark.parametrize(("only", "skip"), [
    ([], ["clean"]), (["fog"], ["clean"]), (["clean"], ["clean"]),
])  # fmt: skip
def test_clean_images_are_never_skipped(only: list[str], skip: list[str]) -> None:
    with pytest.raises(UserError, match="--skip clean: R is relative to clean accuracy"):
        registry.choose_perturbations(only, skip)


@pytest.mark.parametrize(("word", "advice"), [
    ("fogg", "close names: fog"), ("xyz", "groups: noise, blur, weather,"),
    ("pgd", "close names: pgd_0.04, pgd_ll_0.04,"), ("PGD LL", "close names: pgd_ll_0.04"),
    ("MI-FGSM", "close names: mi_fgsm_0.04, mi_fgsm_0.08"), ("CW2", "close names: cw2, cw2_0"),
    ("Obstru", "close names: occlusion"), ("jpeg", "close names: jpeg_compression"),
])  # fmt: skip
def test_unknown_names_are_refused_with_names_that_exist(word: str, advice: str) -> None:
    for arguments in (([word], []), (["fog"], [word])):
        with pytest.raises(UserError) as error:
            registry.choose_perturbations(*arguments)
        assert f"{word!r} is not a perturbation or a group; {advice}" in str(error.value)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 99))
def test_the_subset_has_as_many_of_each_class_as_can_be(
    labels: list[int], limit: int, seed: int
) -> None:
    y = torch.tensor(labels)
    chosen = measure.choose_images(y, limit, seed)
    assert len(chosen) == min(limit, len(y)) and sorted(set(chosen.tolist())) == chosen.tolist()
    had, taken = torch.bincount(y, minlength=5), torch.bincount(y[chosen], minlength=5)
    assert bool((taken <= had).all())
    most = int(taken.max())
    assert bool(((taken >= most - 1) | (taken == had)).all())
    assert torch.equal(chosen, measure.choose_images(y, limit, seed))


def test_the_subset_is_drawn_with_the_seed() -> None:
    y = torch.arange(300) % 3
    first, second = (measure.choose_images(y, 100, seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    # The one image that is left over is of a random class.
    assert (
        len({int(torch.bincount(y[measure.choose_images(y, 100, s)]).argmax()) for s in range(20)})
        == 3
    )


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a line of cells.jsonl is about."""
    return line["model"], line["perturbation"], line["severity"]


def test_a_limited_run_scores_the_same_images_as_the_whole(bench: Bench) -> None:
    options = ["--only", "gaussian_noise", "pgd_0.04", "--skip", "checks"]
    all_images = {key(x): x["hits"] for x in bench.run(*options, out="whole")}
    lines = bench.run(*options, "--limit", "12", out="few")
    chosen = measure.choose_images(bench.sets().test.labels, 12, 0).numpy()
    assert {(x["n"], x["total"], x["limit"]) for x in lines} == {(12, 30, 12)}
    for x in lines:
        few, whole = unpack(x["hits"], 12), unpack(all_images[key(x)], 30)
        assert few.tolist() == whole[chosen].tolist()
        assert x["correct"] == few.sum()
    for file in ("results.json", "results.md", "results.tex"):
        assert (
            "12 images, where possible equally many of each class"
            in (bench.root / "few" / file).read_text()
        )
    assert bench.run(*options, "--limit", "30", out="whole")[0]["limit"] is None


def test_a_folder_is_tested_whole_unless_a_checkpoint_held_out_a_part(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, settings = bench.root / "images" / "val", {"data": "elsewhere", "data_seed": 1}
    fingerprint = bench.sets().fingerprint
    bench.checkpoint("part", fingerprint, 0, 20.0, settings=settings | {"held_out": True})
    bench.checkpoint("split", fingerprint, 0, 20.0, settings=settings | {"held_out": False})
    for part in ("val", "test"):
        (bench.root / f"only-{part}").mkdir()
        (bench.root / f"only-{part}" / part).symlink_to(whole)
    cases = {
        "tinynets:net": (whole, 30, "all"), "part": (whole, 3, "a tenth, held out,"),
        "split": (whole, 30, "all"), "split part": (whole, 3, "a tenth, held out,"),
        "tinynets:four": (bench.root / "only-val", 30, "all"),
        "tinynets:net ": (bench.root / "only-test", 30, "all"),
    }  # fmt: skip
    for i, (models, (data, n, share)) in enumerate(cases.items()):
        options = ["--data", str(data), "--size", "16", "--only", "clean", "--dump-images", "0"]
        lines = bench.run(*options, models=models, out=f"whole{i}")
        assert {line["n"] for line in lines} == {n}
        folder = data if data == whole else data / data.name.removeprefix("only-")
        assert (
            f"{n} test images: {share} of {folder}; preprocessing: squash\n"
            in capsys.readouterr().out
        )
    # What an earlier version of train.py held out is not known: as if it were the tenth.
    old = bench.run("--data", str(whole), "--only", "clean", models="standard")
    assert {line["n"] for line in old} == {3}


@pytest.mark.parametrize("layout", ["{name}", "noise/{name}"])
def test_official_files_give_what_was_written(
    bench: Bench, layout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check --imagenet-c with files that contain our own corrupted images.

    The counts must be those of computed images. Only corruptions with a folder are read from files.
    """
    sets = bench.sets()
    for severity in range(1, 6):
        images = corrupt(sets.test.images, "shot_noise", severity, seed=0)
        folder = bench.root / "c" / layout.format(name="shot_noise") / str(severity)
        for i, (image, label) in enumerate(zip(images, sets.test.labels, strict=True)):
            path = folder / CLASSES[label] / f"{i % 10}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        (folder / "purple").mkdir()  # a class that is not in the dataset
        for name in CLASSES:  # images that are not in the test part
            for i in ("00", "a"):
                Image.new("RGB", (16, 16)).save(folder / name / f"{i}.png")
    (bench.root / "c" / "settings.json").write_text('{"size": 16}')
    options = ["--only", "shot_noise", "fog", "--limit", "15", "-b", "4", "--dump-images", "1"]
    made = bench.run(*options, out="made")
    sheets: list[Any] = []
    monkeypatch.setattr(plots, "plot_images", lambda drawn, _: sheets.append(drawn))
    official = bench.run(*options, "--imagenet-c", str(bench.root / "c"), out="read")
    (((clean, fog),),) = sheets  # the images of a tree are not read again
    assert clean.title.startswith("clean: ") and fog.title == "Fog 3"
    for ours, theirs in zip(made, official, strict=True):
        none, source = ours.pop("imagenet_c"), theirs.pop("imagenet_c") or ""
        assert ours == theirs and none is None
        assert source.endswith("shot_noise") == (ours["perturbation"] == "shot_noise")
    assert "computed here, and not read from --imagenet-c: fog" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no folder or .npy file of a corruption"):
        bench.run("--only", "fog", "--imagenet-c", str(bench.root / "c"), out="none")
    with pytest.raises(UserError, match=r"imagenet_c: None, now .*shot_noise"):
        bench.run(*options, "--imagenet-c", str(bench.root / "c"), out="made")
    monkeypatch.setenv("MTLAT_FROST_DIR", str(bench.root / "nowhere"))  # frost is in the tree
    place = layout.replace("noise", "weather").format(name="frost")
    shutil.copytree(bench.root / "c" / layout.format(name="shot_noise"), bench.root / "c" / place)
    frost = ["--only", "frost", "--imagenet-c", str(bench.root / "c")]
    whole = bench.run(*frost, out="frost")
    assert {cell["frost"] for cell in whole} == {None}
    cells = read_cells(path := bench.root / "frost" / "cells.jsonl")
    path.unlink()
    append_cells(path, [{**cell, "frost": "procedural"} for cell in cells])  # of earlier versions
    assert len(bench.run(*frost, out="frost")) == len(whole)
    last = bench.root / "c" / layout.format(name="shot_noise") / "5"
    (last / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"red.0.png: not a usable image.*fetch the file again"):
        bench.run("--only", "shot_noise", "--imagenet-c", str(bench.root / "c"), out="broken")
    (last / "red" / "0.png").unlink()
    with pytest.raises(UserError, match=r"5 lacks 1 of the 30 test images, such as red/0; the lay"):
        bench.run("--only", "shot_noise", "--imagenet-c", str(bench.root / "c"), out="broken")
    last.rename(last.with_name("6"))
    with pytest.raises(UserError, match=r"noise lacks the folder 5; .*DIR/corruption/sever"):
        bench.run("--only", "shot_noise", "--imagenet-c", str(bench.root / "c"), out="new")
    assert not (bench.root / "new").exists()  # nothing was measured before


def test_the_preprocessing_of_the_models_and_of_the_tree(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    (bench.root / "c" / "fog").mkdir(parents=True)  # without settings.json, as the published files
    tree = ["--imagenet-c", str(bench.root / "c")]
    with pytest.raises(UserError, match=r"last.pt expects the preprocessing squash, and --imagen"):
        bench.run("--only", "fog", *tree)
    fingerprint, data = bench.sets().fingerprint, str(bench.root / "images")
    bench.checkpoint(
        "cropped", fingerprint, 0, 20.0, settings={"data": data, "preprocess": "center-crop"}
    )
    with pytest.raises(UserError, match=r"cropped.last.pt expects the preprocessing center-crop"):
        bench.run(models="standard cropped")
    lines = bench.run("--only", "clean", models="cropped", out="own")
    other = bench.run("--only", "clean", "--preprocess", "squash", models="cropped", out="other")
    assert [x["preprocess"] for x in lines + other] == ["center-crop 18->16", "squash"]
    assert bench.results("own")["preprocess"] == "center-crop 18->16"
    assert "preprocessing: center-crop 18->16" in (bench.root / "own" / "results.md").read_text()
    assert lines[0]["data"] != other[0]["data"] == bench.sets().test_fingerprint
    assert "cropped expects the preprocessing center-crop, not squash" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"another run \(preprocess: squash, now center-crop 18->16"
    ):
        bench.run("--only", "clean", models="cropped", out="other")


@pytest.mark.parametrize("asked", [[], ["--preprocess", "squash"], ["--data", "shapes"]])
def test_arrays_are_refused_with_a_folder_before_anything_is_measured(
    bench: Bench, asked: list[str]
) -> None:
    (bench.root / "c").mkdir()
    (bench.root / "c" / "fog.npy").touch()
    with pytest.raises(UserError, match=r"fog.npy is scored with --data cifar10 or cifar100"):
        bench.run("--only", "fog", "--imagenet-c", str(bench.root / "c"), *asked, out="arrays")
    assert not (bench.root / "arrays").exists()


# ---------------------------------------------------------------------------- models


def test_torchvisions_models_with_their_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: state)
    options = ["--data", str(bench.root / "images"), "--size", "32", "--weights", "DEFAULT"]
    with pytest.raises(UserError, match=r"has 1000 outputs, and the dataset's 3 classes cannot"):
        bench.run(*options, models="torchvision:squeezenet1_1")
    with pytest.raises(UserError, match="no such file, and no such weights in torchvision"):
        bench.run(*options[:-1], "V9", models="torchvision:squeezenet1_1")
    names = bench.root / "names.txt"
    text = "".join(f"{CLASSES[i] if i < 3 else i}\n" for i in range(1000))
    names.write_text(text, "utf-8-sig")  # with a mark of the byte order, as Windows writes it
    options += ["--imagenet-classes", str(names)]
    lines = bench.run(
        *options, "--only", "fog", "--dump-images", "0", models="torchvision:squeezenet1_1"
    )
    assert {line["label"] for line in lines} == {"torchvision:squeezenet1_1"}
    assert {line["preprocess"] for line in lines} == {"center-crop 37->32"}
    resnet = config.parse_eval_config(["torchvision:resnet50", "--weights", "DEFAULT"])
    assert subjects.expected_images(resnet, {}) == {"torchvision:resnet50": (224, (232, 224))}


def same_scores(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two rows have the same scores, apart from signs and differences."""
    keys = ("accuracy", "robustness", "by_severity", "n")
    first, second = (
        {name: [score[key] for key in keys] for name, score in row["scores"].items()}
        for row in (one, other)
    )
    return first == second


def test_own_models_and_their_normalisation(bench: Bench) -> None:
    data_of = ["--data", str(bench.root / "images"), "--size", "16", "--only", "brightness"]
    plain = bench.run(*data_of, models="tinynets:net standard")
    rows = bench.results()["rows"]
    assert len(plain) == 6 and same_scores(*rows)  # measured once
    shift = ["--mean", "0.9", "0.5", "0", "--std", "1", "2", "1"]
    with pytest.raises(UserError, match="another run"):
        bench.run(*data_of, *shift, models="tinynets:net mtlat")
    # Its state dict holds more than tensors.
    assert bench.run(*data_of, out="extra", models="tests.support.world:Extra standard")
    bench.run(*data_of, *shift, out="shifted", models="tinynets:net standard")
    shifted = bench.results("shifted")["rows"]
    accuracy = [row["scores"]["clean"]["accuracy"] for row in (*rows, *shifted)]
    assert accuracy[0] == accuracy[1] == accuracy[3] != accuracy[2]


def test_a_plain_state_dict_is_evaluated_with_its_architecture(bench: Bench) -> None:
    state = bench.networks()[0].state_dict()
    path = bench.root / "plain.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    data_of = ["--data", str(bench.root / "images"), "--size", "16", "--only", "clean"]

    def run(*options: str, out: str) -> Any:
        argv = [str(path), *bench.argv(*data_of, *options, out=out, models="")]
        evaluate.main(argv)
        return bench.lines(out)[0]

    known = bench.run(*data_of, models="standard", out="known")[0]
    plain = run("--arch", "tinynets:net", out="plain")
    assert [plain[k] for k in ("n", "hits")] == [known[k] for k in ("n", "hits")]
    shift = ["--mean", "0.9", "0.5", "0", "--std", "1", "2", "1"]
    assert run("--arch", "tinynets:net", *shift, out="shifted")["hits"] != known["hits"]
    assert plain["label"] == "plain"
    options = ["--arch", "tinynets:net", *data_of]  # for the first model alone
    evaluate.main([str(path), *bench.argv(*options, out="both", models="mtlat")])
    assert [x["label"] for x in bench.lines("both")] == ["plain", "mtlat"]
    torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()}, path)
    assert run("--arch", "tinynets:net", out="compiled")["hits"] == known["hits"]
    with pytest.raises(UserError, match=r"plain.pth is a plain state dict: name its .* --arch"):
        run(out="none")
    with pytest.raises(
        UserError, match=r"does not fit --arch tiny:convnet .* 3 classes: its 0\.bi"
    ):
        run("--arch", "tiny:convnet", out="none")
    torch.save({k: v[:2] for k, v in state.items()}, path)
    with pytest.raises(UserError, match=r"3 classes: its 2.bias is \(2,\), and must be \(3,\)"):
        run("--arch", "tinynets:net", out="none")
    torch.save({"": torch.zeros(1), **state}, path)
    with pytest.raises(UserError, match=r"3 classes: its  is \(1,\), and must be missing"):
        run("--arch", "tinynets:net", out="none")
    with pytest.raises(UserError, match="--arch is for plain state dicts"):
        bench.run("--arch", "tinynets:net", models="standard")


@pytest.mark.parametrize(("options", "said"), [
    ("plain.pth --arch cnn4", "plain gets pixels in [0, 1] as they are: if its training norm"),
    ("plain.pth --arch cnn4 MEAN", ""), ("own.pth --arch tinynets:net", ""),
    ("tinynets:net", ""), ("tinynets:net MEAN", ""), ("tinynets:Normed", ""),
    ("tinynets:Normed MEAN", "tinynets:Normed has a layer with a mean of its own: if it normal"),
])  # fmt: skip
def test_a_normalization_that_is_missing_or_repeated_is_pointed_out(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str,
    said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(bench.root)
    torch.save(build_model("cnn4", 3).state_dict(), "plain.pth")
    torch.save(bench.networks()[0].state_dict(), "own.pth")
    argv = options.replace("MEAN", "--mean .5 .5 .5 --std .2 .2 .2").split()
    data_of = ["--data", str(bench.root / "images"), "--size", "16", "--only", "clean"]
    evaluate.main([*argv, *bench.argv(*data_of, models="")])
    warned = capsys.readouterr().err
    assert said in warned and bool(said) == ("--mean" in warned)


@pytest.mark.parametrize("mean", [None, [0.5] * 3])
def test_what_train_py_saved_has_the_right_normalization(mean: list[float] | None) -> None:
    twice = nn.Sequential(*(Normalize([0.5] * 3, [0.5] * 3) for _ in range(2)))
    loaded = {"a.pt": subjects.Subject("a", twice, "digest")}
    options: Any = SimpleNamespace(mean=mean, arch="cnn4")
    assert len(subjects.normalization_warnings(options, {"a.pt": {}}, loaded)) == 1
    assert not subjects.normalization_warnings(options, {"a.pt": {"format": FORMAT}}, loaded)


def test_a_model_of_more_classes_is_restricted_to_those_of_the_images(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(bench.root / "images"), "--size", "16", "--dump-images", "2"]
    attacks = ["--only", "brightness", "pgd_0.04", "pgd_ll_0.04", "cw2"]
    names = bench.root / "outputs.txt"
    names.write_text("white\nred\nblue\ngray\ngreen\n\n")  # a blank last line is no output
    known = ["--imagenet-classes", str(names)]
    bench.run(*options, *attacks, models="tinynets:net", out="few")
    bench.run(*options, *attacks, *known, models="tinynets:Many", out="many")
    (one,), (other,) = (bench.results(out)["rows"] for out in ("few", "many"))
    assert same_scores(one, other)
    said = "tinynets:Many has 5 outputs; only those of the 3 classes count"
    assert said in capsys.readouterr().err and said in bench.results("many")["notes"]
    clean = ["--only", "clean"]
    with pytest.raises(UserError, match=r"logits \(16, 3\): .* name its outputs by --imag"):
        bench.run(*options, *clean, models="tinynets:Many", out="unnamed")
    assert bench.run(*options, *clean, *known, models="standard tinynets:Many", out="beside")
    # Weights alone, and a surrogate.
    torch.save(bench.networks()[0].state_dict(), bench.root / "three.pt")
    with pytest.raises(UserError, match=r"with 5 classes: its 2.bias is \(3,\)"):
        argv = [str(bench.root / "three.pt"), *bench.argv(*options, *known, models="")]
        evaluate.main([*argv, "--arch", "tinynets:Linear5"])
    far = ["--only", "mi_fgsm_0.04", "--surrogate"]
    bench.run(*options, *far, "tinynets:net", models="tinynets:net", out="near")
    bench.run(*options, *far, "tinynets:Many", *known, models="tinynets:Many", out="far")
    (one,), (other,) = (bench.results(out)["rows"] for out in ("near", "far"))
    assert same_scores(one, other)

    wrong = {
        "white red blue": "^--imagenet-classes names 3 outputs, .* cannot be found among them: "
        "0 have the name 'green'; give",
        "red red blue green": "4 outputs, .*: 2 have the name 'red'; give --imagenet-classes FILE "
        "with a line for each output",
        "red blue green gray": "fails on .*: it has 5 outputs, and 4 have names",
    }
    for text, message in wrong.items():
        names.write_text(text.replace(" ", "\n"))
        with pytest.raises(UserError, match=message):
            bench.run(*options, *known, models="tinynets:Many", out="wrong")
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read"):
        bench.run(*options, "--imagenet-classes", "nowhere.txt", models="tinynets:Many")
    with pytest.raises(UserError, match=r"checkpoints of train.py know theirs"):
        bench.run(*known, models="standard")


def test_a_folder_behind_a_link_has_the_name_of_the_link(bench: Bench) -> None:
    (bench.root / "alias").symlink_to(bench.root / "standard")
    bench.run("--only", "clean", models="alias mtlat")
    assert [row["model"] for row in bench.results()["rows"]] == ["alias", "mtlat"]


def test_equal_layers_and_weights_of_other_code_are_another_model(bench: Bench) -> None:
    fixed = ["--data", str(bench.root / "images"), "--size", "16", "--only", "clean"]
    up, down = bench.run(*fixed, models="tinynets:up tinynets:down")
    assert up["model"] != down["model"] and up["correct"] > 20 > 10 > down["correct"]

    def digest(arch: str, state: dict[str, torch.Tensor]) -> str:
        torch.save(state, path := str(bench.root / "net.pt"))
        chosen = config.parse_eval_config([path, "--arch", arch, "--device", "cpu"])
        return subjects.load_subjects(chosen, CLASSES, {path: {"model": state}})[path].digest

    state = bench.networks()[0].state_dict()
    assert digest("tinynets:up", state) == up["model"] != digest("tinynets:down", state)
    state = torchvision.models.squeezenet1_1(num_classes=3).state_dict()
    assert digest("squeezenet1_1", state) == digest("torchvision:squeezenet1_1", state)


def test_a_model_is_the_same_in_the_next_process(bench: Bench) -> None:
    """Its weights may be random, and its repr may name the address of a function."""
    fixed = ["--data", str(bench.root / "images"), "--size", "16", "--only", "clean"]
    first, second = (bench.run(*fixed, models="tinynets:drawn", out=out) for out in "ab")
    assert [cell["model"] for cell in first] == [cell["model"] for cell in second]
    other = bench.run(*fixed, "--seed", "1", models="tinynets:drawn", out="c")
    assert other[0]["model"] != first[0]["model"]


class Buffers(torch.nn.Module):
    """A network with weights that its repr does not name."""

    def __init__(self, **weights: torch.Tensor) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name, value)


def test_equal_weights_of_other_names_are_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = torch.zeros(3), torch.ones(3)
    made = {"a.pt": Buffers(scale=one, shift=two), "b.pt": Buffers(shift=one, scale=two)}
    made["odd\nname.pt"] = Buffers(scale=one)
    monkeypatch.setattr(subjects, "_load_module", lambda _, spec, *__: made[spec])
    models = ["a.pt", "b.pt", "--surrogate", "odd\nname.pt"]
    chosen = config.parse_eval_config([*models, "--device", "cpu"])
    found = subjects.load_subjects(chosen, CLASSES, {spec: {} for spec in made})
    assert found["a.pt"].digest != found["b.pt"].digest
    assert found["odd\nname.pt"].label == "odd\\nname.pt"  # warnings with it are one line


def test_a_model_is_the_same_in_other_versions_of_torch_and_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norms = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4)]
    model = nn.Sequential(*norms, Extra(2))
    monkeypatch.setattr(subjects, "_load_module", lambda *_: model)
    chosen = config.parse_eval_config(["a.pt", "--device", "cpu"])
    before = subjects.load_subjects(chosen, CLASSES, {})["a.pt"].digest
    for norm in norms:  # of which torch 2.11 does not print the bias
        shown = re.sub(r", bias=\w+", "", norm.extra_repr())
        monkeypatch.setattr(norm, "extra_repr", lambda shown=shown: shown)
    # Python 3.14 has another default.
    monkeypatch.setattr(subjects.pickle, "dumps", partial(pickle.dumps, protocol=5))
    assert subjects.load_subjects(chosen, CLASSES, {})["a.pt"].digest == before


def test_the_findings_of_the_checks_are_printed_without_the_attacks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--data", str(bench.root / "images"), "--size", "16"]
    bench.run(*fixed, "--only", "checks", models="tinynets:Flat")
    finding = "! tinynets:Flat, PGD: the gradient is zero or NaN for 6 of 6 images"
    assert finding in capsys.readouterr().out
    for file in ("results.md", "results.tex"):
        assert "the gradient is zero" in (bench.root / "out" / file).read_text()
    monkeypatch.setattr(plots, "plot_differences", lambda *_: pytest.fail("drawn without R"))
    bench.run(*fixed, "--only", "clean", models="tinynets:net tinynets:four", out="clean")


def test_outputs_are_named_by_wnid_by_line_or_by_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "synsets.txt"
    path.write_text("n01440764 tench, Tinca tinca\nn01443537\ntiger shark\n", "utf-8-sig")
    assert subjects._read_outputs(path) == ["n01440764", "n01443537", "tiger shark"]
    known = find_weights("resnet18", "DEFAULT").outputs
    network, restrict = torch.nn.Identity(), partial(subjects.restrict, given=False)
    x = torch.rand(2, 1000)
    rows = [389, 0, 292]
    chosen = restrict("m", network, known, [known[i] for i in rows])
    assert torch.equal(chosen(x), x[:, rows])
    assert restrict("m", network, known, [f"n{i:08}" for i in range(1000)]) is network
    assert torch.equal(restrict("m", network, known[::-1], known)(x), x.flip(1))
    with pytest.raises(UserError, match=r"names 2 outputs, .* 0 have the name 'a'"):
        restrict("m", network, ["tench", "crane"], ["a", "b"], given=True)
    with pytest.raises(UserError, match=r"m has 1000 outputs, .* 0 have the name 'n01440764'"):
        restrict("m", network, known, ["n01440764", "n01443537"])


def test_a_restricted_model_is_fused_like_the_whole() -> None:
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 9)
    whole = torch.nn.Sequential(*layers, *head).eval()
    model, x = subjects.Restricted(whole, [4, 0, 7], 9), torch.rand(2, 3, 16, 16)
    fused = fuse_for_inference(model, x)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in fused.modules())
    assert torch.allclose(fused(x), whole(x)[:, [4, 0, 7]], atol=1e-5)


def test_logits_in_an_object_or_a_tuple_count_like_logits_alone(bench: Bench) -> None:
    options = ["--data", str(bench.root / "images"), "--size", "16", "--dump-images", "2"]
    options += ["--only", "brightness", "pgd_0.04", "cw2"]
    bench.run(*options, models="tinynets:net tinynets:Pair tinynets:Object")
    rows = bench.results()["rows"]
    assert all(same_scores(rows[0], row) for row in rows[1:])
    bench.run(*options[:-3], "mi_fgsm_0.04", "--surrogate", "tinynets:Object", out="by-object")
    bench.run(*options[:-3], "mi_fgsm_0.04", "--surrogate", "tinynets:net", out="by-tensor")
    pairs = zip(bench.results("by-object")["rows"], bench.results("by-tensor")["rows"], strict=True)
    assert all(same_scores(*pair) for pair in pairs)


def test_scores_are_made_in_full_precision(bench: Bench) -> None:
    assert torch.backends.cudnn.allow_tf32
    data_of = ["--data", str(bench.root / "images"), "--size", "16", "--only", "brightness"]
    assert len(bench.run(*data_of, models="tinynets:Exact")) == 6
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Stuck", "ignores eval"), ("Noisy", "other logits for the same images the second time"),
        ("Broken", "not finite"), ("Two", r"returns \(16, 2\).*dataset's 3 classes"),
        ("Text", "fails on .*: the model returns str; give logits"),
        ("Half", "returns float16 logits, too narrow for attacks"),
        ("Writing", "changes its input in place: let it begin with"),
        ("Big", r"fails on images \(16, 3, 16, 16\)"),
        ("Squeezed", r"fails on images \(1, 3, 16, 16\): the model returns shape \(3,\)"),
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
        assert "tinynets:Soft returns probabilities, not logits" in text
        assert "tinynets:Flat: the gradient is zero or NaN for 16 of 16 sampled images" in text
        assert "standard returns" not in text


def test_full_memory_in_a_backward_pass_is_not_called_a_missing_gradient(bench: Bench) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        bench.run("--only", "pgd_0.04", models="standard tinynets:Full")


def test_a_model_with_another_name_than_before_is_noted_by_its_own(bench: Bench) -> None:
    options = ["--data", str(bench.root / "images"), "--size", "16", "--only", "contrast"]
    cells = [{**line, "label": "one"} for line in bench.run(*options, models="tinynets:Hollow")]
    notes = metrics.aggregate(cells, {"two": cells[0]["model"]}, "two", {}).notes
    assert any("logits of two are NaN under contrast" in note for note in notes)
    assert not any("one" in note for note in notes)


def test_notes_escape_names_that_cannot_be_printed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "chance_notes", lambda *_: ["the classes, caf\udce9 a\nb"])
    bench.run("--only", "clean", models="standard")
    assert "caf\\udce9 a\\nb" in (bench.root / "out" / "results.md").read_text()


def test_an_image_whose_logits_are_nan_is_wrong(bench: Bench) -> None:
    options = ["--data", str(bench.root / "images"), "--size", "16"]
    lines = bench.run(*options, "--only", "contrast", models="tinynets:net tinynets:Hollow")
    found = {(c["label"], c["severity"]): (c["correct"], c.get("nan")) for c in lines}
    assert found["tinynets:net", None] == found["tinynets:Hollow", None]
    assert found["tinynets:net", 5][0] > 0 and found["tinynets:Hollow", 5] == (0, 30)
    note = "logits of tinynets:Hollow are NaN under contrast: such images are wrong"
    assert note in (bench.root / "out" / "results.md").read_text()


def test_an_image_of_which_one_logit_is_nan_is_wrong(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check a network whose logit of class 0 is NaN for bright images: argmax chooses the NaN."""
    options = ["--data", str(bench.root / "images"), "--size", "16"]
    lines = bench.run(*options, "--only", "brightness", models="tinynets:Torn")
    net, test, torn = bench.networks()[0], bench.sets().test, []
    for line in lines:
        severity, x = line["severity"], test.images
        x = (corrupt(x, "brightness", severity, seed=0) if severity else x).float() / 255
        bright = x.mean((1, 2, 3)) > 0.65
        right = (net(x).argmax(1) == test.labels) & ~bright
        torn.append(int(bright.sum()))
        assert (line["correct"], line.get("nan", 0)) == (int(right.sum()), torn[-1])
    assert torn[0] == 0 and any(0 < count < 30 for count in torn)
    note = "logits of tinynets:Torn are NaN under brightness: such images are wrong"
    assert note in capsys.readouterr().out


def test_half_precision_is_too_narrow_for_attacks_alone(bench: Bench) -> None:
    options = ["--data", str(bench.root / "images"), "--size", "16", "--surrogate", "tinynets:net"]
    names = "brightness", "mi_fgsm_0.04"
    bench.run(*options, "--only", *names, models="tinynets:net tinynets:Half")
    rows = bench.results()["rows"]
    assert same_scores(*rows) and {*names} < {*rows[0]["scores"]}
    for attack, models in (("pgd_0.04", "tinynets:Half"), ("mi_fgsm_0.04", "tinynets:net")):
        with pytest.raises(UserError, match=r"^tinynets:Half returns float16 .*: use float32$"):
            bench.run(*options[:-1], "tinynets:Half", "--only", attack, models=models, out="b")


def test_a_model_without_a_gradient_is_measured_where_no_attack_needs_it(bench: Bench) -> None:
    options = ["--data", str(bench.root / "images"), "--size", "16", "--surrogate", "tinynets:net"]
    names = "brightness", "mi_fgsm_0.04"
    bench.run(*options, "--only", "brightness", models="tinynets:Asserting", out="c")
    with pytest.raises(UserError, match=r"Asserting does not give the .* \(inference only\)"):
        bench.run(*options, "--only", "pgd_0.04", models="tinynets:Asserting", out="d")
    bench.run(*options, "--only", *names, models="tinynets:net tinynets:Detached")
    rows = bench.results()["rows"]
    assert same_scores(*rows) and {*names} < {*rows[0]["scores"]}
    for attack, models in (("pgd_0.04", "tinynets:Detached"), ("mi_fgsm_0.04", "tinynets:net")):
        with pytest.raises(UserError, match="Detached does not give the gradient with respect to"):
            bench.run(*options[:-1], "tinynets:Detached", "--only", attack, models=models, out="b")


def test_logits_that_sum_to_1_are_not_taken_for_probabilities() -> None:
    x, y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])

    def warnings(wrap: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        model = Wrapped(linear(3), wrap).eval()
        return subjects.inspect_subject(subjects.Subject("m", model, ""), x, y, 3, attacked=True)

    assert warnings(lambda z: 9 * (z - z.mean(1, keepdim=True)) + 1 / 3) == []
    (warning,) = warnings(lambda z: z.softmax(1))
    assert "probabilities" in warning
    reordered = subjects.Subject("m", subjects.Restricted(linear(3), [2, 0, 1], 3).eval(), "")
    assert subjects.inspect_subject(reordered, x, y, 3, attacked=True) == []


def test_checkpoints_that_may_have_seen_the_test_images_are_marked(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.checkpoint("foreign", "0123", 3, 20.0)
    bench.checkpoint("larger", bench.sets().fingerprint, 3, 20.0, size=64)
    bench.run("--only", "brightness", "--size", "16", models="standard foreign larger")
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["foreign", "larger"]
    assert said[0].endswith("another dataset or preprocessing: it may have seen test images")
    assert "trained at 64 px, and the images" in said[1]
    bench.run("--only", "fog", "--surrogate", bench.argv(models="standard")[0], out="same")
    assert "standard is the surrogate" in capsys.readouterr().err


def test_the_default_folder_is_named_after_the_models_in_any_script() -> None:
    def name(*labels: str) -> str:
        models = [SimpleNamespace(digest="0", label=label) for label in labels]
        options = SimpleNamespace(output_dir=None, imagenet_c=None)
        run = SimpleNamespace(config=options, facts={}, models=models, surrogate=None)
        return str(measure.Evaluation.output_dir.fget(run).name)

    assert re.fullmatch("a_1-модель-日本-[0-9a-f]{8}", name("модель 日本", "a_1"))
    assert len(name("日" * 200).encode()) == 99 + 9


def test_names_in_a_script_that_the_font_lacks_are_drawn(tmp_path: Path) -> None:
    plots.plot_shares({"日本": {"日": 0.5}}, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 0


def test_models_that_guess_are_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run("--only", "clean", models="standard tinynets:down")
    said = capsys.readouterr().out
    assert "down is not significantly above chance (33.3 %, the share of the largest class)" in said
    assert (
        "than the classes, blue, green, red: see --imagenet-classes; or it may expect another norm"
        in said
    )
    assert "standard is not" not in said
    rows = [SimpleNamespace(model=str(x), scores={"clean": SimpleNamespace(low=x)}) for x in
            (0.2, 0.25, 0.3)]  # fmt: skip
    notes = evaluate.chance_notes(SimpleNamespace(rows=rows), list("abcd"), 0.25)
    assert [note.split()[0] for note in notes] == ["0.2", "0.25"]
    assert len(evaluate.chance_notes(SimpleNamespace(rows=rows), list("abc"), 0.3)) == 3


def test_the_first_line_counts_the_tested_images(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run("--only", "clean", "--limit", "6", models="standard")
    assert capsys.readouterr().out.startswith("6 of 30 test images: ")


def test_a_line_per_cell_shows_the_accuracies(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = bench.run("--only", "clean", "fog")
    said = capsys.readouterr().out.splitlines()
    titles = ["clean", *(f"fog {severity}" for severity in range(1, 6))]
    for title, two in zip(titles, zip(*[iter(lines)] * 2, strict=True), strict=True):
        shares = "  ".join(f"{c['label']} {100 * c['correct'] / 30:.1f} %" for c in two)
        assert any(line.startswith(f"{title:26}{shares}  (") for line in said), title


def test_a_dataset_that_is_gone_is_named(bench: Bench) -> None:
    settings = {"data": str(bench.root / "moved")}
    bench.checkpoint("away", bench.sets().fingerprint, 3, 20.0, settings=settings)
    command = [str(bench.root / "away" / "last.pt"), "--output-dir", str(bench.root / "x")]
    with pytest.raises(UserError, match=r"moved, the dataset of a checkpoint, is not there: name"):
        evaluate.main([*command, "--only", "clean", "--device", "cpu"])
    bench.checkpoint("away", bench.sets().fingerprint, 3, 20.0, settings={"data": "shapes"})
    with pytest.raises(UserError) as error:  # of the embedded images, which are always there
        evaluate.main([*command, "--only", "clean", "--device", "cpu"])
    assert "is not there" not in str(error.value)


def test_checkpoints_are_compared_without_their_training_images(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that no training image is decoded, and that older checkpoints are judged honestly."""
    settings = {
        "data": str(bench.root / "images"),
        "test_fingerprint": bench.sets().test_fingerprint,
    }
    bench.checkpoint("new", bench.sets().fingerprint, 0, 20.0, settings=settings)
    options = ["--cache-dir", str(bench.root / "fresh"), "--only", "clean"]
    bench.checkpoint("other", "of other images", 0, 20.0, settings=settings | {
        "test_fingerprint": "of other images", "test_files": bench.sets().test_files,
    })  # fmt: skip
    earlier = "standard may have seen test images: an earlier version of"
    other = "other was trained on another dataset or preprocessing: it may have seen test images"
    for models, warning in (("new", ""), ("standard", earlier), ("other", other)):
        bench.run(*options, models=models, out=models + "-run")
        said = capsys.readouterr().err
        assert warning in said and said.count("warning") == bool(warning)
    assert [p.stat().st_size for p in (bench.root / "fresh").glob("*.u8")] == [30 * 3 * 16**2]
    bench.run("--only", "clean", models="standard", out="known")
    assert "warning" not in capsys.readouterr().err


def test_rows_are_named_by_folder_unless_two_share_it(bench: Bench) -> None:
    label = config.parse_eval_config(bench.argv()).labels
    assert list(label.values()) == ["standard", "mtlat"]
    (bench.root / "other").mkdir()
    (bench.root / "other" / "mtlat").symlink_to(bench.root / "mtlat")
    label = config.parse_eval_config(bench.argv(models="mtlat other/mtlat tinynets:net")).labels
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
    other = bench.run("--only", "gaussian_noise", "--seed", "1", out="c")
    assert [x["seed"] for x in other] == [1] * len(other) != [x["seed"] for x in first]
    again = {key(x): x["hits"] for x in other}
    assert any(again[key(x)] != x["hits"] for x in first if key(x) in again)


def test_pictures_are_drawn_of_every_perturbation(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[Any] = []
    monkeypatch.setattr(plots, "plot_images", lambda drawn, path: sheets.append((drawn, path)))
    bench.run("--skip", "checks", "--dump-images", "2", *bench.surrogate, models="standard")
    ((drawn, path),) = sheets
    assert path == bench.root / "out" / "images.png" and len(drawn) == 2
    (model, _, vgg), sets = bench.networks(), bench.sets()
    numbers = measure.choose_images(sets.test.labels, 2, 0)
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
        assert titles == [f"clean: {CLASSES[y]}", "Fog 3", "MI FGSM 0.08"]
    bench.run("--skip", "checks", "--dump-images", "0", *bench.surrogate, models="standard")
    assert len(sheets) == 1


def test_without_a_surrogate_black_boxes_are_left_out_and_said_to_be(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = bench.run("--only", "pgd_0.04", "black-box", "--skip", "checks")
    assert {x["perturbation"] for x in lines} == {"clean", "pgd_0.04"}
    said = "the black-box attacks are left out: they need --surrogate"
    assert said in capsys.readouterr().out
    bench.run("--only", "clean", out="clean")
    assert said not in capsys.readouterr().out


def test_other_classes_are_refused(bench: Bench) -> None:
    fingerprint = bench.sets().fingerprint
    bench.checkpoint("renamed", fingerprint, 0, 20.0, classes=["blue", "green", "pink"])
    bench.checkpoint("fewer", fingerprint, 0, 20.0, classes=["blue", "green"])
    for name, alone in (("renamed", "pink red"), ("fewer", "red")):
        other = str(bench.root / name / "last.pt")
        message = rf"{name}.last.pt was trained on other classes .*\(only one has {alone}\)"
        with pytest.raises(UserError, match=message):
            bench.run(models=f"standard {name}")
        with pytest.raises(UserError, match=message):
            bench.run("--surrogate", other)


def test_wrong_usage_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--data is missing"):
        bench.run(models="tinynets:net")
    with pytest.raises(
        UserError, match=r"--weights .* name the file itself as a model, with --arch"
    ):
        bench.run("--weights", __file__, models="torchvision:resnet18")
    small = bench.checkpoint("small", "0", 0, 20.0, size=12)
    with pytest.raises(UserError, match="--size 12: the corruptions need images of 16 px or more"):
        evaluate.main([small, *bench.argv(models="")])
    empty = bench.root / "empty"
    for part in ("train", "val"):
        for name in CLASSES:
            (empty / part / name).mkdir(parents=True)
    with pytest.raises(UserError, match="has no image for the test part"):
        bench.run("--data", str(empty))
    monkeypatch.setenv("MTLAT_FROST_DIR", str(bench.root / "empty"))
    with pytest.raises(UserError, match=r"^frost: "):
        bench.run()


def test_the_script_prints_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "nowhere.pt"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(evaluate.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", "error: nowhere.pt: No such file or directory\n")


def test_images_too_small_for_corruptions_are_scored_clean(go: Any, tmp_path: Path) -> None:
    go("--epochs", "1")  # on images of 12 px
    argv = [str(tmp_path / "out" / "last.pt"), "--output-dir", str(tmp_path / "scores")]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    evaluate.main([*argv, *cache, "--device", "cpu", "--only", "clean"])
    assert [cell["n"] for cell in read_cells(tmp_path / "scores" / "cells.jsonl")] == [3]


def test_the_same_classes_in_another_order_are_refused(bench: Bench) -> None:
    fingerprint = bench.sets().fingerprint
    bench.checkpoint("turned", fingerprint, 0, 20.0, classes=["red", "green", "blue"])
    with pytest.raises(UserError, match=r"turned.last.pt .* \(the order differs\)"):
        bench.run("--only", "clean", models="standard turned")


def test_a_checkpoint_is_tested_on_what_its_training_held_out(
    go: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "more", each=20)  # two of each class are held out
    load = partial(load_dataset, str(folder), size=12, num_classes=2, cache_dir=tmp_path / "cache")
    damaged, *_ = load(seed=3).paths
    (folder / damaged).write_bytes(b"no image")
    flags = "--epochs 1 --batch-size 8 --classes 2 --data-seed 3 --skip-bad-images"
    go("--data", str(folder), *flags.split())
    capsys.readouterr()
    scores = tmp_path / "scores"
    evaluate.main([
        str(tmp_path / "out" / "last.pt"), "--device", "cpu", "--only", "clean",
        "--cache-dir", str(tmp_path / "fresh"), "--output-dir", str(scores),
    ])  # fmt: skip
    assert "may have seen" not in capsys.readouterr().err
    tested = [line.split("\t")[0] for line in (scores / "images.txt").read_text().splitlines()]
    assert tested == load(seed=3, skip_bad_images=True).paths and len(tested) == 3


def test_the_held_out_tenth_is_that_of_the_checkpoint_that_held_it_out(bench: Bench) -> None:
    settings = {"data": str(bench.root / "images" / "val")}
    for name, seed in (("whole", 0), ("part", 1)):
        own = {"data_seed": seed, "held_out": name == "part"}
        bench.checkpoint(name, bench.sets().fingerprint, 0, 20.0, settings=settings | own)
    options = ["--only", "clean", "--dump-images", "0"]
    listed = []
    for models in ("part", "whole part"):
        bench.run(*options, models=models, out=f"{models} run")
        listed.append((bench.root / f"{models} run" / "images.txt").read_text())
    assert listed[0] == listed[1]


def test_limited_images_are_drawn_with_the_seed_of_the_command_line(bench: Bench) -> None:
    bench.run("--only", "clean", "--limit", "12", "--seed", "1", models="standard")
    lines = (bench.root / "out" / "images.txt").read_text().splitlines()
    sets = bench.sets()
    drawn = {
        seed: [sets.paths[i] for i in measure.choose_images(sets.test.labels, 12, seed).tolist()]
        for seed in (0, 1)
    }
    assert [line.split("\t")[0] for line in lines] == drawn[1] != drawn[0]


def test_the_baseline_is_not_among_the_differences(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "plot_differences", lambda *given: drawn.append(given))
    bench.run("--only", "gaussian_noise", "--baseline", "mtlat")
    ((compared, baseline, _),) = drawn
    assert list(compared) == ["standard"] and baseline == "mtlat"
