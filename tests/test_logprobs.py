"""Completion log-probs against a plain loop over tokens in float64, and their cost in memory."""

import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpo_lab import batching as layout
from dpo_lab import logprobs
from dpo_lab.batching import completion_batch, lay_out
from dpo_lab.engine import attention, lm_head
from dpo_lab.engine.cpu import matmuls_by_onednn
from dpo_lab.engine.lm_head import token_logps
from dpo_lab.engine.pieces import pieces_of
from dpo_lab.logprobs import (
    Scorer,
    can_compact,
    completion_logps,
    logit_path,
    score_completions,
    use_packed_attention,
)

MODELS = ["gpt2", "gpt2-bias", "llama-tied", "llama-grouped"]
every_model = pytest.mark.parametrize("name", MODELS)

PROMPTS = [[0, 5, 7, 2, 9, 4, 4, 1], [0], [0, 3, 8]]
COMPLETIONS = [[6, 6, 1], [2], [9, 3, 3, 5, 1], [30, 1], [8], [7, 2, 1]]
PROMPT_OF = [0, 1, 0, 2, 0, 2]


def make_model(name, vocabulary=40, context=48, width=16, spread=0.3):
    """A random causal LM in float64 whose logits are far from uniform."""
    set_seed(0)
    if name.startswith("gpt2"):
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=context, n_embd=width, n_layer=2, n_head=2,
            initializer_range=spread,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=context, hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2 if name == "llama-grouped" else 4,
            initializer_range=spread, tie_word_embeddings=name == "llama-tied",
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for module in model.modules():
            # the library's own computes in float32 whatever the model's dtype
            if isinstance(module, LlamaRMSNorm):
                module.forward = lambda x, m=module: (
                    m.weight * x * (x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
                )
    if name == "gpt2-bias":
        model.lm_head.bias = nn.Parameter(torch.randn(vocabulary))
    return model.double().eval()


shared_model = cache(make_model)  # for tests that leave it as it is


def by_loop(model, prompt, completion):
    """log pi(completion | prompt): one full forward, then one token after another."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    position = len(prompt) - 1
    logps = [
        torch.log_softmax(logits[position + k], 0)[token].item()
        for k, token in enumerate(completion)
    ]
    return math.fsum(logps)


def loops(model, prompts=PROMPTS, completions=COMPLETIONS, prompt_of=PROMPT_OF):
    return torch.tensor(
        [by_loop(model, prompts[p], c) for c, p in zip(completions, prompt_of)], dtype=torch.float64
    )


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def gradients(model, logps):
    """Of a sum that weighs each completion differently."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation put in one tensor."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@every_model
def test_a_batch_agrees_with_the_loop(name):
    model = shared_model(name)
    logps = completion_logps(model, completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF))
    assert logps.dtype == torch.float64
    close(logps.detach(), loops(model))


@every_model
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_scorer_gives_the_same_values_and_gradients_to_the_bit(name, compact, precision):
    model = make_model(name).float()
    batch = completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=compact)
    with logprobs.autocast("cpu", precision):
        expected = completion_logps(model, batch)
    slopes = gradients(model, expected)
    with matmuls_by_onednn("cpu"):
        found = Scorer(model, precision)(batch)
        for name, slope in gradients(model, found).items():
            assert torch.equal(slope, slopes[name])
    assert found.dtype == torch.float64 and torch.equal(found, expected)


def test_a_scorer_names_what_the_model_cannot_read():
    scorer = Scorer(shared_model("gpt2"))
    with pytest.raises(ValueError, match="49 tokens, the model's context is 48"):
        scorer(completion_batch([[0] * 40], [[1] * 9], [0]))
    for token in (40, -1):
        with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 40"):
            scorer(completion_batch([[0]], [[token]], [0]))
    scorer(completion_batch([[0] * 40], [[39] * 8], [0]))


