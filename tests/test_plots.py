"""Figures hold the numbers they were given."""

import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dpo_lab.plots import (
    ABOVE,
    BELOW,
    CHOSEN,
    REJECTED,
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
    plot_token_logps,
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
    line, cross = axes.get_lines()[:2]
    assert list(line.get_xdata()) == [0.0, 1.0]
    assert cross.get_marker() == "x" and cross.get_xydata().tolist() == [[1.0, 0.7]]
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
    assert "rgba(230,159,0,0.50)" in html and "rgba(44,95,158,0.25)" in html
    assert token_html([], []).endswith("</div>") and "<small>" not in html
    titled = token_html(["a"], [1.0], title="reward <1>")
    assert "<b>reward &lt;1&gt;</b>" in titled and titled.count("<b>") == 1


def test_the_legend_of_tokens_goes_from_end_to_end_of_the_colors():
    html = token_html(["a"], [0.5], limit=3.0, legend="log pi - <log pi_ref>, $nats$")
    legend = html.split("<small>")[1]
    assert re.findall(r'title="(.*?)"', legend) == ["-3.00", "-1.50", "+0.00", "+1.50", "+3.00"]
    assert "rgba(230,159,0,1.00);color:black" in legend
    assert "rgba(44,95,158,1.00);color:white" in legend
    assert "&lt;log pi_ref&gt;" in legend and "$" not in legend


# linear RGB as it is seen without the cones for long or for medium wavelengths
# (Machado et al. 2009, severity 1)
PROTANOPIA = [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
]
DEUTERANOPIA = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]


def linear(color):
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("seen", [PROTANOPIA, DEUTERANOPIA])
def test_the_colors_of_tokens_are_told_apart_without_red_or_green(seen):
    """Green and red, the colors of chosen and rejected, would be a third as far apart."""

    def distance(one, other):
        return np.linalg.norm(np.array(seen) @ (linear(one) - linear(other)))

    assert distance(ABOVE, BELOW) > 3 * distance(CHOSEN, REJECTED)


def test_text_on_the_colors_of_tokens_has_the_contrast_that_reading_needs():
    """At least 4.5, which WCAG 2 asks for."""
    above, below = (linear(color) @ (0.2126, 0.7152, 0.0722) for color in (ABOVE, BELOW))
    white, black = 1.05 / (above + 0.05), (below + 0.05) / 0.05
    assert white > 4.5 and black > 4.5


def test_the_sum_of_log_probs_ends_at_that_of_the_completion():
    figure = plot_token_logps(["$a$", "_b", "c"], np.log([0.5, 0.25, 1.0]))
    top, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches] == pytest.approx([0.5, 0.25, 1.0])
    ends = [bar.get_y() + bar.get_height() for bar in bottom.patches]
    assert ends == pytest.approx(np.log([0.5, 0.125, 0.125]))
    assert [bar.get_y() for bar in bottom.patches] == pytest.approx([0.0, *ends[:-1]])
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in bottom.get_xticklabels()][0] == r"\$a\$"
    with pytest.raises(ValueError, match="labels has 1 entries.* there are 2 log-probs"):
        plot_token_logps(["a"], [-1.0, -2.0])
