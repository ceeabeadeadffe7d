"""Rewards as they are trained on: groups, replaced prompts, penalties, and a judge that accepts, rejects or says nothing."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.leaks import nothing_left
from tests.runs import (
    SHORT,
    assert_same_run,
    distillation,
    grade_by_length,
    metric_rows,
    save_tiny_model,
    train,
    train_in_two,
    weights,
)
from understudy.errors import DataError, TrainingError
from understudy.tasks import Arithmetic
from understudy.teachers.judges.verbal import VerbalTeacher
from understudy.trainer import loop, rollouts
from understudy.trainer.update import MicroBatch
from understudy.types import Author, Grade, Prompt, Sample, Verdict

pytestmark = pytest.mark.slow

GROUPS = {"prompts_per_step": 4, "samples_per_prompt": 2, "steps": 2}
Grader = Callable[[object, Prompt, str], Grade | None]


class Seen:
    """Every sample that an update was made of, and every denominator's batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates: list[list[Sample]] = []
        self.micros: list[list[MicroBatch]] = []
        self.losses: list[float] = []
        plain = loop.accumulate_gradients

        def accumulate(student: Any, micros: Sequence[MicroBatch], **options: Any) -> Any:
            self.updates.append([sample for micro in micros for sample in micro.samples])
            self.micros.append(list(micros))
            found = plain(student, micros, **options)
            self.losses.append(found[0])
            return found

        monkeypatch.setattr(loop, "accumulate_gradients", accumulate)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def graded(monkeypatch: pytest.MonkeyPatch, grade: Grader) -> None:
    monkeypatch.setattr(Arithmetic, "grade", grade)


def outcome(folder: Path, method: str = "grpo", *, task: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """Changes for a method that uses no teacher."""
    train_keys = GROUPS | keys.pop("train", {})
    changes = distillation(folder, teacher=None, method={"type": method} | keys, train=train_keys)
    return changes | ({} if task is None else {"task": task})


def events(run_dir: Path) -> str:
    path = run_dir / "events.jsonl"
    return path.read_text() if path.is_file() else ""


# --- groups ------------------------------------------------------------------------------------------------------------


def test_equal_rewards_train_to_exactly_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, lambda task, prompt, text: Grade(0.3))
    changes = outcome(tmp_path)
    run_dir = train(tmp_path, **changes)
    assert [row["grad_norm"] for row in metric_rows(run_dir)] == [0.0, 0.0]
    start = weights_of(changes["student"]["model"])
    assert all(torch.equal(value, start[name]) for name, value in weights(run_dir).items())


