"""DPO in rounds at a fixed number of labels, on a bandit: state, picture and explorer."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch

from dpo_lab.engine.arguments import floats, integers
from dpo_lab.losses import check_beta
from dpo_lab.plots import CHOSEN, OPTIMUM, POLICY, REJECTED, check_labels
from dpo_lab.theory.objective import optimal_policy
from dpo_lab.theory.on_policy import tuned_runs
from dpo_lab.widgets.explorers import Explorer, Picture, explorer_of
from dpo_lab.widgets.figures import BlittedFigure, wide

# eight completions, the better the rarer: the best has 0.3% of the reference, and 60% of the
# optimum at beta 0.3
QUALITIES = ("awful", "bad", "poor", "so-so", "fine", "good", "great", "best")
QUALITY_REWARDS = tuple(np.linspace(0, 3.5, 8).tolist())
RARE = tuple(torch.softmax(-1.5 * torch.tensor(QUALITY_REWARDS, dtype=torch.float64), 0).tolist())

# numbers of rounds that the slider has
ROUNDS = (1, 2, 3, 4, 6, 8, 12, 24)

REFERENCES = {"fixed reference": POLICY, "moved reference": REJECTED}


def rounds_state(
    rounds: int,
    moved: bool = False,
    labels: int = 480,
    beta: float = 0.3,
    reference: tuple[float, ...] = RARE,
    reward: tuple[float, ...] = QUALITY_REWARDS,
    seeds: int = 20,
) -> dict[str, Any]:
    """Where DPO ends in `rounds` rounds with `labels` labels in all, at its best learning rate.

    `policy` (n,) is the mean policy of the seeds, `labeled` (n,) the fraction of the labeled
    completions that are each of the n, and `gaps` (seeds,) the J(pi*) - J(pi) of each.
    """
    return _rounds_state(rounds, moved, labels, beta, reference, reward, seeds)


@cache
def _rounds_state(
    rounds: int, moved: bool, labels: int, beta: float, reference: Any, reward: Any, seeds: int
) -> dict[str, Any]:
    """`rounds_state`, computed once for the same arguments."""
    bandit = (torch.tensor(values, dtype=torch.float64) for values in (reference, reward))
    options = {"rounds": rounds, "moved": moved, "labels": labels, "seeds": seeds}
    runs = tuned_runs(*bandit, beta, generator=torch.Generator().manual_seed(0), **options)
    times = (runs.labels.sum(3) + runs.labels.sum(2)).sum((0, 1))
    return {
        "policy": runs.policies[-1].mean(0).numpy(),
        "labeled": (times / times.sum()).numpy(),
        "gaps": runs.gaps.numpy(),
    }


def mean_and_error(gaps: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    return float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5)


def rounds_figure(
    completions: Sequence[str],
    optimum: Sequence[float],
    rounds: Sequence[int],
    gaps: Mapping[str, Sequence[tuple[float, float]]],
) -> BlittedFigure:
    """Mean policies beside the optimum, and the gap to it over the number of rounds.

    A state has `rounds` and, by the kind of reference, the `policies` (n,).

    Args:
        completions: n names.
        optimum: (n,) probabilities.
        rounds: (k,) ascending.
        gaps: by the kind of reference, (k, 2): mean gap and its standard error.
    """
    figure, (left, right) = wide(2)

    # the policies, and the optimum over them
    shown, places = check_labels(completions, len(optimum), "completions"), np.arange(len(optimum))
    bars = {
        name: left.bar(places + side, np.zeros(len(places)), 0.4, color=color, label=name)
        for (name, color), side in zip(REFERENCES.items(), (-0.2, 0.2))
    }
    marks = {"color": CHOSEN, "markersize": 26, "markeredgewidth": 2, "label": "optimum"}
    marks = left.plot(places, optimum, "_", **marks)
    left.set_xticks(places, shown)
    left.set(ylim=(0, 1), ylabel="probability, mean of the seeds")
    left.legend(frameon=False, loc="upper left")

    # the gaps, and the place of the slider
    least, most, points, at = 0.0, 0.0, {}, floats("rounds", rounds)
    for name, style in zip(REFERENCES, ("o-", "s--")):
        means, errors = floats("gaps", gaps[name]).T
        least, most = min(least, *(means - errors)), max(most, *(means + errors))
        color = REFERENCES[name]
        look = {"color": color, "alpha": 0.6, "capsize": 2, "markersize": 4}
        right.errorbar(at, means, errors, fmt=style, label=name, **look)
        (points[name],) = right.plot([], [], style[0], color=color, markersize=10)
    right.set(
        xscale="log", ylim=(1.1 * least, 1.3 * most), xlabel="rounds, with the same labels in all"
    )
    right.set(ylabel="J(optimum) - J(policy)", xlim=(0.85 * rounds[0], 1.18 * rounds[-1]))
    right.set_xticks(rounds, [str(each) for each in rounds], minor=False)
    right.set_xticks([], minor=True)
    right.axhline(0, color=OPTIMUM, linewidth=0.8)
    right.legend(frameon=False, loc="upper left", ncols=2, fontsize=9)

    def update(state: Mapping[str, Any]) -> None:
        place = list(rounds).index(state["rounds"])
        for name in REFERENCES:
            for bar, height in zip(bars[name], state["policies"][name]):
                bar.set_height(height)
            points[name].set_data([state["rounds"]], [gaps[name][place][0]])

    artists = [*(bar for each in bars.values() for bar in each), *marks, *points.values()]
    return BlittedFigure(figure, artists, update)


def rounds_explorer(
    reference: Sequence[float] = RARE,
    reward: Sequence[float] = QUALITY_REWARDS,
    beta: float = 0.3,
    completions: Sequence[str] = QUALITIES,
    *,
    labels: int = 480,
    rounds: Sequence[int] = ROUNDS,
    seeds: int = 20,
) -> Explorer:
    """Where DPO ends with the same labels in one round (offline) or in many, on a bandit.

    It computes all of its rounds when it opens, which takes seconds.

    Args:
        reference: (n,) probabilities, all positive.
        reward: (n,) rewards.
        beta: strength of the KL constraint.
        completions: n names.
        labels: of a whole run, a multiple of each of `rounds`.
        rounds: numbers of rounds, ascending; the slider begins at the first.
        seeds: independent runs, at least 2.

    Raises:
        ValueError: rounds that are not positive and ascending, or do not divide the labels.
    """
    rounds = integers("rounds", rounds).tolist()
    if not rounds or rounds[0] < 1 or sorted(set(rounds)) != rounds:
        raise ValueError(f"rounds is {rounds}; give positive numbers in ascending order")
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}; an error over seeds needs at least 2")
    given = {"reference": reference, "reward": reward}
    bandit = tuple(tuple(floats(name, values).tolist()) for name, values in given.items())
    beta = check_beta(beta)
    states = {
        name: [rounds_state(each, moved, labels, beta, *bandit, seeds) for each in rounds]
        for name, moved in zip(REFERENCES, (False, True))
    }
    gaps = {
        name: [mean_and_error(state["gaps"]) for state in found] for name, found in states.items()
    }
    best = optimal_policy(*(torch.tensor(v, dtype=torch.float64) for v in bandit), beta)
    blitted = rounds_figure(completions, best.tolist(), rounds, gaps)

    def show(rounds_now: int) -> str:
        place = rounds.index(rounds_now)
        policies = {name: found[place]["policy"] for name, found in states.items()}
        blitted.update({"rounds": rounds_now, "policies": policies})
        parts = (f"{name} {gaps[name][place][0]:.3f} ± {gaps[name][place][1]:.3f}" for name in gaps)
        return f"{labels // rounds_now} labels per round; gap: {', '.join(parts)}"

    slider = widgets.SelectionSlider(
        options=[(str(each), each) for each in rounds],
        value=rounds[0],
        description="rounds",
        style={"description_width": "60px"},
        layout={"width": "420px"},
    )
    caption = "The labels are the same in number. With how many rounds do they teach most?"
    return explorer_of(show, Picture(blitted), {"rounds_now": slider}, caption)
