"""Blitted figures: only a few artists are redrawn when a slider moves, which takes milliseconds.

Each function draws what stays and returns a `BlittedFigure`, whose `update` puts the animated
artists where a state says.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from dpo_lab.plots import CHOSEN, OPTIMUM, POLICY, REJECTED, check_labels, root_scale

# what a panel of pairs shows: its label and its color
PAIRS = {"losses": ("loss", POLICY), "weights": ("gradient weight", REJECTED)}

# a legend above the axes, where no bar and no curve reaches
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}


class BlittedFigure(NamedTuple):
    """A figure with some animated artists."""

    figure: Figure
    artists: list[Artist]
    """the animated artists, drawn over everything else"""
    update: Callable[[Mapping[str, Any]], None]
    """puts the artists where a state says"""
    background: Callable[[], Any] = lambda: None
    """tells one background from another, where `update` changes more than the artists"""


def optimum_figure(
    reference: Tensor, labels: Sequence[str], kls: Sequence[float], rewards: Sequence[float]
) -> BlittedFigure:
    """Reference and optimum as bars, and the optimum's point on the reward-KL frontier.

    A state has `policy` (n,), `kl` and `reward`; `kls` and `rewards` are the frontier's.
    """
    figure, (left, right) = wide(2)

    # the two distributions
    shown, places = check_labels(labels, len(reference), "outcomes"), np.arange(len(labels))
    left.bar(places - 0.2, np.asarray(reference), 0.4, color=OPTIMUM, label="reference")
    bars = left.bar(places + 0.2, np.zeros(len(labels)), 0.4, color=CHOSEN, label="optimum")
    left.set_xticks(places, shown)
    left.set(ylim=(0, 1), ylabel="probability")
    left.legend(frameon=False, **ABOVE)

    # the frontier
    right.plot(kls, rewards, color=OPTIMUM, label="optimum for every beta")
    (point,) = right.plot([], [], "o", color=CHOSEN, markersize=9)
    right.set(xlabel="KL to the reference (nats)", ylabel="mean reward")
    right.legend(frameon=False, loc="lower right")

    def update(state: Mapping[str, Any]) -> None:
        _set_heights(bars, state["policy"].tolist())
        point.set_data([state["kl"]], [state["reward"]])

    return BlittedFigure(figure, [*bars, point], update)


def bandit_figure(labels: Sequence[str]) -> BlittedFigure:
    """Two distributions as bars; a state has `reference` and `policy`, (n,) each."""
    figure, (axes,) = wide(1)
    places, none = np.arange(len(labels)), np.zeros(len(labels))
    before = axes.bar(places - 0.2, none, 0.4, color=OPTIMUM, label="reference")
    after = axes.bar(places + 0.2, none, 0.4, color=CHOSEN, label="optimum")
    axes.set_xticks(places, check_labels(labels, len(labels), "outcomes"))
    axes.set(ylim=(0, 1), ylabel="probability")
    axes.legend(frameon=False, **ABOVE)

    def update(state: Mapping[str, Any]) -> None:
        _set_heights(before, state["reference"].tolist())
        _set_heights(after, state["policy"].tolist())

    return BlittedFigure(figure, [*before, *after], update)


def comparisons_figure(
    labels: Sequence[str], fitted: Sequence[float], observed: Sequence[float], most: float = 4.0
) -> BlittedFigure:
    """Rewards as bars beside the fitted ones, and predicted fractions against observed ones.

    A state has `rewards` and `predicted`.

    Args:
        labels: n names of items.
        fitted: (n,) maximum-likelihood rewards, in nats.
        observed: fraction won, for every two items that were compared.
        most: rewards reach from -`most` to `most`, in nats.
    """
    figure, (left, right) = wide(2)

    # rewards; the fitted ones are redrawn only to stay in front of the bars
    places = np.arange(len(labels))
    bars = left.bar(places, np.zeros(len(labels)), 0.6, color=POLICY, label="your rewards")
    marks = {"color": REJECTED, "markersize": 30, "markeredgewidth": 2, "label": "best fit"}
    marks = left.plot(places, fitted, "_", **marks)
    left.set_xticks(places, check_labels(labels, len(fitted), "items"))
    left.set(ylim=(-most, 1.375 * most), ylabel="reward (nats)")
    left.axhline(0, color=OPTIMUM, linewidth=0.8)
    left.legend(frameon=False, loc="upper left", ncols=2)

    # fractions won
    right.plot([0, 1], [0, 1], "--", color=OPTIMUM, label="prediction = observation")
    (points,) = right.plot([], [], "o", color=POLICY, markersize=8)
    right.set(xlabel="predicted fraction won", ylabel="observed fraction won")
    right.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    right.legend(frameon=False, loc="upper left")

    def update(state: Mapping[str, Any]) -> None:
        _set_heights(bars, state["rewards"])
        points.set_data(state["predicted"], observed)

    return BlittedFigure(figure, [*bars, *marks, points], update)


def pairs_figure(usual: Mapping[str, np.ndarray]) -> BlittedFigure:
    """Pairs on the curves of loss and gradient weight against the margin.

    A state has `margins`, `losses`, `weights`, (P,) each, and the same of its `curve`. The limits
    are those of the curve `usual` as long as they hold the state.
    """
    figure, panels = wide(2)
    shown = [_pairs_on_curve(axes, name, usual) for axes, name in zip(panels, PAIRS)]

    def update(state: Mapping[str, Any]) -> None:
        for _, _, update_panel in shown:
            update_panel(state)

    return BlittedFigure(figure, [artists[i] for i in (0, 1) for artists in shown], update)


def run_figure(
    steps: Sequence[int], chosen: Sequence[float], rejected: Sequence[float], furthest: float
) -> BlittedFigure:
    """Mean log-ratios over a run with one step marked, and the pairs at that step.

    A state has `step`, and `chosen` and `rejected` (P,), log-ratios of at most `furthest` nats.
    """
    figure, (left, right) = wide(2)

    # means over the run
    left.plot(steps, chosen, color=CHOSEN, label="chosen")
    left.plot(steps, rejected, "--", color=REJECTED, label="rejected")
    left.axhline(0, color=OPTIMUM, linewidth=0.8)
    left.set(xlabel="step", ylabel="mean log-ratio (nats)")
    left.legend(frameon=False, **ABOVE)
    mark = left.axvline(0, color=POLICY, linewidth=2)

    # pairs at one step
    right.plot([-furthest, furthest], [-furthest, furthest], "--", color=OPTIMUM, label="margin 0")
    (cloud,) = right.plot([], [], "o", color=POLICY, alpha=0.4, markersize=5)
    limits = (-1.05 * furthest, 1.05 * furthest)
    right.set(xlabel="log-ratio of rejected (nats)", ylabel="log-ratio of chosen (nats)")
    right.set(xlim=limits, ylim=limits)
    right.legend(frameon=False, loc="upper left")

    def update(state: Mapping[str, Any]) -> None:
        mark.set_xdata([state["step"], state["step"]])
        cloud.set_data(state["rejected"], state["chosen"])

    return BlittedFigure(figure, [mark, cloud], update)


def sweep_figure(
    rows: Sequence[Mapping[str, float]], optimal: Any, targets: Sequence[float] = ()
) -> BlittedFigure:
    """One run among all, reward against KL, and its KL during training.

    A state has `kl`, `reward` and `step`, a list each, and `target`: one of the `targets`, a KL in
    nats, or None.
    """
    figure, (left, right) = wide(2)
    kls = [row["kl"] for row in rows]

    # every evaluation of every run, and the path of one
    _draw_optimal(left, optimal)
    every = {"color": OPTIMUM, "alpha": 0.25, "markersize": 4, "markeredgewidth": 0}
    left.plot(kls, [row["reward"] for row in rows], "o", **every)
    path, last = _path(left)
    root_scale(left.xaxis, max(kls), min(kls))

    # the KL of that run against its target
    root_scale(right.yaxis, max(*kls, *targets), min(kls))
    (meter,) = right.plot([], [], "o-", color=POLICY, markersize=5)
    target = right.axhline(0, color=REJECTED, linestyle=":", linewidth=2)
    right.set(xlabel="fraction of its training", ylabel="sequence KL (nats)", xlim=(-0.03, 1.03))

    def update(state: Mapping[str, Any]) -> None:
        path.set_data(state["kl"], state["reward"])
        last.set_data(state["kl"][-1:], state["reward"][-1:])
        meter.set_data(np.asarray(state["step"]) / max(state["step"][-1], 1), state["kl"])
        target.set_visible(state["target"] is not None)
        target.set_ydata([state["target"] or 0.0] * 2)

    return BlittedFigure(figure, [path, last, meter, target], update)


def betas_figure(
    paths: Sequence[Sequence[Mapping[str, float]]], optimal: Any, usual: Mapping[str, np.ndarray]
) -> BlittedFigure:
    """One recorded run among those of other betas, and its pairs on the gradient-weight curve.

    The points of `paths` have `kl` and `reward`. A state has both, a list each, and what a state of
    `pairs_figure` has; `usual` is as there.
    """
    figure, (left, right) = wide(2)

    # reward against KL
    _draw_optimal(left, optimal)
    for points in paths:
        places = [p["kl"] for p in points], [p["reward"] for p in points]
        left.plot(*places, "o-", color=OPTIMUM, alpha=0.25, markersize=4)
    path, last = _path(left)
    kls = [point["kl"] for points in paths for point in points]
    root_scale(left.xaxis, max(kls), min(kls))

    # gradient weights
    cloud, curve, update_pairs = _pairs_on_curve(right, "weights", usual)

    def update(state: Mapping[str, Any]) -> None:
        path.set_data(state["kl"], state["reward"])
        last.set_data(state["kl"][-1:], state["reward"][-1:])
        update_pairs(state)

    return BlittedFigure(figure, [path, last, cloud, curve], update)


def curves_figure(steps: int) -> BlittedFigure:
    """Loss and margin of a run during training; a state has `step`, `loss` and `margin`, lists."""
    figure, (left, right) = wide(2)
    left.axhline(np.log(2), color=OPTIMUM, linestyle="--", label="log 2")
    (loss,) = left.plot([], [], color=POLICY, label="loss per pair (nats)")
    right.axhline(0, color=OPTIMUM, linewidth=0.8)
    (margin,) = right.plot([], [], color=CHOSEN, label="margin (beta x nats)")
    left.set(xlabel="step", xlim=(0, steps), ylim=(0, 1))
    right.set(xlabel="step", xlim=(0, steps), ylim=(-0.5, 4))
    for axes in (left, right):
        axes.legend(frameon=False, loc="upper left")

    def update(state: Mapping[str, Any]) -> None:
        loss.set_data(state["step"], state["loss"])
        margin.set_data(state["step"], state["margin"])
        left.set_ylim(expanded_limits(state["loss"], 0, 1))
        right.set_ylim(expanded_limits(state["margin"], -0.5, 4))
        for axes in (left, right):
            axes.set_xlim(expanded_limits(state["step"], 0, steps))

    return BlittedFigure(figure, [loss, margin], update)


def expanded_limits(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Limits that hold the finite `values`: `low` <= 0 < `high`, each doubled as often as needed.

    The background is redrawn only when a value passes a limit, not at every move of a slider.
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) and finite.min() < low == 0:
        low = -high / 16
    while len(finite) and finite.max() > high * (1 + 1e-9):
        high *= 2
    while len(finite) and finite.min() < low * (1 + 1e-9):
        low *= 2
    return low, high


def gae_figure(
    tokens: Sequence[str],
    rewards: Sequence[float],
    values: Sequence[float],
    limits: tuple[float, float],
) -> BlittedFigure:
    """A completion's tokens with their rewards and values, and below them their advantages.

    A state has `advantages` (L,), within `limits`.
    """
    figure = Figure(figsize=(8.4, 4.6), dpi=90, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    places, shown = np.arange(len(tokens)), check_labels(tokens, len(rewards), "tokens")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(0, color=OPTIMUM, linewidth=0.8)

    # what each token is paid, and what was expected before it
    top.bar(places, np.asarray(rewards), 0.7, color=REJECTED, label="reward of the token")
    top.plot(places, np.asarray(values), "o-", color=OPTIMUM, markersize=3, label="value before it")
    top.set_ylabel("standard deviations")
    top.legend(frameon=False, **ABOVE)

    # its advantage
    bars = bottom.bar(places, np.zeros(len(places)), 0.7, color=POLICY)
    bottom.set(ylabel="advantage", ylim=limits)
    bottom.set_xticks(places, shown, rotation=90, fontsize=8, family="monospace")

    def update(state: Mapping[str, Any]) -> None:
        _set_heights(bars, state["advantages"].tolist())

    return BlittedFigure(figure, [*bars], update)


def wide(panels: int) -> tuple[Figure, list[Any]]:
    """A figure as wide as a notebook's page, with panels side by side."""
    figure = Figure(figsize=(8.4, 3.4), dpi=90, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="x", labelsize=9)
    return figure, axes


