"""From a recipe to the parts of a run: the student, its teachers, the engine, and a teacher's own responses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from understudy.engines import Engine, EngineSetup
from understudy.environments import single_turn
from understudy.environments.play import play
from understudy.errors import RecipeError
from understudy.lazy import nn, torch
from understudy.models import (
    Vision,
    apply_lora,
    build_causal_lm,
    compile_blocks,
    disable_dropout,
    enable_gradient_checkpointing,
    fingerprint_files,
    freeze_vision,
    has_bfloat16,
    lm_head,
    load_causal_lm,
    probe_head,
    probe_images,
    row_style,
    stop_ids,
    vocabulary_size,
)
from understudy.recipe.schema import Recipe
from understudy.recipe.tokenizers import Tokenizers
from understudy.tasks import Intake, Split, Task
from understudy.tasks.renderer import Renderer
from understudy.teachers import (
    Judge,
    Responder,
    RoutedTeacher,
    Setup,
    Source,
    Teacher,
    TeacherSection,
    WeightedTeacher,
)
from understudy.teachers.base import hash_facts
from understudy.teachers.rendering import OwnRendering
from understudy.teachers.stores.responses import ResponseSetup, ResponseStore, open_responses
from understudy.trainer.collect import TOKEN_SCORES
from understudy.trainer.distributed import Ranks
from understudy.trainer.publish import NUM_PROBED, Publisher
from understudy.trainer.update import StudentModel
from understudy.types import Prompt, Request, Sample, Sampling

NUM_CHECKED_PROMPTS = 10_000
"""Training prompts whose teacher and responses are looked up."""


def choose_device(name: str) -> torch.device:
    """Raises RecipeError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RecipeError(f"device is {name}, which torch does not see on this machine; use auto or cpu")
    if ":" not in name:
        # torchrun starts one process for each GPU of a machine
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


# --- the student --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Loaded(StudentModel):
    """A student that is ready to sample and to train."""

    renderer: Renderer
    tokenizers: Tokenizers


def load_student(recipe: Recipe, *, resume_from: Path | None = None, tokenizers: Tokenizers | None = None) -> Loaded:
    """Loads the student of a recipe, or as a checkpoint left it, with a tokenizer that its teachers share.

    `tokenizers`: those that were loaded before. Raises RecipeError, VocabularyError.
    """
    device = choose_device(recipe.device)
    tokenizers = tokenizers or Tokenizers(recipe)
    tokenizer = tokenizers.student
    vocab_size = vocabulary_size(tokenizer)
    # raises where a teacher has other tokens
    absent = tokenizers.absent
    tokenizers.compare_ends()
    student, lora, vision = recipe.student, recipe.student.lora, tokenizers.vision
    model = load_base(recipe, tokenizer, vocab_size, device, None if lora else resume_from, vision)
    if vision is not None and student.vision == "frozen":
        freeze_vision(model)
    if lora is not None:
        targets = lora.target_modules or "all-linear"
        model = apply_lora(
            model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=targets, seed=recipe.seed
        )
        if resume_from is not None:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(model, load_file(resume_from / "adapter_model.safetensors"))
    disable_dropout(model)
    probe_head(model)
    if vision is not None:
        probe_images(model)
    if recipe.train.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if recipe.train.compile:
        compile_blocks(model)
    return Loaded(
        model=model.train(),
        device=device,
        vocab_size=vocab_size,
        absent=absent,
        # imitation knows no rollout temperature
        temperature=recipe.temperature if recipe.uses.own_samples or recipe.run_method.needs & TOKEN_SCORES else 1.0,
        compute_dtype=compute_dtype(recipe, model.dtype, device),
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        style=row_style(model, share_prompts=recipe.train.share_prompts),
        fused_kernels=recipe.train.fused_kernels,
        renderer=Renderer(
            tokenizer,
            student.template_kwargs,
            stop_ids(tokenizer, model),
            student.template_date,
            vision,
            student.on_rewrite,
        ),
        tokenizers=tokenizers,
    )


