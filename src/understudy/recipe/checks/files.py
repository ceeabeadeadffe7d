"""The stage "files": the recipe beside this machine, its files, data and tokenizers, without loading a model."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from understudy import config, given
from understudy.errors import DataError, RecipeError, RewriteError, nearest
from understudy.models import (
    check_attention,
    check_build,
    check_lora_targets,
    check_model_dir,
    config_on_disk,
    has_bfloat16,
    name_tokens,
    positions_of,
)
from understudy.recipe.checks.parts import MAX_COMPARED, Check, Files, Finding
from understudy.recipe.load import (
    NUM_CHECKED_PROMPTS,
    choose_device,
    data_parts,
    eval_prompts,
    prompt_limit,
    response_setup,
)
from understudy.recipe.tokenizers import tokenizer_source
from understudy.tasks import Renderer, Split, Task, num_repeated, overlap, overlap_message
from understudy.teachers import RunFacts, TeacherSection, check_names
from understudy.teachers.stores.responses import open_responses
from understudy.trainer.loggers import check_loggers
from understudy.types import Prompt

ENDS_ON_POLICY = 0.05
"""Share of a teacher's response in a prefix below which it is a token or two."""
MAX_SKIPPED_SHARE = 0.01
"""Share of rows that are left out from which on it is a warning."""
NUM_RENDERED = 8
"""First prompts that are rendered."""
NUM_TRIED = 256
"""Solutions, and prompts that spell control tokens, that are rendered."""


def _machine(files: Files) -> Iterator[Finding]:
    recipe = files.recipe
    check_loggers(recipe.loggers)
    device = choose_device(recipe.device)
    if recipe.student.lora is not None and importlib.util.find_spec("peft") is None:
        raise RecipeError("student.lora needs the package peft; run: pip install 'understudy[lora]'")
    if recipe.engine.launches and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "rollout.launch starts servers for one rank alone; with several ranks start them yourself and give rollout.url"
        )
    lacks = "" if has_bfloat16(device) else ", without instructions for bfloat16"
    yield Finding(f"device: {device}{lacks}")


def _objects(files: Files) -> tuple[Finding, ...]:
    """Raises RecipeError for an object of a Python program that is not there."""
    if files.training:
        given.check_given(config.flatten(config.dump(files.recipe)))
    return ()


def _data(task: Task, split: Split | None, section: str) -> Mapping[str, Task]:
    """The parts of a task by their place in the recipe. Raises RecipeError for a missing file or split, with the place.

    `split` None: any will do.
    """
    task.check_files()
    parts = task.places(section)
    for place, part in parts.items():
        try:
            part.check_split(split or part.first_split)
        except RecipeError as error:
            raise RecipeError(f"{place}: {error}") from error
    return parts


def _task(files: Files) -> Iterator[Finding]:
    """Raises RecipeError where the method imitates solutions or rewards right answers and a part of the task has none, and
    for a reward function that the method does not ask for."""
    recipe, name = files.recipe, files.recipe.method_name
    imitates = files.training and recipe.uses.given_responses and recipe.responses is None
    for place, part in _data(recipe.task, "train" if files.training else None, "task").items():
        if imitates and "solution" not in part.carries:
            raise RecipeError(
                f"the method {name} imitates solutions, but {place}.solution_field does not say where they are"
            )
        if files.training and part.rewards and "outcome" not in recipe.uses.rewards:
            raise RecipeError(f"the method {name} asks for no reward, so {place}.reward_function would never be called")
        if "outcome" in recipe.uses.rewards and "reference" not in part.carries and not part.rewards:
            raise RecipeError(
                f"the method {name} rewards right answers, but {place}.reference_field does not say where they are"
            )
        if imitates and "solution" in part.carries and not part.computed and files.may_read(part):
            prompts = part.prompts("train")
            without = [prompt.id for prompt in prompts if prompt.solution is None]
            if without:
                raise RecipeError(
                    f"the method {name} imitates solutions, but {len(without):,} of {len(prompts):,} prompts of {place} have "
                    f"none ({', '.join(without[:3])}): a chat has one where it ends with words of the assistant"
                )
    yield Finding(f"task: {recipe.task.name}")


def _rows(files: Files) -> Iterator[Finding]:
    for name, intake in files.intakes.items():
        found = f"{name}: {intake.num_rows:,} rows"
        if intake.num_skipped:
            found += f", rows_skipped: {intake.num_skipped:,} ({'; '.join(intake.skipped)})"
        many = intake.num_skipped > MAX_SKIPPED_SHARE * intake.num_rows
        yield Finding(found, "warning" if many else "ok", "fill in the fields, or take the rows out", name=name)


