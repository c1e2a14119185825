"""Draw completions from a language model, with a key-value cache that is allocated once."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

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
from dpo_lab.engine.prepacked import prepacked_weights
from dpo_lab.engine.shared_prompts import read_prompts
from dpo_lab.engine.structure import check_fits, check_vocabulary, unwrapped, widest
from dpo_lab.logprobs import Precision, autocast, can_compact, logit_path
from dpo_lab.models import check_cache

# largest length difference, in tokens, of prompts in one batch
MAX_LENGTH_GAP = 16

# tokens; prompts that are longer are read once for all their completions
SHORT_PROMPT = 32

# tokens of prompts whose keys and values a batch keeps
KEPT_TOKENS = 16_384

# tokens per completion from which it pays to copy the weights into another layout
PREPACKING_PAYS = 16

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
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: int | None = None,
    precision: Precision = "float32",
    progress: str | None = None,
) -> list[list[list[int]]]:
    """`k` completions of each prompt as token ids, by default from the whole distribution.

    A completion that ends has its EOS; a truncated one has none. The same seed gives the same
    completions on the same machine, however many processes and threads share the batches. Prompts
    of like length go together, without padding: longer prompts are teacher-forced while shorter
    ones sample. Where a prompt is longer than `SHORT_PROMPT` tokens and the model allows it
    (`can_compact`), each prompt is read once for its `k` completions, which share its keys and
    values.

    Args:
        model: a Hugging Face causal LM.
        prompts: token ids of each prompt, at least one (BOS for an empty text).
        k: completions per prompt.
        eos_token_id: the token that ends a completion, or several (`models.end_tokens`).
        max_new_tokens: completions are truncated at this length.
        temperature: divides the logits; 0 takes the most likely token each time (greedy search).
        top_k: draw among the k most likely tokens alone; 0 for all of them.
        top_p: draw among the most likely tokens that reach this probability together, the fewest
            that do (nucleus sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751); 1
            for all of them. It is applied after `temperature` and `top_k`.
        seed: of the random numbers.
        rows: completions per batch, at most; by default what `rows_on` gives.
        precision: of the computation.
        progress: a name for a progress bar; without it there is none.

    Raises:
        ValueError: a prompt without tokens, or one that with `max_new_tokens` exceeds the model's
            context; a token id outside its vocabulary; a temperature that is negative or not
            finite; `k`, `max_new_tokens` or `rows` below 1; `top_k` below 0 or `top_p` not in
            (0, 1]; a model that does not continue from its cache (`models.check_cache`).
    """
    completions, _ = sample_with_logps(
        model,
        prompts,
        k,
        eos_token_id=eos_token_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
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
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: int | None = None,
    precision: Precision = "float32",
    progress: str | None = None,
) -> tuple[list[list[list[int]]], list[list[float]]]:
    """`sample_completions`, and beside each completion its log-prob in nats.

    It is the log-prob under the distribution that was drawn from. At temperature 1 that is what
    `score_completions` gives, up to rounding: the cache's batches have other shapes. With `top_k`
    or `top_p` it is larger, since the tokens that are left share all probability, and it must not
    stand for the model's log-prob. At temperature 0 it is 0, since greedy search leaves nothing to
    chance.
    """
    model, prompts = unwrapped(model), token_lists("prompts", prompts)
    device = next(model.parameters()).device
    shared = reads_once(model, prompts)
    k, max_new_tokens, rows = _checked(model, prompts, k, max_new_tokens, rows)
    if rows is None:
        rows = rows_on(device, len(prompts) * k if shared else None)
    drawing = Drawing(temperature, top_k, top_p)
    use_packed_attention(model)

    # each batch has a seed of its own, whoever takes it
    batches = _batches_by_prompt(prompts, k, rows) if shared else _batches(prompts, k, rows)
    seeds = [seed, *map(int, np.random.SeedSequence(seed).generate_state(len(batches)))]
    mine = local_shard(list(zip(batches, seeds)))

    # no_grad and autocast hold in one thread only
    def continued(item: tuple[list[int], int]) -> list[tuple[list[int], float]]:
        now, own_seed = item
        generator = torch.Generator(device).manual_seed(own_seed)
        batch = [prompts[i] for i in now]
        with torch.no_grad(), autocast(device.type, precision):
            if shared:
                reader: Reads | ReadsOnce = ReadsOnce(model, batch, now.count(now[0]))
            else:
                reader = Reads(model)
            return _sample(reader, batch, eos_token_id, max_new_tokens, drawing, generator)

    # attention, and weights that are not copied, by MKL: with so few rows oneDNN fragments the heap
    total, quiet = sum(len(now) for now, _ in mine), not (progress and is_main())
    sampled = []
    bar = tqdm(total=total, desc=progress, disable=quiet, unit="completion")
    copied = prepacked_weights(model) if max_new_tokens >= PREPACKING_PAYS else nullcontext()
    with bar, matmuls_by_mkl(), autocast(device.type, precision), copied:
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


def reads_once(model: nn.Module, prompts: list[list[int]]) -> bool:
    """Whether each prompt is read once for all its completions, and not once for each."""
    return max(map(len, prompts), default=0) > SHORT_PROMPT and can_compact(model)


def rows_on(device: torch.device, shared: int | None = None) -> int:
    """Completions that are sampled at a time unless another number is asked for.

    On a CPU each thread takes a batch. So where prompts are read once for all their completions,
    of which there are `shared` in all, they are at least four batches, unless those are small.
    """
    if device.type == "cuda":
        return 1_024
    return 256 if shared is None else min(256, max(64, shared // 4))


@dataclass(frozen=True)
class Drawing:
    """How a token is drawn from the model's distribution.

    Raises:
        ValueError, TypeError: a value that is not allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature, top_k = number("temperature", self.temperature), integer("top_k", self.top_k)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(
                f"temperature is {temperature}; it must be positive and finite, or 0 for the most "
                "likely token each time"
            )
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < (top_p := number("top_p", self.top_p)) <= 1:
            raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1, for all tokens")


