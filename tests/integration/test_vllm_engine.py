"""The engine of vLLM servers, on a stub that computes with a real tiny model: what it writes is that model's."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine_stub import EngineStub
from tests.leaks import nothing_left
from tests.tiny_models import EOS, NUM_ROWS, letters, plain_logp, request, tiny
from understudy.config import parse
from understudy.engines import VLLM, EngineSetup, HFEngine
from understudy.engines.base import Probe
from understudy.engines.vllm.engine import FLOAT32_GAP, VLLMEngine
from understudy.engines.vllm.launch import free_ports
from understudy.engines.vllm.servers import server_command
from understudy.engines.vllm.settings import Launch, logprobs_modes
from understudy.engines.vllm.weights import SHARED_MEMORY, NCCLTransfer, WeightStore, memory_left, with_head
from understudy.errors import DataError, EngineError, RecipeError, WeightsLostError
from understudy.models.lora import merged_state_dict
from understudy.types import Author, Request, Sample, Sampling

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""The stub's forward with a cache against one without, in float32."""
PATIENCE = {"timeout_s": 20.0, "deadline_s": 20.0, "max_retries": 0}
CPU = torch.device("cpu")
LONG = Sampling(max_new_tokens=24)
PROMPTS = [[5], [6, 7, 8, 9], [3, 4]]


def model_of(tied: bool = False, sharp: float = 3.0) -> Any:
    return tiny(dtype="float32", tie_word_embeddings=tied, sharp=sharp)


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    letters(model.config.vocab_size).save_pretrained(path)
    return path


def requests(per_prompt: int = 3) -> list[Request]:
    return [request(f"p{number}", ids, index) for number, ids in enumerate(PROMPTS) for index in range(per_prompt)]


def setup_of(
    model: Any,
    tmp_path: Path,
    *,
    vocab_size: int | None = None,
    absent: tuple[int, ...] = (),
    stop_ids: tuple[int, ...] = (EOS,),
    sampling: Sampling = LONG,
) -> EngineSetup:
    return EngineSetup(
        model=model,
        tokenizer=letters(vocab_size or NUM_ROWS),
        vocab_size=vocab_size or NUM_ROWS,
        absent=absent,
        stop_ids=stop_ids,
        autocast=None,
        seed=0,
        sampling=sampling,
        max_new_tokens=sampling.max_new_tokens,
        run_dir=tmp_path / "run",
    )


@contextmanager
def make_engine(
    model: Any,
    tmp_path: Path,
    *,
    stubs: int = 1,
    stub: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    absent: tuple[int, ...] = (),
    stop_ids: tuple[int, ...] = (EOS,),
    sampling: Sampling = LONG,
    **section: Any,
) -> Iterator[tuple[VLLMEngine, list[EngineStub]]]:
    """An engine before its first push, and its servers, which start with the weights of `model`."""
    start = saved(model, tmp_path / "start")
    with nothing_left(), ExitStack() as stack:
        servers = [stack.enter_context(EngineStub(start, **(stub or {}))) for _ in range(stubs)]
        for server in servers:
            server.logprobs_mode = section.get("mode", "raw_logprobs")
        section.pop("mode", None)
        given = {"url": tuple(server.url for server in servers)} | PATIENCE | section
        setup = setup_of(model, tmp_path, vocab_size=vocab_size, absent=absent, stop_ids=stop_ids, sampling=sampling)
        made = VLLMEngine(VLLM(**given), setup)
        yield stack.enter_context(closing(made)), servers


@torch.no_grad()
def probe_of(model: Any, *sequences: list[int]) -> Probe:
    ids = [torch.tensor(one) for one in sequences or ([5, 6, 7, 8, 9, 10, 11], [3, 4, 5])]
    logprob = [plain_logp(model, row).gather(-1, row[1:, None]).squeeze(-1) for row in ids]
    return Probe(tuple(ids), tuple(logprob))


def moved(model: Any, seed: int = 1, size: float = 0.3) -> Any:
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


def push(engine: VLLMEngine, model: Any, version: int = 0) -> float:
    gap = engine.push(merged_state_dict(model).items(), version, probe_of(model))
    assert gap is not None
    return gap


def wait_until_writing(server: EngineStub, *writing: Future[Any]) -> None:
    """Requests have come, and there was time for some tokens; or everything is written."""
    until = time.monotonic() + PATIENCE["timeout_s"]
    while not server.scheduler.running and not (writing and all(one.done() for one in writing)):
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.15)


def check_logprob(model: Any, sample: Sample, temperature: float = 1.0, vocab_size: int | None = None) -> None:
    assert sample.rollout_logprob is not None
    logp = plain_logp(model, sample.token_ids, temperature, vocab_size)
    expected = logp.gather(-1, sample.token_ids[1:, None]).squeeze(-1).float()
    student = sample.author == Author.STUDENT
    torch.testing.assert_close(sample.rollout_logprob[student], expected[student[1:]], rtol=0, atol=TOLERANCE)
    assert bool(sample.rollout_logprob[~student].isnan().all())


def facts(samples: list[Sample]) -> list[tuple[list[int], str, str]]:
    return [(sample.token_ids.tolist(), sample.finish, sample.text) for sample in samples]


def test_samples_are_the_models(tmp_path: Path) -> None:
    """Log-probabilities, authors, versions, ends and texts; the same (stream, step, request) draws the same."""
    model = model_of()
    with make_engine(model, tmp_path, stubs=2) as (engine, servers):
        assert push(engine, model, 3) < TOLERANCE
        samples = engine.generate(requests(), LONG, step=0)
        for asked, sample in zip(requests(), samples, strict=True):
            check_logprob(model, sample)
            assert sample.key == asked.key
            assert sample.token_ids[: sample.prompt_length].tolist() == asked.token_ids.tolist()
            student = sample.author == Author.STUDENT
            assert torch.equal(sample.policy_version, torch.where(student, 3, -1))
            ended = sample.response_ids[-1].item() == EOS
            assert sample.finish == ("stop" if ended else "length")
            assert ended or sample.num_response_tokens == LONG.max_new_tokens
            assert EOS not in sample.response_ids[:-1]
            shown = sample.response_ids[:-1] if ended else sample.response_ids
            assert sample.text == letters().decode(shown, skip_special_tokens=True)
        assert {sample.finish for sample in samples} == {"stop", "length"}
        assert len({tuple(sample.token_ids.tolist()) for sample in samples}) > len(PROMPTS)
        assert facts(engine.generate(requests()[::-1], LONG, step=0)) == facts(samples)[::-1]
        assert facts(engine.generate(requests(), LONG, step=1)) != facts(samples)
        assert facts(engine.generate(requests(), LONG, step=0, stream="eval")) != facts(samples)
        assert all(len(server.asked("/v1/completions")) > 3 for server in servers)


