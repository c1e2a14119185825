"""How completions lie in a batch: a prompt once for all its completions, rows end to end without padding (docs/speed.md)."""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
)

from dpo_lab.engine.arguments import integers, token_ids
from dpo_lab.engine.pieces import ROUND, Pieces, Spans, moved, pieces_of

Tokens = Sequence[Sequence[int]]  # token ids, one sequence each

SHARE_FROM, PACK_FROM = 1 / 4, 1 / 8  # the share of tokens that it must save

BUCKET_RATIO = (
    2 / 3
)  # rows of these lengths go through attention together, whose work grows with the square


@dataclass(frozen=True)
class CompletionBatch:
    """N completions with their prompts as R rows of at most L token ids, S tokens and T completion tokens in all.

    One row is [prompt, completion], or [prompt, completion 1, ..., completion K] where the prompt is shared: then `segments`
    tells them apart, so that each completion sees the prompt and itself (`allowed`), and its positions continue from the
    prompt's end. Rows are padded, or
    packed: laid end to end as one row of S tokens, and told apart inside attention alone, which takes rows of about the same
    length at a time.
    """

    input_ids: Tensor  # (R, L), or (1, S) packed
    position_ids: Tensor  # as input_ids
    segments: (
        Tensor | None
    )  # (R, L) 0 in a prompt, k in its k-th completion, -1 in padding; None where no prompt is shared
    rows: tuple[
        tuple[tuple[int, int], Tensor | None], ...
    ]  # packed: (r, l) of the rows of like length, and their segments
    spread: (
        Tensor | None
    )  # (all r * l,) index into the S tokens: those rows one after another; None when padded
    pack: Tensor | None  # (S,) index into all r * l: the way back
    sources: Tensor  # (T,) flat position in input_ids whose hidden state predicts the token
    targets: Tensor  # (T,) completion token ids
    owners: Tensor  # (T,) which of the N completions the token belongs to
    places: Tensor  # (T,) the token's place in its completion, from 0
    n: int  # completions
    longest: int  # tokens of the longest prompt with its completion
    longest_completion: int  # tokens
    ids: tuple[int, int]  # the lowest and the highest token id
    spans: Spans  # of which the pieces are made
    pieces: Pieces | None = None  # for attention on a GPU; made on the way there

    @property
    def tokens(self) -> int:
        """Completion tokens in the batch, T."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> "CompletionBatch":
        """The same batch on `device`. A copy from the CPU to a GPU is not waited for."""
        wait = torch.device(device).type == "cpu"
        rows = tuple(
            (shape, None if part is None else part.to(device, non_blocking=not wait))
            for shape, part in self.rows
        )
        pieces = self.pieces
        if pieces is None and torch.device(device).type == "cuda":
            pieces = pieces_of(self.spans)
        return replace(
            self,
            rows=rows,
            pieces=None if pieces is None else pieces.to(device),
            **moved(self, device),
        )


def allowed(segments: Tensor) -> Tensor:
    """Where attention is allowed, (R, 1, L, L): to the prompt and to the same segment, up to the token itself."""
    keys, queries = segments[:, None, :], segments[:, :, None]
    return ((keys == 0) | (keys == queries)).tril_()[:, None]


def completion_batch(
    prompts: Tokens, completions: Tokens, prompt_of: Sequence[int], *, compact: bool = False
) -> CompletionBatch:
    """Lay out completions for `completion_logps`.

    Args:
        prompts: token ids of each prompt, at least one (BOS for an empty text).
        completions: token ids of N completions, at least one token each, with EOS where they have ended.
        prompt_of: N indices into `prompts`.
        compact: put completions of one prompt in one row where that saves a quarter of the tokens, and pack the rows where
            that saves an eighth. Exact for the model families in `logprobs.SHARES_PROMPTS`; `can_compact` tells.

    Raises:
        ValueError, TypeError: an empty prompt or completion, an index outside `prompts`, or a token id that is no integer.
            Arrays and tensors of integers are as good as lists.
    """
    prompts, completions, prompt_of = check_tokens(prompts, completions, prompt_of)
    if not completions:
        raise ValueError("0 completions and 0 values in prompt_of; need one each, at least one")
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(prompt_of):
        groups.setdefault(p, []).append(i)
    saved = sum((len(members) - 1) * len(prompts[p]) for p, members in groups.items())
    total = sum(len(prompts[p]) + len(c) for c, p in zip(completions, prompt_of))
    together = compact and saved >= SHARE_FROM * total
    rows = list(groups.items()) if together else [(p, [i]) for i, p in enumerate(prompt_of)]

    ids, positions, lengths, segments, sources, targets, owners = ([] for _ in range(7))
    spans = []  # of each row's pieces: (start, end) of its prompt, and of itself, from the beginning of the row
    for p, members in rows:
        start, n_prompt = len(ids), len(prompts[p])
        ids += prompts[p]
        positions += range(n_prompt)
        segments += [0] * n_prompt  # 1.. in its completions
        spans.append([(0, 0, 0, n_prompt)])
        for k, i in enumerate(members, start=1):
            n = len(completions[i]) - 1  # nothing is predicted from the last token
            sources += [start + n_prompt - 1, *range(len(ids), len(ids) + n)]
            targets += completions[i]
            owners += [i] * (n + 1)
            spans[-1].append((0, n_prompt, len(ids) - start, len(ids) - start + n))
            ids += completions[i][:n]
            positions += range(n_prompt, n_prompt + n)
            segments += [k] * n
        lengths.append(len(ids) - start)
        if not together:
            spans[-1] = [(0, 0, 0, lengths[-1])]

    starts, positions_, segments_ = (
        torch.tensor(v) for v in (np.cumsum([0, *lengths[:-1]]), positions, segments)
    )

    def lay(some: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows `some`, padded: where their tokens lie end to end (r, l), which of those are there, and the segments."""
        wide = torch.arange(max(lengths[r] for r in some))  # (l,)
        there = wide < torch.tensor([lengths[r] for r in some])[:, None]
        index = (starts[list(some), None] + wide).where(there, 0)
        if not together:
            return index, there, None
        return index, there, segments_[index].where(there, -1)

    tokens, sources_, targets_, owners_ = (
        torch.tensor(values) for values in (ids, sources, targets, owners)
    )
    prompt_lengths = torch.tensor([len(prompts[p]) for p in prompt_of])
    places = positions_[sources_] + 1 - prompt_lengths[owners_]
    ends = [torch.aminmax(values) for values in (tokens, targets_)]
    predicted = (
        *(targets_, owners_, places, len(completions)),
        max(len(prompts[p]) + len(c) for c, p in zip(completions, prompt_of)),
        max(map(len, completions)),
        (min(int(low) for low, _ in ends), max(int(high) for _, high in ends)),
    )
    index, there, segment = lay(range(len(rows)))
    if not compact or there.numel() - len(ids) < PACK_FROM * there.numel():
        place = there.flatten().nonzero()[:, 0]  # of the tokens that are there
        lying = Spans(spans, list(range(0, there.numel(), there.shape[1])), there.numel())
        padded = [values[index].where(there, 0) for values in (tokens, positions_)]
        return CompletionBatch(*padded, segment, (), None, None, place[sources_], *predicted, lying)
    laid = [lay(some) for some in length_buckets(lengths)]
    spread, there = (torch.cat([part[i].flatten() for part in laid]) for i in (0, 1))
    pack = torch.empty(len(ids), dtype=torch.long)
    pack[spread[there]] = there.nonzero()[:, 0]
    parts = tuple((tuple(index.shape), segment) for index, _, segment in laid)
    extra = (0, -len(ids) % ROUND)
    flat = [nn.functional.pad(values, extra) for values in (tokens, positions_, pack)]
    lying = Spans(spans, starts.tolist(), len(flat[2]))
    return CompletionBatch(
        flat[0][None], flat[1][None], None, parts, spread, flat[2], sources_, *predicted, lying
    )


