"""A comparison: every combination once, seeds paired, nothing run twice, no number where there is none."""

from __future__ import annotations

import csv
import json
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.report_run import write_eval, write_lines
from tests.runs import distillation, save_tiny_model, tiny_recipe
from understudy import config
from understudy.cli.app import app
from understudy.compare.cells import Cell, Cells, budgets, parse_cell
from understudy.compare.grid import Combination, Grid, apply, axis_change, read_grid
from understudy.compare.outputs import MAX_LINES, cells_csv, page, page_values, to_json, write_outputs
from understudy.compare.processes import FAILED, Ended, Job, check_ray, ending, run_processes, work
from understudy.compare.run import SAVE_EVERY_S, Comparison, Drafts, Runner, compare
from understudy.compare.table import Outcome, budget_warning, markdown, measure, samples_to_target
from understudy.errors import CheckpointError, RecipeError
from understudy.eval.estimators import crossed_mean, estimate_mean, t_quantile
from understudy.methods import METHODS
from understudy.report.svg import draw
from understudy.trainer.console import Console

pytestmark = pytest.mark.slow

EVAL = {"every": 3, "problems": 8, "samples_per_prompt": 2}


def cells(
    folder: Path, vary: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None, **grid: Any
) -> Cells:
    """A grid over the tiny recipe, which imitates and evaluates."""
    values = dict(base) if base is not None else tiny_recipe(folder, eval=EVAL)
    return Cells(config.parse(Grid, {"vary": vary or {}, "seeds": 2, **grid}), values, folder / "out")


def recipes(found: Cells) -> list[dict[str, Any]]:
    tuned = {combination: {} for combination in found.grid.combinations()}
    return [config.dump(cell.recipe) for cell in found.compared(tuned)]


def run(found: Cells, **changes: Any) -> Comparison:
    return compare(found, Runner(Console(quiet=True), **changes))


def problems(share: float, num: int = 40, seed: int = 0) -> dict[str, list[float]]:
    draws = np.random.default_rng(seed).random((num, 2)) < share
    return {f"add-{index:03d}": [float(value) for value in row] for index, row in enumerate(draws)}


def pretend(cell: Cell, scores: Mapping[int, Mapping[str, list[float]]], split: str = "test", **numbers: float) -> None:
    """The directory of a finished run: evaluations by step, eight samples a step."""
    cell.path.mkdir(parents=True)
    (cell.path / "recipe.yaml").write_text(config.write_yaml(config.dump(cell.recipe)))
    (cell.path / "run.json").write_text(json.dumps({"status": "finished"}))
    steps = range(1, max(scores) + 1)
    write_lines(cell.path / "metrics.jsonl", [{"step": step, "num_samples": 8 * step, **numbers} for step in steps])
    for step, found in scores.items():
        write_eval(cell.path, step, dict(found), split=split)


def pretended(found: Cells, share: Callable[[str, int], float]) -> list[Cell]:
    """Every compared run as if it had been made, with `share(name, seed)` of the answers right."""
    made = found.compared({combination: {} for combination in found.grid.combinations()})
    for cell in made:
        name, seed = cell.combination.name, cell.recipe.seed
        pretend(cell, {0: problems(0.0), 6: problems(share(name, seed), seed=seed)}, grad_norm=1.0)
    return made


# The grid


def test_every_combination_once_and_seeds_paired(tmp_path: Path) -> None:
    vary = {
        "lr": {"low": {"train": {"lr": 1e-4}}, "high": {"train": {"lr": 1e-2}}},
        "steps": {"2": {}, "3": {"train": {"steps": 3}}},
    }
    found = recipes(cells(tmp_path, vary, seeds=3))
    assert len(found) == 2 * 2 * 3 == len({recipe["run_dir"] for recipe in found})
    keys = [(recipe["train"]["lr"], recipe["train"]["steps"], recipe["seed"]) for recipe in found]
    assert sorted(keys) == sorted((lr, steps, seed) for lr in (1e-4, 1e-2) for steps in (6, 3) for seed in (0, 1, 2))
    for recipe in found:
        recipe["train"] |= {"lr": 0, "steps": 0}
        recipe |= {"seed": 0, "run_dir": ""}
    assert all(recipe == found[0] for recipe in found), "runs differ in something that is not varied"


def test_a_method_keeps_only_the_keys_that_it_has() -> None:
    base = {"method": {"type": "gkd", "beta": 0.3}, "train": {"steps": 1}}
    for name, kind in METHODS.items():
        method = apply(base, [axis_change("method.type", name, base)])["method"]
        known = "beta" in kind.__dataclass_fields__
        assert method == {"type": name} | ({"beta": 0.3} if known else {})


def test_a_key_of_a_method_is_set_after_its_type(tmp_path: Path) -> None:
    base = tiny_recipe(tmp_path, **distillation(tmp_path))
    grid = read_grid(None, base, vary=["method.beta=0.2,0.7", "method.type=gkd"], changes={"seeds": 1})
    found = recipes(Cells(grid, base, tmp_path / "out"))
    assert [recipe["method"]["beta"] for recipe in found] == [0.2, 0.7]


