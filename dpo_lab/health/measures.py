"""Numbers that several rules take from a `RunRecord`."""

import math

import numpy as np

from dpo_lab.health.record import RunRecord

LOG_2 = math.log(2)

SIDES = ("chosen", "rejected")


def loss_at_zero(record: RunRecord) -> float | None:
    """The loss where every margin is 0; None where the loss is not known."""
    known = {"sigmoid": LOG_2, "robust": LOG_2, "hinge": 1.0}
    if record.loss_type in known:
        return known[record.loss_type]
    if record.loss_type == "ipo" and record.beta:
        return 1 / (4 * record.beta**2)

    # TRL's default, unless its arguments say something else
    first = record.series("loss")[:1]
    at_log_2 = first.size and abs(first[0] - LOG_2) < 0.01
    return LOG_2 if record.loss_type is None and at_log_2 else None


def log_ratios(record: RunRecord, side: str) -> np.ndarray | None:
    """(T,) mean log-ratio of a side at each line, in nats per completion; None where unknown.

    That is the log-prob minus the reference's, which older runs and TRL's give as reward over beta.
    """
    if record.loss_type != "own" or not record.steps:
        if not record.beta:
            return None
        return record.series(f"rewards/{side}") / record.beta
    names = f"logps/{side}", f"reference_logps/{side}"
    if not all(name in line for line in record.steps for name in names):
        return None
    logps, reference = map(record.series, names)
    return logps - reference if len(logps) == len(reference) else None


def quarter(values: np.ndarray) -> np.ndarray:
    """The last quarter of a series, at least one value."""
    return values[-max(1, len(values) // 4) :]


def mean_and_se(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error; the latter is infinite for fewer than two values."""
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.inf
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def length_of(record: RunRecord, side: str) -> float | None:
    """Mean completion tokens of a side; None where it is not recorded."""
    found = record.data.get(f"{side}_length")
    return float(found) if isinstance(found, (int, float)) and found > 0 else None


def first_line_is_the_start(record: RunRecord) -> bool:
    """Whether the first line is of the first step alone, which precedes every update."""
    return bool(record.steps) and record.steps[0]["step"] == 1


def fraction_of(part: object, whole: object) -> float:
    """`part` over `whole` where both are recorded counts, else 0."""
    if not isinstance(part, (int, float)) or not isinstance(whole, (int, float)) or whole <= 0:
        return 0.0
    return part / whole
