"""Figures from arrays: each function returns a matplotlib Figure, without pyplot.

Names and labels are shown letter by letter (`escaping.for_figure`); titles and axis labels may hold
matplotlib's mathematics. Everything that is given is drawn, within the axes, or refused.
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

# one color per role, in every figure
CHOSEN, REJECTED, POLICY, OPTIMUM = "#1b7f5c", "#c0392b", "#2c5f9e", "#666666"
COLORS, STROKES = (POLICY, REJECTED, CHOSEN, OPTIMUM), ("-", "--", "-.", ":")

# one color per method of a sweep
METHODS = ("#2c5f9e", "#c0392b", "#1b7f5c", "#b07aa1", "#e69f00", "#222222", "#56b4e9")

# above and below zero, behind text: told apart by those who see red and green alike, too
ABOVE, BELOW = "#2c5f9e", "#e69f00"

# ticks of an axis of square roots, in nats
ROOT_TICKS = (0.5, 2, 5, 10, 20, 40, 80, 160)


def looks(
    colors: Sequence[Any], others: Sequence[Any], *, beside: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Colors with strokes, markers or hatches, for any number of things.

    A color that comes again has another stroke, marker or hatch. These change with every color or,
    unless `beside`, only once all colors have been used.
    """
    for k in count():
        turn = k // len(colors)
        yield colors[k % len(colors)], others[(turn + k * beside) % len(others)]


def palette(n: int) -> tuple[str, ...]:
    """Colors for `n` things: those of the methods where each then has its own, or of the roles."""
    return METHODS if len(COLORS) < n <= len(METHODS) else COLORS


