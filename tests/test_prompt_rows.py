"""Attention of long rows that share a prompt: exact in every family, in linear memory."""

import random

import pytest
import torch
from test_logprobs import LargestTensor, close, gradients, loops, make_model
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from dpo_lab import logprobs
from dpo_lab.batching import completion_batch
from dpo_lab.engine import attention, prompt_rows
from dpo_lab.logprobs import autocast, can_compact, completion_logps, score_completions
from dpo_lab.models import ScalarModel
from dpo_lab.rlhf.reward_model import LearnedReward
from dpo_lab.sampling import sample_with_logps
from dpo_lab.sentiment.cost import forward_flops

RNG = random.Random(0)


def texts(*lengths):
    return [[RNG.randrange(2, 40) for _ in range(n)] for n in lengths]


# a prompt whose completions are long, short and of one token, one with nothing but one token each,
# and one with a single completion
PROMPTS, COMPLETIONS = texts(130, 30, 70), texts(20, 1, 40, 7, 1, 1, 9, 33)
PROMPT_OF = [0, 0, 0, 1, 1, 1, 2, 0]
LONG = PROMPTS, COMPLETIONS, PROMPT_OF


def linear(model, batch):
    return logprobs.goes_part_by_part(model, batch)


@pytest.mark.parametrize("pack", [-1, 2], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_values_and_gradients_are_those_of_plain_loops(monkeypatch, name, pack):
    monkeypatch.setattr("dpo_lab.batching.PACK_FROM", pack)
    model = make_model(name, context=200)
    shared, plain = (completion_batch(*LONG, compact=compact) for compact in (True, False))
    assert linear(model, shared) and not linear(model, plain)
    assert bool(shared.rows) == (pack < 0)
    close(completion_logps(model, shared).detach(), loops(model, *LONG))
    expected = gradients(model, completion_logps(model, plain))
    for parameter, gradient in gradients(model, completion_logps(model, shared)).items():
        close(gradient, expected[parameter])


def test_short_rows_would_be_as_exact(monkeypatch):
    monkeypatch.setattr(logprobs, "LONG_ROW", 0)
    model, short = make_model("gpt2"), (texts(6, 3), texts(2, 1, 1, 5, 3), [0, 0, 1, 1, 1])
    batch = completion_batch(*short, compact=True)
    assert linear(model, batch)
    close(completion_logps(model, batch).detach(), loops(model, *short))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_as_exact_as_under_a_mask(monkeypatch, dtype):
    """With bfloat16 weights, and float32 weights that compute in bfloat16."""
    model = make_model("llama-tied", context=200, spread=0.1)
    exact, model = completion_logps(model, completion_batch(*LONG)), model.to(dtype)
    batch, errors = completion_batch(*LONG, compact=True), []
    for longest in (prompt_rows.LONG_ROW, 10_000):
        monkeypatch.setattr(logprobs, "LONG_ROW", longest)
        with torch.no_grad(), autocast("cpu", "bfloat16" if dtype.itemsize == 4 else "float32"):
            errors.append(float((completion_logps(model, batch) - exact).abs().mean()))
    assert errors[0] < 1.5 * errors[1] + 1e-3


def test_memory_is_linear_in_the_length_of_a_prompt(monkeypatch):
    model = make_model("gpt2", context=900)

    def largest(n):
        batch = completion_batch(texts(n), texts(30, 30, 30, 30), [0] * 4, compact=True)
        with LargestTensor() as found:
            completion_logps(model, batch).sum().backward()
        return found.numel, batch.input_ids.numel()

    for n in (400, 800):
        numel, tokens = largest(n)
        assert numel <= 64 * tokens  # the widest layer
    monkeypatch.setattr(logprobs, "LONG_ROW", 10_000)
    numel, tokens = largest(800)
    assert numel >= tokens**2


def test_the_plan_counts_the_work_of_attention_part_by_part(monkeypatch):
    model, sizes = make_model("gpt2", context=400), [30, 1, 20]
    batch = completion_batch(texts(200), texts(*sizes), [0] * 3, compact=True)
    read = [n - 1 for n in sizes]
    pairs = 200**2 + sum(n**2 for n in read) + 200 * sum(read)

    # a product for the weights and one with the values, in two layers of width 16
    found = forward_flops(model, batch)
    monkeypatch.setattr(logprobs, "LONG_ROW", 10_000)
    length = batch.input_ids.shape[1]
    assert forward_flops(model, batch) - found == 2 * 2 * 2 * 16 * (length**2 - pairs)


def test_dropout_of_attention_is_left_to_the_mask():
    model, batch = make_model("gpt2", context=200), completion_batch(*LONG, compact=True)
    model.config.attn_pdrop = 0.1
    assert linear(model, batch) and not linear(model.train(), batch)
    model.config.attn_pdrop = 0.0
    assert linear(model, batch)


def test_matmuls_go_to_mkl_meanwhile_and_the_setting_comes_back(monkeypatch):
    """Only inside our own functions, which know that no other thread is computing."""
    matmul, seen = torch.backends.mkldnn.matmul, []
    before = matmul.fp32_precision

    def noted(*arguments):
        seen.append(matmul.fp32_precision)
        return (part for part in ())

    monkeypatch.setattr(prompt_rows, "_parts", noted)
    model, batch = make_model("gpt2", context=200).float(), completion_batch(*LONG, compact=True)
    try:
        matmul.fp32_precision = attention.ONEDNN
        logps = completion_logps(model, batch)
        assert matmul.fp32_precision == attention.ONEDNN
        logps.sum().backward()
        assert matmul.fp32_precision == attention.ONEDNN and seen == ["ieee"] * len(seen)
        assert len(seen) == 2 * 2 * 3  # there and back, in two layers, for three rows

        matmul.fp32_precision, seen[:] = "ieee", []
        with monkeypatch.context() as patch:
            patch.setattr(prompt_rows, "matmuls_by_mkl", None)
            rows = prompt_rows.prompt_rows(batch.spans, batch.input_ids.shape[1])
            x = torch.zeros(1, 2, batch.input_ids.shape[1], 8)
            assert prompt_rows.prompt_attention(x, x, x, rows, 1.0).shape == (1, x.shape[2], 2, 8)
    finally:
        matmul.fp32_precision = before


# what some families need beside the sizes
EXTRA = {"mistral": {"sliding_window": None}, "phi3": {"sliding_window": None}}
EXTRA |= {"starcoder2": {"sliding_window": None}, "gpt2": {"attn_pdrop": 0.0}}
SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 200, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def of_family(family, **more):
    set_seed(0)
    config = AutoConfig.for_model(family, **SIZES | EXTRA.get(family, {}) | more)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("family", attention.SHARES_PROMPTS)
def test_every_family_that_shares_prompts_is_exact(family):
    """Log-probs, and samples after a prompt that is read once."""
    grouped = {} if family in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
    model = of_family(family, **grouped)
    assert can_compact(model)
    for prompts in (PROMPTS, texts(5, 1, 3)):
        batch = completion_batch(prompts, COMPLETIONS[3:], PROMPT_OF[3:], compact=True)
        expected = loops(model, prompts, COMPLETIONS[3:], PROMPT_OF[3:])
        close(completion_logps(model, batch).detach(), expected)

    completions, logps = sample_with_logps(model, PROMPTS[:1], 2, eos_token_id=0, max_new_tokens=4)
    expected = loops(model, PROMPTS, completions[0], [0, 0])
    close(torch.tensor([float(value) for value in logps[0]]).double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    "family, more",
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ],
)
def test_a_sliding_window_is_not_shared(family, more):
    model = of_family(family, num_key_value_heads=2, **more)
    assert not can_compact(model)
    prompts, completions = texts(30), texts(5, 5)
    found = score_completions(model, prompts, completions, [0, 0])
    close(found, loops(model, prompts, completions, [0, 0]))


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_a_reward_model_reads_a_repeated_prompt_once(monkeypatch, name):
    model, seen = ScalarModel(make_model(name, context=200).float()), []
    torch.nn.init.normal_(model.head.weight)
    prompts = [PROMPTS[p] for p in PROMPT_OF]
    reward = LearnedReward(model)
    alone = [reward([prompt], [ids])[0] for prompt, ids in zip(prompts, COMPLETIONS)]
    noted = lambda batch: seen.append(batch.input_ids.numel()) or batch  # noqa: E731
    monkeypatch.setattr(reward, "batch", lambda *of: noted(LearnedReward.batch(reward, *of)))
    close(torch.from_numpy(reward(prompts, COMPLETIONS)), torch.tensor(alone).double(), atol=1e-4)
    assert seen[0] < sum(map(len, PROMPTS)) + sum(map(len, COMPLETIONS)) + 32


def test_scoring_keeps_together_what_shares_a_prompt():
    """Four completions of a prompt of 1,000 tokens went into batches of one row before."""
    sizes = [(1_000, 60), (500, 60), (20, 60), (1_000, 2_000)]
    prompts = texts(*(n for n, _ in sizes))
    completions = texts(*(n for _, n in sizes for _ in range(4)))
    prompt_of = [p for p in range(4) for _ in range(4)]

    def batches(compact):
        found = logprobs._batches_by_length(prompts, completions, prompt_of, 2_048, compact)
        assert sorted(i for batch in found for i in batch) == list(range(16))
        return found

    # one batch of two prompts with four completions each, and those after the short one, apart
    shared = batches(compact=True)
    assert shared == [[12], [13], [14], [15], list(range(8)), list(range(8, 12))]

    # rows that cannot share: as many as are padded to the batch's size
    for batch in batches(compact=False):
        longest = max(len(prompts[prompt_of[i]]) + len(completions[i]) for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 2_048
