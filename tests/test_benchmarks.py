"""The contenders of the speed benchmark train on the same pairs and compute the same loss."""

import gc
import io
import json
import os
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import batch_element  # noqa: E402
import contender  # noqa: E402
import goodhart  # noqa: E402
import hacking  # noqa: E402
import on_policy  # noqa: E402
import relatives  # noqa: E402
import scale  # noqa: E402
import speed  # noqa: E402

from dpo_lab.loop import LoopConfig  # noqa: E402
from dpo_lab.plots.online import plot_relatives  # noqa: E402
from dpo_lab.rlhf.ppo import PPOConfig  # noqa: E402
from dpo_lab.rlhf.reward_model import RewardModelConfig  # noqa: E402
from dpo_lab.sentiment import reviews  # noqa: E402
from dpo_lab.sentiment.results import (  # noqa: E402
    load_goodhart,
    load_on_policy,
    load_sweep,
    reward_at,
)
from dpo_lab.sentiment.task import TaskConfig  # noqa: E402
from dpo_lab.train import DPOConfig, check_config  # noqa: E402

# small: what contenders load takes longer than what they do
CHANGE = {"prompts": 2, "steps": 2, "passes": 2, "most": 24}
CHANGE |= {"layers": 2, "width": 128, "vocabulary": 1_024}


@pytest.fixture(scope="module")
def measured():
    """The results of all contenders, by job; each in a process of its own."""
    options = ("--workload=embedded", "--untimed=1", f"--change={json.dumps(CHANGE)}")
    yield {
        job: [contender.measure(f"--job={job}", f"--contender={name}", *options) for name in names]
        for job, names in contender.RUNS.items()
    }
    if contender.FORKS:
        server = contender.forking_process()
        contender.forking_process.cache_clear()
        server.stdin.close()
        server.stdout.close()
        assert server.wait(60) == 0


def test_a_contender_that_fails_stops_the_benchmark(monkeypatch):
    """On both sides: of the process that forked it, and of the one that asked for it."""
    monkeypatch.setattr(sys, "stdin", ['["--workload=nothing"]\n'])
    monkeypatch.setattr(os, "fork", lambda: 1)
    monkeypatch.setattr(os, "waitpid", lambda child, options: (child, 256))
    with pytest.raises(SystemExit, match="1"):
        contender.serve()

    ended = SimpleNamespace(stdin=io.StringIO(), stdout=["a line of the log\n"])
    monkeypatch.setattr(contender, "FORKS", True)
    monkeypatch.setattr(contender, "forking_process", lambda: ended)
    with pytest.raises(SystemExit, match="failed with --workload=nothing"):
        contender.measure("--workload=nothing")


def test_all_contenders_compute_the_same_loss(measured):
    results = measured["dpo"]
    losses = [result["loss"] for result in results]
    assert max(losses) - min(losses) < 1e-4 and abs(losses[0] - np.log(2)) > 1e-3
    assert {result["pairs"] for result in results} == {2 * 2 * 6}
    assert all(result["training_seconds"] > 0 for result in results)


def test_all_contenders_of_sft_compute_the_same_loss(measured):
    results = measured["sft"]
    losses = [result["loss"] for result in results]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-4) and losses[0] > 1
    assert all(result["training_seconds"] > 0 for result in results)


@pytest.mark.parametrize("name", contender.WORKLOADS)
def test_a_workload_is_what_it_says(name):
    workload = contender.WORKLOADS[name]
    preferences = contender.make_preferences(replace(workload, steps=50), seed=0)
    lengths = [len(ids) for ids in preferences.completions]
    assert (
        8 <= min(lengths)
        and max(lengths) <= workload.most
        and abs(np.mean(lengths) / workload.mean - 1) < 0.15
    )
    k = workload.completions
    assert len(preferences.chosen) == 50 * workload.prompts * k * (k - 1) // 2
    assert all(ids[-1] == 0 and 0 not in ids[:-1] for ids in preferences.completions)
    shortest, longest = workload.prompt_tokens
    assert {len(ids) - 1 for ids in preferences.prompts} <= set(range(shortest, longest + 1))


def test_a_cost_curve_has_the_same_completions_at_every_point():
    base = contender.WORKLOADS["short"]
    changed = [base, replace(base, prompt_tokens=(256, 256)), replace(base, vocabulary=8_000)]
    first, *others = (
        [len(ids) for ids in contender.make_preferences(w, seed=0).completions] for w in changed
    )
    assert all(lengths == first for lengths in others)


