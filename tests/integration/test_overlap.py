"""Generation, scoring and updates at the same time."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import (
    assert_same_run,
    distillation,
    grade_by_length,
    judge_by_length,
    metric_rows,
    train,
    train_in_two,
)
from understudy.engines import HFEngine
from understudy.errors import EngineError, RecipeError
from understudy.trainer.loop import Trainer
from understudy.types import Request, Sample, Sampling

pytestmark = pytest.mark.slow

COPY = {"type": "hf", "copy": True}


def ahead(folder: Path, staleness: int, **changes: Any) -> dict[str, Any]:
    """Distillation with samples that may be so many steps old."""
    return distillation(folder, rollout=COPY, **{"async": {"max_staleness": staleness, "timeout_s": 60}}, **changes)


def consumed(run_dir: Path) -> list[tuple[int, list[int]]]:
    rows = [json.loads(line) for line in (run_dir / "consumed.jsonl").read_text().splitlines()]
    return [(row["step"], row["positions"]) for row in rows]


class Slow(HFEngine):
    """An engine that answers many requests at the same time, each after a delay of its own."""

    delay_s = 0.02
    seen: list[tuple[str, int]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.running = self.most = 0
        self.seen = []
        self._count = threading.Lock()

    concurrency = 16

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        with self._count:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.delay_s * random.Random(requests[0].key).random())
        try:
            return super().generate(requests, sampling, step=step, stream=stream)
        finally:
            with self._count:
                self.running -= 1
                self.seen += [(request.prompt.id, len(requests)) for request in requests]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[Slow]:
    """Runs sample from such an engine; the list holds those that were opened."""
    made: list[Slow] = []

    def opened(*args: Any, **options: Any) -> Slow:
        made.append(Slow(*args, **options))
        return made[-1]

    monkeypatch.setattr("understudy.engines.sections.HFEngine", opened)
    return made


def test_a_copy_that_is_up_to_date_changes_nothing(tmp_path: Path) -> None:
    """Staleness 0 with the weights copied is the plain run, bit by bit."""
    plain = train(tmp_path / "plain", **distillation(tmp_path / "a"))
    copied = train(tmp_path / "copied", **distillation(tmp_path / "a", rollout=COPY))
    overlapped = train(tmp_path / "overlapped", **ahead(tmp_path / "a", 0))
    assert_same_run(plain, copied)
    rows, others = metric_rows(plain), metric_rows(overlapped)
    assert [row["loss"] for row in rows[:1]] == [row["loss"] for row in others[:1]]
    assert all(row["staleness"] == 0 for row in others)
    assert [positions for _, positions in consumed(overlapped)] == [list(range(8 * n, 8 * n + 8)) for n in range(6)]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_samples_are_as_old_as_allowed_and_no_older(tmp_path: Path, staleness: int, slow: list[Slow]) -> None:
    run_dir = train(tmp_path, **ahead(tmp_path / "m", staleness))
    ages = [row["staleness"] for row in metric_rows(run_dir)]
    assert ages[0] == 0
    assert all(0 <= age <= staleness for age in ages)
    assert (max(ages) > 0) == (staleness > 0)
    assert [at for _, positions in consumed(run_dir) for at in positions] == list(range(48))
    assert sum(count for _, count in slow[0].seen) == 48, "no prompt was written twice, none beyond the last step"


def test_tokens_are_kept_with_what_the_teacher_finds_most_likely(tmp_path: Path, slow: list[Slow]) -> None:
    """Of the first prompts of a step, whose samples are scored ahead of it and one by one."""
    settings = {"steps": 6, "save_samples_every": 3, "samples_per_prompt": 2}
    run_dir = train(tmp_path, **ahead(tmp_path / "m", 2, method={"type": "opd"}, train=settings))
    files = sorted((run_dir / "tokens").iterdir())
    kept = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [row["step"] for row in kept] == [1] * 4 + [3] * 4 + [6] * 4
    assert all(None not in row["tokens"]["teacher_top"] for row in kept)


def test_the_gap_between_engine_and_trainer_is_measured(tmp_path: Path) -> None:
    fresh = metric_rows(train(tmp_path / "0", **ahead(tmp_path / "m", 0)))
    old = metric_rows(train(tmp_path / "2", **ahead(tmp_path / "m", 2)))
    assert all(row["sampler_gap"] < 1e-5 for row in fresh)
    assert old[0]["sampler_gap"] < 1e-5 < 1e-3 < old[-1]["sampler_gap"]


def test_importance_weights_see_the_age(tmp_path: Path) -> None:
    method = {"type": "opd", "correction": "tis"}
    fresh = metric_rows(train(tmp_path / "0", **ahead(tmp_path / "m", 0, method=method)))
    old = metric_rows(train(tmp_path / "2", **ahead(tmp_path / "m", 2, method=method)))
    assert all(row["importance"] == pytest.approx(1, abs=1e-4) for row in fresh)
    assert abs(old[-1]["importance"] - 1) > 1e-4


def test_what_is_used_does_not_depend_on_who_was_fast(tmp_path: Path, slow: list[Slow]) -> None:
    """With staleness 0 every sample comes from the step's weights: delays change nothing but time, and which samples are
    scored in one batch, so that scores round otherwise."""
    one = train(tmp_path / "one", **ahead(tmp_path / "m", 0))
    Slow.delay_s, before = 0.0, Slow.delay_s
    try:
        other = train(tmp_path / "other", **ahead(tmp_path / "m", 0))
    finally:
        Slow.delay_s = before
    assert consumed(one) == consumed(other)
    for row, like in zip(metric_rows(one), metric_rows(other), strict=True):
        assert row["loss"] == pytest.approx(like["loss"], rel=1e-2)
    assert metric_rows(one)[0]["response_tokens"] == metric_rows(other)[0]["response_tokens"]
    assert slow[0].most > 1, "nothing overlapped"


def test_groups_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: list[Slow]) -> None:
    """Samples that are compared with each other are written together, and rewarded as without overlap."""
    from understudy.tasks import Arithmetic

    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    changes = {"method": {"type": "grpo"}, "train": {"samples_per_prompt": 4, "prompts_per_step": 4}}
    plain = train(tmp_path / "plain", **(distillation(tmp_path / "m", **changes) | {"teacher": None}))
    other = train(tmp_path / "ahead", **(ahead(tmp_path / "m", 0, **changes) | {"teacher": None}))
    assert {count for _, count in slow[-1].seen} == {4}
    # the draws are named by position instead of step, so only the first step's count and the shape agree
    assert metric_rows(plain)[0].keys() <= metric_rows(other)[0].keys()
    assert metric_rows(other)[0]["unrewarded"] == 0


def test_flat_prompts_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: list[Slow]) -> None:
    from understudy.tasks import Arithmetic

    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    changes = {"method": {"type": "dapo"}, "train": {"samples_per_prompt": 2, "prompts_per_step": 4}}
    run_dir = train(tmp_path / "ahead", **(ahead(tmp_path / "m", 1, **changes) | {"teacher": None}))
    used = [at for _, positions in consumed(run_dir) for at in positions]
    assert used == list(range(len(used)))
    flat = sum(row["prompts_flat"] for row in metric_rows(run_dir))
    assert flat > 0
    assert len(used) == 6 * 4 + flat


def test_a_phase_takes_no_samples_of_the_one_before(tmp_path: Path, slow: list[Slow]) -> None:
    """What was sent under another method is sent again: its scores are not those that the new one needs."""
    parts = [{"until": 0.5, "type": "opd"}, {"type": "topk", "k": 4}]
    run_dir = train(tmp_path, **ahead(tmp_path / "m", 2, method={"type": "phases", "parts": parts}))
    rows = metric_rows(run_dir)
    assert [row["phase"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [at for _, positions in consumed(run_dir) for at in positions] == list(range(48))
    assert sum(count for _, count in slow[0].seen) == 48, "nothing was written under the wrong method"


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resumed_run_uses_every_prompt_once(tmp_path: Path, staleness: int) -> None:
    run_dir = train_in_two(tmp_path, 3, **ahead(tmp_path / "m", staleness))
    assert consumed(run_dir) == [(n + 1, list(range(8 * n, 8 * n + 8))) for n in range(6)]


def test_resume_is_bit_equal_where_no_sample_is_old(tmp_path: Path) -> None:
    assert_same_run(
        train(tmp_path / "whole", **ahead(tmp_path / "m", 0)),
        train_in_two(tmp_path / "cut", 3, **ahead(tmp_path / "m", 0)),
    )


def test_samples_that_are_too_old_are_dropped_counted_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that says that it wrote with old weights is not believed to be new."""
    plain = HFEngine.generate
    calls = []

    def lies(self: HFEngine, requests: Sequence[Request], sampling: Sampling, **keys: Any) -> list[Sample]:
        samples = plain(self, requests, sampling, **keys)
        if len(samples) == 8:
            calls.append(keys["step"])
            if len(calls) == 4:
                for sample in samples:
                    assert sample.policy_version is not None
                    sample.policy_version[sample.policy_version >= 0] = 0
        return samples

    monkeypatch.setattr(HFEngine, "generate", lies)
    run_dir = train(tmp_path, **ahead(tmp_path / "m", 1))
    rows = metric_rows(run_dir)
    assert sum(row.get("samples_stale", 0) for row in rows) == 8
    assert [at for _, positions in consumed(run_dir) for at in positions] == list(range(48))
    assert calls.count(24) == 2, "the prompts at position 24 were written again"
    assert max(row["staleness"] for row in rows) <= 1


