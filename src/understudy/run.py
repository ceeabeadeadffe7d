"""A training run from its recipe to its student: started or resumed, and finished."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from understudy import config, facts
from understudy.card import model_card
from understudy.engines import VLLM, Engine
from understudy.errors import CheckpointError, DataError, RecipeError
from understudy.eval.evaluate import Rejection, run_eval
from understudy.eval.summary import EvalSummary
from understudy.files import write_atomically, write_json
from understudy.methods import Method
from understudy.models import num_positions, row_style, save_hf
from understudy.recipe import Recipe, check_same_recipe, doctor, load
from understudy.recipe.engine import open_engine, to_compare
from understudy.recipe.judges import Judges, load_judges, open_store
from understudy.report import write_report
from understudy.tasks import Arithmetic, num_repeated, overlap, overlap_message
from understudy.teachers import Judge, StoredTeacher
from understudy.trainer.checkpoint import (
    STUDENT,
    Progress,
    find_checkpoint,
    load_checkpoint,
    load_teacher_state,
    sync_tree,
)
from understudy.trainer.collect import TOKEN_SCORES, Collector
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks, SharedEngine
from understudy.trainer.loggers import JsonLines, make_loggers
from understudy.trainer.loop import Ending, Trainer
from understudy.trainer.observe import Observer, peak_memory_gib
from understudy.trainer.optimizer import Optimizer
from understudy.trainer.overlap import Overlapped
from understudy.trainer.prompts import PromptStream
from understudy.trainer.publish import Publisher
from understudy.trainer.rewards import Rewarder
from understudy.trainer.rollouts import Rollouts
from understudy.trainer.rundir import RunDir
from understudy.trainer.update import StudentModel
from understudy.types import Prompt, Sampling

ENDS_ON_POLICY = 0.05
"""Of a teacher's response in a prefix: less is a token or two."""
MAX_COMPARED = 200_000
"""Training prompts that are compared with the evaluation's: computed tasks have millions."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_dir: RunDir
    ending: Ending
    summaries: tuple[EvalSummary, ...]
    """Of this process, by step."""
    report: Path | None


def train(recipe: Recipe, *, resume: bool = False, examine: bool = True, console: Console) -> Result:
    """Runs a recipe. Nothing is written before everything is checked and loaded; `examine`: and the doctor has seen it.

    Raises RecipeError, DataError or VocabularyError for bad input, CheckpointError when the run cannot be saved or
    resumed, TrainingError when it cannot go on.
    """
    run_dir = RunDir(Path(recipe.run_dir))
    checkpoint = _find_start(run_dir, recipe, resume)
    load.check(recipe, fetch=True)
    device = load.choose_device(recipe.device)
    ranks = Ranks.from_environment(device)
    if ranks.world > 1 and isinstance(recipe.engine, VLLM) and recipe.engine.launch is not None:
        raise RecipeError(
            "rollout.launch starts servers for one rank alone; with several ranks start them yourself and give rollout.url"
        )
    if examine:
        doctor.refuse(ranks.gather(doctor.before_loading(recipe) if ranks.is_main else [])[0])
    console.note("loading " + " and ".join(_models(recipe)))
    with ExitStack() as opened:
        trainer, loaded = _build(recipe, run_dir, checkpoint, ranks, console, device, opened)
        opened.callback(trainer.rollouts.close)
        found = _examine(recipe, loaded, trainer, console) if examine else []
        _observe(recipe, checkpoint, trainer, loaded, console)
        if ranks.is_main and examine:
            doctor.write_findings(run_dir.doctor, found)
        started = time.time()
        status: str = "failed"
        try:
            ending = trainer.run()
            status = ending
            if ranks.is_main and ending != "stopped by a signal":
                _export(recipe, run_dir, loaded, trainer)
        finally:
            if ranks.is_main:
                _write_facts(recipe, run_dir, loaded, trainer.progress, status, started)
            trainer.observer.close()
    report = write_report(run_dir.path) if ranks.is_main else None
    return Result(run_dir, ending, tuple(trainer.observer.summaries), report)


def _find_start(run_dir: RunDir, recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to go on from; None for a new run, and for one that was killed before its first checkpoint."""
    if not resume:
        run_dir.check_new()
        return None
    run_dir.check_started()
    check_same_recipe(config.parse(Recipe, config.read_yaml(run_dir.recipe)), recipe)
    return find_checkpoint(run_dir.checkpoints)


