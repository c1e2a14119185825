"""Checkpoints: weights, optimizer state and random state in safetensors, hashed, written whole or not at all."""

import hashlib
import json
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save_file as save_weights
from torch.optim import Optimizer

from dpo_lab.engine.arguments import checked
from dpo_lab.engine.distributed import from_main, full_tensor, is_main, world_size
from dpo_lab.engine.runs import TRAINING, atomic_write, file_hash, require_space

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"  # files of a checkpoint


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints in a run directory, the newest one last."""
    return sorted((run / "checkpoints").glob("step-*"))


@checked
def save_checkpoint(
    run: Path,
    step: int,
    model: torch.nn.Module,
    optimizers: list[Optimizer],
    *,
    data: str | None = None,
) -> Path:
    """Write `checkpoints/step-N` (weights, optimizer state, random state, a hash of each) and keep the one before it.

    `data` names what was read up to `step`.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    state: dict[str, torch.Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    for k, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            values = {
                name: full_tensor(torch.as_tensor(v)) for name, v in values.items() if v is not None
            }
            if is_main():
                state |= {f"{k}.{index}.{name}": v.contiguous() for name, v in values.items()}
    return from_main(_write_checkpoint, path, step, model, state, data)


def _write_checkpoint(
    path: Path, step: int, model: torch.nn.Module, state: dict[str, torch.Tensor], data: str | None
) -> Path:
    weights, owners = (
        what_is_kept(model),
        Counter(t.untyped_storage().data_ptr() for t in what_is_kept(model).values()),
    )
    for name, tensor in weights.items():  # safetensors takes no tensor that is a part of another
        weights[name] = (
            tensor.clone()
            if owners[tensor.untyped_storage().data_ptr()] > 1
            else tensor.contiguous()
        )
    require_space(
        path, sum(t.numel() * t.element_size() for t in [*weights.values(), *state.values()])
    )
    with atomic_write(path, directory=True) as temporary:
        save_weights(weights, temporary / WEIGHTS)
        save_file(state, temporary / OPTIMIZER)
        hashes = {name: file_hash(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        recorded = {
            "step": step,
            "training": _record_hash(path.parents[1]),
            "data": data,
            "sha256": hashes,
        }
        (temporary / "state.json").write_text(json.dumps(recorded, indent=2) + "\n")
    for older in [other for other in checkpoints_of(path.parents[1]) if other.name < path.name][
        :-1
    ]:
        shutil.rmtree(older)
    return path


def _record_hash(run: Path) -> str | None:
    return file_hash(run / TRAINING) if (run / TRAINING).exists() else None


def unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's state by name; of those that are tied, which share their memory, the first one."""
    found: dict[Any, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        place = (
            (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel()
            else name
        )
        found.setdefault(place, (name, tensor))
    return dict(found.values())


def what_is_kept(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model: all of its state, or of one with adapters (peft) what is trained, for the rest stays."""
    if hasattr(model, "peft_config"):
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return unique_tensors(model)


@checked
def load_checkpoint(
    run: Path,
    model: torch.nn.Module,
    optimizers: list[Optimizer],
    *,
    data_of: Callable[[int], str] | None = None,
) -> int:
    """Load the newest checkpoint of `run` into model and optimizers; return its step, 0 when there is none.

    `data_of(step)` names what is read up to a step; it must be what was read.

    Raises:
        ValueError: a file of the checkpoint is missing, truncated or altered; it belongs to another run, another model or
            other data. Model and optimizers are untouched.
    """
    checkpoints = checkpoints_of(run)
    if not checkpoints:
        return 0
    path = checkpoints[-1]
    advice = f"Delete {path} to continue from the checkpoint before it, or from the start"
    try:
        recorded = json.loads((path / "state.json").read_text())
        if path.name != f"step-{recorded['step']:08d}":
            raise ValueError(
                f"{path / 'state.json'} was altered: it says step {recorded['step']}. {advice}"
            )
        for name in (WEIGHTS, OPTIMIZER):
            if not (path / name).exists() or file_hash(path / name) != recorded["sha256"][name]:
                raise ValueError(
                    f"{path / name} is missing, truncated or altered: its sha256 is not the recorded one. {advice}"
                )
        weights, state = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
        step, training, data = recorded["step"], recorded["training"], recorded["data"]
    except (
        OSError,
        KeyError,
        TypeError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{path} cannot be read ({error!r}). {advice}") from error
    if training != _record_hash(run):
        raise ValueError(f"{path} belongs to another run than {run / TRAINING} records. {advice}")
    kept = what_is_kept(model)
    if different := _unlike(weights, kept):
        raise ValueError(f"{path} holds another model ({different}). {advice}")
    sizes = {
        (k, i): p.shape
        for k, optimizer in enumerate(optimizers)
        for i, p in enumerate(_parameters(optimizer))
    }
    states = _optimizer_states(state)
    if any(
        tensor.shape not in ((), sizes.get(place))
        for place, found in states.items()
        for tensor in found.values()
    ):
        raise ValueError(f"{path} holds the state of another optimizer. {advice}")
    if data_of is not None and data != data_of(step):
        raise ValueError(
            f"{path} was trained on other data: the batches up to step {step} are not those that it read. {advice}"
        )

    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(weights[name])
    for k, optimizer in enumerate(optimizers):
        mine = {i: found for (owner, i), found in states.items() if owner == k}
        optimizer.load_state_dict(
            {"state": mine, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])
    return step


def _unlike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """How the tensors of a checkpoint differ from a model's, the first difference by name; empty where they do not."""
    for name in sorted({*found, *expected}):
        a, b = (
            "nothing" if t is None else f"{t.dtype} {tuple(t.shape)}"
            for t in (found.get(name), expected.get(name))
        )
        if a != b:
            return f"{name}: {a} there, {b} in the model"
    return ""


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _optimizer_states(
    state: dict[str, torch.Tensor],
) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """By optimizer and parameter, the tensors of a checkpoint, which are called `optimizer.parameter.name`."""
    states: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        if not key.startswith("rng."):
            k, index, name = key.split(".", 2)
            states.setdefault((int(k), int(index)), {})[name] = tensor
    return states


def weights_hash(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that name the model's weights: the key under which its log-probs are stored."""
    return tensors_hash(
        dict([*model.named_parameters(), *model.named_buffers()])
    )  # which have a tied tensor once


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that name tensors, by names and bytes."""
    named = sorted(tensors.items())

    def digest(tensor: torch.Tensor) -> bytes:
        return hashlib.sha256(
            tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        ).digest()

    with ThreadPoolExecutor() as pool:
        parts = pool.map(digest, (tensor for _, tensor in named))
        return hashlib.sha256(
            b"".join(name.encode() + part for (name, _), part in zip(named, parts))
        ).hexdigest()[:16]


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that a loop can stop between steps; the second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        if (
            stop.is_set() and world_size() == 1
        ):  # a launcher sends on what its processes have had from the terminal already
            raise KeyboardInterrupt
        stop.set()

    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
