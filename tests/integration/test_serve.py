"""A served teacher says what the same weights say in this process, to the last bit, and survives whatever is sent to it."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.leaks import nothing_left
from tests.processes import Process, command_line
from tests.serving import serve_beside
from tests.tiny_models import ARCHITECTURES, BUDGET, NUM_ROWS, ROUNDING, letters, plain_logp, sample, tiny
from understudy.config import parse
from understudy.errors import EngineError, RecipeError, ScoreError, VocabularyError
from understudy.linear import LMHead, evaluate
from understudy.methods import GKD
from understudy.models import save_hf
from understudy.packing import Unscored, pack
from understudy.serve import Refusal, Scorer, Settings, run
from understudy.serve import app as serve_app
from understudy.serve import prompts as serve_prompts
from understudy.serve import server as serve_server
from understudy.serve import worker as serve_worker
from understudy.tasks.renderer import Renderer
from understudy.teachers import LocalTeacher, Setup
from understudy.teachers.remote.protocol import (
    ABOUT,
    CONTENT_TYPE,
    HEAD,
    SCORE,
    About,
    ProtocolError,
    ScoreReply,
    ScoreRequest,
)
from understudy.teachers.remote.served import Served, ServedTeacher
from understudy.types import Need, Sample, Scores

pytestmark = pytest.mark.slow

VOCABULARY = 37
TEMPERATURE = 0.7
WAIT_S = 60.0
QUICK: dict[str, Any] = {"max_retries": 1, "backoff_s": 0.01, "timeout_s": 20.0, "deadline_s": 30.0}
FIELDS = ("logprob", "entropy", "topk_ids", "topk_logprob", "hidden")
NEEDS: dict[str, frozenset[Need]] = {
    "sampled": frozenset({"sampled"}),
    "topk": frozenset({"topk"}),
    "full": frozenset({"full"}),
    "all": frozenset({"sampled", "topk", "full"}),
}


def samples(seed: int = 1) -> list[Sample]:
    """Prompts and responses of many lengths, one response empty, one prompt of a single token; no prompt twice."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [(3, 5), (1, 4), (9, 2), (4, 0), (2, 11), (7, 1), (3, 6)]
    return [
        sample(f"p{i}", *(torch.randint(2, VOCABULARY, (n,), generator=draw).tolist() for n in pair))
        for i, pair in enumerate(lengths)
    ]


def group(num_prompt: int = 30, lengths: Sequence[int] = (4, 5, 1, 0, 5, 9), seed: int = 2) -> list[Sample]:
    """Responses to one prompt."""
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, VOCABULARY, (num_prompt,), generator=draw).tolist()
    return [
        replace(sample("g", prompt, torch.randint(2, VOCABULARY, (n,), generator=draw).tolist()), index=i)
        for i, n in enumerate(lengths)
    ]


def setup(**options: Any) -> Setup:
    facts = {"name": "t", "vocab_size": VOCABULARY, "temperature": TEMPERATURE, "renderer": Renderer(letters())}
    return Setup(**facts | options)


@contextmanager
def serving(model: Any, *, beside: dict[str, Any] | None = None, **options: Any) -> Iterator[str]:
    """The address of a server of this process. `beside`: settings; `options`: of the scorer."""
    scorer = Scorer(model, letters(), name="tiny", **options)
    with serve_beside(scorer, Settings(model="tiny", **{"port": 0} | (beside or {}))) as url:
        yield url


@contextmanager
def opened(*urls: str, into: Setup | None = None, **keys: Any) -> Iterator[ServedTeacher]:
    teacher = Served(url=urls, **QUICK | keys).open(into or setup())
    try:
        yield teacher
    finally:
        teacher.close()


def local(model: Any, **options: Any) -> LocalTeacher:
    return LocalTeacher(model, **{"name": "t", "vocab_size": VOCABULARY, "temperature": TEMPERATURE} | options)


def ask(some: Sequence[Sample], **options: Any) -> ScoreRequest:
    facts: dict[str, Any] = {"need": frozenset({"sampled"}), "temperature": TEMPERATURE, "vocab_size": VOCABULARY}
    return ScoreRequest(
        tokens=torch.cat([one.token_ids for one in some]).int(),
        lengths=torch.tensor([len(one.token_ids) for one in some], dtype=torch.int32),
        prompt_lengths=torch.tensor([one.prompt_length for one in some], dtype=torch.int32),
        **facts | options,
    )


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    said = {"Content-Type": CONTENT_TYPE} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(url + SCORE, content=body, headers=said, timeout=WAIT_S)


def message(response: httpx.Response) -> str:
    """The one shape of an error."""
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message"]
    return str(body["error"]["message"])


