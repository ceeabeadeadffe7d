"""Runs from Python: `distil`, `train`, `evaluate` and `sample`.

```python
from understudy import GKD, distil

run = distil(student="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-4B", train=rows, prompt="question", reference="answer",
             method=GKD(beta=1.0), steps=200, lr=1e-5)
```
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from understudy import config, run
from understudy import given as in_memory
from understudy.environments import single_turn
from understudy.environments.play import play
from understudy.errors import RecipeError, brief
from understudy.eval.suite import read_suite
from understudy.eval.summary import EvalSummary
from understudy.files import check_writable
from understudy.format import count, interval, metric_note
from understudy.lazy import torch
from understudy.methods import SFT, Method
from understudy.models import positions_on_disk
from understudy.recipe import Recipe, arguments, load_recipe
from understudy.recipe.checks import check
from understudy.recipe.load import choose_device, load_student, load_teachers, sampling_with
from understudy.report import svg
from understudy.report.charts import scaling_charts
from understudy.report.read import read_baseline
from understudy.run import Run
from understudy.tasks import Split
from understudy.trainer.checkpoint import RunDir
from understudy.trainer.console import Console, endured
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Callback
from understudy.trainer.settings import Eval
from understudy.trainer.signals import terminable
from understudy.types import Prompt, Request, Sample

NEW_TOKENS = 512
"""New tokens for a model without a recipe; fewer if it has less than twice as many positions."""
BLOCK_REQUESTS = 256
"""Requests between two updates of the progress bar."""


def distil(
    *,
    student: Any,
    teacher: Any = None,
    train: Any = None,
    prompt: str | None = None,
    reference: str | Mapping[str, Any] | None = None,
    solution: str | None = None,
    validation: Any = None,
    test: Any = None,
    verifier: str | Callable[[str, str], Any] | None = None,
    reward: Callable[[Prompt, str], Any] | None = None,
    method: Method | Mapping[str, Any] | str = "gkd",
    callbacks: Sequence[Callback] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
    examine: bool = True,
    quiet: bool = False,
    **keys: Any,
) -> Run:
    """Trains a student and returns the run with its metrics, evaluations, student and report.

    `student`, `teacher`: a directory or hub name, a pair of a loaded model and its tokenizer, or a section of a recipe
    (`{"model": ..., "lora": {"rank": 8}}`). A loaded student is copied; a loaded teacher is used in place and left unchanged.
    `train`, `validation`, `test`: rows (a `datasets.Dataset` or a list of mappings) or files; `train` may also be a hub data
    set, and the other two its splits. With `validation` or `test`, the student is evaluated before and after.
    `prompt`, `reference`, `solution`: names of the fields. A mapping as `reference` is the section of the reference model;
    `references` has one for each of `teachers`.
    `verifier`: a name, or a function of response and one accepted answer; `reward`: a function of prompt and response, which
    replaces the verifier's grade in training. Both return a number (1 is right), a bool or a `Grade`; a reward of None leaves
    the sample out.
    `run_dir`: by default the first unused of runs/distil, runs/distil-2, ...
    `examine`: run the doctor's checks first. `quiet`: print nothing.
    `keys`: other recipe keys; those of section `train` need no prefix: `lr=1e-5`, `sampling={"top_p": 0.9}`.

    The recipe holds only names of models, rows and functions: pass them again to resume. Ctrl-C saves within seconds and
    raises KeyboardInterrupt; `resume=True` continues. The doctor's rehearsal calls functions too.
    Raises RecipeError, and what `understudy.run.train` raises.
    """
    objects: dict[str, Any] = {}
    values = arguments.sections(keys, objects)
    values["student"] = arguments.model(student, "student", objects)
    values["method"] = {"type": method} if isinstance(method, str) else arguments.plain("method", method)
    if teacher is not None:
        values["teacher"] = arguments.model(teacher, "teacher", objects)
    if isinstance(reference, Mapping):
        values["reference"], reference = arguments.model(reference, "reference", objects), None
    fields = {
        "prompt_field": prompt,
        "reference_field": reference,
        "solution_field": solution,
        "verifier": arguments.function(verifier, "verifier", ("response", "reference"), objects),
        "reward_function": arguments.function(reward, "reward", ("prompt", "response"), objects),
    }
    section = arguments.task(values.get("task", {}), {"train": train, "validation": validation, "test": test}, objects)
    values["task"] = section | {key: value for key, value in fields.items() if value is not None}
    if train is not None and "prompt_field" not in values["task"]:
        raise RecipeError("prompt is missing: the field of the rows that is the prompt, as in prompt='question'")
    if test is not None or validation is not None:
        held_out: Split = "validation" if test is None else "test"
        values["eval"] = {"split": held_out} | (values.get("eval") or {})
    values["callbacks"] = arguments.callbacks(callbacks, objects)
    if run_dir is None and (resume or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise RecipeError("resume, and a run of several processes, need run_dir, the directory of the run")
    free = (path for n in numbers(1) if not (path := Path("runs", f"distil-{n}" if n > 1 else "distil")).exists())
    values["run_dir"] = str(next(free) if run_dir is None else run_dir)
    with in_memory.given(objects), _as_they_were(objects):
        result = _train(config.parse(Recipe, values), resume=resume, examine=examine, quiet=quiet)
    return replace(result, given=objects)


@contextmanager
def _as_they_were(objects: Mapping[str, Any]) -> Iterator[None]:
    """Restores each loaded model's mode, device and `requires_grad` flags on exit."""
    models = [one[0] for one in objects.values() if isinstance(one, tuple)]
    before = [
        (model, model.training, model.device, [value.requires_grad for value in model.parameters()]) for model in models
    ]
    try:
        yield
    finally:
        for model, training, device, flags in before:
            model.train(training).to(device)
            for value, flag in zip(model.parameters(), flags, strict=True):
                value.requires_grad_(flag)


