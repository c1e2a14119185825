"""A small sweep of runs: every method runs, finished runs are kept, and the table has them all."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_classifier

from dpo_lab import cli
from dpo_lab.cli import main
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.loop import LoopConfig
from dpo_lab.models import load_model
from dpo_lab.plots import plot_sweep
from dpo_lab.rlhf.ppo import PPOConfig
from dpo_lab.rlhf.reward_model import RewardModelConfig
from dpo_lab.sentiment import sweep as frontier
from dpo_lab.sentiment.results import (
    COLUMNS,
    REPEATS,
    Run,
    SweepResults,
    load_sweep,
    paper_runs,
    repeats,
)
from dpo_lab.sentiment.sweep import FrontierConfig
from dpo_lab.sentiment.task import Task, TaskConfig
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.widgets.explorers import frontier_explorer

METHODS = ("dpo", "ppo", "ppo-gt", "unlikelihood", "preferred-ft")
pytestmark = pytest.mark.usefixtures("made_up_reviews")
RUNS = [
    Run("dpo", 0.1, 0),
    Run("ppo", 3.0, 0),
    Run("ppo-gt", 3.0, 0),
    Run("unlikelihood", 0.5, 0),
    Run("preferred-ft", 0.0, 1),
]


def config(tiny):
    loop = LoopConfig(eval_every=3, warmup_steps=1)
    return FrontierConfig(
        task=TaskConfig(
            model=str(tiny), prefixes=12, eval_prefixes=8, max_new_tokens=6, precision="float32"
        ),
        loop=loop,
        ppo=PPOConfig(steps=2, batch=8, minibatch=8, epochs=1, eval_every=1),
        reward_model=RewardModelConfig(batch_pairs=12, loop=loop),
        samples=16,
        jobs=1,
    )


def test_the_paper_s_sweep_has_22_runs():
    runs = paper_runs()
    assert len(runs) == len({run.name for run in runs}) == 22
    by_method = {
        method: [run.setting for run in runs if run.method == method]
        for method in {run.method for run in runs}
    }
    assert by_method["dpo"] == [0.05, 0.1, 1, 5] and by_method["unlikelihood"] == [
        0.05,
        0.1,
        0.5,
        1,
    ]
    assert (
        by_method["ppo"] == by_method["ppo-gt"] == [3, 6, 9, 12]
        and len(by_method["preferred-ft"]) == 6
    )


def test_two_settings_never_share_a_directory():
    names = [Run("dpo", setting, 0).name for setting in (0.1, 0.1 + 1e-9, 0.1 + 2e-9, 1.0, 5e-7)]
    assert len(set(names)) == 5 and names[0] == "dpo-0.1-seed0" and names[3] == "dpo-1-seed0"


def test_a_repeat_is_one_setting_of_a_method_in_three_seeds():
    assert repeats("unlikelihood") == [Run("unlikelihood", 0.5, seed) for seed in (0, 1, 2)]
    runs = repeats("dpo", "ppo", "ppo-gt")
    assert len(runs) == len({run.name for run in runs}) == 9 and [
        run.seed for run in runs
    ] == sorted(run.seed for run in runs)


def test_every_contender_is_evaluated_and_a_finished_one_is_kept(tiny, tmp_path, monkeypatch):
    rows = frontier.frontier(config(tiny), tmp_path, runs=RUNS[:2])
    assert {row["method"] for row in rows} == {"dpo", "ppo", "sft", "best-of-n"}
    assert isinstance(load_sweep(tmp_path).seconds, int)  # one call made it all
    ran, original = [], frontier.train_run
    monkeypatch.setattr(
        frontier, "train_run", lambda run, *rest: ran.append(run) or original(run, *rest)
    )
    rows = frontier.frontier(config(tiny), tmp_path, runs=RUNS)
    assert ran == RUNS[2:]
    # what else has finished there stays in the table
    assert frontier.frontier(config(tiny), tmp_path, runs=RUNS[:1]) == rows
    with open(tmp_path / "frontier.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and tuple(table[0]) == COLUMNS
    shipped = json.loads((tmp_path / "frontier.json").read_text())
    assert (
        shipped["commit"]
        and shipped["config"]["samples"] == 16
        and len(shipped["optimal"]["kl"]) == 100
    )
    assert all(len(shipped["runs"][run.name]["samples"]) == 8 for run in RUNS)
    sweep = load_sweep(tmp_path)
    assert sweep.seconds is None  # two calls
    assert (
        sweep.rows == rows
        and set(sweep.runs()) >= set(RUNS)
        and sweep.provenance["commit"] == shipped["commit"]
    )
    assert sweep.before == next(row["reward"] for row in rows if row["method"] == "sft")
    assert {name: len(scores) for name, scores in sweep.scores.items()} == {
        RUNS[1].name: 2,
        RUNS[2].name: 2,
    }
    for best in sweep.summary(at_most=1e9):
        assert best["reward"] == max(
            row["reward"] for row in rows if row["method"] == best["method"]
        )
    assert all(best["kl"] <= 0 for best in sweep.summary(at_most=0))
    assert sweep.spread() == []
    double = replace(
        sweep,
        rows=rows
        + [
            {**row, "seed": 9, "reward": row["reward"] + 0.2}
            for row in rows
            if row["method"] == "dpo"
        ],
        peak_memory_mb=sweep.peak_memory_mb | {"dpo-0.1-seed9": 10**6},
    )
    (dpo,) = double.spread()
    assert dpo["peak_memory_mb"] == 10**6 > max(sweep.peak_memory_mb.values()) > 100
    assert (dpo["name"], dpo["seeds"]) == ("DPO, beta 0.1", 2)
    last = sweep.runs()[RUNS[0]][-1]
    assert dpo["reward"] == pytest.approx(last["reward"] + 0.1) and dpo[
        "reward_sd"
    ] == pytest.approx(0.2 / 2**0.5)
    assert dpo["least_gain"] == pytest.approx(last["reward"] - sweep.before)
    explorer = frontier_explorer(sweep)
    for label, run in explorer.sliders["run"].options:
        last = sweep.runs()[run][-1]
        assert (
            label == run.label
            and f"reward {last['reward']:.2f} at {last['kl']:.1f} nats" in explorer.show(run=run)
        )
        path = explorer.picture.artists[0]
        assert list(path.get_xdata()) == [row["kl"] for row in sweep.runs()[run]]
        assert list(path.get_ydata()) == [row["reward"] for row in sweep.runs()[run]]
    by_method = sweep.by_method()
    assert sum(map(len, by_method.values())) == len(rows) and len(by_method) == 7
    axes = plot_sweep(by_method, sweep.optimal, sweep.band).axes[0]
    assert set(by_method) < {text.get_text() for text in axes.get_legend().get_texts()}
    for run in RUNS:
        mine = [row for row in rows if (row["method"], row["seed"]) == (run.method, run.seed)]
        assert (
            len(mine) >= 2 and mine[0]["step"] == 0 and mine[0]["kl"] == pytest.approx(0, abs=1e-4)
        )
        assert all(0 <= row["reward"] <= 1 and row["seconds"] >= 0 for row in mine)
        assert mine[-1]["kl"] != mine[0]["kl"]
    assert (
        len(
            {
                (row["reward"], row["reward_se"])
                for row in rows
                if row["step"] == 0 and row["method"] in METHODS
            }
        )
        == 1
    )
    tokens = [row["tokens"] for row in rows if row["method"] == "ppo-gt"]
    assert tokens[0] > 0 and tokens[1] - tokens[0] <= 8 * 6 and tokens == sorted(tokens)
    monkeypatch.setattr(Task, "load", lambda task: pytest.fail("everything has run already"))
    finished = tmp_path / RUNS[1].name / "rows.json"
    finished.write_text(json.dumps({**json.loads(finished.read_text()), "commit": "0123456789ab"}))
    assert frontier.frontier(config(tiny), tmp_path, runs=RUNS) == rows
    assert load_sweep(tmp_path).provenance["commit"] == f"{shipped['commit']}, 0123456789ab"


def test_a_sweep_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="frontier.csv.*dpo-lab frontier"):
        load_sweep(tmp_path)


def test_best_of_n_grows_with_n_and_one_is_the_reference(tiny, tmp_path):
    found = frontier.baselines(Task.open(config(tiny).task, tmp_path / "data"), k=16)
    rows, optimal = found["rows"], found["optimal"]
    assert [(row["method"], row["setting"]) for row in rows] == [("sft", 1)] + [
        ("best-of-n", n) for n in (2, 4, 8, 16)
    ]
    rewards = [row["reward"] for row in rows]
    assert (
        rewards == sorted(rewards)
        and rows[0]["kl"] == 0
        and rows[1]["kl"] == pytest.approx(np.log(2) - 0.5)
    )
    assert min(optimal["reward"]) == pytest.approx(rows[0]["reward"], abs=1e-2) and max(
        optimal["kl"]
    ) <= np.log(16)
    inside = [(low, high) for low, high in zip(optimal["low"], optimal["high"]) if low is not None]
    assert inside and all(low <= high for low, high in inside)


def test_runs_side_by_side_find_what_they_find_alone(tiny, tmp_path, monkeypatch):
    """The baselines and a run, each in a process of its own at the same time."""
    monkeypatch.undo()  # a process of its own reads the real reviews
    make_classifier(judge := tmp_path / "judge", ["POSITIVE", "NEGATIVE"])
    small = replace(config(tiny), task=replace(config(tiny).task, reward=str(judge)))
    threads = torch.get_num_threads()
    try:
        # as in each process: sums in another order end in other samples
        torch.set_num_threads(1)
        alone = frontier.frontier(small, tmp_path / "alone", runs=RUNS[2:3])
    finally:
        torch.set_num_threads(threads)
    together = frontier.frontier(replace(small, jobs=2), tmp_path / "together", runs=RUNS[2:3])
    for one, other in zip(alone, together, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in other.items() if k != "seconds"}
        )


def test_another_task_in_the_same_directory_is_refused(tiny, tmp_path):
    frontier.frontier(config(tiny), tmp_path, runs=RUNS[:1])
    for changed in (
        replace(config(tiny), ppo=PPOConfig(steps=9)),
        replace(config(tiny), loop=LoopConfig(learning_rate=1.0)),
    ):
        with pytest.raises(ValueError, match="another config"):
            frontier.frontier(changed, tmp_path, runs=RUNS[:1])


def test_the_command_takes_every_part_of_the_config(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        cli,
        "repeats",
        lambda *methods: RUNS[4:] if methods == ("dpo", "ppo") else pytest.fail(str(methods)),
    )
    options = (
        f"--task.model {tiny} --task.prefixes 12 --task.eval-prefixes 8 --task.max-new-tokens 6 "
        "--loop.eval-every 5 --jobs 1"
    )
    assert (
        main(
            [
                "frontier",
                "--out",
                str(tmp_path / "sweep"),
                *options.split(),
                "--task.precision",
                "float32",
                *"--repeat dpo ppo".split(),
            ]
        )
        == 0
    )
    assert f"evaluations in {tmp_path / 'sweep' / 'frontier.csv'}" in capsys.readouterr().out
    assert set(load_sweep(tmp_path / "sweep").samples) == {run.name for run in RUNS[4:]}
    settings = json.loads((tmp_path / "sweep" / "config.json").read_text())
    assert settings["loop"]["eval_every"] == 5 and settings["task"]["prefixes"] == 12


def test_a_fraction_has_two_ends_past_the_estimate_s_end():
    optimal = OptimalFrontier(
        np.array([0.5, 0.8, 0.9]), np.array([0.0, 1.0, 2.0]), np.array([64.0, 20.0, 9.0])
    )
    sweep = SweepResults(
        [{"method": "sft", "reward": 0.5}], optimal, np.empty((3, 0)), {}, {}, {}, {}, None
    )
    assert sweep.fraction_bounds(0.65, 1.0) == pytest.approx((0.5, 0.5))
    assert sweep.fraction_bounds(0.85, 2.5) == pytest.approx((0.35 / 0.45, 0.35 / 0.4))
    assert sweep.fraction_bounds(0.85, 9.0) == pytest.approx((0.35 / 0.5, 0.35 / 0.4))


def test_shipped_repeats_all_improve_and_dpo_and_ppo_gt_have_85_percent_of_the_gain_within_5_nats():
    rows = {row["name"]: row for folder in REPEATS for row in load_sweep(folder).spread()}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "DPO, beta 0.37": 3,
        "PPO, learned reward, target KL 4.8": 3,
        "PPO, true reward, target KL 4.8": 5,
        "PPO, true reward, target KL 5.1": 3,
        "unlikelihood, alpha 0.5": 3,
        "Preferred-FT": 3,
    }
    for name in ("DPO, beta 0.37", "PPO, true reward, target KL 5.1"):
        assert rows[name]["fraction"][0] >= 0.85 and rows[name]["kl"] <= 5
    assert all(
        row["least_gain"] > (0.2 if name.startswith(("DPO", "PPO")) else 0.05)
        for name, row in rows.items()
    )
    assert all(samples for folder in REPEATS for samples in load_sweep(folder).samples.values())


def test_after_sft_every_contender_starts_from_the_tuned_reference(tiny, tmp_path, monkeypatch):
    tuned = replace(
        config(tiny), task=replace(config(tiny).task, sft_epochs=1, sft_learning_rate=1e-2)
    )
    seen, evaluation = [], Task.evaluate

    def spy(task, policy):
        seen.append((weights_hash(policy), weights_hash(task.reference)))
        return evaluation(task, policy)

    monkeypatch.setattr(Task, "evaluate", spy)
    frontier.frontier(tuned, tmp_path, runs=[RUNS[2]])
    expected = weights_hash(load_model(str(tmp_path / "data" / "sft" / "model")))
    assert expected != weights_hash(load_model(str(tiny))) and seen[0] == (expected, expected)
    assert {reference for _, reference in seen} == {expected} and seen[-1][0] != expected
