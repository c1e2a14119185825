"""A chat model behind an OpenAI-compatible endpoint as a judge: asked at most once per question."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dpo_lab.engine.arguments import checked, finite_positive, folder, integer, number
from dpo_lab.judges.ledger import Ledger, request_key
from dpo_lab.judges.prices import Bill, checked_price, price_calls
from dpo_lab.judges.prompts import SIMPLE, JudgePrompt
from dpo_lab.judges.verdicts import SIGN_OF, Verdicts, check_texts

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
NO_KEY = "none"

WHAT_TO_DO = {
    400: "the server takes no such request: shorten the texts of this item, or change the model's "
    "name, max_tokens, temperature (None leaves it out) or parameters",
    401: "the server does not take the key: check the environment variable that holds it",
    402: "the account has no credit left",
    403: "the account may not use this model: check the model's name and the key",
    404: "there is no such model or page: check the model's name and base_url, which mostly ends "
    "in /v1",
}
"""what to do about the statuses that no second attempt would change"""


class EndpointError(RuntimeError):
    """An endpoint cannot be used as it is: says why, what to do, and what was kept."""


@dataclass(frozen=True, eq=False)
class EndpointJudge:
    """A judge made by `endpoint_judge`; call it, or ask for its `estimate` first."""

    model: str
    """as the endpoint names it"""
    base_url: str
    """of the endpoint"""
    prompt: JudgePrompt
    """what is asked"""
    parameters: Mapping[str, Any]
    """of every request, beside model and messages"""
    ledger: Ledger = field(repr=False)
    """the answers on disk"""
    client: Any = field(repr=False)
    """the `openai.OpenAI` that asks; it alone holds the key"""
    concurrency: int = 8
    """how many calls are under way at once, at most"""
    max_tokens: int = 256
    """of a reply"""
    price: tuple[float, float] | None = None
    """(input, output) per million tokens"""
    max_cost: float | None = None
    """what one call of the judge may cost at most, by its estimate"""
    progress: bool = True
    """whether a progress bar is drawn"""

    def estimate(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Bill:
        """What judging P pairs would cost, without asking anything.

        Raises:
            ValueError, TypeError: the three lists differ in length, are empty, or hold something
                else than texts.
        """
        return self._bill(self._requests(prompts, a, b))

    def __call__(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        """Verdicts on P pairs, in their order.

        Raises:
            ValueError, TypeError: as `estimate`, or it would cost more than `max_cost`; nothing was
                asked then.
            EndpointError: the endpoint refuses the requests or cannot be reached.
        """
        requests = self._requests(prompts, a, b)
        bill = self._bill(requests)
        if self.max_cost is not None and (bill.cost or 0) > self.max_cost:
            raise ValueError(
                f"max_cost is {self.max_cost:.2f}, and this may cost more: {bill}; nothing was "
                "asked. Raise max_cost, or judge fewer items"
            )

        # what is not on disk is asked, then all is read from there
        asked = {key: body for key, body in requests}
        for key in self.ledger.find(asked):
            del asked[key]
        if asked:
            places: dict[str, int] = {}
            for i, (key, _) in enumerate(requests):
                places.setdefault(key, i)
            self._ask_all(asked, places)
        answers = self.ledger.find(key for key, _ in requests)

        # no answer after all attempts is an error, which the next call tries again
        found = [
            read_answer(self.prompt, answers[key]) if key in answers else (None, "error")
            for key, _ in requests
        ]
        winner = [SIGN_OF[letter] if letter else 0 for letter, _ in found]
        return Verdicts(winner, missing=tuple(reason for _, reason in found))

    def _requests(self, *lists: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        """Key and body of each item's request."""
        names = ("prompts", "answers_a", "answers_b")
        check_texts(**dict(zip(names, lists)))
        for name, texts in zip(names, lists):
            for i, text in enumerate(texts):
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"{name}[{i}] is no Unicode text ({error}); it cannot be sent"
                    ) from None
        bodies = [
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompt.filled(*texts)}],
                **self.parameters,
            }
            for texts in zip(*lists)
        ]
        return [(request_key(self.base_url, body), body) for body in bodies]

    def _bill(self, requests: list[tuple[str, dict[str, Any]]]) -> Bill:
        bodies = dict(requests)
        kept = self.ledger.find(bodies)
        questions = [
            body["messages"][0]["content"] for key, body in bodies.items() if key not in kept
        ]
        return price_calls(self.model, questions, len(kept), self.max_tokens, self.price)

    def _ask_all(self, asked: dict[str, dict[str, Any]], places: dict[str, int]) -> None:
        """Ask and keep, several at a time.

        An interrupt waits for the calls under way, so that what they cost is kept.
        """
        failed, in_a_row, stop, halted = 0, 0, None, threading.Event()

        def ask(key: str, body: dict[str, Any]) -> tuple[str, bool]:
            if halted.is_set():
                return "not asked", False
            problem, for_good = self._ask(key, body)
            if for_good:
                halted.set()
            return problem, for_good

        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        bar = tqdm(total=len(asked), desc=self.model, unit="call", disable=not self.progress)
        try:
            calls: dict[Future, str] = {
                pool.submit(ask, key, body): key for key, body in asked.items()
            }
            for call in as_completed(calls):
                problem, for_good = call.result()
                bar.update()
                if halted.is_set() and not for_good:
                    continue
                failed += bool(problem)
                in_a_row = in_a_row + 1 if problem else 0
                hopeless = in_a_row >= max(self.concurrency, 8)
                if problem and (for_good or hopeless or failed == len(asked)):
                    stop = f"item {places[calls[call]]}: {problem}"
                    break
        finally:
            halted.set()
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()
        if stop:
            raise EndpointError(
                f"{self.model} at {self.base_url}, {stop}. {len(self.ledger)} answers are kept in "
                f"{self.ledger.path}; the next run asks only for the others"
            )

    def _ask(self, key: str, body: dict[str, Any]) -> tuple[str, bool]:
        """Ask one question and keep the answer: ("", False), or what went wrong and if for good.

        Whatever arrives whole with status 200 has been paid, and is kept whatever it says. An error
        is returned as text, for the client's exceptions hold the key.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            answer = self.client.chat.completions.with_raw_response.create(**body).http_response
        except APIStatusError as error:
            status, said = error.status_code, self._without_key(_said(error.body))
            for_good = status < 500 and status not in (408, 409, 429)
            advice = WHAT_TO_DO.get(status, WHAT_TO_DO[400]) if for_good else "try again later"
            return f"the server answered with status {status} ({said}); {advice}", for_good
        except APITimeoutError:
            return "no answer in time; try again later, or with a longer timeout", False
        except APIConnectionError as error:
            cause = self._without_key(str(error.__cause__ or error))
            return f"no connection, or it broke off ({cause}); check base_url and network", False
        self.ledger.keep(key, self._without_key(answer.content.decode("utf-8", "replace")))
        return "", False

    def _without_key(self, text: str) -> str:
        """`text` without the key, which a server may echo."""
        key = self.client.api_key
        return text if key == NO_KEY else text.replace(key, "[the key]")


@checked
def endpoint_judge(
    model: str,
    *,
    cache: Path | str,
    base_url: str | None = None,
    key: str | None = None,
    prompt: JudgePrompt = SIMPLE,
    concurrency: int = 8,
    price_per_million: Sequence[float] | None = None,
    max_cost: float | None = None,
    temperature: float | None = 0.0,
    max_tokens: int = 256,
    seed: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
    retries: int = 6,
    progress: bool = True,
) -> EndpointJudge:
    """A judge that asks a chat model behind an OpenAI-compatible endpoint, and keeps each answer.

    A question that was answered once is never asked again, by this run or another: answers are kept
    in `cache` by endpoint, model, question and parameters. Rate limits (with their Retry-After),
    server errors, timeouts and broken connections are tried again, with back-off. A reply that does
    not end as the prompt asks is counted in `Verdicts.missing`, never guessed; a truncated one is
    "malformed", and an item without any answer after all attempts "error".

    Args:
        model: its name at the endpoint.
        cache: the folder that keeps the answers.
        base_url: of the endpoint; OpenAI's by default.
        key: the name of the environment variable that holds the API key: OPENAI_API_KEY by default
            at OpenAI's own URL; at another URL no key is sent unless this names one.
        prompt: what is asked: `SIMPLE`, `CONCISE`, `DIALOGUE`, or a `JudgePrompt`.
        concurrency: calls under way at once, at most.
        price_per_million: (input, output), the price of a million tokens.
        max_cost: asks nothing where the estimate for the items of a call is above this.
        temperature: 0 by default; None leaves it to the endpoint.
        max_tokens: of a reply.
        seed: is sent if given; some endpoints sample by it.
        parameters: further ones of the request, as the endpoint names them; None leaves one out
            ({"max_tokens": None, "max_completion_tokens": 256} for models that want the latter).
        timeout: seconds without a byte before a call is given up. The endpoint may charge for it
            nevertheless, so keep it long.
        retries: further attempts after a failure.
        progress: whether to draw a progress bar.

    Raises:
        ImportError: the package openai is not installed.
        ValueError, TypeError: an argument is out of range, or the environment has no key.
    """
    numbers = {"concurrency": concurrency, "max_tokens": max_tokens, "retries": retries}
    for name, value in numbers.items():
        least = 0 if name == "retries" else 1
        if integer(name, value) < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    if not isinstance(prompt, JudgePrompt):
        raise TypeError(f"prompt is {prompt!r}; it must be a JudgePrompt, as SIMPLE is")
    for name, value in (
        ("model", model),
        ("base_url", OPENAI_URL if base_url is None else base_url),
    ):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is {value!r}; it must be a text that is not empty")

    # what decides the answer, beside the question
    sent = {"max_tokens": int(max_tokens)}
    if temperature is not None:
        sent["temperature"] = number("temperature", temperature)
    if seed is not None:
        sent["seed"] = integer("seed", seed)
    sent |= dict(parameters or {})
    sent = {name: value for name, value in sent.items() if value is not None}
    if reserved := {"model", "messages", "stream", "n"} & set(sent):
        raise ValueError(f"parameters has {sorted(reserved)}, which the judge itself decides")

    price = checked_price(price_per_million, max_cost)
    url = (base_url or OPENAI_URL).rstrip("/")
    client = _client(url, _key(url, key), finite_positive("timeout", timeout), int(retries))
    return EndpointJudge(
        model=model,
        base_url=url,
        prompt=prompt,
        parameters=sent,
        ledger=Ledger(folder("cache", cache)),
        client=client,
        concurrency=int(concurrency),
        max_tokens=int(max_tokens),
        price=price,
        max_cost=max_cost,
        progress=progress,
    )


def read_answer(prompt: JudgePrompt, body: str) -> tuple[str | None, str]:
    """The letter in a kept answer of the endpoint, or None, with "" or the reason for none."""
    try:
        choices = json.loads(body)["choices"]
        if not choices:
            return None, "empty"
        choice, message = choices[0], choices[0]["message"]
        reply, refused = message.get("content"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, "malformed"
    if refused or choice.get("finish_reason") == "content_filter":
        return None, "refusal"
    if reply is not None and not isinstance(reply, str):
        return None, "malformed"
    if choice.get("finish_reason") == "length":
        return None, "malformed" if reply and reply.strip() else "empty"
    return prompt.read(reply)


def _key(url: str, name: str | None) -> str:
    """The API key from the environment."""
    if name is None and url != OPENAI_URL:
        return NO_KEY
    name = name or OPENAI_KEY
    found = os.environ.get(name, "").strip()
    if not found:
        raise ValueError(
            f"the environment variable {name} is not set; it must hold the API key of {url}. Set "
            "it before Python starts, and write it into no notebook"
        )
    return found


def _client(url: str, key: str, timeout: float, retries: int) -> Any:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ImportError(
            "a judge behind an endpoint needs the package openai: pip install 'dpo-lab[judge]'"
        ) from error
    return OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)


def _said(body: Any) -> str:
    """What a server says about an error, on one line of at most 300 characters."""
    with suppress(AttributeError):
        body = body.get("message", body)
    return " ".join(str(body).split())[:300] or "without a message"
