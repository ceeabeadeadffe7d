"""`record`: the student's samples with a teacher's scores; training replays both without the teacher.

Offline on-policy distillation, arXiv 2604.13010. Samples and draws are those of the first step of training, so a student
that takes one step on them takes the step that it would have taken beside the teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from understudy import config
from understudy.environments.play import play
from understudy.errors import DataError, RecipeError
from understudy.files import check_writable, locked, write_atomically
from understudy.lazy import Tensor
from understudy.methods import OPD, TopK
from understudy.models import num_positions
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.checks import check
from understudy.recipe.load import Loaded, load_student, load_teachers, prompt_limit, sampling_with, teacher_setup
from understudy.tasks.renderer import Renderer, now
from understudy.teachers import Teacher
from understudy.teachers.stores.recording import ScoredMeta, recorded, write_scored
from understudy.text import plain_tree
from understudy.trainer.console import Console
from understudy.trainer.rollouts import PromptStream
from understudy.trainer.signals import terminable
from understudy.types import Need, Prompt, Request, Sample, Scores

BLOCK_REQUESTS = 256
"""Samples in one file and between two moves of the progress bar: what an interruption loses at most."""
ORIGIN = "recording.yaml"
DECIDES = ("seed", "student", "teacher", "teachers", "task", "sampling")
"""The keys of a recipe that decide a sample and its scores, kept beside them."""


def record(
    path: Path, overrides: Sequence[str], *, out: Path, prompts: int | None, samples: int | None, k: int | None
) -> str:
    """Returns "finished", or "stopped by a signal", after which the same call continues.

    `prompts`, `samples` of each, and `k` tokens of each top-K row; None: as many as the recipe's run draws and reads.
    Raises RecipeError for a recipe whose teacher or method cannot be recorded, and for an `out` that holds anything but
    this recording.
    """
    recipe = load_recipe(path, overrides)
    _check_teachers(recipe)
    k = _rows_needed(recipe, k)
    check_writable(out, "--out")
    saved = config.read_yaml(out / ORIGIN) if (out / ORIGIN).is_file() else {"student": {"template_date": now()}}
    recipe = recipe.dated(saved["student"].get("template_date"))
    origin: Any = plain_tree({key: value for key, value in config.dump(recipe).items() if key in DECIDES})
    _check_out(out, origin)
    check(recipe)
    # no reference model and no responses: neither is recorded
    method = OPD() if k is None else TopK(k=k)
    scored = replace(recipe, method=method, reference=None, references={}, responses=None)
    shown = ", ".join(section.shown for section in recipe.all_teachers.values())
    with Console() as console, locked(out, "--out", console.warn):
        console.note(f"loading the student and {shown}")
        loaded = load_student(scored)
        teachers = load_teachers(scored, loaded)
        assert teachers.teacher is not None
        meta = ScoredMeta.of(teachers.teacher, teacher_setup(scored, loaded, "teacher"), shown, k)
        known = recorded(out, meta)
        limit = prompt_limit(recipe, recipe.sampling, map(num_positions, [loaded.model, *teachers.models]))
        requests = _requests(recipe, loaded.renderer, limit, prompts, samples)
        missing = [request for request in requests if request.key not in known]
        write_atomically(out / ORIGIN, config.write_yaml(origin))
        pairs = _write_and_score(recipe, loaded, teachers.teacher, k, missing, console)
        try:
            with terminable(), contextlib.closing(teachers):
                total = write_scored(out, meta, pairs, shard_samples=BLOCK_REQUESTS)
        except KeyboardInterrupt:
            console.note(f"stopped by a signal; the same command continues ({out})")
            return "stopped by a signal"
        console.note(f"{total:,} samples, {len(known):,} of them from before, scored by {shown}, in {out}")
        console.note(f"train on them with   teacher={{type: stored, path: {out}, fingerprint: {meta.fingerprint}}}")
    return "finished"


def _check_teachers(recipe: Recipe) -> None:
    """Raises RecipeError unless every teacher gives token scores that stay what they are."""
    if not recipe.all_teachers:
        raise RecipeError("the recipe has no teacher whose scores could be recorded; add a section teacher")
    for section in recipe.all_teachers.values():
        if section.replays:
            raise RecipeError(
                f"the teacher is a recording already ({section.shown}); name the teacher that is to score"
            )
        if section.says_digits:
            raise RecipeError(f"the teacher {section.shown} says digits; only scores of tokens are recorded")
        if section.needs_grades:
            raise RecipeError(
                "teacher.template shows {feedback}, but samples are not graded while they are recorded; change teacher.template"
            )
        if section.follows_student:
            raise RecipeError(
                "the teacher moves with the student (teacher.ema), so its scores do not stay; leave ema out"
            )
    if recipe.sampling.temperature == 0:
        raise RecipeError("sampling.temperature is 0; the student's own samples are drawn (above 0)")


def _rows_needed(recipe: Recipe, k: int | None) -> int | None:
    """Tokens of each top-K row: `k`, or what the method needs; None: scores of the sampled tokens alone.

    Raises RecipeError for a method that cannot be trained from a recording, and for a `k` below the method's.
    """
    name, members = recipe.method_name, recipe.method.members
    most = max((part.reads.k for part in members if "topk" in part.needs), default=None)
    if k is not None:
        if most is not None and k < most:
            raise RecipeError(
                f"--k is {k}, but the method {name} reads {most} tokens a row; raise --k, or lower method.k"
            )
        return k
    if "full" in recipe.method.needs:
        raise RecipeError(
            f"the method {name} needs the teacher's whole distributions, which are not stored; choose another with "
            "method.type=... (see: understudy methods), or store K tokens a row with --k"
        )
    if recipe.uses.prefixes:
        raise RecipeError(
            f"the method {name} begins samples with the teacher's own responses, which are not recorded; set "
            "method.anneal_steps=0"
        )
    return most


def _check_out(out: Path, origin: Mapping[str, Any]) -> None:
    """Raises RecipeError unless `out` is new, empty or holds what these keys of a recipe recorded before."""
    if not (out / ORIGIN).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise RecipeError(f"--out {out} exists and holds something else; choose another directory")
    elif changed := config.changes(config.read_yaml(out / ORIGIN), origin):
        raise RecipeError(
            f"--out {out} holds another recording: {'; '.join(changed.values())}. Choose another directory"
        )


def _requests(
    recipe: Recipe, renderer: Renderer, limit: int, num_prompts: int | None, num_samples: int | None
) -> list[Request]:
    """Requests for the first prompts that training draws, each prompt once. Raises DataError where none fits in `limit`."""
    prompts = recipe.task.prompts("train")
    order = PromptStream(prompts, renderer.start, seed=recipe.seed, max_prompt_tokens=limit)
    wanted = num_prompts or recipe.train.steps * recipe.train.prompts_per_step
    found: dict[str, tuple[Prompt, Tensor]] = {}
    for position in range(len(prompts)):
        if len(found) == wanted:
            break
        prompt = order[position]
        ids = renderer.start(prompt)
        if len(ids) <= limit:
            found.setdefault(prompt.id, (prompt, ids))
    if not found:
        raise DataError(f"all {len(prompts)} training prompts are longer than train.max_prompt_tokens ({limit})")
    indices = range(num_samples or recipe.train.samples_per_prompt)
    return [Request(prompt, index, ids) for prompt, ids in found.values() for index in indices]


def _write_and_score(
    recipe: Recipe, loaded: Loaded, teacher: Teacher, k: int | None, requests: Sequence[Request], console: Console
) -> Iterator[tuple[Sample, Scores]]:
    """A sample with its scores for each request, in order, made block by block when it is asked for."""
    need: frozenset[Need] = frozenset({"sampled"} if k is None else {"sampled", "topk"})
    with sampling_with(recipe, loaded) as engine, console.progress("record", len(requests)) as advance:
        for start in range(0, len(requests), BLOCK_REQUESTS):
            block = requests[start : start + BLOCK_REQUESTS]
            parts = (engine, loaded.renderer, recipe.task.environment)
            samples = play(*parts, block, recipe.sampling, step=0)
            yield from zip(samples, teacher.score(samples, need, k=k), strict=True)
            advance(len(block))
