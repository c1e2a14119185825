"""Log-probabilities of completions under a causal language model: exact, and frugal with memory.

Everything that needs log pi(y|x) calls this file: DPO, SFT, the sequence KL, evaluation. Four things keep it lean
(docs/speed.md): the LM head is applied only where it predicts a completion token; logits exist for one chunk of positions
at a time; a prompt is computed once for all its completions, and padding not at all, where that saves work.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_lab.arguments import checked, finite_positive
from dpo_lab.layout import ROUND, CompletionBatch, Pieces, Tokens, allowed, check_tokens, completion_batch
from dpo_lab.processes import is_main, my_share, whole
from dpo_lab.structure import (
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
from dpo_lab.tuning import ONEDNN, backward_by_onednn, kept_memory, matmuls_by_mkl, matmuls_by_onednn

Precision = Literal["float32", "bfloat16"]  # of the computation; weights and log-prob sums stay float32 or wider
KEPT_LOGITS_BYTES = 2**28  # logits up to 256 MiB wait for the backward pass, in one piece; beyond that it computes them again,
CHUNK_BYTES = 2**26  # 64 MiB at a time: rows enough for matmuls to be fast, and small beside any model
PADS_HEAD = ("cuda",)  # devices whose kernels are several times slower where a size is odd, as GPT-2's vocabulary is
ON_GPU = 4  # times as much of both: a GPU needs more rows to be busy
IN_CACHE = 64  # rows that are normalised at a time: many times faster than all of them, which would go through memory
SHARES_PROMPTS = ("gpt2", "llama")  # attention sees only position ids and the mask, so a shared prompt is exact
LEAST_TEMPERATURE = 1e-30  # of a log-prob, in float32
LogitPath = Literal["weights", "head", "forward"]  # see `logit_path`


@checked
def autocast(device: str, precision: Precision) -> torch.autocast:
    """The context in which a forward pass computes in `precision`; `device` is a torch device type."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def can_share(model: nn.Module) -> bool:
    """Whether sharing a prompt among its completions, and packing rows, is exact for this model."""
    model = unwrapped(model)
    return _shares(model) and logit_path(model) != "forward"


