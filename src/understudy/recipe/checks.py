"""What the sections of a recipe ask of each other and of the data, found out without loading a model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from understudy.errors import RecipeError, nearest
from understudy.recipe.schema import AnyTask, Recipe
from understudy.tasks import Arithmetic, Hub, Jsonl, Mix
from understudy.tasks.mix import parts_of, record_parts
from understudy.tasks.renderer import Renderer
from understudy.tasks.responses import HubResponses, Solutions
from understudy.teachers import Privileged, Stored, check_names
from understudy.teachers.stores.recording import read_record, read_rows
from understudy.teachers.stores.responses import ResponseSetup, TeacherResponses, open_responses
from understudy.trainer.settings import Split

NUM_CHECKED_PROMPTS = 10_000
"""Training prompts whose teacher and responses are looked up."""
FIELDS = {"solution": "solution_field", "reference": "reference_field"}
"""What a teacher's template may show of a prompt, and the key of a task that says where it is."""


def is_here(task: AnyTask) -> bool:
    """Whether its problems can be read without the network."""
    hubs = [part for part in parts_of(task).values() if isinstance(part, Hub)]
    return all(Path(part.dataset).is_dir() for part in hubs)


def check_source(task: AnyTask, split: Split, section: str) -> None:
    """Raises RecipeError where a part of the task has no such split."""
    for place, part in record_parts(task, section).items():
        try:
            part.source_of(split)
        except RecipeError as error:
            raise RecipeError(f"{place}: {error}") from error


def check_fields(recipe: Recipe, *, training: bool) -> None:
    """Raises RecipeError where the method imitates solutions or rewards right answers and a part of the task has none."""
    name, plans = type(recipe.method).__name__, [part.plan(0) for part in recipe.method.members]
    given = training and any(plan.on_policy_share < 1 for plan in plans)
    graded = any(plan.rewards is not None and plan.rewards.source == "outcome" for plan in plans)
    parts = record_parts(recipe.task)
    lacking = [place for place, part in parts.items() if not part.solution_field]
    if given and recipe.responses is None and lacking:
        raise RecipeError(
            f"the method {name} imitates solutions, but {lacking[0]}.solution_field does not say where they are"
        )
    ungraded = [place for place, part in parts.items() if not part.reference_field]
    if graded and ungraded:
        raise RecipeError(
            f"the method {name} rewards right answers, but {ungraded[0]}.reference_field does not say where they are"
        )


def check_rejection(recipe: Recipe) -> None:
    """Raises RecipeError where an evaluation draws answers again that cannot differ."""
    if recipe.eval is None or recipe.eval.reject_below is None:
        return
    place = "sampling" if recipe.eval.sampling is None else "eval.sampling"
    if (recipe.eval.sampling or recipe.sampling).temperature == 0:
        raise RecipeError(
            f"eval.reject_below has answers drawn again, but {place}.temperature is 0, so every redraw would be the same; "
            "set eval.sampling.temperature above 0, or remove eval.reject_below"
        )


def check_training(recipe: Recipe, *, fetch: bool) -> None:
    """The teachers and the teacher's own responses beside the task. `fetch`: data are read from the network too.

    Raises RecipeError, or DataError for a bad row.
    """
    if isinstance(recipe.responses, Solutions):
        _check_solutions(recipe)
    if recipe.teachers:
        _check_names(recipe, recipe.teachers, fetch=fetch)
    for name, section in recipe.judges.items():
        if isinstance(section, Privileged):
            _check_privileged(recipe, name, section, fetch=fetch)
        if isinstance(section, Stored):
            _check_stored(recipe, section)


def _check_solutions(recipe: Recipe) -> None:
    """Some part of the task has solutions: prompts without one are counted."""
    parts = parts_of(recipe.task)
    if not any(getattr(part, "solution_field", "computed") for part in parts.values()):
        raise RecipeError(
            f"responses.type is solutions, but {next(iter(parts))}.solution_field does not say where they are; give it, or "
            "take responses from a file (jsonl, hub) or the teacher"
        )


def _check_names(recipe: Recipe, teachers: Mapping[str, Any], *, fetch: bool) -> None:
    """Every prompt names a teacher; of data that are not here, what the recipe says of them."""
    if fetch or is_here(recipe.task):
        check_names(islice(recipe.task.prompts("train"), NUM_CHECKED_PROMPTS), teachers)
        return
    for place, part in parts_of(recipe.task).items():
        label = place.removeprefix("task.parts.") if isinstance(recipe.task, Mix) else None
        if isinstance(part, Jsonl | Hub) and part.teacher_field is not None:
            if is_here(part):
                check_names(islice(part.prompts("train"), NUM_CHECKED_PROMPTS), teachers)
            continue
        if label is None:
            raise RecipeError(
                f"there are several teachers, but {place} names none for its prompts; set task.teacher_field, or make each "
                "teacher's problems a part of a task of type mix"
            )
        if label not in teachers:
            raise RecipeError(f"{place} names no teacher: {nearest(label, teachers)}")


