"""A training run from its recipe to its student: started or resumed, and finished."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from understudy import config, given
from understudy.engines import Engine
from understudy.errors import CheckpointError, DataError, RecipeError, UnderstudyError
from understudy.eval.evaluate import Rejection, run_eval
from understudy.eval.summary import EvalSummary, read_summaries
from understudy.export import data_facts, export_student, installed, write_facts
from understudy.files import locked, write_atomically
from understudy.lazy import Tensor, nn, torch
from understudy.models import num_positions, save_hf
from understudy.models.parallel import can_slice, shard, shards_of, without_weights
from understudy.recipe import Recipe, check_same_recipe, doctor
from understudy.recipe.checks import Files, Finding, Parts, of_stage
from understudy.recipe.load import (
    Loaded,
    Teachers,
    choose_device,
    eval_prompts,
    load_student,
    load_teachers,
    open_engine,
    open_store,
    prompt_limit,
    read_environment_files,
    read_intakes,
    read_models,
)
from understudy.recipe.schema import may_change
from understudy.recipe.tokenizers import Tokenizers
from understudy.report.page import write_report
from understudy.tasks.renderer import now
from understudy.teachers.base import hash_facts
from understudy.text import plain_tree, printable
from understudy.trainer.alarms import Alarms
from understudy.trainer.checkpoint import (
    STUDENT,
    Progress,
    RunDir,
    check_same_inputs,
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_teacher_state,
)
from understudy.trainer.collect import Collector
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.loggers import JsonLines, make_loggers
from understudy.trainer.loop import Ending, Trainer
from understudy.trainer.observe import Observer, why_not_learnt
from understudy.trainer.overlap import Overlapped
from understudy.trainer.rollouts import PromptStream, Rollouts
from understudy.trainer.tokens import TokenRecorder
from understudy.trainer.update import Optimizer
from understudy.types import Prompt


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    recipe: Recipe = field(repr=False)
    run_dir: RunDir = field(repr=False)
    ending: Ending
    summaries: tuple[EvalSummary, ...] = field(repr=False)
    """The evaluations of the run, by step; those before a resume too."""
    report: Path | None
    """A page that works offline; None on other ranks than the first, and for a run that a signal stopped."""
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Loaded models, rows and functions of the program that started it, by their names in the recipe."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.run_dir.path

    @property
    def student(self) -> Path:
        """The final student with its tokenizer, as `from_pretrained` loads it; not there where a signal ended the run."""
        return self.run_dir.student

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The numbers of every step, those of earlier processes of the run too; NaN where one was not finite."""
        return _read_metrics(self.run_dir)


def _read_metrics(run_dir: RunDir) -> list[dict[str, float]]:
    lines = (run_dir.path / "metrics.jsonl").read_text().splitlines()
    rows = [{name: value for name, value in json.loads(line).items() if name != "nonfinite"} for line in lines]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def train(recipe: Recipe, *, resume: bool = False, examine: bool = True, console: Console) -> Run:
    """Runs a recipe. Nothing is written before everything is checked and loaded; `examine`: by the doctor too.

    No other process trains in the run directory meanwhile. Raises RecipeError, DataError or VocabularyError for bad input,
    CheckpointError when the run cannot be saved or resumed, TrainingError when it cannot go on.
    """
    if recipe.launcher is not None:
        raise RecipeError("launcher starts commands, which only `understudy train` does; remove it, or use the command")
    run_dir = RunDir(Path(recipe.run_dir))
    if resume:
        run_dir.check_started()
    with ExitStack() as entered:
        # the other ranks write nothing
        if Ranks.announced() == 0:
            run_dir.check_kept = entered.enter_context(locked(run_dir.path, "run_dir", console.warn))
        return _train(recipe, run_dir, resume, examine, console)


