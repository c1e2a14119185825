"""Log-probs of tokens from hidden states, through a linear LM head, in bounded memory."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpo_lab.engine.cpu import matmuls_by_onednn
from dpo_lab.engine.pieces import ROUND

# Logits up to 256 MiB are kept for the backward pass. Beyond that they are computed again there, in
# chunks of 64 MiB: enough rows for fast matmuls, and small beside any model.
STORED_LOGITS_BYTES = 2**28
CHUNK_BYTES = 2**26

# four times as much of both on a GPU, which needs more rows to be busy
ON_GPU = 4

# devices with slow matmuls for odd sizes, such as GPT-2's vocabulary
PADS_HEAD = ("cuda",)

# softmax this many rows at a time on a CPU, so that they stay in its cache: many times faster
SOFTMAX_ROWS = 64


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[target] at each position, (T,) nats.

    hidden (T, D), weight (V, D), bias (V,) or None, targets (T,). Under autocast the product is in
    its dtype; the normalizer is float32 (float64 for float64 input).
    """
    device, n, extra = hidden.device.type, len(targets), -len(targets) % ROUND
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden = nn.functional.pad(hidden, (0, 0, 0, extra))
    targets = nn.functional.pad(targets, (0, extra))
    return _TokenLogps.apply(hidden, weight, bias, targets, dtype, torch.is_grad_enabled())[:n]


def logits_budget(device: str) -> tuple[int, int]:
    """Bytes of logits that may be kept for the backward pass, and bytes per chunk beyond that."""
    times = ON_GPU if device == "cuda" else 1
    return times * STORED_LOGITS_BYTES, times * CHUNK_BYTES


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """hidden @ weight.T + bias (C, n), and columns of -inf up to a multiple of 64.

    MKL is 1.5 times slower unpadded. `weight` has n rows, or more, which do not count.
    """
    logits = hidden.new_empty(len(hidden), -(-n // 64) * 64)
    torch.mm(hidden, weight.T, out=logits[:, : len(weight)])
    logits[:, n:] = -torch.inf
    if bias is None:
        return logits
    return logits.add_(nn.functional.pad(bias, (0, logits.shape[1] - n)))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, grad_enabled):
        device = hidden.device.type

        # keep the logits for the backward pass, or go chunk by chunk
        bytes_per_row = len(weight) * dtype.itemsize
        stored_bytes, chunk_bytes = logits_budget(device)
        differentiated = grad_enabled and any(ctx.needs_input_grad)
        keep = differentiated and len(targets) * bytes_per_row <= stored_bytes
        rows_per_chunk = max(SOFTMAX_ROWS, chunk_bytes // bytes_per_row)
        chunks = 1 if keep else -(-len(targets) // rows_per_chunk)
        ctx.chunk, ctx.dtype, ctx.kept = -(-len(targets) // chunks), dtype, None
        ctx.wide = torch.promote_types(dtype, torch.float32)
        ctx.part = SOFTMAX_ROWS if device == "cpu" else len(targets)

        # everything in the dtype of the product
        h, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if device in PADS_HEAD:
            w = nn.functional.pad(w, (0, 0, 0, -len(w) % 64))

        # one product per chunk, one softmax per few rows
        logps = []
        with torch.autocast(device, enabled=False):
            for h_c, y_c in zip(h.split(ctx.chunk), targets.split(ctx.chunk)):
                logits = _logits(h_c, w, b, len(weight))  # (C, V, rounded up)
                for part, y in zip(logits.split(ctx.part), y_c.split(ctx.part)):
                    wide = torch.log_softmax(part, 1, dtype=ctx.wide)
                    logps.append(wide.gather(1, y[:, None])[:, 0])
                    if keep:
                        part.copy_(wide.exp_())

        # by now the kept logits are probabilities
        ctx.kept = logits if keep else None
        ctx.save_for_backward(hidden, weight, bias, targets, w)
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets, w = ctx.saved_tensors
        device, n = hidden.device.type, len(weight)

        # the kept probabilities are overwritten; a second backward pass computes them again
        kept, ctx.kept = ctx.kept, None

        h, b = hidden.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        grad_h, scale = torch.empty_like(h), -grad[:, None].to(ctx.dtype)
        grad_w = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_b = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        with torch.autocast(device, enabled=False), matmuls_by_onednn(device):
            for i in range(0, len(targets), ctx.chunk):
                rows = slice(i, i + ctx.chunk)

                # probabilities, as in the forward pass
                g = kept
                if kept is None:
                    g = _logits(h[rows], w, b, n)
                    for part in g.split(ctx.part):
                        part.copy_(torch.log_softmax(part, 1, dtype=ctx.wide).exp_())

                # minus one at the target: times `scale` this is d loss / d logits, (C, V). Where
                # the head was padded on a GPU, the further columns are zero.
                g = g[:, : len(w)]
                g[torch.arange(len(g), device=g.device), targets[rows]] -= 1
                torch.mul(g @ w, scale[rows], out=grad_h[rows])

                # into the gradient of the head, without another (V, D) where dtype and size allow
                if grad_w is not None and ctx.dtype == weight.dtype and len(w) == n:
                    scaled = h[rows] * scale[rows]
                    torch.addmm(grad_w, g.T, scaled, beta=int(i > 0), out=grad_w)
                elif grad_w is not None:
                    product = (g.T @ (h[rows] * scale[rows]))[:n]
                    grad_w = grad_w.copy_(product) if i == 0 else grad_w.add_(product)
                if grad_b is not None:
                    grad_b += (g.T @ scale[rows, 0])[:n]
        return grad_h.to(hidden.dtype), grad_w, grad_b, None, None, None
