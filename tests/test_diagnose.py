"""diagnose: every rule at its threshold on exact records, the readers, the command."""

import json
import math
import pickle
import string
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dpo_lab import cli
from dpo_lab.facts import (
    completion_facts,
    data_facts,
    pair_hashes,
    record_held_out,
    start_facts,
)
from dpo_lab.health import (
    FAULTS,
    RunRecord,
    diagnose,
    in_data,
    load_diagnosis_table,
    over_time,
    read_run,
    scoring,
)
from dpo_lab.health.diagnosis import RULES, safe
from dpo_lab.health.faults import healthy, plant
from dpo_lab.health.files import read_lines
from dpo_lab.health.finding import Seen, Unknown
from dpo_lab.health.run_size import GALLERY, SMALL, TINY
from dpo_lab.health.trl_state import read_arguments
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model
from dpo_lab.preferences import Preferences, Report
from dpo_lab.train import DPOConfig, train_dpo

STEPS, BETA, LENGTH = 20, 0.1, 24.0

DATA = {
    "pairs": 240,
    "completions": 160,
    "identical": 0,
    "repeated": 0,
    "contradicted": 0,
    "rankings": 40,
    "cyclic_rankings": 0,
    "chosen_length": LENGTH,
    "rejected_length": LENGTH,
    "chosen_longer": 50,
    "rejected_longer": 50,
    "prompt_length": 6.0,
    "begins_with_prompt": 0,
    "shared_prefix": 0.2,
    "share_a_prefix": 40,
    "scored": 240,
    "scored_other_way": 0,
    "short_without_end": 0,
    "report": {"cut": 0, "identical": 0, "prompt_repeated": 0},
}
START = {"precision": "float32", "completions": 16, "sum": 1e-5, "again": 0.0, "log_ratio": 0.0}
FACTS = {"data": DATA, "model": {"trained": {"float32": 100}}, "start": START}


def lines(chosen, rejected, **others):
    """Metrics whose mean log-ratios go from 0 to these, in nats; `others` by their last value."""
    found = []
    for step in range(1, STEPS + 1):
        part = (step - 1) / (STEPS - 1)
        margin = BETA * part * (chosen - rejected)
        line = {
            "step": step,
            "loss": math.log1p(math.exp(-margin)),
            "rewards/chosen": BETA * part * chosen,
            "rewards/rejected": BETA * part * rejected,
            "rewards/margins": margin,
            "rewards/accuracies": 0.5 + 0.3 * part,
            "logps/chosen": -100 + part * chosen,
            "logps/rejected": -100 + part * rejected,
            "reference_logps/chosen": -100.0,
            "reference_logps/rejected": -100.0,
            "grad_norm": 3.0,
        }
        found.append(line | others)
    return found


HEALTHY = RunRecord(
    source="dpo-lab",
    steps=lines(1.0, -3.0),
    evaluations=[
        {"step": step, "eval/reward": reward, "eval/reward_se": 0.02, "eval/length": LENGTH}
        for step, reward in ((0, 0.5), (10, 0.6), (20, 0.7))
    ],
    beta=BETA,
    loss_type="sigmoid",
    learning_rate=5e-5,
    epochs=1,
    pairs_per_line=12,
    precision="float32",
    facts=FACTS,
    leaked=(0, 60),
)


def with_data(record=HEALTHY, **changes):
    return replace(record, facts={**record.facts, "data": {**DATA, **changes}})


def with_start(record=HEALTHY, **changes):
    return replace(record, facts={**record.facts, "start": {**START, **changes}})


def with_evaluations(**series):
    """The healthy run with other evaluations, given by name without `eval/`."""
    n = len(next(iter(series.values())))
    found = [
        {"step": i, **{f"eval/{name}": values[i] for name, values in series.items()}}
        for i in range(n)
    ]
    return replace(HEALTHY, evaluations=found)


def severity(verdict):
    return verdict.severity if isinstance(verdict, Seen) else verdict


# the rules, each just below and just above its threshold


def test_a_healthy_run_shows_nothing():
    found = diagnose(HEALTHY)
    assert found.healthy and not found.findings
    assert set(found.not_looked) == {"reward_hacking"}
    assert "none of 17 faults" in found.summary()


def test_every_fault_has_a_rule_and_a_text():
    assert list(RULES) == list(FAULTS) and len(FAULTS) == 18
    assert all(all(part.strip() for part in fault) for fault in FAULTS.values())


