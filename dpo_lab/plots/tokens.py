"""Figures of tokens and of pairs of completions."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dpo_lab.engine.arguments import floats, integers
from dpo_lab.engine.escaping import for_figure, for_html
from dpo_lab.plots.style import (
    ABOVE,
    BELOW,
    CHOSEN,
    OPTIMUM,
    POLICY,
    REJECTED,
    check_labels,
    labeled_figure,
)


def plot_tokens(title: str, tokens: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Figure:
    """Bars over the tokens of a text, a panel for each of the named rows (L,)."""
    height = 1.1 + 1.3 * len(rows)
    figure = Figure(figsize=(8.4, height), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
    panels[0].set_title(title)
    places = np.arange(len(tokens))
    for axes, (name, values) in zip(panels, rows.items()):
        values = floats(f"rows[{name!r}]", values)
        shown = check_labels(tokens, len(values), f"values in {name!r}")
        colors = [CHOSEN if value > 0 else REJECTED for value in values]
        axes.bar(places, values, 0.7, color=colors)
        axes.axhline(0, color=OPTIMUM, linewidth=0.8)
        axes.set_ylabel(for_figure(name), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(places, shown, rotation=90, fontsize=8, family="monospace")
    return figure


def plot_token_logps(tokens: Sequence[str], logps: Sequence[float]) -> Figure:
    """The probability of each token above, and the running sum of their log-probs below.

    Args:
        tokens: T pieces of a completion.
        logps: (T,) the log-prob of each, nats.

    Raises:
        ValueError: there are not as many log-probs as tokens.
    """
    logps = floats("logps", logps)
    names = check_labels(tokens, len(logps), "log-probs")
    figure, (top, bottom) = labeled_figure(
        "From the tokens to the completion", "p of each token", "sum of log p so far (nats)", x=""
    )
    places = np.arange(len(names))
    bars = top.bar(places, np.exp(logps), 0.7, color=POLICY)
    top.bar_label(bars, [f"{p:.2f}" for p in np.exp(logps)], fontsize=8, padding=2)
    top.set_ylim(0, 1.12)

    # each token takes the sum down by its own log-prob
    sums = np.cumsum(logps)
    bars = bottom.bar(places, logps, 0.7, bottom=sums - logps, color=REJECTED)
    bottom.bar_label(bars, [f"{value:.1f}" for value in sums], fontsize=8, padding=2)
    bottom.set_ylim(1.12 * sums.min(initial=-1.0), 0)
    bottom.set_xticks(places, names, rotation=35, ha="right")
    return figure


def token_html(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    limit: float | None = None,
    title: str = "",
    legend: str = "",
) -> str:
    """A text as HTML whose tokens are colored by their values: blue above zero, orange below.

    Args:
        tokens: T pieces of the text.
        values: (T,), shown in the tooltips.
        limit: the value of full color, by default the largest in absolute value.
        title: shown in bold above the text.
        legend: what the values are, shown under the text beside the scale of the colors.

    Raises:
        ValueError: there are not as many values as tokens.
    """
    values = floats("values", values).tolist()
    if len(tokens) != len(values):
        raise ValueError(
            f"there are {len(tokens)} tokens and {len(values)} values; "
            "give one value for each token"
        )
    limit = limit or max(map(abs, values), default=0.0) or 1.0
    spans = [_colored(token, value, limit) for token, value in zip(tokens, values)]
    heading = f"<b>{for_html(title)}</b>\n" if title else ""

    # five steps of the scale
    scale = ""
    if legend:
        steps = [_colored(f" {k * limit:+.2g} ", k * limit, limit) for k in (-1, -0.5, 0, 0.5, 1)]
        scale = f"\n<small>{''.join(steps)} {for_html(legend)}</small>"
    text = f"{heading}{''.join(spans)}{scale}"
    return f'<div style="line-height:1.8;white-space:pre-wrap">{text}</div>'


def _colored(text: str, value: float, limit: float) -> str:
    """A piece of text on the color of its value, which its tooltip shows."""
    red, green, blue = (round(255 * part) for part in to_rgb(ABOVE if value > 0 else BELOW))
    opacity = min(abs(value) / limit, 1.0)

    # readable on the color, whatever the page's own color of text
    color = "inherit" if opacity <= 0.6 else "white" if value > 0 else "black"
    style = f"background:rgba({red},{green},{blue},{opacity:.2f});color:{color}"
    return f'<span style="{style}" title="{value:+.2f}">{for_html(text)}</span>'


def plot_pairs(scores: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Figure:
    """What P pairs teach: the rewards of their completions, and by how much they differ.

    `scores` are the rewards (N,) of all completions; `chosen` and `rejected` are indices (P,).
    """
    scores = floats("scores", scores)
    chosen, rejected = integers("chosen", chosen), integers("rejected", rejected)
    figure = Figure(figsize=(8.4, 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)

    # rewards of both sides
    bins = np.linspace(scores.min(), scores.max(), 25)
    sides = (chosen, CHOSEN, "-", "chosen"), (rejected, REJECTED, "--", "rejected")
    for index, color, stroke, name in sides:
        style = {"histtype": "step", "linewidth": 2, "linestyle": stroke, "color": color}
        label = f"{name}, mean {scores[index].mean():.2f}"
        left.hist(scores[index], bins, label=label, **style)

    # their differences
    gaps = scores[chosen] - scores[rejected]
    right.hist(gaps, 25, color=POLICY, label=f"mean {gaps.mean():.2f}")
    left.set(xlabel="reward, P(positive)", ylabel="pairs")
    right.set(xlabel="reward of chosen minus rejected")
    for axes in (left, right):
        axes.set_ylim(top=1.35 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right" if axes is right else "upper left", fontsize=9)
    return figure
