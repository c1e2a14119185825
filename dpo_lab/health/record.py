"""What a training run left, read for `diagnose`: a `RunRecord` of its metrics, config and facts.

Ours are the directories of `train_dpo(run=...)` and `dpo-lab train`; TRL's are those with a
`trainer_state.json` (trl_state.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_lab.engine.arguments import one_of
from dpo_lab.engine.checkpoints import WEIGHTS
from dpo_lab.engine.runs import METRICS, TRAINING
from dpo_lab.facts import FACTS, data_facts
from dpo_lab.health.files import (
    SAVED,
    Line,
    checkpoint_facts,
    held_out_overlap,
    integer_in,
    mapping_in,
    number_in,
    read_json,
    read_lines,
    saved_preferences,
    weights_facts,
    well_formed,
)
from dpo_lab.health.trl_state import TRAINER_STATE, read_trainer_state, trainer_states

Source = Literal["dpo-lab", "trl"]


@dataclass(frozen=True)
class RunRecord:
    """A run as numbers: what every rule reads.

    Metrics have the names that `train_dpo` and TRL give them. Of what a callback returns these are
    read: `eval/reward` (by what the labels come from), `eval/true_reward` (by what should have been
    wanted, or another judge), each with `_se`; `eval/accuracy`, `eval/margin` and
    `eval/held_out_loss` on held-out pairs; and what `facts.completion_facts` gives of samples.
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
    learning_rate: float | None = None
    """the peak; None where it is not recorded"""
    epochs: float | None = None
    """passes over the pairs"""
    pairs_per_line: float | None = None
    """about how many pairs a line of `steps` is the mean of"""
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
    found = [line[name] for line in lines if name in line and isfinite(line[name])]
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
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if any(name.startswith("eval/") for name in line)]

    # another method's run
    training, facts = read_json(run / TRAINING, notes), read_json(run / FACTS, notes)
    method = training.get("method", "DPO")
    if method != "DPO" or not any("rewards/margins" in line for line in steps):
        what = f"a run of {method}" if method != "DPO" else "no metrics of DPO (rewards/margins)"
        raise ValueError(
            f"{run} holds {what}; dpo-lab diagnose knows runs of DPO, by train_dpo(run=...), "
            "dpo-lab train or TRL's DPOTrainer"
        )

    # what was not recorded is taken from the data and the newest checkpoint
    saved = None
    if "data" not in facts and (saved := saved_preferences(run, SAVED, notes)) is not None:
        facts["data"] = data_facts(saved)
    weights = checkpoint_facts(run, training, notes)
    facts = well_formed(facts)
    recorded = facts["model"] if facts["model"]["trained"] else {}
    facts["model"] = weights | recorded

    # a run that has not come to its end
    planned, last = integer_in(facts["steps"]), steps[-1]["step"]
    if planned and last < planned:
        notes.append(
            f"{METRICS} ends at step {last:.0f} of {planned}; the run goes on or was interrupted"
        )

    config = mapping_in(training.get("config"))
    loop = mapping_in(config.get("loop"))
    own = "loss" in training
    loss_type, precision = config.get("loss_type"), training.get("precision")
    return RunRecord(
        source="dpo-lab",
        steps=steps,
        evaluations=evaluations,
        beta=number_in(config.get("beta")),
        loss_type="own" if own else loss_type if isinstance(loss_type, str) else None,
        learning_rate=number_in(loop.get("learning_rate")),
        epochs=number_in(config.get("epochs")),
        pairs_per_line=_pairs_per_line(config, facts["data"]),
        precision=precision if isinstance(precision, str) else None,
        facts=facts,
        leaked=held_out_overlap(run, saved, notes),
        notes=tuple(notes),
    )


def _pairs_per_line(config: Mapping[str, Any], data: Mapping[str, Any]) -> float | None:
    """About how many pairs a step has."""
    asked, pairs = number_in(config.get("batch_pairs")), number_in(data.get("pairs"))
    return min(asked, pairs) if asked and pairs else asked