def test_laying_out_checked_tokens_is_the_same_batch_and_stays_where_it_is():
    for compact in (False, True):
        batch = completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=compact)
        other = lay_out(PROMPTS, COMPLETIONS, PROMPT_OF, compact)
        assert batch.to("cpu") is batch
        leaves = tree_leaves(vars(batch)), tree_leaves(vars(other))
        assert len(leaves[0]) == len(leaves[1])
        for value, same in zip(*leaves):
            assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same


@every_model
def test_padding_does_not_show(name):
    model = shared_model(name)
    together = completion_logps(model, completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF))
    alone = [
        completion_logps(model, completion_batch([PROMPTS[p]], [c], [0]))
        for c, p in zip(COMPLETIONS, PROMPT_OF)
    ]
    close(together, torch.cat(alone), atol=1e-12)


tokens = st.integers(0, 39)
prompt_lists = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=3)
completion_lists = st.lists(
    st.tuples(st.integers(0, 2), st.lists(tokens, min_size=1, max_size=5)), min_size=1, max_size=6
)


@every_model
@settings(deadline=None, max_examples=15)
@given(prompts=prompt_lists, members=completion_lists, share=st.booleans())
def test_any_lengths_and_shared_prompts_agree_with_the_loop(name, prompts, members, share):
    model = shared_model(name)
    prompt_of, completions = [p % len(prompts) for p, _ in members], [c for _, c in members]
    batch = completion_batch(prompts, completions, prompt_of, compact=share)
    assert batch.n == len(completions) and batch.tokens == sum(map(len, completions))
    with torch.no_grad():
        close(completion_logps(model, batch), loops(model, prompts, completions, prompt_of))


@every_model
def test_sharing_a_prompt_changes_neither_values_nor_gradients(name):
    model = make_model(name)
    apart, together = (
        completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=share) for share in (False, True)
    )
    assert (
        apart.input_ids.shape[0] == 6
        and sum(r for (r, _), _ in together.rows) == 3
        and len(together.rows) > 1
    )
    close(completion_logps(model, together), completion_logps(model, apart))
    expected = gradients(model, completion_logps(model, apart))
    for parameter, gradient in gradients(model, completion_logps(model, together)).items():
        close(gradient, expected[parameter])


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_a_shared_row_may_be_longer_than_the_context(name):
    model, completions = shared_model(name), [[k] * 20 for k in range(1, 5)]
    batch = completion_batch([list(range(20))], completions, [0] * 4, compact=True)
    assert batch.input_ids.shape == (1, 96)  # the context is 48
    close(
        completion_logps(model, batch).detach(),
        loops(model, [list(range(20))], completions, [0] * 4),
    )


def test_prompts_are_shared_only_where_that_saves_a_quarter_of_the_tokens():
    prompt, completions = [0] * 4, [[1] * 4, [2] * 4]  # sharing saves 4 of 16 tokens
    assert len(completion_batch([prompt], completions, [0, 0], compact=True).input_ids) == 1
    assert len(completion_batch([prompt], [[1] * 4, [2] * 5], [0, 0], compact=True).input_ids) == 2
    assert len(completion_batch([prompt], completions, [0, 0]).input_ids) == 2


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
@pytest.mark.parametrize("prompt_of", [[0, 1, 0, 2, 0, 2], range(6)], ids=["shared", "apart"])
def test_packing_changes_neither_values_nor_gradients_also_with_checkpointing(name, prompt_of):
    model, prompts = make_model(name), [PROMPTS[i % 3] for i in range(6)]
    completions = [c * (i + 1) for i, c in enumerate(COMPLETIONS)]
    packed, padded = (
        completion_batch(prompts, completions, prompt_of, compact=share) for share in (True, False)
    )
    assert packed.rows and not padded.rows
    expected_values, expected = (
        completion_logps(model, padded),
        gradients(model, completion_logps(model, padded)),
    )
    model.train()  # or transformers does not checkpoint; there is no dropout in these models
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        close(completion_logps(model, packed), expected_values)
        for parameter, gradient in gradients(model, completion_logps(model, packed)).items():
            close(gradient, expected[parameter])


