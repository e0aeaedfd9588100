"""Test how train.py resumes, and its messages for wrong usage."""

import json
import math
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train
from harness import checkpoints, errors
from harness.cli import build_parser
from harness.errors import UserError
from harness.files import atomic_write, lock_folder
from harness.images import datasets
from harness.training.config import EARLIER, TrainConfig, parse_train_config
from tests.support.tiny import read_log, states_equal

ROOT = Path(train.__file__).parent


# ---------------------------------------------------------------- resume


def comparable(out: Path) -> tuple:
    """Return the results that must not depend on an interruption: everything except times."""
    times = {"images_per_second", "seconds_left"}
    found = [checkpoints.load_checkpoint(out / name) for name in ("last.pt", "best.pt")]
    for checkpoint in found:
        del checkpoint["settings"]
        checkpoint["log"] = [{k: row[k] for k in row.keys() - times} for row in checkpoint["log"]]
    return *found, [{k: row[k] for k in row.keys() - times} for row in read_log(out)]


RECIPE = "--augment flip-crop --schedule cosine --warmup-epochs 1 --clip-grad 0.5 --ema 0.8"


@pytest.mark.parametrize("flags", ["", RECIPE])
def test_resume_restores_everything(go, tmp_path, monkeypatch, flags):
    flags = ["--epochs", "4", *flags.split()]
    go(*flags, out="straight")
    calls = []
    train_one_epoch = train.train_one_epoch

    def stop_before_the_third(config, training, epoch):
        calls.append(epoch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_one_epoch(config, training, epoch)

    monkeypatch.setattr(train, "train_one_epoch", stop_before_the_third)
    with pytest.raises(KeyboardInterrupt):
        go(*flags)
    train.main(["--resume", str(tmp_path / "out" / "last.pt")])
    assert calls == [0, 1, 2, 2, 3]
    straight, resumed = comparable(tmp_path / "straight"), comparable(tmp_path / "out")
    assert all(map(states_equal, straight, resumed))
    assert not states_equal(straight[0]["model"], go("--epochs", "3", out="three")["model"])
    train.main(["--resume", "auto", "--output-dir", str(tmp_path / "out")])  # the run is finished
    assert len(calls) == 8


def test_a_run_stopped_before_its_copy_in_another_folder_begins_there_again(
    go, tmp_path, monkeypatch, capsys
):
    """The settings alone would say that no epoch is finished."""
    first, other = go("--epochs", "2", out="first"), tmp_path / "other $folder"
    argv = ["--resume", str(tmp_path / "first" / "last.pt"), "--epochs", "3"]
    argv += ["--output-dir", str(other)]
    with monkeypatch.context() as full, pytest.raises(OSError, match="full"):
        full.setattr(train, "save_checkpoint", lambda *_, **__: raise_full())
        train.main(argv)
    assert not (other / "args.json").exists() and not (other / "last.pt").exists()
    train.main(argv)
    assert f"next: python evaluate.py '{other}/last.pt'\n" in capsys.readouterr().out
    log = checkpoints.load_checkpoint(other / "last.pt")["log"]
    assert log[:2] == first["log"] and len(log) == 3
    with pytest.raises(UserError, match=r"folder holds an earlier run: continue it with --resume"):
        train.main(argv)  # which would begin again with the third epoch


def raise_full() -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("flags", "said"),
    [("", "add --resume auto to continue"), ("--resume auto", "run it again to continue"),
     ("--resume=auto", "run it again to continue")],
)  # fmt: skip
def test_an_interrupted_run_says_how_to_continue(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.setattr(sys, "argv", ["train.py", "--output-dir", str(tmp_path), *flags.split()])
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match=r"^130$"):
        runpy.run_path(train.__file__, run_name="__main__")
    assert capsys.readouterr().err == f"\nstopped; what was finished is kept, {said}\n"