def length_buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by length, the longest first, in parts within which no row is shorter than `BUCKET_RATIO` of the longest."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not parts or lengths[row] < BUCKET_RATIO * lengths[parts[-1][0]]:
            parts.append([])
        parts[-1].append(row)
    return parts


def split(batch: CompletionBatch, parts: int) -> list[CompletionBatch]:
    """The completions of `batch` in at most `parts` batches of about as many rows each; the batch itself for one part."""
    if parts == 1:
        return [batch]
    ids, step = batch.input_ids.flatten(), batch.input_ids.shape[1]
    starts = (
        (batch.position_ids[0] == 0).nonzero()[:, 0]
        if batch.rows
        else torch.arange(0, len(ids), step, device=ids.device)
    )
    prompts, completions, members = {}, [], defaultdict(list)  # by row
    for i in range(batch.n):
        own = batch.owners == i
        last = batch.sources[own][0]  # token of the prompt
        row = int(torch.searchsorted(starts, last, right=True)) - 1
        prompts[row] = ids[starts[row] : last + 1].tolist()
        members[row].append(i)
        completions.append(batch.targets[own].tolist())
    rows = np.array_split(list(members), min(parts, len(members)))
    share = batch.segments is not None or bool(batch.rows)
    return [
        completion_batch(
            [prompts[row] for row in range(len(prompts))],
            [completions[i] for row in some for i in members[row]],
            [int(row) for row in some for _ in members[row]],
            compact=share,
        )
        for some in rows
    ]


