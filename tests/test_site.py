"""The documentation site: its made pages are complete, it needs no network, and a browser shows it without faults."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from scripts import ROOT, run_python

from lightning_modules import METHODS

EXTENSIONS = ROOT / "docs" / "_ext"
EQUATIONS = {METHODS[name] for name in yaml.safe_load((EXTENSIONS / "equations.yaml").read_text())}
NEEDED = ("sphinx", "furo", "myst_parser", "latex2mathml")
CHROME = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
PROBE = """<script>
const faults = [];
addEventListener("error", event => faults.push(event.message || event.target.src || event.target.href), true);
addEventListener("load", () => {
  const box = node => node.getBoundingClientRect();
  const formulas = [...document.querySelectorAll("math")];
  document.title = JSON.stringify({faults, formulas: formulas.length, width: innerWidth,
    unseen: formulas.filter(node => !box(node).width || !box(node).height).length,
    over: document.documentElement.scrollWidth - innerWidth});
});
</script>"""


@pytest.fixture
def method_pages(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(EXTENSIONS)
    return importlib.import_module("method_pages")


def test_methods_have_a_place_and_an_equation(method_pages: object) -> None:
    placed = [name for names in method_pages.KINDS.values() for name in names.split()]  # type: ignore[attr-defined]
    written = set(method_pages.written_equations())  # type: ignore[attr-defined]
    assert len(placed) == len(set(placed)) and written <= set(placed) <= set(METHODS)
    assert {METHODS[name] for name in placed} == {METHODS[name] for name in written}


def test_every_page_stands_in_the_index() -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    trees = re.findall(r"```{toctree}\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    named = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    made = {"methods/index", "objectives/index", "api/index"}
    assert sorted(named) == sorted((pages | made) - {"index"})


def test_docstrings_keep_their_formulas_tables_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXTENSIONS)
    rst = importlib.import_module("rst")
    made = rst.prose(
        "Words with a*b and |x| and ``code*``.\n\n  Critic: y = r\n  Actor:  z\n\n"
        "| detail | here |\n|--------|------|\n| one    | a    |\n|        | b    |\n\n"
        "Differs:\n  - in this;\n  - in that."
    )
    assert r"a\*b and \|x\| and ``code*``" in made
    assert ".. code-block:: text\n\n   Critic: y = r\n   Actor:  z" in made
    assert "   * - one\n     - a b\n" in made
    assert "Differs:\n\n- in this;\n- in that." in made


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "build", raising=False)
    return importlib.import_module("build")


def put_versions(folder: Path, pages: dict[str, list[str]]) -> None:
    """Sites of versions that are nothing but the version of each page, as the sidebar has it."""
    for version, names in pages.items():
        for name in names:
            page = folder / version / name
            page.parent.mkdir(parents=True, exist_ok=True)
            root = "../" * name.count("/") or "./"
            page.write_text(
                f'<html data-content_root="{root}"><div class="site-version" data-version="{version}" '
                f'data-page="{name}">version {version}</div><script src="{root}../versions.js"></script>'
                f'<script src="{(ROOT / "docs" / "_static" / "versions.js").as_uri()}"></script>'
            )
        (folder / version / "objects.inv").touch()


def test_versions_stand_beside_each_other(build: object, tmp_path: Path) -> None:
    pages = ["index.html", "methods/iql.html"]
    put_versions(tmp_path, {"0.9.0": pages[:1], "0.10.0": pages, "0.11.0rc1": pages})
    build.name_versions(tmp_path)  # type: ignore[attr-defined]
    made = json.loads((tmp_path / "versions.js").read_text().removeprefix("const siteVersions = ").rstrip(";\n"))
    assert [(row["version"], row["names"]) for row in made] == [
        ("0.11.0rc1", ["latest"]),
        ("0.10.0", ["stable"]),
        ("0.9.0", []),
    ]
    assert [row["pages"] for row in made] == [pages, pages, pages[:1]]
    assert (tmp_path / "latest" / "methods" / "iql.html").resolve().parts[-3] == "0.11.0rc1"
    assert (tmp_path / "stable").resolve().name == "0.10.0"
    assert "url=stable/index.html" in (tmp_path / "index.html").read_text()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # as a copy of the site may have it
    build.name_versions(tmp_path)  # type: ignore[attr-defined]  # the names are none of the versions
    assert (tmp_path / "latest").is_symlink()
    assert len(build.built_versions(tmp_path)) == 3  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: that of CI where it built one, else it is built with warnings as errors."""
    built = os.environ.get("OFFPOLICY_SITE", "")
    if built:
        return Path(built)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the site is not built here, as {', '.join(missing)} is not installed (extra `docs`)")
    out = tmp_path_factory.mktemp("site")
    done = run_python(ROOT / "docs" / "build.py", "--out", out, timeout=230)
    assert done.returncode == 0, done.stderr[-4000:]
    return out / "latest"


