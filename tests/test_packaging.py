"""pyproject.toml holds the one list of dependencies.

constraints.txt, environment.yml and the Makefile agree with it.
"""

import os
import re
import stat
import subprocess
import sys
import tomllib
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from conftest import LONGEST, FileByFile
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN_LINES = (ROOT / "constraints.txt").read_text().splitlines()
REQUIREMENTS = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
]


def test_every_pin_is_a_plain_version_and_they_are_sorted():
    assert [
        line
        for line in PIN_LINES
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*", line)
    ] == []
    names = [canonicalize_name(line.split("==")[0]) for line in PIN_LINES]
    assert names == sorted(set(names)), "pins must be sorted by name, each name once"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_dependency_is_pinned_within_its_bound(requirement):
    assert requirement.specifier, f"{requirement} has no bound"
    pins = [Requirement(line) for line in PIN_LINES]
    versions = [
        str(pin.specifier)[2:]
        for pin in pins
        if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
    ]
    assert len(versions) == 1
    assert requirement.specifier.contains(versions[0], prereleases=True)


def test_every_pin_installs_on_the_oldest_python_that_is_allowed():
    # Debian 12 has 3.11.2
    oldest = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])[1] + ".0"
    refused, seen = [], 0
    for line in PIN_LINES:
        try:
            needs = distribution(line.split("==")[0]).metadata["Requires-Python"]
        except PackageNotFoundError:  # of another system, or of an extra that is not installed
            continue
        seen += 1
        if needs and oldest not in SpecifierSet(needs):
            refused.append(f"{line} needs Python {needs}")
    assert refused == [] and seen > 100


def test_everything_the_installed_dependencies_need_is_pinned():
    pins = {canonicalize_name(line.split("==")[0]) for line in PIN_LINES}
    seen, missing = set(), set()
    queue = [(requirement.name, frozenset(requirement.extras)) for requirement in REQUIREMENTS]
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if canonicalize_name(name) not in pins:
            missing.add(name)
        try:
            needs = [Requirement(line) for line in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        for need in needs:
            # A CUDA build of torch pins its own GPU libraries exactly.
            if name == "torch" and re.match(r"nvidia|cuda|triton", need.name):
                continue
            if need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                queue.append((need.name, frozenset(need.extras)))
    assert len(seen) > len(REQUIREMENTS)
    assert missing == set()


def test_environment_yml_installs_this_package_and_lists_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    others = [item for item in environment["dependencies"] if not isinstance(item, str)]
    assert [re.split(r"[=<>!~ ]", item)[0] for item in conda] == ["python", "pip"]
    assert others == [{"pip": ["-c constraints.txt", "-e .[test]"]}]


def test_environment_yml_python_is_one_the_package_supports():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    version = re.fullmatch(r"python=(\d+\.\d+)", environment["dependencies"][0])[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(Version(version))


def test_no_other_file_lists_packages():
    names = (
        "*requirements*.txt setup.py setup.cfg Pipfile* *.lock environment*.y*ml "
        "binder .binder apt.txt postBuild"
    ).split()
    assert {path.name for name in names for path in ROOT.glob(name)} == {"environment.yml"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files the set-up depends on, with a stamp newer than both."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    (tmp_path / ".venv").mkdir()
    for i, name in enumerate((".installed", ".installed-test")):
        (tmp_path / ".venv" / name).touch()
        os.utime(tmp_path / ".venv" / name, (2_000_000 + i, 2_000_000 + i))
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")
    }
    return subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "target, command",
    [("lab", "jupyter lab notebooks/"), ("test", "-m pytest"), ("demo", "dpo-lab train")],
)
def test_a_second_call_sets_nothing_up_again(checkout, target, command):
    printed = make(checkout, "-n", target).stdout
    assert command in printed
    assert "install" not in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("newer", ["pyproject.toml", "constraints.txt"])
def test_changed_dependencies_are_installed_with_the_constraints(checkout, newer):
    os.utime(checkout / newer, (3_000_000, 3_000_000))
    printed = make(checkout, "-n", "test").stdout
    installs = [line for line in printed.splitlines() if "pip install" in line]
    assert [
        re.search(r" -c constraints\.txt (?:-e|-U) '?([^' ]*)", line)[1] for line in installs
    ] == ["pip", ".", ".[test]"]
    assert "[test]" not in make(checkout, "-n", "lab").stdout


def test_a_failed_install_leaves_no_stamp(checkout):
    os.utime(checkout / "pyproject.toml", (3_000_000, 3_000_000))
    fake = checkout / ".venv" / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\ncase "$*" in *install*) exit 1;; esac\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    done = make(checkout, f"PYTHON={sys.executable}", ".venv/.installed")
    assert done.returncode != 0
    assert "minutes" in done.stdout
    assert "pip install" in done.stdout
    assert not (checkout / ".venv" / ".installed").exists()


def test_make_says_so_when_there_is_no_python(checkout):
    (checkout / ".venv" / ".installed").unlink()
    done = make(checkout, "PYTHON=no-such-python", "test")
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr


def test_make_help_lists_the_targets(checkout):
    listed = [line.split()[1] for line in make(checkout).stdout.splitlines()]
    assert {"lab", "test", "demo"} <= set(listed)
    assert make(checkout, "help").stdout == make(checkout).stdout


def test_a_file_s_tests_share_a_worker_and_notebooks_do_not():
    split = partial(FileByFile._split_scope, None)
    assert (
        split("tests/test_experiment.py::test_a[x::y]")
        == split("tests/test_experiment.py::test_b")
        != split("tests/test_cli.py::test_b")
    )
    assert split("tests/test_notebooks.py::test_a_notebook_runs[04]") != split(
        "tests/test_notebooks.py::test_a_notebook_runs[05]"
    )
    # but one notebook's tests do, for it runs once
    assert split("tests/test_notebooks.py::test_a_notebook_runs[04]") == split(
        "tests/test_notebooks.py::test_every_solution_of_a_notebook_runs[04]"
    )
    # these options ask for conftest's scheduler
    assert "--dist loadscope --no-loadscope-reorder" in (ROOT / "Makefile").read_text()


def test_what_takes_longest_is_there():
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert [name for name in LONGEST if name not in notebooks and not (ROOT / name).exists()] == []


def test_the_gpu_benchmark_is_given_the_pinned_versions():
    lines = (ROOT / "benchmarks" / "gpu-requirements.txt").read_text().splitlines()
    asked = [line for line in lines if not line.startswith("#")]
    assert asked and [line for line in asked if line not in PIN_LINES] == []


def test_every_file_of_data_goes_into_the_wheel():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "dpo_lab"
    files = (path for path in package.rglob("*") if path.is_file())
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    packed = {path for glob in table["package-data"]["dpo_lab"] for path in package.glob(glob)}
    assert data - packed == set()
    assert package / "assets" / "mistakes.csv" in packed
    assert package / "assets" / "dialogue.txt" in packed