@pytest.mark.parametrize("name", FAULTS)
def test_without_any_data_no_rule_fails_or_finds(name):
    empty = RunRecord(source="trl", steps=[{"step": 10.0, "loss": 0.69, "rewards/margins": 0.0}])
    assert not isinstance(RULES[name](empty), Seen)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"identical": 12}, None),
        ({"identical": 13}, "warning"),
        ({"identical": 120}, "error"),
        ({"report": {"identical": 240}}, "error"),
    ],
)
def test_identical_pairs(change, expected):
    assert severity(in_data.identical_pairs(with_data(**change))) == expected


def test_identical_pairs_of_a_run_without_facts():
    same = [line | {"logps/rejected": line["logps/chosen"]} for line in HEALTHY.steps]
    record = replace(HEALTHY, facts={}, steps=same)
    assert severity(in_data.identical_pairs(record)) == "error"
    assert in_data.identical_pairs(replace(record, steps=HEALTHY.steps)) is None


@pytest.mark.parametrize(
    ("other_way", "flipped", "swapped"),
    [
        (12, None, None),
        (13, "warning", None),
        (48, "error", None),
        (179, "error", None),
        (180, None, "error"),
        (240, None, "error"),
    ],
)
def test_labels_against_their_scores(other_way, flipped, swapped):
    record = with_data(scored_other_way=other_way)
    assert severity(in_data.flipped_labels(record)) == flipped
    assert severity(in_data.swapped_columns(record)) == swapped


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cyclic_rankings": 2}, None),
        ({"cyclic_rankings": 3}, "warning"),
        ({"cyclic_rankings": 8}, "error"),
        ({"contradicted": 48}, "error"),
    ],
)
def test_labels_against_one_another(change, expected):
    assert severity(in_data.flipped_labels(with_data(scored=0, **change))) == expected


def test_random_labels_by_a_binomial_bound():
    """Late in the first pass 51 % of the pairs are ranked as labeled."""
    facts = {"data": {**DATA, "scored": 0, "pairs": 2, "completions": 4}}
    steps = [line | {"rewards/accuracies": 0.51} for line in HEALTHY.steps]
    record = replace(HEALTHY, facts=facts, steps=steps)

    # four standard errors of a half are 0.04 at 2,500 pairs, ten lines of 250
    assert in_data.flipped_labels(replace(record, pairs_per_line=249)) is None
    assert severity(in_data.flipped_labels(replace(record, pairs_per_line=251))) == "warning"


def test_the_reward_falls_while_pairs_are_learned():
    falls = with_evaluations(reward=[0.5, 0.3], reward_se=[0.03, 0.03])
    falls = with_data(falls, scored=0)
    assert severity(in_data.swapped_columns(falls)) == "error"  # 4.7 standard errors
    wider = [{**line, "eval/reward_se": 0.04} for line in falls.evaluations]
    assert in_data.swapped_columns(replace(falls, evaluations=wider)) is None  # 3.5


@pytest.mark.parametrize(
    ("longer", "shorter", "lengths", "expected"),
    [
        (79, 21, [24, 24], None),
        (80, 20, [24, 24], "warning"),
        (80, 20, [24, 30], "error"),
        (80, 20, [24, 29], "warning"),
        (8, 2, [24, 24], None),  # too few pairs differ
        (70, 30, [24, 30], "warning"),
        (50, 50, [24, 48], None),
    ],
)
def test_length(longer, shorter, lengths, expected):
    record = with_data(
        with_evaluations(length=lengths), chosen_longer=longer, rejected_longer=shorter
    )
    assert severity(in_data.length_exploitation(record)) == expected


@pytest.mark.parametrize(
    ("change", "truncated", "expected"),
    [
        ({}, [0.02, 0.22], None),
        ({}, [0.02, 0.23], "warning"),
        ({}, [0.4, 0.67], None),  # four standard errors are 0.28
        ({}, [0.4, 0.69], "warning"),
        ({"short_without_end": 16}, [0.5, 0.5], None),
        ({"short_without_end": 17}, [0.5, 0.5], "warning"),
        ({"short_without_end": 17}, [0.5, 0.8], "error"),
        ({"report": {"cut": 80}}, [0.5, 0.5], "error"),
    ],
)
def test_lost_ends(change, truncated, expected):
    record = with_data(with_evaluations(truncated=truncated, completions=[100, 100]), **change)
    assert severity(in_data.truncated_eos(record)) == expected


