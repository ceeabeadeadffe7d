"""A recipe: everything that decides a run, as one frozen value whose sections fit together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from understudy import config
from understudy.engines import ENGINES, HF, EngineSection
from understudy.errors import RecipeError, check_range, nearest
from understudy.given import is_given
from understudy.launchers import LAUNCHERS, Ray, Roles
from understudy.methods import METHODS, REFUSED, Method
from understudy.methods.base import Uses
from understudy.models import DType
from understudy.recipe.names import NO_KEYS, OTHER_NAMES, OTHER_TYPES
from understudy.recipe.rules import RULES
from understudy.tasks import TASKS, Task
from understudy.tasks.renderer import OnRewrite
from understudy.tasks.responses import ResponseSection
from understudy.teachers import REFERENCES, TEACHERS, Start, TeacherSection
from understudy.teachers.stores.responses import RESPONSES
from understudy.text import HIDDEN, plain_tree
from understudy.trainer.settings import Async, Eval, Parallel, Train
from understudy.types import Sampling


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The section `student.lora`."""

    rank: int = 16
    """Columns of the two factors of an update."""
    alpha: float = 32.0
    """An update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] | None = None
    """Ends of module names, such as [q_proj, v_proj]. None or all-linear: every linear layer but the output layer."""
    save: Literal["merged", "adapter"] = "merged"
    """Contents of the final `student/` directory: the merged model with the adapter in `student/adapter/`, or the adapter."""

    def __post_init__(self) -> None:
        check_range(self, 1, "rank", off="without a section lora all weights are trained")
        check_range(self, 0, "alpha", above=True)
        # at 1 adapters would have nothing to learn from
        check_range(self, 0, "dropout", high=0.99)
        if self.target_modules == ():
            raise ValueError(
                "target_modules is []; null takes every linear layer, and without a section lora all are trained"
            )
        if self.target_modules is not None and "all-linear" in tuple(self.target_modules):
            raise ValueError(
                "target_modules is a list with all-linear; write target_modules: all-linear, without a list"
            )


@dataclass(frozen=True, kw_only=True)
class Student:
    """The section `student`: a model to start from, or one to build."""

    model: str | None = None
    """A directory or a hub name."""
    starts: Mapping[str, str] = field(default_factory=dict)
    """Models by names you choose; `start` selects one. For comparisons."""
    start: str | None = None
    """Name of the entry in `starts` that the student starts from."""
    build: Mapping[str, Any] | None = None
    """A model from scratch: `{architecture: llama, hidden_size: 64, num_layers: 2, num_heads: 4}`."""
    tokenizer: str | None = None
    """None: that of `model`, or the task's own for a model from scratch."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the chat template, such as `enable_thinking: false` of Qwen3."""
    template_date: str | None = None
    """The date (and time, ISO 8601) that a chat template reads from its clock; None: the run's start, kept in its recipe."""
    on_rewrite: OnRewrite = "refuse"
    """Refuse a run whose chat template rewrites earlier turns, or cut: end the episode there."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    dtype: DType = "float32"
    """Precision of the weights; `train.compute_dtype` is that of the computation."""
    attn_implementation: str | None = None
    """Name of the attention in transformers, such as sdpa or flash_attention_2; None: its choice."""
    vision: Literal["frozen", "trained"] = "frozen"
    """Whether the image encoder, and all else outside the language model, is trained too."""
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.template_date is not None:
            try:
                datetime.fromisoformat(self.template_date)
            except ValueError:
                raise ValueError(
                    f"template_date is {self.template_date!r}; it must be a date or a date and time, such as 2026-01-31 or "
                    "2026-01-31T09:30:00"
                ) from None
        if self.start is not None:
            if self.start not in self.starts:
                raise ValueError(f"start is {self.start!r}; {nearest(self.start, self.starts)}")
            if self.model not in (None, self.starts[self.start]):
                raise ValueError("model and start are both given; keep one")
            object.__setattr__(self, "model", self.starts[self.start])
        if self.vision == "trained" and self.lora is not None:
            raise ValueError(
                "vision is trained, but with lora the adapters alone are, in the language model; remove one of them"
            )
        if (self.model is None) == (self.build is None):
            raise ValueError("give either model (a directory or a hub name) or build (sizes of a model from scratch)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole recipe. Relative paths in it are relative to the working directory."""

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES
    no_keys: ClassVar[Mapping[str, str]] = NO_KEYS
    other_types: ClassVar[Mapping[str, tuple[str, ...]]] = OTHER_TYPES

    run_dir: str
    seed: int = 0
    """Seed of every draw: the same seed draws the same prompts and samples."""
    device: str = "auto"
    """auto: the first GPU, else the CPU."""
    loggers: tuple[str, ...] = ()
    """Beside metrics.jsonl: tensorboard, wandb, trackio."""
    callbacks: tuple[str, ...] = ()
    """Names of the callbacks that a Python program gives (`understudy.distil`)."""
    student: Student
    teacher: TeacherSection | None = config.choice(TEACHERS, optional=True)
    teachers: Mapping[str, TeacherSection] = config.choices(TEACHERS)
    """Several teachers in place of `teacher`, by the names that the task's prompts use."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each of `teachers`: every sample is scored by all of them, and prompts name none."""
    reference: TeacherSection | None = config.choice(REFERENCES, optional=True)
    """None: the student's start, where the method asks for a reference."""
    references: Mapping[str, TeacherSection] = config.choices(REFERENCES)
    """In place of `reference`: one for the samples of each of `teachers`, by the teacher's name."""
    responses: ResponseSection | None = config.choice(RESPONSES, optional=True)
    """Source of a teacher's own responses: for prefixes, slots of rejected samples, and imitation."""
    task: Task = config.choice(TASKS)
    method: Method = config.choice(METHODS, refused=REFUSED)
    sampling: Sampling = Sampling()
    rollout: EngineSection | None = config.choice(ENGINES, optional=True)
    """The engine that writes samples; None: `hf`, the student itself."""
    train: Train
    async_: Async | None = None
    """Generation, scoring and updates at the same time; None: one after the other."""
    parallel: Parallel | None = None
    """The student in shards over the processes of `torchrun`; None: each holds all of it."""
    launcher: Ray | None = config.choice(LAUNCHERS, optional=True)
    """Who starts the processes of a run on several machines; None: whoever starts `understudy train`."""
    eval: Eval | None = None
    eval_task: Task | None = config.choice(TASKS, optional=True)
    """Source of evaluation problems; None: `task`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu, cuda or cuda:N")
        if "$" in self.run_dir:
            raise ValueError(
                f"run_dir is {self.run_dir!r}; variables are not replaced in a recipe: write the directory out, or begin with ~"
            )
        if self.run_dir.startswith("~"):
            try:
                object.__setattr__(self, "run_dir", str(Path(self.run_dir).expanduser()))
            except RuntimeError as error:
                raise ValueError(f"run_dir is {self.run_dir!r}, but there is no such home directory") from error
        for name in self.callbacks:
            if not is_given(name):
                raise ValueError(
                    f"callbacks has {name!r}; callbacks are given from Python: understudy.distil(callbacks=...)"
                )
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher and teachers are both given; keep one")
        if self.reference is not None and self.references:
            raise ValueError("reference and references are both given; keep one")
        if self.eval_task is not None and self.eval is None:
            raise ValueError("eval_task is given without a section eval")
        if self.eval is not None and self.eval.path is not None:
            if self.eval_task is not None:
                raise ValueError("eval.path and eval_task are both given; keep one")
            _ = self.held_out
        for rule in RULES:
            rule(self)

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Recipe:
        """A recipe from YAML with overrides, as in "train.lr=1e-5". Raises RecipeError."""
        return load_recipe(Path(path), overrides)

    @property
    def method_name(self) -> str:
        """The name in messages and the model card, such as "GKD"."""
        return type(self.method).__name__

    @property
    def roles(self) -> Roles:
        """The parts that a launcher starts processes for."""
        return Roles(
            run_dir=Path(self.run_dir),
            student=self.student.model,
            dtype=self.student.dtype,
            sampling=self.sampling,
            engine=self.engine,
            teachers={self.place_of(name): section for name, section in self.all_teachers.items()},
        )

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the student."""
        return self.parallel is not None and self.parallel.shard > 1

    @property
    def engine(self) -> EngineSection:
        """The engine that writes samples."""
        return self.rollout or HF()

    @cached_property
    def held_out(self) -> Task:
        """The task that evaluation problems come from."""
        if self.eval is None or self.eval.path is None:
            return self.eval_task or self.task
        return self.task.on_file(self.eval.path)

    @property
    def has_images(self) -> bool:
        """Whether a prompt of training or evaluation may have images."""
        return self.task.has_images or self.held_out.has_images

    @property
    def all_teachers(self) -> dict[str, TeacherSection]:
        """Every teacher that is asked, by its name; one alone is called "teacher"."""
        if self.teacher is None or self.leaves_teacher:
            return dict(self.teachers)
        return {"teacher": self.teacher}

    @property
    def all_references(self) -> dict[str, TeacherSection]:
        """Every reference that is asked, by its place in the recipe; equal ones are one, in the place of the first."""
        if "reference" not in self.method.needs:
            return {}
        places: dict[TeacherSection, str] = {}
        for name, section in self.references.items():
            places.setdefault(section, f"references.{name}")
        return {place: section for section, place in places.items()} or {"reference": self.reference or Start()}

    @property
    def scorers(self) -> dict[str, TeacherSection]:
        """Every teacher and reference that is asked, by its place in the recipe."""
        return {self.place_of(name): section for name, section in self.all_teachers.items()} | self.all_references

    @property
    def leaves_teacher(self) -> bool:
        """Whether the recipe never uses section `teacher`, so that it is not loaded."""
        rejects = self.eval is not None and self.eval.reject_below is not None
        by_teacher = self.responses is not None and self.responses.by_teacher
        return self.teacher is not None and not (self.method.needs - {"none", "reference"} or rejects or by_teacher)

    def place_of(self, teacher: str) -> str:
        """The place of a teacher's section in the recipe."""
        return f"teachers.{teacher}" if self.teachers else "teacher"

    def dated(self, date: str | None) -> Recipe:
        """Returns the recipe with `date` as its `template_date`, unless it has one."""
        if date is None or self.student.template_date is not None:
            return self
        return replace(self, student=replace(self.student, template_date=date))

    @property
    def temperature(self) -> float:
        """Temperature of the compared distributions: the sampling temperature, or 1 for greedy samples."""
        return self.sampling.temperature or 1.0

    @cached_property
    def run_method(self) -> Method:
        """The method with its run-dependent values filled in."""
        return self.method.for_run(self.train.steps, self.sampling.max_new_tokens)

    @cached_property
    def uses(self) -> Uses:
        """Everything the method uses at any step of the run."""
        return self.run_method.uses(self.train.steps)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML with dotted overrides. `run_dir` defaults to runs/NAME of the file. Raises RecipeError."""
    values = config.override(config.read_yaml(path), overrides)
    values.setdefault("run_dir", f"runs/{path.stem}")
    for key, value in config.flatten(values).items():
        if HIDDEN in str(value):
            raise RecipeError(
                f"{key} holds {HIDDEN}, which a run writes in place of what may be a secret; give it again, as {key}=VALUE"
            )
    return config.parse(Recipe, values)


RESUMABLE = (
    *("run_dir", "device", "train.save_every", "train.keep_last", "train.keep_best"),
    *(f"parallel.{key}" for key in ("shard", "replicate", "teachers", "reshard", "gradients", "vocabulary")),
)
"""Keys that may change when a run is resumed: they change nothing that it computes but rounding."""
RESUMABLE_SECTIONS = ("launcher.", "loggers.", "rollout.", "train.on_alarm.")
RESUMABLE_ENDS = (
    *(".url", ".api_key_env", ".token_env", ".timeout_s", ".deadline_s", ".max_retries", ".backoff_s"),
    *(".max_concurrency", ".break_after", ".batch_tokens", ".cache"),
)
"""Suffixes of keys for access to a server: address, tokens, timeouts, retries, batching and cache."""


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value for a key."""
    return key in RESUMABLE or f"{key}.".startswith(RESUMABLE_SECTIONS) or key.endswith(RESUMABLE_ENDS)


def check_same_recipe(saved: Recipe, given: Recipe) -> None:
    """Raises RecipeError that lists the keys in which a resumed run would differ from its start."""
    dated = given.dated(saved.student.template_date)
    changed = [
        text
        for key, text in config.changes(*(plain_tree(config.dump(one)) for one in (saved, dated))).items()
        if not may_change(key)
    ]
    if changed:
        raise RecipeError(
            f"the run in {saved.run_dir} was started with another recipe: {'; '.join(changed)}. Restore these keys, or start "
            "a new run with another run_dir"
        )