def test_the_teacher_stays_away_from_a_method_that_asks_none(tmp_path: Path) -> None:
    base = tiny_recipe(tmp_path, **distillation(tmp_path))
    grid = read_grid(None, base, vary=["method.type=gkd,sft"], changes={"seeds": 1})
    found = Cells(grid, base, tmp_path / "out")
    with_teacher, without = recipes(found)
    assert with_teacher["teacher"]["model"] == base["teacher"]["model"]
    assert without["teacher"] is None
    dropped = [cell.dropped for cell in found.compared({combination: {} for combination in grid.combinations()})]
    assert dropped == [(), ("teacher",)]


def test_methods_that_use_other_sections_stand_in_one_grid(tmp_path: Path) -> None:
    weak, medium = (save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("weak", "medium")))
    student = {"build": None, "starts": {"weak": weak, "medium": medium}}
    changes = distillation(tmp_path) | {"student": student, "responses": {"type": "solutions"}, "eval": EVAL}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, **changes)))
    axes = ["--vary", "method.type=opd,gkd,tropd", "--vary", "student.start=weak,medium"]
    done = CliRunner().invoke(app, ["compare", str(recipe), *axes, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "30 runs" in done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip().startswith(("opd", "gkd", "tropd"))]
    assert [(row[0], row[-1] == "responses") for row in rows] == [
        ("opd,", True),
        ("opd,", True),
        ("gkd,", True),
        ("gkd,", True),
        ("tropd,", False),
        ("tropd,", False),
    ]


def test_the_fewest_sections_are_left_out_and_only_those_that_the_method_never_reads(tmp_path: Path) -> None:
    base = tiny_recipe(tmp_path, **distillation(tmp_path), train={"samples_per_prompt": 2})
    solutions, written = {"type": "solutions"}, {"type": "teacher"}
    several = {"teacher": None, "teachers": {"a": base["teacher"], "b": base["teacher"]}}

    def dropped(method: Mapping[str, Any], **changes: Any) -> tuple[str, ...]:
        return parse_cell({key: item for key, item in (base | {"method": method} | changes).items() if item})[1]

    assert dropped({"type": "gkd"}) == ()
    assert dropped({"type": "gkd"}, responses=solutions) == ("responses",)
    assert dropped({"type": "gkd", "on_policy_share": 0.5}, responses=solutions) == ()
    assert dropped({"type": "gkd"}, responses=solutions, reference=base["teacher"]) == ("reference", "responses")
    assert dropped({"type": "sft"}, responses=solutions) == ("teacher",)
    assert dropped({"type": "sft"}, responses=written) == ()
    assert dropped({"type": "grpo"}, responses=written) == ("teacher", "responses")
    assert dropped({"type": "sft"}, **several) == ("teachers",)
    assert dropped({"type": "sft"}, **several, weights={"a": 1.0, "b": 0.5}) == ("teachers", "weights")
    named = several | {"references": {"a": {"type": "start"}, "b": base["teacher"]}}
    assert dropped({"type": "gopd"}, **named) == ()
    assert dropped({"type": "gkd"}, **named) == ("references",)
    assert dropped({"type": "grpo", "kl_coef": 0.1}, **named) == ("teachers", "references")
    # the responses that a method reads are never exchanged for others, nor is one teacher chosen of two
    for method in ({"type": "gkd", "on_policy_share": 0.5}, {"type": "sft"}):
        with pytest.raises(RecipeError, match="only one teacher of type local, verbal or chat writes responses"):
            dropped(method, responses=written, **several)
    with pytest.raises(RecipeError, match="teacher and teachers are both given"):
        dropped({"type": "gkd"}, teachers=several["teachers"])


def test_command_line_and_file_say_the_same(tmp_path: Path) -> None:
    base = tiny_recipe(tmp_path, eval=EVAL)
    file = tmp_path / "grid.yaml"
    file.write_text(
        yaml.safe_dump(
            {"vary": {"train.lr": {"1e-3": {"train": {"lr": 1e-3}}, "1e-2": {"train": {"lr": 1e-2}}}}, "seeds": 2},
            sort_keys=False,
        )
    )
    told = read_grid(None, base, vary=["train.lr=1e-3,1e-2"], changes={"seeds": 2})
    out = tmp_path / "out"
    assert recipes(Cells(read_grid(file, base), base, out)) == recipes(Cells(told, base, out))


def test_what_an_override_does() -> None:
    base = {
        "task": {"type": "arithmetic", "digits": 2},
        "train": {"steps": 4, "max_grad_norm": 1.0},
        "eval": {"every": 2},
    }
    assert apply(base, [{"task": {"type": "jsonl", "path": "x"}}])["task"] == {"type": "jsonl", "path": "x"}
    assert apply(base, [{"task": {"digits": 3}}])["task"] == {"type": "arithmetic", "digits": 3}
    assert "eval" not in apply(base, [{"eval": None}])
    assert apply(base, [{"train": {"max_grad_norm": None}}])["train"] == {"steps": 4, "max_grad_norm": None}
    assert base["train"]["max_grad_norm"] == 1.0
    lora = {"student": {"lora": {"rank": 2, "alpha": 9.0}}}
    assert apply(lora, [axis_change("student.lora", {"rank": 4}, lora)]) == {"student": {"lora": {"rank": 4}}}


def test_commas_inside_brackets_and_quotes_belong_to_the_value() -> None:
    assert config.split_values("a,{x: 1, y: [2, 3]},[4, 5],'b,c',it's", "--vary") == [
        "a",
        "{x: 1, y: [2, 3]}",
        "[4, 5]",
        "'b,c'",
        "it's",
    ]


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        (["method.type=sft,gkdd"], "cell gkdd: method.type is 'gkdd'; did you mean 'gkd'?"),
        (["train.stepz=1,2"], "cell 1: train.stepz: unknown key; did you mean 'steps'?"),
        (["train.lr=1,1"], "a value stands twice"),
        (["train.lr"], "write KEY=V1,V2"),
        (["seed=1,2"], "seed is set by the comparison"),
        (["train.lr=1,2", "train.lr=3"], "given twice"),
    ],
)
def test_bad_input_fails_before_anything_is_written(tmp_path: Path, vary: Sequence[str], said: str) -> None:
    base = tiny_recipe(tmp_path)
    with pytest.raises(RecipeError) as caught:
        run(Cells(read_grid(None, base, vary=vary), base, tmp_path / "out"))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_labels_make_safe_and_different_directories() -> None:
    labels = ["..", "a/b", "a-b", "a+b", "/etc", "x" * 300, "weak_start", "1e-3", "\u00e4"]
    slugs = [Combination((("axis", label),)).slug for label in labels]
    assert len(set(slugs)) == len(labels)
    assert all("/" not in slug and slug.strip(".") and len(slug) < 120 for slug in slugs)
    assert slugs[6:8] == ["weak_start", "1e-3"]


