"""Pictures show exactly what they were given.

Every value within the axes, every label letter by letter, no text as markup.
"""

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import mistune
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ipywidgets import SelectionSlider
from matplotlib.cbook import is_math_text
from matplotlib.patches import Rectangle
from recording import record_run

from dpo_lab import plots
from dpo_lab.engine.arguments import floats
from dpo_lab.engine.escaping import for_figure, for_html, for_markdown
from dpo_lab.engine.runs import append_metrics, write_json
from dpo_lab.evaluate import Evaluation
from dpo_lab.losses import dpo_loss
from dpo_lab.sentiment.results import load_sweep
from dpo_lab.sentiment.run import save_samples
from dpo_lab.theory.bradley_terry import fit_bradley_terry
from dpo_lab.theory.frontier import OptimalFrontier
from dpo_lab.theory.objective import optimal_policy
from dpo_lab.widgets.explorers import (
    _sample_table,
    bandit_explorer,
    beta_explorer,
    betas_explorer,
    bradley_terry_explorer,
    frontier_explorer,
    gae_explorer,
    gradient_weight_explorer,
    live_curves,
    slider_of,
    training_explorer,
)
from dpo_lab.widgets.failures import failures_explorer
from dpo_lab.widgets.figures import expanded_limits
from dpo_lab.widgets.on_policy import rounds_explorer
from dpo_lab.widgets.states import (
    bandit_state,
)
from dpo_lab.widgets.tax import tax_explorer
from dpo_lab.widgets.win_rates import prompts_explorer

LABELS = ["$5 to $10", r"c$\undefined$", "_hidden", "<b>&\n\\$"]
REFERENCE, REWARD = [0.6, 0.3, 0.099, 0.001], [-5.0, 0.0, 1.0, 8.0]
LOG_RATIOS = [1.0, 3.0, -40.0, 250.0, 0.0]
TAX = [
    {"coefficient": c, "reward": 0.8, "kl": 3.0, "changes": {"$_a": 0.1 - c, "<b>": 60 * c}}
    for c in (0, 0.5, 2)
]
OPTIMAL = OptimalFrontier(np.array([0.5, 0.9]), np.array([0.0, 3.0]), np.array([64.0, 20.0]))
# rewards of 5.7, 0 and -5.7
CHAIN = ([0] * 300 + [1] + [1] * 300 + [2], [1] * 300 + [0] + [2] * 300 + [1])


