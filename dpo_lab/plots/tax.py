"""Figures of the alignment tax: each function returns a matplotlib Figure, without pyplot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_lab.engine.arguments import floats
from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots.style import METHODS, OPTIMUM, looks, root_scale

# markers of methods and curves, for those who see colors alike
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# what the measures of a `Tax` are called on an axis
AXES = {
    "nats_per_byte": "change in nats per byte (left is better)",
    "accuracy": "change in accuracy (right is better)",
    "rude": "change in the fraction of rude completions",
}

Measures = Mapping[str, Mapping[str, Sequence[float]]]
"""By group (a key of `AXES`) and measure: a value and its standard error."""


def plot_tax(changes: Mapping[str, Measures], groups: Sequence[str] = tuple(AXES)) -> Figure:
    """What changed under each method: a panel per group, a row per measure, 95% intervals.

    Args:
        changes: by the name of a method, what `Tax.minus` returns.
        groups: keys of `AXES`; one that no method has is left out.

    Raises:
        ValueError: there is no method, or nothing was measured in any of the groups.
    """
    shown = {group: _measures_of(changes, group) for group in groups}
    shown = {group: names for group, names in shown.items() if names}
    if not shown:
        raise ValueError(
            f"changes has the methods {list(changes)} and nothing in {list(groups)}; give what "
            "Tax.minus returns, by method"
        )
    size = (7.2, 1 + 0.8 * len(shown) + 0.32 * sum(map(len, shown.values())))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    heights = [len(names) + 1 for names in shown.values()]
    panels = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]

    for axes, (group, names) in zip(panels, shown.items()):
        axes.axvline(0, color=OPTIMUM, linewidth=1)
        for k, (method, look) in enumerate(zip(changes, looks(METHODS, MARKERS))):
            found = changes[method].get(group, {})
            rows = [i for i, name in enumerate(names) if name in found]
            values, errors = np.reshape([found[names[i]] for i in rows], (-1, 2)).T
            aside = 0.5 * ((k + 0.5) / len(changes) - 0.5)
            style = {"color": look[0], "marker": look[1], "linestyle": "", "markersize": 5}
            axes.errorbar(
                values,
                np.array(rows) + aside,
                xerr=1.96 * errors,
                label=for_figure(method),
                **style,
            )
        axes.set_yticks(range(len(names)), [for_figure(name) for name in names])
        axes.set(xlabel=AXES.get(group, group), ylim=(len(names) - 0.5, -0.5))
        _bare(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=4)
    return figure


def _measures_of(changes: Mapping[str, Measures], group: str) -> list[str]:
    """The measures that any method has in a group, in the order in which they come."""
    return list(dict.fromkeys(name for each in changes.values() for name in each.get(group, {})))


def _bare(axes: Any) -> None:
    """No frame on the right and above, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def plot_coefficients(
    settings: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    xlabel: str,
    *,
    changes: Sequence[str] = (),
) -> Figure:
    """Measures against a coefficient, one panel over the other, as in InstructGPT's Figures 33, 34.

    Settings stand side by side at equal distances, so that 0 can stand among them. A curve is the
    mean over seeds, each bar the standard error of that mean, each small point a seed.

    Args:
        settings: (S,) values of the coefficient.
        panels: by the label of a y axis, curves by name, each (S, seeds).
        xlabel: what the coefficient is.
        changes: the panels of differences, in which a line shows zero.

    Raises:
        ValueError: a curve does not have a row of seeds for each setting.
    """
    figure = Figure(figsize=(6.6, 0.8 + 1.8 * len(panels)), dpi=120, layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    places = np.arange(len(settings))

    for axes, (ylabel, curves) in zip(grid, panels.items()):
        for k, ((name, rows), (color, marker)) in enumerate(
            zip(curves.items(), looks(METHODS, MARKERS))
        ):
            if len(rows) != len(settings):
                raise ValueError(
                    f"panels[{ylabel!r}][{name!r}] has {len(rows)} rows, and there are "
                    f"{len(settings)} settings; give the values of the seeds for each"
                )
            aside = 0.12 * (k - (len(curves) - 1) / 2)
            _curve_over_seeds(axes, places + aside, rows, for_figure(name), (color, marker))
        axes.set_ylabel(ylabel)
        if ylabel in changes:
            axes.axhline(0, color=OPTIMUM, linewidth=0.8)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)
        _bare(axes)
    grid[-1].set_xticks(places, [f"{setting:g}" for setting in settings])
    grid[-1].set_xlabel(xlabel)
    return figure


