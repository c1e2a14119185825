"""Prepacked weights multiply as the layers do, and leave no trace."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dpo_lab import completion_batch, completion_logps, sampling
from dpo_lab.engine import prepacked
from dpo_lab.engine.prepacked import can_prepack, prepacked_bytes, prepacked_weights
from dpo_lab.engine.structure import touched
from dpo_lab.logprobs import autocast, logit_path
from dpo_lab.models import lora
from dpo_lab.sampling import sample_completions, sample_with_logps
from dpo_lab.sentiment.cost import sampling_bytes

pytestmark = pytest.mark.skipif(
    not can_prepack(torch.float32), reason="this torch cannot multiply by prepacked weights here"
)


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    """A random model, far from uniform, with layers of both kinds between them."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        shape = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 96, "vocab_size": 50}
        made = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
        made = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=0))
    for parameter in made.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    return made.eval()


def prepacked_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if "forward" in vars(layer)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([nn.Linear, Conv1D]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_a_prepacked_layer_gives_what_float64_gives(kind, inside, out, shape, biased, precision):
    """Layers of both kinds, with one row and many, in both precisions."""
    if not can_prepack(getattr(torch, precision)):
        precision = "float32"
    generator = torch.Generator().manual_seed(inside * 71 + out)
    layer = nn.Linear(inside, out, bias=biased) if kind is nn.Linear else Conv1D(out, inside)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(*shape, inside, generator=generator)
    weight = layer.weight if kind is nn.Linear else layer.weight.T

    # in bfloat16 from rounded factors, so that the product's rounding is left
    dtype = getattr(torch, precision)
    bias = 0 if layer.bias is None else layer.bias.to(dtype).double()
    exact = x.to(dtype).double() @ weight.to(dtype).double().T + bias
    with torch.no_grad(), autocast("cpu", precision), prepacked_weights(layer):
        assert prepacked_layers(layer) == [layer]
        found = layer(x)
    assert found.dtype == dtype and found.shape == (*shape, out)
    assert torch.allclose(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_model_with_prepacked_weights_gives_the_same_logits(model):
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).logits
        with prepacked_weights(model):
            assert len(prepacked_layers(model)) == sum(
                type(layer) in (nn.Linear, Conv1D) for layer in model.modules()
            )
            found = model(ids).logits
    assert torch.allclose(found, plain, rtol=1e-4, atol=1e-4)


def test_the_layers_are_as_before_after_an_error_too(model):
    with pytest.raises(ZeroDivisionError), prepacked_weights(model):
        assert prepacked_layers(model)
        raise ZeroDivisionError
    assert prepacked_layers(model) == []


def test_an_interrupt_while_weights_are_copied_leaves_nothing(model, monkeypatch):
    """Else the layers would go on with the weights of then, however they are trained."""
    right, calls = prepacked.prepack, []

    def interrupted(weight):
        calls.append(weight)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(weight)

    monkeypatch.setattr(prepacked, "prepack", interrupted)
    with pytest.raises(KeyboardInterrupt), prepacked_weights(model):
        pass
    assert len(calls) == 4 and prepacked_layers(model) == []


def test_the_next_block_prepacks_the_weights_of_then(model):
    """A policy is sampled from, trained, and sampled from again."""
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for _ in range(2):
            with prepacked_weights(model):
                found = model(ids).logits
            assert torch.allclose(found, model(ids).logits, rtol=1e-4, atol=1e-4)
            for parameter in model.parameters():
                parameter.mul_(0.5)


def test_a_pass_with_gradients_has_them(model):
    """Another thread may train while one samples."""
    batch = completion_batch([[1, 2]], [[3, 4, 5]], [0])
    completion_logps(model, batch).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with prepacked_weights(model):
        completion_logps(model, batch).sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


def test_a_pass_in_another_precision_is_the_layers_own(model):
    """Another thread may score in float32 while one samples in bfloat16."""
    if not can_prepack(torch.bfloat16):
        pytest.skip("this CPU has no fast bfloat16")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model(ids).logits
        with autocast("cpu", "bfloat16"):
            context = prepacked_weights(model)
            context.__enter__()
        try:
            assert torch.equal(model(ids).logits, plain)
        finally:
            context.__exit__(None, None, None)


def test_two_threads_use_one_copy_until_the_second_is_done(model):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with prepacked_weights(model):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with prepacked_weights(model):
        mine = [vars(layer)["forward"] for layer in prepacked_layers(model)]
        thread.start()
        assert entered.wait(30)
    assert [vars(layer)["forward"] for layer in prepacked_layers(model)] == mine
    leave.set()
    thread.join()
    assert prepacked_layers(model) == []


def test_a_forward_of_the_users_own_stays(model):
    layer, called = model.lm_head, []
    usual: Callable = layer.forward
    layer.forward = lambda x: called.append(len(x)) or usual(x)
    sample_completions(model, [[1, 2]], 2, eos_token_id=-1, max_new_tokens=20)
    assert len(called) >= 20 and prepacked_layers(model) == [layer]


def test_a_prepacked_head_is_still_the_class_s_own(model):
    """What decides how log-probs are computed is the same while another thread samples."""
    before = logit_path(model)
    with prepacked_weights(model):
        assert not touched(model.lm_head) and logit_path(model) == before


def test_larger_models_and_other_precisions_are_left_alone(model, monkeypatch):
    with prepacked_weights(model.double()):
        assert prepacked_layers(model) == [] and prepacked_bytes(model) == 0
    size = prepacked_bytes(model.float())
    assert size == 4 * sum(
        layer.weight.numel() for layer in model.modules() if type(layer) in (nn.Linear, Conv1D)
    )
    monkeypatch.setattr(prepacked, "MOST_BYTES", size - 1)
    with prepacked_weights(model):
        assert prepacked_layers(model) == [] and prepacked_bytes(model) == 0
    assert sampling_bytes(model, 1, 2, "float32")["prepacked weights"] == 0
    monkeypatch.setattr(prepacked, "MOST_BYTES", size)
    assert sampling_bytes(model, 1, 2, "float32")["prepacked weights"] == size


class Odd(torch.Tensor):
    """Stands for sharded and quantized weights, which are tensors of classes of their own."""


def test_weights_of_another_class_are_left_alone():
    plain, odd, meta = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, device="meta")
    odd.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Odd))
    with prepacked_weights(nn.Sequential(plain, odd, meta)):
        assert "forward" in vars(plain) and not {"forward"} & {*vars(odd), *vars(meta)}


