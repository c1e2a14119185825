"""The landscape explorer: where the pointer is, there the policy is; all that is drawn is right."""

import asyncio
import base64
import io

import numpy as np
import pytest
import torch
from ipywidgets import Button, Play
from PIL import Image

from dpo_lab.theory.landscape import METHODS, Landscape, method_paths
from dpo_lab.theory.objective import kl, objective_value, optimal_policy
from dpo_lab.widgets import landscape as explorers
from dpo_lab.widgets.frames import frames_html
from dpo_lab.widgets.landscape import Drag, landscape_explorer, logits_of, policy_of
from dpo_lab.widgets.triangle import (
    BANDS,
    BASE,
    CORNER,
    CORNERS,
    LOOKS,
    landscape_figure,
    landscape_state,
    nats,
    place_in,
    place_of,
    policies_of_pixels,
    policy_at,
    race_state,
    shades,
)

REFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
NOW = {"beta": 1.0, "budget": 64, "logit_1": 1.6, "logit_2": -0.4, "step": 4}


@pytest.fixture(scope="module")
def small():
    return landscape_explorer(steps=4, seeds=3)


def parts(explorer):
    """Image, readout, pointer and buttons of the box."""
    found = {"buttons": {}}
    for child in explorer.box.children:
        for one in (child, *getattr(child, "children", ())):
            if isinstance(one, Button):
                found["buttons"][one.description] = one
            found[type(one).__name__] = one
    return found


def grid(slider):
    if hasattr(slider, "options"):
        return [value for _, value in slider.options]
    if isinstance(slider.value, int):
        return list(range(slider.min, slider.max + 1))
    steps = np.arange(slider.min, slider.max + slider.step / 2, slider.step)
    return [float(slider.base**s if hasattr(slider, "base") else s) for s in steps]


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.picture.png())).convert("RGB")).astype(int)


def test_a_policy_and_its_place_are_each_other():
    assert place_of(torch.eye(3)).tolist() == CORNERS.tolist()
    for policy in torch.softmax(torch.tensor([[0, 1, 2], [3, 0, 1], [0, 0, 0.5]]).double(), -1):
        torch.testing.assert_close(policy_at(*place_of(policy)), policy)


@pytest.mark.parametrize("place", [(-1, -1), (2, 0.5), (0.5, 3), (0, 0), (1, 0), (0.3, -0.2)])
def test_outside_the_triangle_the_policy_is_one_inside(place):
    policy = policy_at(*place)
    assert policy.min() > 0.004 and float(policy.sum()) == pytest.approx(1)
    nearest = np.linalg.norm(CORNERS - place, axis=1).argmin()
    assert policy.argmax() == nearest


def test_a_pixel_s_policy_is_the_policy_at_its_center():
    inside, policies = policies_of_pixels(30)
    assert inside.shape == (26, 30) and 0.48 < inside.mean() < 0.52
    rows, columns = np.nonzero(inside)
    places = np.stack([(columns + 0.5) / 30, (rows + 0.5) / 26 * CORNERS[2, 1]], 1)
    assert np.abs(place_of(policies) - places).max() < 1e-12
    assert (policies > 0).all() and np.abs(policies.sum(1) - 1).max() < 1e-12


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_hill_is_the_objective_at_every_pixel(beta):
    """Darker exactly where J is higher, by a loop over policies; darkest at the optimum."""
    landscape = Landscape(REFERENCE, REWARD, beta)
    policies = policies_of_pixels(40)[1]
    loop = [
        float(sum(p * r for p, r in zip(pi, REWARD)))
        - beta * float(sum(p * torch.log(p / q) for p, q in zip(pi, REFERENCE)))
        for pi in policies
    ]
    colors = shades(landscape.height(policies).numpy())[:, 0].astype(int)
    low, high = min(loop), max(loop)
    bands = [min(int((j - low) / (high - low) * BANDS), BANDS - 1) for j in loop]
    by_band = [set(colors[np.array(bands) == band]) for band in sorted(set(bands))]
    assert all(len(one) == 1 for one in by_band)
    assert [one.pop() for one in by_band] == sorted(set(colors), reverse=True)
    assert bands[int(kl(policies, landscape.optimum.expand_as(policies)).argmin())] == BANDS - 1


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_state_of_a_policy_is_that_of_the_objective(beta):
    landscape, policy = Landscape(REFERENCE, REWARD, beta), policy_of(0.3, -1.2)
    state, best = landscape_state(landscape, policy), optimal_policy(REFERENCE, REWARD, beta)
    assert torch.equal(state["optimum"], best)
    assert state["height"] == float(objective_value(policy, REFERENCE, REWARD, beta))
    assert state["highest"] == float(objective_value(best, REFERENCE, REWARD, beta))
    assert state["kl"] == float(kl(policy, REFERENCE))
    assert state["distance"] == pytest.approx((state["highest"] - state["height"]) / beta)


