"""Rows, rankings and scores become token ids and pairs.

What is lost on the way is counted; files are whole or absent.
"""

import copy
import errno
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from dpo_lab import preferences
from dpo_lab.batching import completion_batch
from dpo_lab.engine.rows import EXAMPLE
from dpo_lab.logprobs import completion_logps
from dpo_lab.losses import dpo_loss
from dpo_lab.preferences import Preferences, Report, from_rankings, from_rows, from_scores

EOS = 0
ROW = {"prompt": "This film", "chosen": " was a joy", "rejected": " was a bore"}
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def row(**changes):
    return ROW | changes


def said(role, content):
    return [{"role": role, "content": content}]


def chat_row(**changes):
    return {
        "prompt": said("user", "Hi"),
        "chosen": said("assistant", "Joy"),
        "rejected": said("assistant", "Bore"),
    } | changes


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def some(tokenizer):
    """Preferences among twelve completions of three prompts."""
    rankings = [
        [f" was {word} {k}" for word in ("a joy", "good", "fine", "a bore")] for k in range(3)
    ]
    return from_rankings(["This film", "The plot", ""], rankings, tokenizer, context=64)


def small(**changes):
    """Preferences of two prompts with two completions each, as constructor arguments."""
    parts = {
        "prompts": [[0], [0, 1]],
        "completions": [[2, 0], [3, 0], [2, 0], [3, 0]],
        "prompt_of": np.array([0, 0, 1, 1]),
        "chosen": np.array([0, 3]),
        "rejected": np.array([1, 2]),
    }
    return Preferences(**parts | changes)


def many(n_prompts, n_pairs, seed):
    """Random preferences among three or four completions of each prompt, with made-up log-probs."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(n_prompts), rng.integers(3, 5, n_prompts))
    members = [np.flatnonzero(owners == p) for p in range(n_prompts)]
    pairs = [rng.permutation(members[rng.integers(n_prompts)])[:2] for _ in range(n_pairs)]
    chosen, rejected = np.array(pairs).T
    return Preferences(
        prompts=[list(range(2 + p)) for p in range(n_prompts)],
        completions=[[int(i) + 1] * int(rng.integers(1, 6)) for i in range(len(owners))],
        prompt_of=owners,
        chosen=chosen,
        rejected=rejected,
        reference_logps=-rng.random(len(owners)),
    )


def plain(found):
    """Every field with its arrays as lists, to compare."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(found).items()
    }


# Rows


def test_a_row_is_bos_with_the_prompt_and_two_completions_that_end_with_eos(tokenizer):
    found = from_rows([ROW], tokenizer, context=64)
    assert found.prompts == [[tokenizer.bos_token_id, *ids(tokenizer, "This film")]]
    assert found.completions == [
        [*ids(tokenizer, text), EOS] for text in (" was a joy", " was a bore")
    ]
    assert [found.prompt_of.tolist(), found.chosen.tolist(), found.rejected.tolist()] == [
        [0, 0],
        [0],
        [1],
    ]
    assert found.report == Report(pairs=1)


def test_no_token_straddles_the_boundary_of_prompt_and_completion(tokenizer):
    found = from_rows([row(prompt="This fi", chosen="lm", rejected="sh")], tokenizer, context=64)
    joined = [*found.prompts[0], *found.completions[0]]
    assert joined == [0, *ids(tokenizer, "This fi"), *ids(tokenizer, "lm"), EOS]
    assert joined != [*tokenizer("This film")["input_ids"], EOS]  # " film" is one token there
    assert tokenizer.decode(joined, skip_special_tokens=True) == "This film"


def test_an_empty_prompt_is_bos(tokenizer):
    assert from_rows([row(prompt="")], tokenizer, context=64).prompts == [[tokenizer.bos_token_id]]