def _train(recipe: Recipe, run_dir: RunDir, resume: bool, examine: bool, console: Console) -> Run:
    """`train` in a directory that is locked."""
    # None for a new run, and for one that was killed before its first checkpoint
    checkpoint = None
    if resume:
        recipe = resumed_recipe(recipe, run_dir)
        checkpoint = find_checkpoint(run_dir.checkpoints)
    else:
        run_dir.check_new()
    files = Files(recipe)
    found = [item for check in of_stage("files") for item in check(files)]
    ranks = Ranks.from_environment(partial(choose_device, recipe.device))
    if recipe.parallel is not None:
        recipe.parallel.check(ranks.world)
    # one clock for everything that renders, on every rank
    files.recipe = recipe = recipe.dated(ranks.gather(now())[0])
    if examine:
        found += ranks.gather(doctor.attempt_all("room", files) if ranks.is_main else [])[0]
        doctor.refuse(found)
    teachers = [f"{label} ({section.shown})" for label, section in recipe.all_teachers.items()]
    console.note("loading " + " and ".join([f"the student ({recipe.student.model or 'from scratch'})", *teachers]))
    with ExitStack() as opened:
        parts = assemble(files, run_dir, checkpoint, ranks, console, opened)
        found += doctor.examine_parts(parts) if examine else []
        doctor.refuse(found)
        if recipe.is_sharded:
            _shard(parts, checkpoint)
        # from here on the run directory is written
        _open_run_dir(parts, checkpoint, resume, console)
        if ranks.is_main:
            _write_findings(parts, found, checkpoint, examine, console)
        try:
            ending = _run_and_export(parts, files.tokenizers, console)
        finally:
            parts.trainer.observer.close()
    # whoever stops a run wants to leave now; `understudy report` makes one
    report = write_report(run_dir.path) if ranks.is_main and ending != "stopped by a signal" else None
    observer = parts.trainer.observer
    ended = Run(recipe, run_dir, ending, tuple(observer.summaries), report)
    for callback in observer.callbacks:
        callback.on_end(ended)
    return ended


def _open_run_dir(parts: Parts, checkpoint: Path | None, resume: bool, console: Console) -> None:
    """Opens the files of the run, and takes up what an earlier process wrote there."""
    recipe, trainer = parts.recipe, parts.trainer
    run_dir, ranks, step = trainer.run_dir, trainer.ranks, trainer.progress.step
    missing = [] if checkpoint is None or not ranks.is_main else run_dir.check_files(checkpoint)
    trainer.observer = observer = _observer(recipe, run_dir, checkpoint, trainer.progress, ranks, console)
    if missing:
        observer.warn(step, f"missing since an earlier process wrote them: {', '.join(missing)}")
    # those of the run until here; every rank has to know which were made
    observer.summaries += ranks.gather(read_summaries(run_dir.eval) if resume and ranks.is_main else [])[0]
    if resume and ranks.is_main:
        observer.alarms.replay(run_dir.path / "metrics.jsonl", observer.summaries)
    if recipe.train.records_tokens:
        tokenizer = trainer.rollouts.collector.renderer.tokenizer
        trainer.tokens = TokenRecorder(run_dir.tokens, recipe.train, tokenizer, ranks)


def _write_findings(
    parts: Parts, found: list[Finding], checkpoint: Path | None, examine: bool, console: Console
) -> None:
    """Says and writes what the checks found, those of the stage "advice" too."""
    trainer = parts.trainer
    # a resumed run has said it
    warn = partial(trainer.observer.warn, trainer.progress.step) if checkpoint is None else console.warn
    found = doctor.each_once([*found, *doctor.attempt_all("advice", parts)])
    doctor.warn_of(found, warn)
    for item in found:
        # few rows are no warning, and are said all the same
        if item.level == "ok" and "rows_skipped" in item.found:
            console.note(item.found)
    if examine:
        console.note(f"doctor: {doctor.count_fine(found)}")
        doctor.write_findings(trainer.run_dir.doctor, found)


def _run_and_export(parts: Parts, tokenizers: Tokenizers, console: Console) -> Ending:
    """Trains to the end, exports the student, and writes in run.json what became of the run, an error too."""
    recipe, trainer = parts.recipe, parts.trainer
    run_dir, ranks = trainer.run_dir, trainer.ranks
    facts: dict[str, Any] = {"started": time.time()} | (data_facts(parts) if ranks.is_main else {})
    try:
        if ranks.is_main:
            write_facts(parts, run_dir, "running", facts)
        with ranks.together():
            ending = trainer.run()
        if ending == "finished":
            rows = _read_metrics(run_dir) if ranks.is_main else []
            # every rank ends with the same exit code
            if reason := ranks.gather(why_not_learnt(trainer.progress.updates, rows))[0]:
                ending = "did not learn"
                facts["error"] = reason
                trainer.observer.warn(trainer.progress.step, reason)
        if ranks.is_main and ending != "stopped by a signal":
            if recipe.is_sharded:
                # the checkpoint of the last step, for this rank has a part of the student only
                saved = checkpoint_path(run_dir.checkpoints, trainer.progress.step) / STUDENT
                parts.loaded = load_student(recipe, resume_from=saved, tokenizers=tokenizers)
            export_student(parts, run_dir)
        if ranks.is_main:
            write_facts(parts, run_dir, ending, facts)
    except BaseException as error:
        if ranks.is_main:
            # whatever cannot be written now must not hide what went wrong
            try:
                run_dir.check_kept()
                said = str(error) if isinstance(error, UnderstudyError) else f"{type(error).__name__}: {error}"
                write_facts(parts, run_dir, "failed", facts | {"error": printable(said)})
            except CheckpointError as problem:
                console.warn(f"what became of the run is not in {run_dir.facts}: {problem}")
        raise
    return ending