def test_a_finished_run_is_extended_by_the_new_schedule(go, tmp_path, monkeypatch, capsys):
    first = go("--epochs", "3", "--lr", "0.01")
    capsys.readouterr()
    seen, train_one_epoch = [], train.train_one_epoch

    def observe(config, training, epoch):
        if not seen:
            state, optimizer = training.model.state_dict(), training.optimizer.state_dict()
            assert states_equal(dict(state), dict(first["model"]))
            assert states_equal(optimizer["state"], first["optimizer"]["state"])
        seen.append(epoch)
        return train_one_epoch(config, training, epoch)

    monkeypatch.setattr(train, "train_one_epoch", observe)
    train.main(["--resume", "auto", "--epochs", "6", "--output-dir", str(tmp_path / "out")])
    line = (
        "from epoch 4 on, the learning rate (1.0e-03) follows --milestones 2 4 5.33333 of 6 epochs"
    )
    assert f"{line} (before: --milestones 1 2 2.66667 of 3)\n" in capsys.readouterr().out
    last = checkpoints.load_checkpoint(tmp_path / "out" / "last.pt")
    saved = json.loads((tmp_path / "out" / "args.json").read_text())
    for settings in (last["settings"], saved):
        assert settings["epochs"] == 6 and settings["milestones"] == pytest.approx([2, 4, 16 / 3])
    assert seen == [3, 4, 5]
    rates = [row["lr"] for row in last["log"]]
    assert rates == pytest.approx([1e-2, 1e-3, 1e-4, 1e-3, 1e-4, 1e-5])
    train.main(["--resume", str(tmp_path / "out" / "last.pt"), "--epochs", "6"])
    assert "from epoch" not in capsys.readouterr().out and len(seen) == 3


def test_a_cosine_is_named_where_a_run_is_extended(go, tmp_path, capsys):
    go("--epochs", "1", "--schedule", "cosine")
    train.main(["--resume", str(tmp_path / "out" / "last.pt"), "--epochs", "2"])
    line = "follows a cosine of 2 epochs (before: a cosine of 1)\n"
    assert line in capsys.readouterr().out


def test_milestones_that_were_chosen_stay_when_a_run_is_extended(go, tmp_path):
    go("--epochs", "1", "--milestones", "1", "--lr", "0.01")
    last = str(tmp_path / "out" / "last.pt")
    assert parse_train_config(["--resume", last, "--epochs", "5"])[0].milestones == [1]
    own = parse_train_config(["--resume", last, "--epochs", "5", "--milestones", "3"])[0]
    assert own.milestones == [3] and own.learning_rate(1) == 0.01
    train.main(["--resume", last, "--epochs", "3"])
    with pytest.raises(
        UserError, match=r"--epochs 2 is fewer than the 3 that .*last\.pt has: raise"
    ):
        parse_train_config(["--resume", last, "--epochs", "2"])


def test_a_run_that_was_to_be_longer_is_that_longer_run(go, tmp_path):
    """Check that more --epochs before the first milestone give the bits of a run of that length."""
    go("--epochs", "6", out="straight")
    log = train.log_csv

    def stop_after_the_first(rows):
        if len(rows) > 1:
            raise KeyboardInterrupt
        return log(rows)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "log_csv", stop_after_the_first)
        go("--epochs", "3")
    go("--resume", "auto", "--epochs", "6")
    straight, extended = comparable(tmp_path / "straight"), comparable(tmp_path / "out")
    assert all(map(states_equal, straight, extended))


def test_a_run_whose_first_epoch_was_interrupted_keeps_its_settings(go, tmp_path):
    straight = go("--epochs", "3", "--lr", "0.01", "--alpha", "0.7", out="straight")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_one_epoch", lambda *_: signal.default_int_handler(2, None))
        go("--epochs", "3", "--lr", "0.01", "--alpha", "0.7")
    out, auto = tmp_path / "out", ["--resume", "auto", "--output-dir", str(tmp_path / "out")]
    assert not (out / "last.pt").exists()
    before = (out / "args.json").read_text()
    assert parse_train_config(auto)[0].alpha == 0.7
    assert parse_train_config(auto[2:])[0].alpha != 0.7  # which begins again
    with pytest.raises(
        UserError, match=r"^--lr is 3\.0, but the run in .*out was begun with 0\.01:"
    ):
        train.main([*auto, "--lr", "3"])
    assert (out / "args.json").read_text() == before
    assert parse_train_config([*auto, "--epochs", "6"])[0].milestones == pytest.approx(
        [2, 4, 16 / 3]
    )
    train.main([*auto, "--lr", "0.01"])
    resumed = checkpoints.load_checkpoint(out / "last.pt")
    assert states_equal(resumed["model"], straight["model"]) and resumed["settings"]["alpha"] == 0.7
    (out / "last.pt").unlink()
    (out / "best.pt").unlink()
    for content, message in (("{", "is damaged: remove it"), ("[1]", "is damaged: remove it"),
                             ("[" * 100_000, "is damaged: remove it"),
                             ("{}", "args.json has no setting alpha")):  # fmt: skip
        (out / "args.json").write_text(content)
        with pytest.raises(UserError, match=message):
            parse_train_config(auto)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_crash_between_best_and_last_changes_no_bit(go, tmp_path, monkeypatch, epoch):
    """Check that the second epoch is repeated, and that the first is continued from best.pt."""
    correct = iter([1, 2, 1, 2, 2])
    monkeypatch.setattr(train, "count_correct", lambda *_: next(correct))
    go(out="straight")
    write, written = checkpoints.atomic_write, []

    def crash_after_the_first_of_an_epoch(path, content):
        write(path, content)
        written.append(path.name)
        if len(written) == 2 * epoch - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "atomic_write", crash_after_the_first_of_an_epoch)
        go()
    assert (tmp_path / "out" / "last.pt").exists() == (epoch == 2)
    go("--resume", "auto")
    straight, resumed = comparable(tmp_path / "straight"), comparable(tmp_path / "out")
    assert all(map(states_equal, straight, resumed))
    assert len(resumed[1]["log"]) == 2


