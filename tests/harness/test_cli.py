"""Test the command lines that all scripts declare as dataclasses: what --help shows of them."""

from dataclasses import MISSING, fields

import pytest

from harness.benchmark.config import EvalConfig
from harness.cli import build_parser
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