class PlainFlash:
    """What the flash kernel promises, per piece: queries see keys up to their own, from the end."""

    @staticmethod
    def apply(query, key, value, query_ends, key_ends, longest, scale):
        assert (
            query.shape[1:] == key.shape[1:] == value.shape[1:]
            and query_ends.dtype == key_ends.dtype == torch.int32
        )
        ends = list(zip(query_ends.tolist(), key_ends.tolist()))
        assert longest == tuple(max(b[i] - a[i] for a, b in zip(ends, ends[1:])) for i in (0, 1))
        # the kernel leaves what belongs to no piece as it was
        out = torch.full_like(query, float("nan"))
        for (q0, k0), (q1, k1) in zip(ends, ends[1:]):
            scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scale
            unseen = (
                torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
                .tril(k1 - k0 - (q1 - q0))
                .logical_not()
            )
            out[q0:q1] = torch.einsum(
                "hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), value[k0:k1]
            )
        return out


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
@pytest.mark.parametrize("prompt_of", [[0, 1, 0, 2, 0, 2], range(6)], ids=["shared", "apart"])
@pytest.mark.parametrize("share", [-1, 2], ids=["prompts once", "rows"])
@pytest.mark.parametrize("pack", [-1, 2], ids=["packed", "padded"])
def test_pieces_change_neither_values_nor_gradients(monkeypatch, name, prompt_of, share, pack):
    """As a GPU takes attention, with a kernel that this test knows."""
    monkeypatch.setattr(layout, "SHARE_FROM", share)
    monkeypatch.setattr(layout, "PACK_FROM", pack)
    model, prompt_of = make_model(name), list(prompt_of)
    prompts = (
        PROMPTS if len(set(prompt_of)) == 3 else [[0, *range(1, n)] for n in (9, 1, 3, 1, 6, 2)]
    )
    completions = [[6, 6, 1] * 4, *COMPLETIONS[1:]]
    batch = completion_batch(prompts, completions, prompt_of, compact=True)
    assert batch.pieces is None  # until it goes to a GPU
    batch = replace(batch, pieces=pieces_of(batch.spans))
    assert (
        bool(batch.rows) == (pack < 0)
        and int(batch.pieces.query_ends[-1]) == batch.input_ids.numel()
    )
    # a sum over a GPU's matrix of tokens needs each one's place
    for i, completion in enumerate(completions):
        assert batch.places[batch.owners == i].tolist() == list(range(len(completion)))
    assert batch.longest_completion == 12 and batch.longest == max(
        len(prompts[p]) + len(c) for c, p in zip(completions, prompt_of)
    )
    # by itself, and by two completions of more than a token, which attend to their prompt
    assert batch.pieces.uses.shape[1] == (1 if share > 1 else 3 if len(prompts) == 3 else 2)
    plain = gradients(
        model, completion_logps(model, completion_batch(prompts, completions, prompt_of))
    )
    monkeypatch.setattr(logprobs, "takes_pieces", lambda model, device: True)
    monkeypatch.setattr(attention, "_Flash", PlainFlash)
    close(completion_logps(model, batch), loops(model, prompts, completions, prompt_of))
    close(gradients(model, completion_logps(model, batch)), plain)


