"""Planted faults have the cause that they say, and figures and explorer show their curves."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_lab import plots
from dpo_lab.engine.runs import read_metrics
from dpo_lab.facts import pair_hashes
from dpo_lab.health import FAULTS, GROUPS, gallery
from dpo_lab.health.faults import FLIPPED, PLANTS, plant
from dpo_lab.health.gallery import METRICS, TELLTALES, panel_of, read_curves
from dpo_lab.health.run_size import TINY
from dpo_lab.health.small_runs import make_run, set_up
from dpo_lab.logprobs import completion_logps, score_completions
from dpo_lab.widgets.failures import failures_explorer, failures_state

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import failures  # noqa: E402


def planted(fault):
    return PLANTS[fault](0, TINY)


@pytest.fixture(scope="module")
def good():
    return set_up(seed=0, size=TINY)


def test_every_fault_has_a_group_a_curve_and_a_cause():
    assert sorted(sum(GROUPS.values(), ())) == sorted(FAULTS)
    assert set(TELLTALES) == set(PLANTS) == set(FAULTS)
    assert set(TELLTALES.values()) <= set(METRICS)


# what is planted, before anything is trained


def test_identical_pairs_are_so_after_truncation():
    p = planted("identical_pairs").preferences
    assert all(p.completions[c] == p.completions[r] for c, r in zip(p.chosen, p.rejected))
    assert max(map(len, p.completions)) == TINY.max_new_tokens


def test_flipped_labels_contradict_the_scores_by_their_fraction(good):
    p = planted("flipped_labels").preferences
    other_way = (p.scores[p.chosen] < p.scores[p.rejected]).mean()
    assert 0.5 * FLIPPED < other_way < 1.5 * FLIPPED
    q = good.preferences
    assert (q.scores[q.chosen] > q.scores[q.rejected]).all()


def test_swapped_columns_contradict_every_score():
    setup = planted("swapped_columns")
    for p in (setup.preferences, setup.held_out):
        assert (p.scores[p.chosen] < p.scores[p.rejected]).all()


def test_leaked_pairs_are_training_pairs(good):
    setup = planted("leaked_pairs")
    trained = pair_hashes(setup.preferences)
    assert np.isin(pair_hashes(setup.held_out), trained).all()
    assert not np.isin(pair_hashes(good.held_out), trained).any()


def test_only_rejected_sentences_end():
    setup = planted("truncated_eos")
    p, end = setup.preferences, setup.task.end
    assert all(p.completions[r][-1] == end for r in p.rejected)
    lost = [c for c in p.chosen if p.completions[c][-1] != end]
    assert all(len(p.completions[c]) == 1 for c in set(p.chosen) - set(lost))
    assert p.report.without_eos == len(lost) > 0


def test_a_scored_prompt_adds_its_log_prob_to_both_sides(good):
    p, q = planted("prompt_scored").preferences, good.preferences
    assert p.prompts == [prompt[:1] for prompt in q.prompts]
    gaps = p.reference_logps - q.reference_logps
    assert np.allclose(gaps[p.chosen], gaps[p.rejected], atol=1e-3) and (gaps < -1).any()


def test_means_are_sums_over_lengths(good):
    setup = planted("mean_instead_of_sum")
    lengths = np.array([len(ids) for ids in good.preferences.completions])
    expected = good.preferences.reference_logps / lengths
    assert np.allclose(setup.preferences.reference_logps, expected, atol=1e-6)


def test_the_other_precision_is_near_the_right_one_and_not_it(good):
    gaps = planted("other_precision").preferences.reference_logps - good.preferences.reference_logps
    assert 1e-3 < np.abs(gaps).max() < 1


def test_the_policy_of_a_wrong_reference_is_another_model(good):
    setup = planted("wrong_reference")
    p = setup.preferences
    logps = score_completions(setup.policy, p.prompts, p.completions, p.prompt_of).numpy()
    assert np.abs(logps - p.reference_logps).max() > 1
    assert np.array_equal(p.reference_logps, good.preferences.reference_logps)


def test_dropout_changes_a_score_each_time_and_the_policy_back_again(good):
    setup = planted("dropout_on")
    batch = good.preferences.batch(range(4)).completions
    first, second = (setup.score(setup.policy, batch) for _ in range(2))
    assert not torch.equal(first, second) and not setup.policy.training


def test_a_rejected_completion_differs_from_the_chosen_one_in_a_token():
    p = planted("chosen_logps_fall").preferences
    for c, r in zip(p.chosen, p.rejected):
        differ = np.not_equal(p.completions[c], p.completions[r])
        assert differ.sum() == 1 and differ[len(differ) // 2]


def test_labels_of_length_prefer_the_longer_sentence():
    p = planted("length_exploitation").preferences
    lengths = np.array([len(ids) for ids in p.completions])
    assert (lengths[p.chosen] > lengths[p.rejected]).all()


def test_settings_that_are_faults(good):
    assert planted("loss_stuck_tiny_beta").config.beta == 1e-6
    rates = [one.config.loop.learning_rate for one in (planted("learning_rate_too_high"), good)]
    assert rates[0] == pytest.approx(10 * rates[1])
    assert next(planted("bfloat16_weights").policy.parameters()).dtype == torch.bfloat16
    assert planted("overtraining").config.epochs > 10 * good.config.epochs


# what a run leaves


def test_a_loop_by_hand_without_a_mistake_is_train_dpo(good, tmp_path):
    setup = set_up(seed=0, size=TINY)
    make_run(setup, tmp_path / "ours")
    by_hand = replace(setup, policy=setup.task.new_policy(), score=completion_logps)
    make_run(by_hand, tmp_path / "by hand")
    runs = [
        [line for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("ours", "by hand")
    ]
    assert len(runs[0]) == len(runs[1]) > 1
    for ours, other in zip(*runs):
        for name in ("loss", "rewards/margins", "grad_norm", "learning_rate"):
            assert other[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6)


def test_a_frozen_policy_has_a_gradient_and_stays(tmp_path):
    run = plant("loss_stuck_frozen", tmp_path / "run", size=TINY)
    curves = read_curves(run)
    assert np.allclose(curves["loss"][:, 1], math.log(2), atol=1e-5)
    assert (curves["grad_norm"][:, 1] > 0).all() and curves["eval/kl/sequence"][-1, 1] == 0
    assert curves["start"][0, 1] < 1e-5
    with pytest.raises(ValueError, match="already holds a run"):
        plant("loss_stuck_frozen", run, size=TINY)


def test_an_unknown_fault_is_named():
    with pytest.raises(ValueError, match="fault is 'gremlins'"):
        plant("gremlins", "nowhere")


# recorded runs


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Curves of a healthy run and of one fault, made by the benchmark."""
    made = []

    def make(name, seed, size, folder):
        made.append(name)
        curves = {metric: [[1, 0.7], [2, 0.1 * len(made)]] for metric in METRICS}
        kind = failures.HEALTHY.get(name, "")
        return {"planted": name.split()[0], "kind": kind, "seed": seed, "curves": curves}

    monkeypatch.setattr(failures, "recorded", make)
    monkeypatch.setattr(failures, "FAULTS", ("overtraining", "leaked_pairs"))
    monkeypatch.setattr(gallery, "RECORDED", tmp_path / "failures.json")
    for _ in range(2):
        failures.main(tmp_path / "runs", tmp_path / "failures.json", seeds=(0, 1))
    assert made == 2 * ["healthy", "healthy sentence", "overtraining", "leaked_pairs"]
    gallery.load_failures.cache_clear()
    failures_state.cache_clear()
    yield json.loads((tmp_path / "failures.json").read_text(encoding="utf-8"))
    gallery.load_failures.cache_clear()
    failures_state.cache_clear()


