"""A chat endpoint of the OpenAI kind: requests go out side by side, and what may pass is tried again.

The key is read from the environment for each round of requests; no object here holds it, and it is cut from what a server
says.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

import httpx

from understudy.errors import RecipeError, TrainingError
from understudy.randomness import keyed_uniform
from understudy.text import HIDDEN, visible

UNKNOWN_FIELD = (400, 422)
"""What servers say to a field of a request that they do not know; vLLM says nothing."""
_PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may be others a moment later."""
MAX_BACKOFF_S = 60.0
_TOO_LONG = re.compile(r"context.?length|maximum context|too long|too many tokens", re.IGNORECASE)
_SHOWN_CHARS = 300

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Refused(Exception):  # noqa: N818 (caught where it is known what was asked)
    """A status that no retry will change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"status {status}: {message}")
        self.status = status
        self.message = message

    @property
    def too_long(self) -> bool:
        """Whether the question does not fit the model."""
        return self.status in (*UNKNOWN_FIELD, 413) and bool(_TOO_LONG.search(self.message))


class _Stopped(Exception):  # noqa: N818 (never leaves this module)
    """Another request has failed, so this one is given up."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An address, and how patiently it is asked."""

    base: str
    api_key_env: str
    timeout_s: float
    max_retries: int
    backoff_s: float
    max_concurrency: int
    seed: int = 0

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base.rstrip("/") + "/chat/completions"

    def each(self, items: Sequence[_Item], ask: Callable[[Line, _Item], _Result]) -> list[_Result]:
        """Results in the order of the items; the first error stops the rest."""
        if not items:
            return []
        key = read_key(self.api_key_env)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        workers = min(self.max_concurrency, len(items))
        limits = httpx.Limits(max_connections=workers)
        with (
            httpx.Client(headers=headers, timeout=self.timeout_s, limits=limits) as client,
            ThreadPoolExecutor(workers) as pool,
        ):
            line = Line(self, client, Event())

            def run(item: _Item) -> _Result:
                if line.stop.is_set():
                    raise _Stopped
                try:
                    return ask(line, item)
                except BaseException:
                    line.stop.set()
                    raise

            try:
                futures = [pool.submit(run, item) for item in items]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                errors = [future.exception() for future in futures if future in done]
                for error in errors:
                    if error is not None and not isinstance(error, _Stopped):
                        raise error
                return [future.result() for future in futures]
            finally:
                line.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def safe(self, text: str) -> str:
        """What a server said, without the key and what a terminal would obey."""
        key = read_key(self.api_key_env)
        shown = visible(text)
        return shown.replace(key, HIDDEN) if key else shown

    def error(self, refused: Refused) -> TrainingError:
        """What to do about a status."""
        env = self.api_key_env
        key_set = bool(read_key(env))
        hints = {
            401: f"the key in {env} is not accepted" if key_set else f"set {env or 'api_key_env'} to a key",
            403: f"the key in {env} may not use this model" if key_set else f"set {env or 'api_key_env'} to a key",
            404: "check teacher.url (it mostly ends in /v1) and that the server has that model",
        }
        hint = hints.get(refused.status, "check teacher.constrain, teacher.limit_key and teacher.extra_body")
        return TrainingError(f"{self.url} refuses with {refused}; {hint}")


@dataclass(frozen=True)
class Line:
    """An open connection to an endpoint, shared by threads."""

    endpoint: Endpoint
    client: httpx.Client
    stop: Event

    def send(self, body: dict[str, Any], key: str) -> dict[str, Any]:
        """The first choice of the reply. `key` names the request: its waiting times are drawn from it.

        Raises Refused for a status that stays, TrainingError when all retries are spent.
        """
        endpoint = self.endpoint
        content = json.dumps(body).encode("ascii")
        problem, least_s = "", 0.0
        for attempt in range(endpoint.max_retries + 1):
            if attempt and self.stop.wait(max(least_s, self._backoff_s(key, attempt))):
                raise _Stopped
            try:
                response = self.client.post(endpoint.url, content=content)
            except httpx.RequestError as error:
                problem, least_s = self._clip(f"{type(error).__name__} {error}"), 0.0
                continue
            status = response.status_code
            if status == httpx.codes.OK:
                choice = _first_choice(response)
                if choice is not None:
                    return choice
                problem, least_s = f"a reply that is no chat completion: {self._clip(response.text)}", 0.0
                continue
            message = self._clip(_message(response))
            if status < httpx.codes.INTERNAL_SERVER_ERROR and status not in _PASSING:
                raise Refused(status, message)
            problem, least_s = f"status {status}: {message}", _asked_to_wait_s(response)
        raise TrainingError(
            f"{endpoint.url} gave no answer in {endpoint.max_retries + 1} attempts, the last time {problem}; check that "
            "the server is up, lower teacher.max_concurrency, or raise teacher.timeout_s or teacher.max_retries"
        )

    def _backoff_s(self, key: str, attempt: int) -> float:
        """Between half of and the whole of `backoff_s * 2^(attempt - 1)`, so that many requests do not return at once."""
        uniform = float(keyed_uniform(self.endpoint.seed, "retry", attempt, [key], 1))
        full: float = self.endpoint.backoff_s * 2.0 ** (attempt - 1)
        return min(MAX_BACKOFF_S, full) * (0.5 + uniform / 2)

    def _clip(self, text: str) -> str:
        return " ".join(self.endpoint.safe(text).split())[:_SHOWN_CHARS]


def read_key(variable: str) -> str:
    """The key in a variable, empty where it is not set. Raises RecipeError, without it, for one that no header can carry."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key


def _first_choice(response: httpx.Response) -> dict[str, Any] | None:
    """None where the body is no chat completion."""
    try:
        choice = response.json()["choices"][0]
        content = choice["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return choice if content is None or isinstance(content, str) else None


def _message(response: httpx.Response) -> str:
    """`error.message` where the body has one, else the body."""
    try:
        values = response.json()
        error = values.get("error", values)
        found = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError):
        found = None
    return found if isinstance(found, str) else response.text or response.reason_phrase


def _asked_to_wait_s(response: httpx.Response) -> float:
    """Seconds of the header Retry-After, at most `MAX_BACKOFF_S`; 0 for none and for a date."""
    try:
        asked = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return min(MAX_BACKOFF_S, asked) if asked > 0 else 0.0
