"""Test how an epoch is logged."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from harness.training import log
from harness.training.log import header, log_csv, log_line, trained_with

ROW: dict[str, Any] = {
    "epoch": 3, "lr": 0.002, "loss1": 1.23456, "loss2": None, "clean_accuracy": 0.4567,
    "images_per_second": 123.4, "seconds_left": 125,
}  # fmt: skip


@pytest.mark.parametrize("changed, epochs, line", [
    ({}, 90, "epoch  3/90  lr 2.0e-03  loss1 1.2346  clean accuracy  45.7 %  123 images/s"
             "  2:05 left"),
    ({"loss2": 2.0, "clean_accuracy": 1.0, "seconds_left": 59}, 3,
     "epoch 3/3  lr 2.0e-03  loss1 1.2346  loss2 2.0000  clean accuracy 100.0 %  123 images/s"
     "  0:59 left"),
])  # fmt: skip
def test_a_line_has_what_an_epoch_measured(changed: dict[str, Any], epochs: int, line: str) -> None:
    assert log_line(ROW | changed, epochs) == line


def test_csv_has_a_row_per_epoch() -> None:
    rows = [ROW, ROW | {"epoch": 4, "loss2": 0.5}]
    read = csv.DictReader(io.StringIO(log_csv(rows)))
    expected = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert list(read) == expected
    with_another_loss = csv.DictReader(io.StringIO(log_csv([*rows, ROW | {"loss3": 1.0}])))
    assert list(with_another_loss)[:2] == [row | {"loss3": ""} for row in expected]


def test_a_class_cannot_break_the_header() -> None:
    data = Mock(classes=["a\x1b[31m", "b\nc"], fingerprint="0" * 16)
    data.train.labels = data.test.labels = [0, 1]
    said = header(Mock(method="mtlat", minibatch_size=1), data)
    assert "2 classes: a\\x1b[31m b\\nc\n" in said


def test_a_resumed_run_names_what_the_epochs_before_were_trained_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = {"torch": "2.14.1", "python": "3.14.2"}
    monkeypatch.setattr(log, "environment_info", lambda device: now)
    config, saved = Mock(epochs=3), {"torch": "2.11.0", "python": "3.14.2"}
    assert trained_with(config, None) == now
    both = saved | {"torch": "2.11.0, then 2.14.1"}
    assert trained_with(config, {"settings": saved, "log": [ROW] * 2}) == both
    assert trained_with(config, {"settings": both, "log": [ROW] * 2}) == both
    assert trained_with(config, {"settings": saved, "log": [ROW] * 3}) == saved
    assert trained_with(config, {"settings": {}, "log": [ROW]}) == now
    other = trained_with(config, {"settings": {**now, "torch": "12.14.1"}, "log": [ROW]})
    assert other["torch"] == "12.14.1, then 2.14.1"  # though the one ends like the other


def test_a_checkpoint_and_args_json_name_them(
    go: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = go()["settings"]["torch"]
    monkeypatch.setattr(log, "environment_info", lambda device: {"torch": "9.0"})
    for epochs in ("2", "3"):
        settings = go("--resume", "auto", "--epochs", epochs)["settings"]
        shown = json.loads((tmp_path / "out" / "args.json").read_text())["torch"]
        assert shown == settings["torch"] == (now if epochs == "2" else f"{now}, then 9.0")