def test_greedy_is_that_of_the_hf_engine_prefixes_included(tmp_path: Path) -> None:
    model = model_of()
    greedy = Sampling(temperature=0.0, max_new_tokens=9)
    asked = [*requests(1), request("g", [5, 6], prefix=[7, 8, 9]), request("h", [5, 6], prefix=[7] * 8)]
    own = HFEngine(model, letters(), seed=0, stop_ids=(EOS,), vocab_size=NUM_ROWS)
    with make_engine(model, tmp_path) as (engine, _):
        push(engine, model)
        found = engine.generate(asked, greedy, step=0)
    expected = own.generate(asked, greedy, step=0)
    assert facts(found) == facts(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.author, other.author)
        assert one.author.dtype == other.author.dtype
        assert one.policy_version is not None
        assert torch.equal(one.policy_version, other.policy_version)
        torch.testing.assert_close(one.rollout_logprob, other.rollout_logprob, rtol=0, atol=TOLERANCE, equal_nan=True)


def test_stop_tokens_are_the_trainers(tmp_path: Path) -> None:
    """Neither the model's EOS nor another end than the trainer's counts."""
    model = model_of()
    ends = tuple(range(20, 30))
    with make_engine(model, tmp_path, stop_ids=ends) as (engine, _):
        push(engine, model)
        samples = engine.generate(requests(8), LONG, step=0)
    assert any(EOS in sample.response_ids for sample in samples)
    for sample in samples:
        inside = [token in ends for token in sample.response_ids.tolist()]
        assert not any(inside[:-1])
        assert sample.finish == ("stop" if inside[-1] else "length")


@pytest.mark.parametrize("tied", [True, False])
def test_a_push_arrives(tied: bool, tmp_path: Path) -> None:
    """The head of a tied model too, where the server keeps a copy of its own; nothing lies around afterwards."""
    model = model_of(tied)
    with make_engine(model, tmp_path, stubs=2, stub={"stale_tied_head": tied}) as (engine, servers):
        push(engine, model)
        old = facts(engine.generate(requests(), LONG, step=0))
        assert push(engine, moved(model), 1) < TOLERANCE
        assert engine._check.last_gap < TOLERANCE
        samples = engine.generate(requests(), LONG, step=0)
        assert facts(samples) != old
        for sample in samples:
            check_logprob(model, sample)
        assert engine._store is not None
        folder = engine._store.folder
        assert folder.parent == SHARED_MEMORY
        assert [path.name for path in folder.iterdir()] == ["lock"]
        for server in servers:
            paths = [one.path for one in server.requests if one.path not in ("/v1/completions", "/v1/models")]
            routes = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
            assert [path for path in paths if path in routes] == routes * 2
    assert not folder.exists()


def test_weights_of_an_adapter_arrive_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from understudy.models import apply_lora

    model = apply_lora(model_of(), rank=2, alpha=8.0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    plain = model_of()
    plain.load_state_dict(merged_state_dict(model))
    with make_engine(model_of(), tmp_path) as (engine, _):
        engine.push(merged_state_dict(model).items(), 1, probe_of(plain))
        assert engine._check.last_gap < TOLERANCE


def test_a_push_that_is_ignored_ends_the_run(tmp_path: Path) -> None:
    model = model_of()
    with make_engine(model, tmp_path, stubs=2) as (engine, servers):
        push(engine, model)
        servers[1].ignore_pushes = True
        with pytest.raises(EngineError, match="version 1(.|\n)*did not arrive") as caught:
            push(engine, moved(model), 1)
        assert servers[1].url in str(caught.value)
        assert engine._check.last_gap > FLOAT32_GAP
        with pytest.raises(EngineError, match="did not get version 1"):
            engine.generate(requests(), LONG, step=0)


LOOSE: dict[str, Any] = {"check_tolerance": 0.05}
"""As for an engine in 16 bits: what one update moves is far below it."""


def push_little(engine: VLLMEngine, model: Any, version: int, size: float = 1e-5, length: int = 20) -> None:
    """Other weights by about 1e-5 of their size, compared on sequences that differ each time."""
    moved(model, seed=version, size=size)
    ids = [[5 + (7 * place + version + row) % 30 for place in range(length)] for row in range(2)]
    gap = engine.push(merged_state_dict(model).items(), version, probe_of(model, *ids))
    assert gap is not None
    assert gap < LOOSE["check_tolerance"] / 10


def test_pushes_that_are_lost_are_seen_though_they_are_small(tmp_path: Path) -> None:
    """Within three, by the server's own numbers, which stay as they are to the last bit."""
    model = model_of()
    with make_engine(model, tmp_path, stubs=2, **LOOSE) as (engine, servers):
        for version in range(3):
            push_little(engine, model, version)
        servers[1].ignore_pushes = True
        for version in range(3, 5):
            push_little(engine, model, version)
        with pytest.raises(EngineError, match="version 5(.|\n)*to the last bit") as caught:
            push_little(engine, model, 5)
        assert servers[1].url in str(caught.value)
        assert servers[0].url not in str(caught.value)
        with pytest.raises(EngineError, match="did not get version 5"):
            engine.generate(requests(), LONG, step=0)


def test_small_pushes_that_arrive_are_no_error(tmp_path: Path) -> None:
    """Nor is one that comes late, nor weights that did not change, nor a probe of too few tokens to tell."""
    model = model_of()
    with make_engine(model, tmp_path, **LOOSE) as (engine, servers):
        for version in range(8):
            push_little(engine, model, version)
        for version in range(8, 17):
            servers[0].ignore_pushes = version % 3 != 0
            push_little(engine, model, version)
        servers[0].ignore_pushes = False
        for version in range(17, 22):
            push_little(engine, model, version, size=0.0)
    with make_engine(model, tmp_path / "few", **LOOSE) as (engine, servers):
        servers[0].ignore_pushes = True
        for version in range(6):
            push_little(engine, model, version, length=4)


def test_weights_are_told_apart_in_the_engines_precision(tmp_path: Path) -> None:
    """What 16 bits round away is no other weight there."""
    model = model_of()
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    with make_engine(model, tmp_path, dtype="bfloat16", **LOOSE) as (engine, servers):
        for version in range(6):
            servers[0].ignore_pushes = version > 0
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.00001)
            push_little(engine, model, version, size=0.0)
        for version in range(6, 8):
            push_little(engine, model, version, size=1e-3)
        with pytest.raises(EngineError, match="to the last bit"):
            push_little(engine, model, 8, size=1e-3)


