"""Texts as token ids: BOS and EOS written once, completions truncated, and everything counted.

Prompt and completion are tokenized apart and joined as ids, so no token straddles the boundary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_lab.engine.arguments import integer, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]

# what is counted on the way
COUNTS = (
    "without_eos",
    "dropped",
    "identical",
    "duplicated",
    "ties",
    "inner_eos",
    "prompt_repeated",
)


def begun(ids: list[int], start: int) -> list[int]:
    """`ids` with the token `start` before them, once."""
    return ids if ids[:1] == [start] else [start, *ids]


def ended(ids: list[int], end: int) -> list[int]:
    """`ids` with the token `end` after them, once."""
    return ids if ids[-1:] == [end] else [*ids, end]


class TokenCollector:
    """Collects distinct prompts and completions as token ids, and pairs among them.

    `where` names a text in errors. `chat` says that a chat template wrote its BOS and EOS.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", context: int, max_completion_tokens: int | None
    ):
        self.tokenizer, self.context = tokenizer, integer("context", context)
        self.limit = self.context
        if max_completion_tokens is not None:
            self.limit = integer("max_completion_tokens", max_completion_tokens)
        if self.limit < 1:
            raise ValueError(
                f"max_completion_tokens is {self.limit}; "
                "it must be at least 1, or None for no limit"
            )

        # the tokenizer's special tokens
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.bos_text = tokenizer.bos_token or ""
        self.starts_with_bos = tokenizer("")["input_ids"][:1] == [self.bos]

        # SentencePiece puts a space before every text: a line break takes it, and is removed again
        doubled = tokenizer.decode(2 * self.encoded("a"))
        self.newline = self.encoded("\n") if doubled == "a a" else []

        # prompts, with the tokens left for a completion of each, and prompts of more than two
        # tokens as they were given, without BOS
        self.prompts: dict[Ids, int] = {}
        self.room: list[int] = []
        self.asked: list[str | Ids] = []

        # completions by prompt, with their scores, and pairs among them
        self.completions: dict[tuple[int, Ids], int] = {}
        self.scores: list[float | None] = []
        self.pairs: list[tuple[int, int]] = []

        # distinct completions that did not fit, counts, and columns that were not read, in order
        self.truncated: set[tuple[int, Ids]] = set()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.unread: dict[str, None] = {}

    def encoded(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def continued(self, text: str) -> list[int]:
        """Token ids of a text that follows another, without a space that it does not have."""
        n, ids = len(self.newline), self.encoded("\n" + text) if self.newline else []
        return ids[n:] if ids[:n] == self.newline and ids[n:] else self.encoded(text)

    def prompt(self, prompt: str | Sequence[int], *, where: str, chat: bool = False) -> int:
        """The index of a prompt, a text or token ids."""
        given = isinstance(prompt, str)
        if given:
            _check_text(where, prompt)
            ids = self.encoded(prompt)
            if not chat and (self.starts_with_bos or not ids):
                ids = begun(ids, self._needed_eos(where) if self.bos is None else self.bos)
        else:
            ids = token_ids(where, prompt)
        if len(ids) >= self.context:
            raise ValueError(
                f"{where}: the prompt has {len(ids)} tokens and the model's context is "
                f"{self.context}, which leaves no room for a completion; shorten the prompt or "
                "take a model with a longer context"
            )

        # a new prompt, with the room that it leaves
        if tuple(ids) not in self.prompts:
            self.prompts[tuple(ids)] = len(self.prompts)
            self.room.append(min(self.limit, self.context - len(ids)))
            asked = prompt.removeprefix(self.bos_text) if given else self._without_bos(tuple(ids))
            self.asked.append(asked if len(ids) > 2 and not chat else "")
        return self.prompts[tuple(ids)]

    def completion(
        self,
        p: int,
        completion: str | Sequence[int],
        *,
        where: str,
        chat: bool = False,
        head: str = "",
        score: float | None = None,
    ) -> int:
        """The index of a completion of prompt `p`, a text or token ids.

        `head` is the text of the prompt where both are tokenized in one piece.
        """
        if isinstance(completion, str):
            _check_text(where, completion)
            if head:
                ids = self.encoded(head + completion)[len(self.encoded(head)) :]
            else:
                ids = self.continued(completion)
            ids = ids if chat else ended(ids, self._needed_eos(where))
        else:
            ids = token_ids(where, completion)

        # truncate, and keep what is new
        key = (p, tuple(ids[: self.room[p]]))
        if len(ids) > self.room[p]:
            self.truncated.add((p, tuple(ids)))
        if key not in self.completions:
            self.completions[key] = len(self.completions)
            self.scores.append(score)
            self._count(p, key[1], completion, chat)
        return self.completions[key]

    def pair(self, chosen: int, rejected: int) -> None:
        """Add a pair of completions, or count it where both are the same one."""
        if chosen == rejected:
            self.counts["identical"] += 1
        else:
            self.pairs.append((chosen, rejected))

    def _count(self, p: int, ids: Ids, completion: str | Sequence[int], chat: bool) -> None:
        """Count what is unusual about a completion."""
        self.counts["without_eos"] += self.eos not in ids[-2:]

        # chat templates write a line break after EOS
        turn = chat and ids[-1] != self.eos
        inside = ids[: -2 if turn else -1]
        self.counts["inner_eos"] += self.eos in inside or self.bos in inside

        # what `model.generate` returns begins with the prompt
        asked = self.asked[p]
        if isinstance(asked, str):
            text = completion if isinstance(completion, str) else ""
            self.counts["prompt_repeated"] += bool(asked) and text.startswith(asked)
        else:
            self.counts["prompt_repeated"] += self._without_bos(ids)[: len(asked)] == asked

    def _without_bos(self, ids: Ids) -> Ids:
        return ids[1:] if ids[:1] == (self.bos,) else ids

    def _needed_eos(self, where: str) -> int:
        if self.eos is None:
            raise ValueError(
                f"{where}: the tokenizer has no EOS token to end a completion with; "
                "set tokenizer.eos_token"
            )
        return self.eos


def _check_text(where: str, text: str) -> None:
    """Raise ValueError for half of a character that UTF-16 writes as two: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} is {text[error.start]!r}, a lone surrogate, which "
            "is no text; read the file in the encoding that it was written in, or repair it by "
            "text.encode('utf-8', 'replace').decode()"
        ) from None
