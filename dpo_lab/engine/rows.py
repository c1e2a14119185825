"""Rows of a preference data set: read as text, and written so that TRL reads the same tokens.

A row has TRL's columns `prompt`, `chosen` and `rejected`: three strings, or three lists of messages
(`role`, `content`), which the tokenizer's chat template renders.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE = {"prompt": "This movie", "chosen": " was a joy.", "rejected": " was a bore."}

# columns of TRL's that the chat template is given
OPTIONAL = ("tools", "chat_template_kwargs")

# columns of TRL's that no tokenizer reads
PICTURES = ("image", "images")

# a chat template that only joins the messages
JOINED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# roles that a completion cannot have
ASKING = ("user", "system", "developer")


class Row(NamedTuple):
    """A row as text."""

    prompt: str
    chosen: str
    rejected: str
    empty: str
    """the name of a completion that says nothing, or "" """
    chat: bool
    """rendered by a chat template, which writes BOS and EOS itself"""
    joined: bool
    """written by `trl_rows`: its tokens are those of prompt and completion in one piece"""


def read_row(where: str, row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Row:
    """A row as text, its messages rendered by the chat template.

    `where` names the row in errors.
    """
    values = {
        name: list(row[name]) if isinstance(row[name], (tuple, np.ndarray)) else row[name]
        for name in EXAMPLE
    }
    options = _template_options(where, row)

    # three strings
    if all(isinstance(value, str) for value in values.values()):
        if options:
            raise ValueError(
                f"{where} is plain text with {' and '.join(options)}, "
                "which a chat template alone reads; give messages"
            )
        empty = next((name for name in ("chosen", "rejected") if not values[name].strip()), "")
        return Row(**values, empty=empty, chat=False, joined=False)

    # three lists of messages
    _check_lists_of_messages(where, values)
    options = {"tools": options.get("tools"), **options.get("chat_template_kwargs", {})}
    if tokenizer.chat_template is None and not options.get("chat_template"):
        raise ValueError(
            f"{where} is conversational and the tokenizer has no chat template; "
            "set tokenizer.chat_template, or give strings"
        )
    _check_conversation(where, values)
    return _rendered_row(where, values, tokenizer, options)


def _rendered_row(
    where: str,
    values: Mapping[str, list[Any]],
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, Any],
) -> Row:
    """A conversational row as text: what the template adds for a completion is its text."""

    def rendered(messages: list[Mapping[str, Any]], **more: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **more, **options)
        # a template is a program, and can raise anything
        except Exception as error:
            raise ValueError(
                f"{where}: the chat template fails on its messages ({type(error).__name__}: "
                f"{error}): {messages}. Change the row (many templates take no system message, or "
                "want user and assistant in turn), or the template"
            ) from error

    joined = options.get("chat_template") == JOINED
    prompt, answers, empty = rendered(values["prompt"], add_generation_prompt=True), {}, ""
    for name in ("chosen", "rejected"):
        whole = rendered(values["prompt"] + values[name])
        if not whole.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template renders the prompt differently once it is answered, "
                "so it cannot be split off"
            )
        answers[name] = whole[len(prompt) :]
        if not any(_says_something(message, joined) for message in values[name]):
            empty = empty or name
    return Row(prompt, **answers, empty=empty, chat=True, joined=joined)


def trl_rows(texts: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Rows of messages for TRL's `DPOTrainer`, with a chat template that only joins them."""
    join = {"chat_template_kwargs": {"chat_template": JOINED}}
    roles = ("user", "assistant", "assistant")
    rows = [
        [[{"role": role, "content": part}] for role, part in zip(roles, parts)] for parts in texts
    ]
    return [dict(zip(EXAMPLE, row)) | join for row in rows]


def exact_texts(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]]
) -> list[str | None]:
    """The text of each row of ids, special tokens written out; None where it has other ids."""
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [text if ids == list(row) else None for text, ids, row in zip(texts, again, rows)]


def checked_rows(rows: Any) -> Iterable[Mapping[str, Any]]:
    """The rows one by one; raises ValueError unless each is a mapping."""
    kind, found = type(rows).__name__, None
    if isinstance(rows, Mapping):
        found = (
            f" with the keys {list(rows)}; "
            "pass a list of rows, or the rows of one split, as in rows['train']"
        )
        if all(name in rows for name in EXAMPLE):
            found = " that is one row; pass a list of rows, as in [row]"
        if all(isinstance(rows.get(name), list) and not _messages(rows[name]) for name in EXAMPLE):
            found = " of columns; pass datasets.Dataset.from_dict(rows)"
    elif isinstance(rows, (str, bytes, Path)):
        found = (
            " and no rows; read the file first, "
            "as in datasets.load_dataset('json', data_files=path)['train']"
        )
    elif hasattr(rows, "columns") and hasattr(rows, "shape"):
        found = "; pass a dataset made of it, as in datasets.Dataset.from_pandas(rows)"
    elif not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        found = f", {rows!r}, which holds no rows"
    if found:
        raise ValueError(f"rows is a {kind}{found}. Each row must be a mapping such as {EXAMPLE}")

    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {i} is a {type(row).__name__}, {row!r:.200}; "
                f"each row must be a mapping such as {EXAMPLE}"
            )
        yield row