def _models(recipe: Recipe) -> list[str]:
    names = [f"the student ({recipe.student.model or 'from scratch'})"]
    return [*names, *(f"{label} ({section.shown})" for label, section in recipe.judges.items())]


def _build(
    recipe: Recipe,
    run_dir: RunDir,
    checkpoint: Path | None,
    ranks: Ranks,
    console: Console,
    device: torch.device,
    opened: ExitStack,
) -> tuple[Trainer, load.Loaded]:
    """What is `opened` is closed by the caller, also where this fails."""
    progress, state = (Progress(), {}) if checkpoint is None else load_checkpoint(checkpoint, device)
    loaded = load.load_student(recipe, resume_from=None if checkpoint is None else checkpoint / STUDENT)
    optimizer = Optimizer(loaded.model, recipe.train)
    optimizer.load(state)
    judges = load_judges(recipe, loaded)
    opened.callback(judges.close)
    if judges.teacher is not None and checkpoint is not None:
        judges.teacher.load_state(load_teacher_state(checkpoint))
    models = [loaded.model, *judges.models]
    method = recipe.run_method
    samples_own = any(part.plan(0).on_policy_share > 0 for part in method.members)
    engine, weights = open_engine(recipe, loaded)
    opened.callback(engine.close)
    student = _in_training(recipe, loaded, samples_own)
    publish = Publisher(engine, student, weights, ranks, to_compare(recipe, loaded) if engine.remote else ())
    publish(progress.updates, ())
    # from here on an engine knows how long its sequences may be
    limit = prompt_limit(recipe, recipe.sampling, engine, *models) if samples_own else recipe.train.max_prompt_tokens
    collector = _collector(recipe, loaded, judges, engine)
    prompts = PromptStream(
        _training_prompts(recipe, judges),
        loaded.renderer.start,
        seed=recipe.seed,
        max_prompt_tokens=limit,
    )
    prompts.draw(progress.position, 1)
    _check_eval_prompts(recipe, loaded, engine)
    rollouts = Rollouts(
        prompts=prompts,
        collector=collector,
        rewarder=Rewarder(collector, judges.judge, recipe.task.grade, ranks, loaded.vocab_size),
        ranks=ranks,
        settings=recipe.train,
    )
    collected = rollouts if recipe.async_ is None else _overlapped(recipe, rollouts, method)
    trainer = Trainer(
        student=student,
        method=method,
        rollouts=collected,
        publish=publish,
        several_teachers=judges.several,
        optimizer=optimizer,
        settings=recipe.train,
        evaluation=recipe.eval,
        evaluate=evaluator(
            recipe, loaded, engine, judges.judge, ranks, run_dir.eval if ranks.is_main else None, console
        ),
        save_student=lambda path: save_hf(loaded.model, loaded.renderer.tokenizer, path, merged=False),
        observer=Observer(console, (), None),
        run_dir=run_dir,
        ranks=ranks,
        seed=recipe.seed,
        progress=progress,
    )
    return trainer, loaded


def _in_training(recipe: Recipe, loaded: load.Loaded, samples_own: bool) -> StudentModel:
    return StudentModel(
        model=loaded.model,
        device=loaded.device,
        vocab_size=loaded.vocab_size,
        # imitation knows no rollout temperature
        temperature=(recipe.sampling.temperature or 1.0)
        if samples_own or recipe.run_method.needs & TOKEN_SCORES
        else 1.0,
        compute_dtype=loaded.compute_dtype,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        style=row_style(loaded.model),
    )


def _examine(recipe: Recipe, loaded: load.Loaded, trainer: Trainer, console: Console) -> list[doctor.Finding]:
    """What the doctor finds. Raises RecipeError for an error."""
    found = doctor.examine_parts(recipe, loaded, doctor.judges_of(trainer), trainer)
    doctor.refuse(found)
    doctor.show_briefly(console, found)
    return found


def _observe(recipe: Recipe, checkpoint: Path | None, trainer: Trainer, loaded: load.Loaded, console: Console) -> None:
    """From here on the run directory is written."""
    progress, ranks = trainer.progress, trainer.ranks
    warnings = [*loaded.warnings, *_data_warnings(recipe), *_schedule_warnings(recipe)]
    trainer.observer = _observer(recipe, trainer.run_dir, checkpoint, progress, ranks, console)
    for text in warnings if ranks.is_main and checkpoint is None else ():
        trainer.observer.warn(progress.step, text)


