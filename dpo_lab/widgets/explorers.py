"""Explorers: sliders wired to a picture and a readout, for JupyterLab.

Every explorer takes your own rewards, reference, comparisons, log-probs or run. An explorer only
wires: `states` computes what a slider shows, and `figures` draws it.
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
from dpo_lab.losses import LossType
from dpo_lab.plots import check_labels
from dpo_lab.sentiment.results import Run, SweepResults, load_sweep
from dpo_lab.theory.bradley_terry import fit_bradley_terry
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.theory.objective import optimal_policy
from dpo_lab.widgets.figures import (
    BlittedFigure,
    bandit_figure,
    betas_figure,
    comparisons_figure,
    curves_figure,
    gae_figure,
    optimum_figure,
    pairs_figure,
    run_figure,
    sweep_figure,
)
from dpo_lab.widgets.frames import frames_html
from dpo_lab.widgets.states import (
    CHOSEN_FILMS,
    FILMS,
    LABELS,
    REFERENCE,
    REJECTED_FILMS,
    REWARD,
    bandit_state,
    beta_state,
    bradley_terry_state,
    gae_state,
    on_curve,
    usual_curve,
)

# Do not echo a slider's own value before the picture: that saves 10 ms per move, and matters only
# where two browsers show one notebook.
if "JUPYTER_WIDGETS_ECHO" not in os.environ:
    widget_protocol.JUPYTER_WIDGETS_ECHO = False

# values of beta on the optimal frontier
BETAS = np.geomspace(0.01, 100, 81)

# values of lambda that the axes of its explorer hold
LAMBDAS = np.linspace(0, 1, 21)

# from this many sliders on, they stand in two columns, so that the picture below is in sight
TWO_COLUMNS = 4


class Picture:
    """A blitted figure as PNG: only the animated artists are redrawn, over a kept background.

    The background is redrawn where the limits of the axes have changed, or the figure says so.
    """

    def __init__(self, blitted: BlittedFigure):
        self.canvas, self.artists = FigureCanvasAgg(blitted.figure), blitted.artists
        self._figures_own = blitted.background
        for artist in self.artists:
            artist.set_animated(True)
        self._draw_background()

    def _draw_background(self) -> None:
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(self.canvas.figure.bbox)
        self.drawn = self._shown()

    def _shown(self) -> tuple[Any, ...]:
        """What the background depends on."""
        axes = self.canvas.figure.axes
        return [(*each.get_xlim(), *each.get_ylim()) for each in axes], self._figures_own()

    def png(self) -> bytes:
        """The picture as it is now."""
        # draw the animated artists over the background
        if self.drawn != self._shown():
            self._draw_background()
        self.canvas.restore_region(self.background)
        for artist in sorted(self.artists, key=Artist.get_zorder):
            self.canvas.figure.draw_artist(artist)

        # 256 colors: reducing and encoding takes half the time of encoding all colors
        image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        image = image.quantize(method=Image.Quantize.FASTOCTREE)

        # the octree's white is 254
        image.putpalette([255 if value > 252 else value for value in image.getpalette()])
        out = io.BytesIO()
        image.save(out, format="png", compress_level=1)
        return out.getvalue()


@dataclass(frozen=True)
class Explorer:
    """Sliders, a picture and a readout."""

    show: Callable[..., str]
    """redraws for the values of the sliders, and returns the readout"""
    picture: Picture
    sliders: Mapping[str, widgets.Widget]
    box: widgets.Widget
    """everything, as JupyterLab shows it"""

    def _repr_mimebundle_(self, **options: Any) -> Any:
        # a page without a kernel shows the still picture
        still = base64.b64encode(self.picture.png()).decode()
        bundle = {**self.box._repr_mimebundle_(**options), "image/png": still}

        # set while the site is built: one frame per value of the first slider
        if os.environ.get("DPO_LAB_FRAMES"):
            bundle["text/html"] = frames_html(self)
        return bundle


def beta_explorer(
    reference: Tensor = REFERENCE, reward: Tensor = REWARD, labels: Sequence[str] = LABELS
) -> Explorer:
    """Reference, optimum and its point on the reward-KL frontier as beta moves.

    Pass your own distribution and rewards.

    Args:
        reference: (n,) probabilities.
        reward: (n,) rewards.
        labels: n names of the outcomes.

    Raises:
        ValueError, TypeError: reference, reward and labels are not of equally many outcomes, or the
            reference is not a distribution.
    """
    reference, reward = outcomes(reference, reward, labels)
    path = [beta_state(float(beta), reference, reward) for beta in BETAS]
    kls, rewards = ([state[name] for state in path] for name in ("kl", "reward"))
    blitted = optimum_figure(reference, labels, kls, rewards)

    def show(beta: float) -> str:
        state = beta_state(beta, reference, reward)
        blitted.update(state)
        return _optimum_readout(state)

    caption = (
        "Move beta from right to left: what does a smaller beta gain first, and how many nats "
        "does that cost?"
    )
    return explorer_of(show, Picture(blitted), {"beta": beta_slider()}, caption)


def bandit_explorer(
    reference: Tensor = REFERENCE, reward: Tensor = REWARD, labels: Sequence[str] = LABELS
) -> Explorer:
    """Sliders for beta, every reward and the reference, and the optimal policy that follows.

    Arguments and errors are those of `beta_explorer`.
    """
    reference, reward = outcomes(reference, reward, labels)
    n, blitted = len(reference), bandit_figure(labels)

    def show(beta: float, **values: float) -> str:
        rewards = [values[f"reward_{i}"] for i in range(n)]
        weights = [values[f"weight_{i}"] for i in range(n)]
        state = bandit_state(beta, rewards, weights)
        blitted.update(state)
        return _optimum_readout(state)

    sliders: dict[str, widgets.Widget] = {"beta": beta_slider()}
    for i, label in enumerate(labels):
        sliders[f"reward_{i}"] = slider_of(f"reward of {label}", float(reward[i]), -3, 3, 0.1)
    for i, label in enumerate(labels):
        sliders[f"weight_{i}"] = slider_of(
            f"reference: {label}", float(reference[i]), 0.01, 1, 0.01
        )
    caption = "Raise every reward by the same amount: what changes, and what does not?"
    return explorer_of(show, Picture(blitted), sliders, caption)


@checked
def gradient_weight_explorer(
    log_ratios: Sequence[float] | Tensor | None = None,
    *,
    run: Path | str | None = None,
    loss_type: LossType = "sigmoid",
) -> Explorer:
    """The loss and its gradient weight against the margin, with your pairs on the curve.

    Args:
        log_ratios: (P,) nats: log(pi / pi_ref) of the chosen completion of each pair minus that of
            the rejected one.
        run: in place of them, the directory of a run of `dpo-lab train`: pairs that it trained on,
            at its end.
        loss_type: as in `dpo_loss`.

    Raises:
        ValueError: both are given, a log-ratio is not finite, or the directory holds no run.
    """
    pairs = _log_ratios(log_ratios, run)
    blitted = pairs_figure(usual_curve(loss_type))

    def show(beta: float) -> str:
        state = on_curve(beta, pairs, loss_type)
        blitted.update(state)
        return (
            f"mean weight {state['weights'].mean():.3f}, mean loss {state['losses'].mean():.3f}, "
            f"ranked correctly {np.mean(state['margins'] > 0):.0%}"
        )

    caption = (
        "At a small beta every pair has weight one half. Which pairs keep their weight as beta "
        "grows?"
    )
    return explorer_of(show, Picture(blitted), {"beta": beta_slider(0.1)}, caption)


def bradley_terry_explorer(
    chosen: Sequence[int] = CHOSEN_FILMS,
    rejected: Sequence[int] = REJECTED_FILMS,
    labels: Sequence[str] = FILMS,
) -> Explorer:
    """Find the rewards of maximum likelihood by hand. Pass your own comparisons.

    Args:
        chosen: (P,) index into `labels` of the item preferred in each comparison.
        rejected: (P,) index of the other item.
        labels: names of the items.

    Raises:
        ValueError: as in `fit_bradley_terry`.
    """
    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    fit = fit_bradley_terry(chosen, rejected, len(labels))
    observed = bradley_terry_state(fit.rewards, chosen, rejected)["observed"]
    most = max(4.0, math.ceil(np.abs(fit.rewards).max()) + 1.0)
    blitted = comparisons_figure(labels, fit.rewards, observed, most)

    def show(**rewards: float) -> str:
        given = [rewards[f"reward_{i}"] for i in range(len(labels))]
        state = bradley_terry_state(given, chosen, rejected)
        blitted.update(state)
        return (
            f"negative log-likelihood {state['nll']:.4f} nats per comparison; "
            f"the minimum is {fit.nll:.4f}"
        )

    sliders = {
        f"reward_{i}": slider_of(f"reward of {label}", 0.0, -most, most, 0.05)
        for i, label in enumerate(labels)
    }
    caption = (
        "Reach the minimum. Then raise every reward by one: why does the likelihood stay the same?"
    )
    return explorer_of(show, Picture(blitted), sliders, caption)


@checked
def training_explorer(run: Path | str) -> Explorer:
    """Walk through a recorded run of `dpo-lab train`, one evaluation at a time.

    It shows the log-ratios of chosen and rejected completions, the pairs, samples, and what
    `dpo_lab.health.diagnose` finds in the run.

    Raises:
        ValueError: the directory does not hold a run.
    """
    run = folder("run", run)
    snapshots, beta = read_snapshots(run), read_config(run)["dpo"]["beta"]

    # mean log-ratios over the run: the implicit rewards without their factor beta
    lines = [line for line in read_metrics(run) if "rewards/chosen" in line]
    steps = [line["step"] for line in lines]
    means = [[line[f"rewards/{side}"] / beta for line in lines] for side in ("chosen", "rejected")]
    furthest = max(float(np.abs([s["chosen"], s["rejected"]]).max()) for s in snapshots)
    blitted = run_figure(steps, *means, furthest=max(furthest, 1.0))
    samples = widgets.HTML()

    def show(snapshot: int) -> str:
        state = snapshots[snapshot]
        blitted.update(state)
        samples.value = _sample_table(state["texts"], state["rewards"])

        # a tie counts one half
        margins = beta * np.subtract(state["chosen"], state["rejected"])
        ranked = np.mean((margins > 0) + (margins == 0) / 2)
        return (
            f"step {state['step']}: mean margin {margins.mean():.3f} (beta x nats), "
            f"ranked correctly {ranked:.0%}"
        )

    options = [(str(state["step"]), i) for i, state in enumerate(snapshots)]
    sliders = {"snapshot": _selection("step", options)}
    caption = (
        "The margin grows. Does the chosen completion become more likely, or only the rejected "
        "one less likely?"
    )
    health = widgets.HTML(_health_table(run))
    return explorer_of(show, Picture(blitted), sliders, caption, samples, health)


def frontier_explorer(sweep: SweepResults | None = None) -> Explorer:
    """Walk through the runs of a sweep, by default the shipped one.

    It shows each run's path under the optimal frontier, its KL during training, and samples.
    """
    sweep = load_sweep() if sweep is None else sweep
    runs = {run: rows for run, rows in sweep.runs().items() if run.name in sweep.samples}
    targets = {run: run.setting for run in runs if run.method.startswith("ppo")}
    blitted = sweep_figure(sweep.rows, sweep.optimal, list(targets.values()))
    samples = widgets.HTML()

    def show(run: Run) -> str:
        rows = runs[run]
        state = {name: [row[name] for row in rows] for name in ("kl", "reward", "step")}
        blitted.update({**state, "target": targets.get(run)})
        samples.value = _sample_table(*zip(*sweep.samples[run.name]))

        last, fraction = rows[-1], sweep.fraction(rows[-1])
        gain = f", {fraction:.0%} of the optimal gain" if np.isfinite(fraction) else ""
        return (
            f"reward {last['reward']:.2f} at {last['kl']:.1f} nats{gain}; "
            f"{last['seconds']:.0f} s, {last['tokens'] / 1e3:,.0f}k tokens"
        )

    sliders = {"run": _selection("run", [(run.label, run) for run in runs], width="520px")}
    caption = "Which setting moves a method along the frontier, and which only away from it?"
    return explorer_of(show, Picture(blitted), sliders, caption, samples)


def betas_explorer(runs: Mapping[float, Path | str], optimal: OptimalFrontier) -> Explorer:
    """Walk through recorded runs of several betas.

    It shows each run's path under the optimal frontier, its pairs as its beta weighs them, and
    samples.

    Args:
        runs: the run directory of each beta, as `dpo-lab train` makes it.
        optimal: the frontier to draw above them.

    Raises:
        ValueError: there is no run, or a directory does not hold one.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one run directory, as in {0.1: 'runs/imdb'}")
    snapshots = {beta: read_snapshots(folder(f"runs[{beta}]", runs[beta])) for beta in sorted(runs)}
    paths = {
        beta: {name: [snapshot[name] for snapshot in found] for name in ("kl", "reward")}
        for beta, found in snapshots.items()
    }
    blitted = betas_figure(list(snapshots.values()), optimal, usual_curve())
    samples = widgets.HTML()

    def show(beta: float) -> str:
        last = snapshots[beta][-1]
        log_ratios = floats("chosen", last["chosen"]) - floats("rejected", last["rejected"])
        state = on_curve(beta, torch.from_numpy(log_ratios))
        blitted.update({**state, **paths[beta]})
        samples.value = _sample_table(last["texts"], last["rewards"])
        return (
            f"step {last['step']}: reward {last['reward']:.3f} at {last['kl']:.2f} nats, "
            f"mean weight {state['weights'].mean():.3f}, "
            f"mean margin {state['margins'].mean():.2f} (beta x nats)"
        )

    sliders = {"beta": _selection("beta", [(f"{beta:g}", beta) for beta in snapshots])}
    caption = (
        "At which betas do the gradient weights of the pairs go to zero, and at which do they "
        "stay? What does that do to the KL?"
    )
    return explorer_of(show, Picture(blitted), sliders, caption, samples)


