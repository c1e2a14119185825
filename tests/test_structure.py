"""Log-probs, samples and training of models that do more than a decoder under a linear head."""

import copy
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForCausalLM,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutput

from dpo_lab.batching import completion_batch
from dpo_lab.engine.checkpoints import weights_hash
from dpo_lab.engine.structure import context_of, unwrapped, widest
from dpo_lab.evaluate import evaluate_policy
from dpo_lab.logprobs import can_compact, completion_logps, logit_path, score_completions
from dpo_lab.loop import LoopConfig
from dpo_lab.models import ScalarModel, check_cache, end_tokens, load_model, load_tokenizer, lora
from dpo_lab.preferences import Preferences
from dpo_lab.rlhf.ppo import PPOConfig, train_ppo
from dpo_lab.rlhf.reward_model import LearnedReward, RewardModelConfig, train_reward_model
from dpo_lab.sampling import sample_completions, sample_with_logps
from dpo_lab.train import DPOConfig, sft_batches, train_dpo, train_sft, train_unlikelihood

PROMPTS, COMPLETIONS, PROMPT_OF = (
    [[1, 5, 7, 9, 2, 11], [3, 8]],
    [[6, 2], [4, 4, 9, 2], [5, 2, 7], [10, 2]],
    [0, 0, 1, 1],
)
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZE |= {
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LOOP = LoopConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
PPO = PPOConfig(steps=1, batch=2, minibatch=2, epochs=1, max_new_tokens=4)


def llama(**options):
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE | options)).eval()


