"""Weights in oneDNN's own layout, for passes of few rows without gradients on a CPU.

torch keeps a weight row by row. In every product MKL and oneDNN copy it, piece by piece, into a
layout of their own, and with few rows that is a large part of the work. Sampling calls each layer
thousands of times, so its weight is copied once before.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpo_lab.engine.cpu import onednn_is_exact

# bytes of copied weights, at most; a larger model stays as it is
MOST_BYTES = 2**30

# who uses the copies of which layer changes under this lock
_lock = threading.Lock()


class PrepackedForward:
    """The forward pass of a linear layer by a prepacked weight, (..., in) to (..., out).

    A pass with gradients, or in another precision than the copy's, is the layer's own.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        self.layer, self.dtype, self.users = layer, dtype, 0
        weight = layer.weight.detach().to(dtype)
        self.weight = prepack(weight.t() if type(layer) is Conv1D else weight)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or _computed_in(self.layer.weight) != self.dtype:
            return type(self.layer).forward(self.layer, x)
        return product(x.to(self.dtype), self.weight, self.bias)


@contextmanager
def prepacked_weights(model: nn.Module) -> Iterator[None]:
    """In the block, linear layers of a model on a CPU multiply by prepacked weights.

    These are copies in the precision that is in force when the block begins, and the weights must
    not change until it ends. Does nothing where oneDNN cannot do it (`can_prepack`), or where the
    copies would exceed `MOST_BYTES`.
    """
    used: list[PrepackedForward] = []
    try:
        for layer in layers_to_prepack(model):
            _use(layer, used)
        yield
    finally:
        with _lock:
            for forward in used:
                forward.users -= 1
                if forward.users <= 0:
                    vars(forward.layer).pop("forward", None)


def layers_to_prepack(model: nn.Module) -> list[nn.Module]:
    """The layers whose weights are copied: not those with sharded, quantized or other weights."""
    layers = [
        layer
        for layer in model.modules()
        if type(layer) in (nn.Linear, Conv1D)
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.numel()
        and can_prepack(_computed_in(layer.weight))
    ]
    return layers if _bytes(layers) <= MOST_BYTES else []


def prepacked_bytes(model: nn.Module) -> int:
    """Bytes of the copies that `prepacked_weights` makes, in the precision that is in force."""
    return _bytes(layers_to_prepack(model))


def _bytes(layers: list[nn.Module]) -> int:
    return sum(layer.weight.numel() * _computed_in(layer.weight).itemsize for layer in layers)


def _use(layer: nn.Module, used: list[PrepackedForward]) -> None:
    """Give a layer a forward pass by a copy, or count one more for that of another thread.

    A forward pass of another kind stays. `used` knows the new one before the layer has it, so that
    it is taken back after an interrupt too.
    """
    with _lock:
        dtype = _computed_in(layer.weight)
        forward = vars(layer).get("forward") or PrepackedForward(layer, dtype)
        if type(forward) is PrepackedForward and forward.dtype == dtype:
            used.append(forward)
            forward.users += 1
            layer.forward = forward


def prepack(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def product(x: Tensor, prepacked: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times a prepacked weight, plus the bias (out,)."""
    return torch.ops.mkldnn._linear_pointwise(x, prepacked, bias, "none", [], "")


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch multiplies by prepacked weights on this CPU, as exactly as it should.

    The operators are those of torch's compiler, which torch does not promise to keep.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False

    # for its side effect: it limits oneDNN's kernels, which must happen before the first product
    onednn_is_exact()
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 64), (96, 64), (96,))
    )
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())
    try:
        with torch.no_grad():
            found = product(x, prepack(weight), bias)
    except (AttributeError, RuntimeError):
        return False
    return bool((found - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm())


def _computed_in(weight: Tensor) -> torch.dtype:
    """The precision of a product with this weight: autocast's, or the weight's own."""
    if torch.is_autocast_enabled("cpu") and weight.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return weight.dtype
