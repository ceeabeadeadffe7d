"""A teacher behind `understudy serve-teacher`: hidden states and the head once, so that whole rows cost H numbers a token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from understudy.errors import EngineError, RecipeError, ScoreError, VocabularyError
from understudy.http import BadReply, HttpClient, Refused, Reply, RetryPolicy, check_address, check_variable, read_key
from understudy.linear.head import LMHead
from understudy.packing import Unscored
from understudy.teachers.base import Setup, Source, Teacher, TeacherSection
from understudy.teachers.remote.frames import ABOUT, HEAD, SCORE, TEMPERATURES, About, Answer, FrameError, read_head
from understudy.teachers.remote.served_batches import Questions
from understudy.teachers.stores.cache import CACHE_FILE, CachedTeacher
from understudy.teachers.stores.recording import tokenizer_digest
from understudy.types import Need, Sample, Scores

CAN: frozenset[Need] = frozenset({"none", "sampled", "topk", "full"})
OPENING_S = 30.0
"""How long a replica may take to say what it is."""
ABOUT_BYTES = 2**20
"""Of what it says."""
_HEADER_BYTES = 64 * 1024
"""Of a reply beside its tensors."""
NOT_FINITE_TRIES = 2
"""How often a score that is no number is asked for again before its sample goes without."""
_HINTS = {
    400: "are client and server of the same version?",
    401: "set teacher.token_env to the NAME of an environment variable with the server's token",
    404: "teacher.url is no `understudy serve-teacher`",
    413: "lower teacher.batch_tokens, or raise --max-request-bytes or --max-reply-bytes of the server",
}


@dataclass(frozen=True, kw_only=True)
class Served(TeacherSection):
    """The section of a recipe for a teacher that `understudy serve-teacher` serves."""

    url: str | tuple[str, ...]
    """Where it prints that it answers; several are replicas of one teacher."""
    token_env: str = ""
    """The NAME of the environment variable with its token."""
    batch_tokens: int = 16_384
    """Of one request."""
    cache: str | None = None
    """A directory that keeps scores; a rerun asks for nothing twice."""
    tokenizer: str | None = None
    """The teacher's, to be compared with the student's token by token."""
    timeout_s: float = 120.0
    """Of one attempt."""
    deadline_s: float = 600.0
    """Of one request with all its attempts and waits."""
    max_retries: int = 5
    """Of a request; not where nobody listens or the server is busy, which ends at `deadline_s`."""
    backoff_s: float = 0.5
    """Before the first retry; doubled with each, up to a minute."""
    max_concurrency: int = 16
    """Requests in flight over all replicas."""
    break_after: int = 3
    """Failures in a row after which a replica is left alone for a while."""

    def __post_init__(self) -> None:
        _ = self.retry_policy
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")
        if not self.urls:
            raise ValueError("url is empty; give the address that `understudy serve-teacher` prints")
        check_variable(self.token_env, "token_env")

    @property
    def urls(self) -> tuple[str, ...]:
        """All replicas."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @property
    def retry_policy(self) -> RetryPolicy:
        """Raises ValueError for a number that cannot be."""
        return RetryPolicy.of(self)

    @property
    def gives(self) -> frozenset[Need]:
        return CAN

    @property
    def vocabulary(self) -> Source | None:
        return None if self.tokenizer is None else Source(self.tokenizer)

    @property
    def shown(self) -> str:
        return f"the teacher at {', '.join(self.urls)}"

    def check(self) -> str:
        """Raises RecipeError for an address that cannot be one; nothing is sent."""
        for url in self.urls:
            check_address(url, "teacher.url")
        return f"teacher: {self.shown}, not asked yet"

    def open(self, setup: Setup) -> ServedTeacher | CachedTeacher:
        """Asks every replica what it is.

        Raises EngineError where none answers, and for replicas of different teachers, VocabularyError for another
        tokenizer than the student's, RecipeError as `check` and for a head of fewer rows than the student has tokens.
        """
        self.check()
        _ = read_key(self.token_env)
        about = self._ask_about(setup)
        _compare(about, setup, self.shown)
        teacher = ServedTeacher(self, about, setup)
        return teacher if self.cache is None else CachedTeacher(teacher, Path(self.cache).expanduser() / CACHE_FILE)

    def _client(self, setup: Setup, retry_policy: RetryPolicy, max_reply_bytes: int) -> HttpClient:
        return HttpClient(
            self.urls,
            name=f"teacher {setup.name}",
            retry_policy=retry_policy,
            api_key_env=self.token_env,
            seed=setup.seed,
            max_reply_bytes=max_reply_bytes,
        )

    def _ask_about(self, setup: Setup) -> About:
        """Of the replicas that answer; one that does not is found out by whoever asks it later."""
        retry_policy = replace(
            self.retry_policy,
            deadline_s=min(self.deadline_s, OPENING_S),
            timeout_s=min(self.timeout_s, OPENING_S),
            max_retries=min(self.max_retries, 1),
            # a replica that is not there holds up no beginning
            waits=False,
        )
        found: dict[str, About] = {}
        last: EngineError | None = None
        with self._client(setup, retry_policy, ABOUT_BYTES) as client:
            for number, url in enumerate(client.urls):
                try:
                    read = lambda reply: _read_about(reply, url)  # noqa: B023, E731 (called in this turn)
                    found[url] = client.request(ABOUT, read, key="what it is", method="GET", replica=number)
                except Refused as refused:
                    raise _refusal(self, refused) from None
                except EngineError as error:
                    last = error
        if not found:
            raise EngineError(f"no teacher answers: {last}. Start one with: understudy serve-teacher MODEL") from last
        (first, about), *others = found.items()
        for url, other in others:
            if other.fingerprint != about.fingerprint:
                raise EngineError(
                    f"the replicas of {setup.name} are different teachers: {first} serves {about.model} with fingerprint "
                    f"{about.fingerprint}, {url} serves {other.model} with {other.fingerprint}; serve one model, with the "
                    "same --dtype and --hidden-dtype"
                )
        return about