def gae_explorer(
    tokens: Sequence[str], rewards: Sequence[float], values: Sequence[float], lam: float = 0.95
) -> Explorer:
    """The advantage of each token of one completion, as lambda moves from 0 to 1.

    Args:
        tokens: L pieces of text.
        rewards: (L,) what each token is paid, as by `token_rewards`.
        values: (L,) what the value model expected before each token.
        lam: where the slider begins.

    Raises:
        ValueError: tokens, rewards and values are not equally many, or one is not finite.
    """
    rewards, values = floats("rewards", rewards), floats("values", values)
    for name, found in (("rewards", rewards), ("values", values)):
        if found.shape != (len(tokens),) or not len(found) or not np.isfinite(found).all():
            raise ValueError(
                f"{name} has shape {found.shape} for {len(tokens)} tokens; it must be (L,) finite "
                "numbers, one per token"
            )

    # limits that hold the advantages of every lambda
    every = [gae_state(value, rewards, values)["advantages"] for value in LAMBDAS]
    low, high = min(0.0, np.min(every)), max(0.0, np.max(every))
    room = 0.05 * (high - low) or 1.0
    blitted = gae_figure(tokens, rewards, values, (low - room, high + room))

    def show(lam: float) -> str:
        state = gae_state(lam, rewards, values)
        blitted.update(state)
        first, last = state["advantages"][[0, -1]]
        return f"advantage of the first token {first:+.3f}, of the last {last:+.3f}"

    slider = widgets.FloatSlider(
        lam, min=0, max=1, step=0.05, description="lambda", layout={"width": "420px"}
    )
    caption = "At lambda 0, which tokens are praised or blamed? And at lambda 1, for what?"
    return explorer_of(show, Picture(blitted), {"lam": slider}, caption)


