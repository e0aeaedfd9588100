"""What all scripts share, where no script's test shows it."""

from pathlib import Path

import pytest

from common import UserError, locked, replacing


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
