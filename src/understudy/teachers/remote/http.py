"""A teacher behind an inference server's HTTP interface: tokens go out, their log-probabilities come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from json import loads
from threading import Lock
from typing import Any, ClassVar

from understudy.errors import DataError, EngineError, RecipeError, ScoreError, check_range, nearest
from understudy.http.client import HttpClient
from understudy.http.replies import BadReply, Refused, Reply, check_key, check_variable, read_key
from understudy.linear.kept import NUM_LIKELIEST
from understudy.packing import Unscored, by_prompt
from understudy.teachers.base import ExtraIds, RunFacts, Setup, Teacher
from understudy.teachers.grouping import chunks
from understudy.teachers.remote.base import RemoteSection, RemoteTeacher, named
from understudy.teachers.remote.formats import FORMATS
from understudy.teachers.remote.score_check import Answer, check, empty_scores
from understudy.types import Need, Sample, Scores

MAX_SAMPLES = 512
"""Samples in one request; vLLM takes 1,024 prompts (`VLLM_MAX_COMPLETION_PROMPTS`)."""
ASKED_AGAIN = 2
"""Times that a sample whose scores are not finite is scored again, after all others. A number that stays away comes from
the weights, so retrying longer does not help."""
SPARE = 4
"""Tokens asked for beyond K, at least, after a row of K held one that the student lacks."""
_SHAPE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""Errors of reading a reply of another shape; torch reports a number that is too large as a RuntimeError."""


@dataclass(frozen=True, kw_only=True)
class Http(RemoteSection):
    """The section of a recipe for a teacher behind vLLM, SGLang or a completions server that echoes log-probabilities.

    Its softmax is the server's, over all the tokens that the teacher has.
    """

    extra_ids: ClassVar[ExtraIds] = "tail"  # type: ignore[misc]
    model: str
    """Its name at the server."""
    api: str
    """The server's wire format, a key of `formats.FORMATS`."""
    api_key_env: str = ""
    """The NAME of the environment variable with the API key; empty: none is sent."""
    k_max: int | None = None
    """Largest top-k the server returns; None: vLLM's 20, which its `--max-logprobs` raises."""
    revision: str = ""
    """Any word that tells these weights from others of the same name; a cache keeps their scores apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variable(self.api_key_env, "api_key_env")
        if self.api not in FORMATS:
            raise ValueError(f"api is {self.api!r}; {nearest(self.api, FORMATS)}")
        check_range(self, 1, "k_max", off="null: vLLM's 20")
        for url in self.urls:
            if url.rstrip("/").endswith(("/completions", "/generate")):
                raise RecipeError(
                    f"teacher.url is {url!r}; give the base that paths are added to, such as http://host:8000"
                )
        if not self.model.strip():
            raise RecipeError("teacher.model is empty; give the model's name at the server (see its /v1/models)")

    @property
    def gives(self) -> frozenset[Need]:
        """Needs that the server's format can meet."""
        return FORMATS[self.api].gives

    @property
    def bases(self) -> tuple[str, ...]:
        """The URLs without /v1, which is part of the paths."""
        return tuple(url.rstrip("/").removesuffix("/v1") for url in self.urls)

    @property
    def shown(self) -> str:
        return f"{self.model} at {', '.join(self.urls)}"

    @property
    def largest_k(self) -> float:
        """Largest top-k the server returns, `math.inf` for no limit."""
        return self.k_max or FORMATS[self.api].default_k_max or math.inf

    def check_run(self, run: RunFacts) -> None:
        """Raises RecipeError for a temperature or a K that the server does not give, and as `check_rendering`."""
        super().check_run(run)
        self.check_temperature(run.temperature)
        self.check_k(run.k)

    def check(self) -> str:
        """Raises RecipeError for a key that is not there."""
        check_key(self.api_key_env)
        return super().check()

    def check_temperature(self, temperature: float) -> None:
        """Raises RecipeError for another temperature than 1."""
        if temperature != 1.0:
            raise RecipeError(
                f"sampling.temperature is {temperature:g}, but {self.api} scores given tokens at temperature 1 whatever "
                "a request says, and both sides must be at one: set sampling.temperature: 1, or serve the teacher with "
                "`understudy serve-teacher`, which scores at any"
            )

    def check_k(self, k: int) -> None:
        """Raises RecipeError for a larger top-k than the server returns."""
        if k > self.largest_k:
            raise RecipeError(
                f"the method asks for k = {k}, the teacher {self.shown} gives {self.largest_k}: start vLLM with "
                f"--max-logprobs {k} and set teacher.k_max: {k}, or lower method.k"
            )

    def open(self, setup: Setup) -> Teacher:
        """Opens the teacher; nothing is sent yet. Raises RecipeError as `check_temperature`, for a key that a header cannot
        carry, and for a cache that cannot be opened."""
        read_key(self.api_key_env)
        self.check_temperature(setup.temperature)
        return self.cached(HttpTeacher(self, setup))


