"""Sliders: each explorer wires a function that computes to a picture that is drawn anew.

Every explorer takes your own rewards, references, comparisons, log-probs or run. What it computes is a function of its
arguments (`beta_state`, `bandit_state`, ...), so that it can be called and tested without a browser.
"""

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from ipywidgets.widgets import widget as widget_protocol
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from dpo_lab.engine.arguments import checked, floats, folder, integer, integers
from dpo_lab.engine.escaping import for_html
from dpo_lab.engine.runs import read_config, read_metrics, read_snapshots
from dpo_lab.losses import LossType, bradley_terry_nll, dpo_loss
from dpo_lab.plots import check_labels
from dpo_lab.sentiment.results import Run, SweepResults, load_sweep
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.theory.objective import kl, log_partition, optimal_policy
from dpo_lab.widgets.figures import (
    BlittedFigure,
    bandit_figure,
    betas_figure,
    comparisons_figure,
    curves_figure,
    holding,
    optimum_figure,
    pairs_figure,
    run_figure,
    sweep_figure,
)
from dpo_lab.widgets.frames import frames_html

if "JUPYTER_WIDGETS_ECHO" not in os.environ:
    # a moved slider is not told its own value again, ahead of the picture: that costs 10 ms, and serves second browsers alone
    widget_protocol.JUPYTER_WIDGETS_ECHO = False

REFERENCE = torch.tensor([0.35, 0.40, 0.20, 0.05], dtype=torch.float64)

REWARD = torch.tensor([-1.0, 0.0, 1.0, 1.5], dtype=torch.float64)

LABELS = ("a bore", "fine", "a joy", "a masterpiece")

BETAS = np.geomspace(0.01, 100, 81)


class Picture:
    """A figure of which only some artists move: they are drawn over a still background, which takes a few milliseconds.

    The background is drawn anew where the limits of the axes have changed.
    """

    def __init__(self, moving: BlittedFigure):
        self.canvas, self.artists = FigureCanvasAgg(moving.figure), moving.artists
        for artist in self.artists:
            artist.set_animated(True)
        self._draw_background()

    def _draw_background(self) -> None:
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(self.canvas.figure.bbox)
        self.limits = self._limits()

    def _limits(self) -> list[tuple[float, ...]]:
        return [(*axes.get_xlim(), *axes.get_ylim()) for axes in self.canvas.figure.axes]

    def png(self) -> bytes:
        """The picture as it is now."""
        if self.limits != self._limits():
            self._draw_background()
        self.canvas.restore_region(self.background)
        for artist in sorted(self.artists, key=Artist.get_zorder):
            artist.axes.draw_artist(artist)
        image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        image = image.quantize(
            method=Image.Quantize.FASTOCTREE
        )  # with its PNG, half the time of all colors
        image.putpalette(
            [255 if value > 252 else value for value in image.getpalette()]
        )  # the octree's white is 254
        out = io.BytesIO()
        image.save(out, format="png", compress_level=1)
        return out.getvalue()


@dataclass(frozen=True)
class Explorer:
    """Sliders, a picture and a read-out; `show(**values)` is what a moved slider calls."""

    show: Callable[..., str]  # redraws for the values of the sliders, and returns the read-out
    picture: Picture
    sliders: Mapping[str, widgets.Widget]
    box: widgets.Widget

    def _repr_mimebundle_(self, **options: Any) -> Any:
        still = base64.b64encode(self.picture.png()).decode()  # what a page without a kernel shows
        bundle = {**self.box._repr_mimebundle_(**options), "image/png": still}
        # set while the site is built: its pages have no kernel
        if os.environ.get("DPO_LAB_FRAMES"):
            bundle["text/html"] = frames_html(self)
        return bundle


def _explorer(
    show: Callable[..., str],
    picture: Picture,
    sliders: Mapping[str, widgets.Widget],
    caption: str,
    *below: widgets.Widget,
) -> Explorer:
    start = {name: slider.value for name, slider in sliders.items()}
    readout = widgets.Label(show(**start))
    image = widgets.Image(value=picture.png(), format="png", layout={"max_width": "100%"})
    image.add_class("dpo-lab-picture")
    reset = widgets.Button(description="reset", tooltip="Put every slider back")

    def moved(_: Any) -> None:
        says = show(**{name: slider.value for name, slider in sliders.items()})
        image.value = (
            picture.png()
        )  # first: the browser decodes it while the read-out is on its way
        readout.value = says

    def put_back(_: Any) -> None:
        for name, slider in sliders.items():
            slider.value = start[name]

    for slider in sliders.values():
        slider.observe(moved, names="value")
    reset.on_click(put_back)
    box = widgets.VBox(
        [
            *sliders.values(),
            widgets.HBox([reset, readout]),
            image,
            *below,
            widgets.HTML(f"<em>{caption}</em>"),
        ]
    )
    return Explorer(show, picture, sliders, box)


