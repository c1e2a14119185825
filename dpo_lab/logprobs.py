"""Log-probabilities of completions under a causal language model: exact, and frugal with memory.

Everything that needs log pi(y|x) calls this file: DPO, SFT, the sequence KL, evaluation. Three
things keep it lean (docs/speed.md): the LM head is applied only where it predicts a completion
token; logits exist for one chunk of positions at a time; a prompt is computed once for all its
completions, and padding not at all, where that saves work.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dpo_lab.batching import (
    CompletionBatch,
    Tokens,
    allowed,
    check_tokens,
    completion_batch,
    rows_by_prompt,
    sharing_pays,
)
from dpo_lab.engine.arguments import checked, finite_positive
from dpo_lab.engine.attention import (
    NO_MASK,
    PACKED,
    shares_prompts,
    takes_pieces,
    use_packed_attention,
)
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn, tune_backward
from dpo_lab.engine.distributed import gather_shards, is_main, local_shard
from dpo_lab.engine.lm_head import token_logps
from dpo_lab.engine.prompt_rows import LONG_ROW, longest_row, prompt_rows
from dpo_lab.engine.structure import (
    after_head,
    beside_modules,
    check_fits,
    check_vocabulary,
    context_of,
    evaluating,
    name_of,
    structure,
    touched,
    unwrapped,
    widest,
)

# of the computation: weights and sums of log-probs stay float32 or wider
Precision = Literal["float32", "bfloat16"]

# see `logit_path`
LogitPath = Literal["weights", "head", "forward"]

# logits divided by a smaller temperature overflow in float32
LEAST_TEMPERATURE = 1e-30

# attribute of a model, which its copies have too: the structure that was compared, and its path
KNOWN = "_dpo_lab_path"

UNSHARED = (
    "the batch shares prompts or packs rows, which {} does not allow; make it with "
    "compact=can_compact(model)"
)


@checked
def autocast(device: str, precision: Precision) -> torch.autocast:
    """The context in which a forward pass computes in `precision`; `device` is torch's type."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def can_compact(model: nn.Module) -> bool:
    """Whether `completion_batch(..., compact=True)` is exact for this model."""
    model = unwrapped(model)
    return shares_prompts(model) and logit_path(model) != "forward"


# log-probs of a batch


def completion_logps(
    model: nn.Module,
    batch: CompletionBatch,
    *,
    reduction: Literal["sum", "mean", "none"] = "sum",
    temperature: float = 1.0,
) -> Tensor:
    """log pi(completion | prompt) of each completion, (N,) nats, float64.

    Differentiable with respect to the model's parameters. Token log-probs are computed in float32
    or better and summed in float64 (float32 where the device has no float64): a float32 sum near
    -700 is off by up to 8e-4. A model that `can_compact` prompts computes attention by
    `packed_attention` from then on, which is sdpa for its other callers.

    Args:
        model: a Hugging Face causal LM. Its mode is yours to set: dropout changes the result.
        batch: from `completion_batch`, on the model's device; compact only if `can_compact(model)`.
        reduction: "sum" over tokens, as DPO defines it; "mean" divides by the number of tokens,
            which removes the length from the implicit reward and is another objective (IPO on
            means, SimPO); "none" gives the log-prob of each token, (T,).
        temperature: divides the logits, as in sampling at that temperature; positive, since a
            greedy choice has no log-prob.

    Raises:
        ValueError: `reduction` or `temperature` is not allowed; a token id is outside the
            vocabulary; a row is longer than the model's context; the batch is compact and the model
            does not allow it; or the model has no log-probs (`logit_path`).
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(
            f"reduction is {reduction!r}; it must be 'sum' (DPO), 'mean' (length-normalized) or "
            "'none'"
        )
    temperature = _checked_temperature(temperature)
    model = unwrapped(model)
    _check_batch(model, batch, unread=1)

    path = logit_path(model)
    with matmuls_by_onednn(batch.input_ids.device.type):
        tokens = _path_logps(model, batch, path, temperature)  # (T,)
    tune_backward(tokens)

    wide = tokens.to(widest(tokens.device))
    if reduction == "none":
        return wide
    sums = _sum_by_completion(wide, batch)
    return sums / torch.bincount(batch.owners, minlength=batch.n) if reduction == "mean" else sums


class Scorer(nn.Module):
    """`completion_logps` for a training loop: the model is looked at once, not at every step.

    The loop itself chooses the matmul backend, and keeps memory (engine/cpu.py).
    """

    @checked
    def __init__(self, model: nn.Module, precision: Precision = "float32"):
        super().__init__()
        self.model = model = unwrapped(model)
        self.precision, self.path = precision, logit_path(model)
        embedding = model.get_input_embeddings().weight
        self.context, self.vocabulary = context_of(model), len(embedding)
        self.wide = widest(embedding.device)

    def forward(self, batch: CompletionBatch) -> Tensor:
        """log pi(completion | prompt) of each completion, (N,) nats."""
        lowest, highest = batch.ids
        if batch.longest > self.context or lowest < 0 or highest >= self.vocabulary:
            _check_batch(self.model, batch, unread=1)
        half = self.precision == "bfloat16"
        with torch.autocast(batch.sources.device.type, torch.bfloat16, enabled=half):
            tokens = _path_logps(self.model, batch, self.path)  # (T,)
            return _sum_by_completion(tokens.to(self.wide), batch)


def completion_states(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The last hidden state before each completion token, (T, D): what predicts the token.

    Raises:
        ValueError: as `completion_logps`; or the decoder alone is not the model, as with prompt and
            prefix tuning.
    """
    model = unwrapped(model)
    _check_batch(model, batch, unread=0)
    logit_path(model)
    if beside_modules(model):
        raise ValueError(
            f"{name_of(model)} puts virtual tokens before the text, or has adapters that tokens "
            "invoke, so the states of its decoder are not its own; give the model without them, or "
            "with LoRA"
        )
    with matmuls_by_onednn(batch.input_ids.device.type):
        states = _states(model, batch)
    tune_backward(states)
    return states