@pytest.mark.parametrize(
    ("leaked", "expected"), [((0, 60), None), ((1, 200), "warning"), ((2, 200), "error")]
)
def test_leaks(leaked, expected):
    assert severity(in_data.leaked_pairs(replace(HEALTHY, leaked=leaked))) == expected


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"sum": 0.0099, "again": 0.0099}, None),
        ({"again": 0.0101, "sum": 5.0}, "dropout_on"),
        ({"sum": 0.48, "other_precision": 0.4}, "other_precision"),  # 0.1 times the root of 24
        ({"sum": 0.5, "other_precision": 0.4}, "wrong_reference"),
        ({"sum": 3.0, "other_precision": 0.9}, "other_precision"),
        ({"sum": 90.0, "other_precision": 90.0, "mean": 0.005}, "mean_instead_of_sum"),
        ({"sum": 30.0, "mean": 90.0, "prompt_too": 0.005}, "prompt_scored"),
    ],
)
def test_what_was_scored_before_training(change, fault):
    record = with_start(**change)
    rules = {name: RULES[name] for name in scoring_rules()}
    seen = {name for name, rule in rules.items() if isinstance(rule(record), Seen)}
    assert seen == ({fault} if fault else set())


def scoring_rules():
    return [name for name, rule in RULES.items() if rule.__module__ == scoring.__name__]


@pytest.mark.parametrize(
    ("nats", "facts", "fault"),
    [
        (0.009, {}, None),
        (0.011, {}, "other_precision"),
        (0.6, {}, "other_precision"),
        (0.8, {}, "wrong_reference"),
        (0.8, FACTS, "dropout_on"),  # the probe before training found nothing
    ],
)
def test_rewards_of_the_first_step(nats, facts, fault):
    first = HEALTHY.steps[0] | {"rewards/chosen": BETA * nats, "rewards/rejected": BETA * nats}
    record = replace(HEALTHY, steps=[first, *HEALTHY.steps[1:]], facts=facts)
    some = ("dropout_on", "other_precision", "wrong_reference")
    assert [name for name in some if isinstance(RULES[name](record), Seen)] == [fault] * bool(fault)

    # a line that is the mean over several steps says nothing of the start
    later = [line | {"step": 10 * line["step"]} for line in record.steps]
    if not facts:
        assert isinstance(scoring.wrong_reference(replace(record, steps=later)), Unknown)


def test_rewards_that_are_means_over_tokens():
    steps = [
        line | {name: line[name] / LENGTH for name in ("rewards/chosen", "rewards/rejected")}
        for line in HEALTHY.steps
    ]
    found = scoring.mean_instead_of_sum(replace(HEALTHY, steps=steps))
    assert severity(found) == "error" and f"{1 / LENGTH:.3g} times" in found.evidence
    halves = [line | {"rewards/chosen": line["rewards/chosen"] / 2} for line in HEALTHY.steps]
    assert scoring.mean_instead_of_sum(replace(HEALTHY, steps=halves)) is None


@pytest.mark.parametrize(("logp", "expected"), [(-6.1, None), (-5.9, "error")])
def test_log_probs_as_small_as_those_of_one_token(logp, expected):
    steps = [HEALTHY.steps[0] | {"logps/chosen": logp}]
    assert severity(scoring.mean_instead_of_sum(replace(HEALTHY, steps=steps))) == expected


@pytest.mark.parametrize(("entropy", "expected"), [(49.0, None), (51.0, "warning")])
def test_means_in_a_run_of_trl_by_its_entropy(entropy, expected):
    steps = [line | {"entropy": entropy} for line in HEALTHY.steps]
    record = replace(HEALTHY, source="trl", facts={}, steps=steps)
    assert severity(scoring.mean_instead_of_sum(record)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"begins_with_prompt": 8}, None),
        ({"begins_with_prompt": 9}, "warning"),
        ({"begins_with_prompt": 80}, "error"),
        ({"prompt_length": 1.0, "share_a_prefix": 227}, None),
        ({"prompt_length": 1.0, "share_a_prefix": 228}, "error"),
        ({"prompt_length": 2.0, "share_a_prefix": 240}, None),
    ],
)
def test_a_prompt_in_the_completion(change, expected):
    assert severity(scoring.prompt_scored(with_data(**change))) == expected


