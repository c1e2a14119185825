"""Rules on the course of training: nothing moves, too much moves, or the wrong thing does."""

import math

import numpy as np

from dpo_lab.health.finding import Seen, Unknown, Verdict
from dpo_lab.health.in_data import MOST_IDENTICAL, SIGMAS, identical_pairs
from dpo_lab.health.measures import (
    SIDES,
    fraction_of,
    length_of,
    log_ratios,
    loss_at_zero,
    mean_and_se,
    quarter,
)
from dpo_lab.health.record import RunRecord

# fewer lines than this say nothing of a course
FEWEST_LINES = 5

# Two batches of other shapes differ by less than this in float32; a policy that has not moved by
# more after all its steps stands still.
STILL = 0.01

# A margin of 0.05 leaves the gradient weight at 0.4875 of at most 0.5: the loss has seen nothing.
NO_MARGIN = 0.05

# half of the smallest beta that published runs tune over (0.01)
TINY_BETA = 0.005

# nats that a policy's log-probs must move by before a small margin is beta's fault
MOVED = 5.0

# A token that costs a fifth of a nat more has lost a fifth of its probability; the laptop's run of
# `dpo-lab train` loses half of that.
FALL_PER_TOKEN = 0.2

# and a fall is what the margin grew by only if it is at least half as large as the margin
FALL_OF_MARGIN = 0.5

# the same relative to the log-prob at the start, where lengths are not recorded: a token costs
# about four nats
FALL = 0.05

# A token costs about four nats. A policy under which it costs a nat more, on both sides, no longer
# writes what it was trained on.
COLLAPSE = 0.25

# a loss this much above that of equal rewards is more than noise of the last batches
ABOVE_ZERO = 1.05

# half of the distinct two-token sequences that the policy began with
LESS_DISTINCT = 0.6

# Few held-out pairs and margins that are too sure raise their loss in healthy runs too, by up to
# two thirds in those that the rules were fixed on.
LOSS_RISEN = 2.0

# held-out accuracy lost since its best, if that is more than three standard errors of as many pairs
ACCURACY_LOST, ACCURACY_SIGMAS = 0.05, 3.0

# One question is asked of two means: whether the true reward fell while the other rose. Two
# standard errors make it worth a warning, three an error.
RISEN, FALLEN, MUCH_FALLEN = 3.0, 2.0, 3.0

# Adam moves every weight that has a gradient; a rounding format that lets fewer than half move is
# the reason that the others stand still.
FEW_MOVE = 0.5

# significant bits: an update below 2^-bits of a weight is rounded away
BITS = {"bfloat16": 8, "float16": 11}


def loss_stuck_frozen(record: RunRecord) -> Verdict:
    """No weight moves, or no log-prob."""
    steps = len(record.steps)
    if steps < FEWEST_LINES:
        return Unknown(f"the run has {steps} lines of metrics; {FEWEST_LINES} are needed")
    if _all_identical(record) or bfloat16_weights(record) is not None:
        return None
    changed = record.series("weights/changed")
    if record.facts.get("model", {}).get("moved") is False:
        return Seen("error", f"after {steps} steps the weights are those of the start, to the bit")
    if len(changed) and changed.max() == 0:
        return Seen("error", f"no weight changed in {len(changed)} steps that were looked at")

    # log-probs, where weights were not looked at
    ratios = [log_ratios(record, side) for side in SIDES]
    rewards = [record.series(f"rewards/{side}") for side in SIDES]
    values = [r if r is not None else w for r, w in zip(ratios, rewards)]
    late = [np.abs(quarter(found)).max() for found in values if len(found)]
    if late and max(late) < STILL and record.precision != "bfloat16":
        unit = "nats" if ratios[0] is not None else "(beta x nats)"
        return Seen(
            "error",
            f"in the last quarter of {steps} lines no mean log-ratio is farther from 0 than "
            f"{max(late):.2g} {unit}",
            ("loss_stuck_tiny_beta",) if record.beta is None else (),
        )
    return None


def _all_identical(record: RunRecord) -> bool:
    data = record.data
    if data:
        return fraction_of(data.get("identical"), data.get("pairs")) >= MOST_IDENTICAL
    return isinstance(identical_pairs(record), Seen)


def loss_stuck_tiny_beta(record: RunRecord) -> Verdict:
    """Margins stay near 0 since beta is tiny, not since the policy stands still."""
    margins = record.series("rewards/margins")
    if len(margins) < FEWEST_LINES:
        return Unknown(f"the run has {len(margins)} lines of metrics; {FEWEST_LINES} are needed")
    margin = float(quarter(margins).mean())
    if abs(margin) >= NO_MARGIN:
        return None
    if record.beta is not None:
        if record.beta >= TINY_BETA:
            return None
        return Seen(
            "error",
            f"beta is {record.beta:g}; the mean margin ends at {margin:.2g}, which is "
            f"{margin / record.beta:.2g} nats",
        )

    # without beta: log-probs that have moved far
    moved = [_moved(record.series(f"logps/{side}")) for side in SIDES]
    if max(moved) < MOVED:
        return None
    return Seen(
        "warning",
        f"the mean margin ends at {margin:.2g}, while log-probs moved by {max(moved):.1f} nats",
    )