def _set_heights(bars: Any, heights: Sequence[float]) -> None:
    for bar, height in zip(bars, heights):
        bar.set_height(height)


def _draw_optimal(axes: Any, optimal: Any) -> None:
    """The optimal frontier where its estimate is valid, and the names of the axes."""
    kl, reward = optimal.kl[optimal.valid], optimal.reward[optimal.valid]
    axes.plot(kl, reward, "--", color=OPTIMUM, label="optimal policy")
    axes.set(xlabel="sequence KL (nats)", ylabel="mean reward")
    axes.legend(frameon=False, loc="lower right")


def _path(axes: Any) -> tuple[Artist, Artist]:
    """The artists of one run: its evaluations, and the last of them."""
    (path,) = axes.plot([], [], "o-", color=POLICY, markersize=5)
    (last,) = axes.plot([], [], "o", color=CHOSEN, markersize=10)
    return path, last


def _pairs_on_curve(
    axes: Any, name: str, usual: Mapping[str, np.ndarray]
) -> tuple[Artist, Artist, Callable[[Mapping[str, Any]], None]]:
    """Pairs and the curve of `name` against the margin: two artists, and their update."""
    label, color = PAIRS[name]
    (curve,) = axes.plot([], [], color=OPTIMUM, zorder=1.9)
    (cloud,) = axes.plot([], [], "o", color=color, alpha=0.35, markersize=5)
    axes.set(xlabel="margin (beta x nats)", ylabel=label)
    least, most = min(0.0, usual[name].min()), max(1.0, usual[name].max())

    def update(state: Mapping[str, Any]) -> None:
        line = state["curve"]
        curve.set_data(line["margins"], line[name])
        cloud.set_data(state["margins"], state[name])

        # limits with a little room
        low, high = expanded_limits(line[name], least, most)
        room = 0.05 * (high - low)
        axes.set_xlim(line["margins"][0], line["margins"][-1])
        axes.set_ylim(low - room, high + room)

    update({**usual, "curve": usual})
    return cloud, curve, update
