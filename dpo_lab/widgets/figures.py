"""Figures of which some artists move to another state, and the rest stands still: what sliders redraw in milliseconds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from dpo_lab.plots import CHOSEN, OPTIMUM, POLICY, REJECTED, check_labels, root_scale


class BlittedFigure(NamedTuple):
    """A figure, those of its artists that move, and what moves them to another state."""

    figure: Figure
    artists: list[Artist]
    update: Callable[[Mapping[str, Any]], None]


def _wide(panels: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(8.4, 3.4), dpi=90, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="x", labelsize=9)
    return figure, axes


def holding(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Limits that hold the finite `values`: `low` <= 0 and `high` > 0, each doubled as often as it takes.

    So a picture is drawn anew only where a value passes a limit, and not at each move.
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


def _hold(panel: Any, values: Sequence[float], low: float, high: float) -> None:
    """Set the limits of y to `holding`, and a little room."""
    low, high = holding(values, low, high)
    panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def optimum_figure(
    reference: Tensor, labels: Sequence[str], kls: Sequence[float], rewards: Sequence[float]
) -> BlittedFigure:
    """Reference and optimum as bars, and the optimum's place on the frontier; a state has `policy`, `kl` and `reward`."""
    figure, (left, right) = _wide(2)
    shown, places = check_labels(labels, len(reference), "outcomes"), np.arange(len(labels))
    left.bar(places - 0.2, np.asarray(reference), 0.4, color=OPTIMUM, label="reference")
    bars = left.bar(places + 0.2, np.zeros(len(labels)), 0.4, color=CHOSEN, label="optimum")
    left.set_xticks(places, shown)
    left.set(ylim=(0, 1), ylabel="probability")
    left.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2
    )  # where no bar reaches
    right.plot(kls, rewards, color=OPTIMUM, label="optimum for every beta")
    (point,) = right.plot([], [], "o", color=CHOSEN, markersize=9)
    right.set(xlabel="KL to the reference (nats)", ylabel="mean reward")
    right.legend(frameon=False, loc="lower right")

    def update(state: Mapping[str, Any]) -> None:
        for bar, height in zip(bars, state["policy"].tolist()):
            bar.set_height(height)
        point.set_data([state["kl"]], [state["reward"]])

    return BlittedFigure(figure, [*bars, point], update)


def bandit_figure(labels: Sequence[str]) -> BlittedFigure:
    """Two distributions as bars; a state has `reference` and `policy`."""
    figure, (axes,) = _wide(1)
    places = np.arange(len(labels))
    before = axes.bar(places - 0.2, np.zeros(len(labels)), 0.4, color=OPTIMUM, label="reference")
    after = axes.bar(places + 0.2, np.zeros(len(labels)), 0.4, color=CHOSEN, label="optimum")
    axes.set_xticks(places, check_labels(labels, len(labels), "outcomes"))
    axes.set(ylim=(0, 1), ylabel="probability")
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2
    )  # where no bar reaches

    def update(state: Mapping[str, Any]) -> None:
        for bars, heights in ((before, state["reference"]), (after, state["policy"])):
            for bar, height in zip(bars, heights.tolist()):
                bar.set_height(height)

    return BlittedFigure(figure, [*before, *after], update)


def comparisons_figure(
    labels: Sequence[str], likeliest: Sequence[float], observed: Sequence[float], most: float = 4.0
) -> BlittedFigure:
    """Rewards as bars beside the likeliest ones, and predicted shares beside `observed`; a state has `rewards`, `predicted`.

    Rewards are from -`most` to `most`, in nats.
    """
    figure, (left, right) = _wide(2)
    places = np.arange(len(labels))
    bars = left.bar(places, np.zeros(len(labels)), 0.6, color=POLICY, label="your rewards")
    marks = left.plot(
        places,
        likeliest,
        "_",
        color=REJECTED,
        markersize=30,
        markeredgewidth=2,
        label="likeliest rewards",
    )
    left.set_xticks(places, check_labels(labels, len(likeliest), "items"))
    left.set(ylim=(-most, 1.375 * most), ylabel="reward (nats)")
    left.axhline(0, color=OPTIMUM, linewidth=0.8)
    left.legend(frameon=False, loc="upper left", ncols=2)
    right.plot([0, 1], [0, 1], "--", color=OPTIMUM, label="prediction = observation")
    (points,) = right.plot([], [], "o", color=POLICY, markersize=8)
    right.set(
        xlabel="predicted share won",
        ylabel="observed share won",
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
    )
    right.legend(frameon=False, loc="upper left")

    def update(state: Mapping[str, Any]) -> None:
        for bar, height in zip(bars, state["rewards"]):
            bar.set_height(height)
        points.set_data(state["predicted"], observed)

    return BlittedFigure(
        figure, [*bars, *marks, points], update
    )  # the marks move not, but stand before the bars