def test_only_a_gpu_in_half_precision_takes_pieces(monkeypatch):
    model, cuda = shared_model("gpt2"), torch.device("cuda")  # float64, heads of 8
    assert not attention.takes_pieces(model, torch.device("cpu")) and not attention.takes_pieces(
        model, cuda
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert attention.takes_pieces(model, cuda) and not attention.takes_pieces(
        make_model("gpt2", width=10), cuda
    )


def test_a_fixed_order_is_asked_for_meanwhile_and_what_was_set_comes_back():
    def settings():
        switches = (
            torch.are_deterministic_algorithms_enabled,
            torch.is_deterministic_algorithms_warn_only_enabled,
        )
        return [switch() for switch in switches] + [
            torch.utils.deterministic.fill_uninitialized_memory
        ]

    for mine in (False, True):
        torch.use_deterministic_algorithms(mine, warn_only=mine)
        before = settings()
        with pytest.raises(ZeroDivisionError), attention.fixed_order():
            assert settings() == [True, False, False]
            raise ZeroDivisionError
        assert settings() == before
    torch.use_deterministic_algorithms(False)


def test_rows_are_packed_only_where_that_saves_an_eighth():
    lengths = [8, 8, 8, 4]  # 4 of 32 positions are padding
    packed = completion_batch([[0]], [[1] * n for n in lengths], [0] * 4, compact=True)
    assert packed.segments is None and packed.input_ids.shape == (1, 32)  # 28 tokens in a row of 32
    assert (
        completion_batch([[0]], [[1] * n for n in [8, 8, 8, 5]], [0] * 4, compact=True).rows == ()
    )
    assert completion_batch([[0]], [[1] * n for n in lengths], [0] * 4).rows == ()


def test_rows_of_like_length_go_through_attention_together():
    lengths = [30, 2, 29, 10, 9, 20, 1]
    batch = completion_batch([[0]], [[1] * n for n in lengths], [0] * 7, compact=True)
    assert [shape for shape, _ in batch.rows] == [(3, 30), (2, 10), (1, 2), (1, 1)]
    # there and back
    assert batch.spread[batch.pack[: sum(lengths)]].tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_is_left_to_mkl_where_the_other_matmuls_are_of_onednn(
    monkeypatch, matmul, name, share, precision
):
    """In the forward and in the backward pass, and then the setting is back.

    A model that is called directly changes none.
    """
    matmul.fp32_precision, seen = attention.ONEDNN, []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(matmul.fp32_precision)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(matmul.fp32_precision)
            return grad

    def watched(*arguments, **options):
        out, weights = logprobs_sdpa(*arguments, **options)
        return Watched.apply(out), weights

    logprobs_sdpa = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    model, batch = (
        make_model(name).float(),
        completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=share),
    )
    logit_path(model)  # which computes a few tokens, once
    seen.clear()
    with logprobs.autocast("cpu", precision):
        logps = completion_logps(model, batch)
        assert set(seen) == {"ieee"} and matmul.fp32_precision == attention.ONEDNN
        calls = len(seen)
        logps.sum().backward()
    assert seen == ["ieee"] * 2 * calls and matmul.fp32_precision == attention.ONEDNN
    seen.clear()
    model(torch.tensor([[0, 1, 2]]), attention_mask=torch.ones(1, 3)).logits.sum().backward()
    assert set(seen) == {attention.ONEDNN}


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_a_model_that_has_scored_packed_rows_generates_as_before(name):
    model, fresh = make_model(name), make_model(name)
    batch = completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=True)
    completion_logps(model, batch)
    ids = torch.tensor([[0, 0, 5, 7], [3, 8, 2, 9]])
    options = {
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "do_sample": False,
        "max_new_tokens": 6,
    }
    assert model.generate(ids, **options).tolist() == fresh.generate(ids, **options).tolist()
    scores = [
        m.bfloat16()(ids, attention_mask=options["attention_mask"]).logits for m in (model, fresh)
    ]
    # logits are near 3; without the mask they differ by more than 1
    torch.testing.assert_close(*scores, rtol=0, atol=0.1)


@every_model
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_token_after_the_cache_sees_what_it_sees_in_the_whole_text(name, precision):
    model, ids = (
        make_model(name),
        torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(0)),
    )
    model = model if precision == "float64" else model.float()
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        expected = model(ids).logits[:, 11:]
        assert use_packed_attention(model)
        for t, step in enumerate(ids.split([12, *[1] * 8], dim=1), start=12):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                steps.append(
                    model(
                        step, attention_mask=torch.ones(3, t), past_key_values=cache, use_cache=True
                    ).logits[:, -1]
                )
    error = (torch.stack(steps, 1) - expected).abs().max() / expected.abs().max()
    assert error < (1e-12 if precision == "float64" else 0.03)