def check_tokens(
    prompts: Tokens, completions: Tokens, prompt_of: Sequence[int]
) -> tuple[Sequence[list[int]], list[list[int]], list[int]]:
    """The same as lists of ints, of `prompts` those that `prompt_of` names.

    Raises:
        ValueError, TypeError: unless every completion has tokens, and a prompt with tokens among `prompts`.
    """
    owners = integers("prompt_of", prompt_of).tolist()
    completions = [
        token_ids(f"completions[{i}]", ids, signed=True) for i, ids in enumerate(completions)
    ]
    if len(completions) != len(owners):
        raise ValueError(
            f"{len(completions)} completions and {len(owners)} values in prompt_of; need one each"
        )
    used = {}
    for i, (completion, p) in enumerate(zip(completions, owners)):
        if not 0 <= p < len(prompts):
            raise ValueError(
                f"prompt_of[{i}] is {p}; with {len(prompts)} prompts it must be in 0..{len(prompts) - 1}"
            )
        if p not in used:
            used[p] = token_ids(f"prompts[{p}]", prompts[p], signed=True)
        if not used[p]:
            raise ValueError(
                f"prompt {p} has no tokens; start it with the BOS token so that its first token has a context"
            )
        if not completion:
            raise ValueError(f"completion {i} has no tokens; drop it, or end it with EOS")
    if any(used[p] is not prompts[p] for p in used):
        prompts = [used.get(p, []) for p in range(len(prompts))]
    return prompts, completions, owners


def begun(ids: list[int], start: int) -> list[int]:
    """`ids` after the token `start`, which is not written twice."""
    return ids if ids[:1] == [start] else [start, *ids]


def ended(ids: list[int], end: int) -> list[int]:
    """`ids` before the token `end`, which is not written twice."""
    return ids if ids[-1:] == [end] else [*ids, end]


def pack(documents: list[list[int]], context: int, end: int) -> list[list[int]]:
    """Whole documents, each closed by `end`, laid together into rows of at most `context` tokens, best fit, longest first.

    A document longer than a row is cut into rows of its own and a rest. Nothing is dropped and nothing is repeated.
    """
    closed = [_closed(doc, end) for doc in documents]
    pieces = [doc[i : i + context] for doc in closed for i in range(0, len(doc), context)]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for piece in sorted(pieces, key=len, reverse=True):
        k = bisect.bisect_left(room, (len(piece), -1))
        left, row = room.pop(k) if k < len(room) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row] += piece
        if left > len(piece):
            bisect.insort(room, (left - len(piece), row))
    return [row for row in rows if len(row) > 1]


def whole_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, from BOS where the tokenizer adds it to EOS; a text that spells them out gets no second ones."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(texts)["input_ids"]
    return [_closed(ids[1:] if ids[:2] == [bos, bos] else ids, eos) for ids in encoded]


def _closed(document: list[int], end: int) -> list[int]:
    """A document that ends with `end`, once; a lone token may be the same as its BOS, and is closed."""
    return ended(document, end) if len(document) > 1 else [*document, end]
