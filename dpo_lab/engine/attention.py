"""Attention for log-probs: padded rows, packed tokens, and pieces of variable length on a GPU.

`packed_attention` is registered with transformers' `AttentionInterface`. Everything else in a
decoder works on one token at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_lab.engine.cpu import ONEDNN
from dpo_lab.engine.pieces import Pieces
from dpo_lab.engine.prompt_rows import prompt_attention

# the name under which transformers knows `packed_attention`
PACKED = "dpo_lab_packed"

# "no mask": four dimensions, which transformers passes on as they are instead of making a mask
NO_MASK = torch.empty(1, 1, 1, 1)

# families whose attention sees only position ids and the mask, so that a shared prompt is exact
SHARES_PROMPTS = (
    "gpt2",
    "llama",
    "gemma",
    "gpt_neox",
    "mistral",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)

# without cuDNN, which makes a plan for each shape, and batches have many shapes
GPU_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def shares_prompts(model: nn.Module) -> bool:
    """Whether a model's family and its settings allow shared prompts and packed rows."""
    config = model.config
    plain = config.model_type in SHARES_PROMPTS and getattr(config, "sliding_window", None) is None
    return plain and config._attn_implementation in ("sdpa", PACKED)


def use_packed_attention(model: nn.Module) -> bool:
    """Give a model `packed_attention` where that is exact; return whether it is."""
    if not shares_prompts(model):
        return False
    if model.config._attn_implementation != PACKED:
        model.set_attn_implementation(PACKED)
    return True


def takes_pieces(model: nn.Module, device: torch.device) -> bool:
    """Whether torch's variable-length flash attention can compute this model here.

    It needs a GPU, half precision, and heads of at most 256 numbers, a multiple of 8.
    """
    if device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    may_switch_backend=False,
    rows=(),
    spread=None,
    pack=None,
    pieces=None,
    prompt_rows=(),
    shared=None,
    **options,
) -> tuple[Tensor, None]:
    """sdpa, with the signature that transformers' `AttentionInterface` asks for.

    Takes rows (R, H, L, D), or packed tokens (1, H, S, D), which it arranges in `rows` as the batch
    says (`CompletionBatch`). On a GPU in half precision both go through flash attention, as
    `pieces`; on a CPU long rows that share a prompt go part by part, as `prompt_rows`. bfloat16 on
    a CPU is computed in float32, whose backward pass is faster.
    `may_switch_backend` says that no other thread is computing, so that matmuls may go to MKL.
    `shared` prompts (`SharedPrompts`) are what sampled tokens look back at beside their own keys.
    """
    if shared is not None:
        query, key = query.to(value.dtype), key.to(value.dtype)
        return shared.attention(module.layer_idx, query, key, value, options["scaling"]), None
    if pieces is not None:
        return attention_of_pieces(query, key, value, pieces, options["scaling"]), None
    if attention_mask is not None and attention_mask.numel() == NO_MASK.numel():
        attention_mask = None

    # one new token per row: a product; on a GPU sdpa makes a plan for each number of rows and keys
    dtype, device = value.dtype, query.device.type
    widened = device == "cpu" and dtype == torch.bfloat16
    one = query.shape[2] == 1 and attention_mask is None and not torch.is_grad_enabled()
    if one and (widened or device == "cuda"):
        return decode_attention(query.to(dtype), key.to(dtype), value, options["scaling"]), None

    # tokens to their places in the rectangles, (all r * l, H, D), and into float32
    if rows:
        query, key, value = (
            x[0].transpose(0, 1).index_select(0, spread) for x in (query, key, value)
        )
    if widened:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.float()
        rows = [(shape, None if mask is None else mask.float()) for shape, mask in rows]

    with torch.autocast(device, enabled=False) if widened else nullcontext():
        # the parts of long rows, (R, L, H, D)
        if prompt_rows:
            to_mkl = may_switch_backend and torch.backends.mkldnn.matmul.fp32_precision == ONEDNN
            query, key = query.to(value.dtype), key.to(value.dtype)
            out = prompt_attention(query, key, value, prompt_rows, options["scaling"], to_mkl)
            return out.to(dtype), None

        # padded rows at once, (R, L, H, D)
        if not rows:
            out = _sdpa(may_switch_backend, module, query, key, value, attention_mask, **options)
            return out.to(dtype), None

        # packed ones rectangle by rectangle, (r, H, l, D) each, and the tokens back in their order
        parts, sizes = [], [r * length for (r, length), _ in rows]
        for (shape, mask), *some in zip(rows, *(x.split(sizes) for x in (query, key, value))):
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in some)
            parts.append(_sdpa(may_switch_backend, module, q, k, v, mask, **options).flatten(0, 1))
        return torch.cat(parts).to(dtype).index_select(0, pack)[None], None


