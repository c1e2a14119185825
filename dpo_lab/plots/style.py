"""What all figures have in common: colors, strokes, axes, legends."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.scale import FuncScale
from matplotlib.ticker import FixedLocator

from dpo_lab.engine.escaping import for_figure

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


def labeled_figure(title: str, *labels: str, x: str = "step") -> tuple[Figure, Any]:
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


def legend(axes: Any, **options: Any) -> None:
    """A legend inside the axes, or under them where it would cover them."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 8:
        axes.legend(frameon=False, **options)
    else:
        axes.figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=3)


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