def _check_privileged(recipe: Recipe, name: str, section: Privileged, *, fetch: bool) -> None:
    where = f"teachers.{name}" if recipe.teachers else "teacher"
    student, method = recipe.student, type(recipe.method).__name__
    if section.model is None and student.model is None:
        raise RecipeError(
            f"{where} is the student's own start, but the student is built from scratch (student.build) and knows nothing "
            f"yet; set {where}.model, or student.model"
        )
    if section.ema is not None and student.lora is not None:
        raise RecipeError(
            f"{where}.ema averages the student's weights, which needs full fine-tuning; remove student.lora, or {where}.ema: "
            "the teacher is then the student without its adapters"
        )
    asking = [part.plan(0).rewards for part in recipe.method.members if part.needs & section.GIVES - {"none"}]
    if "feedback" in section.shows and any(rewards is None or rewards.source != "outcome" for rewards in asking):
        raise RecipeError(
            f"{where}.template shows {{feedback}}, which a verifier gives, but the method {method} has no samples graded; "
            f"take a method that rewards right answers, or change {where}.template"
        )
    for place, part in parts_of(recipe.task).items():
        if not _is_asked(recipe, name, place, part, fetch=fetch):
            continue
        for word, field in FIELDS.items():
            if word in section.shows and getattr(part, field, "computed") is None:
                raise RecipeError(
                    f"{where}.template shows {{{word}}}, but {place}.{field} does not say where it is; give it, or change "
                    f"{where}.template"
                )
        if section.system is not None and (isinstance(part, Arithmetic) or not part.chat):
            raise RecipeError(
                f"{where}.system is a message of a chat, but the problems of {place} are plain text; put it into "
                f"{where}.template"
            )


def _is_asked(recipe: Recipe, name: str, place: str, part: Arithmetic | Jsonl | Hub, *, fetch: bool) -> bool:
    """Whether samples of the part go to the teacher of that name. False where only data that are not here could say."""
    if not recipe.teachers:
        return True
    if isinstance(part, Arithmetic) or part.teacher_field is None:
        return place == f"task.parts.{name}"
    if not (fetch or is_here(part)):
        return False
    return any(prompt.teacher == name for prompt in islice(part.prompts("train"), NUM_CHECKED_PROMPTS))


def _check_stored(recipe: Recipe, section: Stored) -> None:
    """Raises RecipeError for a recording that holds less than the run reads, or was made at another temperature."""
    meta, wanted = read_record(Path(section.path)).meta, recipe.sampling.temperature or 1.0
    if meta.temperature != wanted:
        raise RecipeError(
            f"the scores in {section.path} were stored with temperature {meta.temperature}, this run has {wanted} "
            "(sampling.temperature): set it back, or record them again"
        )
    most = max((part.reads.k for part in recipe.method.members if "topk" in part.needs), default=0)
    if meta.k is not None and meta.k < min(most, meta.vocab_size):
        raise RecipeError(
            f"the method {type(recipe.method).__name__} reads {most} tokens a row (method.k), but the scores in "
            f"{section.path} have {meta.k}; lower method.k, or record them again"
        )
    if any(part.plan(0).on_policy_share > 0 for part in recipe.method.members):
        _check_amount(section, recipe.train.samples_per_prompt)


def _check_amount(section: Stored, num: int) -> None:
    found: dict[str, set[int]] = {}
    for file in read_record(Path(section.path)).files:
        try:
            rows = read_rows(Path(section.path) / file)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{Path(section.path) / file} is damaged ({error}): record the scores again") from error
        for row in rows:
            found.setdefault(row["prompt"], set()).add(row["index"])
    lacking = {prompt: min(missing) for prompt, has in found.items() if (missing := set(range(num)) - has)}
    if lacking:
        prompt, index = next(iter(lacking.items()))
        raise RecipeError(
            f"train.samples_per_prompt is {num}, but the recording in {section.path} stores no sample for request "
            f"{prompt}#{index}; {len(lacking)} of its {len(found)} prompts have too few: lower it, or record more samples a "
            "prompt"
        )


def check_coverage(recipe: Recipe, renderer: Renderer, *, fetch: bool) -> None:
    """Raises RecipeError where none of the first training prompts has a response that the student's tokenizer can say."""
    section = recipe.responses
    if section is None or isinstance(section, TeacherResponses):
        return
    elsewhere = isinstance(section, HubResponses) and not Path(section.dataset).is_dir()
    if not fetch and (elsewhere or not is_here(recipe.task)):
        return
    setup = ResponseSetup(renderer=renderer, seed=recipe.seed, run_dir=Path(recipe.run_dir), sampling=recipe.sampling)
    store, prompts = open_responses(section, setup), recipe.task.prompts("train")
    # one at a time: most often the first has one
    if not any(store.coverage([prompt])[0] for prompt in islice(prompts, NUM_CHECKED_PROMPTS)):
        store.check(prompts, recipe.task.name, NUM_CHECKED_PROMPTS)


__all__ = [
    "check_coverage",
    "check_fields",
    "check_rejection",
    "check_source",
    "check_training",
    "is_here",
]
