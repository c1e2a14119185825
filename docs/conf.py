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
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "notebooks/exercises/*.ipynb",
]
html_theme = "furo"
html_title = "DPO Lab"
# index.html, which leads to docs/index.html
html_extra_path = ["extra"]
autodoc_member_order = "bysource"
# for instructors alone
autodoc_mock_imports = ["nbgrader"]
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3

# seconds per cell, enough on a busy machine
nb_execution_timeout = 1800
nb_execution_mode = "force"
nb_execution_raise_on_error = True
# the checks of exercises say in words that there is no answer yet
nb_render_error_lexer = "none"

# no page asks another host for anything
nb_ipywidgets_js = {}

# a page has no kernel: explorers move from frames (text/html), or show their first picture
os.environ["DPO_LAB_FRAMES"] = "1"
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/png", 1)]


def setup(app):
    app.connect("autodoc-process-docstring", leave_out_aliases)
    app.connect("doctree-read", leave_out_own_link)


def leave_out_aliases(app, what, name, obj, options, lines):
    """Leave out what a named tuple says of its fields by itself."""
    if "Alias for field" in "".join(lines):
        lines.clear()


def leave_out_own_link(app, doctree):
    """Leave out a notebook's link to its rendered twin, which is this page."""
    # here: the tests read these settings where there is no Sphinx
    from docutils import nodes

    for link in list(doctree.findall(nodes.reference)):
        if link.get("refuri", "").endswith(f".github.io/dpo-lab/{app.env.docname}.html"):
            link.parent.parent.remove(link.parent)
