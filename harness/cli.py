"""Command lines declared as dataclasses: each field is an option with type, default and help.

@dataclass(frozen=True)
class Config:
    epochs: int = option(90, "passes over the training set", type=number(int, 1))

values, given = parse_options(Config, argv, __doc__)
config = Config(**values)                   # after the caller has filled in dependent defaults
"""

import argparse
import dataclasses
import math
import os
import shlex
import subprocess
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from harness.errors import UserError


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` on wrong usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """Make an argparse type that accepts numbers from `low` to `high`.

    Args:
        kind: int or float.
        low, high: the range, both ends included.
        above: exclude `low` itself.
    """
    rule = f"above {low}" if above else f"from {low}"
    rule += f" to {high}" if high < math.inf else ("" if above else " up")

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not of type {kind.__name__}") from None
        if not low <= value <= high or (above and value == low) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {rule}")
        return value

    return convert


def _text(value: str) -> str:
    if not value:  # such as an unset variable of a shell
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave it out")
    return value


def format_command(words: Sequence[str]) -> str:
    """Format a command line as one would type it, on Windows without single quotes."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def option(
    default: Any, help: str, *, flags: tuple[str, ...] = (), group: str = "",
    may_change: bool = False, **arguments: Any,
) -> Any:  # fmt: skip
    """Declare a field of a configuration dataclass as a command-line option.

    Args:
        default: the value without the option; `dataclasses.MISSING` for a positional argument.
        help: the text of --help.
        flags: other spellings, for example ("-b",); a positional argument has none.
        group: the heading of --help that begins with this option.
        may_change: whether a resumed run may pass another value.
        arguments: passed to `ArgumentParser.add_argument`. Without a `type`, an empty value is
            refused.
    """
    metadata = {"help": help, "flags": flags, "group": group, "may_change": may_change,
                "arguments": arguments}  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def build_parser(config: type, description: str | None = None) -> Parser:
    """Build the parser of a configuration dataclass."""
    parser = Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    add = parser.add_argument
    for field in dataclasses.fields(config):
        if field.metadata["group"]:
            add = parser.add_argument_group(field.metadata["group"]).add_argument
        arguments = {"help": field.metadata["help"], **field.metadata["arguments"]}
        if field.type is not bool:
            arguments.setdefault("type", _text)
        if field.default is dataclasses.MISSING:
            add(field.name, **arguments)
            continue
        name = f"--{field.name.replace('_', '-')}"
        flags = sorted([name, *field.metadata["flags"]], key=lambda flag: flag.startswith("--"))
        if field.type is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        add(*flags, dest=field.name, default=field.default, **arguments)
    return parser


def parse_options(
    config: type, argv: list[str] | None, description: str | None
) -> tuple[dict[str, Any], set[str]]:
    """Parse a command line.

    Returns:
        The values by field name, and the names of the fields that the command line gives.
    """
    parser = build_parser(config, description)
    values = vars(parser.parse_args(argv))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return values, set(vars(parser.parse_args(argv)))


def check_saved(config: type, saved: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Check values of options that were read from a file, `path`.

    Raises:
        UserError: the command line would not accept a value, or give another one for it.
    """
    for field in dataclasses.fields(config):
        if field.name not in saved:
            continue
        value, flag = saved[field.name], f"--{field.name.replace('_', '-')}"
        if value is None and type(None) in typing.get_args(field.type):
            continue
        words = [f"{flag}={value}"]
        if isinstance(value, list):  # without dashes, since --help would end the script
            words = [flag, *(str(item).lstrip("-") for item in value)]
        if isinstance(value, bool):
            words = [flag if value else f"--no-{flag[2:]}"]
        try:
            same = parse_options(config, words, None)[0][field.name] == value
        except UserError:
            same = False
        if not same:
            raise UserError(f"{path}: its setting {field.name} cannot be {value!r:.80}: restore it")
