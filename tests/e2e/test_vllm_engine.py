"""A real vLLM as rollout engine: its samples and log-probabilities are the student's, after every push."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.leaks import nothing_left
from tests.tiny_models import EOS, NUM_ROWS, letters, plain_logp, request
from tests.vllm_env import vllm_python
from torch import Tensor

from understudy.engines import VLLM, EngineSetup, HFEngine
from understudy.engines.base import Probe
from understudy.engines.vllm.engine import FLOAT32_GAP, VLLMEngine
from understudy.engines.vllm.settings import Launch
from understudy.errors import EngineError
from understudy.models import build_causal_lm
from understudy.models.lora import merged_state_dict
from understudy.types import Author, Request, Sampling

pytestmark = pytest.mark.slow

VOCAB_SIZE = 36
"""Of the rows; the others are padding."""
SIZES = {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 2}
"""Heads of 32, which vLLM's kernels want."""
WARM = Sampling(temperature=0.7, max_new_tokens=32)
ATTEMPTS = 12
"""To push while something is written; on busy cores a server may take long to hear of it."""
PROMPTS = [[5], [6, 7, 8, 9], [3, 4, 5, 6, 7]]


def build(tied: bool) -> Any:
    sizes = SIZES | {"tie_word_embeddings": tied}
    model = build_causal_lm(sizes, vocab_size=NUM_ROWS, eos_token_id=EOS, pad_token_id=0, dtype="float32")
    # far from uniform, so that other weights are told apart at once
    return spread(model, 0.15)


@torch.no_grad()
def spread(model: Any, size: float, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(size * torch.randn(weight.shape, generator=generator))
    return model


@torch.no_grad()
def probe_of(model: Any) -> Probe:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in (40, 25, 2)]
    rows = [plain_logp(model, row).gather(-1, row[1:, None]).squeeze(-1) for row in ids]
    return Probe(tuple(ids), tuple(rows))


def push(engine: Engine, version: int) -> float:
    started = time.perf_counter()
    gap = engine.engine.push(merged_state_dict(engine.model).items(), version, probe_of(engine.model))
    assert gap is not None
    print(f"push {version}: gap {gap:.1e} nats, {time.perf_counter() - started:.3f} s with its check")
    return gap


def requests(per_prompt: int) -> list[Request]:
    asked = [request(f"p{number}", ids, index) for number, ids in enumerate(PROMPTS) for index in range(per_prompt)]
    return [*asked, request("g", [5, 6], prefix=[7, 8, 9])]


@dataclass(frozen=True)
class Engine:
    """A student and its vLLM server."""

    model: Any
    engine: VLLMEngine
    tied: bool


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Started once for each model: that takes most of the time."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    args = ("--max-num-seqs", "16", "--enforce-eager", "--no-enable-chunked-prefill")
    launch = Launch(python=vllm_python(), env=env, args=args)
    model = build(request.param)
    setup = EngineSetup(
        model=model,
        tokenizer=letters(VOCAB_SIZE),
        vocab_size=VOCAB_SIZE,
        stop_ids=(EOS,),
        autocast=None,
        seed=0,
        sampling=WARM,
        max_new_tokens=WARM.max_new_tokens,
        run_dir=tmp_path_factory.mktemp("run"),
    )
    engine = VLLM(launch=launch, grouped=not request.param).open(setup)
    with nothing_left(), closing(engine):
        made = Engine(model, engine, request.param)
        started = time.perf_counter()
        assert push(made, 0) < FLOAT32_GAP
        print(f"server started in {time.perf_counter() - started:.1f} s")
        yield made


def test_it_says_what_it_is(engine: Engine) -> None:
    assert engine.engine.num_positions == engine.model.config.max_position_embeddings
    assert "vLLM at http://127.0.0.1" in engine.engine.health()


def test_a_push_changes_the_scores_to_the_models(engine: Engine) -> None:
    """The prefix cache holds the old weights' keys and values; nothing of it may be read."""
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    long = [request("long", [7] * 200)]
    before = engine.engine.generate(long, greedy, step=0)
    spread(engine.model, 0.1, seed=1)
    assert push(engine, 1) < FLOAT32_GAP
    own = HFEngine(engine.model, letters(VOCAB_SIZE), seed=0, stop_ids=(EOS,), vocab_size=VOCAB_SIZE)
    (sample,), (expected,) = engine.engine.generate(long, greedy, step=0), own.generate(long, greedy, step=0)
    assert sample.token_ids.tolist() == expected.token_ids.tolist()
    assert sample.rollout_logprob is not None
    assert expected.rollout_logprob is not None
    new = sample.author == Author.STUDENT
    torch.testing.assert_close(sample.rollout_logprob[new], expected.rollout_logprob[new], rtol=0, atol=FLOAT32_GAP)
    assert before[0].rollout_logprob is not None
    assert before[0].rollout_logprob[200] != pytest.approx(float(sample.rollout_logprob[200]), abs=FLOAT32_GAP)


