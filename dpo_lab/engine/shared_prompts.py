"""Prompts that are read once and kept once, for the K completions that are sampled after each."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dpo_lab.engine.attention import NO_MASK

# tokens of prompts that are read in one pass
READ_TOKENS = 2_048

# tokens of a pass from which it ends at a prompt that is longer by more than so many
ENOUGH, GAP = 128, 16

# rows of keys begin where a cache line does
ALIGNED = 16


@dataclass(frozen=True)
class SharedPrompts:
    """Keys and values of P prompts, which the K rows of each look back at."""

    keys: list[Tensor]
    """of each layer, (P, G, D, L) for G heads of width D, ready to be multiplied by queries"""
    values: list[Tensor]
    """of each layer, (P, G, L, D)"""
    hidden: Tensor | None
    """(P, 1, 1, L): -inf behind the end of a shorter prompt, else 0; None if all are as long"""
    k: int
    """rows per prompt"""

    def attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attention of one query per row to its prompt and to the row's own t keys, (R, 1, H, D).

        One softmax goes over the weights of both. R = P K rows; query (R, H, 1, D), key and value
        (R, G, t, D).
        """
        prompts, heads = len(self.keys[layer]), key.shape[1]
        query = query.unflatten(1, (heads, -1))[..., 0, :] * scaling  # (R, G, H / G, D)
        sizes = (prompts, self.k)

        # the K queries of a prompt in one product, (P, G, K H / G, L)
        together = query.unflatten(0, sizes).transpose(1, 2).flatten(2, 3)
        to_prompt = together @ self.keys[layer]
        if self.hidden is not None:
            to_prompt = to_prompt + self.hidden
        to_own = (query @ key.mT).unflatten(0, sizes).transpose(1, 2).flatten(2, 3)

        both = torch.cat([to_prompt, to_own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        to_prompt, to_own = both.split([to_prompt.shape[-1], to_own.shape[-1]], -1)

        # back to rows, (R, G, H / G, D)
        groups = (self.k, query.shape[2])
        prompt_part = (to_prompt @ self.values[layer]).unflatten(2, groups).transpose(1, 2)
        own_weights = to_own.unflatten(2, groups).transpose(1, 2).flatten(0, 1)
        out = prompt_part.flatten(0, 1) + own_weights @ value
        return out.flatten(1, 2)[:, None]

    def select(self, prompts: Tensor) -> "SharedPrompts":
        """These prompts alone."""
        return SharedPrompts(
            [keys[prompts] for keys in self.keys],
            [values[prompts] for values in self.values],
            None if self.hidden is None else self.hidden[prompts],
            self.k,
        )


def read_prompts(model: nn.Module, prompts: list[list[int]], k: int) -> SharedPrompts:
    """Keys and values of P prompts, each read once.

    Prompts of about the same length go together, padded at the right, which no token before sees.

    Args:
        model: one that computes attention by `packed_attention`.
        prompts: token ids; an empty prompt is one that nothing is seen of.
        k: rows that will look back at each prompt.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = -(-max(1, *map(len, prompts)) // ALIGNED) * ALIGNED
    keys: list[Tensor] = []
    values: list[Tensor] = []

    for part in _parts(prompts):
        # (b, l) ids and their keys and values in every layer
        width = max(1, *(len(prompts[i]) for i in part))
        ids = [prompts[i] + [0] * (width - len(prompts[i])) for i in part]
        cache = DynamicCache(config=model.config)
        model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=NO_MASK,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

        # to their places; the rest is zero, as what no weight falls on must be finite
        places = torch.tensor(part, device=device)
        for n, layer in enumerate(cache.layers):
            if n == len(keys):
                _, heads, _, size = layer.keys.shape
                keys.append(layer.keys.new_zeros(len(prompts), heads, size, longest))
                values.append(layer.values.new_zeros(len(prompts), heads, longest, size))
            keys[n][places, ..., :width] = layer.keys.mT
            values[n][places, :, :width] = layer.values

    hidden = None
    if min(map(len, prompts)) < longest:
        behind = torch.arange(longest, device=device) >= lengths[:, None]
        hidden = torch.zeros(behind.shape, dtype=keys[0].dtype, device=device)
        hidden = hidden.masked_fill(behind, -torch.inf)[:, None, None]
    return SharedPrompts(keys, values, hidden, k)


def _parts(prompts: list[list[int]]) -> list[list[int]]:
    """The prompts, by index, in parts of like length and of `ENOUGH` to `READ_TOKENS` tokens."""
    parts: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        length = len(prompts[i])
        if parts:
            shortest, n = len(prompts[parts[-1][0]]), len(parts[-1])
            full = (n + 1) * length > READ_TOKENS
            unlike = length > shortest + GAP and n * shortest >= ENOUGH
        if not parts or full or unlike:
            parts.append([])
        parts[-1].append(i)
    return parts
