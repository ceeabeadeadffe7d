"""Whole runs with an engine and a teacher behind HTTP, on stand-ins that compute with real tiny models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine_stub import EngineStub
from tests.leaks import nothing_left
from tests.processes import run_ranks
from tests.runs import BUILD, assert_close_run, distillation, metric_rows, train, train_all, weights, write_recipe
from tests.serving import serve_beside
from tests.stub_model import StubModel
from understudy.errors import EngineError
from understudy.models import build_causal_lm, load_causal_lm, save_hf
from understudy.serve import Scorer, Settings
from understudy.tasks import build_tokenizer
from understudy.types import Sample

pytestmark = pytest.mark.slow

TOP = {"type": "topk", "k": 4}


def with_engine(models: dict[str, Any], url: str, **changes: Any) -> dict[str, Any]:
    return models | {"rollout": {"type": "vllm", "url": url, "dtype": "float32"}} | changes


def over_http(models: dict[str, Any], url: str, api: str = "vllm") -> dict[str, Any]:
    return {"type": "http", "api": api, "url": url, "model": models["teacher"]["model"]}


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metric_rows(run_dir)]


def consumed(run_dir: Path) -> list[int]:
    rows = [json.loads(line) for line in (run_dir / "consumed.jsonl").read_text().splitlines()]
    return [at for row in rows for at in row["positions"]]


def test_a_teacher_over_http_is_the_local_one(tmp_path: Path) -> None:
    """The same samples, the same scores to rounding: the same run."""
    models = distillation(tmp_path / "m", method=TOP)
    with nothing_left(), EngineStub(models["teacher"]["model"]) as stub:
        here = train(tmp_path / "here", **models)
        there = train(tmp_path / "there", **(models | {"teacher": over_http(models, stub.url)}))
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)


def test_servers_sleep_while_the_student_is_trained(tmp_path: Path) -> None:
    """Once a step, whether or not an update was made: the run is that of servers that stay awake."""
    models = distillation(tmp_path / "m")
    runs = []
    for sleep in (False, True):
        with nothing_left(), EngineStub(models["student"]["model"]) as stub:
            changes = with_engine(models, stub.url)
            changes["rollout"] = changes["rollout"] | {"sleep": sleep}
            runs.append(train(tmp_path / f"{sleep}", **changes))
            assert len(stub.asked("/sleep")) == 6 * sleep
            assert not stub.asleep
    assert losses(runs[0]) == losses(runs[1])


def test_a_served_teacher_gives_whole_rows(tmp_path: Path) -> None:
    """A full-vocabulary divergence from hidden states and the head equals that of the model here."""
    models = distillation(tmp_path / "m", method={"type": "gkd"})
    path = models["teacher"]["model"]
    scorer = Scorer(load_causal_lm(path, dtype="float32", device="cpu"), AutoTokenizer.from_pretrained(path), name="t")
    with nothing_left(), serve_beside(scorer, Settings(model=path, port=0)) as url:
        here = train(tmp_path / "here", **models)
        there = train(tmp_path / "there", **(models | {"teacher": {"type": "served", "url": url}}))
    assert_close_run(here, there, atol=1e-4)


def test_experts_of_several_kinds(tmp_path: Path) -> None:
    """Each teacher by its name, one here and one over HTTP."""
    models = distillation(tmp_path / "m", method=TOP)
    parts = {name: {"type": "arithmetic", "family": "addition", "digits": 2, "seed": n} for n, name in enumerate("ab")}
    with EngineStub(models["teacher"]["model"]) as stub:
        teachers = {"a": models["teacher"], "b": over_http(models, stub.url)}
        changes = models | {"teacher": None, "teachers": teachers, "task": {"type": "mix", "parts": parts}}
        row = metric_rows(train(tmp_path / "run", **changes))[0]
        assert stub.asked("/v1/completions")
    assert {"teacher/a/log_ratio", "teacher/b/log_ratio"} <= row.keys()


def test_scores_are_asked_for_once(tmp_path: Path) -> None:
    """A rerun with a cache asks the teacher for nothing, also where it is gone."""
    models = distillation(tmp_path / "m", method=TOP)
    with EngineStub(models["teacher"]["model"]) as stub:
        cached = models | {"teacher": over_http(models, stub.url) | {"cache": str(tmp_path / "cache")}}
        first = train(tmp_path / "first", **cached)
        asked = len(stub.asked("/v1/completions"))
    again = train(tmp_path / "again", **cached)
    assert asked > 0
    assert losses(first) == losses(again)


@pytest.mark.parametrize("overlap", [{}, {"async": {"max_staleness": 0}}])
def test_an_engine_writes_what_the_student_would(tmp_path: Path, overlap: dict[str, Any]) -> None:
    models = distillation(tmp_path / "m")
    with nothing_left(), EngineStub(models["student"]["model"]) as stub:
        rows = metric_rows(train(tmp_path / "run", **with_engine(models, stub.url, **overlap)))
        assert stub.num_pushes == 7, "the first weights, and those of six updates"
    assert all(row["sampler_gap"] < 1e-5 and row["push_gap"] < 1e-5 and row["staleness"] == 0 for row in rows)


@pytest.mark.parametrize("others", [False, True])
def test_the_gap_shows_that_an_engine_sends_tokens_to_other_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    """`sampler_gap` of a student with experts: the mean of |log S of the engine's routing - log S of the student's|."""
    from understudy.trainer import loop

    models = distillation(tmp_path / "m")
    student = {"model": save_experts(tmp_path / "experts"), "build": None}
    updated: list[Sample] = []
    plain = loop.prepare

    def prepare(*given: Any, **named: Any) -> Any:
        updated.extend(given[2])
        return plain(*given, **named)

    monkeypatch.setattr(loop, "prepare", prepare)
    with nothing_left(), EngineStub(student["model"]) as stub:
        if others:
            for layer in stub.model.model.model.layers:
                layer.mlp.gate.forward = partial(least_likely, layer.mlp.gate)
        changes = with_engine(models, stub.url, student=student, train={"steps": 1, "lr": 0.0})
        # else the comparison after the push ends the run
        changes["rollout"]["check_tolerance"] = 100.0
        (row,) = metric_rows(train(tmp_path / "run", **changes))
        engine = stub.model
        own = StubModel(student["model"])
        gaps = [
            (engine.prompt_logp(ids) - own.prompt_logp(ids)).gather(1, torch.tensor(ids[1:])[:, None])[start:]
            for ids, start in ((one.token_ids.tolist(), one.prompt_length - 1) for one in updated)
        ]
    expected = float(torch.cat(gaps).abs().mean())
    assert (expected > 0.05) == others
    # float32 in two orders of sums
    assert row["sampler_gap"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def save_experts(path: Path) -> str:
    """A random student with experts that matter: weights ten times as large as usual."""
    tokenizer = build_tokenizer("addition")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"architecture": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = build_causal_lm(BUILD | {"num_layers": 2} | sizes, vocab_size=len(tokenizer), seed=1, **ends)
    with torch.no_grad():
        for layer in model.model.layers:
            for value in layer.mlp.parameters():
                value.mul_(10)
    save_hf(model, tokenizer, path)
    return str(path)


def least_likely(gate: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The router of `qwen3_moe`, which takes the least likely experts in place of the most likely."""
    logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
    values, chosen = logits.float().softmax(-1).topk(gate.top_k, largest=False)
    return logits, values.to(logits.dtype), chosen


