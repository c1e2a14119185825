"""Figures of on-policy DPO: each function returns a matplotlib Figure, without pyplot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_lab.engine.arguments import floats
from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots.judges import MARKERS, count_ticks
from dpo_lab.plots.style import METHODS, OPTIMUM, check_labels, looks
from dpo_lab.theory.frontier import OptimalFrontier

# the color of an eighth method
EIGHTH = "#8c564b"


def plot_means(
    title: str,
    x: Sequence[float],
    values: Mapping[str, np.ndarray],
    x_label: str,
    y_label: str,
    *,
    log: bool = True,
) -> Figure:
    """Means over seeds with their standard errors, a curve for each name.

    `values` are (len(x), seeds); the x-axis is logarithmic, and with `log` the y-axis too.
    """
    x = floats("x", x)
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for (name, found), (color, marker) in zip(values.items(), looks(METHODS, MARKERS)):
        found = floats(f"values[{name!r}]", found)
        if found.ndim != 2 or len(found) != len(x) or found.shape[1] < 2:
            raise ValueError(
                f"values[{name!r}] has the shape {found.shape}; it must be ({len(x)}, seeds), with "
                "at least 2 seeds"
            )
        errors = found.std(1, ddof=1) / found.shape[1] ** 0.5
        look = {"color": color, "marker": marker, "markersize": 4, "capsize": 2}
        axes.errorbar(x, found.mean(1), errors, label=for_figure(name), **look)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log")
    axes.set_yscale("log" if log else "linear")
    count_ticks(axes.xaxis, min(x), max(x))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def plot_coverage(
    completions: Sequence[str],
    optimum: Sequence[float],
    labeled: Mapping[str, Sequence[float]],
) -> Figure:
    """Where labels are, and where the optimal policy is.

    Args:
        completions: n names.
        optimum: (n,) probabilities of the optimal policy.
        labeled: by the name of a round, (n,) the fraction of its labeled completions that are each
            of the n.
    """
    shown, places = check_labels(completions, len(optimum), "completions"), np.arange(len(optimum))
    figure = Figure(figsize=(7.2, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    width = 0.84 / max(1, len(labeled))
    for k, ((name, fractions), (color, _)) in enumerate(zip(labeled.items(), looks(METHODS, "o"))):
        aside = (k + 0.5) * width - 0.42
        heights = floats(f"labeled[{name!r}]", fractions)
        axes.bar(places + aside, heights, width, color=color, label=for_figure(name))
    marks = {"color": OPTIMUM, "markersize": 32, "markeredgewidth": 2, "label": "optimal policy"}
    axes.plot(places, floats("optimum", optimum), "_", **marks)
    axes.set_xticks(places, shown)
    axes.set_ylabel("fraction of the labeled completions")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.02, 1.0))
    return figure


def plot_online(
    runs: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    optimal: Any,
    *,
    goal: float | None = None,
) -> Figure:
    """Reward against KL, and the fraction of the optimal gain against labels and against seconds.

    Means over seeds, with standard errors over seeds; small points are the ends of the runs.

    Args:
        runs: as `sentiment.load_on_policy` gives them: `method`, `seed`, and `rows` with `reward`,
            `kl`, `labels`, `seconds` and `fraction`, whose lower end is drawn.
        names: what the legend calls each method that is shown, by the method.
        optimal: what `optimal_frontier` returns, drawn where it is valid.
        goal: a fraction to mark.

    Raises:
        ValueError: a method without runs.
    """
    figure = Figure(figsize=(10.4, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3)
    panels[2].sharey(panels[1])
    kl, reward = optimal.kl[optimal.valid], optimal.reward[optimal.valid]
    panels[0].plot(kl, reward, "--", color=OPTIMUM, label="optimal policy")

    for (method, name), (color, marker) in zip(names.items(), looks(METHODS, MARKERS)):
        own = [run["rows"] for run in runs if run["method"] == method]
        if not own:
            known = ", ".join(dict.fromkeys(run["method"] for run in runs))
            raise ValueError(f"names has {method!r}, of which there is no run; there are {known}")

        # (seeds, rows): the evaluations that all seeds have, and always the last
        fewest = min(map(len, own))
        own = [[*rows[: fewest - 1], rows[-1]] for rows in own]
        found = {
            key: np.array([[row[key] for row in rows] for rows in own])
            for key in ("kl", "reward", "labels", "seconds")
        }
        found["fraction"] = np.array([[row["fraction"][0] for row in rows] for rows in own])

        # a curve in each panel
        look = {"color": color, "marker": marker, "capsize": 2, "label": for_figure(name)}
        ends = {"color": color, "markersize": 2.5, "alpha": 0.5}
        for axes, x, y in zip(panels, ("kl", "labels", "seconds"), ("reward", *["fraction"] * 2)):
            several = len(own) > 1
            errors = found[y].std(0, ddof=1) / len(own) ** 0.5 if several else None
            axes.errorbar(found[x].mean(0), found[y].mean(0), errors, markersize=4, **look)
            axes.plot(found[x][:, -1], found[y][:, -1], marker, **ends)

    # what the axes are
    labels = ("sequence KL to the reference (nats)", "labeled completions", "seconds of one core")
    for axes, label in zip(panels, labels):
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if goal is not None and axes is not panels[0]:
            axes.axhline(goal, color=OPTIMUM, linestyle=":", linewidth=1)
    panels[0].set_ylabel("mean reward, P(positive)")
    panels[1].set_ylabel("fraction of the optimal gain")
    handles, shown = panels[0].get_legend_handles_labels()
    options = {"frameon": False, "loc": "outside upper center", "ncols": 3, "fontsize": 9}
    figure.legend(handles, shown, **options)
    return figure


def plot_relatives(found: Mapping[str, Any]) -> Figure:
    """DPO and its relatives on one task: reward against KL on the left, and at one KL on the right.

    On the left the mean over seeds at each evaluation, with standard errors in both directions, and
    the optimal frontier with its 90% band. On the right the reward of each method where it has
    `config["kl"]` nats: the mean over seeds with its standard error, and a small point per seed.
    The figure says what was trained on; no general ranking follows from it.

    Args:
        found: as `sentiment.load_relatives` gives it.

    Raises:
        ValueError: no run.
    """
    if not found["rows"]:
        raise ValueError("found['rows'] is empty; give at least one run")
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    figure = Figure(figsize=(9.6, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _optimum(left, found["optimal"])
    before = np.mean([row["reward"] for row in found["reference"]])
    left.plot(0, before, "k.", label="reference")

    kl, task = found["config"]["kl"], found["config"]["task"]
    own = looks((*METHODS, EIGHTH), MARKERS)
    for k, (method, (color, marker)) in enumerate(zip(methods, own)):
        runs = [row for row in found["rows"] if row["method"] == method]

        # the evaluations that all seeds have
        fewest = min(len(run["evaluations"]) for run in runs)
        rewards, kls = (
            np.array([[row[name] for row in run["evaluations"][:fewest]] for run in runs])
            for name in ("reward", "kl")
        )
        look = {"color": color, "marker": marker, "markersize": 4, "capsize": 2}
        (x, dx), (y, dy) = map(_mean_and_error, (kls, rewards))
        left.errorbar(x, y, dy, dx, label=for_figure(method), **look)

        at = np.array([run["reward_at_kl"] for run in runs])
        mean, error = _mean_and_error(at)
        right.errorbar(k, mean, error, **look)
        right.plot([k + 0.2] * len(at), at, marker, color=color, markersize=2.5, alpha=0.5)

    best = _frontier(found["optimal"]).reward_at(kl)
    right.axhline(float(best), color=OPTIMUM, linestyle="--", linewidth=1)
    left.axvline(kl, color=OPTIMUM, linestyle=":", linewidth=1)
    left.set(xlabel="sequence KL to the reference (nats)", ylabel="mean reward, P(positive)")
    right.set_title(f"where a run has {kl:g} nats", fontsize=10)
    right.set_xticks(range(len(methods)), [for_figure(name) for name in methods], rotation=45)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"Sentiment of film reviews, {task['max_new_tokens']} tokens, pairs from "
        f"{task['prefixes']:,} prefixes, {len(found['config']['seeds'])} seeds. "
        "One task, one small model: no general ranking follows.",
        fontsize=10,
    )
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=6, fontsize=9)
    return figure


def _optimum(axes: Any, optimal: Mapping[str, Sequence[float]]) -> None:
    """The optimal frontier where its estimate is valid, with its band."""
    found = _frontier(optimal)
    kl = np.sort(found.kl[found.valid])
    axes.plot(kl, found.reward_at(kl), color=OPTIMUM, linestyle="--", label="optimum")
    at, low, high = (np.array(optimal[name], dtype=np.float64) for name in ("at", "low", "high"))
    axes.fill_between(at, low, high, color=OPTIMUM, alpha=0.15, linewidth=0)


def _frontier(optimal: Mapping[str, Sequence[float]]) -> OptimalFrontier:
    """The optimal frontier as it was recorded."""
    return OptimalFrontier(*(np.array(optimal[name]) for name in OptimalFrontier._fields))


def _mean_and_error(values: np.ndarray) -> tuple[Any, Any]:
    """Mean over the first axis, and its standard error; no error for a single value."""
    n = len(values)
    return values.mean(0), values.std(0, ddof=1) / n**0.5 if n > 1 else None
