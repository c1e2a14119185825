"""The glossary has every word that a notebook introduces, and what it names exists."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

import dpo_lab

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
NAME, LINK = r"(?:`([\w.]+)`)?", r"(?:\[\w+\]\(\.\./notebooks/(\w+)\.ipynb\))?"
ROW = rf"^\| \*\*(.+?)\*\*.*? \| (.+?) \| {NAME} \| {LINK} \|$"
ROWS = re.findall(ROW, PAGE, re.MULTILINE)


def words():
    """The words that each notebook says it introduces, in the order of the notebooks."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        header = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        row = re.search(r"^\| \*\*words\*\* \| (.+) \|$", header, re.MULTILINE)[1]
        found[path.stem] = row.replace("`", "").split(", ")
    return found


def test_every_row_of_the_table_is_read():
    assert len(ROWS) == len(re.findall(r"^\| \*\*", PAGE, re.MULTILINE)) > 50


def test_every_word_of_a_notebook_is_in_the_glossary():
    terms = {term for term, *_ in ROWS}
    missing = {stem: sorted(set(row) - terms) for stem, row in words().items()}
    assert {stem: row for stem, row in missing.items() if row} == {}


def test_each_term_names_the_notebook_where_it_first_stands():
    first = {}
    for stem, row in words().items():
        for word in row:
            first.setdefault(word, stem)
    said = {term: stem for term, _, _, stem in ROWS if term in first}
    assert {term: (stem, first[term]) for term, stem in said.items() if stem != first[term]} == {}


def test_terms_are_sorted_and_each_stands_once():
    terms = [term for term, *_ in ROWS]
    assert terms == sorted(set(terms), key=str.lower)


@pytest.mark.parametrize("name", sorted({name for _, _, name, _ in ROWS if name}))
def test_every_name_exists(name):
    if "." not in name:
        assert name in dpo_lab.__all__
        return
    home, _, attribute = name.rpartition(".")
    try:
        import_module(f"dpo_lab.{name}")
    except ModuleNotFoundError:
        assert getattr(import_module(f"dpo_lab.{home}"), attribute)


@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("README.md", "(docs/glossary.md)"),
        ("docs/index.md", "\nglossary\n"),
        ("notebooks/00_start_here.ipynb", "(../docs/glossary.md)"),
        ("notebooks/00b_log_prob_by_hand.ipynb", "(../docs/glossary.md)"),
    ],
)
def test_the_glossary_is_linked(page, link):
    assert link in (ROOT / page).read_text(encoding="utf-8")
