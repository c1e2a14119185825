"""Policies of three completions as points of a triangle: their places, states and figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from dpo_lab.plots import CHOSEN, OPTIMUM, check_labels
from dpo_lab.theory.landscape import METHODS, SAMPLERS, Landscape, method_paths
from dpo_lab.theory.objective import kl
from dpo_lab.widgets.figures import BlittedFigure

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])

# no probability is dragged below this one, since log 0 is minus infinity
LEAST_PROBABILITY = 0.005

# the figure is 756 by 378 pixels; the triangle's base has 300 of them and begins at CORNER
DPI, BASE, CORNER, BANDS = 90, 300, (39, 48), 14

# distances are drawn from here on, in nats; an end below is said to be less
LEAST_DISTANCE, MOST_DISTANCE = 1e-6, 10.0

# the looks of each method: no two of them share color and stroke
LOOKS = {
    "exact gradient": ("#222222", "-"),
    "REINFORCE": ("#e69f00", "-"),
    "PPO": ("#56b4e9", "-"),
    "reward model + PPO": ("#2c5f9e", (0, (4, 1.5))),
    "DPO": ("#c0392b", "-"),
    "IPO": ("#b07aa1", (0, (1.5, 1))),
}
COLUMNS = (0.0, 0.435, 0.62)
SHADES = LinearSegmentedColormap.from_list("hill", ["#ffffff", "#d4dcd9", "#a3b5ae"], BANDS)


def place_of(policy: Any) -> np.ndarray:
    """Where policies (..., 3) stand, (..., 2): the triangle's base is from (0, 0) to (1, 0)."""
    return np.asarray(policy) @ CORNERS


def policy_at(x: float, y: float) -> Tensor:
    """The policy (3,) at a place inside the triangle, or one near a place outside."""
    second, third = np.linalg.solve((CORNERS[1:] - CORNERS[0]).T, [x, y])
    policy = np.array([1 - second - third, second, third]).clip(0, None)
    policy = (policy / policy.sum()).clip(LEAST_PROBABILITY, None)
    return torch.from_numpy(policy / policy.sum())


def policies_of_pixels(width: int) -> tuple[np.ndarray, Tensor]:
    """Which pixels of a picture lie in the triangle, (h, width), and their policies, (M, 3).

    The policies come in the order of the pixels that are True, row by row from the base up.
    """
    height = round(width * CORNERS[2, 1])
    third = (np.arange(height)[:, None] + 0.5) / height
    second = (np.arange(width) + 0.5) / width - third / 2
    policies = np.stack(np.broadcast_arrays(1 - second - third, second, third), -1)
    inside = (policies > 0).all(-1)
    return inside, torch.from_numpy(policies[inside])


def landscape_state(landscape: Landscape, policy: Tensor) -> dict[str, Any]:
    """What a policy (3,) is worth: its height J and the optimum's, and its two KLs in nats."""
    return {
        "policy": policy,
        "optimum": landscape.optimum,
        "height": float(landscape.height(policy)),
        "highest": float(landscape.height(landscape.optimum)),
        "kl": float(kl(policy, landscape.reference)),
        "distance": float(landscape.distance(policy)),
    }


def race_state(
    landscape: Landscape, start: Tensor, budget: int, *, steps: int = 30, seeds: int = 10
) -> dict[str, dict[str, np.ndarray]]:
    """The way of every method from `start`, each with `budget` labels or samples.

    A sampler spreads its samples over its steps. `paths` are policies (steps + 1, seeds, 3),
    `distances` (steps + 1, seeds) their KL to the optimum in nats, and `band` (3, steps + 1) the
    10th, 50th and 90th percentile of the distances.
    """
    found = {}
    for method in METHODS:
        samples = budget // steps if method in SAMPLERS else 1
        counts = {"labels": budget, "samples": samples, "steps": steps, "seeds": seeds}
        paths = method_paths(method, landscape, start, **counts)
        distances = landscape.distance(paths).numpy()
        band = np.quantile(distances, (0.1, 0.5, 0.9), axis=1)
        found[method] = {"paths": paths.numpy(), "distances": distances, "band": band}
    return found


