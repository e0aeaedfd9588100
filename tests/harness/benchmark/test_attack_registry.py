"""Test the attacks of others and the other sizes that evaluate.py takes beside the paper's."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from attacks import cw2, mi_fgsm, pgd, pgd_ll
from harness.benchmark.attack_registry import ATTACKS, load_attack
from harness.benchmark.config import parse_eval_config
from harness.benchmark.registry import GROUPS, PERTURBATIONS
from harness.errors import UserError
from tests.support.bench import Bench
from tests.support.tiny import linear

OTHERS = """
import torch
calls = []
def same(model, x, y):
    calls.append((model.training, any(p.requires_grad for p in model.parameters()), y.dtype))
    return x
def noise(model, x, y): return torch.rand_like(x)
def gray(model, x, y): return torch.full_like(x, 0.5)
def pair(model, x, y): return x, y
def fewer(model, x, y): return x[:1]
def double(model, x, y): return x.double()
def bright(model, x, y): return x + 1
def broken(model, x, y): return x / 0 * 0
def in_place(model, x, y): return x.zero_()
def two(model, x): return x
"""


@pytest.fixture(autouse=True)
def _others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("others", None)  # of another test
    yield
    sys.modules.pop("others", None)


def test_the_papers_attacks_have_the_papers_settings() -> None:
    """Check the numbers of its section on robustness; MI-FGSM's gradients are the surrogate's."""
    linf = {"steps": 10}
    assert {name: (a.function, a.keywords, a.box) for name, a in ATTACKS.items()} == {
        "pgd_0.04": (pgd, linf | {"epsilon": 0.04}, "white-box"),
        "pgd_ll_0.04": (pgd_ll, linf | {"epsilon": 0.04}, "white-box"),
        "cw2": (cw2, {"confidence": 50, "steps": 40}, "white-box"),
        "mi_fgsm_0.04": (mi_fgsm, linf | {"epsilon": 0.04}, "black-box"),
        "mi_fgsm_0.08": (mi_fgsm, linf | {"epsilon": 0.08}, "black-box"),
    }


def test_cw2_searches_the_nearest_image_only_where_its_distance_is_reported() -> None:
    chosen = {name: PERTURBATIONS[name].attack for name in ("cw2", "cw2_0")}
    assert {name: a.keywords for name, a in chosen.items() if a and a.function is cw2} == {
        "cw2": {"confidence": 50, "steps": 40, "rounds": 1},
        "cw2_0": {"confidence": 0, "steps": 40, "rounds": 4},
    }


def test_supplementary_rows_stand_beside_the_papers(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*bench.surrogate, "--only", "clean", "--dump-images", "0"]
    added = ["--attack", "same=others:same", "gray=others:gray", "--epsilon", "0.5", "0.04"]
    lines = bench.run(*options, *added, models="standard")
    sizes = [f"{name}_{e}" for e in (0.5, 0.04) for name in ("pgd", "pgd_ll", "mi_fgsm")]
    correct = {cell["perturbation"]: cell["correct"] for cell in lines}
    assert set(correct) == {"clean", "same", "gray", *sizes, *GROUPS["checks"]}
    assert correct["same"] == correct["clean"] > correct["pgd_0.04"] > correct["pgd_0.5"] == 0
    assert correct["gray"] == 10  # the images of one class
    assert {c.get("attack") for c in lines} == {None, "others:same", "others:gray"}
    table = bench.results()["supplementary"]
    assert table[:2] == [["attack", "standard"], ["pgd_0.5", "0.00"]]
    assert [row[0] for row in table[2:]] == ["pgd_ll_0.5", "mi_fgsm_0.5", "same", "gray"]
    assert table[-2:] == [["same", "1.00"], ["gray", f"{10 / correct['clean']:.2f}"]]
    for text in (capsys.readouterr().out, (bench.root / "out" / "results.md").read_text()):
        assert "Supplementary attacks: R = accuracy / clean accuracy" in text and "gray" in text
    (row,) = bench.results()["rows"]
    assert set(row["scores"]) == {"clean", "pgd_0.04", "pgd_ll_0.04", "mi_fgsm_0.04"}
    assert set(row["supplement"]) == {"pgd_0.5", "pgd_ll_0.5", "mi_fgsm_0.5", "same", "gray"}
    gray = row["supplement"]["gray"]
    assert gray["low"] == pytest.approx(binomtest(10, 30).proportion_ci(method="wilson").low)
    assert 0 < gray["r_low"] < gray["robustness"] < gray["r_high"] <= 1
    cells = f"{gray['robustness']:.2f}", f"{gray['r_low']:.2f} to {gray['r_high']:.2f}"
    assert f"| gray | {cells[0]} | {cells[1]} |" in (bench.root / "out/results.md").read_text()
    assert rf"gray & {cells[0]} & {cells[1]} \\" in (bench.root / "out/results.tex").read_text()
    found = list(csv.DictReader((bench.root / "out/results.csv").read_text().splitlines()))
    (line,) = (x for x in found if x["perturbation"] == "gray")
    assert line["n"] == "30" and line["R low"] == f"{gray['r_low']:.6f}"
    assert bench.run(*options, models="standard") == lines  # finished cells stay
    assert "Supplementary" not in capsys.readouterr().out
    with pytest.raises(UserError, match="attack: others:gray, now others:same"):
        bench.run(*options, "--attack", "gray=others:same", models="standard")


def test_an_attack_of_others_is_not_taken_for_the_papers_with_its_name(bench: Bench) -> None:
    options = ["--only", "clean", "--dump-images", "0"]
    bench.run(*options, "--attack", "pgd_0.5=others:same", models="standard")
    with pytest.raises(UserError, match=r"another run \(attack: others:same, now None\)"):
        bench.run(*options, "--epsilon", "0.5", models="standard")


def test_the_papers_rows_are_never_replaced() -> None:
    config = parse_eval_config(["a:b", "--epsilon", "0.04", "0.08", "--only", "fog"])
    for name in ATTACKS:
        assert config.registry[name] is PERTURBATIONS[name]
    added = {"pgd_0.04", "pgd_ll_0.04", "mi_fgsm_0.04", "pgd_0.08", "pgd_ll_0.08", "mi_fgsm_0.08"}
    assert set(config.perturbations) == {"clean", "fog", *added, *GROUPS["checks"]}
    attack = config.registry["pgd_ll_0.08"].attack
    assert attack.keywords == {"epsilon": 0.08, "steps": 10}
    assert attack.function is ATTACKS["pgd_ll_0.04"].function


def test_an_attack_of_others_may_do_without_the_gradient(bench: Bench) -> None:
    options = ["--data", str(bench.root / "images"), "--size", "16", "--only", "clean"]
    bench.run(*options, "--attack", "gray=others:gray", models="tinynets:Detached")
    (row,) = bench.results()["rows"]
    assert "gray" in row["supplement"]
    with pytest.raises(UserError, match="or add --skip white-box black-box"):
        bench.run(*options, "--epsilon", "0.5", models="tinynets:Detached")


def test_what_is_skipped_is_not_added_again_by_its_epsilon() -> None:
    options = ["--epsilon", "0.04", "0.3", "--skip", "pgd_0.04"]
    found = parse_eval_config(["a:b", *options]).perturbations
    assert "pgd_0.04" not in found and {"pgd_ll_0.04", "mi_fgsm_0.04", "pgd_0.3"} < {*found}


@pytest.mark.parametrize(
    "skip, left",
    [("white-box", {"mine", "mi_fgsm_0.04", "mi_fgsm_0.3"}),
     ("black-box", {"mine", "pgd_0.04", "pgd_ll_0.04", "pgd_0.3", "pgd_ll_0.3"}),
     ("white-box black-box", {"mine"})],
)  # fmt: skip
def test_a_group_is_skipped_in_all_its_sizes(skip: str, left: set[str]) -> None:
    options = ["--epsilon", "0.04", "0.3", "--attack", "mine=others:same", "--skip", *skip.split()]
    found = parse_eval_config(["a:b", *options]).perturbations
    assert {name for name in found if name == "mine" or name.endswith(("0.04", "0.3"))} - {
        *GROUPS["checks"]
    } == left


def test_an_attack_of_others_gets_a_frozen_model_and_copies() -> None:
    model, x, y = linear(3).train(), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    x_adv = load_attack("a", "others:same", 0).function(model, x, y)
    assert sys.modules["others"].calls == [(False, False, torch.int64)]
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(x_adv, x) and x_adv.data_ptr() != x.data_ptr()
    before = x.clone()
    load_attack("a", "others:in_place", 0).function(model, x, y)
    assert torch.equal(x, before)
    first, again, other = (
        load_attack("a", "others:noise", s).function(model, x, y) for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("name", "message"), [
    ("pair", "returns tuple; return x_adv, a tensor like x"),
    ("fewer", r"returns \(1, 3, 8, 8\) torch.float32 on cpu; x is \(4, 3, 8, 8\)"),
    ("double", r"torch\.float64 on cpu; x is"),
    ("bright", r"pixels from 1(\.\d+)? to [12](\.\d+)?; clip them to \[0, 1\]"),
    ("broken", "pixels from nan to nan"),
])  # fmt: skip
def test_what_comes_back_is_checked(name: str, message: str) -> None:
    attack = load_attack("mine", f"others:{name}", 0)
    with pytest.raises(UserError, match=f"--attack mine returns .*{message}|mine {message}"):
        attack.function(nn.Identity(), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(("words", "message"), [
    ("--attack others:same", "others:same: write NAME=module:callable"),
    ("--attack a=others", "a=others: write NAME=module:callable"),
    ("--attack pgd_0.04=others:same", "the name pgd_0.04 is taken; choose another"),
    ("--attack noise=others:same", "the name noise is taken"),
    ("--attack check_a=others:same", "the name check_a is taken"),
    ("--attack a=others:same a=others:gray", "the name a is taken"),
    ("--attack pgd_0.1=others:same --epsilon 0.1", "the name pgd_0.1 is taken"),
    ("--attack a=others:none", "--attack a=others:none: .*none"),
    ("--attack a=nowhere:same", "No module named 'nowhere'"),
    ("--attack a=others:two", "too many positional arguments"),
    ("--epsilon 0", "0 is out of range: above 0 to 1"),
])  # fmt: skip
def test_wrong_usage_is_named(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_eval_config(["a:b", *words.split()])


def test_an_attack_of_others_is_seeded_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seen.append)
    words = ["own.pt", "--attack", "own=torch:where", "--seed", "7"]
    monkeypatch.setattr(
        "harness.benchmark.attack_registry.import_callable", lambda *_: lambda model, x, y: x
    )
    entry = parse_eval_config(words).supplement["own"]
    assert entry.attack
    x = torch.rand(2, 3, 4, 4)
    entry.attack.function(torch.nn.Identity(), x, torch.tensor([0, 1]))
    assert seen == [7]