@pytest.mark.parametrize("name", contender.WORKLOADS)
def test_the_first_step_has_as_many_pairs_as_any_and_the_shortest_completions(name):
    workload = contender.WORKLOADS[name]
    short, p = contender.short_step(workload, seed=0), contender.make_preferences(workload, seed=0)
    assert len(short.chosen) == len(p.chosen) / workload.steps
    assert max(map(len, short.completions)) == 8


def test_the_reference_is_hashed_once_before_the_clock_and_not_kept(monkeypatch):
    """TRL's own hash is not timed either; a cache that held the model would add to the peak."""
    hashed = []

    def slow(model):
        hashed.append(weakref.ref(model))
        skipped.append(1_000)
        return "hash"

    def train(policy, data, *_, **__):
        gc.collect()
        assert hashed[0]() is None and data.reference_logps is not None
        trained.append(len(data.chosen))

    trained, skipped = [], []
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(skipped))
    monkeypatch.setattr(contender, "time", clock)
    monkeypatch.setattr(contender.data_format, "weights_hash", slow)
    # both are set, and put back
    monkeypatch.setattr(contender.loop, "make_optimizers", contender.loop.make_optimizers)
    for name in ("KEEPING", "USUAL", "onednn_is_exact"):
        monkeypatch.setattr(contender.tuning, name, getattr(contender.tuning, name))
    monkeypatch.setattr(contender, "train_dpo", train)
    workload = replace(contender.WORKLOADS["embedded"], prompts=1, steps=1)
    config = contender.ContenderConfig(workload="embedded", without=("oneDNN", "kept memory"))
    pairs, short = contender.make_preferences(workload, 0), contender.short_step(workload, 0)
    result = contender.run_dpo_lab(config, workload, pairs, short)
    assert len(hashed) == 1 and 0 < result["reference_seconds"] < 1_000
    assert trained == [6] * 4  # the short step, two untimed ones, and the one that is timed


def test_the_least_flops_are_those_of_the_matmuls():
    workload = contender.WORKLOADS["short"]
    preferences = contender.make_preferences(workload, seed=0)
    predicted = sum(map(len, preferences.completions))
    seen = sum(map(len, preferences.prompts)) + predicted - len(preferences.completions)
    block = 768 * (3 * 768 + 768 + 4 * 768 + 4 * 768)  # query, key and value; out; up; down
    forward = 2 * (12 * block * seen + 768 * 50_257 * predicted)
    assert (
        speed.least_flops("dpo", workload, 0) == 4 * forward
        and speed.least_flops("sft", workload, 0) == 3 * forward
    )


def test_the_prediction_is_the_arithmetic_that_its_page_tells():
    a, seven = scale.Assumptions(), scale.MODELS[0]
    assert scale.state_bytes(seven, 8, "DDP", a) == 16 * 7e9
    assert scale.state_bytes(seven, 8, "FSDP", a) == 2 * 7e9 + 4 * 7e9 / 32
    assert scale.state_bytes(seven, 8, "LoRA", a) == pytest.approx(
        2 * 7e9 * 0.995 + 16 * 7e9 * 0.005
    )
    assert scale.traffic_bytes(seven, 2, "DDP", a) == 4 * 7e9  # each of two sends a half twice
    assert scale.passes(8, a) == (16, 4) and scale.passes(512, a) == (1, 1)
    eight, more = (scale.predict(seven, gpus, "FSDP", a) for gpus in (8, 64))
    tokens = 512 * 1_200
    assert eight["compute"] == pytest.approx(8 * 7e9 * tokens / (8 * 989e12 * a.share))
    assert more["compute"] == pytest.approx(eight["compute"] / 8) and more["traffic"] > 0
    assert eight["hours_at_best"] < eight["hours_at_worst"]
    assert scale.table().count("\n") == 1 + 2 * 3 * 3 + 2


@pytest.mark.usefixtures("made_up_reviews")
def test_each_learned_reward_is_pushed_and_its_run_recorded(tiny, tmp_path):
    task = TaskConfig(model=str(tiny), eval_prefixes=8, max_new_tokens=6, precision="float32")
    ppo = PPOConfig(steps=2, batch=8, minibatch=4, eval_every=1)
    fitting = RewardModelConfig(
        epochs=4, batch_pairs=12, held_out=0.5, loop=LoopConfig(learning_rate=1e-2, eval_every=1)
    )
    config = hacking.HackingConfig(
        rewards=2, prefixes=12, prompts=12, task=task, reward_model=fitting, ppo=ppo
    )
    hacking.main(config, tmp_path / "hacking.json")
    found = json.loads((tmp_path / "hacking.json").read_text())
    assert [[row["step"] for row in run] for run in found["runs"]] == [[0, 1, 2]] * 2
    first, second = found["runs"]
    # both begin with the same policy
    assert first[0]["reward"] == second[0]["reward"] and first[0]["kl"] == 0
    assert np.isfinite([row["given"] for run in found["runs"] for row in run]).all()
    assert first[0]["given"] != second[0]["given"] and first[-1]["kl"] > 0  # two rewards
    assert found["config"]["task"]["prefixes"] == 24 and found["commit"]