def resumed_recipe(recipe: Recipe, run_dir: RunDir) -> Recipe:
    """The recipe with the clock of the run that it continues. Raises RecipeError where there is none, or it had another."""
    run_dir.check_started()
    saved = config.parse(Recipe, config.read_yaml(run_dir.recipe))
    check_same_recipe(saved, recipe)
    return recipe.dated(saved.student.template_date)


def assemble(
    files: Files, run_dir: RunDir, checkpoint: Path | None, ranks: Ranks, console: Console, opened: ExitStack
) -> Parts:
    """Loads everything and puts it together, ready for the next step. The caller closes what is `opened`.

    Raises RecipeError, DataError and VocabularyError for what does not fit.
    """
    recipe = files.recipe
    progress = Progress() if checkpoint is None else load_checkpoint(checkpoint)
    inputs = _read_inputs(recipe, files.tokenizers.student)
    if checkpoint is not None:
        check_same_inputs(progress.inputs, inputs)
        if inputs and not progress.inputs:
            console.warn(f"{checkpoint} does not say which data it was made with, so it was not compared with today's")
    resume_from = None if checkpoint is None else checkpoint / STUDENT
    loaded = load_student(recipe, resume_from=resume_from, tokenizers=files.tokenizers)
    optimizer = Optimizer(loaded.model, recipe.train)
    # of shards it is loaded when they are there
    if checkpoint is not None and not recipe.is_sharded:
        optimizer.load(load_optimizer(checkpoint, dict(loaded.model.named_parameters())))
    teachers = load_teachers(recipe, loaded)
    opened.callback(teachers.close)
    # the first rank reads the files for all
    read = ranks.gather(read_models(recipe, teachers) if ranks.is_main else {})[0]
    if checkpoint is not None:
        check_same_inputs(progress.inputs, read)
        for place in sorted(progress.inputs.keys() - inputs.keys() - read.keys()):
            console.warn(f"{place} was not compared with what {checkpoint} was made with: nothing is known of it now")
    progress = replace(progress, inputs=inputs | read)
    if teachers.teacher is not None and checkpoint is not None:
        teachers.teacher.load_state(load_teacher_state(checkpoint))
    publish = open_engine(recipe, loaded, ranks, progress.updates, opened)
    engine = publish.engine
    rollouts = _open_rollouts(recipe, loaded, teachers, engine, ranks)
    # raises here, before anything is written, where no prompt fits
    rollouts.prompts.draw(progress.position, 1)
    if recipe.eval is not None:
        # so would an evaluation, but later
        held_out = eval_prompts(recipe)
        limit = prompt_limit(recipe, recipe.eval.sampling or recipe.sampling, [num_positions(loaded.model)], engine)
        if not any(len(loaded.renderer.start(prompt)) <= limit for prompt in held_out):
            raise DataError(
                f"all {len(held_out)} evaluation prompts are longer than {limit} tokens; raise train.max_prompt_tokens"
            )
    collected: Rollouts | Overlapped = rollouts
    if recipe.async_ is not None:
        collected = Overlapped(rollouts, recipe.run_method, recipe.async_, grouped=recipe.engine.grouped)
    opened.callback(collected.close)
    eval_dir = run_dir.eval if ranks.is_main else None
    trainer = Trainer(
        student=loaded,
        method=recipe.run_method,
        rollouts=collected,
        publish=publish,
        several_teachers=bool(recipe.teachers) and not recipe.weights,
        optimizer=optimizer,
        settings=recipe.train,
        evaluation=recipe.eval,
        evaluate=evaluator(recipe, loaded, engine, teachers, ranks, eval_dir, console),
        live_weights=publish.weights is None or any(model is loaded.model for model in teachers.models),
        save_student=_saver(loaded.model, loaded),
        observer=Observer(console),
        run_dir=run_dir,
        ranks=ranks,
        seed=recipe.seed,
        progress=progress,
    )
    return Parts(recipe, loaded, teachers, rollouts, trainer)