def test_a_race_is_every_method_with_one_budget_and_its_band_holds_its_seeds():
    landscape, start = Landscape(REFERENCE, REWARD, 1.0), policy_of(1.0, 0.0)
    race = race_state(landscape, start, 80, steps=5, seeds=4)
    assert list(race) == list(METHODS) == list(LOOKS)
    for method, ways in race.items():
        paths = method_paths(method, landscape, start, labels=80, samples=16, steps=5, seeds=4)
        assert np.array_equal(ways["paths"], paths.numpy())
        assert np.array_equal(ways["distances"], landscape.distance(paths).numpy())
        low, middle, high = ways["band"]
        assert (ways["distances"].min(1) <= low + 1e-15).all() and (low <= middle).all()
        assert (middle <= high).all() and (high <= ways["distances"].max(1) + 1e-15).all()


def test_no_two_methods_look_the_same_even_without_color():
    assert len(set(LOOKS.values())) == len(METHODS)
    light = {m: sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for m, (c, _) in LOOKS.items()}
    for one in METHODS:
        for other in METHODS:
            if one != other and LOOKS[one][1] == LOOKS[other][1]:
                assert abs(light[one] - light[other]) > 60


def test_the_table_says_the_ends_and_the_artists_stand_at_the_step():
    landscape, start = Landscape(REFERENCE, REWARD, 1.0), policy_of(1.0, 0.0)
    race = race_state(landscape, start, 80, steps=5, seeds=4)
    blitted = landscape_figure(landscape, REFERENCE[None], ["a", "b", "c"])
    state = {**landscape_state(landscape, start), "landscape": landscape}
    blitted.update({**state, "step": 3, "race": race})
    says = [text.get_text() for axes in blitted.figure.axes for text in axes.texts]
    assert "step 5" in says and "10% to 90% of 4 seeds" in says
    for method in METHODS:
        low, middle, high = race[method]["band"][:, -1]
        assert nats(middle) in says and f"{nats(low)} to {nats(high)}" in says
    moving = blitted.artists[-3 * len(METHODS) :]
    for k, method in enumerate(METHODS):
        path, ends, median = moving[3 * k : 3 * k + 3]
        assert np.array_equal(path.get_xydata(), place_of(race[method]["paths"][:4, 0]))
        assert np.array_equal(ends.get_xydata(), place_of(race[method]["paths"][3]))
        assert np.array_equal(median.get_ydata(), race[method]["band"][1, :4].clip(1e-6))

    # without paths nothing of them is left
    blitted.update({**state, "step": 3, "race": None})
    assert not any(artist.get_visible() for artist in moving)
    says = [text.get_text() for text in blitted.figure.axes[1].texts if text.get_visible()]
    assert says == ["the paths follow once you let go", "", "", *METHODS]


def test_distances_are_said_in_two_digits():
    assert [nats(v) for v in (0.0, 9e-7, 0.00213, 2.66)] == ["< 1e-06", "< 1e-06", "0.0021", "2.7"]


def test_every_value_of_every_slider_is_shown(monkeypatch):
    """The hill and the policy: the paths are tested where they are computed and drawn."""
    monkeypatch.setattr(explorers, "race_state", lambda *_, **__: {})
    explorer = landscape_explorer(steps=4, seeds=2)
    for name, slider in explorer.sliders.items():
        for value in grid(slider):
            readout = explorer.show(**{**NOW, name: value})
            assert readout.startswith("J ") and "nan" not in readout and "inf" not in readout


def test_the_paths_of_every_beta_and_budget_are_drawn(small):
    for name in ("beta", "budget"):
        for value in grid(small.sliders[name])[::7]:
            small.show(**{**NOW, name: value})
            assert small.picture.png().startswith(b"\x89PNG")


def test_the_readout_is_the_state_in_words(small):
    state = landscape_state(Landscape(REFERENCE, REWARD, 1.0), policy_of(1.6, -0.4))
    assert small.show(**NOW) == (
        f"J {state['height']:.3f} of at most {state['highest']:.3f}; KL to the reference "
        f"{state['kl']:.3f} nats, to the optimum {state['distance']:.3f} nats"
    )