@pytest.mark.usefixtures("made_up_reviews")
def test_dpo_on_the_true_reward_is_asked_about_by_others(tiny, tmp_path, monkeypatch):
    table = tmp_path / "reviews.csv"
    lines = [f"rotten_tomatoes,{i % 2},{['a bore', 'a joy'][i % 2]} number {i}" for i in range(80)]
    table.write_text("\n".join(["source,label,text", "imdb,1,not asked", *lines]))
    monkeypatch.setattr(reviews, "reviews_csv", lambda: table)
    monkeypatch.setattr(reviews, "HELD_OUT_SENTENCES", 20)
    task = TaskConfig(
        model=str(tiny), prefixes=12, eval_prefixes=8, max_new_tokens=6, precision="float32"
    )
    loop = LoopConfig(learning_rate=1e-2, warmup_steps=0, eval_every=10_000)
    config = goodhart.GoodhartConfig(
        betas=(0.1, 1.0), seeds=(0, 1), task=task, loop=loop, batch_pairs=24, out=tmp_path / "runs"
    )
    goodhart.main(config, tmp_path / "goodhart.json")
    found = json.loads((tmp_path / "goodhart.json").read_text())

    # before and after, for each run
    rows = found["rows"]
    assert [(row["seed"], row["beta"]) for row in rows[::2]] == [(0, 0.1), (0, 1), (1, 0.1), (1, 1)]
    for before, after in zip(rows[::2], rows[1::2]):
        assert before["step"] == before["kl"] == 0 < after["step"] and after["kl"] != 0
        assert 0 < after["second"] < 1 and after["reference_logp"] < 0 <= after["known"] <= 1
    assert found["second_judge"]["accuracy"] == 1 and found["commit"]
    assert "out" not in found["config"]

    # what is there is kept, unless something else is asked for
    monkeypatch.setattr(goodhart, "push", None)
    goodhart.main(config, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == rows
    with pytest.raises(ValueError, match="batch_pairs"):
        goodhart.main(replace(config, batch_pairs=12), tmp_path / "again.json")


def test_a_verdict_is_a_mean_over_completions_tokens_and_words():
    class Judge:
        def predict_proba(self, texts):
            return np.array([[1 - len(text) / 10, len(text) / 10] for text in texts])

    evaluation = {
        "step": 3,
        "reward": 0.5,
        "reward_se": 0.1,
        "kl": 2.0,
        "kl_se": 0.2,
        "texts": ["abcd", "ab"],
        "completions": ["A joy, a Joy", "qqq"],
        "lengths": [3, 1],
        "reference_logps": [-6.0, -4.0],
    }
    found = goodhart.verdict(evaluation, Judge(), {"a", "joy"})
    assert found["second"] == pytest.approx(0.3) and found["reference_logp"] == -2.5
    assert found["known"] == 4 / 5 and found["texts"] == ["abcd", "ab"]
    assert goodhart.known_words(["a a", *["a b"] * 4, "b"]) == {"a", "b"}
    assert goodhart.known_words(["b b b b b"]) == set()


def test_what_the_pages_say_of_the_true_reward_is_in_the_shipped_rows():
    rows = load_goodhart()["rows"]
    assert len({(row["beta"], row["seed"]) for row in rows}) * 2 == len(rows)

    def mean(name, beta, last=True):
        found = [row[name] for row in rows if row["beta"] == beta and bool(row["step"]) == last]
        return np.mean(found)

    # both judges approve of text that the reference and the words of the reviews disown
    for name, sign in (("reward", 1), ("second", 1), ("reference_logp", -1), ("known", -1)):
        assert sign * mean(name, 0.05) > sign * mean(name, 0.1) > sign * mean(name, 0.3)
    assert mean("kl", 0.05) > 5 * mean("kl", 0.3)
    for name, close in (("reference_logp", 0.1), ("known", 0.01)):
        assert abs(mean(name, 1.0) - mean(name, 1.0, last=False)) < close


def test_on_policy_rounds_are_tuned_and_run_and_kept(tiny, tmp_path, monkeypatch, made_up_reviews):
    few = {
        "offline": on_policy.Method(betas=(0.1, 10.0)),
        "2 rounds, judge": on_policy.Method(rounds=2, labels="judge", betas=(0.1,)),
        "best and worst": on_policy.Method(labels="extremes", betas=(0.1,), size=2),
        "2 rounds, votes": on_policy.Method(rounds=2, labels="votes", betas=(0.1,)),
        "SPIN": on_policy.Method(2, "human", 1, "moved", betas=(0.1,)),
    }
    monkeypatch.setattr(on_policy, "METHODS", few)
    task = TaskConfig(model=str(tiny), eval_prefixes=8, max_new_tokens=6, precision="float32")
    config = on_policy.OnPolicyConfig(
        completions=48,
        warmup_steps=1,
        seeds=(0,),
        task=task,
        only=tuple(few),
        out=tmp_path / "runs",
    )
    on_policy.main(config, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())

    # every method once, with the better of its betas
    assert [run["method"] for run in found["runs"]] == list(few)
    assert [(run["method"], run["beta"]) for run in found["tuning"]][:2] == [
        ("offline", 0.1),
        ("offline", 10.0),
    ]
    for run in found["runs"]:
        *_, last = run["rows"]
        human, double = run["method"] == "SPIN", run["method"] == "best and worst"
        assert last["labels"] == (0 if human else 96 if double else 48)
        assert 0 < last["sampled_tokens"] and 0 < last["trained_tokens"]
        assert [row["step"] for row in run["rows"]] == sorted(row["step"] for row in run["rows"])
    assert "out" not in found["config"] and found["commit"]

    # what is there is kept; nothing begins too late
    monkeypatch.setattr(on_policy.Run, "rows", None)
    on_policy.main(config, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["runs"] == found["runs"]
    late = replace(config, seeds=(0, 1), minutes=0.0)
    on_policy.main(late, tmp_path / "again.json")


def test_the_best_beta_is_the_one_with_most_of_the_gain_within_the_limit(tmp_path):
    config = on_policy.OnPolicyConfig(out=tmp_path)
    bench = on_policy.Bench(config)
    small, large = on_policy.METHODS["offline"].betas

    def ends(beta, kl, fraction):
        row = {"kl": kl, "fraction": [fraction, 1.0]}
        path = bench.path("offline", beta, on_policy.TUNING_SEED)
        path.write_text(json.dumps({"rows": [row]}))

    for (kl_small, kl_large), best in (((6, 3), large), ((4, 3), small), ((6, 8), small)):
        ends(small, kl_small, 0.9)
        ends(large, kl_large, 0.8)
        assert bench.best_beta("offline") == best


@pytest.mark.usefixtures("made_up_reviews")
def test_the_relatives_are_tuned_alike_and_trained_on_other_seeds(tiny, tmp_path, monkeypatch):
    task = TaskConfig(
        model=str(tiny), prefixes=8, eval_prefixes=8, max_new_tokens=6, precision="float32"
    )
    config = relatives.RelativesConfig(
        methods=("DPO", "KTO"),
        rates=(1e-3, 1e-2),
        seeds=(1, 2),
        task=task,
        tuning_prefixes=4,
        batch_pairs=12,
        samples=12,
        steps=(1, 2),
        kl=0.05,
        enough=1e6,
        out=tmp_path / "runs",
    )
    relatives.main(config, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["config"]["methods"] == ["DPO", "KTO"] and found["commit"]
    assert "out" not in found["config"]

    # four settings each, of which the one with the highest reward is trained again
    for method in ("DPO", "KTO"):
        tried = [row for row in found["tuning"] if row["method"] == method]
        settings = {(row["knob"], row["learning_rate"]) for row in tried}
        assert settings == {(knob, rate) for knob in (0.1, 0.3) for rate in (1e-3, 1e-2)}
        (best,) = [row for row in tried if row["best"]]
        assert best["reward_at_kl"] == max(row["reward_at_kl"] for row in tried)
        runs = [row for row in found["rows"] if row["method"] == method]
        assert [row["seed"] for row in runs] == [1, 2]
        for run, before in zip(runs, found["reference"]):
            assert (run["knob"], run["learning_rate"]) == (best["knob"], best["learning_rate"])
            assert [row["step"] for row in run["evaluations"]][:2] == [1, 2][
                : len(run["evaluations"])
            ]
            curve = [before, *run["evaluations"]]
            assert run["reward_at_kl"] == pytest.approx(reward_at(curve, 0.05))
    assert [row["kl"] for row in found["reference"]] == [0, 0]

    # what is there is kept; the figure says on what task
    monkeypatch.setattr(relatives.Seed, "train", None)
    relatives.main(config, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == found["rows"]
    with pytest.raises(ValueError, match="batch_pairs"):
        relatives.main(replace(config, batch_pairs=6), tmp_path / "again.json")
    figure = plot_relatives(found)
    left, right = figure.axes
    assert "film reviews" in figure.get_suptitle() and "2 seeds" in figure.get_suptitle()
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["DPO", "KTO"]
    shown = left.get_legend_handles_labels()[1]
    assert set(shown) == {"optimum", "reference", "DPO", "KTO"}
    with pytest.raises(ValueError, match="'rows'.* is empty"):
        plot_relatives({**found, "rows": []})


def test_the_reward_at_a_kl_is_read_off_between_two_evaluations():
    run = [{"kl": kl, "reward": r} for kl, r in ((0, 0.5), (2, 0.7), (4, 0.8), (3, 0.75), (6, 1))]
    assert reward_at(run, 3) == pytest.approx(0.75)
    assert reward_at(run, 5) == pytest.approx(0.75 + 0.25 * 2 / 3)
    assert reward_at(run, 0) == 0.5 and reward_at(run[:2], 9) == 0.7
    with pytest.raises(ValueError, match="evaluations is empty"):
        reward_at([], 1)


@pytest.mark.parametrize("method", [name for name in relatives.KNOBS if name != "KTO"])
def test_the_settings_of_a_relative_are_its_own(method):
    setting = relatives.Setting(method, relatives.KNOBS[method][1][0], 1e-3)
    changes, loss = relatives.method(setting)
    check_config(replace(DPOConfig(), **changes))
    knob = relatives.KNOBS[method][0]
    assert changes.get(knob, getattr(loss, knob, None)) == setting.knob


def test_what_the_pages_say_of_eight_times_the_labels_is_what_was_recorded():
    found, name = load_on_policy(), "4 rounds, 8 times the labels"
    every = [run for run in found["runs"] + found["other_betas"] if run["method"] == name]

    def ends(beta):
        lasts = [run["rows"][-1] for run in every if run["beta"] == beta]
        assert len(lasts) == 3
        low, high = np.mean([row["fraction"] for row in lasts], 0)
        return f"{low:.0%}", f"{high:.0%}", f"{np.mean([row['kl'] for row in lasts]):.1f} nats"

    page = " ".join(
        (Path(__file__).parent.parent / "docs" / "online.md").read_text(encoding="utf-8").split()
    )
    low, high, kl = ends(0.35)
    assert f"beta 0.35 go on to {low} to {high} of the gain, but at {kl}" in page
    low, _, kl = ends(0.8)
    assert f"beta 0.8 they stop at {kl} and {low}" in page


def test_the_recorded_on_policy_runs_hold_together():
    found, sweep = load_on_policy(), load_sweep()
    assert {run["method"] for run in found["runs"]} <= set(found["methods"])
    for run in found["runs"]:
        method, rows = found["methods"][run["method"]], run["rows"]
        labels = [row["labels"] for row in rows]
        assert labels == sorted(labels)
        human, size = method["labels"] == "human", method["size"]
        assert labels[-1] == (0 if human else size * found["config"]["completions"])
        for row in rows:
            bounds = sweep.fraction_bounds(row["reward"], row["kl"])
            assert row["fraction"] == pytest.approx(bounds)

        # the beta is the one that the tuning runs chose
        tuned = method["tuned_as"] or run["method"]
        ends = {t["beta"]: t["rows"][-1] for t in found["tuning"] if t["method"] == tuned}
        within = {b: r["fraction"][0] for b, r in ends.items() if r["kl"] <= found["within"]}
        if within and len(method["betas"]) > 1:
            assert run["beta"] == max(within, key=within.get)


@pytest.mark.usefixtures("made_up_reviews")
def test_pairs_of_a_prompt_are_fitted_together_and_shuffled(tiny, tmp_path):
    task = TaskConfig(
        model=str(tiny), completions=3, eval_prefixes=8, max_new_tokens=6, precision="float32"
    )
    config = batch_element.BatchElementConfig(
        seeds=(0,),
        learning_rates=(1e-2,),
        prompts=10,
        held_out=3,
        batch_pairs=6,
        task=task,
        out=tmp_path / "runs",
    )
    batch_element.main(config, tmp_path / "batch_element.json")
    found = json.loads((tmp_path / "batch_element.json").read_text())
    together, shuffled = found["rows"]
    assert not together["shuffled"] and shuffled["shuffled"]
    assert together["steps"] >= 3 and together["trained_loss"] != shuffled["trained_loss"]
    for row in found["rows"]:
        assert 0 < row["unseen_loss"] < 10 and 0 <= row["trained_accuracy"] <= 1
