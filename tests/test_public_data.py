"""Public data sets: each schema is read as it is on the hub, bad rows counted, nothing leaks."""

import re
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
from hub_copies import (
    hc3_row,
    hh_row,
    into_cache,
    shp_row,
    tldr_row,
    tldr_trl_row,
    ultrafeedback_row,
    webgpt_row,
    write,
    write_copy,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lab.data import DATASETS, find_dataset, hub, load_preferences
from dpo_lab.data.hygiene import is_test, name_of
from dpo_lab.data.schemas import Unusable, read_hh, read_shp, read_webgpt, transcript
from dpo_lab.preferences import from_rows

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
NAMES = [name if dataset.default is not None else f"{name}:prefer-human"
         for name, dataset in DATASETS.items()]  # fmt: skip

# how many pairs `write_copy` has in each split, but for those that it splits by hash
PAIRS = {
    "tldr": {"train": 24, "validation": 8, "test": 8},
    "tldr-trl": {"train": 24, "test": 8},
    "hh": {"train": 96, "test": 32},
    "shp": {"train": 48, "validation": 16, "test": 16},
    "ultrafeedback": {"train": 24, "test": 8},
    "ultrafeedback-trl": {"train": 24, "test": 8},
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    root = tmp_path_factory.mktemp("copies")
    return {name: write_copy(root / name, name) for name in DATASETS}


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_gives_the_pairs_of_its_copy(copies, tokenizer, name):
    short = name.split(":")[0]
    dataset = DATASETS[short]
    for split in dataset.splits:
        loaded = load_preferences(name, split, folder=copies[short], bad="error")
        assert (
            len(loaded) == loaded.report.pairs == PAIRS.get(short, {}).get(split, len(loaded)) > 0
        )
        assert loaded.dataset is dataset and list(loaded) == loaded.rows

        # the better answer is the one that the copy made better
        better, worse = {"hc3": ("human", "generated")}.get(short, ("joy", "bore"))
        for row in loaded:
            assert re.search(rf"\b{better}\b(?! .*-)", row["chosen"].rsplit("-", 1)[1])
            assert re.search(rf"\b{worse}\b(?! .*-)", row["rejected"].rsplit("-", 1)[1])
            assert row["chosen"][0] == row["rejected"][0] == " " != row["chosen"][1]
            assert row["prompt"].endswith("\n\nAssistant:" if dataset.dialogue else "\n\nTL;DR:")
            assert row.get("score_chosen", 1) - row.get("score_rejected", 0) == row.get("margin", 1)
        assert from_rows(loaded, tokenizer, context=512).report.pairs == len(loaded)


def asked(text):
    return f"\n\nHuman: {text}\n\nAssistant:"


def parted(row):
    """Prompt and answers of two transcripts, at the last "Assistant:"."""
    (prompt, chosen), (_, rejected) = (
        row[side].rsplit("Assistant:", 1) for side in ("chosen", "rejected")
    )
    return [(f"{prompt}Assistant:", chosen, rejected)]


# prompt, chosen and rejected of a row of each copy, by hand
BY_HAND = {
    "tldr-trl": lambda row: [(row["prompt"], row["chosen"], row["rejected"])],
    "hh": parted,
    "webgpt": lambda row: [(
        asked(row["question"]["full_text"]),
        *(f" {row[f'answer_{k}']}" for k in ((0, 1) if row["score_0"] > 0 else (1, 0))),
    )],
    "shp": lambda row: [(
        asked(row["history"]),
        *(f" {row[f'human_ref_{side}']}" for side in ("BA", "AB")[row["labels"]]),
    )],
    "hc3": lambda row: [
        (asked(row["question"]), f" {human}", f" {row['chatgpt_answers'][0]}")
        for human in row["human_answers"]
    ],
    "ultrafeedback": lambda row: [(
        asked(row["prompt"]),
        *(f" {row[side][1]['content']}" for side in ("chosen", "rejected")),
    )],
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_a_row_comes_back_to_the_letter(copies, name):
    part = {"hc3": "hc3:prefer-human", "hh": "hh:helpful-base", "shp": "shp:explainlikeimfive"}
    train, test = (
        load_preferences(part.get(name, name), split, folder=copies[name])
        for split in ("train", "test")
    )
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in train]
    n = 240 if name in ("webgpt", "hc3") else 24
    expected = [pair for i in range(n) for pair in BY_HAND[name](GOOD[name](i))]
    held_out = {row["prompt"] for row in test} if n == 240 else set()
    assert found == [pair for pair in expected if pair[0] not in held_out] and found


@pytest.mark.parametrize("name", NAMES)
def test_messages_say_the_same_as_text(copies, tokenizer, name):
    folder = copies[name.split(":")[0]]
    text, messages = (
        load_preferences(name, "test", folder=folder, style=style) for style in ("text", "messages")
    )
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    dialogue = text.dataset.dialogue
    for plain, chat in zip(text, messages, strict=True):
        joined = "".join(names[m["role"]] + m["content"] for m in chat["prompt"])
        post = joined.removeprefix(names["user"])
        assert plain["prompt"] == (f"{joined}\n\nAssistant:" if dialogue else post)
        for side in ("chosen", "rejected"):
            ((role, said),) = (tuple(message.values()) for message in chat[side])
            assert (role, f" {said}") == ("assistant", plain[side])
        assert {**plain, **chat} == chat | {k: plain[k] for k in plain if k not in chat}

    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert from_rows(messages, tokenizer, context=512).report.pairs == len(messages)


def test_both_forms_of_the_summaries_are_the_same_pairs(tmp_path):
    made = [tldr_row(i) for i in range(9)]
    write(tmp_path, "comparisons/train/0000.parquet", made)
    write(tmp_path, "data/train-00000-of-00001.parquet", [tldr_trl_row(i) for i in range(9)])
    ours, theirs = (
        load_preferences(name, folder=tmp_path, hygiene=False) for name in ("tldr", "tldr-trl")
    )
    for row, other in zip(ours, theirs, strict=True):
        assert {name: row[name] for name in other} == other
    assert [row["rater"] for row in ours] == [row["worker"] for row in made]
    assert [row["confidence"] for row in ours] == [row["extra"]["confidence"] for row in made]


def test_a_pair_of_which_nothing_more_is_known_is_a_pair(tmp_path):
    rows = [tldr_row(i) | ({"worker": None, "extra": None} if i else {}) for i in range(2)]
    write(tmp_path, "comparisons/train/0000.parquet", rows)
    known, unknown = load_preferences("tldr", folder=tmp_path, hygiene=False, bad="error")
    assert (known["rater"], known["confidence"]) == ("w0", 1)
    assert (unknown["rater"], unknown["confidence"]) == (None, None)


def test_parts_are_read_alone_and_a_part_must_be_named_where_nobody_judged(copies):
    assert len(load_preferences("hh:helpful-base", folder=copies["hh"])) == 24
    assert len(load_preferences("hh:helpful", folder=copies["hh"])) == 72
    eli5 = load_preferences("stanfordnlp/SHP:explainlikeimfive", folder=copies["shp"])
    assert {row["source"] for row in eli5} == {"explainlikeimfive"} and len(eli5) == 24
    both = [
        load_preferences(f"hc3:prefer-{who}", folder=copies["hc3"]) for who in ("human", "chatgpt")
    ]
    for row, other in zip(*both, strict=True):
        assert (row["chosen"], row["rejected"]) == (other["rejected"], other["chosen"])

    for name, found in (
        ("hc3", "nobody compared its answers, so say which side is chosen: hc3:prefer-human"),
        ("hc3:human", "it must be hc3:prefer-human, hc3:prefer-chatgpt"),
        ("hh:red-team-attempts", "it must be hh:all, hh:helpful, hh:helpful-base"),
        ("webgpt:all", "this one has no parts"),
        ("imdb", "no data set of this name, only tldr, tldr-trl, hh, webgpt"),
    ):
        with pytest.raises(ValueError, match=re.escape(found)):
            load_preferences(name)
    with pytest.raises(TypeError, match="name is 3 .int.; it must be a string"):
        find_dataset(3)
    with pytest.raises(ValueError, match="split is 'validation'; hh has 'train', 'test'"):
        load_preferences("hh", "validation")


# schemas


WORD = st.text("abc :\n.", max_size=8).filter(lambda text: "\n\n" not in text)
SAID = WORD.map(lambda text: f"{text.strip() or 'x'}")


@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), SAID, st.booleans())
def test_a_transcript_comes_back_as_its_turns(exchanges, other, space):
    gap = " " if space else ""
    turns = [(role, said) for pair in exchanges for role, said in zip(("user", "assistant"), pair)]
    names = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
    text = "".join(f"{names[role]}{gap}{said}" for role, said in turns)
    assert [(role, said.strip()) for role, said in transcript(text)] == turns

    rejected = text[: text.rindex("\n\nAssistant:")] + f"\n\nAssistant:{gap}{other}"
    (pair,) = read_hh({"chosen": text, "rejected": rejected}, "", "")
    assert list(pair.prompt) == turns[:-1] and pair.more == {"turns": len(exchanges)}
    assert (pair.chosen.strip(), pair.rejected.strip()) == (turns[-1][1], other)


