"""A mutant of a notebook counts only if it fails at the very assert that it is meant for."""

import copy

import mutants
import nbformat
import pytest

CELLS = [
    """\
%matplotlib inline
import torch

x = torch.tensor([1.0, 2.0], requires_grad=True)
seen = []""",
    """\
def check(value):
    assert value > 0, "inside"


(x**2).sum().backward()
gradient = x.grad.clone()
x.grad = None
seen.append(len(seen))
assert torch.equal(
    gradient, 2 * x.detach()
)
for power in (1, 2):
    assert power < 3
check(len(seen))
assert len(seen) == 1""",
    "assert seen == [0] and torch.get_num_threads() >= 1\nprint(seen)",
]
TEXT = """\
**Try next.**

1. One.

   <details><summary>Solution 1</summary>

   ```python
   seen.append(1)
   torch.nn.functional.softplus(-x).sum().backward()
   ```

   </details>
2. Two.

<details><summary>Solution 2</summary>

```python
assert seen == [1]
```

</details>
"""
GRADIENT, POWER, LENGTH, SEEN = (
    "assert torch.equal(",
    "assert power < 3",
    "assert len(seen) == 1",
    "assert seen == [0] and torch.get_num_threads() >= 1",
)
INSIDE = 'assert value > 0, "inside"'


def made_up():
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    return nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_markdown_cell(TEXT)])


def listed(*pairs):
    return {"assert": [{"line": line, kind: code} for line, kind, code in pairs]}


GOOD = listed(
    (GRADIENT, "replace", ["x**2", "x**3"]),
    (POWER, "replace", ["(1, 2)", "(1, 3)"]),
    (LENGTH, "before", "seen.append(7)"),
    (SEEN, "after", "seen.clear(); print('not seen'); __import__('os').write(1, b'nor this')"),
    (INSIDE, "replace", ["seen.append(len(seen))", "seen.clear()"]),
)
BAD = [
    (GRADIENT, "replace", ["x**2", "2 * x**2 / 2"]),
    (LENGTH, "replace", ["seen.append(len(seen))", "seen.clear()"]),
    (POWER, "before", "1 / 0"),
    (SEEN, "before", "assert False"),
    (SEEN, "replace", ["seen == ", "[] == "]),
    (SEEN, "after", "__import__('time').sleep(600)"),
    (SEEN, "after", "__import__('os')._exit(1)"),
    (INSIDE, "after", "value = 0"),
]
REPORTS = [
    "raises nothing",
    "raises AssertionError (inside) at line 2 of piece 1, which is another assert",
    "raises ZeroDivisionError (division by zero) at line 1 of piece 1",
    "raises AssertionError () at line 1 of piece 1",
    "'seen == ' is part of the assert itself",
    "not done after 5 s",
    "the process died",
    "raises NameError (name 'value' is not defined) at line 1 of piece 1",
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook, its run, and a report on each mutant that did not fail where it must."""
    notebook, lists = made_up(), {"assert": GOOD["assert"] + listed(*BAD)["assert"]}
    run = mutants.execute(notebook, tmp_path_factory.mktemp("ran"), lists, limit=5)
    return notebook, run, mutants.survivors(notebook, lists, run)


def test_a_mutant_of_each_kind_that_fails_at_its_assert_is_accepted(ran):
    notebook, run, reports = ran
    assert run.error is None
    assert mutants.faults(notebook, GOOD) == []
    assert len(reports) == len(BAD)


def test_a_mutant_leaves_the_notebook_as_it_is(ran):
    notebook, _, _ = ran
    shown = "".join(out.text for cell in notebook.cells for out in cell.get("outputs", []))
    assert shown == "[0]\n"


def test_solutions_run_each_in_a_fork_of_its_own(ran):
    _, run, _ = ran
    assert run.solutions[1] == {"error": None}
    assert (run.solutions[2]["error"], run.solutions[2]["line"]) == ("AssertionError", 1)


@pytest.mark.parametrize("place", range(len(BAD)), ids=REPORTS)
def test_a_mutant_that_does_anything_else_is_named(ran, place):
    _, _, reports = ran
    line, kind, code = BAD[place]
    assert reports[place] == f"{line}\n    {kind} = {code!r}\n    {REPORTS[place]}"


def test_a_mutant_that_the_notebook_does_not_reach_is_named(tmp_path):
    notebook = made_up()
    notebook.cells.insert(0, nbformat.v4.new_code_cell("1 / 0"))
    run = mutants.execute(notebook, tmp_path, GOOD)
    assert run.error.ename == "ZeroDivisionError"
    assert all(text.endswith("was not reached") for text in mutants.survivors(notebook, GOOD, run))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda lists: lists["assert"].pop(), "0 entries in the list for " + repr(INSIDE)),
        (lambda lists: lists["assert"].append(lists["assert"][0]), "2 entries in the list for"),
        (lambda lists: lists["assert"][0].update(line="assert x"), "0 asserts in the notebook"),
        (lambda lists: lists["assert"][0].update(before="x = 1"), "and no more"),
        (lambda lists: lists["assert"][0].pop("replace"), "one of before, replace, after"),
        (lambda lists: lists.update(asert=[]), "[[asert]] is neither"),
        (
            lambda lists: lists.update(shipped=[lists["assert"].pop() | {"file": "no/such"}]),
            "names no file that is shipped",
        ),
    ],
)
def test_a_list_that_is_not_whole_is_refused(change, fault):
    lists = copy.deepcopy(GOOD)
    change(lists)
    assert any(fault in text for text in mutants.faults(made_up(), lists))


def test_a_line_that_two_asserts_share_is_refused():
    notebook = made_up()
    notebook.cells.append(nbformat.v4.new_code_cell(POWER))
    (fault,) = mutants.faults(notebook, GOOD)
    assert fault == f"2 asserts in the notebook begin with {POWER!r}"
