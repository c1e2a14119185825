"""Figures of on-policy DPO: each function returns a matplotlib Figure, without pyplot."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from dpo_lab.engine.arguments import floats
from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots import CHOSEN, METHODS, OPTIMUM, check_labels, looks
from dpo_lab.plots_judges import MARKERS, count_ticks


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