def test_a_policy_that_stands_still():
    still = replace(HEALTHY, steps=lines(0.009, -0.009))
    assert severity(over_time.loss_stuck_frozen(still)) == "error"
    assert over_time.loss_stuck_frozen(replace(HEALTHY, steps=lines(0.011, -0.011))) is None
    assert over_time.loss_stuck_frozen(with_data(still, identical=240)) is None
    unmoved = {**FACTS, "model": {"trained": {"float32": 1}, "moved": False}}
    assert severity(over_time.loss_stuck_frozen(replace(HEALTHY, facts=unmoved))) == "error"
    steps = lines(1.0, -3.0, **{"weights/changed": 0.0})
    assert severity(over_time.loss_stuck_frozen(replace(HEALTHY, steps=steps))) == "error"


@pytest.mark.parametrize(
    ("beta", "margin", "expected"),
    [(0.0049, 0.04, "error"), (0.005, 0.04, None), (0.0049, 0.06, None)],
)
def test_a_tiny_beta(beta, margin, expected):
    steps = [line | {"rewards/margins": margin} for line in HEALTHY.steps]
    record = replace(HEALTHY, steps=steps, beta=beta)
    assert severity(over_time.loss_stuck_tiny_beta(record)) == expected


def test_a_tiny_beta_that_is_not_recorded():
    steps = [line | {"rewards/margins": 0.0} for line in lines(-40.0, -60.0)]
    unknown = replace(HEALTHY, steps=steps, beta=None)
    assert severity(over_time.loss_stuck_tiny_beta(unknown)) == "warning"
    steps = [line | {"rewards/margins": 0.0} for line in lines(-1.0, -3.0)]
    assert over_time.loss_stuck_tiny_beta(replace(unknown, steps=steps)) is None


def flat(chosen, rejected):
    """Metrics that are from the first line on at these log-ratios."""
    last = lines(chosen, rejected)[-1]
    return [last | {"step": step} for step in range(1, STEPS + 1)]


@pytest.mark.parametrize(
    ("per_token", "expected"), [(-over_time.FALL_PER_TOKEN * 0.99, None), (-1.0, "warning")]
)
def test_chosen_answers_lose_probability(per_token, expected):
    chosen = per_token * LENGTH
    record = replace(HEALTHY, steps=flat(chosen, chosen - 8))
    assert severity(over_time.chosen_logps_fall(record)) == expected
    assert over_time.chosen_logps_fall(replace(record, steps=flat(chosen, 3.1 * chosen))) is None
    assert over_time.chosen_logps_fall(replace(record, steps=flat(chosen, chosen + 20))) is None


@pytest.mark.parametrize(("loss", "expected"), [(0.72, None), (0.74, "error")])
def test_a_loss_above_that_of_equal_rewards(loss, expected):
    steps = [line | {"loss": loss} for line in HEALTHY.steps]
    assert severity(over_time.learning_rate_too_high(replace(HEALTHY, steps=steps))) == expected


@pytest.mark.parametrize("facts", [FACTS, {}])
@pytest.mark.parametrize(("chosen", "expected"), [(-24.0, None), (-26.0, "error")])
def test_both_sides_collapse(facts, chosen, expected):
    """A completion costs 100 nats at first."""
    steps = [{**line, "logps/chosen": -100, "logps/rejected": -100} for line in flat(chosen, -30)]
    record = replace(HEALTHY, facts=facts, steps=steps)
    assert severity(over_time.learning_rate_too_high(record)) == expected


@pytest.mark.parametrize(
    ("model", "changed", "expected"),
    [
        ({"trained": {"bfloat16": 9, "float32": 1}}, 0.49, "error"),
        ({"trained": {"bfloat16": 9, "float32": 1}}, 0.51, None),
        ({"trained": {"float32": 9, "bfloat16": 1}}, 0.01, None),
    ],
)
def test_weights_that_do_not_move(model, changed, expected):
    steps = lines(1.0, -3.0, **{"weights/changed": changed})
    record = replace(HEALTHY, steps=steps, facts={**FACTS, "model": model})
    assert severity(over_time.bfloat16_weights(record)) == expected