def far_run(folder):
    """A recorded run whose log-ratios, KLs and rewards lie far out, below 0 too."""
    write_json(folder / "config.json", {"dpo": {"beta": 0.5}})
    for step in range(1, 5):
        append_metrics(
            folder, {"step": step, "rewards/chosen": -90.0 * step, "rewards/rejected": 70.0 * step}
        )
    lines = [
        {
            "step": 0,
            "chosen": [0.0, 0.0],
            "rejected": [0.0, 0.0],
            "texts": ["a"],
            "rewards": [0.25],
            "reward": 0.5,
            "kl": -0.4,
        },
        {
            "step": 4,
            "chosen": [400.0, -3.0],
            "rejected": [-600.0, -1.0],
            "texts": ["b"],
            "rewards": [7.0],
            "reward": -2.0,
            "kl": 90.0,
        },
    ]
    (folder / "snapshots.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def far_sweep():
    """The sweep, with a run that ends below a KL of 0 and one with a target above every KL."""
    sweep = load_sweep()
    rows = [
        row | ({"kl": -0.3} if row["method"] == "dpo" and row["step"] == 0 else {})
        for row in sweep.rows
    ]
    rows = [
        row | ({"setting": 400.0} if (row["method"], row["setting"]) == ("ppo", 12.0) else {})
        for row in rows
    ]
    samples = {name.replace("ppo-12-", "ppo-400-"): found for name, found in sweep.samples.items()}
    return replace(sweep, rows=rows, samples=samples)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    near, far = tmp_path_factory.mktemp("near"), far_run(tmp_path_factory.mktemp("far"))
    record_run(near)
    return near, far


EXPLORERS = {
    "beta": lambda runs: beta_explorer(REFERENCE, REWARD, LABELS),
    "bandit": lambda runs: bandit_explorer(REFERENCE, REWARD, LABELS),
    **{
        f"gradient weight, {kind}": lambda runs, kind=kind: gradient_weight_explorer(
            LOG_RATIOS, loss_type=kind
        )
        for kind in ("sigmoid", "ipo", "hinge", "robust")
    },
    "gradient weight of a run": lambda runs: gradient_weight_explorer(run=str(runs[1])),
    "Bradley-Terry": lambda runs: bradley_terry_explorer(*CHAIN, LABELS[:3]),
    "training": lambda runs: training_explorer(str(runs[1])),
    "betas": lambda runs: betas_explorer({0.1: str(runs[0]), 5.0: runs[1]}, OPTIMAL),
    "frontier": lambda runs: frontier_explorer(far_sweep()),
    "GAE": lambda runs: gae_explorer(LABELS, [-60.0, 0.1, 0.0, 900.0], [-5.0, 300.0, 0.2, 0.1]),
    "prompts": lambda runs: prompts_explorer(),
    "rounds": lambda runs: rounds_explorer(
        labels=12, rounds=(1, 2, 4), seeds=2, completions=LABELS * 2
    ),
    "failures": lambda runs: failures_explorer(),
    "tax": lambda runs: tax_explorer(TAX),
}


def grid(slider):
    if isinstance(slider, SelectionSlider):
        return [value for _, value in slider.options]
    steps = [
        slider.min + k * slider.step
        for k in range(round((slider.max - slider.min) / slider.step) + 1)
    ]
    return [slider.base**step for step in steps] if hasattr(slider, "base") else steps


def outside(artist):
    """The points of a line, or the height of a bar, that its axes do not show."""
    if isinstance(artist, Rectangle):
        points = np.array([[artist.get_x(), artist.get_height()]])
    else:
        points = np.column_stack(
            [np.broadcast_to(values, (len(artist.get_xdata()),)) for values in artist.get_data()]
        )
    pixels, box = (
        artist.get_transform().transform(points) if not isinstance(artist, Rectangle) else None,
        artist.axes.bbox,
    )
    if pixels is None:
        pixels = artist.axes.transData.transform(points)
    inside = (pixels >= [box.x0 - 1, box.y0 - 1]).all(1) & (pixels <= [box.x1 + 1, box.y1 + 1]).all(
        1
    )
    return points[~inside].tolist()


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_state_of_every_slider_lies_within_the_axes(name, runs):
    explorer = EXPLORERS[name](runs)
    start = {key: slider.value for key, slider in explorer.sliders.items()}
    for key, slider in explorer.sliders.items():
        for value in grid(slider):
            explorer.show(**{**start, key: value})
            for artist in explorer.picture.artists:
                if artist.get_visible():
                    assert outside(artist) == [], (key, value)
    assert explorer.picture.png().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXPLORERS)
def test_what_stands_still_lies_within_the_axes_too(name, runs):
    explorer = EXPLORERS[name](runs)
    for axes in explorer.picture.canvas.figure.axes:
        lines = [
            line
            for line in axes.get_lines()
            if line not in explorer.picture.artists and line.get_color() != plots.OPTIMUM
        ]
        assert [outside(artist) for artist in [*lines, *axes.patches] if outside(artist)] == []


def test_the_background_follows_the_limits():
    explorer = gradient_weight_explorer(LOG_RATIOS, loss_type="ipo")
    for beta in (0.01, 100.0, 0.1):
        explorer.show(beta=beta)
        quick = (
            explorer.picture.png(),
            np.asarray(explorer.picture.canvas.buffer_rgba()).astype(int),
        )[1]
        for artist in explorer.picture.artists:
            artist.set_animated(False)
        explorer.picture.canvas.draw()
        whole = np.asarray(explorer.picture.canvas.buffer_rgba()).astype(int)
        for artist in explorer.picture.artists:
            artist.set_animated(True)
        assert (np.abs(quick - whole).max(-1) > 60).mean() < 0.002, beta


