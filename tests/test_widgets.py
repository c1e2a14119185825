"""Explorers over their whole grids: every state is right, every picture drawn, no error hidden."""

import base64
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ipywidgets import Button
from PIL import Image
from recording import record_run

from dpo_lab.engine.runs import append_metrics, write_json
from dpo_lab.losses import dpo_loss
from dpo_lab.theory.bradley_terry import fit_bradley_terry
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.theory.objective import kl, log_partition, optimal_policy
from dpo_lab.widgets.explorers import (
    BETAS,
    bandit_explorer,
    beta_explorer,
    beta_slider,
    betas_explorer,
    bradley_terry_explorer,
    gae_explorer,
    gradient_weight_explorer,
    live_curves,
    training_explorer,
)
from dpo_lab.widgets.failures import failures_explorer
from dpo_lab.widgets.on_policy import rounds_explorer
from dpo_lab.widgets.states import (
    CHOSEN_FILMS,
    LABELS,
    REFERENCE,
    REJECTED_FILMS,
    REWARD,
    bandit_state,
    beta_state,
    bradley_terry_state,
    gae_state,
    gradient_weight_state,
)
from dpo_lab.widgets.tax import tax_explorer
from dpo_lab.widgets.win_rates import prompts_explorer

RUN = Path(tempfile.mkdtemp()) / "run"
TAX = [
    {"coefficient": c, "reward": 0.8, "kl": 3.0, "changes": {"reviews": 0.1 - c, "license": 60 * c}}
    for c in (0, 0.5, 2)
]
OPTIMAL = OptimalFrontier(np.array([0.5, 0.9]), np.array([0.0, 3.0]), np.array([64.0, 20.0]))
TOKENS = [" a", "<b>", "$x$", "\n"]
TOKEN_REWARDS, TOKEN_VALUES = [-0.1, 0.2, 0.0, 1.5], [0.3, 0.1, -0.4, 0.8]
EXPLORERS = {
    "beta": beta_explorer,
    "bandit": bandit_explorer,
    "gradient weight": gradient_weight_explorer,
    "Bradley-Terry": bradley_terry_explorer,
    "training": lambda: training_explorer(RUN),
    "betas": lambda: betas_explorer({0.1: RUN, 5.0: RUN}, OPTIMAL),
    "GAE": lambda: gae_explorer(TOKENS, TOKEN_REWARDS, TOKEN_VALUES),
    "prompts": prompts_explorer,
    "rounds": lambda: rounds_explorer(labels=12, rounds=(1, 2, 4), seeds=2),
    "failures": failures_explorer,
    "tax": lambda: tax_explorer(TAX),
}


@pytest.fixture(scope="module", autouse=True)
def recorded_run():
    record_run(RUN)
    yield
    shutil.rmtree(RUN.parent)


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.picture.png())).convert("RGB"))


def bar(explorer):
    """The row of the reset button and the readout."""
    rows = [w.children for w in explorer.box.children if hasattr(w, "children")]
    return next(row for row in rows if isinstance(row[0], Button))


def values(explorer):
    return {name: slider.value for name, slider in explorer.sliders.items()}


def grid(slider):
    if hasattr(slider, "options"):
        return [value for _, value in slider.options]
    lowest, highest = slider.min, slider.max
    steps = np.arange(lowest, highest + slider.step / 2, slider.step)
    return [float(slider.base**s if hasattr(slider, "base") else s) for s in steps]