def _read_about(reply: Reply, url: str) -> About:
    try:
        return About.decode(reply.json())
    except FrameError as error:
        raise EngineError(f"what answers at {url} is no teacher for this client: {error}") from error


def _compare(about: About, setup: Setup, shown: str) -> None:
    """Raises VocabularyError and RecipeError as `Served.open`."""
    if not TEMPERATURES[0] <= setup.temperature <= TEMPERATURES[1]:
        raise RecipeError(
            f"temperature {setup.temperature:g}: {shown} scores at {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}"
        )
    if about.num_rows < setup.vocab_size:
        raise RecipeError(
            f"{shown} ({about.model}) has {about.num_rows} rows and the student {setup.vocab_size} tokens: serve a teacher "
            "of the student's family"
        )
    if setup.tokenizer is None or tokenizer_digest(setup.tokenizer) == about.tokenizer.digest:
        return
    size, eos = max(setup.tokenizer.get_vocab().values()) + 1, setup.tokenizer.eos_token_id
    theirs = about.tokenizer
    if size != theirs.size:
        how = f"the student's has {size} tokens, the teacher's {theirs.size}"
    elif eos != theirs.eos_id:
        how = f"EOS is id {eos} for the student and {theirs.eos_id} for the teacher"
    else:
        how = f"both have {size} tokens, but not the same"
    raise VocabularyError(
        f"{shown} ({about.model}) reads with another tokenizer than the student: {how}. Token scores only mean something "
        "where both read the same tokens: choose models of one family, or give the student the teacher's tokenizer"
    )


def _refusal(section: Served, refused: Refused) -> EngineError:
    hint = _HINTS.get(refused.status)
    return EngineError(f"{section.shown} refuses with {refused}" + (f"; {hint}" if hint else ""))


def _reply_bytes(about: About) -> int:
    """Of the longest: the scores of one request, or the head with its bias."""
    head = about.num_rows * (about.hidden_size + 1) * getattr(torch, about.dtype).itemsize
    return max(about.limits.reply_bytes, int(head)) + _HEADER_BYTES