def same(found: Sequence[Scores], expected: Sequence[Scores], atol: float = 0.0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        for name in FIELDS:
            ours, theirs = getattr(one, name), getattr(other, name)
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                torch.testing.assert_close(
                    ours, theirs, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_scores_are_the_local_teachers_to_the_last_bit(dtype: str) -> None:
    """At a temperature and over a cut vocabulary, in the precision of the weights; the client rounds nothing."""
    model = tiny(dtype=dtype, sharp=4.0)
    with serving(model) as url, opened(url) as teacher:
        for need in NEEDS.values():
            found = teacher.score(samples(), need, k=5)
            same(found, local(model).score(samples(), need, k=5))
            if found[0].hidden is not None:
                mine, theirs = teacher.head_for(None), local(model).head_for(None)
                assert torch.equal(mine.logits(found[0].hidden), theirs.logits(found[0].hidden))


@pytest.mark.parametrize(("batch_tokens", "atol"), [(16_384, 0.0), (40, 1e-12)])
@pytest.mark.parametrize("need", ["sampled", "topk"])
def test_samples_that_are_kept_bring_the_most_likely_tokens_of_a_local_teacher(
    need: str, batch_tokens: int, atol: float
) -> None:
    """In the requests that are sent anyway. Of one request no score changes in any bit; of several it depends on which wait
    together."""
    model = tiny(sharp=4.0)
    some = [*samples(), *group()]
    kept = [replace(one, keep_tokens=at % 3 == 0) for at, one in enumerate(some)]
    with serving(model) as url, opened(url, batch_tokens=batch_tokens) as teacher:
        plain = teacher.score(some, NEEDS[need], k=3)
        num_requests = teacher.stats()["requests"]
        found = teacher.score(kept, NEEDS[need], k=3)
        assert teacher.stats()["requests"] == 2 * num_requests
    same(found, plain, atol)
    for one, scores, expected in zip(kept, found, local(model).score(kept, NEEDS[need], k=3), strict=True):
        for name in ("likeliest_ids", "likeliest_logprob", "rank") if one.keep_tokens else ():
            torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_the_head_are_the_whole_row(name: str) -> None:
    """Soft-cap, scale and bias arrive; prompts that several samples share are read once, and it is not seen."""
    model = tiny(name, sharp=4.0)
    some = [*samples(), *group()]
    with serving(model) as url, opened(url) as teacher:
        found = teacher.score(some, NEEDS["all"], k=4)
        head = teacher.head_for(None)
        for one, scores in zip(some, found, strict=True):
            expected = plain_logp(model, one.token_ids, TEMPERATURE, VOCABULARY)[one.prompt_length - 1 :]
            assert scores.hidden is not None
            torch.testing.assert_close(head.logits(scores.hidden).log_softmax(-1), expected, rtol=0, atol=BUDGET[name])
        same(found, local(model).score(some, NEEDS["all"], k=4), atol=BUDGET[name])


def test_loss_and_gradient_through_served_states_are_those_through_local_ones() -> None:
    model, method = tiny(sharp=4.0), GKD(beta=0.3)
    draw = torch.Generator().manual_seed(3)
    batch = pack(samples())
    student = torch.randn(len(batch), 8, dtype=torch.float64, generator=draw)
    weight = torch.randn(NUM_ROWS, 8, dtype=torch.float64, generator=draw)

    def outcome(teacher: LocalTeacher | ServedTeacher) -> tuple[Tensor, Tensor, Tensor]:
        states = torch.cat(
            [score.hidden for score in teacher.score(samples(), NEEDS["full"]) if score.hidden is not None]
        )
        hidden, rows = student.clone().requires_grad_(), weight.clone().requires_grad_()
        head = LMHead(rows, temperature=TEMPERATURE, vocab_size=VOCABULARY)
        found = evaluate(method, batch, hidden, head, teacher=(states, teacher.head_for(None)))
        found.loss.backward()
        assert hidden.grad is not None
        assert rows.grad is not None
        return found.loss.detach(), hidden.grad, rows.grad

    with serving(model) as url, opened(url) as teacher:
        for served, expected in zip(outcome(teacher), outcome(local(model)), strict=True):
            assert expected.abs().max() > 0
            assert torch.equal(served, expected)


def test_hidden_states_may_be_sent_in_bfloat16() -> None:
    """Half the bytes; another fingerprint, because scores differ."""
    model = tiny(dtype="float32", sharp=4.0)
    expected = local(model).score(samples(), NEEDS["full"])
    with serving(model) as url, opened(url) as teacher:
        exact = teacher.fingerprint
    with serving(model, hidden_dtype="bfloat16") as url, opened(url) as teacher:
        assert teacher.fingerprint != exact
        for one, other in zip(teacher.score(samples(), NEEDS["full"]), expected, strict=True):
            assert one.hidden is not None
            assert other.hidden is not None
            assert torch.equal(one.hidden, other.hidden.bfloat16())


def test_the_fingerprint_changes_with_weights_temperature_and_vocabulary() -> None:
    model = tiny()
    with serving(model) as url, opened(url) as one, opened(url) as again:
        assert one.fingerprint == again.fingerprint
        for changed in ({"temperature": 1.0}, {"vocab_size": 36}):
            with opened(url, into=setup(**changed)) as other:
                assert other.fingerprint != one.fingerprint
        before = one.fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-9
    with serving(model) as url, opened(url) as other:
        assert other.fingerprint != before


# prompts that are read once


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("max_tokens", [40, 90, 10_000])
def test_continuing_from_a_prompt_is_reading_every_sequence_whole(name: str, max_tokens: int) -> None:
    """Sliding windows (4 tokens) that end inside the prompt and inside the response; batches of one and of all."""
    model, some = tiny(name, sharp=4.0), group()
    prompt, responses = some[0].token_ids[:30], [one.response_ids for one in some]
    assert serve_prompts.can_continue(model)
    found = serve_prompts.continued_hidden(model, prompt, responses, max_tokens, torch.device("cpu"))
    expected = local(model).score(some, NEEDS["full"])
    for states, other in zip(found, expected, strict=True):
        assert other.hidden is not None
        torch.testing.assert_close(states, other.hidden, rtol=0, atol=BUDGET[name])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_shared_prompt_is_read_once(name: str) -> None:
    """By segments, or, with soft-capped scores, from its cache."""
    model = tiny(name)
    scorer, whole = (Scorer(model, letters(), name="tiny", share_prompts=share) for share in (True, False))
    assert scorer.continues == (name == "gemma2")
    slots: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: slots.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer.score([ask(group(200, [4] * 8))])
    shared, slots[:] = sum(slots), []
    whole.score([ask(group(200, [4] * 8))])
    # the probes of a new view aside, 200 + 8 * 3 slots against 8 * 203
    assert shared <= 224 + 60
    assert sum(slots) >= 8 * 203


def test_a_cache_that_cannot_be_continued_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cache raises or gets wrong, whole sequences are read."""
    from transformers.cache_utils import DynamicCache

    model = tiny("gemma2")
    for broken in (lambda self, repeats: 1 / 0, lambda self, repeats: self.layers[0].keys.zero_()):
        with monkeypatch.context() as patch:
            patch.setattr(DynamicCache, "batch_repeat_interleave", broken)
            scorer = Scorer(model, letters(), name="tiny")
        assert not scorer.continues
    assert Scorer(model, letters(), name="tiny").continues


LENGTHS: dict[str, dict[str, Any]] = {
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"factor": 4.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_positions_that_depend_on_the_length_are_those_of_whole_sequences(kind: str) -> None:
    """The length at which they change (32 tokens) lies inside the responses, beyond every probe."""
    rope = {"rope_type": kind, "rope_theta": 100.0} | LENGTHS[kind]
    models = [tiny(max_position_embeddings=128, rope_parameters=rope, sharp=4.0) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    some = ask(group(lengths=(20, 18, 20, 19)))
    shared, whole = (Scorer(model, letters(), name="t", share_prompts=model is models[0]) for model in models)
    assert serve_prompts.can_continue(models[0]) == (kind not in ("longrope", "dynamic"))
    found, expected = (one.score([some])[0].fields["logprob"] for one in (shared, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_batches_that_continue_keep_to_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(200):
        prompt, budget = draw.randint(1, 50), draw.randint(1, 300)
        lengths = [draw.randint(0, 60) for _ in range(draw.randint(1, 12))]
        batches = serve_prompts.continued_batches(prompt, lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * (prompt + lengths[batch[0]]) <= budget


# many at once


def test_requests_that_wait_together_are_answered_together_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one kind, in any order of arrival, each gets its own answer; of another kind, none is mixed in."""
    model, calls = tiny(sharp=4.0), []
    scorer = Scorer(model, letters(), name="tiny")
    plain = scorer.score
    gate = threading.Event()

    def held(asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
        assert gate.wait(WAIT_S)
        calls.append([one.kind for one in asks])
        return plain(asks)

    monkeypatch.setattr(scorer, "score", held)
    worker = serve_worker.Worker(scorer, reply_bytes=2**30)
    try:
        asks = []
        for index in range(24):
            some = [*samples(seed=index)[:3], *group(seed=index)[:2]]
            asks.append(ask(some, need=frozenset({"topk"}), k=3) if index % 3 else ask(some, temperature=1.3))
        futures = [worker.submit(one) for one in asks]
        gate.set()
        answers = [future.result(WAIT_S) for future in futures]
    finally:
        gate.set()
        worker.close()
    assert all(len(set(kinds)) == 1 for kinds in calls)
    assert len(calls) <= 4, "24 requests of two kinds wait: the first alone perhaps, then each kind at once"
    for one, answer in zip(asks, answers, strict=True):
        (alone,) = plain([one])
        assert torch.equal(alone.token_ids, answer.token_ids)
        for name, value in alone.fields.items():
            torch.testing.assert_close(answer.fields[name], value, rtol=0, atol=ROUNDING)


def test_a_request_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(tiny(), letters(), name="tiny")
    plain, gate = scorer.score, threading.Event()
    bad = ask(samples()[:1])

    def fails(asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
        assert gate.wait(WAIT_S)
        if bad in asks:
            raise RuntimeError("a kernel failed")
        return plain(asks)

    monkeypatch.setattr(scorer, "score", fails)
    worker = serve_worker.Worker(scorer, reply_bytes=2**30)
    try:
        futures = [worker.submit(one) for one in (ask(samples()), bad, ask(samples()))]
        gate.set()
        assert len(futures[0].result(WAIT_S).token_ids) == len(futures[2].result(WAIT_S).token_ids) > 0
        with pytest.raises(RuntimeError, match="kernel"):
            futures[1].result(WAIT_S)
    finally:
        gate.set()
        worker.close()


class Panic(BaseException):
    """As extensions raise."""


@pytest.mark.parametrize("error", [BrokenPipeError("nobody reads"), ValueError("closed file"), Panic("panic")])
def test_lines_that_nobody_reads_end_no_server(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(line: str) -> None:
        raise error

    monkeypatch.setattr(serve_worker, "NOTE_EVERY_S", 0.0)
    worker = serve_worker.Worker(Scorer(tiny(), letters(), name="tiny"), reply_bytes=2**30, note=note)
    try:
        for _ in range(3):
            assert len(worker.submit(ask(samples())).result(WAIT_S).token_ids)
            assert worker.alive
    finally:
        worker.close()


def test_an_error_that_is_no_exception_is_told_and_ends_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(tiny(), letters(), name="tiny")
    plain, errors = scorer.score, [Panic("a kernel panicked")]

    def fails(asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
        if errors:
            raise errors.pop()
        return plain(asks)

    monkeypatch.setattr(scorer, "score", fails)
    worker = serve_worker.Worker(scorer, reply_bytes=2**30)
    try:
        with pytest.raises(RuntimeError, match="a kernel panicked"):
            worker.submit(ask(samples())).result(WAIT_S)
        assert len(worker.submit(ask(samples())).result(WAIT_S).token_ids)
    finally:
        worker.close()


def test_a_server_whose_worker_has_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_worker.Worker, "_run", lambda self: None)
    with serving(tiny()) as url:
        for response in (httpx.get(url + "/health"), post(url, ask(samples()).encode())):
            assert response.status_code == 503
            assert "restart" in message(response)


def test_a_full_queue_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with Retry-After to whom does not fit; who waits is answered; what waits at the end is told so."""
    monkeypatch.setattr(serve_worker, "MAX_WAITING", 2)
    scorer, gate, began = Scorer(tiny(), letters(), name="tiny"), threading.Event(), threading.Event()
    plain = scorer.score

    def held(asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
        began.set()
        assert gate.wait(WAIT_S)
        return plain(asks)

    monkeypatch.setattr(scorer, "score", held)
    worker = serve_worker.Worker(scorer, reply_bytes=2**30)
    try:
        # one is under way, two wait
        futures = [worker.submit(ask(samples()))]
        assert began.wait(WAIT_S)
        futures += [worker.submit(ask(samples())) for _ in range(2)]
        with pytest.raises(Refusal, match="later") as caught:
            worker.submit(ask(samples()))
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
        gate.set()
        assert all(len(future.result(WAIT_S).token_ids) for future in futures)
        gate.clear()
        began.clear()
        under_way = worker.submit(ask(samples()))
        assert began.wait(WAIT_S)
        waits = worker.submit(ask(samples()))
        ends = threading.Thread(target=worker.close)
        ends.start()
        with pytest.raises(Refusal, match="stopping"):
            waits.result(WAIT_S)
        gate.set()
        ends.join(WAIT_S)
        assert len(under_way.result(WAIT_S).token_ids)
        with pytest.raises(Refusal, match="stopping"):
            worker.submit(ask(samples()))
    finally:
        gate.set()
        worker.close()


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """429 and Retry-After over the client: the client waits as long and gets its scores."""
    model, plain, count = tiny(sharp=4.0), serve_worker.Worker.submit, []

    def busy_once(self: serve_worker.Worker, one: ScoreRequest) -> Any:
        count.append(time.monotonic())
        if len(count) == 1:
            raise Refusal(429, "ask later", {"Retry-After": "1"})
        return plain(self, one)

    monkeypatch.setattr(serve_worker.Worker, "submit", busy_once)
    with serving(model) as url, opened(url) as teacher:
        same(teacher.score(samples(), NEEDS["sampled"]), local(model).score(samples(), NEEDS["sampled"]))
    assert len(count) == 2
    assert count[1] - count[0] >= 1.0


def test_many_clients_at_once_get_their_own() -> None:
    model = tiny(sharp=4.0)
    wanted = [samples(seed) for seed in range(8)]
    expected = [local(model).score(some, NEEDS["topk"], k=3) for some in wanted]
    with serving(model) as url, opened(url, batch_tokens=20) as teacher:
        found: dict[int, list[Scores]] = {}

        def fetch(index: int) -> None:
            found[index] = teacher.score(wanted[index], NEEDS["topk"], k=3)

        threads = [threading.Thread(target=fetch, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        for index, scores in enumerate(expected):
            same(found[index], scores, atol=ROUNDING)


def test_what_nobody_waits_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that goes away while its request waits: no forward is made for it."""
    scorer, gate, began, calls = Scorer(tiny(), letters(), name="tiny"), threading.Event(), threading.Event(), []
    plain = scorer.score

    def held(asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
        calls.extend(one.temperature for one in asks)
        began.set()
        assert gate.wait(WAIT_S)
        return plain(asks)

    monkeypatch.setattr(scorer, "score", held)
    headers = {"Content-Type": CONTENT_TYPE}
    with serve_beside(scorer, Settings(model="tiny", port=0)) as url, httpx.Client(timeout=WAIT_S) as client:
        first = threading.Thread(
            target=client.post,
            args=(url + SCORE,),
            kwargs={"content": ask(samples()).encode(), "headers": headers},
        )
        first.start()
        assert began.wait(WAIT_S)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + SCORE, content=ask(samples(), temperature=1.5).encode(), headers=headers, timeout=0.3)
        # the loop that sees it go is the one that answers this
        assert httpx.get(url + "/health").status_code == 200
        gate.set()
        first.join(WAIT_S)
        assert post(url, ask(samples(), temperature=0.9).encode()).status_code == 200
    assert calls == [TEMPERATURE, 0.9]


# what is refused


def test_a_token_is_asked_for_everywhere_but_health(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_TOKEN", "s3cret-of-many-letters")
    monkeypatch.setenv("WRONG_TOKEN", "another-of-many-letters")
    with serving(tiny(), beside={"token_env": "TEACHER_TOKEN"}) as url:
        assert httpx.get(url + "/health").json() == {"status": "ok"}
        for said in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "s3cret-of-many-letters"},
            {"Authorization": b"Bearer \xff"},
        ):
            for answer in (
                httpx.get(url + ABOUT, headers=said),
                httpx.get(url + HEAD, headers=said),
                httpx.post(url + SCORE, content=b"", headers=said),
            ):
                assert answer.status_code == 401
                assert "token" in message(answer)
        with opened(url, token_env="TEACHER_TOKEN") as teacher:
            assert len(teacher.score(samples(), NEEDS["sampled"])) == 7
            assert "s3cret" not in repr(teacher) + repr(vars(teacher))
        for wrong in ("WRONG_TOKEN", ""):
            with pytest.raises(EngineError, match="token_env") as caught:
                Served(url=url, token_env=wrong, **QUICK).open(setup())
            assert "many-letters" not in str(caught.value)
    assert "many-letters" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "teacher.example.org", ""])
def test_others_reach_it_only_with_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="--token-env"):
        Settings(model="m", host=host).check()
    monkeypatch.setenv("TEACHER_TOKEN", "s3cret")
    Settings(model="m", host=host, token_env="TEACHER_TOKEN").check()
    monkeypatch.setenv("TEACHER_TOKEN", "  ")
    with pytest.raises(RecipeError, match="not set"):
        Settings(model="m", host=host, token_env="TEACHER_TOKEN").check()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    Settings(model="m", host=host).check()


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"port": 70_000}, "--port"),
        ({"max_batch_tokens": 0}, "--max-batch-tokens"),
        ({"max_request_bytes": 0}, "--max-request"),
    ],
)
def test_options_that_cannot_be(option: dict[str, int], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Settings(model="m", **option).check()


def test_a_name_of_another_site_leads_nowhere_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: a page's own name leads to 127.0.0.1, and only the header Host tells."""
    names = ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "[", "x:y:z")
    with serving(tiny()) as url:
        for name in names:
            for path in (HEAD, ABOUT, "/health"):
                response = httpx.get(url + path, headers={"Host": name})
                assert response.status_code == 421, name
                assert "localhost" in message(response)
        for name in ("localhost", "localhost:8100", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8100"):
            assert httpx.get(url + ABOUT, headers={"Host": name}).status_code == 200
    monkeypatch.setenv("TEACHER_TOKEN", "s3cret")
    with serving(tiny(), beside={"token_env": "TEACHER_TOKEN"}) as url:
        said = {"Host": "teacher.example", "Authorization": "Bearer s3cret"}
        assert httpx.get(url + ABOUT, headers=said).status_code == 200


@contextmanager
def asked_by_hand(url: str, text: str) -> Iterator[socket.socket]:
    host, port = re.findall(r"//(.*):(\d+)", url)[0]
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as line:
        line.sendall(text.encode())
        yield line


@pytest.mark.parametrize("text", ["", f"POST {SCORE} HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_client_that_never_asks_is_dropped(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "FIRST_BYTE_S", 0.1)
    monkeypatch.setattr(serve_app, "QUIET_S", 0.1)
    with serving(tiny()) as url, asked_by_hand(url, text) as line:
        with suppress(ConnectionResetError):
            assert line.recv(1_000) == b""
        assert httpx.get(url + "/health").status_code == 200


@pytest.mark.parametrize("text", ["", f"POST {SCORE} HTTP/1.1\r\nHost: localhost\r\n"])
def test_those_that_idle_make_room_for_one_that_asks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_server, "MAX_CONNECTIONS", 20)
    begun, go_on, score = threading.Event(), threading.Event(), Scorer.score

    def slow(self: Scorer, requests: Sequence[ScoreRequest]) -> list[ScoreReply]:
        begun.set()
        assert go_on.wait(WAIT_S)
        return score(self, requests)

    monkeypatch.setattr(Scorer, "score", slow)
    with serving(tiny()) as url, ExitStack() as opened, ThreadPoolExecutor(1) as pool:
        working = pool.submit(post, url, ask(samples()).encode())
        assert begun.wait(WAIT_S)
        lines = []
        for _ in range(100):
            lines.append(opened.enter_context(asked_by_hand(url, text)))
            if len(lines) % 10 == 0:
                assert httpx.get(url + ABOUT, timeout=WAIT_S).status_code == 200
        # one that works is never closed for those that idle
        go_on.set()
        assert working.result(WAIT_S).status_code == 200
        lines[0].settimeout(WAIT_S)
        with suppress(ConnectionResetError):
            assert lines[0].recv(1_000) == b"", "the one that idled the longest went first"


def test_where_all_connections_work_one_more_is_told_to_ask_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_server, "MAX_CONNECTIONS", 3)
    begun, go_on = threading.Semaphore(0), threading.Event()
    submit, score = serve_worker.Worker.submit, Scorer.score
    monkeypatch.setattr(serve_worker.Worker, "submit", lambda *given: (submit(*given), begun.release())[0])
    monkeypatch.setattr(Scorer, "score", lambda *given: (go_on.wait(WAIT_S), score(*given))[1])
    with serving(tiny()) as url, ThreadPoolExecutor(3) as pool:
        body = ask(samples()).encode()
        working = [pool.submit(post, url, body) for _ in range(3)]
        for _ in working:
            assert begun.acquire(timeout=WAIT_S)
        reply = httpx.get(url + "/health", timeout=WAIT_S)
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
        assert message(reply) == "all connections are in use: ask later"
        go_on.set()
        assert {one.result(WAIT_S).status_code for one in working} == {200}
        assert httpx.get(url + "/health", timeout=WAIT_S).status_code == 200


def test_bodies_that_stall_make_room_for_one_that_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "MAX_BODIES", 4_000)
    monkeypatch.setattr(serve_app, "STALLED_S", 0.0)
    head = f"POST {SCORE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 9000\r\n\r\n"
    with serving(tiny()) as url, ExitStack() as opened:
        for _ in range(8):
            opened.enter_context(asked_by_hand(url, head + 1_000 * "x"))
        assert post(url, ask(samples()).encode()).status_code == 200


