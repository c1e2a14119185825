"""Completions as rows of token ids: padded or packed, a prompt once for all its completions.

docs/speed.md draws what these rows look like, and how much each form saves.
"""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.engine.arguments import integers, token_ids
from dpo_lab.engine.pieces import ROUND, Pieces, Spans, moved, pieces_of
from dpo_lab.engine.tokenizing import ended

# token ids, one sequence each
Tokens = Sequence[Sequence[int]]

# a row: the index of its prompt, and those of the completions that follow it
Row = tuple[int, list[int]]

# the fraction of the tokens that sharing prompts, or packing rows, must save
SHARE_FROM, PACK_FROM = 1 / 4, 1 / 8

# Packed rows go through attention together when none is shorter than this fraction of the longest:
# attention's work grows with the square of the length.
BUCKET_RATIO = 2 / 3


@dataclass(frozen=True)
class CompletionBatch:
    """N completions with their prompts, as R rows of at most L token ids; S tokens in all.

    A row is [prompt, completion], or [prompt, completion 1, ..., completion K] where completions
    share their prompt. Then `segments` tells them apart: each completion sees the prompt and itself
    (`allowed`), and its positions continue from the end of the prompt. T tokens are predicted.

    Rows are padded, or packed: laid end to end as one row of S tokens. Packed rows are told apart
    in attention alone, which takes rows of about the same length at a time.
    """

    # (R, L) padded, (1, S) packed
    input_ids: Tensor
    position_ids: Tensor

    # (R, L): 0 in a prompt, k in its k-th completion, -1 in padding; None where no prompt is shared
    segments: Tensor | None

    # only where packed, for attention: the shape (r, l) of each group of rows, and their segments;
    # (all r * l,) which of the S tokens stands at each place of the groups; (S,) the way back
    rows: tuple[tuple[tuple[int, int], Tensor | None], ...]
    spread: Tensor | None
    pack: Tensor | None

    # (T,) of each predicted token: the flat position in input_ids whose hidden state predicts it,
    # its id, which of the N completions it belongs to, and its place in that completion, from 0
    sources: Tensor
    targets: Tensor
    owners: Tensor
    places: Tensor

    # N; tokens of the longest prompt with completion, and of the longest completion
    n: int
    longest: int
    longest_completion: int

    # the lowest and the highest token id
    ids: tuple[int, int]

    # for attention on a GPU: where the pieces lie, and the pieces, made on the way there
    spans: Spans
    pieces: Pieces | None = None

    @property
    def tokens(self) -> int:
        """Completion tokens in the batch, T."""
        return len(self.targets)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each completion, on the device of the batch."""
        counts = torch.zeros(self.n, dtype=torch.int64, device=self.owners.device)
        return counts.index_add_(0, self.owners, torch.ones_like(self.owners))

    def to(self, device: torch.device | str) -> "CompletionBatch":
        """The same batch on `device`; a copy from the CPU to a GPU is asynchronous."""
        device = torch.device(device)
        to_gpu, wait = device.type == "cuda", device.type == "cpu"
        if wait and self.sources.device == device:
            return self
        rows = tuple(
            (shape, None if segments is None else segments.to(device, non_blocking=not wait))
            for shape, segments in self.rows
        )
        pieces = pieces_of(self.spans) if self.pieces is None and to_gpu else self.pieces
        pieces = None if pieces is None else pieces.to(device)
        return replace(self, rows=rows, pieces=pieces, **moved(self, device))


def allowed(segments: Tensor) -> Tensor:
    """Where attention may look, (R, 1, L, L): at the prompt and the same segment, not ahead."""
    keys, queries = segments[:, None, :], segments[:, :, None]
    return ((keys == 0) | (keys == queries)).tril_()[:, None]


def completion_batch(
    prompts: Tokens, completions: Tokens, prompt_of: Sequence[int], *, compact: bool = False
) -> CompletionBatch:
    """Arrange completions in rows for `completion_logps`.

    Args:
        prompts: token ids of each prompt, at least one (BOS for an empty text).
        completions: token ids of N completions, at least one token each, with EOS at the end of
            those that were not truncated.
        prompt_of: N indices into `prompts`.
        compact: put completions of one prompt in one row where that saves a quarter of the tokens,
            and pack the rows where that saves an eighth. Exact where `can_compact(model)`.

    Raises:
        ValueError, TypeError: an empty prompt or completion, an index outside `prompts`, or a token
            id that is not an integer. Arrays and tensors of integers are as good as lists.
    """
    prompts, completions, prompt_of = check_tokens(prompts, completions, prompt_of)
    if not completions:
        raise ValueError("0 completions and 0 values in prompt_of; need one each, at least one")
    return lay_out(prompts, completions, prompt_of, compact)


def lay_out(
    prompts: Tokens, completions: Sequence[list[int]], prompt_of: Sequence[int], compact: bool
) -> CompletionBatch:
    """`completion_batch` of lists of ints that were checked before."""
    # one row per completion, or one per prompt
    shared = compact and sharing_pays(prompts, completions, prompt_of)
    rows = rows_by_prompt(prompt_of) if shared else [(p, [i]) for i, p in enumerate(prompt_of)]
    flat = _flatten(prompts, completions, rows, shared)

    # padded, or end to end where much of the rectangle would be padding
    n_padded = len(flat.lengths) * max(flat.lengths)
    packed = compact and n_padded - len(flat.ids) >= PACK_FROM * n_padded
    return _packed(flat) if packed else _padded(flat)


def rows_by_prompt(prompt_of: Sequence[int]) -> list[Row]:
    """One row per prompt, with all of its completions."""
    members: dict[int, list[int]] = {}
    for i, p in enumerate(prompt_of):
        members.setdefault(p, []).append(i)
    return list(members.items())


def sharing_pays(prompts: Tokens, completions: Tokens, prompt_of: Sequence[int]) -> bool:
    """Whether writing each prompt once saves the fraction `SHARE_FROM` of the tokens."""
    apart = sum(len(prompts[p]) for p in prompt_of)
    once = sum(len(prompts[p]) for p in set(prompt_of))
    return apart - once >= SHARE_FROM * (apart + sum(map(len, completions)))


class _FlatRows(NamedTuple):
    """Rows laid end to end without padding: S tokens that predict T."""

    # (S,), segments None where no prompt is shared
    ids: Tensor
    positions: Tensor
    segments: Tensor | None

    # tokens of each row, where each begins, and the spans of its pieces
    lengths: list[int]
    starts: list[int]
    spans: list[list[tuple[int, int, int, int]]]

    # (T,) index into the S tokens, and the fields of the batch that do not depend on padding
    sources: Tensor
    predicted: dict[str, Any]


def _flatten(
    prompts: Tokens, completions: Sequence[list[int]], rows: list[Row], shared: bool
) -> _FlatRows:
    """Lay rows end to end, and note which token predicts which.

    Nothing is predicted from the last token of a completion, so it never enters the model. Each
    completion's first token is predicted from the last token of the prompt:

        input_ids      p  q  r  a  b  d  e         completions [a b c] and [d e f] of [p q r]
        position_ids   0  1  2  3  4  3  4
        predicts             a  b  c  e  f         and r predicts d as well
    """
    ids, positions, segments = [], [], []
    sources, targets, owners, places = [], [], [], []
    starts, spans = [], []
    for p, members in rows:
        start, n_prompt = len(ids), len(prompts[p])
        ids += prompts[p]
        positions += range(n_prompt)
        segments += [0] * n_prompt
        pieces = [(0, 0, 0, n_prompt)]
        for k, i in enumerate(members, start=1):
            # all tokens but the last are read, all of them are predicted
            first, n_read = len(ids), len(completions[i]) - 1
            ids += completions[i][:n_read]
            positions += range(n_prompt, n_prompt + n_read)
            segments += [k] * n_read
            sources += [start + n_prompt - 1, *range(first, first + n_read)]
            targets += completions[i]
            owners += [i] * (n_read + 1)
            places += range(n_read + 1)
            pieces.append((0, n_prompt, first - start, first - start + n_read))
        starts.append(start)
        spans.append(pieces if shared else [(0, 0, 0, len(ids) - start)])

    # by numpy, which reads a list several times faster than torch
    lists = (ids, positions, sources, targets, owners, places)
    tensors = (torch.from_numpy(np.array(values)) for values in lists)
    ids_, positions_, sources_, targets_, owners_, places_ = tensors
    lowest, highest = zip(*(map(int, torch.aminmax(values)) for values in (ids_, targets_)))
    predicted = {
        "targets": targets_,
        "owners": owners_,
        "places": places_,
        "n": len(completions),
        "longest": max(len(prompts[p]) + len(completions[i]) for p, row in rows for i in row),
        "longest_completion": max(map(len, completions)),
        "ids": (min(lowest), max(highest)),
    }
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(ids)])]
    segments_ = torch.from_numpy(np.array(segments)) if shared else None
    return _FlatRows(ids_, positions_, segments_, lengths, starts, spans, sources_, predicted)


def _padded(flat: _FlatRows) -> CompletionBatch:
    """One row of the batch per row, all as long as the longest."""
    index, there, segments = pad_rows(flat, range(len(flat.lengths)))
    place = there.flatten().nonzero()[:, 0]
    starts = list(range(0, there.numel(), there.shape[1]))
    return CompletionBatch(
        input_ids=flat.ids[index].where(there, 0),
        position_ids=flat.positions[index].where(there, 0),
        segments=segments,
        rows=(),
        spread=None,
        pack=None,
        sources=place[flat.sources],
        spans=Spans(flat.spans, starts, there.numel()),
        **flat.predicted,
    )


def _packed(flat: _FlatRows) -> CompletionBatch:
    """All rows end to end as one; for attention, rows of like length as rectangles."""
    # which token stands where in the rectangles, and where in them each token stands
    groups = [pad_rows(flat, rows) for rows in length_buckets(flat.lengths)]
    spread = torch.cat([index.flatten() for index, _, _ in groups])
    there = torch.cat([present.flatten() for _, present, _ in groups])
    pack = torch.empty(len(flat.ids), dtype=torch.long)
    pack[spread[there]] = there.nonzero()[:, 0]

    # a round number of tokens: oneDNN keeps a kernel for each shape
    extra = (0, -len(flat.ids) % ROUND)
    ids, positions, pack = (
        nn.functional.pad(values, extra) for values in (flat.ids, flat.positions, pack)
    )
    return CompletionBatch(
        input_ids=ids[None],
        position_ids=positions[None],
        segments=None,
        rows=tuple((tuple(index.shape), segments) for index, _, segments in groups),
        spread=spread,
        pack=pack,
        sources=flat.sources,
        spans=Spans(flat.spans, flat.starts, len(pack)),
        **flat.predicted,
    )


def pad_rows(flat: _FlatRows, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Some rows as a rectangle (r, l): index into the S tokens, which of them exist, segments."""
    lengths = torch.tensor([flat.lengths[r] for r in rows])
    starts = torch.tensor([flat.starts[r] for r in rows])
    column = torch.arange(int(lengths.max()))
    there = column < lengths[:, None]
    index = (starts[:, None] + column).where(there, 0)
    if flat.segments is None:
        return index, there, None
    return index, there, flat.segments[index].where(there, -1)


