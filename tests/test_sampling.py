"""Sampling after long prompts, which are read once, and from a part of the distribution."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpo_lab import sampling
from dpo_lab.engine import shared_prompts
from dpo_lab.sampling import (
    Drawing,
    draw,
    reads_once,
    rows_on,
    sample_completions,
    sample_with_logps,
)
from dpo_lab.sentiment.cost import sampling_flops

EOS = 17


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def long_model(request):
    """A random model with room for long prompts; the Llama has two queries per key."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        shape = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 160, "vocab_size": 64}
        made = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=EOS))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= heads | {"vocab_size": 64, "max_position_embeddings": 160}
        made = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=EOS))

    # far from uniform, so that a wrong position or key shows
    for parameter in made.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    return made.eval()


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, n).tolist() for n in lengths]


def logps_by_hand(model, prompt, ids, temperature=1.0) -> float:
    """The log-prob of a completion from the logits of the whole text, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, ids))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("k, rows", [(1, None), (5, None), (5, 3), (3, 7)])
def test_log_probs_after_shared_prompts_are_those_of_a_plain_loop(
    long_model, k, rows, temperature, monkeypatch
):
    """Prompts of one token to 60 in one batch, rows that end early, a batch that is split."""
    monkeypatch.setattr(shared_prompts, "READ_TOKENS", 100)
    prompts = prompts_of([60, 1, 33, 34, 2, 59, 60])
    assert reads_once(long_model, prompts)
    completions, logps = sample_with_logps(
        long_model,
        prompts,
        k,
        eos_token_id=EOS,
        max_new_tokens=12,
        temperature=temperature,
        rows=rows,
    )
    exact = copy.deepcopy(long_model).double()
    ends = set()
    for prompt, row, found in zip(prompts, completions, logps):
        assert len(row) == k
        for ids, logp in zip(row, found):
            ends.add(len(ids))
            assert EOS not in ids[:-1] and (len(ids) == 12 or ids[-1] == EOS)
            by_hand = logps_by_hand(exact, prompt, ids, temperature)
            assert logp == pytest.approx(by_hand, abs=1e-4)
    assert len(ends) > 1 or k == 1


def test_a_shared_prompt_leads_to_what_the_whole_texts_lead_to(long_model, monkeypatch):
    """The most likely tokens, and the distribution of the second token, chi-squared."""
    prompts = prompts_of([45, 38])
    greedy = {"eos_token_id": EOS, "max_new_tokens": 20, "temperature": 0}
    shared = sample_completions(long_model, prompts, 2, **greedy)

    n, options = 6_000, {"eos_token_id": -1, "max_new_tokens": 2, "rows": 3_000}
    drawn = sample_completions(long_model, prompts[:1], n, **options)[0]
    with torch.no_grad():
        first = long_model(torch.tensor(prompts[:1])).logits[0, -1].double().softmax(-1)
        texts = torch.tensor([prompts[0] + [token] for token in range(64)])
        second = first @ long_model(texts).logits[:, -1].double().softmax(-1)
    expected = second.numpy() * n
    counts = np.bincount([ids[1] for ids in drawn], minlength=64)
    often = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[often].sum()
    assert abs(chi2 - often.sum()) < 5 * np.sqrt(2 * often.sum())

    monkeypatch.setattr(sampling, "SHORT_PROMPT", 1_000)
    assert not reads_once(long_model, prompts)
    assert shared == sample_completions(long_model, prompts, 2, **greedy)


def test_each_prompt_is_read_once_for_all_its_completions(long_model):
    """The tokens that go through the model: of each prompt once, and of each completion."""
    read = []
    hook = long_model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args or [kwargs["input_ids"]])[0].numel()),
        with_kwargs=True,
    )
    try:
        sample_completions(
            long_model, prompts_of([50, 50, 50]), 4, eos_token_id=-1, max_new_tokens=5
        )
    finally:
        hook.remove()
    # the cache is looked at first, with a few tokens, unless it has been before
    assert sum(read[-6:]) == 3 * 49 + 3 * 4 * 5 and len(read) <= 6 + 3


def test_a_shared_prompt_costs_its_completions_a_part_each(long_model):
    one, four = (sampling_flops(long_model, 50, 5, k) for k in (1, 4))
    assert one == sampling_flops(long_model, 50, 5)
    reading = sampling_flops(long_model, 49, 1) - sampling_flops(long_model, 1, 1)
    reading += sampling_flops(long_model, 1, 1) - 2 * 64 * 16  # without the head
    assert one - four == pytest.approx(0.75 * reading)


def test_threads_share_batches_of_long_prompts_and_sample_the_same(long_model, monkeypatch):
    monkeypatch.setattr(sampling, "KEPT_TOKENS", 120)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(
                sample_completions(
                    long_model, prompts_of([40] * 8), 3, eos_token_id=EOS, max_new_tokens=6, seed=3
                )
            )
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert found[0] != sample_completions(
        long_model, prompts_of([40] * 8), 3, eos_token_id=EOS, max_new_tokens=6, seed=4
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=60))
def test_prompts_are_read_in_parts_with_little_padding(lengths):
    """Each once; padding is what the gap allows, but in a part too small to be worth a pass."""
    parts = shared_prompts._parts([[0] * n for n in lengths])
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        inside = sorted(lengths[i] for i in part)
        assert len(part) == 1 or len(part) * inside[-1] <= shared_prompts.READ_TOKENS
        near = [n for n in inside if n <= inside[0] + shared_prompts.GAP]
        assert len(near) == len(inside) or (len(inside) - 1) * inside[0] < shared_prompts.ENOUGH


@pytest.mark.parametrize(
    "completions, rows", [(1, 64), (64, 64), (256, 64), (512, 128), (1_024, 256), (9_999, 256)]
)
def test_completions_of_shared_prompts_are_at_least_four_batches_for_the_threads(completions, rows):
    """A batch of fewer rows than 64 would gain no thread enough."""
    assert rows_on(torch.device("cpu"), completions) == rows
    assert -(-completions // rows) >= min(4, -(-completions // 64))


def test_batches_depend_on_the_number_of_completions_alone(long_model):
    """Not on threads, so that samples do not."""
    widths = []
    hook = long_model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    try:
        for n in (16, 128):
            widths.clear()
            prompts = prompts_of([33] * n)
            sample_completions(long_model, prompts, 8, eos_token_id=-1, max_new_tokens=1)
            assert max(widths) == rows_on(torch.device("cpu"), 8 * n)
    finally:
        hook.remove()


def kept_by_hand(probabilities: list[float], top_k: int, top_p: float) -> dict[int, float]:
    """The tokens that are drawn from and their probabilities, by a plain loop."""
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    order = order[:top_k] if top_k else order
    total = sum(probabilities[i] for i in order)
    kept, reached = {}, 0.0
    for i in order:
        if top_p < 1 and reached >= top_p - 1e-6:
            break
        kept[i] = probabilities[i]
        reached += probabilities[i] / total
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=90),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.31, 0.77, 0.93, 1.0]),
)
def test_top_k_and_top_p_draw_from_the_tokens_that_a_plain_loop_keeps(counts, top_k, top_p):
    probabilities = torch.tensor(counts, dtype=torch.float32)
    probabilities = probabilities / probabilities.sum()
    kept = kept_by_hand(probabilities.double().tolist(), top_k, top_p)
    drawing = Drawing(top_k=top_k, top_p=top_p)
    index, chance = draw(
        probabilities.log().expand(300, -1), drawing, torch.Generator().manual_seed(0)
    )
    for i, p in zip(index[:, 0].tolist(), chance[:, 0].tolist()):
        assert p == pytest.approx(kept[i], rel=1e-4)


def test_the_log_prob_is_that_of_the_distribution_that_was_drawn_from(long_model):
    prompt = prompts_of([40])
    options = {"eos_token_id": -1, "max_new_tokens": 3, "top_k": 2, "temperature": 0.8}
    completions, logps = sample_with_logps(long_model, prompt, 6, **options)
    for ids, logp in zip(completions[0], logps[0]):
        expected = 0.0
        for n, token in enumerate(ids):
            with torch.no_grad():
                logits = long_model(torch.tensor([prompt[0] + ids[:n]])).logits[0, -1]
            two = (logits.double() / 0.8).topk(2)
            expected += float(two.values.log_softmax(-1)[two.indices == token][0])
        assert logp == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"top_k": -1}, "top_k is -1; it must be at least 1, or 0 for all tokens"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be above 0"),
        ({"top_p": float("nan")}, "top_p is nan; it must be above 0"),
    ],
)
def test_a_part_of_the_distribution_that_cannot_be_is_named(long_model, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        sample_completions(long_model, [[1, 2]], 1, eos_token_id=EOS, max_new_tokens=2, **options)