def _shares(model: nn.Module) -> bool:
    """`can_share` by what a model says of itself."""
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
    embedding, training = model.get_input_embeddings().weight, [module for module in model.modules() if module.training]
    ids = [i % len(embedding) for i in range(13)]
    prompts, completions, prompt_of = [ids[:5], ids[5:6]], [ids[6:8], [ids[6], *ids[8:10]], ids[10:]], [0, 0, 1]
    layouts = [completion_batch(prompts, completions, prompt_of, share=share).to(embedding.device) for share in (False, True)]
    rows = [completion_batch([prompts[p]], [completions[i]], [0]).to(embedding.device) for i, p in enumerate(prompt_of)]
    precise = all(p.is_floating_point() and torch.finfo(p.dtype).bits >= 32 for p in model.parameters())
    tolerance = (1e-3 if embedding.device.type == "cpu" else 2e-2) if precise else 0.5  # nats; GPUs may compute in TF32

    def same(found: Tensor, expected: Tensor) -> bool:
        return bool(((found == expected) | ((found - expected).abs() <= tolerance)).all())

    model.eval()
    try:
        with torch.autocast(embedding.device.type, enabled=False):
            alone = torch.cat([_path_logps(model, row, "forward") for row in rows])  # (8,), of completions of 2, 3 and 3 tokens
            if alone.isnan().any():
                raise ValueError(
                    f"the log-probs of {name_of(model)} are NaN; its weights are damaged, or overflow in their dtype"
                )
            if not same(alone[0], alone[2]):  # one token after one prompt, with other tokens after it
                raise ValueError(f"{name_of(model)} looks at later tokens to predict one; a policy must be a causal LM")
            for way in _paths(model):
                batches = layouts if way != "forward" and _shares(model) else layouts[:1]
                if all(same(_path_logps(model, batch, way), alone) for batch in batches):
                    return way
    except (AttributeError, TypeError) as error:  # each architecture that is no causal LM fails in its own way
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
    model: nn.Module, batch: CompletionBatch, *, reduction: Literal["sum", "mean", "none"] = "sum", temperature: float = 1.0
) -> Tensor:
    """log pi(completion | prompt) of each completion, (N,) nats, float64 (float32 where the device has no float64).

    Args:
        model: a Hugging Face causal LM. Its mode is yours to set: dropout changes the result.
        batch: made by `completion_batch`, on the model's device; `share` only where `can_share(model)`.
        reduction: "sum" over tokens, as DPO defines it; "mean" divides by the number of tokens, which removes the length
            from the implicit reward and is another objective (IPO on means, SimPO); "none" gives each token's, (T,).
        temperature: divides the logits, as in sampling at that temperature; positive, for greedy choices have no log-probs.

    Differentiable with respect to the model's parameters. Token log-probabilities are computed in float32 or better and
    summed in float64: a float32 sum near -700 is off by up to 8e-4. `logit_path` says which way they take. A model that
    `can_share` prompts computes attention by `packed_attention` from then on, which is sdpa for its other callers.

    Raises:
        ValueError: `reduction` or `temperature` not allowed, token ids outside the vocabulary, a row longer than the model's
            context, a batch with `share` for a model that does not allow it, or a model without log-probs (`logit_path`).
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'sum' (DPO), 'mean' (length-normalised) or 'none'")
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
        sums = wide.new_zeros(batch.n, batch.longest_completion).index_put((batch.owners, batch.places), wide).sum(1)
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
    check_vocabulary(model, torch.tensor(batch.ids))


def _path_logps(model: nn.Module, batch: CompletionBatch, way: LogitPath, temperature: float = 1.0) -> Tensor:
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
    found = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), use_cache=False).logits
    logits = found[:, -batch.input_ids.shape[1] :]  # virtual tokens come first
    return logits.flatten(0, 1).index_select(0, batch.sources)


_UNSHARED = "the batch shares prompts or packs rows, which {} does not allow; make it with share=can_share(model)"


def _states(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """The decoder's last hidden state before each completion token, (T, D)."""

    def added(segments: Tensor | None) -> Tensor | None:
        if segments is None:
            return None
        may, lowest = allowed(segments), torch.finfo(model.dtype).min
        return torch.zeros_like(may, dtype=model.dtype).masked_fill_(~may, lowest)

    packed: dict[str, Any] = {"alone": True} if use_packed_attention(model) else {}
    mask = NO_MASK if packed else torch.ones_like(batch.input_ids)  # causal: it never sees the padding
    if not packed and (batch.segments is not None or batch.rows):
        raise ValueError(_UNSHARED.format(name_of(model)))
    if packed and takes_pieces(model, batch.input_ids.device):
        packed["pieces"] = batch.pieces
    elif batch.rows:
        packed |= {"rows": [(shape, added(part)) for shape, part in batch.rows], "spread": batch.spread, "pack": batch.pack}
    elif batch.segments is not None:
        mask = added(batch.segments)
    with matmuls_by_onednn(batch.input_ids.device.type):
        hidden = model.get_decoder()(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False, **packed
        ).last_hidden_state.flatten(0, 1)  # (R * L, D), or (S, D)
    backward_by_onednn(hidden)
    if hidden.device.type == "cuda":
        return nn.functional.embedding(batch.sources, hidden)  # whose gradient is added up in a fixed order there
    return hidden.index_select(0, batch.sources)


