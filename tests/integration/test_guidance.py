"""Samples that a teacher begins: how long its part is at which step, where it comes from, and what is trained on it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import assert_same_run, distillation, metric_rows, train, train_in_two
from understudy.engines import HFEngine
from understudy.losses.schedules import cosine_decay
from understudy.methods import OPD, TrOPD
from understudy.report.page import write_report
from understudy.tasks import Arithmetic
from understudy.trainer import loop
from understudy.trainer.update import MicroBatch
from understudy.types import Author, Sample

pytestmark = pytest.mark.slow

ANNEAL, LIMIT = 4, 24
TASK = Arithmetic("addition", digits=2, num_solutions=40)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[list[MicroBatch]]:
    """The micro-batches of every update."""
    seen: list[list[MicroBatch]] = []
    plain = loop.accumulate_gradients

    def accumulate(student: Any, micros: Sequence[MicroBatch], **options: Any) -> Any:
        seen.append(list(micros))
        return plain(student, micros, **options)

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    return seen


def guided(folder: Path, *, responses: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """Changes for TrOPD with prefixes over the first steps of six."""
    method = {"type": "tropd", "k": 4, "anneal_steps": ANNEAL} | keys.pop("method", {})
    train_keys = {"steps": 6, "prompts_per_step": 4, "samples_per_prompt": 2} | keys.pop("train", {})
    section = responses or {"type": "solutions"}
    task = {"num_solutions": 40}
    return distillation(folder, method=method, responses=section, task=task, train=train_keys, **keys)


def given(sample: Sample) -> int:
    """Tokens of the teacher."""
    return int((sample.author == int(Author.TEACHER)).sum())


def samples_of(update: Sequence[MicroBatch]) -> list[Sample]:
    return [sample for micro in update for sample in micro.samples]


def jsonl(path: Path, texts: dict[str, str]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"q": problem, "a": text}) + "\n" for problem, text in texts.items()))
    return {"type": "jsonl", "path": str(path), "prompt_field": "q", "response_field": "a"}


@pytest.mark.parametrize("kind", ["beside", "replace"])
def test_the_prefix_shrinks_with_the_cosine(tmp_path: Path, kind: str, updates: list[list[MicroBatch]]) -> None:
    """`floor(c(step) L)` tokens of the solution, then the student's own; afterwards none."""
    rows = metric_rows(train(tmp_path, **guided(tmp_path, method={"guided": kind})))
    assert ["prefix_tokens" in row for row in rows] == [True] * ANNEAL + [False] * 2
    for step, update in enumerate(updates):
        samples = samples_of(update)
        begun = [sample for sample in samples if given(sample)]
        share = cosine_decay(step, ANNEAL)
        extra = 4 if kind == "beside" and share else 0
        assert len(samples) == 8 + extra
        assert len({sample.key for sample in samples}) == len(samples)
        assert len(begun) == (4 if share else 0)
        assert {sample.prompt.id for sample in begun} == ({sample.prompt.id for sample in samples} if share else set())
        for sample in begun:
            assert sample.prompt.solution is not None
            solution = len(sample.prompt.solution) + 1
            start, count = sample.prompt_length, given(sample)
            assert count == min(math.floor(share * solution), solution - 1)
            wrote = sample.author[start:].tolist()
            assert wrote == [int(Author.TEACHER)] * count + [int(Author.STUDENT)] * (len(wrote) - count)
            assert sample.text.startswith(sample.prompt.solution[:count])
            assert len(wrote) - count >= 1
            assert len(wrote) <= LIMIT
        if share:
            mean = sum(map(given, begun)) / len(begun)
            assert rows[step]["prefix_tokens"] == pytest.approx(mean)
    assert [row["on_policy"] for row in rows] == [1.0] * 6