def _evaluation(files: Files) -> Iterator[Finding]:
    recipe = files.recipe
    if recipe.eval is not None:
        _data(
            recipe.held_out,
            recipe.eval.split,
            "eval_task" if recipe.eval_task else "eval.path" if recipe.eval.path else "task",
        )
        yield Finding(f"evaluation: {recipe.held_out.name}, {recipe.eval.split} split")


def _sections(files: Files) -> Iterator[Finding]:
    """Each section by itself."""
    recipe = files.recipe
    if recipe.student.model is not None:
        yield Finding(f"student: {check_model_dir(recipe.student.model)}", name="student")
    if recipe.student.tokenizer is not None and not Path(recipe.student.tokenizer).expanduser().is_dir():
        # raises for what is no name of the hub either
        check_model_dir(recipe.student.tokenizer)
    if recipe.student.dtype in ("bfloat16", "float16") and recipe.student.lora is None:
        masters, bytes_of = (
            recipe.train.master_weights,
            "2 weight, 2 gradient, 4 moments; small updates are rounded away",
        )
        if masters:
            bytes_of = "2 weight, 4 master weight, 4 gradient, 8 moments"
        held = f"{recipe.student.dtype} takes {18 if masters else 8} bytes a weight in training ({bytes_of})"
        yield Finding(held, name="student")
    settings = recipe.train
    if settings.warmup_steps > settings.steps:
        yield Finding(
            f"train.warmup_steps ({settings.warmup_steps:,}) is more than train.steps ({settings.steps:,}), so the learning "
            f"rate only reaches {settings.lr * settings.steps / settings.warmup_steps:.2g} of {settings.lr:g}",
            "warning",
            "lower train.warmup_steps",
            name="train",
        )
    if recipe.rollout is not None:
        yield Finding(recipe.rollout.check(), name="rollout")
    for place, section in (recipe.scorers | {"responses": recipe.responses}).items():
        if section is not None:
            yield Finding(section.check(), name=place)
    if recipe.student.build is not None:
        check_build(recipe.student.build)


def _tokenizers(files: Files) -> Iterator[Finding]:
    """Raises VocabularyError for a model whose probabilities are compared and which has other tokens."""
    source = tokenizer_source(files.recipe)
    if source is not None and not files.knows_tokenizer:
        yield Finding(f"tokenizer: {source.name} is a hub name, not checked offline")
        return
    yield Finding(f"tokenizer: {len(files.tokenizers.student):,} tokens")
    recipe = files.recipe
    for section in recipe.scorers.values():
        other = section.vocabulary
        if other is None or not files.has(other):
            continue
        extra = files.tokenizers.other(other)[1]
        shared = f"the student and {other.name} share {len(files.tokenizers.student):,} tokens"
        kept = "left in the tail of" if section.extra_ids == "tail" else "masked out of"
        more = f"; {len(extra)} that the student lacks are {kept} its softmax: {name_tokens(extra)}" if extra else ""
        yield Finding(shared + more)
        if files.tokenizers.other_vision(other) is not None:
            yield Finding(f"the student and {other.name} make the same tokens of an image")
    if all(map(files.has, files.tokenizers.sources)):
        files.tokenizers.compare_ends()


def _layers(files: Files) -> tuple[Finding, ...]:
    """Raises RecipeError for an attention or a layer for LoRA that the models do not have."""
    recipe = files.recipe
    attentions = {"student": recipe.student.attn_implementation}
    for place, section in recipe.scorers.items():
        if section.weights is not None:
            attentions[place] = section.weights.attn_implementation
    for place, name in attentions.items():
        check_attention(name, place)
    lora = recipe.student.lora
    # all-linear is no list
    if lora is not None and isinstance(lora.target_modules, tuple):
        check_lora_targets(recipe.student.model, recipe.student.build, lora.target_modules)
    return ()