def takes_pieces(model: nn.Module, device: torch.device) -> bool:
    """Whether torch's variable-length flash attention computes this model here: on a GPU, in half precision."""
    if device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def packed_attention(
    module, query, key, value, attention_mask, *, alone=False, rows=(), spread=None, pack=None, pieces=None, **options
) -> tuple[Tensor, None]:
    """sdpa for transformers' `AttentionInterface`: of rows (R, H, L, D), or of packed tokens (1, H, S, D), laid out in `rows`.

    On a GPU in half precision both go through flash attention instead, as `pieces` of variable length.

    All else in a decoder works on one token at a time and never sees padding. bfloat16 on a CPU goes through float32: the
    backward pass of the bfloat16 kernel is the slower one. `alone`: no other thread computes meanwhile (as those that sample
    do), so that the matmuls may change hands.
    """
    if pieces is not None:
        return attention_of_pieces(query, key, value, pieces, options["scaling"]), None
    if attention_mask is not None and attention_mask.numel() == NO_MASK.numel():
        attention_mask = None
    dtype, device = value.dtype, query.device.type
    widened = device == "cpu" and dtype == torch.bfloat16
    one = query.shape[2] == 1 and attention_mask is None and not torch.is_grad_enabled()
    if one and (widened or device == "cuda"):  # there cuDNN would make a plan for each number of rows and keys
        return _next(query.to(dtype), key.to(dtype), value, options["scaling"]), None
    if rows:
        query, key, value = (x[0].transpose(0, 1).index_select(0, spread) for x in (query, key, value))  # (all r * l, H, D)
    if widened:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.float()
        rows = [(shape, None if mask is None else mask.float()) for shape, mask in rows]
    with torch.autocast(device, enabled=False) if widened else nullcontext():
        if not rows:
            return _sdpa(alone, module, query, key, value, attention_mask, **options).to(dtype), None  # (R, L, H, D)
        parts, sizes = [], [r * length for (r, length), _ in rows]
        for (shape, mask), *laid in zip(rows, *(x.split(sizes) for x in (query, key, value))):
            laid = (x.unflatten(0, shape).transpose(1, 2) for x in laid)  # (r, H, l, D) each
            parts.append(_sdpa(alone, module, *laid, mask, **options).flatten(0, 1))
        return torch.cat(parts).to(dtype).index_select(0, pack)[None], None


def attention_of_pieces(query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scale: float) -> Tensor:
    """Attention of the tokens of a batch (R, H, L, D), each piece to its keys, (R, L, H, D)."""
    shape = query.shape[0], query.shape[2]
    # (R * L, H, D) each; rotary positions leave float32 under autocast
    query, key, value = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (_Keys.apply(x, pieces.keys, pieces.uses) for x in (key, value))
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return _Flash.apply(query, key, value, pieces.query_ends, pieces.key_ends, pieces.longest, scale).unflatten(0, shape)


class _Keys(torch.autograd.Function):
    """x[keys]; a token's gradient is the sum over its uses as a key, in a fixed order."""

    @staticmethod
    def forward(ctx, x, keys, uses):
        ctx.save_for_backward(uses)
        return x.index_select(0, keys)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (uses,) = ctx.saved_tensors
        none = grad.new_zeros(1, *grad.shape[1:])
        return torch.cat([grad, none])[uses].sum(1), None, None


class _Flash(torch.autograd.Function):
    """Flash attention of pieces: each query sees the keys of its piece up to its own, counted from the end.

    torch's `varlen_attn`, with a backward pass that adds up in a fixed order where it would else take any: beyond two blocks of
    keys. That is a switch of the whole process, which is turned for this one kernel.
    """

    @staticmethod
    def forward(ctx, query, key, value, query_ends, key_ends, longest, scale):
        flash = torch.ops.aten._flash_attention_forward
        out, normalizer, *_ = flash(query, key, value, query_ends, key_ends, *longest, 0.0, True, False, scale=scale)
        ctx.save_for_backward(query, key, value, out, query_ends, key_ends, normalizer)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, query_ends, key_ends, normalizer = ctx.saved_tensors
        of_dropout = torch.empty(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device)
        with fixed_order() if ctx.longest[1] > 128 else nullcontext():
            flash = torch.ops.aten._flash_attention_backward
            sizes = (query_ends, key_ends, *ctx.longest, 0.0, True, *of_dropout)
            grads = flash(grad.contiguous(), query, key, value, out, normalizer, *sizes, scale=ctx.scale)
        return *grads, None, None, None, None


