"""Rules on the pairs, and on what a policy learns from them: lengths, ends, labels, leaks."""

import math

import numpy as np
from scipy.stats import binom

from dpo_lab.health.finding import Seen, Unknown, Verdict
from dpo_lab.health.measures import fraction_of, loss_at_zero, quarter
from dpo_lab.health.record import RunRecord

NO_FACTS = "nothing was recorded about the pairs (a run of TRL's, or of an earlier version)"

# A few identical pairs only waste time; where half are, most of the data teaches nothing.
IDENTICAL, MOST_IDENTICAL = 0.05, 0.5

# People choose the longer answer in some 60 to 65 % of pairs (AlpacaFarm, UltraFeedback). At four
# of five, length alone predicts labels better than most reward models do.
LONGER = 0.8

# Answers that differ in length in fewer pairs than this say little of the whole
DIFFERENT_LENGTHS = 0.3

# A policy whose answers are a quarter longer has changed what it is, not its style
GROWTH = 1.25

# Ends that were lost: a few are odd texts, from a half on the policy cannot learn to stop
UNENDED, MOST_UNENDED = 0.1, 0.5

# A policy that runs to the length limit in a fifth more of its samples ends otherwise than before,
# if that is more than the noise of so many samples. Where their number is not recorded it may be
# small.
MORE_TRUNCATED, FEW_SAMPLES = 0.2, 16

# Raters disagree with themselves in some 5 to 25 % of pairs; scores never do. From three quarters
# on the other order is the better reading.
FLIPPED, MOST_FLIPPED, SWAPPED = 0.05, 0.2, 0.75

# chance of an alarm in a rule that tests a count, and z of one that tests means
ALPHA, SIGMAS = 1e-4, 4.0

# accuracy on new pairs that no useful labels would leave the policy with
NEAR_HALF = 0.55


def identical_pairs(record: RunRecord) -> Verdict:
    """Both completions of a pair are the same tokens."""
    data = record.data
    if data:
        dropped = data.get("report", {}).get("identical", 0)
        kept, pairs = data.get("identical", 0), data.get("pairs", 0)
        fraction = fraction_of(kept + dropped, pairs + dropped)
        if fraction <= IDENTICAL:
            return None
        return Seen(
            "error" if fraction >= MOST_IDENTICAL else "warning",
            f"{kept + dropped:,.0f} of {pairs + dropped:,.0f} pairs have the same tokens as chosen "
            f"and as rejected; {dropped:,.0f} of them were dropped",
        )

    # without facts: lines whose two sides have the same log-prob
    chosen, rejected = record.series("logps/chosen"), record.series("logps/rejected")
    if len(chosen) != len(rejected) or not len(chosen):
        return Unknown(NO_FACTS)
    same = np.abs(chosen - rejected) <= 1e-6 * np.abs(chosen)
    if same.mean() < MOST_IDENTICAL:
        return None
    return Seen(
        "error",
        f"chosen and rejected have the same mean log-prob in {same.sum()} of {len(same)} lines",
    )


def length_exploitation(record: RunRecord) -> Verdict:
    """The chosen answers are the longer ones, and the policy's grow."""
    lengths, data = record.evaluated("length"), record.data
    grown = len(lengths) >= 2 and lengths[-1] >= GROWTH * lengths[0] > 0
    grows = ""
    if grown:
        grows = f"sampled completions grew from {lengths[0]:.1f} to {lengths[-1]:.1f} tokens"
    if not data:
        if grown:
            return Seen("warning", grows)
        return Unknown(NO_FACTS) if len(lengths) < 2 else None

    # how often the chosen one is the longer, of those that differ
    longer, shorter = data.get("chosen_longer", 0), data.get("rejected_longer", 0)
    n = longer + shorter
    many = fraction_of(n, data.get("pairs")) >= DIFFERENT_LENGTHS
    biased = n > 0 and many and longer >= LONGER * n and binom.sf(longer - 1, n, 0.5) < ALPHA
    says = (
        f"the chosen completion is the longer one in {longer:,.0f} of {n:,.0f} pairs that differ "
        f"in length ({data.get('chosen_length', math.nan):.1f} and "
        f"{data.get('rejected_length', math.nan):.1f} tokens on average)"
    )
    if biased:
        return Seen("error" if grown else "warning", "; ".join(filter(None, [says, grows])))
    favored = n > 0 and binom.sf(longer - 1, n, 0.5) < ALPHA
    return Seen("warning", f"{grows}; {says}") if grown and favored else None


def truncated_eos(record: RunRecord) -> Verdict:
    """Completions were truncated or tokenized without EOS, or samples no longer end."""
    data, truncated = record.data, record.evaluated("truncated")
    said, severity = [], ""
    if data:
        n, short = data.get("completions", 0), data.get("short_without_end", 0)
        cut = min(data.get("report", {}).get("cut", 0), n)
        lost = max(short, cut)
        if (fraction := fraction_of(lost, n)) > UNENDED:
            severity = "error" if fraction >= MOST_UNENDED else "warning"
            how = "were truncated" if cut >= short else "end before the limit without an end token"
            said.append(f"{lost:,.0f} of {n:,.0f} completions {how}")
    if len(truncated) >= 2 and _grew(truncated, record.evaluated("completions")):
        severity = "error" if severity else "warning"
        said.append(
            f"{truncated[-1]:.0%} of the samples reach the length limit, {truncated[0]:.0%} before "
            "training"
        )
    if said:
        return Seen(severity, "; ".join(said))
    return None if data or len(truncated) >= 2 else Unknown(NO_FACTS)