def test_a_stale_tied_head_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if the head were left out, which `save_pretrained` does."""
    model = model_of(tied=True)
    monkeypatch.setattr(
        "understudy.engines.vllm.engine.with_head",
        lambda _, weights: ((name, value) for name, value in weights if name != "lm_head.weight"),
    )
    with make_engine(model, tmp_path, stub={"stale_tied_head": True}) as (engine, _):
        push(engine, model)
        with pytest.raises(EngineError, match="tied output layer"):
            push(engine, moved(model), 1)


def test_a_head_that_is_not_among_the_weights_is_added(tmp_path: Path) -> None:
    model = model_of(tied=True)
    with make_engine(model, tmp_path, stub={"stale_tied_head": True}) as (engine, _):
        state = merged_state_dict(moved(model))
        del state["lm_head.weight"]
        gap = engine.push(state.items(), 1, probe_of(model))
        assert gap is not None
        assert gap < TOLERANCE


def test_one_server_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    model = model_of()
    with make_engine(model, tmp_path, stubs=2) as (engine, servers):
        push(engine, model)

        def fail(_: object) -> None:
            raise MemoryError("no room for the weights")

        servers[1].model.reload = fail  # type: ignore[assignment]
        with pytest.raises(EngineError, match="reload_weights(.|\n)*no room") as caught:
            push(engine, moved(model), 1)
        assert servers[1].url in str(caught.value)
        assert servers[0].url not in str(caught.value)
        assert [server.scheduler.paused for server in servers] == [None, None]


@pytest.mark.parametrize("stubs", [2, 3])
def test_who_was_paused_goes_on_where_another_cannot_be(
    stubs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has no such route writes to the end; one that fails ends the push."""
    model = model_of()
    with make_engine(model, tmp_path, stubs=stubs) as (engine, servers):
        push(engine, model)
        routes = servers[1]._routes
        without = {path: route for path, route in routes().items() if path[1] not in ("/pause", "/resume")}
        with monkeypatch.context() as patch:
            patch.setattr(servers[1], "_routes", lambda: without)
            assert push(engine, moved(model), 1) < TOLERANCE
            for sample in engine.generate(requests(), LONG, step=0):
                check_logprob(model, sample)
        assert [server.scheduler.paused for server in servers] == [None] * stubs
        assert [len(server.asked("/resume")) for server in servers] == [2, 1, 2][:stubs]
    with make_engine(model, tmp_path / "fails", stubs=stubs) as (engine, servers):
        push(engine, model)
        monkeypatch.setattr(servers[1], "_pause", lambda *_: (500, {"error": {"message": "no"}}))
        with pytest.raises(EngineError, match="/pause"):
            push(engine, moved(model), 1)
        assert [server.scheduler.paused for server in servers] == [None] * stubs


