"""BOS and EOS stand once at every door, rows of messages are read as TRL reads them.

What is wrong is named by its row.
"""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_classifier
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import byte_level, sentencepiece_like, sentencepiece_with_bytes
from transformers import BertForSequenceClassification

from dpo_lab.batching import pack, whole_documents
from dpo_lab.engine.rows import JOINED
from dpo_lab.preferences import Preferences, Report, from_rankings, from_rows, from_scores
from dpo_lab.sentiment.reviews import sample_prefixes
from dpo_lab.sentiment.reward import SentimentReward
from dpo_lab.sentiment.task import _sft_rows

ROW = {"prompt": "this film", "chosen": " was a joy", "rejected": " was a bore"}
TURNS = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TOOLS = (
    "{% if tools %}TOOLS {{ tools | length }}. {% endif %}{% if short %}BRIEF. {% endif %}" + TURNS
)


def said(role, text):
    return [{"role": role, "content": text}]


def chat_row(**changes):
    row = {
        "prompt": said("user", "time?"),
        "chosen": said("assistant", "nine"),
        "rejected": said("assistant", "five"),
    }
    return row | changes


@pytest.fixture(
    params=["one token for both", "sentencepiece", "sentencepiece with bytes", "no BOS"]
)
def marked(request, tokenizer):
    """Tokenizers whose BOS is EOS, is another token, and is none."""
    made = {
        "sentencepiece": sentencepiece_like,
        "sentencepiece with bytes": sentencepiece_with_bytes,
        "no BOS": byte_level,
    }
    return made[request.param]() if request.param in made else copy.deepcopy(tokenizer)