def test_a_tokenizer_that_adds_no_bos_gets_none_save_for_an_empty_prompt(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer("")["input_ids"] == []
    found = from_rows([ROW, row(prompt="")], tokenizer, context=64)
    assert found.prompts == [ids(tokenizer, "This film"), [tokenizer.bos_token_id]]


def test_a_prompt_and_a_completion_that_come_again_are_stored_once(tokenizer):
    found = from_rows([ROW, row(rejected=" was dull"), row(prompt="A film")], tokenizer, context=64)
    assert (len(found.prompts), len(found.completions)) == (2, 5)
    assert [found.chosen.tolist(), found.rejected.tolist()] == [[0, 0, 3], [1, 2, 4]]
    assert found.pairs_by_prompt() == found.linked_pairs() == [[0, 1], [2]]


def test_a_prompt_that_is_sampled_twice_keeps_its_pairs_apart(tokenizer):
    """They would make one step of all the pairs of a short prompt, however many."""
    prompts = [ids(tokenizer, "I"), ids(tokenizer, "A film"), ids(tokenizer, "I")]
    completions = [[[p, k, 0] for k in (1, 2, 3)] for p in (5, 6, 7)]
    found = from_scores(prompts, completions, [[0.1, 0.2, 0.3]] * 3, tokenizer, context=64)
    assert len(found.prompts) == 2 and len(found.pairs_by_prompt()) == 2
    assert found.linked_pairs() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_messages_are_rendered_by_the_chat_template(chat_tokenizer):
    found = from_rows([chat_row()], chat_tokenizer, context=64)
    assert found.prompts == [ids(chat_tokenizer, "<user>Hi<|endoftext|>\n<assistant>")]
    assert found.completions == [
        ids(chat_tokenizer, f"{text}<|endoftext|>\n") for text in ("Joy", "Bore")
    ]
    assert found.report == Report(pairs=1)


def test_messages_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(
        ValueError, match="row 0 is conversational .* no chat template; set tokenizer.chat_template"
    ):
        from_rows([chat_row()], tokenizer, context=64)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"chosen": said("assistant", " ")}, ["row 0", "empty chosen completion"]),
        ({"rejected": said("assistant", "Joy")}, ["row 0", "same text"]),
        ({"chosen": " Joy"}, ["row 0", "three strings or three lists of messages", "chosen: str"]),
        ({"prompt": []}, ["row 0", "prompt"]),
        ({"chosen": [{"role": "assistant", "text": "Joy"}]}, ["row 0", "content"]),
        ({"chosen": said("assistant", None)}, ["row 0", "content"]),
    ],
)
def test_wrong_messages_are_named_by_their_row(chat_tokenizer, changes, words):
    with pytest.raises(ValueError) as caught:
        from_rows([chat_row(**changes)], chat_tokenizer, context=64)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_a_template_that_rewrites_the_prompt_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="row 0: the chat template renders the prompt differently"):
        from_rows([chat_row()], chat_tokenizer, context=64)


def test_a_misspelt_column_is_shown_with_the_right_name_and_an_example(tokenizer):
    wrong = {"prompt": "This film", "chosen": " was a joy", "rejeted": " was a bore"}
    with pytest.raises(ValueError) as caught:
        from_rows([ROW, wrong], tokenizer, context=64)
    for words in (
        "row 1 has no column 'rejected'",
        "'rejeted' looks like 'rejected'",
        str(wrong),
        str(EXAMPLE),
    ):
        assert words in str(caught.value)


def test_columns_of_another_kind_are_shown_too(tokenizer):
    with pytest.raises(
        ValueError,
        match="row 0 has no column 'prompt', 'chosen', 'rejected': {'text': 'This film'}",
    ):
        from_rows([{"text": "This film"}], tokenizer, context=64)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"chosen": ""},
            "row 1 has an empty chosen completion: .*Correct the row, or pass bad='drop'",
        ),
        ({"rejected": " \n"}, "row 1 has an empty rejected completion"),
        (
            {"chosen": " was a bore"},
            "row 1 has the same text as chosen and as rejected: ' was a bore'",
        ),
    ],
)
def test_an_empty_or_identical_completion_is_an_error_or_is_dropped_and_counted(
    tokenizer, changes, message
):
    rows = [ROW, row(**changes)]
    with pytest.raises(ValueError, match=message):
        from_rows(rows, tokenizer, context=64)
    kept = from_rows(rows, tokenizer, context=64, bad="drop")
    assert kept.report == Report(pairs=1, dropped=1)
    assert plain(replace(kept, report=Report(pairs=1))) == plain(
        from_rows([ROW], tokenizer, context=64)
    )


