"""Test the walkthrough: its numbers are computed, and its lines are those of algorithm1."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import mtlat

PAGE = Path(mtlat.__file__).parent / "docs" / "walkthrough.md"


def test_the_numbers_of_the_walkthrough() -> None:
    failed, run = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert run > 30 and not failed


def made_in_order() -> list[str]:
    """Return the names that algorithm1 assigns, and "yield" for each loss, in their order."""
    (function,) = ast.parse(inspect.getsource(mtlat.algorithm1)).body
    assert isinstance(function, ast.FunctionDef)
    names = []
    for statement in function.body:
        if isinstance(statement, ast.Assign):
            names += [n.id for n in ast.walk(statement.targets[0]) if isinstance(n, ast.Name)]
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield):
            names.append("yield")
    return names


def test_algorithm1_has_the_papers_lines_in_their_order() -> None:
    printed = "x1 lam1 x_mix1 y_mix1 yield x_mix2 y_mix2 x_mtlat y_mtlat yield".split()
    assert [name for name in made_in_order() if name in printed] == printed


def test_the_table_of_the_walkthrough_follows_algorithm1() -> None:
    lines = re.findall(r"^\| [^|`]+ \| `([^`]+)`.* \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    shown = [ast.parse(line).body[0] for line in lines]
    (function,) = ast.parse(inspect.getsource(mtlat.algorithm1)).body
    assert isinstance(function, ast.FunctionDef)
    assert [ast.dump(s) for s in shown] == [ast.dump(s) for s in function.body[1:]]
