"""Log-probabilities of completions under a causal language model: exact, and frugal with memory.

Everything that needs log pi(y|x) calls this file: DPO, SFT, the sequence KL, evaluation. Four things keep it lean
(docs/speed.md): the LM head is applied only where it predicts a completion token; logits exist for one chunk of positions
at a time; a prompt is computed once for all its completions, and padding not at all, where that saves work.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_lab.arguments import checked
from dpo_lab.layout import ROUND, CompletionBatch, Tokens, check_tokens, completion_batch
from dpo_lab.processes import is_main, my_share, whole
from dpo_lab.tuning import ONEDNN, kept_memory, matmuls_by_mkl, matmuls_by_onednn

Precision = Literal["float32", "bfloat16"]  # of the computation; weights and log-prob sums stay float32 or wider
KEPT_LOGITS_BYTES = 2**28  # logits up to 256 MiB wait for the backward pass, in one piece; beyond that it computes them again,
CHUNK_BYTES = 2**26  # 64 MiB at a time: rows enough for matmuls to be fast, and small beside any model
IN_CACHE = 64  # rows that are normalised at a time: many times faster than all of them, which would go through memory
SHARES_PROMPTS = ("gpt2", "llama")  # attention sees only position ids and the mask, so a shared prompt is exact


@checked
def autocast(device: str, precision: Precision) -> torch.autocast:
    """The context in which a forward pass computes in `precision`; `device` is a torch device type."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def can_share(model: nn.Module) -> bool:
    """Whether sharing a prompt among its completions, and packing rows, is exact for this model."""
    config = model.config
    plain = config.model_type in SHARES_PROMPTS and getattr(config, "sliding_window", None) is None
    return plain and config._attn_implementation in ("sdpa", PACKED)


def use_packed_attention(model: nn.Module) -> bool:
    """Give a model `packed_attention` where that is exact; whether it is."""
    if can_share(model) and model.config._attn_implementation != PACKED:
        model.set_attn_implementation(PACKED)
    return can_share(model)


