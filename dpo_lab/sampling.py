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
from dpo_lab.engine.attention import NO_MASK, use_packed_attention
from dpo_lab.engine.cpu import kept_memory, matmuls_by_mkl
from dpo_lab.engine.distributed import gather_shards, is_main, local_shard, parallel_map
from dpo_lab.engine.lm_head import SOFTMAX_ROWS
from dpo_lab.engine.structure import check_fits, check_vocabulary, unwrapped, widest
from dpo_lab.logprobs import Precision, autocast, can_compact, logit_path
from dpo_lab.models import check_cache

# largest length difference, in tokens, of prompts in one batch
MAX_LENGTH_GAP = 16

# tokens per block of the cumulative distribution (`draw`)
BLOCK = 64


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
    """`k` completions of each prompt as token ids, from the whole distribution.

    There is no top-k and no top-p. A completion that ends has its EOS; a truncated one has none.
    The same seed gives the same completions on the same machine, however many processes and threads
    share the batches. Prompts of like length go together, without padding: longer prompts are
    teacher-forced while shorter ones sample.

    Args:
        model: a Hugging Face causal LM.
        prompts: token ids of each prompt, at least one (BOS for an empty text).
        k: completions per prompt.
        eos_token_id: the token that ends a completion, or several (`models.end_tokens`).
        max_new_tokens: completions are truncated at this length.
        temperature: divides the logits; 0 takes the most likely token each time (greedy search).
        seed: of the random numbers.
        rows: completions per batch, at most; by default `rows_on` the device.
        precision: of the computation.
        progress: a name for a progress bar; without it there is none.

    Raises:
        ValueError: a prompt without tokens, or one that with `max_new_tokens` exceeds the model's
            context; a token id outside its vocabulary; a temperature that is negative or not
            finite; `k`, `max_new_tokens` or `rows` below 1; a model that does not continue from its
            cache (`models.check_cache`).
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
    """`sample_completions`, and beside each completion its log-prob in nats.

    At temperature 1 that is what `score_completions` gives, up to rounding: the cache's batches
    have other shapes. At temperature 0 it is 0, since greedy search leaves nothing to chance.
    """
    model, prompts = unwrapped(model), token_lists("prompts", prompts)
    device = next(model.parameters()).device
    rows = rows_on(device) if rows is None else rows
    k, max_new_tokens, rows, temperature = _checked(
        model, prompts, k, max_new_tokens, rows, temperature
    )
    use_packed_attention(model)

    # each batch has a seed of its own, whoever takes it
    batches = _batches_by_length(prompts, k, rows)
    seeds = [seed, *map(int, np.random.SeedSequence(seed).generate_state(len(batches)))]
    mine = local_shard(list(zip(batches, seeds)))

    # no_grad and autocast hold in one thread only
    def continued(item: tuple[list[int], int]) -> list[tuple[list[int], float]]:
        now, own_seed = item
        generator = torch.Generator(device).manual_seed(own_seed)
        batch = [prompts[i] for i in now]
        with torch.no_grad(), autocast(device.type, precision):
            return _sample(model, batch, eos_token_id, max_new_tokens, temperature, generator)

    # by MKL: with so few rows oneDNN fragments the heap (2 GB measured)
    total, quiet = sum(len(now) for now, _ in mine), not (progress and is_main())
    sampled = []
    bar = tqdm(total=total, desc=progress, disable=quiet, unit="completion")
    with bar, matmuls_by_mkl():
        run = parallel_map if device.type == "cpu" else map
        for found in run(continued, mine):
            sampled.append(found)
            bar.update(len(found))

    # back to the order of the prompts
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
    """The numbers of `sample_with_logps` in plain Python.

    Raises:
        ValueError: what cannot be sampled.
    """
    counts = {"k": k, "max_new_tokens": max_new_tokens, "rows": rows}
    for name, value in counts.items():
        counts[name] = integer(name, value)
        if counts[name] < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    temperature = number("temperature", temperature)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature is {temperature}; it must be positive and finite, or 0 for the most "
            "likely token each time"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {i} has no tokens; start it with the BOS token so that its first token "
                "has a context"
            )

    # a model that takes these prompts, is causal, and continues from its cache
    if prompts:
        check_fits(model, max(map(len, prompts)) + counts["max_new_tokens"])
        check_vocabulary(model, [i for prompt in prompts for i in (min(prompt), max(prompt))])
        logit_path(model)
        check_cache(model)
    return *counts.values(), temperature


def _batches_by_length(prompts: list[list[int]], k: int, rows: int) -> list[list[int]]:
    """Each prompt `k` times, by index, in batches of at most `rows` of about the same length."""
    waiting = [i for i in range(len(prompts)) for _ in range(k)]
    waiting.sort(key=lambda i: len(prompts[i]), reverse=True)
    batches: list[list[int]] = []
    while waiting:
        longest = len(prompts[waiting[-1]]) + MAX_LENGTH_GAP
        batch = [waiting.pop()]
        while waiting and len(batch) < rows and len(prompts[waiting[-1]]) <= longest:
            batch.append(waiting.pop())
        batches.append(batch)
    return batches


def _sample(
    model: nn.Module,
    prompts: list[list[int]],
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[tuple[list[int], float]]:
    """Continue each of B prompts: the completion, and its log-prob.

    Rows that are done leave the batch once they are an eighth of it. Asking a GPU means waiting for
    it, so it is asked at every eighth token.
    """
    device = generator.device
    ask_every = 8 if device.type == "cuda" else 1

    # on a GPU without a mask, which transformers would look at
    without_mask = device.type == "cuda" and can_compact(model)

    # texts as far as they are known, (B, room), and where each must end
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, room = min(map(len, prompts)), max(map(len, prompts)) + max_new_tokens
    text = torch.tensor([prompt + [0] * (room - len(prompt)) for prompt in prompts], device=device)
    ends = lengths + max_new_tokens
    logps = torch.zeros(len(prompts), dtype=widest(device), device=device)
    stops = torch.tensor(eos_token_id, device=device)

    # the b rows that are still in the batch, and which of them are done
    rows, done = torch.arange(len(prompts), device=device), torch.zeros_like(ends) > 0

    cache, step = _preallocated_cache(model, room), text[:, :shortest]
    for t in range(shortest, room):
        # a token per row and its probability, (b, 1) each
        ones = None if without_mask else torch.ones(len(step), t, dtype=torch.long, device=device)
        logits = model(
            input_ids=step,
            attention_mask=NO_MASK if ones is None else ones,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        part = SOFTMAX_ROWS if device.type == "cpu" else len(logits)
        drawn = [draw(some, temperature, generator) for some in logits.split(part)]
        step, chance = (torch.cat(parts) for parts in zip(*drawn))

        # a row whose prompt is longer than t reads its own token instead
        reading = t < lengths[rows]
        logps[rows] += chance[:, 0].to(logps.dtype).log().masked_fill(reading | done, 0.0)
        step[:, 0] = torch.where(reading, text[rows, t], step[:, 0])
        text[rows, t] = step[:, 0]

        # done at EOS, or where the row must end
        done = ~reading & (torch.isin(step[:, 0], stops) | (t + 1 == ends[rows]) | done)
        ends[rows] = torch.where(done, ends[rows].clamp(max=t + 1), ends[rows])
        if (t - shortest) % ask_every:
            continue
        if done.all():
            break
        if done.sum() * 8 >= len(done):
            cache.batch_select_indices((~done).nonzero()[:, 0])
            rows, step, done = rows[~done], step[~done], done[~done]

    spans = zip(text.tolist(), lengths.tolist(), ends.tolist())
    return list(zip([row[start:stop] for row, start, stop in spans], logps.tolist()))


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One index per row and its probability, (b, 1) each, for logits (b, V).

    At temperature 0 that is the most likely index, with probability 1. Otherwise the cumulative
    distribution is inverted: first a block, then an index in it. On CPUs a cumulative sum of all V
    costs several times as much as the sums of the blocks, and `torch.multinomial` more.
    """
    if temperature == 0:
        index = logits.argmax(1, keepdim=True)
        return index, torch.ones_like(index, dtype=torch.float32)

    # the largest becomes 0, so that none overflows
    if temperature != 1:
        logits = (logits.float() - logits.amax(1, keepdim=True)) / temperature
    probabilities = torch.softmax(logits, 1, dtype=torch.float32)  # (b, V)

    # (b, V / BLOCK, BLOCK), and the cumulative sums of the blocks, (b, V / BLOCK)
    extra = -logits.shape[1] % BLOCK
    padded = nn.functional.pad(probabilities, (0, extra)) if extra else probabilities
    blocks = padded.unflatten(1, (-1, BLOCK))
    upper = blocks.sum(2).cumsum(1)

    # the block in which the random level lies, then the index in it
    uniform = torch.rand(len(blocks), 1, generator=generator, device=generator.device)
    level = uniform * upper[:, -1:]
    block = first_above(upper, level)
    below = torch.where(block > 0, upper.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(1)
    index = block * BLOCK + first_above(inside, level - below)
    return index, probabilities.gather(1, index)


def first_above(cumulative: Tensor, level: Tensor) -> Tensor:
    """Index (b, 1) of the first of the ascending values (b, n) above `level` (b, 1).

    Rounding may have put `level` at the last value; then it is the first that reaches it.
    """
    last = torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(()))
    return torch.searchsorted(cumulative, torch.minimum(level, last), right=True)


def _preallocated_cache(model: nn.Module, room: int) -> DynamicCache:
    """A key-value cache for `room` tokens; layers of other kinds are transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        PreallocatedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class PreallocatedLayer(DynamicLayer):
    """A layer of the key-value cache that is written in place; nothing is copied."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.seen = room, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        """Add new keys and values, (b, heads, tokens, width) each; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            b, heads, _, width = key_states.shape
            shape = (2, b, heads, self.room, width)
            self.all = torch.empty(shape, dtype=self.dtype, device=self.device)
        before, self.seen = self.seen, self.seen + key_states.shape[2]
        self.all[0, :, :, before : self.seen] = key_states
        self.all[1, :, :, before : self.seen] = value_states
        self.keys, self.values = self.all[..., : self.seen, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.all = self.all[:, indices]
        self.keys, self.values = self.all[..., : self.seen, :]


def texts_of(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], completions: list[list[list[int]]]
) -> list[list[str]]:
    """Prompt and completion as one text, for each completion of each prompt."""
    flat = [[*prompt, *ids] for prompt, row in zip(prompts, completions) for ids in row]
    decoded = iter(tokenizer.batch_decode(flat, skip_special_tokens=True))
    return [[next(decoded) for _ in row] for row in completions]