def test_grades_of_several_threads_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a task whose programs run in a sandbox."""
    callers = set()

    def grade(task: object, prompt: Prompt, text: str) -> Grade | None:
        callers.add(threading.current_thread().name)
        if text.startswith(("1", "2")):
            return None
        return grade_by_length(task, prompt, text)

    graded(monkeypatch, grade)
    one = train(tmp_path / "one", **outcome(tmp_path))
    assert callers == {"MainThread"}
    monkeypatch.setattr(Arithmetic, "graders", 3)
    with nothing_left():
        several = train(tmp_path / "several", **outcome(tmp_path))
    assert len(callers) > 1
    assert_same_run(one, several)

    def fails(task: object, prompt: Prompt, text: str) -> Grade:
        raise DataError("no grade")

    graded(monkeypatch, fails)
    with nothing_left(), pytest.raises(DataError, match="no grade"):
        train(tmp_path / "fails", **outcome(tmp_path))


def weights_of(model: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(model) / "model.safetensors")


@pytest.mark.parametrize("method", ["grpo", "dr_grpo"])
def test_the_advantage_is_that_of_the_group(
    tmp_path: Path, method: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    graded(monkeypatch, grade_by_length)
    train(tmp_path, **outcome(tmp_path, method, train={"samples_per_prompt": 4}))
    for samples in seen.updates:
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.prompt.id, []).append(sample)
        assert [len(group) for group in groups.values()] == [4] * 4
        for group in groups.values():
            rewards = [grade_by_length(None, one.prompt, one.text).score for one in group]
            mean = sum(rewards) / 4
            std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 4)
            divisor = std + 1e-6 if method == "grpo" else 1.0
            expected = [(reward - mean) / divisor for reward in rewards]
            assert [one.advantage for one in group] == pytest.approx(expected, abs=1e-12)
    for micro in (micro for part in seen.micros for micro in part):
        sizes = [sample.num_response_tokens for sample in micro.samples]
        rows = [sample.advantage for sample, size in zip(micro.samples, sizes, strict=True) for _ in range(size)]
        assert micro.batch.outcome_advantage is not None
        assert micro.batch.outcome_advantage.tolist() == pytest.approx(rows)


def test_the_reward_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, lambda task, prompt, text: Grade(0.3))
    rows = metric_rows(train(tmp_path, **outcome(tmp_path)))
    assert [row["reward"] for row in rows] == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(("score", "advice"), [(0.0, "take easier problems"), (1.0, "take harder problems")])
@pytest.mark.parametrize("overlap", [None, {"max_staleness": 0}], ids=["in turns", "overlapped"])
def test_rewards_that_are_all_equal_are_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float, advice: str, overlap: dict[str, Any] | None
) -> None:
    graded(monkeypatch, lambda task, prompt, text: Grade(score))
    changes = outcome(tmp_path, "grpo", train={"steps": 5}) | {
        "rollout": {"type": "hf", "copy": True},
        "async": overlap,
    }
    run_dir = train(tmp_path, **changes)
    assert [row["prompts_flat"] for row in metric_rows(run_dir)] == [4.0] * 5
    told = events(run_dir)
    assert told.count("the samples of every prompt are rewarded alike") == 1
    assert told.count("no prompt has samples of different reward since step 1") == told.count(advice) == 1


def test_one_prompt_with_different_rewards_is_enough_to_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graded(monkeypatch, only_some)
    run_dir = train(tmp_path, **outcome(tmp_path, "grpo", train={"steps": 4}))
    flat = [row["prompts_flat"] for row in metric_rows(run_dir)]
    assert any(0 < number < 4 for number in flat)
    assert ("rewarded alike" in events(run_dir)) == (4 in flat)


def test_one_prompt_is_a_run(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot of a step is the same prompt: one group, all of it distinct samples."""
    graded(monkeypatch, grade_by_length)
    train(tmp_path, **outcome(tmp_path, task={"num_solutions": 1}))
    assert [len({sample.key for sample in samples}) for samples in seen.updates] == [8, 8]
    for samples in seen.updates:
        rewards = [sample.reward for sample in samples]
        assert sum(sample.advantage or 0.0 for sample in samples) == pytest.approx(0.0, abs=1e-9)
        assert len(set(rewards)) > 1


# --- replaced prompts --------------------------------------------------------------------------------------------------


def only_some(task: object, prompt: Prompt, text: str) -> Grade:
    """Prompts whose sum is a multiple of four are too hard: always wrong."""
    return Grade(0.0) if int((prompt.reference or ("0",))[0]) % 4 == 0 else grade_by_length(task, prompt, text)


def test_flat_prompts_are_replaced(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, only_some)
    changes = outcome(tmp_path, "dapo", train={"steps": 4})
    whole = train(tmp_path / "whole", **changes)
    for samples in seen.updates:
        counts = Counter(sample.prompt.id for sample in samples)
        assert list(counts.values()) == [2] * 4
        for name in counts:
            assert len({sample.reward for sample in samples if sample.prompt.id == name}) == 2
    rows = metric_rows(whole)
    assert all(row["prompts_flat"] > 0 and row["rounds_refilled"] > 0 for row in rows)
    progress = json.loads(next((whole / "checkpoints").glob("*/progress.json")).read_text())
    assert progress["position"] == 4 * 4 + sum(row["prompts_flat"] for row in rows)
    names = [sample.prompt.id for samples in seen.updates for sample in samples]
    assert len(set(names)) == 4 * 4
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))


