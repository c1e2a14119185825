"""Run directories: every file whole or absent, every run resumable to the byte.

A run directory holds `config.json` (what was asked), `metrics.jsonl` (one line an event), `training.json` (records.py) and
`checkpoints/step-N/` while it trains, and the results. A checkpoint is a directory of safetensors that appears by one rename.
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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dpo_lab.engine.arguments import checked
from dpo_lab.engine.distributed import from_main, is_main

SNAPSHOTS = "snapshots.jsonl"

TRAINING = "training.json"  # records.py

# names that earlier versions recorded in configs, and today's
RENAMED = {"kind": "loss_type", "accumulate": "gradient_accumulation_steps"}

# what the two lanes of earlier versions meant
LANES = {
    "laptop": {"device": "cpu", "model": "embedded", "reward": "tfidf"},
    "gpu": {
        "device": "cuda",
        "model": "openai-community/gpt2-large",
        "reward": "siebert/sentiment-roberta-large-english",
    },
}


@checked
@contextmanager
def atomic_write(path: Path | str, *, directory: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` when the block succeeds, remove it when it does not.

    Of several processes only the main one's file is kept.
    """
    path = Path(path)
    if directory and Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(
            f"{str(path)!r} is the working directory or holds it; give a folder of its own, such as 'new'"
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
    inner = temporary / path.name
    try:
        if directory:
            inner.mkdir()
        yield inner
        old = temporary / "old"
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
    """Raise OSError unless `directory` can be written, or made where it is not there yet. Nothing is left there."""
    existing = next(
        path for path in (directory, *directory.absolute().parents) if os.path.lexists(path)
    )
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        why = (
            "it is a file"
            if existing.is_file()
            else f"nothing can be written into {existing} ({error.strerror})"
        )
        raise OSError(
            error.errno,
            f"{directory} cannot be written: {why}. Choose another directory with --out (--data for its data)",
        ) from error


def provenance() -> dict[str, str]:
    """Where a result comes from: commit ("-dirty" where code differs from it), command, machine and versions."""
    root = Path(__file__).parents[2]
    script = Path(sys.argv[0]).absolute()
    shown = script.relative_to(root) if script.is_relative_to(root) else script.name
    program = "dpo-lab" if script.name in ("dpo-lab", "cli.py") else f"python {shown}"
    return {
        "commit": _commit(root),
        "command": " ".join([program, *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {_processor()}",
        "versions": ", ".join(
            f"{p} {version(p)}" for p in ("torch", "transformers", "datasets", "accelerate")
        ),
    }


def _commit(root: Path) -> str:
    """The commit of a checkout. Results and pages that one command after another writes do not make it dirty."""
    git = partial(subprocess.run, cwd=root, capture_output=True, text=True, check=False)
    if (
        not (root / ".git").exists()
        or (head := git(["git", "rev-parse", "--short=12", "HEAD"])).returncode
    ):
        return "not a git checkout"
    changed = git(
        ["git", "diff", "--quiet", "HEAD", "--", "dpo_lab", "benchmarks", ":!benchmarks/results"]
    ).returncode
    return head.stdout.strip() + "-dirty" * bool(changed)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB (0 where the system does not tell)."""
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # for Linux counts the peak of the process that started this one into ru_maxrss
        return next(
            int(line.split()[1]) * 1024 / 1e6
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@checked
def read_config(directory: Path) -> dict[str, Any]:
    """The config that a run directory was opened with, in today's names.

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
    """A config as it was recorded, by this version or an earlier one, in today's names and values."""
    if not isinstance(recorded, dict):
        return recorded
    found = {RENAMED.get(name, name): current_config(value) for name, value in recorded.items()}

    # a lane set the device, and the model and reward that were not given
    if "lane" in found:
        lane = found.pop("lane")
        for name, value in LANES.get(lane, {}).items():
            found[name] = value if found.get(name) is None else found[name]
    return found


@checked
def open_run(directory: Path | str, config: dict[str, Any], *, resume: bool) -> Path:
    """Create a run directory, or check that an existing one holds this config.

    Raises:
        ValueError: it holds another config, or it holds this one already and `resume` is False.
    """
    return from_main(_open_run, Path(directory), config, resume)


@checked
def check_run(directory: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Raise the errors of `open_run` with these arguments, and write nothing; for before anything is loaded."""
    from_main(_check_run, directory, config, resume)


def _check_run(directory: Path, config: dict[str, Any], resume: bool) -> None:
    if directory.exists() and _holds_files(directory):
        _open_run(directory, config, resume)


def _holds_files(directory: Path) -> bool:
    """Whether there is anything in a directory but locks, which a process that was killed leaves behind."""
    return any(path.suffix != ".lock" for path in directory.iterdir())


def _open_run(directory: Path, config: dict[str, Any], resume: bool) -> Path:
    config = json.loads(json.dumps(config))
    recorded = directory / "config.json"
    if recorded.exists():
        found = read_config(directory)
        if differences(found, config):
            different = "; ".join(differences(found, config))
            raise ValueError(
                f"{directory} holds a run with another config ({different}). Choose another --out, or delete it"
            )
        if not resume:
            raise ValueError(
                f"{directory} already holds a run with this config; continue it with --resume, or choose another --out"
            )
    elif directory.exists() and _holds_files(directory):
        raise ValueError(f"{directory} is not empty and has no config.json; choose another --out")
    else:
        write_json(recorded, config)
    return directory


def differences(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """`name: value there, value asked` of each setting in which two configs differ, names of nested ones joined by dots.

    A path differs from none that is the same place, and from none where nothing is any more: it was moved.
    """

    def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        parts = [
            flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
            for k, v in config.items()
        ]
        return {name: value for part in parts for name, value in part.items()}

    found, asked = flat(found), flat(asked)
    changed = [name for name in sorted({*found, *asked}) if found.get(name) != asked.get(name)]
    names = [name for name in changed if not _same_place(found.get(name), asked.get(name))]
    return [f"{name}: {found.get(name)!r} there, {asked.get(name)!r} asked" for name in names]


def _same_place(found: Any, asked: Any) -> bool:
    if not (
        isinstance(found, str)
        and isinstance(asked, str)
        and Path(asked).is_absolute()
        and Path(asked).exists()
    ):
        return False
    return (
        Path(found).absolute() == Path(asked)
        or Path(found).is_absolute()
        and not Path(found).exists()
    )


@checked
def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """Append one line to `metrics.jsonl` in one write."""
    if is_main():
        with open(run / "metrics.jsonl", "ab", buffering=0) as file:
            file.write((json.dumps(line) + "\n").encode())


@checked
def read_metrics(run: Path | str, up_to: float = float("inf")) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` with step <= `up_to`; a line cut short by a crash ends the list."""
    lines = []
    path = Path(run) / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= up_to:
            lines.append(line)
    return lines


@checked
def read_snapshots(run: Path | str) -> list[dict[str, Any]]:
    """What a run kept at each evaluation: `step`, log-ratios of `chosen` and `rejected` (P,) in nats, mean `reward`, `kl`, and
    the first `texts` with their `rewards`.

    Raises:
        ValueError: the directory holds no `snapshots.jsonl`.
    """
    path = Path(run) / SNAPSHOTS
    if not path.exists():
        raise ValueError(
            f"{run} holds no {SNAPSHOTS}; give the run directory of `dpo-lab train`, such as runs/imdb"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@checked
def file_hash(path: Path | str) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