def adapted(config, spread=0.3):
    """A small Llama with adapters far from zero, in evaluation mode."""
    model = get_peft_model(llama(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=spread)
    return model


class Halved(LlamaForCausalLM):
    """A family that scales its logits and says so nowhere."""

    def forward(self, *arguments, **options):
        found = super().forward(*arguments, **options)
        found.logits = found.logits / 2
        return found


def hooked():
    model = llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    return model


def sequential():
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    return model


def halved():
    set_seed(0)
    return Halved(LlamaConfig(**SIZE)).eval()


def family(model, config, **options):
    set_seed(0)
    return model(config(**SIZE | options)).eval()


LORA = partial(LoraConfig, r=4, task_type="CAUSAL_LM")
ODD = {  # how each is made, and the way its log-probs must take
    "LoRA on the head": (lambda: adapted(LORA(target_modules=["q_proj", "lm_head"])), "head"),
    "a trained copy of the head": (
        lambda: adapted(LORA(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        "head",
    ),
    "a hook on the head": (hooked, "head"),
    "a head of two layers": (sequential, "head"),
    "prompt tuning": (
        lambda: adapted(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 1.0),
        "forward",
    ),
    "prefix tuning": (
        lambda: adapted(PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 1.0),
        "forward",
    ),
    "P-tuning": (
        lambda: adapted(
            PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
        ),
        "forward",
    ),
    "Gemma 2": (
        lambda: family(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=2.0),
        "forward",
    ),
    "Granite": (lambda: family(GraniteForCausalLM, GraniteConfig, logits_scaling=8.0), "forward"),
    "Cohere": (
        lambda: family(CohereForCausalLM, CohereConfig, bos_token_id=1, eos_token_id=2),
        "forward",
    ),
    "a forward of its own": (halved, "forward"),
}
PLAIN = {
    "Llama": (llama, "weights"),
    "Mistral": (lambda: family(MistralForCausalLM, MistralConfig, sliding_window=4), "weights"),
    "LoRA in the blocks": (
        lambda: adapted(LORA(target_modules=["q_proj", "down_proj"])),
        "weights",
    ),
}
every_odd = pytest.mark.parametrize("name", ODD)
VIRTUAL = ("prompt tuning", "prefix tuning", "P-tuning")


def own_logps(model, temperature=1.0):
    """Each completion by the model's own forward pass on it alone, token by token, float64."""
    found = []
    for completion, p in zip(COMPLETIONS, PROMPT_OF):
        ids = torch.tensor([PROMPTS[p] + completion])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
            0, -ids.shape[1] :
        ]
        table = (logits.double() / temperature).log_softmax(-1)[len(PROMPTS[p]) - 1 : -1]
        found.append(table.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def own_sums(model):
    with torch.no_grad():
        return torch.stack([tokens.sum() for tokens in own_logps(model)])


def laid_out(model, share=None):
    return completion_batch(
        PROMPTS, COMPLETIONS, PROMPT_OF, compact=can_compact(model) if share is None else share
    )


def pairs(model):
    """The first completion of each prompt is the better one."""
    prompt_of, chosen, rejected = (np.array(values) for values in (PROMPT_OF, [0, 2], [1, 3]))
    return Preferences(PROMPTS, COMPLETIONS, prompt_of, chosen, rejected).with_reference(model)


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ODD | PLAIN)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_gradients_are_those_of_the_model_s_own_forward(name, temperature):
    make, way = (ODD | PLAIN)[name]
    model = make()
    expected = own_logps(model, temperature)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    by_hand = torch.autograd.grad(
        sum(k * tokens.sum() for k, tokens in enumerate(expected, 1)), list(trained.values())
    )
    batch = laid_out(model)
    found = completion_logps(model, batch, reduction="none", temperature=temperature)
    assert logit_path(model) == way
    for i, tokens in enumerate(expected):
        close(found[batch.owners == i].detach(), tokens.detach())
    weights = torch.arange(1, 5)[batch.owners]
    gradients = torch.autograd.grad(
        (weights * found).sum(), list(trained.values()), allow_unused=True
    )
    for gradient, other in zip(gradients, by_hand):
        close(gradient, other, atol=1e-3 * float(1 + other.abs().max()))
    sums = completion_logps(model, batch, temperature=temperature).detach()
    close(sums, torch.zeros(4).double().index_add(0, batch.owners, found.detach()))


@every_odd
def test_every_door_gives_the_log_probs_of_the_model_s_own_forward(name, tmp_path):
    """Scoring, a run's reference, the first step of DPO, unlikelihood, SFT; then what has moved."""
    make, _ = ODD[name]
    model = make()
    expected = own_sums(model)
    # the plain decoder under its head is another model
    assert (expected - own_sums(llama())).abs().max() > 0.1
    close(score_completions(model, PROMPTS, COMPLETIONS, PROMPT_OF), expected)
    preferences = pairs(model)
    close(torch.from_numpy(preferences.reference_logps), expected)

    (first,) = train_dpo(
        copy.deepcopy(model), preferences, DPOConfig(beta=0.5, loop=LOOP), progress=None
    )
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["logps/chosen"] == pytest.approx(float(expected[[0, 2]].mean()), abs=1e-4)
    (first,) = train_unlikelihood(copy.deepcopy(model), preferences, 0.3, LOOP, progress=None)
    assert first["logps/rejected"] == pytest.approx(float(expected[[1, 3]].mean()), abs=1e-4)
    trained = copy.deepcopy(model)
    batches = sft_batches(preferences, 4, chosen_only=False, compact=can_compact(model))
    (first,) = train_sft(
        trained, batches, 1, replace(LOOP, learning_rate=1e-3), run=tmp_path, progress=None
    )
    assert first["loss"] == pytest.approx(
        -float(expected.sum()) / sum(map(len, COMPLETIONS)), abs=1e-4
    )
    # it is the model's own forward pass that must have been trained
    assert own_sums(trained).sum() > expected.sum()
    close(score_completions(trained, PROMPTS, COMPLETIONS, PROMPT_OF), own_sums(trained))


@every_odd
def test_samples_are_those_of_plain_forward_passes_or_are_refused(name):
    model = ODD[name][0]()
    if name in VIRTUAL:
        with pytest.raises(
            ValueError, match="puts virtual tokens before the text.*its own generate"
        ):
            sample_completions(model, PROMPTS, 1, eos_token_id=2, max_new_tokens=6)
        return
    for prompt, (ids,) in zip(
        PROMPTS,
        sample_completions(model, PROMPTS, 1, eos_token_id=2, max_new_tokens=6, temperature=0),
    ):
        text = list(prompt)
        while len(text) < len(prompt) + 6 and (len(text) == len(prompt) or text[-1] != 2):
            with torch.no_grad():
                text.append(
                    int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
                )
        assert ids == text[len(prompt) :]
    completions, logps = sample_with_logps(model, PROMPTS, 3, eos_token_id=2, max_new_tokens=6)
    flat = [ids for row in completions for ids in row]
    close(
        score_completions(model, PROMPTS, flat, [0, 0, 0, 1, 1, 1]),
        torch.tensor(logps).flatten(),
        atol=1e-3,
    )


@pytest.mark.parametrize("name", ODD | PLAIN)
def test_gradient_checkpointing_changes_no_step_or_is_refused(name):
    made = (ODD | PLAIN)[name][0]()
    preferences, ends = pairs(made), []
    for again in (False, True):
        model, config = (
            copy.deepcopy(made),
            DPOConfig(beta=0.5, epochs=2, loop=replace(LOOP, gradient_checkpointing=again)),
        )
        if again and name == "prefix tuning":
            with pytest.raises(
                ValueError,
                match="gradient_checkpointing is on, and prefix tuning does not allow it",
            ):
                train_dpo(model, preferences, config, progress=None)
            return
        ends.append([line["loss"] for line in train_dpo(model, preferences, config, progress=None)])
    assert ends[0] == pytest.approx(ends[1], abs=1e-6) and ends[0][-1] < ends[0][0]


@pytest.mark.parametrize("name", ["LoRA on the head", "Granite"])
def test_ppo_starts_at_ratio_one_and_trains_what_the_forward_uses(name):
    policy, reference, value = ODD[name][0](), ODD[name][0](), ScalarModel(llama())
    before = {n: p.clone() for n, p in policy.named_parameters() if p.requires_grad}

    def low(prompts, completions):
        return np.array([-sum(ids) for ids in completions], dtype=float)

    lines = train_ppo(policy, reference, value, low, PROMPTS, PPO, eos_token_id=2, progress=None)
    assert lines[-1]["policy/ratio_off"] == 0 == lines[-1]["objective/kl"]
    moved = {
        n for n, p in policy.named_parameters() if n in before and not torch.equal(p, before[n])
    }
    assert any("lm_head" in n for n in moved)


def test_a_cache_whose_rows_cannot_leave_is_refused_before_the_first_token():
    """Falcon H1 caches convolutions beside keys and values; not all are selected per row."""
    sizes = {
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
    }
    model = family(FalconH1ForCausalLM, FalconH1Config, lm_head_multiplier=0.5, **sizes)
    close(score_completions(model, PROMPTS, COMPLETIONS, PROMPT_OF), own_sums(model))
    with pytest.raises(
        ValueError, match="FalconH1ForCausalLM does not continue from transformers' key-value cache"
    ):
        sample_completions(model, PROMPTS, 1, eos_token_id=2, max_new_tokens=6)


def test_adapters_that_are_zero_as_yet_are_seen_and_trained():
    """LoRA begins with B at zero, where no number tells it from the plain head."""
    model = get_peft_model(llama(), LORA(target_modules=["lm_head"])).eval()
    close(own_sums(model), own_sums(llama()), atol=0)
    assert logit_path(model) == "head"
    train_dpo(model, pairs(model), DPOConfig(beta=0.5, epochs=3, loop=LOOP), progress=None)
    moved = {n: float(p.detach().abs().max()) for n, p in model.named_parameters() if "lora_B" in n}
    assert moved and all(size > 0 for size in moved.values())
    close(score_completions(model, PROMPTS, COMPLETIONS, PROMPT_OF), own_sums(model))


@pytest.mark.parametrize("factor", [1e-3, 0.3])
@pytest.mark.parametrize("name", ["Gemma 2", "Granite", "Cohere"])
def test_caps_and_factors_are_seen_where_they_change_nothing_yet(name, factor):
    """With an LM head near zero all logits are, capped and scaled or not."""
    model = ODD[name][0]()
    model.get_output_embeddings().weight.data.mul_(factor)
    assert logit_path(model) == "forward"
    close(score_completions(model, PROMPTS, COMPLETIONS, PROMPT_OF), own_sums(model))


def test_the_way_is_found_again_when_adapters_or_the_head_change():
    model = llama()

    def agrees():
        close(completion_logps(model, laid_out(model)).detach(), own_sums(model))
        return logit_path(model)

    found = [agrees()]
    wrapped = get_peft_model(model, LORA(target_modules=["lm_head"]))
    nn.init.normal_(model.lm_head.lora_B["default"].weight)
    found.append(agrees())
    with wrapped.disable_adapter():
        found.append(agrees())
    model = wrapped.merge_and_unload()
    found.append(agrees())
    handle = model.register_forward_hook(
        lambda module, inputs, output: CausalLMOutput(logits=output.logits * 2)
    )
    found.append(agrees())
    handle.remove()
    found.append(agrees())
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    found.append(agrees())
    model.lm_head = nn.Linear(32, 64)
    found.append(agrees())
    assert found == ["weights", "head", "head", "weights", "forward", "weights", "head", "weights"]


def test_a_model_is_compared_once_and_a_copy_is_known(monkeypatch):
    calls, original = [], LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM,
        "forward",
        lambda self, **options: calls.append(1) or original(self, **options),
    )
    model = llama()
    completion_logps(model, laid_out(model))
    assert calls
    calls.clear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # as in training
    for scored in (model, copy.deepcopy(model)):
        completion_logps(scored, laid_out(scored))
        score_completions(scored, PROMPTS, COMPLETIONS, PROMPT_OF)
        LearnedReward(ScalarModel(scored))(PROMPTS, COMPLETIONS[:2])
    assert not calls


@pytest.mark.parametrize("check", [logit_path, check_cache])
def test_the_comparison_leaves_modes_random_state_and_gradients_alone(check):
    model = llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert check(model) in ("weights", None)
    assert [module.training for module in model.modules()] == modes and torch.equal(
        torch.get_rng_state(), state
    )
    assert all(parameter.grad is None for parameter in model.parameters())


class Mixed(LlamaForCausalLM):
    """A model whose rows see each other."""

    def forward(self, *arguments, **options):
        found = super().forward(*arguments, **options)
        found.logits = found.logits + found.logits.mean(0, keepdim=True)
        return found


def damaged():
    model = llama()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    return model


BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
REFUSED = {
    "BERT": (
        lambda: BertLMHeadModel(BertConfig(**BERT, initializer_range=0.5)),
        "looks at later tokens .*causal LM",
    ),
    "T5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1)
        ),
        "encoder and a decoder",
    ),
    "a bare decoder": (lambda: LlamaModel(LlamaConfig(**SIZE)), "has no LM head"),
    "NaN": (damaged, "are NaN; its weights are damaged"),
    "rows that see each other": (
        lambda: Mixed(LlamaConfig(**SIZE)),
        "depend on the other rows of a batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_log_probs_is_refused_at_every_door(name, tmp_path):
    make, words = REFUSED[name]
    set_seed(0)
    model = make().eval()
    preferences = replace(pairs(llama()), reference_logps=np.zeros(4))
    batches = sft_batches(preferences, 4)
    doors = [
        lambda: completion_logps(model, laid_out(model, False)),
        lambda: score_completions(model, PROMPTS, COMPLETIONS, PROMPT_OF),
        lambda: preferences.with_reference(model),
        lambda: train_dpo(model, preferences, DPOConfig(), run=tmp_path / "run", progress=None),
        lambda: train_unlikelihood(model, preferences, 0.1, LOOP, progress=None),
        lambda: train_sft(model, batches, 1, LOOP, run=tmp_path / "run", progress=None),
        lambda: sample_completions(model, PROMPTS, 1, eos_token_id=2, max_new_tokens=3),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=words):
            door()
    assert not list(tmp_path.iterdir())


def test_a_shared_batch_is_refused_by_a_model_that_does_not_allow_it():
    for name in ("Granite", "prompt tuning"):
        model = ODD[name][0]()
        assert not can_compact(model)
        with pytest.raises(
            ValueError, match=r"shares prompts or packs rows.*compact=can_compact\(model\)"
        ):
            completion_logps(model, laid_out(model, True))
    model = PLAIN["Mistral"][0]()
    for share in (
        laid_out(model, True),
        completion_batch([[1]], [[2] * n for n in (9, 2, 2)], [0] * 3, compact=True),
    ):
        with pytest.raises(
            ValueError, match=r"MistralForCausalLM does not allow; .*compact=can_compact\(model\)"
        ):
            completion_logps(model, share)


def test_a_scalar_head_stands_on_the_decoder_s_states_or_is_refused():
    """A cap after the LM head does not concern it; virtual tokens do."""
    model = ScalarModel(ODD["Gemma 2"][0]())
    nn.init.normal_(model.head.weight)
    rewards = LearnedReward(model)([PROMPTS[p] for p in PROMPT_OF], COMPLETIONS)
    for reward, completion, p in zip(rewards, COMPLETIONS, PROMPT_OF):
        with torch.no_grad():
            hidden = model.model.model(torch.tensor([PROMPTS[p] + completion])).last_hidden_state[
                0, -1
            ]
            assert reward == pytest.approx(float(model.head(hidden)), abs=1e-4)
    for name in VIRTUAL:
        with pytest.raises(ValueError, match="virtual tokens before the text.*decoder"):
            LearnedReward(ScalarModel(ODD[name][0]()))(PROMPTS, COMPLETIONS[:2])


ROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.fixture
def longrope():
    set_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(**SIZE, original_max_position_embeddings=16, rope_scaling=ROPE)
    ).eval()


