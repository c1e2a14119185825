"""Rules on how log-probs were computed: the reference, dropout, precision, means, the prompt.

A policy that begins as the reference has implicit rewards of 0 before the first step. Where it has
not, `facts.start_facts` has scored some completions in other ways before training, and the way that
gives the reference's log-probs says which mistake was made.
"""

import math

import numpy as np

from dpo_lab.facts import PROBE_LIMIT
from dpo_lab.health.catalog import FaultName
from dpo_lab.health.finding import Seen, Unknown, Verdict
from dpo_lab.health.measures import (
    SIDES,
    first_line_is_the_start,
    fraction_of,
    length_of,
    log_ratios,
)
from dpo_lab.health.record import RunRecord

# Rounding in bfloat16 is worth a few hundredths of a nat per token, with random signs: over n
# tokens it adds up to that times the root of n. A tenth of a nat leaves room.
ROUNDING_PER_ROOT_TOKEN = 0.1

# where lengths are not recorded, as of TRL's runs: such a completion has some 50 tokens
USUAL_LENGTH = 50.0

# Under a mean, log-ratios and log-probs are smaller than sums by the number of tokens. From three
# tokens on that cannot be rounding.
LEAST_LENGTH = 3.0

# An average token costs a language model 1 to 5 nats. A completion of at least 16 tokens, each of
# which seems to cost less than a quarter, was averaged; so was one that costs no more than two
# tokens of the entropy that was measured.
LEAST_NATS_PER_TOKEN, LEAST_TOKENS, TOKENS_OF_A_MEAN = 0.25, 16, 2.0

# Some completions begin with their prompt by chance or by quoting; a script does it to all of them.
FEW, MOST = 0.05, 0.5


def _limit(record: RunRecord) -> float:
    """Nats by which a log-prob may differ between two batches in the run's precision."""
    return PROBE_LIMIT.get(record.precision or "float32", PROBE_LIMIT["float32"])


def _rounding(record: RunRecord) -> float:
    """Nats by which another precision may change a log-prob."""
    lengths = [length_of(record, side) or USUAL_LENGTH for side in SIDES]
    return ROUNDING_PER_ROOT_TOKEN * math.sqrt(max(lengths))


def _start_line(record: RunRecord) -> tuple[float, float] | None:
    """Mean log-ratios of both sides at the first step, in nats; in units of beta without beta."""
    if not first_line_is_the_start(record):
        return None
    line = record.steps[0]
    both = [log_ratios(record, side) for side in SIDES]
    if all(found is not None and len(found) for found in both):
        return float(both[0][0]), float(both[1][0])
    rewards = [line.get(f"rewards/{side}", math.nan) for side in SIDES]
    return (rewards[0], rewards[1]) if all(map(math.isfinite, rewards)) else None


def _mismatch(record: RunRecord) -> str:
    """Why the rewards at the start are not 0: the name of a fault, "" for none, "?" for unknown."""
    start, limit = record.start, _limit(record)
    if start:
        if start["again"] > limit:
            return "dropout_on"
        if start["sum"] > limit:
            return _explained(record)

    # what training itself saw
    first = _start_line(record)
    if first is None:
        return "" if start else "?"
    largest = max(map(abs, first))
    if largest <= limit:
        return ""
    if start:
        # the same weights gave the reference's log-probs a moment before
        return "dropout_on"
    if largest > _rounding(record) and _evaluation_is_zero(record):
        return "dropout_on"
    return "other_precision" if largest <= _rounding(record) else "wrong_reference"


def _evaluation_is_zero(record: RunRecord) -> bool:
    """Whether an evaluation before the first step, without dropout, found held-out margins of 0."""
    first = next((line for line in record.evaluations if line["step"] == 0), {})
    return abs(first.get("eval/margin", math.inf)) <= _limit(record) * (record.beta or 1)


def _explained(record: RunRecord) -> str:
    """Which other way of scoring gives the reference's log-probs."""
    start, limit = record.start, _limit(record)
    for way, fault in (("mean", "mean_instead_of_sum"), ("prompt_too", "prompt_scored")):
        if start.get(way, math.inf) <= max(limit, 0.01 * start["sum"]):
            return fault

    # rounding: the other precision comes much nearer, or the difference is no larger than that
    nearer = start.get("other_precision", math.inf) < start["sum"] / 3
    if nearer or start["sum"] <= _rounding(record):
        return "other_precision"
    return "wrong_reference"


def _start_evidence(record: RunRecord) -> str:
    """The numbers that say how far from 0 the start is."""
    said, start, first = [], record.start, _start_line(record)
    if start:
        said.append(
            f"before training {start['completions']:.0f} completions differ from the reference by "
            f"{start['sum']:.3g} nats (root mean square), where {_limit(record):g} is rounding"
        )
    if first is not None:
        unit = "nats" if record.beta else "(beta x nats)"
        said.append(
            f"at the first step the mean log-ratios of chosen and rejected are {first[0]:.3g} and "
            f"{first[1]:.3g} {unit}, and should be 0"
        )
    return "; ".join(said)


NO_START = "the first line of metrics is not of the first step alone, and no facts were recorded"


def dropout_on(record: RunRecord) -> Verdict:
    """Scoring twice gives two numbers, or training scores otherwise than a moment before."""
    fault = _mismatch(record)
    if fault == "?":
        return Unknown(NO_START)
    if fault != "dropout_on":
        return None
    twice = record.start.get("again", 0.0)
    if twice > _limit(record):
        return Seen(
            "error",
            f"scoring the same completions twice gives log-probs that differ by {twice:.3g} nats "
            "(root mean square), where the difference should be 0",
        )
    other: FaultName = "other_precision" if record.start else "wrong_reference"
    return Seen("error", _start_evidence(record), (other,))


