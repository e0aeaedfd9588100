"""The walkthrough is true: its numbers are computed, and its table is the function's text."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import mtlat

PAGE = Path(mtlat.__file__).with_name("walkthrough.md")


def test_the_numbers_of_the_walkthrough() -> None:
    failed, run = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert run > 30 and not failed


def test_algorithm1_has_the_papers_lines_in_their_order() -> None:
    source = inspect.getsource(mtlat.algorithm1)
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    lines = [ast.get_source_segment(source, statement) for statement in function.body[1:]]
    table = re.findall(r"^\| [^|`]+ \| `([^`]+)`.* \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert table == lines
    # As printed: what is drawn, the first mix and its loss, the second, its attack, and its loss.
    names = "x1 lam1 x_mix1 loss1 x_mix2 x_mtlat loss2".split()
    assigned = [re.findall(r"\w+", line.partition("=")[0]) for line in table if " = " in line]
    assert [name for line in assigned for name in line if name in names] == names