@pytest.mark.parametrize("place", [(0.5, 0.3), (0.2, 0.1), (0.45, 0.7)])
def test_the_policy_stands_under_the_pointer(small, place):
    """From the fractions that the page sends to the marker in the picture, within a pixel."""
    x, y = CORNER + BASE * np.array(place)
    found = parts(small)
    before = found["Label"].value, found["Image"].value
    found["Drag"].place = [x / 756, 1 - y / 378]
    point = small.picture.artists[5].get_xydata()[0]
    assert np.abs(point - place).max() * BASE < 3
    policy = policy_of(small.sliders["logit_1"].value, small.sliders["logit_2"].value)
    assert np.array_equal(place_of(policy), point)
    assert found["Label"].value != before[0] and found["Image"].value != before[1]
    assert found["Image"].value == small.picture.png()
    assert place_in(small.picture.canvas.figure, x / 756, 1 - y / 378) == pytest.approx(place)


@pytest.mark.parametrize("logits", [(1.6, -0.4), (-6.0, 6.0), (0.02, 0.0)])
def test_the_sliders_hold_the_logits_of_a_dragged_policy(logits):
    assert logits_of(policy_of(*logits)) == logits


def test_a_drag_shows_the_hill_at_once_and_the_paths_once_it_rests(monkeypatch):
    """As in a kernel: in a running loop."""
    monkeypatch.setattr(explorers, "REST", 0.02)
    explorer = landscape_explorer(steps=4, seeds=2)
    found, paths = parts(explorer), explorer.picture.artists[7]

    async def drag():
        for x in (0.2, 0.25, 0.3):
            found["Drag"].place = [x, 0.6]
            assert not paths.get_visible()
        await asyncio.sleep(0.02)
        for _ in range(200):
            if paths.get_visible():
                break
            await asyncio.sleep(0.02)
        assert found["Image"].value == explorer.picture.png()

    asyncio.run(drag())
    assert paths.get_visible()
    now = {name: slider.value for name, slider in explorer.sliders.items()}
    assert found["Label"].value == explorer.show(**now)
    assert found["Image"].value == explorer.picture.png()


def test_the_buttons_go_one_step_and_put_all_back(small):
    found, step = parts(small), small.sliders["step"]
    found["buttons"]["reset"].click()
    start = found["Label"].value, found["Image"].value
    for expected in (0, 1, 2):
        found["buttons"]["one step"].click()
        assert step.value == expected
    small.sliders["beta"].value = 0.5
    assert (found["Label"].value, found["Image"].value) != start
    found["buttons"]["reset"].click()
    assert (found["Label"].value, found["Image"].value) == start
    assert isinstance(found["Play"], Play) and found["Play"].max == step.max


def test_a_picture_over_its_background_is_the_picture_drawn_anew(small):
    """After a drag, and after the paths have come: the background follows."""
    small.show(**{**NOW, "beta": 0.4, "step": 2})
    shown = pixels(small)
    for artist in small.picture.artists:
        artist.set_animated(False)
    small.picture.canvas.draw()
    whole = np.asarray(small.picture.canvas.buffer_rgba())[..., :3].astype(int)
    for artist in small.picture.artists:
        artist.set_animated(True)
    assert (np.abs(shown - whole).max(-1) > 60).mean() < 0.002


def test_your_own_completions_can_be_explored_and_others_are_refused():
    own = landscape_explorer([0.2, 0.3, 0.5], [1.0, 0.0, 0.0], ["x", "y", "z"], steps=2, seeds=2)
    assert own.sliders["logit_2"].description == "logit of z"
    with pytest.raises(ValueError, match="of three completions, each with a positive"):
        landscape_explorer([0.5, 0.5], [1.0, 0.0], ["x", "y"])
    with pytest.raises(ValueError, match="of three completions, each with a positive"):
        landscape_explorer([0.5, 0.5, 0.0], [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="at least two completions must differ"):
        landscape_explorer(reward=[1.0, 1.0, 1.0])


def test_a_page_without_a_kernel_has_the_picture_and_beta_in_frames(small):
    shown = small._repr_mimebundle_()
    assert base64.b64decode(shown["image/png"]) == small.picture.png()
    html = frames_html(small, [0.5, 1.0, 2.0])
    assert html.count("<img") == 3 and "only the slider <em>beta</em> moves" in html


def test_the_script_of_the_page_needs_no_other():
    code = str(Drag._esm)
    assert "import" not in code and "http" not in code and 'model.set("place"' in code
