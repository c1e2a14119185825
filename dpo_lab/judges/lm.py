"""A local causal LM as a judge: asked which answer is better, by log-probs of "A" and "B"."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from dpo_lab.engine.arguments import checked, number
from dpo_lab.engine.tokenizing import TokenCollector
from dpo_lab.judges.simple import NO_LIMIT, sigmoid
from dpo_lab.judges.verdicts import Judge, Verdicts
from dpo_lab.logprobs import Precision, score_completions

TEMPLATE = (
    "Which of the following two answers to the prompt is better?\n\n"
    "Prompt: {prompt}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
    'State only "A" or "B".'
)
"""What `lm_judge` asks by default"""

FIELDS = ("prompt", "a", "b")


@checked
def lm_judge(
    model: nn.Module,
    tokenizer: Any,
    template: Any = TEMPLATE,
    *,
    lead: str | None = None,
    tie_within: float = 0.0,
    least_mass: float = 0.0,
    precision: Precision = "float32",
) -> Judge:
    """A judge that takes the likelier of "A" and "B" as the next word of a causal LM.

    Its confidence is P(A) / (P(A) + P(B)). Each letter counts with and without a space before it,
    and may be several tokens; all are scored by `score_completions`, a prompt once for all of them.
    Where the tokenizer has a chat template, the question is the user's turn and `lead` begins the
    assistant's; else `lead` follows the question on a line of its own.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its own.
        template: the question, with {prompt}, {a} and {b} once each: a text, or a prompt of
            `judges.prompts`, such as the paper's `SIMPLE` and `CONCISE`. No comparison is written
            first, which those ask for: the letter is scored at once.
        lead: what the letter follows; by default the label of the prompt and a colon, and
            "Preferred:" after a text.
        tie_within: a tie where the confidence differs from 1/2 by no more than this.
        least_mass: no verdict ("prose") where P(A) + P(B) is below this, since the model would say
            something else; by default every pair gets one.
        precision: of the computation.

    Raises:
        ValueError, TypeError: a field is missing from the template or stands there twice, or a
            number is out of range; when asked: a text is longer than the model's context.
    """
    lead = f"{getattr(template, 'label', 'Preferred')}:" if lead is None else lead
    template = getattr(template, "template", template)
    _check_template(template)
    tie_within, least_mass = number("tie_within", tie_within), number("least_mass", least_mass)
    if not (0 <= tie_within <= 0.5 and 0 <= least_mass <= 1):
        raise ValueError(
            f"tie_within is {tie_within} and least_mass {least_mass}; the first must lie in "
            "[0, 1/2], the second in [0, 1]"
        )

    def judge(prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        questions = [filled(template, *texts) for texts in zip(prompts, a, b)]
        logps = letter_logps(model, tokenizer, questions, lead=lead, precision=precision)

        # P(A) / (P(A) + P(B)), a tie near one half, and no verdict where neither is likely
        confidence = sigmoid(logps[:, 0] - logps[:, 1])
        winner = np.where(np.abs(confidence - 0.5) <= tie_within, 0, np.sign(confidence - 0.5))
        unlikely = np.exp(logps).sum(1) < least_mass
        missing = tuple("prose" if none else "" for none in unlikely)
        return Verdicts(np.where(unlikely, 0, winner), confidence, missing)

    return judge


@checked
def letter_logps(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    lead: str = "Preferred:",
    precision: Precision = "float32",
) -> np.ndarray:
    """log P("A") and log P("B") after each question and the lead, (P, 2) nats."""
    collector = TokenCollector(tokenizer, NO_LIMIT, None)
    chat = tokenizer.chat_template is not None
    places = [
        collector.prompt(_asked(tokenizer, text, lead), where=f"pair {i}", chat=chat)
        for i, text in enumerate(questions)
    ]
    prompts = [list(ids) for ids in collector.prompts]

    # all ways to write each letter, for each distinct question
    ways = [(letter, ids) for letter in (0, 1) for ids in letter_tokens(collector, "AB"[letter])]
    completions = [ids for _ in prompts for _, ids in ways]
    owners = [p for p in range(len(prompts)) for _ in ways]
    logps = score_completions(model, prompts, completions, owners, precision=precision)

    # summed over the ways to write a letter
    table, of = logps.numpy().reshape(len(prompts), len(ways)), np.array([one for one, _ in ways])
    both = [np.logaddexp.reduce(table[:, of == letter], axis=1) for letter in (0, 1)]
    return np.stack(both, 1)[places]


def letter_tokens(collector: TokenCollector, letter: str) -> list[list[int]]:
    """The ways to write a letter after a text, as token ids: with a space before it and without.

    They are different events: where one would begin with another, only the shorter counts.
    """
    ways: list[list[int]] = []
    for ids in sorted((collector.continued(" " + letter), collector.continued(letter)), key=len):
        if not any(ids[: len(known)] == known for known in ways):
            ways.append(ids)
    return ways


def filled(template: str, prompt: str, a: str, b: str) -> str:
    """The template with its fields filled in; braces in the texts stay as they are."""
    texts = {"prompt": prompt, "a": a, "b": b}
    return re.sub(r"\{(prompt|a|b)\}", lambda field: texts[field[1]], template)


def _asked(tokenizer: Any, question: str, lead: str) -> str:
    """The question as the model reads it, up to where the letter stands."""
    if tokenizer.chat_template is None:
        return f"{question}\n{lead}"
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return text + lead


def _check_template(template: str) -> None:
    """Raise ValueError unless each field stands in the template once."""
    if not isinstance(template, str):
        raise TypeError(
            f"template is {template!r} ({type(template).__name__}); it must be a text or a prompt "
            "of judges.prompts"
        )
    found = re.findall(r"\{(prompt|a|b)\}", template)
    if sorted(found) != sorted(FIELDS):
        raise ValueError(
            f"template has the fields {found}; it must have {{prompt}}, {{a}} and {{b}}, once each"
        )
