"""Log-probabilities of completions under a causal language model: exact, and frugal with memory.

Everything that needs log pi(y|x) calls this file: DPO, SFT, the sequence KL, evaluation. Four things keep it lean
(docs/speed.md): the LM head is applied only where it predicts a completion token; logits exist for one chunk of positions
at a time; a prompt is computed once for all its completions, and padding not at all, where that saves work.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dpo_lab.batching import CompletionBatch, Tokens, allowed, check_tokens, completion_batch
from dpo_lab.engine.arguments import checked, finite_positive
from dpo_lab.engine.attention import NO_MASK, PACKED, takes_pieces
from dpo_lab.engine.cpu import kept_memory, matmuls_by_onednn, tune_backward
from dpo_lab.engine.distributed import gather_shards, is_main, local_shard
from dpo_lab.engine.lm_head import token_logps
from dpo_lab.engine.structure import (
    after_head,
    beside_modules,
    check_fits,
    check_vocabulary,
    name_of,
    structure,
    touched,
    unwrapped,
    widest,
)

Precision = Literal[
    "float32", "bfloat16"
]  # of the computation; weights and log-prob sums stay float32 or wider

SHARES_PROMPTS = (
    "gpt2",
    "llama",
)  # attention sees only position ids and the mask, so a shared prompt is exact

LEAST_TEMPERATURE = 1e-30  # of a log-prob, in float32

LogitPath = Literal["weights", "head", "forward"]  # see `logit_path`


@checked
def autocast(device: str, precision: Precision) -> torch.autocast:
    """The context in which a forward pass computes in `precision`; `device` is a torch device type."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def can_compact(model: nn.Module) -> bool:
    """Whether sharing a prompt among its completions, and packing rows, is exact for this model."""
    model = unwrapped(model)
    return _shares(model) and logit_path(model) != "forward"


def _shares(model: nn.Module) -> bool:
    """`can_compact` by what a model says of itself."""
    config = model.config
    plain = config.model_type in SHARES_PROMPTS and getattr(config, "sliding_window", None) is None
    return plain and config._attn_implementation in ("sdpa", PACKED)


def use_packed_attention(model: nn.Module) -> bool:
    """Give a model `packed_attention` where that is exact; whether it is."""
    if _shares(model) and model.config._attn_implementation != PACKED:
        model.set_attn_implementation(PACKED)
    return _shares(model)


def logit_path(model: nn.Module) -> LogitPath:
    """How `completion_logps` gets from tokens to log-probs: the leanest way that gives what the model's own forward does.

    - "weights": the decoder, then the weights of a linear LM head in chunks, at completion tokens.
    - "head": the decoder, then the LM head as a module, at completion tokens: where adapters, hooks or quantization change it.
    - "forward": the model's own forward on plain rows: where logits are capped or scaled after the head (Gemma 2, Cohere,
      Granite), and where PEFT puts virtual tokens before the text (prompt and prefix tuning).

    A few tokens are computed at the first call, and again when `structure` changes; then it is only looked up.

    Raises:
        ValueError: there is no LM head, a log-prob depends on later tokens or on other rows of the batch, or it is NaN.
    """
    made, known = structure(model), vars(model).get(KNOWN)
    if known is None or known[0] != made:
        known = made, _compared(model)
        setattr(model, KNOWN, known)
    return known[1]


KNOWN = "_dpo_lab_path"  # attribute of a model, which its copies have too: the structure that was compared, and its path


@torch.no_grad()
def _compared(model: nn.Module) -> LogitPath:
    """The first path whose log-probs of a few tokens are those of the model's own forward on each completion alone."""
    embedding, training = (
        model.get_input_embeddings().weight,
        [module for module in model.modules() if module.training],
    )
    ids = [i % len(embedding) for i in range(13)]
    prompts, completions, prompt_of = (
        [ids[:5], ids[5:6]],
        [ids[6:8], [ids[6], *ids[8:10]], ids[10:]],
        [0, 0, 1],
    )
    layouts = [
        completion_batch(prompts, completions, prompt_of, compact=share).to(embedding.device)
        for share in (False, True)
    ]
    rows = [
        completion_batch([prompts[p]], [completions[i]], [0]).to(embedding.device)
        for i, p in enumerate(prompt_of)
    ]
    precise = all(
        p.is_floating_point() and torch.finfo(p.dtype).bits >= 32 for p in model.parameters()
    )
    tolerance = (
        (1e-3 if embedding.device.type == "cpu" else 2e-2) if precise else 0.5
    )  # nats; GPUs may compute in TF32

    def same(found: Tensor, expected: Tensor) -> bool:
        return bool(((found == expected) | ((found - expected).abs() <= tolerance)).all())

    model.eval()
    try:
        with torch.autocast(embedding.device.type, enabled=False):
            alone = torch.cat(
                [_path_logps(model, row, "forward") for row in rows]
            )  # (8,), of completions of 2, 3 and 3 tokens
            if alone.isnan().any():
                raise ValueError(
                    f"the log-probs of {name_of(model)} are NaN; its weights are damaged, or overflow in their dtype"
                )
            if not same(
                alone[0], alone[2]
            ):  # one token after one prompt, with other tokens after it
                raise ValueError(
                    f"{name_of(model)} looks at later tokens to predict one; a policy must be a causal LM"
                )
            for way in _paths(model):
                batches = layouts if way != "forward" and _shares(model) else layouts[:1]
                if all(same(_path_logps(model, batch, way), alone) for batch in batches):
                    return way
    except (
        AttributeError,
        TypeError,
    ) as error:  # each architecture that is no causal LM fails in its own way
        raise ValueError(
            f"{name_of(model)} gives no logits for input_ids alone ({error}); a policy must be a causal LM"
        ) from error
    finally:
        for module in training:
            module.training = True
    raise ValueError(
        f"the log-probs of {name_of(model)} depend on the other rows of a batch, so those of a completion have no meaning; "
        "give a causal LM such as the GPT-2 and Llama families"
    )


