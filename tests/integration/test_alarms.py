"""Alarms: each is raised by a run that really fails in its way, and by nothing else."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import run_ranks
from tests.report_run import write_lines, write_run
from tests.runs import (
    SHORT,
    assert_same_run,
    distillation,
    save_tiny_model,
    tiny_recipe,
    train,
    train_all,
    train_in_two,
    write_recipe,
)
from understudy import config
from understudy.engines import HFEngine
from understudy.errors import RecipeError, TrainingError
from understudy.eval.estimators import Estimate
from understudy.eval.summary import EvalSummary
from understudy.recipe import Recipe
from understudy.report.page import write_report
from understudy.report.read import read_run
from understudy.tasks import Arithmetic, build_tokenizer
from understudy.teachers.judges.verbal import VerbalTeacher
from understudy.trainer.alarms import ALARMS, WINDOW, Alarms, Change
from understudy.trainer.checkpoint import Progress
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.loggers import Dashboard, Opened
from understudy.trainer.observe import Callback, Observer, ends_in_loop
from understudy.types import Grade, Prompt, Sample, Verdict

NAMES = [alarm.name for alarm in ALARMS]
END = "<eos>"

# --- rules on series of numbers -------------------------------------------------------------------------------------------

Row = dict[str, float]


def summary(step: int, right: int, num: int = 200, **metrics: float) -> EvalSummary:
    share, half = right / num, 0.07
    found = {"avg@1": Estimate(share, max(0.0, share - half), min(1.0, share + half), num)}
    found |= {name: Estimate(value, None, None, num) for name, value in metrics.items()}
    return EvalSummary(step, "test", 1, num, found)


def changing(at: int, before: Row, after: Row, *, num: int = 60) -> list[Row]:
    return [before if step < at else after for step in range(num)]


def constant(**row: float) -> list[Row]:
    return [row] * 60


SPIKES = [{"grad_norm": 50.0 if step in (22, 26, 30, 34) else 1.0} for step in range(40)]
FAILING: Mapping[str, tuple[list[Row], list[EvalSummary]]] = {
    "length_explosion": (
        changing(30, {"response_tokens": 50.0, "truncated": 0.0}, {"response_tokens": 140.0, "truncated": 0.3}),
        [],
    ),
    "length_collapse": (
        changing(30, {"response_tokens": 90.0, "truncated": 0.1}, {"response_tokens": 20.0, "truncated": 0.0}),
        [summary(0, 60), summary(40, 55)],
    ),
    "missing_eos": (constant(truncated=0.6, response_tokens=100.0), []),
    "repetition": (constant(repetition=0.2), []),
    "entropy_collapse": (
        changing(20, {"on_policy": 1.0, "student_entropy": 0.7}, {"on_policy": 1.0, "student_entropy": 0.01}),
        [],
    ),
    "teacher_excludes": (constant(teacher_excluded=0.02), []),
    "nothing_trusted": (constant(trusted=0.1), []),
    "nothing_accepted": (constant(accepted=0.01), []),
    "few_tokens_decide": (constant(outlier_size=0.095, log_ratio_size=0.1, outliers=0.01), []),
    "overlap_falls": (changing(30, {"overlap": 0.9}, {"overlap": 0.7}), []),
    "sampler_gap": (constant(sampler_gap=0.2), []),
    "stale_samples": (constant(staleness=12.0), []),
    "gradient_spikes": (SPIKES, []),
    "reward_hacking": (changing(30, {"reward": 0.3}, {"reward": 0.6}), [summary(0, 100), summary(50, 40)]),
    "accuracy_falls": ([], [summary(0, 100), summary(50, 40)]),
    "no_learning": (constant(log_ratio=-0.5), [summary(0, 40), summary(50, 41)]),
    "updates_lost": (constant(update_survives=0.02, lr=1e-6), []),
    "weak_teacher": ([], [summary(0, 100, teacher=0.4)]),
}
HEALTHY: Mapping[str, tuple[list[Row], list[EvalSummary]]] = {
    "length_explosion": (
        changing(30, {"response_tokens": 50.0, "truncated": 0.0}, {"response_tokens": 140.0, "truncated": 0.02}),
        [],
    ),
    "length_collapse": (
        changing(30, {"response_tokens": 90.0, "truncated": 0.1}, {"response_tokens": 20.0, "truncated": 0.0}),
        [summary(0, 20), summary(31, 120)],
    ),
    # cut by design: the evaluation's responses end
    "missing_eos": (constant(truncated=1.0, response_tokens=100.0), [summary(0, 20, no_eos=0.1)]),
    "repetition": (constant(repetition=0.05), []),
    # a confident teacher
    "entropy_collapse": (
        changing(
            20,
            {"on_policy": 1.0, "student_entropy": 0.7, "teacher_entropy": 0.011},
            {"on_policy": 1.0, "student_entropy": 0.01, "teacher_entropy": 0.011},
        ),
        [],
    ),
    # hardly any distance is left, and what is left is on few tokens
    "few_tokens_decide": (constant(outlier_size=0.0095, log_ratio_size=0.01, outliers=0.001), []),
    # one jump to another size, as where a method changes its phase
    "gradient_spikes": (changing(30, {"grad_norm": 1.0}, {"grad_norm": 13.0}), []),
    "reward_hacking": (changing(30, {"reward": 0.3}, {"reward": 0.6}), [summary(0, 100), summary(50, 90)]),
    # still above its beginning
    "accuracy_falls": ([], [summary(0, 40), summary(25, 150), summary(50, 100)]),
    # accuracy rises before the teacher is near
    "no_learning": (constant(log_ratio=-0.5), [summary(0, 40), summary(45, 80)]),
    # a schedule's end
    "updates_lost": (
        changing(50, {"update_survives": 0.9, "lr": 1e-6}, {"update_survives": 0.02, "lr": 1e-9}),
        [],
    ),
    "weak_teacher": ([], [summary(0, 100, teacher=0.6), summary(50, 180)]),
}


def raised(rows: list[Row], summaries: list[EvalSummary]) -> list[str]:
    """The names of all alarms that begin."""
    alarms, found = Alarms(), []
    waiting = sorted(summaries, key=lambda item: -item.step)
    for step, row in enumerate(rows, 1):
        while waiting and waiting[-1].step < step:
            found += alarms.evaluated(waiting.pop())
        found += alarms.step(step, row)
    for late in reversed(waiting):
        found += alarms.evaluated(late)
    return [change.alarm.name for change in found if change.begins]


def test_every_alarm_has_a_series_a_sentence_and_a_source() -> None:
    assert list(FAILING) == list(PROVOKED) == NAMES
    for alarm in ALARMS:
        assert alarm.reads, alarm.name
        assert all(text.endswith(".") for text in (alarm.means, alarm.advice)), alarm.name
        assert alarm.source, alarm.name


@pytest.mark.parametrize("name", NAMES)
def test_the_series_of_an_alarm_raises_it_alone(name: str) -> None:
    expected = [name, "accuracy_falls"] if name == "reward_hacking" else [name]
    assert raised(*FAILING[name]) == expected
    assert raised(*HEALTHY.get(name, ([], []))) == []


def test_few_tokens_that_teach_are_no_alarm() -> None:
    """A sure teacher's corrections of a student that improves."""
    rows, _ = FAILING["few_tokens_decide"]
    assert raised(rows, [summary(0, 40), summary(5, 120)]) == []
    assert raised(rows, [summary(0, 40), summary(5, 45)]) == ["few_tokens_decide"]


