"""Figures from arrays. Each function returns a matplotlib Figure and leaves pyplot alone.

Names and labels are shown letter by letter (`escaping.for_figure`); titles and the names of axes may hold matplotlib's
mathematics. Everything that is given is drawn, within the axes, or refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.scale import FuncScale
from matplotlib.ticker import FixedLocator
from torch import Tensor

from dpo_lab.engine.arguments import floats, integers
from dpo_lab.engine.escaping import for_figure, for_html

CONTENDERS = ("#2c5f9e", "#c0392b", "#1b7f5c", "#b07aa1", "#e69f00", "#222222", "#56b4e9")

CHOSEN, REJECTED, POLICY, OPTIMUM = "#1b7f5c", "#c0392b", "#2c5f9e", "#666666"

COLORS, STROKES = (POLICY, REJECTED, CHOSEN, OPTIMUM), ("-", "--", "-.", ":")


def looks(
    colors: Sequence[Any], others: Sequence[Any], *, beside: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Colors with strokes, markers or hatches, for any number of things: a color that comes again has another one.

    The second moves on with the color, or, unless `beside`, only when the colors are through.
    """
    for k in count():
        turn = k // len(colors)
        yield colors[k % len(colors)], others[(turn + k * beside) % len(others)]


def check_labels(labels: Sequence[str], n: int, what: str) -> list[str]:
    """The labels as matplotlib shows them letter by letter. Raises ValueError unless there is one for each of `n`."""
    if len(labels) != n:
        raise ValueError(
            f"labels has {len(labels)} entries, {list(labels)}, and there are {n} {what}; give one label for each"
        )
    return [for_figure(label) for label in labels]


def _figure(title: str, *labels: str, x: str = "step") -> tuple[Figure, Any]:
    """A figure with one panel for each of the y `labels`, stacked."""
    figure = Figure(figsize=(6.4, 3 + len(labels)), dpi=120, layout="constrained")
    panels = figure.subplots(len(labels), sharex=True, squeeze=False)[:, 0]
    panels[0].set_title(title)
    panels[-1].set_xlabel(x)
    for axes, label in zip(panels, labels):
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, panels if len(labels) > 1 else panels[0]


def _legend(axes: Any, **options: Any) -> None:
    """A legend inside the axes, or under them where it would cover them."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 8:
        axes.legend(frameon=False, **options)
    else:
        axes.figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=3)


def _curve(axes: Any, metrics: Sequence[dict[str, Any]], name: str, color: str, label: str) -> None:
    """A metric against the step, faint, under its running mean over a tenth of the steps."""
    points = [(line["step"], line[name]) for line in metrics if name in line]
    steps, values = map(np.array, zip(*points))
    width = max(1, len(values) // 10)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    starts = np.maximum(np.arange(len(values)) + 1 - width, 0)
    ends = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), color=color, label=label)


def plot_distributions(
    labels: Sequence[str], distributions: Mapping[str, Sequence[float]]
) -> Figure:
    """Named distributions over the same outcomes, as bars side by side."""
    figure, axes = _figure("Probabilities", "probability", x="outcome")
    width, places = 0.8 / len(distributions), np.arange(len(labels))
    own = looks((OPTIMUM, CHOSEN, POLICY, REJECTED), (None, "//", "..", "xx"), beside=False)
    for k, ((name, values), (color, hatch)) in enumerate(zip(distributions.items(), own)):
        values = floats(f"distributions[{name!r}]", values)
        shown = check_labels(labels, len(values), f"probabilities in {name!r}")
        left = places + (k - (len(distributions) - 1) / 2) * width
        axes.bar(left, values, width, label=for_figure(name), color=color, hatch=hatch)
    axes.set_xticks(places, shown)
    axes.set_ylim(0, 1)
    _legend(axes)
    return figure


def plot_beta_path(
    betas: Sequence[float],
    policies: np.ndarray,
    labels: Sequence[str],
    value: Sequence[float],
    spent: Sequence[float],
) -> Figure:
    """How the optimal policy changes with beta: probabilities (B, n), and under them mean reward and KL (B,)."""
    policies, value, spent = (
        floats("policies", policies),
        floats("value", value),
        floats("spent", spent),
    )
    figure, (top, bottom) = _figure(
        "The optimal policy from beta = infinity to 0", "probability", "mean reward", x="beta"
    )
    shown, strokes = (
        check_labels(labels, policies.shape[1], "outcomes"),
        (*STROKES, (0, (5, 1)), (0, (1, 1))),
    )
    for label, line, (color, style) in zip(
        shown, policies.T, looks((OPTIMUM, REJECTED, POLICY, CHOSEN), strokes)
    ):
        top.plot(betas, line, linestyle=style, color=color, label=label)
    bottom.plot(betas, value, color=CHOSEN, label="mean reward")
    bottom.set_xscale("log")
    bottom.invert_xaxis()
    right = bottom.twinx()
    right.plot(betas, spent, color=POLICY, linestyle="--", label="KL to the reference")
    right.set_ylabel("KL (nats)")
    right.spines["top"].set_visible(False)
    _legend(top)
    lines = [*bottom.get_lines(), *right.get_lines()]
    bottom.legend(lines, [line.get_label() for line in lines], frameon=False)
    return figure


def plot_lines(
    title: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Named curves over one axis, told apart by color and by stroke."""
    figure, axes = _figure(title, y_label, x=x_label)
    x = floats("x", x)
    for (name, values), (color, style) in zip(lines.items(), looks(COLORS, STROKES)):
        values = floats(f"lines[{name!r}]", values)
        if len(values) != len(x):
            raise ValueError(
                f"line {name!r} has {len(values)} values and x has {len(x)}; there must be one for each"
            )
        axes.plot(x, values, color=color, linestyle=style, label=for_figure(name))
    _legend(axes)
    return figure


