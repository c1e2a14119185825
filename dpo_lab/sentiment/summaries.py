"""One-sentence summaries of reviews by a chat model: what is asked, the reward, and replies.

A task whose reward is known: a summary should have the sentiment of its review, and be short.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpo_lab.assets import ASSETS
from dpo_lab.engine.arguments import integer, integers
from dpo_lab.judges.verdicts import Judge, Verdicts
from dpo_lab.models import end_tokens
from dpo_lab.sampling import sample_completions
from dpo_lab.sentiment.reward import SentimentReward

# what the model is told, and asked
SYSTEM = "You summarize movie reviews in one short sentence."
REQUEST = "{review}\n\nSummarize this movie review in one sentence."

# words of a review, at most: long prompts take a CPU long
LONGEST_REVIEW = 60

# words of a summary that cost nothing
BRIEF = 16


@dataclass(frozen=True)
class SummaryRequests:
    """N reviews, each with the chat prompt that asks for its summary."""

    prompts: list[list[int]]
    """N lists of token ids: the request in the chat template, up to where the answer begins"""
    reviews: list[str]
    """N texts"""
    labels: np.ndarray
    """(N,) 1 for a positive review, 0 for a negative one"""


def summary_requests(
    reviews: Dataset, tokenizer: PreTrainedTokenizerBase, n: int | None = None, *, seed: int = 0
) -> SummaryRequests:
    """Requests to summarize `n` reviews of at most 60 words, drawn by `seed`, or all of them.

    Different reviews as long as there are enough; then each is taken again.

    Args:
        reviews: with the columns `text` and `label`, such as `load_imdb()["test"]`.
        tokenizer: of a chat model.
        n: how many; by default every short review once, in order.
        seed: which ones.

    Raises:
        ValueError: the tokenizer has no chat template, or no review is short enough.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, which a request is written in; take a chat model "
            "such as 'smollm2', or set tokenizer.chat_template"
        )
    texts, labels, short = reviews["text"][:], reviews["label"][:], short_reviews(reviews)
    if not short:
        raise ValueError(f"no review has {LONGEST_REVIEW} words or fewer; give some that do")

    if n is not None:
        shuffled = np.random.default_rng(seed).permutation(short)
        short = np.resize(shuffled, integer("n", n)).tolist()
    return SummaryRequests(
        prompts=[chat_prompt(tokenizer, REQUEST.format(review=texts[i]), SYSTEM) for i in short],
        reviews=[texts[i] for i in short],
        labels=np.array([labels[i] for i in short], dtype=np.int64),
    )


def short_reviews(reviews: Dataset) -> list[int]:
    """The indices of the reviews of at most 60 words."""
    texts = reviews["text"][:]
    return [i for i, text in enumerate(texts) if len(text.split()) <= LONGEST_REVIEW]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str, system: str = "") -> list[int]:
    """Token ids of one turn of a user in the chat template, up to where the answer begins."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(rendered, add_special_tokens=False)


def brevity(text: str) -> float:
    """min(1, exp(1 - w / 16)) for a text of w words; 0 for one without words.

    This is the brevity penalty of BLEU with its fraction turned around, so that long texts pay and
    not short ones. Papineni et al. 2002, https://aclanthology.org/P02-1040
    """
    words = len(text.split())
    return min(1.0, math.exp(1 - words / BRIEF)) if words else 0.0


class SummaryReward:
    """P(the summary has its review's label) x `brevity`, in [0, 1].

    Call it with N summaries and the N labels of their reviews; get a float64 array (N,). The
    probability is a sentiment classifier's, given the summary alone.
    """

    def __init__(self, sentiment: SentimentReward):
        self.sentiment, self.name = sentiment, f"{sentiment.name} x brevity"

    def __call__(self, summaries: Sequence[str], labels: Sequence[int]) -> np.ndarray:
        labels = integers("labels", labels)
        positive = self.sentiment(summaries)
        if len(labels) != len(positive):
            raise ValueError(
                f"{len(positive)} summaries and {len(labels)} labels; give the label of each "
                "summary's review"
            )
        agrees = np.where(labels == 1, positive, 1 - positive)
        return agrees * np.array([brevity(text) for text in summaries])


def summary_judge(requests: SummaryRequests, reward: SummaryReward) -> Judge:
    """A judge for whom the summary with the higher reward wins; its prompts are the reviews.

    Raises:
        ValueError: when asked about a review that is not among the requests.
    """
    label_of = dict(zip(requests.reviews, requests.labels.tolist()))

    def judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        unknown = [review for review in prompts if review not in label_of]
        if unknown:
            raise ValueError(
                f"prompts has the review {unknown[0]!r}, which is not among the requests; the "
                "judge knows the labels of those alone"
            )
        labels = [label_of[review] for review in prompts]
        return Verdicts(np.sign(reward(a, labels) - reward(b, labels)))

    return judge


# answers to look at


def replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    k: int = 1,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> list[list[str]]:
    """`k` answers to each chat prompt, as texts without what the template wrote."""
    drawn = sample_completions(
        model,
        [list(prompt) for prompt in prompts],
        k,
        eos_token_id=end_tokens(model, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return [
        [text.strip() for text in tokenizer.batch_decode(row, skip_special_tokens=True)]
        for row in drawn
    ]


def ranked_summaries(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: SummaryRequests,
    reward: SummaryReward,
    k: int = 4,
    *,
    seed: int = 0,
) -> list[list[tuple[float, str]]]:
    """`k` summaries of each review with their rewards, best first: what pairs are made of.

    Four summaries of four reviews take SmolLM2 about a minute on a laptop.
    """
    found = []
    for summaries, label in zip(
        replies(model, tokenizer, requests.prompts, k, seed=seed), requests.labels
    ):
        rewards = reward(summaries, [label] * k)
        found.append(sorted(zip(rewards.tolist(), summaries), reverse=True))
    return found


def dialogue_prompts() -> list[str]:
    """The 30 single questions and requests of assets/dialogue.txt, written for this package."""
    path: Path = ASSETS / "dialogue.txt"
    return path.read_text(encoding="utf-8").splitlines()
