"""Win rates over temperature: what is asked, how the benchmark records it, and how it is shown."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import win_rates  # noqa: E402

from dpo_lab.loop import LoopConfig  # noqa: E402
from dpo_lab.plots.judges import plot_prompts, plot_win_rates  # noqa: E402
from dpo_lab.rlhf.ppo import PPOConfig  # noqa: E402
from dpo_lab.rlhf.reward_model import RewardModelConfig  # noqa: E402
from dpo_lab.sentiment import reviews  # noqa: E402
from dpo_lab.sentiment.results import load_win_rates  # noqa: E402
from dpo_lab.sentiment.reviews import load_rotten_tomatoes, sample_continuations  # noqa: E402
from dpo_lab.sentiment.task import TaskConfig  # noqa: E402
from dpo_lab.train import DPOConfig  # noqa: E402
from dpo_lab.widgets.win_rates import prompts_explorer, prompts_state  # noqa: E402

ROWS = [
    {"method": method, "temperature": t, "rate": rate, "low": rate - 0.1, "high": rate + 0.1}
    for method, rates in {"SFT": (0.4, 0.5), "DPO": (0.9, 0.7)}.items()
    for t, rate in zip((0.0, 1.0), rates)
]


@pytest.fixture
def sentences(tmp_path, monkeypatch):
    """Made-up sentences in the place of Rotten Tomatoes."""
    table = tmp_path / "reviews.csv"
    line = "rotten_tomatoes,{},{} of number {} and then the film goes on and on and on"
    lines = [line.format(i % 2, ["a bore", "a joy"][i % 2], i) for i in range(80)]
    table.write_text("\n".join(["source,label,text", "imdb,1,not asked", *lines]))
    monkeypatch.setattr(reviews, "reviews_csv", lambda: table)
    monkeypatch.setattr(reviews, "HELD_OUT_SENTENCES", 20)
    return table


# what is asked


def test_a_beginning_and_its_continuation_are_one_review(tokenizer):
    texts = [f"film {i} is a joy from the first scene to the last, and then some" for i in range(9)]
    prompts, continuations = sample_continuations(texts, tokenizer, 9, seed=1, max_new_tokens=12)
    for prompt, continuation in zip(prompts, continuations):
        assert prompt[0] == tokenizer.bos_token_id and 2 <= len(prompt) - 1 <= 8
        assert 8 <= len(continuation) <= 12
    whole = tokenizer.batch_decode([p[1:] + c for p, c in zip(prompts, continuations)])
    assert len({text[:6] for text in whole}) == 9
    assert all(any(text.startswith(part) for text in texts) for part in whole)
    again = sample_continuations(texts, tokenizer, 4, seed=1, max_new_tokens=12)
    assert again == (prompts[:4], continuations[:4])


def test_reviews_that_are_too_short_are_counted(tokenizer):
    texts = ["short", "a film that goes on and on and on and on and on and on and on and on, alas"]
    assert len(sample_continuations(texts, tokenizer, 1, seed=0)[0]) == 1
    with pytest.raises(ValueError, match="n is 2, and 1 of the 2 reviews"):
        sample_continuations(texts, tokenizer, 2, seed=0)


def test_sentences_are_split_and_none_is_on_both_sides(sentences):
    found = load_rotten_tomatoes()
    assert (len(found["train"]), len(found["test"])) == (60, 20)
    assert not set(found["train"]["text"][:]) & set(found["test"]["text"][:])
    for part in found.values():
        for text, label in zip(part["text"][:], part["label"][:]):
            assert label == text.startswith("a joy")


# the benchmark


@pytest.mark.usefixtures("made_up_reviews")
def test_a_small_run_has_every_method_temperature_and_judge(tiny, tmp_path, sentences, monkeypatch):
    task = TaskConfig(
        model=str(tiny), prefixes=8, eval_prefixes=8, max_new_tokens=6, precision="float32"
    )
    loop = LoopConfig(learning_rate=1e-3, warmup_steps=0, eval_every=10_000)
    config = win_rates.WinRatesConfig(
        seeds=(0, 1),
        temperatures=(0.0, 1.0),
        prompts=6,
        best_of=2,
        task=task,
        dpo=DPOConfig(beta=0.3, batch_pairs=24, loop=loop),
        reward_model=RewardModelConfig(batch_pairs=24, loop=loop),
        ppo=PPOConfig(steps=1, batch=4, minibatch=2),
        out=tmp_path / "runs",
    )
    win_rates.main(config, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())

    # a row for each, whose rate is the mean of its seeds
    rows = found["rows"]
    asked = [(row["source"], row["method"], row["temperature"], row["judge"]) for row in rows]
    assert len(set(asked)) == len(rows) == 3 * 2 * (4 + 3)
    for row in rows:
        assert row["low"] <= row["rate"] <= row["high"]
        assert row["rate"] == pytest.approx(np.mean(row["seeds"])) and len(row["seeds"]) == 2

    # at temperature 0 best of N has nothing to choose from
    greedy = {
        (row["method"], row["judge"]): row["seeds"]
        for row in rows
        if row["source"] == "imdb" and not row["temperature"]
    }
    for judge in ("classifier", "second", "biased"):
        assert greedy["sft", judge] == greedy["best-of-n", judge]
    assert "out" not in found["config"] and found["commit"]

    # paired differences are differences of the rates
    rate = dict(zip(asked, (row["rate"] for row in rows)))
    for row in found["differences"]:
        where = row["temperature"], row["judge"]
        gap = rate[row["source"], "dpo", *where] - rate[row["source"], "ppo", *where]
        assert row["difference"] == pytest.approx(gap)

    # what is there is kept, unless something else is asked for
    monkeypatch.setattr(win_rates.Seed, "answers", None)
    win_rates.main(config, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == rows
    with pytest.raises(ValueError, match="best_of"):
        win_rates.main(replace(config, best_of=3), tmp_path / "again.json")


def test_repeated_words_are_counted():
    assert win_rates.distinct(["a b c d"]) == 1
    assert win_rates.distinct(["a b a b a b"]) == 2 / 4
    assert win_rates.distinct(["a b c d", "A b, a b a b"]) == 0.75
    assert win_rates.distinct(["too short", ""]) == 1


# how it is shown


def test_every_method_has_its_curve_in_every_panel():
    seeds = [{**row, "seeds": [row["rate"] - 0.02, row["rate"] + 0.02]} for row in ROWS]
    figure = plot_win_rates({"true $reward$": ROWS, "second": seeds[:2]})
    first, second = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SFT", "DPO"]
    assert len(first.containers) == 2 and len(second.containers) == 1
    for container, rates in zip(first.containers, ((0.4, 0.5), (0.9, 0.7))):
        line, _, (bars,) = container
        assert line.get_ydata() == pytest.approx(rates)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        assert ends == pytest.approx(np.add.outer(rates, (-0.1, 0.1)))
    dots = [line for line in second.get_lines() if len(line.get_xdata()) == 2]
    assert {0.38, 0.42} <= {round(float(y), 2) for line in dots for y in line.get_ydata()}


@pytest.mark.parametrize("panels, words", [({}, "panels is empty"), ({"a": []}, r"panels\['a'\]")])
def test_a_figure_without_rows_is_refused(panels, words):
    with pytest.raises(ValueError, match=words):
        plot_win_rates(panels)


def test_the_interval_and_the_power_stand_over_the_prompts():
    figure = plot_prompts(0.6, [10, 100], [(0.3, 0.8), (0.5, 0.69)], [0.1, 0.5], marked=100)
    top, bottom = figure.axes
    assert list(top.get_lines()[0].get_ydata()) == [0.6, 0.6]
    assert list(bottom.get_lines()[0].get_ydata()) == [0.1, 0.5]


def test_the_state_of_a_number_of_prompts_is_wilsons_interval_and_the_binomial_power():
    # solved by hand: |rate - p| = z sqrt(p (1 - p) / n) at both ends
    state, z = prompts_state(200, 0.55), 1.959963984540054
    for end in ("low", "high"):
        p = state[end]
        assert abs(0.55 - p) == pytest.approx(z * (p * (1 - p) / 200) ** 0.5)
    rng = np.random.default_rng(0)
    wins = rng.binomial(200, 0.55, 200_000) / 200
    excluded = np.abs(wins - 0.5) > z * (0.25 / 200) ** 0.5
    assert state["power"] == pytest.approx(excluded.mean(), abs=0.005)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n": 7}, "n is 7"),
        ({"n": 2, "prompts": [3, 2]}, "ascending"),
        ({"n": 0, "prompts": [0, 2]}, "positive"),
        ({"rate": 0.9}, "rate is 0.9"),
    ],
)
def test_an_explorer_that_cannot_begin_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        prompts_explorer(**change)


# what is shipped


def test_the_shipped_curves_have_four_methods_five_temperatures_and_three_seeds():
    found = load_win_rates()
    for source, methods in {"imdb": 4, "rotten_tomatoes": 3}.items():
        for judge in ("classifier", "second", "biased"):
            rows = [r for r in found["rows"] if (r["source"], r["judge"]) == (source, judge)]
            assert len(rows) == methods * 5 and all(len(row["seeds"]) == 3 for row in rows)
            assert {row["temperature"] for row in rows} == {0, 0.25, 0.5, 0.75, 1}
    assert not found["commit"].endswith("-dirty")
