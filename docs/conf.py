"""Sphinx settings of the site: `make site` renders README, notebooks, pages and API into site/."""

import os

project = "DPO Lab"
author = "The DPO Lab authors"
extensions = [
    "myst_nb",
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "notebooks/*.ipynb"]
html_theme = "furo"
html_title = "DPO Lab"
# index.html, which leads to docs/index.html
html_extra_path = ["extra"]
autodoc_member_order = "bysource"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# seconds per cell, enough on a busy machine
nb_execution_timeout = 1800
nb_execution_mode = "force"
nb_execution_raise_on_error = True

# no page asks another host for anything
nb_ipywidgets_js = {}

# a page has no kernel: explorers move from frames (text/html), or show their first picture
os.environ["DPO_LAB_FRAMES"] = "1"
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/png", 1)]


def setup(app):
    """Leave out what a named tuple says of its fields by itself."""
    app.connect(
        "autodoc-process-docstring",
        lambda *event: event[-1].clear() if "Alias for field" in "".join(event[-1]) else None,
    )
