"""How Sphinx builds the site: ``python docs/build.py`` (extra ``docs``), offline."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from offpolicy.version import __version__  # noqa: E402

project = "offpolicy"
author = "the authors of offpolicy"
copyright = "the authors of offpolicy, MIT licence"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "mathml",
    "made_pages",
    "method_links",
]
templates_path = ["_templates"]
exclude_patterns = ["_ext", "_static", "_templates"]
default_role = "code"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["config.cache"]

autodoc_inherit_docstrings = False  # those of Lightning are not ours to show
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "offpolicy"  # the version stands in the sidebar
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
parts = ("brand", "versions", "search", "scroll-start", "navigation", "scroll-end")
html_sidebars = {"**": [f"sidebar/{part}.html" for part in parts]}