@pytest.mark.parametrize("name", NAMES)
def test_an_alarm_does_not_apply_without_its_numbers(name: str) -> None:
    """Neither an absent number nor one that is not finite counts as 0."""
    rows, summaries = FAILING[name]
    alarm = next(alarm for alarm in ALARMS if alarm.name == name)
    for metric in alarm.reads:
        nothing = [{key: value for key, value in row.items() if key != metric} for row in rows]
        if any(metric in row for row in rows):
            assert name not in raised(nothing, summaries)
            assert name not in raised([row | {metric: float("nan")} for row in rows], summaries)


def test_an_alarm_ends_when_its_conditions_have_not_held_for_a_while() -> None:
    alarms, found = Alarms(), []
    for step, row in enumerate(changing(30, {"sampler_gap": 0.2}, {"sampler_gap": 0.0}), 1):
        found += [(step, change.begins, alarms.on) for change in alarms.step(step, row)]
    # the mean over ten steps is below the bound from the eighth good one on, and stays there for ten
    assert found == [(WINDOW, True, ("sampler_gap",)), (31 + 7 + WINDOW - 1, False, ())]


def test_the_page_shows_an_alarm_in_words_and_in_the_charts_of_what_it_reads(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    alarms, rows = Alarms(), []
    for step, row in enumerate(changing(40, {"grad_norm": 1.0}, {"grad_norm": 1.0, "sampler_gap": 0.1}, num=120), 1):
        rows += [change.event for change in alarms.step(step, row)]
    ended = {"step": 90, "kind": "alarm", "alarm": "sampler_gap", "begins": False, "text": ""}
    write_lines(run / "events.jsonl", [*rows, ended])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [row | {"sampler_gap": 0.1 + row["step"] / 1e4} for row in lines])
    html = write_report(run).read_text()
    section = html.partition('<section id="alarms">')[2].partition("</section>")[0]
    assert "Samples do not come from the student that is trained" in section
    assert "step 50 to 90" in section
    assert html.count('<rect class="span"') == html.count("alarm sampler_gap, from step 50 to 90") == 1
    assert "None was raised." in write_report(write_run(tmp_path / "other")).read_text()


