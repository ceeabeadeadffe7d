"""Whether a recipe's teachers, reference and responses are what its method needs: found out before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from understudy.methods import Method
from understudy.tasks.responses import HubResponses, JsonlResponses, Solutions
from understudy.teachers import AnyReference, AnyTeacher, Chat, Local, Stored, Verbal
from understudy.teachers.stores.responses import TeacherResponses
from understudy.trainer.settings import Train
from understudy.types import Need

AnyResponses = Solutions | JsonlResponses | HubResponses | TeacherResponses

WHY: dict[Need, str] = {
    "sampled": "log T of every sampled token, which is its reward",
    "topk": "the teacher's K most probable tokens: its forward KL sums over them, and the score of the sampled token alone "
    "says nothing about the tokens that were not sampled",
    "full": "the teacher's whole next-token distribution, which a teacher gives that is loaded here (local) or served by "
    "`understudy serve-teacher` (served)",
    "verbal": "a digit from 0 to 9 for each sample",
}
"""What a method asks a teacher for, and why nothing less will do."""


def check_needs(
    method: Method,
    teachers: Mapping[str, AnyTeacher],
    *,
    several: bool,
    reference: AnyReference | None,
    responses: AnyResponses | None,
    rejects: bool = False,
) -> None:
    """Every need of the method is met, and nothing is given that nobody asks for. Raises ValueError.

    `rejects`: evaluations ask a judge.
    """
    name = type(method).__name__
    asked = method.needs - {"none", "reference"}
    if asked and not teachers:
        raise ValueError(
            f"the method {name} needs a teacher ({', '.join(sorted(asked))} scores); add a section "
            "`teacher: {type: local, model: ...}`"
        )
    if rejects and not any(isinstance(section, Verbal | Chat) for section in teachers.values()):
        raise ValueError("eval.reject_below needs a judge that says digits: a teacher of type verbal or chat")
    if not asked and teachers and not rejects and not isinstance(responses, TeacherResponses):
        raise ValueError(f"the method {name} asks no teacher; remove the section teacher")
    if several and any(isinstance(section, Verbal | Chat | Stored) for section in teachers.values()):
        raise ValueError("several teachers score tokens; a judge (verbal, chat) or a stored teacher stands alone")
    for label, section in teachers.items():
        lacking = sorted(asked - section.GIVES)
        if lacking:
            where = f"teachers.{label}" if several else "teacher"
            raise ValueError(
                f"the method {name} needs {WHY[lacking[0]]}; {where} ({section.shown}) gives only "
                f"{', '.join(sorted(section.GIVES - {'none'}))}. Choose another teacher, or a method that asks for less "
                "(see: understudy methods)"
            )
    if reference is not None and "reference" not in method.needs:
        raise ValueError(f"the method {name} as it is set uses no reference model; remove the section reference")
    _check_responses(method, None if several else next(iter(teachers.values()), None), responses)


def _check_responses(method: Method, teacher: AnyTeacher | None, responses: AnyResponses | None) -> None:
    """A teacher's own responses are there where they are used, and from somebody who writes them."""
    name, plans = type(method).__name__, [part.plan(0) for part in method.members]
    filled = any(plan.fills_slots for plan in plans)
    begun = any(plan.prefix_share > 0 for plan in plans)
    if responses is None and (filled or begun):
        use = (
            "fills rejected slots with the teacher's own responses"
            if filled
            else "begins samples with the teacher's own"
        )
        instead = "method.on_reject: drop" if filled else "method.anneal_steps: 0"
        raise ValueError(
            f"the method {name} {use}; add a section `responses: {{type: teacher}}` (or solutions, jsonl, hub), or set "
            f"{instead}"
        )
    if responses is not None and not any(plan.takes_responses for plan in plans):
        raise ValueError(f"the method {name} uses no responses of a teacher; remove the section responses")
    writes = isinstance(teacher, Local | Chat)
    if isinstance(responses, TeacherResponses) and not writes:
        raise ValueError(
            "responses.type is teacher, but only one teacher of type local or chat writes responses; take them from "
            "solutions, jsonl or hub"
        )
    if begun and isinstance(teacher, Stored):
        raise ValueError(
            f"the method {name} begins samples with the teacher's own, but a stored teacher knows recorded samples only; set "
            "method.anneal_steps: 0"
        )


def check_groups(method: Method, train: Train) -> None:
    """Raises ValueError where samples are compared with their group and there is none."""
    for part in method.members:
        if part.plan(0).rewards is not None and train.samples_per_prompt < 2:
            raise ValueError("the advantage compares samples of one prompt; set train.samples_per_prompt to 2 or more")
