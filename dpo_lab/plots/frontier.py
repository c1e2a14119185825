"""Figures of reward against KL, and of what each method needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots.style import (
    COLORS,
    METHODS,
    OPTIMUM,
    POLICY,
    REJECTED,
    labeled_figure,
    legend,
    looks,
    root_scale,
)


def plot_frontier(
    runs: Mapping[str, Sequence[dict[str, float]]], frontier: Any | None = None
) -> Figure:
    """Mean reward against sequence KL of named runs during training, under the optimal frontier.

    The points of a run have `reward`, `kl` and their `_se`. `frontier` is what `optimal_frontier`
    returns, drawn where the estimate is valid; a cross marks its end.
    """
    figure, axes = labeled_figure(
        "Reward against KL on held-out prefixes",
        "mean reward, P(positive)",
        x="sequence KL to the reference (nats)",
    )
    if frontier is not None:
        kl, reward = frontier.kl[frontier.valid], frontier.reward[frontier.valid]
        label = "optimal policy, estimated up to the cross"
        axes.plot(kl, reward, "--", color=OPTIMUM, label=label)
        if len(kl):
            end = np.argmax(kl)
            axes.plot(kl[end], reward[end], "x", color=OPTIMUM, markersize=9)

    # each run with its standard errors
    names = ("kl", "reward", "reward_se", "kl_se")
    for (name, points), (color, marker) in zip(runs.items(), looks(COLORS, "os^D")):
        values = [[point[name] for point in points] for name in names]
        style = {"marker": marker, "markersize": 4, "color": color}
        axes.errorbar(*values, label=for_figure(name), **style)
    low, high = axes.dataLim.intervaly
    axes.set(ylim=(min(0.4, low - 0.02), max(1.0, high + 0.02 * (high > 1))))
    legend(axes, loc="lower right")
    return figure


def plot_sweep(
    runs: Mapping[str, Sequence[Mapping[str, float]]], optimal: Any, band: np.ndarray
) -> Figure:
    """Every evaluation of each method, reward against sequence KL, under the optimal frontier.

    Points have `reward` and `kl`; `band` is (3, A): KL, lower and upper end of the frontier. The
    frontier ends in a cross where its estimate rests on too few samples.
    """
    figure, axes = labeled_figure(
        "Every method on held-out prefixes",
        "mean reward, P(positive)",
        x="sequence KL to the reference (nats)",
    )

    # the frontier, its band and its end
    valid = optimal.valid
    axes.fill_between(*band, color=OPTIMUM, alpha=0.2, linewidth=0)
    label = "optimal policy, with its 90% band"
    axes.plot(optimal.kl[valid], optimal.reward[valid], "--", color=OPTIMUM, label=label)
    end = np.argmax(np.where(valid, optimal.kl, -1))
    axes.plot(optimal.kl[end], optimal.reward[end], "x", color=OPTIMUM, markersize=9)

    # every evaluation
    for (name, points), (color, marker) in zip(runs.items(), looks(METHODS, "os^DvP*")):
        kl, reward = ([p[k] for p in points] for k in ("kl", "reward"))
        style = {"color": color, "markersize": 5, "alpha": 0.75, "markeredgewidth": 0}
        axes.plot(kl, reward, marker, label=for_figure(name), **style)
    kls = [point["kl"] for points in runs.values() for point in points]
    root_scale(axes.xaxis, max(kls), min(kls))
    legend(axes, loc="lower right", fontsize=9)
    return figure


def plot_betas(runs: Mapping[float, Sequence[Mapping[str, float]]], optimal: Any) -> Figure:
    """Reward against sequence KL during training, a panel per beta, under the optimal frontier."""
    figure = Figure(figsize=(8.4, 2.7), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    kls = [point["kl"] for points in runs.values() for point in points]
    for axes, (beta, points) in zip(panels, runs.items()):
        axes.plot(optimal.kl[optimal.valid], optimal.reward[optimal.valid], "--", color=OPTIMUM)
        kl, reward = ([p[name] for p in points] for name in ("kl", "reward"))
        axes.plot(kl, reward, "o-", color=POLICY, markersize=4)
        axes.set_title(f"beta {beta:g}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
        root_scale(axes.xaxis, max(kls), min(kls))
    figure.axes[0].set_ylabel("mean reward")
    figure.supxlabel("sequence KL (nats); dashed: the optimal policy", fontsize=10)
    return figure


def plot_memory(methods: Mapping[str, Mapping[str, str]], gigabytes: float) -> Figure:
    """The models that each method keeps in memory, as bars of `gigabytes` each.

    `methods` gives, for each method and each role, what its model is used for.
    """
    figure = Figure(figsize=(8.4, 0.9 + 0.6 * len(methods)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for y, roles in enumerate(methods.values()):
        for x, (role, use) in enumerate(roles.items()):
            color = REJECTED if "trained" in use else POLICY
            axes.barh(y, 0.94 * gigabytes, left=x * gigabytes, height=0.7, color=color, alpha=0.8)
            place = ((x + 0.47) * gigabytes, y)
            style = {"ha": "center", "va": "center", "color": "white", "fontsize": 9}
            axes.annotate(for_figure(f"{role}\n{use}"), place, **style)
    axes.set_yticks(range(len(methods)), [for_figure(method) for method in methods])
    axes.invert_yaxis()
    axes.set(xlabel="GB of weights")
    axes.set_xticks(np.arange(max(map(len, methods.values())) + 1) * gigabytes)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure
