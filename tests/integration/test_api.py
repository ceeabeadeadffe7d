"""Runs from Python: models, rows and functions in memory, the same numbers as the command line, nothing left behind."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file

import understudy
from tests.runs import distillation, save_tiny_model, tiny_recipe, write_recipe
from understudy import GKD, GRPO, SFT, Callback, Recipe, Run, config, distil, evaluate, sample, train
from understudy import given as in_memory
from understudy.errors import DataError, RecipeError
from understudy.eval.summary import EvalSummary
from understudy.methods import METHODS
from understudy.models import load_causal_lm, load_tokenizer
from understudy.recipe.arguments import OTHER_ARGUMENTS
from understudy.trainer.settings import Train
from understudy.types import Grade, Prompt, Sampling

pytestmark = pytest.mark.slow

ROWS = [{"question": f"{a:02d}+{b:02d}:", "answer": str(a + b), "work": f"{a + b}"} for a in range(8) for b in range(8)]
PLAIN: dict[str, Any] = {
    "prompt": "question",
    "reference": "answer",
    "task": {"chat": False, "verifier": "exact"},
    "sampling": Sampling(max_new_tokens=6),
    "prompts_per_step": 4,
    "device": "cpu",
    "quiet": True,
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a student and a teacher."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": save_tiny_model(folder / "student", seed=1),
        "teacher": save_tiny_model(folder / "teacher", seed=2, hidden_size=32),
    }


@pytest.fixture
def loaded(names: dict[str, str]) -> dict[str, Any]:
    return {key: (load_causal_lm(name), load_tokenizer(name)) for key, name in names.items()}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.student / "model.safetensors")


def test_a_run_of_names_and_rows(names: dict[str, str], tmp_path: Path) -> None:
    run = distil(**names, train=ROWS, method=GKD(beta=1.0), steps=3, lr=1e-3, run_dir=tmp_path / "run", **PLAIN)
    assert run.ending == "finished"
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert run.report is not None
    assert run.report.is_file()
    assert run.summaries == ()
    assert transformers.AutoModelForCausalLM.from_pretrained(run.student) is not None
    assert run.recipe.train.lr == 1e-3
    saved = config.read_yaml(run.path / "recipe.yaml")
    assert saved["task"]["train"].startswith("in-memory: 64 rows ")


def test_it_trains_as_the_command_line_does(names: dict[str, str], loaded: dict[str, Any], tmp_path: Path) -> None:
    """Files and names, rows and loaded models, a `Dataset`: bit-equal students."""
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    files = distil(**names, train=tmp_path / "data.jsonl", steps=2, lr=1e-3, run_dir=tmp_path / "files", **PLAIN)
    again = train(Recipe.load(files.path / "recipe.yaml", f"run_dir={tmp_path / 'again'}"), quiet=True)
    held = distil(**loaded, train=Dataset.from_list(ROWS), steps=2, lr=1e-3, run_dir=tmp_path / "held", **PLAIN)
    for name, value in weights(files).items():
        assert torch.equal(value, weights(again)[name]), name
        assert value.shape == weights(held)[name].shape
    rows = distil(**names, train=ROWS, steps=2, lr=1e-3, run_dir=tmp_path / "rows", **PLAIN)
    assert [row["loss"] for row in rows.metrics] == [row["loss"] for row in held.metrics]
    for name, value in weights(rows).items():
        assert torch.equal(value, weights(held)[name]), name


@pytest.mark.parametrize("kind", ["tuple", "torch", "numpy", "pandas"])
def test_rows_are_taken_as_they_are(names: dict[str, str], tmp_path: Path, kind: str) -> None:
    """Whatever list or format they come in."""
    rows = tuple(ROWS) if kind == "tuple" else Dataset.from_list(ROWS).with_format(kind)
    run = distil(**names, train=rows, steps=1, run_dir=tmp_path / "run", **PLAIN)
    (name,) = {config.read_yaml(run.path / "recipe.yaml")["task"]["train"]}
    assert name == in_memory.name_of_rows(ROWS)


def test_loaded_models_stay_as_they_are(loaded: dict[str, Any], tmp_path: Path) -> None:
    student, teacher = loaded["student"][0].train(), loaded["teacher"][0]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    run = distil(**loaded, train=ROWS, steps=2, lr=1e-2, run_dir=tmp_path / "run", **PLAIN)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in weights(run).items())
    assert student.training
    assert not teacher.training
    assert all(value.requires_grad for value in [*student.parameters(), *teacher.parameters()])


def test_functions_grade_and_reward(names: dict[str, str], tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"verified": [], "rewarded": []}

    def verify(text: str, reference: str) -> bool:
        seen["verified"].append(reference)
        return len(text) % 2 == 0

    def reward(prompt: Prompt, text: str) -> float:
        seen["rewarded"].append(prompt.reference)
        return float(len(text) % 4)

    keys = PLAIN | {"task": {"chat": False}, "samples_per_prompt": 4, "run_dir": tmp_path / "run", "examine": False}
    rows = {"train": ROWS[:32], "test": ROWS[32:48]}
    run = distil(student=names["student"], **rows, verifier=verify, reward=reward, method=GRPO(), steps=2, **keys)
    assert len(seen["rewarded"]) == 2 * 4 * 4
    assert len(seen["verified"]) == 2 * 16
    assert all(0 < row["reward"] < 3 for row in run.metrics)
    assert [summary.step for summary in run.summaries] == [0, 2]
    assert run.recipe.task.verifier.endswith("test_functions_grade_and_reward.<locals>.verify")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("0.5", "returned '0.5'"),
        (float("nan"), "returned nan"),
        (torch.ones(2), r"returned tensor\(\[1., 1.\]\)"),
        (numpy.ones(3), r"returned array\(\[1., 1., 1.\]\)"),
        (10**400, "returned 1000"),
    ],
)
def test_a_reward_that_is_no_number_is_refused(names: dict[str, str], tmp_path: Path, result: Any, words: str) -> None:
    def reward(prompt: Prompt, text: str) -> Any:
        return result

    keys = PLAIN | {"samples_per_prompt": 4, "run_dir": tmp_path / "run", "examine": False}
    with pytest.raises(DataError, match=words):
        distil(student=names["student"], train=ROWS, reward=reward, method="grpo", steps=1, **keys)


@pytest.mark.parametrize("examine", [True, False])
def test_a_function_that_raises_is_named(names: dict[str, str], tmp_path: Path, examine: bool) -> None:
    def reward(prompt: Prompt, text: str) -> float:
        raise KeyError("answer")

    keys = PLAIN | {"samples_per_prompt": 4, "run_dir": tmp_path / "run", "examine": examine}
    with pytest.raises((RecipeError, DataError), match=r"<locals>.reward raised KeyError: 'answer'") as refused:
        distil(student=names["student"], train=ROWS, reward=reward, method="grpo", steps=1, **keys)
    assert "report it" not in str(refused.value)


def test_a_reward_of_none_leaves_the_sample_out(names: dict[str, str], tmp_path: Path) -> None:
    def reward(prompt: Prompt, text: str) -> Grade | None:
        return Grade(len(text) % 3 / 2) if len(text) % 2 else None

    keys = PLAIN | {"samples_per_prompt": 8, "run_dir": tmp_path / "run"}
    run = distil(student=names["student"], train=ROWS, reward=reward, method="grpo", steps=1, **keys)
    assert 0 < run.metrics[0]["unrewarded"] < 1


class Told(Callback):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_step(self, step: int, metrics: Any) -> None:
        assert metrics["loss"] is not None
        self.heard.append(step)

    def on_evaluation(self, summary: EvalSummary) -> None:
        self.heard.append(f"evaluated at {summary.step}")

    def on_end(self, run: Run) -> None:
        self.heard.append(run.ending)


def test_callbacks(names: dict[str, str], tmp_path: Path) -> None:
    told = Told()
    keys = PLAIN | {"run_dir": tmp_path / "run"}
    distil(**names, train=ROWS[8:], test=ROWS[:8], callbacks=[told, Told()], steps=2, **keys)
    assert told.heard == ["evaluated at 0", 1, 2, "evaluated at 2", "finished"]
    saved = config.read_yaml(tmp_path / "run" / "recipe.yaml")["callbacks"]
    assert saved == ["in-memory: tests.integration.test_api.Told", "in-memory: tests.integration.test_api.Told 2"]


def test_resuming_needs_the_same_objects(loaded: dict[str, Any], names: dict[str, str], tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    class Stops(Told):
        def on_step(self, step: int, metrics: Any) -> None:
            if step == 2:
                raise StopError

    keys: dict[str, Any] = PLAIN | {"steps": 4, "lr": 1e-3}
    whole = distil(**loaded, train=ROWS, callbacks=[Told()], run_dir=tmp_path / "whole", **keys)
    cut = keys | {"run_dir": tmp_path / "cut"}
    Stops.__qualname__, Stops.__module__ = "Told", Told.__module__
    with pytest.raises(StopError):
        distil(**loaded, train=ROWS, callbacks=[Stops()], **cut)
    changed = [*ROWS[:-1], ROWS[-1] | {"answer": "15"}]
    for given, words in (
        ({"train": changed}, r"task.train was 'in-memory: 64 rows \w+', is 'in-memory: 64 rows \w+'"),
        ({"student": loaded["teacher"]}, r"student.model was 'in-memory: LlamaForCausalLM \w+', is"),
        ({"callbacks": []}, "callbacks was"),
    ):
        with pytest.raises(RecipeError, match=words):
            distil(**(loaded | {"train": ROWS, "callbacks": [Told()]} | given), resume=True, **cut)
    # the command line has none of them
    command = [sys.executable, "-m", "understudy", "train", str(tmp_path / "cut" / "recipe.yaml"), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "callbacks: 'in-memory: " in done.stderr or "student.model: 'in-memory: Llama" in done.stderr
    assert "give it again" in done.stderr
    resumed = distil(**loaded, train=ROWS, callbacks=[Told()], resume=True, **cut)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_evaluate_and_sample(names: dict[str, str], tmp_path: Path) -> None:
    run = distil(**names, train=ROWS[8:], test=ROWS[:8], steps=1, run_dir=tmp_path / "run", **PLAIN)
    summary = evaluate(run, quiet=True)
    assert summary.metrics["avg@1"].value == run.summaries[-1].metrics["avg@1"].value
    written = sample(run, ["01+02:", "03+04:"], num_samples=2, quiet=True)
    assert [one.prompt.text for one in written] == ["01+02:"] * 2 + ["03+04:"] * 2
    assert all(isinstance(one.text, str) for one in written)
    # also a run of another process, as far as it needs nothing in memory
    with pytest.raises(RecipeError, match="rows .* stands for an object of a Python program"):
        evaluate(run.path, quiet=True)
    with pytest.raises(RecipeError, match=r"student, a model directory, needs none of it"):
        sample(run.path, ["01+02:"], quiet=True)
    # a section that the saved recipe leaves out can be given
    alone = distil(**names, train=ROWS, steps=1, run_dir=tmp_path / "alone", **PLAIN)
    summary = evaluate(alone, overrides=["eval.problems=3", "eval.split=train"], out=str(tmp_path / "out"), quiet=True)
    assert summary.num_problems == 3
    assert (tmp_path / "out").is_dir()
    for call, words in (
        (lambda: sample(run, "01+02:"), r"prompts is '01\+02:'; it must be a list of strings"),
        (lambda: sample(run, [{"role": "user", "content": "1"}]), "prompts is .*; it must be a list of strings"),  # type: ignore[list-item]
        (lambda: sample(run, num=-1), "num is -1"),
        (lambda: sample(run, ["1"], num_samples=0), "num_samples is 0"),
        (lambda: sample(run, ["1"], overrides="seed=1"), "overrides are 'seed=1'; give a list"),
        (lambda: sample(None, ["1"]), "the source is of type NoneType"),  # type: ignore[arg-type]
        (lambda: evaluate((1, 2)), "the source is of type tuple"),  # type: ignore[arg-type]
        (lambda: evaluate(run, model=run), "model is of type Run"),  # type: ignore[arg-type]
        (lambda: train(run.path), r"the recipe is of type .*Path; load a file with Recipe.load"),  # type: ignore[arg-type]
        (lambda: Recipe.load(run.path / "recipe.yaml", ["seed=1"]), "is not an override"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RecipeError, match=words):
            call()


def test_nothing_is_left_behind(names: dict[str, str], tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    torch.manual_seed(5)
    random.seed(5)
    state, numbers = torch.get_rng_state(), random.getstate()
    threads, verbosity = threading.enumerate(), transformers.logging.get_verbosity()
    distil(**names, train=ROWS, steps=1, run_dir=tmp_path / "run", **PLAIN)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert torch.equal(state, torch.get_rng_state())
    assert numbers == random.getstate()
    assert threading.enumerate() == threads
    assert transformers.logging.get_verbosity() == verbosity
    assert transformers.logging.is_progress_bar_enabled()


def test_it_runs_in_another_thread(names: dict[str, str], tmp_path: Path) -> None:
    """Only the main thread may set signal handlers."""
    ended: list[str] = []
    work = threading.Thread(
        target=lambda: ended.append(distil(**names, train=ROWS, steps=1, run_dir=tmp_path / "run", **PLAIN).ending)
    )
    work.start()
    work.join()
    assert ended == ["finished"]


def test_an_interrupt_saves_and_raises(names: dict[str, str], tmp_path: Path) -> None:
    class Interrupts(Callback):
        def on_step(self, step: int, metrics: Any) -> None:
            if step == 2:
                signal.raise_signal(signal.SIGINT)

    keys: dict[str, Any] = PLAIN | {"steps": 4, "run_dir": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        distil(**names, train=ROWS, callbacks=[Interrupts()], **keys)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]


class Deaf(Callback):
    def on_step(self, step: int) -> None:  # type: ignore[override]
        pass


async def waits(prompt: Prompt, text: str) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"student": torch.nn.Linear(1, 1)}, r"student is a loaded model without its tokenizer"),
        (
            {"student": (load_tokenizer, load_causal_lm)},
            "a pair of function, function; it must be a loaded model and its",
        ),
        ({"reward": lambda prompt, text: 1.0}, "GKD asks for no reward, so task.reward_function would never be called"),
        ({"student": 3}, "student is of type int"),
        ({"learning_rate": 1}, "learning_rate: unknown key"),
        ({"train": {"train": ROWS}}, "train is of type dict; rows are"),
        ({"train": iter(ROWS)}, "train is of type list_iterator; rows are"),
        ({"train": ["a", "b"]}, "row 0 is of type str"),
        ({"train": [{"question": object()}]}, "row 0 cannot be told from others"),
        ({"train": ROWS, "test": "test"}, "give all of them as rows or all by name"),
        ({"train": None, "test": ROWS}, "test without train"),
        ({"prompt": None}, "prompt is missing: the field"),
        ({"prompt": "text"}, "no field 'text'"),
        ({"method": "gdk"}, "method.type is 'gdk'"),
        ({"resume": True, "run_dir": None}, "resume, .* need run_dir"),
        ({"callbacks": [print]}, "callbacks: .* lacks one of on_step"),
        ({"callbacks": [Told]}, r"Told is a class; give an object of it, as in Told\(\)"),
        ({"callbacks": [Deaf()]}, r"on_step of Deaf takes \(step\); it is called with \(step, metrics\)"),
        ({"callbacks": Told()}, "callbacks is of type Told; it must be a list"),
        ({"callbacks": None}, "callbacks is of type NoneType"),
        ({"verifier": lambda text: 1.0}, r"verifier takes \(text\); it is called with \(response, reference\)"),
        ({"reward": lambda completions, **rest: [1.0]}, r"reward takes \(completions, \*\*rest\); it is called with"),
        ({"reward": Told}, "reward is the class Told; give an object"),
        ({"reward": waits}, "reward is async; give a plain function"),
        ({"method": GKD}, r"method is the class GKD; give an object of it, as in GKD\(\)"),
        ({"method": "GKD"}, "did you mean 'gkd'"),
        ({"method": "TrOPD"}, "did you mean 'tropd'"),
        ({"teacher": ["a", "b"]}, r"teacher is of type list; .*several teachers are teachers=\{'name'"),
        ({"train_dataset": ROWS}, "train_dataset: unknown argument; it is train here"),
        ({"eval_dataset": ROWS}, "it is test here"),
        ({"reward_funcs": [len]}, "it is reward here"),
        ({"processing_class": load_tokenizer}, r"it is student=\(model, tokenizer\) here"),
        ({"task": {"chat": False, "reward_function": "mine"}}, "reward_function is 'mine'"),
    ],
)
def test_what_cannot_be_used_is_refused(
    names: dict[str, str], tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = names | PLAIN | {"train": ROWS, "steps": 1, "run_dir": tmp_path / "run"} | keys
    with pytest.raises((RecipeError, DataError), match=words):
        distil(**given)
    assert not (tmp_path / "run").exists()


def test_a_loaded_model_has_all_of_its_weights_and_its_configuration(loaded: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded["student"]
    given: dict[str, Any] = PLAIN | {"train": ROWS, "method": SFT(), "run_dir": tmp_path / "run"}
    for one, words in ((torch.nn.DataParallel(model), "a pair of DataParallel"), (model.to("meta"), "on no device")):
        with pytest.raises(RecipeError, match=words):
            distil(student=(one, tokenizer), **given)


def test_rows_in_a_tuple_are_rows(names: dict[str, str], tmp_path: Path) -> None:
    rows = ({"q": "1+2:", "a": "3"}, {"q": "2+2:", "a": "4"})
    keys = PLAIN | {"prompt": "q", "reference": "a", "run_dir": tmp_path / "run"}
    assert distil(**names, train=rows, steps=1, **keys).ending == "finished"


def test_the_package_lists_its_names_and_every_method() -> None:
    assert set(understudy.__all__) <= set(dir(understudy))
    assert {kind.__name__ for kind in METHODS.values()} <= set(understudy.__all__)


def test_names_of_arguments_elsewhere_are_no_keys_here() -> None:
    keys = {config.key_of(item) for kind in (Recipe, Train) for item in fields(kind)}
    assert not keys & set(OTHER_ARGUMENTS)


def test_run_directories_are_numbered(names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("distil", "distil-2"):
        run = distil(student=names["student"], train=ROWS, solution="work", method=SFT(), steps=1, **PLAIN)
        assert run.path == Path("runs", expected)


def test_sections_and_loaded_teachers_by_name(loaded: dict[str, Any], names: dict[str, str], tmp_path: Path) -> None:
    rows = [row | {"who": ("one", "two")[n % 2]} for n, row in enumerate(ROWS)]
    keys = PLAIN | {"task": {"chat": False, "teacher_field": "who"}, "run_dir": tmp_path / "run"}
    teachers = {"one": loaded["teacher"], "two": names["teacher"]}
    student = {"model": names["student"], "lora": {"rank": 2, "target_modules": ["q_proj"]}}
    run = distil(student=student, train=rows, teachers=teachers, steps=1, **keys)
    assert run.recipe.teachers["one"].shown.startswith("in-memory: LlamaForCausalLM")
    card = (run.student / "README.md").read_text()
    assert "base_model: in-memory" not in card
    shares = {"one": 0.5, "two": 0.5}
    keys = PLAIN | {
        "weights": shares,
        "references": teachers,
        "method": {"type": "gopd"},
        "run_dir": tmp_path / "mixed",
    }
    mixture = distil(student=student, train=ROWS, teachers=teachers, steps=1, **keys)
    assert mixture.metrics[0]["teacher_over_reference"] == 0.0
    assert evaluate(mixture, overrides=["eval.problems=3", "eval.split=train"], quiet=True).num_problems == 3


NOTEBOOK = """
from understudy import distil
run = distil(student={student!r}, teacher={teacher!r}, train={rows!r}, prompt="question", task={{"chat": False}},
             sampling={{"max_new_tokens": 6}}, prompts_per_step=4, steps=2, device="cpu", run_dir={run_dir!r})
print("losses", [row["loss"] for row in run.metrics])
"""


def test_progress_in_a_notebook(names: dict[str, str], tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = textwrap.dedent(NOTEBOOK.format(**names, rows=ROWS[:16], run_dir=str(tmp_path / "run")))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    shown = json.dumps(notebook.cells[0].outputs)
    assert "step 2/2" in shown
    assert "losses" in shown


def test_the_recipe_of_a_run_parses(names: dict[str, str], tmp_path: Path) -> None:
    """Reports and comparisons read it in processes that have none of the objects."""
    run = distil(**names, train=ROWS, verifier=lambda text, reference: 1.0, steps=1, run_dir=tmp_path / "run", **PLAIN)
    recipe = Recipe.load(run.path / "recipe.yaml")
    assert recipe == run.recipe
    assert recipe.task.verifier == f"in-memory: {__name__}.test_the_recipe_of_a_run_parses.<locals>.<lambda>"  # type: ignore[attr-defined]


def test_load_takes_overrides(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, **distillation(tmp_path))
    assert Recipe.load(path, "train.lr=1e-4", "seed=3").seed == 3
    assert Recipe.load(path).train.lr == tiny_recipe(tmp_path)["train"]["lr"]