def test_a_reply_that_nobody_takes_is_given_up_and_a_slow_client_gets_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from understudy.serve import scorer

    monkeypatch.setattr(serve_app, "QUIET_S", 0.6)
    gone, plain = threading.Event(), serve_app.Connection.connection_lost
    monkeypatch.setattr(serve_app.Connection, "connection_lost", lambda self, exc: (gone.set(), plain(self, exc))[1])
    written, write = [], scorer.write_head
    monkeypatch.setattr(scorer, "write_head", lambda *args: (written.append(1), write(*args))[1])
    model = tiny(dtype="float32", num_rows=200_000)
    size = len(Scorer(model, letters(), name="tiny").head())
    written.clear()
    request = f"GET {HEAD} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(model) as url:
        with asked_by_hand(url, request) as stuck, asked_by_hand(url, request) as slow:
            taken = 0
            for _ in range(20):
                taken += len(slow.recv(2**20))
                time.sleep(0.1)
            while taken < size:
                part = slow.recv(2**20)
                assert part, "a client that takes something is not dropped"
                taken += len(part)
            # nothing is read before the server has let go
            assert gone.wait(WAIT_S)
            rest = 0
            with suppress(ConnectionResetError):
                while part := stuck.recv(2**20):
                    rest += len(part)
            assert rest < size
        assert len(written) == 1