def test_unequal_budgets_are_told(tmp_path: Path) -> None:
    equal = cells(tmp_path, {"lr": {"a": {"train": {"lr": 1e-3}}, "b": {"train": {"lr": 1e-2}}}})
    unequal = cells(tmp_path, {"steps": {"a": {}, "b": {"train": {"steps": 12}}}})
    shares = [pretended(equal, lambda *_: 0.5), pretended(cells(tmp_path / "2", unequal.grid.vary), lambda *_: 0.5)]
    assert budget_warning(budgets(shares[0])) == ""
    assert "not equal" in markdown(run(cells(tmp_path / "2", unequal.grid.vary)).table)
    assert "They are 1,152, but b: 2,304" in budget_warning(budgets(shares[1]))


def test_a_budget_is_the_most_that_training_may_take(tmp_path: Path) -> None:
    """6 steps of 8 prompts with 2 samples of 24 tokens, and what a method may draw beyond them."""
    base = tiny_recipe(tmp_path, **distillation(tmp_path), train={"samples_per_prompt": 2})
    judge = {"type": "verbal", "model": base["teacher"]["model"]}
    solutions = {"type": "solutions"}

    def samples(method: Mapping[str, Any], **changes: Any) -> int:
        (cell, *_) = (found := cells(tmp_path, base=base | {"method": method} | changes)).compared(
            {found.grid.combinations()[0]: {}}
        )
        assert cell.budget_tokens % 24 == 0
        return cell.budget_tokens // 24

    assert samples({"type": "gkd"}) == 6 * 8 * 2
    assert samples({"type": "grpo"}) == 6 * 8 * 2
    assert samples({"type": "grpo", "dynamic_sampling": True}) == 10 * 6 * 8 * 2
    asked = {"teacher": judge, "responses": solutions}
    assert samples({"type": "ovd"}, **asked) == 6 * 8 * 2
    assert samples({"type": "ovd", "on_reject": "resample"}, **asked) == 2 * 6 * 8 * 2
    # a guided sample beside the others, as long as prefixes have not faded
    assert samples({"type": "tropd", "anneal_steps": 4}, responses=solutions) == 6 * 8 * 2 + 4 * 8
    assert samples({"type": "tropd", "guided": "replace"}, responses=solutions) == 6 * 8 * 2
    phases = {"type": "phases", "parts": [{"until": 0.5, "type": "grpo", "dynamic_sampling": True}, {"type": "opd"}]}
    assert samples(phases) == 3 * 8 * 2 * 10 + 3 * 8 * 2


# Runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cells, Comparison]:
    """Two variants that are the same and one that diverges, which were really run, two at once."""
    vary = {"variant": {"one": {}, "broken": {"train": {"lr": 1e30}}, "other": {}}}
    found = cells(tmp_path_factory.mktemp("compare"), vary)
    comparison = run(found, num_at_once=2)
    write_outputs(comparison)
    return found, comparison


def stamps(found: Cells) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (found.out / "cells").rglob("metrics.jsonl")}


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_failed_run_is_told_and_the_others_go_on(made: tuple[Cells, Comparison]) -> None:
    found, comparison = made
    assert comparison.ending == "failed"
    by_name = {row.combination.name: row for row in comparison.table.rows}
    assert (by_name["broken"].num_finished, by_name["broken"].num_failed) == (0, 2)
    assert [by_name[name].num_finished for name in ("one", "other")] == [2, 2]
    failed = [outcome for outcome in comparison.outcomes if outcome.status == "failed"]
    assert len(failed) == 2
    for outcome in failed:
        assert "not finite" in (outcome.error or "")
        assert "not finite" in outcome.cell.log.read_text()
        assert str(outcome.cell.log) in (found.out / "compare.html").read_text()
    assert comparison.table.texts[1][1:] == ["not recorded"] * 7 + ["0 of 2, 2 failed"]