def length_buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups of like length, the longest first, none below `BUCKET_RATIO` of the first."""
    buckets: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not buckets or lengths[row] < BUCKET_RATIO * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(row)
    return buckets


def split(batch: CompletionBatch, parts: int) -> list[CompletionBatch]:
    """The completions of `batch` in at most `parts` batches of about as many rows each."""
    if parts == 1:
        return [batch]

    # where the rows begin in the flat tokens
    ids, length = batch.input_ids.flatten(), batch.input_ids.shape[1]
    starts = torch.arange(0, len(ids), length, device=ids.device)
    if batch.rows:
        starts = (batch.position_ids[0] == 0).nonzero()[:, 0]

    # each completion as a list again, and by row its prompt and its members
    prompts, completions, members = {}, [], defaultdict(list)
    for i in range(batch.n):
        own = batch.owners == i
        end_of_prompt = batch.sources[own][0]
        row = int(torch.searchsorted(starts, end_of_prompt, right=True)) - 1
        prompts[row] = ids[starts[row] : end_of_prompt + 1].tolist()
        members[row].append(i)
        completions.append(batch.targets[own].tolist())

    # batches of whole rows
    compact = batch.segments is not None or bool(batch.rows)
    return [
        completion_batch(
            [prompts[row] for row in range(len(prompts))],
            [completions[i] for row in some for i in members[row]],
            [int(row) for row in some for _ in members[row]],
            compact=compact,
        )
        for some in np.array_split(list(members), min(parts, len(members)))
    ]


def check_tokens(
    prompts: Tokens, completions: Tokens, prompt_of: Sequence[int]
) -> tuple[Sequence[list[int]], list[list[int]], list[int]]:
    """The same as lists of ints; of `prompts`, those that `prompt_of` names.

    Raises:
        ValueError, TypeError: unless every completion has tokens, and its prompt has.
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
                f"prompt_of[{i}] is {p}; with {len(prompts)} prompts it must be in "
                f"0..{len(prompts) - 1}"
            )
        if p not in used:
            used[p] = token_ids(f"prompts[{p}]", prompts[p], signed=True)
        if not used[p]:
            raise ValueError(
                f"prompt {p} has no tokens; start it with the BOS token so that its first token "
                "has a context"
            )
        if not completion:
            raise ValueError(f"completion {i} has no tokens; drop it, or end it with EOS")

    # the caller's own list, unless one of them had to be converted
    if any(used[p] is not prompts[p] for p in used):
        prompts = [used.get(p, []) for p in range(len(prompts))]
    return prompts, completions, owners


def pack(documents: list[list[int]], context: int, end: int) -> list[list[int]]:
    """Whole documents in rows of at most `context` tokens: best fit, the longest first.

    Each document is closed by `end`. One that is longer than a row fills rows of its own and leaves
    a rest. Nothing is dropped and nothing is repeated.
    """
    closed = [_closed(doc, end) for doc in documents]
    pieces = [doc[i : i + context] for doc in closed for i in range(0, len(doc), context)]

    # each piece into the row with the least room that still takes it
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
    """Token ids of texts, from BOS (where the tokenizer adds it) to EOS.

    A text that spells these tokens out does not get them twice.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(texts)["input_ids"]
    return [_closed(ids[1:] if ids[:2] == [bos, bos] else ids, eos) for ids in encoded]


def _closed(document: list[int], end: int) -> list[int]:
    """A document that ends with `end`, once; a lone token, which may be its BOS, gets it too."""
    return ended(document, end) if len(document) > 1 else [*document, end]
