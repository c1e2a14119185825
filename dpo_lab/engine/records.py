"""Which run a run directory holds: the record of what decides its weights, and its lock.

`training.json` holds method, config, seed, and hashes of data and weights; it is compared before a
run continues. `reference.safetensors` holds the reference log-probs that the run trains with. A
checkpoint names the record that it belongs to.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_lab.engine.checkpoints import checkpoints_of, tensors_hash, unique_tensors, what_is_kept
from dpo_lab.engine.distributed import from_main
from dpo_lab.engine.runs import (
    TRAINING,
    atomic_write,
    current_config,
    differences,
    read_metrics,
    write_json,
)

REFERENCE = "reference.safetensors"

AGAIN = "Choose another run directory, or delete this one to begin again"

# of a model's config, what does not decide how it computes
IGNORED = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


# the record


@contextmanager
def training_run(
    run: Path | None,
    describe: Callable[[], dict[str, Any]],
    *,
    resume: bool,
    logps: np.ndarray | None = None,
    atol: float = 0.0,
) -> Iterator[np.ndarray | None]:
    """Hold the directory `run` for training, and give the reference log-probs to train with.

    Args:
        run: without it nothing is recorded, and the block gets `logps`.
        describe: gives the record, which includes `weights_record`; called in the main process
            alone.
        logps: (N,) in nats. A run that continues takes those that it began with: another machine's
            may differ in the last bit.
        atol: nats by which `logps` may differ from those.

    Raises:
        ValueError: another process holds the directory; it holds checkpoints and `resume` is False;
            it holds checkpoints or metrics without a record; or the recorded run is another one.
            Nothing was changed then.
    """
    if run is None:
        yield logps
        return
    with locked(run):
        yield from_main(_open_training, run, describe, resume, logps, atol)


def _open_training(
    run: Path,
    describe: Callable[[], dict[str, Any]],
    resume: bool,
    logps: np.ndarray | None,
    atol: float,
) -> np.ndarray | None:
    path, checkpoints = run / TRAINING, checkpoints_of(run)
    if path.exists() and checkpoints and not resume:
        raise ValueError(
            f"{run} holds the checkpoints of an earlier run, the last one {checkpoints[-1].name}. "
            "Continue that run with resume=True (--resume), choose another run directory, or "
            "delete this one to begin again"
        )
    if not path.exists():
        require_unused(run)

    asked = json.loads(json.dumps(describe()))
    if logps is not None:
        asked["reference_logps"] = _logps_hash(logps)
    if not (resume and path.exists()):
        if logps is not None:
            _write_logps(run, logps)
        write_json(path, asked)
        return logps

    # a checkpoint's weights come in the place of the initial ones
    found, began_with = _read_record(path), _read_logps(run / REFERENCE)
    if checkpoints:
        asked["initial_weights"] = found.get("initial_weights")

    # log-probs that differ by rounding alone are those that the run began with
    if logps is not None and began_with is not None:
        unaltered = _logps_hash(began_with) == found.get("reference_logps")
        alike = logps.shape == began_with.shape
        if unaltered and alike and np.allclose(logps, began_with, rtol=0, atol=atol):
            asked["reference_logps"], logps = found["reference_logps"], began_with

    if different := "; ".join(differences(found, asked)):
        again = ""
        if "_weights:" in different:
            again = " (load the model again if it was trained since)"
        raise ValueError(
            f"{run} holds another run ({different}). Continue it with what is recorded there"
            f"{again}, choose another run directory, or delete this one to begin again"
        )
    if logps is not None and logps is not began_with:
        _write_logps(run, logps)
    return logps


def require_unused(run: Path) -> None:
    """Raise ValueError for a directory with checkpoints or metrics of an unknown run."""
    kept = "checkpoints" if checkpoints_of(run) else "metrics" if read_metrics(run) else ""
    if kept:
        raise ValueError(
            f"{run} holds the {kept} of an earlier run, and no {TRAINING} that records its config "
            "and data (PPO does not write one, nor did earlier versions), so it cannot be "
            f"continued. {AGAIN}"
        )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return dict(current_config(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:  # not JSON, not text, not an object
        raise ValueError(
            f"{path} was altered ({error}), so it is unknown whose checkpoints these are. {AGAIN}"
        ) from error


def _write_logps(run: Path, logps: np.ndarray) -> None:
    with atomic_write(run / REFERENCE) as temporary:
        save_file({"logps": torch.as_tensor(logps)}, temporary)


def _read_logps(path: Path) -> np.ndarray | None:
    try:
        return load_file(path)["logps"].numpy()
    except (OSError, KeyError, SafetensorError):
        return None


def _logps_hash(logps: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(logps, dtype=np.float64).tobytes()).hexdigest()[:16]


def weights_record(model: nn.Module, *, adapters: bool = False) -> dict[str, str | None]:
    """The part of a record that says which model is trained.

    `model` names its config, its modules, its parameters and which of them are trained;
    `frozen_weights` those that checkpoints do not hold, `initial_weights` those that they do. With
    `adapters` the whole model stays frozen, and what is trained will be added to it.
    """
    trained = {} if adapters else what_is_kept(model)
    frozen = {name: tensor for name, tensor in unique_tensors(model).items() if name not in trained}

    # how the model computes, as text
    config = getattr(getattr(model, "config", None), "to_diff_dict", dict)()
    settings = {name: value for name, value in config.items() if name not in IGNORED}
    parameters = [
        (name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()
    ]
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    described = json.dumps([settings, parameters, modules], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]

    has_adapters = adapters or hasattr(model, "peft_config")
    return {
        "model": f"{type(model).__name__} {digest}",
        "frozen_weights": tensors_hash(frozen) if has_adapters else None,
        "initial_weights": tensors_hash(trained) if trained else None,
    }


def data_hash(*parts: Any) -> str:
    """16 hexadecimal digits that name data.

    Parts are tensors, arrays, plain values, and the sequences, mappings and dataclasses that hold
    them.
    """
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(part, (list, tuple)):
            digest.update(f"[{len(part)}]".encode())
            for item in part:
                add(item)
        elif isinstance(part, Mapping) or hasattr(part, "__dataclass_fields__"):
            add(list((part if isinstance(part, Mapping) else vars(part)).items()))
        else:
            digest.update(f"{type(part).__name__}{part!r};".encode())

    add(parts)
    return digest.hexdigest()[:16]


# the lock


@contextmanager
def locked(run: Path, name: str = "training.lock") -> Iterator[None]:
    """Keep others out of the directory `run` while the block runs.

    The lock is a file with the number of this process, locked by the operating system, which ends
    the lock with the process, however that ends.

    Raises:
        ValueError: another process, or this one elsewhere, holds it.
    """
    held: list[IO[str]] = []
    from_main(_lock, run, name, held)
    try:
        yield
    finally:
        for file in held:
            path = run / name
            with suppress(PermissionError):  # Windows removes no open file
                if _is_open(file, path):
                    path.unlink()
            file.close()


def require_free(run: Path, name: str = "training.lock") -> None:
    """Raise ValueError where another process holds `run`: for use before anything is loaded."""
    if run.is_dir():
        with locked(run, name):
            pass


def _lock(run: Path, name: str, held: list[IO[str]]) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{run} is a file or lies in one; give the path of a folder as run directory"
        ) from error

    # open and lock; again, if another process has just removed the file
    path = run / name
    while True:
        file = open(path, "a+", encoding="utf-8")
        if not _taken(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{run} is in use by {holder}. Wait until that ends, stop it, or choose another "
                "run directory"
            )
        if _is_open(file, path):
            break
        file.close()

    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    held.append(file)


def _taken(file: IO[str]) -> bool:
    """Lock an open file; False where it is locked already.

    Where the system or the file system has no such locks, nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_open(file: IO[str], path: Path) -> bool:
    """Whether `file` is what lies at `path` now: it may have been removed or moved since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
