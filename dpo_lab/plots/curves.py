"""Curves: of anything, over seeds, and of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_lab.engine.arguments import floats
from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots.style import (
    CHOSEN,
    OPTIMUM,
    POLICY,
    REJECTED,
    STROKES,
    labeled_figure,
    legend,
    looks,
    palette,
)


def plot_lines(
    title: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Named curves over one axis, told apart by color and by stroke."""
    figure, axes = labeled_figure(title, y_label, x=x_label)
    x = floats("x", x)
    for (name, values), (color, style) in zip(lines.items(), looks(palette(len(lines)), STROKES)):
        values = floats(f"lines[{name!r}]", values)
        if len(values) != len(x):
            raise ValueError(
                f"line {name!r} has {len(values)} values and x has {len(x)}; "
                "there must be one for each"
            )
        axes.plot(x, values, color=color, linestyle=style, label=for_figure(name))
    legend(axes)
    return figure


def plot_band(
    title: str,
    x: Sequence[float],
    values: np.ndarray,
    lines: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
) -> Figure:
    """Mean over seeds with the band from the 10th to the 90th percentile, beside theory.

    `values` are (len(x), seeds), `lines` what theory says; both axes are logarithmic.
    """
    x, values = floats("x", x), floats("values", values)
    figure, axes = labeled_figure(title, y_label, x=x_label)
    band = np.quantile(values, (0.1, 0.9), axis=1)
    axes.fill_between(x, *band, color=POLICY, alpha=0.2, label="10% to 90% of seeds")
    axes.plot(x, values.mean(1), "o-", color=POLICY, label="mean of seeds")
    for name, line in lines.items():
        axes.plot(x, floats(f"lines[{name!r}]", line), "--", color=OPTIMUM, label=for_figure(name))
    axes.set(xscale="log", yscale="log")
    legend(axes)
    return figure


def plot_race(
    title: str,
    racers: Mapping[str, tuple[Sequence[float], np.ndarray]],
    x_label: str,
    y_label: str,
    *,
    goal: float | None = None,
) -> Figure:
    """Median and band from the 10th to the 90th percentile of each racer.

    A racer is (x, values), with values (len(x), seeds); both axes are logarithmic, and a line
    stands at `goal`.
    """
    figure, axes = labeled_figure(title, y_label, x=x_label)
    own = looks(palette(len(racers)), STROKES)
    for (name, (x, values)), (color, style) in zip(racers.items(), own):
        values = floats(f"racers[{name!r}]", values)
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, middle, color=color, linestyle=style, label=for_figure(name))
    if goal is not None:
        axes.axhline(goal, color=OPTIMUM, linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    legend(axes)
    return figure


def plot_loss(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Loss per pair against the step, with log 2, where every run of the sigmoid loss starts."""
    figure, axes = labeled_figure("Loss", "loss per pair (nats)")
    _curve(axes, metrics, "loss", POLICY, "training batch, running mean")
    start = "log 2: the policy is the reference"
    axes.axhline(np.log(2), color=OPTIMUM, linestyle="--", label=start)
    axes.legend(frameon=False)
    return figure


def plot_rewards(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Implicit rewards against the step, and under them the fraction of pairs ranked correctly."""
    figure, (rewards, accuracy) = labeled_figure(
        "Implicit rewards and accuracy",
        "implicit reward (beta x nats)",
        "fraction ranked correctly",
    )
    _curve(rewards, metrics, "rewards/chosen", CHOSEN, "chosen")
    _curve(rewards, metrics, "rewards/rejected", REJECTED, "rejected")
    _curve(accuracy, metrics, "rewards/accuracies", POLICY, "accuracy")
    accuracy.axhline(0.5, color=OPTIMUM, linewidth=0.8)
    rewards.legend(frameon=False)
    return figure


def plot_margins(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Margin of the implicit rewards against the step."""
    figure, axes = labeled_figure("Margin", "reward of chosen minus rejected (beta x nats)")
    _curve(axes, metrics, "rewards/margins", POLICY, "training batch, running mean")
    axes.axhline(0, color=OPTIMUM, linewidth=0.8)
    axes.legend(frameon=False)
    return figure


def _curve(axes: Any, metrics: Sequence[dict[str, Any]], name: str, color: str, label: str) -> None:
    """A metric against the step, faint, under its running mean over a tenth of the steps."""
    points = [(line["step"], line[name]) for line in metrics if name in line]
    steps, values = map(np.array, zip(*points))

    # the running mean by differences of cumulative sums
    width = max(1, len(values) // 10)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    starts = np.maximum(np.arange(len(values)) + 1 - width, 0)
    ends = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), color=color, label=label)