def test_when_every_row_is_dropped_the_error_says_why(tokenizer):
    with pytest.raises(ValueError, match="no pair left .*dropped 2"):
        from_rows([row(chosen="")] * 2, tokenizer, context=64, bad="drop")


def test_what_to_do_with_bad_rows_must_be_known(tokenizer):
    with pytest.raises(ValueError, match="bad is 'skip'.*'error'.*'drop'"):
        from_rows([ROW], tokenizer, context=64, bad="skip")


@pytest.mark.parametrize("limit", [0, -1])
def test_completions_must_be_allowed_a_token(tokenizer, limit):
    with pytest.raises(ValueError, match=f"max_completion_tokens is {limit}"):
        from_rows([ROW], tokenizer, context=64, max_completion_tokens=limit)


def test_a_value_that_is_no_text_is_named(tokenizer):
    with pytest.raises(ValueError, match="row 0 must hold three strings .*rejected: NoneType"):
        from_rows([row(rejected=None)], tokenizer, context=64)


def test_a_prompt_that_leaves_no_room_is_an_error_and_one_that_leaves_a_token_is_not(tokenizer):
    length = len(tokenizer("This film")["input_ids"])
    with pytest.raises(
        ValueError,
        match=f"row 1: the prompt has {length} tokens .*context is {length}, .*shorten the prompt",
    ):
        from_rows([row(prompt=""), ROW], tokenizer, context=length)
    kept = from_rows([row(chosen="J", rejected="B")], tokenizer, context=length + 1)
    assert kept.completions == [ids(tokenizer, "J"), ids(tokenizer, "B")]
    assert (kept.report.cut, kept.report.without_eos) == (2, 2)


def test_a_cut_completion_is_counted_and_loses_its_eos(tokenizer):
    joy, bore = ids(tokenizer, " joy and a great story"), ids(tokenizer, " bore")
    assert len(bore) < 4 < len(joy)
    found = from_rows(
        [row(chosen=" joy and a great story", rejected=" bore")],
        tokenizer,
        context=64,
        max_completion_tokens=4,
    )
    assert found.completions == [joy[:4], [*bore, EOS]]
    assert found.report == Report(pairs=1, cut=1, without_eos=1)


def test_prompt_and_completion_together_fit_the_context(tokenizer):
    found = from_rows([row(chosen=" joy" * 50, rejected=" bore" * 50)], tokenizer, context=20)
    assert [len(found.prompts[0]) + len(completion) for completion in found.completions] == [20, 20]


def test_completions_that_are_alike_once_cut_are_dropped_and_counted(tokenizer):
    alike = row(chosen=" was a great joy", rejected=" was a great bore")
    found = from_rows(
        [row(chosen=" joy", rejected=" bore"), alike],
        tokenizer,
        context=64,
        max_completion_tokens=3,
    )
    assert (
        len(ids(tokenizer, " was a great"))
        >= 3
        > max(len(ids(tokenizer, text)) for text in (" joy", " bore"))
    )
    assert (found.report.pairs, found.report.identical, found.report.cut) == (1, 1, 2)
    assert found.chosen.tolist() == [0] and found.rejected.tolist() == [1]


def test_a_pair_that_comes_twice_is_kept_and_counted(tokenizer):
    found = from_rows(
        [ROW, ROW, row(chosen=ROW["rejected"], rejected=ROW["chosen"])], tokenizer, context=64
    )
    assert found.report == Report(pairs=3, duplicated=1)
    assert [found.chosen.tolist(), found.rejected.tolist()] == [[0, 0, 1], [1, 1, 0]]