def _read_inputs(recipe: Recipe, tokenizer: Any) -> dict[str, Mapping[str, Any]]:
    """Fingerprints of the data, the files of environments, the recipe and the chat template, by their names."""
    inputs: dict[str, Mapping[str, Any]] = {name: one.fingerprint for name, one in read_intakes(recipe).items()}
    inputs |= read_environment_files(recipe)
    # a checkpoint of another run; another version may have other keys
    flat = config.flatten(config.dump(recipe))
    # a section that is absent, such as parallel, is one whose keys say nothing
    kept = {key: value for key, value in flat.items() if value is not None and not may_change(key)}
    inputs[f"recipe of understudy {installed().get('understudy')}"] = {
        "source": "recipe.yaml, or what is hidden there",
        "digest": hash_facts([kept]),
    }
    if tokenizer.chat_template and any(part.is_chat for part in recipe.task.places().values()):
        digest = hash_facts([tokenizer.chat_template])
        inputs["chat template"] = {"source": str(tokenizer.name_or_path), "digest": digest}
    return inputs


def _open_rollouts(recipe: Recipe, loaded: Loaded, teachers: Teachers, engine: Engine, ranks: Ranks) -> Rollouts:
    """The training prompts, and who samples, rewards and scores them."""
    # from here on an engine knows how long its sequences may be
    models = [loaded.model, *teachers.models]
    sizes = [engine.num_positions, *(num_positions(model) for model in models)]
    collector = Collector(
        engine=engine,
        sampling=recipe.sampling,
        renderer=loaded.renderer,
        environment_of=recipe.task.environment,
        teacher=teachers.teacher,
        reference=teachers.reference,
        responses=open_store(recipe, loaded, teachers),
        settings=recipe.train,
        seed=recipe.seed,
        max_tokens=min((size for size in sizes if size is not None), default=None),
    )
    prompts = PromptStream(
        _training_prompts(recipe, teachers),
        loaded.renderer.start,
        seed=recipe.seed,
        max_prompt_tokens=prompt_limit(recipe, recipe.sampling, map(num_positions, models), engine)
        if recipe.uses.own_samples
        else recipe.train.max_prompt_tokens,
    )
    task = recipe.task
    return Rollouts(prompts, collector, teachers.judge, task.reward, ranks, loaded.vocab_size, task.graders)


def _saver(model: nn.Module, loaded: Loaded) -> Callable[[Path, Iterable[tuple[str, Tensor]] | None], None]:
    """Writes the student in the form a resumed run loads, with the weights of `model` or those given."""
    tokenizer, stop_ids = loaded.renderer.tokenizer, loaded.renderer.stop_ids
    return lambda path, weights: save_hf(model, tokenizer, path, merged=False, stop_ids=stop_ids, weights=weights)


def _shard(parts: Parts, checkpoint: Path | None) -> None:
    """Keeps each rank's part of the student and optimizer state. A collective call.

    Raises RecipeError for a checkpoint in 16 bits (`student.dtype: auto`) that would need master weights.
    """
    recipe, loaded = parts.recipe, parts.loaded
    assert recipe.parallel is not None
    trained = [value for value in loaded.model.parameters() if value.requires_grad]
    if recipe.train.master_weights and any(value.element_size() < torch.float32.itemsize for value in trained):
        raise RecipeError(
            f"{recipe.student.model} is in 16 bits, and shards are the master weights; set student.dtype: float32, "
            "parallel.param_dtype: bfloat16 and parallel.reduce_dtype: float32 to compute in 16 bits"
        )
    parts.trainer.save_student = _saver(without_weights(loaded.model), loaded)
    mesh = torch.distributed.device_mesh.init_device_mesh(
        loaded.device.type,
        (recipe.parallel.replicate, recipe.parallel.shard),
        mesh_dim_names=("replicate", "shard"),
    )
    named = recipe.parallel.param_dtype, recipe.parallel.reduce_dtype
    param_dtype, reduce_dtype = (None if name is None else getattr(torch, name) for name in named)
    shard(
        loaded.model,
        mesh,
        reshard=recipe.parallel.reshard,
        whole_gradients=recipe.parallel.gradients == "whole",
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        vocabulary=recipe.parallel.vocabulary,
    )
    # raises here where a rank would have no token
    loaded.head()
    # of a row or of its largest entries a teacher's whole output layer is needed
    sliced = recipe.parallel.vocabulary and not recipe.method.needs & {"topk", "full"}
    if recipe.parallel.teachers:
        for model in parts.teachers.models:
            # the start of a LoRA student is the student
            if shards_of(model) is None:
                shard(model, mesh, vocabulary=sliced and can_slice(model, recipe.parallel.shard, loaded.vocab_size))
    parts.trainer.optimizer = Optimizer(loaded.model, recipe.train)
    if checkpoint is not None:
        parts.trainer.optimizer.load(load_optimizer(checkpoint, dict(loaded.model.named_parameters())))


