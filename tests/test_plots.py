"""Figures hold the numbers they were given."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dpo_lab.plots import (
    plot_band,
    plot_beta_path,
    plot_betas,
    plot_calibration,
    plot_distributions,
    plot_frontier,
    plot_intervals,
    plot_lines,
    plot_loss,
    plot_margins,
    plot_memory,
    plot_pairs,
    plot_race,
    plot_rewards,
    plot_simplex,
    plot_tokens,
    root_scale,
    token_html,
)
from dpo_lab.theory.frontier import OptimalFrontier

METRICS = [
    {
        "step": s,
        "loss": 0.7 - s / 100,
        "rewards/chosen": s,
        "rewards/rejected": -s,
        "rewards/accuracies": 0.5,
        "rewards/margins": 2 * s,
    }
    for s in range(1, 31)
]


@pytest.mark.parametrize("plot", [plot_loss, plot_rewards, plot_margins])
def test_curves_show_the_metrics_and_label_their_axes(plot):
    figure = plot([{"step": 0, "eval/reward": 0.5}, *METRICS])
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert list(axes.get_lines()[0].get_xdata()) == list(range(1, 31))
    assert figure.axes[-1].get_xlabel() == "step" and figure.axes[0].get_legend()


def test_the_running_mean_is_a_mean_of_the_last_tenth():
    line = plot_loss(METRICS).axes[0].get_lines()[1].get_ydata()
    values = [m["loss"] for m in METRICS]
    assert line[10] == pytest.approx(np.mean(values[8:11])) and line[0] == pytest.approx(values[0])


def test_a_bar_for_every_model_in_memory():
    axes = plot_memory(
        {"PPO": {"policy": "trained", "reference": "read"}, "DPO": {"policy": "trained"}}, 14
    ).axes[0]
    assert [bar.get_x() for bar in axes.patches] == [0, 14, 0] and axes.get_xticks().tolist() == [
        0,
        14,
        28,
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["PPO", "DPO"]


def test_the_frontier_is_drawn_only_where_the_estimate_holds():
    points = [
        {"reward": 0.5, "reward_se": 0.01, "kl": 0.0, "kl_se": 0.0},
        {"reward": 0.8, "reward_se": 0.01, "kl": 2.0, "kl_se": 0.1},
    ]
    frontier = OptimalFrontier(
        np.array([0.5, 0.7, 0.9]), np.array([0.0, 1.0, 3.0]), np.array([64.0, 20.0, 2.0])
    )
    axes = plot_frontier({"DPO": points, "PPO": points[:1]}, frontier).axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == [0.0, 1.0]
    assert "KL" in axes.get_xlabel() and "nats" in axes.get_xlabel()
    plot_frontier({"DPO": points})


def test_bars_have_the_height_of_the_probabilities():
    axes = plot_distributions(["a", "b"], {"one": [0.25, 0.75], "two": [0.5, 0.5]}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.75, 0.5, 0.5]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(right <= left + 1e-9 for (_, right), (left, _) in zip(edges, edges[1:]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


def test_the_beta_path_runs_from_large_to_small_beta():
    betas, policies = np.array([10.0, 1.0, 0.1]), np.array([[0.5, 0.5], [0.6, 0.4], [0.9, 0.1]])
    top, bottom, right = plot_beta_path(
        betas, policies, ["a", "b"], [0.0, 0.1, 0.8], [0.0, 0.02, 0.4]
    ).axes
    assert (
        list(top.get_lines()[0].get_ydata()) == [0.5, 0.6, 0.9]
        and bottom.get_xlim()[0] > bottom.get_xlim()[1]
    )
    assert (
        list(right.get_lines()[0].get_ydata()) == [0.0, 0.02, 0.4] and "nats" in right.get_ylabel()
    )


def test_lines_are_told_apart_by_more_than_color():
    axes = plot_lines("Title", [0, 1], {"one": [0, 1], "two": [1, 0]}, "x", "y").axes[0]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[0, 1], [1, 0]]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == 2
    assert (
        len({line.get_linestyle() for line in axes.get_lines()}) == 2
        and axes.get_title() == "Title"
    )


def test_the_first_interval_stands_at_the_top():
    axes = plot_intervals(["a", "b"], [-1.0, 0.0], [0.0, 0.5], [1.0, 2.0]).axes[0]
    places = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.get_yticks()))
    assert places["a"] > places["b"]
    assert [segment[:, 0].tolist() for segment in axes.collections[0].get_segments()] == [
        [-1.0, 1.0],
        [0.0, 2.0],
    ]


def test_calibration_errors_are_two_binomial_ones():
    axes = plot_calibration([0.5], [0.6], [25]).axes[0]
    bars = [c for c in axes.collections if hasattr(c, "get_segments")][0].get_segments()[0]
    assert bars[:, 1].tolist() == pytest.approx(
        [0.4, 0.8]
    ) and axes.get_xlim() == axes.get_ylim() == (0, 1)


def test_a_race_shows_the_median_of_each_racer_in_logs():
    values = np.random.default_rng(0).lognormal(size=(3, 21))
    axes = plot_race(
        "Title",
        {"one": ([1, 10, 100], values), "two": ([2, 20], values[:2])},
        "samples",
        "gap",
        goal=0.5,
    ).axes[0]
    one, two, goal = axes.get_lines()
    assert one.get_ydata() == pytest.approx(np.median(values, 1)) and list(two.get_xdata()) == [
        2,
        20,
    ]
    assert list(goal.get_ydata()) == [0.5, 0.5] and axes.get_xscale() == axes.get_yscale() == "log"
    low, high = np.quantile(values[0], (0.1, 0.9))
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert corners.min() <= low + 1e-12 and corners.max() >= high - 1e-12


def test_the_band_holds_most_seeds_around_their_mean():
    values = np.random.default_rng(0).lognormal(size=(3, 20))
    axes = plot_band("Title", [1, 10, 100], values, {"theory": [3, 2, 1]}, "n", "error").axes[0]
    mean, theory = (line.get_ydata() for line in axes.get_lines())
    assert (
        mean == pytest.approx(values.mean(1))
        and list(theory) == [3, 2, 1]
        and axes.get_xscale() == "log"
    )
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(np.quantile(values, 0.1, axis=1).min())


def test_corners_and_points_of_the_simplex_stand_where_they_should():
    figure = plot_simplex(
        lambda p: p[:, 0], ["a", "b", "c"], {"curve": torch.eye(3)}, {"middle": torch.ones(3) / 3}
    )
    axes = figure.axes[0]
    curve, point = (line.get_xydata() for line in axes.get_lines())
    assert curve == pytest.approx(np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])) and point[
        0
    ] == pytest.approx(curve.mean(0))
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]


def test_every_beta_has_a_panel_on_one_scale():
    points = [{"kl": 0.0, "reward": 0.5}, {"kl": 4.0, "reward": 0.9}]
    optimal = OptimalFrontier(np.array([0.5, 0.9]), np.array([0.0, 3.0]), np.array([64.0, 20.0]))
    panels = plot_betas({0.1: points, 5.0: points[:1]}, optimal).axes
    assert [axes.get_title() for axes in panels] == ["beta 0.1", "beta 5"] and len(
        {axes.get_xlim() for axes in panels}
    ) == 1
    assert list(panels[0].get_lines()[1].get_xdata()) == [0, 4]


@pytest.mark.parametrize("most", [0.6, 1, 4, 7, 30, 60, 220])
def test_ticks_of_a_root_scale_do_not_touch(most):
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots(1, 2)[0]
    root_scale(axes.xaxis, most)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 1 and all(right.x0 - left.x1 > 3 for left, right in zip(boxes, boxes[1:]))


def test_pairs_are_counted_on_the_side_where_they_stand():
    left, right = plot_pairs(np.array([0.9, 0.1, 0.5]), np.array([0, 0]), np.array([1, 2])).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "chosen, mean 0.90",
        "rejected, mean 0.30",
    ]
    assert (
        right.get_legend().get_texts()[0].get_text() == "mean 0.60"
        and sum(bar.get_height() for bar in right.patches) == 2
    )


def test_tokens_are_colored_by_sign_and_escaped():
    html = token_html(["<b>", " joy"], [-1.0, 0.5], limit=2.0)
    assert "&lt;b&gt;" in html and "<b>" not in html and 'title="+0.50"' in html
    assert "rgba(192,57,43,0.50)" in html and "rgba(27,127,92,0.25)" in html
    assert token_html([], []).endswith("</div>")
    titled = token_html(["a"], [1.0], title="reward <1>")
    assert "<b>reward &lt;1&gt;</b>" in titled and titled.count("<b>") == 1


def test_every_row_of_tokens_has_its_bars_in_the_color_of_their_sign():
    rows = {"log-ratio": [0.5, -0.25], "reward": [-1.0, 2.0]}
    panels = plot_tokens("t", [" $a$", "b"], rows).axes
    assert [axes.get_ylabel() for axes in panels] == list(rows)
    for axes, values in zip(panels, rows.values()):
        assert [bar.get_height() for bar in axes.patches] == values
        greens = [bar.get_facecolor()[1] > bar.get_facecolor()[0] for bar in axes.patches]
        assert greens == [value > 0 for value in values]
    assert len(panels[-1].get_xticklabels()) == 2
    with pytest.raises(ValueError, match="labels has 2 entries"):
        plot_tokens("t", ["a", "b"], {"one": [1.0]})
