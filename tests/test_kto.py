"""KTO: its data from pairs and rows, its first step by hand, its training and its resume."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_train import LOOP, make_preferences, same, state, timeless

from dpo_lab.engine.runs import read_metrics
from dpo_lab.loop import Scorer
from dpo_lab.models import load_model
from dpo_lab.train import DPOConfig
from dpo_lab.variants.feedback import BinaryFeedback
from dpo_lab.variants.kto import KTOConfig, KTOObjective, train_kto


@pytest.fixture(scope="module")
def preferences(tiny):
    return make_preferences(tiny)


KTO = KTOConfig(beta=0.5, epochs=2, batch_completions=24, loop=LOOP)
ROWS = [
    {"prompt": "This film", "completion": " was a joy", "label": True},
    {"prompt": "This film", "completion": " was a bore", "label": False},
    {"prompt": "The plot", "completion": " thrills", "label": True},
    {"prompt": "The plot", "completion": " thrills", "label": True},
]


@pytest.fixture(scope="module")
def feedback(tiny, preferences):
    return BinaryFeedback.from_pairs(preferences).with_reference(load_model(str(tiny)))


def test_pairs_taken_apart_are_ratings_of_the_same_completions(preferences, feedback):
    n = len(preferences.chosen)
    assert feedback.rated.tolist() == [*preferences.chosen, *preferences.rejected]
    assert feedback.desirable.tolist() == [True] * n + [False] * n
    assert feedback.completions == preferences.completions
    # the stored log-probs are kept, those of mismatched completions are new
    assert feedback.reference_logps.tolist() == preferences.reference_logps.tolist()
    assert np.isfinite(feedback.mismatched_logps).all()
    assert abs(feedback.mismatched_logps - feedback.reference_logps).min() > 1e-3


def test_a_mismatched_completion_belongs_to_another_prompt(feedback):
    others, prompts = feedback.others, [feedback.prompts[p] for p in feedback.prompt_of]
    assert sorted(others.tolist()) == list(range(len(others)))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(others))
    # one prompt with most of the completions, written twice
    heavy = replace(
        feedback,
        prompts=[[1, 2], [1, 2], [3]],
        completions=[[4], [5], [6], [7]],
        prompt_of=[0, 1, 0, 2],
        rated=[0, 3],
        desirable=[True, False],
        reference_logps=None,
        mismatched_logps=None,
    )
    assert heavy.others.tolist()[:3] == [3, 3, 3] and heavy.others[3] != 3


def test_rows_become_ratings(tokenizer):
    found = BinaryFeedback.from_rows(iter(ROWS), tokenizer, context=64)
    assert found.rated.tolist() == [0, 1, 2, 2]
    assert found.desirable.tolist() == [True, False, True, True]
    assert found.prompt_of.tolist() == [0, 0, 1]
    texts = [tokenizer.decode(ids) for ids in found.completions]
    assert texts == [f" {text}<|endoftext|>" for text in ("was a joy", "was a bore", "thrills")]


def test_the_first_step_of_kto_is_its_formula(tiny, feedback):
    """At the reference all log-ratios are 0, so z0 is 0 and every loss is one half."""
    policy = load_model(str(tiny))
    objective = KTOObjective(policy, feedback, KTO, 0)
    (micro,) = objective.micro_batches(0, 1)
    score = Scorer(policy)
    loss, sums = objective.loss(score, micro)
    n = objective.weight(micro)
    assert loss.item() == pytest.approx(n / 2, rel=1e-6) and float(sums["kl"]) < 1e-4

    # elsewhere, rating by rating
    with torch.no_grad():
        for weights in policy.parameters():
            weights.mul_(1.1)
    loss, sums = objective.loss(score, micro)
    with torch.no_grad():
        ratios = (score(micro.completions) - micro.reference_logps).tolist()
        mismatched = (score(micro.mismatched) - micro.mismatched_logps).tolist()
    z0, total = max(0.0, math.fsum(mismatched) / len(mismatched)), 0.0
    for place, good in zip(micro.rated.tolist(), micro.desirable.tolist()):
        total += 1 / (1 + math.exp((1 if good else -1) * 0.5 * (ratios[place] - z0)))
    assert loss.item() == pytest.approx(total, rel=1e-9)
    assert float(sums["kl"]) / n == pytest.approx(z0, rel=1e-9)
    rewards = [0.5 * ratios[r] for r, good in zip(micro.rated, micro.desirable) if good]
    assert float(sums["rewards/chosen"]) / n == pytest.approx(np.mean(rewards), rel=1e-9)


def test_kto_trains_with_pairs_and_without(tiny, feedback, tokenizer):
    policy = load_model(str(tiny))
    metrics = train_kto(policy, feedback, KTO, progress=None)
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert metrics[-1]["loss"] < 0.5 and metrics[-1]["kl"] >= 0
    assert metrics[-1]["rewards/chosen"] > metrics[-1]["rewards/rejected"]

    rows = BinaryFeedback.from_rows(ROWS, tokenizer, context=64)
    policy = load_model(str(tiny))
    config = replace(KTO, epochs=6, batch_completions=4)
    metrics = train_kto(policy, rows.with_reference(policy), config, progress=None)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_kto_of_desirable_ratings_alone_logs_one_side(tiny, tokenizer):
    rows = BinaryFeedback.from_rows([ROWS[0], ROWS[2]], tokenizer, context=64)
    policy = load_model(str(tiny))
    metrics = train_kto(policy, rows.with_reference(policy), KTO, progress=None)
    assert "rewards/chosen" in metrics[0] and "rewards/rejected" not in metrics[0]


def test_a_kto_run_is_recorded_and_goes_on_bit_identically(tiny, feedback, tmp_path):
    class Stop(Exception):
        pass

    def stop(model, step):
        if step == 3:
            raise Stop
        return {}

    whole, again = load_model(str(tiny)), load_model(str(tiny))
    expected = train_kto(whole, feedback, KTO, progress=None)
    with pytest.raises(Stop):
        train_kto(again, feedback, KTO, run=tmp_path, callback=stop, progress=None)
    lines, again = read_metrics(tmp_path), load_model(str(tiny))
    for data, config in (
        (feedback, replace(KTO, undesirable_weight=2.0)),
        (replace(feedback, desirable=~feedback.desirable), KTO),
    ):
        with pytest.raises(ValueError, match="holds another run"):
            train_kto(again, data, config, run=tmp_path, resume=True, progress=None)
    assert read_metrics(tmp_path) == lines
    metrics = train_kto(again, feedback, KTO, run=tmp_path, resume=True, progress=None)
    assert same(state(again), state(whole))
    assert [line for line in timeless(metrics) if "loss" in line] == timeless(expected)


def test_wrong_feedback_is_named(tiny, preferences, feedback, tokenizer):
    policy, read = load_model(str(tiny)), partial(BinaryFeedback.from_rows, context=64)
    one = replace(feedback, prompts=[[1]] * len(feedback.prompts))
    numbers = feedback.desirable.astype(int)
    cases = [
        (lambda: read([{"prompt": "a", "label": True}], tokenizer), "no column 'completion'"),
        (lambda: read([ROWS[0] | {"label": 1}], tokenizer), "label is 1; it must be True"),
        (lambda: read([ROWS[0] | {"completion": ""}], tokenizer), "completion is empty"),
        (lambda: read([ROWS[0] | {"prompt": ["a"]}], tokenizer), "prompt is .* must be a text"),
        (lambda: read([], tokenizer), "at least one rating"),
        (lambda: replace(feedback, desirable=numbers), r"it must be \(R,\) booleans"),
        (lambda: replace(feedback, rated=feedback.rated[1:]), "one of each per rating"),
        (lambda: replace(feedback, rated=feedback.rated + 999), r"rated\[0\] is \d+; .* in 0\.\."),
        (lambda: replace(feedback, reference_logps=[0.0]), "reference_logps has 1 values"),
        (lambda: replace(feedback, mismatched_logps=feedback.others * math.nan), "be finite"),
        (lambda: one.others, "at least two different prompts"),
        (lambda: train_kto(policy, preferences, KTO), "feedback is a Preferences; .*from_pairs"),
        (lambda: train_kto(policy, replace(feedback, mismatched_logps=None), KTO), "with_refer"),
        (lambda: train_kto(policy, feedback, replace(KTO, beta=0)), "beta is 0"),
        (lambda: train_kto(policy, feedback, replace(KTO, batch_completions=1)), "at least 2"),
        (lambda: train_kto(policy, feedback, replace(KTO, desirable_weight=-1)), "desirable_wei"),
        (lambda: train_kto(policy, feedback, DPOConfig()), "config is DPOConfig.*a KTOConfig"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