def test_one_prompt_fills_all_slots_of_a_step(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is drawn for four slots has filled four."""
    graded(monkeypatch, grade_by_length)
    rows = metric_rows(train(tmp_path, **outcome(tmp_path, "dapo", task={"num_solutions": 1})))
    assert [len(samples) for samples in seen.updates] == [8, 8]
    assert not any(row.get("rounds_refilled") for row in rows)


def test_a_search_without_end_ends(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, lambda task, prompt, text: Grade(0.0))
    run_dir = train(tmp_path, **outcome(tmp_path, "dapo"))
    rows = metric_rows(run_dir)
    assert [row["prompts_flat"] for row in rows] == [4.0 * rollouts.MAX_ROUNDS] * 2
    assert [row["rounds_refilled"] for row in rows] == [rollouts.MAX_ROUNDS - 1.0] * 2
    assert "step 1 was skipped: the samples of every prompt are rewarded alike (mean 0)" in events(run_dir)
    assert "no sample with a trained token" not in events(run_dir)
    assert "lr" not in rows[0]


def test_long_samples_are_worth_less(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """DAPO's eq. 13 with a limit of 24 and a buffer of 8: nothing up to 16 tokens, one at 24. It makes no group differ in
    being right, which is what dynamic sampling looks at."""
    graded(monkeypatch, lambda task, prompt, text: Grade(1.0))
    train(tmp_path, **outcome(tmp_path, "grpo", overlong_buffer=8))
    samples = [sample for part in seen.updates for sample in part]
    assert any(sample.truncated for sample in samples)
    for sample in samples:
        penalty = max(sample.num_response_tokens - 16, 0) / 8
        assert sample.reward == pytest.approx(1.0 - penalty)


# --- several updates ---------------------------------------------------------------------------------------------------


def test_a_second_pass_without_a_move_is_the_first(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, grade_by_length)
    train(tmp_path, **outcome(tmp_path, train={"passes": 2, "lr": 0.0}))
    assert len(seen.losses) == 4
    assert seen.losses[0] == seen.losses[1]
    assert seen.losses[2] == seen.losses[3]


@pytest.mark.parametrize("method", ["grpo", "opd", "reopold", "gkd"])
def test_two_minibatches_are_two_updates(
    tmp_path: Path, method: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the updates; S_old of both is that of before the first; each is divided by its own tokens."""
    graded(monkeypatch, grade_by_length)
    teacher = {} if method == "grpo" else {"teacher": distillation(tmp_path)["teacher"]}
    changes = outcome(tmp_path, method, train={"minibatches": 2, "passes": 2})
    if method == "reopold":
        changes["method"] |= {"switch_step": 0, "top_share": 0.25}
    run_dir = train(tmp_path, **changes | teacher)
    assert json.loads((run_dir / "run.json").read_text())["updates"] == 8
    assert [len(samples) for samples in seen.updates] == [4] * 8
    for first in (0, 4):
        one, other, again, last = (seen.micros[first + index] for index in range(4))
        assert all(first_pass is second_pass for first_pass, second_pass in zip(one, again, strict=True))
        assert all(first_pass is second_pass for first_pass, second_pass in zip(other, last, strict=True))
        assert not {sample.key for sample in seen.updates[first]} & {sample.key for sample in seen.updates[first + 1]}
    for micro in (micro for part in seen.micros for micro in part):
        old, sampled = micro.batch.student_logprob, micro.batch.rollout_logprob
        assert old is not None
        assert sampled is not None
        # the engine wrote with the weights that S_old is of; its cache sums in another order
        torch.testing.assert_close(old, sampled, rtol=0, atol=1e-4)
    if method == "reopold":
        kept = [micro.terms.given[0].per.sum() for part in seen.micros[:2] for micro in part]  # type: ignore[union-attr]
        trained = sum(int(micro.batch.mask.sum()) for part in seen.micros[:2] for micro in part)
        assert int(sum(kept)) == math.ceil(0.25 * trained)


def test_minibatches_are_each_a_mean(tmp_path: Path, seen: Seen) -> None:
    """The loss of an update is the mean over its own tokens, also where its sizes differ."""
    teacher = {"teacher": distillation(tmp_path)["teacher"]}
    train(tmp_path, **outcome(tmp_path, "opd", train={"minibatches": 2, "lr": 0.0, "steps": 1}) | teacher)
    for part, loss in zip(seen.micros, seen.losses, strict=True):
        total, count = 0.0, 0
        for micro in part:
            batch = micro.batch
            assert batch.teacher_logprob is not None
            assert batch.student_logprob is not None
            total -= float((batch.teacher_logprob - batch.student_logprob).sum())
            count += len(batch)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_more_minibatches_than_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update without a sample is none."""
    graded(monkeypatch, grade_by_length)
    run_dir = train(tmp_path, **outcome(tmp_path, train={"prompts_per_step": 1, "minibatches": 3}))
    assert json.loads((run_dir / "run.json").read_text())["updates"] == 4
    assert all(math.isfinite(row["loss"]) for row in metric_rows(run_dir))


# --- a judge -----------------------------------------------------------------------------------------------------------

Judging = Callable[[Sample], Verdict]


def verbal(folder: Path, *, responses: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """Changes for OVD; threshold 7, filled with solutions unless told otherwise."""
    fills = keys.get("on_reject", "teacher") == "teacher"
    return outcome(folder, "ovd", **keys) | {
        "teacher": SHORT | {"model": save_tiny_model(folder / "judge", seed=9)},
        "responses": (responses or {"type": "solutions"}) if fills else None,
        "task": {"num_solutions": 50},
    }


def judged(monkeypatch: pytest.MonkeyPatch, *rounds: Judging) -> list[list[Sample]]:
    """The judge says what the functions say, the last one from then on; returns what it was asked."""
    asked: list[list[Sample]] = []

    def judge(self: object, samples: Sequence[Sample], *, score: str = "argmax", steps: bool = False) -> list[Verdict]:
        said = rounds[min(len(asked), len(rounds) - 1)]
        asked.append(list(samples))
        return [said(sample) for sample in samples]

    monkeypatch.setattr(VerbalTeacher, "judge", judge)
    return asked


def second_is_bad(sample: Sample) -> Verdict:
    return Verdict(9.0 if sample.index % 2 == 0 else 3.0, signal_bytes=1)


def all_good(sample: Sample) -> Verdict:
    return Verdict(7.0, signal_bytes=1)


def solved(task: object, prompt: Prompt, text: str) -> Grade:
    return Grade(float(text == prompt.solution))


def authors(samples: Sequence[Sample]) -> list[set[int]]:
    return [set(sample.author[sample.prompt_length :].tolist()) for sample in samples]


def test_a_batch_of_filled_slots_has_nothing_to_correct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine sampled its tokens, so they weigh 1; they lack no number."""
    judged(monkeypatch, lambda sample: Verdict(0.0))
    rows = metric_rows(train(tmp_path, **verbal(tmp_path, correction="tis")))
    assert all(row["filled"] == 1.0 for row in rows)
    assert all("importance" not in row for row in rows)


def test_rejected_slots_are_the_teachers(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole responses of the teacher, trained in place of what was rejected and compared with the rest of the group."""
    judged(monkeypatch, second_is_bad)
    graded(monkeypatch, solved)
    row = metric_rows(train(tmp_path, **verbal(tmp_path, train={"steps": 1})))[0]
    (samples,) = seen.updates
    assert len(samples) == 8
    for sample, wrote in zip(samples, authors(samples), strict=True):
        filled = sample.index % 2 == 1
        assert wrote == {int(Author.TEACHER if filled else Author.STUDENT)}
        assert (sample.text == sample.prompt.solution) is filled
        assert int(sample.token_ids[-1]) == 1 or not filled
        # two samples with rewards 1 and 0
        assert sample.advantage == pytest.approx(1.0 if filled else -1.0, abs=1e-5)
    for micro in seen.micros[0]:
        assert bool(micro.batch.mask.all())
        assert micro.batch.student_logprob is None
    assert row["accepted"] == 0.5
    assert row["filled"] == 0.5
    assert row["unscored"] == 0.0
    assert row["verbal_score"] == 6.0
    assert row["reward"] == 0.5
    assert [row[f"verbal/{digit}"] for digit in range(10)] == [0, 0, 0, 0.5, 0, 0, 0, 0, 0, 0.5]
    # eight digits; 17 logits of four bytes; 17 pairs of eight bytes, all that there are
    assert row["signal_bytes_per_token"] == pytest.approx(8 / (8 * row["response_tokens"]))
    assert row["signal_bytes_per_token_full"] == 4 * 17
    assert row["signal_bytes_per_token_top64"] == 8 * 17


def test_rejected_samples_are_dropped(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, second_is_bad)
    graded(monkeypatch, grade_by_length)
    row = metric_rows(train(tmp_path, **verbal(tmp_path, on_reject="drop", train={"samples_per_prompt": 4})))[0]
    for samples in seen.updates:
        assert [sample.index % 2 for sample in samples] == [0] * 8
    assert (row["accepted"], row["filled"]) == (0.5, 0.0)


def test_rejected_samples_are_written_again(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; a second attempt that is rejected too leaves its slot empty."""
    asked = judged(monkeypatch, second_is_bad, lambda sample: Verdict(9.0 if sample.index == 1 else 0.0))
    graded(monkeypatch, grade_by_length)
    changes = verbal(tmp_path, on_reject="resample", train={"samples_per_prompt": 4, "steps": 1})
    row = metric_rows(train(tmp_path, **changes))[0]
    first, second = asked
    assert [sample.index for sample in second] == [1, 3] * 4
    texts = {sample.key: sample.text for sample in first}
    assert all(sample.text != texts[sample.key] for sample in second)
    assert sorted(sample.index for sample in seen.updates[0]) == [0] * 4 + [1] * 4 + [2] * 4
    again = {sample.key: sample.text for sample in second}
    assert all(sample.text == again[sample.key] for sample in seen.updates[0] if sample.index == 1)
    assert row["filled"] == pytest.approx(4 / 12)


def test_what_the_judge_cannot_score_is_not_trained(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither accepted nor rejected: no 0, no slot to fill, not in the mean."""
    judged(monkeypatch, lambda sample: Verdict(None if sample.index == 0 else 8.0))
    graded(monkeypatch, grade_by_length)
    row = metric_rows(train(tmp_path, **verbal(tmp_path)))[0]
    assert [sample.index for sample in seen.updates[0]] == [1] * 4
    assert (row["unscored"], row["accepted"], row["verbal_score"], row["filled"]) == (0.5, 1.0, 8.0, 0.0)


def test_a_judge_that_accepts_nothing_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without a sample are skipped and told; a run of nothing else does not end as if it had learnt."""
    monkeypatch.setattr(loop, "MAX_EMPTY", 2)
    judged(monkeypatch, lambda sample: Verdict(0.0))
    with pytest.raises(TrainingError, match="no sample was left to train on in 2 steps in a row"):
        train(tmp_path, **verbal(tmp_path, on_reject="drop", train={"steps": 6}))
    assert "no sample with a trained token is left" in events(tmp_path / "run")


def test_the_digit_is_the_reward(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verifier is asked; responses of the teacher are judged as well, and without a digit they are dropped."""

    def said(sample: Sample) -> Verdict:
        if sample.finish == "data":
            return Verdict(None if sample.prompt.id.endswith(("1:", "3:", "5:", "7:", "9:")) else 8.0)
        return second_is_bad(sample)

    asked = judged(monkeypatch, said)
    graded(monkeypatch, lambda task, prompt, text: pytest.fail("a verifier was asked"))
    changes = verbal(tmp_path, reward="verbal", train={"steps": 1, "prompts_per_step": 8})
    row = metric_rows(train(tmp_path, **changes))[0]
    assert len(asked) == 2
    lost = sum(said(sample).score is None for sample in asked[1])
    assert 0 < lost < 8
    assert row["unrewarded"] == lost / 16
    assert len(seen.updates[0]) == 16 - lost
    for sample in seen.updates[0]:
        assert sample.reward == pytest.approx((8.0 if sample.finish == "data" else 9.0) / 9.0)


def test_a_step_that_rejects_all_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, lambda sample: Verdict(0.0), all_good)
    graded(monkeypatch, grade_by_length)
    run_dir = train(tmp_path, **verbal(tmp_path, on_reject="drop"))
    first, second = metric_rows(run_dir)
    assert (first["accepted"], second["accepted"]) == (0.0, 1.0)
    assert "filled" not in first
    assert json.loads((run_dir / "run.json").read_text())["updates"] == 1
    assert "step 1 was skipped" in events(run_dir)


def test_a_slot_without_a_response_stays_empty(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(monkeypatch, second_is_bad)
    graded(monkeypatch, grade_by_length)
    task = Arithmetic("addition", digits=2, num_solutions=50)
    rows = [{"q": prompt.text, "a": prompt.solution} for prompt in list(task.prompts("train"))[::2]]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "path": str(file), "prompt_field": "q", "response_field": "a"}
    shown = metric_rows(train(tmp_path, **verbal(tmp_path, responses=source, train={"prompts_per_step": 10})))
    for row, samples in zip(shown, seen.updates, strict=True):
        assert 0 < row["responses_missing"] < 10
        assert len(samples) == 20 - row["responses_missing"]


@pytest.mark.parametrize("method", ["sft", "ovd"])
def test_a_response_beyond_the_positions_is_not_trained(
    tmp_path: Path, method: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models have 64 positions. Nothing is cut."""
    judged(monkeypatch, second_is_bad)
    graded(monkeypatch, grade_by_length)
    task = Arithmetic("addition", digits=2, num_solutions=50)
    rows = [{"q": prompt.text, "a": "1" * 80} for prompt in task.prompts("train")]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "path": str(file), "prompt_field": "q", "response_field": "a"}
    changes = verbal(tmp_path, responses=source)
    if method == "sft":
        changes |= {"method": {"type": "sft"}, "teacher": None}
    shown = metric_rows(train(tmp_path, **changes))
    assert all(sample.token_ids.numel() <= 65 for samples in seen.updates for sample in samples)
    assert [len(samples) for samples in seen.updates] == [0 if method == "sft" else 4] * 2
    if method == "sft":
        assert [row["samples_left_out"] for row in shown] == [8.0] * 2
    else:
        assert [(row["filled"], row["responses_too_long"]) for row in shown] == [(0.0, 1.0)] * 2


def test_one_example_is_a_run(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one line, drawn for every prompt of a step."""
    judged(monkeypatch, second_is_bad)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"q": "12+34:", "a": "240=06;130=04#46", "r": "46"}) + "\n")
    fields = {"prompt_field": "q", "solution_field": "a", "reference_field": "r", "chat": False}
    changes = verbal(tmp_path) | {"task": {"type": "jsonl", "path": str(file), **fields}}
    train(tmp_path, **changes)
    for samples in seen.updates:
        assert len(samples) == len({sample.key for sample in samples}) == 5
        # there is one solution, which fills one of the four slots
        assert Counter(sample.finish == "data" for sample in samples) == {True: 1, False: 4}


def several(folder: Path, count: int) -> dict[str, Any]:
    """`count` responses to every problem, the first of them its solution."""
    file = folder / "several.jsonl"
    prompts = Arithmetic("addition", digits=2, num_solutions=50).prompts("train")
    rows = [{"q": p.text, "a": f"{p.solution or ''}{'0' * number}"} for p in prompts for number in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"type": "jsonl", "path": str(file), "prompt_field": "q", "response_field": "a"}


def first_is_good(sample: Sample) -> Verdict:
    return Verdict(9.0 if sample.index % 4 == 0 else 0.0)


@pytest.mark.parametrize(("count", "held"), [(5, 3), (3, 3), (2, 2), (1, 1)])
def test_rejected_slots_of_a_group_hold_different_responses(
    tmp_path: Path, count: int, held: int, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slots hold `held` responses, none twice; slots that nothing is left for stay empty, counted and told."""
    judged(monkeypatch, first_is_good)
    graded(monkeypatch, lambda task, prompt, text: Grade(float(len(text) % 2)))
    changes = verbal(tmp_path, responses=several(tmp_path, count), train={"samples_per_prompt": 4})
    run_dir = train(tmp_path, **changes)
    for row, samples in zip(metric_rows(run_dir), seen.updates, strict=True):
        given = [(sample.prompt.id, sample.text) for sample in samples if sample.finish == "data"]
        assert len(given) == len(set(given)) == 4 * held
        assert Counter(name for name, _ in given) == dict.fromkeys({name for name, _ in given}, held)
        assert row["slots_empty"] == pytest.approx(1 - held / 3)
        if held > 1:
            assert any(sample.advantage for sample in samples if sample.finish == "data")
    assert events(run_dir).count("places of rejected samples stay empty") == (1 if held < 3 else 0)


def test_a_group_of_rejected_samples_learns_where_its_responses_differ(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is rejected: right responses of the teacher are compared with its wrong ones."""
    judged(monkeypatch, lambda sample: Verdict(0.0))
    graded(monkeypatch, solved)
    changes = verbal(tmp_path, responses=several(tmp_path, 4), train={"samples_per_prompt": 4, "steps": 1})
    train(tmp_path, **changes)
    for sample in seen.updates[0]:
        # one of four is right: mean 1/4, standard deviation sqrt(3) / 4
        expected = 3 / math.sqrt(3) if sample.text == sample.prompt.solution else -1 / math.sqrt(3)
        assert sample.advantage == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("overlap", [None, {"max_staleness": 0}], ids=["in turns", "overlapped"])
def test_filled_slots_go_on_after_a_resume(
    tmp_path: Path, overlap: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, first_is_good)
    graded(monkeypatch, grade_by_length)
    changes = verbal(tmp_path, responses=several(tmp_path, 5), kl_coef=0.0, train={"samples_per_prompt": 4, "steps": 4})
    changes |= {"rollout": {"type": "hf", "copy": True}, "async": overlap}
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))


def test_a_local_judge_reads_the_samples(tmp_path: Path) -> None:
    """Its own words, through the whole loop."""
    rows = metric_rows(train(tmp_path, **verbal(tmp_path, threshold=0, score="expectation", steps=True)))
    assert all(row["accepted"] == 1.0 and 0 < row["verbal_score"] < 9 for row in rows)
    # forty bytes for the ten probabilities of each step
    assert all(row["signal_bytes_per_token"] * row["response_tokens"] >= 40 for row in rows)
