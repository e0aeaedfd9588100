"""Test the command lines that all scripts declare as dataclasses: --help, and ranges of numbers."""

import argparse
import shlex
from dataclasses import MISSING, fields

import pytest

from harness import cli
from harness.benchmark.config import EvalConfig
from harness.cli import build_parser, format_command, number, parse_options
from harness.errors import UserError
from harness.reproduction.plan import ReproduceConfig
from harness.training.config import TrainConfig


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, ReproduceConfig])
def test_help_shows_every_spelling_and_default(
    config: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")  # no path breaks at a hyphen
    parser = build_parser(config)
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(["--help"])
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in shown
    for field, action in zip(fields(config), parser._actions[1:], strict=True):  # without --help
        formatter = parser._get_formatter()
        formatter.add_argument(action)
        text = " ".join(formatter.format_help().split())
        assert action.dest == field.name and text in shown
        if field.default is not MISSING:
            spellings = {f"--{field.name.replace('_', '-')}", *field.metadata["flags"]}
            assert spellings <= set(text.replace(",", " ").split()), field.name
        if field.default not in (MISSING, None):
            assert text.endswith(f" (default: {field.default})"), field.name


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, ReproduceConfig])
def test_help_shows_each_option_under_the_last_heading_before_it(config: type) -> None:
    parser, heading = build_parser(config), ""
    groups = {action.dest: group for group in parser._action_groups for action in
              group._group_actions}  # fmt: skip
    for field in fields(config):
        heading = field.metadata["group"] or heading
        assert groups[field.name].title == heading, field.name


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, ReproduceConfig])
def test_help_breaks_no_word_at_a_hyphen(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = build_parser(config)
    for columns in (70, 80, 90, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        words = [line.split()[-1] for line in parser.format_help().splitlines() if line]
        assert [word for word in words if word.endswith("-") and word != "-"] == []


@pytest.mark.parametrize(
    ("arguments", "accepted", "refused"),
    [
        ({"low": 1}, ["1", "2"], ["0.999"]),
        ({"low": 0, "high": 1}, ["0", "1"], ["-1e-9", "1.001"]),
        ({"low": 0, "above": True}, ["1e-9"], ["0", "-1"]),
        ({"low": 0, "high": 1, "above": True}, ["1"], ["0", "1.001"]),
    ],
)
def test_a_range_includes_its_ends_unless_it_begins_above_one(
    arguments: dict[str, float], accepted: list[str], refused: list[str]
) -> None:
    convert = number(float, **arguments)
    assert [convert(text) for text in accepted] == [float(text) for text in accepted]
    for text in (*refused, "nan", "inf", "one"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            convert(text)


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, ReproduceConfig])
def test_an_empty_value_is_refused(config: type) -> None:
    """It is what an unset variable of a shell leaves."""
    for field in fields(config):
        if field.type is bool or "type" in field.metadata["arguments"]:  # numbers refuse it, too
            continue
        name = "" if field.default is MISSING else f"--{field.name.replace('_', '-')}"
        with pytest.raises(UserError, match=f"{name}.*: it is empty; give a value, or leave it"):
            parse_options(config, [name, ""] if name else [""], None)
    assert parse_options(ReproduceConfig, ["--train-flags", ""], None)[0]["train_flags"] == ""


def test_a_command_can_be_typed_as_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, use no single quotes, which cmd.exe does not know, and leave backslashes."""
    words = ["python", "train.py", "--data", r"C:\my images", "--output-dir", r"runs\a"]
    assert shlex.split(format_command(words)) == words
    monkeypatch.setattr(cli.os, "name", "nt")
    shown = format_command(words)
    monkeypatch.undo()
    assert shown == r'python train.py --data "C:\my images" --output-dir runs\a'
