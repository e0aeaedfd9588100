"""Test that a damaged file is either reported or read as it was written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import checkpoints, errors
from harness.benchmark import store
from harness.errors import UserError
from harness.images import cache, datasets
from tests.support.tiny import image_folder, states_equal

FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# Damage as caused by disks and by copying: flipped bits, a lost part, and a part that is replaced
# by zeros or by another part of the file. The format is (kind, two positions as fractions of the
# file, bit).
SHARE = st.floats(0, 1, exclude_max=True)
DAMAGE = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "lose", "splice", "zeros"]), SHARE, SHARE,
              st.integers(0, 7)), min_size=1, max_size=3,
)  # fmt: skip


def damaged(content: bytes, damage: list[tuple[str, float, float, int]]) -> bytes:
    found = bytearray(content)
    for kind, one, other, bit in damage:
        i, j = int(one * len(found)), int(other * len(found))
        match kind:
            case "flip" if found:
                found[i] ^= 1 << bit
            case "cut":
                del found[i:]
            case "lose":
                del found[min(i, j) : max(i, j)]
            case "splice":
                found[i : i + 64] = found[j : j + 64]
            case "zeros":
                found[i : i + 64] = bytes(len(found[i : i + 64]))
    return bytes(found)


def told(error: UserError, path: Path) -> None:
    assert str(path) in str(error) and "\n" not in str(error)


CONTENT: dict[str, Any] = {
    "arch": "tiny:convnet", "classes": ["a", "b"], "size": 16, "fingerprint": "f", "log": [],
    "settings": {"lr": 0.002}, "optimizer": {"state": {0: torch.arange(9.0)}}, "scaler": {},
    "normalize": None, "model": {"w": torch.arange(300.0), "n": torch.tensor(3)},
}  # fmt: skip


@FOLDER
@given(DAMAGE)
def test_checkpoints(tmp_path: Path, damage: list[Any]) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint([path], **CONTENT)
    path.write_bytes(damaged(path.read_bytes(), damage))
    try:
        found = checkpoints.load_checkpoint(path)
    except UserError as error:
        told(error, path)
    else:
        assert states_equal(found, {"format": checkpoints.FORMAT, **CONTENT})


def test_every_bit_of_a_checkpoint(tmp_path: Path) -> None:
    """Check a flipped bit in every third byte. PyTorch alone would read most as other weights."""
    path = tmp_path / "last.pt"
    content = {**CONTENT, "model": {"w": torch.arange(4.0)}, "optimizer": {}}
    checkpoints.save_checkpoint([path], **content)
    whole, wrong, refused = path.read_bytes(), 0, 0
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = checkpoints.load_checkpoint(path)
            wrong += not states_equal(found, {"format": checkpoints.FORMAT, **content})
        except UserError:
            refused += 1
    assert wrong == 0 and refused > 100


@pytest.mark.parametrize("name", CONTENT)
def test_a_checkpoint_needs_every_field(tmp_path: Path, name: str) -> None:
    path = tmp_path / "last.pt"
    for found, content in (
        ("missing", {k: v for k, v in CONTENT.items() if k != name}),
        ("float", CONTENT | {name: 0.5}),
    ):
        checkpoints.save_checkpoint([path], **content)
        with pytest.raises(UserError, match=rf"last\.pt is not .*: its {name} is {found}$"):
            checkpoints.load_checkpoint(path)


LINES = [
    {"model": "ab", "label": "net", "perturbation": name, "severity": 1, "n": 100, "correct": n,
     "total": 100, "margin": 0.1 * n, "seconds": 0.123}
    for n, name in enumerate(("fog", "snow", "frost"), 70)
]  # fmt: skip


@FOLDER
@given(DAMAGE)
def test_finished_cells(tmp_path: Path, damage: list[Any]) -> None:
    """Check that a line is read as written, missing as a whole, repeated, or named in the error."""
    path = tmp_path / "cells.jsonl"
    path.unlink(missing_ok=True)
    store.append_cells(path, LINES)
    path.write_bytes(damaged(path.read_bytes(), damage))
    content = path.read_bytes()
    try:
        found = store.read_cells(path)
        assert path.read_bytes() == content  # another run may be writing it
        assert store.read_cells(path, repair=True) == found
    except UserError as error:
        told(error, path)
        assert " is damaged; delete it and start again" in str(error)
    else:
        assert all(line in LINES for line in found)
        assert path.read_bytes().count(b"\n") == len(found)


@FOLDER
@given(st.sampled_from(["u8", "json"]), DAMAGE)
def test_the_cache(tmp_path: Path, kind: str, damage: list[Any]) -> None:
    """Check that the images are those of the folder, whatever the damage to the cache."""
    root = tmp_path / "set"
    if not root.exists():
        image_folder(root, classes=2, each=3)
    whole = datasets.load_dataset(str(root), size=12, cache_dir=tmp_path / "new")
    for path in sorted((tmp_path / "new").glob(f"*.{kind}")):
        content = damaged(path.read_bytes(), damage)
        path.unlink()  # the first dataset is still mapped from this file
        path.write_bytes(content)
    again = datasets.load_dataset(str(root), size=12, cache_dir=tmp_path / "new")
    assert again.fingerprint == whole.fingerprint
    for found, expected in ((again.train, whole.train), (again.test, whole.test)):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(PLAIN, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=6)


@FOLDER
@given(JSON)
def test_foreign_json(tmp_path: Path, content: Any) -> None:
    """Check that JSON of any other program is neither read as a cell nor as a manifest."""
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(content) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        store.read_cells(path)
    (tmp_path / "x.u8").write_bytes(b"")
    assert cache._read_cache(tmp_path / "x.u8", path, "x") is None
    for text in (json.dumps(content), "[" * 100_000):
        (tmp_path / "cells.json").write_text(text)
        assert cache.cached_checksum(SimpleNamespace(pixels_path=lambda: path)) is None


@FOLDER
@given(st.text(st.characters(codec=None), min_size=1))
def test_names_are_printed_in_one_line(text: str) -> None:
    shown = errors.escape_unprintable(text)
    assert shown.isprintable() and len(shown.splitlines()) <= 1
    assert shown == text or not text.isprintable()
    shown.encode()
