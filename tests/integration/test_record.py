"""Offline distillation: what `record` stores trains as the teacher itself would, and nothing else is ever replayed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.runs import distillation, save_tiny_model, write_recipe
from understudy.cli import recording
from understudy.cli.app import EXIT_SIGNAL, app
from understudy.engines import HFEngine
from understudy.errors import UnderstudyError
from understudy.tasks import build_tokenizer
from understudy.teachers.stores.recording import read_record

pytestmark = pytest.mark.slow

Tensors = dict[str, dict[str, torch.Tensor]]


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and all that was said."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit | UnderstudyError):
        raise result.exception
    return result.exit_code, result.output + str(result.exception or "")


def refuse(words: str, *arguments: object) -> None:
    """It fails, and says why."""
    code, text = run(*arguments)
    assert code != 0
    assert words in text


def succeed(*arguments: object) -> str:
    code, text = run(*arguments)
    assert code == 0, text
    return text


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """One step of OPD on 8 prompts with 2 samples each, between two random models."""
    train = {"steps": 1, "samples_per_prompt": 2, "save_samples_every": 1}
    return write_recipe(tmp_path, **distillation(tmp_path, method={"type": "opd"}, train=train))


def stored(scores: Path) -> str:
    return f"teacher={{type: stored, path: {scores}}}"


def recorded_tensors(scores: Path) -> Tensors:
    """Every tensor of every sample, by the sample's key."""
    found: Tensors = {}
    for name in read_record(scores).files:
        with safe_open(scores / name, framework="pt") as file:
            rows = json.loads(file.metadata()["samples"])
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                number, field = key.split(".")
                row = rows[int(number)]
                found.setdefault(f"{row['prompt']}#{row['index']}", {})[field] = file.get_tensor(key)
    return found


