"""Figures of distributions, rewards and what beta does to them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dpo_lab.engine.arguments import floats
from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots.style import (
    CHOSEN,
    OPTIMUM,
    POLICY,
    REJECTED,
    STROKES,
    check_labels,
    labeled_figure,
    legend,
    looks,
)


def plot_distributions(
    labels: Sequence[str], distributions: Mapping[str, Sequence[float]]
) -> Figure:
    """Named distributions over the same outcomes, as bars side by side."""
    figure, axes = labeled_figure("Probabilities", "probability", x="outcome")
    width, places = 0.8 / len(distributions), np.arange(len(labels))
    own = looks((OPTIMUM, CHOSEN, POLICY, REJECTED), (None, "//", "..", "xx"), beside=False)
    for k, ((name, values), (color, hatch)) in enumerate(zip(distributions.items(), own)):
        values = floats(f"distributions[{name!r}]", values)
        shown = check_labels(labels, len(values), f"probabilities in {name!r}")
        left = places + (k - (len(distributions) - 1) / 2) * width
        axes.bar(left, values, width, label=for_figure(name), color=color, hatch=hatch)
    axes.set_xticks(places, shown)
    axes.set_ylim(0, 1)
    legend(axes)
    return figure


def plot_kl(labels: Sequence[str], p: Sequence[float], q: Sequence[float]) -> Figure:
    """KL(p || q) by eye, for positive (n,) distributions over the same outcomes.

    Above the probabilities, below what each outcome adds: p log(p / q), in nats. The title has the
    sum. Raises ValueError for a probability that is not positive.
    """
    p, q = floats("p", p), floats("q", q)
    shown, places = check_labels(labels, len(p), "outcomes"), np.arange(len(p))
    check_labels(labels, len(q), "probabilities in q")
    for name, values in (("p", p), ("q", q)):
        if not (values > 0).all():
            raise ValueError(
                f"{name} is {values.tolist()}; each probability must be positive: leave out "
                "outcomes that have none"
            )
    parts = p * np.log(p / q)
    title = f"KL(p || q) = {parts.sum():.3f} nats"
    figure, (top, bottom) = labeled_figure(title, "probability", "p log(p / q), nats", x="outcome")

    # the two distributions
    top.bar(places - 0.2, p, 0.4, label="p", color=POLICY)
    top.bar(places + 0.2, q, 0.4, label="q", color=OPTIMUM, hatch="//")
    legend(top)

    # what each outcome adds, positive or negative
    bottom.bar(places, parts, 0.4, color=[CHOSEN if part > 0 else REJECTED for part in parts])
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set_xticks(places, shown)
    return figure


def plot_tangent() -> Figure:
    """log t and its tangent at t = 1, the line t - 1, which lies above it everywhere else."""
    t = np.linspace(0.05, 3, 300)
    figure, axes = labeled_figure("log t never exceeds t - 1", "height", x="t = q / p")
    axes.plot(t, t - 1, color=POLICY, label="t - 1")
    axes.plot(t, np.log(t), color=REJECTED, linestyle="--", label="log t")
    axes.fill_between(t, np.log(t), t - 1, color=OPTIMUM, alpha=0.2, label="g(t) = t - 1 - log t")
    axes.plot(1, 0, "o", color="black")
    legend(axes)
    return figure


def plot_beta_path(
    betas: Sequence[float],
    policies: np.ndarray,
    labels: Sequence[str],
    value: Sequence[float],
    spent: Sequence[float],
) -> Figure:
    """How the optimal policy changes with beta, from (B,) values of beta.

    Above the probabilities (B, n), below the mean reward and the KL (B,).
    """
    policies = floats("policies", policies)
    value, spent = floats("value", value), floats("spent", spent)
    figure, (top, bottom) = labeled_figure(
        "The optimal policy from beta = infinity to 0", "probability", "mean reward", x="beta"
    )

    # probabilities
    shown = check_labels(labels, policies.shape[1], "outcomes")
    strokes = (*STROKES, (0, (5, 1)), (0, (1, 1)))
    own = looks((OPTIMUM, REJECTED, POLICY, CHOSEN), strokes)
    for label, line, (color, style) in zip(shown, policies.T, own):
        top.plot(betas, line, linestyle=style, color=color, label=label)
    legend(top)

    # mean reward and KL
    bottom.plot(betas, value, color=CHOSEN, label="mean reward")
    bottom.set_xscale("log")
    bottom.invert_xaxis()
    right = bottom.twinx()
    right.plot(betas, spent, color=POLICY, linestyle="--", label="KL to the reference")
    right.set_ylabel("KL (nats)")
    right.spines["top"].set_visible(False)
    lines = [*bottom.get_lines(), *right.get_lines()]
    bottom.legend(lines, [line.get_label() for line in lines], frameon=False)
    return figure


def plot_simplex(
    value: Callable[[Tensor], Tensor],
    labels: Sequence[str],
    curves: Mapping[str, Tensor],
    points: Mapping[str, Tensor],
    steps: int = 80,
) -> Figure:
    """A value over all distributions of three outcomes, as contours.

    Curves (K, 3) and points (3,) of distributions are drawn over them; `steps` is the fineness of
    the grid.
    """
    shown = check_labels(labels, 3, "outcomes")
    figure = Figure(figsize=(6.4, 5.2), dpi=120, layout="constrained")
    axes = figure.subplots()

    # the value on a triangular grid of distributions
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(3) / 2]])
    grid = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    grid = torch.tensor(grid).double() / steps
    places = (grid.numpy() @ corners).T
    surface = axes.tricontourf(*places, value(grid).numpy(), levels=16, cmap="cividis")
    figure.colorbar(surface, ax=axes, label="objective", shrink=0.8)

    # curves and points over it
    own = looks(("white", REJECTED), STROKES, beside=False)
    for (name, curve), (color, style) in zip(curves.items(), own):
        places = (np.asarray(curve) @ corners).T
        axes.plot(*places, style, color=color, linewidth=2, label=for_figure(name))
    own = looks("so^D", (REJECTED, POLICY, CHOSEN), beside=False)
    for (name, point), (marker, color) in zip(points.items(), own):
        style = {"color": color, "markeredgecolor": "white", "markersize": 9}
        axes.plot(*np.asarray(point) @ corners, marker, label=for_figure(name), **style)

    # names at the corners in place of axes
    for label, corner, drop in zip(shown, corners, (-0.07, -0.07, 0.03)):
        axes.text(corner[0], corner[1] + drop, label, ha="center")
    axes.set(aspect="equal", xlim=(-0.15, 1.15), ylim=(-0.12, 0.95))
    axes.axis("off")
    figure.legend(loc="outside lower center", ncols=3, facecolor="#cccccc")
    return figure


def plot_intervals(
    labels: Sequence[str],
    low: Sequence[float],
    center: Sequence[float],
    high: Sequence[float],
    *,
    title: str = "Estimates with intervals",
    x_label: str = "reward (nats)",
    goal: float = 0.0,
) -> Figure:
    """Estimates with their intervals, one line each, the first at the top; a line at `goal`."""
    low, center, high = floats("low", low), floats("center", center), floats("high", high)
    figure, axes = labeled_figure(title, "", x=x_label)
    shown, places = check_labels(labels, len(center), "estimates"), np.arange(len(labels))[::-1]
    axes.hlines(places, low, high, color=POLICY)
    axes.plot(center, places, "o", color=POLICY)
    axes.axvline(goal, color=OPTIMUM, linewidth=0.8)
    axes.set_yticks(places, shown)
    return figure


def plot_calibration(
    predicted: Sequence[float], observed: Sequence[float], count: Sequence[float]
) -> Figure:
    """Observed fractions against predicted probabilities, with two binomial standard errors.

    The area of a point is proportional to its `count` of comparisons.
    """
    predicted, observed = floats("predicted", predicted), floats("observed", observed)
    count = floats("count", count)
    figure, axes = labeled_figure("Calibration", "observed fraction", x="predicted probability")
    axes.plot([0, 1], [0, 1], color=OPTIMUM, linestyle="--", label="perfectly calibrated")
    error = 2 * np.sqrt(predicted * (1 - predicted) / count)
    axes.errorbar(predicted, observed, error, fmt="none", color=POLICY, alpha=0.5)
    axes.scatter(predicted, observed, 50 * count / count.max(), color=POLICY, label="comparisons")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    return figure