def _paths(model: nn.Module) -> tuple[LogitPath, ...]:
    """The paths that a model's structure allows, the leanest first: a difference may be invisible as yet, as LoRA's at the start."""
    head = model.get_output_embeddings()
    if beside_modules(model) or after_head(model):
        return ("forward",)
    return ("head" if touched(head) or type(head) is not nn.Linear else "weights", "forward")


def completion_logps(
    model: nn.Module,
    batch: CompletionBatch,
    *,
    reduction: Literal["sum", "mean", "none"] = "sum",
    temperature: float = 1.0,
) -> Tensor:
    """log pi(completion | prompt) of each completion, (N,) nats, float64 (float32 where the device has no float64).

    Args:
        model: a Hugging Face causal LM. Its mode is yours to set: dropout changes the result.
        batch: made by `completion_batch`, on the model's device; `compact` only where `can_compact(model)`.
        reduction: "sum" over tokens, as DPO defines it; "mean" divides by the number of tokens, which removes the length
            from the implicit reward and is another objective (IPO on means, SimPO); "none" gives each token's, (T,).
        temperature: divides the logits, as in sampling at that temperature; positive, for greedy choices have no log-probs.

    Differentiable with respect to the model's parameters. Token log-probabilities are computed in float32 or better and
    summed in float64: a float32 sum near -700 is off by up to 8e-4. `logit_path` says which way they take. A model that
    `can_compact` prompts computes attention by `packed_attention` from then on, which is sdpa for its other callers.

    Raises:
        ValueError: `reduction` or `temperature` not allowed, token ids outside the vocabulary, a row longer than the model's
            context, a batch with `compact` for a model that does not allow it, or a model without log-probs (`logit_path`).
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(
            f"reduction is {reduction!r}; it must be 'sum' (DPO), 'mean' (length-normalized) or 'none'"
        )
    model, temperature = unwrapped(model), finite_positive("temperature", temperature)
    if temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature is {temperature}; logits that it divides overflow, so it must be at least {LEAST_TEMPERATURE}"
        )
    _check_batch(model, batch, unread=1)
    way = logit_path(model)
    with matmuls_by_onednn(batch.input_ids.device.type):
        tokens = _path_logps(model, batch, way, temperature)  # (T,)
    wide = tokens.to(widest(tokens.device))
    if reduction == "none":
        return wide
    if wide.device.type == "cuda":  # where index_add takes any order
        sums = (
            wide.new_zeros(batch.n, batch.longest_completion)
            .index_put((batch.owners, batch.places), wide)
            .sum(1)
        )
    else:
        sums = wide.new_zeros(batch.n).index_add(0, batch.owners, wide)  # (N,)
    return sums / torch.bincount(batch.owners, minlength=batch.n) if reduction == "mean" else sums


def completion_states(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The last hidden state before each completion token, (T, D): what predicts it.

    Raises:
        ValueError: as `completion_logps`; or the decoder alone is not the model, as with prompt and prefix tuning.
    """
    model = unwrapped(model)
    _check_batch(model, batch, unread=0)
    logit_path(model)
    if beside_modules(model):
        raise ValueError(
            f"{name_of(model)} puts virtual tokens before the text, or has adapters that tokens invoke, so the states of its "
            "decoder are not its own; give the model without them, or with LoRA"
        )
    return _states(model, batch)


def _check_batch(model: nn.Module, batch: CompletionBatch, unread: int) -> None:
    """Raise ValueError for what the model cannot read; `unread` tokens follow the last position of each row."""
    check_fits(model, batch.longest - 1 + unread)
    check_vocabulary(model, batch.ids)