def nats(value: float) -> str:
    """A distance in two digits."""
    if value < LEAST_DISTANCE:
        return f"< {LEAST_DISTANCE:g}"
    return f"{value:.2g}"


def landscape_figure(landscape: Landscape, track: Tensor, labels: Sequence[str]) -> BlittedFigure:
    """The hill of the objective over the triangle, paths of all methods, and their distances.

    A state is that of `landscape_state`, with `landscape`, the `step` up to which paths are drawn,
    and `race`, a state of `race_state`, or None where there are no paths yet. The hill is drawn
    anew where the landscape is another than before. `track` (K, 3) are the optima of all betas.
    """
    figure = Figure(figsize=(8.4, 4.2), dpi=DPI)
    hill, update_hill = _hill(figure, landscape, track, labels)
    race, update_race = _race(figure, hill[1].axes)
    shown = {"race": None, "number": 0}

    def update(state: Mapping[str, Any]) -> None:
        update_hill(state)
        update_race(state)
        if state["race"] is not shown["race"]:
            shown.update(race=state["race"], number=shown["number"] + 1)

    def number() -> int:
        """The table and the bands belong to the background, which changes with the race alone."""
        return shown["number"]

    return BlittedFigure(figure, [*hill, *race], update, number)


def place_in(figure: Figure, left: float, top: float) -> np.ndarray:
    """The place (2,) in the triangle of a point of the picture, in fractions from its top left."""
    width, height = figure.bbox.size
    return (np.array([left * width, (1 - top) * height]) - CORNER) / BASE


def _hill(figure: Figure, landscape: Landscape, track: Tensor, labels: Sequence[str]) -> Any:
    """The triangle: the hill, the optimum and its track, the reference and the policy."""
    axes = figure.add_axes((0, 0, 0.5, 1))
    low = -np.array(CORNER) / BASE
    size = figure.bbox.height / BASE
    axes.set(xlim=(low[0], low[0] + size), ylim=(low[1], low[1] + size))
    axes.axis("off")
    placed = zip(check_labels(labels, 3, "outcomes"), CORNERS, ("left", "right", "center"))
    for label, (x, y), align in placed:
        outward = {"left": -0.1, "right": 0.1, "center": 0.0}[align]
        drop = 0.03 if align == "center" else -0.09
        axes.text(x + outward, y + drop, label, ha=align, fontsize=9)

    # the hill under the axes, pixel by pixel, transparent outside the triangle
    inside, policies = policies_of_pixels(BASE)
    pixels = np.zeros((*inside.shape, 4), np.uint8)
    image = figure.figimage(pixels, *CORNER, origin="lower", zorder=-1)
    (edge,) = axes.plot(*CORNERS[[0, 1, 2, 0]].T, color=OPTIMUM, linewidth=1, zorder=2)

    # what stands on it
    style = {"color": OPTIMUM, "linewidth": 1.2, "zorder": 2, "label": "optimum for every beta"}
    (line,) = axes.plot(*place_of(track).T, "--", **style)
    marks = {"linestyle": "none", "markeredgecolor": "white"}
    style = {"color": OPTIMUM, "markersize": 8, "zorder": 3, "label": "reference", **marks}
    (reference,) = axes.plot(*place_of(landscape.reference), "s", **style)
    style = {"color": CHOSEN, "markersize": 15, "zorder": 6, "label": "optimum", **marks}
    (star,) = axes.plot([], [], "*", **style)
    style = {"color": "black", "markersize": 13, "zorder": 7, "markeredgewidth": 2, **marks}
    (point,) = axes.plot([], [], "o", label="your policy", **style)
    style = {"frameon": False, "fontsize": 8, "loc": "upper left", "bbox_to_anchor": (0, 1)}
    axes.legend(handles=[point, star, line, reference], **style)
    drawn = [None]

    def update(state: Mapping[str, Any]) -> None:
        if state["landscape"] is not drawn[0]:
            drawn[0] = state["landscape"]
            pixels[inside] = shades(drawn[0].height(policies).numpy())
            image.set_data(pixels)
        star.set_data(*place_of(state["optimum"])[:, None])
        point.set_data(*place_of(state["policy"])[:, None])

    return [image, edge, line, reference, star, point], update


