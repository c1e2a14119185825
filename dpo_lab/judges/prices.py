"""What calls to an endpoint will cost at most, estimated before the first of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dpo_lab.engine.arguments import floats

PER_MESSAGE = 8
"""tokens that the roles and marks of a conversation of one message are taken to add"""


@dataclass(frozen=True)
class Bill:
    """An estimate of what a judge's calls cost: nothing was asked yet."""

    calls: int
    """how many will be made; one for all identical items"""
    kept: int
    """distinct items whose answers are on disk already, and cost nothing"""
    input_tokens: int
    """of all calls, estimated"""
    output_tokens: int
    """of all calls, if each reply is as long as it may be"""
    cost: float | None
    """in the currency of the price; None without a price"""
    counted_by: str
    """how tokens were counted"""

    def __str__(self) -> str:
        price = "no price was given" if self.cost is None else f"costs {self.cost:.2f} at most"
        return (
            f"{self.calls:,} calls ({self.kept:,} more are on disk), about {self.input_tokens:,} "
            f"tokens in and at most {self.output_tokens:,} out ({self.counted_by}): {price}; "
            "repeated attempts after a failure may add to it"
        )


def price_calls(
    model: str, questions: Sequence[str], kept: int, max_tokens: int, price: Any
) -> Bill:
    """The bill for asking a model N questions, each answered in at most `max_tokens` tokens.

    Args:
        price: (input, output) per million tokens, or None.
    """
    count, counted_by = token_counter(model)
    tokens_in = sum(count(text) + PER_MESSAGE for text in questions)
    tokens_out = len(questions) * max_tokens
    cost = None
    if price is not None:
        cost = (tokens_in * price[0] + tokens_out * price[1]) / 1e6
    return Bill(len(questions), kept, tokens_in, tokens_out, cost, counted_by)


@cache
def token_counter(model: str) -> tuple[Callable[[str], int], str]:
    """A function that counts a text's tokens, and how it does so.

    By tiktoken where it is installed, has its files and knows the model; else a token per 4 bytes
    of UTF-8, which is near for English and too few for some other scripts.
    """
    try:
        import tiktoken

        encoding = tiktoken.encoding_for_model(model)
    except Exception:  # not installed, an unknown model, or no internet for its files
        return lambda text: math.ceil(len(text.encode()) / 4), "a token per 4 bytes"
    return lambda text: len(encoding.encode(text, disallowed_special=())), "counted by tiktoken"


def checked_price(price: Any, max_cost: float | None) -> tuple[float, float] | None:
    """A price as two numbers, or None.

    Raises:
        ValueError, TypeError: it is no pair of numbers of 0 or more, or there is a `max_cost` and
            no price.
    """
    if max_cost is not None and not max_cost >= 0:
        raise ValueError(f"max_cost is {max_cost}; it must be 0 or more")
    if price is None:
        if max_cost is not None:
            raise ValueError(
                "max_cost needs price_per_million=(input, output), the price of a million tokens; "
                "your provider's page has it, and a server of your own costs (0, 0)"
            )
        return None
    pair = floats("price_per_million", price)
    if pair.shape != (2,) or not ((pair >= 0) & (pair < math.inf)).all():
        raise ValueError(
            f"price_per_million is {price!r}; it must be (input, output), two numbers of 0 or more"
        )
    return float(pair[0]), float(pair[1])
