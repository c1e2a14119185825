"""Figures of runs with faults beside healthy ones, and of what `diagnose` said of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots.style import OPTIMUM, POLICY, REJECTED

HEALTHY = "#b5b5b5"

# letters per line of a panel's title
TITLE_WIDTH = 22


def plot_failures(columns: Mapping[str, Sequence[Mapping[str, Any]]], *, dpi: int = 110) -> Figure:
    """Small multiples: for each fault a column of panels, healthy runs in gray behind it.

    Args:
        columns: panels by the title of a column, as `health.gallery.panels_of` gives them. Each has
            a `label`, the curves (T, 2) of `healthy` runs and of recorded ones `with_fault`, the
            curve `here` or None, whether it is `logarithmic`, and a `line` to draw or None.
        dpi: dots per inch.

    Raises:
        ValueError: no column, or columns of unequal length.
    """
    lengths = {len(panels) for panels in columns.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"columns have {sorted(lengths)} panels; give at least one column, all of as many"
        )
    (rows,) = lengths
    size = (0.8 + 2.15 * len(columns), 0.5 + 2.1 * rows)
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for axes, (title, panels) in zip(grid.T, columns.items()):
        axes[0].set_title(_wrapped(title), fontsize=9)
        axes[-1].set_xlabel("step", fontsize=8)
        for place, panel in zip(axes, panels):
            _draw_panel(place, panel)

    # one legend for all
    handles = {
        label: line
        for axes in grid.ravel()
        for line, label in zip(*axes.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(), handles, frameon=False, loc="outside upper center", ncols=3, fontsize=9
    )
    return figure


def _draw_panel(axes: Any, panel: Mapping[str, Any]) -> None:
    """The curves of a panel, healthy ones behind."""
    for name, color, curves, width in (
        ("healthy", HEALTHY, panel["healthy"], 1.0),
        ("with the fault, recorded", REJECTED, panel["with_fault"], 1.0),
        ("here", POLICY, [] if panel["here"] is None else [panel["here"]], 2.2),
    ):
        for k, curve in enumerate(curves):
            label = None if k else name
            axes.plot(*np.asarray(curve).T, color=color, linewidth=width, label=label)
    if panel["logarithmic"]:
        axes.set_yscale("log")
    if panel["line"] is not None:
        axes.axhline(panel["line"], color=OPTIMUM, linestyle=":", linewidth=1)
    axes.set_ylabel(for_figure(panel["label"]), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def plot_confusion(matrix: Mapping[str, Mapping[str, Any]]) -> Figure:
    """In how many runs with each planted fault, and healthy ones, `diagnose` found which faults.

    Args:
        matrix: that of `health.load_diagnosis_table`: by what was planted the number of `runs`, and
            of those in which each fault was `found`.
    """
    rows, columns = list(matrix), [name for name in matrix if name != "healthy"]
    cells = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(rows):
        for fault, n in matrix[row]["found"].items():
            cells[i, columns.index(fault)] = n / max(1, matrix[row]["runs"])

    figure = Figure(figsize=(8.6, 6.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(cells, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
    for i, j in np.argwhere(cells > 0):
        count = matrix[rows[i]]["found"][columns[j]]
        axes.text(j, i, f"{count}", ha="center", va="center", fontsize=8)
    labels = [f"{_named(row)} ({matrix[row]['runs']})" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    names = [_named(column) for column in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=8, rotation=50, ha="right")
    axes.set(xlabel="found by diagnose (runs)", ylabel="planted (runs)")

    # lines between the cells
    axes.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows)) - 0.5, minor=True)
    axes.grid(which="minor", color=HEALTHY, linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    return figure


def _named(name: str) -> str:
    return for_figure(name.replace("_", " "))


def _wrapped(text: str) -> str:
    """A title in lines of about the width of a panel."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= TITLE_WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return for_figure("\n".join(lines))