@given(st.integers(-4, 4), st.integers(0, 3))
def test_the_higher_score_of_webgpt_is_chosen_and_zero_is_a_tie(quarter, i):
    row = webgpt_row(i) | {"score_0": quarter / 4, "score_1": -quarter / 4}
    if not quarter:
        with pytest.raises(Unusable) as error:
            list(read_webgpt(row, "", ""))
        assert error.value.kind == "ties"
        return
    (pair,) = read_webgpt(row, "", "")
    assert pair.chosen == row["answer_0" if quarter > 0 else "answer_1"]
    assert pair.rejected == row["answer_1" if quarter > 0 else "answer_0"]
    assert pair.more["margin"] == abs(quarter) / 2


@given(st.integers(2, 99), st.integers(2, 99), st.integers(-1, 2))
def test_label_1_of_shp_is_comment_a(a, b, label):
    row = shp_row(1) | {"score_A": a, "score_B": b, "labels": label}
    if label in (0, 1) and a != b and (a > b) == (label == 1):
        (pair,) = read_shp(row, "", "")
        assert pair.chosen == row["human_ref_A" if label else "human_ref_B"]
        return
    with pytest.raises(Unusable) as error:
        list(read_shp(row, "", ""))
    assert error.value.kind == ("ties" if a == b and label in (0, 1) else "odd")