def test_prompts_are_shared_only_by_models_that_allow_it():
    assert can_compact(shared_model("gpt2")) and can_compact(shared_model("llama-grouped"))
    for config in (
        {"model_type": "bloom"},
        {"sliding_window": 8},
        {"_attn_implementation": "eager"},
    ):
        options = {"model_type": "llama", "_attn_implementation": "sdpa", **config}
        assert not can_compact(SimpleNamespace(config=SimpleNamespace(**options)))


def test_a_batch_moves_as_a_whole():
    moved = completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=True).to("meta")
    assert moved.n == 6
    assert {
        value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)
    } == {"meta"}


def test_the_mean_divides_each_sum_by_its_number_of_tokens():
    model = shared_model("gpt2")
    mean = completion_logps(
        model, completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF), reduction="mean"
    )
    close(mean.detach(), loops(model) / torch.tensor([len(c) for c in COMPLETIONS]))


@every_model
@pytest.mark.parametrize("share", [False, True])
def test_tokens_at_a_temperature_are_those_of_a_loop(name, share):
    """Each token's log-prob from logits divided by the temperature, in the order of `owners`.

    The gradient too.
    """
    model = shared_model(name)
    batch = completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=share)
    found = completion_logps(model, batch, reduction="none", temperature=0.7)
    for i, (completion, p) in enumerate(zip(COMPLETIONS, PROMPT_OF)):
        ids = torch.tensor([[*PROMPTS[p], *completion]])
        table = torch.log_softmax(model(ids).logits[0, len(PROMPTS[p]) - 1 : -1] / 0.7, 1)
        close(found[batch.owners == i], table.gather(1, torch.tensor(completion)[:, None])[:, 0])
    sums = completion_logps(model, batch, temperature=0.7)
    close(
        torch.zeros(6, dtype=torch.float64).index_add(0, batch.owners, found).detach(),
        sums.detach(),
    )


def test_float32_is_exact_to_a_ten_thousandth_near_minus_700():
    model = make_model("gpt2", vocabulary=512, context=256, width=32, spread=0.02)
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(512, (n,), generator=generator).tolist() for n in (108, 111, 115)]
    expected = loops(model, PROMPTS, completions, [0, 1, 2])
    assert expected.max() < -650
    found = completion_logps(model.float(), completion_batch(PROMPTS, completions, [0, 1, 2]))
    close(found.detach(), expected, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [2**27, 0], ids=["logits kept", "logits computed again"])
@pytest.mark.parametrize("chunk", [2**23, 1], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("pads", [(), ("cpu",)], ids=["head as it is", "head padded"])
def test_gradients_are_those_of_autograd_through_full_logits(monkeypatch, name, kept, chunk, pads):
    monkeypatch.setattr(lm_head, "PADS_HEAD", pads)
    monkeypatch.setattr(lm_head, "STORED_LOGITS_BYTES", kept)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", chunk)
    model = make_model(name)
    generator = torch.Generator().manual_seed(0)
    # 133 tokens
    completions = [
        torch.randint(40, (n,), generator=generator).tolist() for n in (40, 3, 30, 39, 1, 20)
    ]
    plain = []
    for completion, p in zip(completions, PROMPT_OF):
        logps = (
            model(torch.tensor([PROMPTS[p] + completion]))
            .logits[0]
            .log_softmax(1)[len(PROMPTS[p]) - 1 : -1]
        )
        plain.append(logps[range(len(completion)), completion].sum())
    expected = gradients(model, torch.stack(plain))
    for parameter, gradient in gradients(
        model, completion_logps(model, completion_batch(PROMPTS, completions, PROMPT_OF))
    ).items():
        close(gradient, expected[parameter])


@pytest.mark.parametrize("kept", [2**27, 0], ids=["logits kept", "logits computed again"])
@pytest.mark.parametrize("bias", [True, False])
def test_token_logps_pass_gradcheck(monkeypatch, kept, bias):
    monkeypatch.setattr(lm_head, "STORED_LOGITS_BYTES", kept)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((3, 4), (5, 4), (5,))
    )
    targets = torch.tensor([4, 0, 4])
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, b if bias else None, targets), (hidden, weight, b)
    )