def _teachers(files: Files) -> tuple[Finding, ...]:
    """Each teacher beside the run: what it needs is there, and every prompt names one.

    Raises RecipeError for a prompt that names no teacher; of data that may not be read, the recipe has to say one.
    """
    recipe, task = files.recipe, files.recipe.task
    if not files.training or recipe.weights:
        return ()
    if recipe.teachers and files.may_read(task):
        check_names(islice(task.prompts("train"), NUM_CHECKED_PROMPTS), recipe.teachers)
    elif recipe.teachers:
        for place, part in task.places().items():
            label = place.rpartition(".")[2]
            if "teacher" in part.carries:
                if files.may_read(part):
                    check_names(islice(part.prompts("train"), NUM_CHECKED_PROMPTS), recipe.teachers)
            elif place == "task":
                raise RecipeError(
                    "there are several teachers, but task names none for its prompts; set task.teacher_field, or make each "
                    "teacher's problems a part of a task of type mix"
                )
            elif label not in recipe.teachers:
                raise RecipeError(f"{place} names no teacher: {nearest(label, recipe.teachers)}")
    for name, section in recipe.all_teachers.items():
        section.check_run(_facts(files, name, section))
    if recipe.leaves_teacher:
        found = f"the method {recipe.method_name} uses no teacher, so the section teacher is not loaded"
        return (Finding(found, "warning", "remove it, or choose a method that asks (see: understudy methods)"),)
    return ()


def _facts(files: Files, name: str, section: TeacherSection) -> RunFacts:
    recipe, method = files.recipe, files.recipe.run_method
    rewards = []
    if section.needs_grades:
        needed = section.gives - {"none"}
        steps = (step for step in range(recipe.train.steps) if method.at(step)[0].needs & needed)
        rewards = [method.plan(step).rewards for step in steps]
    k = max((part.reads.k for part in method.members if "topk" in part.needs), default=0)

    def is_asked(place: str, part: Task) -> bool:
        """Whether samples of the part go to this teacher. False where only data that may not be read could say."""
        if not recipe.teachers or recipe.weights:
            return True
        if "teacher" not in part.carries:
            return place == f"task.parts.{name}"
        prompts = islice(part.prompts("train"), NUM_CHECKED_PROMPTS) if files.may_read(part) else ()
        return any(prompt.teacher == name for prompt in prompts)

    return RunFacts(
        where=recipe.place_of(name),
        method=recipe.method_name,
        k=min(k, len(files.tokenizers.student)) if k and files.knows_tokenizer else k,
        temperature=recipe.temperature,
        samples_per_prompt=recipe.train.samples_per_prompt,
        own_samples=recipe.uses.own_samples,
        graded=all(reward is not None and reward.source == "outcome" for reward in rewards),
        start=recipe.student.model,
        lora=recipe.student.lora is not None,
        parts={place: part for place, part in recipe.task.places().items() if is_asked(place, part)},
    )


def _prompts(files: Files) -> Iterator[Finding]:
    """Raises RecipeError where the models have no positions for a response, DataError where no prompt leaves room for one."""
    recipe, limit = files.recipe, files.recipe.train.max_prompt_tokens
    student = positions_of(config_on_disk(recipe.student.model, recipe.student.build))
    if recipe.uses.own_samples or not files.training:
        loaded = [section.weights for section in recipe.scorers.values() if section.vocabulary is not None]
        sources = [weights.source.name for weights in loaded if weights is not None and weights.source is not None]
        others = [positions_of(config_on_disk(name)) for name in sources if files.training]
        limit = prompt_limit(recipe, recipe.sampling, [student, *others])
    if files.knows_tokenizer and files.may_read(recipe.task):
        split: Split = "train" if files.training else recipe.task.first_split
        lengths = [len(files.renderer.start(prompt)) for prompt in islice(recipe.task.prompts(split), NUM_RENDERED)]
        if files.training and min(lengths) > limit:
            _check_any_fits(files, recipe.task, recipe.task.prompts("train"), limit, "training")
        yield Finding(f"first prompts: {min(lengths)} to {max(lengths)} tokens")
    if recipe.eval is not None:
        limit = prompt_limit(recipe, recipe.eval.sampling or recipe.sampling, [student])
        if files.knows_tokenizer and files.may_read(recipe.held_out):
            _check_any_fits(files, recipe.held_out, eval_prompts(recipe), limit, "evaluation")


def _check_any_fits(files: Files, task: Task, prompts: Sequence[Prompt], limit: int, kind: str) -> None:
    """Renders prompts until one fits; of a computed task, which has millions of a kind, the first."""
    shown = prompts[:NUM_CHECKED_PROMPTS] if task.computed else prompts
    if not any(len(files.renderer.start(prompt)) <= limit for prompt in shown):
        named = files.recipe.train.max_prompt_tokens
        told = f"train.max_prompt_tokens ({limit}); raise it"
        if limit < named:
            told = f"the {limit} tokens that max_new_tokens leaves of the models' positions; lower it"
        raise DataError(f"all {len(shown):,} {kind} prompts are longer than {told}, or shorten the prompts")


