"""What a training run left, read for `diagnose`: a `RunRecord` of its metrics, config and facts.

Ours are the directories of `train_dpo(run=...)` and `dpo-lab train`; TRL's are those with a
`trainer_state.json` (trl_state.py).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from dpo_lab.engine.arguments import one_of
from dpo_lab.engine.checkpoints import WEIGHTS, checkpoints_of, tensors_hash
from dpo_lab.engine.runs import METRICS, TRAINING, current_config
from dpo_lab.facts import FACTS, HELD_OUT, PAIRS, data_facts, pair_hashes
from dpo_lab.health.trl_state import TRAINER_STATE, read_trainer_state, trainer_states
from dpo_lab.preferences import Preferences

Line = dict[str, float]

Source = Literal["dpo-lab", "trl"]

# where a run keeps its pairs in `data`, and those that it is evaluated on
SAVED, SAVED_HELD_OUT = ("preferences", "train"), ("held_out", "test")

# checkpoints up to this size are compared with the initial weights
LARGEST_HASHED = 2**30

# a run directory holds no file larger than this that is read whole
LARGEST = 512 * 2**20


@dataclass(frozen=True)
class RunRecord:
    """A run as numbers: what every rule of `health.rules` reads.

    Metrics have the names that `train_dpo` and TRL give them. Of what a callback returns these are
    read: `eval/reward` (by what the labels come from), `eval/true_reward` (by what should have been
    wanted, or another judge), `eval/kl/sequence`, each with `_se`; `eval/accuracy` and
    `eval/held_out_loss` on held-out pairs; `eval/length`, `eval/truncated` and `eval/distinct_2`,
    as `facts.completion_facts` gives them. `eval/ended` is taken for 1 minus `eval/truncated`,
    `eval/held_out/accuracy` for `eval/accuracy`.
    """

    source: Source
    """who wrote it"""
    steps: Sequence[Line]
    """metrics of training, in the order of the steps"""
    evaluations: Sequence[Line] = ()
    """metrics that begin with `eval/`, in the order of the steps"""
    beta: float | None = None
    """strength of the KL constraint; None where it is not recorded"""
    loss_type: str | None = None
    """such as "sigmoid"; None where it is not recorded, "own" for a loss of the user's"""
    label_smoothing: float = 0.0
    """assumed fraction of flipped labels"""
    learning_rate: float | None = None
    """the peak; None where it is not recorded"""
    warmup_steps: int = 0
    """steps of linear warm-up"""
    epochs: float | None = None
    """passes over the pairs"""
    pairs_per_line: float | None = None
    """about how many pairs a line of `steps` is the mean of"""
    planned: int | None = None
    """steps that the run was to have"""
    precision: str | None = None
    """in which log-probs were computed"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what facts.py recorded; empty for older runs and for TRL's"""
    leaked: tuple[int, int] | None = None
    """held-out pairs that are training pairs too, and all held-out pairs; None where unknown"""
    notes: tuple[str, ...] = ()
    """what was wrong with the files, in plain text"""

    def __post_init__(self) -> None:
        one_of("source", self.source, Source)

    @property
    def data(self) -> Mapping[str, Any]:
        """Facts about the pairs."""
        return self.facts.get("data") or {}

    @property
    def start(self) -> Mapping[str, Any]:
        """Facts about the scores before the first step."""
        return self.facts.get("start") or {}

    def series(self, name: str) -> np.ndarray:
        """(T,) the values of a training metric where it is a finite number."""
        return _series(self.steps, name)

    def evaluated(self, name: str) -> np.ndarray:
        """(E,) the values of `eval/` + `name` where it is a finite number."""
        return _series(self.evaluations, f"eval/{name}")


def _series(lines: Sequence[Line], name: str) -> np.ndarray:
    found = [line[name] for line in lines if name in line and math.isfinite(line[name])]
    return np.array(found, dtype=np.float64)


def read_run(run: Path) -> RunRecord:
    """The record of a run directory, ours or TRL's.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no DPO run, or one that cannot be read; what was found is named.
    """
    if not run.exists():
        raise FileNotFoundError(f"{run} does not exist; give the directory of a run")
    if run.is_file():
        if run.name != TRAINER_STATE:
            raise ValueError(f"{run} is a file; give the directory of a run, which holds it")
        run = run.parent

    # ours, or TRL's
    if (run / METRICS).is_file():
        return _read_ours(run)
    if states := trainer_states(run):
        return _read_trl(states[-1])
    found = sorted(path.name for path in run.iterdir())[:6]
    inside = f"holds {', '.join(map(repr, found))}" if found else "is empty"
    raise ValueError(
        f"{run} {inside}; the directory of a run holds {METRICS} (train_dpo, dpo-lab train) or "
        f"{TRAINER_STATE} (TRL: give a checkpoint folder, or the output_dir that holds some)"
    )