def test_a_frozen_head_gets_no_gradient_and_the_rest_does():
    model = make_model("llama-grouped")
    model.lm_head.weight.requires_grad_(False)
    completion_logps(model, completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF)).sum().backward()
    assert model.lm_head.weight.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.layers.parameters())


def test_a_second_backward_pass_over_logits_that_the_first_has_used_gives_the_same():
    model = shared_model("gpt2")
    loss = completion_logps(model, completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF)).sum()
    first, second = (
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second))


def test_a_second_derivative_is_refused_rather_than_wrong():
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    logps = token_logps(
        hidden, torch.randn(5, 4, dtype=torch.float64), None, torch.tensor([4, 0, 4])
    )
    (gradient,) = torch.autograd.grad((logps**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("share", [False, True])
def test_the_head_sees_completion_positions_only(monkeypatch, share):
    seen = []

    def recorded(hidden, *rest):
        seen.append(len(hidden))
        return token_logps(hidden, *rest)

    logit_path(shared_model("gpt2"))  # which computes a few tokens, once
    monkeypatch.setattr(logprobs, "token_logps", recorded)
    completion_logps(
        shared_model("gpt2"), completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=share)
    )
    assert seen == [sum(map(len, COMPLETIONS))]


def test_memory_does_not_grow_with_prompt_length_times_vocabulary():
    model = make_model("gpt2", vocabulary=20_032, context=204).float()
    batch = completion_batch([[1] * 200] * 8, [[2, 3, 4, 5]] * 8, range(8))
    with LargestTensor() as largest:
        completion_logps(model, batch).sum().backward()
    assert largest.numel <= 32 * 20_032  # 32 completion tokens; full logits are 8 * 204 * 20_032


def test_memory_does_not_grow_with_the_completions_beyond_a_chunk(monkeypatch):
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 4 * 64 * 20_032)
    monkeypatch.setattr(lm_head, "STORED_LOGITS_BYTES", 0)
    model = make_model("gpt2", vocabulary=20_032, context=101).float()
    with LargestTensor() as largest:
        completion_logps(
            model, completion_batch([[1]] * 3, [[2] * 100] * 3, range(3))
        ).sum().backward()
    assert largest.numel <= 64 * 20_032  # 300 completion tokens


def test_scoring_holds_the_logits_of_one_chunk_at_a_time(monkeypatch):
    alive, original, references = [], torch.log_softmax, []

    def recorded(logits, *arguments, **options):
        references.append(weakref.ref(logits))
        alive.append(sum(reference() is not None for reference in references))
        return original(logits, *arguments, **options)

    monkeypatch.setattr(torch, "log_softmax", recorded)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 1)
    score_completions(shared_model("gpt2"), [[0]], [[1] * 40] * 10, [0] * 10)
    assert len(alive) > 4 and set(alive) == {1}


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_bfloat16_autocast_gives_finite_sums_near_those_of_float32(name):
    model, batch = (
        make_model(name).float(),
        completion_batch(PROMPTS, COMPLETIONS, PROMPT_OF, compact=True),
    )
    expected = completion_logps(model, batch).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = completion_logps(model, batch)
    assert found.dtype == torch.float64
    assert not torch.equal(found, expected)
    per_token = torch.tensor([len(c) for c in COMPLETIONS])
    # nats; logits near 4, rounded to 1 in 256
    assert ((found - expected).abs() / per_token).max() < 0.03
    assert all(gradient.isfinite().all() for gradient in gradients(model, found).values())