def test_a_check_that_could_not_be_made_is_made_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that gives no answer has not lost its weights, and may have. That it has is said once."""
    model = model_of()
    with make_engine(model, tmp_path) as (engine, servers):
        push(engine, model)
        engine.generate(requests(), LONG, step=0)
        servers[0].model.model.load_state_dict(moved(model_of(), seed=5).state_dict())
        with monkeypatch.context() as patch:
            patch.setattr(servers[0], "_completions", lambda *_: (500, {"error": {"message": "no"}}))
            with pytest.raises(EngineError, match="gave no answer"):
                engine.verify()
        with pytest.raises(WeightsLostError):
            engine.verify()
        engine.verify()
        assert push(engine, model, 1) < TOLERANCE


def test_a_push_in_the_middle_splits_a_response_by_version(tmp_path: Path) -> None:
    """Old tokens keep the old version and the old model's log-probabilities, new ones are the new model's."""
    model = model_of()
    old = model_of()
    long = Sampling(max_new_tokens=60)
    # no token ends a response
    options: dict[str, Any] = {"stop_ids": (), "sampling": long, "stub": {"token_latency": lambda _: 0.02}}
    with make_engine(model, tmp_path, **options) as (engine, servers), ThreadPoolExecutor() as threads:
        push(engine, model)
        writing = threads.submit(engine.generate, requests(1), long, step=0)
        wait_until_writing(servers[0])
        assert push(engine, moved(model), 1) < TOLERANCE
        samples = writing.result(timeout=30)
    split = 0
    for sample in samples:
        assert sample.finish == "length"
        assert sample.num_response_tokens == 60
        assert sample.policy_version is not None
        assert sample.rollout_logprob is not None
        versions = sample.policy_version[sample.prompt_length :]
        assert bool((versions.diff() >= 0).all())
        assert versions[-1] == 1
        split += int(versions[0] == 0)
        for version, author in ((0, old), (1, model)):
            expected = plain_logp(author, sample.token_ids).gather(-1, sample.token_ids[1:, None]).squeeze(-1)
            here = sample.policy_version == version
            torch.testing.assert_close(sample.rollout_logprob[here], expected[here[1:]].float(), rtol=0, atol=TOLERANCE)
    assert split > 0


def test_requests_that_come_while_it_is_paused_end_on_the_new_weights(tmp_path: Path) -> None:
    """A request may reach the server after the pause did; it must not be told apart by luck."""
    model = model_of()
    # few at a time, or all are in the server's queue before the comparison of the first push, which waits behind them
    options: dict[str, Any] = {"stub": {"token_latency": lambda _: 0.01, "concurrency": 1}, "max_concurrency": 3}
    with make_engine(model, tmp_path, **options) as (engine, servers), ThreadPoolExecutor() as threads:
        push(engine, model)
        models = {0: model_of()}
        writing = [threads.submit(engine.generate, requests(4), LONG, step=step) for step in range(2)]
        for version in (1, 2, 3):
            wait_until_writing(servers[0], *writing)
            push(engine, moved(model, seed=version), version)
            models[version] = model_of()
            models[version].load_state_dict(model.state_dict())
        samples = [sample for one in writing for sample in one.result(timeout=30)]
    versions = torch.cat([sample.policy_version for sample in samples if sample.policy_version is not None]).unique()
    assert len(versions) > 2
    for sample in samples:
        assert sample.policy_version is not None
        assert sample.rollout_logprob is not None
        for version, author in models.items():
            expected = plain_logp(author, sample.token_ids).gather(-1, sample.token_ids[1:, None]).squeeze(-1)
            here = sample.policy_version == version
            torch.testing.assert_close(sample.rollout_logprob[here], expected[here[1:]].float(), rtol=0, atol=TOLERANCE)


def test_tokens_that_do_not_exist_are_forbidden(tmp_path: Path) -> None:
    """Rows 36 to 39 are padding. In the mode of what is drawn from, their share is missing from the log-probabilities too."""
    model = model_of(sharp=0.1)
    options: dict[str, Any] = {"vocab_size": 36, "stop_ids": (), "mode": "processed_logprobs"}
    with make_engine(model, tmp_path, **options) as (engine, servers):
        push(engine, model)
        samples = engine.generate(requests(8), LONG, step=0)
        body = servers[0].asked("/v1/completions")[-1].body
    assert body["logit_bias"] == {str(row): -100.0 for row in range(36, 40)}
    for sample in samples:
        assert int(sample.token_ids.max()) < 36
        assert sample.num_response_tokens == LONG.max_new_tokens
        check_logprob(model, sample, vocab_size=36)


def test_a_response_ends_before_a_token_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many to forbid; it is truncated, and never empty."""
    monkeypatch.setattr("understudy.engines.vllm.engine.MAX_BIASED", 3)
    model = model_of(sharp=0.1)
    with make_engine(model, tmp_path, vocab_size=36, stop_ids=()) as (engine, servers):
        push(engine, model)
        samples = engine.generate(requests(8), LONG, step=0)
        assert "logit_bias" not in servers[0].asked("/v1/completions")[-1].body
    assert all(int(sample.token_ids.max()) < 36 and sample.num_response_tokens > 0 for sample in samples)
    short = [sample for sample in samples if sample.num_response_tokens < LONG.max_new_tokens]
    # a tenth of the tokens is padding
    assert len(short) > len(samples) // 2
    assert all(sample.truncated for sample in short)


@pytest.mark.parametrize("may_forbid", [True, False])
def test_ids_between_those_of_the_student_are_never_written(
    may_forbid: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("understudy.engines.vllm.engine.MAX_BIASED", 5 if may_forbid else 1)
    model = model_of(sharp=0.1)
    with make_engine(model, tmp_path, vocab_size=36, absent=(20,), stop_ids=()) as (engine, servers):
        push(engine, model)
        samples = engine.generate(requests(8), LONG, step=0)
        bias = servers[0].asked("/v1/completions")[-1].body.get("logit_bias", {})
    assert sorted(map(int, bias)) == ([20, 36, 37, 38, 39] if may_forbid else [])
    assert not {20, 36, 37, 38, 39} & {token for sample in samples for token in sample.response_ids.tolist()}


def test_a_group_is_one_request(tmp_path: Path) -> None:
    model = model_of()
    with make_engine(model, tmp_path, grouped=True) as (engine, servers):
        push(engine, model)
        asked = [*requests(4), request("g", [5], 9, prefix=[7])]
        samples = engine.generate(asked, LONG, step=0)
        bodies = [one.body for one in servers[0].asked("/v1/completions") if "prompt_logprobs" not in one.body]
        assert [body["n"] for body in bodies] == [4, 4, 4, 1] or sorted(body["n"] for body in bodies) == [1, 4, 4, 4]
        assert [sample.key for sample in samples] == [one.key for one in asked]
        assert len({tuple(sample.token_ids.tolist()) for sample in samples[:4]}) > 1
        for sample in samples:
            check_logprob(model, sample)


def test_a_group_has_one_room(tmp_path: Path) -> None:
    """The same context, once as a prompt and once with a prefix, which takes of what may be written."""
    model = model_of()
    with make_engine(model, tmp_path, grouped=True, stop_ids=()) as (engine, _):
        push(engine, model)
        asked = [request("a", [5, 7]), request("b", [5], prefix=[7])]
        for order in (asked, asked[::-1]):
            samples = engine.generate(order, LONG, step=0)
            assert {sample.num_response_tokens for sample in samples} == {LONG.max_new_tokens}


def test_a_group_that_is_interrupted_goes_on_one_by_one(tmp_path: Path) -> None:
    model = model_of()
    options: dict[str, Any] = {"grouped": True, "stop_ids": (), "stub": {"token_latency": lambda _: 0.02}}
    with make_engine(model, tmp_path, **options) as (engine, servers), ThreadPoolExecutor() as threads:
        push(engine, model)
        writing = threads.submit(engine.generate, requests(3), LONG, step=0)
        wait_until_writing(servers[0])
        push(engine, moved(model), 1)
        samples = writing.result(timeout=30)
    assert all(sample.num_response_tokens == 24 and int(sample.policy_version[-1]) == 1 for sample in samples)  # type: ignore[index]
    assert any(int(sample.policy_version[sample.prompt_length]) == 0 for sample in samples)  # type: ignore[index]


def test_tempered_log_probabilities_need_the_servers_mode(tmp_path: Path) -> None:
    model = model_of()
    warm = Sampling(temperature=0.7, max_new_tokens=8)
    with make_engine(model, tmp_path / "processed", sampling=warm, mode="processed_logprobs") as (engine, _):
        push(engine, model)
        for sample in engine.generate(requests(), warm, step=0):
            check_logprob(model, sample, temperature=0.7)
        # evaluation may draw as it likes; a number that would be another's is not given
        filtered = dataclasses.replace(warm, top_p=0.9)
        assert all(one.rollout_logprob is None for one in engine.generate(requests(), filtered, step=0))
    with (
        make_engine(model, tmp_path / "raw", sampling=warm) as (engine, _),
        pytest.raises(RecipeError, match="raw_logprobs(.|\n)*needs processed_logprobs"),
    ):
        push(engine, model)


def test_filters_at_temperature_1_refer_to_the_whole_distribution(tmp_path: Path) -> None:
    model = model_of()
    filtered = Sampling(top_p=0.8, top_k=5, max_new_tokens=8)
    with make_engine(model, tmp_path, sampling=filtered) as (engine, _):
        push(engine, model)
        for sample in engine.generate(requests(), filtered, step=0):
            check_logprob(model, sample)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), ("raw_logprobs", "processed_logprobs")),
        (Sampling(temperature=0.0), ("raw_logprobs", "processed_logprobs")),
        (Sampling(temperature=0.6), ("processed_logprobs",)),
        (Sampling(top_p=0.9), ("raw_logprobs",)),
        (Sampling(temperature=0.6, top_k=5), RecipeError),
        (Sampling(temperature=0.6, min_p=0.1), RecipeError),
    ],
)
def test_which_mode_a_recipe_needs(sampling: Sampling, expected: object) -> None:
    if expected is RecipeError:
        with pytest.raises(RecipeError, match="never of the unfiltered distribution"):
            VLLM(url="http://localhost:1").check_sampling(sampling)
    else:
        assert logprobs_modes(sampling) == expected