def test_a_resumed_engine_has_the_resumed_weights(tmp_path: Path) -> None:
    from tests.runs import train_in_two

    models = distillation(tmp_path / "m")
    with nothing_left(), EngineStub(models["student"]["model"]) as stub:
        changes = with_engine(models, stub.url, **{"async": {"max_staleness": 1}})
        run_dir = train_in_two(tmp_path / "run", 3, **changes)
    assert consumed(run_dir) == list(range(48))
    assert all(row["sampler_gap"] < 1e-5 for row in metric_rows(run_dir) if row["staleness"] == 0)


@pytest.mark.parametrize("overlap", [{}, {"async": {"max_staleness": 0}}, {"async": {"max_staleness": 2}}])
def test_an_engine_that_was_started_again_gets_its_weights_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: dict[str, Any]
) -> None:
    """Its weights are those of the start, and nothing says so: what it wrote with them is written again."""
    from understudy.engines.vllm.engine import VLLMEngine

    models = distillation(tmp_path / "m", train={"lr": 3e-2, "steps": 6})
    plain, calls = VLLMEngine._body, []
    with nothing_left(), EngineStub(models["student"]["model"]) as stub:

        def restarted(self: VLLMEngine, *args: Any) -> Any:
            calls.append(args)
            if len(calls) == 28:
                # between two pushes, as somebody who looks after servers would
                stub.model = StubModel(models["student"]["model"])
            return plain(self, *args)

        monkeypatch.setattr(VLLMEngine, "_body", restarted)
        run_dir = train(tmp_path / "run", **with_engine(models, stub.url, **overlap))
    told = [json.loads(line)["text"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert sum("lost its weights" in text for text in told) == 1
    fresh = [row["sampler_gap"] for row in metric_rows(run_dir) if row["staleness"] == 0]
    assert fresh
    assert max(fresh) < 1e-4, "the student learnt from what it had not written"
    if overlap:
        assert consumed(run_dir) == list(range(48))


def test_two_ranks_overlap_as_one(tmp_path: Path) -> None:
    """Prompts are split over ranks, every one is used once, and the loss is that of one process."""
    changes = {"rollout": {"type": "hf", "copy": True}, "async": {"max_staleness": 0}, "train": {"steps": 3}}
    for name in ("one", "two"):
        write_recipe(tmp_path / name, **distillation(tmp_path / "m", **changes))
    one = train(tmp_path / "one", **distillation(tmp_path / "m", **changes))
    run_ranks(train_all, tmp_path / "two", folder=tmp_path)
    two = tmp_path / "two" / "run"
    assert consumed(two) == consumed(one) == list(range(24))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    for name, value in weights(one).items():
        # Adam divides gradients by their size, so a rounding moves a weight by up to lr where the gradient is one
        torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=3 * 3e-3)


@pytest.mark.parametrize("overlap", [{}, {"async": {"max_staleness": 1}}])
def test_a_push_that_does_not_arrive_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: dict[str, Any]
) -> None:
    """One sentence that says so; the step whose weights were pushed is in the checkpoint, and resume goes on behind it."""
    from understudy.trainer.publish import Publisher

    models = distillation(tmp_path / "m", train={"lr": 3e-2})
    plain = Publisher.__call__
    with nothing_left(), EngineStub(models["student"]["model"]) as stub:

        def deaf(self: Publisher, version: int, samples: Any) -> Any:
            stub.ignore_pushes = version == 4
            return plain(self, version, samples)

        changes = with_engine(models, stub.url, **overlap)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineError, match="after the push of version 4"):
            patch.setattr(Publisher, "__call__", deaf)
            train(tmp_path, **changes)
        stub.ignore_pushes = False
        assert (tmp_path / "run" / "checkpoints" / "step_000004").is_dir()
        run_dir = train(tmp_path, resume=True, **changes)
    rows = metric_rows(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["sampler_gap"] < 1e-4 for row in rows if row["staleness"] == 0)
    if overlap:
        assert consumed(run_dir) == list(range(48))