def test_the_report_reads_as_a_sentence():
    expected = (
        "pairs 1,200, cut 0, without eos 3, dropped 0, identical 0, duplicated 0, ties 0, "
        "retokenized 0, inner eos 2, prompt repeated 0"
    )
    assert str(Report(pairs=1200, without_eos=3, inner_eos=2)) == expected
    assert str(Report(unread=("score", "source"))).endswith(
        ", prompt repeated 0, columns not read: score, source"
    )


# Rankings and scores


def test_a_ranking_of_k_gives_every_pair_better_first(tokenizer):
    texts = [" great", " good", " fine", " awful"]
    found = from_rankings(["This film", "The plot"], [texts, texts[:2]], tokenizer, context=64)
    pairs = [*combinations(range(4), 2), (4, 5)]
    assert list(zip(found.chosen.tolist(), found.rejected.tolist())) == pairs
    assert found.completions == [[*ids(tokenizer, text), EOS] for text in texts + texts[:2]]
    assert found.prompt_of.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.report == Report(pairs=7)
    assert found.scores is None


@pytest.mark.parametrize("ranking", [[" joy"], [" joy", " "], [" joy", " bore", " joy"], []])
def test_a_ranking_without_two_different_texts_is_refused(tokenizer, ranking):
    with pytest.raises(
        ValueError, match="ranking 1 must hold at least two different, non-empty completions"
    ):
        from_rankings(["a", "b"], [[" joy", " bore"], ranking], tokenizer, context=64)


def test_a_text_in_place_of_a_ranking_is_refused(tokenizer):
    with pytest.raises(ValueError, match="ranking 0 must"):
        from_rankings(["a"], [" joy"], tokenizer, context=64)


def test_each_prompt_needs_a_ranking(tokenizer):
    with pytest.raises(ValueError, match="2 prompts and 1 rankings"):
        from_rankings(["a", "b"], [[" joy", " bore"]], tokenizer, context=64)


def test_the_higher_score_is_chosen_and_ties_are_dropped_and_counted(tokenizer):
    texts = [" joy", " bore", " plot", " film"]
    found = from_scores(["This"], [texts], [[0.5, -1.0, 0.5, 2.0]], tokenizer, context=64)
    pairs = set(zip(found.chosen.tolist(), found.rejected.tolist()))
    assert pairs == {(0, 1), (3, 0), (2, 1), (3, 1), (3, 2)}
    assert found.report == Report(pairs=5, ties=1)
    assert found.scores.tolist() == [0.5, -1.0, 0.5, 2.0]


def test_scored_token_ids_are_taken_as_they_are(tokenizer):
    found = from_scores(
        [[0, 7], [9]], [[[5, 0], [6, 6]], [[5, 0], [8]]], [[1, 2], [2, 1]], tokenizer, context=64
    )
    assert found.prompts == [[0, 7], [9]]
    assert found.completions == [[5, 0], [6, 6], [5, 0], [8]]
    assert [found.chosen.tolist(), found.rejected.tolist()] == [[1, 2], [0, 3]]
    assert found.report == Report(pairs=2, without_eos=2)


def test_scored_completions_that_are_the_same_tokens_are_identical_and_no_tie(tokenizer):
    found = from_scores([[0]], [[[5, 0], [5, 0], [6, 0]]], [[1, 1, 2]], tokenizer, context=64)
    assert found.completions == [[5, 0], [6, 0]]
    assert found.report == Report(pairs=2, identical=1, duplicated=1)


@pytest.mark.parametrize("completions", [[[5, 6], [5, 6, 7], [8]], [[5, 6, 7], [5, 6], [8]]])
def test_a_cut_is_counted_whichever_completion_comes_first(tokenizer, completions):
    assert (
        from_scores(
            [[0]], [completions], [[1, 2, 3]], tokenizer, context=64, max_completion_tokens=2
        ).report.cut
        == 1
    )


@pytest.mark.parametrize("scores", [[1.0, np.nan], [np.inf, 0.0], [1.0]])
def test_every_completion_needs_a_finite_score(tokenizer, scores):
    with pytest.raises(
        ValueError, match="prompt 1 has 2 completions and scores .*; one finite score each"
    ):
        from_scores(
            ["a", "b"], [[" joy", " bore"]] * 2, [[1.0, 0.0], scores], tokenizer, context=64
        )