def shades(heights: np.ndarray) -> np.ndarray:
    """Colors (M, 4) of heights (M,), in bands from the lowest to the highest, darker uphill."""
    low, high = heights.min(), heights.max()
    bands = ((heights - low) / (high - low) * BANDS).astype(int).clip(0, BANDS - 1)
    return (SHADES(np.arange(BANDS)) * 255).round().astype(np.uint8)[bands]


def _race(figure: Figure, triangle: Any) -> Any:
    """The methods: paths in the triangle, distances against the step, and a table of their ends."""
    table = figure.add_axes((0.5, 0.665, 0.5, 0.325), xlim=(0, 1), ylim=(-6.7, 0.7))
    table.axis("off")
    curves = figure.add_axes((0.585, 0.125, 0.4, 0.5), yscale="log")
    curves.spines[["top", "right"]].set_visible(False)
    curves.set(ylim=(0.7 * LEAST_DISTANCE, MOST_DISTANCE), xlim=(0, 1), xlabel="step")
    curves.set_ylabel("KL to the optimum (nats)")
    curves.tick_params(labelsize=8)
    now = curves.axvline(0, color=OPTIMUM, linewidth=0.8)
    heads = [_cell(table, x, 0, OPTIMUM) for x in COLUMNS]

    # the artists of each method
    rows = {}
    for k, (method, (color, stroke)) in enumerate(LOOKS.items(), 1):
        look = {"color": color, "linestyle": stroke, "linewidth": 1.8}
        table.plot([0, 0.07], [-k, -k], **look)
        _cell(table, 0.09, -k).set_text(method)
        rows[method] = {
            "path": triangle.plot([], [], zorder=4, **look)[0],
            "ends": triangle.plot([], [], "o", color=color, markersize=3.5, zorder=5)[0],
            "median": curves.plot([], [], **look)[0],
            "band": curves.fill_between([0, 1], 1, 1, color=color, alpha=0.18, linewidth=0),
            "end": _cell(table, COLUMNS[1], -k),
            "range": _cell(table, COLUMNS[2], -k),
        }

    def update(state: Mapping[str, Any]) -> None:
        race, step = state["race"] or {}, state["step"]
        now.set_xdata([step, step])
        for head, text in zip(heads, _heads(race)):
            head.set_text(text)
        for method, artists in rows.items():
            for artist in artists.values():
                artist.set_visible(method in race)
            if method in race:
                curves.set_xlim(0, len(race[method]["paths"]) - 1)
                _show_method(artists, race[method], step)

    moving = [row[name] for row in rows.values() for name in ("path", "ends", "median")]
    return [now, *moving], update


def _cell(table: Any, x: float, y: float, color: str = "black") -> Any:
    """An empty cell of the table."""
    return table.text(x, y, "", fontsize=8.2, va="center", color=color)


def _heads(race: Mapping[str, Any]) -> tuple[str, str, str]:
    """The heads of the table: what its numbers are of."""
    if not race:
        return "the paths follow once you let go", "", ""
    steps, seeds, _ = next(iter(race.values()))["paths"].shape
    return "KL to the optimum (nats)", f"step {steps - 1}", f"10% to 90% of {seeds} seeds"


def _show_method(artists: Mapping[str, Any], ways: Mapping[str, np.ndarray], step: int) -> None:
    """One method up to a step: the path of its first seed, where every seed is, and the band."""
    places = place_of(ways["paths"])
    artists["path"].set_data(*places[: step + 1, 0].T)
    artists["ends"].set_data(*places[step].T)

    # distances of every seed, and those of the last step in words
    low, middle, high = ways["band"].clip(LEAST_DISTANCE, None)
    steps = np.arange(len(middle))
    around = np.concatenate([np.stack([steps, low], 1), np.stack([steps, high], 1)[::-1]])
    artists["band"].set_verts([around])
    artists["median"].set_data(steps[: step + 1], middle[: step + 1])
    ends = ways["band"][:, -1]
    artists["end"].set_text(nats(ends[1]))
    artists["range"].set_text(f"{nats(ends[0])} to {nats(ends[2])}")
