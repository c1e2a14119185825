"""TRL's runs: `trainer_state.json`, and what lies beside it.

`DPOTrainer` of TRL 1.16 logs the means since the line before under `rewards/*`, `logps/*`, `loss`,
`grad_norm`, `learning_rate` and `entropy`; evaluations have the prefix `eval_`. The state says
nothing of beta or the loss. They are among the arguments in `training_args.bin`, a pickle, of which
the plain values are read here without running it.
"""

import json
import math
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

TRAINER_STATE, ARGUMENTS = "trainer_state.json", "training_args.bin"

# of the arguments, those that are read
READ = {
    "beta",
    "loss_type",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}

# opcodes between a key and its value, and those that are plain values
MEMO = {"BINPUT", "LONG_BINPUT", "MEMOIZE", "EMPTY_LIST", "MARK"}
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}


def trainer_states(run: Path) -> list[Path]:
    """The `trainer_state.json` of a checkpoint or an output_dir, the newest checkpoint's last."""
    if (run / TRAINER_STATE).is_file():
        return [run / TRAINER_STATE]
    found = [path for path in run.glob(f"checkpoint-*/{TRAINER_STATE}") if path.is_file()]

    def step(path: Path) -> int:
        digits = re.fullmatch(r"checkpoint-(\d{1,18})", path.parent.name)
        return int(digits[1]) if digits else -1

    return sorted(found, key=step)


def read_trainer_state(path: Path) -> dict[str, Any]:
    """The fields of a `RunRecord` from a `trainer_state.json`.

    Raises:
        ValueError: it is not JSON, or holds no metrics of DPO.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it may be half written: "
            "give an earlier checkpoint"
        ) from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise ValueError(f"{path} has no log_history; it is not a state that TRL's trainer wrote")

    # lines of numbers
    lines = [_numbers(line) for line in history if isinstance(line, dict)]
    lines = [line for line in lines if "step" in line]
    steps = [line for line in lines if "rewards/margins" in line and "loss" in line]
    if not steps:
        raise ValueError(
            f"{path} has no line with rewards/margins in its log_history; it is not a run of "
            "DPOTrainer, or it ended before the first line was logged"
        )
    evaluations = [
        {_name(name): value for name, value in line.items()}
        for line in lines
        if any(name.startswith("eval_") for name in line)
    ]

    # what lies beside it
    arguments, notes = read_arguments(path.parent / ARGUMENTS), []
    for line in steps:
        odd = [name for name, value in line.items() if not math.isfinite(value)]
        if odd:
            notes.append(f"{path.name}: {odd[0]} is not a finite number at step {line['step']:.0f}")
            break
    loss_type = arguments.get("loss_type")
    return {
        "steps": steps,
        "evaluations": evaluations,
        "beta": arguments.get("beta"),
        "loss_type": loss_type,
        "learning_rate": arguments.get("learning_rate"),
        "epochs": _numbers(state).get("num_train_epochs"),
        "pairs_per_line": _pairs_per_line(steps, arguments, _numbers(state)),
        "notes": tuple(notes),
    }


def _pairs_per_line(
    steps: list[dict[str, float]], arguments: dict[str, Any], state: dict[str, float]
) -> float | None:
    """Pairs that a logged line is the mean of, on one device."""
    size = arguments.get("per_device_train_batch_size") or state.get("train_batch_size")
    if not size:
        return None
    every = steps[1]["step"] - steps[0]["step"] if len(steps) > 1 else steps[0]["step"]
    return size * (arguments.get("gradient_accumulation_steps") or 1) * max(every, 1)


def _name(name: str) -> str:
    """`eval_rewards/accuracies` is the accuracy on held-out pairs, which ours calls accuracy."""
    bare = name.removeprefix("eval_")
    if bare == name:
        return name
    return "eval/accuracy" if bare == "rewards/accuracies" else f"eval/{bare}"


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in line.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                found[name] = float(value)
            except OverflowError:
                continue
    return found


def read_arguments(path: Path) -> dict[str, Any]:
    """Plain values among the pickled arguments; nothing of the pickle is run.

    A key of a dictionary stands right before its value, so `beta` is the number that follows the
    string "beta".
    """
    try:
        with zipfile.ZipFile(path) as file:
            name = next(name for name in file.namelist() if name.endswith("/data.pkl"))
            pickled = file.read(name)
        codes = [(code.name, value) for code, value, _ in pickletools.genops(pickled)]
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, RuntimeError):
        return {}

    found: dict[str, Any] = {}
    plain = [(name, value) for name, value in codes if name not in MEMO]
    for (_, key), (code, value) in zip(plain, plain[1:]):
        if isinstance(key, str) and key in READ and key not in found:
            value = CONSTANTS.get(code, value)
            text = key == "loss_type"
            if isinstance(value, str if text else (bool, int, float)):
                found[key] = value
    return found