def beta_slider(value: float = 1.0) -> widgets.FloatLogSlider:
    """Beta from 0.01 to 100, in twenty steps a decade."""
    return widgets.FloatLogSlider(
        value=value,
        base=10,
        min=-2,
        max=2,
        step=0.05,
        description="beta",
        readout_format=".3g",
        layout={"width": "420px"},
    )


def _slider(
    description: str, value: float, low: float, high: float, step: float
) -> widgets.FloatSlider:
    """A slider that can be exactly `value`: its range holds it, and so do its steps."""
    below, above = (
        math.ceil(round(max(gap, 0.0) / step, 6)) for gap in (value - low, high - value)
    )
    off = value - round(
        value, 9
    )  # 0 for a value of few digits, whose range ends at such values too
    lowest, highest = (round(value - off + n * step, 9) + off for n in (-below, above))
    return widgets.FloatSlider(
        value,
        min=min(lowest, value),
        max=max(highest, value),
        step=step,
        description=for_html(description),
        description_allow_html=True,
        readout_format=".2f" if round(value, 2) == value else ".12",
        style={"description_width": "180px"},
        layout={"width": "450px"},
    )


def _outcomes(reference: Any, reward: Any, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Reference and reward as float64 (n,). Raises ValueError or TypeError unless they are that, of as many outcomes as labels."""
    reference, reward = (
        torch.from_numpy(floats(name, v))
        for name, v in (("reference", reference), ("reward", reward))
    )
    if reference.ndim != 1 or reward.ndim != 1:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)} and reward {tuple(reward.shape)}; both must be (n,)"
        )
    check_labels(labels, len(reference), "outcomes")
    optimal_policy(reference, reward, 1.0)  # which names what is no distribution, or not finite
    return reference, reward


def beta_state(
    beta: float, reference: Tensor = REFERENCE, reward: Tensor = REWARD
) -> dict[str, Any]:
    """The optimal policy at beta (n,), its mean reward, its KL in nats, and log Z."""
    best = optimal_policy(reference, reward, beta)
    return {
        "policy": best,
        "reward": float(best @ reward),
        "kl": float(kl(best, reference)),
        "log_z": float(log_partition(reference, reward, beta)),
    }


def _optimum_readout(state: Mapping[str, Any]) -> str:
    return (
        f"mean reward {state['reward']:.3f}, KL {state['kl']:.3f} nats, log Z {state['log_z']:.3f}"
    )


def beta_explorer(
    reference: Tensor = REFERENCE, reward: Tensor = REWARD, labels: Sequence[str] = LABELS
) -> Explorer:
    """Reference, optimum and the point on the reward-KL frontier, as beta moves. Pass your own distribution and rewards.

    Raises:
        ValueError, TypeError: reference, reward and labels are not of as many outcomes, or the reference is no distribution.
    """
    reference, reward = _outcomes(reference, reward, labels)
    path = [beta_state(float(beta), reference, reward) for beta in BETAS]
    moving = optimum_figure(reference, labels, [s["kl"] for s in path], [s["reward"] for s in path])

    def show(beta: float) -> str:
        state = beta_state(beta, reference, reward)
        moving.update(state)
        return _optimum_readout(state)

    caption = "From right to left: what is the first thing that a smaller beta buys, and what does it cost in nats?"
    return _explorer(show, Picture(moving), {"beta": beta_slider()}, caption)


def bandit_state(beta: float, reward: Sequence[float], weight: Sequence[float]) -> dict[str, Any]:
    """`beta_state` for a reference proportional to `weight`, with that reference."""
    reference = torch.from_numpy(floats("weight", weight))
    reference = reference / reference.sum()
    return {
        "reference": reference,
        **beta_state(beta, reference, torch.from_numpy(floats("reward", reward))),
    }


def bandit_explorer(
    reference: Tensor = REFERENCE, reward: Tensor = REWARD, labels: Sequence[str] = LABELS
) -> Explorer:
    """Rewards and reference under your hands, and the optimal policy that follows. Errors are those of `beta_explorer`."""
    reference, reward = _outcomes(reference, reward, labels)
    n, moving = len(reference), bandit_figure(labels)

    def show(beta: float, **values: float) -> str:
        state = bandit_state(
            beta,
            [values[f"reward_{i}"] for i in range(n)],
            [values[f"weight_{i}"] for i in range(n)],
        )
        moving.update(state)
        return _optimum_readout(state)

    sliders: dict[str, widgets.Widget] = {"beta": beta_slider()}
    for i, label in enumerate(labels):
        sliders[f"reward_{i}"] = _slider(f"reward of {label}", float(reward[i]), -3, 3, 0.1)
    for i, label in enumerate(labels):
        sliders[f"weight_{i}"] = _slider(f"reference: {label}", float(reference[i]), 0.01, 1, 0.01)
    caption = "Raise every reward by the same amount: what moves, and what does not?"
    return _explorer(show, Picture(moving), sliders, caption)


@checked
def gradient_weight_state(
    beta: float, log_ratios: Sequence[float] | Tensor, loss_type: LossType = "sigmoid"
) -> dict[str, np.ndarray]:
    """Margins, losses and gradient weights of pairs whose log-ratios differ by `log_ratios` (P,) nats, chosen less rejected."""
    log_ratios = torch.from_numpy(floats("log_ratios", log_ratios))
    logps = torch.stack([log_ratios, torch.zeros_like(log_ratios)], 1).flatten()  # (2 P,)
    index = torch.arange(0, 2 * len(log_ratios), 2)
    result = dpo_loss(logps, torch.zeros_like(logps), index, index + 1, beta, loss_type=loss_type)
    return {
        "margins": result.margins.numpy(),
        "losses": result.losses.numpy(),
        "weights": result.gradient_weights.numpy(),
    }


def _on_curve(beta: float, log_ratios: Tensor, loss_type: LossType = "sigmoid") -> dict[str, Any]:
    """`gradient_weight_state`, and as `curve` that of margins on both sides of 0 as far as any of the pairs', which lie on it."""
    state = gradient_weight_state(beta, log_ratios, loss_type)
    _, most = holding(np.abs(state["margins"]), 0, 1.0 if loss_type == "ipo" else 6.0)
    line = torch.linspace(-most, most, 241, dtype=torch.float64) / beta
    return {
        **state,
        "curve": gradient_weight_state(
            beta, torch.cat([line, log_ratios]).sort().values, loss_type
        ),
    }


@checked
def gradient_weight_explorer(
    log_ratios: Sequence[float] | Tensor | None = None,
    *,
    run: Path | str | None = None,
    loss_type: LossType = "sigmoid",
) -> Explorer:
    """The loss and its gradient weight against the margin, with your pairs on the curve as beta moves.

    `log_ratios` are (P,) nats: log(pi / pi_ref) of the chosen less that of the rejected completion of each pair. Or name
    the `run` directory of `dpo-lab train`, for pairs that it trained on, at its end.
    """
    if log_ratios is not None and run is not None:
        raise ValueError("log_ratios and run are both given; the pairs come from one of them")
    if run is not None:
        last = read_snapshots(folder("run", run))[-1]
        log_ratios = np.subtract(last["chosen"], last["rejected"])
    if log_ratios is None:
        log_ratios = torch.linspace(-12, 20, 60, dtype=torch.float64)
    pairs = torch.from_numpy(floats("log_ratios", log_ratios))
    if pairs.ndim != 1 or not len(pairs) or not torch.isfinite(pairs).all():
        raise ValueError(
            f"log_ratios has shape {tuple(pairs.shape)}; it must be (P,) finite numbers, one a pair"
        )
    moving = pairs_figure(_on_curve(1.0, torch.zeros(1, dtype=torch.float64), loss_type)["curve"])

    def show(beta: float) -> str:
        state = _on_curve(beta, pairs, loss_type)
        moving.update(state)
        ranked = np.mean(state["margins"] > 0)
        return f"mean weight {state['weights'].mean():.3f}, mean loss {state['losses'].mean():.3f}, ranked rightly {ranked:.0%}"

    caption = (
        "With a small beta all pairs weigh one half. Which pairs keep their weight as beta grows?"
    )
    return _explorer(show, Picture(moving), {"beta": beta_slider(0.1)}, caption)


FILMS = ("a bore", "fine", "a joy")

CHOICES = (
    ("a joy", "a bore", 18),
    ("a bore", "a joy", 2),
    ("a joy", "fine", 14),
    ("fine", "a joy", 6),
    ("fine", "a bore", 15),
    ("a bore", "fine", 5),
)

CHOSEN_FILMS, REJECTED_FILMS = (
    np.repeat([FILMS.index(row[side]) for row in CHOICES], [row[2] for row in CHOICES])
    for side in (0, 1)
)


def bradley_terry_state(
    rewards: Sequence[float], chosen: np.ndarray, rejected: np.ndarray
) -> dict[str, Any]:
    """Likelihood of P comparisons under rewards (n,): `nll` in nats a comparison, and the share won that they predict.

    `predicted` and `observed` have one value for every two items that were compared, the lower index first.
    """
    values = torch.from_numpy(floats("rewards", rewards))
    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    first, second = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    pairs, which = np.unique(np.stack([first, second], 1), axis=0, return_inverse=True)
    won = np.bincount(which.ravel(), weights=chosen == first) / np.bincount(which.ravel())
    return {
        "rewards": values.tolist(),
        "nll": float(
            bradley_terry_nll(values, torch.as_tensor(chosen), torch.as_tensor(rejected)).mean()
        ),
        "predicted": torch.sigmoid(values[pairs[:, 0]] - values[pairs[:, 1]]).tolist(),
        "observed": won.tolist(),
    }


def bradley_terry_explorer(
    chosen: Sequence[int] = CHOSEN_FILMS,
    rejected: Sequence[int] = REJECTED_FILMS,
    labels: Sequence[str] = FILMS,
) -> Explorer:
    """Find the rewards that make comparisons likeliest by hand. Pass your own: indices into `labels`, one pair a comparison."""
    from dpo_lab.theory.bradley_terry import (
        fit_bradley_terry,  # here: scikit-learn takes seconds to import, and no other slider needs it
    )

    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    fit = fit_bradley_terry(chosen, rejected, len(labels))
    most = max(4.0, math.ceil(np.abs(fit.rewards).max()) + 1.0)
    moving = comparisons_figure(
        labels, fit.rewards, bradley_terry_state(fit.rewards, chosen, rejected)["observed"], most
    )

    def show(**rewards: float) -> str:
        state = bradley_terry_state(
            [rewards[f"reward_{i}"] for i in range(len(labels))], chosen, rejected
        )
        moving.update(state)
        return f"negative log-likelihood {state['nll']:.4f} nats a comparison; the least there is, {fit.nll:.4f}"

    sliders = {
        f"reward_{i}": _slider(f"reward of {label}", 0.0, -most, most, 0.05)
        for i, label in enumerate(labels)
    }
    caption = "Reach the least. Then raise every reward by one: why does the likelihood not mind?"
    return _explorer(show, Picture(moving), sliders, caption)


def _sample_table(texts: Sequence[str], rewards: Sequence[float]) -> str:
    whole = "white-space:pre-wrap"  # line breaks of a text are shown
    rows = [
        f'<tr><td>{reward:.2f}</td><td style="{whole}">{for_html(text)}</td></tr>'
        for text, reward in zip(texts, rewards, strict=True)
    ]
    return f"<table><tr><th>reward</th><th>sample of the policy</th></tr>{''.join(rows)}</table>"


@checked
def training_explorer(run: Path | str) -> Explorer:
    """Walk through a recorded run of `dpo-lab train`: log-ratios of chosen and rejected, pairs, and samples at each evaluation.

    Raises:
        ValueError: the directory is not that of a run.
    """
    run = folder("run", run)
    snapshots, beta = read_snapshots(run), read_config(run)["dpo"]["beta"]
    lines = [line for line in read_metrics(run) if "rewards/chosen" in line]
    means = [[line[f"rewards/{side}"] / beta for line in lines] for side in ("chosen", "rejected")]
    furthest = max(float(np.abs([s["chosen"], s["rejected"]]).max()) for s in snapshots)
    moving = run_figure([line["step"] for line in lines], *means, furthest=max(furthest, 1.0))
    samples = widgets.HTML()

    def show(snapshot: int) -> str:
        state = snapshots[snapshot]
        moving.update(state)
        samples.value = _sample_table(state["texts"], state["rewards"])
        margins = beta * np.subtract(state["chosen"], state["rejected"])
        ranked = np.mean((margins > 0) + (margins == 0) / 2)
        return f"step {state['step']}: mean margin {margins.mean():.3f} (beta x nats), ranked rightly {ranked:.0%}"

    slider = widgets.SelectionSlider(
        options=[(str(s["step"]), i) for i, s in enumerate(snapshots)],
        description="step",
        layout={"width": "420px"},
    )
    caption = "The margin grows. Does the chosen completion grow likelier, or only the rejected one less likely?"
    return _explorer(show, Picture(moving), {"snapshot": slider}, caption, samples)


def frontier_explorer(sweep: SweepResults | None = None) -> Explorer:
    """Walk through the runs of a sweep, by default the shipped one: its path under the optimal frontier, KL and samples."""
    sweep = load_sweep() if sweep is None else sweep
    runs = {run: rows for run, rows in sweep.runs().items() if run.name in sweep.samples}
    targets = {run: run.setting for run in runs if run.method.startswith("ppo")}
    moving = sweep_figure(sweep.rows, sweep.optimal, list(targets.values()))
    samples = widgets.HTML()

    def show(run: Run) -> str:
        rows = runs[run]
        state = {name: [row[name] for row in rows] for name in ("kl", "reward", "step")}
        moving.update({**state, "target": targets.get(run)})
        samples.value = _sample_table(*zip(*sweep.samples[run.name]))
        last, share = rows[-1], sweep.fraction(rows[-1])
        gain = f", {share:.0%} of the optimal gain" if np.isfinite(share) else ""
        return (
            f"reward {last['reward']:.2f} at {last['kl']:.1f} nats{gain}; {last['seconds']:.0f} s, "
            f"{last['tokens'] / 1e3:,.0f}k tokens"
        )

    slider = widgets.SelectionSlider(
        options=[(run.label, run) for run in runs],
        description="run",
        layout={"width": "520px"},
        style={"description_width": "40px"},
    )
    caption = "Which setting moves a method along the frontier, and which only off it?"
    return _explorer(show, Picture(moving), {"run": slider}, caption, samples)


@dataclass(frozen=True)
class LiveCurves:
    """Loss and margin of a run, drawn while it trains: pass it to `train_dpo` as `evaluate`, and show `image` before."""

    run: Path
    picture: Picture
    update: Callable[[Mapping[str, Any]], None]
    image: widgets.Image

    def __call__(self, model: Any = None, step: int = 0) -> dict[str, float]:
        """Draw what `metrics.jsonl` holds; measures nothing."""
        lines = [line for line in read_metrics(self.run) if "loss" in line]
        names = {"step": "step", "loss": "loss", "margin": "rewards/margins"}
        self.update({name: [line[key] for line in lines] for name, key in names.items()})
        self.image.value = self.picture.png()
        return {}


@checked
def live_curves(run: Path | str, steps: int) -> LiveCurves:
    """Curves of the `steps` steps that `train_dpo` will write into the directory `run`."""
    moving = curves_figure(integer("steps", steps))
    picture = Picture(moving)
    image = widgets.Image(value=picture.png(), format="png", layout={"max_width": "100%"})
    return LiveCurves(folder("run", run), picture, moving.update, image)


def betas_explorer(runs: Mapping[float, Path | str], optimal: OptimalFrontier) -> Explorer:
    """Walk through recorded runs of several betas: reward against KL, the pairs as each beta weighs them, and samples.

    `runs` gives the run directory of each beta, as `dpo-lab train` makes it; `optimal` is the frontier to draw above them.

    Raises:
        ValueError: there is no run, or a directory is not that of a run.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run directory, as in {0.1: 'runs/imdb'}")
    snapshots = {beta: read_snapshots(folder(f"runs[{beta}]", runs[beta])) for beta in sorted(runs)}
    paths = {
        beta: [{name: snapshot[name] for name in ("kl", "reward")} for snapshot in found]
        for beta, found in snapshots.items()
    }
    moving = betas_figure(
        list(paths.values()), optimal, _on_curve(1.0, torch.zeros(1, dtype=torch.float64))["curve"]
    )
    samples = widgets.HTML()

    def show(beta: float) -> str:
        last = snapshots[beta][-1]
        state = _on_curve(
            beta,
            torch.from_numpy(
                floats("chosen", last["chosen"]) - floats("rejected", last["rejected"])
            ),
        )
        moving.update(
            {**state, **{name: [point[name] for point in paths[beta]] for name in ("kl", "reward")}}
        )
        samples.value = _sample_table(last["texts"], last["rewards"])
        return (
            f"step {last['step']}: reward {last['reward']:.3f} at {last['kl']:.2f} nats, mean weight {state['weights'].mean():.3f}, "
            f"mean margin {state['margins'].mean():.2f} (beta x nats)"
        )

    slider = widgets.SelectionSlider(
        options=[(f"{beta:g}", beta) for beta in snapshots],
        description="beta",
        layout={"width": "420px"},
    )
    caption = "Which beta lets its pairs rest, and which never does? What does that do to the KL?"
    return _explorer(show, Picture(moving), {"beta": slider}, caption, samples)
