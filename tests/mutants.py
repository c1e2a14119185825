"""Mutants of a notebook: broken on purpose, it must fail at the assert that guards what was broken.

`tests/mutations/NAME.toml` lists each assert of a notebook once:

    [[assert]]
    line = "assert gap < 1e-8"            # its first line, which occurs once in the notebook
    before = "labels = labels.flip(0)"    # code to run before its cell
    # or replace = ["beta", "2 * beta"]   # or text to replace, once, in its cell
    # or after = "gap = gap + 1e-7"       # or code to run after its cell, then that assert alone

    [[shipped]]                           # guards a file that comes with the package
    line = "assert row['gain'] > 0"
    file = "dpo_lab/assets/sweep.json"

Mutants and the solutions of exercises run in forks of the kernel, so the notebook itself runs once.
"""

import ast
import copy
import os
import re
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
MUTATIONS = Path(__file__).parent / "mutations"
KINDS = ("before", "replace", "after")
LIMIT = 120  # seconds for one mutant or solution


@dataclass(frozen=True)
class Assert:
    """One assert statement: index and text of its cell, its lines there, itself alone."""

    cell: int
    source: str
    lines: range
    alone: str

    @property
    def first_line(self):
        return self.source.splitlines()[self.lines[0] - 1].strip()


def asserts(notebook):
    """Every assert statement of a notebook's code."""
    found = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found += asserts_of(cell.source, index)
    return found


def asserts_of(source, index=0):
    tree = ast.parse(TransformerManager().transform_cell(source))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    found = []
    for node in sorted(statements, key=lambda node: node.lineno):
        lines = range(node.lineno, node.end_lineno + 1)
        text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
        found.append(Assert(index, source, lines, textwrap.dedent(text)))
    return found


def entries(stem):
    """What a notebook's file of mutations says, None if it has none."""
    path = MUTATIONS / f"{stem}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def faults(notebook, listed):
    """What is wrong with a list of mutations, before anything runs."""
    unknown = set(listed) - {"assert", "shipped"}
    wrong = [f"[[{name}]] is neither [[assert]] nor [[shipped]]" for name in sorted(unknown)]
    mutants, shipped = listed.get("assert", []), listed.get("shipped", [])
    lines = [entry.get("line") for entry in mutants + shipped]
    present = [claim.first_line for claim in asserts(notebook)]
    for line in dict.fromkeys(present + lines):
        if present.count(line) != 1:
            wrong.append(f"{present.count(line)} asserts in the notebook begin with {line!r}")
        elif lines.count(line) != 1:
            wrong.append(f"{lines.count(line)} entries in the list for {line!r}")
    for entry in mutants:
        if len(entry) != 2 or len(set(entry) & set(KINDS)) != 1:
            wrong.append(f"{entry} needs `line` and one of {', '.join(KINDS)}, and no more")
    for entry in shipped:
        if set(entry) != {"line", "file"} or not (ROOT / entry["file"]).is_file():
            wrong.append(f"{entry} needs `line` and `file`, and names no file that is shipped")
    return wrong


def steps(claim, entry):
    """Code of a mutant, piece by piece, and the lines of the last piece that are the assert."""
    if "before" in entry:
        return [entry["before"], claim.source], claim.lines
    if "after" in entry:
        whole = range(1, len(claim.lines) + 1)
        return [claim.alone, entry["after"], claim.alone], whole  # first, that it holds as it is
    old, new = entry["replace"]
    if claim.source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {claim.source.count(old)} times in the cell")
    mutated = claim.source.replace(old, new)
    for other in asserts_of(mutated):
        if other.alone == claim.alone:
            return [mutated], other.lines
    raise ValueError(f"{old!r} is part of the assert itself")


def verdict(outcome, last, lines):
    """None if a mutant failed where it must, else what it did."""
    if outcome is None:
        return "was not reached"
    if outcome["error"] is None:
        return "raises nothing"
    if outcome["error"] in ("timeout", "crash"):
        return outcome["message"]
    line = f"line {outcome['line']}" if outcome["line"] else "a line that is called"
    where = f"at {line} of piece {outcome['step'] + 1}"
    error = f"raises {outcome['error']} ({outcome['message']}) {where}"
    if outcome["error"] == "AssertionError" and outcome["step"] == last:
        return None if outcome["line"] in lines else f"{error}, which is another assert"
    return error


