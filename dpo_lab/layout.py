"""How completions lie in a batch: a prompt once for all its completions, rows end to end without padding (docs/speed.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tokens = Sequence[Sequence[int]]  # token ids, one sequence each
SHARE_FROM, PACK_FROM = 1 / 4, 1 / 8  # the share of tokens that it must save
ROUND = 32  # packed tokens are padded to a multiple: oneDNN keeps a kernel for each shape it has met, so let the shapes repeat


@dataclass(frozen=True)
class CompletionBatch:
    """N completions with their prompts as R rows of at most L token ids, S tokens and T completion tokens in all.

    One row is [prompt, completion], or [prompt, completion 1, ..., completion K] where the prompt is shared: then `mask`
    lets each completion see the prompt and itself, and its positions continue from the prompt's end. Rows are padded, or
    packed: laid end to end as one row of S tokens, and told apart inside attention alone.
    """

    input_ids: Tensor  # (R, L), or (1, S) packed
    position_ids: Tensor  # as input_ids
    mask: Tensor | None  # (R, 1, L, L) True where attention is allowed; None for plain causal attention
    unpack: Tensor | None  # (R, L) index into the S packed tokens; None when padded
    pack: Tensor | None  # (S,) index into R * L; None when padded
    sources: Tensor  # (T,) flat position in input_ids whose hidden state predicts the token
    targets: Tensor  # (T,) completion token ids
    owners: Tensor  # (T,) which of the N completions the token belongs to
    n: int  # completions

    @property
    def tokens(self) -> int:
        """Completion tokens in the batch, T."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> "CompletionBatch":
        """The same batch on `device`."""
        return CompletionBatch(*(v.to(device) if isinstance(v, Tensor) else v for v in vars(self).values()))


def completion_batch(prompts: Tokens, completions: Tokens, prompt_of: Sequence[int], *, share: bool = False) -> CompletionBatch:
    """Lay out completions for `completion_logps`.

    Args:
        prompts: token ids of each prompt, at least one (BOS for an empty text).
        completions: token ids of N completions, at least one token each, with EOS where they have ended.
        prompt_of: N indices into `prompts`.
        share: put completions of one prompt in one row where that saves a quarter of the tokens, and pack the rows where
            that saves an eighth. Exact for the model families in `logprobs.SHARES_PROMPTS`; `can_share` tells.

    Raises:
        ValueError: an empty prompt or completion, or an index outside `prompts`.
    """
    if not completions:
        raise ValueError("0 completions and 0 values in prompt_of; need one each, at least one")
    check_tokens(prompts, completions, prompt_of)
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(prompt_of):
        groups.setdefault(p, []).append(i)
    saved = sum((len(members) - 1) * len(prompts[p]) for p, members in groups.items())
    total = sum(len(prompts[p]) + len(c) for c, p in zip(completions, prompt_of))
    together = share and saved >= SHARE_FROM * total
    rows = list(groups.items()) if together else [(p, [i]) for i, p in enumerate(prompt_of)]

    ids, positions, lengths, segments, sources, targets, owners = ([] for _ in range(7))  # segments: 0 in a prompt, 1.. after it
    for p, members in rows:
        start, n_prompt = len(ids), len(prompts[p])
        ids += prompts[p]
        positions += range(n_prompt)
        segments += [0] * n_prompt
        for k, i in enumerate(members, start=1):
            n = len(completions[i]) - 1  # nothing is predicted from the last token
            sources += [start + n_prompt - 1, *range(len(ids), len(ids) + n)]
            targets += completions[i]
            owners += [i] * (n + 1)
            ids += completions[i][:n]
            positions += range(n_prompt, n_prompt + n)
            segments += [k] * n
        lengths.append(len(ids) - start)

    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (R, L)
    pack = real.flatten().nonzero()[:, 0]  # (S,)

    def padded(values: Sequence[int] | Tensor, fill: int = 0) -> Tensor:
        return torch.full(real.shape, fill).masked_scatter_(real, torch.as_tensor(values))  # (R, L)

    mask = None
    if together:
        segment = padded(segments, fill=-1)
        mask = ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])).tril_()[:, None]  # (R, 1, L, L)
    predicted = torch.tensor(targets), torch.tensor(owners), len(completions)
    if share and real.numel() - len(ids) >= PACK_FROM * real.numel():
        extra = -len(ids) % ROUND
        flat = [nn.functional.pad(torch.tensor(values), (0, extra)) for values in (ids, positions)]
        unpack, pack = padded(range(len(ids))), nn.functional.pad(pack, (0, extra))
        return CompletionBatch(flat[0][None], flat[1][None], mask, unpack, pack, torch.tensor(sources), *predicted)
    return CompletionBatch(padded(ids), padded(positions), mask, None, None, pack[sources], *predicted)


def split(batch: CompletionBatch, parts: int) -> list[CompletionBatch]:
    """The completions of `batch` in at most `parts` batches of about as many rows each; the batch itself for one part."""
    if parts == 1:
        return [batch]
    flat = batch.sources if batch.pack is None else batch.pack[batch.sources]  # (T,) into rows * columns
    ids = batch.input_ids if batch.unpack is None else batch.input_ids[0][batch.unpack]  # (R, L)
    members: list[list[int]] = [[] for _ in ids]
    prompts, completions = [[] for _ in ids], []
    for i in range(batch.n):
        own = batch.owners == i
        row, column = divmod(int(flat[own][0]), ids.shape[1])  # where the last token of the prompt stands
        members[row].append(i)
        prompts[row] = ids[row, : column + 1].tolist()
        completions.append(batch.targets[own].tolist())
    rows = torch.arange(len(ids)).tensor_split(min(parts, len(ids)))
    share = batch.mask is not None or batch.pack is not None
    return [
        completion_batch(
            prompts,
            [completions[i] for row in some for i in members[row]],
            [int(row) for row in some for _ in members[row]],
            share=share,
        )
        for some in rows
    ]


def check_tokens(prompts: Tokens, completions: Tokens, prompt_of: Sequence[int]) -> None:
    """Raise ValueError unless every completion has tokens, and a prompt with tokens among `prompts`."""
    if len(completions) != len(prompt_of):
        raise ValueError(f"{len(completions)} completions and {len(prompt_of)} values in prompt_of; need one each")
    for i, (completion, p) in enumerate(zip(completions, prompt_of)):
        if not 0 <= p < len(prompts):
            raise ValueError(f"prompt_of[{i}] is {p}; with {len(prompts)} prompts it must be in 0..{len(prompts) - 1}")
        if not len(prompts[p]):
            raise ValueError(f"prompt {p} has no tokens; start it with the BOS token so that its first token has a context")
        if not len(completion):
            raise ValueError(f"completion {i} has no tokens; drop it, or end it with EOS")
