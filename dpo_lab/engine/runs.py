"""Run directories: every file whole or absent, every run resumable to the byte.

A run directory holds `config.json` (what was asked for), `metrics.jsonl` (one line per event), the
results, and while it trains `training.json` (records.py) and `checkpoints/step-N/`
(checkpoints.py). This file also says where a result comes from, and what it cost.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dpo_lab.engine.arguments import checked
from dpo_lab.engine.distributed import from_main, is_main

METRICS, SNAPSHOTS, TRAINING = "metrics.jsonl", "snapshots.jsonl", "training.json"

# settings that earlier versions recorded under another name
RENAMED = {
    "kind": "loss_type",
    "accumulate": "gradient_accumulation_steps",
    "retokenised": "retokenized",
}

# settings that earlier versions did not have, and what they did
NEW = {"prompt": "prefix", "lora_layers": 0}

# what the two lanes of earlier versions meant
LANES = {
    "laptop": {"device": "cpu", "model": "embedded", "reward": "tfidf"},
    "gpu": {
        "device": "cuda",
        "model": "openai-community/gpt2-large",
        "reward": "siebert/sentiment-roberta-large-english",
    },
}


# files


@checked
@contextmanager
def atomic_write(path: Path | str, *, directory: bool = False) -> Iterator[Path]:
    """Give a temporary path next to `path`, and rename it to `path` when the block succeeds.

    When the block fails, nothing is left. With several processes only the main one's file is kept.

    Raises:
        ValueError: `path` is to be a directory and is, or holds, the working directory.
        OSError: the disk is full.
    """
    path = Path(path)
    if directory and Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(
            f"{str(path)!r} is the working directory or holds it; give a folder of its own, "
            "such as 'new'"
        )
    if not is_main():
        with tempfile.TemporaryDirectory() as elsewhere:
            inner = Path(elsewhere) / path.name
            if directory:
                inner.mkdir()
            yield inner
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    inner, old = temporary / path.name, temporary / "old"
    try:
        if directory:
            inner.mkdir()
        yield inner

        # a directory cannot be replaced in one step: move the old one aside, or back
        if directory and path.exists():
            path.rename(old)
        try:
            os.replace(inner, path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        advice = "nothing of it was kept. Free some space, then use --resume"
        raise OSError(errno.ENOSPC, f"no space left to write {path}; {advice}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@checked
def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@checked
def require_space(path: Path, n_bytes: int) -> None:
    """Raise OSError unless the file system of `path` has `n_bytes` free."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(existing).free) < n_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {n_bytes / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free; "
            "free some space or choose another directory with --out. Nothing was written",
        )