def check_columns(where: str, row: Mapping[str, Any], unread: dict[str, None]) -> None:
    """Raise ValueError for columns that are missing, misspelled, or needed and not read.

    Other columns that are not read are added to `unread`.
    """
    missing = [name for name in EXAMPLE if name not in row]
    if missing:
        raise ValueError(_missing_columns(where, row, missing))
    for name in row:
        if name in PICTURES and row[name] is not None:
            raise ValueError(
                f"{where} has a column {name!r}; pictures are not read, "
                "and its completions would be scored without"
            )
        if name in EXAMPLE or name in OPTIONAL or name in unread:
            continue

        # a misspelled column of TRL's
        close = difflib.get_close_matches(str(name), OPTIONAL, n=1, cutoff=0.8)
        if close and close[0] not in row:
            raise ValueError(
                f"{where} has a column {name!r}, which looks like {close[0]!r} "
                "and would not be read; rename it"
            )
        unread[str(name)] = None


def _missing_columns(where: str, row: Mapping[str, Any], missing: Sequence[str]) -> str:
    """What is missing, and which columns look like it."""
    near = {name: difflib.get_close_matches(name, row, n=1) for name in missing}
    hints = [f"{found[0]!r} looks like {name!r}" for name, found in near.items() if found]
    if missing == ["prompt"] and not hints:
        hints = [
            "chosen and rejected may hold whole conversations: "
            "take what both begin with for the prompt"
        ]
    hint = f" ({'; '.join(hints)})" if hints else ""
    return (
        f"{where} has no column {', '.join(map(repr, missing))}{hint}: {dict(row)}. "
        f"Rename the columns as in this example: {EXAMPLE}"
    )


def _template_options(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns `tools` and `chat_template_kwargs` of a row, where they hold anything."""
    options = {name: row[name] for name in OPTIONAL if row.get(name) is not None}
    if isinstance(options.get("tools"), str):
        try:
            options["tools"] = json.loads(options["tools"])
        except ValueError as error:
            raise ValueError(
                f"{where}: tools is no JSON ({error}): {options['tools']!r}; "
                "give a list of tools, or JSON"
            ) from error
    for name, kind in (("tools", list), ("chat_template_kwargs", Mapping)):
        if name in options and not isinstance(options[name], kind):
            found = options[name]
            raise ValueError(
                f"{where}: {name} is {found!r} ({type(found).__name__}); "
                f"it must be a {kind.__name__.lower()}"
            )
    return {name: value for name, value in options.items() if value}


def _check_lists_of_messages(where: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError unless all three values are lists."""
    if all(isinstance(value, list) for value in values.values()):
        return
    found = ", ".join(f"{name}: {type(value).__name__}" for name, value in values.items())
    hint = ""
    if isinstance(values["prompt"], str) and _messages(values["chosen"]):
        hint = (
            ". Give the prompt as messages too, "
            "and in chosen and rejected the assistant's answer alone"
        )
    raise ValueError(
        f"{where} must hold three strings or three lists of messages; found {found}{hint}"
    )


def _check_conversation(where: str, values: Mapping[str, list[Any]]) -> None:
    """Raise unless the prompt is a conversation, and each completion the assistant's next turn."""
    for name, messages in values.items():
        if not messages or not all(map(_is_message, messages)):
            raise ValueError(
                f"{where}: {name} must hold messages with a 'role' and a text as 'content'; "
                f"found {messages}"
            )
    asked = [(message["role"], message.get("content")) for message in values["prompt"]]
    for name in ("chosen", "rejected"):
        said = [(message["role"], message.get("content")) for message in values[name]]
        if said[: len(asked)] == asked:
            raise ValueError(
                f"{where}: {name} holds the whole conversation, and begins with the messages of "
                "the prompt, which would be there twice; keep the answer alone, "
                f"as in row[{name!r}][{len(asked)}:]"
            )
        for k, (role, _) in enumerate(said):
            if role in ASKING or k == 0 and role != "assistant":
                raise ValueError(
                    f"{where}: {name}[{k}] has the role {role!r}; a completion holds what the "
                    "assistant says, so its first message has the role 'assistant', and what "
                    "comes before belongs in the prompt"
                )


def _messages(values: Any) -> bool:
    """Whether this is a list of messages."""
    listed = isinstance(values, Sequence) and bool(values)
    return listed and all(isinstance(value, Mapping) for value in values)


def _is_message(message: Any) -> bool:
    """Whether this has a role and a text; a message that calls tools may have no text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _says_something(message: Mapping[str, Any], joined: bool) -> bool:
    """Whether a message calls a tool or holds text; space alone is text only in `trl_rows`."""
    if message.get("tool_calls"):
        return True
    return bool(message["content"] if joined else message["content"].strip())