def test_a_torch_without_these_operators_samples_as_before(model, monkeypatch):
    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    can_prepack.cache_clear()
    monkeypatch.setattr(prepacked, "prepack", missing)
    try:
        assert not can_prepack(torch.float32)
        rows = sample_completions(model, [[1, 2]], 2, eos_token_id=-1, max_new_tokens=20)
        assert [len(ids) for ids in rows[0]] == [20, 20]
    finally:
        can_prepack.cache_clear()


def test_an_operator_that_computes_something_else_is_not_used(monkeypatch):
    right = prepacked.product
    monkeypatch.setattr(prepacked, "product", lambda x, w, b: right(x, w, b) * 1.01)
    can_prepack.cache_clear()
    try:
        assert not can_prepack(torch.float32)
    finally:
        can_prepack.cache_clear()


@pytest.mark.parametrize("adapted", [False, True])
def test_sampling_draws_the_same_tokens_with_the_same_log_probs(model, monkeypatch, adapted):
    """Also from adapters, whose layers are prepacked like others."""
    seen, inside = [], prepacked.PrepackedForward.__call__
    monkeypatch.setattr(
        prepacked.PrepackedForward, "__call__", lambda self, x: seen.append(1) or inside(self, x)
    )
    prompts = [[1, 2, 3], [4] * 40, [5, 6]]

    def drawn(model: nn.Module) -> tuple:
        return sample_with_logps(model, prompts, 4, eos_token_id=0, max_new_tokens=20, seed=3)

    def both(model: nn.Module) -> None:
        completions, logps = drawn(model)
        assert seen and prepacked_layers(model) == []
        monkeypatch.setattr(sampling, "PREPACKING_PAYS", 1_000)
        seen.clear()
        plain, plain_logps = drawn(model)
        assert not seen and completions == plain
        assert torch.allclose(torch.tensor(logps), torch.tensor(plain_logps), atol=1e-3)

    if not adapted:
        both(model)
        return
    with lora(model, 2) as policy:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        both(policy)
