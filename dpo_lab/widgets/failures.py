"""Curves of runs with each fault: state, picture and explorer."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import ipywidgets as widgets
import numpy as np

from dpo_lab.engine.arguments import checked
from dpo_lab.health.catalog import FAULTS, FaultName
from dpo_lab.health.gallery import METRICS, TELLTALES, panel_of, recorded_faults
from dpo_lab.plots import OPTIMUM, REJECTED
from dpo_lab.widgets.explorers import Explorer, Picture, explorer_of
from dpo_lab.widgets.figures import BlittedFigure, wide

# what is shown of every run, beside the curve by which one recognizes its fault
SHOWN = ("loss", "rewards/chosen")

HEALTHY = "#b5b5b5"


@cache
def failures_state(fault: FaultName) -> dict[str, Any]:
    """What the explorer shows of a fault: panels of three metrics, and `says`, what one sees."""
    metrics = [*SHOWN, TELLTALES[fault]]
    return {
        "panels": [panel_of(metric, fault) for metric in metrics],
        "says": f"{METRICS[metrics[-1]]}, from {_ends(fault)}",
    }


def _ends(fault: FaultName) -> str:
    """First and last value of the curve by which a fault is recognized, healthy and with it."""
    panel = panel_of(TELLTALES[fault], fault)
    values = []
    for name in ("healthy", "with_fault"):
        first, last = (np.mean([curve[i][1] for curve in panel[name]]) for i in (0, -1))
        values.append(f"{first:.3g} to {last:.3g}")
    return f"{values[0]} where healthy, from {values[1]} with the fault"


def failures_figure() -> BlittedFigure:
    """Three panels, in which a state has the curves of healthy runs and of those with a fault."""
    figure, panels = wide(3)

    # places that do not depend on what was drawn before
    figure.set_layout_engine("none")
    for k, axes in enumerate(panels):
        axes.set_position((0.09 + 0.335 * k, 0.16, 0.225, 0.79))
        axes.set_xlabel("step")
    gray = [
        [axes.plot([], [], color=HEALTHY, linewidth=1.2)[0] for _ in range(6)] for axes in panels
    ]
    red = [[axes.plot([], [], color=REJECTED, linewidth=2)[0] for _ in range(6)] for axes in panels]
    panels[0].axhline(np.log(2), color=OPTIMUM, linestyle=":", linewidth=1)
    shown: list[tuple[str, bool]] = []

    def update(state: Mapping[str, Any]) -> None:
        for axes, panel, *lines in zip(panels, state["panels"], gray, red):
            axes.set_yscale("log" if panel["logarithmic"] else "linear")
            axes.set_ylabel(panel["label"])
            curves = panel["healthy"], panel["with_fault"]
            for some, artists in zip(curves, lines):
                for k, artist in enumerate(artists):
                    artist.set_data(*(some[k].T if k < len(some) else ([], [])))

            # limits that hold all curves
            points = np.concatenate([*curves[0], *curves[1]])
            axes.set_xlim(0, points[:, 0].max() + 1)
            axes.set_ylim(*_limits(points[:, 1], panel["logarithmic"]))
        shown[:] = [(panel["label"], panel["logarithmic"]) for panel in state["panels"]]

    artists = [line for lines in (*gray, *red) for line in lines]
    return BlittedFigure(figure, artists, update, lambda: tuple(shown))


def _limits(values: np.ndarray, logarithmic: bool) -> tuple[float, float]:
    """Limits of an axis with a little room."""
    if logarithmic:
        some = values[values > 0]
        return some.min() / 2, some.max() * 2
    low, high = values.min(), values.max()
    room = 0.05 * (high - low) or 0.1
    return low - room, high + room


@checked
def failures_explorer(fault: FaultName = "identical_pairs") -> Explorer:
    """Loss, reward of the chosen and the telltale curve of runs with a fault, healthy ones behind.

    Args:
        fault: where the slider begins.

    Raises:
        ValueError: there is no recorded run with this fault.
    """
    names = recorded_faults()
    if fault not in names:
        raise ValueError(f"fault is {fault!r}; it must be one of {', '.join(names)}")
    blitted = failures_figure()
    blitted.update(failures_state(fault))

    def show(fault: FaultName) -> str:
        state = failures_state(fault)
        blitted.update(state)
        return state["says"]

    sliders = {
        "fault": widgets.SelectionSlider(
            options=[(FAULTS[name].title, name) for name in names],
            value=fault,
            description="fault",
            style={"description_width": "60px"},
            layout={"width": "620px"},
        )
    }
    caption = "Which faults can be seen in the loss alone? Which look healthy there?"
    return explorer_of(show, Picture(blitted), sliders, caption)