@dataclass(frozen=True)
class LiveCurves:
    """Loss and margin of a run, drawn during training.

    Show `image`, then pass this to `train_dpo` as `callback`.
    """

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
    """Curves of the `steps` steps that `train_dpo` will write to the directory `run`."""
    blitted = curves_figure(integer("steps", steps))
    picture = Picture(blitted)
    return LiveCurves(folder("run", run), picture, blitted.update, image_of(picture))


def beta_slider(value: float = 1.0) -> widgets.FloatLogSlider:
    """Beta from 0.01 to 100, in twenty steps per factor of ten."""
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


def slider_of(
    description: str, value: float, low: float, high: float, step: float
) -> widgets.FloatSlider:
    """A slider that can be exactly `value`: its range holds it, and so do its steps."""
    # steps from the value to the ends of the range
    below, above = (
        math.ceil(round(max(gap, 0.0) / step, 6)) for gap in (value - low, high - value)
    )

    # a value of few digits has a range that ends at such values too: its remainder is 0
    remainder = value - round(value, 9)
    lowest, highest = (round(value - remainder + n * step, 9) + remainder for n in (-below, above))
    return widgets.FloatSlider(
        value,
        min=min(lowest, value),
        max=max(highest, value),
        step=step,
        description=for_html(description),
        description_allow_html=True,
        readout_format=".2f" if round(value, 2) == value else ".12",
        style={"description_width": "178px"},
        layout={"width": "415px"},
    )