def train(recipe: Recipe, *, resume: bool = False, examine: bool = True, quiet: bool = False) -> Run:
    """Trains a recipe. Prints progress, the first and last evaluation, and the path of the student.

    Ctrl-C saves within seconds and raises KeyboardInterrupt. Restores signal handlers, random states and library
    settings. Raises what `understudy.run.train` raises.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"the recipe is of type {type(recipe).__name__}; load a file with Recipe.load(path)")
    return _train(recipe, resume=resume, examine=examine, quiet=quiet)


def _train(recipe: Recipe, *, resume: bool, examine: bool, quiet: bool) -> Run:
    with _undisturbed(recipe.device):
        result = train_and_show(recipe, resume=resume, examine=examine, quiet=quiet)
    if result.ending == "stopped by a signal":
        raise KeyboardInterrupt(f"stopped by a signal; the run is saved in {result.path}, and resume=True goes on")
    return result


def train_and_show(recipe: Recipe, *, resume: bool, examine: bool, quiet: bool = False) -> Run:
    """Trains and prints the results, for the command line: random states and library settings stay changed."""
    ranks = Ranks.from_environment(partial(choose_device, recipe.device))
    with terminable(), endured(), Console(quiet=quiet or not ranks.is_main) as console, closing(ranks):
        result = run.train(recipe, resume=resume, examine=examine, console=console)
        if result.summaries:
            title = "before and after" if len(result.summaries) > 1 else "evaluation"
            show(console, title, result.summaries)
        if result.ending == "stopped by a signal":
            console.note(f"stopped by a signal; the checkpoint is saved, continue with --resume ({result.path})")
        else:
            console.note(f"student  {result.student}")
            console.note(f"report   {result.report}")
    return result


@contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    """Restores random states, the current device and library settings on exit."""
    import transformers

    libraries = transformers.logging
    with ExitStack() as restored:
        devices = []
        if torch.cuda.is_available() and device != "cpu":
            restored.enter_context(torch.cuda.device(torch.cuda.current_device()))
            devices = [choose_device(device).index or 0]
        restored.enter_context(torch.random.fork_rng(devices))
        restored.callback(libraries.set_verbosity, libraries.get_verbosity())
        if libraries.is_progress_bar_enabled():
            restored.callback(libraries.enable_progress_bar)
        # their bars and notes would tear the display
        libraries.set_verbosity_error()
        libraries.disable_progress_bar()
        yield


def show(console: Console, title: str, summaries: Sequence[EvalSummary]) -> None:
    """Prints a table of the first and the last evaluation, metric by metric."""
    shown = summaries if len(summaries) < 2 else [summaries[0], summaries[-1]]
    last = shown[-1]
    rows = [
        [name, metric_note(name), *(interval(name, one.metrics.get(name)) for one in shown)] for name in last.metrics
    ]
    described = f"{title}: {count(last.num_problems, f'{last.split} problem')}, 95 % intervals over problems"
    console.table(described, ["metric", "", *(f"step {one.step:,}" for one in shown)], rows)


def is_model(source: object) -> bool:
    """Whether it is the directory of a model, and not of a run."""
    names = ("config.json", "adapter_config.json")
    return isinstance(source, str | Path) and any((Path(source) / name).is_file() for name in names)


def model_recipe(path: str | Path, overrides: Sequence[str], **sections: Mapping[str, Any]) -> Recipe:
    """Builds a recipe for a model directory; `sections` and overrides give the rest."""
    values: dict[str, Any] = {
        "run_dir": f"runs/{Path(path).absolute().name}",
        "student": {"model": str(path)},
        "sampling": {},
        "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
    }
    values = config.override(values | {key: dict(section) for key, section in sections.items()}, overrides)
    if "task" not in values:
        raise RecipeError(
            f"{path} is a model, which has no task; give one, such as task.type=file task.path=FILE task.prompt_field=NAME"
        )
    chosen = "max_new_tokens" in values["sampling"]
    recipe = config.parse(
        Recipe, values if chosen else config.override(values, [f"sampling.max_new_tokens={NEW_TOKENS}"])
    )
    # before the model is looked at, which may take the import of torch
    recipe.task.check_files()
    if chosen:
        return recipe
    positions = positions_on_disk(str(path))
    if positions is None:
        return recipe
    tokens = min(NEW_TOKENS, max(1, positions // 2))
    return replace(recipe, sampling=replace(recipe.sampling, max_new_tokens=tokens))


def load_for_use(
    source: Run | Recipe | str | Path,
    overrides: Sequence[str],
    model: str | Path | None,
    **sections: Mapping[str, Any],
) -> Recipe:
    """The recipe with `model` as its student, or with the final student of a run, or of a model directory alone.

    It keeps no teacher but the judge that evaluations ask, and how it writes responses. `sections`: as for `model_recipe`.
    Raises RecipeError for a run without a final student.
    """
    path = source.path if isinstance(source, Run) else source
    if not isinstance(path, Recipe | str | Path):
        raise RecipeError(
            f"the source is of type {type(path).__name__}; it must be a run, a recipe, or the path of one or of a model"
        )
    if not isinstance(model, str | Path | None):
        raise RecipeError(f"model is of type {type(model).__name__}; it must be the path of a model directory")
    if isinstance(path, Recipe):
        recipe = config.parse(Recipe, config.override(config.dump(path), overrides))
    elif is_model(path):
        recipe = model_recipe(path, ["student.dtype=auto", *overrides], method={"type": "sft"}, **sections)
    elif (path := Path(path)).is_dir():
        run_dir = RunDir(path)
        run_dir.check_started()
        recipe = load_recipe(run_dir.recipe, overrides)
        if model is None and not run_dir.student.is_dir():
            raise RecipeError(f"{path} has no final student yet; name a checkpoint's student with --model")
        model = model or str(run_dir.student)
        try:
            in_memory.check_given(config.flatten({"task": config.dump(recipe.task)}))
        except RecipeError as error:
            raise RecipeError(f"{error}; {run_dir.student}, a model directory, needs none of it") from error
    else:
        recipe = load_recipe(path, overrides)
    rejects = recipe.eval is not None and recipe.eval.reject_below is not None
    teacher, responses = (recipe.teacher, recipe.responses) if rejects else (None, None)
    if responses is not None and not responses.by_teacher:
        responses = None
    unused: dict[str, Any] = {"teachers": {}, "weights": {}, "reference": None, "references": {}}
    recipe = replace(recipe, teacher=teacher, responses=responses, method=SFT(), callbacks=(), **unused)
    if model is None:
        return recipe
    student = replace(
        recipe.student, model=str(model), starts={}, start=None, build=None, tokenizer=None, lora=None, revision=None
    )
    return replace(recipe, student=student)


@contextmanager
def _objects_of(source: object) -> Iterator[None]:
    """Makes the Python objects that a run was given available again."""
    objects = source.given if isinstance(source, Run) else {}
    with in_memory.given(objects), _as_they_were(objects):
        yield


@contextmanager
def _using(recipe: Recipe, quiet: bool) -> Iterator[Console]:
    with _undisturbed(recipe.device), terminable(), Console(quiet=quiet) as console:
        yield console


def evaluate(
    source: Run | Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    model: str | Path | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> EvalSummary:
    """Evaluates the final student of a run, the student of a recipe, or `model`; prints and returns the numbers.

    `source` may also be a model directory, with a task among the overrides, which are keys of the recipe, as in
    "eval.problems=100". `out`: an empty directory for the summary and all samples.
    """
    out = None if out is None else _new_folder(Path(out))
    with _objects_of(source), ExitStack() as opened:
        recipe = load_for_use(source, overrides, model)
        if recipe.eval is None:
            recipe = replace(recipe, eval=Eval())
        found = check(recipe, training=False)
        console = opened.enter_context(_using(recipe, quiet))
        for line in found:
            if "rows_skipped" in line:
                console.warn(line)
        loaded = load_student(recipe)
        started = time.perf_counter()
        with closing(load_teachers(recipe, loaded)) as teachers, sampling_with(recipe, loaded) as engine:
            summary = run.evaluator(recipe, loaded, engine, teachers, Ranks(), out, console)(0)
        _draw_scaling(out)
        show(console, recipe.student.model or "random weights", [summary])
        console.note(f"{time.perf_counter() - started:.1f} s" + (f", samples in {out}" if out is not None else ""))
    return summary


def evaluate_suite(
    source: Run | Recipe | str | Path,
    suite: str,
    *,
    overrides: Sequence[str] = (),
    model: str | Path | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, EvalSummary]:
    """Evaluates on every task of a suite (`eval.suite.read_suite`), loading the model once; prints one table.

    `source`, `model`, `out`: as in `evaluate`. `overrides` are keys of the recipe, or of the suite behind `suite.`, as in
    "suite.tasks.gsm8k.samples_per_prompt=4". Returns the numbers by the names of the tasks.
    """
    out = None if out is None else _new_folder(Path(out))
    prefix = "suite."
    of_suite = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    parts = read_suite(suite, of_suite)
    with _objects_of(source), ExitStack() as opened:
        # the recipe's own task is not evaluated; the smallest takes its place where there is none
        sections = {"task": {"type": "arithmetic"}} if is_model(source) else {}
        others = [text for text in overrides if not text.startswith(prefix)]
        base = load_for_use(source, others, model, **sections)
        recipes = {
            name: replace(
                base,
                task=part.task,
                eval_task=None,
                eval=Eval(
                    split=part.split,
                    problems=part.problems,
                    samples_per_prompt=part.samples_per_prompt,
                    sampling=part.sampling,
                ),
                train=replace(base.train, stop_at=None),
            )
            for name, part in parts.items()
        }
        found = {name: check(recipe, training=False) for name, recipe in recipes.items()}
        longest = max(recipes.values(), key=lambda recipe: cast(Eval, recipe.eval).sampling.max_new_tokens)  # type: ignore[union-attr]
        console = opened.enter_context(_using(base, quiet))
        for name, lines in found.items():
            for line in lines:
                if "rows_skipped" in line:
                    console.warn(f"{name}: {line}")
        loaded = load_student(longest)
        started = time.perf_counter()
        summaries = {}
        with closing(load_teachers(longest, loaded)) as teachers, sampling_with(longest, loaded) as engine:
            for name, recipe in recipes.items():
                console.note(f"{name}: {recipe.task.name}")
                folder = None if out is None else out / name
                summaries[name] = run.evaluator(recipe, loaded, engine, teachers, Ranks(), folder, console)(0)
                _draw_scaling(folder)
        show_suite(console, f"{base.student.model or 'random weights'}, suite {suite}", summaries)
        console.note(f"{time.perf_counter() - started:.1f} s" + (f", samples in {out}" if out is not None else ""))
    return summaries


def _draw_scaling(folder: Path | None) -> None:
    """Draws scaling_samples.svg and scaling_tokens.svg beside an evaluation that has several samples of each problem."""
    if folder is not None:
        for chart in scaling_charts(read_baseline(folder)):
            svg.save(chart, folder / f"scaling_{chart.point}s.svg")


def show_suite(console: Console, title: str, summaries: Mapping[str, EvalSummary]) -> None:
    """Prints a table of several evaluations, each with the sampling that it was made with."""
    rows = []
    for name, one in summaries.items():
        num = one.samples_per_prompt
        drawn = one.sampling
        said = [f"T {drawn['temperature']:g}" if drawn["temperature"] else "greedy"]
        said += [
            f"{key} {drawn[key]:g}" for key, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)) if drawn[key] != off
        ]
        said.append(f"at most {drawn['max_new_tokens']:,} tokens")
        main = [
            f"{key} {interval(key, one.metrics.get(key))}"
            for key in dict.fromkeys((f"avg@{num}", f"pass@{num}", f"maj@{num}"))
        ]
        also = [
            f"{key.partition('/')[2]} {interval(key, item)}"
            for key, item in one.metrics.items()
            if key.startswith("score/")
        ]
        lengths = [interval(key, one.metrics.get(key)) for key in ("mean_tokens", "truncated")]
        shown = main if num > 1 else main[:1]
        rows.append([name, f"{one.num_problems:,}", "\n".join([*shown, *also]), *lengths, ", ".join(said)])
    columns = ["task", "problems", "score, with 95 % intervals over problems", "tokens", "cut off", "sampling"]
    console.table(title, columns, rows)


def _new_folder(path: Path) -> Path:
    """The directory of `--out`. Raises RecipeError where it cannot be written or has something in it."""
    check_writable(path, "--out")
    if path.is_dir() and any(path.iterdir()):
        raise RecipeError(f"--out {path} exists and is not empty; choose another directory")
    return path


def sample(
    source: Run | Recipe | str | Path,
    prompts: Sequence[str] = (),
    *,
    overrides: Sequence[str] = (),
    model: str | Path | None = None,
    num: int = 4,
    split: str = "train",
    num_samples: int = 1,
    quiet: bool = False,
) -> list[Sample]:
    """Returns `num_samples` responses to each of `prompts`, or to each of the first `num` prompts of a split.

    `source`, `overrides`, `model`: as in `evaluate`. A sample's `text` is the response.
    """
    if split not in get_args(Split):
        raise RecipeError(f"--split is {split!r}; it must be one of {', '.join(get_args(Split))}")
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise RecipeError(f"prompts is {brief(prompts)}; it must be a list of strings")
    for name, number in (("num", num), ("num_samples", num_samples)):
        if not isinstance(number, int) or number < 1:
            raise RecipeError(f"{name} is {brief(number)}; it must be a whole number from 1 on")
    with _objects_of(source), ExitStack() as opened:
        # prompts of the user's own need no task, whose place the smallest takes
        alone = bool(prompts) and is_model(source)
        recipe = load_for_use(source, overrides, model, **({"task": {"type": "arithmetic"}} if alone else {}))
        # nothing is evaluated, so nothing waits for an evaluation either
        recipe = replace(recipe, eval=None, eval_task=None, train=replace(recipe.train, stop_at=None))
        check(recipe, training=False)
        chosen, environment_of = list(islice(recipe.task.prompts(cast(Split, split)), num)), recipe.task.environment
        console = opened.enter_context(_using(recipe, quiet))
        loaded = load_student(recipe)
        if prompts:
            # in the form that the task's prompts have, or that the model was trained on
            is_chat = next(iter(recipe.task.prompts(recipe.task.first_split))).messages is not None
            is_chat, environment_of = bool(loaded.renderer.tokenizer.chat_template) if alone else is_chat, single_turn
            chosen = [
                Prompt(f"cli/{text}", messages=({"role": "user", "content": text},))
                if is_chat
                else Prompt(f"cli/{text}", text=text)
                for text in prompts
            ]
        rendered = [loaded.renderer.start(prompt) for prompt in chosen]
        requests = [
            Request(prompt, index, ids)
            for prompt, ids in zip(_distinct(chosen), rendered, strict=True)
            for index in range(num_samples)
        ]
        samples: list[Sample] = []
        with sampling_with(recipe, loaded) as engine, console.progress("sample", len(requests)) as advance:
            for start in range(0, len(requests), BLOCK_REQUESTS):
                block = requests[start : start + BLOCK_REQUESTS]
                parts = (engine, loaded.renderer, environment_of)
                samples += play(*parts, block, recipe.sampling, step=0, stream="sample/cli")
                advance(len(block))
    return samples


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Makes the ids of repeated prompts distinct: draws are keyed by id, so they would get the same samples."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        seen[prompt.id] += 1
        count = seen[prompt.id]
        found.append(prompt if count == 1 else replace(prompt, id=f"{prompt.id}~{count}"))
    return found
