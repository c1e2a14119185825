"""Checkpoints: weights, optimizer state and random state in safetensors, hashed.

A checkpoint is a directory that appears by one rename, whole or not at all.
"""

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
from torch import Tensor
from torch.optim import Optimizer

from dpo_lab.engine.arguments import checked
from dpo_lab.engine.distributed import from_main, full_tensor, is_main, world_size
from dpo_lab.engine.runs import TRAINING, atomic_write, file_hash, require_space

# files of a checkpoint
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"

# by optimizer and parameter, the tensors of an optimizer's state
OptimizerStates = dict[tuple[int, int], dict[str, Tensor]]


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints in a run directory, the newest last."""
    return sorted((run / "checkpoints").glob("step-*"))


# save


@checked
def save_checkpoint(
    run: Path,
    step: int,
    model: torch.nn.Module,
    optimizers: list[Optimizer],
    *,
    data: str | None = None,
) -> Path:
    """Write `checkpoints/step-N`, and keep the checkpoint before it.

    It holds weights, optimizer state, random state, and a hash of each file. `data` names the
    batches that were read up to `step`.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    state: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()

    # every process takes part in gathering a shard; the main one keeps the result
    for k, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                whole = None if value is None else full_tensor(torch.as_tensor(value))
                if whole is not None and is_main():
                    state[f"{k}.{index}.{name}"] = whole.contiguous()
    return from_main(_write_checkpoint, path, step, model, state, data)


def _write_checkpoint(
    path: Path, step: int, model: torch.nn.Module, state: dict[str, Tensor], data: str | None
) -> Path:
    # safetensors takes no tensor that is a part of another
    weights = what_is_kept(model)
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in weights.values())
    for name, tensor in weights.items():
        part_of_another = owners[tensor.untyped_storage().data_ptr()] > 1
        weights[name] = tensor.clone() if part_of_another else tensor.contiguous()

    tensors = [*weights.values(), *state.values()]
    require_space(path, sum(t.numel() * t.element_size() for t in tensors))
    with atomic_write(path, directory=True) as temporary:
        save_weights(weights, temporary / WEIGHTS)
        save_file(state, temporary / OPTIMIZER)
        recorded = {
            "step": step,
            "training": _record_hash(path.parents[1]),
            "data": data,
            "sha256": {name: file_hash(temporary / name) for name in (WEIGHTS, OPTIMIZER)},
        }
        (temporary / STATE).write_text(json.dumps(recorded, indent=2) + "\n")

    # of the older ones the last is kept
    older = [other for other in checkpoints_of(path.parents[1]) if other.name < path.name]
    for one in older[:-1]:
        shutil.rmtree(one)
    return path


def _record_hash(run: Path) -> str | None:
    return file_hash(run / TRAINING) if (run / TRAINING).exists() else None


def unique_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state by name; of tied ones, which share memory, the first."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        found.setdefault(place if tensor.numel() else name, (name, tensor))
    return dict(found.values())


