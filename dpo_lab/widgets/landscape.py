"""The landscape explorer: a policy under the hand, and the paths of every method from it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import torch
import traitlets
from torch import Tensor

from dpo_lab.engine.arguments import checked
from dpo_lab.theory.landscape import Landscape
from dpo_lab.theory.objective import optimal_policy
from dpo_lab.widgets.explorers import BETAS, Explorer, Picture, image_of, outcomes, slider_of
from dpo_lab.widgets.triangle import (
    landscape_figure,
    landscape_state,
    place_in,
    policy_at,
    race_state,
)

# three completions to begin with
REFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
LABELS = ("a bore", "fine", "a joy")

# where the point stands at first: logits of the second and third completion; the first has 0
START, LOGIT_STEP, LARGEST_LOGIT = (1.6, -0.4), 0.02, 6.0

# seconds for which a slider or the point must rest until the paths are computed, and for how many
# values of the sliders these are kept
REST, KEPT = 0.15, 200

CAPTION = (
    "In JupyterLab, drag the black point; then press play. Which methods end at the optimum, which "
    "around it, and which one elsewhere? What do ten times the labels change, and for whom?"
)


class Drag(anywidget.AnyWidget):
    """Where the picture of the same box is dragged to; it shows nothing of its own."""

    _esm = Path(__file__).parent / "drag.js"
    place = traitlets.List([0.5, 0.5]).tag(sync=True)
    """fractions of the picture's width and height, from its top left"""


@checked
def landscape_explorer(
    reference: Tensor = REFERENCE,
    reward: Tensor = REWARD,
    labels: Sequence[str] = LABELS,
    *,
    steps: int = 30,
    seeds: int = 10,
) -> Explorer:
    """The objective as a hill over three completions, with the paths of every method on it.

    Drag the policy in the triangle, or move it by the sliders of its logits: its height J and its
    KLs follow. Once it rests, the exact gradient, REINFORCE, PPO, a reward model with PPO, DPO and
    IPO set out from it. The hill, the optimum and the paths move with beta.

    Args:
        reference: (3,) probabilities, all positive.
        reward: (3,) rewards, not all equal.
        labels: names of the completions.
        steps: updates of each method.
        seeds: data sets or draws per method; each method's band is over them.

    Raises:
        ValueError, TypeError: reference, reward and labels are not of three outcomes, or a
            probability of the reference is zero.
    """
    reference, reward = _three(reference, reward, labels)
    track = torch.stack([optimal_policy(reference, reward, float(beta)) for beta in BETAS])
    named = [f"{label}, reward {value:g}" for label, value in zip(labels, reward.tolist())]
    blitted = landscape_figure(Landscape(reference, reward, 1.0), track, named)

    @lru_cache
    def landscape(beta: float) -> Landscape:
        return Landscape(reference, reward, beta)

    races: dict[tuple[float, ...], dict[str, Any]] = {}

    def compute(beta: float, budget: int, logit_1: float, logit_2: float, step: int) -> None:
        """Find the paths, or keep those that were found."""
        key = (beta, budget, logit_1, logit_2)
        if key not in races:
            counts = {"steps": steps, "seeds": seeds}
            start = policy_of(logit_1, logit_2)
            races[key] = race_state(landscape(beta), start, budget, **counts)
        if len(races) > KEPT:
            races.pop(next(iter(races)), None)

    def glance(beta: float, budget: int, logit_1: float, logit_2: float, step: int) -> str:
        """Show the hill and the policy, and the paths where they are known."""
        state = landscape_state(landscape(beta), policy_of(logit_1, logit_2))
        race = races.get((beta, budget, logit_1, logit_2))
        blitted.update({**state, "landscape": landscape(beta), "step": step, "race": race})
        return _readout(state)

    def show(**values: Any) -> str:
        compute(**values)
        return glance(**values)

    sliders = {
        "beta": _beta_slider(),
        "budget": _budget_slider(steps),
        "logit_1": _logit_slider(labels[1], START[0]),
        "logit_2": _logit_slider(labels[2], START[1]),
        "step": widgets.IntSlider(steps, 0, steps, description="step", layout={"width": "300px"}),
    }
    return _wire(show, glance, compute, Picture(blitted), sliders)


def policy_of(logit_1: float, logit_2: float) -> Tensor:
    """The policy (3,) with these logits, and 0 for the first completion."""
    return torch.softmax(torch.tensor([0.0, logit_1, logit_2], dtype=torch.float64), -1)


def logits_of(policy: Tensor) -> tuple[float, float]:
    """Logits of the second and the third completion that the sliders can take; the first has 0."""
    logits = (policy[1:].log() - policy[0].log()).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    return tuple(round(round(float(one) / LOGIT_STEP) * LOGIT_STEP, 9) for one in logits)