def _selection(
    description: str, options: Sequence[tuple[str, Any]], width: str = "420px"
) -> widgets.SelectionSlider:
    """A slider over named values."""
    return widgets.SelectionSlider(
        options=options,
        description=description,
        style={"description_width": "40px"},
        layout={"width": width},
    )


def image_of(picture: Picture) -> widgets.Image:
    """The picture in its own size, where the page has room for it."""
    layout = {"max_width": "100%", "align_self": "flex-start"}
    return widgets.Image(value=picture.png(), format="png", layout=layout)


def explorer_of(
    show: Callable[..., str],
    picture: Picture,
    sliders: Mapping[str, widgets.Widget],
    caption: str,
    *below: widgets.Widget,
) -> Explorer:
    """Wire sliders to `show` and to the picture, with a readout and a button that resets them."""
    start = {name: slider.value for name, slider in sliders.items()}
    readout = widgets.Label(show(**start))
    image = image_of(picture)
    image.add_class("dpo-lab-picture")
    reset = widgets.Button(description="reset", tooltip="Put every slider back")

    def update(_: Any) -> None:
        says = show(**{name: slider.value for name, slider in sliders.items()})

        # the picture first: the browser decodes it while the readout is on its way
        image.value = picture.png()
        readout.value = says

    def put_back(_: Any) -> None:
        for name, slider in sliders.items():
            slider.value = start[name]

    for slider in sliders.values():
        slider.observe(update, names="value")
    reset.on_click(put_back)
    bar = widgets.HBox([reset, readout])
    question = widgets.HTML(f"<em>{caption}</em>")
    box = widgets.VBox([*_arranged(sliders), bar, image, *below, question])
    return Explorer(show, picture, sliders, box)