def completion_logps(
    model: nn.Module, batch: CompletionBatch, *, reduction: Literal["sum", "mean", "none"] = "sum", temperature: float = 1.0
) -> Tensor:
    """log pi(completion | prompt) of each completion, (N,) nats, float64 (float32 where the device has no float64).

    Args:
        model: a Hugging Face causal LM with a linear LM head. Its mode is yours to set: dropout changes the result.
        batch: made by `completion_batch`, on the model's device.
        reduction: "sum" over tokens, as DPO defines it; "mean" divides by the number of tokens, which removes the length
            from the implicit reward and is another objective (IPO on means, SimPO); "none" gives each token's, (T,).
        temperature: divides the logits, as in sampling at that temperature.

    Differentiable with respect to the model's parameters. Token log-probabilities are computed in float32 or better and
    summed in float64: a float32 sum near -700 is off by up to 8e-4. A model that `can_share` prompts computes attention by
    `packed_attention` from then on, which is sdpa for its other callers.

    Raises:
        ValueError: `reduction` unknown, token ids outside the vocabulary, or a row longer than the model's context.
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'sum' (DPO), 'mean' (length-normalised) or 'none'")
    head, states = model.get_output_embeddings(), completion_states(model, batch)
    weight, bias = head.weight, getattr(head, "bias", None)
    if temperature != 1:
        weight, bias = weight / temperature, None if bias is None else bias / temperature
    with matmuls_by_onednn(states.device.type):
        tokens = token_logps(states, weight, bias, batch.targets)  # (T,)
    wide = tokens.to(torch.float32 if tokens.device.type == "mps" else torch.float64)
    if reduction == "none":
        return wide
    sums = wide.new_zeros(batch.n).index_add(0, batch.owners, wide)  # (N,)
    return sums / torch.bincount(batch.owners, minlength=batch.n) if reduction == "mean" else sums


def completion_states(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The last hidden state before each completion token, (T, D): what predicts it. Errors are those of `completion_logps`."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and (longest := int(batch.position_ids.max()) + 2) > context:
        raise ValueError(f"prompt and completion have {longest} tokens, the model's context is {context}; shorten them")
    ids, vocabulary = torch.cat([batch.input_ids.flatten(), batch.targets]), len(model.get_input_embeddings().weight)
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        wrong = int(ids[(ids < 0) | (ids >= vocabulary)][0])
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocabulary}; use this model's own tokenizer")

    def added(allowed: Tensor | None) -> Tensor | None:
        lowest = torch.finfo(model.dtype).min
        return None if allowed is None else torch.zeros_like(allowed, dtype=model.dtype).masked_fill_(~allowed, lowest)

    mask = torch.ones_like(batch.input_ids) if batch.mask is None else added(batch.mask)  # causal: it never sees the padding
    packed = {"alone": True} if use_packed_attention(model) else {}
    if batch.rows:
        mask = NO_MASK
        packed |= {"rows": [(shape, added(allowed)) for shape, allowed in batch.rows], "spread": batch.spread, "pack": batch.pack}
    with matmuls_by_onednn(batch.input_ids.device.type):
        hidden = model.get_decoder()(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False, **packed
        ).last_hidden_state  # (R, L, D), or (1, S, D)
    return hidden.flatten(0, 1).index_select(0, batch.sources)


def packed_attention(
    module, query, key, value, attention_mask, *, alone=False, rows=(), spread=None, pack=None, **options
) -> tuple[Tensor, None]:
    """sdpa for transformers' `AttentionInterface`: of rows (R, H, L, D), or of packed tokens (1, H, S, D), laid out in `rows`.

    All else in a decoder works on one token at a time and never sees padding. bfloat16 on a CPU goes through float32: the
    backward pass of the bfloat16 kernel is the slower one. `alone`: no other thread computes meanwhile (as those that sample
    do), so that the matmuls may change hands.
    """
    dtype, device = value.dtype, query.device.type
    widened = device == "cpu" and dtype == torch.bfloat16
    if widened and query.shape[2] == 1 and attention_mask is None and not torch.is_grad_enabled():
        return _next(query.to(dtype), key.to(dtype), value, options["scaling"]), None
    if rows:
        query, key, value = (x[0].transpose(0, 1).index_select(0, spread) for x in (query, key, value))  # (all r * l, H, D)
    if widened:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.float()
    with torch.autocast(device, enabled=False) if widened else nullcontext():
        if not rows:
            return _sdpa(alone, module, query, key, value, attention_mask, **options).to(dtype), None  # (R, L, H, D)
        parts, sizes = [], [r * length for (r, length), _ in rows]
        for (shape, mask), *laid in zip(rows, *(x.split(sizes) for x in (query, key, value))):
            laid = (x.unflatten(0, shape).transpose(1, 2) for x in laid)  # (r, H, l, D) each
            parts.append(_sdpa(alone, module, *laid, mask, **options).flatten(0, 1))
        return torch.cat(parts).to(dtype).index_select(0, pack)[None], None


def _sdpa(alone: bool, module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options) -> Tensor:
    """transformers' sdpa, forward and backward, (R, L, H, D); `alone`, by MKL where the other matmuls are oneDNN's.

    Its many products are so small that oneDNN would take longer to begin them than to compute them.
    """
    matmul = torch.backends.mkldnn.matmul
    if not alone or query.device.type != "cpu" or matmul.fp32_precision != ONEDNN:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]

    held: list[str] = []

    def to_mkl(_: Tensor) -> None:
        held.append(matmul.fp32_precision)
        matmul.fp32_precision = "ieee"

    def and_back(_: Tensor) -> None:
        if held:
            matmul.fp32_precision = held.pop()

    with matmuls_by_mkl():
        out = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    if out.requires_grad:
        out.register_hook(to_mkl)
        for x in (query, key, value):
            if x.requires_grad:
                x.register_hook(and_back)
    return out


def _next(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one query a row (R, H, 1, D) to L keys (R, G, L, D), as (R, 1, H, D): in bfloat16 sdpa is slow at it."""
    grouped = query.unflatten(1, (key.shape[1], -1))[..., 0, :] * scaling  # (R, G, H / G, D)
    weights = (grouped @ key.mT).softmax(-1, dtype=torch.float32).to(query.dtype)  # (R, G, H / G, L)
    return (weights @ value).flatten(1, 2)[:, None]