def _training_prompts(recipe: Recipe, teachers: Teachers) -> Sequence[Prompt]:
    """The task's, or where samples were recorded those of them that have some. Raises DataError where none has."""
    prompts = recipe.task.prompts("train")
    recording = None if teachers.teacher is None else teachers.teacher.recording
    if recording is None:
        return prompts
    known = set(recording.prompt_ids)
    found = []
    for prompt in prompts:
        if prompt.id in known:
            known.discard(prompt.id)
            found.append(prompt)
            if not known:
                # a computed task has millions more
                break
    if not found:
        raise DataError(f"none of the prompts of task {recipe.task.name} is among those of {recording.name}")
    return found


def _observer(
    recipe: Recipe, run_dir: RunDir, checkpoint: Path | None, progress: Progress, ranks: Ranks, console: Console
) -> Observer:
    if not ranks.is_main:
        return Observer(console)
    plain = config.dump(recipe)
    resume_step = None
    if run_dir.recipe.is_file():
        resume_step = progress.step
        run_dir.drop_after(progress.step if checkpoint is not None else -1)
    write_atomically(run_dir.recipe, config.write_yaml(plain_tree(plain)))
    loggers = make_loggers(run_dir.path, recipe.loggers, plain, resume_step=resume_step, warn=console.warn)
    names = ["events", *(["pictures"] if recipe.train.records_tokens else []), *(["consumed"] if recipe.async_ else [])]
    files = {name: JsonLines(run_dir.path / f"{name}.jsonl") for name in names}
    if resume_step is not None:
        for lines in files.values():
            lines.truncate_after(resume_step)
    callbacks = [given.find(name) for name in recipe.callbacks]
    return Observer(console, loggers, files, callbacks, Alarms(recipe.train.on_alarm))


def evaluator(
    recipe: Recipe,
    loaded: Loaded,
    engine: Engine,
    teachers: Teachers,
    ranks: Ranks,
    out_dir: Path | None,
    console: Console,
) -> Callable[[int], EvalSummary]:
    """A function that evaluates the engine's weights at a step as the section `eval` says, and saves what it finds."""

    # read once: a file that changes during the run must not change its evaluations
    prompts = () if recipe.eval is None else eval_prompts(recipe)

    def evaluate(step: int) -> EvalSummary:
        assert recipe.eval is not None
        settings, rejection = recipe.eval, None
        sampling = settings.sampling or recipe.sampling
        if settings.reject_below is not None and teachers.judge is not None:
            judge = partial(teachers.judge.judge, steps=settings.on_reject != "resample")
            respond = None
            if teachers.responder is not None:
                respond = partial(
                    teachers.responder.respond,
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                )
            rejection = Rejection(
                lambda samples: ranks.share(samples, judge),
                settings.reject_below,
                settings.max_attempts,
                settings.on_reject,
                None if respond is None else lambda prompts: ranks.share(prompts, respond),
                None if recipe.responses is None else recipe.responses.continue_template,
            )
        answer = None
        if settings.teacher and step == 0 and teachers.responder is not None:
            write = partial(
                teachers.responder.respond, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature
            )
            answer = partial(ranks.share, work=write)
        with console.progress("evaluate", len(prompts) * settings.samples_per_prompt) as advance:
            return run_eval(
                prompts=prompts,
                task=recipe.held_out,
                renderer=loaded.renderer,
                engine=engine,
                share=ranks.share,
                sampling=sampling,
                samples_per_prompt=settings.samples_per_prompt,
                step=step,
                split=settings.split,
                out_dir=out_dir,
                max_prompt_tokens=prompt_limit(recipe, sampling, [num_positions(loaded.model)], engine),
                progress=advance,
                greedy=settings.greedy,
                rejection=rejection,
                answer=answer,
            )

    return evaluate