def test_an_engine_that_never_takes_weights_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFEngine, "push", lambda self, weights, version, probe=None: None)
    with pytest.raises(EngineError, match="take the weights"):
        train(tmp_path, **ahead(tmp_path / "m", 1))


def test_an_error_in_a_thread_ends_the_run_and_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from understudy.teachers import LocalTeacher

    plain, calls = LocalTeacher.score, []

    def fails(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **keys: Any) -> Any:
        calls.append(len(samples))
        if len(calls) == 4:
            raise EngineError("the teacher at http://x is gone")
        return plain(self, samples, *args, **keys)

    before = set(threading.enumerate())
    monkeypatch.setattr(LocalTeacher, "score", fails)
    with pytest.raises(EngineError, match="is gone"):
        train(tmp_path, **ahead(tmp_path / "m", 1))
    assert not {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("understudy")}
    monkeypatch.setattr(LocalTeacher, "score", plain)
    run_dir = train(tmp_path, resume=True, **ahead(tmp_path / "m", 1))
    assert [at for _, positions in consumed(run_dir) for at in positions] == list(range(48))


def test_a_wait_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from understudy.teachers import LocalTeacher

    release = threading.Event()
    plain = LocalTeacher.score

    def hangs(self: LocalTeacher, *args: Any, **keys: Any) -> Any:
        release.wait(30)
        return plain(self, *args, **keys)

    monkeypatch.setattr(LocalTeacher, "score", hangs)
    monkeypatch.setattr(LocalTeacher, "close", lambda self: release.set())
    changes = ahead(tmp_path / "m", 1)
    changes["async"]["timeout_s"] = 1
    with pytest.raises(EngineError, match="no sample was finished for 1 s"):
        train(tmp_path, **changes)
    assert release.is_set()


