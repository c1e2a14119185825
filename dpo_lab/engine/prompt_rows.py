"""Attention of rows that share a prompt, on a CPU: each query meets the keys that it sees, no mask.

A masked row of L tokens computes L x L weights, and holds a mask of that size. Here a prompt of P
tokens meets itself, its completions meet the prompt, and each of them itself. The last two parts
are joined by their normalizers, as flash attention joins blocks of keys (Dao et al. 2022).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_lab.engine.cpu import matmuls_by_mkl
from dpo_lab.engine.pieces import Spans

# tokens of the longest row from which this pays: shorter rows go faster together, under a mask
LONG_ROW = 128


class PromptRow(NamedTuple):
    """A prompt and its completions, as places among the tokens (R, H, L, D) of attention."""

    index: int
    """which of the R"""
    prompt: slice
    after: slice
    """all of its completions, which follow the prompt"""
    completions: list[slice]
    """each of them; none of those that have no token that is read"""


def prompt_rows(spans: Spans, length: int) -> list[PromptRow]:
    """The rows of a batch that lie in an (R, length) rectangle; R is 1 where they are packed."""
    found = []
    for pieces, start in zip(spans.rows, spans.starts):
        index, at = divmod(start, length)
        (_, _, first, end), *rest = pieces

        # what is alone in its row is one piece
        completions = [slice(at + c, at + d) for _, _, c, d in rest if c < d]
        if len(completions) == 1:
            first, end, completions = first, completions[0].stop - at, []
        prompt = slice(at + first, at + end)
        after = slice(prompt.stop, completions[-1].stop if completions else prompt.stop)
        found.append(PromptRow(index, prompt, after, completions))
    return found


def longest_row(spans: Spans) -> int:
    """Tokens of the longest row."""
    return max(pieces[-1][3] for pieces in spans.rows)


def query_key_pairs(rows: list[PromptRow]) -> int:
    """How many weights attention computes, those that a causal part leaves out included."""
    parts = [part for row in rows for part in _parts(row)]
    return sum((q.stop - q.start) * (k.stop - k.start) for q, k, _ in parts)


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: list[PromptRow],
    scale: float,
    by_mkl: bool = False,
) -> Tensor:
    """Attention of query (R, H, L, D) to key and value (R, G, L, D), as (R, L, H, D).

    Of G heads of keys each serves H / G of the queries'. What belongs to no row comes out as zero.
    `by_mkl` says that no other thread is computing, so that matmuls may go to MKL, which is faster
    at small ones.
    """
    return _PromptAttention.apply(query, key, value, rows, scale, by_mkl)


def _parts(row: PromptRow) -> Iterator[tuple[slice, slice, bool]]:
    """The queries and the keys of each part of a row, and whether it is causal."""
    yield row.prompt, row.prompt, True
    for completion in row.completions:
        yield completion, completion, True
    if row.completions:
        yield row.after, row.prompt, False


class _PromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, rows, scale, by_mkl):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        r, heads, length, size = query.shape
        out = query.new_zeros(r, length, heads, size).transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        normalizer = query.new_zeros(r, heads, length, dtype=wide)  # of each query, log sum exp

        with _small_matmuls(by_mkl):
            for row in rows:
                q, k, v, o, n = (x[row.index, None] for x in (query, key, value, out, normalizer))
                for queries, keys, causal in _parts(row):
                    found = flash(
                        q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
                    )
                    if causal:
                        o[:, :, queries], n[:, :, queries] = found
                    else:
                        _join(o[:, :, queries], n[:, :, queries], *found)

        ctx.save_for_backward(query, key, value, out, normalizer)
        ctx.rows, ctx.scale, ctx.by_mkl = rows, scale, by_mkl
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, normalizer = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        slopes = [torch.zeros_like(x) for x in (query, key, value)]

        # with the normalizer of all keys, a part's gradients are those within the whole
        with _small_matmuls(ctx.by_mkl):
            for row in ctx.rows:
                g, q, k, v, o, n = (
                    x[row.index, None] for x in (grad, query, key, value, out, normalizer)
                )
                for queries, keys, causal in _parts(row):
                    met = q[:, :, queries], k[:, :, keys], v[:, :, keys]
                    whole = o[:, :, queries], n[:, :, queries]
                    found = flash(g[:, :, queries], *met, *whole, 0.0, causal, scale=ctx.scale)
                    for slope, places, part in zip(slopes, (queries, keys, keys), found):
                        slope[row.index, None, :, places] += part
        return *slopes, None, None, None


def _join(out: Tensor, normalizer: Tensor, more: Tensor, of_more: Tensor) -> None:
    """Attention to some keys, made in place that to them and others."""
    of_both = torch.logaddexp(normalizer, of_more)
    out *= (normalizer - of_both).exp()[..., None]
    out += more * (of_more - of_both).exp()[..., None]
    normalizer.copy_(of_both)


def _small_matmuls(by_mkl: bool) -> AbstractContextManager[None]:
    return matmuls_by_mkl() if by_mkl else nullcontext()
