"""What a causal LM is made of, as far as its log-probs and samples depend on it: looked up, without computing anything."""

import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

AFTER_HEAD = (  # what families call a cap or a factor on the logits; None or 1 where there is none
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_mup_width_multiplier",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
)

CONTEXTS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_target_positions",
)  # what families call the longest text


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, `DataParallel` and DDP, whose parameters and function are the same."""
    while True:
        inside = getattr(model, "_modules", {})
        if "_orig_mod" in inside:
            model = inside["_orig_mod"]
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def widest(device: torch.device) -> torch.dtype:
    """float64, in which log-probs are summed; float32 where the device has none (Apple's mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def name_of(model: nn.Module) -> str:
    """How errors call a model: by its class, and where it came from if it says so."""
    path = getattr(model, "name_or_path", "")
    return f"{path!r} ({type(model).__name__})" if path else type(model).__name__


def text_config(model: nn.Module) -> Any:
    """The config of a model's language part: its own, but for models of images and text."""
    return vars(model.config).get("text_config") or model.config


def structure(model: nn.Module) -> tuple[Any, ...]:
    """What decides how log-probs can be computed: it changes when adapters come or go, or the head is replaced.

    Raises:
        ValueError: the model has no LM head, or reads one text and writes another.
    """
    if vars(model.config).get("is_encoder_decoder"):
        raise ValueError(
            f"{name_of(model)} is an encoder and a decoder; a policy must be a causal LM, such as a GPT-2 or Llama"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{name_of(model)} has no LM head, so it gives no log-probs; load it with AutoModelForCausalLM"
        )
    return (
        type(model),
        type(head),
        touched(head),
        touched(model),
        after_head(model),
        beside_modules(model),
    )


def touched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def after_head(model: nn.Module) -> tuple[str, ...]:
    """The names of the caps and factors that come after the LM head, of those that families have in their configs."""
    values = vars(text_config(model))
    return tuple(name for name in AFTER_HEAD if values.get(name) not in (None, 1))


def beside_modules(model: nn.Module) -> bool:
    """Whether a PEFT model's own forward does what its decoder's does not: virtual tokens, or adapters that tokens invoke."""
    configs = getattr(model, "peft_config", None) or {}
    return any(
        config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None)
        for config in configs.values()
    )


def context_of(model: nn.Module) -> int:
    """How many tokens prompt and completion may have together; without a limit of the model's, `sys.maxsize`.

    Of models with longrope (Phi 3), as many as it takes the same frequencies for: beyond that all tokens of a batch get others
    as soon as one row is longer, so that a log-prob would depend on what stands beside it and on what comes after it. Virtual
    tokens of PEFT (prompt and prefix tuning) take their places from the text.
    """
    model = unwrapped(model)
    config, adapters = text_config(model), (getattr(model, "peft_config", None) or {}).values()
    declared = next(
        (limit for name in CONTEXTS if (limit := getattr(config, name, None)) is not None),
        sys.maxsize,
    )
    return min(declared, _longrope(config)) - max(
        (getattr(one, "num_virtual_tokens", None) or 0 for one in adapters), default=0
    )


def _longrope(config: Any) -> int:
    """Up to how many tokens longrope, in any layer, leaves the frequencies alone; `sys.maxsize` without it."""
    rope = vars(config).get("rope_parameters") or {}
    kinds = [
        kind
        for kind in (rope, *rope.values())
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope"
    ]
    name = "original_max_position_embeddings"
    return min((kind.get(name) or getattr(config, name) for kind in kinds), default=sys.maxsize)


def check_fits(model: nn.Module, tokens: int) -> None:
    """Raise ValueError when prompt and completion have more tokens than the model's context."""
    if tokens > (context := context_of(model)):
        changes = context == _longrope(text_config(unwrapped(model)))
        why = (
            ", for beyond that its longrope takes other frequencies, for all rows of a batch"
            if changes
            else ""
        )
        raise ValueError(
            f"prompt and completion have {tokens} tokens, the model's context is {context}{why}; shorten them"
        )


def check_vocabulary(model: nn.Module, ids: Collection[int]) -> None:
    """Raise ValueError when there are other token ids among `ids` than the model has embeddings for."""
    vocabulary = len(model.get_input_embeddings().weight)
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token id {token} is outside the vocabulary of {vocabulary}; use this model's own tokenizer"
            )


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError for weights that cannot be trained: all of them frozen, or in half precision."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            f"{name_of(model)} has no weight that requires a gradient; call requires_grad_(True) on what should train"
        )
    check_precision(trained)


def check_precision(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError for weights in half precision, in which most updates are rounded away."""
    for name, parameter in parameters.items():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"{name} is {parameter.dtype}, in which most updates are rounded away; load the model in float32, as load_model "
                'does by default, and let it compute in bfloat16: precision="bfloat16", of with_reference for train_dpo'
            )