def test_weights_that_an_update_cannot_move():
    """An update of the learning rate is lost on weights above 2^8 times it."""
    sizes = np.linspace(0, 0.02, 21).tolist()
    record = replace(HEALTHY, facts={"model": {"trained": {"bfloat16": 1}, "sizes": sizes}})
    assert severity(over_time.bfloat16_weights(replace(record, learning_rate=1e-5))) == "error"
    assert over_time.bfloat16_weights(replace(record, learning_rate=1e-4)) is None


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ({"reward": [0.5, 0.9, 0.8], "reward_se": [0.02] * 3}, None),  # 3.5 standard errors
        ({"reward": [0.5, 0.9, 0.78], "reward_se": [0.02] * 3}, "warning"),  # 4.2
        ({"held_out_loss": [0.69, 0.6, 0.6 * over_time.LOSS_RISEN - 1e-9]}, None),
        ({"held_out_loss": [0.69, 0.6, 0.6 * over_time.LOSS_RISEN + 1e-9]}, "warning"),
        ({"distinct_2": [0.9, 0.9 * over_time.LESS_DISTINCT + 1e-9]}, None),
        ({"distinct_2": [0.9, 0.9 * over_time.LESS_DISTINCT - 1e-9]}, "warning"),
        (
            {
                "reward": [0.5, 0.9, 0.7],
                "reward_se": [0.02] * 3,
                "distinct_2": [0.9, 0.9, 0.3],
            },
            "error",
        ),
    ],
)
def test_overtraining(series, expected):
    assert severity(over_time.overtraining(with_evaluations(**series))) == expected


@pytest.mark.parametrize(("n", "expected"), [(3370, None), (3390, "warning"), (None, None)])
def test_a_fall_of_accuracy_by_the_number_of_pairs(n, expected):
    """Three standard errors of two means over a third of n pairs are 0.0632 at 3,380."""
    falls = with_evaluations(accuracy=[0.5, 0.7, 0.7 - 0.0632])
    record = replace(falls, leaked=n and (0, n))
    assert severity(over_time.overtraining(record)) == expected


@pytest.mark.parametrize(
    ("true", "expected"),
    [([0.5, 0.6, 0.55], None), ([0.5, 0.6, 0.54], "warning"), ([0.5, 0.6, 0.51], "error")],
)
def test_reward_hacking(true, expected):
    series = {
        "reward": [0.5, 0.8, 0.9],
        "reward_se": [0.02] * 3,
        "true_reward": true,
        "true_reward_se": [0.02] * 3,
    }
    assert severity(over_time.reward_hacking(with_evaluations(**series))) == expected
    series["reward"] = [0.5, 0.8, 0.7]
    assert over_time.reward_hacking(with_evaluations(**series)) is None
    series |= {"reward": [0.5, 0.55, 0.58]}  # 2.8 standard errors
    assert over_time.reward_hacking(with_evaluations(**series)) is None


# facts


def pairs(completions, chosen, rejected, prompts=((7, 1, 2),), **others):
    owners = np.zeros(len(completions), dtype=int)
    return Preferences(list(map(list, prompts)), completions, owners, chosen, rejected, **others)


def test_facts_of_pairs_by_hand():
    scores = np.array([3.0, 1.0, 2.0, 2.0])
    rows = [[1, 2, 5], [4, 0], [4, 9, 9], [4, 9, 9]]
    found = data_facts(pairs(rows, [0, 1, 2, 2], [1, 2, 0, 3], scores=scores), end_tokens=[0])
    assert found | {"report": 0} == {
        "pairs": 4,
        "completions": 4,
        "identical": 1,
        "repeated": 0,
        "contradicted": 0,
        "rankings": 1,
        "cyclic_rankings": 1,
        "chosen_length": 2.75,
        "rejected_length": 2.75,
        "chosen_longer": 1,
        "rejected_longer": 1,
        "prompt_length": 3.0,
        "begins_with_prompt": 1,
        "shared_prefix": 1.0,
        "share_a_prefix": 2,
        "scored": 3,
        "scored_other_way": 2,
        "short_without_end": 0,
        "report": 0,
    }


def test_pairs_in_both_orders_contradict_and_repeat():
    found = data_facts(pairs([[1], [2]], [0, 1, 0], [1, 0, 1]))
    assert (found["repeated"], found["contradicted"]) == (2, 2)