def check_labels(labels: Sequence[str], n: int, what: str) -> list[str]:
    """The labels, escaped so that matplotlib shows them letter by letter.

    Raises ValueError unless there is one for each of `n` things, which the error calls `what`.
    """
    if len(labels) != n:
        raise ValueError(
            f"labels has {len(labels)} entries, {list(labels)}, and there are {n} {what}; "
            "give one label for each"
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

    # the running mean by differences of cumulative sums
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
    figure, (top, bottom) = _figure(title, "probability", "p log(p / q), nats", x="outcome")

    # the two distributions
    top.bar(places - 0.2, p, 0.4, label="p", color=POLICY)
    top.bar(places + 0.2, q, 0.4, label="q", color=OPTIMUM, hatch="//")
    _legend(top)

    # what each outcome adds, positive or negative
    bottom.bar(places, parts, 0.4, color=[CHOSEN if part > 0 else REJECTED for part in parts])
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set_xticks(places, shown)
    return figure


def plot_tangent() -> Figure:
    """log t and its tangent at t = 1, the line t - 1, which lies above it everywhere else."""
    t = np.linspace(0.05, 3, 300)
    figure, axes = _figure("log t never exceeds t - 1", "height", x="t = q / p")
    axes.plot(t, t - 1, color=POLICY, label="t - 1")
    axes.plot(t, np.log(t), color=REJECTED, linestyle="--", label="log t")
    axes.fill_between(t, np.log(t), t - 1, color=OPTIMUM, alpha=0.2, label="g(t) = t - 1 - log t")
    axes.plot(1, 0, "o", color="black")
    _legend(axes)
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
    figure, (top, bottom) = _figure(
        "The optimal policy from beta = infinity to 0", "probability", "mean reward", x="beta"
    )

    # probabilities
    shown = check_labels(labels, policies.shape[1], "outcomes")
    strokes = (*STROKES, (0, (5, 1)), (0, (1, 1)))
    own = looks((OPTIMUM, REJECTED, POLICY, CHOSEN), strokes)
    for label, line, (color, style) in zip(shown, policies.T, own):
        top.plot(betas, line, linestyle=style, color=color, label=label)
    _legend(top)

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


def plot_lines(
    title: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> Figure:
    """Named curves over one axis, told apart by color and by stroke."""
    figure, axes = _figure(title, y_label, x=x_label)
    x = floats("x", x)
    for (name, values), (color, style) in zip(lines.items(), looks(palette(len(lines)), STROKES)):
        values = floats(f"lines[{name!r}]", values)
        if len(values) != len(x):
            raise ValueError(
                f"line {name!r} has {len(values)} values and x has {len(x)}; "
                "there must be one for each"
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
    """Mean over seeds with the band from the 10th to the 90th percentile, beside theory.

    `values` are (len(x), seeds), `lines` what theory says; both axes are logarithmic.
    """
    x, values = floats("x", x), floats("values", values)
    figure, axes = _figure(title, y_label, x=x_label)
    band = np.quantile(values, (0.1, 0.9), axis=1)
    axes.fill_between(x, *band, color=POLICY, alpha=0.2, label="10% to 90% of seeds")
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
    """Median and band from the 10th to the 90th percentile of each racer.

    A racer is (x, values), with values (len(x), seeds); both axes are logarithmic, and a line
    stands at `goal`.
    """
    figure, axes = _figure(title, y_label, x=x_label)
    own = looks(palette(len(racers)), STROKES)
    for (name, (x, values)), (color, style) in zip(racers.items(), own):
        values = floats(f"racers[{name!r}]", values)
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
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
    figure, axes = _figure(title, "", x=x_label)
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
    figure, axes = _figure("Calibration", "observed fraction", x="predicted probability")
    axes.plot([0, 1], [0, 1], color=OPTIMUM, linestyle="--", label="perfectly calibrated")
    error = 2 * np.sqrt(predicted * (1 - predicted) / count)
    axes.errorbar(predicted, observed, error, fmt="none", color=POLICY, alpha=0.5)
    axes.scatter(predicted, observed, 50 * count / count.max(), color=POLICY, label="comparisons")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    return figure


def plot_loss(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Loss per pair against the step, with log 2, where every run of the sigmoid loss starts."""
    figure, axes = _figure("Loss", "loss per pair (nats)")
    _curve(axes, metrics, "loss", POLICY, "training batch, running mean")
    start = "log 2: the policy is the reference"
    axes.axhline(np.log(2), color=OPTIMUM, linestyle="--", label=start)
    axes.legend(frameon=False)
    return figure


def plot_rewards(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Implicit rewards against the step, and under them the fraction of pairs ranked correctly."""
    figure, (rewards, accuracy) = _figure(
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
    figure, axes = _figure("Margin", "reward of chosen minus rejected (beta x nats)")
    _curve(axes, metrics, "rewards/margins", POLICY, "training batch, running mean")
    axes.axhline(0, color=OPTIMUM, linewidth=0.8)
    axes.legend(frameon=False)
    return figure


def plot_frontier(
    runs: Mapping[str, Sequence[dict[str, float]]], frontier: Any | None = None
) -> Figure:
    """Mean reward against sequence KL of named runs during training, under the optimal frontier.

    The points of a run have `reward`, `kl` and their `_se`. `frontier` is what `optimal_frontier`
    returns, drawn where the estimate is valid; a cross marks its end.
    """
    figure, axes = _figure(
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
    _legend(axes, loc="lower right")
    return figure


def plot_sweep(
    runs: Mapping[str, Sequence[Mapping[str, float]]], optimal: Any, band: np.ndarray
) -> Figure:
    """Every evaluation of each method, reward against sequence KL, under the optimal frontier.

    Points have `reward` and `kl`; `band` is (3, A): KL, lower and upper end of the frontier. The
    frontier ends in a cross where its estimate rests on too few samples.
    """
    figure, axes = _figure(
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
    _legend(axes, loc="lower right", fontsize=9)
    return figure


def root_scale(axis: Any, most: float, least: float = 0.0) -> None:
    """A scale of square roots, on which 1 nat and 40 nats can both be seen.

    The axis reaches from `least`, which is below 0 where an estimated KL is, to `most`.
    """
    functions = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    limits = (1.1 * min(least, 0.0), 1.1 * most)
    axis.axes.set(
        **{f"{axis.axis_name}scale": FuncScale(axis, functions), f"{axis.axis_name}lim": limits}
    )
    ticks = [0.0]
    for tick in ROOT_TICKS:
        if tick <= 1.1 * most and tick**0.5 - ticks[-1] ** 0.5 >= (1.1 * most) ** 0.5 / 8:
            ticks.append(tick)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")


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


def plot_tokens(title: str, tokens: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Figure:
    """Bars over the tokens of a text, a panel for each of the named rows (L,)."""
    height = 1.1 + 1.3 * len(rows)
    figure = Figure(figsize=(8.4, height), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
    panels[0].set_title(title)
    places = np.arange(len(tokens))
    for axes, (name, values) in zip(panels, rows.items()):
        values = floats(f"rows[{name!r}]", values)
        shown = check_labels(tokens, len(values), f"values in {name!r}")
        colors = [CHOSEN if value > 0 else REJECTED for value in values]
        axes.bar(places, values, 0.7, color=colors)
        axes.axhline(0, color=OPTIMUM, linewidth=0.8)
        axes.set_ylabel(for_figure(name), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(places, shown, rotation=90, fontsize=8, family="monospace")
    return figure


def plot_pairs(scores: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Figure:
    """What P pairs teach: the rewards of their completions, and by how much they differ.

    `scores` are the rewards (N,) of all completions; `chosen` and `rejected` are indices (P,).
    """
    scores = floats("scores", scores)
    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    figure = Figure(figsize=(8.4, 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)

    # rewards of both sides
    bins = np.linspace(scores.min(), scores.max(), 25)
    sides = (chosen, CHOSEN, "-", "chosen"), (rejected, REJECTED, "--", "rejected")
    for index, color, stroke, name in sides:
        style = {"histtype": "step", "linewidth": 2, "linestyle": stroke, "color": color}
        label = f"{name}, mean {scores[index].mean():.2f}"
        left.hist(scores[index], bins, label=label, **style)

    # their differences
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


def plot_judges(rows: Sequence[Mapping[str, float]], measures: Mapping[str, str]) -> Figure:
    """What DPO with several betas ends at by several measures, a panel each, against sequence KL.

    Points are means over seeds, with the standard deviation between seeds where there are several.

    Args:
        rows: evaluations with `beta`, `step`, `kl` and the measures. Those of step 0 are the
            reference's, drawn as a line; of the others each is one seed's.
        measures: the title of each measure's panel, by its name in the rows.
    """
    figure = Figure(figsize=(8.4, 1 + 1.9 * -(-len(measures) // 2)), dpi=120, layout="constrained")
    panels = figure.subplots(-(-len(measures) // 2), min(2, len(measures)), squeeze=False).ravel()
    for empty in panels[len(measures) :]:
        empty.remove()
    ends = [row for row in rows if row["step"]]
    for axes, (name, label) in zip(panels, measures.items()):
        before = np.mean([row[name] for row in rows if not row["step"]])
        axes.axhline(before, color=OPTIMUM, linestyle=":", label="reference")

        # one point per beta, the labels in turn above and below
        for k, beta in enumerate(sorted({row["beta"] for row in ends})):
            kl, value = ([r[key] for r in ends if r["beta"] == beta] for key in ("kl", name))
            at, bars = (np.mean(kl), np.mean(value)), {}
            if len(kl) > 1:
                bars = {"xerr": np.std(kl, ddof=1), "yerr": np.std(value, ddof=1)}
            axes.errorbar(*at, **bars, fmt="o", color=POLICY, capsize=2, markersize=4)
            place = {"xytext": (0, 14 if k % 2 else -14), "textcoords": "offset points"}
            axes.annotate(f"{beta:g}", at, ha="center", va="center", fontsize=9, **place)

        axes.set_title(label, fontsize=10)
        axes.margins(y=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        root_scale(axes.xaxis, max(row["kl"] for row in ends), min(row["kl"] for row in ends))
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.supxlabel("sequence KL (nats); the number at a point is its beta", fontsize=10)
    return figure


def token_html(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    limit: float | None = None,
    title: str = "",
    legend: str = "",
) -> str:
    """A text as HTML whose tokens are colored by their values: blue above zero, orange below.

    Args:
        tokens: T pieces of the text.
        values: (T,), shown in the tooltips.
        limit: the value of full color, by default the largest in absolute value.
        title: shown in bold above the text.
        legend: what the values are, shown under the text beside the scale of the colors.

    Raises:
        ValueError: there are not as many values as tokens.
    """
    values = floats("values", values).tolist()
    if len(tokens) != len(values):
        raise ValueError(
            f"there are {len(tokens)} tokens and {len(values)} values; "
            "give one value for each token"
        )
    limit = limit or max(map(abs, values), default=0.0) or 1.0
    spans = [_colored(token, value, limit) for token, value in zip(tokens, values)]
    heading = f"<b>{for_html(title)}</b>\n" if title else ""

    # five steps of the scale
    scale = ""
    if legend:
        steps = [_colored(f" {k * limit:+.2g} ", k * limit, limit) for k in (-1, -0.5, 0, 0.5, 1)]
        scale = f"\n<small>{''.join(steps)} {for_html(legend)}</small>"
    text = f"{heading}{''.join(spans)}{scale}"
    return f'<div style="line-height:1.8;white-space:pre-wrap">{text}</div>'


def _colored(text: str, value: float, limit: float) -> str:
    """A piece of text on the color of its value, which its tooltip shows."""
    red, green, blue = (round(255 * part) for part in to_rgb(ABOVE if value > 0 else BELOW))
    opacity = min(abs(value) / limit, 1.0)

    # readable on the color, whatever the page's own color of text
    color = "inherit" if opacity <= 0.6 else "white" if value > 0 else "black"
    style = f"background:rgba({red},{green},{blue},{opacity:.2f});color:{color}"
    return f'<span style="{style}" title="{value:+.2f}">{for_html(text)}</span>'


def plot_token_logps(tokens: Sequence[str], logps: Sequence[float]) -> Figure:
    """The probability of each token above, and the running sum of their log-probs below.

    Args:
        tokens: T pieces of a completion.
        logps: (T,) the log-prob of each, nats.

    Raises:
        ValueError: there are not as many log-probs as tokens.
    """
    logps = floats("logps", logps)
    names = check_labels(tokens, len(logps), "log-probs")
    figure, (top, bottom) = _figure(
        "From the tokens to the completion", "p of each token", "sum of log p so far (nats)", x=""
    )
    places = np.arange(len(names))
    bars = top.bar(places, np.exp(logps), 0.7, color=POLICY)
    top.bar_label(bars, [f"{p:.2f}" for p in np.exp(logps)], fontsize=8, padding=2)
    top.set_ylim(0, 1.12)

    # each token takes the sum down by its own log-prob
    sums = np.cumsum(logps)
    bars = bottom.bar(places, logps, 0.7, bottom=sums - logps, color=REJECTED)
    bottom.bar_label(bars, [f"{value:.1f}" for value in sums], fontsize=8, padding=2)
    bottom.set_ylim(1.12 * sums.min(initial=-1.0), 0)
    bottom.set_xticks(places, names, rotation=35, ha="right")
    return figure