def test_a_server_that_would_die_of_a_seed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 on a CPU, where a prompt with a seed is read in chunks: RuntimeError, CPU Generator does not use offset."""
    model = model_of()
    with make_engine(model, tmp_path) as (engine, servers):
        info = servers[0]._server_info

        def on_cpu(*args: Any) -> tuple[int, Any]:
            status, body = info(*args)
            more = {"device_config": {"device_type": "cpu"}, "scheduler_config": {"enable_chunked_prefill": True}}
            return status, body | {"vllm_config": body["vllm_config"] | more}

        monkeypatch.setattr(servers[0], "_server_info", on_cpu)
        with pytest.raises(RecipeError, match="--no-enable-chunked-prefill"):
            push(engine, model)


def test_what_cannot_be_written_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    model = model_of()
    with make_engine(model, tmp_path) as (engine, servers):
        push(engine, model)
        sent = len(servers[0].requests)
        limit = engine.num_positions
        assert limit == model.config.max_position_embeddings
        assert limit is not None
        with pytest.raises(RecipeError, match=f"make {limit + 1}, but the rollout engine takes {limit}"):
            engine.generate([request("a", [5] * 8)], Sampling(max_new_tokens=limit - 7), step=0)
        with pytest.raises(DataError, match="no prompt token"):
            engine.generate([request("a", [])], LONG, step=0)
        with pytest.raises(DataError, match="leaves nothing"):
            engine.generate([request("a", [5], prefix=[6] * 24)], LONG, step=0)
        with pytest.raises(RecipeError, match="draws at 0.01"):
            engine.generate(requests(), Sampling(temperature=0.005), step=0)
        assert len(servers[0].requests) == sent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "log-probabilities for"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, None), "is None"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, float("nan")), "is nan"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, 0.5), "is 0.5"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, -9999.0), "is -9999"),
        (lambda choice: choice.update(logprobs=None), "no log-probabilities"),
        (lambda choice: choice.update(token_ids=None), "no token ids"),
        (lambda choice: choice.update(prompt_token_ids=[1, 5]), "other prompt tokens"),
        (lambda choice: choice.update(finish_reason="stop"), "stopped at a token that ends no response"),
        (lambda choice: choice.update(finish_reason="repetition"), "repetition"),
        (lambda choice: choice["token_ids"].__setitem__(1, EOS), "went on after"),
        (lambda choice: choice.update(index=3), "choices"),
    ],
)
def test_a_wrong_reply_is_never_a_sample(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    short = Sampling(max_new_tokens=3)
    with make_engine(model, tmp_path) as (engine, servers):
        push(engine, model)
        right = servers[0]._completions

        def wrong(*args: Any) -> tuple[int, Any]:
            status, body = right(*args)
            ids = [7, 8, 9]
            given = {"token_ids": list(ids), "finish_reason": "length"}
            given["logprobs"] = {"token_logprobs": [-1.0, -2.0, -3.0]}
            body = json.loads(json.dumps(body))
            body["choices"][0].update(given)
            change(body["choices"][0])
            return status, body

        monkeypatch.setattr(servers[0], "_completions", wrong)
        with pytest.raises(EngineError, match=message):
            engine.generate([request("a", [5])], short, step=0)


def test_nothing_is_left_when_it_ends_in_the_middle(tmp_path: Path) -> None:
    """`close` from another thread: whoever waits gets an error, and the server has nothing to do."""
    model = model_of()
    options: dict[str, Any] = {"stop_ids": (), "stub": {"token_latency": lambda _: 0.2}}
    with make_engine(model, tmp_path, **options) as (engine, servers), ThreadPoolExecutor() as threads:
        push(engine, model)
        writing = threads.submit(engine.generate, requests(), LONG, step=0)
        wait_until_writing(servers[0])
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            writing.result(timeout=10)
        until = time.monotonic() + 10
        while servers[0].scheduler.running:
            assert time.monotonic() < until
            time.sleep(0.02)
        with pytest.raises(EngineError, match="closed"):
            push(engine, model, 1)


def test_what_a_killed_run_left_is_removed_and_a_living_one_is_respected(tmp_path: Path) -> None:
    model = model_of()
    store = store_of(model, tmp_path, weights="shm")
    left = store.write(merged_state_dict(model).items(), "v7")
    try:
        with pytest.raises(RecipeError, match="another run is at work"):
            store_of(model, tmp_path, weights="shm")
        assert store._lock is not None
        store._lock.close()  # as the kernel does when a process ends
        again = store_of(model, tmp_path, weights="shm")
        assert not left.exists()
        again.close()
    finally:
        store.close()
    assert not store.folder.exists()


def store_of(model: Any, tmp_path: Path, dtype: torch.dtype = torch.float32, **section: Any) -> WeightStore:
    """A store beside a server on this machine."""
    return WeightStore(VLLM(url="http://127.0.0.1:1", **section), setup_of(model, tmp_path), dtype)


def shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a store of `tmp_path` lies in a shared memory of the test's own."""
    monkeypatch.setattr("understudy.engines.vllm.weights.SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    store = store_of(model_of(), tmp_path, weights="shm")
    store.close()
    return store.folder


@pytest.mark.parametrize("way", ["link", "lock", "open", "foreign"])
def test_a_folder_that_another_user_prepared_is_refused(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name can be guessed. Nothing behind a link is changed or removed."""
    folder = shared_folder(tmp_path, monkeypatch)
    victim = tmp_path / "home" / "documents" / "precious"
    victim.parent.mkdir(parents=True)
    victim.write_text("precious")
    if way == "link":
        folder.symlink_to(tmp_path / "home")
    else:
        folder.mkdir(mode=0o700)
    if way == "lock":
        (folder / "lock").symlink_to(victim)
    if way == "open":
        folder.chmod(0o777)
    if way == "foreign":
        mine = os.geteuid()
        monkeypatch.setattr("understudy.engines.vllm.weights.os.geteuid", lambda: mine + 1)
    says = {"link": "is a link", "lock": "cannot open", "open": "written to by others", "foreign": "another user"}
    with pytest.raises(RecipeError, match=says[way]):
        store_of(model_of(), tmp_path, weights="shm")
    assert victim.read_text() == "precious"


def test_a_folder_of_weights_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a link in it leads to is not removed with what a killed run left."""
    folder = shared_folder(tmp_path, monkeypatch)
    folder.mkdir(mode=0o700)
    (tmp_path / "home" / "documents").mkdir(parents=True)
    (folder / "v3").symlink_to(tmp_path / "home")
    store = store_of(model_of(), tmp_path, weights="shm")
    assert (tmp_path / "home" / "documents").is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "lock").stat().st_mode & 0o777 == 0o600
    store.close()
    assert not folder.exists()
    assert (tmp_path / "home" / "documents").is_dir()


def test_memory_that_is_left(tmp_path: Path) -> None:
    """The least of the machine's and of what each control group leaves, cached files counted as free."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "job" / "task").mkdir(parents=True)
    assert memory_left(proc, groups) is None
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\nHugePages_Total: 0\n")
    assert memory_left(proc, groups) == 5000 * 1024
    (proc / "self" / "cgroup").write_text("4:memory:/other\n0::/job/task\n")
    for folder, limit, used in ((groups / "job", "4000000", 1_000_000), (groups / "job" / "task", "max", 5)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 7\nactive_file 200\ninactive_file 30\n")
    assert memory_left(proc, groups) == 3_000_230
    (groups / "job" / "task" / "memory.max").write_text("20\n")
    assert memory_left(proc, groups) == 245


def test_shared_memory_is_not_taken_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr("understudy.engines.vllm.weights.memory_left", lambda: 1000)
    store = store_of(model, tmp_path)
    assert store.folder.is_relative_to(tmp_path)
    store.write(merged_state_dict(model).items(), "v0")
    store.close()


def test_weights_without_room_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory that is full sends them to the run directory; a place that was asked for is an error."""
    model = model_of()
    monkeypatch.setattr(
        "understudy.engines.vllm.weights._free", lambda folder: 0 if SHARED_MEMORY in (folder, folder.parent) else 10**9
    )
    store = store_of(model, tmp_path)
    assert store.folder.is_relative_to(tmp_path)
    store.close()
    store = store_of(model, tmp_path, weights="shm")
    with pytest.raises(EngineError, match="GiB free"):
        store.write(merged_state_dict(model).items(), "v0")
    store.close()


def test_tensors_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And read back equal, in the engine's precision."""
    from transformers import AutoModelForCausalLM

    model = model_of(tied=True)
    monkeypatch.setattr("understudy.models.parallel.PIECE_BYTES", 5000)
    store = store_of(model, tmp_path, weights_dir=str(tmp_path), dtype=torch.bfloat16)
    written = store.write(merged_state_dict(model).items(), "v0")
    assert len(list(written.glob("*.safetensors"))) > 2
    read: Mapping[str, Tensor] = AutoModelForCausalLM.from_pretrained(written, dtype="auto").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(read[name], value.bfloat16())
    store.close()


def test_a_started_engine_reads_an_adapted_embedding_as_it_acts(tmp_path: Path) -> None:
    """Adapters on a tied embedding: the configuration that a server reads no longer ties the head to it."""
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from understudy.models import apply_lora

    model = apply_lora(model_of(tied=True), rank=2, alpha=8.0, target_modules=["embed_tokens", "q_proj"]).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    store = store_of(model, tmp_path, weights_dir=str(tmp_path))
    written = store.write(with_head(model, merged_state_dict(model).items()), "v0")
    read = AutoModelForCausalLM.from_pretrained(written)
    ids = torch.arange(2, 10)[None]
    # (W + BA) x against W x + B (A x)
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    store.close()


def test_another_rank_finds_the_servers_and_pushes_nothing(tmp_path: Path) -> None:
    model = model_of()
    with make_engine(model, tmp_path, stubs=1) as (engine, servers):
        assert engine.push(None, 4) is None
        (sample,) = engine.generate(requests()[:1], LONG, step=0)
        assert sample.policy_version is not None
        assert int(sample.policy_version[-1]) == 4
        assert not servers[0].asked("/collective_rpc")


def test_servers_of_its_own_begin_with_the_weights(tmp_path: Path) -> None:
    """The recipe's own command, `{model}` and `{port}` filled in; the log lies in the run directory; its death is told."""
    model = moved(model_of(tied=True))
    command = (sys.executable, "-m", "tests.engine_stub", "{model}", "--port", "{port}")
    launch = Launch(command=command, env={"OMP_NUM_THREADS": "1"}, ready_timeout_s=60.0, num_servers=1)
    section = VLLM(**{"launch": launch} | PATIENCE | {"max_retries": 1})  # type: ignore[arg-type]
    engine = section.open(setup_of(model, tmp_path))
    with nothing_left(), closing(engine):
        assert push(engine, model) < TOLERANCE
        assert push(engine, moved(model, seed=2), 1) < TOLERANCE
        for sample in engine.generate(requests(1), LONG, step=0):
            check_logprob(model, sample)
        assert "vLLM at http://127.0.0.1" in engine.health()
        assert "ready" in (tmp_path / "run" / "engine_0.log").read_text()
        (process,) = engine._servers._processes
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="rollout engine 0 was killed by signal 9"):
            engine.generate(requests(1), LONG, step=1)
        client = engine._servers.client
        assert client is not None
        # it does not come back, so it is not waited for
        assert client.stats()["retries"] <= len(requests(1))