def test_a_run_that_did_not_learn_is_counted_and_told_everywhere(tmp_path: Path) -> None:
    found = cells(tmp_path, {"variant": {"one": {}, "wild": {"train": {"lr": 1e-2}}}})
    made = pretended(found, lambda name, seed: 0.5)
    wild = next(cell for cell in made if cell.combination.name == "wild")
    facts = {"status": "did not learn", "error": "its loss rose from 1 to 1e6"}
    (wild.path / "run.json").write_text(json.dumps(facts))
    comparison = run(found)
    assert comparison.ending == "finished"
    assert [(row.num_finished, row.num_unlearnt) for row in comparison.table.rows] == [(2, 0), (2, 1)]
    assert [texts[-1] for texts in comparison.table.texts] == ["2", "2, 1 did not learn"]
    told = (
        "Some runs did not learn, and are in the numbers of their rows all the same: wild (1 of 2: its loss rose from"
    )
    assert told in markdown(comparison.table)
    shown = page(comparison)
    assert told in shown
    assert "4 of 4 finished, 1 did not learn" in shown
    row = next(row for row in csv.DictReader(cells_csv(comparison).splitlines()) if row["run_dir"] == str(wild.path))
    assert (row["status"], row["error"]) == ("did not learn", "its loss rose from 1 to 1e6")
    assert "its loss rose" in json.dumps(to_json(comparison)["cells"])


BAR = "Loading weights: 100%|##########| 2/2 [00:00<00:00, 5.1it/s]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"step 1/2\n{BAR}\nerror: prompt 3 is too long\n", "prompt 3 is too long"),
        (f"Traceback (most recent call last):\n  File\nMemoryError: 3 GiB\n{BAR}\r{BAR}", "MemoryError: 3 GiB"),
        (f"cannot import x\n{BAR}\r{BAR}\n", "cannot import x"),
        (BAR, "it ended with code 1 and printed nothing"),
        ("", "it ended with code 1 and printed nothing"),
    ],
)
def test_the_reason_of_a_failure_is_never_a_progress_bar(tmp_path: Path, text: str, reason: str) -> None:
    log = tmp_path / "log"
    before = "error: of an earlier try\n"
    log.write_text(before + text)
    assert ending(0, 1, log, len(before)).error == reason


def test_an_error_behind_an_open_progress_bar_is_a_line_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    sys.stderr.write(BAR)
    assert work(Job({"run_dir": "x"}, resume=False, log="")) == FAILED
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: student is missing")


def test_one_pair_of_seeds_is_called_one_pair(tmp_path: Path) -> None:
    found = cells(tmp_path, {"variant": {"one": {}, "two": {}}}, seeds=2)
    made = pretended(found, lambda *_: 0.5)
    outcomes = [Outcome(cell, "finished", measured=measure(cell)) for cell in made[:3]]
    assert "(1 pair of seeds)" in Comparison(found, outcomes, (), {}).table.texts[1][2]


def test_seeds_draw_alike_in_every_variant(made: tuple[Cells, Comparison]) -> None:
    paths = {outcome.cell.name: outcome.cell.path for outcome in made[1].outcomes}
    for seed in ("seed-0", "seed-1"):
        assert losses(paths[f"one, {seed}"]) == losses(paths[f"other, {seed}"])
    assert losses(paths["one, seed-0"]) != losses(paths["one, seed-1"])


def test_what_was_recorded_is_shown(made: tuple[Cells, Comparison]) -> None:
    row = made[1].table.rows[0]
    rows = [json.loads(line) for line in (made[1].outcomes[0].cell.path / "metrics.jsonl").read_text().splitlines()]
    run0 = made[1].outcomes[0].measured
    assert run0 is not None
    assert run0.grad_norm == pytest.approx(statistics.fmean(item["grad_norm"] for item in rows), rel=1e-12)
    assert run0.peak_memory_gib == max(item["peak_memory_gib"] for item in rows)
    assert run0.entropy_at_end == rows[-1]["student_entropy"]
    assert run0.samples == 48
    assert row.tokens_per_s is not None
    assert run0.curves["accuracy"].steps.tolist() == [0, 24, 48]


def test_a_second_call_runs_only_what_is_missing(made: tuple[Cells, Comparison]) -> None:
    found, _ = made
    intact = Cells(
        config.parse(Grid, {"vary": {"variant": {"one": {}, "other": {}}}, "seeds": 2}), found.base, found.out
    )
    before = stamps(intact)
    again = run(intact)
    assert again.ending == "finished"
    assert stamps(intact) == before
    gone = found.out / "cells" / "other" / "seed-1"
    old = losses(gone)
    shutil.rmtree(gone)
    assert run(intact).ending == "finished"
    assert {path for path, at in stamps(intact).items() if before[path] != at} == {str(gone / "metrics.jsonl")}
    assert losses(gone) == old


