"""Test that the HTML page is complete, self-contained and safe for any text, and its figures."""

import base64
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Drawing

from harness.benchmark import plots
from harness.reproduction.page import Code, Figure, Section, Table, Text, render_page
from mtlat import Draws
from tests.support.figures import collect_figures
from tests.support.tiny import convnet, linear

HOSTILE = '<script>alert("1")</script> & \' "><img src=x onerror=go()> &amp; </style>'
ALLOWED = (
    "html head meta link title style body header h1 h2 p nav ol ul li a main section figure div img"
    " figcaption table caption span thead tbody tr th td pre code"
)


class Reader(HTMLParser):
    """Parse a page like a browser: collect its elements, and the text inside each kind."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append((tag, ""))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        for i in range(len(self.texts) - 1, -1, -1):
            if self.open and self.texts[i][0] == self.open[-1]:
                self.texts[i] = (self.open[-1], self.texts[i][1] + data)
                break

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [content for name, content in self.texts if name == tag]


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Drawing((3, 2), dpi=150).savefig(path)
    return path


def test_hostile_text_stays_text_everywhere(png: Path) -> None:
    table = Table(HOSTILE, [[HOSTILE, "R"], [HOSTILE, HOSTILE]], [HOSTILE])
    blocks: list[Any] = [Text(HOSTILE), Code(HOSTILE), table, Figure(png, HOSTILE)]
    read = Reader(render_page(HOSTILE, HOSTILE, [Section(HOSTILE, blocks)]))
    assert {tag for tag, _ in read.elements} == set(ALLOWED.split())
    assert not [a for _, attributes in read.elements for a in attributes if a.startswith("on")]
    for tag in ("title", "h1", "h2", "a", "p", "code", "span", "th", "td", "figcaption"):
        assert HOSTILE in read.text(tag), tag
    assert HOSTILE in read.text("li")
    (image,) = read.all("img")
    assert image["alt"] == HOSTILE


@given(st.text(), st.text(), st.text(min_size=1))
def test_any_text_is_read_back(title: str, cell: str, code: str) -> None:
    rows = [["", title], [title, cell]]
    read = Reader(render_page(title, title, [Section(title, [Table(title, rows), Code(code)])]))
    assert read.text("h1") == read.text("h2") == read.text("title") == [title]
    assert read.text("code") == [code]
    assert read.text("th") == ["", title, title]


def test_the_page_needs_nothing_from_elsewhere(png: Path) -> None:
    read = Reader(render_page("t", "l", [Section("s", [Figure(png, "c")])]))
    (image,) = read.all("img")
    kind, _, content = str(image["src"]).partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == png.read_bytes()
    assert (image["width"], image["height"]) == ("450", "300")
    assert image["style"] == "--inches: 3.00"
    addresses = [v for _, a in read.elements for k, v in a.items() if k in ("src", "href")]
    assert all(str(address).startswith(("data:", "#")) for address in addresses)
    (style,) = read.text("style")
    assert "url(" not in style and "@import" not in style and style.count("{") == style.count("}")
    assert "&" not in style and '"Segoe UI"' in style and "> summary" in style  # not escaped
    policy = [a["content"] for a in read.all("meta") if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_screen_reader_finds_its_way_through_the_page() -> None:
    sections = [Section("one", [Table("c", [["model", "R"], ["a", "1"]])]), Section("two", [])]
    read = Reader(render_page("t", "first\n\nsecond", sections))
    assert read.all("html") == [{"lang": "en"}] and read.text("p") == ["first", "second"]
    identifiers = {a["id"] for _, a in read.elements if "id" in a}
    links = [str(a["href"])[1:] for a in read.all("a")]
    assert links == [a["id"] for a in read.all("section")] and len(set(links)) == 2
    assert {a["aria-labelledby"] for a in read.all("section")} <= identifiers
    assert [a["scope"] for a in read.all("th")] == ["col", "col", "row"]
    scrolled = [a for a in read.all("div") if a.get("class") == "box"]
    assert all(a["tabindex"] == "0" and a["aria-label"] == "c" for a in scrolled) and scrolled


def test_signs_are_marked_and_numbers_aligned() -> None:
    rows = [
        ["run-1-", "R", "what"],
        ["a-", "0.83+", "1e-4 - 5-fold"],
        ["b+", "0.51-!", "x"],
        ["c!", "1.00!", "y"],
        ["d", "-", "z"],
        ["e", "0.7+ 0.81(-)", "5"],
    ]
    rows = [[*row, "long " * 7 * (row[0] == "d")] for row in rows]
    content = render_page("t", "l", [Section("s", [Table("c", rows)])])
    read = Reader(content)
    assert [(a["class"], t) for a, t in zip(read.all("b"), read.text("b"), strict=True)] == [
        ("better hang", "+"), ("worse hang", "−!"), ("doubt hang", "!"),  # noqa: RUF001
        ("better", "+"), ("undecided hang", "(−)"),  # noqa: RUF001
    ]  # fmt: skip
    assert [a.get("class") for a in read.all("td")] == ["number", None, "long"] * 5
    assert read.text("th")[4:] == [row[0] for row in rows[1:]]  # signs in names are not marked


def test_what_is_no_figure_or_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"<svg>")
    with pytest.raises(ValueError, match=r"a\.png is not a PNG file"):
        render_page("t", "l", [Section("s", [Figure(tmp_path / "a.png", "c")])])
    with pytest.raises(ValueError):
        render_page("t", "l", [Section("s", [Table("c", [["a", "b"], ["c"]])])])


# ---------------------------------------------------------------------------- figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the figures that are saved during the test."""
    return collect_figures(monkeypatch)