@pytest.fixture
def chat(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TOOLS
    return tokenizer


DOORS = {
    "rows": lambda prompt, texts, t, **options: from_rows(
        [{"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}], t, context=64, **options
    ),
    "rankings": lambda prompt, texts, t, **options: from_rankings(
        [prompt], [texts], t, context=64, **options
    ),
    "scores": lambda prompt, texts, t, **options: from_scores(
        [prompt], [texts], [[1.0, 0.0]], t, context=64, **options
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_marker_that_the_text_spells_out_is_not_written_again(door, marked):
    bos, eos, texts = marked.bos_token or "", marked.eos_token, (ROW["chosen"], ROW["rejected"])
    plain = DOORS[door](ROW["prompt"], texts, marked)
    spelt = DOORS[door](bos + ROW["prompt"], [text + eos for text in texts], marked)
    assert [spelt.prompts, spelt.completions] == [plain.prompts, plain.completions]
    assert spelt.report == plain.report == Report(pairs=1)
    assert all(
        ids.count(marked.eos_token_id) == 1 and ids[-1] == marked.eos_token_id
        for ids in spelt.completions
    )
    assert plain.prompts[0].count(marked.bos_token_id) == (marked.bos_token is not None)


@pytest.mark.parametrize("door", DOORS)
def test_a_marker_inside_a_completion_is_counted(door, marked):
    eos = marked.eos_token
    found = DOORS[door](ROW["prompt"], [f" was{eos} a joy", " was a bore"], marked)
    assert found.completions[0].count(marked.eos_token_id) == 2 and found.report == Report(
        pairs=1, inner_eos=1
    )
    if marked.bos_token:
        assert (
            DOORS[door](
                ROW["prompt"], [" was a joy", f"{marked.bos_token} was a bore"], marked
            ).report.inner_eos
            == 1
        )


def test_ids_that_were_padded_with_eos_are_taken_as_they_are_and_counted(tokenizer):
    found = from_scores([[0, 7]], [[[5, 6, 0], [8, 0, 0]]], [[1, 0]], tokenizer, context=64)
    assert found.completions == [[5, 6, 0], [8, 0, 0]] and found.report == Report(
        pairs=1, inner_eos=1
    )


@pytest.mark.parametrize("door", DOORS)
def test_a_completion_that_repeats_its_prompt_is_counted(door, marked):
    both = [ROW["prompt"] + text for text in (" was a joy", " was a bore")]
    assert DOORS[door](ROW["prompt"], both, marked).report == Report(pairs=1, prompt_repeated=2)
    assert DOORS[door]("the plot", both, marked).report == Report(pairs=1)


def test_samples_with_their_prompt_as_generate_gives_them_are_counted(tokenizer):
    found = from_scores(
        [[0, 7, 8]], [[[0, 7, 8, 5, 0], [7, 8, 6, 0]]], [[1, 0]], tokenizer, context=64
    )
    assert found.report == Report(pairs=1, prompt_repeated=2, inner_eos=1)


def test_turns_that_a_template_ends_are_not_inner(chat):
    assert from_rows([chat_row()], chat, context=64).report == Report(pairs=1)
    chat.chat_template = TURNS.replace("{{ eos_token }}", "{{ eos_token }}\n")
    assert from_rows([chat_row()], chat, context=64).report == Report(pairs=1)


def test_a_completion_without_eos_to_end_it_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match="row 0: chosen: the tokenizer has no EOS token .*set tokenizer.eos_token"
    ):
        from_rows([ROW], tokenizer, context=64)


def test_packed_documents_and_prefixes_have_each_marker_once(marked):
    start = marked.eos_token_id if marked.bos_token_id is None else marked.bos_token_id
    texts = ["this film was a joy", "this film"]
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    spelt = [(marked.bos_token or "") + text + marked.eos_token for text in texts]
    assert _sft_rows(spelt, marked, model) == _sft_rows(texts, marked, model)
    assert whole_documents(marked, spelt) == whole_documents(marked, texts)
    begun = [(marked.bos_token or marked.eos_token) + text for text in texts]
    assert sample_prefixes(begun, marked, 2, seed=0) == sample_prefixes(texts, marked, 2, seed=0)
    assert [ids[0] for ids in sample_prefixes(texts, marked, 2, seed=0)] == [start, start]


def test_packing_closes_each_document_once():
    assert sorted(pack([[1, 5, 0], [1, 5], [0]], 3, 0)) == [[0, 0], [1, 5, 0], [1, 5, 0]]


def test_a_classifier_reads_special_tokens_of_a_text_as_text(tmp_path, monkeypatch):
    make_classifier(tmp_path, ["negative", "positive"])
    reward, read, forward = (
        SentimentReward.hub(str(tmp_path)),
        [],
        BertForSequenceClassification.forward,
    )

    def recorded(model, input_ids, **options):
        read.append(input_ids.tolist())
        return forward(model, input_ids, **options)

    monkeypatch.setattr(BertForSequenceClassification, "forward", recorded)
    reward(["good [SEP] film"])
    unknown, start, end, good, film = 1, 2, 3, 5, 7
    assert read == [[[start, good, unknown, unknown, unknown, film, end]]]


# Rows of messages


@pytest.mark.parametrize("form", ["list", "JSON", "dataset"])
def test_tools_and_template_arguments_reach_the_template(chat, form):
    tools = [{"name": "clock"}]
    row = chat_row(
        tools=json.dumps(tools) if form == "JSON" else tools, chat_template_kwargs={"short": True}
    )
    found = from_rows(Dataset.from_list([row]) if form == "dataset" else [row], chat, context=64)
    expected = chat.apply_chat_template(
        row["prompt"], tools=tools, short=True, tokenize=False, add_generation_prompt=True
    )
    assert expected.startswith("TOOLS 1. BRIEF.") and found.prompts == [
        chat(expected, add_special_tokens=False)["input_ids"]
    ]
    assert found.report.unread == ()


def test_trl_reads_tools_and_template_arguments_as_we_do(chat, tiny, tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM

    rows = [
        chat_row(tools=[{"name": "clock"}], chat_template_kwargs={"short": True}),
        chat_row(tools=[{"name": "map"}]),
    ]
    rows[1] |= {"prompt": said("user", "where?"), "chat_template_kwargs": {"short": False}}
    options = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny),
        args=trl.DPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=chat,
    )
    theirs = [
        tuple(row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        for row in trainer.train_dataset
    ]
    assert pair_ids(from_rows(rows, chat, context=64)) == theirs


def test_a_message_may_call_a_tool_without_saying_anything(chat):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "clock"}}],
    }
    prompt = [*said("user", "time?"), call, *said("tool", "9")]
    assert (
        len(
            from_rows([chat_row(prompt=prompt, tools=[{"name": "clock"}])], chat, context=64).chosen
        )
        == 1
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"prompt": "time?"},
            [
                "found prompt: str",
                "Give the prompt as messages too",
                "the assistant's answer alone",
            ],
        ),
        ({"rejected": said("user", "five")}, ["rejected[0] has the role 'user'", "'assistant'"]),
        ({"chosen": said("assistant", "a") + said("user", "b")}, ["chosen[1] has the role 'user'"]),
        ({"chosen": said("model", "nine")}, ["chosen[0] has the role 'model'"]),
        (
            {"chosen": said("user", "time?") + said("assistant", "nine")},
            ["chosen holds the whole conversation", "row['chosen'][1:]"],
        ),
        (
            {"rejected": said("user", "other?") + said("assistant", "five")},
            ["rejected[0] has the role 'user'"],
        ),
        ({"prompt": [{"content": "time?"}]}, ["prompt must hold messages with a 'role'"]),
        ({"chosen": said("assistant", None)}, ["chosen must hold messages", "'content'"]),
        ({"tools": 3}, ["tools is 3 (int)", "list"]),
        ({"tools": "clock"}, ["tools is no JSON", "'clock'"]),
        ({"chat_template_kwargs": [1]}, ["chat_template_kwargs is [1] (list)", "mapping"]),
        ({"chat_template_kwargs": {"tokenize": True}}, ["the chat template fails", "tokenize"]),
        ({"tool": []}, ["column 'tool'", "looks like 'tools'"]),
        ({"images": ["a.png"]}, ["column 'images'", "pictures are not read"]),
        ({"prompt": said("user", "a \ud800")}, ["character", "'\\ud800'", "surrogate"]),
        ({"rejected": said("assistant", "\udfff")}, ["rejected: character", "surrogate"]),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named_by_its_row(chat, changes, words):
    with pytest.raises(ValueError) as caught:
        from_rows([chat_row(), chat_row(**changes)], chat, context=64)
    assert [word for word in ["row 1", *words] if word not in str(caught.value)] == [], caught.value


