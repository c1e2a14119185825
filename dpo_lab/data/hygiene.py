"""No prompt on both sides of a split: prompts compared, and repeated pairs counted."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from dpo_lab.data.schemas import Pair, Turns

# of a data set that has no split: one prompt in so many is held out
ONE_IN = 20


def not_held_out(pairs: list[Pair], held_out: Sequence[Turns], counts: Counter[str]) -> list[Pair]:
    """The pairs whose prompt is not held out, up to case, spaces and punctuation.

    The others are counted as `leaked`, and as `near_leaked` where the prompt is not the same to
    the letter. Kept and counted as `same_opening` is a conversation whose first message begins one
    that is held out.
    """
    exact, words = set(held_out), {name_of(prompt) for prompt in held_out}
    openings = {name_of(prompt[:1]) for prompt in held_out}
    kept = []
    for pair in pairs:
        if name_of(pair.prompt) in words:
            counts["leaked"] += 1
            counts["near_leaked"] += pair.prompt not in exact
        else:
            counts["same_opening"] += name_of(pair.prompt[:1]) in openings
            kept.append(pair)
    return kept


def count_repeats(pairs: list[Pair], counts: Counter[str]) -> None:
    """Count as `duplicated` pairs that were there before, as `reversed` those whose reverse is."""
    seen = Counter((pair.prompt, pair.chosen, pair.rejected) for pair in pairs)
    counts["duplicated"] = len(pairs) - len(seen)
    counts["reversed"] = sum(
        n for (prompt, chosen, rejected), n in seen.items() if (prompt, rejected, chosen) in seen
    )


def is_test(prompt: Turns) -> bool:
    """Whether a data set without a split holds this prompt out: one in 20, by its hash."""
    return int.from_bytes(name_of(prompt)[:8], "big") % ONE_IN == 0


def name_of(prompt: Turns) -> bytes:
    """16 bytes that name a conversation's letters and digits, or its signs where it has none."""
    text = "\n".join(said for _, said in prompt)
    key = " ".join(re.findall(r"[^\W_]+", text.casefold())) or text
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()