def _three(reference: Any, reward: Any, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Reference and reward as float64 (3,), checked."""
    reference, reward = outcomes(reference, reward, labels)
    if len(reference) != 3 or not (reference > 0).all():
        raise ValueError(
            f"reference is {reference.tolist()}; it must be of three completions, each with a "
            "positive probability: they are the corners of a triangle"
        )
    if float(reward.max()) == float(reward.min()):
        raise ValueError(
            f"reward is {reward.tolist()}; at least two completions must differ, or every beta has "
            "the reference as its optimum"
        )
    return reference, reward


def _readout(state: Mapping[str, Any]) -> str:
    return (
        f"J {state['height']:.3f} of at most {state['highest']:.3f}; KL to the reference "
        f"{state['kl']:.3f} nats, to the optimum {state['distance']:.3f} nats"
    )


def _beta_slider() -> widgets.FloatLogSlider:
    """Beta from 0.25 to 4, in twenty steps per factor of ten."""
    return widgets.FloatLogSlider(
        1.0,
        base=10,
        min=-0.6,
        max=0.6,
        step=0.05,
        description="beta",
        readout_format=".3g",
        style={"description_width": "178px"},
        layout={"width": "415px"},
    )


def _budget_slider(steps: int) -> widgets.SelectionSlider:
    """Labels, or samples: from two samples per step to 512, each time twice as many."""
    counts = [2 * steps * 2**k for k in range(9)]
    return widgets.SelectionSlider(
        options=[(f"{count:,}", count) for count in counts],
        value=counts[3],
        description="labels, or samples",
        style={"description_width": "178px"},
        layout={"width": "415px"},
    )


def _logit_slider(label: str, value: float) -> widgets.FloatSlider:
    return slider_of(f"logit of {label}", value, -LARGEST_LOGIT, LARGEST_LOGIT, LOGIT_STEP)


def _wire(
    show: Callable[..., str],
    glance: Callable[..., str],
    compute: Callable[..., None],
    picture: Picture,
    sliders: Mapping[str, widgets.Widget],
) -> Explorer:
    """Wire sliders and pointer to a glance at once, and to the whole picture once they rest."""
    start = {name: slider.value for name, slider in sliders.items()}
    readout, image, drag = widgets.Label(show(**start)), image_of(picture), Drag()
    image.add_class("dpo-lab-picture")
    held: list[bool] = []
    resting: list[asyncio.Task] = []

    def values() -> dict[str, Any]:
        return {name: slider.value for name, slider in sliders.items()}

    def draw(says: str) -> None:
        image.value = picture.png()
        readout.value = says

    async def rest(before: Mapping[str, Any]) -> None:
        """Draw the whole if nothing moves any more, computed where it holds nothing up."""
        await asyncio.sleep(REST)
        await asyncio.to_thread(compute, **before)
        if values() == before:
            draw(glance(**before))

    def update(_: Any) -> None:
        if held:
            return
        while resting:
            resting.pop().cancel()
        if loop := _kernel_loop():
            draw(glance(**values()))
            resting.append(loop.create_task(rest(values())))
        else:
            draw(show(**values()))

    def put(new: Mapping[str, Any]) -> None:
        """Move several sliders, and draw once."""
        held.append(True)
        for name, value in new.items():
            sliders[name].value = value
        held.clear()
        update(None)

    def dragged(change: Any) -> None:
        place = place_in(picture.canvas.figure, *change["new"])
        put(dict(zip(("logit_1", "logit_2"), logits_of(policy_at(*place)))))

    def put_back(_: Any) -> None:
        put(start)

    for slider in sliders.values():
        slider.observe(update, names="value")
    drag.observe(dragged, names="place")
    reset = widgets.Button(description="reset", tooltip="Put every slider back")
    reset.on_click(put_back)

    # two sliders to a row, so that the picture is in sight
    placed, wrap = list(sliders.values()), {"flex_flow": "row wrap"}
    rows = [widgets.HBox(placed[:2], layout=wrap), widgets.HBox(placed[2:4], layout=wrap)]
    rows += [_player(sliders["step"]), widgets.HBox([reset, readout])]
    box = widgets.VBox([*rows, image, drag, widgets.HTML(f"<em>{CAPTION}</em>")])
    box.add_class("dpo-lab-drag")
    return Explorer(show, picture, sliders, box)


def _kernel_loop() -> asyncio.AbstractEventLoop | None:
    """The loop of the kernel that runs this, or None in a script, where nobody waits."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _player(step: widgets.IntSlider) -> widgets.HBox:
    """Play and pause, a button that goes one step, and the slider of the step."""
    play = widgets.Play(value=step.value, max=step.max, interval=150)
    one = widgets.Button(description="one step", tooltip="Go one step, at the end to the start")

    def go_on(_: Any) -> None:
        step.value = step.value + 1 if step.value < step.max else 0

    one.on_click(go_on)
    row = widgets.HBox([play, one, step], layout={"flex_flow": "row wrap"})
    row.link = widgets.jslink((step, "value"), (play, "value"))
    return row
