"""An evaluation from prompts to files, with an engine whose responses are known."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from understudy.errors import CheckpointError, DataError, VocabularyError
from understudy.eval import evaluate
from understudy.eval.estimators import SHARE, estimate_mean
from understudy.eval.evaluate import Rejection, run_eval
from understudy.eval.summary import EvalSummary, read_summaries, summarise
from understudy.report.read import read_attempts, read_eval
from understudy.tasks import Arithmetic, Jsonl, build_tokenizer
from understudy.tasks.renderer import Renderer
from understudy.teachers.judges.wording import Wording
from understudy.types import Author, Finish, Prompt, Request, Sample, Sampling, Verdict

TASK = Arithmetic()
TOKENIZER = build_tokenizer("addition")
EOS = int(TOKENIZER.eos_token_id)
PROMPTS = list(TASK.prompts("test")[:6])

Answer = Callable[[Request], str]


class Oracle:
    """An engine that answers what it is told to; "" is a response cut at the length limit."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[tuple[list[str], int, str]] = []

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        self.calls.append(([request.key for request in requests], step, stream))
        return [self._sample(request) for request in requests]

    def push(self, weights: object, version: int) -> None:
        raise AssertionError("an evaluation does not change the weights")

    def _sample(self, request: Request) -> Sample:
        text = self.answer(request)
        finish: Finish = "stop" if text else "length"
        response = Renderer(TOKENIZER).response(request.prompt, text) if text else torch.full((9,), 2)
        ids = torch.cat([request.token_ids, response])
        author = torch.full(ids.shape, Author.STUDENT, dtype=torch.uint8)
        return Sample(request.prompt, request.index, ids, author, len(request.token_ids), finish, text)


def right(request: Request) -> str:
    return request.prompt.solution or ""


def right_for(num_right: int) -> Answer:
    """The first samples of each prompt are right, the last one has no end, those between are wrong and agree."""
    return lambda request: right(request) if request.index < num_right else "#7" if request.index < 3 else ""


def evaluated(answer: Answer = right, **changes: Any) -> EvalSummary:
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "task": TASK,
        "renderer": Renderer(TOKENIZER),
        "engine": Oracle(answer),
        "sampling": Sampling(max_new_tokens=40),
        "samples_per_prompt": 4,
        "step": 20,
        "split": "test",
        "out_dir": None,
        "max_prompt_tokens": 16,
    }
    return run_eval(**(settings | changes))


def values(summary: EvalSummary) -> dict[str, float]:
    return {name: estimate.value for name, estimate in summary.metrics.items()}


def test_all_right() -> None:
    summary = evaluated()
    length = np.mean([len(prompt.solution or "") + 1 for prompt in PROMPTS])
    assert values(summary) == {
        "avg@4": 1.0,
        "pass@2": 1.0,
        "pass^2": 1.0,
        "pass@4": 1.0,
        "pass^4": 1.0,
        "maj@4": 1.0,
        "mean_tokens": pytest.approx(length),
        "truncated": 0.0,
        "no_eos": 0.0,
    }
    assert (summary.num_problems, summary.samples_per_prompt, summary.unscored, summary.too_long) == (6, 4, 0, 0)


def test_known_numbers() -> None:
    """One right, two that agree on a wrong answer, one without end."""
    assert values(evaluated(right_for(1))) == {
        "avg@4": 0.25,
        "pass@2": pytest.approx(1 - (3 * 2) / (4 * 3)),
        "pass^2": 0.0,
        "pass@4": 1.0,
        "pass^4": 0.0,
        "maj@4": 0.0,
        "mean_tokens": pytest.approx(np.mean([len(p.solution or "") + 1 + 3 + 3 + 9 for p in PROMPTS]) / 4),
        "truncated": 0.25,
        "no_eos": 0.25,
    }
    assert values(evaluated(right_for(2)))["maj@4"] == 1.0


def test_intervals_are_over_problems() -> None:
    good = {prompt.id for prompt in PROMPTS[:2]}
    summary = evaluated(lambda request: right(request) if request.prompt.id in good else "#7")
    expected = estimate_mean([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], SHARE)
    assert summary.metrics["avg@4"] == expected
    assert expected.num_problems == 6


