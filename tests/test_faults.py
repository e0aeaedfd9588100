"""A few rounds of tests/faults; its own command line does more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import UserError, locked, replacing


def test_scripts_survive_what_may_happen() -> None:
    command = [sys.executable, "-m", "tests.faults.run", "--rounds", "2", "--only"]
    command += ["kills_while_writing", "damaged_files", "data_that_change"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 3


def test_a_lock_keeps_others_out_and_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with locked(out):
        (out / "mine.tmp").touch()
        with replacing(out / "last.pt") as unfinished:
            unfinished.touch()
            with pytest.raises(UserError, match=r"another run is writing into .*out: wait"):
                with locked(out):
                    pass
            unfinished.rename(out / ".old.unfinished")
            unfinished.touch()
    with locked(out):
        assert sorted(path.name for path in out.iterdir()) == [".lock", "last.pt", "mine.tmp"]
