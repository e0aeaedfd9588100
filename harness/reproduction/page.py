"""A page of text, tables and figures as one HTML file that needs no network and no script.

The HTML is in page.html, a Jinja2 template, and the style in page.css. This file prepares what the
template shows.
"""

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2

from harness.benchmark.plots import DPI

# The sign and the mark of a failed check behind a number in a table: 0.83+, 0.83(-) or 0.83-!
SIGN = re.compile(r"(?<=\d)(\(?[+-]\)|[+-]?)(!?)(?=[\s,;/]|$)")
NUMBER = re.compile(r"[-+±%!.,:/()\s\d]*( to [-+\d.]+\)?)?|not run")


class Part(NamedTuple):
    """A column's heading or a piece of a cell, with the CSS classes that align or color it."""

    text: str
    css: str = ""


@dataclass
class Figure:
    """A PNG file, embedded. The caption is its text alternative too.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a PNG file.
    """

    path: Path
    caption: str

    def __post_init__(self) -> None:
        data = self.path.read_bytes()
        if data[:8] != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"{self.path} is not a PNG file: give a figure that savefig wrote")
        self.width, self.height = struct.unpack(">II", data[16:24])
        self.inches = self.width / DPI
        self.base64 = base64.b64encode(data).decode()


@dataclass
class Table:
    """A table of text: the first row is the header, the first column names the rows.

    Raises:
        ValueError: the rows differ in length.
    """

    caption: str
    rows: list[list[str]]
    notes: Sequence[str] = ()
    fold: bool = False  # whether the page shows it only when the reader asks

    def __post_init__(self) -> None:
        header, *rows = self.rows
        contents = zip(header, *rows, strict=True)
        self.columns = [Part(heading, _column_class(cells)) for heading, *cells in contents]
        self.body = [(name, [*map(_split_signs, cells)]) for name, *cells in rows]


@dataclass
class Text:
    """Plain text; an empty line begins a new paragraph."""

    text: str

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs of the text."""
        return re.split(r"\n\s*\n", self.text.strip())


@dataclass
class Code:
    """Commands or output, shown unchanged."""

    text: str


Block = Figure | Table | Text | Code


class Section(NamedTuple):
    """A part of the page with a heading of its own."""

    title: str
    blocks: list[Block]


def render_page(title: str, lead: str, sections: list[Section]) -> str:
    """Render the page as HTML. Text that looks like HTML is shown literally.

    Args:
        title: of the page.
        lead: the first paragraphs.
        sections: the rest, listed in a table of contents.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((folder / "page.html").read_text())
    style = (folder / "page.css").read_text()
    return template.render(title=title, lead=Text(lead), sections=sections, style=style) + "\n"


def _column_class(cells: Sequence[str]) -> str:
    """Choose a column's class: numbers are set to the right, long text in several lines."""
    if all(NUMBER.fullmatch(cell) for cell in cells):
        return "number"
    return "long" if max(map(len, cells)) > 30 else ""


def _split_signs(content: str) -> list[Part]:
    """Split a cell at its signs, to color them. One at its end hangs over, to align the digits."""
    parts, start = [], 0
    for match in SIGN.finditer(content):
        sign, mark = match.groups()
        if sign + mark:
            css = {"+": "better", "-": "worse", "": "doubt"}.get(sign, "undecided")
            css += " hang" if match.end() == len(content) else ""
            parts += [Part(content[start : match.start()])]
            parts += [Part(sign.replace("-", "\N{MINUS SIGN}") + mark, css)]
            start = match.end()
    return [*parts, Part(content[start:])]