def test_hidden_states_of_a_shared_prompt_are_held_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from understudy.serve import scorer

    one = Scorer(tiny("gemma2", sharp=4.0), letters(), name="tiny")
    (expected,) = one.score([ask(group())])
    held: list[int] = []
    plain = scorer.continued_hidden
    monkeypatch.setattr(scorer, "GROUP_BYTES", 10 * 32 * 8)
    monkeypatch.setattr(
        scorer, "continued_hidden", lambda *args: (held.append(sum(len(row) for row in args[2])), plain(*args))[1]
    )
    (found,) = one.score([ask(group())])
    assert held
    assert max(held) <= 10
    torch.testing.assert_close(found.fields["logprob"], expected.fields["logprob"], rtol=0, atol=BUDGET["gemma2"])


def test_a_header_without_end_is_not_read() -> None:
    body = save({"tokens": torch.zeros(1)}, {f"x{i}": "y" for i in range(10_000)})
    with pytest.raises(ProtocolError, match="header of at most"):
        ScoreRequest.decode(body)


def test_bodies_are_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, decode = [], ScoreRequest.decode

    def seen(data: bytes) -> ScoreRequest:
        threads.append(threading.current_thread().name)
        return decode(data)

    monkeypatch.setattr(ScoreRequest, "decode", staticmethod(seen))
    with serving(tiny()) as url:
        assert post(url, ask(samples()).encode()).status_code == 200
    assert threads
    assert "understudy-serve" not in threads


