"""Functions of the exercises with known mistakes, as tensors that can be trained with."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_lab.checks import EXERCISES, Exercise

Settings = Mapping[str, str]
"""Mistakes by switch, as in `assets/mistakes.csv`; none is the right function."""


def singles(exercise: Exercise) -> list[tuple[str, Settings]]:
    """The right function and every single mistake, each with its name."""
    named = [("right", {})]
    for switch, some in exercise.slips.items():
        named += [(slip.name, {switch: setting}) for setting, slip in some.items()]
    return named


# by numbers: any exercise


class _Numeric(torch.autograd.Function):
    """An exercise's answer in numpy; its gradient in one input by central differences."""

    STEP = 1e-6

    @staticmethod
    def forward(ctx, x, function):
        ctx.x, ctx.function, ctx.dtype = x.detach().double().numpy(), function, x.dtype
        return torch.as_tensor(function(ctx.x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slope = np.zeros(ctx.x.size)
        for i in range(slope.size):
            sides = []
            for change in (_Numeric.STEP, -_Numeric.STEP):
                moved = ctx.x.flatten()
                moved[i] += change
                sides.append(ctx.function(moved.reshape(ctx.x.shape)))
            with np.errstate(all="ignore"):
                slope[i] = (grad.numpy() * (sides[0] - sides[1])).sum() / (2 * _Numeric.STEP)
        return torch.as_tensor(slope.reshape(ctx.x.shape)).to(ctx.dtype), None


def mistaken(name: str, settings: Settings) -> Callable[..., Tensor]:
    """`my_{name}` with these mistakes, differentiable in its first input."""
    exercise = EXERCISES[name]

    def function(x: Tensor, *rest: Tensor | float) -> Tensor:
        others = [value.numpy() if isinstance(value, Tensor) else value for value in rest]

        def values(first: np.ndarray) -> np.ndarray:
            with np.errstate(all="ignore"):
                return np.asarray(exercise.answer(first, *others, **settings), dtype=float)

        return _Numeric.apply(x, values)

    function.__name__ = f"my_{name}"
    return function


# by torch: log-probs of completions, from logits that are too many for differences

# the mistakes of `my_sequence_logps` that a training run is shown for
LOGPS_MISTAKES = {
    "right": {},
    "mean over tokens": {"reduce": "mean"},
    "prompt counted": {"mask": "prompt counted"},
    "padding counted": {"mask": "padding counted"},
    "mask inverted": {"mask": "inverted"},
    "EOS dropped": {"mask": "last dropped"},
    "labels not shifted": {"shift": "unshifted"},
    "mask not shifted": {"shift": "mask unshifted"},
    "not normalized": {"normal": "raw"},
    "sign": {"sign": "negative"},
}


def mistaken_logps(
    logits: Tensor, input_ids: Tensor, completion_mask: Tensor, settings: Settings
) -> Tensor:
    """`my_sequence_logps` with one of `LOGPS_MISTAKES`, (B,) nats.

    Args:
        logits: (B, L, V).
        input_ids: (B, L).
        completion_mask: (B, L), True on the tokens of the completion.
        settings: one of the values of `LOGPS_MISTAKES`.
    """
    table = logits if settings.get("normal") == "raw" else logits.log_softmax(-1)
    length = input_ids.shape[1]

    # which scores meet which targets, and the places of the targets
    whole, early, late = slice(None), slice(0, -1), slice(1, None)
    scores, targets, mask = {
        None: (early, late, late),
        "unshifted": (whole, whole, whole),
        "mask unshifted": (early, late, early),
    }[settings.get("shift")]
    place = torch.arange(length)[targets]
    start = completion_mask.int().argmax(1, keepdim=True)
    end = start + completion_mask.sum(1, keepdim=True)

    # which of them count
    kept = completion_mask[:, mask]
    kept = {
        None: kept,
        "prompt counted": place < end,
        "padding counted": place >= start,
        "inverted": ~kept,
        "last dropped": kept & (place != end - 1),
    }[settings.get("mask")]
    found = table[:, scores].gather(-1, input_ids[:, targets, None])[..., 0]
    sums = torch.where(kept, found, 0.0).sum(1)
    sums = sums / kept.sum(1) if settings.get("reduce") == "mean" else sums
    return -sums if settings.get("sign") == "negative" else sums
