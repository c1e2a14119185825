"""What a causal LM is made of, as far as its log-probs and samples depend on it.

All of it is looked up; nothing is computed.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpo_lab.engine.prepacked import PrepackedForward

# what families call a cap or a factor on the logits; None or 1 where there is none
AFTER_HEAD = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_mup_width_multiplier",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
)

# what families call the number of tokens of the longest text
CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` or DDP, which computes the same."""
    while True:
        inside = getattr(model, "_modules", {})
        if "_orig_mod" in inside:
            model = inside["_orig_mod"]
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In the block, all modules are in evaluation mode; then each is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def widest(device: torch.device) -> torch.dtype:
    """The dtype in which log-probs are summed: float64, or float32 on Apple's mps."""
    return torch.float32 if device.type == "mps" else torch.float64


def name_of(model: nn.Module) -> str:
    """How errors name a model: by its class, and by where it came from if it knows."""
    path = getattr(model, "name_or_path", "")
    return f"{path!r} ({type(model).__name__})" if path else type(model).__name__


def text_config(model: nn.Module) -> Any:
    """The config of a model's language part: its own, except for models of images and text."""
    return vars(model.config).get("text_config") or model.config


def structure(model: nn.Module) -> tuple[Any, ...]:
    """What decides how log-probs can be computed.

    It changes when adapters come or go, or when the head is replaced.

    Raises:
        ValueError: the model has no LM head, or it is an encoder with a decoder.
    """
    if vars(model.config).get("is_encoder_decoder"):
        raise ValueError(
            f"{name_of(model)} is an encoder and a decoder; a policy must be a causal LM, such as "
            "a GPT-2 or Llama"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{name_of(model)} has no LM head, so it gives no log-probs; load it with "
            "AutoModelForCausalLM"
        )
    classes = type(model), type(head)
    return *classes, touched(head), touched(model), after_head(model), beside_modules(model)


def touched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a forward of its own."""
    own = vars(module).get("forward")
    replaced = own is not None and type(own) is not PrepackedForward
    return bool(module._forward_hooks or module._forward_pre_hooks) or replaced


def after_head(model: nn.Module) -> tuple[str, ...]:
    """The names of the caps and factors that a model applies after its LM head."""
    values = vars(text_config(model))
    return tuple(name for name in AFTER_HEAD if values.get(name) not in (None, 1))


def beside_modules(model: nn.Module) -> bool:
    """Whether a PEFT model's own forward does what its decoder's does not.

    That is the case with virtual tokens, and with adapters that certain tokens invoke.
    """
    configs = getattr(model, "peft_config", None) or {}
    return any(
        config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None)
        for config in configs.values()
    )


def context_of(model: nn.Module) -> int:
    """How many tokens prompt and completion may have together; `sys.maxsize` without a limit.

    Longrope (Phi 3) changes its frequencies beyond a certain length, for all tokens of a batch as
    soon as one row is longer: a log-prob would depend on the other rows and on later tokens. So
    that length is the limit. Virtual tokens of PEFT take their places from the text.
    """
    model = unwrapped(model)
    config = text_config(model)
    limits = (getattr(config, name, None) for name in CONTEXTS)
    declared = next((limit for limit in limits if limit is not None), sys.maxsize)
    adapters = (getattr(model, "peft_config", None) or {}).values()
    virtual = [getattr(one, "num_virtual_tokens", None) or 0 for one in adapters]
    return min(declared, _longrope(config)) - max(virtual, default=0)


def _longrope(config: Any) -> int:
    """How many tokens longrope leaves the frequencies alone for; `sys.maxsize` without it."""
    name = "original_max_position_embeddings"
    rope = vars(config).get("rope_parameters") or {}

    # one for the model, or one per type of layer
    scaled = [
        one
        for one in (rope, *rope.values())
        if isinstance(one, dict) and one.get("rope_type") == "longrope"
    ]
    return min((one.get(name) or getattr(config, name) for one in scaled), default=sys.maxsize)


def check_fits(model: nn.Module, tokens: int) -> None:
    """Raise ValueError when prompt and completion have more tokens than the model's context."""
    if tokens <= (context := context_of(model)):
        return
    why = ""
    if context == _longrope(text_config(unwrapped(model))):
        why = ", beyond which its longrope takes other frequencies, for all rows of a batch"
    raise ValueError(
        f"prompt and completion have {tokens} tokens, the model's context is {context}{why}; "
        "shorten them"
    )


def check_vocabulary(model: nn.Module, ids: Collection[int]) -> None:
    """Raise ValueError when a token id among `ids` has no embedding in the model."""
    vocabulary = len(model.get_input_embeddings().weight)
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token id {token} is outside the vocabulary of {vocabulary}; use this model's own "
                "tokenizer"
            )


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for a model whose weights are all frozen, or in half precision."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            f"{name_of(model)} has no weight that requires a gradient; call requires_grad_(True) "
            "on what should be trained"
        )
    check_precision(trained)


def check_precision(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError for weights in half precision, in which most updates are rounded away."""
    for name, parameter in parameters.items():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"{name} is {parameter.dtype}, in which most updates are rounded away; load the "
                "model in float32, as load_model does by default, and let it compute in bfloat16: "
                'precision="bfloat16", of with_reference for train_dpo'
            )
