"""Figures hold the numbers they were given."""

import numpy as np
import pytest

from dpo_lab.plots import plot_frontier, plot_loss, plot_margins, plot_rewards

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


def test_the_frontier_is_drawn_only_where_the_estimate_holds():
    points = [
        {"reward": 0.5, "reward_se": 0.01, "kl": 0.0, "kl_se": 0.0},
        {"reward": 0.8, "reward_se": 0.01, "kl": 2.0, "kl_se": 0.1},
    ]
    frontier = (np.array([0.5, 0.7, 0.9]), np.array([0.0, 1.0, 3.0]), np.array([64.0, 20.0, 2.0]))
    axes = plot_frontier(points, frontier).axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == [0.0, 1.0]
    assert "KL" in axes.get_xlabel() and "nats" in axes.get_xlabel()
    plot_frontier(points)
