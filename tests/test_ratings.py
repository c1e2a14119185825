"""Ratings: the file survives crashes, the form's state survives all keys, votes become pairs."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dpo_lab.data.labeling import Labeling
from dpo_lab.data.rated_pairs import choices_of, scores_of, to_pairs, to_rows
from dpo_lab.data.ratings import Item, Rating, RatingStore, as_items, shown_order
from dpo_lab.widgets.rating import rating_widget

PAIRS = [(f"prompt {i}", f"one {i}", f"other {i}") for i in range(4)]
ALONE = [("shared", f"answer {i}") for i in range(3)]
ITEMS = [*PAIRS, *ALONE]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ratings.jsonl"


def rating(item=PAIRS[0], **changes):
    key = as_items([item])[0].key
    given = {"rater": "A", "pass_number": 1, "order": (0, 1), "choice": "left"}
    if len(item) == 2:
        given |= {"order": (0,), "choice": None, "scores": (3,)}
    return Rating(item=key, **given | changes)


def said(store):
    """What holds, without the time that the store adds."""
    return [replace(one, time="") for one in store.ratings()]


# the file


def test_a_rating_is_flushed_to_disk_before_it_counts(path, monkeypatch):
    store, synced = RatingStore(path), []

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        assert json.loads(path.read_text())["choice"] == "left"

    monkeypatch.setattr(os, "fsync", fsync)
    store.add(rating())
    assert synced == [path.stat().st_size] and said(store) == [rating()]


def test_a_file_cut_off_anywhere_keeps_all_that_was_whole(path):
    store, ratings = RatingStore(path), [rating(item) for item in PAIRS[:3]]
    for one in ratings:
        store.add(one)
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    near = [end + k for end in ends for k in (-1, 0, 1)]
    for length in sorted({0, 1, 20, *near, *range(0, len(whole), 29)}):
        path.write_bytes(whole[:length])
        cut = RatingStore(path)
        assert said(cut) == ratings[: sum(end <= length for end in ends)]
        half = length not in (0, *ends, *(end + 1 for end in ends))
        assert bool(cut.damaged) == half

        # what comes after does not run into the half line
        cut.add(rating(PAIRS[3]))
        again = RatingStore(path)
        assert said(again) == [*said(cut)] and again.damaged == cut.damaged


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\x00\x00",
        b"\xff\xfe",
        b"[1]",
        b"3",
        b'{"event": "rating"}',
        b'{"event": "other", "version": 1}',
        b'{"event": "rating", "version": 1, "item": "x", "rater": 3}',
        b'{"event": "undo", "version": 1}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_skipped_and_reported(path, line):
    store = RatingStore(path)
    store.add(rating())
    path.write_bytes(path.read_bytes() + line + b"\n")
    RatingStore(path).add(rating(PAIRS[1]))
    found = RatingStore(path)
    assert said(found) == [rating(), rating(PAIRS[1])] and found.damaged == (2,)
    assert "damaged lines [2]" in repr(found)


def test_files_of_something_else_or_of_the_future_are_refused(path):
    path.write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(ValueError, match="something else than ratings, such as b'prompt,chosen"):
        RatingStore(path)
    path.write_text('{"event": "rating", "version": 2}\n')
    with pytest.raises(ValueError, match="later version"):
        RatingStore(path)
    with pytest.raises(TypeError, match="path is 3"):
        RatingStore(3)


def test_undo_is_a_line_and_a_later_rating_replaces(path):
    store = RatingStore(path)
    store.add(rating())
    store.add(rating(PAIRS[1]))
    store.undo(rating())
    store.add(rating(PAIRS[1], choice="tie"))
    assert said(store) == said(RatingStore(path)) == [rating(PAIRS[1], choice="tie")]
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(KeyError, match="no rating of item"):
        store.undo(rating())


def test_two_kernels_write_to_one_file(path):
    one, other = RatingStore(path), RatingStore(path)
    one.add(rating(rater="A"))
    other.add(rating(rater="B"))
    other.add_guidelines("be kind")
    one.add(rating(rater="C"))
    one.undo(rating(rater="C"))
    assert [found.rater for found in one.ratings()] == ["A", "B"]
    assert [found.rater for found in one.ratings("B", 1)] == ["B"]
    assert one.get(rating().item, "B", 2) is None and "be kind" in one.guidelines.values()
    assert other.ratings() == one.ratings() == RatingStore(path).ratings()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rater": " "}, "no rater"),
        ({"pass_number": 0}, "a pass"),
        ({"order": (1, 1)}, "an order"),
        ({"choice": "up"}, "choice is .*; it must be"),
        ({"choice": None}, "choice is .*; it must be"),
        ({"scores": (1, 2)}, "prefers another answer"),
        ({"scores": (9, 2)}, "from 1 to 5"),
        ({"scores": (3,)}, "from 1 to 5"),
        ({"order": (0,), "choice": None}, "needs a score"),
    ],
)
def test_a_rating_that_contradicts_itself_is_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        rating(**changes)


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([], "items is empty"),
        ("text", "items is a str"),
        ([("a", "b", "b")], r"items\[0\]: an item has the answer 'b' twice"),
        ([("a", "b"), ("a", "b")], "items 0 and 1 are the same texts"),
        ([("a", 3)], r"items\[0\]: an item holds 3"),
        ([{"prompt": "a"}], r"items\[0\] is"),
        ([{"prompt": "a", "answers": ["1", "2", "3"]}], "has 3 answers"),
        (3, "items is a int"),
    ],
)
def test_bad_items_are_named(items, problem):
    with pytest.raises((ValueError, TypeError), match=problem):
        as_items(items)


def test_items_come_in_several_forms_and_a_changed_text_has_no_rating(path):
    forms = [("p", "a", "b"), {"prompt": "p", "completions": ["a", "b"]}, Item("p", ("a", "b"))]
    assert len({as_items([form])[0].key for form in forms}) == 1
    store = RatingStore(path)
    store.add(rating())
    changed = [("prompt 0", "one 0", "other 0.")]
    assert Labeling(changed, store, rater="A").view()["done"] == 0
    found = to_pairs(store, changed)
    assert (len(found), found.unmatched, found.unrated) == (0, 1, 1)


def test_sides_are_drawn_evenly_by_seed_item_rater_and_pass():
    items = as_items([("p", f"a{i}", f"b{i}") for i in range(2000)])
    drawn = {"seed": 0, "rater": "A", "pass_number": 1}
    sides = np.array([shown_order(item, **drawn)[0] for item in items])
    assert abs(sides.mean() - 0.5) < 0.04
    for change in ({"seed": 1}, {"rater": "B"}, {"pass_number": 2}):
        others = np.array([shown_order(item, **drawn | change)[0] for item in items])
        assert abs((sides == others).mean() - 0.5) < 0.05


# the state of the form, over all sequences of keys


class Rater(RuleBasedStateMachine):
    """Keys, stale keys, killed kernels and half-written lines, beside a plain model of them."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ratings.jsonl"
        self.said, self.scores = {}, []
        self.restart()

    def teardown(self):
        self.folder.cleanup()

    @rule()
    def restart(self):
        """A new kernel: ratings of one of two answers are lost, saved ones are not."""
        self.labeling, self.scores = Labeling(ITEMS, self.path, rater="A", seed=3), []

    @rule(length=st.integers(1, 60))
    def crash_while_writing(self, length):
        line = b'{"event": "rating", "version": 1, "item": "0123456789abcdef", "rater": "A"'
        with open(self.path, "ab") as file:
            file.write(line[:length] if not file.tell() else b"\n" + line[:length])
        self.restart()

    @rule(key=st.sampled_from(["left", "right", "tie", "1", "2", "5", "undo"]), stale=st.booleans())
    def press(self, key, stale):
        before, turn = self.labeling.item, self.labeling.turn
        counted = self.labeling.press(key, turn=turn - stale, seconds=1.0)
        if stale:
            assert not counted and self.labeling.item is before
        elif key == "undo":
            self._undo(counted)
        else:
            self._answer(before, key, counted)

    def _undo(self, counted):
        assert counted == bool(self.scores or self.said)
        if self.scores:
            self.scores = []
        elif self.said:
            last, _ = self.said.popitem()
            assert self.labeling.item.key == last

    def _answer(self, item, key, counted):
        if item is None or (len(item.answers) == 1 and not key.isdigit()):
            assert not counted
            return
        assert counted
        if not key.isdigit():
            self.said[item.key], self.scores = (key, None), []
            return
        self.scores = [*self.scores, int(key)]
        if len(self.scores) == len(item.answers):
            choice = None
            if len(self.scores) == 2:
                left, right = self.scores
                choice = {True: "left", False: "right"}[left > right] if left != right else "tie"
            self.said[item.key], self.scores = (choice, tuple(self.scores)), []

    @invariant()
    def the_page_and_the_file_say_the_same(self):
        view = self.labeling.view()
        assert view["done"] == len(self.said) and view["total"] == len(ITEMS)
        assert view["finished"] == (len(self.said) == len(ITEMS))
        assert view["can_undo"] == bool(self.said or self.scores)
        found = {one.item: (one.choice, one.scores) for one in RatingStore(self.path).ratings("A")}
        assert found == self.said and list(found) == list(self.said)
        if view["item"]:
            assert view["item"]["key"] not in self.said and view["item"]["scores"] == self.scores
        json.dumps(view)