@pytest.mark.parametrize(
    "of", [list, np.array, torch.tensor, lambda values: np.array(values, dtype=np.float32)]
)
def test_an_explorer_starts_with_exactly_what_it_was_given(of):
    sliders = bandit_explorer(of(REFERENCE), of(REWARD), LABELS).sliders
    shown = {
        name: [sliders[f"{name}_{i}"].value for i in range(4)] for name in ("reward", "weight")
    }
    assert shown == {
        "reward": floats("reward", of(REWARD)).tolist(),
        "weight": floats("weight", of(REFERENCE)).tolist(),
    }
    expected = optimal_policy(
        *(torch.tensor(shown[name], dtype=torch.float64) for name in ("weight", "reward")), 1.0
    )
    assert bandit_state(1.0, shown["reward"], shown["weight"])["policy"].tolist() == pytest.approx(
        expected.tolist(), abs=1e-9
    )
    bars = bandit_explorer(of(REFERENCE), of(REWARD), LABELS).picture.artists
    assert [bar.get_height() for bar in bars] == pytest.approx(
        REFERENCE + expected.tolist(), abs=1e-7
    )
    points = gradient_weight_explorer(of(LOG_RATIOS)).picture.artists[0]
    assert points.get_xdata() == pytest.approx(0.1 * np.array(LOG_RATIOS), rel=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.floats(-1e6, 1e6), st.sampled_from([(-3, 3, 0.1), (0.01, 1, 0.01), (-4, 4, 0.05)]))
@example(0.1, (-3, 3, 0.1))
@example(0.3499999940395355, (0.01, 1, 0.01))
@example(0.0, (0.01, 1, 0.01))
def test_a_slider_can_be_exactly_what_it_is_given(value, bounds):
    low, high, step = bounds
    slider = slider_of("x", value, low, high, step)
    assert slider.value == value and slider.min <= min(low, value) + 1e-5 * step
    assert slider.max >= max(high, value) - 1e-5 * step
    steps = (value - slider.min) / step
    assert abs(steps - round(steps)) < 1e-3
    digits = {".2f": f"{value:.2f}", ".12": f"{value:.12g}"}[slider.readout_format]
    assert float(digits) == pytest.approx(value, rel=1e-11, abs=1e-300)
    if (
        round(value, 2) == value
        and low <= value <= high
        and abs(value / step - round(value / step)) < 1e-9
    ):
        assert (slider.min, slider.max) == (low, high)


def test_the_likeliest_rewards_can_be_reached():
    fit = fit_bradley_terry(*CHAIN, 3)
    explorer = bradley_terry_explorer(*CHAIN, LABELS[:3])
    assert np.abs(fit.rewards).max() > 5
    for i, reward in enumerate(fit.rewards):
        explorer.sliders[f"reward_{i}"].value = reward
        assert explorer.sliders[f"reward_{i}"].value == reward
    readout = next(w for w in explorer.box.children if hasattr(w, "children")).children[1].value
    assert readout.split()[2] == readout.split()[-1] == f"{fit.nll:.4f}"


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "robust"])
def test_the_pairs_lie_on_the_curve_at_every_beta(kind):
    explorer = gradient_weight_explorer(LOG_RATIOS, loss_type=kind)
    index = torch.arange(5)
    logps = torch.tensor(LOG_RATIOS + [0.0] * 5, dtype=torch.float64)
    for beta in grid(explorer.sliders["beta"]):
        explorer.show(beta=beta)
        loss = dpo_loss(
            logps, torch.zeros(10, dtype=torch.float64), index, index + 5, beta, loss_type=kind
        )
        for panel, points, expected in zip(
            explorer.picture.canvas.figure.axes,
            explorer.picture.artists,
            (loss.losses, loss.gradient_weights),
        ):
            assert points.get_xdata() == pytest.approx(loss.margins.numpy())
            assert points.get_ydata() == pytest.approx(expected.numpy())
            on_curve = np.interp(points.get_xdata(), *panel.get_lines()[0].get_data())
            assert on_curve == pytest.approx(points.get_ydata(), rel=1e-9, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), max_size=5), st.sampled_from([(0, 1), (-0.5, 4), (0, 6.0)]))
def test_limits_hold_the_values_and_are_not_moved_without_need(values, limits):
    low, high = expanded_limits(values, *limits)
    assert low <= limits[0] and high >= limits[1]
    assert all(low * (1 + 1e-8) <= value <= high * (1 + 1e-8) for value in values)
    assert (low, high) == limits or any(not limits[0] <= value <= limits[1] for value in values)
    assert expanded_limits([*values, float("nan"), float("inf")], *limits) == (low, high)


