"""Test that `pip install .` installs the method, the attacks and the corruptions alone."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mtlat

ROOT = Path(mtlat.__file__).parent


@pytest.mark.slow
def test_pip_installs_what_others_import(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="pip builds with it")
    source, site = tmp_path / "source", tmp_path / "site"
    skipped = shutil.ignore_patterns(".*", "runs", "results", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)  # because pip writes into the folder
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
    pip = [sys.executable, "-m", "pip", "install", *offline, "--target", site, source]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    package = {f"corruptions/{path.name}" for path in (ROOT / "corruptions").glob("*.py")}
    installed = {name for name in files if not name.startswith("mtlat-1.0.dist-info/")}
    assert installed == {"mtlat.py", "attacks.py", *package}
    program = f"""
import sys
sys.path.insert(0, {str(site)!r})
import attacks, corruptions, mtlat
print(attacks.__file__, corruptions.__file__, mtlat.__file__, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(site) for line in done.stdout.splitlines())


def test_the_wheel_needs_what_the_project_does() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) < set((ROOT / "requirements.txt").read_text().split())