def test_best_is_not_overwritten_where_a_damaged_last_was_removed(go, tmp_path):
    content, out = go("--epochs", "1"), tmp_path / "out"
    before = (out / "best.pt").read_bytes()
    (out / "last.pt").unlink()
    with pytest.raises(
        UserError, match=r"holds an earlier run: continue it with --resume .*best\.pt"
    ):
        go()
    assert (out / "best.pt").read_bytes() == before
    again = go("--resume", "auto", "--epochs", "1")  # which writes last.pt
    assert all(states_equal(again[k], content[k]) for k in content.keys() - {"settings"})


def test_what_another_run_has_written_before_the_lock_is_continued(go, tmp_path, monkeypatch):
    """Check two runs that resume at the same time: the second one gets the lock after the first."""
    go("--epochs", "1")
    resumed = "--resume", "auto", "--epochs", "2"
    lock_folder, trained = train.lock_folder, []

    def lock_late(folder):
        monkeypatch.setattr(train, "lock_folder", lock_folder)
        go(*resumed)
        trained.append((folder / "last.pt").read_bytes())
        (folder / "log.csv").unlink()  # a lost log is written again
        return lock_folder(folder)

    monkeypatch.setattr(train, "lock_folder", lock_late)
    go(*resumed)
    assert (tmp_path / "out" / "last.pt").read_bytes() == trained[0]
    assert len(read_log(tmp_path / "out")) == 2


def test_a_checkpoint_of_an_earlier_version_resumes(go, tmp_path):
    content, last = go("--epochs", "1"), tmp_path / "out" / "last.pt"
    for name in (*EARLIER, "held_out", "test_fingerprint"):
        content["settings"].pop(name)
    checkpoints.save_checkpoint([last], **content)
    args, _ = parse_train_config(["--resume", str(last)])
    new, _ = parse_train_config(["--output-dir", "new"])
    assert all(getattr(args, name) == getattr(new, name) for name in EARLIER)
    assert args.preprocess == "squash" and args.mix_at == ["input"]
    with pytest.raises(UserError, match=r"--preprocess is center-crop, but .* with squash"):
        parse_train_config(["--resume", str(last), "--preprocess", "center-crop"])