@pytest.mark.parametrize(
    ("num_samples", "names"), [(1, {"pass@1"}), (3, {"pass@2", "pass@3"}), (8, {"pass@2", "pass@4", "pass@8"})]
)
def test_sizes_of_pass_at_k(num_samples: int, names: set[str]) -> None:
    found = evaluated(samples_per_prompt=num_samples).metrics
    assert {name for name in found if name.startswith("pass@")} == names
    powers = {name.replace("@", "^") for name in names} - {"pass^1"}
    assert {name for name in found if name.startswith("pass^")} == powers
    assert {f"avg@{num_samples}", f"maj@{num_samples}"} < found.keys()


def test_scaling_has_the_accuracy_of_fewer_samples() -> None:
    """One of four is right; two agree on a wrong answer, one has no end and no vote."""
    summary = evaluated(right_for(1))
    assert [point.samples for point in summary.scaling] == [1, 2, 4]
    found = {name: [point.metrics[name].value for point in summary.scaling] for name in ("avg", "pass", "maj")}
    assert found["avg"] == [0.25] * 3
    assert found["pass"] == pytest.approx([0.25, 0.5, 1.0])
    # of six pairs three have the right answer: with a wrong one it wins by lot, alone always
    assert found["maj"] == pytest.approx([0.25, (1 / 2 + 1 / 2 + 1) / 6, 0.0])
    tokens = summary.metrics["mean_tokens"]
    assert [point.tokens.value for point in summary.scaling] == pytest.approx([tokens.value * k for k in (1, 2, 4)])
    for name in ("pass", "maj"):
        assert summary.scaling[-1].metrics[name] == summary.metrics[f"{name}@4"]
    assert evaluated(samples_per_prompt=1).scaling == []


def test_scaling_is_over_problems_that_are_graded() -> None:
    open_ended = [replace(prompt, id=f"open {prompt.id}", reference=None) for prompt in PROMPTS[:2]]
    summary = evaluated(prompts=[*open_ended, *PROMPTS[:3]])
    assert {point.tokens.num_problems for point in summary.scaling} == {3}
    assert evaluated(prompts=open_ended).scaling == []


def test_the_draws_are_those_of_the_split_and_not_of_the_step() -> None:
    engines = []
    for step in (0, 20):
        engines.append(Oracle(right))
        evaluated(engine=engines[-1], step=step)
    assert engines[0].calls == engines[1].calls
    ((keys, _, stream),) = engines[0].calls
    assert stream == "eval/test"
    assert keys == [f"{prompt.id}#{index}" for prompt in PROMPTS for index in range(4)]


def test_blocks_change_nothing_and_report_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluated(right_for(1))
    monkeypatch.setattr(evaluate, "BLOCK_REQUESTS", 10)
    seen: list[int] = []
    assert evaluated(right_for(1), progress=seen.append) == whole
    assert seen == [10, 10, 4]


def test_long_prompts_are_counted_and_not_cut() -> None:
    longer = replace(PROMPTS[0], id="longer", text="1+1:" * 5)
    engine = Oracle(right)
    summary = evaluated(prompts=[longer, *PROMPTS], engine=engine)
    assert (summary.too_long, summary.num_problems) == (1, 6)
    assert not any("longer" in key for keys, _, _ in engine.calls for key in keys)
    with pytest.raises(DataError, match="none of the 1 evaluation prompts has at most 16 tokens"):
        evaluated(prompts=[longer])


def test_bad_input_is_refused_before_anything_is_sampled() -> None:
    engine = Oracle(right)
    with pytest.raises(DataError, match="no evaluation prompts"):
        evaluated(prompts=[], engine=engine)
    with pytest.raises(DataError, match="ids must be distinct"):
        evaluated(prompts=[PROMPTS[0], PROMPTS[0]], engine=engine)
    with pytest.raises(ValueError, match="at least 1"):
        evaluated(samples_per_prompt=0, engine=engine)
    endless = build_tokenizer("addition")
    endless.eos_token = None
    with pytest.raises(VocabularyError, match="no EOS"):
        evaluated(renderer=Renderer(endless), engine=engine)
    assert engine.calls == []


def test_an_engine_that_loses_a_sample_is_named() -> None:
    class Lossy(Oracle):
        def generate(self, requests: Sequence[Request], sampling: Sampling, **keyed: Any) -> list[Sample]:
            samples = super().generate(requests, sampling, **keyed)
            return [samples[0], *samples[2:]]

    with pytest.raises(DataError, match=rf"23 samples for 24 requests, and not that of .*{PROMPTS[0].text[:3]}.*#1 in"):
        evaluated(engine=Lossy(right))


