"""The files of a run, whole or broken, ours or written by others: metrics, facts, pairs, weights.

What is wrong with a file is said in a note, and costs what it would have told alone.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from dpo_lab.engine.checkpoints import WEIGHTS, checkpoints_of, tensors_hash
from dpo_lab.engine.runs import current_config
from dpo_lab.facts import HELD_OUT, PAIRS, pair_hashes
from dpo_lab.preferences import Preferences

Line = dict[str, float]

# where a run keeps its pairs in `data`, and those that it is evaluated on
SAVED, SAVED_HELD_OUT = ("preferences", "train"), ("held_out", "test")

# checkpoints up to this size are compared with the initial weights
LARGEST_HASHED = 2**30

# a run directory holds no file larger than this that is read whole
LARGEST = 512 * 2**20


def read_lines(path: Path) -> tuple[list[Line], list[str]]:
    """The lines of `metrics.jsonl` as numbers, in order, and what was wrong with it.

    A line that cannot be read ends nothing but itself; the last one may be half written.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which no run writes")
    texts = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lines: list[Line] = []
    broken: list[int] = []
    missing: dict[str, int] = {}
    for i, text in enumerate(texts, 1):
        if not text.strip():
            continue
        line = _line(text)
        if line is None:
            broken.append(i)
            continue
        for name, value in line.items():
            if not math.isfinite(value):
                missing.setdefault(name, int(line["step"]))
        lines.append(line)

    # what was wrong, by number and name
    notes = []
    if broken:
        last = " (the last one, half written)" if broken == [len(texts)] else ""
        notes.append(
            f"{path.name}: {len(broken)} of {len(texts)} lines cannot be read, line {broken[0]} "
            f"first{last}"
        )
    for name, step in missing.items():
        notes.append(f"{path.name}: {name} is not a finite number at step {step}")
    if not lines:
        raise ValueError(f"{path} holds no line of metrics; the run has not begun, or is another's")
    return lines, notes


def _line(text: str) -> Line | None:
    """A line of metrics with a step, its numbers by name; None where it is none."""
    try:
        found = current_config(json.loads(text))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or number_in(found.get("step")) is None:
        return None
    numbers = {name: number_in(value) for name, value in found.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def number_in(value: Any) -> float | None:
    """A JSON number as a float, which may be NaN; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def integer_in(value: Any) -> int | None:
    """A positive, finite number as an int; None for anything else."""
    found = number_in(value)
    return int(found) if found is not None and 0 < found < math.inf else None


def mapping_in(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """An object of a JSON file; empty where there is none, with a note where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = current_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} holds no object")
        return {}
    return found


def saved_preferences(run: Path, names: Sequence[str], notes: list[str]) -> Preferences | None:
    """The preferences that a run keeps under one of these names in its folder `data`."""
    for name in names:
        if (run / "data" / name / "preferences.json").is_file():
            try:
                return Preferences.load(run / "data" / name)
            except ValueError as error:
                notes.append(f"data/{name} cannot be read ({type(error).__name__})")
    return None


def held_out_overlap(
    run: Path, trained: Preferences | None, notes: list[str]
) -> tuple[int, int] | None:
    """How many of the held-out pairs were trained on, and how many there are."""
    pairs = _hashes(run / PAIRS, notes)
    if pairs is None and trained is not None:
        pairs = pair_hashes(trained)
    held_out = _hashes(run / HELD_OUT, notes)
    if held_out is None and (saved := saved_preferences(run, SAVED_HELD_OUT, notes)) is not None:
        held_out = pair_hashes(saved)
    if pairs is None or held_out is None:
        return None
    return int(np.isin(held_out, pairs).sum()), len(held_out)


def _hashes(path: Path, notes: list[str]) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        return load_file(path)["pairs"]
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return None


def checkpoint_facts(run: Path, training: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Facts about the weights of the newest checkpoint."""
    checkpoints = checkpoints_of(run)
    path = checkpoints[-1] / WEIGHTS if checkpoints else None
    if path is None or not path.is_file():
        return {}
    found = weights_facts(path, notes)
    initial = training.get("initial_weights")
    if initial and path.stat().st_size <= LARGEST_HASHED:
        try:
            found["moved"] = tensors_hash(load_torch(path)) != initial
        except (SafetensorError, OSError) as error:
            notes.append(f"{path.name} cannot be read ({type(error).__name__})")
    return found


def weights_facts(path: Path, notes: list[str]) -> dict[str, Any]:
    """The dtypes of the weights of a checkpoint, and the sizes of some of them.

    `trained` counts tensors' values by dtype, and `sizes` are the quantiles 0, 1/20, ..., 1 of the
    weights' absolute values, those of embeddings included.
    """
    dtypes: dict[str, int] = {}
    values = []
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = part.get_shape()
                rows = part[: max(1, 256 // max(1, math.prod(shape[1:])))] if shape else None
                if rows is None or not rows.is_floating_point():
                    continue
                dtype = str(rows.dtype).removeprefix("torch.")
                dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(shape)
                values.append(rows.flatten()[:256].float().abs())
    except (SafetensorError, OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
    if not values:
        return {}
    sizes = np.quantile(torch.cat(values).numpy(), np.linspace(0, 1, 21))
    return {"trained": dtypes, "sizes": sizes.tolist()}


def well_formed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of facts that others may have written, those that have the form of ours."""

    def numbers(value: Any) -> dict[str, float]:
        found = {name: number_in(one) for name, one in mapping_in(value).items()}
        return {name: n for name, n in found.items() if n is not None and math.isfinite(n)}

    data, start = numbers(facts.get("data")), numbers(facts.get("start"))
    if not {"pairs", "completions"} <= data.keys():
        data = {}
    if not {"sum", "again", "completions"} <= start.keys():
        start = {}
    return {
        "steps": facts.get("steps"),
        "data": data and {**data, "report": numbers(mapping_in(facts["data"]).get("report"))},
        "start": start,
        "model": {"trained": numbers(mapping_in(facts.get("model")).get("trained"))},
    }
