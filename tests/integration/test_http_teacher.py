"""A teacher behind HTTP against the same model in this process, and against every reply that is not what was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Lock
from types import TracebackType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.engine_stub import EngineStub
from tests.faults import HALF, TRUNCATED, WRONG_IDS, FaultProxy, reset, seeded, status
from tests.leaks import nothing_left
from tests.loopback import JSONHandler, Loopback
from tests.runs import save_tiny_model
from tests.tiny_models import NUM_ROWS, letters, sample, tiny
from understudy import config
from understudy.errors import DataError, EngineError, RecipeError, ScoreError
from understudy.http.replies import BadReply
from understudy.models import load_causal_lm
from understudy.packing import Unscored, attach_scores
from understudy.tasks.renderer import Renderer
from understudy.teachers import Setup
from understudy.teachers.local import LocalTeacher
from understudy.teachers.remote import formats
from understudy.teachers.remote.http import Http, HttpTeacher, group_by_prompt
from understudy.teachers.remote.score_check import MAX_FOREIGN_MASS, TOLERANCE, Answer, RawScores, check
from understudy.teachers.stores.cache import CachedTeacher
from understudy.types import Need, Sample, Scores

pytestmark = pytest.mark.slow

SAMPLED: frozenset[Need] = frozenset({"sampled"})
TOPK: frozenset[Need] = frozenset({"topk"})
APIS = ("vllm", "sglang", "completions")
MODEL = "teacher"
ATOL = 1e-5
"""A reply holds float64 numbers of the same model; what is left is that packed rows sum in another order."""


@dataclass(frozen=True)
class Asked:
    path: str
    body: Any
    headers: dict[str, str]


TOKENS = "/inference/v1/generate"


class Server:
    """The interfaces around one model; vLLM's for token ids where `tokens` says so, which else refuses with `closed`.

    `mangle(reply, number of the request)` changes a reply; it may return bytes, or a pair of a status and a body.
    """

    def __init__(self, model: Any, mangle: Callable[[Any, int], Any] | None = None) -> None:
        self.model = model
        self.mangle = mangle or (lambda reply, number: reply)
        self.shift = torch.zeros(NUM_ROWS, dtype=torch.float64)
        self.as_text = False
        self.strict = False
        self.tokens = False
        self.closed = 404
        self.num_closed = 0
        self.asked: list[Asked] = []
        self.broken: list[Exception] = []
        self.models = [{"id": MODEL, "max_model_len": 64}]
        lock, server = Lock(), self

        class Handler(JSONHandler):
            def do_GET(self) -> None:  # noqa: N802
                known = {
                    "/v1/models": {"data": server.models},
                    "/version": {"version": "0.32.0"},
                    "/get_server_info": {"version": "0.5.9"},
                }
                self.send(200 if self.path in known else 404, known.get(self.path, {"error": "no such path"}))

            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.read_body())
                if self.path == TOKENS and not server.tokens:
                    with lock:
                        server.num_closed += 1
                    self.send(server.closed, {"error": {"message": "no such route"}})
                    return
                with lock:
                    number = len(server.asked)
                    server.asked.append(Asked(self.path, body, dict(self.headers)))
                    try:
                        found = server.mangle(server.answer(self.path, body), number)
                    except Exception as error:
                        # the client would retry, and a test of wrong replies pass without one
                        server.broken.append(error)
                        raise
                status, reply = found if isinstance(found, tuple) else (200, found)
                self.send(status, reply)

        self._loopback = Loopback(Handler).start()
        self.url = f"http://127.0.0.1:{self._loopback.server_port}"

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loopback.close()
        if kind is None and self.broken:
            raise AssertionError(f"the stub itself failed: {self.broken[0]!r}") from self.broken[0]

    @torch.no_grad()
    def rows(self, ids: Sequence[int]) -> Tensor:
        """[L - 1, V] for tokens 1 to L - 1."""
        logits = self.model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        return (logits.double() + self.shift).log_softmax(-1)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/generate":
            return self._sglang(body)
        if path == TOKENS:
            return self._token_ids(body)
        if self.strict and "return_tokens_as_token_ids" in body:
            return 400, {"error": {"message": "unrecognized argument: return_tokens_as_token_ids"}}
        if body["model"] != MODEL:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        choices = [self._choice(body, ids) | {"index": i} for i, ids in enumerate(body["prompt"])]
        return {"choices": choices}

    def _choice(self, body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        logp = self.rows(ids)
        if "prompt_logprobs" not in body:
            assert body["echo"] is True
            assert body["max_tokens"] == 1
            spell = self._spell if self.as_text else "token_id:{}".format
            own = [None, *(float(logp[j, token]) for j, token in enumerate(ids[1:]))]
            return {"logprobs": {"tokens": [*map(spell, ids), spell(5)], "token_logprobs": [*own, -0.5]}}
        top = logp.topk(body["prompt_logprobs"])
        places: list[Any] = [None]
        for j, token in enumerate(ids[1:]):
            # the prompt's own token first, then by rank, as vLLM has it
            listed = [token, *top.indices[j].tolist()]
            rank = [int((logp[j] > logp[j, i]).sum()) + 1 for i in listed]
            places.append(
                {str(i): {"logprob": float(logp[j, i]), "rank": at} for i, at in zip(listed, rank, strict=True)}
            )
        return {"prompt_token_ids": ids, "prompt_logprobs": places}

    def _token_ids(self, body: dict[str, Any]) -> Any:
        ids, params = body["token_ids"], body["sampling_params"]
        assert (params["max_tokens"], params["detokenize"]) == (1, False)
        found = self._choice({"prompt_logprobs": params["prompt_logprobs"]}, ids)
        return found | {"choices": [{"index": 0, "token_ids": [5]}]}

    def _spell(self, token: int) -> str:
        return str(letters().decode([token]))

    def _sglang(self, body: dict[str, Any]) -> list[Any]:
        assert body["sampling_params"]["max_new_tokens"] == 0
        replies = []
        for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            logp = self.rows(ids)
            own, top = [[None, ids[start], None]], [None]
            for j in range(start, len(ids) - 1):
                own.append([float(logp[j, ids[j + 1]]), ids[j + 1], None])
                likeliest = logp[j].topk(body["top_logprobs_num"])
                top.append([[float(v), int(i), None] for v, i in zip(*likeliest, strict=True)])
            facts = {"prompt_tokens": len(ids), "input_token_logprobs": own}
            facts["input_top_logprobs"] = top if body["top_logprobs_num"] else [None] * len(own)
            replies.append({"text": "", "meta_info": facts})
        return replies


def samples() -> list[Sample]:
    """Groups of one prompt that do not lie side by side, a prompt of a single token, a response without a token."""
    prompts = [[3, 4, 5], [6], [7, 8], [3, 4, 5], [9, 2, 2, 9], [6], [7, 8]]
    sizes = [5, 4, 2, 1, 0, 9, 3]
    generator = torch.Generator().manual_seed(1)
    return [
        sample(f"p{i}", prompt, torch.randint(2, 37, (size,), generator=generator).tolist())
        for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
    ]


def section(server: Server | str, api: str = "vllm", **options: Any) -> Http:
    url = server if isinstance(server, str) else server.url
    patient = {"max_retries": 2, "backoff_s": 0.001, "timeout_s": 20.0, "deadline_s": 60.0}
    return Http(**({"url": url, "model": MODEL, "api": api} | patient | options))


def setup(**options: Any) -> Setup:
    return Setup(**({"name": "t", "vocab_size": NUM_ROWS, "renderer": Renderer(letters())} | options))


def scored(
    server: Server,
    api: str,
    need: frozenset[Need],
    k: int | None = None,
    made: Sequence[Sample] | None = None,
    **options: Any,
) -> list[Scores]:
    made = samples() if made is None else made
    judge = HttpTeacher(section(server, api, **options), setup())
    try:
        return judge.score(made, need, k=k)
    finally:
        judge.close()


def local(model: Any) -> LocalTeacher:
    return LocalTeacher(model, name="t", vocab_size=NUM_ROWS)


def same(found: Scores, expected: Scores, *, top: bool) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.logprob, expected.logprob, rtol=0, atol=ATOL, check_dtype=False)
    if top:
        assert found.topk_ids is not None
        assert torch.equal(found.topk_ids, expected.topk_ids)
        torch.testing.assert_close(found.topk_logprob, expected.topk_logprob, rtol=0, atol=ATOL, check_dtype=False)


@pytest.mark.parametrize("batch_tokens", [1, 17, 10_000])
@pytest.mark.parametrize("api", APIS)
def test_scores_are_those_of_the_same_model_here(api: str, batch_tokens: int) -> None:
    model = tiny(sharp=4.0)
    expected = local(model).score(samples(), TOPK, k=6)
    with nothing_left(), Server(model) as server:
        for one, like in zip(scored(server, api, SAMPLED, batch_tokens=batch_tokens), expected, strict=True):
            same(one, like, top=False)
            assert one.logprob is None or one.logprob.dtype == torch.float32
            assert one.topk_ids is None
        if api != "completions":
            found = scored(server, api, TOPK, 6, batch_tokens=batch_tokens)
            for one, like in zip(found, expected, strict=True):
                same(one, like, top=True)
            attach_scores(samples(), found, "error")
        sizes = [sum(map(len, asked.body.get("prompt") or asked.body["input_ids"])) for asked in server.asked]
        assert max(sizes) <= max(batch_tokens, 10)


@pytest.mark.parametrize("api", APIS)
def test_samples_that_are_kept_bring_their_most_likely_tokens(api: str) -> None:
    """In as many requests, of which only theirs ask for more; those that the student lacks are left out."""
    model = tiny(sharp=4.0)
    kept = [replace(one, keep_tokens=at in (0, 1)) for at, one in enumerate(samples())]
    setup_of_37 = setup(vocab_size=37)
    with Server(model) as server:
        judge = HttpTeacher(section(server, api, batch_tokens=12), setup_of_37)
        plain = judge.score(samples(), SAMPLED)
        num_requests = len(server.asked)
        found = judge.score(kept, SAMPLED)
        assert len(server.asked) == 2 * num_requests
        judge.close()
        wide = [asked.body.get("prompt_logprobs", asked.body.get("top_logprobs_num")) for asked in server.asked]
        assert {*wide[num_requests:]} == ({None} if api == "completions" else {0, 5})
        assert 5 not in wide[:num_requests]
    expected = LocalTeacher(model, name="t", vocab_size=37, tail_size=NUM_ROWS).score(kept, SAMPLED)
    for one, scores, like, true in zip(kept, found, plain, expected, strict=True):
        assert torch.equal(scores.logprob, like.logprob)  # type: ignore[arg-type]
        assert scores.topk_ids is None
        assert (scores.likeliest_ids is not None) == (one.keep_tokens and api != "completions")
        if scores.likeliest_ids is None or not one.keep_tokens:
            continue
        assert true.likeliest_ids is not None
        for row, whole in zip(scores.likeliest_ids.tolist(), true.likeliest_ids.tolist(), strict=True):
            here = [token for token in row if token >= 0]
            assert here == whole[: len(here)]
            assert row[len(here) :] == [-1] * (5 - len(here))
        assert (scores.rank is not None) == (api == "vllm")
        if scores.rank is not None:
            assert torch.equal(scores.rank, true.rank)  # type: ignore[arg-type]


def test_more_tokens_than_the_vocabulary_has_are_all_of_it() -> None:
    model = tiny()
    with Server(model) as server:
        found = scored(server, "vllm", TOPK, 99, k_max=1000)
        assert found[0].topk_ids is not None
        assert found[0].topk_ids.sort(-1).values.tolist() == [list(range(NUM_ROWS))] * 5


def test_samples_of_one_prompt_are_asked_side_by_side() -> None:
    with Server(tiny()) as server:
        scored(server, "sglang", SAMPLED)
        (asked,) = server.asked
    assert [ids[0] for ids in asked.body["input_ids"]] == [3, 3, 6, 6, 7, 7]
    assert asked.body["logprob_start_len"] == [2, 2, 0, 0, 1, 1]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=30), st.integers(1, 40))
def test_requests_hold_every_response_once_and_stay_below_their_tokens(
    shapes: list[tuple[int, int]], max_tokens: int
) -> None:
    made = [sample(f"p{i}", [3] * prompt, [4] * size) for i, (prompt, size) in enumerate(shapes)]
    groups = group_by_prompt(made, range(len(made)), max_tokens=max_tokens)
    assert sorted(i for group in groups for i in group) == [i for i, (_, size) in enumerate(shapes) if size]
    for group in groups:
        assert len(group) == 1 or sum(made[i].token_ids.numel() for i in group) <= max_tokens
    order = [made[i].prompt_length for group in groups for i in group]
    assert len([1 for a, b in pairwise(order) if a != b]) == max(0, len(set(order)) - 1)


def test_a_request_holds_no_more_samples_than_a_server_takes() -> None:
    made = [sample(f"p{i}", [3], [4]) for i in range(1200)]
    sizes = [len(group) for group in group_by_prompt(made, range(1200), max_tokens=10**6)]
    assert sum(sizes) == 1200
    assert max(sizes) <= 1024


def test_nothing_is_sent_for_no_need_and_an_unknown_one() -> None:
    with Server(tiny()) as server:
        assert all(one.logprob is None for one in scored(server, "vllm", frozenset({"none"})))
        with pytest.raises(ScoreError, match="cannot give \\['full'\\]"):
            scored(server, "vllm", frozenset({"full"}))
        with pytest.raises(ScoreError, match="completions .*gives \\['none', 'sampled'\\]"):
            scored(server, "completions", TOPK, 2)
        with pytest.raises(ValueError, match="k of at least 1"):
            scored(server, "vllm", TOPK)
        with pytest.raises(ScoreError, match="--max-logprobs 21"):
            scored(server, "vllm", TOPK, 21)
        with pytest.raises(DataError, match="no prompt token"):
            scored(server, "vllm", SAMPLED, made=[sample("p", [], [3])])
        assert not server.asked


# --- ids past the student's vocabulary


def padded(server: Server, *, by: float) -> None:
    """The last three rows of the head become `by` nats less likely."""
    server.shift[37:] -= by


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_padding_rows_are_dropped_and_nothing_is_scaled(api: str) -> None:
    """k of the student's tokens come back, descending, from the softmax over the whole head."""
    with Server(tiny(sharp=0.1)) as server:
        padded(server, by=7.0)
        # among 39 of 40 likeliest tokens are padding rows
        judge = HttpTeacher(section(server, api, k_max=40), setup(vocab_size=37))
        made = [one for one in samples() if one.num_response_tokens]
        found = judge.score(made, TOPK, k=37)
        asked = len(server.asked)
        for one, scores in zip(made, found, strict=True):
            logp = server.rows(one.token_ids.tolist())[one.prompt_length - 1 :]
            values, ids = logp[:, :37].sort(dim=-1, descending=True)
            assert scores.topk_ids is not None
            assert torch.equal(scores.topk_ids, ids)
            torch.testing.assert_close(scores.topk_logprob, values.float(), rtol=0, atol=ATOL)
            torch.testing.assert_close(
                scores.logprob, logp.gather(-1, one.response_ids[:, None]).squeeze(-1).float(), rtol=0, atol=ATOL
            )
        judge.close()
        assert asked == 1


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_more_is_asked_for_where_padding_takes_places_and_it_is_remembered(api: str) -> None:
    with Server(tiny(sharp=0.01)) as server:
        padded(server, by=-0.5)
        server.shift[:30] -= torch.linspace(0, 40, 30, dtype=torch.float64)
        server.shift[0] += 8.0
        judge = HttpTeacher(section(server, api, k_max=40), setup(vocab_size=37))
        for rounds in (2, 1):
            before = len(server.asked)
            found = judge.score(samples()[:1], TOPK, k=3)
            assert not isinstance(found[0], Unscored)
            assert found[0].topk_ids is not None
            assert bool((found[0].topk_ids < 37).all())
            assert len(server.asked) - before == rounds
        judge.close()
        with pytest.raises(ScoreError, match=r"--max-logprobs .*teacher.k_max"):
            scored_small = HttpTeacher(section(server, api, k_max=3), setup(vocab_size=37))
            try:
                scored_small.score(samples()[:1], TOPK, k=3)
            finally:
                scored_small.close()