def test_samples_without_reference_are_unscored_and_never_zero() -> None:
    open_ended = [replace(prompt, id=f"open {prompt.id}", reference=None) for prompt in PROMPTS[:2]]
    summary = evaluated(prompts=[*open_ended, *PROMPTS])
    assert summary.unscored == 8
    assert summary.metrics["avg@4"].value == 1.0
    assert summary.metrics["avg@4"].num_problems == 6
    assert summary.metrics["mean_tokens"].num_problems == 8
    nothing = evaluated(prompts=open_ended)
    assert set(nothing.metrics) == {"mean_tokens", "truncated", "no_eos"}


def test_every_eos_of_the_model_ends_a_response() -> None:
    other = int(TOKENIZER.convert_tokens_to_ids("9"))

    class OtherEnd(Oracle):
        def _sample(self, request: Request) -> Sample:
            sample = super()._sample(request)
            return replace(sample, token_ids=torch.cat([sample.token_ids[:-1], torch.tensor([other])]))

    assert values(evaluated(engine=OtherEnd(right)))["no_eos"] == 1.0
    assert (
        values(evaluated(engine=OtherEnd(right), renderer=Renderer(TOKENIZER, stop_ids=(EOS, other))))["no_eos"] == 0.0
    )


def test_a_broken_grader_stops_the_evaluation() -> None:
    class Broken(Arithmetic):
        def grade(self, prompt: Prompt, text: str) -> Any:
            raise OSError("the grader is gone")

    with pytest.raises(OSError, match="the grader is gone"):
        evaluated(task=Broken())
    assert not any(thread.name.startswith("grade") for thread in threading.enumerate())


def test_unequal_numbers_of_samples_have_no_summary() -> None:
    samples = Oracle(right).generate([Request(PROMPTS[0], 0, torch.tensor([3]))], Sampling(), step=0)
    more = [*samples, *(replace(samples[0], prompt=PROMPTS[1], index=index) for index in range(2))]
    for wrong in (more, []):
        with pytest.raises(ValueError, match="same number of samples"):
            summarise(wrong, step=0, split="test", eos_ids=(EOS,))


# Files


def test_the_report_reads_what_was_written(tmp_path: Path) -> None:
    summary = evaluated(right_for(1), out_dir=tmp_path / "eval", sampling=Sampling(temperature=0.7, max_new_tokens=40))
    record = read_eval(tmp_path / "eval/step_000020.json")
    assert (record.step, record.split, record.samples_per_prompt, record.num_problems) == (20, "test", 4, 6)
    assert {name: (item.value, item.low, item.high) for name, item in record.metrics.items()} == {
        name: (item.value, item.low, item.high) for name, item in summary.metrics.items()
    }
    assert (record.scaling, read_summaries(tmp_path / "eval")) == (summary.scaling, [summary])
    raw = json.loads((tmp_path / "eval/step_000020.json").read_text())
    assert raw["metrics"]["avg@4"]["num_problems"] == 6
    assert raw["sampling"]["temperature"] == 0.7
    assert (raw["unscored"], raw["too_long"]) == (0, 0)
    attempts = [attempt for found in record.problems().values() for attempt in found]
    assert len(attempts) == 24
    first, last = attempts[0], attempts[3]
    assert (first.prompt_id, first.prompt, first.reference) == (PROMPTS[0].id, PROMPTS[0].text, PROMPTS[0].reference[0])
    assert (first.response, first.answer, first.score) == (PROMPTS[0].solution, PROMPTS[0].reference[0], 1.0)
    assert (first.finish, first.num_tokens) == ("stop", len(PROMPTS[0].solution or "") + 1)
    assert (last.finish, last.num_tokens, last.answer, last.score) == ("length", 9, None, 0.0)
    assert last.note


def test_a_number_can_be_traced_to_its_texts(tmp_path: Path) -> None:
    summary = evaluated(right_for(1), out_dir=tmp_path)
    attempts = read_attempts(tmp_path / "step_000020.jsonl")
    scores = [
        TASK.grade(prompt, attempt.response).score
        for prompt, attempt in zip(np.repeat(PROMPTS, 4), attempts, strict=True)
    ]  # type: ignore[arg-type]
    assert np.mean(scores) == summary.metrics["avg@4"].value
    assert np.mean([attempt.num_tokens for attempt in attempts]) == summary.metrics["mean_tokens"].value