def _checked(
    model: nn.Module, prompts: list[list[int]], k: int, max_new_tokens: int, rows: int | None
) -> tuple[int, int, int | None]:
    """The numbers of `sample_with_logps` in plain Python.

    Raises:
        ValueError: what cannot be sampled.
    """
    counts = {"k": k, "max_new_tokens": max_new_tokens}
    if rows is not None:
        counts["rows"] = rows
    for name, value in counts.items():
        counts[name] = integer(name, value)
        if counts[name] < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
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
    return counts["k"], counts["max_new_tokens"], counts.get("rows")


def _batches(prompts: list[list[int]], k: int, rows: int) -> list[list[int]]:
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


def _batches_by_prompt(prompts: list[list[int]], k: int, rows: int) -> list[list[int]]:
    """Each prompt `k` times, by index, in batches that hold equally many rows of each, one by one.

    Prompts go by length. A batch has at most `rows` rows, and `KEPT_TOKENS` tokens of prompts or a
    single prompt.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    most = min(k, rows)
    parts = [min(most, k - begun) for begun in range(0, k, most)]

    batches: list[list[int]] = []
    for part in parts:
        batch: list[int] = []
        for i in by_length:
            places = len(batch) // part + 1
            if batch and (places * part > rows or places * len(prompts[i]) > KEPT_TOKENS):
                batches.append(batch)
                batch = []
            batch += [i] * part
        batches.append(batch)
    return batches


def _sample(
    reader: "Reads | ReadsOnce",
    prompts: list[list[int]],
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    drawing: Drawing,
    generator: torch.Generator,
) -> list[tuple[list[int], float]]:
    """Continue each of B prompts: the completion, and its log-prob.

    Rows that are done leave the batch once they are an eighth of it. Asking a GPU means waiting for
    it, so it is asked at every eighth token.
    """
    device = generator.device
    ask_every = 8 if device.type == "cuda" else 1

    # texts as far as they are known, (B, room), and where each must end
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    room = max(map(len, prompts)) + max_new_tokens
    text = torch.tensor([prompt + [0] * (room - len(prompt)) for prompt in prompts], device=device)
    ends = lengths + max_new_tokens
    logps = torch.zeros(len(prompts), dtype=widest(device), device=device)
    stops = torch.tensor(eos_token_id, device=device)

    # the b rows that are still in the batch, and which of them are done
    rows, done = torch.arange(len(prompts), device=device), torch.zeros_like(ends) > 0

    start, step = reader.begin(text, lengths, max_new_tokens)
    for j in range(int((ends - start).max())):
        # a token per row and its probability, (b, 1) each
        place = start[rows] + j
        logits = reader.logits(step, place)
        part = SOFTMAX_ROWS if device.type == "cpu" else len(logits)
        drawn = [draw(some, drawing, generator) for some in logits.split(part)]
        step, chance = (torch.cat(parts) for parts in zip(*drawn))

        # a row whose prompt is longer reads its own token instead
        reading = place < lengths[rows]
        logps[rows] += chance[:, 0].to(logps.dtype).log().masked_fill(reading | done, 0.0)
        step[:, 0] = torch.where(reading, text[rows, place], step[:, 0])
        text[rows, place] = step[:, 0]

        # done at EOS, or where the row must end
        done = ~reading & (torch.isin(step[:, 0], stops) | (place + 1 == ends[rows]) | done)
        ends[rows] = torch.where(done, torch.minimum(ends[rows], place + 1), ends[rows])
        if j % ask_every:
            continue
        if done.all():
            break
        leaving = reader.may_leave(done)
        if leaving.sum() * 8 >= len(leaving):
            reader.keep(~leaving)
            rows, step, done = rows[~leaving], step[~leaving], done[~leaving]

    spans = zip(text.tolist(), lengths.tolist(), ends.tolist())
    return list(zip([row[start:stop] for row, start, stop in spans], logps.tolist()))


class Reads:
    """A model that reads the prompt of each row: all begin together, the longer ones read on."""

    def __init__(self, model: nn.Module):
        self.model = model

        # on a GPU without a mask, which transformers would look at
        self.without_mask = model.device.type == "cuda" and can_compact(model)

    def begin(self, text: Tensor, lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Where each row begins to draw or read on, (B,), and the tokens to read first, (B, l)."""
        self.cache = _preallocated_cache(self.model, text.shape[1])
        shortest = int(lengths.min())
        return torch.full_like(lengths, shortest), text[:, :shortest]

    def logits(self, step: Tensor, place: Tensor) -> Tensor:
        """Logits of the tokens at `place` (b,) after reading `step` (b, l), as (b, V)."""
        seen = (len(step), self.cache.get_seq_length() + step.shape[1])
        ones = None if self.without_mask else torch.ones(seen, dtype=torch.long, device=step.device)
        return self.model(
            input_ids=step,
            attention_mask=NO_MASK if ones is None else ones,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def may_leave(self, done: Tensor) -> Tensor:
        """Which rows (b,) may leave the batch: those that are done."""
        return done

    def keep(self, kept: Tensor) -> None:
        """Go on with these rows (b,) alone."""
        self.cache.batch_select_indices(kept.nonzero()[:, 0])


class ReadsOnce:
    """A model that reads each of P prompts once, for the `k` rows that follow it.

    The last token of a prompt is read by its rows, whose own keys begin with it.
    """

    def __init__(self, model: nn.Module, prompts: list[list[int]], k: int):
        self.model, self.k = model, k
        self.shared = read_prompts(model, [prompt[:-1] for prompt in prompts[::k]], k)

    def begin(self, text: Tensor, lengths: Tensor, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Where each row begins to draw, (B,), and the last tokens of the prompts, (B, 1)."""
        self.cache = _preallocated_cache(self.model, max_new_tokens)
        return lengths, text.gather(1, lengths[:, None] - 1)

    def logits(self, step: Tensor, place: Tensor) -> Tensor:
        """Logits of the tokens at `place` (b,) after reading `step` (b, 1), as (b, V)."""
        return self.model(
            input_ids=step,
            position_ids=place[:, None] - 1,
            attention_mask=NO_MASK,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            shared=self.shared,
        ).logits[:, -1]

    def may_leave(self, done: Tensor) -> Tensor:
        """Which rows (b,) may leave the batch: those of prompts all of whose rows are done."""
        return done.view(-1, self.k).all(1).repeat_interleave(self.k)

    def keep(self, kept: Tensor) -> None:
        """Go on with these rows (b,) alone."""
        self.cache.batch_select_indices(kept.nonzero()[:, 0])
        self.shared = self.shared.select(kept[:: self.k].nonzero()[:, 0])


def draw(logits: Tensor, drawing: Drawing, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One index per row and its probability, (b, 1) each, for logits (b, V).

    At temperature 0 that is the most likely index, with probability 1. Otherwise the cumulative
    distribution is inverted: first a block, then an index in it. On CPUs a cumulative sum of all V
    costs several times as much as the sums of the blocks, and `torch.multinomial` more.
    """
    temperature = drawing.temperature
    if temperature == 0:
        index = logits.argmax(1, keepdim=True)
        return index, torch.ones_like(index, dtype=torch.float32)

    # the largest becomes 0, so that none overflows
    if temperature != 1:
        logits = (logits.float() - logits.amax(1, keepdim=True)) / temperature
    probabilities = torch.softmax(logits, 1, dtype=torch.float32)  # (b, V)
    if drawing.top_k or drawing.top_p < 1:
        probabilities = _most_likely(probabilities, drawing)

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


def _most_likely(probabilities: Tensor, drawing: Drawing) -> Tensor:
    """Probabilities (b, V) of the tokens that are drawn from, and 0 for the others.

    Tokens of equal probability go by their index.
    """
    ordered, index = probabilities.sort(dim=1, descending=True, stable=True)
    if drawing.top_k:
        ordered[:, drawing.top_k :] = 0.0
    ordered = ordered / ordered.sum(1, keepdim=True)

    # a token is kept where those before it do not reach top_p yet
    before = ordered.cumsum(1) - ordered
    ordered = ordered.masked_fill(before >= drawing.top_p, 0.0) if drawing.top_p < 1 else ordered
    kept = torch.zeros_like(probabilities).scatter_(1, index, ordered)
    return kept / kept.sum(1, keepdim=True)


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