def test_the_picture_of_a_step_shows_a_step(tmp_path: Path, drawn: list[Any]) -> None:
    classes = ["$alpha$", "b", "c" * 60, "<d>", "e"]
    x = 0.1 + 0.8 * torch.rand(8, 3, 12, 12)
    y = torch.arange(8) % 5
    model = convnet(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plots.plot_step(model, x, y, classes, tmp_path / "step.png", seed=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    (figure,) = drawn
    *panels, bars = figure.axes
    x3, x4, x_mix2, enlarged, x_mtlat = (torch.tensor(p.images[0].get_array()) for p in panels)
    i = next(i for i in range(8) if torch.allclose(x[i].permute(1, 2, 0), x3))
    assert torch.allclose(x[i - 1].permute(1, 2, 0), x4)
    shares = [bar.get_width() for bar in bars.patches]
    epsilon = shares[2]  # the target is a third class, with epsilon of the label
    lam = shares[0] / (1 - epsilon)
    assert 0 < epsilon < 0.025 and sum(shares) == pytest.approx(1)
    assert torch.allclose(x_mix2, lam * x3 + (1 - lam) * x4, atol=1e-5)
    signs = 2 * enlarged - 1
    assert torch.allclose(signs, signs.round(), atol=1e-3) and signs.min() < signs.max()
    assert torch.allclose(x_mtlat, (x_mix2 + epsilon * signs).clamp(0, 1), atol=1e-4)
    assert f"{lam:.2f} x3 + {1 - lam:.2f} x4" in panels[2].get_title()
    named = [y[i], y[i - 1]]
    for k, title, bar in zip(named, (panels[0], panels[1]), bars.texts, strict=False):
        assert classes[k][:15] in title.get_title() and classes[k][:15] in bar.get_text()
        assert not title.title.get_parse_math() and not bar.get_parse_math()
    model = linear(5)  # in eval mode a new convnet hardly looks at the images
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        plots.plot_step(model, x, y, classes, tmp_path / name, seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    *panels, _ = drawn[1].axes
    pictures = [torch.tensor(panels[k].images[0].get_array()) for k in (2, 4)]
    shares = 100 * model(torch.stack(pictures).permute(0, 3, 1, 2)).softmax(1)
    said = [float(share) for share in re.findall(r"([\d.]+) %", panels[4].get_title())]
    assert said[0] < said[1]  # the probability of the target, which is neither image's class
    others = [k for k in range(5) if k not in named]
    assert any(said == pytest.approx(shares[:, k].tolist(), abs=0.02) for k in others)
    with pytest.raises(ValueError, match="3 images"):
        plots.plot_step(model, x[:3], y[:3], classes, tmp_path / "none.png")


def test_titles_of_long_class_names_do_not_overlap(tmp_path: Path, drawn: list[Any]) -> None:
    classes = [f"{k}wnid_of_a_class_with_a_long_name" for k in range(5)]
    plots.plot_step(
        convnet(5), torch.rand(8, 3, 12, 12), torch.arange(8) % 5, classes, tmp_path / "step.png"
    )
    boxes = [axes.title.get_window_extent() for axes in drawn[0].axes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert min(box.x0 for box in boxes) >= 0


@pytest.mark.parametrize("lam2, epsilon, mixes, chosen", [
    ([0.1, 0.6, 0.9], [0.02, 0.02, 0.02], [(0, 1, 2)] * 3, 1),  # both images show
    ([0.5, 0.5, 0.5], [0.01, 0.02, 0.02], [(0, 1, 2)] * 2 + [(0, 1, 1)], 1),
    ([0.5, 0.9, 0.9], [0.02, 0.01, 0.02], [(0, 1, 1), (0, 1, 2), (0, 0, 2)], 1),  # three classes
])  # fmt: skip
def test_the_step_shown_is_the_one_that_shows_most(
    lam2: list[float], epsilon: list[float], mixes: list[tuple[int, int, int]], chosen: int
) -> None:
    half = torch.tensor([0.5] * 3)
    target = torch.tensor([mix[2] for mix in mixes])
    draws = Draws(half, torch.tensor(lam2), torch.tensor(epsilon), target)
    assert plots._most_visible(mixes, draws) == chosen


def test_curves_are_those_of_the_logs(tmp_path: Path, drawn: list[Any]) -> None:
    log = [{"epoch": e, "loss1": 2 / e, "loss2": None, "clean_accuracy": e / 10} for e in (1, 2, 3)]
    two = [{**log[0], "loss2": 5.0}]
    plots.plot_curves({"standard": log, "mtlat": two}, tmp_path / "curves.png")
    losses, accuracy = drawn[0].axes
    seen = [line.get_ydata().tolist() for line in losses.lines]
    assert seen[0] == [2, 1, 2 / 3] and seen[2:] == [[2], [5]]
    assert [line.get_linestyle() for line in losses.lines] == ["-", "--"] * 2
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[10, 20, 30], [10]]
    (legend,) = drawn[0].legends
    assert [t.get_text() for t in legend.get_texts()] == ["standard", "mtlat"]


@pytest.mark.parametrize("length", [4, 30, 70])
def test_a_legend_of_any_names_fits_the_figure(
    length: int, tmp_path: Path, drawn: list[Any]
) -> None:
    log = [{"epoch": 1, "loss1": 1.0, "loss2": None, "clean_accuracy": 0.5}]
    logs = {f"{k}{'runs/m' * length}"[:length]: log for k in range(9)}
    plots.plot_curves(logs, tmp_path / "curves.png")
    (figure,) = drawn
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    colours = {line.get_color() for line in figure.axes[1].lines}
    assert len(colours) == 9  # one color for each
    assert figure.axes[0].get_position().height * figure.get_figheight() > 2  # inches