@pytest.mark.parametrize("denominator", ["separate", "joint"])
def test_prefixes_are_imitated_and_the_rest_is_not(
    denominator: str, tmp_path: Path, updates: list[list[MicroBatch]]
) -> None:
    """Term "prefix": `-log S` on the teacher's tokens alone, guidance its weight, over these tokens or all trained ones."""
    changes = guided(tmp_path, method={"guidance": 0.5, "denominator": denominator}, train={"steps": 1, "lr": 0.0})
    row = metric_rows(train(tmp_path, **changes))[0]
    count = own = 0
    for micro in updates[0]:
        batch = micro.batch
        assert bool(batch.mask.all())
        count, own = count + len(batch), own + int(batch.on_policy.sum())
        assert batch.uniform is not None
        assert batch.uniform.unique().numel() == len(batch)
        assert int((~batch.on_policy).sum()) == sum(map(given, micro.samples))
    without = guided(tmp_path, method={"guidance": 0.0, "denominator": denominator}, train={"steps": 1, "lr": 0.0})
    other = metric_rows(train(tmp_path / "without", **without))[0]
    # the metric is the mean over its own tokens
    assert row["loss/prefix"] == pytest.approx(other["loss/prefix"], rel=1e-6)
    assert row["loss/prefix"] == pytest.approx(math.log(17), rel=0.05)
    share = (count - own) / count if denominator == "joint" else 1.0
    assert row["loss"] - other["loss"] == pytest.approx(0.5 * row["loss/prefix"] * share, rel=1e-3)


def test_saved_samples_say_who_wrote_each_token(tmp_path: Path) -> None:
    run_dir = train(tmp_path, **guided(tmp_path, train={"steps": 1, "save_samples_every": 1}))
    lines = (run_dir / "samples" / "step_000001.jsonl").read_text().splitlines()
    tables = [(json.loads(line)["tokens"], json.loads(line)["num_tokens"]) for line in lines]
    assert {author for table, _ in tables for author in table["author"]} == {"teacher", "student"}
    for table, num_tokens in tables:
        assert {len(values) for values in table.values()} == {num_tokens}
        assert [value is None for value in table["log-probability"]] == [who == "teacher" for who in table["author"]]
    assert 'class="by-teacher"' in write_report(run_dir).read_text()


@pytest.mark.parametrize("kind", ["beside", "replace"])
def test_without_guidance_it_is_the_run_without_responses(
    tmp_path: Path, kind: str, updates: list[list[MicroBatch]]
) -> None:
    """The draws of the student's own samples do not depend on what stands beside them."""
    changes = guided(tmp_path, method={"guided": kind}, train={"steps": 1})
    train(tmp_path / "guided", **changes)
    plain = guided(tmp_path, method={"anneal_steps": 0}, train={"steps": 1}) | {"responses": None}
    train(tmp_path / "plain", **plain)
    alone = {sample.key: sample.token_ids.tolist() for sample in samples_of(updates[1])}
    own = {sample.key: sample.token_ids.tolist() for sample in samples_of(updates[0]) if not given(sample)}
    assert len(own) == (8 if kind == "beside" else 4)
    assert own == {key: alone[key] for key in own}


def test_a_sample_without_a_response_is_counted(tmp_path: Path, updates: list[list[MicroBatch]]) -> None:
    texts = {prompt.text or "": prompt.solution or "" for prompt in list(TASK.prompts("train"))[::2]}
    changes = guided(tmp_path, responses=jsonl(tmp_path / "r.jsonl", texts), train={"prompts_per_step": 8, "steps": 2})
    for row, update in zip(metric_rows(train(tmp_path, **changes)), updates, strict=True):
        missing = int(row["responses_missing"])
        assert 0 < missing < 8
        assert len(samples_of(update)) == 16 + 8 - missing
        assert sum(given(sample) > 0 for sample in samples_of(update)) == 8 - missing
        assert row["samples_left_out"] == 0


def test_replaced_requests_without_a_response_are_the_students(tmp_path: Path, updates: list[list[MicroBatch]]) -> None:
    texts = {prompt.text or "": prompt.solution or "" for prompt in list(TASK.prompts("train"))[::2]}
    changes = guided(tmp_path, responses=jsonl(tmp_path / "r.jsonl", texts), method={"guided": "replace"})
    for row, update in zip(metric_rows(train(tmp_path, **changes)), updates, strict=True):
        assert len(samples_of(update)) == 8
        begun = sum(given(sample) > 0 for sample in samples_of(update))
        assert begun == (4 - row["responses_missing"] if "prefix_tokens" in row else 0)


