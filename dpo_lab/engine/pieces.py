"""The tokens of a batch as pieces of variable length, which an attention kernel on a GPU takes."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROUND = 32  # packed tokens are padded to a multiple: oneDNN keeps a kernel for each shape it has met, so let the shapes repeat


@dataclass(frozen=True)
class Pieces:
    """The S tokens of a batch, padding included, as pieces that a variable-length attention kernel takes.

    A piece is a row, or a shared prompt, or one of its completions, or padding, which would else be left undefined.
    It attends to its keys: to itself, and a completion before that to its prompt.
    """

    query_ends: Tensor  # (s + 1,) int32: where the pieces begin among the S tokens, and the end
    key_ends: Tensor  # (s + 1,) int32: where the keys of each begin among all keys, and the end
    keys: Tensor  # (K,) index into the S tokens: the keys of each piece, one piece after another
    uses: (
        Tensor  # (S, m) index into the keys: where each token is one; K where it has no further use
    )
    longest: tuple[int, int]  # tokens and keys of the longest pieces

    def to(self, device: torch.device | str) -> "Pieces":
        """The same pieces on `device`."""
        return replace(self, **moved(self, device))


class Spans(NamedTuple):
    """Where the pieces of a batch lie among its tokens."""

    rows: list[
        list[tuple[int, int, int, int]]
    ]  # of each piece of a row: (start, end) of its prompt, and of itself, in the row
    starts: list[int]  # where the rows begin
    n: int  # tokens; those between the rows are padding


def moved(parts: Any, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a dataclass on `device`. To a GPU without waiting: CUDA has read memory that is not pinned by then."""
    wait = torch.device(device).type == "cpu"
    return {
        name: v.to(device, non_blocking=not wait)
        for name, v in vars(parts).items()
        if isinstance(v, Tensor)
    }


def pieces_of(spans: Spans) -> Pieces:
    """The pieces of a batch, in the order of its tokens."""
    found = []
    for row, start, end in zip(spans.rows, spans.starts, [*spans.starts[1:], spans.n]):
        found += [(start + a, start + b, start + c, start + d) for a, b, c, d in row if c < d]
        found += [(last, last, last, end) for last in [found[-1][3]] if last < end]
    keys = np.concatenate([np.r_[a:b, c:d] for a, b, c, d in found])
    sizes = [d - c for _, _, c, d in found], [b - a + d - c for a, b, c, d in found]
    query_ends, key_ends = (torch.tensor(np.cumsum([0, *of]), dtype=torch.int32) for of in sizes)

    # where each token is a key: the ranks of equal tokens, after a stable sort, are the columns
    order, counts = np.argsort(keys, kind="stable"), np.bincount(keys, minlength=spans.n)
    column = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    uses = np.full((spans.n, counts.max()), len(keys))
    uses[keys[order], column] = order
    return Pieces(
        query_ends, key_ends, torch.from_numpy(keys), torch.from_numpy(uses), tuple(map(max, sizes))
    )