def test_threads_end_with_the_run(tmp_path: Path, slow: list[Slow]) -> None:
    before = set(threading.enumerate())
    train(tmp_path, **ahead(tmp_path / "m", 2))
    assert not {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("understudy")}


def test_scores_are_those_of_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: list[Slow]) -> None:
    """Pieces are scored together in whatever order they come: each gets what the teacher says of it alone."""
    plain, seen = Trainer._update, []

    def compared(self: Trainer, samples: Sequence[Sample], *args: Any) -> dict[str, float]:
        teacher = self.rollouts.collector.teacher
        assert teacher is not None
        for sample in samples:
            assert sample.scores is not None
            alone = teacher.score([sample], frozenset({"sampled"}))[0]
            torch.testing.assert_close(sample.scores.logprob, alone.logprob, rtol=0, atol=1e-5)
            seen.append(sample.key)
        return plain(self, samples, *args)

    monkeypatch.setattr(Trainer, "_update", compared)
    train(tmp_path, **ahead(tmp_path / "m", 1, method={"type": "opd"}, train={"samples_per_prompt": 3}))
    assert len(set(seen)) == len(seen) == 6 * 8 * 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": None}, "copy: true"),
        ({"async": {"max_staleness": -1}}, "max_staleness is -1"),
    ],
)
def test_what_cannot_overlap_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        train(tmp_path, **(ahead(tmp_path / "m", 1) | changes))


def test_a_teacher_on_the_students_weights_is_refused(tmp_path: Path) -> None:
    changes = ahead(tmp_path / "m", 1, method={"type": "gopd"}, student={"lora": {"rank": 2}})
    with pytest.raises(RecipeError, match="reference score beside the update"):
        train(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_a_judge_is_asked_in_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: list[Slow]) -> None:
    from tests.runs import SHORT
    from understudy.teachers.judges.verbal import VerbalTeacher

    monkeypatch.setattr(VerbalTeacher, "judge", judge_by_length)
    changes = ahead(tmp_path / "m", 1, train={"samples_per_prompt": 2})
    changes |= {"teacher": SHORT | {"model": changes["teacher"]["model"]}, "method": {"type": "ovd"}}
    changes["method"] |= {"on_reject": "drop"}
    run_dir = train(tmp_path, **changes)
    assert [at for _, positions in consumed(run_dir) for at in positions] == list(range(48))
    assert 0 < metric_rows(run_dir)[0]["accepted"] < 1
