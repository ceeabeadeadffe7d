"""A judge at any OpenAI-compatible chat endpoint: it reads a response and answers with a digit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from understudy.errors import EngineError, RecipeError, check_range
from understudy.http.client import HttpClient, RetryOptions
from understudy.http.replies import BadReply, Refused, check_address, check_key, check_variable, read_key
from understudy.http.replies import Reply as HttpReply
from understudy.teachers.base import Judge, ScoreForm, Setup, hash_facts
from understudy.teachers.judges.wording import DIGITS, JudgeSection, Reply, as_text, read_digit, verdicts
from understudy.text import printable
from understudy.types import Prompt, Sample, Verdict

Constrain = Literal["auto", "guided_choice", "structured_outputs", "none"]
_CONSTRAINTS: dict[str, dict[str, Any]] = {
    "guided_choice": {"guided_choice": list(DIGITS)},
    "structured_outputs": {"structured_outputs": {"choice": list(DIGITS)}},
    "none": {},
}
"""vLLM dropped `guided_choice` for `structured_outputs` in 0.12 (docs.vllm.ai, "Structured Outputs"), and ignores a field that
it does not know, so a reply is read with the same care under a constraint."""
_UNKNOWN_FIELD = (400, 422)
"""Statuses that other servers give to an unknown field."""
_PATH = "/chat/completions"
TOP_LOGPROBS = 20
"""Largest number that OpenAI gives, and vLLM unless told otherwise; a digit that is not among them has no weight."""
REMINDER = "Say one digit from 0 to 9 and nothing else."
_OWN_KEYS = frozenset({"model", "messages", "stream", "n", "logprobs", "top_logprobs"})
_SHOWN_REPLY_CHARS = 60


@dataclass(frozen=True, kw_only=True)
class Chat(RetryOptions, JudgeSection):
    """The section of a recipe for a judge behind a chat endpoint."""

    writes_responses = True

    url: str
    """The base, such as http://host:8000/v1."""
    model: str
    """Its name at the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """The NAME of the environment variable with the key; this one may be unset, and then none is sent."""
    constrain: Constrain = "auto"
    """How the server is told to say a digit only. "auto": `structured_outputs`, and nothing if that is refused."""
    max_tokens: int = 8
    """Limit of a verdict; more for a model that thinks first."""
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the request names its limit of tokens; newer models of OpenAI take the second only."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Added to every request, such as `chat_template_kwargs: {enable_thinking: false}`; null takes a key out."""
    max_parse_retries: int = 2
    """Retries after a reply without a readable digit; then the sample is unscored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.retry_policy
        check_variable(self.api_key_env, "api_key_env")
        check_range(self, 1, "max_tokens")
        check_range(self, 0, "max_parse_retries")
        if taken := sorted(_OWN_KEYS & self.extra_body.keys()):
            raise ValueError(f"extra_body sets {', '.join(taken)}, which this section sets itself")

    @property
    def shown(self) -> str:
        return f"{self.model} at {self.url}"

    def check(self) -> str:
        """Raises RecipeError for a URL or model name that cannot be one, and a key that is not there; nothing is sent."""
        check_address(self.url, "teacher.url", "http://host:8000/v1")
        check_key(self.api_key_env, optional="OPENAI_API_KEY")
        if self.url.rstrip("/").endswith("/completions"):
            raise RecipeError(
                f"teacher.url is {self.url!r}; give the base that {_PATH} is added to, such as http://host:8000/v1"
            )
        if not self.model.strip():
            raise RecipeError("teacher.model is empty; give the model's name at the server (see its /v1/models)")
        return f"teacher: {self.shown}, not asked yet"

    def open(self, setup: Setup) -> ChatTeacher:
        """Opens the judge; nothing is sent yet. Raises RecipeError as `check`, and for a key that a header cannot carry."""
        self.check()
        _ = read_key(self.api_key_env)
        return ChatTeacher(self, name=setup.name, seed=setup.seed)


def _sent(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the interface takes it, which has the arguments of a call as a string."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}


class ChatTeacher(Judge):
    """A chat model as a judge that says one digit, at temperature 0, and as a writer of responses.

    "argmax" is the digit that it says. "expectation" is `sum_d d p(d)` over the digits among the `TOP_LOGPROBS` tokens
    that the server names where it says a digit, renormalised. Questions are sent concurrently; results are in the order of
    the samples. How the server encodes a response that spells special tokens is up to the server.
    """

    remote = True

    def __init__(self, section: Chat, *, name: str, seed: int = 0) -> None:
        self._section = section
        self.name = name
        self._constrain: Constrain = section.constrain
        policy, env = section.retry_policy, section.api_key_env
        self._client = HttpClient([section.url], name="teacher", retry_policy=policy, api_key_env=env, seed=seed)

    @property
    def fingerprint(self) -> str:
        """Hash of URL, model and all that a request holds beside its question. The weights behind it are unseen."""
        section, words = self._section, self._section.wording
        how = [section.constrain, section.max_tokens, section.max_parse_retries, dict(section.extra_body)]
        return hash_facts([section.url, section.model, words.whole, words.step, words.separator, how])

    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """Returns a verdict on each sample, in order; no score without a digit, and for a question too long for the model.

        Raises EngineError if the server refuses or does not answer, RecipeError for "expectation" at a server that gives no
        probabilities.
        """
        asked = [self._section.wording.questions(sample, steps=steps) for sample in samples]
        named = [
            (f"{sample.key}/{number}", as_text(question))
            for sample, questions in zip(samples, asked, strict=True)
            for number, question in enumerate(questions)
        ]
        # the first question shows whether a constraint is understood, so it is sent before the others
        first = named[:1] if self._constrain == "auto" else []
        replies: list[Reply] = []
        for part in (first, named[len(first) :]):
            replies += self._client.each(part, lambda item: self._ask(*item, score))
        starts = [self._section.wording.starts(sample, steps=steps) for sample in samples]
        return verdicts(replies, starts, score=score, steps=steps)

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """Returns the model's own response to each prompt, in order; None for an empty one, one that was cut off, and a
        prompt that is too long. Raises EngineError as `judge`."""

        def write(prompt: Prompt) -> str | None:
            messages = [
                _sent(message) for message in prompt.messages or ({"role": "user", "content": prompt.text or ""},)
            ]
            body = self._body(messages, max_new_tokens, temperature)
            if prompt.tools:
                body["tools"] = [dict(tool) for tool in prompt.tools]
            choice = self._complete(body, prompt.id)
            if isinstance(choice, Refused) or choice.get("finish_reason") == "length":
                return None
            return choice["message"].get("content") or None

        return self._client.each(prompts, write)

    def close(self) -> None:
        """Cancels requests in flight, and answers no more."""
        self._client.close()

    def _ask(self, key: str, question: str, score: ScoreForm) -> Reply:
        messages = [{"role": "user", "content": question}]
        said = ""
        attempts = 1 + self._section.max_parse_retries
        for attempt in range(attempts):
            body = self._body(messages, self._section.max_tokens)
            if score == "expectation":
                body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            choice = self._complete(body, f"{key}/{attempt}", self._constrain)
            if isinstance(choice, Refused):
                return Reply(None, attempt, f"the server refuses the question as too long: {choice.message}")
            said = choice["message"].get("content") or ""
            value = read_digit(said)
            number = value if value is None or score == "argmax" else self._expectation(choice, value)
            if number is not None:
                return Reply(float(number), attempt + 1)
            if said.strip():
                spoken = [{"role": "assistant", "content": said}, {"role": "user", "content": REMINDER}]
                messages = [messages[0], *spoken]
        shown = printable(said)[:_SHOWN_REPLY_CHARS]
        return Reply(None, attempts, f"no digit in {attempts} replies, the last of which begins {shown!r}")

    def _body(self, messages: list[dict[str, str]], max_tokens: int, temperature: float = 0.0) -> dict[str, Any]:
        section = self._section
        body = {"model": section.model, "messages": messages, "temperature": temperature, section.limit_key: max_tokens}
        return {key: value for key, value in (body | dict(section.extra_body)).items() if value is not None}

    def _complete(self, body: dict[str, Any], key: str, constrain: Constrain = "none") -> dict[str, Any] | Refused:
        """The first choice of a chat completion, or the refusal of a prompt that is too long. Raises EngineError."""
        tried = "structured_outputs" if constrain == "auto" else constrain
        try:
            choice = self._client.request(_PATH, _read_choice, json=body | _CONSTRAINTS[tried], key=key)
        except Refused as refused:
            if refused.too_long:
                return refused
            if constrain == "auto" and refused.status in _UNKNOWN_FIELD:
                plain = self._complete(body, key)
                self._constrain = "none"
                return plain
            raise self._error(refused) from None
        if constrain == "auto":
            self._constrain = "structured_outputs"
        return choice

    def _expectation(self, choice: dict[str, Any], said: int) -> float | None:
        """Returns the mean digit at the token that says `said`; None if no token is that digit."""
        tokens = (choice.get("logprobs") or {}).get("content") or ()
        place = next((token for token in tokens if token["token"].strip() == str(said)), None)
        if tokens and place is None:
            return None
        if place is None or not place.get("top_logprobs"):
            raise RecipeError(
                f"{self._section.shown} gives no top_logprobs, and the score `expectation` is made of them: set method.score "
                "to argmax, or use a server that gives them"
            )
        named = {entry["token"]: entry["logprob"] for entry in (place, *place["top_logprobs"])}
        weights = [math.fsum(math.exp(v) for token, v in named.items() if token.strip() == digit) for digit in DIGITS]
        total = math.fsum(weights)
        return math.fsum(d * weight for d, weight in enumerate(weights)) / total if total > 0 else None

    def _error(self, refused: Refused) -> EngineError:
        """Returns the error for a status that a retry does not change, with what to do."""
        env = self._section.api_key_env
        given, unset = bool(read_key(env)), f"set {env or 'api_key_env'} to a key"
        hints = {
            401: f"the key in {env} is not accepted" if given else unset,
            403: f"the key in {env} may not use this model" if given else unset,
            404: "check teacher.url (it mostly ends in /v1) and that the server has that model",
        }
        hint = hints.get(refused.status, "check teacher.constrain, teacher.limit_key and teacher.extra_body")
        return EngineError(f"{self._section.url.rstrip('/')}{_PATH} refuses with {refused}; {hint}")


def _read_choice(reply: HttpReply) -> dict[str, Any]:
    try:
        choice = reply.json()["choices"][0]
        content = choice["message"].get("content")
    except (LookupError, TypeError, AttributeError):
        choice, content = None, None
    if not isinstance(choice, dict) or not (content is None or isinstance(content, str)):
        raise BadReply(f"a reply that is not a chat completion: {reply.text}")
    return choice