def test_a_response_that_is_too_long_leaves_room_for_the_student(
    tmp_path: Path, updates: list[list[MicroBatch]]
) -> None:
    """Cut to the length budget less one token; what the tokenizer cannot say is counted and not used."""
    texts = {prompt.text or "": "1" * 50 for prompt in TASK.prompts("train")}
    first = TASK.prompts("train")[0].text or ""
    texts[first] = "no such letters"
    changes = guided(tmp_path, responses=jsonl(tmp_path / "r.jsonl", texts), train={"prompts_per_step": 40, "steps": 1})
    row = metric_rows(train(tmp_path, **changes))[0]
    counts = Counter(map(given, samples_of(updates[0])))
    assert counts == {LIMIT - 1: 39, 0: 80}
    assert all(sample.num_response_tokens <= LIMIT for sample in samples_of(updates[0]))
    assert (row["responses_missing"], row["responses_unreadable"]) == (1.0, 1.0)


# --- the teacher's own -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that the teacher wrote a response to."""
    names: list[str] = []
    plain = HFEngine.generate

    def generate(self: HFEngine, requests: Any, *args: Any, **options: Any) -> Any:
        if options.get("stream") == "teacher":
            names.extend(request.prompt.id for request in requests)
        return plain(self, requests, *args, **options)

    monkeypatch.setattr(HFEngine, "generate", generate)
    return names


def test_the_teacher_writes_each_response_once(
    tmp_path: Path, asked: list[str], updates: list[list[MicroBatch]]
) -> None:
    """A second run that shares the cache has none written but those that did not end."""
    section = {"type": "teacher", "cache": str(tmp_path / "cache"), "max_new_tokens": 40}
    changes = guided(tmp_path, responses=section)
    changes["task"] = {"num_solutions": 12}
    first = train(tmp_path / "first", **changes)
    assert 0 < len(asked) == len(set(asked)) <= 12
    begun = [sample for sample in samples_of(updates[0]) if given(sample)]
    assert begun
    kept = [json.loads(line) for path in (tmp_path / "cache").iterdir() for line in path.read_text().splitlines()[1:]]
    texts = {row["prompt"]: row["text"] for row in kept}
    assert set(texts) <= set(asked)
    for sample in begun:
        assert sample.text.startswith(texts[sample.prompt.id][: given(sample)])
    unended = set(asked) - set(texts)
    asked.clear()
    assert_same_run(first, train(tmp_path / "second", **changes))
    assert set(asked) == unended


def test_the_teachers_responses_go_on_after_a_resume(tmp_path: Path, asked: list[str]) -> None:
    changes = guided(tmp_path, responses={"type": "teacher"}, train={"steps": 4})
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))


def test_imitating_a_teacher_that_writes(tmp_path: Path, asked: list[str], updates: list[list[MicroBatch]]) -> None:
    """Sequence-level distillation: SFT on what the teacher wrote."""
    changes = guided(tmp_path, responses={"type": "teacher"}, train={"steps": 2}) | {"method": {"type": "sft"}}
    rows = metric_rows(train(tmp_path, **changes))
    assert set(asked) >= {sample.prompt.id for update in updates for sample in samples_of(update)}
    for row, update in zip(rows, updates, strict=True):
        assert row["on_policy"] == 0.0
        assert row["samples_left_out"] == 8 - len(samples_of(update)) == row["responses_missing"]
        assert all(given(sample) == sample.num_response_tokens for sample in samples_of(update))


def test_phases_end_the_guidance(tmp_path: Path, updates: list[list[MicroBatch]]) -> None:
    """TrOPD for two thirds, whose steps it counts itself, then OPD without a response asked for."""
    parts = [{"until": 2 / 3, "type": "tropd", "k": 4, "anneal_steps": 8}, {"type": "opd"}]
    changes = guided(tmp_path) | {"method": {"type": "phases", "parts": parts}}
    rows = metric_rows(train(tmp_path, **changes))
    assert ["prefix_tokens" in row for row in rows] == [True] * 4 + [False] * 2
    kinds = [type(update[0].terms) for update in updates]
    assert kinds == [TrOPD] * 4 + [OPD] * 2
    assert [update[0].batch.uniform is None for update in updates] == [False] * 4 + [True] * 2
    assert torch.is_tensor(updates[0][0].batch.topk_ids)
    assert updates[-1][0].batch.topk_ids is None
