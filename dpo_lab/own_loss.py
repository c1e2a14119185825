"""A loss of the user's own for `train_dpo`: tried before training, read at each step, recorded."""

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lab.engine.records import data_hash
from dpo_lab.engine.structure import widest
from dpo_lab.losses import DPOLoss
from dpo_lab.preferences import Preferences

OwnLoss = Callable[..., Tensor | DPOLoss]
"""A loss in place of `dpo_loss`: from policy_logps (N,), reference_logps (N,), chosen (P,),
rejected (P,) and beta to losses (P,), or to a `DPOLoss`. One with a parameter named `lengths` is
also given the number of tokens of each completion (N,) by that name. One with an attribute
`needs_reference` that is False trains on preferences without reference log-probs as well, and gets
None in their place."""


def needs_reference(loss: OwnLoss | None) -> bool:
    """Whether a loss reads the log-probs of the reference; DPO's own, None, does."""
    return bool(getattr(loss, "needs_reference", True))


def call_loss(
    loss: OwnLoss,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    lengths: Tensor,
) -> DPOLoss:
    """What a user's loss finds, as a `DPOLoss`; `lengths` are given to a loss that asks for them.

    Raises:
        ValueError, TypeError: it returned something else.
    """
    data = (policy_logps, reference_logps, chosen, rejected, beta)
    found = loss(*data, lengths=lengths) if _takes_lengths(loss) else loss(*data)
    return as_dpo_loss(loss, found, *data)


def try_loss(
    loss: OwnLoss, preferences: Preferences, pairs: np.ndarray, beta: float, device: torch.device
) -> None:
    """Call a user's loss on the first batch, with the reference's log-probs for the policy's.

    Where there are none, with minus one nat per token.

    Raises:
        ValueError, TypeError: it does not return finite losses (P,) with a gradient.
    """
    if not callable(loss):
        raise TypeError(
            f"loss is {loss!r}; it must be a function of policy_logps, reference_logps, chosen, "
            "rejected and beta. The name of a loss belongs in config.loss_type"
        )

    # what it would get from a policy that is still the reference
    used, chosen, rejected = preferences.completions_of(pairs)
    lengths = torch.tensor([len(preferences.completions[i]) for i in used])
    known = preferences.reference_logps
    reference = -lengths if known is None else torch.as_tensor(known[used])
    indices = [torch.as_tensor(side).to(device) for side in (chosen, rejected)]

    # a call that leaves no trace, and its gradient
    with torch.enable_grad(), _random_state_kept():
        reference = reference.to(widest(device)).to(device)
        logps = reference.clone().requires_grad_()
        data = (logps, None if known is None else reference, *indices, beta)
        result = call_loss(loss, *data, lengths.to(device))
        gradient = None
        if result.losses.requires_grad:
            (gradient,) = torch.autograd.grad(result.losses.sum(), logps, allow_unused=True)

    # finite values and a finite gradient
    name = _name_of(loss)
    for part, values in result._asdict().items():
        if values is not None and not torch.isfinite(values).all():
            at = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(
                f"{part}[{at}] of loss ({name}) is {values[at].item()} on the first batch, where "
                "policy and reference are the same; every value must be finite"
            )
    if gradient is None:
        raise ValueError(
            f"loss ({name}) returned losses without a gradient with respect to policy_logps; "
            "compute them from policy_logps by torch functions, without detach, item or numpy"
        )
    if not torch.isfinite(gradient).all():
        raise ValueError(
            f"the gradient of loss ({name}) is not finite on the first batch, where policy and "
            "reference are the same; look for a square root, norm or logarithm of zero"
        )


def as_dpo_loss(
    loss: OwnLoss,
    found: Any,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
) -> DPOLoss:
    """What a user's loss has `found`, as a `DPOLoss`: without gradient weights for losses alone.

    Raises:
        ValueError, TypeError: it returned something else.
    """
    if not isinstance(found, DPOLoss):
        ratios = policy_logps if reference_logps is None else policy_logps - reference_logps
        rewards = beta * ratios  # (N,)
        found = DPOLoss(found, rewards, rewards[chosen] - rewards[rejected], None)

    # tensors of the right shapes
    n, p = len(policy_logps), len(chosen)
    shapes = {"losses": (p,), "rewards": (n,), "margins": (p,), "gradient_weights": (p,)}
    for part, values in found._asdict().items():
        if part == "gradient_weights" and values is None:
            continue
        if not isinstance(values, Tensor) or not values.is_floating_point():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(
                f"loss ({_name_of(loss)}) returned {part} as {kind}; it must return a "
                "floating-point tensor (P,), one loss per pair, or a DPOLoss"
            )
        if tuple(values.shape) != shapes[part]:
            raise ValueError(
                f"loss ({_name_of(loss)}) returned {part} of shape {tuple(values.shape)} for {n} "
                f"completions and {p} pairs; the shape must be {shapes[part]}, with one loss per "
                "pair, neither summed nor averaged"
            )

    # what is only logged keeps no graph
    losses, *logged = found
    return DPOLoss(losses, *(None if values is None else values.detach() for values in logged))


def _takes_lengths(loss: OwnLoss) -> bool:
    """Whether a loss has a parameter named `lengths`."""
    try:
        return "lengths" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a builtin without one
        return False


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Give torch, numpy and Python the random state back that they had."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _name_of(loss: OwnLoss) -> str:
    """The qualified name of a function, of what a partial calls, or of an object's class."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def loss_record(loss: OwnLoss) -> dict[str, str]:
    """What names a user's loss in the record of a run: its name, and a hash of its source.

    The hash also covers plain values that the loss was made with: defaults, a closure's variables,
    a partial's arguments, an object's attributes. It does not cover other functions that it calls.
    """
    name, settings = _name_of(loss), []
    while isinstance(loss, functools.partial):
        settings += [loss.args, loss.keywords]
        loss = loss.func

    # the source, or the compiled code where there is none to read
    function = loss if hasattr(loss, "__qualname__") else type(loss)
    try:
        source: Any = inspect.getsource(function)
    except (OSError, TypeError):
        source = _code(getattr(function, "__code__", None))

    settings += [getattr(loss, part, None) for part in ("__defaults__", "__kwdefaults__")]
    settings += [cell.cell_contents for cell in getattr(loss, "__closure__", None) or ()]
    settings += [] if function is loss else [vars(loss)]
    return {"name": name, "source": data_hash(source, _plain(settings))}


def _code(code: CodeType | None) -> Any:
    """Compiled code as plain values, without the file and the lines that it came from."""
    if code is None:
        return None
    inner = [_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), inner]


def _plain(value: Any) -> Any:
    """Numbers, text, arrays and what holds them; of anything else only its type."""
    if isinstance(value, (Tensor, np.ndarray, bool, int, float, str, bytes, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return type(value).__qualname__
