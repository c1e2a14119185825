"""The tokens of a batch as pieces of variable length, for an attention kernel on a GPU."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Packed tokens are padded to a multiple of this: oneDNN keeps a kernel for each shape it has met,
# so shapes should repeat.
ROUND = 32


@dataclass(frozen=True)
class Pieces:
    """The S tokens of a batch, padding included, as pieces for a variable-length attention kernel.

    A piece is a row, a shared prompt, one of its completions, or padding (which would otherwise be
    left undefined). It attends to its keys: to itself, and before that, if it is a completion, to
    its prompt.
    """

    # (s + 1,) int32: where the pieces begin among the S tokens, and the end
    query_ends: Tensor

    # (s + 1,) int32: where the keys of each piece begin among all K keys, and the end
    key_ends: Tensor

    # (K,) index into the S tokens: the keys of each piece, one piece after another
    keys: Tensor

    # (S, m) index into the keys: where each token is one; K where it has no further use
    uses: Tensor

    # tokens and keys of the longest pieces
    longest: tuple[int, int]

    def to(self, device: torch.device | str) -> "Pieces":
        """The same pieces on `device`."""
        return replace(self, **moved(self, device))


class Spans(NamedTuple):
    """Where the pieces of a batch lie among its tokens."""

    # of each piece of a row: (start, end) of its prompt, and of itself, counted within the row
    rows: list[list[tuple[int, int, int, int]]]

    # where the rows begin, and how many tokens there are; those between rows are padding
    starts: list[int]
    n: int


def moved(parts: Any, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a dataclass on `device`, by name.

    Copies to a GPU are not waited for: CUDA has read memory that is not pinned when they return.
    """
    wait = torch.device(device).type == "cpu"
    return {
        name: value.to(device, non_blocking=not wait)
        for name, value in vars(parts).items()
        if isinstance(value, Tensor)
    }


def pieces_of(spans: Spans) -> Pieces:
    """The pieces of a batch, in the order of its tokens."""
    # (start, end) of each piece's prompt and of itself; what remains of a row is padding
    found = []
    for row, start, end in zip(spans.rows, spans.starts, [*spans.starts[1:], spans.n]):
        found += [(start + a, start + b, start + c, start + d) for a, b, c, d in row if c < d]
        last = found[-1][3]
        if last < end:
            found.append((last, last, last, end))

    # the keys of all pieces, and where each piece's tokens and keys end
    keys = np.concatenate([np.r_[a:b, c:d] for a, b, c, d in found])
    queries_of = [d - c for _, _, c, d in found]
    keys_of = [b - a + d - c for a, b, c, d in found]
    query_ends, key_ends = (
        torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32) for sizes in (queries_of, keys_of)
    )

    # where each token is a key: the ranks of equal tokens, after a stable sort, are the columns
    order, counts = np.argsort(keys, kind="stable"), np.bincount(keys, minlength=spans.n)
    column = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    uses = np.full((spans.n, counts.max()), len(keys))
    uses[keys[order], column] = order

    longest = max(queries_of), max(keys_of)
    return Pieces(query_ends, key_ends, torch.from_numpy(keys), torch.from_numpy(uses), longest)
