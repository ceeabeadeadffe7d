"""A teacher behind `understudy serve-teacher`. Whole rows travel as hidden states, H numbers a token, and the head once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor

from understudy.errors import EngineError, RecipeError, ScoreError, VocabularyError
from understudy.http import (
    BadReply,
    HttpClient,
    Refused,
    Reply,
    RetryPolicy,
    check_address,
    check_variable,
    read_key,
)
from understudy.linear.head import LMHead
from understudy.packing import Unscored
from understudy.teachers.base import Setup
from understudy.teachers.remote.base import RemoteSection, RemoteTeacher
from understudy.teachers.remote.protocol import (
    ABOUT,
    HEAD,
    SCORE,
    TEMPERATURES,
    About,
    ProtocolError,
    ScoreReply,
    read_head,
)
from understudy.teachers.remote.served_batches import HEADER_BYTES, ScoreBatches
from understudy.teachers.stores.cache import CachedTeacher
from understudy.teachers.stores.recording import tokenizer_digest
from understudy.types import Need, Sample, Scores

CAN: frozenset[Need] = frozenset({"none", "sampled", "topk", "full"})
OPENING_S = 30.0
"""Time that a replica has to describe itself."""
ABOUT_BYTES = 2**20
"""Largest description."""
NOT_FINITE_TRIES = 2
"""Times that a score that is not finite is asked for again before its sample is `Unscored`."""
_HINTS = {
    400: "are client and server of the same version?",
    401: "set teacher.token_env to the NAME of an environment variable with the server's token",
    404: "teacher.url is not an `understudy serve-teacher`",
    413: "lower teacher.batch_tokens, or raise --max-request-bytes or --max-reply-bytes of the server",
}


@dataclass(frozen=True, kw_only=True)
class Served(RemoteSection):
    """The section of a recipe for a teacher that `understudy serve-teacher` serves."""

    token_env: str = ""
    """The NAME of the environment variable with the server's token."""
    break_after: int = 3
    """Consecutive failures after which a replica is left alone for a while."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variable(self.token_env, "token_env")

    @property
    def gives(self) -> frozenset[Need]:
        return CAN

    @property
    def shown(self) -> str:
        return f"the teacher at {', '.join(self.urls)}"

    def check(self) -> str:
        """Raises RecipeError for a URL that cannot be one; nothing is sent."""
        for url in self.urls:
            check_address(url, "teacher.url")
        return f"teacher: {self.shown}, not asked yet"

    def open(self, setup: Setup) -> ServedTeacher | CachedTeacher:
        """Asks every replica to describe itself.

        Raises EngineError if none answers, and for replicas of different teachers, VocabularyError for another tokenizer
        than the student's, RecipeError as `check` and for a head of fewer rows than the student has tokens.
        """
        self.check()
        _ = read_key(self.token_env)
        about = self._ask_about(setup)
        self._compare(about, setup)
        return self.cached(ServedTeacher(self, about, setup))

    def connect(self, setup: Setup, retry_policy: RetryPolicy, max_reply_bytes: int) -> HttpClient:
        """Returns a client for all replicas, to be closed by the caller."""
        return HttpClient(
            self.urls,
            name=f"teacher {setup.name}",
            retry_policy=retry_policy,
            api_key_env=self.token_env,
            seed=setup.seed,
            max_reply_bytes=max_reply_bytes,
        )

    def _ask_about(self, setup: Setup) -> About:
        """Returns the description that all replicas agree on; one that is down is noticed by the first request to it."""
        policy = replace(
            self.retry_policy,
            deadline_s=min(self.deadline_s, OPENING_S),
            timeout_s=min(self.timeout_s, OPENING_S),
            max_retries=min(self.max_retries, 1),
            # a replica that is down must not delay the start of a run
            waits=False,
        )
        found: dict[str, About] = {}
        last: EngineError | None = None
        with self.connect(setup, policy, ABOUT_BYTES) as client:
            for number, url in enumerate(client.urls):
                try:
                    about = client.request(ABOUT, _read_about, key="what it is", method="GET", replica=number)
                    found[url] = about
                except Refused as refused:
                    raise self.refusal(refused) from None
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

    def _compare(self, about: About, setup: Setup) -> None:
        """Raises VocabularyError and RecipeError as `open`."""
        if not TEMPERATURES[0] <= setup.temperature <= TEMPERATURES[1]:
            raise RecipeError(
                f"temperature {setup.temperature:g}: {self.shown} scores at {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}"
            )
        if about.num_rows < setup.vocab_size:
            raise RecipeError(
                f"{self.shown} ({about.model}) has {about.num_rows} rows and the student {setup.vocab_size} tokens: serve a "
                "teacher of the student's family"
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
            f"{self.shown} ({about.model}) reads with another tokenizer than the student: {how}. Token scores only mean "
            "something where both read the same tokens: choose models of one family, or give the student the teacher's "
            "tokenizer"
        )

    def refusal(self, refused: Refused) -> EngineError:
        """Returns the error for a status that a retry does not change, with what to do."""
        hint = _HINTS.get(refused.status)
        return EngineError(f"{self.shown} refuses with {refused}" + (f"; {hint}" if hint else ""))


def _read_about(reply: Reply) -> About:
    try:
        return About.decode(reply.json())
    except ProtocolError as error:
        raise EngineError(f"what answers at {reply.url} is not a teacher for this client: {error}") from error


class ServedTeacher(RemoteTeacher):
    """Scores as a local teacher's, to rounding: which sequences the server reads together depends on who else asks."""

    def __init__(self, section: Served, about: About, setup: Setup) -> None:
        # the longest reply is the scores of one request, or the head with its bias
        head = about.num_rows * (about.hidden_size + 1) * getattr(torch, about.dtype).itemsize
        longest = max(about.limits.reply_bytes, int(head)) + HEADER_BYTES
        super().__init__(section, setup, section.connect(setup, section.retry_policy, longest))
        self._section = section
        self._about = about
        self._head: LMHead | None = None
        self._lock = Lock()

    @property
    def about(self) -> About:
        """The server's description when the run began."""
        return self._about

    @property
    def fingerprint(self) -> str:
        """Hash of the server's fingerprint, temperature and vocabulary."""
        return self.hashed(self._about.fingerprint)

    @property
    def max_tokens(self) -> int | None:
        return self._about.limits.positions

    def head_for(self, name: str | None) -> LMHead:
        """Returns the head for `Scores.hidden`, on the run's device; it is fetched at the first call."""
        with self._lock:
            if self._head is None:
                try:
                    self._head = self._client.request(HEAD, self._read_head, key="its head", method="GET")
                except Refused as refused:
                    raise self._section.refusal(refused) from None
            return self._head

    def _read_head(self, reply: Reply) -> LMHead:
        try:
            head, fingerprint = read_head(reply.content)
        except ProtocolError as error:
            raise BadReply(f"a head that cannot be read: {error}") from error
        self._check_same(fingerprint, reply.url)
        shape = self._about.num_rows, self._about.hidden_size
        if tuple(head.weight.shape) != shape:
            raise BadReply(f"a head of {tuple(head.weight.shape)}, and {shape} was announced")
        device, bias = self._setup.device, None if head.bias is None else head.bias.to(self._setup.device)
        facts = self._setup.temperature, self._setup.vocab_size
        return LMHead(head.weight.to(device), bias, head.softcap, head.scale, *facts)

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Scores of each sample, in order, on the CPU; `Unscored` if a score is not finite after all.

        Raises ScoreError for another need and for a sample longer than the teacher's positions, EngineError if the server
        does not answer, refuses, or is another teacher than before, ValueError for "topk" without k.
        """
        if need - CAN:
            raise ScoreError(f"{self._section.shown} cannot give {sorted(need - CAN)}; it gives {sorted(CAN)}")
        if "topk" in need and (k is None or k < 1):
            raise ValueError(f"need 'topk' asks for k of at least 1; k is {k}")
        asked: frozenset[str] = need - {"none"}
        if not asked:
            return [Scores(sample.response_ids) for sample in samples]
        return self._score(samples, asked, k if "topk" in need else None, None)

    def score_at(self, samples: Sequence[Sample], ids: Sequence[Tensor]) -> list[Scores]:
        """`topk_logprob` [R, K] of `topk_ids` = the given ids [R, K] of each sample, from the full softmax.

        Raises ValueError for ids without a row for each response token, else as `score`.
        """
        for sample, rows in zip(samples, ids, strict=True):
            if rows.dim() != 2 or rows.shape[0] != sample.num_response_tokens or rows.shape[1:] != ids[0].shape[1:]:
                raise ValueError(
                    f"sample {sample.key}: ids of shape {tuple(rows.shape)}; one row for each response token"
                )
        return self._score(samples, frozenset({"given"}), None, ids)

    def _score(
        self, samples: Sequence[Sample], need: frozenset[str], k: int | None, ids: Sequence[Tensor] | None
    ) -> list[Scores]:
        """Asks in batches, side by side."""
        limit = self._about.limits.positions
        for sample in samples:
            # the last token is never read
            if limit is not None and sample.token_ids.numel() - 1 > limit:
                raise ScoreError(
                    f"sample {sample.key} has {sample.token_ids.numel()} tokens, but {self._section.shown} has {limit} "
                    "positions (max_position_embeddings): lower max_new_tokens or drop longer prompts"
                )
        work = ScoreBatches(self._about, samples, need, self._setup.temperature, self._setup.vocab_size, k, ids)
        # no replica waits while another one has everything
        share = math.ceil(sum(sample.token_ids.numel() for sample in samples) / len(self._client.urls))
        batches = work.batches(min(self._section.batch_tokens, max(1, share)))
        try:
            answers = self._client.each(batches, lambda batch: self._ask(work, batch))
        except Refused as refused:
            raise self._section.refusal(refused) from None
        found = {
            index: score
            for batch, scores in zip(batches, answers, strict=True)
            for index, score in zip(batch, scores, strict=True)
        }
        return [found[index] for index in range(len(samples))]

    def _ask(self, work: ScoreBatches, batch: Sequence[int]) -> list[Scores]:
        tries = min(NOT_FINITE_TRIES, self._section.max_retries)

        def read(reply: Reply) -> list[Scores]:
            nonlocal tries
            try:
                answer = ScoreReply.decode(reply.content)
            except ProtocolError as error:
                raise BadReply(f"a reply that cannot be read: {error}") from error
            self._check_same(answer.fingerprint, reply.url)
            scores = work.read(answer, batch)
            lacking = next((score for score in scores if isinstance(score, Unscored)), None)
            if lacking is not None and tries:
                tries -= 1
                raise BadReply(lacking.reason)
            return scores

        first = work.samples[batch[0]].key
        key = first if len(batch) == 1 else f"{first} and {len(batch) - 1} more samples"
        return self._client.request(SCORE, read, key=key, content=work.request(batch).encode())

    def _check_same(self, fingerprint: str, url: str) -> None:
        if fingerprint != self._about.fingerprint:
            raise EngineError(
                f"the teacher at {url} is another than when this run began: its fingerprint was {self._about.fingerprint} and "
                f"is {fingerprint}; serve {self._about.model} as before and resume"
            )