def test_a_directory_of_another_recipe_is_refused_before_anything_runs(made: tuple[Cells, Comparison]) -> None:
    found, _ = made
    vary = {"variant": {"new": {}, "one": {"train": {"steps": 7}}}}
    with pytest.raises(RecipeError, match=r"cell one, seed-0: .*train\.steps was 6, is 7"):
        run(Cells(config.parse(Grid, {"vary": vary, "seeds": 2}), found.base, found.out))
    assert not (found.out / "cells" / "new").exists()


def test_a_signal_stops_cleanly_and_the_next_call_goes_on(tmp_path: Path) -> None:
    base = tiny_recipe(tmp_path, train={"steps": 150, "prompts_per_step": 2}, eval=EVAL | {"every": None})
    found = cells(tmp_path, base=base)
    first, second = found.compared({found.grid.combinations()[0]: {}})
    first.log.parent.mkdir(parents=True)
    jobs = [Job(config.dump(cell.recipe), False, str(cell.log)) for cell in (first, second)]
    metrics = first.path / "metrics.jsonl"
    ended = list(run_processes(jobs, 1, stopped=lambda: metrics.is_file() and metrics.stat().st_size > 0))
    assert [(item.index, item.stopped) for item in ended] == [(0, True)]
    assert (first.state(), second.state()) == ("started", "new")
    done = json.loads((first.path / "run.json").read_text())
    assert done["status"] == "stopped by a signal"
    assert 0 < done["steps"] < 150
    only = cells(tmp_path, base=base, seeds=1)
    assert run(only).ending == "finished"
    assert len(losses(first.path)) == 150


def test_the_command_and_its_exit_code(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tmp_path, eval=EVAL)))
    base = config.read_yaml(recipe)
    asked = ["compare", str(recipe), "--vary", "train.lr=0.003,0.001", "--seeds", "2"]
    dry = CliRunner().invoke(app, [*asked, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "4 runs" in dry.output
    assert not (tmp_path / "run-compare").exists()
    grid = read_grid(None, base, vary=["train.lr=0.003,0.001"], changes={"seeds": 2})
    pretended(Cells(grid, base, tmp_path / "run-compare"), lambda *_: 0.5)
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "run-compare").iterdir()}
    assert {"table.md", "cells.csv", "compare.json", "compare.html"} <= names


