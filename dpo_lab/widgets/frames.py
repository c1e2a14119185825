"""An explorer on a page without a kernel: a frame per value of its first slider, as static HTML."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
from PIL import Image

from dpo_lab.engine.escaping import for_html

# a frame takes up to 9 KB, and a page of two explorers at most 1.5 MB
MAX_FRAMES = 81

# what a moved slider does: it shows its own frame alone, and says the value of that frame
ON_INPUT = (
    "const frames = this.closest('.dpo-lab-frames').querySelectorAll('.dpo-lab-frame');"
    " frames.forEach((frame, i) => { frame.hidden = i != this.value; });"
    " const value = frames[this.value].dataset.value;"
    " this.parentElement.querySelector('output').textContent = value;"
    " this.setAttribute('aria-valuetext', value);"
)


def frames_html(explorer: Any, values: Sequence[Any] | None = None) -> str:
    """HTML in which the explorer's first slider moves: picture, readout and samples of each value.

    The HTML needs no kernel, no other file and no network. The other sliders keep their values.

    Args:
        explorer: an `Explorer` of `dpo_lab.widgets`.
        values: of the first slider, in the order of the range; by default `slider_values`.

    Raises:
        ValueError: there are no values.
    """
    now = {name: slider.value for name, slider in explorer.sliders.items()}
    name, slider = next(iter(explorer.sliders.items()))
    values = slider_values(slider) if values is None else list(values)
    if not values:
        raise ValueError("values is empty; give at least one value of the first slider")
    start = _nearest(values, now[name])

    # draw a frame per value, then put the explorer back
    frames = []
    for i, value in enumerate(values):
        readout = explorer.show(**{**now, name: value})
        frames.append(_frame(explorer, readout, _label(slider, value), hidden=i != start))
    explorer.show(**now)

    # say which slider moves where the explorer has several
    description = slider.description
    if not slider.description_allow_html:
        description = for_html(description)
    caption = f"<p>{_texts(explorer)[-1]}</p>"
    if len(now) > 1:
        caption += (
            f"<p>On this page, only the slider <em>{description}</em> moves;"
            f" in JupyterLab, all {len(now)} do.</p>"
        )

    label = _label(slider, values[start])
    return (
        f'<div class="dpo-lab-frames">\n<label>{description} '
        f'<input type="range" min="0" max="{len(values) - 1}" value="{start}" autocomplete="off"'
        f' aria-valuetext="{html.escape(label)}" oninput="{ON_INPUT}"'
        ' style="width: 420px; max-width: 60%; vertical-align: middle">'
        f" <output>{for_html(label)}</output></label>\n{''.join(frames)}{caption}\n</div>"
    )


def slider_values(slider: widgets.Widget) -> list[Any]:
    """At most 81 values of a slider in its order, evenly spread, its present value among them."""
    # every value that the slider can take
    if hasattr(slider, "options"):
        values = [value for _, value in slider.options]
    else:
        count = round((slider.max - slider.min) / slider.step) + 1
        values = [slider.min + k * slider.step for k in range(count)]
        if isinstance(slider, widgets.FloatLogSlider):
            values = [slider.base**exponent for exponent in values]

    # the present value and every n-th on both sides of it
    now = _nearest(values, slider.value)
    values[now] = slider.value
    every = -(-len(values) // MAX_FRAMES)
    return values[now % every :: every]


def _nearest(values: Sequence[Any], value: Any) -> int:
    """Index of `value` itself, or else of the number nearest to it."""
    if value in values:
        return list(values).index(value)
    return min(range(len(values)), key=lambda i: abs(values[i] - value))


def _label(slider: widgets.Widget, value: Any) -> str:
    """The value as the slider writes it."""
    if hasattr(slider, "options"):
        return next(label for label, option in slider.options if option == value)
    return format(value, slider.readout_format)


def _texts(explorer: Any) -> list[str]:
    """HTML of the texts below the picture: samples, if any, and last the caption."""
    return [child.value for child in explorer.box.children if isinstance(child, widgets.HTML)]


def _frame(explorer: Any, readout: str, label: str, hidden: bool) -> str:
    """The block of one value: readout, picture and samples as `show` left them."""
    return (
        f'<div class="dpo-lab-frame" data-value="{html.escape(label)}"{" hidden" * hidden}>'
        f"<p>{for_html(readout)}</p>"
        f'<img src="data:image/webp;base64,{_webp(explorer.picture.png())}" decoding="sync"'
        f' alt="{html.escape(readout)}" style="max-width: 100%">'
        f"{''.join(_texts(explorer)[:-1])}</div>\n"
    )


def _webp(png: bytes) -> str:
    """The picture without loss at two thirds of its size, in base64."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "webp", lossless=True, method=4)
    return base64.b64encode(out.getvalue()).decode()
