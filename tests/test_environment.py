"""Start the scripts with odd environment variables, settings of Matplotlib and signals."""

import errno
import importlib.util
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context, rcParams
from PIL import Image

import reproduce
from corruptions.__main__ import main as corruptions_main
from harness.devices import environment_info
from harness.errors import UserError, is_explained, run_script
from harness.images.loader import map_images

ROOT = Path(reproduce.__file__).parent
ODD = "text.usetex: True\nimage.origin: lower\nsavefig.dpi: 300\nfont.family: serif\n"
KEYS = ("text.usetex", "image.origin", "savefig.dpi", "font.family", "text.parse_math")
SHEET = ("--only", "fog", "--size", "32")
NO_BACKEND = {"MPLBACKEND": "module://no_such_backend"}


def start(
    code: str, cwd: Path, *, stderr: Any = subprocess.PIPE, **variables: str
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=stderr,
    )  # fmt: skip


def run(code: str, cwd: Path, **variables: str) -> tuple[int, str, str]:
    process = start(code, cwd, **variables)
    out, err = process.communicate()
    return process.returncode, out.strip(), err


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Draw a sheet and then load the figures of the scripts, with the odd settings.

    Returns the folder, and the settings that the figures have.
    """
    folder = tmp_path_factory.mktemp("odd")
    pixels = np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "matplotlibrc").write_text(ODD)
    code = f"""if True:
        from corruptions.__main__ import main
        main({[*SHEET, "a.png", "--out", "odd.png"]})
        from harness.benchmark.plots import rcParams
        print([rcParams[key] for key in {KEYS}])
    """
    ended, out, err = run(code, folder, **NO_BACKEND)
    assert ended == 0, err
    return folder, out.splitlines()[-1]


def test_figures_ignore_the_settings_of_a_notebook_and_of_a_matplotlibrc(
    odd: tuple[Path, str],
) -> None:
    assert odd[1] == "[False, 'upper', 'figure', ['serif'], False]"


def test_a_sheet_ignores_them_and_leaves_those_of_its_caller(odd: tuple[Path, str]) -> None:
    folder, _ = odd
    with rc_context({"figure.dpi": 77}):
        corruptions_main([*SHEET, str(folder / "a.png"), "--out", str(folder / "plain.png")])
        assert rcParams["figure.dpi"] == 77
    assert (folder / "odd.png").read_bytes() == (folder / "plain.png").read_bytes()


def test_an_ignored_sigchld_hides_no_exit_code() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match=r"^3$"):
            run_script(lambda: sys.exit(subprocess.call([sys.executable, "-c", "exit(3)"])))
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_says_so_and_can_be_stopped(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = """if True:
        from harness import distributed
        from harness.errors import run_script
        distributed.PATIENCE = 0.1
        run_script(lambda: None)
    """
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    said = tmp_path / "said"
    line = "waiting for the other processes (WORLD_SIZE is 2, and this is RANK 0): start them"
    with (
        said.open("w") as sink,
        start(code, tmp_path, stderr=sink, **place, MASTER_PORT="0") as process,
    ):
        try:
            for _ in range(600):
                if line in said.read_text():
                    break
                time.sleep(0.1)
            process.send_signal(number)
            assert process.wait(60) == -number
            assert line in said.read_text()
        finally:
            process.kill()


def test_a_limit_of_threads_is_explained() -> None:
    assert is_explained(RuntimeError("can't start new thread"))


def test_a_link_to_reproduce_finds_the_other_scripts(tmp_path: Path) -> None:
    link = tmp_path / "link.py"
    link.symlink_to(ROOT / "reproduce.py")
    spec = importlib.util.spec_from_file_location("link", link)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.ROOT / "train.py").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_revision_is_that_of_this_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook's would let this test commit into its repository
    own = environment_info("cpu")["revision"]
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    git += ["-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment_info("cpu")["revision"] == own
    monkeypatch.delenv("GIT_DIR")
    inside = tmp_path / "copy" / "harness" / "devices.py"  # without a repository of its own
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr("harness.devices.__file__", str(inside))
    assert environment_info("cpu")["revision"] == "unknown"


def test_a_missing_folder_of_frost_is_found_before_a_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTLAT_FROST_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(reproduce, "run_task", lambda _: pytest.fail("a training was started"))
    out = tmp_path / "out"
    argv = "--size 32 --archs cnn4 --device cpu --data".split()
    with pytest.raises(UserError, match="frost"):
        reproduce.main([*argv, str(folder), "--cache-dir", str(tmp_path), "--output-dir", str(out)])
    assert not out.exists()


def test_a_tree_of_corruptions_has_names_of_full_length(tmp_path: Path) -> None:
    name = "x" * 250
    (tmp_path / "set" / "class").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "set/class" / f"{name}.png")
    out = tmp_path / "out"
    corruptions_main([str(tmp_path / "set"), "--out", str(out), "--size", "32", "--only", "fog"])
    assert [path.name for path in (out / "fog/5/class").iterdir()] == [f"{name}.JPEG"]


def test_a_file_system_that_maps_no_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    (tmp_path / "pixels").write_bytes(bytes(12))
    with pytest.raises(UserError, match="choose a --cache-dir on another one"):
        map_images(tmp_path / "pixels", [0], 2)