def test_bfloat16_logits_are_normalized_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(9, 16, generator=generator),
        torch.randn(50, 16, generator=generator),
    )
    targets = torch.arange(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logps(hidden, weight, None, targets)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    assert found.dtype == torch.float32
    close(found, logits.log_softmax(1)[range(9), targets], atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_scores_come_in_the_order_given_and_the_mode_is_put_back(training):
    model = make_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train(training)
    scores = score_completions(model, PROMPTS, COMPLETIONS, PROMPT_OF, batch_tokens=24)
    assert model.training is training
    assert not scores.requires_grad
    model.eval()
    close(scores, loops(model))


@pytest.mark.parametrize("batch_tokens", [1, 24, 10**6])
def test_scores_do_not_depend_on_the_size_of_a_batch(batch_tokens):
    model = shared_model("llama-grouped")
    close(
        score_completions(model, PROMPTS, COMPLETIONS, PROMPT_OF, batch_tokens=batch_tokens),
        loops(model),
    )


def test_of_no_completions_there_are_no_scores():
    assert score_completions(shared_model("gpt2"), PROMPTS, [], []).shape == (0,)


def test_the_training_mode_is_put_back_after_an_error_too():
    model = make_model("gpt2").train()
    with pytest.raises(ValueError, match="context"):
        score_completions(model, [[0]], [[1] * 48], [0])
    assert model.training


BAD = [  # prompts, completions, prompt_of, words of the message
    ([[]], [[1]], [0], ["prompt 0 has no tokens", "BOS"]),
    ([[0], []], [[1], [1]], [0, 1], ["prompt 1 has no tokens", "BOS"]),
    ([[0]], [[1], []], [0, 0], ["completion 1 has no tokens", "EOS"]),
    ([[]], [[]], [0], ["has no tokens"]),
    ([[0]], [[1], [1]], [0, 1], ["prompt_of[1] is 1", "1 prompts", "0..0"]),
    ([[0]], [[1]], [-1], ["prompt_of[0] is -1", "0..0"]),
    ([[0]], [[1], [2]], [0], ["2 completions", "1 values in prompt_of"]),
    ([[0]], [[1] * 48], [0], ["49 tokens", "context is 48", "shorten"]),
    ([[0]], [[40]], [0], ["token id 40", "vocabulary of 40"]),
    ([[0, 41]], [[1]], [0], ["token id 41", "vocabulary of 40"]),
    ([[0]], [[-1]], [0], ["token id -1", "vocabulary of 40"]),
]


@pytest.mark.parametrize(
    "prompts, completions, prompt_of, words", BAD, ids=[" ".join(bad[-1]) for bad in BAD]
)
@pytest.mark.parametrize("how", ["a batch", "scores"])
def test_wrong_tokens_are_named(how, prompts, completions, prompt_of, words):
    model = shared_model("gpt2")
    with pytest.raises(ValueError) as caught:
        if how == "scores":
            score_completions(model, prompts, completions, prompt_of)
        else:
            completion_logps(model, completion_batch(prompts, completions, prompt_of))
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(
        ValueError, match="0 completions and 0 values in prompt_of; need one each, at least one"
    ):
        completion_batch([[0]], [], [])


def test_a_completion_may_fill_the_context():
    model = shared_model("gpt2")
    close(
        completion_logps(model, completion_batch([[0]], [[1] * 47], [0])).detach(),
        loops(model, [[0]], [[1] * 47], [0]),
    )


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="reduction is 'average'; it must be 'sum' .* or 'none'"):
        completion_logps(
            shared_model("gpt2"), completion_batch([[0]], [[1]], [0]), reduction="average"
        )


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the process's memory where Linux keeps it"
)
def test_memory_does_not_grow_with_the_batches_scored():
    """In a process of its own, whose heap nothing has cut into pieces yet."""
    source = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
from dpo_lab.logprobs import score_completions
from dpo_lab.engine.cpu import keep_freed_memory
from dpo_lab.models import prepare_model

def score(n):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    prompts = [[5] * length for length in lengths]
    score_completions(model, prompts, [[7] * 48] * (4 * n), [i // 4 for i in range(4 * n)])
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

keep_freed_memory()
torch.manual_seed(0)
config = GPT2Config(vocab_size=8192, n_positions=64, n_embd=16, n_layer=1, n_head=2)
model = prepare_model(GPT2LMHeadModel(config))
print(score(200), score(1200))
"""
    found = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    few, many = map(float, found.stdout.split())
    assert many < few + 200, (few, many)