def _checked_temperature(temperature: float) -> float:
    found = finite_positive("temperature", temperature)
    if found < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature is {found}; logits that it divides overflow, so it must be at least "
            f"{LEAST_TEMPERATURE}"
        )
    return found


def _check_batch(model: nn.Module, batch: CompletionBatch, unread: int) -> None:
    """Raise ValueError for rows that are too long for the model, or tokens that it does not know.

    `unread` tokens follow the last position of each row.
    """
    check_fits(model, batch.longest - 1 + unread)
    check_vocabulary(model, batch.ids)


def _sum_by_completion(tokens: Tensor, batch: CompletionBatch) -> Tensor:
    """Sums of token log-probs (T,) over each completion, (N,)."""
    # on a GPU index_add takes any order
    if tokens.device.type == "cuda":
        table = tokens.new_zeros(batch.n, batch.longest_completion)
        return table.index_put((batch.owners, batch.places), tokens).sum(1)
    return tokens.new_zeros(batch.n).index_add(0, batch.owners, tokens)


def _path_logps(
    model: nn.Module, batch: CompletionBatch, path: LogitPath, temperature: float = 1.0
) -> Tensor:
    """The log-prob of each completion token, (T,), float32 or better."""
    head = model.get_output_embeddings()
    if path == "weights":
        weight, bias = head.weight, head.bias
        if temperature != 1:
            weight, bias = weight / temperature, None if bias is None else bias / temperature
        return token_logps(_states(model, batch), weight, bias, batch.targets)

    # (T, V)
    logits = head(_states(model, batch)) if path == "head" else _own_logits(model, batch)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return torch.log_softmax(wide, 1).gather(1, batch.targets[:, None])[:, 0]


def _own_logits(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The logits before each completion token, (T, V), by the model's own forward."""
    if batch.segments is not None or batch.rows:
        raise ValueError(UNSHARED.format(name_of(model)))
    found = model(
        input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), use_cache=False
    ).logits

    # virtual tokens come first
    logits = found[:, -batch.input_ids.shape[1] :]
    return logits.flatten(0, 1).index_select(0, batch.sources)


def _states(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The decoder's last hidden state before each completion token, (T, D)."""
    packed = model.config._attn_implementation == PACKED or use_packed_attention(model)
    if not packed and (batch.segments is not None or batch.rows):
        raise ValueError(UNSHARED.format(name_of(model)))

    # How tokens see each other. Plain rows need no mask: attention is causal, and padding comes
    # last; other models than those with our attention get a mask of ones.
    mask, options = NO_MASK, {"may_switch_backend": True}
    if not packed:
        mask, options = torch.ones_like(batch.input_ids), {}
    elif batch.input_ids.is_cuda and takes_pieces(model, batch.input_ids.device):
        options["pieces"] = batch.pieces
    elif goes_part_by_part(model, batch):
        options["prompt_rows"] = prompt_rows(batch.spans, batch.input_ids.shape[1])
    elif batch.rows:
        rows = [(shape, _added(segments, model.dtype)) for shape, segments in batch.rows]
        options |= {"rows": rows, "spread": batch.spread, "pack": batch.pack}
    elif batch.segments is not None:
        mask = _added(batch.segments, model.dtype)

    hidden = model.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **options,
    ).last_hidden_state.flatten(0, 1)  # (R * L, D), or (S, D)

    # on a GPU the gradient of an embedding is summed in a fixed order, that of index_select is not
    if hidden.device.type == "cuda":
        return nn.functional.embedding(batch.sources, hidden)
    return hidden.index_select(0, batch.sources)