def test_greedy_is_that_of_the_hf_engine(engine: Engine) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=24)
    own = HFEngine(engine.model, letters(VOCAB_SIZE), seed=0, stop_ids=(EOS,), vocab_size=VOCAB_SIZE)
    found, expected = (one.generate(requests(1), greedy, step=0) for one in (engine.engine, own))
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.finish, one.text) == (other.finish, other.text)
        assert torch.equal(one.author, other.author)


def test_tempered_log_probabilities_are_the_models(engine: Engine) -> None:
    """Of what is drawn from: at the temperature, without the padding, which is never drawn."""
    samples = engine.engine.generate(requests(8), WARM, step=0)
    gaps: list[Tensor] = []
    for sample in samples:
        assert int(sample.token_ids.max()) < VOCAB_SIZE
        assert sample.rollout_logprob is not None
        logp = plain_logp(engine.model, sample.token_ids, WARM.temperature, VOCAB_SIZE)
        expected = logp.gather(-1, sample.token_ids[1:, None]).squeeze(-1)
        new = sample.author == Author.STUDENT
        gaps.append((sample.rollout_logprob[new] - expected[new[1:]]).abs())
        ended = sample.response_ids[-1].item() == EOS
        assert sample.finish == ("stop" if ended else "length")
    largest = float(torch.cat(gaps).max())
    print(f"largest distance of {sum(map(len, gaps))} sampled log-probabilities: {largest:.1e} nats")
    assert largest < FLOAT32_GAP
    assert {sample.finish for sample in samples} == {"stop", "length"}
    assert len({tuple(sample.token_ids.tolist()) for sample in samples}) > len(samples) // 2


def test_pushes_in_the_middle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of several versions in one response, each with its own model's log-probability; no token is read as an end."""
    monkeypatch.setattr(engine.engine, "_setup", replace(engine.engine._setup, stop_ids=()))
    long = replace(WARM, max_new_tokens=600)
    models = {}
    with ThreadPoolExecutor(1) as threads:
        for attempt in range(ATTEMPTS):
            writing = threads.submit(engine.engine.generate, requests(2), long, step=5 + attempt)
            while not writing.done():
                spread(engine.model, 0.02, seed=len(models))
                version = 2 + len(models)
                # without its check, which takes seconds on a busy machine; the log-probabilities are compared below
                engine.engine.push(merged_state_dict(engine.model).items(), version)
                models[version] = copy.deepcopy(engine.model)
                # shorter with each attempt: all responses together take about a second where the machine is free
                wait([writing], timeout=0.4 / (1 + attempt))
            samples = writing.result(timeout=0)
            versions = [set(sample.policy_version[sample.prompt_length :].tolist()) for sample in samples]  # type: ignore[index]
            if any(len(found - {-1, 1}) > 1 for found in versions):
                break
    print(f"versions of each response: {versions}")
    assert any(len(found - {-1, 1}) > 1 for found in versions)
    for sample in samples:
        assert sample.num_response_tokens == long.max_new_tokens
        assert sample.policy_version is not None
        assert sample.rollout_logprob is not None
        assert bool((sample.policy_version[sample.author == Author.STUDENT].diff() >= 0).all())
        for version, model in models.items():
            logp = plain_logp(model, sample.token_ids, long.temperature, VOCAB_SIZE)
            expected = logp.gather(-1, sample.token_ids[1:, None]).squeeze(-1)
            here = sample.policy_version == version
            torch.testing.assert_close(sample.rollout_logprob[here], expected[here[1:]], rtol=0, atol=FLOAT32_GAP)


def test_what_breaks_it_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test, after which the engine is unusable: a tied head that was left out; a server that is killed."""
    if engine.tied:
        monkeypatch.setattr("understudy.engines.vllm.engine.with_head", without_head)
        spread(engine.model, 0.05, seed=3)
        with pytest.raises(EngineError, match="tied output layer"):
            push(engine, 99)
        print(f"gap without the head: {engine.engine._check.last_gap:.2g} nats")
        message = "did not get version 99"
    else:
        pid = engine.engine._servers._processes[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        message = "rollout engine 0 was killed by signal 9"
    with pytest.raises(EngineError, match=message):
        engine.engine.generate(requests(1), WARM, step=0)


def without_head(_: object, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As `save_pretrained` leaves it out."""
    return ((name, value) for name, value in weights if name != "lm_head.weight")
