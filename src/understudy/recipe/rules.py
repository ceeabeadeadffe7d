"""Rules about sections of a recipe beside each other. Each raises ValueError, before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from understudy.tasks import Task
from understudy.types import Need

if TYPE_CHECKING:
    from understudy.recipe.schema import Recipe

WHY: dict[Need, str] = {
    "sampled": "log T of every sampled token, which is its reward",
    "topk": "the teacher's K most probable tokens: its forward KL sums over them, and the score of the sampled token alone "
    "says nothing about the tokens that were not sampled",
    "full": "the teacher's whole next-token distribution, which a teacher gives that is loaded here (local) or served by "
    "`understudy serve-teacher` (served), with extra_ids: mask",
    "verbal": "a digit from 0 to 9 for each sample",
}
"""The need of a method, and why nothing less will do."""


def _teachers_give_what_is_asked(recipe: Recipe) -> None:
    method, teachers, name = recipe.method, recipe.all_teachers, recipe.method_name
    rejects = recipe.eval is not None and recipe.eval.reject_below is not None
    asked = method.needs - {"none", "reference"}
    if asked and not teachers:
        raise ValueError(
            f"the method {name} needs a teacher ({', '.join(sorted(asked))} scores); add a section "
            "`teacher: {type: local, model: ...}`"
        )
    if rejects and not any(section.says_digits for section in teachers.values()):
        raise ValueError("eval.reject_below needs a judge that says digits: a teacher of type verbal or chat")
    by_teacher = recipe.responses is not None and recipe.responses.by_teacher
    if not asked and teachers and not rejects and not by_teacher:
        raise ValueError(f"the method {name} uses no teacher; remove the section teachers")
    if recipe.weights:
        if recipe.weights.keys() != recipe.teachers.keys():
            raise ValueError(
                f"weights are for {sorted(recipe.weights)}, but the teachers are {sorted(recipe.teachers)}; give each a weight"
            )
        if min(recipe.weights.values()) < 0 or not any(recipe.weights.values()):
            raise ValueError("weights must be at least 0, and one of them above 0")
        if asked != {"sampled"}:
            raise ValueError(
                f"weights mix the scores of sampled tokens, but the method {name} asks for {', '.join(sorted(asked))}; "
                "choose a method such as opd, or remove weights and have each prompt name its teacher"
            )
    if recipe.teachers and any(section.alone for section in teachers.values()):
        raise ValueError("several teachers score tokens; a judge (verbal, chat) or a stored teacher stands alone")
    for label, section in teachers.items():
        lacking = sorted(asked - section.gives)
        if lacking:
            raise ValueError(
                f"the method {name} needs {WHY[lacking[0]]}; {recipe.place_of(label)} ({section.shown}) gives only "
                f"{', '.join(sorted(section.gives - {'none'}))}. Choose another teacher, or a method that asks for less "
                "(see: understudy methods)"
            )
        if recipe.uses.judges_steps and not section.reads_steps:
            raise ValueError(
                f"the method {name} has each step judged, but {recipe.place_of(label)} ({section.shown}) reads whole "
                "responses; set method.steps: false, or take a judge of type verbal or chat"
            )
    given = [key for key in ("reference", "references") if getattr(recipe, key)]
    if given and "reference" not in method.needs:
        raise ValueError(f"the method {name} as it is set uses no reference model; remove the section {given[0]}")
    if recipe.references and not recipe.teachers:
        raise ValueError("references go by the names in teachers, which the recipe lacks; write one section reference")
    if recipe.references and recipe.references.keys() != recipe.teachers.keys():
        raise ValueError(
            f"references are for {sorted(recipe.references)}, but the teachers are {sorted(recipe.teachers)}; give each a "
            "reference (`type: start` is the student's start), or write one section reference for all"
        )


def _responses_are_given_and_used(recipe: Recipe) -> None:
    """Responses of a teacher are there where the method uses them, used where they are there, and written by somebody."""
    uses, responses, name = recipe.uses, recipe.responses, recipe.method_name
    if uses.continues and (responses is None or not responses.by_teacher):
        raise ValueError(
            f"the method {name} has the teacher continue what the student began, which no response does that was written "
            "before; set `responses: {type: teacher}`, or method.on_reject: teacher or drop"
        )
    if responses is None and (uses.fills_slots or uses.prefixes):
        use, instead = "begins samples with the teacher's own", "method.anneal_steps: 0"
        if uses.fills_slots:
            use, instead = "fills rejected slots with the teacher's own responses", "method.on_reject: drop"
        raise ValueError(
            f"the method {name} {use}; add a section `responses: {{type: teacher}}` (or solutions, jsonl, hub), or set "
            f"{instead}"
        )
    if uses.continues and _answers_the_student(recipe.task):
        raise ValueError(
            f"the method {name} has the teacher continue what the student began, but in the task {recipe.task.name} an "
            "environment answers the student, and would have to answer the teacher; set method.on_reject: resample or drop"
        )
    if responses is not None and not uses.takes_responses:
        raise ValueError(f"the method {name} uses no responses of a teacher; remove the section responses")
    writes = recipe.teacher is not None and recipe.teacher.writes_responses
    if responses is not None and responses.by_teacher and not writes:
        raise ValueError(
            "responses.type is teacher, but only one teacher of type local, verbal or chat writes responses; take them from "
            "solutions, jsonl or hub"
        )
    if uses.prefixes and recipe.teacher is not None and recipe.teacher.replays:
        raise ValueError(
            f"the method {name} begins samples with the teacher's own, but a stored teacher knows recorded samples only; set "
            "method.anneal_steps: 0"
        )


def _answers_the_student(task: Task) -> bool:
    """Whether some part of the task has an environment of its own."""
    return any(type(part).environment is not Task.environment for part in task.places().values())


def _samples_are_drawn_and_compared(recipe: Recipe) -> None:
    if recipe.sampling.temperature == 0 and recipe.uses.own_samples:
        raise ValueError(
            "sampling.temperature is 0; a student that learns from its own samples has to draw them (above 0)"
        )
    if recipe.uses.rewards and recipe.train.samples_per_prompt < 2:
        raise ValueError("the advantage compares samples of one prompt; set train.samples_per_prompt to 2 or more")
    recipe.engine.check_sampling(recipe.sampling)
    if (recipe.task.longest or 0) > recipe.sampling.max_new_tokens:
        raise ValueError(
            f"task.sampling has a max_new_tokens of {recipe.task.longest}, more than sampling.max_new_tokens "
            f"{recipe.sampling.max_new_tokens}, which bounds every response; raise that"
        )


def _images_are_read(recipe: Recipe) -> None:
    """Everybody who is shown a prompt with images reads them."""
    if not recipe.has_images:
        return
    if recipe.student.model is None:
        raise ValueError("the prompts have images, and student.build makes models of text; set student.model")
    if not recipe.engine.reads_images:
        raise ValueError(
            "the prompts have images, which the rollout engine is not sent: its requests are token ids; use rollout: {type: hf}"
        )
    for place, section in recipe.scorers.items():
        if not section.reads_images:
            raise ValueError(
                f"the prompts have images, which {place} ({section.shown}) is not shown; take a teacher that is loaded here "
                "(type local, privileged or verifier), or what one recorded (stored)"
            )


def _evaluation_is_there_and_draws(recipe: Recipe) -> None:
    if recipe.train.stop_at is not None and (recipe.eval is None or recipe.eval.every is None):
        raise ValueError("train.stop_at waits for an evaluation, so eval.every must say how often there is one")
    if recipe.eval is not None and recipe.eval.teacher:
        if recipe.teacher is None or recipe.leaves_teacher or not recipe.teacher.writes_responses:
            raise ValueError(
                "eval.teacher has the teacher answer the problems, but the method asks no single teacher of type local, verbal "
                "or chat, which are the ones that write; remove eval.teacher"
            )
        if not recipe.eval.at_start:
            raise ValueError("eval.teacher has the teacher answer before the first step; set eval.at_start: true")
        if _answers_the_student(recipe.held_out):
            raise ValueError(
                f"eval.teacher has the teacher answer in one message, but in the task {recipe.held_out.name} an environment "
                "answers; remove eval.teacher"
            )
    if recipe.eval is None or recipe.eval.reject_below is None:
        return
    how, teacher = recipe.eval.on_reject, recipe.teacher
    if how != "resample" and teacher is not None:
        if not teacher.reads_steps:
            raise ValueError(
                f"eval.on_reject is {how}, which keeps the steps before the first rejected one, but teacher ({teacher.shown}) "
                "reads whole responses; set eval.on_reject: resample, or take a judge of type verbal or chat"
            )
        if _answers_the_student(recipe.held_out):
            raise ValueError(
                f"eval.on_reject is {how}, which keeps the steps of a single message, but in the task {recipe.held_out.name} "
                "an environment answers the student; set eval.on_reject: resample"
            )
    if how == "continue":
        return
    if (recipe.eval.sampling or recipe.sampling).temperature == 0:
        place = "sampling" if recipe.eval.sampling is None else "eval.sampling"
        raise ValueError(
            f"eval.reject_below has answers drawn again, but {place}.temperature is 0, so every redraw would be the same; "
            "set eval.sampling.temperature above 0, or remove eval.reject_below"
        )


def _nothing_beside_the_update_moves_with_it(recipe: Recipe) -> None:
    if recipe.async_ is None:
        return
    if recipe.engine.sleep:
        raise ValueError(
            "rollout.sleep has the servers sleep during the update, and async has them write samples beside it; remove one"
        )
    if not recipe.engine.beside_update:
        raise ValueError(
            "async has samples written beside the update, but they are written with the weights that are updated; set "
            "rollout: {type: hf, copy: true}, which takes the memory of the weights once more, or use an engine "
            "(rollout.type: vllm)"
        )
    if any(section.replays for section in recipe.all_teachers.values()):
        raise ValueError("async has nothing to overlap where samples are stored; remove the section async")
    for place, section in recipe.scorers.items():
        if section.follows_student or (section.is_start and recipe.student.lora is not None):
            raise ValueError(
                f"async has the {place} score beside the update, but it runs on the student's own weights or follows "
                "them; give it a model of its own, or remove the section async"
            )


def _shards_reach_everything(recipe: Recipe) -> None:
    """Refuses what would run the student on one process alone, or read weights of which it has a part."""
    if not recipe.is_sharded:
        return
    if recipe.has_images:
        raise ValueError("parallel.shard is not for prompts with images yet; remove the section parallel")
    student, teachers = recipe.student, recipe.parallel is not None and recipe.parallel.teachers
    if recipe.parallel is not None and recipe.parallel.vocabulary:
        if student.lora is not None:
            raise ValueError("parallel.vocabulary is for an output layer that is trained; remove it, or student.lora")
        if recipe.teachers and "full" in recipe.method.needs:
            raise ValueError(
                "parallel.vocabulary has all processes compare whole rows of one teacher at a time, and the samples of several "
                "teachers are in micro-batches of their own; remove it, or choose a method that needs no whole rows"
            )
    if student.lora is not None and not recipe.engine.runs_here:
        raise ValueError(
            "adapters in shards cannot be merged for a server; use rollout: {type: hf}, or remove student.lora or parallel"
        )
    if student.dtype in ("bfloat16", "float16") and student.lora is None and recipe.train.master_weights:
        raise ValueError(
            f"student.dtype is {student.dtype} with train.master_weights, but shards are the master weights; set "
            "student.dtype: float32, parallel.param_dtype: bfloat16 and parallel.reduce_dtype: float32 to compute in 16 bits"
        )
    for place, section in recipe.scorers.items():
        if teachers and section.follows_student:
            raise ValueError(f"the {place} follows the student, which shards do not; set parallel.teachers: false")
        if teachers and section.weights is not None and section.weights.offload:
            raise ValueError(f"{place}.offload keeps whole weights; remove it, or set parallel.teachers: false")
        if section.is_start and student.lora is not None and "full" in recipe.method.needs:
            raise ValueError(
                f"the {place} is the student without its adapters, whose output layer is in shards; give it a model of its own "
                "(type: local)"
            )
    asking = {
        "responses": recipe.responses is not None and recipe.responses.by_teacher,
        "async": recipe.async_ is not None,
        "eval.teacher": recipe.eval is not None and recipe.eval.teacher,
    }
    for key in (key for key, asks in asking.items() if teachers and asks):
        raise ValueError(
            f"{key} has each process ask the teacher by itself, and in shards all have to at once; set parallel.teachers: false"
        )


RULES: tuple[Callable[[Recipe], None], ...] = (
    _teachers_give_what_is_asked,
    _responses_are_given_and_used,
    _samples_are_drawn_and_compared,
    _images_are_read,
    _evaluation_is_there_and_draws,
    _nothing_beside_the_update_moves_with_it,
    _shards_reach_everything,
)
"""The checks of the stage "parse": no recipe is made that breaks one."""