def test_a_port_that_is_taken_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"port {port}"), serving(tiny(), beside={"port": port}):
            pass


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RecipeError, match=r"pip install 'understudy\[serve\]'"):
        run(Settings(model="m"), print)


def test_requests_over_a_limit_are_refused_with_what_to_do() -> None:
    """A body's size before it is read, an answer's before it is computed, a sequence's with its number."""
    model = tiny(max_position_embeddings=32)
    small = samples()
    with serving(model, beside={"max_request_bytes": 2_000, "max_reply_bytes": 2_000}) as url:
        assert post(url, ask(small).encode()).status_code == 200
        too_large = post(url, bytes(3_000))
        assert too_large.status_code == 413
        assert "2,000 bytes" in message(too_large)
        reply = post(url, ask(small, need=frozenset({"full"})).encode())
        assert reply.status_code == 413
        assert "--max-reply-bytes" in message(reply)
        long = [small[0], sample("long", [2] * 4, [3] * 30)]
        refused = post(url, ask(long).encode())
        assert refused.status_code == 422
        assert "sample 1" in message(refused)
        assert "32 positions" in message(refused)
        assert post(url, ask([sample("fits", [2] * 4, [3] * 29)]).encode()).status_code == 200


def test_a_body_without_a_length_is_cut_at_the_limit() -> None:
    """No more is read than the limit, whatever is announced; a body that never comes is given up."""
    with serving(tiny(), beside={"max_request_bytes": 10_000}) as url:
        sent = []

        def endless() -> Iterator[bytes]:
            for _ in range(100_000):
                sent.append(1)
                yield bytes(1_000)

        # the server closes the line while the client still writes, which may hide the answer
        with suppress(httpx.TransportError):
            response = httpx.post(
                url + SCORE, content=endless(), headers={"Content-Type": CONTENT_TYPE}, timeout=WAIT_S
            )
            assert response.status_code == 413
        assert len(sent) < 100_000
        assert httpx.get(url + "/health").status_code == 200