PACKED = "dpo_lab_packed"
NO_MASK = torch.empty(1, 1, 1, 1)  # four dimensions: transformers hands it on as it is, instead of making a mask
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[target] at each position, (T,) nats, in chunks of bounded memory.

    hidden (T, D), weight (V, D), bias (V,) or None, targets (T,). Under autocast the product runs in its dtype; the
    normaliser is float32 (float64 for float64 input).
    """
    device, n, extra = hidden.device.type, len(targets), -len(targets) % ROUND
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, targets = nn.functional.pad(hidden, (0, 0, 0, extra)), nn.functional.pad(targets, (0, extra))
    return _TokenLogps.apply(hidden, weight, bias, targets, dtype, torch.is_grad_enabled())[:n]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias (C, V), and columns of -inf up to a multiple of 64: MKL is half as slow again without them."""
    n, logits = len(weight), hidden.new_empty(len(hidden), -(-len(weight) // 64) * 64)
    torch.mm(hidden, weight.T, out=logits[:, :n])
    logits[:, n:] = -torch.inf
    return logits if bias is None else logits.add_(nn.functional.pad(bias, (0, logits.shape[1] - n)))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, grad_enabled):
        row = len(weight) * dtype.itemsize  # bytes of a position's logits
        keep = grad_enabled and any(ctx.needs_input_grad) and len(targets) * row <= KEPT_LOGITS_BYTES
        ctx.wide = torch.promote_types(dtype, torch.float32)
        ctx.part = IN_CACHE if hidden.device.type == "cpu" else len(targets)
        chunks = 1 if keep else -(-len(targets) // max(IN_CACHE, CHUNK_BYTES // row))
        ctx.chunk, ctx.dtype, ctx.kept = -(-len(targets) // chunks), dtype, None
        h, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        logps = []
        with torch.autocast(hidden.device.type, enabled=False):
            for h_c, y_c in zip(h.split(ctx.chunk), targets.split(ctx.chunk)):
                logits = _logits(h_c, w, b)  # (C, V and a little)
                for part, y in zip(logits.split(ctx.part), y_c.split(ctx.part)):
                    wide = torch.log_softmax(part, 1, dtype=ctx.wide)
                    logps.append(wide.gather(1, y[:, None])[:, 0])
                    if keep:
                        part.copy_(wide.exp_())
                if keep:
                    ctx.kept = logits  # probabilities by now
        ctx.save_for_backward(hidden, weight, bias, targets, w)
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, w = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # which is overwritten; a second backward pass computes it again
        h, b = hidden.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        grad_h, scale = torch.empty_like(h), -grad[:, None].to(ctx.dtype)
        grad_w = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_b = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        device = hidden.device.type
        with torch.autocast(device, enabled=False), matmuls_by_onednn(device):
            for i in range(0, len(targets), ctx.chunk):
                rows = slice(i, i + ctx.chunk)
                g = _logits(h[rows], w, b) if kept is None else kept
                if kept is None:
                    for part in g.split(ctx.part):
                        part.copy_(torch.log_softmax(part, 1, dtype=ctx.wide).exp_())  # as in the forward pass
                g = g[:, : len(w)]  # (C, V)
                g[torch.arange(len(g), device=g.device), targets[rows]] -= 1  # times scale: d loss / d logits
                torch.mul(g @ w, scale[rows], out=grad_h[rows])
                if grad_w is not None and ctx.dtype == weight.dtype:
                    torch.addmm(grad_w, g.T, h[rows] * scale[rows], beta=int(i > 0), out=grad_w)  # without another (V, D)
                elif grad_w is not None:
                    product = g.T @ (h[rows] * scale[rows])
                    grad_w = grad_w.copy_(product) if i == 0 else grad_w.add_(product)
                if grad_b is not None:
                    grad_b += g.T @ scale[rows, 0]
        return grad_h.to(hidden.dtype), grad_w, grad_b, None, None, None


@torch.no_grad()
@checked
@kept_memory()
def score_completions(
    model: nn.Module,
    prompts: Tokens,
    completions: Tokens,
    prompt_of: Sequence[int],
    *,
    batch_tokens: int = 2048,
    precision: Precision = "float32",
    progress: str | None = None,
) -> Tensor:
    """`completion_logps` of any number of completions, (N,) on the CPU, in batches of about `batch_tokens` tokens.

    Batches go by length, so little is padded; `progress` names a progress bar. The model is in evaluation mode meanwhile.
    Several processes share the batches, and each gets all the log-probs.
    """
    check_tokens(prompts, completions, prompt_of)
    device, share = next(model.parameters()).device, can_share(model)
    modes = [(module, module.training) for module in model.modules()]
    lengths = [len(prompt) for prompt in prompts]  # with the longest completion, so that a prompt's completions stay together
    for completion, p in zip(completions, prompt_of):
        lengths[p] = max(lengths[p], len(prompts[p]) + len(completion))
    order = sorted(range(len(completions)), key=lambda i: (lengths[prompt_of[i]], prompt_of[i]))
    batches = []
    while order:
        size = max(1, batch_tokens // lengths[prompt_of[order[-1]]])
        batches.append(order[-size:])
        del order[-size:]
    mine = my_share(batches)
    # one tensor for all: kept between them, a small one from each batch would cut the memory that the next could have used
    logps = torch.empty(len(completions), dtype=torch.float64)
    model.eval()
    bar = tqdm(total=sum(map(len, mine)), desc=progress, disable=not (progress and is_main()), unit="completion")
    try:
        with bar, autocast(device.type, precision):
            for now in mine:
                batch = completion_batch(prompts, [completions[i] for i in now], [prompt_of[i] for i in now], share=share)
                logps[now] = completion_logps(model, batch.to(device)).cpu().double()
                bar.update(len(now))
    finally:
        for module, training in modes:
            module.training = training
    for now, values in zip(batches, whole([logps[now] for now in mine])):
        logps[now] = values
    return logps