def _sdpa(
    may_switch_backend: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options,
) -> Tensor:
    """transformers' sdpa, (R, L, H, D), by MKL where oneDNN computes the other matmuls.

    Attention's many products are so small that oneDNN's launch overhead dominates.
    """
    matmul = torch.backends.mkldnn.matmul
    if query.device.type == "cuda":
        with sdpa_kernel(GPU_BACKENDS):
            return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    if not may_switch_backend or matmul.fp32_precision != ONEDNN:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]

    held: list[str] = []

    def to_mkl(_: Tensor) -> None:
        held.append(matmul.fp32_precision)
        matmul.fp32_precision = "ieee"

    def and_back(_: Tensor) -> None:
        if held:
            matmul.fp32_precision = held.pop()

    to_mkl(query)
    try:
        out = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    finally:
        and_back(query)

    # the same in the backward pass, which enters at `out` and leaves at query, key and value
    if out.requires_grad:
        out.register_hook(to_mkl)
        for x in (query, key, value):
            if x.requires_grad:
                x.register_hook(and_back)
    return out


def decode_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one query per row (R, H, 1, D) to L keys (R, G, L, D), as (R, 1, H, D).

    sdpa is slow at this.
    """
    # (R, G, H / G, D) queries of each group of keys, and (R, G, H / G, L) weights
    grouped = query.unflatten(1, (key.shape[1], -1))[..., 0, :] * scaling
    weights = (grouped @ key.mT).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).flatten(1, 2)[:, None]


def attention_of_pieces(
    query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scale: float
) -> Tensor:
    """Attention of the tokens of a batch (R, H, L, D), each piece to its keys, as (R, L, H, D)."""
    # (R * L, H, D) each; under autocast rotary positions leave query and key in float32
    shape = query.shape[0], query.shape[2]
    query, key, value = (
        x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value)
    )

    # the keys of each piece, once per query head
    groups = query.shape[1] // key.shape[1]
    key, value = (_Keys.apply(x, pieces.keys, pieces.uses) for x in (key, value))
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return _Flash.apply(
        query, key, value, pieces.query_ends, pieces.key_ends, pieces.longest, scale
    ).unflatten(0, shape)


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
    """Flash attention of pieces: each query sees the keys of its piece up to its own.

    Keys are counted from the end. This is torch's `varlen_attn`, with a backward pass that sums in
    a fixed order where it would otherwise take any: beyond two blocks of keys. That switch is one
    of the whole process, and is turned for this kernel alone.
    """

    @staticmethod
    def forward(ctx, query, key, value, query_ends, key_ends, longest, scale):
        flash = torch.ops.aten._flash_attention_forward
        out, normalizer, *_ = flash(
            query, key, value, query_ends, key_ends, *longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, query_ends, key_ends, normalizer)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, query_ends, key_ends, normalizer = ctx.saved_tensors
        device = grad.device
        seed, offset = (
            torch.empty(2, dtype=torch.uint64, device=device),
            torch.empty(0, device=device),
        )
        with fixed_order() if ctx.longest[1] > 128 else nullcontext():
            flash = torch.ops.aten._flash_attention_backward
            sizes = (query_ends, key_ends, *ctx.longest, 0.0, True, seed, offset)
            grads = flash(
                grad.contiguous(), query, key, value, out, normalizer, *sizes, scale=ctx.scale
            )
        return *grads, None, None, None, None


@contextmanager
def fixed_order() -> Iterator[None]:
    """In the block, in all threads: only kernels that sum in a fixed order."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
