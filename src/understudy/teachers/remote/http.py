"""A teacher behind an engine's HTTP interface: tokens go out, their log-probabilities come back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from torch import Tensor

from understudy.errors import RecipeError, ScoreError
from understudy.http import HttpClient, Refused, RetryPolicy, check_address, check_variable, read_key
from understudy.teachers.base import RunFacts, Setup, Source, Teacher, TeacherSection
from understudy.teachers.remote.prompt_scores import (
    VLLM,
    Completions,
    Format,
    SGLang,
    VLLMTokens,
    group_by_prompt,
    is_too_long,
    join_given,
    named,
    read_reply,
    refusal,
    spellings_of,
)
from understudy.teachers.remote.score_check import Answer, check, check_at, no_rows, unscored
from understudy.teachers.remote.server_info import look
from understudy.teachers.stores.cache import CACHE_FILE, CachedTeacher
from understudy.types import Need, Sample, Scores

Api = Literal["vllm", "sglang", "completions"]
DEFAULT_K_MAX = {"vllm": 20}
"""What a server gives unless told otherwise: vLLM's `--max-logprobs`; SGLang has no limit."""
ASKED_AGAIN = 2
"""Times that a sample whose scores are not finite is scored anew, after all others; a number that stays away comes from the
weights, and asking again does not change them."""
SPARE = 4
"""Tokens asked for beyond K, at least, once a row of K held one that the student lacks."""
_VERSIONS = {"vllm": "/version", "sglang": "/get_server_info"}
_UNKNOWN_FIELD = frozenset({400, 422})
_NO_ROUTE = frozenset({403, 404, 405})
"""Of a path that is not there, or that a server was not told to open."""