@pytest.mark.slow
def test_pages_are_complete_and_need_no_network(site: Path) -> None:
    for file in set(METHODS.values()):
        text = (site / "methods" / f"{file}.html").read_text()
        assert "<math" in text or file not in EQUATIONS, f"no formula on the page of {file}"
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:[^"]+)"', text)
        assert not loaded, f"{page.name} loads {loaded}"
        assert not [one for one in re.findall(r"<math.*?</math>", text, re.DOTALL) if "\\" in one], page.name
        assert 'class="site-version"' in text and text.count("/versions.js") == 2, page.name
    assert "searchindex.js" in {path.name for path in site.iterdir()}


def look_at(page: Path, profile: Path, width: int = 1280) -> subprocess.CompletedProcess[str]:
    """Open a file in Chromium; its standard output is the page after its scripts."""
    command = [str(CHROME), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", f"--window-size={width},900", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(CHROME is None, reason="no Chromium is installed here, so the list of versions is not looked at")
def test_list_of_versions_in_a_browser(build: object, tmp_path: Path) -> None:
    """It leads to the same page of another version, to its front page where that has none, and is text when alone."""
    out = tmp_path / "site"
    put_versions(out, {"0.1.0": ["index.html"], "0.2.0": ["index.html", "methods/iql.html"]})
    build.name_versions(out)  # type: ignore[attr-defined]
    for folder in ("0.2.0", "latest"):
        shown = look_at(out / folder / "methods" / "iql.html", tmp_path / "profile")
        options = re.findall(r'<option value="file://([^"]+)">([^<]+)</option>', shown.stdout)
        assert options == [
            (str(out / "0.2.0" / "methods" / "iql.html"), "0.2.0 (latest, stable)"),
            (str(out / "0.1.0" / "index.html"), "0.1.0"),
        ], shown.stderr[-2000:]
    (out / "versions.js").unlink()
    shown = look_at(out / "0.2.0" / "index.html", tmp_path / "profile")
    assert "<select" not in shown.stdout and "version 0.2.0" in shown.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROME is None, reason="no Chromium is installed here, so the site is not looked at in one")
@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("page", ["index", "methods/iql", "api/training"])
def test_site_in_a_browser(site: Path, page: str, width: int, tmp_path: Path) -> None:
    """No error, every formula is seen, and nothing is wider than the window."""
    path = site / f"{page}.html"
    probe = path.with_name(f"probe-{path.stem}-{width}.html")
    probe.write_text(path.read_text().replace("<head>", "<head>" + PROBE, 1))
    try:
        done = look_at(probe, tmp_path, width)
    finally:
        probe.unlink()
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found["faults"] == [] and "CONSOLE" not in done.stderr, (found, done.stderr[-2000:])
    assert found["unseen"] == 0 and (found["formulas"] > 0) == page.startswith("methods")
    assert found["over"] <= 0, f"{page} is {found['over']} pixels wider than a window of {found['width']}"