class ServedTeacher(Teacher):
    """Scores as a local teacher's, to rounding: which sequences the server reads together is up to who else asks."""

    remote = True

    def __init__(self, section: Served, about: About, setup: Setup) -> None:
        self.name, self.temperature, self.concurrency = setup.name, setup.temperature, section.max_concurrency
        self._section = section
        self._about = about
        self._setup = setup
        self._client = section._client(setup, section.retry_policy, _reply_bytes(about))
        self._head: LMHead | None = None
        self._lock = Lock()

    @property
    def about(self) -> About:
        """What the server said when it was asked first."""
        return self._about

    @property
    def fingerprint(self) -> str:
        """Hash of the server's, temperature and vocabulary."""
        facts = [self._about.fingerprint, self._setup.temperature, self._setup.vocab_size]
        return blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    @property
    def max_tokens(self) -> int | None:
        return self._about.limits.positions

    def head_for(self, name: str | None) -> LMHead:
        """The head for `Scores.hidden`, on the run's device; fetched when it is first asked for."""
        with self._lock:
            if self._head is None:
                try:
                    self._head = self._client.request(HEAD, self._read_head, key="its head", method="GET")
                except Refused as refused:
                    raise _refusal(self._section, refused) from None
            return self._head

    def _read_head(self, reply: Reply) -> LMHead:
        try:
            head, fingerprint = read_head(reply.content)
        except FrameError as error:
            raise BadReply(f"a head that cannot be read: {error}") from error
        self._check_same(fingerprint, reply.url)
        shape = self._about.num_rows, self._about.hidden_size
        if tuple(head.weight.shape) != shape:
            raise BadReply(f"a head of {tuple(head.weight.shape)}, and {shape} was announced")
        device, bias = self._setup.device, None if head.bias is None else head.bias.to(self._setup.device)
        facts = self._setup.temperature, self._setup.vocab_size
        return LMHead(head.weight.to(device), bias, head.softcap, head.scale, *facts)

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """One for each sample, in order, on the CPU. A score that stays no number makes its sample `Unscored`.

        Raises ScoreError for another need and for a sample longer than the teacher's positions, EngineError where the
        server does not answer, refuses, or is another teacher than before, ValueError for "topk" without k.
        """
        if need - CAN:
            raise ScoreError(f"{self._section.shown} cannot give {sorted(need - CAN)}; it gives {sorted(CAN)}")
        if "topk" in need and (k is None or k < 1):
            raise ValueError(f"need 'topk' asks for k of at least 1; k is {k}")
        asked = need - {"none"}
        if not asked:
            return [Scores(sample.response_ids) for sample in samples]
        return self._gather(self._questions(samples, frozenset(asked), k=k if "topk" in need else None))

    def score_at(self, samples: Sequence[Sample], ids: Sequence[Tensor]) -> list[Scores]:
        """`topk_logprob` [R, K] of `topk_ids` = the given ids [R, K] of each sample, from the full softmax.

        Raises ValueError for ids without a row for each response token, else as `score`.
        """
        for sample, rows in zip(samples, ids, strict=True):
            if rows.dim() != 2 or rows.shape[0] != sample.num_response_tokens or rows.shape[1:] != ids[0].shape[1:]:
                raise ValueError(
                    f"sample {sample.key}: ids of shape {tuple(rows.shape)}; one row for each response token"
                )
        return self._gather(self._questions(samples, frozenset({"given"}), ids=ids))

    def _questions(self, samples: Sequence[Sample], need: frozenset[str], **how: Any) -> Questions:
        setup = self._setup
        return Questions(
            about=self._about,
            samples=samples,
            need=need,
            temperature=setup.temperature,
            vocab_size=setup.vocab_size,
            **how,
        )

    def _gather(self, questions: Questions) -> list[Scores]:
        """Batches side by side."""
        samples = questions.samples
        self._check_positions(samples)
        # no replica waits while another has all
        share = math.ceil(sum(sample.token_ids.numel() for sample in samples) / len(self._client.urls))
        batches = questions.batches(min(self._section.batch_tokens, max(1, share)))
        try:
            answers = self._client.each(batches, lambda batch: self._ask(questions, batch))
        except Refused as refused:
            raise _refusal(self._section, refused) from None
        found = {
            index: score
            for batch, scores in zip(batches, answers, strict=True)
            for index, score in zip(batch, scores, strict=True)
        }
        return [found[index] for index in range(len(samples))]

    def _ask(self, questions: Questions, batch: Sequence[int]) -> list[Scores]:
        tries = min(NOT_FINITE_TRIES, self._section.max_retries)
        samples = [questions.samples[index] for index in batch]

        def read(reply: Reply) -> list[Scores]:
            nonlocal tries
            try:
                answer = Answer.decode(reply.content)
            except FrameError as error:
                raise BadReply(f"a reply that cannot be read: {error}") from error
            self._check_same(answer.fingerprint, reply.url)
            scores = questions.read(answer, batch)
            lacking = next((score for score in scores if isinstance(score, Unscored)), None)
            if lacking is not None and tries:
                tries -= 1
                raise BadReply(lacking.reason)
            return scores

        key = samples[0].key if len(samples) == 1 else f"{samples[0].key} and {len(samples) - 1} more samples"
        return self._client.request(SCORE, read, key=key, content=questions.ask(batch).encode())

    def _check_positions(self, samples: Sequence[Sample]) -> None:
        limit = self._about.limits.positions
        for sample in samples:
            if limit is not None and sample.token_ids.numel() - 1 > limit:
                raise ScoreError(
                    f"sample {sample.key} has {sample.token_ids.numel()} tokens, but {self._section.shown} has {limit} "
                    "positions (max_position_embeddings): lower max_new_tokens or drop longer prompts"
                )

    def _check_same(self, fingerprint: str, url: str) -> None:
        if fingerprint != self._about.fingerprint:
            raise EngineError(
                f"the teacher at {url} is another than when this run began: its fingerprint was {self._about.fingerprint} and "
                f"is {fingerprint}; serve {self._about.model} as before and resume"
            )

    def stats(self) -> Mapping[str, Any]:
        """Of the connections (`HttpClient.stats`)."""
        return self._client.stats()

    def close(self) -> None:
        """Gives up what is in flight."""
        self._client.close()