def test_a_server_that_is_not_there_at_the_start_is_not_waited_for(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    with make_engine(model_of(), tmp_path, url=nowhere, max_retries=1, deadline_s=6.0) as (engine, _):
        with pytest.raises(EngineError, match="gave no answer to GET /v1/models") as caught:
            push(engine, model_of())
        assert "deadline_s =" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either url .* or launch"),
        ({"url": "http://a:1", "launch": {}}, "either url .* or launch"),
        ({"url": "localhost:8000"}, "http://host:8000"),
        ({"url": []}, "at least one"),
        ({"url": "http://far:8000", "weights": "shm"}, "need not be on this machine"),
        ({"url": "http://localhost:1", "weights": "shm", "weights_dir": "w"}, "keep one"),
        ({"launch": {"command": ["serve", "{model}"]}}, "{port}"),
        ({"launch": {"num_servers": 0}}, "at least 1"),
        ({"url": "http://127.0.0.1:1", "sleep": True, "weights": "nccl"}, "joins no two processes on one GPU"),
        ({"url": "http://localhost:1", "check_tolerance": 0}, "above 0"),
        ({"url": "http://localhost:1", "weight": "shm"}, "did you mean 'weights'"),
    ],
)
def test_impossible_sections_are_refused(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(VLLM, values, "rollout")


def test_a_section_as_a_recipe_writes_it() -> None:
    section = parse(
        VLLM, {"url": ["http://localhost:8000/v1", "http://127.0.0.1:8001/"], "timeout_s": 5, "dtype": "bfloat16"}
    )
    assert section.urls == ("http://localhost:8000", "http://127.0.0.1:8001")
    assert section.retry_policy().timeout_s == 5
    assert section.is_local
    with pytest.raises(RecipeError, match="there is no program"):
        parse(VLLM, {"launch": {"python": "/nowhere/python"}}).check()


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(RecipeError, match=r"rollout\.url holds a user or password") as caught:
        parse(VLLM, {"url": ["http://localhost:1", "http://me:sesame@localhost:8000"]}, "rollout")
    assert "sesame" not in str(caught.value)


def test_the_timeout_grows_with_the_longest_response(tmp_path: Path) -> None:
    """32,768 tokens at 10 a second; what the recipe says stays."""

    def retry_policy(length: int, **given: float) -> tuple[float, float]:
        found = parse(VLLM, {"url": "http://localhost:1", **given}).retry_policy(length)
        return found.timeout_s, found.deadline_s

    assert retry_policy(512) == (900.0, 3600.0)
    assert retry_policy(32_768) == (3276.8, 13_107.2)
    assert retry_policy(32_768, timeout_s=5.0) == (5.0, 20.0)
    assert retry_policy(32_768, timeout_s=5.0, deadline_s=6.0) == (5.0, 6.0)
    assert retry_policy(32_768, deadline_s=6.0) == (3276.8, 6.0)
    long = Sampling(max_new_tokens=32_768)
    with make_engine(model_of(), tmp_path, sampling=long, timeout_s=None, deadline_s=None) as (engine, _):
        assert engine._servers.policy.timeout_s == 3276.8


def test_servers_sleep_until_the_next_push(tmp_path: Path) -> None:
    """They give up everything once, get memory for the weights before these, and for the cache after them."""
    model = model_of()
    with make_engine(model, tmp_path, stubs=2, sleep=True) as (engine, servers):
        push(engine, model)
        engine.generate(requests(1), LONG, step=0)
        engine.verify()
        assert engine.sleep(asks=True)
        assert all(server.asleep == {"weights", "kv_cache"} for server in servers)
        # nothing to compare with, and nothing to ask
        engine.verify()
        assert push(engine, moved(model), 1) < TOLERANCE
        for sample in engine.generate(requests(1), LONG, step=1):
            check_logprob(model, sample)
        for server in servers:
            assert not server.asleep
            told = [one.query.get("tags", one.path) for one in server.requests if one.method == "POST"]
            assert [one for one in told if one not in ("/v1/completions", "/pause", "/resume")][-5:] == [
                *("/sleep", "weights", "/collective_rpc", "/reset_prefix_cache", "kv_cache"),
            ]
        # one that was started again meanwhile is awake, and has the weights of its start
        assert engine.sleep(asks=True)
        servers[0].asleep.clear()
        assert push(engine, moved(model, seed=3), 2) < TOLERANCE
        assert len(servers[0].asked("/wake_up")) == 2
        assert len(servers[1].asked("/wake_up")) == 4


def test_a_server_of_its_own_writes_no_line_for_each_request(tmp_path: Path) -> None:
    names = {"model": str(tmp_path), "host": "127.0.0.1", "port": "8000"}
    command = server_command(VLLM(launch=Launch()), names, dtype="float32", mode="raw_logprobs")
    assert "--disable-uvicorn-access-log" in command
    assert command[command.index("--host") + 1] == "127.0.0.1"


class Pipe:
    """What NCCL does, between threads: `broadcast` reaches every server that waits in `update_weights`."""

    def __init__(self, num_servers: int) -> None:
        self.queues: list[SimpleQueue[Tensor]] = [SimpleQueue() for _ in range(num_servers)]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            for queue in self.queues:
                queue.put(tensor.clone())


class OverNCCL:
    """The routes of vLLM 0.32 for weights that come by NCCL, in front of a stub."""

    def __init__(self, stub: EngineStub, queue: SimpleQueue[Tensor], world_size: int) -> None:
        self.stub, self.queue, self.world_size = stub, queue, world_size
        self.told: list[tuple[str, dict[str, Any]]] = []
        self._routes = stub._routes
        stub._routes = self.routes  # type: ignore[method-assign]

    def routes(self) -> dict[tuple[str, str], Any]:
        def note(request: Any, _: object) -> tuple[int, Any]:
            self.told.append((request.path, request.body))
            return 200, {"message": "done"}

        def update(request: Any, _: object) -> tuple[int, Any]:
            note(request, None)
            info = request.body["update_info"]
            own = dict(self.stub.model.model.named_parameters(remove_duplicate=False))
            for name, shape in zip(info["names"], info["shapes"], strict=True):
                tensor = self.queue.get(timeout=2)
                assert list(tensor.shape) == shape
                with torch.no_grad():
                    own[name].copy_(tensor)
            return 200, {"message": "done"}

        posts = ("/init_weight_transfer_engine", "/start_weight_update", "/finish_weight_update")
        return (
            self._routes()
            | {("POST", path): note for path in posts}
            | {
                ("POST", "/update_weights"): update,
                ("GET", "/get_world_size"): lambda *_: (200, {"world_size": self.world_size}),
            }
        )


def test_weights_over_nccl_reach_every_server_in_order(tmp_path: Path) -> None:
    """Ranks: the trainer, then the workers of each server. A tied head is among what is sent; no file is written."""
    model = model_of(tied=True)
    with make_engine(model, tmp_path, stubs=2, stub={"stale_tied_head": True}) as (engine, servers):
        pipe, opened = Pipe(2), []

        def open_group(unique_id: bytes, num_ranks: int, _: torch.device) -> Pipe:
            opened.append((unique_id, num_ranks))
            return pipe

        routes = [OverNCCL(server, pipe.queues[number], 2 + number) for number, server in enumerate(servers)]
        engine._transfer = NCCLTransfer(engine._servers, torch.float32, CPU, 10.0, open_group, lambda: bytes(128))
        assert push(engine, moved(model), 0) < TOLERANCE
        assert push(engine, moved(model, seed=2), 1) < TOLERANCE
        assert engine._store is None
    assert [number for _, number in opened] == [1 + 2 + 3]
    for route, offset in zip(routes, (1, 3), strict=True):
        paths = [path for path, _ in route.told]
        update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
        assert paths == ["/init_weight_transfer_engine", *update, *update]
        info = route.told[0][1]["init_info"]
        assert (info["rank_offset"], info["world_size"], info["packed"]) == (offset, 6, False)
        assert len(b64decode(info["nccl_unique_id_b64"])) == 128
        assert "lm_head.weight" in route.told[2][1]["update_info"]["names"]


def test_weights_over_nccl_go_a_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there never is a second model in the engine's precision."""
    monkeypatch.setattr("understudy.models.parallel.PIECE_BYTES", 0)
    model = model_of()
    with make_engine(model, tmp_path) as (engine, servers):
        pipe = Pipe(1)
        route = OverNCCL(servers[0], pipe.queues[0], 1)
        engine._transfer = NCCLTransfer(engine._servers, torch.float32, CPU, 10.0, lambda *_: pipe, lambda: bytes(128))
        assert push(engine, moved(model)) < TOLERANCE
    infos = [body["update_info"] for path, body in route.told if path == "/update_weights"]
    assert [name for info in infos for name in info["names"]] == list(model.state_dict())
    assert len(infos) == 2 + 3, "each layer, and the embedding, norm and head"
    assert [path for path, _ in route.told].count("/finish_weight_update") == 1


def test_a_server_that_fails_over_nccl_ends_the_push(tmp_path: Path) -> None:
    """Not configured for it, or lost on the way: an error in time, not a collective that waits for ever."""
    model = model_of()
    with make_engine(model, tmp_path) as (engine, _):
        engine._transfer = NCCLTransfer(
            engine._servers, torch.float32, CPU, 0.5, lambda *_: Pipe(1), lambda: bytes(128)
        )
        with pytest.raises(EngineError, match="get_world_size was refused"):
            push(engine, model)
    with make_engine(model, tmp_path / "lost") as (engine, servers):
        OverNCCL(servers[0], SimpleQueue(), 1)
        engine._transfer = NCCLTransfer(
            engine._servers, torch.float32, CPU, 0.5, lambda *_: Pipe(1), lambda: bytes(128)
        )
        with pytest.raises(EngineError, match="did not pass"):
            push(engine, model)


def test_nccl_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the trainer has no GPU"), make_engine(model_of(), tmp_path, weights="nccl"):
        pass
