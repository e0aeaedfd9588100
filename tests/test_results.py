"""Make the tables of results/ again from the cells beside them, by the code of their README."""

import re
import shutil
from pathlib import Path

import pytest

import evaluate

RESULTS = Path(evaluate.__file__).parent / "results"


@pytest.mark.parametrize("name", ["tiny20", "tiny50"])
def test_the_tables_are_made_from_the_cells(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "results" / name
    shutil.copytree(RESULTS / name, copy)
    written = [copy / "tables.md", copy / "differences.png"]
    for file in written:
        file.unlink()
    monkeypatch.chdir(tmp_path)
    readme = (copy / "README.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE))
    exec(compile(code, str(copy / "README.md"), "exec"), {})
    assert written[0].read_text() == (RESULTS / name / "tables.md").read_text()
    assert written[1].stat().st_size > 0
