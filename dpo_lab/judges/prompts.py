"""What the paper asks GPT-4, and how a reply to it is read: a verdict, or why there is none."""

import re
from dataclasses import dataclass

FIELDS = ("prompt", "a", "b")

REFUSAL = re.compile(
    r"\b(I\s*(['’]m|am)\s+(sorry|unable|not able)|I\s+apologi[sz]e|as an AI\b"
    r"|I\s+(can['’]?t|cannot|can not|won['’]t|will not|must decline|decline)\b)",
    re.IGNORECASE,
)
"""words by which a reply without an answer line is counted as a refusal, not as prose"""


@dataclass(frozen=True)
class JudgePrompt:
    """A question about two answers, and the line on which its reply names the better one.

    Raises:
        ValueError: a field is missing from the template or stands there twice, or there is no name.
    """

    template: str
    """the question, with {prompt}, {a} and {b} once each"""
    label: str = "Preferred"
    """what the line with the verdict begins with, before a colon"""

    def __post_init__(self) -> None:
        found = re.findall(r"\{(prompt|a|b)\}", self.template)
        if sorted(found) != sorted(FIELDS):
            raise ValueError(
                f"template has the fields {found}; it must have {{prompt}}, {{a}} and {{b}}, once "
                "each"
            )
        if not self.label.strip():
            raise ValueError("label is empty; it names the line that holds the verdict")

    def filled(self, prompt: str, a: str, b: str) -> str:
        """The question about two answers; braces in the three texts stay as they are."""
        texts = {"prompt": prompt, "a": a, "b": b}
        return re.sub(r"\{(prompt|a|b)\}", lambda field: texts[field[1]], self.template)

    def read(self, reply: str | None) -> tuple[str | None, str]:
        """The letter that a reply names, or None, with "" or the reason why there is none.

        A verdict is a reply whose last line is the label, a colon, and A or B, with or without the
        quotation marks of the question, and in which no other line begins with the label. All
        else is counted and never guessed: "empty", "malformed" (the label is there in another
        form or twice), "refusal", or "prose".
        """
        lines = [line.strip() for line in re.split(r"[\r\n]+", reply or "") if line.strip()]
        if not lines:
            return None, "empty"
        labeled = [line for line in lines if self.label.lower() + ":" in line.lower()]
        form = re.fullmatch(rf'{re.escape(self.label)}: *("?)([AB])\1', lines[-1])
        if form and len(labeled) == 1:
            return form[2], ""
        if labeled:
            return None, "malformed"
        return None, "refusal" if REFUSAL.search(reply or "") else "prose"


# Rafailov et al. 2023, arXiv 2305.18290, Appendix C.2, with its angle-bracketed places as fields.
# Wording compared with two transcripts of that appendix and with the authors' evaluation script;
# line breaks within a sentence, which differ among these, are left out.
_SUMMARIES = """

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. \
SECOND, on a new line, state only "A" or "B" to indicate your choice. Your response should use the \
format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""

SIMPLE = JudgePrompt(
    "Which of the following summaries does a better job of summarizing the most important points "
    "in the given forum post?" + _SUMMARIES
)
"""(S), the simple prompt for summaries. Rafailov et al. 2023, Appendix C.2"""

CONCISE = JudgePrompt(
    "Which of the following summaries does a better job of summarizing the most important points "
    "in the given forum post, without including unimportant or irrelevant details? A good summary "
    "is both precise and concise." + _SUMMARIES
)
"""(C), the concise prompt for summaries. Rafailov et al. 2023, Appendix C.2"""

DIALOGUE = JudgePrompt(
    """For the following query to a chatbot, which response is more helpful?

Query: {prompt}

Response A:
{a}

Response B:
{b}

FIRST provide a one-sentence comparison of the two responses and explain which you feel is more \
helpful. SECOND, on a new line, state only "A" or "B" to indicate which response is more helpful. \
Your response should use the format:
Comparison: <one-sentence comparison and explanation>
More helpful: <"A" or "B">""",
    label="More helpful",
)
"""The prompt for dialogue. Rafailov et al. 2023, Appendix C.2"""
