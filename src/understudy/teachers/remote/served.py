"""A teacher behind `understudy serve-teacher`. Whole rows travel as hidden states, H numbers a token, and the head once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from threading import Lock

from understudy.errors import EngineError, RecipeError, ScoreError, VocabularyError
from understudy.http.client import HttpClient, RetryPolicy
from understudy.http.replies import BadReply, Refused, Reply, check_key, check_variable, read_key
from understudy.lazy import torch
from understudy.linear.head import LMHead
from understudy.linear.kept import NUM_LIKELIEST
from understudy.packing import LOGPROB_TOLERANCE, Unscored, by_prompt, lacks_score
from understudy.teachers.base import ExtraIds, Setup, Teacher, gives_of
from understudy.teachers.remote.base import RemoteSection, RemoteTeacher, named
from understudy.teachers.remote.protocol import (
    ABOUT,
    HEAD,
    HEADER_BYTES,
    IDS,
    LIKELIEST,
    MAX_SAMPLES,
    NEEDS,
    SCORE,
    TEMPERATURES,
    About,
    ProtocolError,
    ScoreReply,
    ScoreRequest,
    Shapes,
    read_head,
    reply_fields,
    row_bytes,
)
from understudy.teachers.stores.recording import tokenizer_digest
from understudy.types import Need, Sample, Scores, map_tensors

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
    extra_ids: ExtraIds = "mask"
    """As of a local teacher; its `tokenizer` then has to be named."""
    break_after: int = 3
    """Consecutive failures after which a replica is left alone for a while."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variable(self.token_env, "token_env")

    @property
    def gives(self) -> frozenset[Need]:
        return gives_of(NEEDS | {"none"}, self.extra_ids)

    @property
    def shown(self) -> str:
        return f"the teacher at {', '.join(self.urls)}"

    def check(self) -> str:
        """Raises RecipeError for a token that is not there."""
        check_key(self.token_env)
        return super().check()

    def open(self, setup: Setup) -> Teacher:
        """Asks every replica to describe itself.

        Raises EngineError if none answers, and for replicas of different teachers, VocabularyError for another tokenizer
        than the student's, RecipeError for a head of fewer rows than the student has tokens.
        """
        read_key(self.token_env)
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
                    found[url] = client.request(
                        ABOUT, lambda reply: About.decode(reply.json()), key="what it is", method="GET", replica=number
                    )
                except ProtocolError as error:
                    last = EngineError(f"what answers at {url} is not a teacher for this client: {error}")
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
        # the teacher's own was compared with the student's, token by token
        tokenizers = [one for one in (setup.teacher_tokenizer, setup.tokenizer) if one is not None]
        if not tokenizers or about.tokenizer_digest in map(tokenizer_digest, tokenizers):
            return
        size = max(setup.tokenizer.get_vocab().values()) + 1
        raise VocabularyError(
            f"{self.shown} ({about.model}) reads with another tokenizer than the student: the teacher's has "
            f"{about.tokenizer_size} tokens and EOS is id {about.eos_id}, the student's has {size} tokens and EOS is id "
            f"{setup.tokenizer.eos_token_id}. Token scores only mean something where both read the same tokens: choose models "
            "of one family, give the student the teacher's tokenizer, or name the teacher's own (teacher.tokenizer) where it "
            "begins with all of the student's tokens"
        )

    def refusal(self, refused: Refused) -> EngineError:
        """Returns the error for a status that a retry does not change, with what to do."""
        hint = _HINTS.get(refused.status)
        return EngineError(f"{self.shown} refuses with {refused}" + (f"; {hint}" if hint else ""))