def test_prompts_completions_and_scores_must_be_as_many(tokenizer):
    with pytest.raises(ValueError, match="2 prompts, 1 lists of completions, 1 of scores"):
        from_scores(["a", "b"], [[" joy", " bore"]], [[1, 0]], tokenizer, context=64)


def test_when_all_scores_tie_the_error_says_so(tokenizer):
    with pytest.raises(ValueError, match="no pair left .*ties 1"):
        from_scores(["a"], [[" joy", " bore"]], [[1, 1]], tokenizer, context=64)


def test_sampled_ids_must_hold_a_token(tokenizer):
    with pytest.raises(ValueError, match="prompt 0.*(empty|no tokens)"):
        from_scores([[0]], [[[], [3, 0]]], [[1, 2]], tokenizer, context=64)


# The dataclass


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"chosen": np.array([0, 4])}, ["chosen[1] is 4", "0..3"]),
        ({"rejected": np.array([-1, 2])}, ["rejected[0] is -1", "0..3"]),
        ({"prompt_of": np.array([0, 0, 1, 2])}, ["prompt_of[3] is 2", "0..1"]),
        ({"rejected": np.array([1, 1])}, ["pair 1", "two different prompts"]),
        ({"chosen": np.array([1, 3])}, ["pair 0", "completion 1", "chosen and as rejected"]),
        ({"chosen": np.array([], int), "rejected": np.array([], int)}, ["no pair left", "pairs 0"]),
        ({"chosen": np.array([0])}, ["chosen has 1", "rejected 2"]),
        ({"prompt_of": np.array([0, 0, 1])}, ["prompt_of has 3", "4 completions"]),
        ({"scores": np.zeros(3)}, ["scores has 3", "4 completions"]),
        ({"reference_logps": np.zeros(5)}, ["reference_logps has 5", "4 completions"]),
    ],
)
def test_parts_that_disagree_are_named(changes, words):
    with pytest.raises(ValueError) as caught:
        small(**changes)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_the_hash_of_the_tokens_follows_prompts_completions_and_what_belongs_to_what():
    others = [
        small(prompts=[[0], [0, 2]]),
        small(completions=[[2, 0], [3, 0], [2, 0], [4, 0]]),
        small(prompt_of=np.array([1, 1, 0, 0])),
    ]
    assert len({preferences.tokens_hash() for preferences in (small(), *others)}) == 4
    assert (
        small().tokens_hash()
        == small(
            scores=np.ones(4), chosen=np.array([1, 2]), rejected=np.array([0, 3])
        ).tokens_hash()
    )


# Files


def test_what_is_saved_is_loaded(tmp_path, some, model):
    whole = replace(
        some.with_reference(model), scores=np.linspace(-1, 1, 12), report=Report(pairs=18, cut=2)
    )
    whole.save(tmp_path / "made" / "here")
    assert plain(Preferences.load(tmp_path / "made" / "here")) == plain(whole)


def test_what_is_not_there_is_not_made_up_by_saving(tmp_path, some):
    some.save(tmp_path / "p")
    loaded = Preferences.load(str(tmp_path / "p"))
    assert loaded.scores is None and loaded.reference_logps is None and loaded.reference_key == ""
    assert plain(loaded) == plain(some)


def test_saving_again_replaces_the_directory(tmp_path, some):
    some.save(tmp_path / "p")
    small().save(tmp_path / "p")
    assert plain(Preferences.load(tmp_path / "p")) == plain(small())
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    "damage",
    [
        "nothing there",
        "no json",
        "json of another kind",
        "bytes",
        "a column missing",
        "half a file",
    ],
)
def test_a_directory_that_holds_no_preferences_is_named(tmp_path, damage):
    if damage != "nothing there":
        small().save(tmp_path / "p")
    if damage == "no json":
        (tmp_path / "p" / "preferences.json").unlink()
    elif damage == "json of another kind":
        (tmp_path / "p" / "preferences.json").write_text("[]")
    elif damage == "bytes":
        (tmp_path / "p" / "preferences.json").write_bytes(b"\xff\xfe")
    elif damage == "a column missing":
        DatasetDict(
            {name: Dataset.from_dict({"x": [1]}) for name in ("prompts", "completions", "pairs")}
        ).save_to_disk(tmp_path / "p")
    elif damage == "half a file":
        (file,) = (tmp_path / "p" / "pairs").glob("*.arrow")
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'p'} does not hold preferences")):
        Preferences.load(tmp_path / "p")