def test_a_teacher_that_means_what_the_student_lacks_gives_no_score() -> None:
    with Server(tiny()) as server:
        padded(server, by=-9.0)
        judge = HttpTeacher(section(server), setup(vocab_size=37))
        (found,) = judge.score(samples()[:1], TOPK, k=3)
        judge.close()
    assert isinstance(found, Unscored)
    assert "its vocabulary is another" in found.reason


# --- wrong replies


def each_logprob(reply: Any, change: Callable[[float], Any], *, only: int | None = None) -> Any:
    """Every number of a response token changed; `only`: of one sample of each request."""
    for number, one in enumerate(reply["choices"] if isinstance(reply, dict) else reply):
        if only is not None and number != only:
            continue
        if "meta_info" in one:
            for place in one["meta_info"]["input_token_logprobs"][1:]:
                place[0] = change(place[0])
        elif "logprobs" in one:
            values = one["logprobs"]["token_logprobs"]
            values[1:] = map(change, values[1:])
        else:
            for row in one["prompt_logprobs"][1:]:
                for entry in row.values():
                    entry["logprob"] = change(entry["logprob"])
    return reply


def wrong_ids(reply: Any) -> Any:
    for one in reply["choices"] if isinstance(reply, dict) else reply:
        if "meta_info" in one:
            one["meta_info"]["input_token_logprobs"][-1][1] += 1
        elif "logprobs" in one:
            one["logprobs"]["tokens"][-2] = "token_id:38"
        else:
            row = one["prompt_logprobs"][-1]
            one["prompt_logprobs"][-1] = {str(39 - int(token)): entry for token, entry in row.items()}
    return reply


