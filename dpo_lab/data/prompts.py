"""Prompts from a list, a file, rows of a data set, or a template."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any


def template_prompts(template: str, **values: Sequence[str]) -> list[str]:
    """A prompt for each combination of values: `template_prompts("The {what} is", what=[...])`.

    Raises:
        ValueError: a name in the template has no values, or a list is empty.
    """
    for name, some in values.items():
        if isinstance(some, str) or not len(some):
            raise ValueError(f"{name} is {some!r}; it must be a list of at least one text")
    rows = [dict(zip(values, row)) for row in product(*values.values())]
    try:
        return list(dict.fromkeys(template.format(**row) for row in rows))
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"template is {template!r} and has no values for {error}; it has {list(values)}"
        ) from error


def read_prompts(source: Any, column: str = "prompt") -> list[Any]:
    """Prompts as a list of different ones, from a list, a file, or rows such as a data set's.

    Args:
        source: texts or lists of token ids; rows with a `column`, such as a `datasets.Dataset`; or
            the path of a file: .jsonl with rows, .json with a list, else one prompt per line.
        column: of the rows.

    Raises:
        ValueError, TypeError: there is no prompt, or one is something else.
    """
    if isinstance(source, Path) or (isinstance(source, str) and Path(source).is_file()):
        source = _read_file(Path(source))
    if isinstance(source, (str, Mapping)) or not isinstance(source, Iterable):
        raise TypeError(
            f"prompts is {source!r:.200} ({type(source).__name__}); give a list of texts, the path "
            f"of a file that is there, or rows with a column {column!r}"
        )
    found = []
    for i, row in enumerate(source):
        if isinstance(row, Mapping):
            if column not in row:
                raise ValueError(f"prompts[{i}] has no column {column!r}; it has {list(row)}")
            row = row[column]
        text = isinstance(row, str) and row.strip()
        if not text and (isinstance(row, str) or not hasattr(row, "__len__")):
            raise ValueError(f"prompts[{i}] is {row!r}; it must be a text, or token ids")
        found.append(row if isinstance(row, str) else tuple(row))
    if not found:
        raise ValueError("prompts is empty; give at least one")
    return list(dict.fromkeys(found))


def _read_file(path: Path) -> list[Any]:
    """The rows or lines of a file."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    return [line for line in text.splitlines() if line.strip()]
