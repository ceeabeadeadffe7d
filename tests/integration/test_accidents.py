"""Accidents of a run: a second process, files that are not its own, a console, disk or directory that goes away."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.processes import PATIENCE_S, Process, command_line
from tests.report_run import write_eval
from tests.runs import SHORT, assert_same_run, distillation, save_tiny_model, tiny_recipe, train, write_recipe
from tests.serving import serve_beside
from understudy.errors import CheckpointError, RecipeError
from understudy.files import LOCK, by_step, check_writable, compare_files, hash_file, locked, write_atomically
from understudy.report.page import write_report
from understudy.trainer.loop import Trainer
from understudy.trainer.observe import why_not_learnt


def stopping_at(monkeypatch: pytest.MonkeyPatch, step: int, do: Any) -> None:
    """Before the step after `step`, `do` is called."""
    plain = Trainer._take_step

    def take_step(self: Trainer) -> None:
        if self.progress.step == step:
            do()
        plain(self)

    monkeypatch.setattr(Trainer, "_take_step", take_step)


# --- two processes ----------------------------------------------------------------------------------------------------


def test_a_lock_names_its_owner_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder, "run_dir") as check:
        check()
        with pytest.raises(RecipeError, match=rf"run_dir .*run is in use by process {os.getpid()} on ") as caught:
            locked(folder, "run_dir").__enter__()
        assert "choose another" in str(caught.value)
    assert not (tmp_path / "new").exists()
    folder.mkdir(parents=True)
    with locked(folder, "run_dir"):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_directory_that_was_removed_or_replaced_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder, "run_dir") as check:
        shutil.rmtree(folder)
        with pytest.raises(CheckpointError, match="removed, moved or replaced"):
            check()
        with locked(folder, "run_dir"), pytest.raises(CheckpointError):
            check()
    assert not folder.exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    said: list[str] = []
    with locked(tmp_path / "run", "run_dir", said.append) as check:
        check()
    assert len(said) == 1
    assert "cannot be locked" in said[0]


@pytest.mark.parametrize("kind", ["loop", "file", "long"])
def test_a_directory_that_cannot_be_made_is_one_error(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 300 if kind == "long" else "run")
    if kind == "loop":
        folder.symlink_to(folder)
    if kind == "file":
        folder.touch()
    with pytest.raises(RecipeError, match="run_dir .* cannot be written to"):
        train(tmp_path, run_dir=str(folder))
    if kind == "loop":
        with pytest.raises(RecipeError, match="--out .* cannot be written to"):
            check_writable(folder, "--out")
        # the clean-up after the error must not hide it
        with pytest.raises(CheckpointError, match="cannot write"):
            write_atomically(folder / "file", "text")


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    """The second is refused before it loads anything, also where it resumes; readers are not."""
    changes = distillation(tmp_path, train={"steps": 12, "save_every": 2, "prompts_per_step": 4})
    whole = train(tmp_path / "whole", **changes)
    path, run_dir = write_recipe(tmp_path, **changes), tmp_path / "run"
    first = Process(command_line, "train", path, "--no-doctor", "train.steps=100000", log=tmp_path / "first.log")
    while not by_step(run_dir / "checkpoints"):
        assert first.poll() is None, first.output
    for option in ("--no-doctor", "--resume"):
        second = Process(command_line, "train", path, option, log=tmp_path / "second.log")
        assert second.wait() == 2
        assert f"is in use by process {first._process.pid} on" in second.output
        assert "loading" not in second.output
    reader = Process(command_line, "report", run_dir, log=tmp_path / "reader.log")
    assert reader.wait() == 0, reader.output
    assert json.loads((run_dir / "run.json").read_text())["status"] == "running"
    first.kill()
    assert (run_dir / LOCK).exists()
    shutil.rmtree(run_dir)
    train(tmp_path, **changes)
    assert_same_run(run_dir, whole)
    assert not (run_dir / LOCK).exists()


def test_a_run_whose_directory_is_removed_ends_with_one_error_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="removed, moved or replaced"):
        train(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_file_that_is_removed_while_it_is_written_ends_the_run_at_its_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at(monkeypatch, 1, lambda: (tmp_path / "run" / name).unlink())
    with pytest.raises(CheckpointError, match=f"cannot write .*{name}: No such file"):
        train(tmp_path, train={"steps": 4, "save_every": 2, "prompts_per_step": 2})


# --- what is not ours -------------------------------------------------------------------------------------------------


def test_names_of_steps_are_exact(tmp_path: Path) -> None:
    ours = ["step_000005", "step_000010", "step_1234567"]
    others = ["step_5", "step_0000005", "step_000005 (copy)", "step_000005.bak", "step_best", "step_", "step_00000５"]
    for name in [*others, *reversed(ours)]:
        (tmp_path / name).mkdir()
    assert [path.name for path in by_step(tmp_path).values()] == ours
    assert by_step(tmp_path / "missing") == by_step(tmp_path, ".json") == {}


def test_stray_files_disturb_neither_a_save_nor_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = distillation(
        tmp_path, train={"save_every": 2, "save_samples_every": 1}, eval={"every": 3, "problems": 4, "at_start": True}
    )
    whole, run_dir = train(tmp_path / "whole", **changes), tmp_path / "run"
    stray: list[Path] = []

    def litter() -> None:
        for folder in ("eval", "samples"):
            stray.extend(
                run_dir / folder / name for name in ("notes.txt", "step_best.json", "step_000001 (copy).jsonl")
            )
        for file in stray:
            file.write_text("not JSON")
        saved = run_dir / "checkpoints" / "step_000002"
        for name in ("step_000002 (copy)", "step_best", "step_000009.bak"):
            stray.append(Path(shutil.copytree(saved, saved.with_name(name))))

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stopping_at(patch, 3, litter)
        stopping_at(patch, 5, stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **changes)
    assert_same_run(train(tmp_path, resume=True, **changes), whole)
    assert len(stray) == 9
    assert all(path.exists() for path in stray)


# --- errors that would hide the first -------------------------------------------------------------------------------------


def test_the_first_error_is_told_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def break_down() -> None:
        monkeypatch.setattr("os.fsync", full)
        monkeypatch.setattr("understudy.trainer.loop.save_checkpoint", full)
        raise ValueError("the first error")

    with monkeypatch.context() as patch:
        stopping_at(patch, 3, break_down)
        with pytest.raises(ValueError, match="the first error"):
            train(tmp_path)


def test_a_failed_run_keeps_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down() -> None:
        raise ValueError("the first error")

    stopping_at(monkeypatch, 3, break_down)
    with pytest.raises(ValueError, match="the first error"):
        train(tmp_path)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["status"], facts["error"]) == ("failed", "ValueError: the first error")


# --- a console that goes away --------------------------------------------------------------------------------------------


def train_without_console(stream: str, path: str) -> None:
    """`understudy train` whose standard output is full, or closed from the start."""
    os.close(1)
    if stream == "full":
        assert os.open("/dev/full", os.O_WRONLY) == 1
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    else:
        sys.stdout = None  # type: ignore[assignment]
    command_line("train", path, "--no-doctor")


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["left", "full", "closed"])
def test_a_console_that_cannot_be_written_to_is_endured(stream: str, tmp_path: Path) -> None:
    """`train | head -n 0`, `> /dev/full`, `>&-`: the run ends as ever, with status 0, and the event is recorded."""
    path, log = write_recipe(tmp_path, train={"steps": 3}), tmp_path / "log"
    if stream == "left":
        piped = f"{sys.executable} -m understudy train {path} --no-doctor 2> {log} | head -n 0; exit ${{PIPESTATUS[0]}}"
        code = subprocess.run(["bash", "-c", piped], timeout=PATIENCE_S, check=False).returncode
    else:
        code = Process(train_without_console, stream, str(path), log=log).wait()
    said, run_dir = log.read_text(), tmp_path / "run"
    assert code == 0, said
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    assert (run_dir / "report.html").is_file()
    events = (run_dir / "events.jsonl").read_text()
    reason = {"left": "(Broken pipe)", "full": "(No space left on device)", "closed": None}[stream]
    # nobody misses what was closed from the start
    for text in (events, said):
        assert ("console cannot be written to" in text) == (reason is not None)
        assert reason is None or reason in text
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_names_that_the_file_system_refuses_are_one_error(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name in ("x" * 300, str(loop)):
        for command in (
            ["report", name],
            ["train", name],
            ["eval", name],
            ["report", str(tmp_path), "--baseline", name],
        ):
            assert command_line_here(pytest.MonkeyPatch(), command) in (1, 2)


def command_line_here(patch: pytest.MonkeyPatch, command: list[str]) -> int:
    from understudy.cli.app import main

    with patch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "argv", ["understudy", *command])
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


# --- a run that did not learn ----------------------------------------------------------------------------------------------


def test_what_speaks_against_learning() -> None:
    falling = [{"loss": 3.0 / step, "phase": 0.0} for step in range(1, 30)]
    assert why_not_learnt(29, falling) is None
    assert why_not_learnt(0, []) is None
    assert "samples_dropped 8" in (why_not_learnt(0, [{"samples_dropped": 4.0}] * 2) or "")
    assert "rose from 2 to 300" in (why_not_learnt(3, [{"loss": 2.0}, {"loss": 40.0}, {"loss": 300.0}]) or "")
    assert "rose from 0.01 to 2.8" in (why_not_learnt(2, [{"loss": -0.01}, {"loss": 2.8}]) or "")
    # a surrogate begins at 0; another phase has another loss; a step without a finite loss says nothing
    for rows in (
        [{"loss": 0.0, "reward": 0.5}, {"loss": -90.0, "reward": 0.5}],
        [{"loss": 0.0}, {"loss": 0.9}],
        [{"loss": 0.1, "phase": 0.0}, {"loss": 400.0, "phase": 1.0}, {"loss": 300.0, "phase": 1.0}],
        [{"loss": 1.0}, {"loss": math.nan}],
        [{"loss": 1.0}, {"loss": 500.0}, *[{"loss": 1.0}] * 10],
    ):
        assert why_not_learnt(2, rows) is None


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    from understudy import config, run
    from understudy.recipe import Recipe
    from understudy.trainer.console import Console

    console = io.StringIO()
    changes = distillation(tmp_path, train={"lr": 10.0, "steps": 8})
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, **changes))
    ended = run.train(recipe, examine=False, console=Console(console))
    assert ended.ending == "did not learn"
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "did not learn"
    assert "its loss rose from" in facts["error"]
    assert f"warning: {facts['error']}" in console.getvalue()
    assert ended.report is not None
    assert facts["error"] in ended.report.read_text()


def test_a_run_without_any_score_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from understudy.teachers.local import LocalTeacher

    plain = LocalTeacher.score

    def unscored(self: LocalTeacher, samples: Any, need: Any, **options: Any) -> Any:
        return [
            replace(scores, hidden=None if scores.hidden is None else scores.hidden * math.nan)
            for scores in plain(self, samples, need, **options)
        ]

    monkeypatch.setattr(LocalTeacher, "score", unscored)
    run_dir = train(tmp_path, **distillation(tmp_path, train={"on_missing_score": "drop", "steps": 3}))
    facts = json.loads((run_dir / "run.json").read_text())
    assert (facts["status"], facts["updates"]) == ("did not learn", 0)
    assert "samples_dropped 24" in facts["error"]


# --- another model than before --------------------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> None:
    """A run with a checkpoint after its second step."""

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stopping_at(patch, 2, stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder, **changes)


@pytest.mark.parametrize("which", ["student", "teacher", "reference", "judge", "base"])
def test_a_resumed_run_refuses_another_model(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights in the same directory, as a copy over it leaves them; put back, the run goes on as if nothing had been."""
    changes = distillation(tmp_path)
    model = tmp_path / ("student" if which == "student" else "teacher")
    place = which if which in ("student", "reference") else "teacher"
    if which == "reference":
        # a teacher of its own, so that the reference alone is another
        section = {"type": "local", "model": save_tiny_model(tmp_path / "reference", seed=5)}
        changes |= {"method": {"type": "gopd"}, "reference": section}
        model = tmp_path / "reference"
    if which == "judge":
        changes |= {"method": {"type": "ovd"}, "responses": {"type": "solutions"}, "task": {"num_solutions": 50}}
        changes |= {"teacher": SHORT | {"model": str(model)}, "train": {"samples_per_prompt": 2}}
    if which == "base":
        adapter = tmp_path / "adapter"
        save_adapter(model, adapter)
        changes["teacher"] = {"type": "local", "model": str(adapter)}
    interrupted(monkeypatch, tmp_path, **changes)
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    named = "base model.safetensors" if which == "base" else "model.safetensors"
    with pytest.raises(
        CheckpointError, match=rf"{place} \(.*\): {named} [0-9a-f]+, now [0-9a-f]+. Put it back"
    ) as caught:
        train(tmp_path, resume=True, **changes)
    assert "not what this run began with" in str(caught.value)
    weights.write_bytes(before)
    train(tmp_path, resume=True, **changes)