@contextmanager
def fixed_order() -> Iterator[None]:
    """Only kernels that add up in a fixed order meanwhile, in all threads; what the process had comes back."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _sdpa(alone: bool, module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options) -> Tensor:
    """transformers' sdpa, forward and backward, (R, L, H, D); `alone`, by MKL where the other matmuls are oneDNN's.

    Its many products are so small that oneDNN would take longer to begin them than to compute them.
    """
    matmul = torch.backends.mkldnn.matmul
    if query.device.type == "cuda":  # without cuDNN, which makes a plan for each shape, and the shapes of batches are many
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    if not alone or matmul.fp32_precision != ONEDNN:
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
    """Attention of one query per row (R, H, 1, D) to L keys (R, G, L, D), as (R, 1, H, D): sdpa is slow at it."""
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


def logits_budget(device: str) -> tuple[int, int]:
    """Bytes of logits that may wait for the backward pass, and of those that are there at a time beyond that."""
    times = ON_GPU if device == "cuda" else 1
    return times * KEPT_LOGITS_BYTES, times * CHUNK_BYTES


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """hidden @ weight.T + bias (C, n), and columns of -inf up to a multiple of 64: MKL is half as slow again without them.

    `weight` has n rows, or more that do not count.
    """
    logits = hidden.new_empty(len(hidden), -(-n // 64) * 64)
    torch.mm(hidden, weight.T, out=logits[:, : len(weight)])
    logits[:, n:] = -torch.inf
    return logits if bias is None else logits.add_(nn.functional.pad(bias, (0, logits.shape[1] - n)))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, grad_enabled):
        row = len(weight) * dtype.itemsize  # bytes of a position's logits
        kept_bytes, chunk_bytes = logits_budget(hidden.device.type)
        keep = grad_enabled and any(ctx.needs_input_grad) and len(targets) * row <= kept_bytes
        ctx.wide = torch.promote_types(dtype, torch.float32)
        ctx.part = IN_CACHE if hidden.device.type == "cpu" else len(targets)
        chunks = 1 if keep else -(-len(targets) // max(IN_CACHE, chunk_bytes // row))
        ctx.chunk, ctx.dtype, ctx.kept = -(-len(targets) // chunks), dtype, None
        h, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if hidden.device.type in PADS_HEAD:
            w = nn.functional.pad(w, (0, 0, 0, -len(w) % 64))
        logps = []
        with torch.autocast(hidden.device.type, enabled=False):
            for h_c, y_c in zip(h.split(ctx.chunk), targets.split(ctx.chunk)):
                logits = _logits(h_c, w, b, len(weight))  # (C, V and a little)
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
                g = _logits(h[rows], w, b, len(weight)) if kept is None else kept
                if kept is None:
                    for part in g.split(ctx.part):
                        part.copy_(torch.log_softmax(part, 1, dtype=ctx.wide).exp_())  # as in the forward pass
                g = g[:, : len(w)]  # (C, V), or with columns of zeros where the head has rows that do not count
                g[torch.arange(len(g), device=g.device), targets[rows]] -= 1  # times scale: d loss / d logits
                torch.mul(g @ w, scale[rows], out=grad_h[rows])
                if grad_w is not None and ctx.dtype == weight.dtype and len(w) == len(weight):
                    torch.addmm(grad_w, g.T, h[rows] * scale[rows], beta=int(i > 0), out=grad_w)  # without another (V, D)
                elif grad_w is not None:
                    product = (g.T @ (h[rows] * scale[rows]))[: len(weight)]
                    grad_w = grad_w.copy_(product) if i == 0 else grad_w.add_(product)
                if grad_b is not None:
                    grad_b += (g.T @ scale[rows, 0])[: len(weight)]
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
    device, share = next(model.parameters()).device, can_share(model)
    batch_tokens = batch_tokens or (16_384 if device.type == "cuda" else 2_048)
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