def goes_part_by_part(model: nn.Module, batch: CompletionBatch) -> bool:
    """Whether attention takes shared rows as `prompt_rows`: long ones on a CPU, without dropout."""
    shared = any(len(pieces) > 1 for pieces in batch.spans.rows)
    long = shared and longest_row(batch.spans) >= LONG_ROW
    names = ("attn_pdrop", "attention_dropout")
    drops = model.training and any(getattr(model.config, name, 0) for name in names)
    return long and not drops and batch.input_ids.device.type == "cpu"


def _added(segments: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Segments as a mask that is added to attention's scores."""
    if segments is None:
        return None
    may = allowed(segments)
    return torch.zeros_like(may, dtype=dtype).masked_fill_(~may, torch.finfo(dtype).min)


# how a model gets from tokens to log-probs


def logit_path(model: nn.Module) -> LogitPath:
    """How `completion_logps` gets log-probs: the leanest way that agrees with the model's forward.

    - "weights": the decoder, then the weights of a linear LM head in chunks, at completion tokens.
    - "head": the decoder, then the LM head as a module, at completion tokens: where adapters, hooks
      or quantization change it.
    - "forward": the model's own forward on plain rows: where logits are capped or scaled after the
      head (Gemma 2, Cohere, Granite), and where PEFT puts virtual tokens before the text (prompt
      and prefix tuning).

    A few tokens are computed at the first call, and again when `structure` changes; otherwise the
    answer is looked up.

    Raises:
        ValueError: there is no LM head, a log-prob depends on later tokens or on other rows of the
            batch, or it is NaN.
    """
    made, known = structure(model), vars(model).get(KNOWN)
    if known is None or known[0] != made:
        known = made, _compared(model)
        setattr(model, KNOWN, known)
    return known[1]


@torch.no_grad()
def _compared(model: nn.Module) -> LogitPath:
    """The first path on which a few tokens have the log-probs of the model's own forward.

    That forward is on each completion alone.
    """
    rows, batches = _probes(model)
    device = rows[0].sources.device.type

    # nats; a GPU may compute in TF32, and some weights are in half precision
    tolerance = 1e-3 if device == "cpu" else 2e-2
    for p in model.parameters():
        if not p.is_floating_point() or torch.finfo(p.dtype).bits < 32:
            tolerance = 0.5

    def same(found: Tensor, expected: Tensor) -> bool:
        return bool(((found == expected) | ((found - expected).abs() <= tolerance)).all())

    name = name_of(model)
    try:
        with (
            evaluating(model),
            torch.autocast(device, enabled=False),
            matmuls_by_onednn(device),
        ):
            # (8,), of completions of 2, 3 and 3 tokens
            alone = torch.cat([_path_logps(model, row, "forward") for row in rows])
            if alone.isnan().any():
                raise ValueError(
                    f"the log-probs of {name} are NaN; its weights are damaged, or overflow in "
                    "their dtype"
                )
            if not same(alone[0], alone[2]):
                raise ValueError(
                    f"{name} looks at later tokens to predict one; a policy must be a causal LM"
                )
            for path in _paths(model):
                compact_too = path != "forward" and shares_prompts(model)
                tried = batches if compact_too else batches[:1]
                if all(same(_path_logps(model, batch, path), alone) for batch in tried):
                    return path

    # each architecture that is not a causal LM fails in its own way
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} gives no logits for input_ids alone ({error}); a policy must be a causal LM"
        ) from error
    raise ValueError(
        f"the log-probs of {name} depend on the other rows of a batch, so those of a completion "
        "have no meaning; give a causal LM such as the GPT-2 and Llama families"
    )


