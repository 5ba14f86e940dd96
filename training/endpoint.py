"""A client of an OpenAI-compatible chat endpoint: bounded rate, retries with back-off, every token counted.

Retryable: 429 (its Retry-After is obeyed), 5xx, time-outs, broken connections, bodies that are no answer. Everything else is
final. The key is read from the environment variable that is named, never from a file of ours.
"""

import os
import re
import time
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import httpx

from training.errors import TrainingError

RETRYABLE_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
CHARACTERS_PER_TOKEN = 4.0
"""Rule of thumb for prices before a run; the run itself counts what the endpoint reports."""


RETRY_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


class EndpointError(TrainingError, RuntimeError):
    """The endpoint refused for good, or kept failing; the message says what it answered last."""


@dataclass(frozen=True)
class Completion:
    """One answer and what it cost in tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    whole: bool = True  # False when the endpoint says that it stopped at the limit of tokens


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens; the default is GPT-4o mini's list price of 2024."""

    input_per_million: float = 0.15
    output_per_million: float = 0.60

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars.

        >>> round(Price().cost(1_000_000, 1_000_000), 2)
        0.75
        """
        return (prompt_tokens * self.input_per_million + completion_tokens * self.output_per_million) / 1e6


@dataclass
class Endpoint:
    """Chat completions at `base_url` (".../v1"); `requests_per_second` bounds the rate over all threads."""

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 60.0
    attempts: int = 6
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0
    requests_per_second: float = 5.0
    max_tokens: int = 2048
    _client: httpx.Client = field(default_factory=httpx.Client, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)
    _free_at: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        """ValueError for a rate that would never ask."""
        if not self.requests_per_second > 0:
            raise ValueError(f"{self.requests_per_second} requests a second are none: give a rate above 0")

    def complete(self, prompt: str, system: str | None = None, temperature: float = 0.0) -> Completion:
        """The answer to one prompt; EndpointError when it cannot be had."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": self.max_tokens}
        last = "no attempt was made"
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self._wait(attempt))
            self._take_turn()
            try:
                response = self._client.post(
                    f"{self.base_url.rstrip('/')}/chat/completions",
                    json=body,
                    headers=self._headers(),
                    timeout=self.timeout_seconds,
                )
            except (httpx.TransportError, httpx.DecodingError) as error:
                last = f"{type(error).__name__}"
                continue
            if response.status_code in RETRYABLE_STATUS:
                last = f"HTTP {response.status_code}"
                self._obey(response)
                continue
            if response.is_error:
                raise EndpointError(f"the endpoint answered HTTP {response.status_code}: {response.text[:200]}")
            answer = parse_completion(response)
            if answer is not None:
                return answer
            last = "a body that is no chat completion"
        raise EndpointError(f"the endpoint failed {self.attempts} times, last with {last}")

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable)
        return {} if not key else {"Authorization": f"Bearer {key}"}

    def _wait(self, attempt: int) -> float:
        return min(self.max_backoff_seconds, self.backoff_seconds * 2 ** (attempt - 1))

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._free_at)
            self._free_at = turn + 1 / self.requests_per_second
        time.sleep(max(0.0, turn - now))

    def _obey(self, response: httpx.Response) -> None:
        asked = response.headers.get("retry-after", "")
        if RETRY_SECONDS.fullmatch(asked):
            time.sleep(min(float(asked), self.max_backoff_seconds))


def parse_completion(response: httpx.Response) -> Completion | None:
    """The answer in a response body, or None when it is not one (cut JSON, no choices, text of another type)."""
    try:
        body: Any = response.json()
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(text, str):
        return None
    usage = body.get("usage")
    tokens = _counted(usage, "prompt_tokens"), _counted(usage, "completion_tokens")
    return Completion(text, *tokens, whole=finish != "length")


def _counted(usage: Any, name: str) -> int:
    """A count of tokens; 0 where the endpoint counts none, as local servers may, or tells no number."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and count > 0 else 0


def estimate_tokens(text: str) -> int:
    """Tokens of a text before an endpoint has counted them.

    >>> estimate_tokens("abcdefgh")
    2
    """
    return int(len(text) / CHARACTERS_PER_TOKEN + 0.5)
