"""Models and tokenizers come from a folder or the cache, and only if they fit.

No network, no pickle.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import httpx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from dpo_lab import models
from dpo_lab.batching import completion_batch
from dpo_lab.cli import main
from dpo_lab.engine.attention import PACKED
from dpo_lab.logprobs import can_compact, completion_logps
from dpo_lab.models import check_same_vocabulary, load_model, load_tokenizer, lora, prepare_model

GEMMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GEMMA |= {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 1.0,
}


def small_gpt2(vocabulary=8):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=8,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def save_words(folder, **special):
    """A tokenizer of three words with the special tokens given."""
    words = Tokenizer(WordLevel({"<end>": 0, "good": 1, "bad": 2}, unk_token="bad"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def test_a_folder_gives_its_model_ready_to_evaluate(tiny):
    model = load_model(str(tiny))
    saved = GPT2LMHeadModel.from_pretrained(tiny)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(
        torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_the_dtype_asked_for_is_given(tiny):
    assert load_model(str(tiny), dtype=torch.float64).dtype == torch.float64


def test_a_llama_with_a_plain_head_is_taken(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.model_type == "llama"


def test_embedded_is_the_folder_inside_the_package(tiny, monkeypatch):
    monkeypatch.setattr(models, "EMBEDDED", tiny)
    assert load_model().config.n_embd == 32
    assert len(load_tokenizer()) == 512


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_missing_embedded_model_says_how_to_make_it(load, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=re.escape(
            f"missing from {tmp_path}; reinstall dpo-lab, or train it with `dpo-lab pretrain`"
        ),
    ):
        load()


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_unknown_name_says_what_can_be_given_instead(load):
    with pytest.raises(FileNotFoundError) as caught:
        load("no-such-owner/no-such-model")
    for words in (
        "'no-such-owner/no-such-model'",
        "'embedded'",
        "config.json and model.safetensors",
        "`hf download`",
    ):
        assert words in str(caught.value)


def test_a_name_in_the_cache_needs_no_network(tiny, tmp_path):
    repository = tmp_path / "hub" / "models--openai-community--gpt2"
    commit = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = """
from dpo_lab.models import load_model, load_tokenizer
tokenizer = load_tokenizer("openai-community/gpt2")
print(load_model("openai-community/gpt2").config.n_embd, tokenizer("joy")["input_ids"][0])
"""
    hidden = {"HF_HUB_CACHE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(models.__file__).parent.parent,
        env=environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["32", "0"], done.stderr


def test_pickled_weights_are_refused(tmp_path):
    model = small_gpt2()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_model(str(tmp_path))


def test_half_a_file_of_weights_is_named(tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        load_model(str(tmp_path))


@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_a_model_that_caps_its_logits_is_refused(tmp_path, spread):
    set_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**GEMMA | {"initializer_range": spread})).save_pretrained(
        tmp_path / "capped"
    )
    Gemma2ForCausalLM(Gemma2Config(**GEMMA, final_logit_softcapping=None)).save_pretrained(
        tmp_path / "plain"
    )
    with pytest.raises(
        ValueError,
        match="capped' changes its logits after the LM head .* use a model with "
        "a plain linear LM head",
    ):
        load_model(str(tmp_path / "capped"))
    assert load_model(str(tmp_path / "plain")).config.model_type == "gemma2"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_named(tiny, device):
    with pytest.raises(
        ValueError, match=f"device is '{device}' and torch sees no GPU; .*device='cpu'"
    ):
        load_model(str(tiny), device=device)


def test_a_tokenizer_pads_with_eos_unless_it_has_a_pad_token(tmp_path):
    tokenizer = load_tokenizer(save_words(tmp_path / "a", eos_token="<end>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert (
        load_tokenizer(save_words(tmp_path / "b", eos_token="<end>", pad_token="bad")).pad_token_id
        == 2
    )


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    name = save_words(tmp_path)
    with pytest.raises(
        ValueError, match="tokenizer of .* has no EOS token, .*set tokenizer.eos_token"
    ):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))


def test_policy_and_reference_must_have_as_many_tokens():
    check_same_vocabulary(small_gpt2(8), small_gpt2(8))
    with pytest.raises(
        ValueError,
        match="policy has a vocabulary of 8 tokens and reference one of 9; .*reference's weights",
    ):
        check_same_vocabulary(small_gpt2(8), small_gpt2(9))


def test_a_prepared_gpt2_computes_the_same_with_the_fused_gelu():
    model = small_gpt2().double().eval()
    ids = torch.arange(8)[None] % model.config.vocab_size
    before = model(ids).logits
    assert {type(block.mlp.act) for block in prepare_model(model).transformer.h} == {torch.nn.GELU}
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [False, True])
def test_the_merged_model_is_the_one_with_adapters(tiny, tmp_path, family, share):
    """Its logits, and its log-probs by the paths that share prompts and pack rows."""
    if family == "gpt2":
        model = load_model(str(tiny))
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        LlamaForCausalLM(
            LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
        ).save_pretrained(tmp_path)
        model = load_model(str(tmp_path))
    ids = torch.arange(12)[None] + 3
    batches = [
        completion_batch(
            [list(range(1, 10))], [[i + 4] * 9 for i in range(6)], [0] * 6, compact=share
        ),
        completion_batch(
            [[1], [2, 3], [9]], [[4] * 20, [5] * 2, [6] * 3], [0, 1, 2], compact=share
        ),
    ]
    assert not share or (batches[0].segments is not None and batches[1].rows)
    plain, before = (
        model(ids).logits.detach(),
        {name: p.clone() for name, p in model.state_dict().items()},
    )
    with lora(model, 3, seed=1) as adapted:
        torch.testing.assert_close(adapted(input_ids=ids).logits.detach(), plain, rtol=0, atol=0)
        for name, parameter in adapted.named_parameters():
            assert parameter.requires_grad is (".lora_" in name)
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        logits = adapted(input_ids=ids).logits.detach()
        logps = [completion_logps(adapted, batch).detach() for batch in batches]
        assert can_compact(adapted) and model.config._attn_implementation == PACKED
    assert (logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
    for batch, found in zip(batches, logps):
        torch.testing.assert_close(completion_logps(model, batch), found, rtol=0, atol=1e-4)
    assert model.state_dict().keys() == before.keys() and not hasattr(model, "peft_config")
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert not list((tmp_path / "merged").glob("adapter*"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Folder of one model in an otherwise empty Hugging Face cache."""
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("607a30d783dfa663caf39e06633721c8d4cfcd7e")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = repository / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    small_gpt2().save_pretrained(snapshot)
    save_words(snapshot, eos_token="<end>")
    return snapshot


@pytest.mark.parametrize(
    "left, words",
    [
        (None, "is here (.*), but not whole: .*hf download someone/model"),
        ("pytorch_model.bin", "pickle"),
    ],
)
def test_a_cache_without_safetensors_says_what_is_there(cache, tmp_path, capsys, left, words):
    assert load_model("someone/model").config.n_embd == 8
    (cache / "model.safetensors").unlink()
    if left:
        torch.save({}, cache / left)
    for command in ("sample", "label"):
        assert main([command, "--model", "someone/model", "--data", str(tmp_path / "data")]) == 2
        assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "data").exists()


def test_a_gated_model_says_how_to_be_let_in(tmp_path, monkeypatch, capsys):
    """The hub's own answer, over a made-up connection: 403 and the code that gives the reason."""
    asked = []

    def answer(request):
        asked.append(request.url.path)
        return httpx.Response(403, headers={"X-Error-Code": "GatedRepo"}, request=request)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.utils._http._GLOBAL_CLIENT",
        httpx.Client(transport=httpx.MockTransport(answer)),
    )
    assert main(["train", "--model", "someone/gated", "--out", str(tmp_path / "run")]) == 2
    assert asked and re.search(
        "'someone/gated' is gated, .*`hf auth login`", capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
