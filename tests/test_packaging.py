"""What a wheel holds: three packages, their data, nothing else."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile

import pytest
from scripts import ROOT

import offpolicy

PACKAGES = ("offpolicy", "lightning_modules", "datasets_cfg")
KEPT = {".py", ".yaml", ".csv", ".typed"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], str]:
    """Files of the sources, those of a wheel built from a copy of them without a network, and its metadata."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").write_text("")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        about = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    files = (path for name in PACKAGES for path in (source / name).rglob("*") if path.suffix in KEPT)
    return {path.relative_to(source).as_posix() for path in files}, names, about


def test_wheel_holds_every_module_and_every_data_file(built: tuple[set[str], set[str], str]) -> None:
    sources, wheel, _ = built
    assert not sources - wheel
    for name in (
        "offpolicy/py.typed",
        "lightning_modules/py.typed",
        "datasets_cfg/d4rl.csv",
        "lightning_modules/recipes/iql/antmaze.yaml",
    ):
        assert name in wheel


def test_wheel_holds_nothing_else(built: tuple[set[str], set[str], str]) -> None:
    _, wheel, _ = built
    top = {name.partition("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert any(name.endswith("LICENSE") for name in wheel)


def test_the_version_stands_in_one_place(built: tuple[set[str], set[str], str]) -> None:
    assert f"\nVersion: {offpolicy.__version__}\n" in built[2]
    assert f"\nversion: {offpolicy.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    versions = [line for line in changes.splitlines() if line.startswith("## ") and line != "## Unreleased"]
    assert versions[0] == f"## {offpolicy.__version__}"