def prompts_of(scores: Path) -> set[str]:
    return {key.rpartition("#")[0] for key in recorded_tensors(scores)}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def trained_on(run_dir: Path, step: int) -> list[tuple[str, str]]:
    """(prompt, response) of every sample of a step."""
    rows = [json.loads(line) for line in (run_dir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()]
    return sorted((str(row["prompt"]), str(row["response"])) for row in rows)


@pytest.mark.parametrize(
    "method",
    [
        "{type: opd}",
        "{type: opd, discount: 0.9, correction: tis}",
        "{type: tropd, k: 5, anneal_steps: 0}",
        "{type: topk, k: 3}",
        "{type: kdrl}",
    ],
)
def test_the_first_step_is_that_of_training_beside_the_teacher(recipe: Path, tmp_path: Path, method: str) -> None:
    """Same seed, same samples: the same loss, gradient and weights, but for the order of sums. The teacher is gone."""
    scores, live, replayed = tmp_path / "scores", tmp_path / "live", tmp_path / "replayed"
    chosen = f"method={method}"
    succeed("train", recipe, chosen, f"run_dir={live}")
    succeed("record", recipe, chosen, "--out", scores)
    shutil.rmtree(tmp_path / "teacher")
    succeed("train", recipe, chosen, stored(scores), f"run_dir={replayed}")
    assert len(trained_on(live, 1)) == 16
    assert trained_on(live, 1) == trained_on(replayed, 1)
    (one,), (other,) = metrics(live), metrics(replayed)
    assert one["grad_norm"] > 0
    for name in ("loss", "grad_norm", "log_ratio", "student_entropy", "response_tokens"):
        assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
    before = load_file(tmp_path / "student" / "model.safetensors")
    first, second = (load_file(path / "student" / "model.safetensors") for path in (live, replayed))
    assert any(not torch.equal(first[name], before[name]) for name in first)
    for name, value in first.items():
        # Adam's first step is lr times a sign; where the gradient is a rounding error the sign is one too
        close = (second[name] - value).abs() < 1e-5
        assert close.float().mean() > 0.99, name


def test_several_teachers_are_recorded_into_one_directory(tmp_path: Path) -> None:
    """Each sample is scored by its own; the replay is one teacher."""
    made = {name: tmp_path / name for name in ("student", "one", "two")}
    for seed, path in enumerate(made.values()):
        save_tiny_model(path, seed=seed, family="chain")
    task = {
        "type": "mix",
        "parts": {
            "one": {"type": "arithmetic", "family": "addition", "digits": 2, "alphabet": "chain"},
            "two": {"type": "arithmetic", "family": "chain", "operations": 3},
        },
    }
    teachers = {name: {"type": "local", "model": str(made[name])} for name in ("one", "two")}
    student, train = {"model": str(made["student"]), "build": None}, {"steps": 1, "save_samples_every": 1}
    mixed = write_recipe(tmp_path, student=student, task=task, teachers=teachers, method={"type": "opd"}, train=train)
    scores, live, replayed = tmp_path / "scores", tmp_path / "live", tmp_path / "replayed"
    succeed("train", mixed, f"run_dir={live}")
    # the prompts of a recording are drawn in an order of their own, so all of them are drawn at once
    succeed("record", mixed, "--out", scores)
    # scores of references are not recorded
    start = "{one: {type: start}, two: {type: start}}"
    succeed("record", mixed, "method={type: gopd}", f"references={start}", "--out", tmp_path / "other")
    assert read_record(tmp_path / "other").meta == read_record(scores).meta
    one = {"type": "stored", "path": str(scores)}
    alone = write_recipe(
        tmp_path / "alone", student=student, task=task, teacher=one, method={"type": "opd"}, train=train
    )
    succeed("train", alone, f"run_dir={replayed}")
    assert trained_on(live, 1) == trained_on(replayed, 1)
    (first,), (second,) = metrics(live), metrics(replayed)
    for name in ("loss", "grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-5), name


def test_epochs_replay_the_same_samples_and_no_other_prompt(recipe: Path, tmp_path: Path) -> None:
    scores, run_dir = tmp_path / "scores", tmp_path / "run"
    succeed("record", recipe, "--out", scores, "--prompts", 4)
    succeed("train", recipe, stored(scores), "train.steps=3", "train.prompts_per_step=4")
    steps = [trained_on(run_dir, step) for step in (1, 2, 3)]
    assert len(steps[0]) == 8
    assert steps[0] == steps[1] == steps[2]
    assert {f"arithmetic/addition/{prompt}" for prompt, _ in steps[0]} == prompts_of(scores)
    losses = [row["loss"] for row in metrics(run_dir)]
    assert len(set(losses)) == 3


def test_by_default_the_runs_own_prompts_are_recorded(recipe: Path, tmp_path: Path) -> None:
    """As many as the run draws, but never more than there are."""
    for name, overrides, num_prompts in (
        ("whole", ["train.steps=2"], 16),
        ("few", ["train.steps=2", "task.num_solutions=5"], 5),
    ):
        text = succeed("record", recipe, *overrides, "--out", tmp_path / name)
        assert f"{2 * num_prompts} samples, 0 of them from before" in text
        assert len(prompts_of(tmp_path / name)) == num_prompts


def test_what_was_not_stored_is_an_error_not_another_sample(recipe: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    succeed("record", recipe, "--out", scores)
    refuse("stores no sample for request", "train", recipe, stored(scores), "train.samples_per_prompt=3")
    elsewhere = ["task={type: arithmetic, num_solutions: 50}", f"run_dir={tmp_path / 'elsewhere'}"]
    refuse("none of the prompts of task", "train", recipe, stored(scores), *elsewhere)
    refuse("the method GKD needs", "train", recipe, stored(scores), "method={type: gkd}")
    refuse("gives only sampled", "train", recipe, stored(scores), "method={type: topk, k: 3}")


def test_another_teacher_temperature_or_template_is_refused(recipe: Path, tmp_path: Path) -> None:
    scores, other = tmp_path / "scores", save_tiny_model(tmp_path / "other", seed=9, hidden_size=32)
    text = succeed("record", recipe, "--out", scores)
    own, fingerprint = tmp_path / "teacher", read_record(scores).meta.fingerprint
    assert f"fingerprint: {fingerprint}" in text
    named = f"teacher={{type: stored, path: {scores}, model: {other}}}"
    refuse("were stored from teacher", "train", recipe, named)
    refuse("were stored from teacher", "train", recipe, f"teacher={{type: stored, path: {scores}, fingerprint: abc}}")
    refuse("stored with temperature 1.0", "train", recipe, stored(scores), "sampling.temperature=0.5")
    assert not (tmp_path / "run").exists()
    right = f"teacher={{type: stored, path: {scores}, model: {own}, fingerprint: {fingerprint}}}"
    succeed("train", recipe, right)


def test_an_interrupted_recording_is_continued(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made twice, and the whole is what it would have been at once."""
    monkeypatch.setattr(recording, "BLOCK_REQUESTS", 4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed("record", recipe, "--out", whole)
    asked: list[str] = []
    generate = HFEngine.generate

    def until_stopped(self: HFEngine, requests: Any, *rest: Any, **options: Any) -> Any:
        if len(asked) == 8:
            raise KeyboardInterrupt
        asked.extend(request.key for request in requests)
        return generate(self, requests, *rest, **options)

    monkeypatch.setattr(HFEngine, "generate", until_stopped)
    code, text = run("record", recipe, "--out", cut)
    assert code == EXIT_SIGNAL
    assert "the same command continues" in text
    refuse("was cut short after 8 samples", "train", recipe, stored(cut))

    def counted(self: HFEngine, requests: Any, *rest: Any, **options: Any) -> Any:
        asked.extend(request.key for request in requests)
        return generate(self, requests, *rest, **options)

    monkeypatch.setattr(HFEngine, "generate", counted)
    assert "16 samples, 8 of them from before" in succeed("record", recipe, "--out", cut)
    assert len(asked) == len(set(asked)) == 16
    assert "16 samples, 16 of them from before" in succeed("record", recipe, "--out", cut)
    assert len(asked) == 16
    one, other = recorded_tensors(whole), recorded_tensors(cut)
    assert one.keys() == other.keys()
    for key, tensors in one.items():
        for name, value in tensors.items():
            torch.testing.assert_close(other[key][name], value, rtol=0, atol=0, equal_nan=True)


def test_a_recording_grows(recipe: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    succeed("record", recipe, "--out", scores, "--prompts", 3, "--samples", 1)
    first = recorded_tensors(scores)
    assert "10 samples, 3 of them from before" in succeed(
        "record", recipe, "--out", scores, "--prompts", 5, "--samples", 2
    )
    grown = recorded_tensors(scores)
    assert first.keys() < grown.keys()
    assert len(prompts_of(scores)) == 5
    assert all(torch.equal(grown[key]["token_ids"], first[key]["token_ids"]) for key in first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=1", "seed was 0, is 1"),
        ("sampling.top_p=0.9", "sampling.top_p was 1, is 0.9"),
        ("sampling.temperature=0.5", "sampling.temperature was 1, is 0.5"),
        ("task.seed=3", "task.seed was 0, is 3"),
        ("teacher.dtype=float64", "teacher.dtype was 'auto', is 'float64'"),
        ("student.dtype=float64", "student.dtype was 'float32', is 'float64'"),
        ("method={type: topk, k: 3}", "k was None, is 3"),
    ],
)
def test_another_recording_in_the_directory_is_refused(recipe: Path, tmp_path: Path, change: str, words: str) -> None:
    scores = tmp_path / "scores"
    succeed("record", recipe, "--out", scores, "--prompts", 1)
    before = {file.name: file.read_bytes() for file in scores.iterdir()}
    refuse(words, "record", recipe, change, "--out", scores)
    assert {file.name: file.read_bytes() for file in scores.iterdir()} == before


def test_a_teacher_that_was_changed_in_place_is_noticed(recipe: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    succeed("record", recipe, "--out", scores, "--prompts", 1)
    shutil.rmtree(tmp_path / "teacher")
    save_tiny_model(tmp_path / "teacher", seed=9, hidden_size=32)
    refuse("fingerprint was", "record", recipe, "--out", scores)


def test_a_directory_with_something_else_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    refuse("exists and holds something else", "record", recipe, "--out", tmp_path / "teacher")
    refuse("cannot be written to (Not a directory)", "record", recipe, "--out", recipe)
    (tmp_path / "empty").mkdir()
    succeed("record", recipe, "--out", tmp_path / "empty", "--prompts", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method={type: gkd}"], "needs the teacher's whole distributions, which are not stored"),
        (["method={type: opd, baseline: true}"], "needs the teacher's whole distributions"),
        (["method={type: topk, k: 9}", "--k", "8"], "--k is 8, but the method TopK reads 9 tokens a row"),
        (["method={type: sft}", "teacher=null"], "has no teacher"),
        (["teacher={type: privileged, ema: 0.9}"], "moves with the student"),
        (["teacher={type: chat, url: 'http://x/v1', model: m}", "method={type: ovd, on_reject: drop}"], "says digits"),
        (["train.max_prompt_tokens=3"], "longer than train.max_prompt_tokens (3)"),
        (
            ["method={type: tropd}", "responses={type: solutions}"],
            "begins samples with the teacher's own responses, which are not recorded",
        ),
        (["method={type: gkd, on_policy_share: 0}", "sampling.temperature=0", "--k", "4"], "temperature is 0"),
    ],
)
def test_what_cannot_be_recorded(recipe: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    refuse(words, "record", recipe, *arguments, "--out", tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_a_recording_of_a_recording_is_refused(recipe: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    succeed("record", recipe, "--out", scores, "--prompts", 1)
    refuse("is a recording already", "record", recipe, stored(scores), "--out", tmp_path / "again")


def test_k_is_stored_whatever_the_method(recipe: Path, tmp_path: Path) -> None:
    """With --k one recording serves methods that need it and methods that do not."""
    scores = tmp_path / "scores"
    succeed("record", recipe, "method={type: gkd}", "--out", scores, "--k", 4)
    assert all(tensors["topk_ids"].shape[-1] == 4 for tensors in recorded_tensors(scores).values())
    for number, method in enumerate(("{type: opd}", "{type: topk, k: 2}", "{type: tropd, k: 4, anneal_steps: 0}")):
        succeed("train", recipe, stored(scores), f"method={method}", f"run_dir={tmp_path / str(number)}")


def test_longer_prompts_are_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"q": "1+2:", "a": "3"}), json.dumps({"q": "11+22:", "a": "33"})]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    task = {"type": "jsonl", "path": str(tmp_path / "data.jsonl"), "prompt_field": "q", "chat": False}
    changes = distillation(tmp_path, task=task, method={"type": "opd"}, train={"max_prompt_tokens": 4})
    succeed("record", write_recipe(tmp_path, **changes), "--out", tmp_path / "scores")
    (tensors,) = recorded_tensors(tmp_path / "scores").values()
    assert build_tokenizer("addition").decode(tensors["token_ids"][:4]) == "1+2:"


@pytest.mark.parametrize(("prompts_per_step", "steps"), [(8, 1), (3, 4)])
def test_a_prompt_that_is_drawn_twice_in_a_step_gives_its_samples_twice(
    recipe: Path, tmp_path: Path, prompts_per_step: int, steps: int
) -> None:
    """More prompts a step than there are, or a step over the end of an epoch."""
    scores, run_dir = tmp_path / "scores", tmp_path / "run"
    succeed("record", recipe, "--out", scores, "--prompts", 4)
    succeed("train", recipe, stored(scores), f"train.steps={steps}", f"train.prompts_per_step={prompts_per_step}")
    seen = Counter(pair for step in range(1, steps + 1) for pair in trained_on(run_dir, step))
    assert seen.total() == 2 * prompts_per_step * steps
    # every prompt as often as every other, each sample of it as often as the other
    assert {key.rpartition("#")[0] for key in recorded_tensors(scores)} == {f"arithmetic/addition/{p}" for p, _ in seen}
    assert {sum(seen[pair] for pair in seen if pair[0] == prompt) for prompt, _ in seen} == {
        2 * prompts_per_step * steps // 4
    }
