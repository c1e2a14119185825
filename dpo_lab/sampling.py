"""Draw completions from a language model, with a key-value cache that is allocated once."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from dpo_lab.batching import Tokens
from dpo_lab.engine.arguments import checked, integer, number, token_lists
from dpo_lab.engine.attention import NO_MASK
from dpo_lab.engine.cpu import kept_memory, matmuls_by_mkl
from dpo_lab.engine.distributed import gather_shards, is_main, local_shard, parallel_map
from dpo_lab.engine.lm_head import SOFTMAX_ROWS
from dpo_lab.engine.structure import check_fits, check_vocabulary, unwrapped, widest
from dpo_lab.logprobs import Precision, autocast, can_compact, logit_path, use_packed_attention
from dpo_lab.models import check_cache


@checked
def sample_completions(
    model: nn.Module,
    prompts: Tokens,
    k: int,
    *,
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int | None = None,
    precision: Precision = "float32",
    progress: str | None = None,
) -> list[list[list[int]]]:
    """`k` completions of each prompt as token ids, sampled from the whole distribution (no top-k, no top-p).

    A completion that ends has its EOS (`eos_token_id`, or one of several: `models.end_tokens`); one that reaches
    `max_new_tokens` has none. Prompts of similar length go together,
    without padding: the longer ones read their own tokens where the others already sample. The same seed gives the same
    completions on the same machine, however many processes and threads share the batches, of up to `rows` completions (by
    default `rows_on` the device).
    `temperature` divides the logits; 0 takes the likeliest token each time (greedy search).

    Raises:
        ValueError: a prompt without tokens, or one that with `max_new_tokens` exceeds the model's context; a token id outside
            its vocabulary; a temperature that is negative or not finite; `k`, `max_new_tokens` or `rows` below 1; a model that
            does not continue from its cache (`models.check_cache`).
    """
    completions, _ = sample_with_logps(
        model,
        prompts,
        k,
        eos_token_id=eos_token_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        rows=rows,
        precision=precision,
        progress=progress,
    )
    return completions


@checked
@kept_memory()
def sample_with_logps(
    model: nn.Module,
    prompts: Tokens,
    k: int,
    *,
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int | None = None,
    precision: Precision = "float32",
    progress: str | None = None,
) -> tuple[list[list[list[int]]], list[list[float]]]:
    """`sample_completions`, and beside each completion its log-prob in nats, under the distribution that it was drawn from.

    At temperature 1 that is what `score_completions` gives, up to rounding: the cache's batches have other shapes. At
    temperature 0 it is 0, for greedy search leaves nothing to chance.
    """
    model, prompts = unwrapped(model), token_lists("prompts", prompts)
    device = next(model.parameters()).device
    rows = rows_on(device) if rows is None else rows
    k, max_new_tokens, rows, temperature = _checked(
        model, prompts, k, max_new_tokens, rows, temperature
    )
    use_packed_attention(model)
    waiting = sorted(
        (i for i in range(len(prompts)) for _ in range(k)),
        key=lambda i: len(prompts[i]),
        reverse=True,
    )
    batches: list[list[int]] = []
    while waiting:
        longest = len(prompts[waiting[-1]]) + MAX_LENGTH_GAP
        batches.append([waiting.pop()])
        while waiting and len(batches[-1]) < rows and len(prompts[waiting[-1]]) <= longest:
            batches[-1].append(waiting.pop())
    seeds = [
        seed,
        *map(int, np.random.SeedSequence(seed).generate_state(len(batches))),
    ]  # a batch's own, whoever takes it
    mine = local_shard(list(zip(batches, seeds)))

    def continued(item: tuple[list[int], int]) -> list[tuple[list[int], float]]:
        now, own = item
        generator = torch.Generator(device).manual_seed(own)
        with torch.no_grad(), autocast(device.type, precision):  # which hold in one thread
            return _sample(
                model,
                [prompts[i] for i in now],
                eos_token_id,
                max_new_tokens,
                temperature,
                generator,
            )

    sampled = []
    bar = tqdm(
        total=sum(len(now) for now, _ in mine),
        desc=progress,
        disable=not (progress and is_main()),
        unit="completion",
    )
    with bar, matmuls_by_mkl():  # oneDNN's of so few rows leave gaps in the heap that came to 2 GB
        for found in (
            parallel_map(continued, mine) if device.type == "cpu" else map(continued, mine)
        ):
            sampled.append(found)
            bar.update(len(found))
    completions: list[list[list[int]]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    for now, found in zip(batches, gather_shards(sampled)):
        for i, (tokens, logp) in zip(now, found):
            completions[i].append(tokens)
            logps[i].append(logp)
    return completions, logps


def rows_on(device: torch.device) -> int:
    """Completions that are sampled at a time unless another number is asked for."""
    return 1_024 if device.type == "cuda" else 256


def _checked(
    model: nn.Module,
    prompts: list[list[int]],
    k: int,
    max_new_tokens: int,
    rows: int,
    temperature: float,
) -> tuple[int, int, int, float]:
    """The numbers of `sample_with_logps` in plain Python. Raises ValueError for what cannot be sampled."""
    counts = {"k": k, "max_new_tokens": max_new_tokens, "rows": rows}
    for name, value in counts.items():
        counts[name] = integer(name, value)
        if counts[name] < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    temperature = number("temperature", temperature)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature is {temperature}; it must be positive and finite, or 0 for the likeliest token each time"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {i} has no tokens; start it with the BOS token so that its first token has a context"
            )
    if prompts:
        check_fits(model, max(map(len, prompts)) + counts["max_new_tokens"])
        check_vocabulary(model, [i for prompt in prompts for i in (min(prompt), max(prompt))])
        logit_path(model)  # or an error where a token depends on later ones
        check_cache(model)
    return *counts.values(), temperature


MAX_LENGTH_GAP = (
    16  # tokens by which prompts in one batch may differ: those that are read one by one
)


def _sample(
    model: nn.Module,
    prompts: list[list[int]],
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[tuple[list[int], float]]:
    """Continue each prompt by up to `max_new_tokens`: the completion, and its log-prob.

    Rows that are done leave the batch when they are an eighth of it. A GPU, which must be waited for to know, is asked at every
    eighth token.
    """
    device, every = generator.device, 8 if generator.device.type == "cuda" else 1
    packed = device.type == "cuda" and can_compact(
        model
    )  # whose attention needs no mask, which transformers would look at
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    end = longest + max_new_tokens
    text = torch.tensor(
        [prompt + [0] * (end - len(prompt)) for prompt in prompts], device=device
    )  # (B, end)
    ends = lengths + max_new_tokens  # (B,)
    logps = torch.zeros(len(prompts), dtype=widest(device), device=device)
    stops = torch.tensor(eos_token_id, device=device)
    cache, rows, done = (
        DynamicCache(config=model.config),
        torch.arange(len(prompts), device=device),
        torch.zeros_like(ends) > 0,
    )
    cache.layers = [
        PreallocatedLayer(end) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    step = text[:, :shortest]
    for t in range(shortest, end):
        mask = NO_MASK if packed else torch.ones(len(step), t, dtype=torch.long, device=device)
        logits = model(
            input_ids=step,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        part = SOFTMAX_ROWS if device.type == "cpu" else len(logits)
        drawn = [_draw(some, temperature, generator) for some in logits[:, -1].split(part)]
        step, chance = (torch.cat(parts) for parts in zip(*drawn))  # (b, 1) each
        read = t < lengths[rows]
        logps[rows] += chance[:, 0].to(logps.dtype).log().masked_fill(read | done, 0.0)
        step[:, 0] = torch.where(read, text[rows, t], step[:, 0])
        text[rows, t] = step[:, 0]
        done = ~read & (torch.isin(step[:, 0], stops) | (t + 1 == ends[rows]) | done)
        ends[rows] = torch.where(done, ends[rows].clamp(max=t + 1), ends[rows])
        if (t - shortest) % every:
            continue
        if done.all():
            break
        if done.sum() * 8 >= len(done):
            cache.batch_select_indices((~done).nonzero()[:, 0])
            rows, step, done = rows[~done], step[~done], done[~done]
    ids = [
        row[start:stop] for row, start, stop in zip(text.tolist(), lengths.tolist(), ends.tolist())
    ]
    return list(zip(ids, logps.tolist()))


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One index a row and its probability, (b, 1) each, for logits (b, V); at temperature 0 the likeliest, with probability 1.

    By the inverse of the cumulative distribution: first a block, then in it. On CPUs a cumulative sum of all V costs several
    times as much as the sums of the blocks, and `torch.multinomial` more.
    """
    if temperature == 0:
        index = logits.argmax(1, keepdim=True)
        return index, torch.ones_like(index, dtype=torch.float32)
    if temperature != 1:
        logits = (
            logits.float() - logits.amax(1, keepdim=True)
        ) / temperature  # the largest is 0, so that none overflows
    probabilities = torch.softmax(logits, 1, dtype=torch.float32)  # (b, V)
    padded = (
        nn.functional.pad(probabilities, (0, extra))
        if (extra := -logits.shape[1] % BLOCK)
        else probabilities
    )
    blocks = padded.unflatten(1, (-1, BLOCK))  # (b, V / BLOCK, BLOCK)
    upper = blocks.sum(2).cumsum(1)  # (b, V / BLOCK)
    uniform = (
        torch.rand(len(blocks), 1, generator=generator, device=generator.device) * upper[:, -1:]
    )
    block = _first_above(upper, uniform)
    below = torch.where(block > 0, upper.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(1)  # (b, BLOCK)
    index = block * BLOCK + _first_above(inside, uniform - below)
    return index, probabilities.gather(1, index)


def _first_above(cumulative: Tensor, level: Tensor) -> Tensor:
    """Index (b, 1) of the first of the ascending values (b, n) above `level` (b, 1), which rounding may have put at the last."""
    last = torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(()))
    return torch.searchsorted(cumulative, torch.minimum(level, last), right=True)


BLOCK = 64  # tokens


class PreallocatedLayer(DynamicLayer):
    """A cache layer with room for all that will come: a new token is written into it, and nothing is copied."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.seen = room, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            b, heads, _, width = key_states.shape
            self.all = torch.empty(
                2, b, heads, self.room, width, dtype=self.dtype, device=self.device
            )
        before, self.seen = self.seen, self.seen + key_states.shape[2]
        self.all[0, :, :, before : self.seen], self.all[1, :, :, before : self.seen] = (
            key_states,
            value_states,
        )
        self.keys, self.values = self.all[..., : self.seen, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.all = self.all[:, indices]
        self.keys, self.values = self.all[..., : self.seen, :]


def texts_of(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], completions: list[list[list[int]]]
) -> list[list[str]]:
    """Prompt and completion as one text, for each of the completions of each prompt."""
    flat = [[*prompt, *ids] for prompt, row in zip(prompts, completions) for ids in row]
    decoded = iter(tokenizer.batch_decode(flat, skip_special_tokens=True))
    return [[next(decoded) for _ in row] for row in completions]