@checked
def require_writable(directory: Path) -> None:
    """Raise OSError unless `directory` can be written, or created. Nothing is left there."""
    candidates = (directory, *directory.absolute().parents)
    existing = next(path for path in candidates if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        why = f"nothing can be written into {existing} ({error.strerror})"
        if existing.is_file():
            why = "it is a file"
        raise OSError(
            error.errno,
            f"{directory} cannot be written: {why}. Choose another directory with --out "
            "(--data for its data)",
        ) from error


@checked
def file_hash(path: Path | str) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# the config of a run


@checked
def open_run(directory: Path | str, config: dict[str, Any], *, resume: bool) -> Path:
    """Create a run directory, or check that an existing one holds this config.

    Raises:
        ValueError: it holds another config, or it holds this one already and `resume` is False.
    """
    return from_main(_open_run, Path(directory), config, resume)


@checked
def check_run(directory: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Raise the errors of `open_run`, and write nothing: for use before anything is loaded."""
    from_main(_check_run, directory, config, resume)


def _check_run(directory: Path, config: dict[str, Any], resume: bool) -> None:
    if directory.exists() and _holds_files(directory):
        _open_run(directory, config, resume)


def _open_run(directory: Path, config: dict[str, Any], resume: bool) -> Path:
    config = json.loads(json.dumps(config))
    recorded = directory / "config.json"
    if recorded.exists():
        if different := "; ".join(differences(read_config(directory), config)):
            raise ValueError(
                f"{directory} holds a run with another config ({different}). "
                "Choose another --out, or delete it"
            )
        if not resume:
            raise ValueError(
                f"{directory} already holds a run with this config; continue it with --resume, "
                "or choose another --out"
            )
    elif directory.exists() and _holds_files(directory):
        raise ValueError(f"{directory} is not empty and has no config.json; choose another --out")
    else:
        write_json(recorded, config)
    return directory


def _holds_files(directory: Path) -> bool:
    """Whether a directory holds anything but locks, which a killed process leaves behind."""
    return any(path.suffix != ".lock" for path in directory.iterdir())


@checked
def read_config(directory: Path) -> dict[str, Any]:
    """The config of a run directory, also of an earlier version's.

    Raises:
        ValueError: the file is not JSON.
    """
    recorded = directory / "config.json"
    try:
        return current_config(json.loads(recorded.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{recorded} is not JSON ({error}); it is not a run directory of dpo-lab"
        ) from error


def current_config(recorded: Any) -> Any:
    """A config, or a line of metrics, of this or an earlier version, in today's names."""
    if not isinstance(recorded, dict):
        return recorded
    found = {RENAMED.get(name, name): current_config(value) for name, value in recorded.items()}

    # a lane set the device, and the model and reward that were not given
    if "lane" in found:
        for name, value in LANES.get(found.pop("lane"), {}).items():
            found[name] = value if found.get(name) is None else found[name]
    return found


def differences(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """`name: value there, value asked` of each setting in which two configs differ.

    Names of nested settings are joined by dots. Two paths that are the same place do not differ,
    nor does a path at which there is nothing any more: that folder was moved.
    """

    def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        settings = {}
        for name, value in config.items():
            nested = isinstance(value, dict)
            settings |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
        return settings

    found, asked = flat(found), flat(asked)
    found = {name: NEW[leaf] for name in asked if (leaf := name.split(".")[-1]) in NEW} | found
    changed = [name for name in sorted({*found, *asked}) if found.get(name) != asked.get(name)]
    names = [name for name in changed if not _same_place(found.get(name), asked.get(name))]
    return [f"{name}: {found.get(name)!r} there, {asked.get(name)!r} asked" for name in names]


def _same_place(found: Any, asked: Any) -> bool:
    if not (isinstance(found, str) and isinstance(asked, str)):
        return False
    there, here = Path(found), Path(asked)
    if not (here.is_absolute() and here.exists()):
        return False
    return there.absolute() == here or there.is_absolute() and not there.exists()


# what a run has measured


@checked
def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """Append one line to `metrics.jsonl` in one write."""
    if is_main():
        with open(run / METRICS, "ab", buffering=0) as file:
            file.write((json.dumps(line) + "\n").encode())


@checked
def read_metrics(run: Path | str, up_to: float = float("inf")) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` with step <= `up_to`, up to one that a crash truncated."""
    lines = []
    path = Path(run) / METRICS
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= up_to:
            lines.append(current_config(line))
    return lines


@checked
def read_snapshots(run: Path | str) -> list[dict[str, Any]]:
    """What a run kept at each evaluation.

    Each has `step`, the log-ratios of `chosen` and `rejected` (P,) in nats, mean `reward` and `kl`,
    and the first `texts` with their `rewards`.

    Raises:
        ValueError: the directory holds no `snapshots.jsonl`.
    """
    path = Path(run) / SNAPSHOTS
    if not path.exists():
        raise ValueError(
            f"{run} holds no {SNAPSHOTS}; give the run directory of `dpo-lab train`, "
            "such as runs/imdb"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# where a result comes from, and what it cost


def provenance() -> dict[str, str]:
    """Where a result comes from: commit, command, machine and versions.

    The commit ends with "-dirty" where the code differs from it.
    """
    root = Path(__file__).parents[2]
    script = Path(sys.argv[0]).absolute()
    shown = script.relative_to(root) if script.is_relative_to(root) else script.name
    program = "dpo-lab" if script.name in ("dpo-lab", "cli.py") else f"python {shown}"
    packages = ("torch", "transformers", "datasets", "accelerate")
    return {
        "commit": _commit(root),
        "command": " ".join([program, *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {_processor()}",
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
    }


def _commit(root: Path) -> str:
    """The commit of a checkout; results and pages written by commands do not make it dirty."""
    git = partial(subprocess.run, cwd=root, capture_output=True, text=True, check=False)
    if not (root / ".git").exists():
        return "not a git checkout"
    head = git(["git", "rev-parse", "--short=12", "HEAD"])
    if head.returncode:
        return "not a git checkout"
    code = ["dpo_lab", "benchmarks", ":!benchmarks/results"]
    changed = git(["git", "diff", "--quiet", "HEAD", "--", *code]).returncode
    return head.stdout.strip() + "-dirty" * bool(changed)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB (0 where the system does not tell)."""
    # Linux counts the peak of the parent process into ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class Stopwatch:
    """Seconds of the named stages of a notebook: `with clock("SFT"): ...`, then `clock.table()`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block, and add it to what `stage` took before."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[stage] = self.seconds.get(stage, 0.0) + took

    def table(self) -> str:
        """The stages as a table in Markdown, with their sum and the peak memory."""
        rows = [f"| {stage} | {seconds:.0f} |" for stage, seconds in self.seconds.items()]
        rows += [f"| **all** | {sum(self.seconds.values()):.0f} |"]
        rows += [f"| peak memory, GB | {peak_memory_mb() / 1e3:.1f} |"]
        return "\n".join(["| stage | seconds, here and now |", "|---|---|", *rows])


@contextmanager
def quiet_bars() -> Iterator[None]:
    """In the block, transformers and datasets draw no progress bars; ours remain.

    Downloads from the hub keep theirs. Of these two libraries only those that are already imported
    are told, and the process's own settings are as before afterwards.
    """
    with ExitStack() as restore:
        if transformers := sys.modules.get("transformers"):
            logging = transformers.utils.logging

            def no_bar(factory: Any, arguments: tuple, options: dict[str, Any]) -> Any:
                return factory(*arguments, **options | {"disable": True})

            if hasattr(logging, "set_tqdm_hook"):
                restore.callback(logging.set_tqdm_hook, logging.set_tqdm_hook(no_bar))

        # an environment variable goes before this setting
        datasets = sys.modules.get("datasets")
        if datasets and datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None:
            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                restore.callback(datasets.enable_progress_bars)
        yield
