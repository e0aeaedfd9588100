"""What all scripts share, where no script's test shows it."""

from pathlib import Path

import pytest
import torch

from common import UserError, locked, replacing, run


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


def test_what_pytorch_cannot_repeat_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As VGG's pooling on CUDA; on a CPU it is this."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(SystemExit, match="2"):
            run(lambda: torch.zeros(4).put_(torch.arange(2), torch.ones(2)))
    finally:
        torch.use_deterministic_algorithms(False)
    said = capsys.readouterr().err
    assert said == "error: --deterministic: put_ cannot; leave it out, or choose another --arch\n"
    with pytest.raises(RuntimeError, match="size"):  # any other is a fault, and shows where
        run(lambda: torch.zeros(4) + torch.zeros(5))