def test_an_evaluation_is_by_the_pushed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was started again just before is given its weights first; then the evaluation counts."""
    from understudy.trainer.loop import Trainer

    models = distillation(tmp_path / "m", train={"lr": 3e-2, "steps": 4})
    held_out = {"eval": {"problems": 8, "at_start": False, "split": "test"}}
    plain = Trainer._evaluate
    with nothing_left(), EngineStub(models["student"]["model"]) as stub:
        changes = with_engine(models, stub.url, **held_out)
        whole = train(tmp_path / "whole", **changes)

        def restarted(self: Trainer) -> None:
            stub.model = StubModel(models["student"]["model"])
            plain(self)

        monkeypatch.setattr(Trainer, "_evaluate", restarted)
        other = train(tmp_path / "other", **changes)
    files = [sorted((path / "eval").glob("*.jsonl"))[-1].read_text() for path in (whole, other)]
    assert files[0] == files[1]


def test_weights_that_did_not_change_are_not_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is skipped makes no update: nothing is written or loaded for it."""
    from understudy.trainer.update import Optimizer

    models = distillation(tmp_path / "m")
    plain, norms = Optimizer.clip, []

    def clip(self: Optimizer) -> float:
        norms.append(plain(self))
        return float("nan") if len(norms) == 2 else norms[-1]

    monkeypatch.setattr(Optimizer, "clip", clip)
    with nothing_left(), EngineStub(models["student"]["model"]) as stub:
        rows = metric_rows(train(tmp_path / "run", **with_engine(models, stub.url)))
        assert stub.num_pushes == 6, "the first weights, and those of five updates"
    assert ["push_gap" in row for row in rows] == [True, False, True, True, True, True]