def _grew(fractions: np.ndarray, samples: np.ndarray) -> bool:
    """Whether a fraction grew from the first to the last evaluation, beyond noise."""
    grown, n = fractions[-1] - fractions[0], samples.min() if len(samples) else FEW_SAMPLES
    both = (fractions[0] + fractions[-1]) / 2
    return grown > max(MORE_TRUNCATED, SIGMAS * math.sqrt(2 * both * (1 - both) / max(n, 1)))


def flipped_labels(record: RunRecord) -> Verdict:
    """Labels contradict their scores or one another, or cannot be told from chance."""
    data = record.data
    scored, other_way = data.get("scored", 0), data.get("scored_other_way", 0)
    if scored:
        fraction = other_way / scored
        if FLIPPED < fraction < SWAPPED:
            return Seen(
                "error" if fraction >= MOST_FLIPPED else "warning",
                f"{other_way:,.0f} of {scored:,.0f} pairs ({fraction:.0%}) prefer the completion "
                "with the lower score",
            )
        return None

    # a beats b, b beats c, c beats a; or a beats b and b beats a
    for name, whole, what in (
        ("cyclic_rankings", "rankings", "groups of completions are ranked in a circle"),
        ("contradicted", "pairs", "pairs are there in both orders"),
    ):
        if (fraction := fraction_of(data.get(name), data.get(whole))) > FLIPPED:
            severity = "error" if fraction >= MOST_FLIPPED else "warning"
            return Seen(severity, f"{data[name]:,.0f} of {data[whole]:,.0f} {what}")
    return _near_half(record)


def _fresh_lines(record: RunRecord) -> int:
    """How many of the first lines are of the first pass, whose pairs were not seen before."""
    epochs = record.epochs or 1
    return max(1, int(len(record.steps) / max(epochs, 1)))


def _near_half(record: RunRecord) -> Verdict:
    """Accuracy on new pairs late in the first pass that is one half, up to a binomial bound."""
    fresh = record.series("rewards/accuracies")[: _fresh_lines(record)]
    late, data = fresh[len(fresh) // 2 :], record.data
    if not len(late) or not record.pairs_per_line:
        return Unknown("neither scores, nor rankings, nor accuracies with their number of pairs")

    # pairs that share completions are not independent
    linked = fraction_of(data.get("completions"), 2 * data.get("pairs", 0)) or 1.0
    n = len(late) * record.pairs_per_line * min(1.0, linked)
    accuracy = float(late.mean())
    upper = accuracy + SIGMAS * math.sqrt(0.25 / n)
    loss, zero = record.series("loss"), loss_at_zero(record)
    moved = zero is None or len(loss) and abs(quarter(loss).mean() - zero) > 1e-3
    if upper < NEAR_HALF and moved:
        return Seen(
            "warning",
            f"late in the first pass {accuracy:.1%} of new pairs are ranked as labeled, at most "
            f"{upper:.1%} within {SIGMAS:g} standard errors: the labels look random",
            ("swapped_columns",),
        )
    return None


def swapped_columns(record: RunRecord) -> Verdict:
    """Nearly all labels contradict their scores, or the reward falls below where it began."""
    data = record.data
    scored, other_way = data.get("scored", 0), data.get("scored_other_way", 0)
    if scored and other_way / scored >= SWAPPED:
        return Seen(
            "error",
            f"{other_way:,.0f} of {scored:,.0f} pairs ({other_way / scored:.0%}) prefer the "
            "completion with the lower score",
        )

    # the reward of samples, from the first evaluation to the last
    fallen = reward_change(record)
    if fallen is None:
        return None if scored else Unknown("neither scores of the pairs nor a reward of samples")
    change, se, first, last = fallen
    accuracies, margins = record.series("rewards/accuracies"), record.series("rewards/margins")
    learned = len(accuracies) and quarter(accuracies).mean() > 0.5 and quarter(margins).mean() > 0
    if change < -SIGMAS * se and learned:
        return Seen(
            "error",
            f"the reward of samples fell from {first:.3f} to {last:.3f} ({change / se:.1f} "
            f"standard errors) while {quarter(accuracies).mean():.0%} of the training pairs are "
            "ranked as labeled",
            ("overtraining",),
        )
    return None


def reward_change(
    record: RunRecord, name: str = "reward"
) -> tuple[float, float, float, float] | None:
    """Change of a reward from the first to the last evaluation, its standard error, and both."""
    lines = [line for line in record.evaluations if f"eval/{name}" in line]
    if len(lines) < 2:
        return None
    first, last = lines[0], lines[-1]
    values = [line[f"eval/{name}"] for line in (first, last)]
    errors = [line.get(f"eval/{name}_se", math.nan) for line in (first, last)]
    if not all(map(math.isfinite, values + errors)):
        return None
    se = max(math.hypot(*errors), 1e-12)
    return values[1] - values[0], se, values[0], values[1]


def leaked_pairs(record: RunRecord) -> Verdict:
    """Held-out pairs are training pairs, or are ranked far better than new ones."""
    if record.leaked is not None:
        leaked, n = record.leaked
        if leaked:
            return Seen(
                "error" if leaked >= 0.01 * n else "warning",
                f"{leaked:,} of {n:,} held-out pairs are training pairs too",
            )
        return None

    # accuracy on held-out pairs against that on new training pairs, at the end of the first pass
    fresh = record.series("rewards/accuracies")[: _fresh_lines(record)]
    held_out = record.evaluated("accuracy")
    if not len(held_out) or not len(fresh):
        return Unknown("the run has no evaluation on held-out pairs")
    return Unknown("which pairs are held out was not recorded (facts.record_held_out)")