@dataclass(frozen=True, kw_only=True)
class Http(TeacherSection):
    """The section of a recipe for a teacher behind vLLM, SGLang or a completions server that echoes log-probabilities."""

    url: str | tuple[str, ...]
    """The base, such as http://host:8000 (a /v1 behind it is no matter), or those of several replicas of one server."""
    model: str
    """Its name at the server."""
    api: Api
    """How the server is asked: by vLLM's `prompt_logprobs` (of its route for token ids where `--enable-scale-out` opened it),
    SGLang's /generate, or `echo` of the first completions."""
    api_key_env: str = ""
    """The NAME of the environment variable with the key; empty: none is sent."""
    k_max: int | None = None
    """The most likeliest tokens that the server gives; None: vLLM's 20, which its `--max-logprobs` raises."""
    batch_tokens: int = 16_384
    """Of all samples in one request; vLLM's route for token ids takes one sample each, `max_concurrency` at a time."""
    tokenizer: str | None = None
    """The teacher's, a directory or hub name, which is compared with the student's; None: they are taken to be the same."""
    cache: str | None = None
    """A directory on a local disk, where scores are kept for the next run."""
    revision: str = ""
    """Whatever tells these weights from others of the same name; a cache keeps their scores apart."""
    timeout_s: float = 120.0
    """Of one attempt."""
    deadline_s: float = 600.0
    """Of one request with all its attempts and waits."""
    max_retries: int = 5
    """Of a request that timed out, lost its connection, met status 429 or 500 and above, or got a wrong reply."""
    backoff_s: float = 0.5
    """Before the first retry; doubled with each, up to a minute."""
    max_concurrency: int = 16
    """Requests in flight over all replicas."""

    def __post_init__(self) -> None:
        _ = self.retry_policy
        check_variable(self.api_key_env, "api_key_env")
        for key, value in (("batch_tokens", self.batch_tokens), ("k_max", self.k_max)):
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}; it must be at least 1")
        if not self.bases:
            raise ValueError("url is an empty list; give the address of the server")

    @property
    def gives(self) -> frozenset[Need]:
        """No top-K from a completions server: it names tokens by text, and several tokens may share one."""
        return frozenset({"none", "sampled"} if self.api == "completions" else {"none", "sampled", "topk"})

    @property
    def retry_policy(self) -> RetryPolicy:
        """Of all its requests."""
        return RetryPolicy.of(self)

    @property
    def urls(self) -> tuple[str, ...]:
        """As they stand in the recipe."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @property
    def bases(self) -> tuple[str, ...]:
        """What paths are added to, with their own /v1."""
        return tuple(url.rstrip("/").removesuffix("/v1") for url in self.urls)

    @property
    def vocabulary(self) -> Source | None:
        return None if self.tokenizer is None else Source(self.tokenizer)

    @property
    def shown(self) -> str:
        return f"{self.model} at {', '.join(self.urls)}"

    def check(self) -> str:
        """Raises RecipeError for an address or a model name that cannot be one; nothing is sent."""
        for url in self.urls:
            check_address(url, "teacher.url")
            if url.rstrip("/").endswith(("/completions", "/generate")):
                raise RecipeError(
                    f"teacher.url is {url!r}; give the base that paths are added to, such as http://host:8000"
                )
        if not self.model.strip():
            raise RecipeError("teacher.model is empty; give the model's name at the server (see its /v1/models)")
        return f"teacher: {self.shown}, not asked yet"

    def check_run(self, run: RunFacts) -> None:
        """Raises RecipeError for a temperature or a K that the server does not give."""
        self.check_temperature(run.temperature)
        self.check_k(run.k)

    def check_temperature(self, temperature: float) -> None:
        """Raises RecipeError for another than 1."""
        if temperature != 1.0:
            raise RecipeError(
                f"sampling.temperature is {temperature:g}, but {self.api} scores given tokens at temperature 1 whatever "
                "a request says, and both sides must be at one: set sampling.temperature: 1, or serve the teacher with "
                "`understudy serve-teacher`, which scores at any"
            )

    def check_k(self, k: int) -> None:
        """Raises RecipeError for more tokens of a row than the server gives."""
        limit = self.k_max or DEFAULT_K_MAX.get(self.api)
        if limit is not None and k > limit:
            raise RecipeError(
                f"the method asks for k = {k}, the teacher {self.shown} gives {limit}: start vLLM with --max-logprobs {k} and "
                f"set teacher.k_max: {k}, or lower method.k"
            )

    def open(self, setup: Setup) -> HttpTeacher | CachedTeacher:
        """Nothing is sent yet. Raises RecipeError as `check`, for a key that no header can carry, a cache that cannot be
        opened, and a temperature at which these servers give no scores."""
        self.check()
        read_key(self.api_key_env)
        self.check_temperature(setup.temperature)
        teacher = HttpTeacher(self, setup)
        return teacher if self.cache is None else CachedTeacher(teacher, Path(self.cache).expanduser() / CACHE_FILE)


class HttpTeacher(Teacher):
    """log T(y_t) and the K likeliest tokens by the server's softmax, over its whole head, at temperature 1.

    Each scored sequence needs one position more than it has tokens at vLLM (`--max-model-len`), which generates a token.
    """

    remote = True

    def __init__(self, section: Http, setup: Setup) -> None:
        self._section = section
        self.name, self.concurrency = setup.name, section.max_concurrency
        self._vocab_size = setup.vocab_size
        self.temperature: float = setup.temperature
        self._format = _format(section, setup.tokenizer)
        self._spare = 0
        self._finding = Lock()
        self._unsure = isinstance(self._format, VLLMTokens)
        self._client = HttpClient(
            section.bases,
            name=f"teacher {setup.name!r}",
            retry_policy=section.retry_policy,
            api_key_env=section.api_key_env,
            seed=setup.seed,
        )

    @property
    def fingerprint(self) -> str:
        """Hash of interface, model, revision, temperature and vocabulary size. The weights behind the name are unseen."""
        section = self._section
        facts = [section.api, section.model, section.revision, float(self.temperature), self._vocab_size]
        return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    @property
    def max_tokens(self) -> int | None:
        """The limit that the server tells. Raises EngineError as `info`."""
        limit: int | None = self.info()["max_length"]
        return limit

    def health(self) -> str:
        """What the server says of itself, in a line. Raises EngineError as `info`."""
        return ", ".join(f"{key} {value}" for key, value in self.info().items())

    def close(self) -> None:
        """Gives up what is in flight."""
        self._client.close()

    def stats(self) -> dict[str, Any]:
        """Requests, retries, failures and bytes."""
        return self._client.stats()

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """One for each sample, in order; `Unscored` where a number is not finite after all. Entropies are not given.

        Raises ScoreError for another need, for more tokens than the server gives and for a sample that is too long for it,
        ValueError for "topk" without k, EngineError where the server does not answer or not what was asked.
        """
        if need - self._section.gives:
            raise ScoreError(
                f"{self._who} cannot give {sorted(need - self._section.gives)}; behind "
                f"{self._section.api} it gives {sorted(self._section.gives)}"
            )
        if not need - {"none"}:
            return [Scores(sample.response_ids) for sample in samples]
        if "topk" in need and (k is None or k < 1):
            raise ValueError(f"need 'topk' asks for k of at least 1; k is {k}")
        kept = min(k, self._vocab_size) if k is not None and "topk" in need else None
        if kept is not None and kept > self._most:
            raise self._too_many(kept)
        answers = self._ask_until_scored(samples, kept)
        return [
            unscored(sample, kept, f"{self._who}: {answer.missing}") if answer.scores is None else answer.scores
            for sample, answer in zip(samples, answers, strict=True)
        ]

    def score_at(self, samples: Sequence[Sample], ids: Sequence[Tensor]) -> list[Scores]:
        """`log T` at given ids [R, K] of each sample, as `topk_ids` and `topk_logprob`, beside `logprob`.

        Raises ScoreError for a server that cannot be asked for given ids, else as `score`.
        """
        form = self._format
        if not isinstance(form, SGLang | VLLMTokens):
            raise self._no_given(f"the route {form.path} names none")
        for sample, rows in zip(samples, ids, strict=True):
            if rows.dim() != 2 or len(rows) != sample.num_response_tokens or not rows.shape[1]:
                raise ValueError(
                    f"sample {sample.key}: ids have shape {tuple(rows.shape)}, not ({len(sample.response_ids)}, K)"
                )
            if rows.shape[1] > self._most:
                raise self._too_many(rows.shape[1])
        pieces = [
            (index, *piece) for index, pair in enumerate(zip(samples, ids, strict=True)) for piece in form.cut(*pair)
        ]
        asked = [piece for _, piece, _ in pieces]

        def ask(group: list[int]) -> list[Answer]:
            part, rows = [asked[index] for index in group], [pieces[index][2] for index in group]
            try:
                return self._send(
                    form.path,
                    form.body_at(part, rows),
                    part,
                    form.parts,
                    lambda index, sample, said: check_at(sample, form.read_at(sample, said, rows[index]), rows[index]),
                )
            except Refused as refused:
                if isinstance(form, VLLMTokens) and (refused.status in _NO_ROUTE or form.given in refused.message):
                    raise self._no_given(str(refused)) from None
                raise

        found = self._spread(asked, range(len(asked)), ask)
        by_sample: list[list[Answer]] = [[] for _ in samples]
        for number, (index, _, _) in enumerate(pieces):
            by_sample[index].append(found[number])
        return [join_given(*item, who=self._who) for item in zip(samples, ids, by_sample, strict=True)]

    def info(self) -> dict[str, Any]:
        """`models` that every replica has, `max_length` in tokens and `version`, None where none is told.

        Raises EngineError for a replica that does not answer, and one that lacks the model.
        """
        return look(self._client, self._section.model, _VERSIONS.get(self._section.api))

    @property
    def _who(self) -> str:
        return f"teacher {self.name!r} ({self._section.shown})"

    @property
    def _most(self) -> float:
        """Tokens of a top-K row that the server gives."""
        limit = self._section.k_max or DEFAULT_K_MAX.get(self._section.api)
        return math.inf if limit is None else float(limit)

    def _too_many(self, k: int) -> ScoreError:
        return ScoreError(
            f"the method asks for k = {k}, teacher {self.name!r} gives {self._most:.0f}: start vLLM with "
            f"--max-logprobs {k} and set teacher.k_max to it, or lower method.k"
        )

    def _no_given(self, why: str) -> ScoreError:
        return ScoreError(
            f"{self._who} cannot be asked for the scores of given tokens ({why}): start vLLM 0.32 with --enable-scale-out "
            "(and its V2 model runner), or serve it with SGLang (teacher.api: sglang) or `understudy serve-teacher`"
        )

    def _ask_until_scored(self, samples: Sequence[Sample], k: int | None) -> list[Answer]:
        found = {index: Answer(no_rows(sample, k)) for index, sample in enumerate(samples)}
        waiting: Sequence[int] = range(len(samples))
        for _ in range(1 + ASKED_AGAIN):
            num_top = 0 if k is None else int(min(k + self._spare, self._most))
            found |= self._spread(samples, waiting, partial(self._ask, samples, k, num_top))
            waiting = [index for index in waiting if found[index].scores is None]
            short = max((found[index].short for index in waiting), default=0)
            if short and num_top >= self._most:
                raise ScoreError(
                    f"sample {samples[waiting[0]].key}: {short} of the {num_top} likeliest tokens of teacher {self.name!r} "
                    f"are past the student's {self._vocab_size} tokens, and the server gives no more: raise its "
                    "--max-logprobs and teacher.k_max with it, or lower method.k"
                )
            if short:
                self._spare += max(short, SPARE)
        return [found[index] for index in range(len(samples))]

    def _ask(self, samples: Sequence[Sample], k: int | None, num_top: int, group: list[int]) -> list[Answer]:
        """One request, a second one where a server does not know a field."""
        form, asked = self._format, [samples[index] for index in group]

        def judge(index: int, sample: Sample, said: Any) -> Answer:
            return check(sample, form.read(sample, said), k=k, num_top=num_top, vocab_size=self._vocab_size)

        try:
            return self._send(form.path, form.body(asked, num_top), asked, form.parts, judge)
        except Refused as refused:
            if not (isinstance(form, Completions) and form.as_ids and refused.status in _UNKNOWN_FIELD):
                raise
        # whether tokens come as ids or as text is told by the reply, so it is read as before
        plain = replace(form, as_ids=False)
        answers = self._send(plain.path, plain.body(asked, num_top), asked, form.parts, judge)
        self._format = plain
        return answers

    def _send(
        self,
        path: str,
        body: dict[str, Any],
        samples: Sequence[Sample],
        parts: Callable[[Any], list[Any]],
        judge: Callable[[int, Sample, Any], Answer],
    ) -> list[Answer]:
        return self._client.request(
            path, lambda reply: read_reply(reply, samples, parts, judge), key=named(samples), json=body
        )

    def _spread(
        self, samples: Sequence[Sample], chosen: Sequence[int], ask: Callable[[list[int]], list[Answer]]
    ) -> dict[int, Answer]:
        """Answers by index. Raises ScoreError, EngineError."""

        def run(group: list[int]) -> list[Answer]:
            try:
                return ask(group)
            except Refused as refused:
                raise self._refusal(refused, samples, group) from None

        found: dict[int, Answer] = {}
        with self._finding:
            if self._unsure:
                found = self._find_route(samples, chosen, ask)
        left = [index for index in chosen if index not in found]
        one_each = isinstance(self._format, VLLMTokens)
        groups = group_by_prompt(samples, left, max_tokens=1 if one_each else self._section.batch_tokens)
        for group, answers in zip(groups, self._client.each(groups, run), strict=True):
            found.update(zip(group, answers, strict=True))
        return found

    def _refusal(self, refused: Refused, samples: Sequence[Sample], group: list[int]) -> Exception:
        asked = [samples[index] for index in group]
        return refusal(refused, asked, who=self._who, api_key_env=self._section.api_key_env)

    def _find_route(
        self, samples: Sequence[Sample], chosen: Sequence[int], ask: Callable[[list[int]], list[Answer]]
    ) -> dict[int, Answer]:
        """The first sample's answer by vLLM's route for token ids; none where the server lacks it, and another is asked."""
        for first in group_by_prompt(samples, chosen, max_tokens=1)[:1]:
            try:
                answers = ask(first)
            except Refused as refused:
                if is_too_long(refused) or refused.status not in _NO_ROUTE | _UNKNOWN_FIELD:
                    raise self._refusal(refused, samples, first) from None
                self._format = VLLM(self._section.model)
                answers = []
            self._unsure = False
            return dict(zip(first, answers, strict=False))
        return {}


def _format(section: Http, tokenizer: Any) -> Format:
    if section.api == "completions":
        return Completions(section.model, None if tokenizer is None else spellings_of(tokenizer))
    return VLLMTokens(section.model) if section.api == "vllm" else SGLang()
