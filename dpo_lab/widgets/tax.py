"""What a coefficient buys and what it costs elsewhere: state, picture and explorer."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np

from dpo_lab.engine.escaping import for_figure
from dpo_lab.plots import OPTIMUM, POLICY, REJECTED
from dpo_lab.widgets.explorers import Explorer, Picture, explorer_of
from dpo_lab.widgets.figures import BlittedFigure, wide

Row = Mapping[str, Any]
"""A run: `coefficient`, `reward`, `kl`, and `changes`, in nats per byte by kind of text."""


def tax_state(rows: Sequence[Row], coefficient: float) -> dict[str, Any]:
    """Means and standard errors over the seeds of one coefficient.

    Of `reward`, of `kl` in nats, and of `changes`, by kind of text in nats per byte: `reward` and
    `reward_se`, and so on. With one seed the errors are 0.
    """
    mine = [row for row in rows if row["coefficient"] == coefficient]
    state: dict[str, Any] = {"coefficient": coefficient, "seeds": len(mine)}
    for name in ("reward", "kl"):
        state[name], state[f"{name}_se"] = _mean([row[name] for row in mine])
    found = {kind: _mean([row["changes"][kind] for row in mine]) for kind in mine[0]["changes"]}
    state["changes"] = {kind: mean for kind, (mean, _) in found.items()}
    state["changes_se"] = {kind: error for kind, (_, error) in found.items()}
    return state


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread / len(values) ** 0.5


def tax_figure(states: Sequence[Mapping[str, Any]], kind: str) -> BlittedFigure:
    """Reward against the tax on one kind of text, and the tax on each kind.

    A state is that of `tax_state`; `states` are those of every coefficient, in order.
    """
    figure, (left, right) = wide(2)

    # every coefficient, and the place of this one
    taxes = [state["changes"][kind] for state in states]
    rewards = [state["reward"] for state in states]
    left.plot(taxes, rewards, "o-", color=OPTIMUM, alpha=0.5, markersize=4)
    left.axvline(0, color=OPTIMUM, linestyle=":")
    (across,) = left.plot([], [], color=POLICY)
    (up,) = left.plot([], [], color=POLICY)
    (point,) = left.plot([], [], "o", color=POLICY, markersize=9)
    left.set(xlabel=f"change in nats per byte, {for_figure(kind)}", ylabel="true reward")

    # each kind of text, at this coefficient and, in gray, at the first one
    kinds, places = list(states[0]["changes"]), np.arange(len(states[0]["changes"]))
    right.axhline(0, color=OPTIMUM, linewidth=0.8)
    start = [states[0]["changes"][name] for name in kinds]
    label = f"at coefficient {states[0]['coefficient']:g}"
    right.plot(places, start, "_", color=OPTIMUM, markersize=26, markeredgewidth=2, label=label)
    bars = right.bar(places, np.zeros(len(kinds)), 0.5, color=REJECTED)
    every = [value for state in states for value in state["changes"].values()]
    room = 0.15 * (max(0.0, *every) - min(0.0, *every)) or 1.0
    right.set(ylim=(min(0.0, *every) - room, max(0.0, *every) + room))
    right.set_xticks(places, [for_figure(name) for name in kinds])
    right.set_ylabel("change in nats per byte")
    right.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))

    def update(state: Mapping[str, Any]) -> None:
        (tax, error), (reward, other) = (
            (state["changes"][kind], state["changes_se"][kind]),
            (state["reward"], state["reward_se"]),
        )
        point.set_data([tax], [reward])
        across.set_data([tax - error, tax + error], [reward, reward])
        up.set_data([tax, tax], [reward - other, reward + other])
        for bar, name in zip(bars, kinds):
            bar.set_height(state["changes"][name])

    return BlittedFigure(figure, [across, up, point, *bars], update)


def tax_explorer(rows: Sequence[Row], *, name: str = "gamma", kind: str | None = None) -> Explorer:
    """Reward and alignment tax as a coefficient moves, over the runs of a recorded sweep.

    Args:
        rows: one per run, with `coefficient`, `reward`, `kl` (nats), and `changes`: by kind of text
            the change in nats per byte.
        name: of the coefficient.
        kind: of text on the horizontal axis; by default the first.

    Raises:
        ValueError: there are no rows, or `kind` is none of theirs.
    """
    if not rows:
        raise ValueError("rows is empty; give at least one run, as load_tax returns them")
    kinds = list(rows[0]["changes"])
    kind = kinds[0] if kind is None else kind
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, kinds))}")
    settings = sorted({row["coefficient"] for row in rows})
    states = {setting: tax_state(rows, setting) for setting in settings}
    blitted = tax_figure(list(states.values()), kind)

    def show(coefficient: float) -> str:
        state = states[coefficient]
        blitted.update(state)
        changes = ", ".join(f"{each} {value:+.3f}" for each, value in state["changes"].items())
        return (
            f"reward {state['reward']:.3f} ± {state['reward_se']:.3f} at {state['kl']:.1f} nats; "
            f"change in nats per byte: {changes}; {state['seeds']} seeds"
        )

    slider = widgets.SelectionSlider(
        options=[(f"{setting:g}", setting) for setting in settings],
        value=settings[0],
        description=name,
        style={"description_width": "60px"},
        layout={"width": "420px"},
    )
    caption = "How much of the tax goes before the reward does?"
    return explorer_of(show, Picture(blitted), {"coefficient": slider}, caption)
