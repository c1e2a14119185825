"""What a row of each public data set says: which answer to which prompt was preferred.

A reader takes a row as it is on the hub and yields pairs, or raises `Unusable` with the reason.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Turns = tuple[tuple[str, str], ...]
"""A conversation: role and text of each turn."""

SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Pair(NamedTuple):
    """Two answers to one prompt."""

    prompt: Turns
    """the conversation so far; the last turn is the user's"""
    chosen: str
    rejected: str
    more: dict[str, Any]
    """what else the data set says of the pair, by column"""


class Unusable(Exception):
    """A row that gives no pair. `kind` is the count of `LoadReport` that it belongs to."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


# dialogue


def read_hh(row: Mapping[str, Any], part: str, split: str) -> Iterator[Pair]:
    """Anthropic HH: two transcripts, which begin with the same conversation."""
    yield _answers_of(transcript(row["chosen"]), transcript(row["rejected"]), {})


def read_messages(row: Mapping[str, Any], part: str, split: str) -> Iterator[Pair]:
    """UltraFeedback binarized: two conversations as messages, and GPT-4's score of each answer."""
    sides = [
        tuple((message["role"], message["content"] or "") for message in row[name])
        for name in ("chosen", "rejected")
    ]
    scores = float(row["score_chosen"]), float(row["score_rejected"])
    if scores[0] == scores[1]:
        raise Unusable("ties", f"both answers have the score {scores[0]}")
    if not scores[0] > scores[1]:
        raise Unusable("odd", f"the chosen answer has the score {scores[0]}, the other {scores[1]}")
    yield _answers_of(*sides, _scored(*scores))


def transcript(text: str) -> Turns:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Raises:
        Unusable: it begins with something else.
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip():
        speaker = re.match(r"\s*(\w+):", before)
        kind = "unknown_role" if speaker and speaker[1] not in SPEAKERS else "odd"
        raise Unusable(kind, f"a transcript must begin with '\\n\\nHuman:', not with {text[:40]!r}")
    return tuple((SPEAKERS[who], said) for who, said in zip(parts[::2], parts[1::2]))


def _answers_of(chosen: Turns, rejected: Turns, more: dict[str, Any]) -> Pair:
    """The last turns of two conversations that are the same up to there."""
    chosen, rejected = _stripped(chosen), _stripped(rejected)
    for turns in (chosen, rejected):
        _check_turns(turns)
    if chosen[:-1] != rejected[:-1]:
        raise Unusable(
            "no_common_prompt",
            "the two conversations differ before their last turn, so their answers are to other "
            f"prompts: {chosen[:-1][-1:]} and {rejected[:-1][-1:]}",
        )
    prompt = chosen[:-1]
    asked = sum(role == "user" for role, _ in prompt)
    return Pair(prompt, chosen[-1][1], rejected[-1][1], more | {"turns": asked})


def _stripped(turns: Turns) -> Turns:
    """The turns before the last one without space around them."""
    return tuple((role, said.strip()) for role, said in turns[:-1]) + turns[-1:]


def _check_turns(turns: Turns) -> None:
    """Raise Unusable unless user and assistant speak in turn, after a system message or none."""
    roles = [role for role, _ in turns]
    if strange := [role for role in roles if role not in ("system", "user", "assistant")]:
        raise Unusable("unknown_role", f"a turn has the role {strange[0]!r}")
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = all(role == ("user", "assistant")[k % 2] for k, role in enumerate(spoken))
    if len(spoken) < 2 or len(spoken) % 2 or not in_turn:
        raise Unusable("odd", f"user and assistant must speak in turn, the assistant last: {roles}")
    if not all(said for _, said in turns[:-1]):
        raise Unusable("odd", "a turn before the answer is empty")


# summaries