def save_adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from understudy.models import load_causal_lm, load_tokenizer

    load_tokenizer(str(base)).save_pretrained(str(folder))
    model = get_peft_model(load_causal_lm(str(base)), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(str(folder))


def test_a_resumed_run_refuses_another_model_behind_the_same_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from understudy.models import load_causal_lm, load_tokenizer
    from understudy.serve import Scorer, Settings

    def served(model: str) -> Any:
        scorer = Scorer(load_causal_lm(model), load_tokenizer(model), name="tiny")
        return serve_beside(scorer, Settings(model="tiny", port=0))

    changes = distillation(tmp_path)
    other = save_tiny_model(tmp_path / "other", seed=9, hidden_size=32)
    with served(changes["teacher"]["model"]) as url:
        changes["teacher"] = {"type": "served", "url": url}
        interrupted(monkeypatch, tmp_path, **changes)
        train(tmp_path, resume=True, **changes)
    with served(other) as url:
        changes["teacher"] = {"type": "served", "url": url}
        with pytest.raises(CheckpointError, match=r"teacher \(.*\): fingerprint [0-9a-f]+, now"):
            train(tmp_path, resume=True, **changes)


# --- the stress commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accidents() -> Any:
    """scripts/accidents.py"""
    return runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "accidents.py"))