def test_a_body_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "BODY_S", 0.1)
    with serving(tiny()) as url:
        host, port = re.findall(r"//(.*):(\d+)", url)[0]
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as line:
            head = f"POST {SCORE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 50"
            line.sendall(f"{head}\r\n\r\nhalf".encode())
            assert b" 408 " in line.recv(1_000)


def test_what_is_not_well_formed_is_named() -> None:
    some = samples()
    right = ask(some)
    wrong: dict[str, ScoreRequest] = {
        "prompt length 0": replace(right, prompt_lengths=torch.zeros_like(right.prompt_lengths)),
        "add up": replace(right, tokens=right.tokens[1:]),
        "one of each": replace(right, lengths=right.lengths[1:]),
        "longer": replace(right, prompt_lengths=right.lengths + 1),
        "at most 65,536": replace(
            right, lengths=torch.ones(70_000, dtype=torch.int32), prompt_lengths=torch.ones(70_000, dtype=torch.int32)
        ),
        "need is": replace(right, need=frozenset({"everything"})),
        "temperature is": replace(right, temperature=0.0),
        "temperature is 'nan'": replace(right, temperature=float("nan")),
        "k is": replace(right, need=frozenset({"topk"})),
        "tokens is int64": replace(right, tokens=right.tokens.long()),
        "vocab_size is 41": replace(right, vocab_size=41),
        "must lie in [0, 40)": replace(right, tokens=right.tokens - 3),
        "vocab_size is 30": replace(right, vocab_size=30),
    }
    with serving(tiny()) as url:
        for words, one in wrong.items():
            response = post(url, one.encode())
            assert response.status_code in (400, 422), words
            assert words in message(response)
        assert post(url, right.encode(), Content_Type="application/json").status_code == 415
        for response in (httpx.get(url + "/v1/nothing"), httpx.get(url + SCORE)):
            assert response.status_code in (404, 405)
            assert message(response)


def test_no_body_makes_the_server_fail() -> None:
    """Random, truncated, bit-flipped bodies and headers with other facts: an answer or a refusal, never a 500, and the
    server says afterwards what it said before."""
    draw = random.Random(7)
    right = ask([*samples(), *group()], need=frozenset({"topk", "full"}), k=3).encode()
    small = ask(samples()[:1]).encode()
    size = int.from_bytes(right[:8], "little")
    bodies = [
        b"",
        right[:7],
        right[:8],
        bytes(8),
        b"\xff" * 8,
        b"\xff" * 64,
        right + b"x",
        save({}),
        right[:8] + b"{" * size,
    ]
    for _ in range(200):
        bodies.append(draw.randbytes(draw.randint(0, 400)))
        source = draw.choice([right, small])
        bodies.append(source[: draw.randint(0, len(source))])
        flipped = bytearray(source)
        for _ in range(draw.randint(1, 4)):
            flipped[draw.randrange(len(flipped))] = draw.randrange(256)
        bodies.append(bytes(flipped))
    values = [-(2**31), -1, 0, 1, 2, 5, 2**31 - 1]
    for _ in range(100):
        pieces = {
            name: torch.tensor([draw.choice(values) for _ in range(draw.randint(0, 4))], dtype=torch.int32)
            for name in draw.sample(["tokens", "lengths", "prompt_lengths", "ids"], draw.randint(1, 4))
        }
        bodies.append(
            save(
                pieces,
                {
                    "need": draw.choice(["sampled", "given", "topk"]),
                    "temperature": "1e3",
                    "vocab_size": "37",
                    "k": "9999999999",
                },
            )
        )
    with serving(tiny()) as url, httpx.Client(timeout=WAIT_S) as client:
        headers = {"Content-Type": CONTENT_TYPE}
        before = client.post(url + SCORE, content=right, headers=headers).content
        for body in bodies:
            response = client.post(url + SCORE, content=body, headers=headers)
            assert response.status_code in (200, 400, 422), (response.status_code, response.content, body)
            if response.status_code != 200:
                assert message(response)
        assert client.post(url + SCORE, content=right, headers=headers).content == before


