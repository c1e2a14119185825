"""Figures and explorer of the alignment tax."""

import numpy as np
import pytest

from dpo_lab.plots.tax import plot_coefficients, plot_rudeness, plot_tax, plot_trade_off
from dpo_lab.widgets.tax import tax_explorer, tax_state

CHANGES = {
    "PPO": {"nats_per_byte": {"a_$b$": [0.3, 0.1], "c": [0.0, 0.2]}, "accuracy": {"p": [-0.1, 0]}},
    "DPO": {"nats_per_byte": {"c": [0.5, 0.05]}, "accuracy": {}},
}
ROWS = [
    {
        "coefficient": c,
        "reward": 0.8 - 0.1 * c + s,
        "kl": 3 - c,
        "changes": {"x": 0.1 / (1 + c), "y": s},
    }
    for c in (0, 0.5, 2)
    for s in (-0.01, 0.0, 0.04)
]


def drawn(axes):
    """By label, the values of each curve with bars and the ends of its bars."""
    found = {}
    for container in axes.containers:
        line, _, bars = container
        found[container.get_label()] = (line, np.array(bars[0].get_segments()))
    return found


def test_each_change_stands_in_its_row_with_its_interval():
    figure = plot_tax(CHANGES)
    top, bottom = figure.axes
    assert [text.get_text() for text in top.get_yticklabels()] == [r"a_\$b\$", "c"]
    ppo, bars = drawn(top)["PPO"]
    assert list(ppo.get_xdata()) == [0.3, 0.0]
    assert np.round(ppo.get_ydata()).tolist() == [0, 1]
    assert bars[:, :, 0] == pytest.approx(np.array([[0.104, 0.496], [-0.392, 0.392]]))
    dpo, _ = drawn(top)["DPO"]
    assert list(dpo.get_xdata()) == [0.5] and round(dpo.get_ydata()[0]) == 1
    assert list(drawn(bottom)["PPO"][0].get_xdata()) == [-0.1]
    # the row of the first measure is at the top
    assert top.get_ylim()[0] > top.get_ylim()[1]
    assert len(figure.legends[0].get_texts()) == 2


@pytest.mark.parametrize("changes", [{}, {"PPO": {}}, {"PPO": {"accuracy": {}}}])
def test_changes_without_a_measure_are_refused(changes):
    with pytest.raises(ValueError, match="changes has the methods"):
        plot_tax(changes)


def test_coefficients_are_drawn_with_the_standard_error_over_seeds():
    rows = [[1.0, 2.0, 3.0], [4.0, 4.0, 7.0]]
    panels = {"reward": {"PPO": rows}, "tax": {"a": rows, "b": [[0.0], [1.0]]}}
    figure = plot_coefficients([0, 0.25], panels, "gamma", changes=["tax"])
    top, bottom = figure.axes
    line, bars = drawn(top)["PPO"]
    assert list(line.get_ydata()) == [2.0, 5.0]
    errors = [1 / 3**0.5, 3**0.5 / 3**0.5]
    assert bars[:, 1, 1] - line.get_ydata() == pytest.approx(np.array(errors))
    assert [text.get_text() for text in bottom.get_xticklabels()] == ["0", "0.25"]
    seeds = [list(line.get_ydata()) for line in top.get_lines() if len(line.get_ydata()) == 3]
    assert seeds == rows
    zeros = [
        [line for line in axes.get_lines() if list(line.get_ydata()) == [0, 0]]
        for axes in figure.axes
    ]
    assert [len(found) for found in zeros] == [0, 1]


def test_a_curve_needs_seeds_for_each_setting():
    with pytest.raises(ValueError, match="has 1 rows, and there are 2 settings"):
        plot_coefficients([0, 1], {"reward": {"PPO": [[1.0]]}}, "gamma")


def test_rudeness_is_drawn_by_request():
    rates = {"before": {"none": [0.1, 0.01], "polite": [0.05, 0.0]}}
    axes = plot_rudeness(rates).axes[0]
    line, bars = drawn(axes)["before"]
    assert list(line.get_ydata()) == [0.1, 0.05]
    assert bars[0, 1, 1] == pytest.approx(0.1 + 0.0196)
    for wrong in ({}, rates | {"after": {"none": [0.1, 0.01]}}):
        with pytest.raises(ValueError, match="rates has the requests"):
            plot_rudeness(wrong)


def test_the_tax_stands_against_kl_and_against_reward():
    point = {"kl": 4.0, "kl_se": 0.5, "reward": 0.8, "reward_se": 0.02, "tax": 0.1, "tax_se": 0.01}
    curves = {"PPO": [point, point | {"kl": 9.0, "tax": 0.3}], "DPO": [point | {"reward": 0.7}]}
    figure = plot_trade_off(curves, "reviews")
    left, right = map(drawn, figure.axes)
    assert list(left["PPO"][0].get_xdata()) == [4.0, 9.0]
    assert list(left["PPO"][0].get_ydata()) == [0.1, 0.3]
    assert list(right["DPO"][0].get_xdata()) == [0.7]
    assert len(figure.legends[0].get_texts()) == 2
    for nothing in ({}, {"PPO": []}):
        with pytest.raises(ValueError, match="and no point"):
            plot_trade_off(nothing, "reviews")


def test_the_state_of_a_coefficient_is_the_mean_over_its_seeds():
    state = tax_state(ROWS, 0.5)
    seeds = np.array([-0.01, 0.0, 0.04])
    assert state["seeds"] == 3 and state["kl"] == 2.5 and state["kl_se"] == 0
    assert state["reward"] == pytest.approx(0.75 + seeds.mean())
    assert state["reward_se"] == pytest.approx(seeds.std(ddof=1) / 3**0.5)
    assert state["changes"] == pytest.approx({"x": 0.1 / 1.5, "y": seeds.mean()})
    assert state["changes_se"]["y"] == pytest.approx(seeds.std(ddof=1) / 3**0.5)
    one = tax_state(ROWS[:1], 0)
    assert (one["reward"], one["reward_se"]) == (ROWS[0]["reward"], 0)


def test_every_coefficient_of_the_explorer_shows_its_own_state():
    explorer = tax_explorer(ROWS, kind="y")
    slider = explorer.sliders["coefficient"]
    assert [value for _, value in slider.options] == [0, 0.5, 2]
    readouts = [explorer.show(value) for _, value in slider.options]
    for (_, value), readout in zip(slider.options, readouts):
        state = tax_state(ROWS, value)
        assert (
            f"reward {state['reward']:.3f}" in readout and f"x {0.1 / (1 + value):+.3f}" in readout
        )
        explorer.show(value)
        *_, point = (
            line
            for line in explorer.picture.canvas.figure.axes[0].get_lines()
            if len(line.get_xdata()) == 1
        )
        assert point.get_ydata()[0] == state["reward"]
        assert point.get_xdata()[0] == state["changes"]["y"]


def test_an_explorer_without_runs_or_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="rows is empty"):
        tax_explorer([])
    with pytest.raises(ValueError, match="kind is 'z'; it must be one of 'x', 'y'"):
        tax_explorer(ROWS, kind="z")
