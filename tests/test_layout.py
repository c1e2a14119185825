"""The layout: which package may import which, and what each front gives without the rest."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_lab
from dpo_lab import theory

PACKAGE = Path(dpo_lab.__file__).parent
ROOM_OF = {"losses": "core", "batching": "core", "widgets": "top", "cli": "top", "doctor": "top"}
MAY_IMPORT = {
    "assets": set(),
    "engine": {"engine"},
    "checks": {"assets", "engine", "checks"},
    "core": {"engine", "core"},
    "theory": {"engine", "core", "theory"},
    "root": {"assets", "engine", "core", "theory", "root"},
    "rlhf": {"engine", "core", "root", "rlhf"},
    "data": {"engine", "core", "root", "data"},
    "variants": {"engine", "core", "root", "variants"},
    "judges": {"engine", "core", "theory", "root", "data", "variants", "judges"},
}
MAY_IMPORT["sentiment"] = set(MAY_IMPORT) - {"checks"} | {"sentiment"}
MAY_IMPORT["health"] = MAY_IMPORT["sentiment"] | {"health"}
MAY_IMPORT["top"] = MAY_IMPORT["health"] | {"top"}
THEORY_NEEDS = {"dpo_lab.losses", "dpo_lab.engine.arguments"}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_lab")
    }
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    found |= {alias.name for node in named for alias in node.names}
    return {name for name in found if name.split(".")[0] == "dpo_lab"}


def room_of(module: str) -> str:
    """The room that a module lies in: a package, or a part of the root."""
    first = (module.split(".") + [""])[1]
    return ROOM_OF.get(first, first if first in MAY_IMPORT else "root")


def modules() -> dict[str, Path]:
    """Every module of the package but the front door, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["dpo_lab"]
    return found


def test_a_package_imports_only_what_lies_below_it():
    wrong = [
        f"{name} imports {used}"
        for name, path in modules().items()
        for used in imports_of(path)
        if room_of(used) not in MAY_IMPORT[room_of(name)]
    ]
    assert wrong == []


def test_theory_imports_the_losses_alone():
    used = {
        one
        for name, path in modules().items()
        if room_of(name) == "theory"
        for one in imports_of(path)
    }
    assert {one for one in used if room_of(one) != "theory"} <= THEORY_NEEDS


def test_no_two_modules_import_each_other():
    names, order = modules(), []
    used = {name: imports_of(path) & set(names) for name, path in names.items()}
    while ready := [name for name in used if used[name] <= set(order) | {name}]:
        order += ready
        used = {name: found for name, found in used.items() if name not in ready}
    assert used == {}


def test_packages_are_one_level_deep():
    assert max(len(name.split(".")) for name in modules()) == 3
    assert not [name for name in modules() if "utils" in name]


def front_table(package):
    """Where the imports that editors read take each name of a package from."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: node.module.removeprefix("dpo_lab.")
        for node in block.body
        for alias in node.names
    }


def test_the_front_door_says_the_same_three_times():
    """`__all__`, the table of homes, and the imports that editors read."""
    read = front_table(dpo_lab)
    assert read == dpo_lab._HOME
    assert set(dpo_lab.__all__) == {*read, "__version__"} == set(dir(dpo_lab))
    assert len(dpo_lab.__all__) == len(set(dpo_lab.__all__)) <= 60


@pytest.mark.parametrize("name", ["rlhf", "sentiment", "data", "judges", "plots", "health"])
def test_the_door_of_a_package_says_the_same_three_times(name):
    package = importlib.import_module(f"dpo_lab.{name}")
    read = front_table(package)
    homes = {one: home.removeprefix(f"{name}.") for one, home in package._HOME.items()}
    assert {one: home.removeprefix(f"{name}.") for one, home in read.items()} == homes
    assert sorted(read) == package.__all__ == dir(package)
    assert all(getattr(package, one) is not None for one in read)
    with pytest.raises(AttributeError, match=f"{name}' has no attribute 'nothing'; it has "):
        package.__getattr__("nothing")


def test_the_names_of_theory_are_there_and_in_order():
    assert sorted(theory.__all__) == theory.__all__
    assert all(getattr(theory, one) is not None for one in theory.__all__)


@pytest.mark.parametrize("module", ["dpo_lab.widgets", "dpo_lab.theory", "dpo_lab.rlhf"])
def test_a_slider_is_there_without_waiting_for_what_it_does_not_use(module):
    """In a process of its own: the tests around this one have long imported everything."""
    code = f"import sys, {module}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert module in loaded
    assert not loaded & {"transformers", "datasets", "sklearn", "scipy", "pandas", "sympy"}
    assert "matplotlib.pyplot" not in loaded


@pytest.mark.parametrize("name", dpo_lab.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dpo_lab, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'dpo_los'; it has .*dpo_loss"):
        getattr(dpo_lab, "dpo_" + "los")
    with pytest.raises(ImportError, match="dpo_los"):
        exec("from dpo_lab import dpo_los")


HEAVY = ["transformers", "accelerate", "datasets", "pyarrow", "sklearn", "scipy", "matplotlib"]


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from dpo_lab import dpo_loss, DPOLoss", HEAVY),
        ("from dpo_lab.checks import check_dpo_loss", HEAVY),
        ("import dpo_lab.engine.runs, dpo_lab.engine.records, dpo_lab.engine.cpu", HEAVY),
        ("import dpo_lab.widgets", [name for name in HEAVY if name != "matplotlib"]),
    ],
)
def test_what_needs_no_library_does_not_load_it(code, heavy):
    report = f"import sys; print(*[name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