def test_a_full_disk_leaves_the_old_directory_and_nothing_else(tmp_path, monkeypatch, some):
    some.save(tmp_path / "p")

    def full(parts, directory):
        (directory / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DatasetDict, "save_to_disk", full)
    with pytest.raises(
        OSError, match=re.escape(f"no space left to write {tmp_path / 'p'}")
    ) as caught:
        small().save(tmp_path / "p")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert plain(Preferences.load(tmp_path / "p")) == plain(some)


# The reference


@pytest.fixture
def scored(monkeypatch):
    """How many completions each call of score_completions is given."""
    calls, original = [], preferences.score_completions

    def recorded(model, prompts, completions, *rest, **options):
        calls.append(len(completions))
        return original(model, prompts, completions, *rest, **options)

    monkeypatch.setattr(preferences, "score_completions", recorded)
    return calls


def test_the_reference_is_the_sum_of_completion_logps(some, model):
    found = some.with_reference(model).reference_logps
    for i, logp in enumerate(found):
        batch = completion_batch([some.prompts[some.prompt_of[i]]], [some.completions[i]], [0])
        assert logp == pytest.approx(completion_logps(model, batch).item(), abs=1e-4)


def test_the_reference_is_computed_once_for_the_same_weights(some, model, scored, tmp_path):
    once = some.with_reference(model)
    once.save(tmp_path / "p")
    assert scored == [12]
    again = Preferences.load(tmp_path / "p").with_reference(model)
    assert np.array_equal(again.reference_logps, once.reference_logps)
    assert len(scored) == 2 and scored[1] <= 8


def test_another_precision_is_computed_anew_and_told(some, model, scored, tmp_path):
    once = some.with_reference(model)
    other = once.with_reference(model, precision="bfloat16")
    other.save(tmp_path / "p")
    assert (once.reference_precision, Preferences.load(tmp_path / "p").reference_precision) == (
        "float32",
        "bfloat16",
    )
    assert 0 < np.abs(other.reference_logps - once.reference_logps).max() < 1
    assert scored == [12, 12] and other.with_reference(model, precision="bfloat16") is other


def test_other_weights_or_tokens_are_computed_anew(some, model, scored):
    once = some.with_reference(model)
    completions = [[*completion[:-1], 5, EOS] for completion in some.completions]
    replace(once, completions=completions).with_reference(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    other = once.with_reference(model)
    assert scored == [12, 12, 12]
    assert other.reference_key != once.reference_key
    assert np.abs(other.reference_logps - once.reference_logps).min() > 0


@pytest.mark.parametrize(
    "precision, alteration", [("float32", 0.1), ("float32", np.nan), ("bfloat16", 1.0)]
)
def test_stored_values_that_were_altered_are_refused(some, model, precision, alteration):
    once = some.with_reference(model, precision=precision)
    altered = replace(once, reference_logps=once.reference_logps + alteration)
    with pytest.raises(
        ValueError, match="(?s)stored reference_logps .* not this model's .* altered. Delete it"
    ):
        altered.with_reference(model, precision=precision)


def test_log_probs_known_from_sampling_are_taken_and_checked(some, model, scored):
    computed = some.with_reference(model)
    known = computed.reference_logps + 1e-4
    taken = some.with_reference(model, known=known)
    assert (
        np.array_equal(taken.reference_logps, known)
        and taken.reference_key == computed.reference_key
    )
    assert scored == [12, 8]
    with pytest.raises(ValueError, match="not this model's"):
        some.with_reference(model, known=known[::-1].copy())


def test_a_batch_holds_each_completion_of_its_pairs_once_in_the_order_of_a_plain_loop():
    @given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99), st.data(), st.booleans())
    def holds(n_prompts, n_pairs, seed, data, compact):
        p = many(n_prompts, n_pairs, seed)
        pairs = data.draw(st.lists(st.integers(0, n_pairs - 1), min_size=1, max_size=15))
        used = []
        for i in sorted([*p.chosen[pairs], *p.rejected[pairs]]):
            if i not in used:
                used.append(i)
        expected = completion_batch(
            p.prompts,
            [p.completions[i] for i in used],
            [p.prompt_of[i] for i in used],
            compact=compact,
        )
        batch = p.batch(pairs, compact=compact)
        for name, value in vars(expected).items():
            found = getattr(batch.completions, name)
            same = torch.equal(found, value) if isinstance(value, torch.Tensor) else True
            assert same and type(found) is type(value), name
        assert batch.tokens == sum(len(p.completions[i]) for i in used)
        assert batch.reference_logps.tolist() == [p.reference_logps[i] for i in used]
        assert [used[i] for i in batch.chosen] == [p.chosen[k] for k in pairs]
        assert [used[i] for i in batch.rejected] == [p.rejected[k] for k in pairs]

    holds()