def test_completions_that_stop_short_without_an_end():
    rows = pairs([[1, 2, 3], [1, 2], [1, 0], [5, 5, 5]], [0, 2], [1, 3])
    assert data_facts(rows, end_tokens=[0])["short_without_end"] == 1
    assert "short_without_end" not in data_facts(rows)
    # by a report, which counts with the tokenizer's own end
    reported = replace(rows, report=Report(pairs=2, without_eos=3))
    assert data_facts(reported)["short_without_end"] == 1


@given(st.permutations(range(4)), st.integers(0, 3), st.integers(0, 3))
def test_a_ranking_has_a_cycle_if_a_pair_is_against_it(order, better, worse):
    ranks = {item: place for place, item in enumerate(order)}
    sides = [(a, b) for a in order for b in order if ranks[a] < ranks[b]]
    if ranks[better] < ranks[worse]:
        sides = [(b, a) if (a, b) == (better, worse) else (a, b) for a, b in sides]
    chosen, rejected = zip(*sides)
    found = data_facts(pairs([[1], [2], [3], [4]], chosen, rejected))
    # neighbors may be exchanged: that is another ranking
    assert found["cyclic_rankings"] == (ranks[worse] - ranks[better] > 1)


def test_a_hash_names_a_pair_in_either_order():
    a = pair_hashes(pairs([[1], [2], [3]], [0, 1], [1, 2]))
    b = pair_hashes(pairs([[1], [2], [3]], [1, 0], [0, 2]))
    assert a[0] == b[0] and a[1] != b[1] and a.dtype == np.int64


def test_facts_of_completions():
    found = completion_facts([[1, 2, 1, 2], [3, 0]], max_new_tokens=4, end_tokens=[0])
    assert found == {"completions": 2, "length": 3.0, "truncated": 0.5, "distinct_2": 3 / 4}


# runs


@pytest.fixture
def trained(tiny, tokenizer, tmp_path):
    """A tiny run by train_dpo, with held-out pairs recorded."""
    model = load_model(str(tiny))
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 60, (24, 6)).tolist()
    found = Preferences(
        [[1, 2]] * 12, rows, np.arange(24) // 2, np.arange(0, 24, 2), np.arange(1, 24, 2)
    ).with_reference(model)
    config = DPOConfig(
        batch_pairs=2, loop=LoopConfig(learning_rate=1e-3, warmup_steps=1, save_every=100)
    )
    run = tmp_path / "run"
    train_dpo(model, found, config, run=run, progress=None)
    record_held_out(run, found.select([0, 1]))
    return run


def test_a_run_keeps_its_facts(trained):
    record = read_run(trained)
    assert record.data["pairs"] == 12 and record.facts["steps"] == len(record.steps) == 6
    assert record.start["sum"] < 1e-3 and record.start["again"] == 0
    assert record.leaked == (2, 2) and record.facts["model"]["moved"]
    assert record.facts["model"]["trained"].keys() == {"float32"}
    assert 0.9 < record.series("weights/changed").max() <= 1
    found = diagnose(trained)
    assert "leaked_pairs" in found.faults and found.run == str(trained) and not found.notes

    # an interrupted one
    kept = (trained / "metrics.jsonl").read_text().splitlines()[:4]
    (trained / "metrics.jsonl").write_text("\n".join(kept))
    assert "ends at step 4 of 6" in diagnose(trained).notes[0]


def test_a_run_of_an_earlier_version_is_read(trained):
    for name in ("facts.json", "pairs.safetensors", "held_out.safetensors"):
        (trained / name).unlink()
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    old = [
        {
            name: value
            for name, value in line.items()
            if "reference" not in name and "we" not in name
        }
        for line in steps
    ]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    found = diagnose(trained)
    assert "leaked_pairs" in found.not_looked and "identical_pairs" not in found.not_looked
    assert read_run(trained).facts["model"]["moved"]