def _moved(values: np.ndarray) -> float:
    """Nats between the first and the last quarter of a series, beyond the noise between lines."""
    k = max(1, len(values) // 4)
    (first, a), (last, b) = mean_and_se(values[:k]), mean_and_se(values[-k:])
    noise = math.hypot(a, b)
    return max(0.0, abs(last - first) - SIGMAS * noise) if math.isfinite(noise) else 0.0


def chosen_logps_fall(record: RunRecord) -> Verdict:
    """The margin grows while chosen answers lose much probability."""
    margins, logps = record.series("rewards/margins"), record.series("logps/chosen")
    if len(margins) < FEWEST_LINES or not len(logps):
        return Unknown(f"the run has {len(margins)} lines of metrics; {FEWEST_LINES} are needed")
    if quarter(margins).mean() <= 0:
        return None
    ratios, length = log_ratios(record, "chosen"), length_of(record, "chosen")

    # per token where the length is known
    if ratios is not None and length:
        fall = -float(quarter(ratios).mean()) / length
        margin = quarter(margins).mean() / (record.beta or math.inf)
        if fall < FALL_PER_TOKEN or fall * length < FALL_OF_MARGIN * margin:
            return None
        return Seen(
            "warning",
            f"chosen answers have lost {fall * length:.1f} nats each, {fall:.2f} per token, while "
            f"the margin grew to {quarter(margins).mean():.2f}",
        )

    # relative to what they were
    start = float(-logps[: max(1, len(logps) // 10)].mean())
    fall = -float(quarter(ratios).mean()) if ratios is not None else _fall(logps)
    if start <= 0 or fall < FALL * start:
        return None
    return Seen(
        "warning",
        f"chosen answers have lost {fall:.1f} of the {start:.0f} nats that they cost at first, "
        f"while the margin grew to {quarter(margins).mean():.2f}",
    )


def _fall(logps: np.ndarray) -> float:
    """Nats by which log-probs fell, beyond the noise between lines."""
    k = max(1, len(logps) // 4)
    return _moved(logps) if logps[-k:].mean() < logps[:k].mean() else 0.0


def learning_rate_too_high(record: RunRecord) -> Verdict:
    """The loss ends above that of equal rewards, or both sides collapse in the first pass."""
    steps = len(record.steps)
    if steps < FEWEST_LINES:
        return Unknown(f"the run has {steps} lines of metrics; {FEWEST_LINES} are needed")
    said = []

    # the loss after warm-up
    zero, loss = loss_at_zero(record), record.series("loss")
    late = loss[len(loss) // 2 :]
    mean, se = mean_and_se(late)
    if zero is not None and mean > ABOVE_ZERO * zero and mean - zero > SIGMAS / 2 * se:
        said.append(
            f"the loss of the second half is {mean:.3g}, above the {zero:.3g} of equal rewards"
        )

    # what both sides have lost within one pass
    lost = _lost_in_a_pass(record)
    if lost is not None and min(lost) > COLLAPSE:
        said.append(
            f"within the first pass chosen and rejected completions came to cost {lost[0]:.0%} and "
            f"{lost[1]:.0%} more nats than before"
        )
    if not said:
        return None
    rate = f"; learning_rate is {record.learning_rate:g}" if record.learning_rate else ""
    return Seen("error", "; ".join(said) + rate)


def _lost_in_a_pass(record: RunRecord) -> list[float] | None:
    """By which fraction the negative log-prob of each side grew within the first pass."""
    first_pass = max(1, int(len(record.steps) / max(record.epochs or 1, 1)))
    found = []
    for side in SIDES:
        ratios, logps = log_ratios(record, side), record.series(f"logps/{side}")
        if not len(logps) or logps[0] >= 0:
            return None
        fall = -quarter(ratios[:first_pass]).mean() if ratios is not None else _fall(logps)
        found.append(float(fall) / -float(logps[0]))
    return found


def bfloat16_weights(record: RunRecord) -> Verdict:
    """Weights in a 16-bit format, of which few move."""
    model = record.facts.get("model", {})
    dtypes = model.get("trained", {})
    if not dtypes:
        return Unknown("the dtype of the weights was not recorded, and there is no checkpoint")
    name = max(dtypes, key=dtypes.get)
    if name not in BITS:
        return None
    norms = record.series("grad_norm")
    if len(norms) and not norms.max() > 0:
        return None

    # what steps did, or what Adam's would do
    changed, sizes = record.series("weights/changed"), model.get("sizes")
    if len(changed):
        move, says = changed.max(), "a step changes at most {:.0%} of them"
    elif sizes and (rate := record.learning_rate):
        # an update of about the learning rate is lost on a weight of more than 2^bits times that
        move = float(np.mean(np.array(sizes) <= 2 ** BITS[name] * rate))
        says = f"at a learning rate of {rate:g} an update of Adam can move about {{:.0%}} of them"
    else:
        return Unknown("neither the steps' changes nor the learning rate was recorded")
    if move >= FEW_MOVE:
        return None
    return Seen("error", f"the trained weights are {name}, and {says.format(move)}")


def overtraining(record: RunRecord) -> Verdict:
    """Held-out reward, accuracy or variety falls from its best while training goes on."""
    said = []

    # the reward of samples since its best
    lines = [line for line in record.evaluations if "eval/reward" in line]
    rewards = [(line["eval/reward"], line.get("eval/reward_se", math.nan)) for line in lines]
    rewards = [found for found in rewards if all(map(math.isfinite, found))]
    if len(rewards) >= 3:
        (best, best_se), (last, last_se) = max(rewards), rewards[-1]
        se = max(math.hypot(best_se, last_se), 1e-12)
        if best - last > SIGMAS * se and best > rewards[0][0] + SIGMAS / 2 * rewards[0][1]:
            said.append(
                f"the reward of samples fell from {best:.3f} to {last:.3f} "
                f"({(best - last) / se:.1f} standard errors)"
            )

    # accuracy on held-out pairs since its best, while that on training pairs is not lower
    held_out, trained = record.evaluated("accuracy"), record.series("rewards/accuracies")
    if len(held_out) >= 3 and held_out.max() - held_out[-1] > _accuracy_noise(record):
        if len(trained) and quarter(trained).mean() > held_out[-1]:
            said.append(
                f"accuracy on held-out pairs fell from {held_out.max():.1%} to {held_out[-1]:.1%}, "
                f"while {quarter(trained).mean():.1%} of the training pairs are ranked as labeled"
            )

    # loss on held-out pairs since its best
    losses = record.evaluated("held_out_loss")
    if len(losses) >= 3 and losses[-1] > LOSS_RISEN * losses.min() > 0:
        said.append(f"the loss on held-out pairs rose from {losses.min():.3f} to {losses[-1]:.3f}")

    # variety of samples
    distinct = record.evaluated("distinct_2")
    if len(distinct) >= 2 and distinct[-1] < LESS_DISTINCT * distinct[0]:
        said.append(f"distinct-2 of samples fell from {distinct[0]:.2f} to {distinct[-1]:.2f}")
    if said:
        return Seen("error" if len(said) > 1 else "warning", "; ".join(said))
    looked = max(len(rewards), len(held_out), len(losses)) >= 3 or len(distinct) >= 2
    return None if looked else Unknown("too few evaluations of held-out pairs or samples")


def _accuracy_noise(record: RunRecord) -> float:
    """By how much held-out accuracy may fall by chance: all of it, where the pairs are not counted.

    Pairs that share completions are not independent.
    """
    if not record.leaked or not record.leaked[1]:
        return 1.0
    data = record.data
    linked = fraction_of(data.get("completions"), 2 * data.get("pairs", 0)) or 1.0
    n = record.leaked[1] * min(1.0, linked)
    return max(ACCURACY_LOST, ACCURACY_SIGMAS * math.sqrt(2 * 0.25 / n))


def reward_hacking(record: RunRecord) -> Verdict:
    """The reward that labels rises while the true one falls from its best."""
    both = {
        name: [line for line in record.evaluations if f"eval/{name}" in line]
        for name in ("reward", "true_reward")
    }
    if any(len(lines) < 2 for lines in both.values()):
        return Unknown("no second reward of samples was logged (eval/true_reward)")
    proxy, true = ([line[f"eval/{name}"] for line in lines] for name, lines in both.items())
    proxy_se, true_se = (
        [line.get(f"eval/{name}_se", math.nan) for line in lines] for name, lines in both.items()
    )
    best = int(np.argmax(true))
    risen = (proxy[-1] - proxy[0]) / max(math.hypot(proxy_se[0], proxy_se[-1]), 1e-12)
    fallen = (true[best] - true[-1]) / max(math.hypot(true_se[best], true_se[-1]), 1e-12)

    # the true one has fallen since its best, the other one has not
    if not (risen > RISEN and proxy[-1] >= proxy[min(best, len(proxy) - 1)] and fallen > FALLEN):
        return None
    return Seen(
        "error" if fallen > MUCH_FALLEN else "warning",
        f"the reward that labels rose from {proxy[0]:.3f} to {proxy[-1]:.3f}, while the true one "
        f"fell from {true[best]:.3f} to {true[-1]:.3f} ({fallen:.1f} standard errors)",
    )