def _arranged(sliders: Mapping[str, widgets.Widget]) -> list[widgets.Widget]:
    """The sliders one below the other, or many of them in two columns with beta above."""
    if len(sliders) < TWO_COLUMNS:
        return list(sliders.values())
    above = [slider for name, slider in sliders.items() if name == "beta"]
    others = [slider for name, slider in sliders.items() if name != "beta"]
    half = math.ceil(len(others) / 2)
    columns = [widgets.VBox(others[:half]), widgets.VBox(others[half:])]
    return [*above, widgets.HBox(columns, layout={"flex_flow": "row wrap"})]


def outcomes(reference: Any, reward: Any, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Reference and reward as float64 (n,).

    Raises ValueError or TypeError unless there are as many of each as labels, and the reference is
    a distribution.
    """
    reference = torch.from_numpy(floats("reference", reference))
    reward = torch.from_numpy(floats("reward", reward))
    if reference.ndim != 1 or reward.ndim != 1:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)} and reward {tuple(reward.shape)}; "
            "both must be (n,)"
        )
    check_labels(labels, len(reference), "outcomes")

    # names what is not a distribution, or not finite
    optimal_policy(reference, reward, 1.0)
    return reference, reward


def _log_ratios(log_ratios: Any, run: Path | None) -> Tensor:
    """Log-ratios (P,) of pairs as float64: given, from the end of a run, or made up."""
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
            f"log_ratios has shape {tuple(pairs.shape)}; "
            "it must be (P,) finite numbers, one per pair"
        )
    return pairs


def _optimum_readout(state: Mapping[str, Any]) -> str:
    return (
        f"mean reward {state['reward']:.3f}, KL {state['kl']:.3f} nats, log Z {state['log_z']:.3f}"
    )


def _sample_table(texts: Sequence[str], rewards: Sequence[float]) -> str:
    """Samples with their rewards as HTML; line breaks of a text are shown."""
    rows = [
        f'<tr><td>{reward:.2f}</td><td style="white-space:pre-wrap">{for_html(text)}</td></tr>'
        for text, reward in zip(texts, rewards, strict=True)
    ]
    return f"<table><tr><th>reward</th><th>sample of the policy</th></tr>{''.join(rows)}</table>"


def _health_table(run: Path) -> str:
    """What `diagnose` finds in a run as HTML."""
    # imported here, since it loads datasets and transformers
    from dpo_lab.health.catalog import FAULTS
    from dpo_lab.health.diagnosis import diagnose, safe

    try:
        found = diagnose(run)
    except (ValueError, FileNotFoundError) as error:
        return f"<p>diagnosis: none ({for_html(safe(str(error)))})</p>"
    if not found.findings:
        return f"<p>diagnosis: {for_html(found.summary())}</p>"
    rows = [
        "".join(
            f"<td>{for_html(safe(text))}</td>"
            for text in (f.severity, FAULTS[f.fault].title, f.evidence, f.advice)
        )
        for f in found.findings
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    head = "<tr><th>diagnosis</th><th>fault</th><th>seen</th><th>what to do</th></tr>"
    return f"<table>{head}{body}</table>"
