"""Log-probs of tokens from the hidden states that predict them, through a linear LM head, in bounded memory."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpo_lab.engine.cpu import matmuls_by_onednn
from dpo_lab.engine.pieces import ROUND

STORED_LOGITS_BYTES = (
    2**28
)  # logits up to 256 MiB wait for the backward pass, in one piece; beyond that it computes them again,

CHUNK_BYTES = (
    2**26
)  # 64 MiB at a time: rows enough for matmuls to be fast, and small beside any model

PADS_HEAD = (
    "cuda",
)  # devices whose matmuls take slower kernels where a size is odd, as GPT-2's vocabulary is

ON_GPU = 4  # times as much of both: a GPU needs more rows to be busy

SOFTMAX_ROWS = 64  # rows that are normalized at a time: many times faster than all of them, which would go through memory


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[target] at each position, (T,) nats, in chunks of bounded memory.

    hidden (T, D), weight (V, D), bias (V,) or None, targets (T,). Under autocast the product runs in its dtype; the
    normalizer is float32 (float64 for float64 input).
    """
    device, n, extra = hidden.device.type, len(targets), -len(targets) % ROUND
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, targets = (
        nn.functional.pad(hidden, (0, 0, 0, extra)),
        nn.functional.pad(targets, (0, extra)),
    )
    return _TokenLogps.apply(hidden, weight, bias, targets, dtype, torch.is_grad_enabled())[:n]


def logits_budget(device: str) -> tuple[int, int]:
    """Bytes of logits that may wait for the backward pass, and of those that are there at a time beyond that."""
    times = ON_GPU if device == "cuda" else 1
    return times * STORED_LOGITS_BYTES, times * CHUNK_BYTES


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """hidden @ weight.T + bias (C, n), and columns of -inf up to a multiple of 64: MKL is half as slow again without them.

    `weight` has n rows, or more that do not count.
    """
    logits = hidden.new_empty(len(hidden), -(-n // 64) * 64)
    torch.mm(hidden, weight.T, out=logits[:, : len(weight)])
    logits[:, n:] = -torch.inf
    return (
        logits if bias is None else logits.add_(nn.functional.pad(bias, (0, logits.shape[1] - n)))
    )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, grad_enabled):
        row = len(weight) * dtype.itemsize  # bytes of a position's logits
        kept_bytes, chunk_bytes = logits_budget(hidden.device.type)
        keep = grad_enabled and any(ctx.needs_input_grad) and len(targets) * row <= kept_bytes
        ctx.wide = torch.promote_types(dtype, torch.float32)
        ctx.part = SOFTMAX_ROWS if hidden.device.type == "cpu" else len(targets)
        chunks = 1 if keep else -(-len(targets) // max(SOFTMAX_ROWS, chunk_bytes // row))
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
        kept, ctx.kept = (
            ctx.kept,
            None,
        )  # which is overwritten; a second backward pass computes it again
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
                        part.copy_(
                            torch.log_softmax(part, 1, dtype=ctx.wide).exp_()
                        )  # as in the forward pass
                g = g[
                    :, : len(w)
                ]  # (C, V), or with columns of zeros where the head has rows that do not count
                g[torch.arange(len(g), device=g.device), targets[rows]] -= (
                    1  # times scale: d loss / d logits
                )
                torch.mul(g @ w, scale[rows], out=grad_h[rows])
                if grad_w is not None and ctx.dtype == weight.dtype and len(w) == len(weight):
                    torch.addmm(
                        grad_w, g.T, h[rows] * scale[rows], beta=int(i > 0), out=grad_w
                    )  # without another (V, D)
                elif grad_w is not None:
                    product = (g.T @ (h[rows] * scale[rows]))[: len(weight)]
                    grad_w = grad_w.copy_(product) if i == 0 else grad_w.add_(product)
                if grad_b is not None:
                    grad_b += (g.T @ scale[rows, 0])[: len(weight)]
        return grad_h.to(hidden.dtype), grad_w, grad_b, None, None, None