@pytest.mark.slow
def test_a_damaged_file_ends_right_or_with_one_error(accidents: Any, tmp_path: Path) -> None:
    """Some of the 200 cases of `make accidents`."""
    found = accidents["damaged_files"](4, 1, tmp_path)
    assert sum(found.values()) == 12
    assert not {name for name in found if name.split(": ")[1] in accidents["BAD"]}, found


def test_what_differs_from_the_table_of_a_run_is_told(tmp_path: Path) -> None:
    for name, text in (("metrics.jsonl", "1\n"), ("eval.json", "2"), ("gone.json", "3")):
        (tmp_path / name).write_text(text)
    table = {path.name: list(hash_file(path)) for path in tmp_path.iterdir()}
    assert compare_files(tmp_path, table) == {}
    (tmp_path / "metrics.jsonl").write_text("1\n2\n")
    assert compare_files(tmp_path, table, grows="metrics.jsonl") == {}
    (tmp_path / "eval.json").write_text("4")
    (tmp_path / "gone.json").unlink()
    told = {"metrics.jsonl": "was changed", "eval.json": "was changed", "gone.json": "is missing"}
    assert compare_files(tmp_path, table) == told
    assert compare_files(tmp_path, ["eval.json"]) == {"the table of the files": "was changed"}
    for entry in (None, [], ["x", 1], [1, "x"], {"a": 1}):
        assert compare_files(tmp_path, {"eval.json": entry}) == {"eval.json": "was changed"}