def compute_dtype(recipe: Recipe, weights: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The precision of mixed precision over weights of that precision; None: they are computed with as they are.

    Raises RecipeError for one that the device has no mixed precision for.
    """
    named = recipe.train.compute_dtype
    if named == "auto":
        return torch.bfloat16 if weights == torch.float32 and has_bfloat16(device) else None
    if named is None or getattr(torch, named) == weights:
        return None
    if named == "float32" and device.type == "cpu":
        raise RecipeError(
            f"train.compute_dtype is float32, but the student's weights are {str(weights).removeprefix('torch.')}, and a CPU "
            "has no mixed precision above the weights'; set student.dtype: float32"
        )
    dtype: torch.dtype = getattr(torch, named)
    return dtype


def load_base(
    recipe: Recipe,
    tokenizer: Any,
    vocab_size: int,
    device: torch.device,
    resume_from: Path | None,
    vision: Vision | None = None,
) -> Any:
    """Loads or builds the student without adapters."""
    student = recipe.student
    source = student.model if resume_from is None else str(resume_from)
    if source is not None:
        return load_causal_lm(
            source,
            dtype=student.dtype,
            device=str(device),
            attn_implementation=student.attn_implementation,
            revision=student.revision if source == student.model else None,
            # teachers and references may be the same one
            copy=True,
            vision=vision,
        )
    assert student.build is not None
    return build_causal_lm(
        student.build,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        dtype="float32" if student.dtype == "auto" else student.dtype,
        device=device,
        seed=recipe.seed,
    )


def prompt_limit(
    recipe: Recipe, sampling: Sampling, positions: Iterable[int | None], engine: Engine | None = None
) -> int:
    """The longest prompt in tokens that leaves room for a response, by `train.max_prompt_tokens`, the positions of models,
    and the engine.

    Raises RecipeError where no room is left.
    """
    rooms = [("a model has {} positions (max_position_embeddings)", room) for room in positions]
    if engine is not None:
        rooms.append(("the rollout engine takes {} tokens in all (--max-model-len)", engine.num_positions))
    limit = recipe.train.max_prompt_tokens
    for described, room in rooms:
        if room is None:
            continue
        limit = min(limit, room - sampling.max_new_tokens)
        if limit < 1:
            raise RecipeError(
                f"max_new_tokens is {sampling.max_new_tokens}, but {described.format(room)}: no prompt fits before the "
                "response; lower max_new_tokens, or use what takes more"
            )
    return limit


def eval_prompts(recipe: Recipe) -> Sequence[Prompt]:
    """The held-out problems that the section `eval` names."""
    assert recipe.eval is not None
    prompts = recipe.held_out.prompts(recipe.eval.split)
    return prompts if recipe.eval.problems is None else prompts[: recipe.eval.problems]


def data_parts(recipe: Recipe, training: bool = True) -> list[tuple[str, Task, Split]]:
    """The tasks and splits whose prompts a run reads, each with its place in the recipe: "task.parts.maths.train".

    `training`: those of the training too, not of the evaluation alone.
    """
    found: list[tuple[str, Task, Split]] = []
    if training:
        found += [(f"{place}.train", part, "train") for place, part in recipe.task.places().items()]
    if recipe.eval is not None:
        split = recipe.eval.split
        for place, part in recipe.held_out.places("eval_task" if recipe.eval_task else "task").items():
            found.append((f"{place}.{split}", part, split))
    return found


def read_intakes(
    recipe: Recipe, training: bool = True, may_read: Callable[[Task], bool] = lambda task: True
) -> dict[str, Intake]:
    """Intake of each source of prompts and responses, by place in the recipe. Raises DataError for bad data."""
    found = {name: part.intake(split) for name, part, split in data_parts(recipe, training) if may_read(part)}
    if training and recipe.responses is not None:
        found["responses"] = recipe.responses.intake(may_read)
    return {name: intake for name, intake in found.items() if intake is not None}


def read_environment_files(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Fingerprints of the files that environments read, such as a corpus to search, by place in the recipe."""
    parts = {place.rpartition(".")[0]: part for place, part, _ in data_parts(recipe)}
    return {
        f"{place}.{key}": dict(facts)
        for place, part in parts.items()
        for key, facts in part.environment_files().items()
    }


# --- teachers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teachers:
    """The opened teachers of a run."""

    teacher: Teacher | None = None
    """Gives token scores; of several the one that each sample names."""
    judge: Judge | None = None
    """Says a digit."""
    reference: Teacher | None = None
    """Gives the reference's token scores; of several those of the one for the teacher that each sample names."""
    responder: Responder | None = None
    """Writes responses of its own."""

    @property
    def models(self) -> list[nn.Module]:
        """The models in this process that read what the student reads."""
        scorers = [one for one in (self.teacher, self.reference) if one is not None]
        members = [member for one in scorers for member in one.members().values()]
        return [member.model for member in members if member.model is not None]

    def close(self) -> None:
        """Ends connections."""
        for one in (self.teacher, self.judge, self.reference):
            if one is not None:
                one.close()


def load_teachers(recipe: Recipe, loaded: Loaded) -> Teachers:
    """Opens the teachers and the reference models, at the student's temperature and vocabulary."""
    with ExitStack() as stack:

        def open_section(name: str, section: TeacherSection) -> Any:
            reader = None
            if section.rendering == "own" and section.vocabulary is not None:
                reader = loaded.renderer.like(loaded.tokenizers.other(section.vocabulary)[0])
            setup = teacher_setup(recipe, loaded, name, section, reader)
            one: Any = section.open(setup)
            stack.callback(one.close)
            return one if reader is None else OwnRendering(one, setup, reader)

        opened = {name: open_section(name, section) for name, section in recipe.all_teachers.items()}
        references = {section: open_section(place, section) for place, section in recipe.all_references.items()}
        # from here on they are closed by the caller
        stack.pop_all()
    scorers = {name: one for name, one in opened.items() if not recipe.all_teachers[name].says_digits}
    teacher: Teacher | None = next(iter(scorers.values()), None)
    reference: Teacher | None = next(iter(references.values()), None)
    together = partial(WeightedTeacher, weights=recipe.weights) if recipe.weights else RoutedTeacher
    if recipe.teachers:
        teacher = together(scorers)
    if len(references) > 1:
        reference = together({name: references[section] for name, section in recipe.references.items()})
    return Teachers(
        teacher=teacher,
        judge=next((one for name, one in opened.items() if name not in scorers), None),
        reference=reference,
        responder=opened["teacher"]
        if "teacher" in opened and recipe.all_teachers["teacher"].writes_responses
        else None,
    )


def read_models(recipe: Recipe, teachers: Teachers) -> dict[str, dict[str, Any]]:
    """Fingerprints of the student's start and tokenizer, and of all teachers, judges and references, by place in the recipe.

    Of a chat model behind an address nothing is known but its name, which the recipe holds.
    """
    student = recipe.student
    sources = {"student.tokenizer": student.tokenizer and Source(student.tokenizer, student.revision)}
    sources["student"] = student.model and Source(student.model, student.revision)
    sources |= {place: section.weights.source for place, section in recipe.scorers.items() if section.weights}
    found: dict[str, dict[str, Any]] = {}
    for place, source in sources.items():
        facts = source and fingerprint_files(source.name, source.revision)
        if source and facts:
            found[place] = {"source": source.name, "digest": hash_facts(sorted(facts.items())), **facts}
    opened: dict[str, Teacher] = {}
    if teachers.teacher is not None:
        opened |= {recipe.place_of(name): one for name, one in teachers.teacher.members().items()}
    if teachers.reference is not None:
        several = len(recipe.all_references) > 1
        members = teachers.reference.members().items()
        opened |= {f"references.{name}" if several else name: one for name, one in members}
    for place, one in opened.items():
        if one.origin is not None:
            shown = recipe.scorers[place].shown
            found[place] = {"source": shown, "digest": one.origin, "fingerprint": one.origin[:16]}
    return found


def teacher_setup(
    recipe: Recipe, loaded: Loaded, name: str, section: TeacherSection | None = None, reader: Renderer | None = None
) -> Setup:
    """The student's side of the run, for a teacher of that name; without a section it has the student's tokenizer.

    `reader`: its own chat template, if it writes with that.
    """
    student, renderer = recipe.student, loaded.renderer
    as_student = reader or renderer
    source = None if section is None else section.vocabulary
    vision = loaded.tokenizers.vision if source is None else loaded.tokenizers.other_vision(source)

    def generate(
        model: nn.Module, prompts: Sequence[Prompt], sampling: Sampling, *, reader: Renderer | None = None
    ) -> list[str | None]:
        asked = as_student if reader is None else reader
        # the teacher may end its turns with another token than the student
        ends = tuple({*asked.stop_ids, *stop_ids(asked.tokenizer, model)})
        setup = replace(engine_setup(recipe, loaded), stop_ids=ends, autocast=None)
        if reader is not None:
            size = min(vocabulary_size(reader.tokenizer), lm_head(model).num_tokens)
            setup = replace(setup, tokenizer=reader.tokenizer, vocab_size=size, absent=())
        requests = [Request(prompt, 0, asked.start(prompt)) for prompt in prompts]
        written = play(setup.hf(model), asked, single_turn, requests, sampling, step=0, stream="teacher")
        return [None if sample.truncated else sample.text for sample in written]

    return Setup(
        name=name,
        vocab_size=loaded.vocab_size,
        absent=loaded.absent,
        teacher_tokenizer=None if source is None else loaded.tokenizers.other(source)[0],
        temperature=recipe.temperature,
        device=loaded.device,
        renderer=renderer,
        student=loaded.model,
        start=student.model,
        start_revision=student.revision,
        fresh_student=lambda: load_base(recipe, renderer.tokenizer, loaded.vocab_size, loaded.device, None),
        vision=vision,
        seed=recipe.seed,
        share_prompts=recipe.train.share_prompts,
        grade=recipe.task.reward,
        generate=generate,
    )


def open_store(recipe: Recipe, loaded: Loaded, teachers: Teachers) -> ResponseStore | None:
    """Opens the source of a teacher's own responses. Raises RecipeError where none suits the training prompts."""
    section = recipe.responses
    if section is None:
        return None
    teacher = (teachers.teacher or teachers.judge) if section.by_teacher else None
    fingerprint = None if teacher is None else teacher.fingerprint
    store = open_responses(section, response_setup(recipe, loaded.renderer, teachers.responder, fingerprint))
    store.check(recipe.task.prompts("train"), recipe.task.name, limit=NUM_CHECKED_PROMPTS)
    return store


def response_setup(
    recipe: Recipe, renderer: Renderer, responder: Responder | None = None, fingerprint: str | None = None
) -> ResponseSetup:
    """The run's side of a store of responses; without a responder for sections that need none."""
    generate = None
    if recipe.responses is not None and responder is not None:
        sampling = recipe.responses.sampling(recipe.sampling)
        generate = partial(responder.respond, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature)
    return ResponseSetup(
        renderer=renderer,
        seed=recipe.seed,
        run_dir=Path(recipe.run_dir),
        sampling=recipe.sampling,
        generate=generate,
        fingerprint=fingerprint,
    )


# --- the engine ---------------------------------------------------------------------------------------------------------


def engine_setup(recipe: Recipe, loaded: Loaded) -> EngineSetup:
    """The student's side of the run, for its engine."""
    held_out = None if recipe.eval is None else recipe.eval.sampling
    return EngineSetup(
        model=loaded.model,
        tokenizer=loaded.renderer.tokenizer,
        vocab_size=loaded.vocab_size,
        absent=loaded.absent,
        stop_ids=loaded.renderer.stop_ids,
        autocast=loaded.compute_dtype,
        seed=recipe.seed,
        sampling=recipe.sampling,
        max_new_tokens=max(one.max_new_tokens for one in (recipe.sampling, held_out) if one is not None),
        run_dir=Path(recipe.run_dir),
    )


def open_engine(recipe: Recipe, loaded: Loaded, ranks: Ranks, version: int, opened: ExitStack) -> Publisher:
    """The engine of a run with the student's weights, `version` updates old; `opened` closes it.

    Raises RecipeError, and EngineError for an engine that does not answer or computes something else.
    """
    engine = recipe.engine.open(engine_setup(recipe, loaded))
    opened.callback(engine.close)
    # an engine elsewhere is compared on some prompts before there are samples
    prompts = islice(recipe.task.prompts(recipe.task.first_split), NUM_PROBED) if engine.remote else ()
    rendered = [(prompt, loaded.renderer.start(prompt)) for prompt in prompts]
    first = [
        Sample(prompt, 0, ids, torch.zeros_like(ids, dtype=torch.uint8), 1, "data", "") for prompt, ids in rendered
    ]
    publish = Publisher(engine, loaded, recipe.engine.pushed(loaded.model), ranks, first)
    publish(version, ())
    return publish


@contextmanager
def sampling_with(recipe: Recipe, loaded: Loaded) -> Iterator[Engine]:
    """An engine with the weights as they are, compared before and after where it is remote, and closed at the end."""
    with ExitStack() as opened:
        engine = open_engine(recipe, loaded, Ranks(), 0, opened).engine
        yield engine
        engine.verify()