class ServedTeacher(RemoteTeacher):
    """Scores as a local teacher's, to rounding: which sequences the server reads together depends on who else asks."""

    def __init__(self, section: Served, about: About, setup: Setup) -> None:
        # the longest reply is the scores of one request, or the head with its bias
        head = about.num_rows * (about.hidden_size + 1) * getattr(torch, about.dtype).itemsize
        longest = max(about.reply_bytes, int(head)) + HEADER_BYTES
        client = section.connect(setup, section.retry_policy, longest)
        tail = ["tail"] if section.extra_ids == "tail" else []
        super().__init__(section, setup, client, section.shown, about.fingerprint, *tail)
        self._section: Served = section
        self.about = about
        """The server's description when the run began."""
        self._head: LMHead | None = None
        self._lock = Lock()

    @property
    def max_tokens(self) -> int | None:
        return self.about.positions

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
        shape = self.about.num_rows, self.about.hidden_size
        if tuple(head.weight.shape) != shape:
            raise BadReply(f"a head of {tuple(head.weight.shape)}, and {shape} was announced")
        setup = self._setup
        absent = torch.tensor(setup.absent) if setup.absent else None
        head = replace(head, temperature=setup.temperature, vocab_size=setup.vocab_size, absent=absent)
        return map_tensors(head, lambda value: value.to(setup.device))

    def _score(self, samples: Sequence[Sample], need: frozenset[Need], k: int | None) -> list[Scores]:
        """Asks in batches, side by side."""
        limit = self.about.positions
        for sample in samples:
            # the last token is never read
            if limit is not None and sample.token_ids.numel() - 1 > limit:
                raise ScoreError(
                    f"sample {sample.key} has {sample.token_ids.numel()} tokens, but {self._who} has {limit} "
                    "positions (max_position_embeddings): lower max_new_tokens or drop longer prompts"
                )
        shapes = reply_fields(need, num_top=k or 0, hidden_size=self.about.hidden_size)
        # as many samples a request whether or not some are kept token by token: what is read together stays so
        batches = self._batches(samples, shapes)
        try:
            answers = self._client.each(batches, lambda batch: self._ask([samples[index] for index in batch], need, k))
        except Refused as refused:
            raise self._section.refusal(refused) from None
        found = dict(zip(chain(*batches), chain(*answers), strict=True))
        return [found[index] for index in range(len(samples))]

    def _batches(self, samples: Sequence[Sample], shapes: Shapes) -> list[list[int]]:
        """Returns indices for each request, samples of one prompt side by side. A request and its reply keep within the
        server's limits unless it is one sample alone."""
        about, row = self.about, self._row_bytes(shapes)
        # no replica waits while another one has everything
        share = math.ceil(sum(sample.token_ids.numel() for sample in samples) / len(self._client.urls))
        max_tokens = min(self._section.batch_tokens, max(1, share))
        most = max_tokens, about.request_bytes - HEADER_BYTES, about.reply_bytes
        batches: list[list[int]] = []
        used = [0, 0, 0]
        for index in chain(*by_prompt(samples)):
            length, rows = samples[index].token_ids.numel(), samples[index].num_response_tokens
            # tokens, bytes sent (ids and the two lengths), bytes received
            size = length, (length + 2) * torch.int32.itemsize, rows * row
            used = [sum(pair) for pair in zip(used, size, strict=True)]
            if not batches or any(a > b for a, b in zip(used, most, strict=True)) or len(batches[-1]) == MAX_SAMPLES:
                batches.append([])
                used = list(size)
            batches[-1].append(index)
        return batches

    def _row_bytes(self, shapes: Shapes) -> int:
        return row_bytes(
            shapes, scores=getattr(torch, self.about.dtype), hidden=getattr(torch, self.about.hidden_dtype)
        )

    def _ask(self, samples: Sequence[Sample], need: frozenset[Need], k: int | None) -> list[Scores]:
        """One request."""
        vocab_size, likeliest = self._setup.vocab_size, any(sample.keep_tokens for sample in samples)
        asked = partial(reply_fields, need, num_top=k or 0, hidden_size=self.about.hidden_size)
        shapes = asked(num_likeliest=min(NUM_LIKELIEST, vocab_size) if likeliest else 0)
        num_rows = sum(sample.num_response_tokens for sample in samples)
        if likeliest and self._row_bytes(shapes) * num_rows > self.about.reply_bytes:
            # numbers to look at must not make a reply too large
            likeliest, shapes = False, asked()
        tries = min(NOT_FINITE_TRIES, self._section.max_retries)

        def read(reply: Reply) -> list[Scores]:
            nonlocal tries
            try:
                answer = ScoreReply.decode(reply.content)
            except ProtocolError as error:
                raise BadReply(f"a reply that cannot be read: {error}") from error
            self._check_same(answer.fingerprint, reply.url)
            scores = _read_scores(answer, samples, shapes, vocab_size)
            lacking = next((score for score in scores if isinstance(score, Unscored)), None)
            if lacking is not None and tries:
                tries -= 1
                raise BadReply(lacking.reason)
            return scores

        request = ScoreRequest(
            tokens=torch.cat([sample.token_ids for sample in samples]).int(),
            lengths=torch.tensor([sample.token_ids.numel() for sample in samples], dtype=torch.int32),
            prompt_lengths=torch.tensor([sample.prompt_length for sample in samples], dtype=torch.int32),
            need=need,
            temperature=self._setup.temperature,
            vocab_size=vocab_size,
            absent=torch.tensor(self._setup.absent, dtype=torch.int32),
            tail_size=self._setup.tail_size if self._section.extra_ids == "tail" else None,
            k=k,
            likeliest=likeliest,
        )
        return self._client.request(SCORE, read, key=named(samples), content=request.encode())

    @property
    def origin(self) -> str:
        return self.about.fingerprint

    def _check_same(self, fingerprint: str, url: str) -> None:
        if fingerprint != self.about.fingerprint:
            raise EngineError(
                f"the teacher at {url} is another than when this run began: its fingerprint was {self.about.fingerprint} and "
                f"is {fingerprint}; serve {self.about.model} as before and resume"
            )