def run_figure(
    steps: Sequence[int], chosen: Sequence[float], rejected: Sequence[float], furthest: float
) -> BlittedFigure:
    """Mean log-ratios over a run with the step marked, and pairs at that step; a state has `step`, `chosen`, `rejected`."""
    figure, (left, right) = _wide(2)
    left.plot(steps, chosen, color=CHOSEN, label="chosen")
    left.plot(steps, rejected, "--", color=REJECTED, label="rejected")
    left.axhline(0, color=OPTIMUM, linewidth=0.8)
    left.set(xlabel="step", ylabel="mean log-ratio (nats)")
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    mark = left.axvline(0, color=POLICY, linewidth=2)
    right.plot([-furthest, furthest], [-furthest, furthest], "--", color=OPTIMUM, label="margin 0")
    (cloud,) = right.plot([], [], "o", color=POLICY, alpha=0.4, markersize=5)
    limits = (-1.05 * furthest, 1.05 * furthest)
    right.set(
        xlabel="log-ratio of rejected (nats)",
        ylabel="log-ratio of chosen (nats)",
        xlim=limits,
        ylim=limits,
    )
    right.legend(frameon=False, loc="upper left")

    def update(state: Mapping[str, Any]) -> None:
        mark.set_xdata([state["step"], state["step"]])
        cloud.set_data(state["rejected"], state["chosen"])

    return BlittedFigure(figure, [mark, cloud], update)


def sweep_figure(
    rows: Sequence[Mapping[str, float]], optimal: Any, targets: Sequence[float] = ()
) -> BlittedFigure:
    """One run among all, reward against KL, and its KL as it trains; a state has `kl`, `reward`, `step` and `target`.

    `target` is one of the `targets`, a KL in nats, or None.
    """
    figure, (left, right) = _wide(2)
    valid = optimal.valid
    left.plot(optimal.kl[valid], optimal.reward[valid], "--", color=OPTIMUM, label="optimal policy")
    left.plot(
        [r["kl"] for r in rows],
        [r["reward"] for r in rows],
        "o",
        color=OPTIMUM,
        alpha=0.25,
        markersize=4,
        markeredgewidth=0,
    )
    (path,) = left.plot([], [], "o-", color=POLICY, markersize=5)
    (last,) = left.plot([], [], "o", color=CHOSEN, markersize=10)
    left.set(xlabel="sequence KL (nats)", ylabel="mean reward")
    left.legend(frameon=False, loc="lower right")
    kls = [row["kl"] for row in rows]
    root_scale(left.xaxis, max(kls), min(kls))
    root_scale(right.yaxis, max(*kls, *targets), min(kls))
    (meter,) = right.plot([], [], "o-", color=POLICY, markersize=5)
    target = right.axhline(0, color=REJECTED, linestyle=":", linewidth=2)
    right.set(xlabel="share of its training", ylabel="sequence KL (nats)", xlim=(-0.03, 1.03))

    def update(state: Mapping[str, Any]) -> None:
        path.set_data(state["kl"], state["reward"])
        last.set_data(state["kl"][-1:], state["reward"][-1:])
        meter.set_data(np.asarray(state["step"]) / max(state["step"][-1], 1), state["kl"])
        target.set_visible(state["target"] is not None)
        target.set_ydata([state["target"] or 0.0] * 2)

    return BlittedFigure(figure, [path, last, meter, target], update)


PAIRS = {
    "losses": ("loss", POLICY),
    "weights": ("gradient weight", REJECTED),
}  # what a panel shows: its label and color