def test_a_conversation_without_a_prompt_column_says_where_it_is():
    row = {name: said("user", "time?") + said("assistant", name) for name in ("chosen", "rejected")}
    with pytest.raises(
        ValueError,
        match="row 0 has no column 'prompt' .*whole conversations: take what both begin with",
    ):
        from_rows([row], byte_level(), context=64)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('System role not supported') }}",
        "{{ 1 // 0 }}",
        "{{ messages[9].role }}",
    ],
)
def test_a_template_that_fails_names_the_row(chat, template):
    chat.chat_template = "{% if messages[0].role == 'system' %}" + template + "{% endif %}" + TURNS
    system = chat_row(prompt=said("system", "be brief") + said("user", "time?"))
    with pytest.raises(ValueError, match="row 1: the chat template fails .*be brief") as caught:
        from_rows([chat_row(), system], chat, context=64)
    assert caught.value.__cause__ is not None


def test_columns_that_are_not_read_are_named(tokenizer, tmp_path):
    found = from_rows(
        [ROW | {"score": 1}, ROW | {"source": "x", "score": 2}], tokenizer, context=64
    )
    assert found.report == Report(pairs=2, duplicated=1, unread=("score", "source"))
    found.save(tmp_path / "p")
    assert Preferences.load(tmp_path / "p").report == found.report
    with pytest.raises(
        ValueError, match="row 0 is plain text with tools, which a chat template alone reads"
    ):
        from_rows([ROW | {"tools": [{"name": "clock"}]}], tokenizer, context=64)
    assert from_rows(
        [ROW | {"tools": None, "images": None}], tokenizer, context=64
    ).report == Report(pairs=1, unread=("images",))