def test_steps_take_every_pair_once_an_epoch_in_the_order_of_a_plain_loop():
    @given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 99), st.integers(1, 9))
    def holds(n_prompts, n_pairs, seed, batch_pairs):
        p = many(n_prompts, n_pairs, seed)
        groups, expected = p.linked_pairs(), []
        for epoch in range(2):
            step = []
            for g in np.random.default_rng([seed, epoch]).permutation(len(groups)):
                if step and len(step) + len(groups[g]) > batch_pairs:
                    expected.append(step)
                    step = []
                step = step + groups[g]
            expected.append(step)
        steps = p.steps(batch_pairs, epochs=2, seed=seed)
        assert [step.tolist() for step in steps] == expected
        assert sorted(np.concatenate(steps)) == sorted(2 * list(range(n_pairs)))

    holds()


def test_pairs_that_are_not_there_are_named():
    p = many(2, 5, seed=0)
    for pairs, error, message in (
        ([0, 7], ValueError, r"pairs\[1\] is 7; with 5 pairs an index must be in 0\.\.4"),
        ([-1], ValueError, r"pairs\[0\] is -1; with 5 pairs"),
        ([], ValueError, "pairs is empty"),
        (3, TypeError, "pairs is 3 .*it must be a sequence of integers"),
        ([0.5], TypeError, "pairs holds 0.5"),
        ([True], TypeError, "pairs holds True"),
    ):
        for call in (p.batch, p.select, p.completions_of):
            with pytest.raises(error, match=message):
                call(pairs)
    with pytest.raises(ValueError, match="batch_pairs is 0; it must be at least 1"):
        p.steps(0)
    with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
        p.steps(4, epochs=0)


def test_selected_pairs_keep_their_completions_and_are_counted():
    p = many(2, 5, seed=0)
    some = p.select(range(1, 3))
    assert some.chosen.tolist() == p.chosen[1:3].tolist() and some.report.pairs == 2
    assert some.rejected.tolist() == p.rejected[1:3].tolist()
    assert some.completions == p.completions and some.tokens_hash() == p.tokens_hash()


def test_a_batch_moves_as_a_whole_and_says_when_there_is_no_reference():
    p = many(2, 5, seed=0)
    batch = p.batch([0, 1]).to("meta")
    parts = (batch.completions.input_ids, batch.reference_logps, batch.chosen, batch.rejected)
    assert {part.device.type for part in parts} == {"meta"}
    alone = replace(p, reference_logps=None).batch([0, 1])
    assert alone.reference_logps is None and alone.to("meta").reference_logps is None
    with pytest.raises(TypeError, match="reference_logps"):
        dpo_loss(torch.zeros(alone.completions.n), None, alone.chosen, alone.rejected, 0.1)