class HttpTeacher(RemoteTeacher):
    """log T(y_t) and the K likeliest tokens by the server's softmax over its whole head, at temperature 1.

    vLLM generates a token with each request, so a sample needs one position more than it has tokens (`--max-model-len`).
    """

    def __init__(self, section: Http, setup: Setup) -> None:
        client = HttpClient(
            section.bases,
            name=f"teacher {setup.name!r}",
            retry_policy=section.retry_policy,
            api_key_env=section.api_key_env,
            seed=setup.seed,
        )
        who = f"teacher {setup.name!r} ({section.api} api: {section.shown})"
        # the weights behind the name are unseen
        super().__init__(section, setup, client, who, section.api, section.model, section.revision)
        self._section: Http = section
        self._format = FORMATS[section.api](section.model, setup.tokenizer)
        self._format_known = False
        """Whether the server has answered in `_format`, or its fallback was chosen."""
        self._format_lock = Lock()
        self._spare = 0
        """Tokens asked for beyond K, because ids past the student's vocabulary take places in a row."""

    @property
    def max_tokens(self) -> int | None:
        """The limit that the server tells. Raises EngineError as `info`."""
        limit: int | None = self.info()["max_length"]
        return limit

    def health(self) -> str:
        """Returns what the server tells about itself, in a line. Raises EngineError as `info`."""
        return ", ".join(f"{key} {value}" for key, value in self.info().items())

    def _score(self, samples: Sequence[Sample], need: frozenset[Need], k: int | None) -> list[Scores]:
        """Asks again for samples whose scores are not finite, and for more tokens where some are not the student's."""
        try:
            self._section.check_k(k or 0)
        except RecipeError as error:
            raise ScoreError(str(error)) from None
        limit = self._section.largest_k
        found = {index: Answer(empty_scores(sample, k)) for index, sample in enumerate(samples)}
        waiting: Sequence[int] = range(len(samples))
        for _ in range(1 + ASKED_AGAIN):
            num_top = 0 if k is None else int(min(k + self._spare, limit))
            found |= self._ask_all(samples, waiting, k, num_top)
            waiting = [index for index in waiting if found[index].scores is None]
            short = max((found[index].short for index in waiting), default=0)
            if short and num_top >= limit:
                raise ScoreError(
                    f"sample {samples[waiting[0]].key}: {short} of the {num_top} likeliest tokens of teacher {self.name!r} "
                    f"are past the student's {self._setup.vocab_size} tokens, and the server gives no more: raise its "
                    "--max-logprobs and teacher.k_max with it, or lower method.k"
                )
            if short:
                self._spare += max(short, SPARE)
        return [
            answer.scores or Unscored(**vars(empty_scores(sample, k)), reason=f"{self._who}: {answer.missing}")
            for sample, answer in zip(samples, found.values(), strict=True)
        ]

    def info(self) -> dict[str, Any]:
        """Returns `models` that every replica has, `max_length` in tokens and `version`, None if the server does not tell.

        Raises EngineError for a replica that does not answer, and one that lacks the model.
        """
        model, path = self._section.model, self._format.version_path

        def read_models(reply: Reply) -> dict[str, int | None]:
            try:
                return {card["id"]: card.get("max_model_len") for card in reply.json()["data"]}
            except (LookupError, TypeError, AttributeError):
                raise BadReply("/v1/models lists no models") from None

        lengths: list[dict[str, int | None]] = []
        versions: set[str] = set()
        for number, url in enumerate(self._client.urls):
            get = partial(self._client.request, method="GET", replica=number)
            try:
                lengths.append(get("/v1/models", read_models, key="/v1/models"))
            except Refused as refused:
                hint = "check teacher.url and teacher.api_key_env"
                raise EngineError(f"{url} refuses /v1/models with {refused}; {hint}") from None
            if model not in lengths[-1]:
                raise EngineError(f"{url} has no model {model!r}; it has: {', '.join(map(str, lengths[-1])) or 'none'}")
            if path is not None:
                with suppress(Refused, ValueError, LookupError, TypeError, RecursionError):
                    versions.add(get(path, lambda reply: str(loads(reply.content)["version"]), key=path))
        return {
            "models": [name for name in lengths[0] if all(name in others for others in lengths)],
            "max_length": min((length for known in lengths if (length := known[model]) is not None), default=None),
            "version": ", ".join(sorted(versions)) or None,
        }

    def _ask_all(
        self, samples: Sequence[Sample], chosen: Sequence[int], k: int | None, num_top: int
    ) -> dict[int, Answer]:
        """Answers by index, requests side by side. Raises ScoreError, EngineError.

        The first request of all goes out alone: it shows whether the server knows the route and its fields.
        """

        def groups(indices: Sequence[int]) -> list[list[int]]:
            max_tokens = 1 if self._format.single else self._section.batch_tokens
            return group_by_prompt(samples, indices, max_tokens=max_tokens)

        limit = self._section.largest_k

        def ask(group: list[int]) -> list[Answer]:
            asked = [samples[index] for index in group]
            shown = "topk" in self._format.gives and any(sample.keep_tokens for sample in asked)
            try:
                return self._send(asked, k, max(num_top, int(min(NUM_LIKELIEST, limit)) if shown else 0))
            except Refused as refused:
                fallback = None if self._format_known or refused.too_long else self._format.fallback(refused)
                if fallback is None:
                    raise self._refusal(refused, asked) from None
                self._format = fallback
                return []

        found: dict[int, Answer] = {}
        with self._format_lock:
            rest = groups(chosen)
            if rest and not self._format_known:
                # no answers where the server turned out to need the fallback
                found = dict(zip(rest[0], ask(rest[0]), strict=False))
                self._format_known = True
                rest = groups([index for index in chosen if index not in found])
        for group, answers in zip(rest, self._client.each(rest, ask), strict=True):
            found.update(zip(group, answers, strict=True))
        return found

    def _send(self, asked: Sequence[Sample], k: int | None, num_top: int) -> list[Answer]:
        """One request. `num_top`: how many of the likeliest tokens it asks for, at least `k`; more for those that people look
        at."""
        form = self._format

        def read(reply: Reply) -> list[Answer]:
            who, answers = reply.url, []
            known = {name: getattr(self._setup, name) for name in ("vocab_size", "absent", "teacher_size")}
            try:
                parts = form.parts(reply.json())
                if len(parts) != len(asked):
                    raise BadReply(f"{len(parts)} samples came back for {len(asked)}")
                for sample, part in zip(asked, parts, strict=True):
                    who = f"{reply.url}, sample {sample.key}"
                    raw = form.read(sample, part)
                    answers.append(check(sample, raw, k=k, num_top=num_top, **known))
                return answers
            except BadReply as error:
                raise BadReply(f"{who}: {error}") from None
            except _SHAPE_ERRORS as error:
                raise BadReply(f"{who}: a reply of another shape ({type(error).__name__} {error})") from None

        return self._client.request(form.path, read, key=named(asked), json=form.body(asked, num_top))

    def _refusal(self, refused: Refused, samples: Sequence[Sample]) -> ScoreError | EngineError:
        """The error, with what to do, for a status that a retry does not change."""
        longest = max(samples, key=lambda sample: sample.token_ids.numel())
        if refused.too_long:
            return ScoreError(
                f"sample {longest.key} has {longest.token_ids.numel()} tokens, which {self._who} refuses as too long "
                f"({refused.message}): raise its --max-model-len (one more than the longest sample), or lower max_new_tokens"
            )
        env = self._section.api_key_env
        hint = "check teacher.api, teacher.k_max, and that the ids are those of its tokenizer"
        if refused.status in (401, 403):
            hint = f"the key in {env} is not accepted" if env else "set teacher.api_key_env"
        elif refused.status == 404:
            hint = "check teacher.url, teacher.api, and that the server has that model (see its /v1/models)"
        return EngineError(f"{self._who} refuses {named(samples)} with {refused}; {hint}")


def group_by_prompt(samples: Sequence[Sample], chosen: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices for each request, samples of one prompt side by side; at most `max_tokens` tokens or one sample.

    A response without a token is left out. Raises DataError for a sample without a prompt token.
    """
    for index in chosen:
        if samples[index].prompt_length < 1:
            key = samples[index].key
            raise DataError(f"sample {key} has no prompt token, so nothing predicts its first response token")
    kept = [index for index in chosen if samples[index].num_response_tokens]
    grouped = [kept[place] for same in by_prompt([samples[index] for index in kept]) for place in same]
    return chunks(grouped, lambda index: samples[index].token_ids.numel(), max_tokens, MAX_SAMPLES)