def test_the_page_of_the_documentation_has_every_alarm() -> None:
    page = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    assert [row for row in rows if row[0].strip("`") in NAMES] == [
        [f"`{alarm.name}`", alarm.means, alarm.bounds, alarm.source] for alarm in ALARMS
    ]


def test_loops_are_found_by_their_period() -> None:
    def sample(ids: list[int]) -> Sample:
        tokens = torch.tensor([1, 2, *ids])
        return Sample(Prompt("p", "p"), 0, tokens, torch.zeros(len(tokens), dtype=torch.uint8), 2, "length", "")

    varied = torch.arange(300).tolist()
    looping = [[7] * 16, [*varied, *[5, 6] * 8], [*varied, *list(range(64)) * 3]]
    others = [[], [7] * 15, varied, [*[7] * 100, 8], [*varied, *list(range(64)) * 2], [*varied, *list(range(70)) * 3]]
    assert ends_in_loop([sample(ids) for ids in looping]) == [True] * 3
    assert ends_in_loop([sample(ids) for ids in others]) == [False] * 6


Failing = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]
"""Makes the changes to the tiny recipe by which it fails in one way."""


# --- runs that fail -------------------------------------------------------------------------------------------------------


def unigram(path: Path, likely: Mapping[str, float], *, seed: int = 1) -> str:
    """A model whose logits are nearly `likely` by token, 0 for others, whatever it reads."""
    save_tiny_model(path, seed=seed)
    file, tokenizer = path / "model.safetensors", build_tokenizer("addition")
    weights = load_file(file)
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight" if "lm_head.weight" in weights else embedding
    assert head != embedding
    # a large first entry of every hidden state, which the last norm takes to the root of the width: 4
    weights[embedding][:, 0] = 40.0
    weights[head] *= 0.05
    weights[head][:, 0] = 0.0
    for token, logit in likely.items():
        index = tokenizer.eos_token_id if token == END else tokenizer.convert_tokens_to_ids(token)
        weights[head][index, 0] = logit / 4
    save_file(weights, file, metadata={"format": "pt"})
    return str(path)


def pair(
    folder: Path, student: Mapping[str, float], teacher: Mapping[str, float], *, seed: int = 2, **changes: Any
) -> dict[str, Any]:
    """Distillation between two unigram models, four samples a step."""
    settings = {"steps": 11, "prompts_per_step": 4, "lr": 1e-6} | changes.pop("train", {})
    return {
        "student": {"model": unigram(folder / "student", student), "build": None},
        "teacher": {"type": "local", "model": unigram(folder / "teacher", teacher, seed=seed)},
        "method": {"type": "gkd"},
        "train": settings,
    } | changes