def _overlapped(recipe: Recipe, rollouts: Rollouts, method: Method) -> Overlapped:
    """Raises RecipeError where something that scores would run on weights that are being updated."""
    assert recipe.async_ is not None
    for name, one in (("teacher", rollouts.collector.teacher), ("reference", rollouts.collector.reference)):
        if one is not None and not one.apart:
            raise RecipeError(
                f"async has the {name} score beside the update, but it runs on the student's own weights or follows them; "
                f"give the {name} a model of its own, or remove the section async"
            )
    grouped = isinstance(recipe.engine, VLLM) and recipe.engine.grouped
    return Overlapped(rollouts, method, recipe.async_, grouped=grouped)


def prompt_limit(recipe: Recipe, sampling: Sampling, engine: Engine, *models: nn.Module) -> int:
    """`load.prompt_limit`, and what the engine takes. Raises RecipeError where no room is left."""
    limit, room = load.prompt_limit(recipe, sampling, *models), engine.num_positions
    if room is not None and room - sampling.max_new_tokens < 1:
        raise RecipeError(
            f"max_new_tokens is {sampling.max_new_tokens}, but the rollout engine takes {room} tokens in all "
            "(--max-model-len): no prompt fits before the response; lower it, or start the engine with more"
        )
    return limit if room is None else min(limit, room - sampling.max_new_tokens)


def _collector(recipe: Recipe, loaded: load.Loaded, judges: Judges, engine: Engine) -> Collector:
    sizes = [engine.num_positions, *(num_positions(model) for model in (loaded.model, *judges.models))]
    return Collector(
        engine=engine,
        sampling=recipe.sampling,
        renderer=loaded.renderer,
        teacher=judges.teacher,
        reference=judges.reference,
        responses=open_store(recipe, loaded, judges),
        settings=recipe.train,
        seed=recipe.seed,
        max_tokens=min((size for size in sizes if size is not None), default=None),
    )


def _training_prompts(recipe: Recipe, judges: Judges) -> Sequence[Prompt]:
    """The task's, or where samples were stored those of them that have some. Raises DataError where none has."""
    prompts = recipe.task.prompts("train")
    if not isinstance(judges.teacher, StoredTeacher):
        return prompts
    known = set(judges.teacher.prompt_ids)
    found = []
    for prompt in prompts:
        if prompt.id in known:
            known.discard(prompt.id)
            found.append(prompt)
            if not known:
                # a computed task has millions more
                break
    if not found:
        raise DataError(f"none of the prompts of task {recipe.task.name} is among those of {judges.teacher.name}")
    return found


def _check_eval_prompts(recipe: Recipe, loaded: load.Loaded, engine: Engine) -> None:
    """Raises before anything is written what an evaluation would raise later."""
    if recipe.eval is None:
        return
    limit = prompt_limit(recipe, recipe.eval.sampling or recipe.sampling, engine, loaded.model)
    prompts = load.eval_prompts(recipe)
    lengths = (len(loaded.renderer.start(prompt)) for prompt in prompts)
    if not any(length <= limit for length in lengths):
        raise DataError(
            f"all {len(prompts)} evaluation prompts are longer than {limit} tokens; raise train.max_prompt_tokens"
        )


def _data_warnings(recipe: Recipe) -> list[str]:
    """What is odd about the data: problems of the evaluation that are trained on, problems that repeat."""
    # the splits of a computed task are disjoint by construction, and millions long
    if recipe.eval is None or (isinstance(recipe.task, Arithmetic) and recipe.eval_task is None):
        return []
    held_out, training = load.eval_prompts(recipe), recipe.task.prompts("train")
    shared = overlap(training, held_out, limit=MAX_COMPARED)
    warnings = [overlap_message(shared, len(held_out))] if shared else []
    repeated = num_repeated(held_out)
    return [*warnings, f"{repeated} evaluation prompts repeat an earlier one"] if repeated else warnings


