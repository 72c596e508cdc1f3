"""Pages made from the code before Sphinx reads its sources: the API reference, and a page for each method.

They are written into ``docs/api`` and ``docs/methods``, which git ignores.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import api_pages
import component_pages
import method_pages
from sphinx.application import Sphinx

MAKERS = {"api": api_pages.pages, "methods": method_pages.pages, "objectives": component_pages.pages}


def page_of(method: str) -> str:
    """The document of a method."""
    return f"methods/{method_pages.file_of(method)}"


def write(folder: Path, pages: Mapping[str, str]) -> None:
    """Write the pages that changed, so that Sphinx reads only these again, and remove what is no page any more."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.suffix != ".rst" or old.stem not in pages:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def make(app: Sphinx) -> None:
    for folder, pages in MAKERS.items():
        write(Path(app.srcdir) / folder, pages())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", make)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
