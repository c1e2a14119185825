"""Figures of judges and win rates: each function returns a matplotlib Figure, without pyplot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dpo_lab.engine.arguments import floats
from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots.style import (
    METHODS,
    OPTIMUM,
    POLICY,
    looks,
    root_scale,
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_win_rates(
    panels: Mapping[str, Sequence[Mapping[str, Any]]], *, columns: int = 2
) -> Figure:
    """Win rate against sampling temperature, one panel per judge or source of prompts.

    Args:
        panels: by the title of a panel, rows with `method`, `temperature`, `rate`, `low` and
            `high`; where a row has `seeds`, a list of rates, each is a small point of its own.
        columns: panels side by side.

    Raises:
        ValueError: no panel, or a panel without rows.
    """
    for title, rows in panels.items():
        if not rows:
            raise ValueError(f"panels[{title!r}] is empty; give at least one row")
    if not panels:
        raise ValueError("panels is empty; give at least one, as in {'true reward': rows}")

    # one look per method, the same in every panel
    methods = list(dict.fromkeys(row["method"] for rows in panels.values() for row in rows))
    look = dict(zip(methods, looks(METHODS, MARKERS)))
    n = -(-len(panels) // columns)
    size = (4.4 * min(columns, len(panels)), 0.5 + 3.2 * n)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    grid = figure.subplots(n, min(columns, len(panels)), sharey=True, squeeze=False)
    for empty in grid.ravel()[len(panels) :]:
        empty.remove()

    for axes, (title, rows) in zip(grid.ravel(), panels.items()):
        axes.axhline(0.5, color=OPTIMUM, linestyle=":", linewidth=1)
        for k, method in enumerate(methods):
            mine = sorted(
                (row for row in rows if row["method"] == method),
                key=lambda row: row["temperature"],
            )
            if mine:
                _sweep(axes, mine, for_figure(method), look[method], (k - len(methods) / 2) * 0.012)
        axes.set_title(for_figure(title), fontsize=10)
        axes.set_ylim(0, 1.02)
        axes.set_xticks(sorted({row["temperature"] for row in rows}))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in grid[:, 0]:
        axes.set_ylabel("win rate")
    figure.supxlabel("sampling temperature (0: greedy)", fontsize=10)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside upper center", ncols=4)
    return figure


def _sweep(
    axes: Any, rows: Sequence[Mapping[str, Any]], label: str, look: tuple[Any, Any], aside: float
) -> None:
    """The curve of one method, a little to the side of those of the others."""
    color, marker = look
    at, rates, low, high = (
        floats(name, [row[name] for row in rows]) for name in ("temperature", "rate", "low", "high")
    )
    bars = np.abs([rates - low, high - rates])
    axes.errorbar(
        at + aside, rates, bars, label=label, color=color, marker=marker, capsize=2, markersize=4
    )
    for place, row in zip(at + aside, rows):
        seeds = row.get("seeds", ())
        axes.plot([place] * len(seeds), seeds, marker, color=color, markersize=2.5, alpha=0.5)


def plot_prompts(
    rate: float,
    n: Sequence[int],
    intervals: Sequence[tuple[float, float]],
    power: Sequence[float],
    marked: int | None = None,
) -> Figure:
    """What a number of prompts can say of one win rate: its interval above, the power below.

    Args:
        rate: the win rate that was measured.
        n: (k,) numbers of prompts, ascending.
        intervals: (k, 2) the interval of `rate` at each.
        power: (k,) the probability that the interval excludes one half.
        marked: a number of prompts to mark.
    """
    figure = Figure(figsize=(6.4, 4.6), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    low, high = floats("intervals", intervals).T
    top.fill_between(n, low, high, color=POLICY, alpha=0.2, label="95% interval")
    top.plot(n, np.full(len(n), rate), color=POLICY, label=f"measured win rate {rate:g}")
    top.axhline(0.5, color=OPTIMUM, linestyle=":")
    top.set(ylabel="win rate", ylim=(0.3, 0.9))
    top.legend(frameon=False, loc="upper right")
    bottom.plot(n, power, color=POLICY)
    bottom.axhline(0.8, color=OPTIMUM, linestyle=":")
    bottom.set(ylabel="power", ylim=(0, 1.02), xscale="log", xlabel="prompts, each judged once")
    count_ticks(bottom.xaxis, n[0], n[-1])
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if marked:
            axes.axvline(marked, color=OPTIMUM, linewidth=1)
    return figure


def count_ticks(axis: Any, least: float, most: float) -> None:
    """Ticks of a logarithmic axis of counts at 1, 2 and 5 times powers of ten, as numbers."""
    ticks = [m * 10**power for power in range(7) for m in (1, 2, 5)]
    axis.set_ticks([tick for tick in ticks if least <= tick <= most])
    axis.set_major_formatter("{x:,.0f}")
    axis.set_minor_locator(NullLocator())


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