TestRater = Rater.TestCase
TestRater.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_what_is_not_saved_does_not_go_on(path, monkeypatch):
    labeling = Labeling(PAIRS, path)
    item = labeling.item

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not labeling.press("left") and labeling.item is item
    assert "Not saved: [Errno 28] No space left" in labeling.view()["message"]
    assert labeling.view()["done"] == 0 and not path.stat().st_size
    monkeypatch.undo()
    assert labeling.press("4") and labeling.press("2") and labeling.item is not item
    assert labeling.view()["message"] == ""


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rater": ""}, "rater is blank"),
        ({"rater": 3}, "rater is 3"),
        ({"pass_number": 0}, "pass_number is 0"),
        ({"pass_number": "2"}, "pass_number is '2'"),
        ({"guidelines": None}, "guidelines is None"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_bad_arguments_are_named(path, options, problem):
    with pytest.raises((ValueError, TypeError), match=problem):
        Labeling(PAIRS, path, **options)
    with pytest.raises(ValueError, match="key is 'x'"):
        Labeling(PAIRS, path).press("x")


def test_the_form_sends_keys_and_shows_texts_as_text(path):
    hostile = "<script>alert(1)</script> $x$"
    form = rating_widget([("<b>p</b>", hostile, "b")], path, guidelines="be kind")
    form._receive(form, {"key": "left", "turn": 5, "seconds": 1}, [])
    for message in ({}, {"key": "x", "turn": 0, "seconds": 1}, None):
        form._receive(form, message, [])
    assert form.view["done"] == 0 and form.view["guidelines"] == "be kind"
    html = form._repr_mimebundle_()[0]["text/html"]
    assert "&lt;script&gt;" in html and "<script" not in html and "$" not in html
    form._receive(form, {"key": "left", "turn": 0, "seconds": 2.5}, [])
    (one,) = RatingStore(path).ratings()
    assert form.view["finished"] and one.seconds == 2.5
    assert list(RatingStore(path).guidelines) == [one.guidelines]
    assert "1 of 1 rated" in form._repr_mimebundle_()[0]["text/html"]


# pairs


def test_ratings_refer_to_the_item_not_to_the_side(path):
    store = RatingStore(path)
    store.add(rating(PAIRS[0], order=(1, 0), choice="left", scores=(5, 2)))
    store.add(rating(PAIRS[1], choice="right"))
    store.add(rating(PAIRS[2], choice="tie"))
    store.add(rating(ALONE[0], scores=(4,)))
    np.testing.assert_array_equal(choices_of(store, ITEMS, rater="A"), [-1, -1, 0, *[np.nan] * 4])
    np.testing.assert_array_equal(scores_of(store, ITEMS, rater="A")[[0, 4]], [[2, 5], [4, np.nan]])
    found = to_pairs(store, ITEMS)
    assert [found.answers[i] for i in found.chosen] == ["other 0", "other 1"]
    np.testing.assert_array_equal(found.margins, [3, np.nan])
    assert (found.ties, found.unrated, found.votes) == (1, 3, 3)


def test_answers_rated_alone_become_pairs_with_margins(path):
    store = RatingStore(path)
    for item, score in zip(ALONE, (2, 5, 2)):
        store.add(rating(item, scores=(score,)))
    rows = to_rows(store, ALONE)
    assert {(row["chosen"], row["rejected"], row["margin"]) for row in rows} == {
        ("answer 1", "answer 0", 3.0),
        ("answer 1", "answer 2", 3.0),
    }
    assert to_pairs(store, ALONE).ties == 1


VOTES = st.lists(
    st.tuples(
        st.integers(0, 3), st.sampled_from("AB"), st.sampled_from([1, 2]), st.integers(-1, 1)
    ),
    unique_by=lambda vote: vote[:3],
)


@settings(max_examples=40, deadline=None)
@given(votes=VOTES, rule=st.sampled_from(["first", "last", "majority", "drop", "all"]))
def test_disagreeing_votes_are_settled_as_a_plain_loop_does(tmp_path_factory, votes, rule):
    store = RatingStore(tmp_path_factory.mktemp("votes") / "ratings.jsonl")
    signs = {i: [] for i in range(4)}
    for i, rater, number, sign in votes:
        choice = {1: "left", -1: "right", 0: "tie"}[sign]
        store.add(rating(PAIRS[i], rater=rater, pass_number=number, choice=choice))
        signs[i].append(sign)

    # the plain loop
    kept, dropped = Counter(), 0
    for i, votes_of in signs.items():
        often = Counter(votes_of)
        best = [sign for sign in often if often[sign] == max(often.values())]
        if not votes_of:
            continue
        if rule in ("first", "last"):
            held = [votes_of[0 if rule == "first" else -1]]
        elif rule == "all":
            held = votes_of
        elif rule == "majority":
            held = best if len(best) == 1 else []
        else:
            held = votes_of[:1] if len(set(votes_of)) == 1 else []
        dropped += not held
        kept.update((i, sign) for sign in held)

    found = to_pairs(store, PAIRS, disagreement=rule)
    got = Counter(
        (int(found.prompts[c][-1]), 1 if found.answers[c].startswith("one") else -1)
        for c in found.chosen
    )
    assert got == Counter({k: n for k, n in kept.items() if k[1]})
    assert found.ties == sum(n for k, n in kept.items() if not k[1])
    assert found.dropped == dropped and found.votes == len(votes)
    assert found.disagreements == sum(len(set(some)) > 1 for some in signs.values())
    assert all(found.prompts[c] == found.prompts[r] for c, r in zip(found.chosen, found.rejected))


def test_an_unknown_rule_is_refused(path):
    with pytest.raises(ValueError, match="disagreement is 'mean'; it must be one of 'first'"):
        to_pairs(RatingStore(path), PAIRS, disagreement="mean")


def test_ratings_need_neither_torch_nor_datasets():
    code = "import sys, dpo_lab.data.rated_pairs; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
