"""Rounds at a fixed number of labels: figures, state and explorer."""

import numpy as np
import pytest
import torch

from dpo_lab.plots.online import plot_coverage, plot_means, plot_online
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.theory.on_policy import tuned_runs
from dpo_lab.widgets.on_policy import (
    QUALITY_REWARDS,
    RARE,
    mean_and_error,
    rounds_explorer,
    rounds_state,
)

SMALL = {"labels": 12, "rounds": (1, 2, 4), "seeds": 3}


def test_the_bandit_is_badly_covered():
    best = np.exp(np.array(QUALITY_REWARDS) / 0.3) * RARE
    assert sum(RARE) == pytest.approx(1) and RARE[-1] < 0.003
    assert best[-1] / best.sum() == pytest.approx(0.6, abs=0.005)


@pytest.mark.parametrize("moved", [False, True])
def test_a_state_is_the_mean_of_tuned_runs(moved):
    state = rounds_state(2, moved, labels=12, seeds=3)
    bandit = (torch.tensor(values, dtype=torch.float64) for values in (RARE, QUALITY_REWARDS))
    options = {"labels": 12, "rounds": 2, "seeds": 3, "moved": moved}
    found = tuned_runs(*bandit, 0.3, generator=torch.Generator().manual_seed(0), **options)
    np.testing.assert_array_equal(state["gaps"], found.gaps)
    np.testing.assert_array_equal(state["policy"], found.policies[-1].mean(0))

    # each label is of two completions
    times = np.zeros(8)
    for i, j in np.argwhere(np.ones((8, 8))):
        times[[i, j]] += found.labels[:, :, i, j].sum().item()
    np.testing.assert_allclose(state["labeled"], times / (2 * 3 * 12))


def test_every_place_of_the_slider_shows_its_state():
    explorer = rounds_explorer(**SMALL)
    slider = explorer.sliders["rounds_now"]
    assert [value for _, value in slider.options] == [1, 2, 4] and slider.value == 1
    *bars, marks, fixed_point, moved_point = explorer.picture.artists
    assert len(bars) == 16 and len(marks.get_ydata()) == 8
    for rounds in (4, 1, 2):
        slider.value = rounds
        for kind, shown, point in ((0, bars[:8], fixed_point), (1, bars[8:], moved_point)):
            state = rounds_state(rounds, bool(kind), labels=12, seeds=3)
            assert [bar.get_height() for bar in shown] == state["policy"].tolist()
            assert point.get_xdata() == [rounds]
            assert point.get_ydata() == pytest.approx([state["gaps"].mean()])
    found = mean_and_error(rounds_state(2, labels=12, seeds=3)["gaps"])
    assert f"fixed reference {found[0]:.3f} ± {found[1]:.3f}" in explorer.show(2)
    assert "6 labels per round" in explorer.show(2)


def test_one_round_is_offline_whatever_the_reference():
    fixed, moved = (rounds_state(1, moved, labels=12, seeds=3)["gaps"] for moved in (False, True))
    np.testing.assert_array_equal(fixed, moved)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rounds": (2, 1)}, "rounds is .2, 1.; give positive numbers in ascending order"),
        ({"rounds": (0, 1)}, "ascending"),
        ({"rounds": ()}, "ascending"),
        ({"rounds": (1, 5)}, "labels is 12 with 5 rounds; it must be a multiple"),
        ({"seeds": 1}, "seeds is 1; an error over seeds needs at least 2"),
        ({"beta": 0}, "beta is 0"),
        ({"completions": ["a"]}, "labels has 1 entries"),
    ],
)
def test_an_explorer_that_cannot_begin_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        rounds_explorer(**SMALL | change)


# figures


def test_means_stand_with_their_standard_errors():
    values = np.array([[1.0, 3.0], [2.0, 2.0], [0.5, 1.5]])
    figure = plot_means("title", [1, 10, 100], {"a $b$": values}, "labels", "gap")
    (axes,) = figure.axes
    (container,) = axes.containers
    line, _, (bars,) = container.lines
    assert line.get_ydata().tolist() == [2.0, 2.0, 1.0]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[1, 3], [2, 2], [0.5, 1.5]])
    assert axes.get_legend().get_texts()[0].get_text() == r"a \$b\$"
    with pytest.raises(ValueError, match=r"values\['a'\] has the shape \(3, 1\)"):
        plot_means("title", [1, 10, 100], {"a": values[:, :1]}, "labels", "gap")


def test_coverage_stands_beside_the_optimum():
    labeled = {"round 1": [0.7, 0.3], "round 2": [0.1, 0.9]}
    (axes,) = plot_coverage(["<i>", "b"], [0.2, 0.8], labeled).axes
    assert [bar.get_height() for bar in axes.patches] == [0.7, 0.3, 0.1, 0.9]
    places = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert places == pytest.approx([-0.21, 0.79, 0.21, 1.21])
    assert axes.get_lines()[0].get_ydata().tolist() == [0.2, 0.8]
    with pytest.raises(ValueError, match="2 completions"):
        plot_coverage(["a"], [0.2, 0.8], labeled)


def recorded_run(method, seed, fractions):
    rows = [
        {
            "labels": 10 * k,
            "seconds": k + seed,
            "kl": 2.0 * k,
            "reward": value / 2,
            "fraction": [value, value + 0.1],
        }
        for k, value in enumerate(fractions, 1)
    ]
    return {"method": method, "seed": seed, "rows": rows}


def test_fractions_stand_over_labels_and_over_seconds():
    runs = [
        recorded_run("offline", 0, [0.5, 0.7, 0.8]),
        recorded_run("offline", 2, [0.7, 0.6]),
        recorded_run("4 rounds", 0, [0.9]),
    ]
    optimal = OptimalFrontier(np.array([0.5, 0.9]), np.array([0.0, 3.0]), np.array([64.0, 2.0]))
    figure = plot_online(runs, {"offline": "once"}, optimal, goal=0.93)
    first, *others = figure.axes
    assert [list(line.get_xdata()) for line in first.get_lines()[:1]] == [[0.0]]
    line, _, _ = first.containers[0].lines
    assert line.get_xdata().tolist() == [2, 5] and line.get_ydata().tolist() == [0.3, 0.35]
    for axes, at in zip(others, ([10, 25], [2, 3.5])):
        line, _, (bars,) = axes.containers[0].lines
        assert line.get_xdata().tolist() == at
        np.testing.assert_allclose(line.get_ydata(), [0.6, 0.7])
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [[0.5, 0.7], [0.6, 0.8]])
        points = [list(line.get_ydata()) for line in axes.get_lines()]
        assert [0.8, 0.6] in points and [0.93, 0.93] in points
    with pytest.raises(
        ValueError, match="names has 'PPO', of which there is no run; there are off"
    ):
        plot_online(runs, {"PPO": "PPO"}, optimal)