def one_less(reply: Any) -> Any:
    for one in reply["choices"] if isinstance(reply, dict) else reply:
        facts = one.get("meta_info") or one.get("logprobs") or one
        for name in ("input_token_logprobs", "token_logprobs", "prompt_logprobs"):
            if name in facts:
                facts[name].pop()
    return reply


def other_prompt(reply: Any) -> Any:
    for one in reply["choices"] if isinstance(reply, dict) else reply:
        if "meta_info" in one:
            one["meta_info"]["prompt_tokens"] += 1
        elif "logprobs" in one:
            one["logprobs"]["tokens"][0] = "token_id:38"
        else:
            one["prompt_token_ids"][0] += 1
    return reply


def no_index(reply: Any) -> Any:
    for one in reply["choices"] if isinstance(reply, dict) else reply:
        one.pop("index", None)
        one.pop("meta_info", None)
    return reply


WRONG: dict[str, Callable[[Any], Any]] = {
    "other ids": wrong_ids,
    "a place less": one_less,
    "another prompt": other_prompt,
    "above 0": lambda reply: each_logprob(reply, lambda value: 0.2),
    "text for numbers": lambda reply: each_logprob(reply, str),
    "true and false": lambda reply: each_logprob(reply, lambda value: False),
    "no number that fits": lambda reply: each_logprob(reply, lambda value: 10**400),
    "another shape": no_index,
    "a sample less": lambda reply: {"choices": reply["choices"][1:]} if isinstance(reply, dict) else reply[1:],
    "a list of nothing": lambda reply: [],
    "null": lambda reply: None,
    "half of it": lambda reply: json.dumps(reply).encode()[:40],
    "a page": lambda reply: b"<html>gateway</html>",
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("api", APIS)
def test_a_wrong_reply_is_asked_again_and_never_believed(api: str, kind: str) -> None:
    model = tiny(sharp=2.0)
    with Server(model, lambda reply, number: WRONG[kind](reply) if number == 0 else reply) as server:
        for one, like in zip(scored(server, api, SAMPLED), local(model).score(samples(), SAMPLED), strict=True):
            same(one, like, top=False)
        assert len(server.asked) == 2
    with Server(model, lambda reply, number: WRONG[kind](reply)) as server:
        with pytest.raises(EngineError, match="3 attempts") as caught:
            scored(server, api, SAMPLED)
        assert server.url in str(caught.value)
        assert "sample p0" in str(caught.value)


def test_an_error_names_the_sample_whose_scores_are_wrong() -> None:
    with (
        Server(tiny(), lambda reply, number: each_logprob(reply, lambda value: 0.2, only=2)) as server,
        pytest.raises(EngineError, match=f"{server.url}, sample p1#0: 0.2 is above 0"),
    ):
        scored(server, "vllm", SAMPLED)


def shifted_rows(reply: Any) -> Any:
    """The rows of the likeliest tokens belong to the places before theirs."""
    for one in reply["choices"] if isinstance(reply, dict) else reply:
        if "meta_info" in one:
            rows = one["meta_info"]["input_top_logprobs"]
            rows[1:] = [*rows[2:], rows[1]]
    return reply


def turned_rows(reply: Any) -> Any:
    for one in reply:
        for row in one["meta_info"]["input_top_logprobs"][1:]:
            row.reverse()
    return reply


def repeated_id(reply: Any) -> Any:
    for one in reply:
        for row in one["meta_info"]["input_top_logprobs"][1:]:
            row[1] = list(row[0])
    return reply


def few(reply: Any) -> Any:
    for one in reply["choices"] if isinstance(reply, dict) else reply:
        if "meta_info" in one:
            for row in one["meta_info"]["input_top_logprobs"][1:]:
                row.pop()
        else:
            for row in one["prompt_logprobs"][1:]:
                for token in list(row)[1:][-2:]:
                    del row[token]
    return reply


@pytest.mark.parametrize(
    ("api", "change"),
    [("sglang", shifted_rows), ("sglang", turned_rows), ("sglang", repeated_id), ("sglang", few), ("vllm", few)],
)
def test_wrong_rows_of_likeliest_tokens_are_refused(api: str, change: Callable[[Any], Any]) -> None:
    model = tiny(sharp=4.0)
    with Server(model, lambda reply, number: change(reply)) as server, pytest.raises(EngineError, match="3 attempts"):
        scored(server, api, TOPK, 4)
    with Server(model, lambda reply, number: change(reply) if number == 0 else reply) as server:
        for one, like in zip(scored(server, api, TOPK, 4), local(model).score(samples(), TOPK, k=4), strict=True):
            same(one, like, top=True)


ABSENT = {"null": None, "NaN": math.nan}


@pytest.mark.parametrize("value", ABSENT.values(), ids=ABSENT)
@pytest.mark.parametrize("api", APIS)
def test_a_missing_number_is_asked_for_again_and_then_has_a_reason(api: str, value: float | None) -> None:
    """It never becomes a number: the sample is unscored, the others of the request keep their scores."""
    model = tiny(sharp=2.0)
    made, expected = samples(), local(model).score(samples(), SAMPLED)
    with Server(
        model, lambda reply, number: each_logprob(reply, lambda _: value, only=1) if number == 0 else reply
    ) as server:
        for one, like in zip(scored(server, api, SAMPLED), expected, strict=True):
            same(one, like, top=False)
        assert len(server.asked) == 2
        second = server.asked[1].body
        assert len(second.get("prompt") or second["input_ids"]) == 1

    def always(reply: Any, number: int) -> Any:
        return each_logprob(reply, lambda _: value, only=1 if number == 0 else 0)

    with Server(model, always) as server:
        found = scored(server, api, SAMPLED)
        assert len(server.asked) == 3
    gone = [i for i, one in enumerate(found) if isinstance(one, Unscored)]
    assert gone == [3]
    assert found[3].logprob is not None
    assert bool(found[3].logprob.isnan().all())
    assert "response token 0" in found[3].reason  # type: ignore[attr-defined]
    for i in {0, 1, 2, 4, 5, 6}:
        same(found[i], expected[i], top=False)
    assert [one is None for one in attach_scores(made, found, "drop")] == [i == 3 for i in range(7)]
    with pytest.raises(ScoreError, match="sample p3"):
        attach_scores(made, found, "error")


@pytest.mark.parametrize("value", [-math.inf, -9999.0], ids=["minus infinity", "vLLM's minus infinity"])
@pytest.mark.parametrize("api", APIS)
def test_a_token_that_the_server_excludes_has_a_score(api: str, value: float) -> None:
    """It is asked for once, and stays -inf until a method floors it."""
    made = samples()
    with Server(tiny(sharp=2.0), lambda reply, number: each_logprob(reply, lambda _: value, only=1)) as server:
        found = scored(server, api, SAMPLED)
        assert len(server.asked) == 1
    gone = [i for i, one in enumerate(found) if one.logprob is not None and bool(one.logprob.isneginf().any())]
    assert len(gone) == 1
    assert None not in attach_scores(made, found, "error")


# --- the check alone


@st.composite
def raws(draw: st.DrawFn) -> tuple[Sample, RawScores, int]:
    """What an honest server says about a random row of each response token."""
    size, k = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    vocab = draw(st.integers(k, 9))
    numbers = st.floats(-20, 20)
    logits = draw(st.lists(st.lists(numbers, min_size=vocab, max_size=vocab), min_size=size, max_size=size))
    logp = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    response = draw(st.lists(st.integers(0, vocab - 1), min_size=size, max_size=size))
    top = logp.topk(k)
    rows = [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(top.indices, top.values, strict=True)]
    return (
        sample("p", [1], response),
        RawScores(response, [float(row[t]) for row, t in zip(logp, response, strict=True)], rows),
        k,
    )


@given(raws(), st.data())
def test_check_returns_what_was_said_and_refuses_what_cannot_be(
    made: tuple[Sample, RawScores, int], data: st.DataObject
) -> None:
    one, raw, k = made
    scores = check(one, raw, k=k, num_top=k, vocab_size=9).scores
    assert scores is not None
    assert raw.top is not None
    expected = torch.tensor(raw.logprob, dtype=torch.float64).clamp(max=0).float()
    assert torch.equal(scores.logprob, expected)  # type: ignore[arg-type]
    assert scores.topk_ids is not None
    assert scores.topk_ids.tolist() == [[token for token, _ in row] for row in raw.top]
    row = data.draw(st.integers(0, len(raw.logprob) - 1))
    column = data.draw(st.integers(0, k - 1))
    for name, other in _corrupted(raw, row, column).items():
        if name.startswith("missing"):
            answer = check(one, other, k=k, num_top=k, vocab_size=9)
            assert answer.scores is None, name
            assert f"response token {row}" in answer.missing
        else:
            with pytest.raises(BadReply):
                check(one, other, k=k, num_top=k, vocab_size=9)


def _corrupted(raw: RawScores, row: int, column: int) -> dict[str, RawScores]:
    def put(values: Sequence[Any], at: int, value: Any) -> list[Any]:
        return [*values[:at], value, *values[at + 1 :]]

    assert raw.top is not None
    entries = raw.top[row]
    token = entries[column][0]
    found = {
        "another id": replace(raw, token_ids=put(raw.token_ids, row, raw.token_ids[row] + 1)),
        "one id less": replace(raw, token_ids=raw.token_ids[1:]),
        "one score less": replace(raw, logprob=raw.logprob[1:]),
        "one row less": replace(raw, top=raw.top[1:]),
        "above 0": replace(raw, logprob=put(raw.logprob, row, 2 * TOLERANCE)),
        "a short row": replace(raw, top=put(raw.top, row, entries[1:])),
        "no rows": replace(raw, top=None),
        "a row above 0": replace(raw, top=put(raw.top, row, put(entries, column, (token, 1.0)))),
        "no id": replace(raw, top=put(raw.top, row, put(entries, column, (-1, entries[column][1])))),
    }
    if len(entries) > 1:
        other = entries[column - 1][0]
        found["an id twice"] = replace(raw, top=put(raw.top, row, put(entries, column, (other, entries[column][1]))))
        if entries[0][1] > entries[-1][1]:
            found["ascending"] = replace(raw, top=put(raw.top, row, entries[::-1]))
    for value in (None, math.nan):
        found[f"missing {value}"] = replace(raw, logprob=put(raw.logprob, row, value))
        found[f"missing {value} in a row"] = replace(raw, top=put(raw.top, row, put(entries, column, (token, value))))
    return found


def test_a_row_may_end_in_excluded_tokens_but_not_hold_nothing_else() -> None:
    """A server that applies top-p has fewer than K tokens of any probability."""
    one = sample("p", [1], [2])
    rows = [[(3, -0.1), (4, -9999.0), (5, -9999.0)]]
    found = check(one, RawScores([2], [-9999.0], rows), k=3, num_top=3, vocab_size=9).scores
    assert found is not None
    assert found.topk_logprob is not None
    assert found.topk_logprob[0, 1:].tolist() == [-math.inf, -math.inf]
    nothing = [[(token, -9999.0) for token, _ in rows[0]]]
    assert check(one, RawScores([2], [-9999.0], nothing), k=3, num_top=3, vocab_size=9).scores is None
    with pytest.raises(BadReply, match="contradicts"):
        check(one, RawScores([2], [-1.0], rows), k=3, num_top=3, vocab_size=9)


def test_a_rounded_zero_is_zero_and_a_contradiction_is_none() -> None:
    one = sample("p", [1], [2])
    found = check(one, RawScores([2], [TOLERANCE / 2], [[(2, TOLERANCE / 2)]]), k=1, num_top=1, vocab_size=9).scores
    assert found is not None
    assert found.logprob is not None
    assert found.topk_logprob is not None
    assert (found.logprob.tolist(), found.topk_logprob.tolist()) == ([0.0], [[0.0]])
    for raw in (RawScores([2], [-1.0], [[(2, -1.1)]]), RawScores([2], [-1.0], [[(3, -1.1)]])):
        with pytest.raises(BadReply, match="contradicts"):
            check(one, raw, k=1, num_top=1, vocab_size=9)


@pytest.mark.parametrize(("mass", "lost"), [(MAX_FOREIGN_MASS / 2, False), (MAX_FOREIGN_MASS * 2, True)])
def test_foreign_probability_is_left_out_up_to_a_bound(mass: float, lost: bool) -> None:
    raw = RawScores([2], [-0.1], [[(2, -0.1), (9, math.log(mass)), (3, -7.0)]])
    answer: Answer = check(sample("p", [1], [2]), raw, k=2, num_top=3, vocab_size=9)
    assert (answer.scores is None) == lost
    assert answer.short == 0
    if answer.scores is not None and answer.scores.topk_ids is not None:
        assert answer.scores.topk_ids.tolist() == [[2, 3]]
        assert check(sample("p", [1], [2]), raw, k=3, num_top=3, vocab_size=9).short == 1


# --- vLLM's route for token ids


def test_the_route_for_token_ids_gives_the_same_scores() -> None:
    """One sequence a request, no text written."""
    model = tiny(sharp=4.0)
    expected = local(model).score(samples(), TOPK, k=6)
    with nothing_left(), Server(model) as server:
        server.tokens = True
        for one, like in zip(scored(server, "vllm", SAMPLED), expected, strict=True):
            same(one, like, top=False)
        for one, like in zip(scored(server, "vllm", TOPK, 6), expected, strict=True):
            same(one, like, top=True)
        assert {asked.path for asked in server.asked} == {TOKENS}
        assert len(server.asked) == 2 * sum(one.num_response_tokens > 0 for one in samples())


@pytest.mark.parametrize("status", [400, 403, 404, 405, 422])
def test_a_server_without_the_route_is_found_out_once(status: int) -> None:
    """Also by many threads at once; batches are those of the completions."""
    model = tiny(sharp=2.0)
    expected = local(model).score(samples(), SAMPLED)
    with nothing_left(), Server(model) as server, ThreadPoolExecutor(8) as pool:
        server.closed = status
        judge = HttpTeacher(section(server), setup())
        for found in pool.map(lambda _: judge.score(samples(), SAMPLED), range(8), timeout=60):
            for one, like in zip(found, expected, strict=True):
                same(one, like, top=False)
        judge.close()
        assert server.num_closed == 1
        assert [asked.path for asked in server.asked] == ["/v1/completions"] * 8


@pytest.mark.parametrize("status", [401, 418])
def test_another_refusal_is_none_of_the_route(status: int) -> None:
    with Server(tiny()) as server:
        server.closed = status
        with pytest.raises(EngineError, match=f"status {status}"):
            scored(server, "vllm", SAMPLED)
        assert not server.asked


def test_a_sample_that_is_too_long_is_no_missing_route() -> None:
    long = "The decoder prompt (length 9) is longer than the maximum model length of 8."
    with Server(tiny(), refuses(400, long)) as server:
        server.tokens = True
        with pytest.raises(ScoreError, match="p0#0 has 8 tokens.*--max-model-len"):
            scored(server, "vllm", SAMPLED)
        assert [asked.path for asked in server.asked] == [TOKENS]


TOKEN_KINDS = ("other ids", "a place less", "another prompt", "above 0", "text for numbers", "half of it", "null")


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_a_wrong_reply_of_the_route_is_asked_again_and_never_believed(kind: str) -> None:
    def wrong(reply: Any) -> Any:
        found = WRONG[kind](reply if kind in ("half of it", "null") else [reply])
        return found[0] if isinstance(found, list) else found

    model = tiny(sharp=2.0)
    with Server(model, lambda reply, number: wrong(reply) if number in (0, 3) else reply) as server:
        server.tokens = True
        for one, like in zip(scored(server, "vllm", SAMPLED), local(model).score(samples(), SAMPLED), strict=True):
            same(one, like, top=False)
        assert len(server.asked) == 8
        server.mangle = lambda reply, number: wrong(reply)
        with pytest.raises(EngineError, match=r"3 attempts.*sample p0|sample p0.*3 attempts"):
            scored(server, "vllm", SAMPLED)


# --- tokens as text


def test_tokens_that_come_as_text_are_compared_with_the_students() -> None:
    model = tiny(sharp=2.0)
    with Server(model) as server:
        server.as_text = True
        for one, like in zip(
            scored(server, "completions", SAMPLED), local(model).score(samples(), SAMPLED), strict=True
        ):
            same(one, like, top=False)
        server.mangle = lambda reply, number: json.loads(json.dumps(reply).replace('"B"', '"b"'))
        with pytest.raises(EngineError, match="'b' was scored in its place"):
            scored(server, "completions", SAMPLED)
        judge = HttpTeacher(section(server, "completions"), setup(renderer=None))
        with pytest.raises(EngineError, match="no tokenizer"):
            judge.score(samples(), SAMPLED)
        judge.close()


def test_a_strict_server_is_asked_without_the_field_that_it_does_not_know() -> None:
    model = tiny(sharp=2.0)
    with Server(model) as server:
        server.as_text = server.strict = True
        judge = HttpTeacher(section(server, "completions"), setup())
        for _ in range(2):
            for one, like in zip(judge.score(samples(), SAMPLED), local(model).score(samples(), SAMPLED), strict=True):
                same(one, like, top=False)
        judge.close()
        assert ["return_tokens_as_token_ids" in asked.body for asked in server.asked] == [True, False, False]


# --- servers


def test_a_dead_replica_costs_nothing_but_attempts() -> None:
    model = tiny(sharp=2.0)
    with Server(model) as gone:
        pass
    with nothing_left(), Server(model) as server:
        for first, second in ((gone, server), (server, gone)):
            found = scored(server, "vllm", SAMPLED, url=(first.url, f"{second.url}/v1/"), batch_tokens=9)
            for one, like in zip(found, local(model).score(samples(), SAMPLED), strict=True):
                same(one, like, top=False)
    with nothing_left(), pytest.raises(EngineError, match="teacher 't'"):
        scored(gone, "vllm", SAMPLED, max_retries=1, deadline_s=1.0)


def refuses(status: int, message: str) -> Callable[[Any, int], Any]:
    return lambda reply, number: (status, {"error": {"message": message}})


@pytest.mark.parametrize(
    ("mangle", "error", "shown"),
    [
        (refuses(404, "no such model"), EngineError, "/v1/models"),
        (refuses(401, "no"), EngineError, "teacher.api_key_env"),
        (
            refuses(400, "This model's maximum context length is 9 tokens"),
            ScoreError,
            "p5#0 has 10 tokens.*--max-model-len",
        ),
        (refuses(400, "max_tokens must be at least 1, got 0."), ScoreError, "p5#0 has 10 tokens.*--max-model-len"),
        (refuses(400, "token id 99 is out of vocabulary"), EngineError, "out of vocabulary"),
    ],
)
def test_a_refusal_says_what_to_do_and_is_not_repeated(
    mangle: Callable[[Any, int], Any], error: type[Exception], shown: str
) -> None:
    with Server(tiny(), mangle) as server:
        with pytest.raises(error, match=shown):
            scored(server, "vllm", SAMPLED)
        assert len(server.asked) == 1


def test_the_key_is_sent_and_never_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    with Server(tiny()) as server:
        judge = HttpTeacher(section(server, api_key_env="TEACHER_KEY"), setup())
        judge.score(samples(), SAMPLED)
        sent = {name.lower(): value for name, value in server.asked[0].headers.items()}
        assert sent["authorization"] == "Bearer sk-very-secret"
        server.mangle = refuses(403, "the key sk-very-secret is not for this")
        with pytest.raises(EngineError, match="TEACHER_KEY is not accepted") as caught:
            judge.score(samples(), SAMPLED)
        judge.close()
        assert "very-secret" not in str(caught.value)
        assert "very-secret" not in repr(vars(judge))


@pytest.mark.parametrize(("api", "version"), [("vllm", "0.32.0"), ("sglang", "0.5.9"), ("completions", None)])
def test_a_server_says_what_it_is(api: str, version: str | None) -> None:
    with Server(tiny()) as server, Server(tiny()) as other:
        other.models = [{"id": "more"}, {"id": MODEL, "max_model_len": 32}]
        judge = HttpTeacher(section(server, api, url=(server.url, other.url)), setup())
        assert judge.info() == {"models": [MODEL], "max_length": 32, "version": version}
        other.models = [{"id": "more"}]
        with pytest.raises(EngineError, match=f"{other.url} has no model 'teacher'; it has: more"):
            judge.info()
        judge.close()
    with pytest.raises(EngineError), closing(HttpTeacher(section(server, max_retries=0), setup())) as gone:
        gone.info()


@pytest.mark.parametrize("scale_out", [False, True])
def test_a_network_of_faults_changes_no_score(tmp_path: Any, scale_out: bool) -> None:
    """Resets, overload, half replies, other ids, NaN and null on the way to a stand-in for vLLM's server."""
    folder = save_tiny_model(tmp_path / "model", seed=3, hidden_size=32)
    model = load_causal_lm(folder, dtype="float32", device="cpu")
    size = model.config.vocab_size
    made = [
        sample(
            f"p{i}",
            [3 + i // 4, 4],
            torch.randint(0, size, (1 + i,), generator=torch.Generator().manual_seed(i)).tolist(),
        )
        for i in range(24)
    ]
    expected = LocalTeacher(model, name="t", vocab_size=size).score(made, TOPK, k=3)
    kinds = [reset(), reset(middle=True), status(429), HALF, TRUNCATED, WRONG_IDS]
    with nothing_left(), EngineStub(folder) as stub, FaultProxy(stub.url, seeded(7, kinds, share=0.4)) as proxy:
        stub.scale_out = scale_out
        judge = HttpTeacher(
            section(proxy.url, model=stub.name, batch_tokens=40, max_retries=20), setup(vocab_size=size)
        )
        for one, like in zip(judge.score(made, TOPK, k=3), expected, strict=True):
            same(one, like, top=True)
        judge.close()
        assert len(proxy.seen) > len(kinds) / 2
        assert bool(stub.asked("/v1/completions")) != scale_out


# --- a new format


class Plain(formats.WireFormat):
    """A server that takes ids and returns one number for each but the first."""

    path = "/scores"
    gives = frozenset({"none", "sampled"})

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        return {"ids": [one.token_ids.tolist() for one in samples]}

    def parts(self, reply: Any) -> list[Any]:
        return list(reply["rows"])

    def read(self, sample: Sample, part: Any) -> RawScores:
        return RawScores(part["ids"][sample.prompt_length :], part["numbers"][sample.prompt_length - 1 :])


def test_a_new_format_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, "plain", Plain)  # type: ignore[arg-type]
    model = tiny(sharp=2.0)
    with Server(model) as server:

        def answer(path: str, body: Any) -> Any:
            rows = ((ids, server.rows(ids).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]) for ids in body["ids"])
            return {"rows": [{"ids": ids, "numbers": row.tolist()} for ids, row in rows]}

        monkeypatch.setattr(server, "answer", answer)
        for one, like in zip(scored(server, "plain", SAMPLED), local(model).score(samples(), SAMPLED), strict=True):
            same(one, like, top=False)
        assert {asked.path for asked in server.asked} == {"/scores"}
        with pytest.raises(ScoreError, match="plain .*gives \\['none', 'sampled'\\]"):
            scored(server, "plain", TOPK, 2)