def test_longrope_is_exact_up_to_where_it_changes_whatever_stands_beside(longrope):
    assert context_of(longrope) == 16
    alone = completion_logps(longrope, completion_batch([[1, 2, 3]], [[4, 5, 6]], [0])).detach()
    beside = completion_logps(
        longrope, completion_batch([[1, 2, 3]], [[4, 5, 6], [7] * 13], [0, 0])
    ).detach()
    close(beside[:1], alone, atol=1e-5)
    assert (
        len(sample_completions(longrope, [[1, 2, 3]], 1, eos_token_id=-1, max_new_tokens=13)[0][0])
        == 13
    )


@pytest.mark.parametrize("door", ["log-probs", "scores", "reference", "samples", "PPO", "rewards"])
def test_longrope_is_refused_beyond_it_at_every_door(longrope, door):
    long = [[4, 5], [7] * 14]
    doors = {
        "log-probs": lambda: completion_logps(
            longrope, completion_batch([[1, 2, 3]], long, [0, 0])
        ),
        "scores": lambda: score_completions(longrope, [[1, 2, 3]], long, [0, 0]),
        "reference": lambda: Preferences(
            [[1, 2, 3]], long, *(np.array(i) for i in ([0, 0], [0], [1]))
        ).with_reference(longrope),
        "samples": lambda: sample_completions(
            longrope, [[1, 2, 3]], 1, eos_token_id=-1, max_new_tokens=14
        ),
        "PPO": lambda: train_ppo(
            longrope,
            longrope,
            ScalarModel(longrope),
            len,
            [[1] * 13],
            PPO,
            eos_token_id=2,
            progress=None,
        ),
        "rewards": lambda: LearnedReward(ScalarModel(longrope))([[1, 2, 3]], long[1:]),
    }
    with pytest.raises(ValueError, match="context.* 16"):
        doors[door]()


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_take_their_places_in_the_context(name):
    model = ODD[name][0]()
    assert context_of(model) == 61
    assert completion_logps(model, completion_batch([[1] * 30], [[2] * 31], [0])).isfinite().all()
    with pytest.raises(ValueError, match="62 tokens, the model's context is 61"):
        completion_logps(model, completion_batch([[1] * 30], [[2] * 32], [0]))


