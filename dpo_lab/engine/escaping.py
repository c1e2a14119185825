"""Text from data and models in a figure, in HTML and in Markdown: nothing in it is markup."""

import html
import re

# where str.splitlines splits
LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


def for_figure(text: str) -> str:
    """`text` as a label in matplotlib.

    A dollar begins no formula, and a leading underscore does not hide the label from the legend.
    """
    escaped = str(text).replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def for_html(text: str) -> str:
    """`text` between HTML tags; every dollar and backslash in a <span>, so MathJax sees none."""
    return re.sub(
        r"[$\\]",
        lambda found: f"<span>&#{ord(found[0])};</span>",
        html.escape(str(text), quote=False),
    )


def for_markdown(text: str) -> str:
    """`text` as a cell of a Markdown table: on one line, its line breaks as <br>."""
    lines = map(for_html, LINE_BREAK.split(str(text)))
    return "<br>".join(
        re.sub(r"[`*_~|\[\]]", lambda found: f"&#{ord(found[0])};", line) for line in lines
    )