def _unused(files: Files) -> Iterator[Finding]:
    """Names each thing once that the chats of the data hold and a template leaves out.

    Raises DataError for a conversation that a template refuses, the student's or that of a teacher that reads its own.
    """
    if not files.knows_tokenizer:
        return
    # templates look at the roles and their order, and at what messages have
    kinds: dict[object, Prompt] = {}
    for prompt in files.written_prompts:
        messages = prompt.messages or ()
        keys = frozenset(key for message in messages for key in message)
        kinds.setdefault((tuple(message["role"] for message in messages), keys, prompt.tools is None), prompt)
    for reader, renderer in _readers(files):
        found: dict[str, str] = {}
        for prompt in kinds.values():
            try:
                unused = renderer.unused(prompt)
            except DataError as error:
                raise type(error)(f"the {reader} cannot be shown all data: {error}") from error
            for what in unused:
                found.setdefault(what, prompt.id)
        if found:
            named = ", ".join(f"{what} (of prompt {first})" for what, first in found.items())
            is_chat = any(prompt.messages for prompt in kinds.values())
            why = "its chat template leaves that out" if is_chat else "with chat: false it reads the text alone"
            other = "take another chat_template" if is_chat else "leave chat: false out"
            yield Finding(
                f"the {reader} does not read {named}: {why}", "warning", f"{other}, or take it out of the data"
            )


def _readers(files: Files) -> Iterator[tuple[str, Renderer]]:
    """The student, and the teachers that read prompts in their own chat templates."""
    yield "student", files.renderer
    for place, section in files.recipe.scorers.items():
        source = section.vocabulary
        if section.rendering == "own" and source is not None and files.has(source):
            yield place, files.renderer.like(files.tokenizers.other(source)[0])


def _spelling(files: Files) -> Iterator[Finding]:
    if files.knows_tokenizer and files.spelling:
        for prompt in files.spelling[:NUM_TRIED]:
            # not every tokenizer and template can keep them as text
            files.renderer.start(prompt)
        names = ", ".join(prompt.id for prompt in files.spelling[:3])
        yield Finding(
            f"prompts_with_special_tokens: {len(files.spelling):,} ({names}); the student reads the tokens that they spell as "
            "plain text",
            "warning",
            "where they are a chat that was rendered before, give it as a list of messages",
        )


def _responses(files: Files) -> tuple[Finding, ...]:
    """Raises RecipeError where none of the first training prompts has a response that the student's tokenizer can say."""
    recipe, section = files.recipe, files.recipe.responses
    if section is None or not files.training:
        return ()
    parts = recipe.task.places()
    if section.of_task and not any("solution" in part.carries for part in parts.values()):
        raise RecipeError(
            f"responses.type is solutions, but {next(iter(parts))}.solution_field does not say where they are; give it, or "
            "take responses from a file (jsonl, hub) or the teacher"
        )
    is_here = files.fetch or (section.is_local and recipe.task.is_local)
    if section.by_teacher or not files.knows_tokenizer or not is_here:
        return ()
    store = open_responses(section, response_setup(recipe, files.renderer))
    store.check(recipe.task.prompts("train"), recipe.task.name, NUM_CHECKED_PROMPTS)
    return ()


def _turns(files: Files) -> Iterator[Finding]:
    """How the chat template ends a turn, and where a response is not trained as the template would write it."""
    recipe = files.recipe
    chats = [part for part in recipe.task.places().values() if part.is_chat]
    if not files.knows_tokenizer or not chats or not files.renderer.has_template:
        return
    renderer, own = files.renderer, files.training and recipe.uses.given_responses and recipe.responses is None
    if own and files.may_read(recipe.task):
        given = [one for one in islice(recipe.task.prompts("train"), NUM_CHECKED_PROMPTS) if one.solution is not None]
        # beside the first ones those whose reasoning may have no room in what the prompt opens or closes
        tried = given[:NUM_RENDERED]
        if renderer.begins:
            tried += [one for one in given if ("</think>" in str(one.solution)) != (renderer.begins == "<think>")]
        for prompt in tried[:NUM_TRIED]:
            renderer.response(prompt, prompt.solution or "")
    end = renderer.turn_end
    token = renderer.tokenizer.convert_ids_to_tokens(end.token_id)
    how = (
        "as the chat template ends a turn"
        if end.text
        else "EOS: the chat template ends a turn with no token of its own"
    )
    yield Finding(f"a response ends with {token!r}, {how}")
    sources = files.tokenizers.sources
    if recipe.student.template_kwargs and all(map(files.has, sources)):
        tokenizers = renderer.tokenizer, *(files.tokenizers.other(source)[0] for source in sources)
        known = set(re.findall(r"\w+", " ".join(str(one.chat_template) for one in tokenizers)))
        if unknown := [key for key in recipe.student.template_kwargs if key not in known]:
            yield Finding(
                f"no chat template reads {', '.join(unknown)} of student.template_kwargs",
                "warning",
                "correct the name, or take it out",
            )
    if renderer.reads_clock:
        pinned = recipe.student.template_date
        when = (
            "the run's start, which its recipe keeps; student.template_date sets another" if pinned is None else pinned
        )
        yield Finding(f"the chat template reads the clock: every prompt has {when}")
    for note in renderer.notes:
        yield Finding(note, "warning", "change chat_template in the tokenizer's configuration where that is not meant")