def other_precision(record: RunRecord) -> Verdict:
    """At the start the rewards are as far from 0 as rounding makes them."""
    fault = _mismatch(record)
    if fault == "?":
        return Unknown(NO_START)
    if fault != "other_precision":
        return None
    found = _start_evidence(record)
    if "other_precision" in record.start:
        found += f"; in the other precision they differ by {record.start['other_precision']:.3g}"
    return Seen("warning", found, () if record.start else ("dropout_on", "wrong_reference"))


def wrong_reference(record: RunRecord) -> Verdict:
    """At the start the rewards are farther from 0 than rounding makes them."""
    fault = _mismatch(record)
    if fault == "?":
        return Unknown(NO_START)
    if fault != "wrong_reference":
        return None
    return Seen("error", _start_evidence(record), () if record.start else ("dropout_on",))


def mean_instead_of_sum(record: RunRecord) -> Verdict:
    """The reference's log-probs are means, or rewards are smaller than log-ratios by the length."""
    if _mismatch(record) == "mean_instead_of_sum":
        return Seen(
            "error",
            "the reference's log-probs are those of whole completions divided by their tokens: "
            f"they differ from these means by {record.start['mean']:.3g} nats, and from the sums "
            f"by {record.start['sum']:.3g}",
        )

    # a completion that costs less than a token or two usually does
    length, logps = length_of(record, "chosen"), record.series("logps/chosen")
    if length and len(logps) and length >= LEAST_TOKENS:
        per_token = -float(logps[0]) / length
        if 0 <= per_token < LEAST_NATS_PER_TOKEN:
            return Seen(
                "error",
                f"chosen completions have {length:.1f} tokens and a log-prob of {logps[0]:.3g}, "
                f"which would be {per_token:.2g} nats per token",
            )
    return _rewards_of_means(record) or _entropy_says(record)


def _rewards_of_means(record: RunRecord) -> Verdict:
    """Rewards over beta that are smaller than the log-ratios by about the number of tokens."""
    lengths = [length_of(record, side) for side in SIDES]
    if record.source != "dpo-lab" or not record.beta or not all(lengths):
        return None
    if min(lengths) < LEAST_LENGTH:
        return None
    rewards, ratios = [], []
    for side in SIDES:
        for line in record.steps:
            names = f"rewards/{side}", f"logps/{side}", f"reference_logps/{side}"
            if all(math.isfinite(line.get(name, math.nan)) for name in names):
                rewards.append(line[names[0]] / record.beta)
                ratios.append(line[names[1]] - line[names[2]])
    rewards, ratios = np.array(rewards), np.array(ratios)
    if not len(ratios) or (ratios**2).mean() < (10 * _limit(record)) ** 2:
        return None

    # the slope of one on the other is 1 for sums
    slope = float(rewards @ ratios / (ratios @ ratios))
    if not 0 < slope < 1 / LEAST_LENGTH:
        return None
    return Seen(
        "error",
        f"rewards are {slope:.3g} times beta times the log-ratios of whole completions, where the "
        f"factor should be 1; one over the mean length is {1 / np.mean(lengths):.3g}",
    )


def _entropy_says(record: RunRecord) -> Verdict:
    """TRL logs the entropy per token: a completion of n tokens costs about n times as much."""
    entropy, logps = record.series("entropy"), record.series("logps/chosen")
    if not len(entropy) or not len(logps) or entropy[0] <= 0:
        if record.source == "trl":
            return Unknown("neither the entropy nor the lengths of completions were logged")
        return None
    tokens = -logps[0] / entropy[0]
    if tokens >= TOKENS_OF_A_MEAN:
        return None
    return Seen(
        "warning",
        f"the mean log-prob of the chosen completions is {logps[0]:.3g} nats, as much as "
        f"{tokens:.2g} tokens at the entropy of {entropy[0]:.3g} nats per token",
    )


def prompt_scored(record: RunRecord) -> Verdict:
    """Completions begin with their prompt, or the reference's log-probs include it."""
    if _mismatch(record) == "prompt_scored":
        return Seen(
            "error",
            "the reference's log-probs are those of prompt and completion together: they differ "
            f"from these by {record.start['prompt_too']:.3g} nats, and from those of the "
            f"completions by {record.start['sum']:.3g}",
        )
    data = record.data
    if not data:
        return Unknown("nothing was recorded about the tokens of the pairs")
    report = data.get("report", {})
    repeated = max(data.get("begins_with_prompt", 0), report.get("prompt_repeated", 0))
    fraction = fraction_of(repeated, data.get("completions"))
    if fraction > FEW:
        severity = "error" if fraction >= MOST else "warning"
        return Seen(
            severity,
            f"{repeated:,.0f} of {data['completions']:,.0f} completions begin with their whole "
            "prompt",
        )

    # no prompt at all, and both completions of nearly every pair begin with the same tokens
    shared = fraction_of(data.get("share_a_prefix"), data.get("pairs"))
    no_prompt = data.get("prompt_length", math.inf) <= 1
    if no_prompt and shared >= 1 - FEW:
        return Seen(
            "error",
            f"prompts have {data['prompt_length']:.0f} token, and the two completions of "
            f"{shared:.0%} of the pairs begin with the same tokens, {data['shared_prefix']:.1f} of "
            "them on average, as if the prompt stood there",
        )
    return None