def test_unscored_samples_are_null_in_the_file(tmp_path: Path) -> None:
    evaluated(prompts=[replace(PROMPTS[0], reference=None)], out_dir=tmp_path)
    row = json.loads((tmp_path / "step_000020.jsonl").read_text().splitlines()[0])
    assert (row["score"], row["answer"], row["reference"]) == (None, None, None)
    assert "no reference" in row["note"]


def test_hostile_text_is_one_line_of_the_file(tmp_path: Path) -> None:
    text = "a\u2028b\nc\r\x00\udcff</script>"

    class Hostile(Oracle):
        def _sample(self, request: Request) -> Sample:
            return replace(super()._sample(request), text=text)

    evaluated(engine=Hostile(right), out_dir=tmp_path)
    lines = (tmp_path / "step_000020.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 24 + 1
    assert json.loads(lines[0])["response"] == text


class Interrupted(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("number", [1, 2])
def test_where_a_summary_stands_its_own_samples_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """A second evaluation of the same step is cut off at its first or second write."""
    evaluated(right, out_dir=tmp_path)
    module, _, name = call.rpartition(".")
    holder = __import__("os") if module == "os" else Path
    original, count = getattr(holder, name), [0]

    def cut(*args: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise Interrupted
        return original(*args)

    monkeypatch.setattr(holder, name, cut)
    with pytest.raises(Interrupted):
        evaluated(right_for(0), out_dir=tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "step_000020.json").exists(), "the old summary is not of the new samples"
    if (tmp_path / "step_000020.jsonl").exists():
        assert len(read_attempts(tmp_path / "step_000020.jsonl")) == 24
    evaluated(right_for(0), out_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000020.json", "step_000020.jsonl"]


def test_a_full_disk_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*eval.*: No space left on device; free space"):
        evaluated(out_dir=tmp_path / "eval")
    assert list((tmp_path / "eval").iterdir()) == []


def test_chats_are_shown_with_their_roles() -> None:
    user = {"role": "user", "content": "hi"}
    assert Prompt("p", messages=(user,)).conversation == "hi"
    system = {"role": "system", "content": "Be brief."}
    assert Prompt("p", messages=(system, user)).conversation == "system: Be brief.\n\nuser: hi"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert Prompt("p", messages=(user, called)).conversation == (
        'user: hi\n\nassistant: {"name": "add", "arguments": {"a": 1}}'
    )


def test_real_problems_through_the_math_verifier(tmp_path: Path) -> None:
    """GSM8K as text, answered in words, by several threads at once."""
    path = Path(__file__).parents[1] / "fixtures/gsm8k.jsonl"
    task = Jsonl(
        path=str(path),
        prompt_field="question",
        reference_field="answer",
        reference_after="####",
        solution_field="answer",
    )
    prompts = [replace(prompt, text="1+1:", messages=None) for prompt in task.prompts("train")]

    class Words(Oracle):
        def _sample(self, request: Request) -> Sample:
            answer = f"{request.prompt.reference[0]}.0" if request.index else "-3.5"
            return replace(super()._sample(request), text=f"It is \\boxed{{{answer}}}.")

    summary = evaluated(prompts=prompts, task=task, engine=Words(lambda _: "1"), samples_per_prompt=3, out_dir=tmp_path)
    assert summary.metrics["avg@3"].value == pytest.approx(2 / 3)
    assert summary.metrics["maj@3"].value == 1.0


@dataclass
class Digit:
    """A judge that always says the same, or nothing."""

    digit: float | None
    name: str = "judge"
    fingerprint: str = "judge"
    num_asked: int = 0

    def judge(self, samples: Sequence[Sample], *, score: str = "argmax", steps: bool = False) -> list[Verdict]:
        self.num_asked += len(samples)
        return [Verdict(self.digit) for _ in samples]


SOLUTION_STEPS = Wording(separator=";")


@dataclass
class Strict:
    """A judge of steps: 9 for one that the solution has at its place, 0 for any other."""

    read: list[list[str]] = field(default_factory=list)

    def judge(self, samples: Sequence[Sample]) -> list[Verdict]:
        self.read.append([sample.text for sample in samples])
        found = []
        for sample in samples:
            starts, known = SOLUTION_STEPS.starts(sample, steps=True), (sample.prompt.solution or "").split(";")
            said = sample.text.split(";")
            digits = tuple(9.0 if said[at] == known[at] else 0.0 for at in range(len(said)))
            found.append(Verdict(min(digits), digits, starts))
        return found


def begins_wrong_after(num_steps: int) -> Answer:
    """The first steps of the solution, then one that is none; behind a prefix the solution goes on for one step more."""

    def answer(request: Request) -> str:
        steps = (request.prompt.solution or "").split(";")
        given = "" if request.prefix_ids is None else TOKENIZER.decode(request.prefix_ids)
        right = given.count(";") + num_steps
        return ";".join([*steps[:right], "1"] if right < len(steps) else steps)

    return answer


def test_a_revision_keeps_the_accepted_steps_and_draws_the_rest_again() -> None:
    """Three steps a solution: each draw gets one more of them right, behind the tokens of those that stand."""
    judge, oracle = Strict(), Oracle(begins_wrong_after(1))
    found = values(evaluated(engine=oracle, samples_per_prompt=1, rejection=Rejection(judge.judge, 7.0, 4, "revise")))
    assert (found["avg@1"], found["revision@4"], found["attempts"]) == (0.0, 1.0, 3)
    assert len(judge.read) == 3
    for earlier, later in zip(judge.read, judge.read[1:], strict=False):
        for before, after in zip(earlier, later, strict=True):
            assert after.startswith(before.rpartition(";")[0] + ";")
    cut = values(evaluated(engine=oracle, samples_per_prompt=1, rejection=Rejection(judge.judge, 7.0, 2, "revise")))
    assert (cut["revision@2"], cut["attempts"]) == (0.0, 2)


def test_a_first_step_that_is_rejected_is_drawn_again_whole() -> None:
    oracle = Oracle(begins_wrong_after(0))
    found = values(evaluated(engine=oracle, rejection=Rejection(Strict().judge, 7.0, 3, "revise")))
    whole = values(evaluated(engine=oracle, rejection=Rejection(Digit(0.0).judge, 7.0, 3)))
    assert found["revision@3"] == whole["rejection@3"] == 0.0
    assert found["attempts"] == whole["attempts"] == 3


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_a_teacher_writes_the_rest_of_a_rejected_answer(num_right: int) -> None:
    """Behind the steps that stand; a whole response where none does, and nothing where all do. Where it has none, the student's
    answer stands."""
    asked: list[Prompt] = []
    mute = PROMPTS[-1].id

    def respond(prompts: Sequence[Prompt]) -> list[str | None]:
        asked.extend(prompts)
        found: list[str | None] = []
        for prompt in prompts:
            known = next(one for one in PROMPTS if one.id == prompt.id)
            so_far = (prompt.text or "").removeprefix("go on:") if num_right else ""
            found.append(None if prompt.id == mute else (known.solution or "").removeprefix(so_far))
        return found

    oracle = Oracle(begins_wrong_after(num_right))
    rejection = Rejection(Strict().judge, 7.0, 4, "continue", respond, "go on:{steps}")
    found = values(evaluated(engine=oracle, rejection=rejection))
    num = len(PROMPTS)
    assert len(asked) == (0 if num_right == 3 else num)
    assert found["assisted"] == pytest.approx(1.0 if num_right == 3 else (num - 1) / num)
    assert found["assisted_share"] == pytest.approx(0.0 if num_right == 3 else (num - 1) / num)
    assert "attempts" not in found
    for prompt, question in zip(PROMPTS, asked, strict=False):
        begun = ";".join([*(prompt.solution or "").split(";")[:num_right], ""])
        assert question.text == (f"go on:{begun}" if num_right else prompt.text)


@pytest.mark.parametrize(("digit", "attempts"), [(9.0, 1), (7.0, 1), (6.0, 3), (None, 1)])
def test_rejection_draws_again_what_the_judge_rejects(digit: float | None, attempts: int) -> None:
    """Below the threshold an answer is drawn again, at most N times, each with other draws; without a digit it stands."""
    judge, oracle = Digit(digit), Oracle(lambda request: request.prompt.solution or "")
    summary = evaluated(engine=oracle, rejection=Rejection(judge.judge, 7.0, 3), greedy=True)
    found = values(summary)
    assert found["attempts"] == attempts
    assert judge.num_asked == attempts * len(PROMPTS)
    assert found["rejection@3"] == found["greedy"] == 1.0
    streams = [stream for _, _, stream in oracle.calls]
    assert len(set(streams)) == len(streams) == 2 + attempts