def _read_scores(reply: ScoreReply, samples: Sequence[Sample], shapes: Shapes, vocab_size: int) -> list[Scores]:
    """Returns scores of a request's samples; `Unscored` if any number of a sample is missing (`packing.lacks_score`).

    Raises BadReply, naming the sample, for scores of other ids, other fields or shapes, probabilities above 1, and a
    token twice in a row of the likeliest.
    """
    if reply.fields.keys() != shapes.keys():
        raise BadReply(f"a reply with {sorted(reply.fields)}, where {sorted(shapes)} were asked for")
    sizes = [sample.num_response_tokens for sample in samples]
    if len(reply.token_ids) != sum(sizes):
        raise BadReply(f"a reply of {len(reply.token_ids)} tokens, where {sum(sizes)} were asked for")
    for name, value in reply.fields.items():
        if value.shape[1:] != shapes[name]:
            raise BadReply(f"a reply whose {name} has shape {tuple(value.shape)}")
    scored = reply.token_ids.split(sizes)
    parts = {name: value.split(sizes) for name, value in reply.fields.items()}
    scores: list[Scores] = []
    for place, sample in enumerate(samples):
        found = {name: part[place] for name, part in parts.items()}
        if not torch.equal(scored[place].long(), sample.response_ids):
            raise BadReply(f"sample {sample.key}: scores of other tokens than were sent")
        for name in ("logprob", "topk_logprob"):
            if name in found and bool((found[name] > LOGPROB_TOLERANCE).any()):
                raise BadReply(f"sample {sample.key}: {name} is above 0, so no log-probability")
        found |= {name: found[name].long() for name in IDS if name in found}
        for name in ("topk_ids", "likeliest_ids"):
            ranked = found[name].sort(-1).values if name in found else torch.zeros(0, 1)
            if bool((ranked[:, 1:] == ranked[:, :-1]).any()):
                raise BadReply(f"sample {sample.key}: {name} names a token twice")
            if ranked.numel() and not 0 <= int(ranked.min()) <= int(ranked.max()) < vocab_size:
                raise BadReply(f"sample {sample.key}: {name} names a token that does not exist")
        scored_by = {name: value for name, value in found.items() if name not in LIKELIEST}
        broken = sorted(name for name, value in scored_by.items() if bool(lacks_score(name, value).any()))
        if not broken:
            scores.append(Scores(sample.response_ids, **found))
            continue
        empty = {
            name: torch.full_like(value, -1 if name == "topk_ids" else torch.nan) for name, value in scored_by.items()
        }
        reason = (
            f"sample {sample.key}: {broken[0]} is NaN or infinite; serve the teacher with another --dtype (bfloat16 or "
            "float32 for float16)"
        )
        scores.append(Unscored(sample.response_ids, **empty, reason=reason))
    return scores