def test_live_curves_hold_losses_margins_and_steps_of_any_size(tmp_path):
    curves = live_curves(str(tmp_path), np.int64(2))
    assert [axes.get_xlim() for axes in curves.picture.canvas.figure.axes] == [(0, 2), (0, 2)]
    for step, (loss, margin) in enumerate(
        [(0.7, 0.0), (25.0, -30.0), (-2.0, 90.0), (float("nan"), 1.0)], start=1
    ):
        append_metrics(tmp_path, {"step": step, "loss": loss, "rewards/margins": margin})
        curves(None, step)
        for artist in curves.picture.artists:
            artist.set_data(
                *(
                    values[np.isfinite(artist.get_ydata())]
                    for values in map(np.array, artist.get_data())
                )
            )
            assert outside(artist) == []


# Labels and colors


def text_of(label):
    """What matplotlib draws of a label that it does not read as mathematics."""
    assert not is_math_text(label)
    return label.replace(r"\$", "$").removeprefix("\u200b")


def texts(figure):
    legends = [legend for axes in figure.axes if (legend := axes.get_legend())] + figure.legends
    return [text_of(text.get_text()) for legend in legends for text in legend.get_texts()]


def ticks(axis):
    return [text_of(label.get_text()) for label in axis.get_ticklabels()]


NAMES = [*LABELS, *(f"name {i}" for i in range(12))]
POINTS = [
    {"reward": 0.1, "reward_se": 0.01, "kl": -0.2, "kl_se": 0.1},
    {"reward": 1.4, "reward_se": 0.1, "kl": 60.0, "kl_se": 1.0},
]
MANY = {
    "distributions": lambda: plots.plot_distributions(["a", "b"], dict.fromkeys(NAMES, [0.5, 0.5])),
    "beta path": lambda: plots.plot_beta_path(
        [1.0, 2.0], np.full((2, 16), 1 / 16), NAMES, [0, 1], [0, 1]
    ),
    "lines": lambda: plots.plot_lines("t", [0, 1], dict.fromkeys(NAMES, [0, 1]), "x", "y"),
    "band": lambda: plots.plot_band(
        "t", [1, 2], np.ones((2, 3)), dict.fromkeys(NAMES, [1, 1]), "x", "y"
    ),
    "race": lambda: plots.plot_race("t", dict.fromkeys(NAMES, ([1, 2], np.ones((2, 3)))), "x", "y"),
    "simplex": lambda: plots.plot_simplex(
        lambda p: p[:, 0],
        LABELS[:3],
        dict.fromkeys(NAMES[:9], torch.eye(3)),
        dict.fromkeys(NAMES[9:], torch.ones(3) / 3),
        8,
    ),
    "frontier": lambda: plots.plot_frontier(dict.fromkeys(NAMES, POINTS), OPTIMAL),
    "contenders": lambda: plots.plot_sweep(
        dict.fromkeys(NAMES, POINTS), OPTIMAL, np.array([[0, 1], [0, 1], [0, 1]])
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_everything_that_is_given_is_drawn_and_named(name):
    figure = MANY[name]()
    figure.draw_without_rendering()  # which reads each label
    assert [text for text in texts(figure) if text in NAMES] == NAMES


@pytest.mark.parametrize(
    "name, n",
    [("distributions", 16), ("lines", 16), ("race", 16), ("beta path", 12), ("contenders", 16)],
)
def test_what_is_drawn_together_can_be_told_apart(name, n):
    axes = MANY[name]().axes[0]
    artists = [artist for artist in axes.get_lines() if text_of(artist.get_label()) in NAMES]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in artists]
    if name == "distributions":
        looks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers]
    if name == "beta path":
        looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in artists]
    assert len(looks) == 16 and len(set(looks[:n])) == n


def test_the_first_looks_are_what_they_were():
    first = [next(pair) for pair in [plots.looks(plots.COLORS, plots.STROKES)] for _ in range(4)]
    assert first == list(zip(plots.COLORS, ("-", "--", "-.", ":")))


@pytest.mark.parametrize("name", ["frontier", "contenders"])
def test_points_of_any_size_lie_within_the_axes(name):
    axes = MANY[name]().axes[0]
    lines = [line for line in axes.get_lines() if line.get_color() != plots.OPTIMUM]
    assert len(lines) > 9 and [outside(line) for line in lines if outside(line)] == []
    near = plots.plot_frontier(
        {"DPO": [{"reward": 0.5, "reward_se": 0.01, "kl": 1.0, "kl_se": 0.1}]}
    ).axes[0]
    assert near.get_ylim() == (0.4, 1.0)