def test_no_reply_makes_the_client_fail() -> None:
    """Half a reply, and one with a few other bytes, is told apart or is a well-formed answer."""
    draw = random.Random(8)
    right = ScoreReply(
        fingerprint="f", token_ids=torch.arange(5).int(), fields={"logprob": torch.zeros(5), "entropy": torch.ones(5)}
    ).encode()
    for _ in range(500):
        flipped = bytearray(right[: draw.choice([len(right), draw.randint(0, len(right))])])
        for _ in range(draw.randint(0, 3) if flipped else 0):
            flipped[draw.randrange(len(flipped))] = draw.randrange(256)
        try:
            found = ScoreReply.decode(bytes(flipped))
        except ProtocolError:
            continue
        assert all(len(value) == len(found.token_ids) for value in found.fields.values())


# the client


WRONG = {
    "other tokens": lambda a: replace(a, token_ids=a.token_ids + 1),
    "of 4 tokens": lambda a: replace(a, token_ids=a.token_ids[1:], fields={n: v[1:] for n, v in a.fields.items()}),
    "above 0": lambda a: replace(a, fields={**a.fields, "logprob": a.fields["logprob"] + 100.0}),
    "names a token twice": lambda a: replace(a, fields={**a.fields, "topk_ids": a.fields["topk_ids"] * 0}),
    "does not exist": lambda a: replace(a, fields={**a.fields, "topk_ids": a.fields["topk_ids"] + 30}),
    "asked for": lambda a: replace(a, fields={"logprob": a.fields["logprob"]}),
    "has shape": lambda a: replace(a, fields={**a.fields, "topk_logprob": a.fields["topk_logprob"][:, :1]}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_reply_is_asked_for_again_and_then_an_error_that_names_the_sample(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, one = tiny(sharp=4.0), samples()[:1]
    with serving(model) as url, opened(url) as teacher:
        plain, count = Scorer.score, []
        bad = WRONG[what]

        def twice(self: Scorer, asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
            count.append(1)
            answers = plain(self, asks)
            return [bad(answer) if len(count) % 2 or always else answer for answer in answers]

        monkeypatch.setattr(Scorer, "score", twice)
        always = False
        same(teacher.score(one, NEEDS["topk"], k=3), local(model).score(one, NEEDS["topk"], k=3))
        assert len(count) == 2
        always = True
        with pytest.raises(EngineError, match=what) as caught:
            teacher.score(one, NEEDS["topk"], k=3)
        assert "p0#0" in str(caught.value)
        assert url in str(caught.value)


@pytest.mark.parametrize("need", NEEDS)
def test_a_score_that_stays_no_number_leaves_its_sample_unscored(need: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a number; the other samples keep theirs; a NaN that passes is not seen."""
    model, plain, count = tiny(sharp=4.0), Scorer.score, []

    def broken(self: Scorer, asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
        count.append(1)
        answers = plain(self, asks)
        for answer in answers if always or len(count) == 1 else []:
            for name, value in answer.fields.items():
                if name != "topk_ids":
                    value[2] = float("nan")
        return answers

    expected = local(model).score(samples(), NEEDS[need], k=3)
    with serving(model) as url, opened(url) as teacher:
        monkeypatch.setattr(Scorer, "score", broken)
        always = False
        same(teacher.score(samples(), NEEDS[need], k=3), expected)
        always = True
        found = teacher.score(samples(), NEEDS[need], k=3)
    assert isinstance(found[0], Unscored)
    assert "NaN" in found[0].reason
    for name in ("logprob", "entropy", "topk_logprob", "hidden"):
        value = getattr(found[0], name)
        assert value is None or bool(value.isnan().all())
    same(found[1:], expected[1:])


def test_a_token_that_the_teacher_excludes_is_scored_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny(sharp=4.0), Scorer.score

    def masked(self: Scorer, asks: Sequence[ScoreRequest]) -> list[ScoreReply]:
        answers = plain(self, asks)
        for answer in answers:
            answer.fields["logprob"][2] = -torch.inf
            answer.fields["topk_logprob"][2, 1:] = -torch.inf
        return answers

    monkeypatch.setattr(Scorer, "score", masked)
    with serving(model) as url, opened(url) as teacher:
        found = teacher.score(samples(), NEEDS["topk"], k=3)
    assert not any(isinstance(one, Unscored) for one in found)
    assert sum(int(one.logprob.isneginf().sum()) for one in found if one.logprob is not None) == 1
    assert sum(int(one.topk_logprob.isneginf().sum()) for one in found if one.topk_logprob is not None) == 2


def test_a_teacher_that_changes_in_the_middle_is_an_error() -> None:
    model = tiny()
    with serving(model) as url:
        port = int(url.rpartition(":")[2])
        teacher = Served(url=url, **QUICK).open(setup())
    try:
        with (
            serving(tiny("qwen3"), beside={"port": port}),
            pytest.raises(EngineError, match="another than when this run began"),
        ):
            teacher.score(samples(), NEEDS["sampled"])
    finally:
        teacher.close()


def test_replicas_share_the_load_and_one_may_be_dead() -> None:
    model = tiny(sharp=4.0)
    expected = local(model).score(samples(), NEEDS["sampled"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    with serving(model) as one, serving(model) as other:
        with opened(one, other, batch_tokens=10) as teacher:
            same(teacher.score(samples(), NEEDS["sampled"]), expected, atol=ROUNDING)
            asked = teacher.stats()["replicas"]
            assert all(asked[url]["requests"] > 0 for url in (one, other))
        for urls in ((dead, one), (one, dead)):
            with opened(*urls, batch_tokens=10, max_retries=3) as teacher:
                same(teacher.score(samples(), NEEDS["sampled"]), expected, atol=ROUNDING)
    with pytest.raises(EngineError, match="serve-teacher"), opened(dead, one):
        pass


def test_replicas_of_different_teachers_are_refused() -> None:
    with (
        serving(tiny()) as one,
        serving(tiny("qwen3")) as other,
        pytest.raises(EngineError, match="different teachers"),
        opened(one, other),
    ):
        pass


def test_another_tokenizer_is_refused_and_padding_rows_are_not() -> None:
    """The tables of ids are compared, not their sizes; rows past the student's tokens are padding."""
    shifted = letters(NUM_ROWS)
    shifted.eos_token = "<unk>"
    with serving(tiny(num_rows=48)) as url:
        with opened(url) as teacher:
            assert teacher.about.num_rows == 48
        with pytest.raises(VocabularyError, match="38 tokens"), opened(url, into=setup(renderer=Renderer(letters(38)))):
            pass
        with pytest.raises(VocabularyError, match="EOS is id 0"), opened(url, into=setup(renderer=Renderer(shifted))):
            pass
        with pytest.raises(RecipeError, match="48 rows"), opened(url, into=setup(vocab_size=49)):
            pass


def test_what_cannot_be_asked_is_said_before_anything_is_sent() -> None:
    with serving(tiny(max_position_embeddings=16)) as url, opened(url) as teacher:
        before = teacher.stats()["requests"]
        with pytest.raises(ScoreError, match="p2#0 has"):
            teacher.score([replace(one, token_ids=one.token_ids.repeat(2)) for one in samples()], NEEDS["sampled"])
        with pytest.raises(ScoreError, match="verbal"):
            teacher.score(samples(), frozenset({"verbal"}))
        with pytest.raises(ValueError, match="k of at least 1"):
            teacher.score(samples(), NEEDS["topk"])
        none = teacher.score(samples(), frozenset({"none"}))
        assert [len(one.token_ids) for one in none] == [one.num_response_tokens for one in samples()]
        assert teacher.score([], NEEDS["sampled"]) == []
        assert teacher.stats()["requests"] == before


def test_batches_keep_to_the_servers_limits() -> None:
    """Whatever the client's own budget is, no request is refused for its size or its answer's."""
    model = tiny(sharp=4.0)
    some = [one for seed in range(5) for one in samples(seed)]
    limits = {"max_request_bytes": 2**16 + 400, "max_reply_bytes": 4_000}
    with serving(model, beside=limits) as url, opened(url) as teacher:
        found = teacher.score(some, NEEDS["full"])
        same(found, local(model).score(some, NEEDS["full"]), atol=ROUNDING)


def test_the_section_reads_from_a_recipe() -> None:
    section = parse(Served, {"url": ["http://a:1", "http://b:2/"], "token_env": "T", "max_retries": 2})
    assert section.urls == ("http://a:1", "http://b:2/")
    assert parse(Served, {"url": "http://a:1"}).urls == ("http://a:1",)
    for keys, match in (
        ({"url": []}, "url is empty"),
        ({"url": "http://a:1", "token_env": "not a name"}, "NAME"),
        ({"url": "http://a:1", "batch_tokens": 0}, "batch_tokens"),
        ({"url": "http://a:1", "max_retries": -1}, "max_retries"),
    ):
        with pytest.raises(RecipeError, match=match):
            parse(Served, keys)
    for url in ("a:1", "http://user:word@a", "ftp://a"):
        with pytest.raises(RecipeError, match=r"teacher\.url"):
            Served(url=url).check()


def test_another_format_is_told_apart() -> None:
    with serving(tiny()) as url:
        said = httpx.get(url + ABOUT).json()
    assert asdict(About.decode(said)) == said
    assert About.decode(said | {"more": 1}) == About.decode(said)
    for wrong in (
        [],
        {},
        said | {"format": 1},
        said | {"tokenizer_digest": None},
        {k: v for k, v in said.items() if k != "dtype"},
    ):
        with pytest.raises(ProtocolError):
            About.decode(json.loads(json.dumps(wrong)))


# the process


def test_nothing_is_left_behind() -> None:
    model = tiny()
    with nothing_left(), serving(model) as url, opened(url) as teacher:
        teacher.score(samples(), NEEDS["sampled"])
    with nothing_left(), pytest.raises(EngineError), serving(model), opened("http://127.0.0.1:9"):
        pass


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    save_hf(tiny(dtype="float32"), letters(), path)
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_until_a_signal(number: int, on_disk: Path, tmp_path: Path) -> None:
    """It prints where it is and what it serves, answers, and ends by itself, leaving nothing."""
    with nothing_left():
        command = ["serve-teacher", on_disk, "--port", 0, "--max-batch-tokens", 512]
        process = Process(command_line, *command, log=tmp_path / "log")
        try:
            until = time.monotonic() + WAIT_S
            while (
                found := re.search(r"(http://127\.0\.0\.1:\d+) .* fingerprint ([0-9a-f]{32})", process.output)
            ) is None:
                assert process.poll() is None, process.output
                assert time.monotonic() < until, process.output
                time.sleep(0.02)
            with opened(found[1]) as teacher:
                assert teacher.about.fingerprint == found[2]
                assert len(teacher.score(samples(), NEEDS["full"])) == 7
            process.send_signal(number)
            assert process.wait(WAIT_S) == 0, process.output
            assert "Traceback" not in process.output
            assert "stopped" in process.output
        finally:
            process.kill()