def last(slider):
    """A value far from where the slider starts."""
    return grid(slider)[-1]


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_slider_shows_every_value_of_its_grid(name):
    explorer = EXPLORERS[name]()
    start = values(explorer)
    for slider in explorer.sliders:
        for value in grid(explorer.sliders[slider]):
            readout = explorer.show(**{**start, slider: value})
            assert "nan" not in readout and "inf" not in readout and readout
            assert explorer.picture.png().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_moved_slider_changes_the_picture_and_reset_puts_it_back(name):
    explorer = EXPLORERS[name]()
    box = explorer.box.children
    image = next(w for w in box if hasattr(w, "format"))
    reset, readout = bar(explorer)
    before = image.value, readout.value
    slider = next(iter(explorer.sliders.values()))
    slider.value = last(slider)
    assert image.value != before[0] and readout.value != before[1]
    assert image.value == explorer.picture.png()
    reset.click()
    assert (image.value, readout.value) == before


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_picture_drawn_over_its_background_is_the_picture_drawn_anew(name):
    explorer = EXPLORERS[name]()
    name, slider = next(iter(explorer.sliders.items()))
    explorer.show(**{**values(explorer), name: grid(slider)[len(grid(slider)) // 2]})
    shown = pixels(explorer).astype(int)
    quick = np.asarray(explorer.picture.canvas.buffer_rgba())[..., :3].astype(int)
    # an octree of 256 colors, eight levels of each primary in a leaf
    assert np.abs(shown - quick).max() <= 16
    for artist in explorer.picture.artists:
        artist.set_animated(False)
    explorer.picture.canvas.draw()
    whole = np.asarray(explorer.picture.canvas.buffer_rgba())[..., :3]
    # grid and frame order
    assert quick.shape == whole.shape and (np.abs(quick - whole).max(-1) > 60).mean() < 0.002
    assert (shown[quick.min(-1) == 255] == 255).all()


def test_every_control_has_a_name_for_a_screen_reader():
    for make in EXPLORERS.values():
        explorer = make()
        assert all(slider.description for slider in explorer.sliders.values())
        reset = bar(explorer)[0]
        assert reset.description and reset.tooltip


@pytest.mark.parametrize("beta", BETAS[::8])
def test_the_state_of_beta_is_that_of_the_objective(beta):
    state = beta_state(float(beta))
    best = optimal_policy(REFERENCE, REWARD, float(beta))
    assert torch.equal(state["policy"], best) and state["kl"] == float(kl(best, REFERENCE))
    assert state["reward"] == pytest.approx(float(best @ REWARD)) and state["log_z"] == float(
        log_partition(REFERENCE, REWARD, beta)
    )


def test_the_bars_stand_as_high_as_the_probabilities():
    explorer = beta_explorer()
    explorer.show(beta=0.5)
    heights = [artist.get_height() for artist in explorer.picture.artists[:4]]
    assert heights == optimal_policy(REFERENCE, REWARD, 0.5).tolist()


def test_the_reference_is_what_the_weights_sum_to():
    state = bandit_state(1.0, [0.0, 0.0], [3.0, 1.0])
    assert state["reference"].tolist() == [0.75, 0.25] and state[
        "policy"
    ].tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "robust"])
def test_pairs_are_weighed_as_the_loss_weighs_them(kind):
    log_ratios = torch.tensor([-3.0, 0.0, 5.0], dtype=torch.float64)
    state = gradient_weight_state(0.3, log_ratios, kind)
    for i, ratio in enumerate(log_ratios):
        logps = torch.stack([ratio, torch.zeros_like(ratio)])
        alone = dpo_loss(
            logps,
            torch.zeros(2, dtype=torch.float64),
            torch.tensor([0]),
            torch.tensor([1]),
            0.3,
            loss_type=kind,
        )
        assert (
            state["weights"][i] == alone.gradient_weights.item()
            and state["losses"][i] == alone.losses.item()
        )


def test_your_own_distribution_and_pairs_can_be_explored():
    three = beta_explorer(
        torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.0, 1.0, 0.0]), ["a", "b", "c"]
    )
    assert "KL" in three.show(beta=1.0) and len(LABELS) == 4
    assert "ranked correctly 50%" in gradient_weight_explorer([-1.0, 1.0]).show(beta=1.0)


@pytest.mark.parametrize("wrong", [[], [float("nan")], [[1.0]]])
def test_pairs_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="log_ratios has shape"):
        gradient_weight_explorer(wrong)


def test_the_likelihood_under_the_sliders_is_that_of_every_comparison():
    rewards, chosen, rejected = (
        [0.3, -1.0, 2.0],
        np.array([2, 2, 0, 1, 2]),
        np.array([0, 1, 1, 2, 0]),
    )
    state = bradley_terry_state(rewards, chosen, rejected)
    chances = [1 / (1 + np.exp(rewards[r] - rewards[c])) for c, r in zip(chosen, rejected)]
    assert state["nll"] == pytest.approx(-np.mean(np.log(chances)))
    assert state["observed"] == [1.0, 0.0, 0.5]  # 0 against 1, 0 against 2, 1 against 2
    assert state["predicted"] == pytest.approx(
        [1 / (1 + np.exp(b - a)) for a, b in ((0.3, -1), (0.3, 2), (-1, 2))]
    )


def test_the_likeliest_rewards_reach_the_least_that_the_readout_tells():
    fit = fit_bradley_terry(CHOSEN_FILMS, REJECTED_FILMS, 3)
    readout = bradley_terry_explorer().show(**{f"reward_{i}": r for i, r in enumerate(fit.rewards)})
    assert readout.split()[2] == readout.split()[-1] == f"{fit.nll:.4f}"
    with pytest.raises(ValueError, match="fall into 2 groups"):
        bradley_terry_explorer([0, 0], [1, 1], ["a", "b"])


def test_a_recorded_run_is_walked_through():
    explorer = training_explorer(RUN)
    readout = explorer.show(snapshot=1)
    assert readout == "step 4: mean margin 2.000 (beta x nats), ranked correctly 50%"
    assert explorer.show(snapshot=0).endswith("ranked correctly 50%")
    samples = next(w for w in explorer.box.children if "<table>" in str(getattr(w, "value", "")))
    assert "A &lt;b&gt;film&lt;/b&gt;" in samples.value and "0.25" in samples.value
    chosen, rejected = explorer.picture.artists[0].axes.get_lines()[:2]
    # rewards / beta
    assert chosen.get_ydata().tolist() == [1, 2, 3, 4]
    assert rejected.get_ydata().tolist() == [-2, -4, -6, -8]