def missing_eos(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return pair(folder, {END: -20.0}, {END: -20.0})


def repetition(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return pair(folder, {"0": 20.0}, {"0": 20.0})


def updates_lost(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    changes = distillation(folder, train={"steps": 2, "lr": 1e-6, "master_weights": False})
    changes["student"] |= {"dtype": "bfloat16"}
    return changes


def no_learning(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    train_keys = {"steps": 72, "prompts_per_step": 4, "lr": 1e-9}
    return pair(folder, {}, {"1": 2.0, "2": 1.0}, train=train_keys, sampling={"max_new_tokens": 12})


def length_explosion(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return pair(folder, {END: 3.0}, {END: -20.0}, train={"steps": 30, "lr": 0.03})


def length_collapse(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return pair(folder, {END: 0.6}, {END: 8.0}, train={"steps": 30, "lr": 0.03})


def rewarded(folder: Path, patch: pytest.MonkeyPatch, student: Row, method: Row | None = None) -> dict[str, Any]:
    """The share of zeros is rewarded; on the prompts of the evaluation, that there is a 1."""

    def grade(task: Arithmetic, prompt: Prompt, text: str) -> Grade:
        return Grade(float("1" in text) if task.seed else text.count("0") / 6)

    patch.setattr(Arithmetic, "grade", grade)
    settings = {"steps": 50, "prompts_per_step": 2, "samples_per_prompt": 4, "lr": 0.02}
    changes = pair(folder, {END: -20.0} | student, {END: -20.0}, train=settings, sampling={"max_new_tokens": 6})
    return changes | {"teacher": None, "method": {"type": "grpo"}}


def entropy_collapse(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return rewarded(folder, patch, {})


def overlap_falls(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    teacher = {"type": "local", "model": unigram(folder / "uniform", {END: -20.0}, seed=2)}
    return rewarded(folder, patch, {}) | {"teacher": teacher, "method": {"type": "kdrl", "beta": 0.0001}}


def reward_hacking(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    held_out = {"type": "arithmetic", "family": "addition", "digits": 2, "seed": 1}
    return rewarded(folder, patch, {"1": 2.0}) | {"eval_task": held_out, "eval": {"every": 25, "problems": 50}}


def teacher_excludes(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return pair(folder, {}, {"5": -1e6}, method={"type": "opd"})


def nothing_trusted(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return pair(folder, {}, {"0": 20.0}, method={"type": "tropd", "k": 4, "anneal_steps": 0})


def nothing_accepted(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(VerbalTeacher, "judge", lambda judge, samples, **_: [Verdict(0.0) for _ in samples])
    judge = SHORT | {"model": unigram(folder / "judge", {})}
    method = {"type": "ovd", "on_reject": "drop"}
    settings = {"steps": 11, "prompts_per_step": 2, "samples_per_prompt": 2}
    return pair(folder, {}, {}, train=settings) | {"teacher": judge, "method": method}


def few_tokens_decide(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return pair(folder, {"5": -2.0}, {"5": -14.0}, method={"type": "opd"}, train={"prompts_per_step": 8})


def old_weights(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(HFEngine, "push", lambda *_: None)
    changes = pair(folder, {}, {"1": 2.0}, train={"steps": 20, "lr": 0.01}, sampling={"max_new_tokens": 12})
    return changes | {"rollout": {"type": "hf", "copy": True}}


def gradient_spikes(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    settings = {"steps": 36, "lr": 1e-7}
    return pair(folder, {"5": -2.3}, {"5": -30.0}, seed=1, method={"type": "opd"}, train=settings)


def weak_teacher(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(Arithmetic, "grade", lambda task, prompt, text: Grade(float("1" in text)))
    return pair(folder, {"1": 2.0}, {"2": 4.0}, train={"steps": 1}) | {"eval": {"problems": 20, "teacher": True}}


PROVOKED: Mapping[str, Failing] = {
    "length_explosion": length_explosion,
    "length_collapse": length_collapse,
    "missing_eos": missing_eos,
    "repetition": repetition,
    "entropy_collapse": entropy_collapse,
    "teacher_excludes": teacher_excludes,
    "nothing_trusted": nothing_trusted,
    "nothing_accepted": nothing_accepted,
    "few_tokens_decide": few_tokens_decide,
    "overlap_falls": overlap_falls,
    "sampler_gap": old_weights,
    "stale_samples": old_weights,
    "gradient_spikes": gradient_spikes,
    "reward_hacking": reward_hacking,
    "accuracy_falls": reward_hacking,
    "no_learning": no_learning,
    "updates_lost": updates_lost,
    "weak_teacher": weak_teacher,
}
"""A run that raises each."""


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("make", list(dict.fromkeys(PROVOKED.values())), ids=lambda make: make.__name__)
def test_a_run_that_fails_raises_its_alarm(tmp_path: Path, make: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = train(tmp_path, **make(tmp_path / "models", monkeypatch))
    begun = [event for event in events(run_dir) if event["kind"] == "alarm" and event["begins"]]
    expected = {name for name, its in PROVOKED.items() if its is make}
    assert expected <= {event["alarm"] for event in begun}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for event in begun:
        # that of an evaluation begins behind its step
        near = rows[max(0, event["step"] - 1) : event["step"] + 1]
        assert 1.0 in [row.get(f"alarm/{event['alarm']}") for row in near]


@pytest.mark.slow
def test_a_run_that_learns_raises_none(tmp_path: Path) -> None:
    changes = distillation(tmp_path / "models", train={"steps": 22, "lr": 1e-3, "prompts_per_step": 4})
    assert [event for event in events(train(tmp_path, **changes)) if event["kind"] == "alarm"] == []


def test_an_alarm_is_said_when_it_begins_and_when_it_ends() -> None:
    """On the console, to dashboards as an alert, to callbacks, and as a number of its steps."""
    out, alerts, told = io.StringIO(), [], []
    logged: list[Mapping[str, float]] = []

    class Listens(Callback):
        def on_alarm(self, change: Change) -> None:
            told.append((change.step, change.alarm.name, change.begins))

    opened = Opened(lambda step, values: logged.append(values), lambda: None, None, lambda *said: alerts.append(said))
    console = Console(out, live=False)
    console.start(60)
    observer = Observer(console, [Dashboard("wandb", opened, pytest.fail)], callbacks=[Listens()])
    for step, row in enumerate(changing(30, {"sampler_gap": 0.2}, {"sampler_gap": 0.0}), 1):
        observer.step(Progress(step=step), row, ())
    assert told == [(10, "sampler_gap", True), (47, "sampler_gap", False)]
    assert [title for title, _ in alerts] == ["sampler_gap"]
    text = out.getvalue()
    assert "step 10: alarm sampler_gap: Samples do not come from the student that is trained" in text
    assert "step 47: alarm sampler_gap has ended" in text
    on = [values.get("alarm/sampler_gap") for values in logged]
    assert on == [None] * 9 + [1.0] * 37 + [0.0] + [None] * 13


@pytest.mark.slow
def test_an_alarm_stays_on_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = missing_eos(tmp_path / "models", monkeypatch)
    changes["train"] |= {"steps": 13, "save_every": 2}
    whole = train(tmp_path / "whole", **changes)
    cut = train_in_two(tmp_path / "cut", 11, **changes)
    assert_same_run(whole, cut)
    assert (whole / "events.jsonl").read_text() == (cut / "events.jsonl").read_text()
    assert [alarm.name for alarm in read_run(cut).alarms] == ["missing_eos"]
    assert "More than half of the responses do not end by themselves." in write_report(cut).read_text()


@pytest.mark.slow
def test_an_alarm_stops_the_run_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = missing_eos(tmp_path / "models", monkeypatch)
    changes["train"] |= {"on_alarm": {"missing_eos": "stop"}}
    for resume in (False, True):
        with pytest.raises(TrainingError, match=rf"alarm missing_eos stops the run after step {WINDOW}.*=warn"):
            train(tmp_path, resume=resume, **changes)
    assert (tmp_path / "run" / "checkpoints" / f"step_{WINDOW:06d}").is_dir()
    changes["train"] |= {"on_alarm": {"missing_eos": "warn"}}
    run_dir = train(tmp_path, resume=True, **changes)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 11
    shutil.rmtree(run_dir)
    changes["train"] |= {"on_alarm": {"missing_eos": "ignore"}}
    assert not [event for event in events(train(tmp_path, **changes)) if event["kind"] == "alarm"]


def stop_two_ranks(folder: Path) -> None:
    """Trains until an alarm stops this rank, and writes why."""
    try:
        with pytest.raises(TrainingError) as stopped:
            train_all(folder)
        (folder / f"stopped_{os.environ['RANK']}").write_text(str(stopped.value))
    finally:
        Ranks.from_environment(lambda: torch.device("cpu")).close()


@pytest.mark.slow
def test_an_alarm_stops_all_ranks_at_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first of them has the numbers that alarms read; none is left waiting, and the run goes on by a resume."""
    changes = missing_eos(tmp_path / "models", monkeypatch)
    changes["train"] |= {"on_alarm": {"missing_eos": "stop"}}
    write_recipe(tmp_path, **changes)
    run_ranks(stop_two_ranks, tmp_path, folder=tmp_path)
    said = [(tmp_path / f"stopped_{rank}").read_text() for rank in (0, 1)]
    assert all(f"alarm missing_eos stops the run after step {WINDOW}" in text for text in said)
    assert (tmp_path / "run" / "checkpoints" / f"step_{WINDOW:06d}").is_dir()
    changes["train"] |= {"on_alarm": {"missing_eos": "warn"}}
    run_dir = train(tmp_path, resume=True, **changes)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 11


def test_a_name_that_is_no_alarm_is_refused(tmp_path: Path) -> None:
    values = tiny_recipe(tmp_path, train={"steps": 1, "on_alarm": {"missing_eo": "stop"}})
    with pytest.raises(RecipeError, match="did you mean 'missing_eos'"):
        config.parse(Recipe, values)
