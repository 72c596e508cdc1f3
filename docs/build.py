"""Build this version of the site beside the others: ``python docs/build.py --out site`` (extra ``docs``), offline.

Writes ``OUT/VERSION/``, the names ``OUT/latest`` (the newest version) and ``OUT/stable`` (the newest that is no
pre-release), and ``OUT/versions.js``, from which the sidebar of every version lists them all. For an older version
check it out and run the same command with the same ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from offpolicy.version import __version__  # noqa: E402

FRONT = """<!doctype html><meta charset="utf-8"><title>offpolicy</title>
<meta http-equiv="refresh" content="0; url={name}/index.html"><a href="{name}/index.html">offpolicy {name}</a>
"""


def built_versions(out: Path) -> list[Version]:
    """The versions whose site stands in ``out``, the newest first."""
    found = []
    for inventory in out.glob("*/objects.inv"):
        try:
            version = Version(inventory.parent.name)
        except InvalidVersion:  # `latest` and `stable`
            continue
        if str(version) == inventory.parent.name:
            found.append(version)
    return sorted(found, reverse=True)


def pages_of(folder: Path) -> list[str]:
    return sorted(page.relative_to(folder).as_posix() for page in folder.rglob("*.html"))


def name_versions(out: Path) -> str:
    """Write ``versions.js``, the links ``latest`` and ``stable`` and the front page for what stands in ``out``; returns
    where the front page leads."""
    versions = built_versions(out)
    names = {"latest": versions[0]}
    released = [version for version in versions if not version.is_prerelease]
    if released:
        names["stable"] = released[0]
    for name in ("latest", "stable"):
        link = out / name
        if link.is_dir() and not link.is_symlink():  # as a copy of a site may have it
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        if name in names:
            link.symlink_to(str(names[name]), target_is_directory=True)
    rows = [
        {
            "version": str(version),
            "names": [name for name, named in names.items() if named == version],
            "pages": pages_of(out / str(version)),
        }
        for version in versions
    ]
    # A script and no JSON: a page that is opened from the disk may not fetch other files.
    (out / "versions.js").write_text(f"const siteVersions = {json.dumps(rows)};\n")
    front = "stable" if released else "latest"
    (out / "index.html").write_text(FRONT.format(name=front))
    return front


def main() -> int:
    parser = argparse.ArgumentParser(description="Build this version of the site beside the others.")
    parser.add_argument("--out", type=Path, default=Path("site"), help="folder of all versions (default: site)")
    out = parser.parse_args().out
    folder = out / str(Version(__version__))
    new, read = out / f".{folder.name}", out.absolute().with_name(f".{out.name}-read") / folder.name
    shutil.rmtree(new, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-A", "beside_others=1"]
    done = subprocess.run([*command, "-d", str(read), str(HERE), str(new)])
    if done.returncode == 0:  # a build that failed is no version
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
        leads = name_versions(out)
        print(f"{folder / 'index.html'} is built; {out / 'index.html'} leads to {leads}.")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