def _schedule_warnings(recipe: Recipe) -> list[str]:
    share = recipe.run_method.plan(recipe.train.steps - 1).prefix_share
    if share < ENDS_ON_POLICY:
        return []
    return [
        f"samples still begin with {share:.0%} of a teacher's response at the last step, so training does not end on the "
        "student's own; lower method.anneal_steps or raise train.steps"
    ]


def _observer(
    recipe: Recipe, run_dir: RunDir, checkpoint: Path | None, progress: Progress, ranks: Ranks, console: Console
) -> Observer:
    if not ranks.is_main:
        return Observer(console, (), None)
    plain = config.dump(recipe)
    resume_step = None
    if run_dir.recipe.is_file():
        resume_step = progress.step
        run_dir.drop_after(progress.step if checkpoint is not None else -1)
    write_atomically(run_dir.recipe, config.write_yaml(plain))
    loggers = make_loggers(run_dir.path, recipe.loggers, plain, resume_step=resume_step, warn=console.warn)
    events = JsonLines(run_dir.path / "events.jsonl")
    consumed = None if recipe.async_ is None else JsonLines(run_dir.path / "consumed.jsonl")
    if resume_step is not None:
        for lines in (events, consumed):
            if lines is not None:
                lines.truncate_after(progress.step)
    return Observer(console, loggers, events, consumed)


def evaluator(
    recipe: Recipe,
    loaded: load.Loaded,
    engine: Engine,
    judge: Judge | None,
    ranks: Ranks,
    out_dir: Path | None,
    console: Console,
) -> Callable[[int], EvalSummary]:
    """A function that evaluates the engine's weights at a step as the section `eval` says, and saves what it finds."""
    settings = recipe.eval
    shared = SharedEngine(engine, ranks)

    def evaluate(step: int) -> EvalSummary:
        assert settings is not None
        prompts = load.eval_prompts(recipe)
        with console.progress("evaluate", len(prompts) * settings.samples_per_prompt) as advance:
            done = 0

            def show(count: int, total: int) -> None:
                nonlocal done
                advance(count - done)
                done = count

            return run_eval(
                prompts=prompts,
                task=recipe.held_out,
                renderer=loaded.renderer,
                engine=shared,
                sampling=settings.sampling or recipe.sampling,
                samples_per_prompt=settings.samples_per_prompt,
                step=step,
                split=settings.split,
                out_dir=out_dir,
                max_prompt_tokens=prompt_limit(recipe, settings.sampling or recipe.sampling, engine, loaded.model),
                progress=show,
                greedy=settings.greedy,
                rejection=None
                if settings.reject_below is None or judge is None
                else Rejection(
                    lambda samples: ranks.share(samples, judge.judge), settings.reject_below, settings.max_attempts
                ),
            )

    return evaluate


def _export(recipe: Recipe, run_dir: RunDir, loaded: load.Loaded, trainer: Trainer) -> None:
    """The final student and its card."""
    lora = recipe.student.lora
    merged = lora is None or lora.save == "merged"
    aside = run_dir.path / ".writing-student"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        save_hf(loaded.model, loaded.renderer.tokenizer, aside, merged=merged)
        (aside / "README.md").write_text(
            model_card(recipe, trainer.progress, trainer.observer.summaries), encoding="utf-8"
        )
        sync_tree(aside)
        shutil.rmtree(run_dir.student, ignore_errors=True)
        aside.rename(run_dir.student)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {run_dir.student}: {error}; free space, then finish with --resume"
        ) from error


def _write_facts(
    recipe: Recipe, run_dir: RunDir, loaded: load.Loaded, progress: Progress, status: str, started: float
) -> None:
    parameters = list(loaded.model.parameters())
    values: Mapping[str, Any] = {
        "status": status,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": progress.step,
        "updates": progress.updates,
        "samples": progress.num_samples,
        "response_tokens": progress.num_tokens,
        "training_s": round(progress.elapsed_s, 2),
        "student_parameters": sum(value.numel() for value in parameters),
        "trained_parameters": sum(value.numel() for value in parameters if value.requires_grad),
        "vocabulary": loaded.vocab_size,
        "teacher": ", ".join(section.shown for section in recipe.judges.values()) or None,
        "hardware": facts.hardware(loaded.device),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "versions": facts.installed(),
        "commit": facts.commit(),
    }
    write_json(run_dir.facts, values)


__all__ = ["Result", "evaluator", "train"]
