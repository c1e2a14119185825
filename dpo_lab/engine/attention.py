"""Attention for log-probs: of padded rows, of packed tokens laid out in rows, and on a GPU of pieces of variable length.

It is registered with transformers' `AttentionInterface`; all else in a decoder works on one token at a time.
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

from dpo_lab.engine.cpu import ONEDNN, matmuls_by_mkl
from dpo_lab.engine.pieces import Pieces


def takes_pieces(model: nn.Module, device: torch.device) -> bool:
    """Whether torch's variable-length flash attention computes this model here: on a GPU, in half precision."""
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
    **options,
) -> tuple[Tensor, None]:
    """sdpa for transformers' `AttentionInterface`: of rows (R, H, L, D), or of packed tokens (1, H, S, D), laid out in `rows`.

    On a GPU in half precision both go through flash attention instead, as `pieces` of variable length.

    All else in a decoder works on one token at a time and never sees padding. bfloat16 on a CPU goes through float32: the
    backward pass of the bfloat16 kernel is the slower one. `may_switch_backend`: no other thread computes meanwhile (as those that sample
    do), so that the matmuls may change hands.
    """
    if pieces is not None:
        return attention_of_pieces(query, key, value, pieces, options["scaling"]), None
    if attention_mask is not None and attention_mask.numel() == NO_MASK.numel():
        attention_mask = None
    dtype, device = value.dtype, query.device.type
    widened = device == "cpu" and dtype == torch.bfloat16
    one = query.shape[2] == 1 and attention_mask is None and not torch.is_grad_enabled()
    if one and (
        widened or device == "cuda"
    ):  # there cuDNN would make a plan for each number of rows and keys
        return decode_attention(query.to(dtype), key.to(dtype), value, options["scaling"]), None
    if rows:
        query, key, value = (
            x[0].transpose(0, 1).index_select(0, spread) for x in (query, key, value)
        )  # (all r * l, H, D)
    if widened:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.float()
        rows = [(shape, None if mask is None else mask.float()) for shape, mask in rows]
    with torch.autocast(device, enabled=False) if widened else nullcontext():
        if not rows:
            return _sdpa(
                may_switch_backend, module, query, key, value, attention_mask, **options
            ).to(dtype), None  # (R, L, H, D)
        parts, sizes = [], [r * length for (r, length), _ in rows]
        for (shape, mask), *laid in zip(rows, *(x.split(sizes) for x in (query, key, value))):
            laid = (x.unflatten(0, shape).transpose(1, 2) for x in laid)  # (r, H, l, D) each
            parts.append(_sdpa(may_switch_backend, module, *laid, mask, **options).flatten(0, 1))
        return torch.cat(parts).to(dtype).index_select(0, pack)[None], None


def attention_of_pieces(
    query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scale: float
) -> Tensor:
    """Attention of the tokens of a batch (R, H, L, D), each piece to its keys, (R, L, H, D)."""
    shape = query.shape[0], query.shape[2]
    # (R * L, H, D) each; rotary positions leave float32 under autocast
    query, key, value = (
        x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value)
    )
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
    """Flash attention of pieces: each query sees the keys of its piece up to its own, counted from the end.

    torch's `varlen_attn`, with a backward pass that adds up in a fixed order where it would else take any: beyond two blocks of
    keys. That is a switch of the whole process, which is turned for this one kernel.
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
        of_dropout = (
            torch.empty(2, dtype=torch.uint64, device=grad.device),
            torch.empty(0, device=grad.device),
        )
        with fixed_order() if ctx.longest[1] > 128 else nullcontext():
            flash = torch.ops.aten._flash_attention_backward
            sizes = (query_ends, key_ends, *ctx.longest, 0.0, True, *of_dropout)
            grads = flash(
                grad.contiguous(), query, key, value, out, normalizer, *sizes, scale=ctx.scale
            )
        return *grads, None, None, None, None


@contextmanager
def fixed_order() -> Iterator[None]:
    """Only kernels that add up in a fixed order meanwhile, in all threads; what the process had comes back."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _sdpa(
    may_switch_backend: bool,
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options,
) -> Tensor:
    """transformers' sdpa, forward and backward, (R, L, H, D); `may_switch_backend`, by MKL where the other matmuls are oneDNN's.

    Its many products are so small that oneDNN would take longer to begin them than to compute them.
    """
    matmul = torch.backends.mkldnn.matmul
    if (
        query.device.type == "cuda"
    ):  # without cuDNN, which makes a plan for each shape, and the shapes of batches are many
        with sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        ):
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

    with matmuls_by_mkl():
        out = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    if out.requires_grad:
        out.register_hook(to_mkl)
        for x in (query, key, value):
            if x.requires_grad:
                x.register_hook(and_back)
    return out


def decode_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of one query per row (R, H, 1, D) to L keys (R, G, L, D), as (R, 1, H, D): sdpa is slow at it."""
    grouped = query.unflatten(1, (key.shape[1], -1))[..., 0, :] * scaling  # (R, G, H / G, D)
    weights = (
        (grouped @ key.mT).softmax(-1, dtype=torch.float32).to(query.dtype)
    )  # (R, G, H / G, L)
    return (weights @ value).flatten(1, 2)[:, None]


PACKED = "dpo_lab_packed"

NO_MASK = torch.empty(
    1, 1, 1, 1
)  # four dimensions: transformers hands it on as it is, instead of making a mask

AttentionInterface.register(PACKED, packed_attention)

AttentionMaskInterface.register(PACKED, sdpa_mask)