def test_the_checkpoint_of_another_step_or_run_is_refused(tmp_path: Path) -> None:
    changes = distillation(tmp_path, train={"save_every": 2, "steps": 4})
    saved = train(tmp_path, **changes) / "checkpoints"
    other = train(tmp_path / "other", seed=1, **changes) / "checkpoints"
    shutil.copytree(saved / "step_000002", saved / "step_000008")
    with pytest.raises(CheckpointError, match="step_000008 is damaged: it holds step 2"):
        train(tmp_path, resume=True, **changes)
    shutil.rmtree(saved / "step_000008")
    shutil.rmtree(saved / "step_000004")
    shutil.copytree(other / "step_000004", saved / "step_000004")
    with pytest.raises(CheckpointError, match=r"recipe of understudy .* \(recipe.yaml, or .*\): another than before"):
        train(tmp_path, resume=True, **changes)


def test_another_value_that_the_saved_recipe_hides_is_refused(tmp_path: Path) -> None:
    changes = {"train": {"steps": 1, "prompts_per_step": 2, "save_every": 1}}
    changes |= {"student": tiny_recipe(tmp_path)["student"] | {"template_kwargs": {"password": "one"}}}
    run_dir = train(tmp_path, **changes)
    assert "one" not in (run_dir / "recipe.yaml").read_text().split()
    changes["student"]["template_kwargs"] = {"password": "two"}
    with pytest.raises(CheckpointError, match="recipe.yaml, or what is hidden there"):
        train(tmp_path, resume=True, **changes)


def test_changed_files_of_a_run_are_refused_by_a_resume_and_told_by_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(monkeypatch, tmp_path)
    run_dir = tmp_path / "run"
    before = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(before.replace('"loss": ', '"loss": 1'))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl differ from what this run wrote until step_000002; put"):
        train(tmp_path, resume=True)
    assert command_line_here(monkeypatch, ["report", str(run_dir)]) == 0
    told = "metrics.jsonl was changed"
    assert f"warning: not everything is as run.json says the run wrote it: {told}" in capsys.readouterr().err
    assert told in (run_dir / "report.html").read_text()
    (run_dir / "metrics.jsonl").unlink()
    train(tmp_path, resume=True)
    assert "missing since an earlier process wrote them: metrics.jsonl" in (run_dir / "events.jsonl").read_text()
    assert command_line_here(monkeypatch, ["report", str(run_dir)]) == 0
    assert told not in capsys.readouterr().err


def test_a_prompt_id_of_a_megabyte_makes_no_heavy_page(tmp_path: Path) -> None:
    write_eval(tmp_path, 0, {"x" * 1_000_000: [1.0]})
    write_eval(tmp_path, 5, {"x" * 1_000_000: [0.0]})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert write_report(tmp_path).stat().st_size < 300_000