def test_what_is_found_in_a_run_stands_below_it(tmp_path):
    run = tmp_path / "<b>run</b>"
    record_run(run)
    shown = training_explorer(run).box.children[-2].value
    assert "diagnosis: none" in shown and "&lt;b&gt;run" in shown and "<b>" not in shown

    # five steps with a beta that is tiny
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
    for step in range(1, 6):
        append_metrics(run, {"step": step, **dict.fromkeys(names, 0.0)})
    write_json(run / "training.json", {"config": {"beta": 1e-4, "loss_type": "sigmoid"}})
    shown = training_explorer(run).box.children[-2].value
    assert "beta is 0.0001" in shown and "Raise beta" in shown and "<td>error</td>" in shown


def test_the_pairs_of_a_run_are_those_at_its_end(tmp_path):
    assert "ranked correctly 50%" in gradient_weight_explorer(run=RUN).show(beta=1.0)
    margins = gradient_weight_explorer(run=RUN).picture.artists[0]
    assert margins.get_xdata().tolist() == pytest.approx([1.0, -0.2])  # beta starts at 0.1
    with pytest.raises(ValueError, match="both given"):
        gradient_weight_explorer([1.0], run=RUN)
    with pytest.raises(ValueError, match="holds no snapshots.jsonl"):
        gradient_weight_explorer(run=tmp_path)


def test_a_page_without_a_kernel_shows_the_picture():
    explorer = beta_explorer()
    shown = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert base64.b64decode(shown["image/png"]) == explorer.picture.png()


def test_a_moved_slider_is_not_told_its_own_value(monkeypatch):
    """Its echo would stand in the queue before the picture."""
    slider, sent = beta_slider(), []
    monkeypatch.setattr(
        slider, "_send", lambda message, buffers=None: sent.append(message["method"])
    )
    slider.set_state({"value": 2.0})
    assert slider.value == 2.0 and "echo_update" not in sent


def test_the_betas_explorer_shows_each_run_as_its_beta_weighs_it():
    explorer = betas_explorer({5.0: RUN, 0.1: RUN}, OPTIMAL)
    path, last, cloud, curve = explorer.picture.artists
    for beta in (0.1, 5.0):
        says = explorer.show(beta)
        margins = beta * np.array([10.0, -2.0])
        assert list(path.get_xdata()) == [0.0, 2.5] and list(last.get_ydata()) == [0.75]
        assert cloud.get_ydata() == pytest.approx(1 / (1 + np.exp(margins)))
        assert cloud.get_xdata() == pytest.approx(margins)
        assert np.interp(margins, *curve.get_data()) == pytest.approx(cloud.get_ydata())
        assert "reward 0.750 at 2.50 nats" in says and f"mean margin {margins.mean():.2f}" in says
    with pytest.raises(ValueError, match="runs is empty"):
        betas_explorer({}, OPTIMAL)


def test_live_curves_follow_the_run_s_metrics(tmp_path):
    curves = live_curves(tmp_path, 4)
    before = curves.image.value
    append_metrics(tmp_path, {"step": 0, "eval/reward": 0.5})
    for step, loss in ((1, 0.7), (2, 0.4)):
        append_metrics(tmp_path, {"step": step, "loss": loss, "rewards/margins": 0.25})
    assert curves(None, 2) == {}
    loss, margin = curves.picture.artists
    assert list(loss.get_xydata()[0]) == [1, 0.7] and list(margin.get_xydata()[0]) == [1, 0.25]
    assert curves.image.value != before


@pytest.mark.parametrize("lam", [0.0, 0.35, 1.0])
def test_the_advantages_under_the_slider_are_discounted_sums_of_surprises(lam):
    following = [*TOKEN_VALUES[1:], 0.0]
    surprises = [r + after - v for r, after, v in zip(TOKEN_REWARDS, following, TOKEN_VALUES)]
    expected = [sum(lam**k * d for k, d in enumerate(surprises[t:])) for t in range(4)]
    state = gae_state(lam, TOKEN_REWARDS, TOKEN_VALUES)
    assert state["advantages"] == pytest.approx(expected)
    assert state["surprises"] == pytest.approx(surprises)
    assert state["returns"] == pytest.approx(np.add(expected, TOKEN_VALUES))

    explorer = gae_explorer(TOKENS, TOKEN_REWARDS, TOKEN_VALUES)
    readout = explorer.show(lam=lam)
    heights = [artist.get_height() for artist in explorer.picture.artists]
    assert heights == pytest.approx(expected)
    assert readout == f"advantage of the first token {expected[0]:+.3f}, of the last +0.700"


@pytest.mark.parametrize(
    "tokens, rewards, values, words",
    [
        (TOKENS, TOKEN_REWARDS[:3], TOKEN_VALUES, r"rewards has shape \(3,\) for 4 tokens"),
        (TOKENS, TOKEN_REWARDS, [TOKEN_VALUES], r"values has shape \(1, 4\) for 4 tokens"),
        (TOKENS, TOKEN_REWARDS, [0.0, 0.0, np.nan, 0.0], "values has shape .* finite"),
        ([], [], [], r"rewards has shape \(0,\) for 0 tokens"),
    ],
)
def test_a_completion_that_is_none_is_refused(tokens, rewards, values, words):
    with pytest.raises(ValueError, match=words):
        gae_explorer(tokens, rewards, values)