@pytest.mark.parametrize("least", [0.0, -0.3])
def test_the_scale_of_roots_goes_below_zero_where_a_kl_does(least):
    axes = plots.plot_betas(
        {0.1: [{"kl": least, "reward": 0.5}, {"kl": 9.0, "reward": 0.9}]}, OPTIMAL
    ).axes[0]
    line = axes.get_lines()[1]
    assert outside(line) == [] and line.get_xdata()[0] == least
    assert axes.get_xlim()[0] == pytest.approx(1.1 * least)


LABELED = {
    "bars": lambda labels: ticks(
        plots.plot_distributions(labels, {"one": [0.25] * 4}).axes[0].xaxis
    ),
    "intervals": lambda labels: ticks(
        plots.plot_intervals(labels, [0] * 4, [1] * 4, [2] * 4).axes[0].yaxis
    ),
    "beta path": lambda labels: texts(
        plots.plot_beta_path([1, 2], np.full((2, 4), 0.25), labels, [0, 1], [0, 1])
    )[:4],
    "beta explorer": lambda labels: ticks(
        beta_explorer(REFERENCE, REWARD, labels).picture.canvas.figure.axes[0].xaxis
    ),
    "bandit explorer": lambda labels: ticks(
        bandit_explorer(REFERENCE, REWARD, labels).picture.canvas.figure.axes[0].xaxis
    ),
}


@pytest.mark.parametrize("name", LABELED)
def test_labels_are_shown_letter_by_letter_one_for_each(name):
    assert LABELED[name](LABELS) == LABELS
    for labels in (LABELS[:3], [*LABELS, "more"], []):
        with pytest.raises(
            ValueError,
            match=f"labels has {len(labels)} entries.* there are 4 .*give one label for each",
        ):
            LABELED[name](labels)