def plot_band(
    title: str,
    x: Sequence[float],
    values: np.ndarray,
    lines: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
) -> Figure:
    """Mean of `values` (len(x), seeds) with the band from the 10th to the 90th percentile, beside theory, both axes in logs."""
    x, values = floats("x", x), floats("values", values)
    figure, axes = _figure(title, y_label, x=x_label)
    axes.fill_between(
        x,
        *np.quantile(values, (0.1, 0.9), axis=1),
        color=POLICY,
        alpha=0.2,
        label="10% to 90% of seeds",
    )
    axes.plot(x, values.mean(1), "o-", color=POLICY, label="mean of seeds")
    for name, line in lines.items():
        axes.plot(x, floats(f"lines[{name!r}]", line), "--", color=OPTIMUM, label=for_figure(name))
    axes.set(xscale="log", yscale="log")
    _legend(axes)
    return figure


def plot_race(
    title: str,
    racers: Mapping[str, tuple[Sequence[float], np.ndarray]],
    x_label: str,
    y_label: str,
    *,
    goal: float | None = None,
) -> Figure:
    """Median and band from the 10th to the 90th percentile of each racer, (x, values (len(x), seeds)), both axes in logs."""
    figure, axes = _figure(title, y_label, x=x_label)
    for (name, (x, values)), (color, style) in zip(racers.items(), looks(COLORS, STROKES)):
        low, middle, high = np.quantile(
            floats(f"racers[{name!r}]", values), (0.1, 0.5, 0.9), axis=1
        )
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, middle, color=color, linestyle=style, label=for_figure(name))
    if goal is not None:
        axes.axhline(goal, color=OPTIMUM, linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    _legend(axes)
    return figure


def plot_simplex(
    value: Callable[[Tensor], Tensor],
    labels: Sequence[str],
    curves: Mapping[str, Tensor],
    points: Mapping[str, Tensor],
    steps: int = 80,
) -> Figure:
    """A value over all distributions of three outcomes as contours, with curves (K, 3) and points (3,) among them."""
    corners, shown = (
        np.array([[0, 0], [1, 0], [0.5, np.sqrt(3) / 2]]),
        check_labels(labels, 3, "outcomes"),
    )
    grid = (
        torch.tensor(
            [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
        ).double()
        / steps
    )
    figure = Figure(figsize=(6.4, 5.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    surface = axes.tricontourf(
        *(grid.numpy() @ corners).T, value(grid).numpy(), levels=16, cmap="cividis"
    )
    figure.colorbar(surface, ax=axes, label="objective", shrink=0.8)
    for (name, curve), (color, style) in zip(
        curves.items(), looks(("white", REJECTED), STROKES, beside=False)
    ):
        axes.plot(
            *(np.asarray(curve) @ corners).T,
            style,
            color=color,
            linewidth=2,
            label=for_figure(name),
        )
    for (name, point), (marker, color) in zip(
        points.items(), looks("so^D", (REJECTED, POLICY, CHOSEN), beside=False)
    ):
        place = np.asarray(point) @ corners
        axes.plot(
            *place,
            marker,
            color=color,
            markeredgecolor="white",
            markersize=9,
            label=for_figure(name),
        )
    for label, corner, drop in zip(shown, corners, (-0.07, -0.07, 0.03)):
        axes.text(corner[0], corner[1] + drop, label, ha="center")
    axes.set(aspect="equal", xlim=(-0.15, 1.15), ylim=(-0.12, 0.95))
    axes.axis("off")
    figure.legend(loc="outside lower center", ncols=3, facecolor="#cccccc")
    return figure


def plot_intervals(
    labels: Sequence[str], low: Sequence[float], center: Sequence[float], high: Sequence[float]
) -> Figure:
    """Estimates with their intervals, one line each, the first at the top."""
    low, center, high = floats("low", low), floats("center", center), floats("high", high)
    figure, axes = _figure("Estimates with intervals", "", x="reward (nats)")
    shown, places = check_labels(labels, len(center), "estimates"), np.arange(len(labels))[::-1]
    axes.hlines(places, low, high, color=POLICY)
    axes.plot(center, places, "o", color=POLICY)
    axes.axvline(0, color=OPTIMUM, linewidth=0.8)
    axes.set_yticks(places, shown)
    return figure


def plot_calibration(
    predicted: Sequence[float], observed: Sequence[float], count: Sequence[float]
) -> Figure:
    """Observed share against predicted probability, points as large as they are many, with two binomial standard errors."""
    predicted, observed, count = (
        floats("predicted", predicted),
        floats("observed", observed),
        floats("count", count),
    )
    figure, axes = _figure("Calibration", "observed share", x="predicted probability")
    axes.plot([0, 1], [0, 1], color=OPTIMUM, linestyle="--", label="perfectly calibrated")
    error = 2 * np.sqrt(predicted * (1 - predicted) / count)
    axes.errorbar(predicted, observed, error, fmt="none", color=POLICY, alpha=0.5)
    axes.scatter(predicted, observed, 50 * count / count.max(), color=POLICY, label="comparisons")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    return figure


def plot_loss(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Loss a pair against the step, with log 2, where every sigmoid run starts."""
    figure, axes = _figure("Loss", "loss a pair (nats)")
    _curve(axes, metrics, "loss", POLICY, "training batch, running mean")
    axes.axhline(
        np.log(2), color=OPTIMUM, linestyle="--", label="log 2: the policy is the reference"
    )
    axes.legend(frameon=False)
    return figure


def plot_rewards(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Implicit rewards of chosen and rejected, and under them the share of pairs ranked rightly, against the step."""
    figure, (rewards, accuracy) = _figure(
        "Implicit rewards and accuracy", "implicit reward (beta x nats)", "share ranked rightly"
    )
    _curve(rewards, metrics, "rewards/chosen", CHOSEN, "chosen")
    _curve(rewards, metrics, "rewards/rejected", REJECTED, "rejected")
    _curve(accuracy, metrics, "rewards/accuracies", POLICY, "accuracy")
    accuracy.axhline(0.5, color=OPTIMUM, linewidth=0.8)
    rewards.legend(frameon=False)
    return figure


def plot_margins(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Margin of the implicit rewards against the step."""
    figure, axes = _figure("Margin", "reward of chosen minus rejected (beta x nats)")
    _curve(axes, metrics, "rewards/margins", POLICY, "training batch, running mean")
    axes.axhline(0, color=OPTIMUM, linewidth=0.8)
    axes.legend(frameon=False)
    return figure


def plot_frontier(
    runs: Mapping[str, Sequence[dict[str, float]]], frontier: Any | None = None
) -> Figure:
    """Mean reward against sequence KL of named runs as training goes on, under the best that any policy can reach.

    The points of a run have `reward`, `kl` and their `_se`; `frontier` is what `optimal_frontier` returns, drawn only while
    the estimate is valid.
    """
    figure, axes = _figure(
        "Reward against KL on held-out prefixes",
        "mean reward, P(positive)",
        x="sequence KL to the reference (nats)",
    )
    if frontier is not None:
        valid = frontier.valid
        axes.plot(
            frontier.kl[valid],
            frontier.reward[valid],
            color=OPTIMUM,
            linestyle="--",
            label="optimal policy, estimated from the reference",
        )
    for (name, points), (color, marker) in zip(runs.items(), looks(COLORS, "os^D")):
        kl, reward, kl_se, reward_se = (
            [p[k] for p in points] for k in ("kl", "reward", "kl_se", "reward_se")
        )
        axes.errorbar(
            kl,
            reward,
            reward_se,
            kl_se,
            marker=marker,
            markersize=4,
            color=color,
            label=for_figure(name),
        )
    low, high = axes.dataLim.intervaly
    axes.set(ylim=(min(0.4, low - 0.02), max(1.0, high + 0.02 * (high > 1))))
    _legend(axes, loc="lower right")
    return figure


def plot_sweep(
    runs: Mapping[str, Sequence[Mapping[str, float]]], optimal: Any, band: np.ndarray
) -> Figure:
    """Every evaluation of each method, reward against sequence KL, under the optimal frontier with its `band` (3, A).

    Points have `reward` and `kl`; the frontier ends in a cross where too few samples bear the estimate.
    """
    figure, axes = _figure(
        "Every contender on held-out prefixes",
        "mean reward, P(positive)",
        x="sequence KL to the reference (nats)",
    )
    valid = optimal.valid
    axes.fill_between(*band, color=OPTIMUM, alpha=0.2, linewidth=0)
    axes.plot(
        optimal.kl[valid],
        optimal.reward[valid],
        "--",
        color=OPTIMUM,
        label="optimal policy, with its 90 % band",
    )
    end = np.argmax(np.where(valid, optimal.kl, -1))
    axes.plot(optimal.kl[end], optimal.reward[end], "x", color=OPTIMUM, markersize=9)
    for (name, points), (color, marker) in zip(runs.items(), looks(CONTENDERS, "os^DvP*")):
        kl, reward = ([p[k] for p in points] for k in ("kl", "reward"))
        axes.plot(
            kl,
            reward,
            marker,
            color=color,
            markersize=5,
            alpha=0.75,
            markeredgewidth=0,
            label=for_figure(name),
        )
    kls = [point["kl"] for points in runs.values() for point in points]
    root_scale(axes.xaxis, max(kls), min(kls))
    _legend(axes, loc="lower right", fontsize=9)
    return figure


def root_scale(axis: Any, most: float, least: float = 0.0) -> None:
    """A scale of square roots, on which 1 nat and 40 can both be seen; `least` is below 0 where an estimate of a KL is."""
    functions = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    limits = (1.1 * min(least, 0.0), 1.1 * most)
    axis.axes.set(
        **{f"{axis.axis_name}scale": FuncScale(axis, functions), f"{axis.axis_name}lim": limits}
    )
    ticks = [0.0]
    for tick in (0.5, 2, 5, 10, 20, 40, 80, 160):
        if tick <= 1.1 * most and tick**0.5 - ticks[-1] ** 0.5 >= (1.1 * most) ** 0.5 / 8:
            ticks.append(tick)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")


def plot_memory(methods: Mapping[str, Mapping[str, str]], gigabytes: float) -> Figure:
    """The models that each method keeps, as bars of `gigabytes` each; `methods` gives what is done with each role's model."""
    figure = Figure(figsize=(8.4, 0.9 + 0.6 * len(methods)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for y, roles in enumerate(methods.values()):
        for x, (role, use) in enumerate(roles.items()):
            color = REJECTED if "trained" in use else POLICY
            axes.barh(y, 0.94 * gigabytes, left=x * gigabytes, height=0.7, color=color, alpha=0.8)
            place = ((x + 0.47) * gigabytes, y)
            axes.annotate(
                for_figure(f"{role}\n{use}"),
                place,
                ha="center",
                va="center",
                color="white",
                fontsize=9,
            )
    axes.set_yticks(range(len(methods)), [for_figure(method) for method in methods])
    axes.invert_yaxis()
    axes.set(xlabel="GB of weights")
    axes.set_xticks(np.arange(max(map(len, methods.values())) + 1) * gigabytes)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def plot_pairs(scores: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Figure:
    """What P pairs teach: the rewards of their chosen and rejected completions, out of `scores` (N,), and how far they differ."""
    scores, chosen, rejected = (
        floats("scores", scores),
        integers("chosen", chosen),
        integers("rejected", rejected),
    )
    figure = Figure(figsize=(8.4, 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.linspace(scores.min(), scores.max(), 25)
    for index, color, style, name in (
        (chosen, CHOSEN, "-", "chosen"),
        (rejected, REJECTED, "--", "rejected"),
    ):
        label = f"{name}, mean {scores[index].mean():.2f}"
        left.hist(
            scores[index],
            bins,
            histtype="step",
            linewidth=2,
            linestyle=style,
            color=color,
            label=label,
        )
    gaps = scores[chosen] - scores[rejected]
    right.hist(gaps, 25, color=POLICY, label=f"mean {gaps.mean():.2f}")
    left.set(xlabel="reward, P(positive)", ylabel="pairs")
    right.set(xlabel="reward of chosen minus rejected")
    for axes in (left, right):
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right" if axes is right else "upper left", fontsize=9)
    return figure


def plot_betas(runs: Mapping[float, Sequence[Mapping[str, float]]], optimal: Any) -> Figure:
    """Reward against sequence KL as training goes on, a small panel for each beta, under the optimal frontier."""
    figure = Figure(figsize=(8.4, 2.7), dpi=120, layout="constrained")
    kls = [point["kl"] for points in runs.values() for point in points]
    for axes, (beta, points) in zip(
        figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], runs.items()
    ):
        axes.plot(optimal.kl[optimal.valid], optimal.reward[optimal.valid], "--", color=OPTIMUM)
        axes.plot(
            [p["kl"] for p in points],
            [p["reward"] for p in points],
            "o-",
            color=POLICY,
            markersize=4,
        )
        axes.set_title(f"beta {beta:g}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
        root_scale(axes.xaxis, max(kls), min(kls))
    figure.axes[0].set_ylabel("mean reward")
    figure.supxlabel("sequence KL (nats); dashed: the optimal policy", fontsize=10)
    return figure


def token_html(
    tokens: Sequence[str], values: Sequence[float], *, limit: float | None = None
) -> str:
    """A text whose tokens are colored by a value each, green above zero and red below; the value is in the tooltip.

    `limit` is the value with full color, by default the largest in size.
    """
    values = floats("values", values).tolist()
    if len(tokens) != len(values):
        raise ValueError(
            f"there are {len(tokens)} tokens and {len(values)} values; give one value for each token"
        )
    limit = limit or max(map(abs, values), default=0.0) or 1.0
    spans = []
    for token, value in zip(tokens, values):
        red, green, blue = (round(255 * part) for part in to_rgb(CHOSEN if value > 0 else REJECTED))
        share = min(abs(value) / limit, 1.0)
        style = f"background:rgba({red},{green},{blue},{share:.2f});color:{'white' if share > 0.6 else 'inherit'}"
        spans.append(f'<span style="{style}" title="{value:+.2f}">{for_html(token)}</span>')
    return f'<div style="line-height:1.8;white-space:pre-wrap">{"".join(spans)}</div>'