def test_dynamic_rope_is_as_it_was_at_the_top_of_its_context():
    model = llama(rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    long = [[4, 5, 6], [7] * 61]
    alone = [
        float(completion_logps(model, completion_batch([[1, 2, 3]], [ids], [0])).detach()[0])
        for ids in long
    ]
    for share in (False, True):
        beside = completion_logps(
            model, completion_batch([[1, 2, 3]], long, [0, 0], compact=share)
        ).detach()
        close(beside, torch.tensor(alone), atol=1e-4)


def test_a_reward_may_be_of_a_text_that_fills_the_context(tiny):
    model = ScalarModel(load_model(str(tiny)))
    nn.init.normal_(model.head.weight)
    prompt, completion = [0, 5], [7] * 62
    with torch.no_grad():
        expected = float(
            model.head(
                model.model.transformer(torch.tensor([prompt + completion])).last_hidden_state[
                    0, -1
                ]
            )
        )
    assert LearnedReward(model)([prompt], [completion])[0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="65 tokens, the model's context is 64"):
        LearnedReward(model)([prompt], [completion + [7]])


LAYOUTS = {  # prompts, completions, prompt_of, share: rows, shared, packed, shared and packed
    "rows": (PROMPTS, COMPLETIONS, PROMPT_OF, False),
    "shared": ([PROMPTS[0]], COMPLETIONS[:2], [0, 0], True),
    "packed": ([[1], [3]], [[4] * 12, [5] * 3], [0, 1], True),
    "shared and packed": ([PROMPTS[0], [3]], [*COMPLETIONS[:2], [9]], [0, 0, 1], True),
}
# nats per token; float64 beside float32
NEAR = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


COMPUTED = [(dtype, precision) for dtype in NEAR for precision in ("float32", "bfloat16")]
COMPUTED.remove((torch.float16, "bfloat16"))  # torch's layers refuse it on a CPU


@pytest.mark.parametrize("dtype, precision", COMPUTED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_dtype_takes_every_layout_with_and_without_autocast(
    name, dtype, layout, precision, tiny
):
    model = load_model(str(tiny)) if name == "gpt2" else llama()
    prompts, completions, prompt_of, share = LAYOUTS[layout]
    batch = completion_batch(prompts, completions, prompt_of, compact=share)
    assert ("shared" in layout) == (
        batch.segments is not None or any(mask is not None for _, mask in batch.rows)
    )
    assert ("packed" in layout) == bool(batch.rows)
    expected = score_completions(model, prompts, completions, prompt_of)
    model = model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found = completion_logps(model, batch).detach()
        states = ScalarModel(model)(batch)
    tolerance = max(NEAR[dtype], NEAR[torch.bfloat16] if precision == "bfloat16" else 0)
    assert found.dtype == torch.float64 and states.shape == (batch.tokens,)
    assert (
        (found - expected).abs() / torch.tensor([len(ids) for ids in completions])
    ).max() < tolerance
    completions, logps = sample_with_logps(
        model, prompts, 2, eos_token_id=2, max_new_tokens=4, precision=precision
    )
    flat, owners = (
        [ids for row in completions for ids in row],
        [p for p in range(len(prompts)) for _ in range(2)],
    )
    again = score_completions(model, prompts, flat, owners, precision=precision)
    assert (again - torch.tensor(logps).flatten()).abs().max() < 4 * tolerance


class NoFloat64(TorchDispatchMode):
    """Fails where an operation gives float64, as a device without it does; numpy's may."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        dtypes = {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        assert torch.float64 not in dtypes or function is torch.ops.aten.lift_fresh.default, (
            function
        )
        return result


def test_a_device_without_float64_samples_scores_and_trains(monkeypatch):
    assert (widest(torch.device("mps")), widest(torch.device("cpu"))) == (
        torch.float32,
        torch.float64,
    )
    model, exact = llama(), llama()
    preferences = pairs(model)
    expected = train_dpo(exact, preferences, DPOConfig(loop=LOOP), progress=None)
    for module in ("logprobs", "sampling", "preferences", "loop"):
        monkeypatch.setattr(f"dpo_lab.{module}.widest", lambda device: torch.float32)
    with NoFloat64():
        found = sample_with_logps(model, PROMPTS, 2, eos_token_id=2, max_new_tokens=4)
        scores = completion_logps(model, laid_out(model))
        lines = train_dpo(model, preferences, DPOConfig(loop=LOOP), progress=None)
    assert found[0] == sample_with_logps(llama(), PROMPTS, 2, eos_token_id=2, max_new_tokens=4)[0]
    assert scores.dtype == torch.float32 and lines[0]["loss"] == pytest.approx(
        expected[0]["loss"], abs=1e-5
    )


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "door", ["DPO", "LoRA", "unlikelihood", "SFT", "reward model", "PPO", "value model", "lora"]
)
def test_weights_in_half_precision_are_not_trained(dtype, door, tmp_path):
    model = llama().to(dtype)
    preferences, before = pairs(llama()), {n: p.clone() for n, p in model.named_parameters()}
    value = ScalarModel(llama())
    options = {"eos_token_id": 2, "progress": None, "run": tmp_path / "run"}
    doors = {
        "DPO": lambda: train_dpo(
            model, preferences, DPOConfig(), run=tmp_path / "run", progress=None
        ),
        "LoRA": lambda: train_dpo(
            model, preferences, DPOConfig(lora_rank=2), run=tmp_path / "run", progress=None
        ),
        "unlikelihood": lambda: train_unlikelihood(model, preferences, 0.1, LOOP, progress=None),
        "SFT": lambda: train_sft(
            model, sft_batches(preferences, 2), 1, LOOP, run=tmp_path / "run", progress=None
        ),
        "reward model": lambda: train_reward_model(
            ScalarModel(model), preferences, RewardModelConfig(held_out=0.5), progress=None
        ),
        "PPO": lambda: train_ppo(model, llama(), value, len, PROMPTS, PPO, **options),
        "value model": lambda: train_ppo(
            llama(), llama(), ScalarModel(model), len, PROMPTS, PPO, **options
        ),
        "lora": lambda: lora(model, 2).__enter__(),
    }
    with pytest.raises(
        ValueError, match=f'weight is {dtype}, .*load the model in float32.*precision="bfloat16"'
    ):
        doors[door]()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_float32_adapters_on_frozen_half_precision_weights_are_trained():
    model = get_peft_model(llama().bfloat16(), LORA(target_modules=["q_proj"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lines = train_dpo(model, pairs(model), DPOConfig(beta=0.5, epochs=8, loop=LOOP), progress=None)
    assert (
        lines[0]["loss"] == pytest.approx(math.log(2))
        and lines[-1]["loss"] < lines[0]["loss"] - 0.01
    )


def test_a_model_without_a_weight_to_train_is_named():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no weight that requires a gradient"):
        train_dpo(llama().requires_grad_(False), pairs(llama()), DPOConfig(), progress=None)


@pytest.mark.parametrize("which", ["the PEFT model", "the model inside"])
def test_adapters_on_adapters_are_refused_before_the_first_step(which, tmp_path):
    model, evaluated = get_peft_model(llama(), LORA(target_modules=["q_proj"])), []
    policy = model if which == "the PEFT model" else model.get_base_model()
    preferences, before = pairs(model), {n: p.clone() for n, p in model.named_parameters()}
    options = {
        "run": tmp_path / "run",
        "progress": None,
        "callback": lambda model, step: evaluated.append(step) or {},
    }
    with pytest.raises(ValueError, match="has adapters already, .*merge_and_unload.*lora_rank=0"):
        train_dpo(policy, preferences, DPOConfig(lora_rank=4), **options)
    assert not evaluated and not list(tmp_path.iterdir())
    assert {n for n, _ in model.named_parameters()} == set(before)
    merged = model.merge_and_unload()
    assert len(train_dpo(merged, preferences, DPOConfig(lora_rank=4), progress=None)) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf, -math.inf, np.float32(-0.5)])
@pytest.mark.parametrize("door", ["log-probs", "samples", "samples with log-probs", "PPO"])
def test_a_temperature_that_is_negative_or_not_finite_is_refused(name, temperature, door, tiny):
    model = load_model(str(tiny)) if name == "gpt2" else llama()
    options = {"eos_token_id": 2, "max_new_tokens": 3, "temperature": temperature}
    config = replace(PPO, temperature=temperature)
    doors = {
        "log-probs": lambda: completion_logps(model, laid_out(model), temperature=temperature),
        "samples": lambda: sample_completions(model, PROMPTS, 1, **options),
        "samples with log-probs": lambda: sample_with_logps(model, PROMPTS, 1, **options),
        "PPO": lambda: train_ppo(
            model, model, ScalarModel(model), len, PROMPTS, config, eos_token_id=2, progress=None
        ),
    }
    with pytest.raises(ValueError, match="temperature is .*; it must be positive and finite"):
        doors[door]()


@pytest.mark.parametrize("temperature", [0, 0.0, np.float64(0), 1e-40])
def test_at_temperature_zero_and_near_it_samples_are_greedy_and_certain(temperature, model):
    found, logps = sample_with_logps(
        model, PROMPTS, 2, eos_token_id=17, max_new_tokens=12, temperature=temperature
    )
    for prompt, row in zip(PROMPTS, found):
        ids = torch.tensor([prompt])
        greedy = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=17,
        )
        assert row == [greedy[0, len(prompt) :].tolist()] * 2
    assert logps == [[0.0, 0.0]] * 2


def test_a_greedy_completion_has_no_log_prob(model):
    with pytest.raises(ValueError, match="temperature is 0.0; it must be positive"):
        completion_logps(model, laid_out(model), temperature=0)
    with pytest.raises(
        ValueError, match="temperature is 1e-40; .*overflow, so it must be at least 1e-30"
    ):
        completion_logps(model, laid_out(model), temperature=1e-40)
    assert completion_logps(model, laid_out(model), temperature=1e-30).isfinite().all()


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([[1], []], {}, "prompt 1 has no tokens; .*BOS"),
        ([[1] * 60], {"max_new_tokens": 5}, "have 65 tokens, the model's context is 64; shorten"),
        ([[1], [1] * 61], {"max_new_tokens": 4}, "have 65 tokens, the model's context is 64"),
        ([[1, 512]], {}, "token id 512 is outside the vocabulary of 512"),
        ([[-1]], {}, r"prompts\[0\]\[0\] is -1; a token id"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([[1]], {"rows": 0}, "rows is 0; it must be at least 1"),
    ],
)
@pytest.mark.parametrize("sample", [sample_completions, sample_with_logps])
def test_what_cannot_be_sampled_is_named(model, sample, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        sample(model, prompts, 1, **{"eos_token_id": 0, "max_new_tokens": 3} | options)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sampling_and_scoring_have_the_same_context(name, tiny):
    """To the top of the context both work, one token further both refuse; evaluation as well."""
    model = load_model(str(tiny)) if name == "gpt2" else llama()
    ((ids,),) = sample_completions(model, [[1] * 60], 1, eos_token_id=-1, max_new_tokens=4)
    assert len(ids) == 4 and score_completions(model, [[1] * 60], [ids], [0]).isfinite().all()
    for refused in (
        lambda: sample_completions(model, [[1] * 61], 1, eos_token_id=-1, max_new_tokens=4),
        lambda: score_completions(model, [[1] * 61], [ids], [0]),
        lambda: evaluate_policy(
            model, model, [[1] * 61] * 2, len, load_tokenizer(str(tiny)), max_new_tokens=4
        ),
    ):
        with pytest.raises(ValueError, match="65 tokens, the model's context is 64"):
            refused()


@pytest.mark.parametrize(
    "make", [tuple, np.array, torch.tensor, lambda rows: [np.array(row) for row in rows]]
)
def test_prompts_may_be_tuples_arrays_and_tensors(make, model):
    prompts, options = [[1, 5, 7], [3, 8, 2]], {"eos_token_id": 0, "max_new_tokens": 5}
    found = sample_completions(model, make(prompts), 2, **options)
    assert found == sample_completions(model, prompts, 2, **options)
    json.dumps(found)  # of plain ints


@pytest.mark.parametrize("prompts", [["a kettle"], [1, 2], [[1.5]], [None]])
def test_prompts_that_are_no_token_ids_are_named(prompts, model):
    with pytest.raises(TypeError, match="prompts.* must "):
        sample_completions(model, prompts, 1, eos_token_id=0, max_new_tokens=3)


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))]
)
def test_a_wrapped_model_is_the_model_inside_it(wrap, tmp_path, tokenizer):
    """What torch.compile and DataParallel wrap is scored, sampled from, trained as if unwrapped."""
    model = llama()
    wrapped, preferences = wrap(model), pairs(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<turn>")
    assert (
        end_tokens(wrapped, tokenizer) == end_tokens(model, tokenizer)
        and len(end_tokens(model, tokenizer)) == 2
    )
    assert context_of(wrapped) == 64 and can_compact(wrapped)
    close(completion_logps(wrapped, laid_out(wrapped)).detach(), own_sums(model))
    close(score_completions(wrapped, PROMPTS, COMPLETIONS, PROMPT_OF), own_sums(model))
    options = {"eos_token_id": 2, "max_new_tokens": 4}
    assert sample_completions(wrapped, PROMPTS, 2, **options) == sample_completions(
        model, PROMPTS, 2, **options
    )
    assert (
        replace(preferences, reference_logps=None).with_reference(wrapped).reference_key
        == preferences.reference_key
    )
    for rank in (0, 2):
        alone, inside = (copy.deepcopy(model) for _ in range(2))
        config = DPOConfig(beta=0.5, lora_rank=rank, loop=LOOP)
        lines = [
            train_dpo(m, preferences, config, run=tmp_path / f"{i}-{rank}", progress=None)
            for i, m in enumerate((alone, wrap(inside)))
        ]
        assert lines[0][0]["loss"] == lines[1][0]["loss"]
        assert weights_hash(alone) == weights_hash(inside) != weights_hash(model)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_value_or_reward_model_is_the_model_inside_it(wrap):
    alone, inside, config = (
        ScalarModel(llama()),
        ScalarModel(wrap(llama())),
        RewardModelConfig(held_out=0.5, loop=LOOP),
    )
    losses = []
    for model in (alone, wrap(inside)):
        nn.init.constant_(unwrapped(model).head.weight, 0.3)
        losses.append(
            [
                line["loss"]
                for line in train_reward_model(model, pairs(llama()), config, progress=None)
                if "loss" in line
            ]
        )
    assert losses[0] == losses[1] and losses[0]
    rewards = [LearnedReward(model)(PROMPTS, COMPLETIONS[:2]) for model in (alone, wrap(inside))]
    assert np.array_equal(*rewards) and rewards[0].any()


def test_whisper_s_decoder_is_half_a_model(tmp_path):
    small = {
        "d_model": 16,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "pad_token_id": 0,
    }
    model = WhisperForCausalLM(WhisperConfig(vocab_size=64, max_target_positions=32, **small))
    assert context_of(model) == 32
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a WhisperForCausalLM; a policy must be a causal LM"):
        load_model(str(tmp_path))
