"""What a number of prompts can say of a win rate: state, picture and explorer."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import ipywidgets as widgets

from dpo_lab.engine.arguments import integers
from dpo_lab.judges.intervals import power, wilson
from dpo_lab.plots import OPTIMUM, POLICY
from dpo_lab.plots.judges import count_ticks
from dpo_lab.widgets.explorers import Explorer, Picture, explorer_of, slider_of
from dpo_lab.widgets.figures import BlittedFigure, wide

# prompts that the slider has, and the axes
PROMPTS = (20, 30, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1_000, 1_500, 2_000, 3_000)


@cache
def prompts_state(n: int, rate: float) -> dict[str, float]:
    """What `n` prompts say where they give the win rate `rate`, each judged once, without ties.

    `low` and `high` are the ends of its 95% interval (Wilson), and `power` is the probability that
    such an interval excludes one half where the true rate is `rate`.
    """
    found = wilson(rate, n)
    return {"n": n, "rate": rate, "low": found.low, "high": found.high, "power": power(n, rate)}


def prompts_figure(prompts: Sequence[int]) -> BlittedFigure:
    """The interval of a win rate and the power against the number of prompts.

    A state has `rate`, `n`, and of every number of prompts the `low`, `high` and `power`.
    """
    figure, (left, right) = wide(2)
    for axes, half in ((left, 0.5), (right, 0.8)):
        axes.set(xscale="log", xlim=(0.9 * prompts[0], 1.1 * prompts[-1]), xlabel="prompts")
        axes.axhline(half, color=OPTIMUM, linestyle=":")
        count_ticks(axes.xaxis, prompts[0], prompts[-1])
    left.set(ylim=(0.2, 1), ylabel="win rate and its 95% interval")
    right.set(ylim=(-0.03, 1.03), ylabel="power")

    # both ends of the interval, and the place of the slider
    ends = [left.plot([], [], color=POLICY, alpha=0.5)[0] for _ in range(2)]
    (bar,) = left.plot([], [], "o-", color=POLICY, linewidth=3, markersize=7)
    (curve,) = right.plot([], [], color=POLICY, alpha=0.5)
    (point,) = right.plot([], [], "o", color=POLICY, markersize=9)

    def update(state: Mapping[str, Any]) -> None:
        place = list(prompts).index(state["n"])
        for end, name in zip(ends, ("low", "high")):
            end.set_data(prompts, state[name])
        middle = (state["low"][place], state["rate"], state["high"][place])
        bar.set_data([state["n"]] * 3, middle)
        curve.set_data(prompts, state["power"])
        point.set_data([state["n"]], [state["power"][place]])

    return BlittedFigure(figure, [*ends, bar, curve, point], update)


def prompts_explorer(
    n: int = 200, rate: float = 0.55, prompts: Sequence[int] = PROMPTS
) -> Explorer:
    """The interval of a measured win rate and the power, as prompts and win rate move.

    Args:
        n: where the slider of the prompts begins; one of `prompts`.
        rate: the win rate that was measured, from 0.5 to 0.8.
        prompts: numbers of prompts, ascending.

    Raises:
        ValueError: `n` is none of the prompts, or these are not positive and ascending.
    """
    prompts = integers("prompts", prompts).tolist()
    if n not in prompts or prompts[0] < 1 or sorted(set(prompts)) != prompts:
        raise ValueError(
            f"n is {n} and prompts is {prompts}; give positive numbers in ascending order, one of "
            "them n"
        )
    if not 0.5 <= rate <= 0.8:
        raise ValueError(f"rate is {rate}; give a win rate from 0.5 to 0.8")
    blitted = prompts_figure(prompts)

    def show(n: int, rate: float) -> str:
        every = [prompts_state(each, round(rate, 2)) for each in prompts]
        state = {key: [found[key] for found in every] for key in ("low", "high", "power")}
        blitted.update({**state, "n": n, "rate": round(rate, 2)})
        now = prompts_state(n, round(rate, 2))
        return f"interval {now['low']:.3f} to {now['high']:.3f}; power {now['power']:.0%}"

    sliders = {
        "n": widgets.SelectionSlider(
            options=[(f"{each:,}", each) for each in prompts],
            value=n,
            description="prompts",
            style={"description_width": "60px"},
            layout={"width": "420px"},
        ),
        "rate": slider_of("measured win rate", rate, 0.5, 0.8, 0.01),
    }
    caption = "How many prompts does a win rate of 0.55 need until its interval excludes one half?"
    return explorer_of(show, Picture(blitted), sliders, caption)