def test_killed_and_resumed_is_the_same_to_the_bit(go, folder, tmp_path, monkeypatch, capsys):
    """Check SIGKILL at a random moment of a real run. tests/faults does this many times."""
    argv = ["--epochs", "12", "-b", "6", "--resume", "auto"]
    go(*argv, out="straight")
    assert "clean accuracy" in capsys.readouterr().out
    command = [
        sys.executable, str(ROOT / "train.py"), "--arch", "tiny:convnet", "--data", str(folder),
        "--size", "12", *argv, "--cache-dir", str(tmp_path / "cache"), "--device", "cpu",
        "--output-dir", str(tmp_path / "killed"),
    ]  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as in this process
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT / "tests" / "support", **pipes)
    next(line for line in process.stdout if line.startswith("epoch"))
    time.sleep(random.Random(1).uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    go(*argv, out="killed")
    said = capsys.readouterr().out
    assert "clean accuracy" in said and "epoch  1/12" not in said  # it goes on
    assert "epoch 12/12" in said
    straight, killed = comparable(tmp_path / "straight"), comparable(tmp_path / "killed")
    assert all(map(states_equal, straight, killed))
    assert len(straight[2]) == 12


@pytest.mark.parametrize(
    "closed", [pytest.param("<&- >&-", marks=pytest.mark.slow), "<&- >&- 2>&-"]
)
def test_closed_streams_do_not_end_a_run_nor_name_its_files(folder, tmp_path, closed):
    """A job may start without them. What is written to them must not reach a file of the run."""
    code = (
        "import os, train; from harness.errors import run_script\n"
        "def main():\n"
        "    file = os.open('opened', os.O_CREAT | os.O_WRONLY)\n"
        "    os.write(1, b'x'), os.write(2, b'x'), os.write(file, str(file).encode())\n"
        "    train.main()\n"
        "run_script(main)"
    )
    command = [
        sys.executable, "-c", code, "--arch", "tiny:convnet", "--data", str(folder), "--size", "12",
        "-b", "26", "--epochs", "1", "--cache-dir", str(tmp_path / "cache"), "--device", "cpu",
        "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    shell = f"PYTHONPATH={shlex.quote(path)} {shlex.join(command)} {closed}"
    done = subprocess.run(shell, shell=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and (tmp_path / "out" / "last.pt").exists()
    assert int((tmp_path / "opened").read_text()) > 2


def test_an_epoch_is_saved_before_its_line_is_printed(go, tmp_path, monkeypatch):
    """Printing may fail, where the pipe was closed."""

    def close(*_):
        raise BrokenPipeError

    monkeypatch.setattr(train, "log_line", close)
    with pytest.raises(BrokenPipeError):
        go()
    assert len(checkpoints.load_checkpoint(tmp_path / "out" / "last.pt")["log"]) == 1


def test_a_loss_that_is_not_finite_stops_the_run(go, tmp_path, monkeypatch):
    train_one_epoch = train.train_one_epoch

    def explode(config, training, epoch):
        return train_one_epoch(replace(config, lr=1e30) if epoch else config, training, epoch)

    monkeypatch.setattr(train, "train_one_epoch", explode)
    with pytest.raises(
        UserError, match=r"the loss became (nan|inf) in epoch 2 .*: start again with a lower --lr"
    ):
        go("--opt", "sgd")
    kept = checkpoints.load_checkpoint(tmp_path / "out" / "last.pt")
    assert len(kept["log"]) == 1
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_a_network_without_finite_logits_is_not_saved(go, tmp_path, monkeypatch):
    train_one_epoch = train.train_one_epoch

    def ruin(config, training, epoch):
        losses = train_one_epoch(config, training, epoch)
        if epoch:  # as by the last update, after which no loss is computed
            next(training.model.parameters()).data.fill_(torch.nan)
        return losses

    monkeypatch.setattr(train, "train_one_epoch", ruin)
    with pytest.raises(
        UserError, match="logits are not finite after epoch 2: start again with a lower --lr"
    ):
        go()
    assert len(checkpoints.load_checkpoint(tmp_path / "out" / "last.pt")["log"]) == 1


# ---------------------------------------------------------------- wrong usage


def test_a_wrong_folder_or_architecture_is_reported_before_the_data_are_loaded(
    go, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "load_dataset", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        go(out="file")
    with lock_folder(tmp_path / "out"), pytest.raises(UserError, match="another run is writing"):
        go()
    for arch in ("resnet5O", "torchvision:cnn4", "timm:resnet5O"):
        with pytest.raises(UserError, match=f"--arch {arch}: "):
            go("--arch", arch, out="new")
    with pytest.raises(UserError, match="--data nowhere: no such folder"):
        go("--data", "nowhere", out="new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_says_so_and_keeps_the_last_checkpoint(go, tmp_path, monkeypatch, capsys):
    go()
    before = (tmp_path / "out" / "last.pt").read_bytes()

    def full(path: Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as exit_info:
        errors.run_script(
            lambda: checkpoints.save_checkpoint([tmp_path / "out" / "last.pt"], model={})
        )
    assert exit_info.value.code == 2
    assert "No space left on device; free some space: what was finished" in capsys.readouterr().err
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "out").glob(".*.unfinished"))


@pytest.mark.parametrize("error", [13, 1, 30])  # EACCES, EPERM, EROFS
def test_a_place_without_permission_may_be_changed(
    error: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        raise OSError(error, "No", "cache")

    with pytest.raises(SystemExit):
        errors.run_script(write)
    assert ("; change its permissions" in capsys.readouterr().err) == (error != 30)


def test_a_file_that_cannot_be_replaced_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Windows a program that has the file open keeps it from being replaced."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Access is denied", str(source), None, str(target))

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(SystemExit):
        errors.run_script(lambda: atomic_write(tmp_path / "results.csv", "1"))
    said = f"error: {tmp_path / 'results.csv'}: Access is denied; close it in other programs"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_plain_command_as_a_process(tmp_path):
    """Run the command of the README with small images, one epoch and a small network."""
    command = [sys.executable, str(ROOT / "train.py"), "--arch", "resnet18", "--size", "16"]
    command += ["--epochs", "1", "-b", "200", "--classes", "3", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 classes: " in done.stdout
    assert f"checkpoint: {tmp_path / 'last.pt'}\nnext: python evaluate.py" in done.stdout
    wrong = subprocess.run([*command, "--alpha", "0"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: argument --alpha: 0 is out")


def test_all_data_names_are_offered():
    text = build_parser(TrainConfig).format_help()
    assert all(re.search(rf"\b{name}\b", text) for name in datasets.SIZES)


def test_a_resumed_run_keeps_the_scale_of_the_losses(go, tmp_path):
    go("--epochs", "1")
    argv = ["--resume", str(tmp_path / "out" / "last.pt"), "--epochs", "2", "--device", "cpu"]
    config, checkpoint = parse_train_config(argv)
    config = replace(config, amp="fp16")  # which the command line refuses on a CPU
    checkpoint["scaler"] = torch.amp.GradScaler("cpu", init_scale=128.0).state_dict()
    assert train.build(config, train.load_data(config), checkpoint).scaler.get_scale() == 128.0


def test_a_run_of_an_apple_gpu_is_continued_with_the_fused_optimizer(go, tmp_path):
    """A scaler passes its scale to an optimizer that was built as fused."""
    go("--epochs", "1")
    argv = ["--resume", str(tmp_path / "out" / "last.pt"), "--epochs", "2", "--device", "cpu"]
    config, checkpoint = parse_train_config(argv)
    config = replace(config, amp="fp16")  # which the command line refuses on a CPU
    checkpoint["scaler"] = torch.amp.GradScaler("cpu").state_dict()
    checkpoint["optimizer"]["param_groups"][0]["fused"] = False  # as build_optimizer for mps
    training = train.build(config, train.load_data(config), checkpoint)
    assert all(map(math.isfinite, train.train_one_epoch(config, training, 1)))


@pytest.mark.parametrize(
    "change",
    [{"exp_avg": torch.zeros(2)}, {"exp_avg": "x"}, {"more": torch.zeros(())}],
    ids=["shape", "type", "name"],
)
def test_an_optimizer_that_does_not_fit_the_model_is_refused(go, tmp_path, change):
    """A fused step would write beyond the end of its memory."""
    go("--epochs", "1")
    argv = ["--resume", str(tmp_path / "out" / "last.pt"), "--epochs", "2", "--device", "cpu"]
    config, checkpoint = parse_train_config(argv)
    checkpoint["optimizer"]["state"][0] |= change
    with pytest.raises(UserError, match=r"last\.pt: its optimizer does not fit the model \("):
        train.build(config, train.load_data(config), checkpoint)


@pytest.mark.parametrize("trained", [{}, {"trained": 5}, {"trained": {"0.weight": torch.ones(1)}}])
def test_weights_beside_an_average_that_do_not_fit_the_model_are_refused(go, tmp_path, trained):
    go("--epochs", "1", "--ema", "0.5")
    argv = ["--resume", str(tmp_path / "out" / "last.pt"), "--epochs", "2", "--device", "cpu"]
    config, checkpoint = parse_train_config(argv)
    del checkpoint["trained"]
    with pytest.raises(UserError, match=r"last\.pt: its weights beside --ema's average do not fit"):
        train.build(config, train.load_data(config), checkpoint | trained)


def test_an_optimizer_that_shares_memory_between_weights_gets_its_own(go, tmp_path):
    go("--epochs", "1")
    argv = ["--resume", str(tmp_path / "out" / "last.pt"), "--epochs", "2", "--device", "cpu"]
    config, checkpoint = parse_train_config(argv)
    state = checkpoint["optimizer"]["state"][0]
    state["exp_avg"] = torch.zeros(()).expand(state["exp_avg"].shape)
    restored = train.build(config, train.load_data(config), checkpoint).optimizer
    average = next(iter(restored.state.values()))["exp_avg"]
    assert average.untyped_storage().nbytes() == 4 * average.numel()


def test_an_empty_cache_of_an_earlier_version_is_the_default(go, tmp_path):
    go("--epochs", "1")
    path = tmp_path / "out" / "last.pt"
    earlier = torch.load(path)
    earlier["settings"]["cache_dir"] = ""
    torch.save(earlier, path)
    config, _ = parse_train_config(["--resume", str(path)])
    assert config.cache_dir == TrainConfig.cache_dir


def test_a_resumed_run_keeps_its_cache_unless_another_is_given(go, tmp_path):
    go("--epochs", "1")
    argv = ["--resume", str(tmp_path / "out" / "last.pt")]
    assert parse_train_config(argv)[0].cache_dir == str(tmp_path / "cache")
    assert parse_train_config([*argv, "--cache-dir", "other"])[0].cache_dir == "other"