def _path_logps(
    model: nn.Module, batch: CompletionBatch, way: LogitPath, temperature: float = 1.0
) -> Tensor:
    """The log-prob of each completion token, (T,), float32 or better."""
    head = model.get_output_embeddings()
    if way == "weights":
        weight, bias = head.weight, head.bias
        if temperature != 1:
            weight, bias = weight / temperature, None if bias is None else bias / temperature
        return token_logps(_states(model, batch), weight, bias, batch.targets)
    logits = head(_states(model, batch)) if way == "head" else _own_logits(model, batch)  # (T, V)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return torch.log_softmax(wide, 1).gather(1, batch.targets[:, None])[:, 0]


def _own_logits(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The logits before each completion token, (T, V), by the model's own forward."""
    if batch.segments is not None or batch.rows:
        raise ValueError(_UNSHARED.format(name_of(model)))
    found = model(
        input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), use_cache=False
    ).logits
    logits = found[:, -batch.input_ids.shape[1] :]  # virtual tokens come first
    return logits.flatten(0, 1).index_select(0, batch.sources)


_UNSHARED = "the batch shares prompts or packs rows, which {} does not allow; make it with compact=can_compact(model)"


def _states(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The decoder's last hidden state before each completion token, (T, D)."""

    def added(segments: Tensor | None) -> Tensor | None:
        if segments is None:
            return None
        may, lowest = allowed(segments), torch.finfo(model.dtype).min
        return torch.zeros_like(may, dtype=model.dtype).masked_fill_(~may, lowest)

    packed: dict[str, Any] = {"may_switch_backend": True} if use_packed_attention(model) else {}
    mask = (
        NO_MASK if packed else torch.ones_like(batch.input_ids)
    )  # causal: it never sees the padding
    if not packed and (batch.segments is not None or batch.rows):
        raise ValueError(_UNSHARED.format(name_of(model)))
    if packed and takes_pieces(model, batch.input_ids.device):
        packed["pieces"] = batch.pieces
    elif batch.rows:
        packed |= {
            "rows": [(shape, added(part)) for shape, part in batch.rows],
            "spread": batch.spread,
            "pack": batch.pack,
        }
    elif batch.segments is not None:
        mask = added(batch.segments)
    with matmuls_by_onednn(batch.input_ids.device.type):
        hidden = model.get_decoder()(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **packed,
        ).last_hidden_state.flatten(0, 1)  # (R * L, D), or (S, D)
    tune_backward(hidden)
    if hidden.device.type == "cuda":
        return nn.functional.embedding(
            batch.sources, hidden
        )  # whose gradient is added up in a fixed order there
    return hidden.index_select(0, batch.sources)


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
    """`completion_logps` of any number of completions, (N,) on the CPU, in batches of about `batch_tokens` tokens.

    By default 2,048, and 16,384 on a GPU. Batches go by length, so little is padded; `progress` names a progress bar. The
    model is in evaluation mode meanwhile.
    Several processes share the batches, and each gets all the log-probs.
    """
    prompts, completions, prompt_of = check_tokens(prompts, completions, prompt_of)
    model = unwrapped(model)
    device, share = next(model.parameters()).device, can_compact(model)
    batch_tokens = batch_tokens or (16_384 if device.type == "cuda" else 2_048)
    modes = [(module, module.training) for module in model.modules()]
    lengths = [
        len(prompt) for prompt in prompts
    ]  # with the longest completion, so that a prompt's completions stay together
    for completion, p in zip(completions, prompt_of):
        lengths[p] = max(lengths[p], len(prompts[p]) + len(completion))
    order = sorted(range(len(completions)), key=lambda i: (lengths[prompt_of[i]], prompt_of[i]))
    batches = []
    while order:
        size = max(1, batch_tokens // lengths[prompt_of[order[-1]]])
        batches.append(order[-size:])
        del order[-size:]
    mine = local_shard(batches)
    # one tensor for all: kept between them, a small one from each batch would cut the memory that the next could have used
    logps = torch.empty(len(completions), dtype=torch.float64)
    model.eval()
    bar = tqdm(
        total=sum(map(len, mine)),
        desc=progress,
        disable=not (progress and is_main()),
        unit="completion",
    )
    try:
        with bar, autocast(device.type, precision):
            for now in mine:
                batch = completion_batch(
                    prompts,
                    [completions[i] for i in now],
                    [prompt_of[i] for i in now],
                    compact=share,
                )
                logps[now] = completion_logps(model, batch.to(device)).cpu().double()
                bar.update(len(now))
    finally:
        for module, training in modes:
            module.training = training
    for now, values in zip(batches, gather_shards([logps[now] for now in mine])):
        logps[now] = values
    return logps