def what_is_kept(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its state, or of one with adapters what is trained."""
    if hasattr(model, "peft_config"):
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return unique_tensors(model)


# load


@checked
def load_checkpoint(
    run: Path,
    model: torch.nn.Module,
    optimizers: list[Optimizer],
    *,
    data_of: Callable[[int], str] | None = None,
) -> int:
    """Load the newest checkpoint of `run`, and return its step; 0 when there is none.

    `data_of(step)` names the batches that this run reads up to a step. They must be those of the
    checkpoint.

    Raises:
        ValueError: a file of the checkpoint is missing, truncated or altered; it belongs to another
            run, another model or other data. Model and optimizers are untouched.
    """
    checkpoints = checkpoints_of(run)
    if not checkpoints:
        return 0
    path = checkpoints[-1]
    advice = f"Delete {path} to continue from the checkpoint before it, or from the start"

    # whole, and of this run, this model, these optimizers and these data
    recorded, weights, state = _read_checkpoint(path, advice)
    states, kept, step = _optimizer_states(state), what_is_kept(model), recorded["step"]
    if recorded["training"] != _record_hash(run):
        raise ValueError(f"{path} belongs to another run than {run / TRAINING} records. {advice}")
    if different := _unlike(weights, kept):
        raise ValueError(f"{path} holds another model ({different}). {advice}")
    if not _fit_optimizers(states, optimizers):
        raise ValueError(f"{path} holds the state of another optimizer. {advice}")
    if data_of is not None and recorded["data"] != data_of(step):
        raise ValueError(
            f"{path} was trained on other data: the batches up to step {step} are not those that "
            f"it read. {advice}"
        )

    # into the model, the optimizers and the random generators
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(weights[name])
    for k, optimizer in enumerate(optimizers):
        mine = {index: found for (owner, index), found in states.items() if owner == k}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": mine, "param_groups": groups})
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])
    return step


def _read_checkpoint(
    path: Path, advice: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The record, the weights and the optimizer state of a checkpoint that is whole."""
    try:
        recorded = json.loads((path / STATE).read_text())
        if path.name != f"step-{recorded['step']:08d}":
            raise ValueError(
                f"{path / STATE} was altered: it says step {recorded['step']}. {advice}"
            )
        for name in (WEIGHTS, OPTIMIZER):
            if not (path / name).exists() or file_hash(path / name) != recorded["sha256"][name]:
                raise ValueError(
                    f"{path / name} is missing, truncated or altered: its sha256 is not the "
                    f"recorded one. {advice}"
                )
        weights, state = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
        found = {name: recorded[name] for name in ("step", "training", "data")}
    except (
        OSError,
        KeyError,
        TypeError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{path} cannot be read ({error!r}). {advice}") from error
    return found, weights, state


def _optimizer_states(state: dict[str, Tensor]) -> OptimizerStates:
    """The tensors of a checkpoint, which are called `optimizer.parameter.name`."""
    states: OptimizerStates = {}
    for key, tensor in state.items():
        if not key.startswith("rng."):
            k, index, name = key.split(".", 2)
            states.setdefault((int(k), int(index)), {})[name] = tensor
    return states


def _fit_optimizers(states: OptimizerStates, optimizers: list[Optimizer]) -> bool:
    """Whether each tensor is a scalar, or as large as the parameter that it belongs to."""
    shapes = {}
    for k, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shapes |= {(k, index): p.shape for index, p in enumerate(parameters)}
    return all(
        tensor.shape in ((), shapes.get(place))
        for place, found in states.items()
        for tensor in found.values()
    )


def _unlike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """The first difference, by name, between tensors of a checkpoint and of a model; or ""."""
    for name in sorted({*found, *expected}):
        there, here = (
            "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            for tensor in (found.get(name), expected.get(name))
        )
        if there != here:
            return f"{name}: {there} there, {here} in the model"
    return ""


# names of weights


def weights_hash(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that name a model's weights: the key of its stored log-probs."""
    # these lists have a tied tensor once
    return tensors_hash(dict([*model.named_parameters(), *model.named_buffers()]))


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """16 hexadecimal digits that name tensors, by names and bytes."""
    named = sorted(tensors.items())

    def digest(tensor: Tensor) -> bytes:
        flat = tensor.detach().cpu().reshape(-1).contiguous()
        return hashlib.sha256(flat.view(torch.uint8).numpy()).digest()

    with ThreadPoolExecutor() as pool:
        parts = pool.map(digest, (tensor for _, tensor in named))
        joined = b"".join(name.encode() + part for (name, _), part in zip(named, parts))
    return hashlib.sha256(joined).hexdigest()[:16]


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that a loop can stop between steps.

    The second one stops at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        # a launcher passes on a signal that its processes have had from the terminal already
        if stop.is_set() and world_size() == 1:
            raise KeyboardInterrupt
        stop.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
