"""The layout: which package may import which, and what the front door gives without loading the rest."""

import ast
from pathlib import Path

import pytest

import dpo_lab

PACKAGE = Path(dpo_lab.__file__).parent
ROOM_OF = {"losses": "core", "batching": "core", "widgets": "top", "cli": "top", "doctor": "top"}
MAY_IMPORT = {
    "assets": set(),
    "engine": {"engine"},
    "core": {"engine", "core"},
    "theory": {"engine", "core", "theory"},
    "root": {"assets", "engine", "core", "theory", "root"},
    "rlhf": {"engine", "core", "root", "rlhf"},
    "sentiment": {"assets", "engine", "core", "theory", "root", "rlhf", "sentiment"},
    "top": {"assets", "engine", "core", "theory", "root", "rlhf", "sentiment", "top"},
}
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


def test_the_front_door_says_the_same_three_times():
    """`__all__`, the table of homes, and the imports that editors read."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    read = {
        alias.name: node.module.removeprefix("dpo_lab.")
        for node in block.body
        for alias in node.names
    }
    assert read == dpo_lab._HOME
    assert set(dpo_lab.__all__) == {*read, "__version__"} == set(dir(dpo_lab))
    assert len(dpo_lab.__all__) == len(set(dpo_lab.__all__)) <= 50


@pytest.mark.parametrize("name", dpo_lab.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dpo_lab, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'dpo_los'; it has .*dpo_loss"):
        getattr(dpo_lab, "dpo_" + "los")
    with pytest.raises(ImportError, match="dpo_los"):
        exec("from dpo_lab import dpo_los")