def test_the_benchmark_keeps_what_it_has_made(recorded):
    assert [row["seed"] for row in recorded["runs"]] == 4 * [0] + 4 * [1]
    assert gallery.recorded_faults() == ["leaked_pairs", "overtraining"]


def test_a_panel_has_healthy_runs_of_its_kind_and_those_with_the_fault(recorded):
    panel = panel_of("loss", "overtraining", {"loss": np.ones((2, 2))})
    assert len(panel["healthy"]) == len(panel["with_fault"]) == 2
    assert panel["line"] == math.log(2) and (panel["here"] == 1).all()
    assert panel_of("loss", "healthy")["with_fault"] == []
    with pytest.raises(ValueError, match="metric is 'lost'; it must be one of loss, "):
        panel_of("lost", "healthy")
    with pytest.raises(ValueError, match="fault is 'flu'"):
        panel_of("loss", "flu")


def test_the_figure_of_faults_has_a_panel_for_each_metric(recorded):
    columns = {"a $b$ c": [panel_of(name, "overtraining") for name in ("loss", "grad_norm")]}
    figure = plots.plot_failures(columns)
    assert len(figure.axes) == 2 and r"\$b\$" in figure.axes[0].get_title()
    assert figure.axes[1].get_yscale() == "log"
    for wrong in ({}, {"a": [], "b": []}, {"a": columns["a $b$ c"], "b": []}):
        with pytest.raises(ValueError, match="columns have"):
            plots.plot_failures(wrong)


def test_the_explorer_shows_the_faults_that_are_recorded(recorded):
    explorer = failures_explorer("overtraining")
    assert [name for _, name in explorer.sliders["fault"].options] == gallery.recorded_faults()
    says = explorer.show("leaked_pairs")
    assert says.startswith("held-out accuracy, from 0.7 to 0.") and "with the fault" in says
    with pytest.raises(ValueError, match="fault is"):
        failures_explorer("swapped_columns")


def test_the_confusion_matrix_counts_runs():
    matrix = {
        "a_b": {"runs": 2, "found": {"a_b": 2, "c": 1}},
        "c": {"runs": 1, "found": {}},
        "healthy": {"runs": 3, "found": {}},
    }
    axes = plots.plot_confusion(matrix).axes[0]
    cells = {(*text.get_position(), text.get_text()) for text in axes.texts}
    assert cells == {(0, 0, "2"), (1, 0, "1")}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "a b (2)",
        "c (1)",
        "healthy (3)",
    ]