# --- the section


def test_the_section_reads_and_checks_itself() -> None:
    one = config.parse(Http, {"url": "http://h:1/v1", "model": "m", "api": "vllm"})
    many = config.parse(Http, {"url": ["http://h:1", "https://g/x/v1/"], "model": "m", "api": "sglang"})
    assert (one.bases, many.bases) == (("http://h:1",), ("http://h:1", "https://g/x"))
    assert config.parse(Http, config.dump(many)) == many
    assert "http://h:1, https://g/x" in many.check()
    for values, shown in (
        ({"url": "h:1"}, "teacher.url"),
        ({"url": "http://u:p@h"}, "password"),
        ({"url": ["http://h", "ftp://h"]}, "ftp"),
        ({"url": "http://h/v1/completions"}, "base"),
        ({"model": " "}, "teacher.model"),
    ):
        with pytest.raises(RecipeError, match=shown):
            config.parse(Http, {"url": "http://h", "model": "m", "api": "vllm"} | values).check()
    for values, shown in (
        ({"api": "tgi"}, "api"),
        ({"url": []}, "url is empty"),
        ({"api_key_env": "sk-123"}, "NAME"),
        ({"k_max": 0}, "k_max"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"deadline_s": 0}, "deadline_s"),
    ):
        with pytest.raises(RecipeError, match=shown):
            config.parse(Http, {"url": "http://h", "model": "m", "api": "vllm"} | values)


@pytest.mark.parametrize("api", APIS)
def test_another_temperature_is_refused_before_anything_is_asked(api: str) -> None:
    with pytest.raises(RecipeError, match="serve-teacher"):
        section("http://127.0.0.1:9", api).open(setup(temperature=0.7))


def test_a_fingerprint_is_all_that_scores_depend_on_and_needs_no_server(tmp_path: Any) -> None:
    def of(made: Http, **options: Any) -> str:
        judge = made.open(setup(**options))
        judge.close()
        return judge.fingerprint

    base = section("http://127.0.0.1:9")
    others = [
        of(replace(base, api="sglang")),
        of(replace(base, model="other")),
        of(replace(base, revision="2")),
        of(base, vocab_size=39),
    ]
    assert len({of(base), *others}) == 5
    cached = replace(base, url="http://127.0.0.1:8", cache=str(tmp_path))
    assert of(cached) == of(base)
    judge = cached.open(setup())
    assert isinstance(judge, CachedTeacher)
    assert isinstance(judge.teacher, HttpTeacher)
    judge.close()