def test_what_scoring_before_training_finds(tiny):
    model = load_model(str(tiny))
    rows = np.random.default_rng(0).integers(1, 60, (8, 12)).tolist()
    sides = np.arange(0, 8, 2), np.arange(1, 8, 2)
    found = Preferences([[1, 2, 3]] * 4, rows, np.arange(8) // 2, *sides).with_reference(model)
    assert start_facts(model, found)["sum"] < 1e-3

    # means, and prompts that are scored
    means = replace(found, reference_logps=found.reference_logps / 12)
    assert start_facts(model, means)["mean"] < 1e-3 < 1 < start_facts(model, means)["sum"]
    joined = replace(found, prompts=[[1]] * 4, completions=[[2, 3, *row] for row in rows])
    whole = joined.with_reference(model).reference_logps
    assert start_facts(model, replace(found, reference_logps=whole))["prompt_too"] < 1e-3

    # dropout that eval mode does not end
    class Noise(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.dropout(x, 0.5)

    model.transformer.drop = Noise()
    assert start_facts(model, found)["again"] > 0.1


# readers


def write(run, *texts, name="metrics.jsonl"):
    run.mkdir(exist_ok=True)
    (run / name).write_text("\n".join(texts))
    return run


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is empty"):
        read_run(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds 'notes.txt'; .*metrics.jsonl"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        read_run(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="no line of metrics"):
        read_run(write(tmp_path, "", "{}", "[1]", "nonsense"))
    with pytest.raises(ValueError, match="no metrics of DPO"):
        read_run(write(tmp_path, '{"step": 1, "loss": 0.5}'))
    write(tmp_path, '{"method": "SFT"}', name="training.json")
    with pytest.raises(ValueError, match="a run of SFT"):
        read_run(tmp_path)


def test_a_half_written_line_and_nan_are_noted(tmp_path):
    first = json.dumps({"step": 1, "loss": math.nan, "rewards/margins": 0.0})
    run = write(tmp_path / "run", first, '{"step": 2, "loss": 0.6, "rewards/margins": 0.1}', '{"st')
    (run / "facts.json").write_text("[1")
    record = read_run(run)
    assert len(record.steps) == 2 and record.series("loss").tolist() == [0.6]
    said = "; ".join(record.notes)
    assert "1 of 3 lines cannot be read, line 3 first (the last one, half written)" in said
    assert "loss is not a finite number at step 1" in said and "facts.json cannot be read" in said
    assert "note on the files" in str(diagnose(run))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(string.printable, max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["step", "loss", "rewards/margins", "eval/reward", "data"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=20), JSON.map(lambda v: json.dumps(v).encode()))))
def test_garbage_is_read_or_refused(tmp_path_factory, texts):
    run = tmp_path_factory.mktemp("run")
    good = json.dumps({"step": 1, "loss": 0.7, "rewards/margins": 0.0}).encode()
    (run / "metrics.jsonl").write_bytes(b"\n".join([good, *texts]))
    lines, _ = read_lines(run / "metrics.jsonl")
    assert lines[0] == {"step": 1, "loss": 0.7, "rewards/margins": 0}
    for name in ("facts.json", "training.json"):
        (run / name).write_bytes(texts[0] if texts else b"")
    try:
        str(diagnose(run))
    except ValueError as error:
        assert str(run) in str(error)


def trl_run(run, history, arguments=None, *, checkpoint="checkpoint-10"):
    folder = run / checkpoint
    folder.mkdir(parents=True)
    state = {"log_history": history, "max_steps": 10, "num_train_epochs": 1, "train_batch_size": 8}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if arguments:
        with zipfile.ZipFile(folder / "training_args.bin", "w") as file:
            file.writestr("training_args/data.pkl", pickle.dumps(arguments, protocol=2))
    return run


def test_a_run_of_trl_is_read(tmp_path):
    history = [{**line, "epoch": 0.1, "entropy": 4.0} for line in HEALTHY.steps]
    history.insert(5, {"step": 5, "eval_loss": 0.7, "eval_rewards/accuracies": 0.625})
    history.append({"step": 10, "train_runtime": 3.0, "train_loss": 0.6})
    arguments = {"loss_type": ["sigmoid"], "beta": 0.1, "disable_dropout": True}
    arguments |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-6, "warmup_steps": 0}
    run = trl_run(tmp_path, history, arguments)
    trl_run(tmp_path, [], checkpoint="checkpoint-9")
    save_file({"w": torch.ones(4, 4)}, run / "checkpoint-10" / "model.safetensors")

    record = read_run(run)
    assert record.source == "trl" and len(record.steps) == STEPS
    assert (record.beta, record.loss_type, record.learning_rate) == (0.1, "sigmoid", 1e-6)
    assert record.pairs_per_line == 16 and record.evaluated("accuracy").tolist() == [0.625]
    assert record.facts["model"]["trained"] == {"float32": 16}
    found = diagnose(run)
    assert found.healthy and "prompt_scored" in found.not_looked
    state = run / "checkpoint-10" / "trainer_state.json"
    assert diagnose(state).as_dict()["steps"] == diagnose(state.parent).steps == STEPS


