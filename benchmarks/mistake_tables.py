"""The tables of docs/mistakes.md, from what `benchmarks/mistakes.py` measured."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_lab.checks import mistakes

RESULTS = Path(__file__).parent / "results" / "mistakes.json"

# beyond this a number grows without an end
ENDLESS = 1000

UNMEASURED = "Not measured yet: `python benchmarks/mistakes.py --part model` fills this in."

TRAINED = {
    "reward": ("reward", 2),
    "kl": ("KL to the reference", 1),
    "chosen": ("log-ratio of chosen", 1),
    "rejected": ("of rejected", 1),
}


def results() -> dict[str, Any]:
    """What was measured."""
    return json.loads(RESULTS.read_text())


def driven(exercise: str) -> str:
    """What an exercise's function drives with each mistake, the right one first, then the worst."""
    rows = results()["exact"]["exercises"][exercise]["rows"]
    columns = list(rows[0]["numbers"])
    lines = []
    for row in [rows[0], *sorted(rows[1:], key=_badness, reverse=True)]:
        numbers = [_shown(row["numbers"].get(column)) for column in columns]
        if "unusable" in row:
            numbers = ["stops: " + row["unusable"], *[""] * (len(columns) - 1)]
        says, source = _in_words(exercise, row["settings"])
        lines.append((_name(row, rows), says, *numbers, source))
    return _table(("mistake", "what the numbers show", *columns, "seen in"), lines)


def trained(exercise: str) -> str:
    """What the language model becomes with each mistake, over the seeds."""
    rows = results()["model"]["exercises"].get(exercise)
    if rows is None:
        return UNMEASURED
    keys = [key for key in TRAINED if any(key in row for row in rows)]
    lines = []
    for row in [rows[0], *sorted(rows[1:], key=_far_from(rows[0]), reverse=True)]:
        numbers = [_over_seeds(row.get(key), TRAINED[key][1]) for key in keys]
        if "error" in row:
            numbers = ["NaN at the first step", *[""] * (len(keys) - 1)]
        lines.append((_name(row, rows), *numbers, len(row["seeds"])))
    return _table(("mistake", *(TRAINED[key][0] for key in keys), "seeds"), lines)


def specimen(source: str) -> str:
    """A link to where a mistake was seen in public: an address, and words in parentheses."""
    if not source:
        return ""
    address, _, words = source.partition(" ")
    short = re.sub(r"^https?://(github\.com/|arxiv\.org/abs/)?", "", address)
    short = short.replace("/issues/", "#").replace("/pull/", "#")
    return f"[{short}]({address})" + (f", {words.strip('()')}" if words else "")


def _badness(row: dict[str, Any]) -> float:
    """The first number; what stops or is NaN comes last, for it shows itself."""
    first = next(iter(row["numbers"].values()), None)
    return -1.0 if first is None else first


def _far_from(right: dict[str, Any]) -> Any:
    """How far the KL of a row is from that of the right one; what stops comes last."""

    def far(row: dict[str, Any]) -> float:
        values = [value for value in row.get("kl", []) if value is not None]
        if not values:
            return -1.0
        return abs(statistics.fmean(values) - statistics.fmean(right["kl"]))

    return far


def _name(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A mistake's name, with its setting where two have one name."""
    twice = Counter(other["name"] for other in rows)[row["name"]] > 1
    return f"{row['name']} ({', '.join(row['settings'].values())})" if twice else row["name"]


def _in_words(exercise: str, settings: dict[str, str]) -> tuple[str, str]:
    if not settings:
        return "", ""
    ((switch, setting),) = settings.items()
    slip = mistakes()[exercise][switch][setting]
    return slip.says.replace("|", "\\|"), specimen(slip.source)


def _shown(value: float | None) -> str:
    if value is None:
        return "NaN"
    if abs(value) >= ENDLESS:
        return "no end"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _over_seeds(values: list[float | None] | None, digits: int) -> str:
    """The mean, and its standard error over seeds."""
    if not values or None in values:
        return "not one number"
    if max(map(abs, values)) >= ENDLESS:
        return "no end"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (tuple(header), *rows)]
    rule = "|" + "---|" * (lines[0].count(" | ") + 1)
    return "\n".join([lines[0], rule, *lines[1:]])