def test_labels_of_the_other_pictures_are_shown_letter_by_letter():
    bars = ticks(bradley_terry_explorer(*CHAIN, LABELS[:3]).picture.canvas.figure.axes[0].xaxis)
    simplex = [text_of(text.get_text()) for text in MANY["simplex"]().axes[0].texts]
    assert bars == simplex == LABELS[:3]
    axes = plots.plot_memory({LABELS[0]: {LABELS[1]: LABELS[2]}}, 1.0).axes[0]
    assert (
        ticks(axes.yaxis) == LABELS[:1]
        and text_of(axes.texts[0].get_text()) == f"{LABELS[1]}\n{LABELS[2]}"
    )
    sliders = bandit_explorer(REFERENCE, REWARD, LABELS).sliders
    for i, label in enumerate(LABELS):
        assert (
            sliders[f"reward_{i}"].description_allow_html
            and read_html(sliders[f"reward_{i}"].description)[0] == f"reward of {label}"
        )


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: beta_explorer([0.5, 0.5], [0.0, 1.0, 2.0], ["a", "b"]),
            "reward has 3 outcomes and the distribution 2",
        ),
        (lambda: bandit_explorer([0.5, 0.6], [0.0, 1.0], ["a", "b"]), "reference sums to 1.1"),
        (lambda: bandit_explorer([0.5, 0.5], [0.0, np.nan], ["a", "b"]), "reward is .*finite"),
        (
            lambda: bandit_explorer([[0.5, 0.5]], [0.0, 1.0], ["a", "b"]),
            r"reference has shape \(1, 2\)",
        ),
        (lambda: beta_explorer(["x", "y"], [0.0, 1.0], ["a", "b"]), "reference holds 'x'"),
        (
            lambda: plots.plot_simplex(lambda p: p[:, 0], ["a", "b"], {}, {}, 8),
            "labels has 2 entries",
        ),
        (
            lambda: plots.plot_lines("t", [0, 1], {"one": [0, 1], "two": [0]}, "x", "y"),
            "line 'two' has 1 values and x has 2",
        ),
        (lambda: plots.token_html(["a"], [1.0, 2.0]), "1 tokens and 2 values"),
        (lambda: gradient_weight_explorer([1.0], loss_type="dpo"), "loss_type is 'dpo'"),
    ],
)
def test_what_cannot_be_drawn_whole_is_refused_by_name(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


# Text


class Reader(html.parser.HTMLParser):
    """The text of HTML, <br> as a line break, and its text nodes."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.nodes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.nodes.append("\n" if tag == "br" else "")

    def handle_endtag(self, tag):
        self.nodes.append("")

    def handle_data(self, data):
        self.nodes.append(data)


def read_html(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    return "".join(reader.nodes), reader


MARKUP = [
    "$",
    "$$",
    "\\",
    "\\(",
    "\\)",
    "|",
    "<b>",
    "</td>",
    "&amp;",
    "&lt;",
    "`",
    "*",
    "**",
    "_",
    "__",
    "~~",
    "[a](b)",
    "![x](y)",
    "<!--",
]
MARKUP += [
    "\n",
    "\r\n",
    "\r",
    "\u2028",
    "\u0085",
    "\x0b",
    " ",
    "a",
    "# ",
    "- ",
    "http://a_b.c/$x_y",
    "<script>",
    "](",
    "&#36;",
    "---",
    "\n\n",
]
marked = st.lists(st.sampled_from(MARKUP), max_size=12).map("".join) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"])
)


@settings(max_examples=300, deadline=None)
@given(marked)
def test_html_shows_the_text_and_no_markup_or_formula(text):
    shown, reader = read_html(for_html(text))
    assert shown == text and set(reader.tags) <= {"span"}
    # such a character is alone in its element
    assert all(len(node) == 1 for node in reader.nodes if "$" in node or "\\" in node)


@settings(max_examples=300, deadline=None)
@given(marked)
def test_a_cell_of_a_markdown_table_shows_the_text_on_one_line(text):
    cell = for_markdown(text)
    assert len(cell.splitlines()) <= 1
    table = mistune.create_markdown(
        escape=False, plugins=["table", "strikethrough", "math", "url"]
    )(f"| head |\n|---|\n| {cell} |\n")
    (found,) = re.findall("<td>(.*?)</td>", table, re.DOTALL) or [""]
    shown, reader = read_html(found)
    lines = re.sub("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]", "\n", text)
    assert re.sub(r"[^\S\n]+", " ", shown).strip(" ") == re.sub(r"[^\S\n]+", " ", lines).strip(" ")
    assert set(reader.tags) <= {"span", "br", "a"}


@given(st.text(), st.sampled_from(LABELS))
def test_a_label_of_a_figure_is_no_mathematics(text, label):
    for one in (text, label, label + text):
        assert text_of(for_figure(one)) == one.removeprefix("\u200b") and not for_figure(
            one
        ).startswith("_")


def evaluation(texts):
    n = len(texts)
    return Evaluation(0.5, 0.1, 0.0, 0.0, tuple(texts), (0.5,) * n, ((1,),) * n)


def test_samples_are_a_row_each_whatever_they_hold(tmp_path):
    texts = ["A kettle\nboils\n\nslowly", "a | b \\| c", "<b>$5</b> to $10", "", *MARKUP]
    save_samples(str(tmp_path), evaluation(texts), evaluation(texts[::-1]), n=np.int64(100))
    lines = (tmp_path / "samples.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(texts) and all(line.count("|") == 5 for line in lines)
    rows = re.findall(
        "<tr>(.*?)</tr>",
        mistune.create_markdown(escape=False, plugins=["table"])("\n".join(lines)),
        re.DOTALL,
    )
    assert len(rows) == 1 + len(texts)


def test_a_table_of_samples_and_colored_tokens_are_text():
    shown, reader = read_html(_sample_table(["<script>$x$</script>\n\\(y\\)"], [0.5]))
    assert "<script>$x$</script>\n\\(y\\)" in shown and "script" not in reader.tags
    shown, reader = read_html(plots.token_html(["$5 to ", "$10<b>"], [0.5, -1.0]))
    assert shown == "$5 to $10<b>" and set(reader.tags) == {"div", "span"}
    with pytest.raises(ValueError):
        _sample_table(["a", "b"], [0.5])


def test_notebooks_show_texts_of_models_escaped():
    """Every cell that makes HTML of a text escapes it."""
    for path in (Path(__file__).parent.parent / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and "HTML(" in source:
                for line in source.splitlines():
                    assert not re.search(r"f\"<.*\{(?!for_html)[^}]*(decode|texts?\b)", line), (
                        path.name,
                        line,
                    )
