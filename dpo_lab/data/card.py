"""A data card for preferences: what they are, who made them and how, in Markdown.

The questions are those of "Datasheets for Datasets" (Gebru et al. 2018) that apply to preferences.
What nobody recorded is said to be "not recorded".
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_lab.data.agreement import (
    Agreement,
    position_bias,
    rater_agreement,
    seconds_per_item,
)
from dpo_lab.data.make import MadePreferences
from dpo_lab.data.ratings import Rating, RatingStore
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.escaping import for_markdown
from dpo_lab.engine.runs import provenance
from dpo_lab.preferences import Preferences

UNKNOWN = "not recorded"

QUESTIONS = {
    "purpose": "For what purpose was it made?",
    "creators": "Who made it, and who paid for it?",
    "prompts": "Where do the prompts come from?",
    "raters": "Who rated, how were they found and paid, and did they consent?",
    "sensitive": "Does it hold personal, offensive or confidential data?",
    "uses": "For what should it be used, and for what not?",
    "distribution": "How is it distributed, and who maintains it?",
}
"""what only its makers can say, by the name under which `data_card` takes their answer"""


@checked
def data_card(
    title: str,
    made: MadePreferences | Preferences,
    *,
    license: str,
    store: RatingStore | None = None,
    items: Iterable[Any] | None = None,
    says: Mapping[str, str] | None = None,
) -> str:
    """A datasheet in Markdown, with what is recorded filled in.

    Args:
        title: name of the data set.
        made: the preferences, best with the origins that `make_preferences` keeps.
        license: under which it may be used, such as "CC BY 4.0"; "none: not for use" is an answer.
        store: the ratings, where people rated.
        items: those that were rated, for the agreement; needed with `store`.
        says: your answers to questions of `QUESTIONS`, by name.

    Raises:
        ValueError, TypeError: no license, a store without items, or an answer to an unknown
            question.
    """
    says = _checked(title, license, store, items, says)
    preferences = made.preferences if isinstance(made, MadePreferences) else made
    sections = {
        "Motivation": _answers(says, "purpose", "creators"),
        "Composition": _composition(preferences) + _answers(says, "sensitive"),
        "Collection of prompts and answers": _answers(says, "prompts") + _origins(made),
        "Labels": _labels(made) + _answers(says, "raters"),
    }
    if store is not None:
        listed = list(items or ())
        sections["Ratings by people"] = _ratings(store, listed)
        sections["Agreement"] = _agreement(rater_agreement(store, listed))
        sections["Guidelines"] = _guidelines(store)
    sections["Uses"] = _answers(says, "uses")
    sections["Distribution"] = [
        f"- **License:** {for_markdown(license)}",
        *_answers(says, "distribution"),
    ]
    found = provenance()
    sections["Provenance of this card"] = [
        f"- **{name}:** {for_markdown(value) or UNKNOWN}" for name, value in found.items()
    ]

    parts = [f"# Data card: {for_markdown(title)}"]
    parts += [f"## {name}\n\n" + "\n".join(lines) for name, lines in sections.items()]
    parts.append('Questions after "Datasheets for Datasets" (Gebru et al. 2018).')
    return "\n\n".join(parts) + "\n"


def _answers(says: Mapping[str, str], *names: str) -> list[str]:
    """What the makers say to these questions."""
    return [f"- **{QUESTIONS[name]}** {for_markdown(says.get(name) or UNKNOWN)}" for name in names]


def _composition(preferences: Preferences) -> list[str]:
    """Sizes."""
    used = np.union1d(preferences.chosen, preferences.rejected)
    lengths = np.array([len(preferences.completions[i]) for i in used])
    prompts = len(set(preferences.prompt_of[used].tolist()))
    return [
        f"- **Pairs:** {len(preferences.chosen):,}",
        f"- **Prompts with a pair:** {prompts:,} of {len(preferences.prompts):,}",
        f"- **Answers in a pair:** {len(used):,} of {len(preferences.completions):,}",
        f"- **Tokens per answer:** median {np.median(lengths):g}, at most {lengths.max()}",
        f"- **What became of the rest:** {preferences.report}",
    ]


def _origins(made: MadePreferences | Preferences) -> list[str]:
    """A table of the models and temperatures, and how often the answers of each were chosen."""
    if not isinstance(made, MadePreferences):
        return [f"- **Where do the answers come from?** {UNKNOWN}"]
    answers, compared, won = Counter(), Counter(), Counter()
    for place, origins in enumerate(made.origins):
        for key in dict.fromkeys((one.model, one.temperature) for one in origins):
            answers[key] += 1
            won[key] += int((made.preferences.chosen == place).sum())
            compared[key] += int((made.preferences.rejected == place).sum())
    rows = [
        f"| {for_markdown(model)} | {temperature:g} | {answers[model, temperature]} | "
        f"{won[model, temperature]} of {(won + compared)[model, temperature]} |"
        for model, temperature in answers
    ]
    config = made.config
    return [
        f"- **Drawn:** {config.k} answers of each model at each temperature, of at most "
        f"{config.max_new_tokens} tokens, seed {config.seed}",
        f"- **Duplicated answers, kept once:** {made.duplicated}",
        "",
        "| model | temperature | different answers | chosen |",
        "|---|---|---|---|",
        *rows,
    ]


def _labels(made: MadePreferences | Preferences) -> list[str]:
    """Who judged, and what has no label."""
    if not isinstance(made, MadePreferences):
        return [f"- **Judge:** {UNKNOWN}", f"- **Ties:** {made.report.ties}"]
    lost = ", ".join(f"{name} {n}" for name, n in made.missing.items()) or "none"
    return [
        f"- **Judge:** {for_markdown(made.judge)}",
        f"- **Pairs judged:** {made.pairs}",
        f"- **Ties, dropped:** {made.ties}",
        f"- **Without a verdict, dropped:** {lost}",
    ]


def _ratings(store: RatingStore, items: Sequence[Any]) -> list[str]:
    """Raters, their passes, position bias and time."""
    rows = [
        "| rater | pass | ratings | ties | left chosen | median seconds |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Rating]] = {}
    for rating in store.ratings():
        groups.setdefault(rating.who, []).append(rating)
    for (rater, number), ratings in groups.items():
        bias, seconds = position_bias(ratings), seconds_per_item(ratings)
        left = f"{bias.left}" if bias.left.n else "no pairs"
        rows.append(
            f"| {for_markdown(rater)} | {number} | {len(ratings)} | {bias.ties} | {left} | "
            f"{seconds if seconds.n else UNKNOWN} |"
        )
    bias, dates = position_bias(store.ratings()), sorted(r.time for r in store.ratings() if r.time)
    when = f"{dates[0]} to {dates[-1]}" if dates else UNKNOWN
    return [
        f"- **Items given to raters:** {len(items)}",
        f"- **When:** {when}",
        f"- **Left answer chosen, all raters:** {bias.left}; without a bias one half, p = "
        f"{bias.p_value:.2g}",
        f"- **Damaged lines of the file, skipped:** {len(store.damaged)}",
        "",
        *rows,
    ]


def _agreement(found: Agreement) -> list[str]:
    """Agreement between raters and within them, with 95 % intervals over items."""
    lines = []
    if len(found.raters) > 1:
        lines += [f"- **Raw agreement:** {found.raw}", f"- **Fleiss' kappa:** {found.fleiss}"]
        lines += [f"- **Krippendorff's alpha:** {found.alpha}"]
        lines += [
            f"- **Cohen's kappa, {for_markdown(one)} and {for_markdown(other)}:** {kappa}"
            for (one, other), kappa in found.cohen.items()
        ]
    else:
        lines.append(f"- **Between raters:** {UNKNOWN}; there is one rater")
    for rater in found.raters:
        raw, kappa = found.with_themselves.get(rater, (UNKNOWN, UNKNOWN))
        said = f"raw {raw}, Cohen's kappa {kappa}" if raw != UNKNOWN else UNKNOWN
        lines.append(f"- **{for_markdown(rater)} in two passes:** {said}")
    return [*lines, "", "Intervals are of 95 %, over resampled items; a tie is a label."]


def _guidelines(store: RatingStore) -> list[str]:
    """Every version of the guidelines, and how many ratings were given under it."""
    used = Counter(rating.guidelines for rating in store.ratings())
    lines = [
        f"- **Version {number} ({name}), {used[name]} ratings:** {for_markdown(text)}"
        for number, (name, text) in enumerate(store.guidelines.items(), 1)
    ]
    if used[None] or not lines:
        lines.append(f"- **Without guidelines, {used[None]} ratings:** {UNKNOWN}")
    return lines


def _checked(
    title: Any, license: Any, store: Any, items: Any, says: Mapping[str, str] | None
) -> Mapping[str, str]:
    """The makers' answers, and all arguments checked."""
    for name, text in (("title", title), ("license", license)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} is {text!r}; it must be a text that is not blank")
    if store is not None and items is None:
        raise ValueError("items is None; with a store, give the items that were rated")
    for name, text in (says or {}).items():
        if name not in QUESTIONS:
            raise ValueError(f"says has {name!r}; it can have {', '.join(QUESTIONS)}")
        if not isinstance(text, str):
            raise TypeError(f"says[{name!r}] is {text!r}; it must be a text")
    return says or {}