@pytest.mark.parametrize("door", DOORS)
def test_half_a_character_is_named_by_its_place(door, tokenizer):
    place = {
        "rows": "row 0: chosen",
        "rankings": "ranking 0: text 0",
        "scores": r"completions\[0\]\[0\]",
    }[door]
    with pytest.raises(ValueError, match=rf"{place}: character 4 is '\\ud83c', a lone surrogate"):
        DOORS[door]("this film", [" was\ud83c", " bore"], tokenizer)
    with pytest.raises(ValueError, match=r"0: character 0 is '\\udfac', a lone surrogate"):
        DOORS[door]("\udfac", [" was", " bore"], tokenizer)


# To TRL and back


def pair_ids(p):
    return [
        (p.prompts[p.prompt_of[c]], p.completions[c], p.completions[r])
        for c, r in zip(p.chosen, p.rejected)
    ]


PIECES = [
    "this",
    " film",
    "film",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "a",
    "é",
    "e\u0301",
    "映画",
    "🎬",
    "\u200d",
    "\u202e",
    "\x00",
    "\ufeff",
]
PIECES += [
    "{{ x }}",
    "{% if %}",
    "<b>",
    "&amp;",
    "$",
    "|",
    "\\",
    "'",
    "'s",
    "12",
    "▁",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
]
anything = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(
    st.characters(codec="utf-8"), max_size=8
)
words = st.lists(
    st.sampled_from(["this", " film", " was", "joy", " ", "s", "<s>", "</s>"]), max_size=6
).map("".join)
MADE = {
    "one token for both": (lambda: None, anything),
    "BOS not added": (lambda: None, anything),
    "no BOS": (byte_level, anything),
    "sentencepiece": (sentencepiece_like, words),
}


@pytest.mark.parametrize("kind", MADE)
def test_rows_for_trl_come_back_as_the_same_tokens(kind, tokenizer):
    make, text = MADE[kind]
    made_of, tried = make() or copy.deepcopy(tokenizer), []
    if kind == "BOS not added":
        made_of.backend_tokenizer.post_processor = None

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.tuples(text, text, text), min_size=1, max_size=4),
        st.none() | st.integers(1, 6),
        st.booleans(),
    )
    def there_and_back(rows, limit, as_dataset):
        rows = [
            dict(zip(ROW, row))
            for row in rows
            if row[1].strip() and row[2].strip() and row[1] != row[2]
        ]
        try:
            p = from_rows(rows, made_of, context=128, max_completion_tokens=limit).as_text(made_of)
        except ValueError as error:
            assert "no pair left" in str(error)
            return
        trl = p.to_trl(made_of)
        read = from_rows(trl if as_dataset else list(trl), made_of, context=128)
        assert pair_ids(read) == pair_ids(p)
        again = from_rows(read.to_trl(made_of), made_of, context=128)
        assert [again.prompts, again.completions, again.report] == [
            read.prompts,
            read.completions,
            read.report,
        ]
        for name in ("prompt_of", "chosen", "rejected"):
            assert np.array_equal(getattr(again, name), getattr(read, name))
        tried.append(p.report.cut)

    there_and_back()
    assert len(tried) > 20 and max(tried) > 0


def test_our_rows_for_trl_need_no_template_of_the_tokenizer(tokenizer):
    p = from_rows([ROW], tokenizer, context=64)
    rows = p.to_trl(tokenizer)
    assert (
        rows[0]["chat_template_kwargs"] == {"chat_template": JOINED}
        and tokenizer.chat_template is None
    )
    read = from_rows(rows, tokenizer, context=64)
    assert [read.prompts, read.completions, read.report] == [p.prompts, p.completions, p.report]