def _read_trl(state: Path) -> RunRecord:
    found = read_trainer_state(state)
    weights, notes = state.parent / WEIGHTS, list(found.pop("notes"))
    if weights.is_file():
        found["facts"] = {"model": weights_facts(weights, notes)}
    return RunRecord(source="trl", notes=tuple(notes), **found)


def _read_ours(run: Path) -> RunRecord:
    lines, notes = read_lines(run / METRICS)
    for line in lines:
        if "eval/ended" in line:
            line.setdefault("eval/truncated", 1 - line["eval/ended"])
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if any(name.startswith("eval/") for name in line)]

    # another method's run
    training, facts = _read_json(run / TRAINING, notes), _read_json(run / FACTS, notes)
    method = training.get("method", "DPO")
    if method != "DPO" or not any("rewards/margins" in line for line in steps):
        what = f"a run of {method}" if method != "DPO" else "no metrics of DPO (rewards/margins)"
        raise ValueError(
            f"{run} holds {what}; dpo-lab diagnose knows runs of DPO, by train_dpo(run=...), "
            "dpo-lab train or TRL's DPOTrainer"
        )

    # what was not recorded is taken from the data and the newest checkpoint
    saved = None
    if "data" not in facts and (saved := _saved(run, SAVED, notes)) is not None:
        facts["data"] = data_facts(saved)
    weights = _weights(run, training, notes)
    facts = _well_formed(facts)
    recorded = facts["model"] if facts["model"]["trained"] else {}
    facts["model"] = weights | recorded

    config = _mapping(training.get("config"))
    loop = _mapping(config.get("loop"))
    data = facts["data"]
    own = "loss" in training
    loss_type, precision = config.get("loss_type"), training.get("precision")
    return RunRecord(
        source="dpo-lab",
        steps=steps,
        evaluations=evaluations,
        beta=_number(config.get("beta")),
        loss_type="own" if own else loss_type if isinstance(loss_type, str) else None,
        label_smoothing=_number(config.get("label_smoothing")) or 0.0,
        learning_rate=_number(loop.get("learning_rate")),
        warmup_steps=_integer(loop.get("warmup_steps")) or 0,
        epochs=_number(config.get("epochs")),
        pairs_per_line=_pairs_per_line(config, data, len(steps)),
        planned=_integer(facts.get("steps")),
        precision=precision if isinstance(precision, str) else None,
        facts=facts,
        leaked=_leaked(run, saved, notes),
        notes=tuple(notes),
    )


def _well_formed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of facts that others may have written, those that have the form of ours."""

    def numbers(value: Any) -> dict[str, float]:
        found = {name: _number(one) for name, one in _mapping(value).items()}
        return {name: n for name, n in found.items() if n is not None and math.isfinite(n)}

    data, start = numbers(facts.get("data")), numbers(facts.get("start"))
    if not {"pairs", "completions"} <= data.keys():
        data = {}
    if not {"sum", "again", "completions"} <= start.keys():
        start = {}
    return {
        "steps": facts.get("steps"),
        "data": data and {**data, "report": numbers(_mapping(facts["data"]).get("report"))},
        "start": start,
        "model": {"trained": numbers(_mapping(facts.get("model")).get("trained"))},
    }


def _pairs_per_line(config: Mapping[str, Any], data: Mapping[str, Any], steps: int) -> float | None:
    """About how many pairs a step has."""
    asked, pairs = _number(config.get("batch_pairs")), _number(data.get("pairs"))
    return min(asked, pairs) if asked and pairs else asked


def read_lines(path: Path) -> tuple[list[Line], list[str]]:
    """The lines of `metrics.jsonl` as numbers, in order, and what was wrong with it.

    A line that cannot be read ends nothing but itself; the last one may be half written. Of steps
    that were done again after a crash the last lines count.
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
    if not isinstance(found, dict) or _number(found.get("step")) is None:
        return None
    numbers = {name: _number(value) for name, value in found.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _number(value: Any) -> float | None:
    """A JSON number as a float, which may be NaN; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _integer(value: Any) -> int | None:
    """A positive, finite number as an int."""
    found = _number(value)
    return int(found) if found is not None and 0 < found < math.inf else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
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


# the data and the weights beside the metrics


def _saved(run: Path, names: Sequence[str], notes: list[str]) -> Preferences | None:
    """The preferences that a run keeps under one of these names in its folder `data`."""
    for name in names:
        if (run / "data" / name / "preferences.json").is_file():
            try:
                return Preferences.load(run / "data" / name)
            except ValueError as error:
                notes.append(f"data/{name} cannot be read ({type(error).__name__})")
    return None


def _leaked(run: Path, trained: Preferences | None, notes: list[str]) -> tuple[int, int] | None:
    """How many of the held-out pairs were trained on, and how many there are."""
    pairs = _hashes(run / PAIRS, notes)
    if pairs is None and trained is not None:
        pairs = pair_hashes(trained)
    held_out = _hashes(run / HELD_OUT, notes)
    if held_out is None and (saved := _saved(run, SAVED_HELD_OUT, notes)) is not None:
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


def _weights(run: Path, training: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
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