def _probes(model: nn.Module) -> tuple[list[CompletionBatch], list[CompletionBatch]]:
    """Three completions of two prompts: each alone, and together in rows, plain and compact.

    The first two begin with the same token, after the same prompt.
    """
    embedding = model.get_input_embeddings().weight
    ids = [i % len(embedding) for i in range(13)]
    prompts, prompt_of = [ids[:5], ids[5:6]], [0, 0, 1]
    completions = [ids[6:8], [ids[6], *ids[8:10]], ids[10:]]
    alone = [
        completion_batch([prompts[p]], [completion], [0]).to(embedding.device)
        for completion, p in zip(completions, prompt_of)
    ]
    together = [
        completion_batch(prompts, completions, prompt_of, compact=compact).to(embedding.device)
        for compact in (False, True)
    ]
    return alone, together


def _paths(model: nn.Module) -> tuple[LogitPath, ...]:
    """The paths that a model's structure allows, the leanest first.

    Numbers alone do not tell: LoRA's difference, for instance, is zero before training.
    """
    head = model.get_output_embeddings()
    if beside_modules(model) or after_head(model):
        return ("forward",)
    return ("head" if touched(head) or type(head) is not nn.Linear else "weights", "forward")


# log-probs of any number of completions


@torch.no_grad()
@checked
@kept_memory()
def score_completions(
    model: nn.Module,
    prompts: Tokens,
    completions: Tokens,
    prompt_of: Sequence[int],
    *,
    batch_tokens: int | None = None,
    precision: Precision = "float32",
    progress: str | None = None,
) -> Tensor:
    """`completion_logps` of any number of completions, (N,) on the CPU, without gradients.

    The model is put in evaluation mode for the call. Several processes share the batches, and each
    gets all log-probs.

    Args:
        model, prompts, completions, prompt_of: as in `completion_logps` and `completion_batch`.
        batch_tokens: about as many tokens per batch; by default 2,048, on a GPU 16,384. Batches go
            by length, so little is padded, and what shares a prompt stays together.
        precision: of the computation.
        progress: a name for a progress bar; without it there is none.
    """
    prompts, completions, prompt_of = check_tokens(prompts, completions, prompt_of)
    model = unwrapped(model)
    device, compact = next(model.parameters()).device, can_compact(model)
    batch_tokens = batch_tokens or (16_384 if device.type == "cuda" else 2_048)
    batches = _batches_by_length(prompts, completions, prompt_of, batch_tokens, compact)
    mine = local_shard(batches)

    # one tensor for all: small ones, kept from batch to batch, would fragment the heap
    logps = torch.empty(len(completions), dtype=torch.float64)
    quiet = not (progress and is_main())
    bar = tqdm(total=sum(map(len, mine)), desc=progress, disable=quiet, unit="completion")
    with bar, evaluating(model), autocast(device.type, precision):
        for now in mine:
            batch = completion_batch(
                prompts,
                [completions[i] for i in now],
                [prompt_of[i] for i in now],
                compact=compact,
            )
            logps[now] = completion_logps(model, batch.to(device)).cpu().double()
            bar.update(len(now))
    for now, values in zip(batches, gather_shards([logps[now] for now in mine])):
        logps[now] = values
    return logps


def _batches_by_length(
    prompts: Tokens,
    completions: Sequence[list[int]],
    prompt_of: Sequence[int],
    batch_tokens: int,
    compact: bool,
) -> list[list[int]]:
    """Indices of completions in batches of about `batch_tokens`, the longest rows first.

    Completions that share their prompt stay together, and it counts once.
    """
    # (longest row, tokens, members) of what stays together
    together: list[tuple[int, int, list[int]]] = []
    for p, members in rows_by_prompt(prompt_of):
        n_prompt, sizes = len(prompts[p]), [len(completions[i]) for i in members]
        longest, parts = n_prompt + max(sizes), len(members)
        if compact and sharing_pays(prompts, [completions[i] for i in members], [p] * parts):
            parts = min(parts, -(-sum(sizes) // max(1, batch_tokens - n_prompt)))
        for part in np.array_split(members, parts):
            tokens = n_prompt + sum(len(completions[i]) for i in part)
            together.append((longest, tokens if compact else longest, part.tolist()))

    batches: list[list[int]] = []
    width = room = 0
    for longest, tokens, part in sorted(together, key=lambda one: -one[0]):
        # padded rows are as long as the first of their batch, the longest
        needed = tokens if compact else max(tokens, width)
        if not batches or needed > room:
            batches.append([])
            width, room, needed = longest, batch_tokens, tokens
        batches[-1] += part
        room -= needed
    return batches
