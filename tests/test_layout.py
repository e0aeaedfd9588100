"""Test the layout: top-level files, direction of imports, and module names of users."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import evaluate
import mtlat
import train
from tests.support.tiny import image_folder

ROOT = Path(mtlat.__file__).parent
SCRIPTS = {"train.py", "evaluate.py", "reproduce.py"}
PRODUCT = [*ROOT.glob("*.py"), *ROOT.glob("harness/**/*.py"), *ROOT.glob("corruptions/*.py")]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def called(node: ast.AST) -> str:
    """Return the name of the function that a node calls, or an empty string."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def imported(path: Path) -> set[str]:
    """Return the top-level modules that a file imports."""
    return {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def test_the_top_level_is_what_the_readme_says() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"mtlat.py", "attacks.py", *SCRIPTS}


def test_the_two_files_at_the_bottom_import_nothing_above_them() -> None:
    own = {"harness", "corruptions", "attacks", "train", "evaluate", "reproduce"}
    alone = {"math", "collections", "contextlib", "typing", "torch"}  # so that the file can travel
    assert imported(ROOT / "mtlat.py") == alone and set(mtlat.__all__) <= set(vars(mtlat))
    assert imported(ROOT / "attacks.py") & (own | {"mtlat"}) == {"mtlat"}


def test_files_and_functions_are_small() -> None:
    for path in PRODUCT:
        text = path.read_text()
        assert text.count("\n") <= 350, path
        for function in functions(ast.parse(text)):
            lines = (function.end_lineno or 0) - function.lineno + 1
            assert lines <= 50, (path.name, function.name, lines)


def attacks_a_mix(function: ast.FunctionDef) -> bool:
    """Return whether a function attacks images that it has mixed, and computes a loss."""
    mixed = {
        name.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and called(node.value) == "mixup"
        for name in ast.walk(node.targets[0])
        if isinstance(name, ast.Name)
    }
    attacked = {
        argument.id
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and called(node) == "targeted_fgsm"
        for argument in node.args
        if isinstance(argument, ast.Name)
    }
    losses = any(called(node) in ("cross_entropy", "loss") for node in ast.walk(function))
    return bool(mixed & attacked) and losses


def test_algorithm_1_is_written_once() -> None:
    """Check that Algorithm 1 has a single implementation.

    The code that a reader compares with the paper is then the code that every training runs.
    """
    found = [
        (path.name, function.name)
        for path in PRODUCT
        for function in functions(ast.parse(path.read_text()))
        if attacks_a_mix(function)
    ]
    assert found == [("mtlat.py", "algorithm1")]


NAMES = "data common report settings methods page paper parallel cells feed shapes figures sanity"
NETWORK = """
{imports}
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes + {total}))
"""


def test_a_network_may_import_modules_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = NAMES.split()
    for name in names:
        (tmp_path / f"{name}.py").write_text("VALUE = 0\n")
    imports = "\n".join(f"import {name}" for name in names)
    total = " + ".join(f"{name}.VALUE" for name in names)
    (tmp_path / "mynet.py").write_text(NETWORK.format(imports=imports, total=total))
    image_folder(tmp_path / "images", side=16)
    # The script's folder comes first, as in `python SCRIPT`, and no folder of the tests.
    own = {"", str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")}
    monkeypatch.setattr(sys, "path", [str(ROOT), *(p for p in sys.path if p not in own)])
    monkeypatch.chdir(tmp_path)
    common = ["--data", "images", "--cache-dir", "cache", "--device", "cpu"]
    trained = "runs/mynet-make-mtlat/last.pt"
    try:
        train.main(["--arch", "mynet:make", *common, "--size", "16", "--epochs", "1", "-b", "6"])
        evaluate.main([trained, *common, "--only", "fog"])
        alone = ["--size", "16", "--only", "clean", "--output-dir", "own"]
        evaluate.main(["mynet:make", *common, *alone])
    finally:
        for name in (*names, "mynet"):
            sys.modules.pop(name, None)
    settings = json.loads((tmp_path / "runs" / "mynet-make-mtlat" / "args.json").read_text())
    assert settings["arch"] == "mynet:make"