def test_a_state_of_another_trainer_is_refused(tmp_path):
    run = trl_run(tmp_path, [{"step": 1, "loss": 3.0}])
    with pytest.raises(ValueError, match="no line with rewards/margins"):
        diagnose(run)
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"log_history": [')
    with pytest.raises(ValueError, match="half written"):
        diagnose(run)


class Dangerous:
    def __reduce__(self):
        return print, ("run",)


def test_pickled_arguments_are_read_and_not_run(tmp_path, capsys):
    arguments = {"beta": 0.25, "x": Dangerous(), "loss_type": ["ipo"], "learning_rate": 1e-6}
    run = trl_run(tmp_path, [], arguments)
    found = read_arguments(run / "checkpoint-10" / "training_args.bin")
    assert found == {"beta": 0.25, "loss_type": "ipo", "learning_rate": 1e-6}
    assert capsys.readouterr().out == ""
    (tmp_path / "other").write_bytes(b"no zip")
    assert read_arguments(tmp_path / "other") == read_arguments(tmp_path / "nothing") == {}


# the command


def test_the_command_prints_and_exits(trained, capsys):
    assert cli.main(["diagnose", str(trained)]) == 1
    shown = capsys.readouterr().out
    assert "ERROR  evaluation pairs were trained on (leaked_pairs)" in shown
    assert "what to do:" in shown and "not looked for:" in shown
    (trained / "held_out.safetensors").unlink()
    status = cli.main(["diagnose", str(trained), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (not found["healthy"]) and found["source"] == "dpo-lab"
    assert cli.main(["diagnose", str(trained / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_control_characters_are_shown_safely():
    assert safe("a\x1b[31m\nb\u202e") == "a\\u001b[31m\nb\\u202e"
    odd = replace(HEALTHY, notes=("\x1b]0;title\x07",))
    assert "\x1b" not in str(diagnose(odd)) and "\\u001b]0;title" in str(diagnose(odd))


def test_a_summary_has_at_most_so_many_lines():
    bad = with_data(identical=240, scored_other_way=240, report={"cut": 160}, prompt_length=1.0)
    found = diagnose(bad)
    assert len(found.findings) >= 3 and len(found.summary(2).splitlines()) == 2
    assert found.summary(2).endswith("more findings")
    assert [f.severity for f in found.findings] == sorted(f.severity for f in found.findings)


# planted faults


@pytest.mark.parametrize("fault", ["wrong_reference", "mean_instead_of_sum", "swapped_columns"])
def test_a_fault_that_is_planted_is_found(fault, tmp_path):
    assert fault in diagnose(plant(fault, tmp_path / "run", seed=300, size=TINY)).faults


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_that_is_planted_is_found(fault, tmp_path):
    larger = replace(SMALL, eval_prefixes=96)
    size = larger if fault in ("chosen_logps_fall", "reward_hacking") else GALLERY
    assert fault in diagnose(plant(fault, tmp_path / "run", seed=301, size=size)).faults


@pytest.mark.long
@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("kind", ["prefix", "sentence"])
def test_no_alarm_on_a_healthy_run(kind, beta, tmp_path):
    run = healthy(tmp_path / "run", seed=302, size=GALLERY, kind=kind, beta=beta)
    assert diagnose(run).findings == ()


def test_the_recorded_table_is_that_of_its_runs():
    found = load_diagnosis_table()
    runs = found["runs"]
    assert found["faults"] == list(FAULTS) and len({row["seed"] for row in runs}) > 20
    assert max(row["seed"] for row in runs) < 100
    for planted, counts in found["matrix"].items():
        some = [row for row in runs if row["planted"] == planted]
        assert counts["runs"] == len(some)
        for fault in FAULTS:
            seen = sum(fault in row["found"] for row in some)
            assert counts["found"].get(fault, 0) == seen

    # what the page claims: every planted fault is found, and nothing on a healthy run
    assert all(row["planted"] in row["found"] for row in runs if row["planted"] != "healthy")
    assert all(row["found"] == [] for row in runs if row["planted"] == "healthy")
    assert len(runs) >= 60 and found["matrix"]["healthy"]["runs"] >= 20
    assert all(found["matrix"][fault]["runs"] >= 2 for fault in FAULTS)