# bad rows


H, A = "\n\nHuman: ", "\n\nAssistant: "


def spoken(*turns, k=0):
    """A row of HH of two such transcripts, that differ in their answers."""
    text = "".join(turns)
    return hh_row(0) | {"chosen": text, "rejected": f"{text} no"}


def uf(chosen=(), rejected=(), **more):
    """A row of UltraFeedback with other messages."""
    row = ultrafeedback_row(0)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages:
            row[name] = [{"role": role, "content": said} for role, said in messages]
    return row | more


ASK, SAY, NO = ("user", "Why?"), ("assistant", "Because."), ("assistant", "No.")
BAD = [
    ("hh", "unknown_role", spoken("\n\nSystem: Be good.", H, "hi", A, "ok"), "must begin with"),
    ("hh", "odd", spoken("Hello ", H, "hi", A, "ok"), "must begin with"),
    ("hh", "odd", spoken(H, "hi", A, "ok", H, "and?"), "the assistant last"),
    ("hh", "odd", spoken(H, "hi", H, "you", A, "ok"), "speak in turn"),
    ("hh", "odd", spoken(A, "ok"), "speak in turn"),
    ("hh", "odd", spoken(""), "must begin with"),
    ("hh", "odd", spoken(H, " ", A, "ok"), "a turn before the answer is empty"),
    ("hh", "no_common_prompt", {"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}a{A}e{H}c{A}f"},
     "differ before their last turn"),
    ("hh", "no_common_prompt", {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b{H}c{A}d"},
     "differ before their last turn"),
    ("hh", "empty", {"chosen": f"{H}a{A} ", "rejected": f"{H}a{A}b"}, "chosen answer is empty"),
    ("hh", "empty", {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}"}, "rejected answer is empty"),
    ("hh", "identical", {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b "}, "both answers are 'b'"),
    ("hh", "missing", {"chosen": f"{H}a{A}b", "rejected": None}, "nothing in 'rejected'"),
    ("ultrafeedback", "ties", uf(score_rejected=8.0), "the score 8.0"),
    ("ultrafeedback", "odd", uf(score_rejected=9.0), "the other 9.0"),
    ("ultrafeedback", "unknown_role", uf([ASK, ("tool", "2"), SAY], [ASK, NO]), "'tool'"),
    ("ultrafeedback", "no_common_prompt", uf([ASK, SAY], [("user", "Who?"), NO]), "other prompts"),
    ("ultrafeedback", "odd", uf([SAY], [NO]), "speak in turn"),
    ("ultrafeedback", "odd", uf([ASK, ASK], [ASK, ASK]), "speak in turn"),
    ("ultrafeedback", "empty", uf([ASK, ("assistant", None)], [ASK, NO]), "chosen answer is empty"),
    ("tldr", "odd", tldr_row(0) | {"choice": 2}, "choice is 2 of 2 summaries"),
    ("tldr", "odd", tldr_row(0) | {"choice": -1}, "choice is -1 of 2 summaries"),
    ("tldr", "odd", tldr_row(0) | {"summaries": tldr_row(0)["summaries"][:1]}, "of 1 summaries"),
    ("tldr", "filtered", tldr_row(0) | {"info": tldr_row(0)["info"] | {"post": None}}, ""),
    ("tldr-trl", "filtered", tldr_trl_row(0) | {"prompt": "TITLE: News\n\nTL;DR:"}, ""),
    ("webgpt", "ties", webgpt_row(0) | {"score_0": 0.0, "score_1": 0.0}, "the score 0"),
    ("webgpt", "odd", webgpt_row(0) | {"score_0": 0.5, "score_1": 0.5}, "do not sum to 0"),
    ("webgpt", "odd", webgpt_row(0) | {"score_0": float("nan")}, "do not sum to 0"),
    ("shp", "odd", shp_row(0) | {"labels": 2}, "labels is 2"),
    ("shp", "odd", shp_row(0) | {"labels": 1}, "against the scores"),
    ("shp", "ties", shp_row(0) | {"score_A": 20}, "the score 20"),
    ("hc3:prefer-human", "empty", hc3_row(0) | {"human_answers": []}, "no answer"),
    ("hc3:prefer-human", "empty", hc3_row(0) | {"chatgpt_answers": [" "]}, "answer is empty"),
    ("shp", "odd", shp_row(0) | {"history": " "}, "its prompt is empty"),
    ("webgpt", "odd", webgpt_row(0) | {"question": {"dataset": "eli5", "id": "0"}}, "other shape"),
    ("tldr", "odd", tldr_row(0) | {"summaries": 2 * [{"text": None, "policy": ""}]}, "other shape"),
    ("ultrafeedback", "odd", uf([("user", None), SAY], [("user", None), NO]), "before the answer"),
]  # fmt: skip

GOOD = {
    "hh": hh_row, "ultrafeedback": ultrafeedback_row, "tldr": tldr_row, "tldr-trl": tldr_trl_row,
    "webgpt": webgpt_row, "shp": shp_row, "hc3": hc3_row,
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "row", "why"), BAD)
def test_a_bad_row_is_counted_or_an_error(tmp_path, name, kind, row, why):
    short, part = name.split(":")[0], find_dataset(name)[1]
    file = DATASETS[short].parts[part]["train"][0].replace("*/", "askvet/").replace("*", "0")
    kept = next(row for row in map(GOOD[short], range(1, 99)) if not _held_out(short, row))
    write(tmp_path, file, [kept, row, kept])
    if short == "hh":
        name = "hh:helpful-base"

    options = {"folder": tmp_path, "hygiene": False}
    loaded = load_preferences(name, **options)
    counts = {key: n for key, n in vars(loaded.report).items() if n}
    pairs = 2 * len(kept.get("human_answers", [0]))
    assert counts == {"rows": 3, "pairs": pairs, kind: counts[kind], "duplicated": pairs // 2}
    if kind in ("ties", "filtered"):
        assert load_preferences(name, bad="error", **options).report == loaded.report
        return
    with pytest.raises(
        ValueError, match=rf"row 1 of \S+ \(train\) is no pair: .*{why}.*bad='drop'"
    ):
        load_preferences(name, bad="error", **options)


def _held_out(short, row):
    question = row["question"] if short in ("webgpt", "hc3") else ""
    text = question["full_text"] if isinstance(question, dict) else question
    return is_test((("user", text),))


def test_files_of_something_else_are_refused(tmp_path, copies):
    write(tmp_path, "all.jsonl", [{"question": "Why?", "answer": "So."}])
    with pytest.raises(ValueError, match="no column 'human_answers', 'chatgpt_answers', 'source'"):
        load_preferences("hc3:prefer-human", folder=tmp_path)
    (tmp_path / "all.jsonl").write_text('{"question": "Why?"\n{')
    with pytest.raises(ValueError, match=r"all.jsonl cannot be read as rows \(.*get it again"):
        load_preferences("hc3:prefer-human", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no helpful-base/train.jsonl.gz; it must be"):
        load_preferences("hh:helpful-base", folder=tmp_path)


def test_a_cache_of_the_hub_is_read_offline_and_what_is_not_there_is_named(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, command in (
        ("hh", "hf download --repo-type dataset Anthropic/hh-rlhf`"),
        ("tldr", "summarize_from_feedback --revision refs/convert/parquet`"),
    ):
        with pytest.raises(FileNotFoundError, match=f"HF_HUB_OFFLINE is set.*{command}"):
            load_preferences(name)
        dataset, n = DATASETS[name], PAIRS[name]["train"]
        into_cache(cache, dataset.hub, write_copy(tmp_path / name, name), dataset.revision)
        assert load_preferences(name).report.pairs == n

    # a copy of which a file is missing
    for file in cache.glob("datasets--Anthropic--hh-rlhf/snapshots/*/harmless-base/test.jsonl.gz"):
        file.unlink()
    assert len(load_preferences("hh:helpful-base")) == 24
    with pytest.raises(FileNotFoundError, match="neither in the Hugging Face cache"):
        load_preferences("hh")


def test_without_a_copy_the_hub_is_asked_for_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = []

    class NoNetwork(Exception):
        """An error of no kind that Python has."""

    def refuse(kind, *, data_files, split):
        asked.extend([kind, *data_files])
        raise NoNetwork("no name server")

    monkeypatch.setattr(hub, "load_dataset", refuse)
    for name in ("tldr", "hc3:prefer-human"):
        with pytest.raises(FileNotFoundError, match="neither in .* the hub .no name server."):
            load_preferences(name)
    assert asked == [
        "parquet",
        "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet"
        "/comparisons/train/*.parquet",
        "json",
        "hf://datasets/Hello-SimpleAI/HC3@main/all.jsonl",
    ]


# splits


def test_a_prompt_that_is_held_out_is_dropped_from_train(tmp_path):
    def row(prompt, answer="yes", other="no"):
        return {"chosen": f"{prompt}{A}{answer}", "rejected": f"{prompt}{A}{other}"}

    test = [row(f"{H}Who are you?"), row(f"{H}Hi.{A}Hello.{H}Why?")]
    train = [
        row(f"{H}Who are you?", "I?"),  # the same prompt
        row(f"{H}who are YOU"),  # the same words
        row(f"{H}Hi!{A}hello{H}Why?"),  # the same words of a conversation
        row(f"{H}Hi.{A}Hello.{H}How?"),  # the same opening alone
        row(f"{H}Who?"),
        row(f"{H}Who?", " yes "),  # the same pair, with space around it
        row(f"{H}Who?", "no", "yes"),  # its reverse
    ]
    write(tmp_path, "helpful-base/train.jsonl.gz", train)
    write(tmp_path, "helpful-base/test.jsonl.gz", test)
    report = load_preferences("hh:helpful-base", folder=tmp_path).report
    counts = {name: n for name, n in vars(report).items() if n}
    assert counts == dict(
        rows=7,
        pairs=4,
        leaked=3,
        near_leaked=2,
        same_opening=1,
        trimmed=1,
        duplicated=1,
        reversed=3,
    )
    assert "leaked 3, near leaked 2, same opening 1" in str(report) and "ties" not in str(report)
    assert load_preferences("hh:helpful-base", folder=tmp_path, hygiene=False).report.pairs == 7
    assert len(load_preferences("hh:helpful-base", "test", folder=tmp_path)) == 2


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99))
def test_no_prompt_is_in_two_splits(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("shp")
    for m, split in enumerate(("train", "validation", "test")):
        rows = [shp_row((seed * 7 + i * (m + 1)) % 9, 0, f"askvet_{split}") for i in range(5)]
        write(folder, f"askvet/{split}.json", rows)
    prompts = []
    for split in ("train", "validation", "test"):
        try:
            loaded = load_preferences("shp:askvet", split, folder=folder)
        except ValueError as error:
            assert re.search(
                "no pair is left of shp:askvet .*: rows 5, pairs 0, leaked 5", str(error)
            )
            loaded = []
        prompts.append({row["prompt"] for row in loaded})
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(prompts[2]) == len({(seed * 7 + i * 3) % 9 for i in range(5)})


@pytest.mark.parametrize("name", ["webgpt", "hc3:prefer-chatgpt"])
def test_a_data_set_without_a_split_is_split_by_prompt(copies, name):
    short = name.split(":")[0]
    train, test = (
        load_preferences(name, split, folder=copies[short]) for split in ("train", "test")
    )
    here, there = ({row["prompt"] for row in rows} for rows in (train, test))
    assert not here & there and len(here | there) == 240 and 3 <= len(there) <= 25
    assert (train.report.filtered, test.report.filtered) == (len(test), len(train))


@settings(max_examples=60)
@given(st.text("aB ., éß_?", max_size=6), st.text("aB ., éß_?", max_size=6))
def test_prompts_have_one_name_where_their_words_are_the_same(one, other):
    def words(text):
        spaced = "".join(c if c.isalnum() else " " for c in text.casefold())
        return spaced.split() or text

    same = words(one) == words(other)
    assert (name_of((("user", one),)) == name_of((("user", other),))) == same


def test_about_one_prompt_in_twenty_is_held_out():
    found = Counter(is_test((("user", f"question {i}"),)) for i in range(4_000))
    assert abs(found[True] - 200) < 5 * (4_000 * 0.05 * 0.95) ** 0.5


# the page


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))
def test_the_page_says_what_the_catalog_does(dataset):
    cells = [dataset.prompts, dataset.answers, dataset.judges]
    assert f"| `{dataset.name}` | {' | '.join(cells)} |\n" in PAGE
    link = f"[{dataset.hub}](https://huggingface.co/datasets/{dataset.hub})"
    assert f"| {link} (`{dataset.name}`) | {dataset.size} | {dataset.license} |\n" in PAGE