def pairs_figure(usual: Mapping[str, np.ndarray]) -> BlittedFigure:
    """Pairs on the curves of loss and gradient weight; a state has `margins`, `losses`, `weights`, and those of its `curve`.

    `usual` is the curve whose limits are kept as long as they hold the state.
    """
    figure, panels = _wide(2)
    shown = [_pairs_on_curve(axes, name, usual) for axes, name in zip(panels, PAIRS)]

    def update(state: Mapping[str, Any]) -> None:
        for _, _, move in shown:
            move(state)

    return BlittedFigure(figure, [artists[i] for i in (0, 1) for artists in shown], update)


def _pairs_on_curve(
    axes: Any, name: str, usual: Mapping[str, np.ndarray]
) -> tuple[Artist, Artist, Callable[[Mapping[str, Any]], None]]:
    """The artists of pairs and of the curve of `name` against the margin, and what moves both."""
    label, color = PAIRS[name]
    (curve,) = axes.plot([], [], color=OPTIMUM, zorder=1.9)
    (cloud,) = axes.plot([], [], "o", color=color, alpha=0.35, markersize=5)
    axes.set(xlabel="margin (beta x nats)", ylabel=label)
    low, high = min(0.0, usual[name].min()), max(1.0, usual[name].max())

    def move(state: Mapping[str, Any]) -> None:
        line = state["curve"]
        curve.set_data(line["margins"], line[name])
        cloud.set_data(state["margins"], state[name])
        axes.set_xlim(line["margins"][0], line["margins"][-1])
        _hold(axes, line[name], low, high)

    move({**usual, "curve": usual})
    return cloud, curve, move


def curves_figure(steps: int) -> BlittedFigure:
    """Loss and margin of a run while it trains; a state has `step`, `loss` and `margin`, each a list."""
    figure, (left, right) = _wide(2)
    left.axhline(np.log(2), color=OPTIMUM, linestyle="--", label="log 2")
    (loss,) = left.plot([], [], color=POLICY, label="loss a pair (nats)")
    right.axhline(0, color=OPTIMUM, linewidth=0.8)
    (margin,) = right.plot([], [], color=CHOSEN, label="margin (beta x nats)")
    left.set(xlabel="step", xlim=(0, steps), ylim=(0, 1))
    right.set(xlabel="step", xlim=(0, steps), ylim=(-0.5, 4))
    for axes in (left, right):
        axes.legend(frameon=False, loc="upper left")

    def update(state: Mapping[str, Any]) -> None:
        loss.set_data(state["step"], state["loss"])
        margin.set_data(state["step"], state["margin"])
        left.set_ylim(holding(state["loss"], 0, 1))
        right.set_ylim(holding(state["margin"], -0.5, 4))
        for axes in (left, right):
            axes.set_xlim(holding(state["step"], 0, steps))

    return BlittedFigure(figure, [loss, margin], update)


def betas_figure(
    paths: Sequence[Sequence[Mapping[str, float]]], optimal: Any, usual: Mapping[str, np.ndarray]
) -> BlittedFigure:
    """One recorded run among those of other betas: reward against KL, and its pairs on the curve of the gradient weight.

    `paths` have points with `kl` and `reward`; `usual` and a state, beside `kl` and `reward`, are as in `pairs_figure`.
    """
    figure, (left, right) = _wide(2)
    valid = optimal.valid
    left.plot(optimal.kl[valid], optimal.reward[valid], "--", color=OPTIMUM, label="optimal policy")
    for points in paths:
        left.plot(
            [p["kl"] for p in points],
            [p["reward"] for p in points],
            "o-",
            color=OPTIMUM,
            alpha=0.25,
            markersize=4,
        )
    (path,) = left.plot([], [], "o-", color=POLICY, markersize=5)
    (last,) = left.plot([], [], "o", color=CHOSEN, markersize=10)
    left.set(xlabel="sequence KL (nats)", ylabel="mean reward")
    left.legend(frameon=False, loc="lower right")
    kls = [point["kl"] for points in paths for point in points]
    root_scale(left.xaxis, max(kls), min(kls))
    cloud, curve, move = _pairs_on_curve(right, "weights", usual)

    def update(state: Mapping[str, Any]) -> None:
        path.set_data(state["kl"], state["reward"])
        last.set_data(state["kl"][-1:], state["reward"][-1:])
        move(state)

    return BlittedFigure(figure, [path, last, cloud, curve], update)