def _curve_over_seeds(
    axes: Any,
    places: np.ndarray,
    rows: Sequence[Sequence[float]],
    label: str,
    look: tuple[Any, Any],
) -> None:
    """Means over seeds with their standard errors, and the seeds."""
    color, marker = look
    values = [floats("rows", row) for row in rows]
    means = [each.mean() for each in values]
    errors = [each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0 for each in values]
    axes.errorbar(
        places, means, errors, label=label, color=color, marker=marker, capsize=2, markersize=4
    )
    for place, each in zip(places, values):
        axes.plot([place] * len(each), each, marker, color=color, markersize=2.5, alpha=0.5)


def plot_rudeness(rates: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """The fraction of rude completions after each request, one curve per model, 95% intervals.

    Args:
        rates: by the name of a model, then of a request: the fraction and its standard error.

    Raises:
        ValueError: there is no model, or the models were not asked the same.
    """
    requests = [list(found) for found in rates.values()]
    if not requests or any(each != requests[0] for each in requests):
        raise ValueError(
            f"rates has the requests {requests}; give at least one model, and the same requests "
            "for all"
        )
    figure = Figure(figsize=(6.6, 3.6), dpi=120, layout="constrained")
    axes, places = figure.subplots(), np.arange(len(requests[0]))
    for k, ((model, found), look) in enumerate(zip(rates.items(), looks(METHODS, MARKERS))):
        values, errors = np.reshape([found[name] for name in requests[0]], (-1, 2)).T
        aside = 0.5 * ((k + 0.5) / len(rates) - 0.5)
        style = {"color": look[0], "marker": look[1], "linestyle": "", "capsize": 2}
        axes.errorbar(places + aside, values, 1.96 * errors, label=for_figure(model), **style)
    axes.set_xticks(places, [for_figure(name) for name in requests[0]])
    axes.set(ylabel="fraction with a rude word", xlabel="what the prompt asks for")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
    _bare(axes)
    return figure


def plot_trade_off(curves: Mapping[str, Sequence[Mapping[str, float]]], kind: str) -> Figure:
    """The tax on one kind of text against the sequence KL, and against the reward.

    Args:
        curves: by name, points with `kl` (nats), `reward` and `tax` (nats per byte), and the
            standard error of each, `kl_se` and so on; a curve joins them in their order.
        kind: of text, for the axis.

    Raises:
        ValueError: there is no point.
    """
    if not any(curves.values()):
        raise ValueError(f"curves has the names {list(curves)} and no point; give at least one")
    figure = Figure(figsize=(8.4, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = {"kl": "sequence KL to the model before (nats)", "reward": "true reward"}
    for axes, (across, label) in zip((left, right), labels.items()):
        axes.axhline(0, color=OPTIMUM, linewidth=0.8)
        for (name, points), (color, marker) in zip(curves.items(), looks(METHODS, MARKERS)):
            columns = (across, "tax", "tax_se", f"{across}_se")
            values = [[point[column] for point in points] for column in columns]
            style = {"color": color, "marker": marker, "markersize": 5, "elinewidth": 0.8}
            axes.errorbar(*values, label=for_figure(name), **style)
        axes.set_xlabel(label)
        _bare(axes)
    root_scale(left.xaxis, max(point["kl"] for points in curves.values() for point in points))
    left.set_ylabel(f"change in nats per byte, {for_figure(kind)}")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside upper center", ncols=4, fontsize=9)
    return figure