def solutions(notebook):
    """Code of each folded solution, by its number."""
    found = []
    for number, text in folded(notebook, r"Solution (\d+)"):
        blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        found.append((int(number), [textwrap.dedent(code) for _, code in blocks]))
    return found


def folded(notebook, title):
    """Group in the title, and text, of each <details> whose summary is `title`."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    details = rf"<details>\s*<summary>{title}</summary>(.*?)</details>"
    return re.findall(details, text, re.DOTALL)


def exercises(notebook):
    """How many items stand under a notebook's headings "Try next"."""
    number = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL)
            for part in re.findall(r"^(?:#+ |\*\*)Try next(.*?)(?=^#|\Z)", text, re.M | re.S):
                number += len(re.findall(r"^(?:\d+\.|[-*]) ", part, re.MULTILINE)) or 1
    return number


@dataclass
class Run:
    """A notebook after it ran: its error, and what became of its mutants and solutions.

    Mutants go by their place in the list, solutions by their number.
    """

    error: CellExecutionError | None
    mutants: dict
    solutions: dict


def execute(notebook, folder, listed=None, limit=LIMIT):
    """Run a notebook in a fresh kernel, once, with mutants and solutions in forks of it."""
    by_line = {claim.first_line: claim for claim in asserts(notebook)}
    before, after = {}, {}  # jobs by the index of the cell that they stand before or after
    for place, entry in enumerate((listed or {}).get("assert", [])):
        claim = by_line.get(entry.get("line"))
        try:
            pieces = steps(claim, entry)[0]
        except (AttributeError, KeyError, ValueError):
            continue  # a fault that `verdicts` and `faults` name
        jobs = after if "after" in entry else before
        jobs.setdefault(claim.cell, []).append(("mutant", place, pieces))
    last = len(notebook.cells) - 1
    for number, blocks in solutions(notebook):
        after.setdefault(last, []).append(("solution", number, blocks))

    # a copy in which each group of jobs has a cell of its own
    probed, probes = copy.copy(notebook), []
    probed.cells = []
    for index, cell in enumerate(notebook.cells):
        for jobs, cells in ((before.get(index), []), (None, [cell]), (after.get(index), [])):
            if jobs:
                code = [pieces for _, _, pieces in jobs]
                call = f"__import__('forks').try_all(globals(), {code!r}, {limit})"
                cells = [nbformat.v4.new_code_cell(call)]
                probes.append((cells[0], jobs))
            probed.cells += cells

    path = os.pathsep.join(filter(None, [str(MUTATIONS), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(probed, timeout=1_800, resources={"metadata": {"path": str(folder)}})
    run = Run(None, {}, {})
    try:
        client.execute(env=os.environ | {"PYTHONPATH": path})
    except CellExecutionError as error:
        run.error = error
    for cell, jobs in probes:
        shown = [out["data"] for out in cell.outputs if out.output_type == "display_data"]
        for (kind, key, _), outcome in zip(jobs, shown[0]["application/json"] if shown else []):
            (run.mutants if kind == "mutant" else run.solutions)[key] = outcome
    return run


def survivors(notebook, listed, run):
    """Mutants that did not fail at their assert, each with what it did; those in `faults` apart."""
    by_line = {claim.first_line: claim for claim in asserts(notebook)}
    found = []
    for place, entry in enumerate(listed.get("assert", [])):
        claim, kinds = by_line.get(entry.get("line")), set(entry) & set(KINDS)
        if claim is None or not kinds:
            continue
        try:
            pieces, lines = steps(claim, entry)
            wrong = verdict(run.mutants.get(place), len(pieces) - 1, lines)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            kind = kinds.pop()
            found.append(f"{entry['line']}\n    {kind} = {entry[kind]!r}\n    {wrong}")
    return found