def read_comparison(row: Mapping[str, Any], part: str, split: str) -> Iterator[Pair]:
    """Summaries of Reddit posts: two, and the index of the better one (Stiennon et al. 2020)."""
    # the hub's validation is one half of model selection and one of final evaluation
    halves = {"validation": "valid1", "test": "valid2"}
    if split in halves and row["split"] != halves[split]:
        raise Unusable("filtered", "a row of another split")

    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if info["post"] is None:
        raise Unusable("filtered", "a news article, not a post")
    if len(summaries) != 2 or choice not in (0, 1):
        raise Unusable(
            "odd", f"choice is {choice!r} of {len(summaries)} summaries; it must be 0 or 1 of 2"
        )

    better, worse = summaries[choice], summaries[1 - choice]
    more = {
        "rater": row["worker"],
        "confidence": (row["extra"] or {}).get("confidence"),
        "policy_chosen": better["policy"],
        "policy_rejected": worse["policy"],
        "id": info["id"],
    }
    prompt = post_prompt(info["subreddit"], info["title"], info["post"])
    yield Pair((("user", prompt),), better["text"], worse["text"], more)


def post_prompt(subreddit: str, title: str, post: str) -> str:
    """A Reddit post as TRL writes it, so that both forms of the data set have the same prompts."""
    body = post.replace("\n\n", "\n")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def read_texts(row: Mapping[str, Any], part: str, split: str) -> Iterator[Pair]:
    """Summaries of Reddit posts in TRL's form: prompt, chosen and rejected as text."""
    if not row["prompt"].startswith("SUBREDDIT:"):
        raise Unusable("filtered", "a news article, not a post")
    yield Pair((("user", row["prompt"]),), row["chosen"], row["rejected"], {})


# answers to questions


def read_webgpt(row: Mapping[str, Any], part: str, split: str) -> Iterator[Pair]:
    """WebGPT comparisons: two answers with scores in [-1, 1] that sum to 0; (0, 0) is a tie."""
    scores = [float(row["score_0"]), float(row["score_1"])]
    if not all(map(math.isfinite, scores)) or abs(sum(scores)) > 1e-6:
        raise Unusable("odd", f"the scores {scores} do not sum to 0")
    if scores[0] == scores[1]:
        raise Unusable("ties", "both answers have the score 0")
    best = int(scores[1] > scores[0])
    more = _scored(scores[best], scores[1 - best]) | {"source": row["question"]["dataset"]}
    answers = row["answer_0"], row["answer_1"]
    prompt = (("user", row["question"]["full_text"]),)
    yield Pair(prompt, answers[best], answers[1 - best], more)


def read_shp(row: Mapping[str, Any], part: str, split: str) -> Iterator[Pair]:
    """SHP: two comments on a post, with Reddit's scores; label 1 says that A is preferred."""
    scores, label = [row["score_A"], row["score_B"]], row["labels"]
    if label not in (0, 1):
        raise Unusable("odd", f"labels is {label!r}; it must be 1 (A) or 0 (B)")
    if scores[0] == scores[1]:
        raise Unusable("ties", f"both comments have the score {scores[0]}")
    if (scores[0] > scores[1]) != (label == 1):
        raise Unusable("odd", f"labels is {label}, against the scores {scores}")
    answers, best = [row["human_ref_A"], row["human_ref_B"]], 1 - label
    more = _scored(scores[best], scores[1 - best])
    more |= {"score_ratio": row["score_ratio"], "source": (row["domain"] or "").rsplit("_", 1)[0]}
    yield Pair((("user", row["history"]),), answers[best], answers[1 - best], more)


def read_hc3(row: Mapping[str, Any], part: str, split: str) -> Iterator[Pair]:
    """HC3: answers by people and by ChatGPT, which nobody compared; `part` says who is chosen."""
    people, chatgpt = row["human_answers"], row["chatgpt_answers"]
    if not people or not chatgpt:
        raise Unusable("empty", "one side has no answer")
    for human in people:
        for generated in chatgpt:
            sides = (human, generated) if part == "prefer-human" else (generated, human)
            yield Pair((("user", row["question"]),), *sides, {"source": row["source"]})


def _scored(chosen: float, rejected: float) -> dict[str, float]:
    return {"score_chosen": chosen, "score_rejected": rejected, "margin": chosen - rejected}