def _tools(files: Files) -> Iterator[Finding]:
    """Raises TemplateError where the chat template cannot go on behind a tool's reply, unless episodes are cut there."""
    if not files.knows_tokenizer or not files.renderer.has_template:
        return
    for place, part, split in data_parts(files.recipe, files.training):
        prompt = next(iter(part.prompts(split)[:1]), None) if not part.computed and files.may_read(part) else None
        if prompt is None or prompt.messages is None or not prompt.tools:
            continue
        environment = part.environment(prompt)
        environment.close()
        if environment.max_turns == 1:
            continue
        called = {"role": "assistant", "content": "1"}
        reply = {"role": "tool", "name": "1", "content": "1", "tool_call_id": "call00001"}
        try:
            files.renderer.append(files.renderer.start(prompt), prompt, (called, reply))
        except RewriteError as error:
            if files.renderer.on_rewrite == "refuse":
                raise
            yield Finding(
                f"{place}: an episode ends at the first reply of a tool, for {error}",
                "warning",
                "take a model or settings (student.template_kwargs) whose chat template keeps earlier turns",
            )


def _overlap(files: Files) -> Iterator[Finding]:
    recipe = files.recipe
    # the splits of a computed task are disjoint by construction, and millions long
    if recipe.eval is None or (recipe.task.computed and recipe.eval_task is None):
        return
    held_out = eval_prompts(recipe)
    shared = overlap(recipe.task.prompts("train"), held_out, limit=MAX_COMPARED)
    yield Finding(overlap_message(shared, len(held_out)), "warning" if shared else "ok", name="overlap")
    if repeated := num_repeated(held_out):
        yield Finding(f"{repeated} evaluation prompts repeat an earlier one", "warning", name="repeated")


def _last_step(files: Files) -> Iterator[Finding]:
    share = files.recipe.run_method.plan(files.recipe.train.steps - 1).prefix_share
    if share >= ENDS_ON_POLICY:
        yield Finding(
            f"samples still begin with {share:.0%} of a teacher's response at the last step, so training does not end on the "
            "student's own; lower method.anneal_steps or raise train.steps",
            "warning",
        )


CHECKS = (
    Check("objects", "files", "models, rows and functions of a Python program", _objects),
    Check("task", "files", "data, and the fields that the method reads", _task),
    Check("evaluation", "files", "held-out data", _evaluation),
    Check("rows", "files", "rows, and those without a value in one of the fields", _rows),
    Check("section", "files", "each section by itself", _sections),
    Check("machine", "files", "device, packages and loggers", _machine),
    Check("tokenizer", "files", "tokens of the student against those of its teachers, one by one", _tokenizers),
    Check("layers", "files", "attention, and layers for LoRA, by the models' configurations", _layers),
    Check("teachers", "files", "each teacher against the run", _teachers),
    Check("prompts", "files", "the first prompts as tokens", _prompts),
    Check("unused", "files", "what the data holds and the chat template leaves out", _unused),
    Check("special tokens", "files", "texts of the data against the tokenizer's control tokens", _spelling),
    Check("responses", "files", "a teacher's own responses against the prompts", _responses),
    Check("turns", "files", "how the chat template ends a turn, and writes given responses", _turns),
    Check("tools", "files", "replies of tools as the chat template writes them", _tools),
    Check("rows", "advice", "rows, and those without a value in one of the fields", _rows),
    Check("unused", "advice", "what the data holds and the chat template leaves out", _unused),
    Check("special tokens", "advice", "texts of the data against the tokenizer's control tokens", _spelling),
    Check("data", "advice", "evaluation problems against those that are trained on", _overlap),
    Check("last step", "advice", "whether training ends on the student's own samples", _last_step),
)
"""In this order: a check may rely on those before it, and what needs no torch comes first."""
