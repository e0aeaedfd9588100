"""A page of text, tables and figures as one HTML file that needs no network and no script."""

import base64
import re
import struct
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

DPI = 150  # of the figures: a figure's size in inches decides how large it is on the page
SIGN = re.compile(r"(?<=\d)([+-]?)(!?)(?=[\s,;/)]|$)")  # of report.grid: 0.83+ or 0.83-!
NUMBER = re.compile(r"[-+±%!.,:/()\s\d]*( to [\d.]+)?|not run")


class Figure(NamedTuple):
    """A PNG file, embedded; the caption is its text alternative too."""

    path: Path
    caption: str


class Table(NamedTuple):
    """Cells as text: the first row is the header, the first column names the rows."""

    caption: str
    rows: list[list[str]]
    notes: Sequence[str] = ()


class Text(NamedTuple):
    """Plain text; an empty line begins a new paragraph."""

    text: str


class Code(NamedTuple):
    """Commands or output, kept as they are."""

    text: str


Block = Figure | Table | Text | Code


class Section(NamedTuple):
    title: str
    blocks: list[Block]


def page(title: str, lead: str, sections: list[Section]) -> str:
    """Make the page: title, a first paragraph, the contents, and the sections.

    All text is taken literally: whatever looks like HTML in it is shown, not obeyed. Raises OSError
    if a figure cannot be read, and ValueError if it is no PNG or a table's rows differ in length.
    """
    links = "".join(
        f'<li><a href="#s{i}">{escape(section.title)}</a></li>\n'
        for i, section in enumerate(sections, 1)
    )
    body = "".join(
        f'<section id="s{i}" aria-labelledby="h{i}">\n<h2 id="h{i}">{escape(section.title)}</h2>\n'
        f"{''.join(map(_block, section.blocks))}</section>\n"
        for i, section in enumerate(sections, 1)
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{POLICY}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{_paragraphs(lead)}</header>\n"
        f'<nav aria-label="Contents">\n<ol>\n{links}</ol>\n</nav>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Text):
        return _paragraphs(block.text)
    return f'<pre tabindex="0"><code>{escape(block.text)}</code></pre>\n'


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(part)}</p>\n" for part in re.split(r"\n\s*\n", text.strip()))


def _figure(figure: Figure) -> str:
    data = figure.path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{figure.path} is no PNG: give a figure that savefig wrote as one")
    width, height = struct.unpack(">II", data[16:24])
    caption, inches = escape(figure.caption), width / DPI
    return (
        f'<figure>\n<div class="box" tabindex="0" role="region" aria-label="{caption}">'
        f'<img width="{width}" height="{height}" style="--inches: {inches:.2f}" alt="{caption}"'
        f' src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>\n"
    )


def _table(table: Table) -> str:
    header, *rows = table.rows
    columns = list(zip(header, *rows, strict=True))
    kinds = [_kind(column[1:]) for column in columns]
    head = "".join(
        f'<th scope="col"{kind}>{escape(cell)}</th>'
        for cell, kind in zip(header, kinds, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td{k}>{_cell(c)}</td>" for c, k in zip(cells, kinds[1:], strict=True))
        + "</tr>\n"
        for name, *cells in rows
    )
    caption = escape(table.caption)
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in table.notes)
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{caption}">\n<table>\n'
        f"<caption><span>{caption}</span></caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}</tbody>\n</table>\n</div>\n"
        + (f'<ul class="notes">\n{notes}</ul>\n' if notes else "")
    )


def _kind(cells: Sequence[str]) -> str:
    """How a column is set: numbers to the right, long text in several lines."""
    if all(NUMBER.fullmatch(cell) for cell in cells):
        return ' class="number"'
    return ' class="long"' if max(map(len, cells)) > 30 else ""


def _cell(content: str) -> str:
    """The cell with its signs in colour; one at its end hangs over, so that the digits align."""

    def mark(match: re.Match[str]) -> str:
        sign, doubt = match.groups()
        if not sign + doubt:
            return ""
        kind = {"+": "better", "-": "worse", "": "doubt"}[sign]
        hang = " hang" if match.end() == len(content) else ""
        return f'<b class="{kind}{hang}">{sign.replace("-", "&minus;")}{doubt}</b>'

    return SIGN.sub(mark, escape(content))


POLICY = (  # the browser's word for it: nothing is fetched, nothing runs
    '<meta http-equiv="Content-Security-Policy"'
    " content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)

STYLE = """
:root { --ground: #fff; --ink: #1f2328; --dim: #57606a; --line: #d0d7de; --tint: #f6f8fa;
  --link: #0550ae; --better: #116329; --worse: #b3261e; }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #0d1117; --ink: #e6edf3;
  --dim: #9ea7b3; --line: #30363d; --tint: #161b22; --link: #79c0ff; --better: #56d364;
  --worse: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 2vw, 2.5rem) 4rem; max-width: 86rem;
  background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 1rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .8rem 0; }
a { color: var(--link); }
nav ol { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin: 1.5rem 0 0; padding: 0;
  list-style-position: inside; }
.box, pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.box:focus-visible, pre:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
pre { padding: .8rem 1rem; background: var(--tint); font-size: .85rem; line-height: 1.5; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
figure { margin: 1.5rem 0; }
figure .box { background: #fff; padding: .5rem; width: fit-content; max-width: 100%; }
img { display: block; height: auto; max-width: 100%; width: calc(var(--inches) * 96px); }
figcaption, .notes { color: var(--dim); font-size: .9rem; max-width: 46rem; margin-top: .5rem; }
.notes { padding-left: 1.2rem; }
.box:has(table) { margin-top: 1.5rem; width: fit-content; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-size: .8rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem; font-weight: 600; font-size: .88rem; }
caption span { position: sticky; left: .6rem; display: inline-block;
  max-width: min(46rem, 100vw - 4.5rem); }
th, td { padding: .35rem .6rem; text-align: left; border-top: 1px solid var(--line);
  white-space: nowrap; }
thead th { background: var(--tint); }
tbody tr:hover > * { background: var(--tint); }
.number { text-align: right; padding-right: .8rem; padding-left: .25rem; }
.long { white-space: normal; min-width: 14rem; }
th:first-child { position: sticky; left: 0; background: var(--ground);
  border-right: 1px solid var(--line); }
thead th:first-child { background: var(--tint); }
.better { color: var(--better); }
.worse { color: var(--worse); }
.hang { display: inline-block; width: 0; white-space: nowrap; }
@media (max-width: 45rem) {
  img { max-width: none; width: max(100%, calc(var(--inches) * 66px)); }
  th:first-child { min-width: 7rem; max-width: 9rem; overflow-wrap: anywhere;
    white-space: normal; }
}
@media print {
  @page { size: landscape; margin: 12mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  .box, pre { overflow: visible; border: 0; }
  pre { white-space: pre-wrap; }
  table { font-size: 6.8pt; }
  th, td { padding: .2em .5em .2em .3em; }
  .number { padding-right: 1.1em; }
  tr, figure, pre { break-inside: avoid; }
  h2, caption { break-after: avoid; }
}
"""