def test_what_is_known_is_written_while_runs_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four runs of 20.5 seconds each: after the first and after the fourth. Every finished run is measured once."""
    found = cells(tmp_path, {"variant": {"one": {}, "two": {}}}, seeds=3)
    made = found.compared({combination: {} for combination in found.grid.combinations()})
    for cell in made[:2]:
        pretend(cell, {6: problems(0.5)})
    now = [0.0]
    measured: list[Path] = []

    def one_after_the_other(jobs: Sequence[Job], num_at_once: int, stopped: object) -> Any:
        for index, job in enumerate(jobs):
            cell = next(cell for cell in made if str(cell.path) == job.recipe["run_dir"])
            pretend(cell, {6: problems(0.5)})
            now[0] += 20.5
            yield Ended(index, "broke" if index == 0 else None)

    def measure_one(cell: Cell) -> Any:
        measured.append(cell.path)
        return measure(cell)

    monkeypatch.setattr("understudy.compare.run.run_processes", one_after_the_other)
    monkeypatch.setattr("understudy.compare.run.measure", measure_one)
    monkeypatch.setattr("understudy.compare.run.Drafts", partial(Drafts, clock=lambda: now[0]))
    drafts: list[Comparison] = []

    def save(draft: Comparison) -> None:
        drafts.append(draft)
        if len(drafts) == 1:
            page = write_outputs(draft)
            first = (found.out / "table.md").read_text().splitlines()[0]
            assert first.startswith("**Unfinished: 3 of 6 runs have ended.")
            values = json.loads((found.out / "compare.json").read_text())
            assert (values["status"], values["unfinished"]) == ("running", draft.unfinished)
            text = page.read_text()
            assert text.index(draft.unfinished) < text.index("<h2>")
            assert "1 run failed." in text

    ended = compare(found, Runner(Console(quiet=True)), save=save)
    assert [draft.unfinished.split(" runs")[0] for draft in drafts] == ["Unfinished: 3 of 6", "Unfinished: 6 of 6"]
    assert sorted(measured) == sorted(cell.path for cell in made if cell is not made[2])
    assert [row.num_finished for row in drafts[0].table.rows] == [2, 0]
    assert ended.unfinished == ""
    assert (ended.ending, ended.table) == ("failed", drafts[1].table)
    write_outputs(ended)
    assert "Unfinished" not in "".join(path.read_text() for path in found.out.iterdir() if path.is_file())


def test_outputs_that_cannot_be_written_stop_no_run(tmp_path: Path) -> None:
    now = [0.0]
    told: list[str] = []
    console = Console(quiet=True)
    console.warn = told.append  # type: ignore[method-assign]
    tried: list[Comparison] = []

    def save(draft: Comparison) -> None:
        tried.append(draft)
        raise CheckpointError("the disk is full")

    drafts = Drafts(save, console, clock=lambda: now[0])
    draft = Comparison(cells(tmp_path), (), (), {}, running=True)
    for now[0] in (0.0, SAVE_EVERY_S - 1, SAVE_EVERY_S, 2 * SAVE_EVERY_S - 1):
        drafts(lambda: draft)
    assert len(tried) == 2
    assert told == ["the outputs so far were not written: the disk is full"] * 2


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'understudy\[ray\]'"):
        check_ray()


# Tuning


def test_tuning_takes_the_best_value_of_each_combination(tmp_path: Path) -> None:
    vary = {"steps": {"a": {}, "b": {"train": {"steps": 4}}}}
    found = cells(tmp_path, vary, tune={"train.lr": [1e-3, 1e-2, 1e-1]}, seeds=1)
    best = {"a": 1e-2, "b": 1e-1}
    for cell in found.tuning:
        share = 0.9 if cell.tuned["train.lr"] == best[cell.combination.name] else 0.2
        pretend(cell, {0: problems(0.95), cell.recipe.train.steps: problems(share)}, split="validation")
    chosen = {combination: {"train.lr": best[combination.name]} for combination in found.grid.combinations()}
    for cell in found.compared(chosen):
        pretend(cell, {6: problems(0.5)})
    comparison = run(found)
    assert comparison.ending == "finished"
    assert comparison.tuned == chosen
    assert [row[1] for row in comparison.table.texts] == ["0.01", "0.1"]
    assert [row for row in page_values(comparison)["tuning"] if row[-1]] == [
        ["a", "0.01", "87.5 %", "yes"],
        ["b", "0.1", "87.5 %", "yes"],
    ]


def test_a_tuning_run_sees_neither_a_compared_seed_nor_a_compared_problem(tmp_path: Path) -> None:
    found = cells(tmp_path, tune={"train.lr": [1e-3, 1e-2]}, tune_steps=2, seeds=1)
    comparison = run(found, num_at_once=2)
    assert comparison.ending == "finished"
    (compared,) = comparison.outcomes
    seen = [attempt for item in comparison.tuning for attempt in asked_in(item.cell.path)]
    assert len(seen) == 2 * 2 * 8 * 2
    assert set(seen).isdisjoint(asked_in(compared.cell.path))
    for outcome in comparison.tuning:
        saved = config.read_yaml(outcome.cell.path / "recipe.yaml")
        assert (saved["eval"]["split"], saved["seed"], saved["train"]["steps"]) == ("validation", 1000, 2)


def asked_in(path: Path) -> list[str]:
    rows = (line for file in (path / "eval").glob("*.jsonl") for line in file.read_text().splitlines())
    return [json.loads(line)["prompt_id"] for line in rows]


def test_tuning_on_what_is_compared_is_refused(tmp_path: Path) -> None:
    rows = [{"question": f"{index}+1=", "answer": str(index + 1), "solution": f"{index + 1}"} for index in range(20)]
    for name in ("train", "held_out"):
        write_lines(tmp_path / f"{name}.jsonl", rows[:10] if name == "train" else rows[10:])
    held_out = str(tmp_path / "held_out.jsonl")
    task = {
        "type": "jsonl",
        "path": str(tmp_path / "train.jsonl"),
        "validation_path": held_out,
        "test_path": held_out,
        "prompt_field": "question",
        "reference_field": "answer",
        "solution_field": "solution",
    }
    student = distillation(tmp_path)["student"]
    base = tiny_recipe(tmp_path, task=task | {"chat": False}, student=student, eval=EVAL)
    with pytest.raises(RecipeError, match="10 problems of the evaluation are also in the validation split|8 problems"):
        run(cells(tmp_path, base=base, tune={"train.lr": [1e-3, 1e-2]}))
    with pytest.raises(RecipeError, match="has to be on another"):
        other = tiny_recipe(tmp_path, eval=EVAL | {"split": "validation"})
        run(cells(tmp_path, base=other, tune={"train.lr": [1e-3, 1e-2]}))


# Numbers


def test_the_interval_covers_the_mean_over_seeds_and_problems() -> None:
    """Share of intervals that hold the truth, for five seeds of three kinds; 400 draws: 2 standard errors are 2 %."""
    rng = np.random.default_rng(0)
    for by_seed, by_problem, rest in ((0.05, 0.3, 0.3), (0.1, 0.05, 0.3), (0.0, 0.4, 0.1)):
        found = [
            crossed_mean(
                0.5
                + by_seed * rng.normal(size=(5, 1))
                + by_problem * rng.normal(size=(1, 60))
                + rest * rng.normal(size=(5, 60))
            )
            for _ in range(400)
        ]
        assert 0.92 <= np.mean([item.low <= 0.5 <= item.high for item in found]) <= 0.985


def test_limits_of_the_interval() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 50))
    # problems that do not differ: the t interval over seeds
    seeds = np.repeat(values[:, :1], 50, axis=1)
    half = t_quantile(0.975, 3) * seeds[:, 0].std(ddof=1) / 2
    assert crossed_mean(seeds).high - crossed_mean(seeds).value == pytest.approx(half, rel=1e-9)
    # seeds that do not differ, and one seed: over problems
    problems_only = np.repeat(values[:1], 4, axis=0)
    one, same = crossed_mean(values[:1]), crossed_mean(problems_only)
    assert (same.low, same.high) == pytest.approx((one.low, one.high), rel=1e-9)
    assert one == estimate_mean(values[0])
    # neither order nor place matters
    shuffled = crossed_mean(values[::-1, rng.permutation(50)])
    assert (shuffled.low, shuffled.high) == pytest.approx((crossed_mean(values).low, crossed_mean(values).high))


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706205), (4, 2.776445), (10, 2.228139), (1e7, 1.959964)])
def test_quantiles_of_t(freedom: float, value: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=1e-6)


def test_identical_variants_differ_by_exactly_nothing_and_a_better_one_by_its_gain(tmp_path: Path) -> None:
    found = cells(tmp_path, {"variant": {"one": {}, "same": {}, "better": {}}}, seeds=4)
    pretended(found, lambda name, seed: 0.9 if name == "better" else 0.4)
    one, same, better = run(found).table.rows
    assert one.is_baseline
    assert one.accuracy == same.accuracy
    assert one.accuracy is not None
    assert 0 < one.accuracy.low < one.accuracy.value < one.accuracy.high < 1
    assert same.difference is not None
    assert same.difference.value == 0.0
    assert (same.difference.low, same.difference.high) == pytest.approx((-0.0881, 0.0881), abs=1e-4), (
        "40 equal problems"
    )
    assert better.difference is not None
    assert better.difference.low > 0.2
    assert better.accuracy is not None
    assert better.difference.value == pytest.approx(better.accuracy.value - one.accuracy.value, abs=1e-12)


def test_the_baseline_is_the_row_with_the_same_other_labels(tmp_path: Path) -> None:
    vary = {"method": {"a": {}, "b": {}}, "start": {"weak": {}, "strong": {}}}
    found = cells(tmp_path, vary, baseline={"method": "b"})
    pretended(found, lambda name, seed: {"a, weak": 0.3, "b, weak": 0.1, "a, strong": 0.6, "b, strong": 0.8}[name])
    rows = {row.combination.name: row for row in run(found).table.rows}
    assert [name for name, row in rows.items() if row.is_baseline] == ["b, weak", "b, strong"]
    weak, strong = rows["a, weak"].difference, rows["a, strong"].difference
    assert weak is not None
    assert strong is not None
    assert weak.value > 0 > strong.value


def test_the_order_of_runs_and_labels_changes_no_row(tmp_path: Path) -> None:
    vary = {"variant": {name: {} for name in ("one", "two", "three")}}
    found = cells(tmp_path, vary, seeds=3, baseline={"variant": "one"})
    pretended(found, lambda name, seed: len(name) / 10)
    comparison = run(found)
    mixed = random.Random(0).sample(list(comparison.outcomes), len(comparison.outcomes))
    assert Comparison(found, mixed, (), comparison.tuned).table.rows == comparison.table.rows
    turned = {"variant": dict(reversed(vary["variant"].items()))}
    other = run(cells(tmp_path, turned, seeds=3, baseline={"variant": "one"})).table.texts
    assert sorted(other) == sorted(comparison.table.texts)


def test_a_target_that_was_not_reached_is_no_number(tmp_path: Path) -> None:
    found = cells(tmp_path, {"variant": {"none": {}, "one": {}, "all": {}}}, seeds=3, target=0.5)
    for cell in found.compared({combination: {} for combination in found.grid.combinations()}):
        name, seed = cell.combination.name, cell.recipe.seed
        reaches = name == "all" or (name == "one" and seed == 0)
        shares = {0: 0.0, 2 + seed: 0.8 if reaches else 0.2, 6: 0.8 if reaches else 0.2}
        pretend(cell, {step: problems(share) for step, share in shares.items()})
    comparison = run(found)
    column = comparison.table.columns.index("samples to 50 %")
    assert [row[column] for row in comparison.table.texts] == ["not reached", "not reached (1 of 3 seeds did)", "24"]
    assert [row.reached.median for row in comparison.table.rows if row.reached] == [None, None, 24]
    rows = list(csv.DictReader(cells_csv(comparison).splitlines()))
    assert [row["samples_to_target"] for row in rows] == ["not reached"] * 3 + ["16"] + ["not reached"] * 2 + [
        "16",
        "24",
        "32",
    ]
    assert samples_to_target({}, 0.5) is None


def test_what_was_not_recorded_says_so(tmp_path: Path) -> None:
    found = cells(tmp_path, {"variant": {"one": {}, "two": {}}}, seeds=1)
    for cell in found.compared({combination: {} for combination in found.grid.combinations()}):
        pretend(cell, {6: problems(0.5)})
        (cell.path / "eval" / "step_000006.json").unlink()
        (cell.path / "eval" / "step_000006.jsonl").unlink()
    comparison = run(found)
    assert comparison.table.texts[0][1:] == ["not recorded", "baseline", *["not recorded"] * 5, "1"]
    assert comparison.table.texts[1][2] == "not recorded"
    assert "Not recorded: accuracy, gradient norm, entropy." in page(comparison)
    values = to_json(comparison)
    assert values["rows"][0]["accuracy"] is None
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_tokens_are_those_that_the_student_wrote(tmp_path: Path) -> None:
    """By the seconds of all steps; all response tokens where no others were recorded, or not at every step."""
    found = cells(tmp_path, {"variant": {"own": {}, "all": {}, "some": {}}}, seeds=1)
    for cell in found.compared({combination: {} for combination in found.grid.combinations()}):
        pretend(cell, {2: problems(0.5)})
        rows: list[dict[str, float]] = [
            {"step": 1, "step_s": 1.0, "tokens_per_s": 100.0, "student_tokens": 60.0},
            {"step": 2, "step_s": 3.0, "tokens_per_s": 20.0, "student_tokens": 20.0},
        ]
        for row in rows[: {"own": 0, "all": 2, "some": 1}[cell.combination.name]]:
            del row["student_tokens"]
        write_lines(cell.path / "metrics.jsonl", rows)
    assert [row.tokens_per_s for row in run(found).table.rows] == [20.0, 40.0, 40.0]


def test_a_skipped_step_is_not_in_the_mean_gradient_norm(tmp_path: Path) -> None:
    found = cells(tmp_path, seeds=1)
    (cell,) = found.compared({found.grid.combinations()[0]: {}})
    pretend(cell, {4: problems(0.5)})
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0, "grad_norm": 2.0},
        {"step": 2},
        {"step": 3, "loss": None, "grad_norm": 50.0},
        {"step": 4, "loss": 1.0, "grad_norm": None},
        {"step": 5, "loss": 1.0, "grad_norm": 4.0},
    ]
    write_lines(cell.path / "metrics.jsonl", rows)
    assert measure(cell).grad_norm == 3.0


def test_the_caption_says_what_the_numbers_rest_on(tmp_path: Path) -> None:
    found = cells(tmp_path, {"variant": {"one": {}, "two": {}, "three": {}}}, seeds=2)
    made = pretended(found, lambda *_: 0.5)
    outcomes = [Outcome(cell, "finished", measured=measure(cell)) for cell in made]
    whole = " ".join(Comparison(found, outcomes, (), {}).table.caption)
    assert "no correction for many rows" in whole
    assert "Not every run finished" not in whole
    outcomes[2:4] = [Outcome(made[2], "failed", "x"), Outcome(made[3], "not run")]
    part = Comparison(found, outcomes, (), {})
    assert "rest on the seeds that did" in " ".join(part.table.caption)
    assert "Runs failed in two (1 of 2: x)." in " ".join(part.table.caption)
    assert part.unfinished.startswith("Unfinished: 5 of 6 runs have ended.")
    pair = cells(tmp_path / "pair", {"variant": {"one": {}, "two": {}}}, seeds=1)
    pretended(pair, lambda *_: 0.5)
    assert "no correction" not in " ".join(run(pair).table.caption)


def test_greedy_accuracy_is_shown_where_the_evaluation_is_greedy(tmp_path: Path) -> None:
    base = tiny_recipe(tmp_path, eval=EVAL | {"sampling": {"temperature": 0.0, "max_new_tokens": 24}})
    found = cells(tmp_path, base=base, seeds=1)
    (cell,) = pretended(found, lambda *_: 0.5)
    run0 = measure(cell)
    assert run0.final is not None
    assert run0.greedy == run0.final.value
    assert "greedy" in run(found).table.columns
    pretended(cells(tmp_path / "drawn", seeds=1), lambda *_: 0.5)
    assert "greedy" not in run(cells(tmp_path / "drawn", seeds=1)).table.columns


# The page


def test_what_a_run_wrote_is_text_on_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    found = cells(tmp_path, {hostile: {hostile: {}, "b": {}}}, seeds=1)
    made = pretended(found, lambda *_: 0.5)
    outcomes = [Outcome(made[0], "failed", hostile), Outcome(made[1], "finished", measured=measure(made[1]))]
    comparison = Comparison(found, outcomes, (), {}, command=hostile)
    charts = page_values(comparison)["drawn"]
    for chart in charts:
        drawn = ElementTree.fromstring(draw(chart))
        assert [text.text for text in drawn.iter("text")][-1] == "training sample"
        assert any(str(path.get("class")).startswith("curve") for path in drawn.iter("path"))
    html = page(comparison)
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "optimizer step" not in html
    assert "&#34;point&#34;:&#34;sample&#34;" in html
    assert "over training samples" in html
    assert not [line for chart in charts for line in chart.lines if "at step" in chart.describe(line.series)]


def test_more_combinations_than_colours_get_more_charts(tmp_path: Path) -> None:
    found = cells(tmp_path, {"variant": {f"v{index}": {} for index in range(MAX_LINES + 1)}}, seeds=2)
    pretended(found, lambda name, seed: 0.5)
    charts = page_values(run(found))["drawn"]
    assert [len(item.lines) for item in charts if item.title.startswith("Accuracy")] == [MAX_LINES, 1]
