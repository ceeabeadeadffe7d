"""A recipe: everything that decides a run, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from understudy import config
from understudy.engines import ENGINES, HF, VLLM, AnyEngine
from understudy.engines.sections import check_temperature, logprobs_mode
from understudy.errors import RecipeError, nearest
from understudy.methods import METHODS, REFUSED, Method
from understudy.models import DType
from understudy.recipe.needs import AnyResponses, check_groups, check_needs
from understudy.tasks import TASKS, Arithmetic, Hub, Jsonl, Mix
from understudy.teachers import REFERENCES, TEACHERS, AnyReference, AnyTeacher, Http, Privileged, Start, Stored
from understudy.teachers.stores.responses import RESPONSES
from understudy.trainer.settings import Async, Eval, Train
from understudy.types import Sampling

AnyTask = Arithmetic | Jsonl | Hub | Mix


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The section `student.lora`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    """None: every linear layer but the output layer."""
    save: Literal["merged", "adapter"] = "merged"
    """What the final `student/` directory holds."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Student:
    """The section `student`: a model to start from, or one to build."""

    model: str | None = None
    """A directory or a hub name."""
    starts: Mapping[str, str] = field(default_factory=dict)
    """Models by a name of your own, of which `start` picks one: for comparisons."""
    start: str | None = None
    build: Mapping[str, Any] | None = None
    """A model from scratch: `{architecture: llama, hidden_size: 64, num_layers: 2, num_heads: 4}`."""
    tokenizer: str | None = None
    """None: that of `model`, or the task's own for a model from scratch."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """For the chat template, such as `enable_thinking: false` of Qwen3."""
    revision: str | None = None
    dtype: DType = "float32"
    """Precision of the weights; `train.compute_dtype` is that of the computation."""
    attn_implementation: str | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.start is not None:
            self._pick_start(self.start)
        if (self.model is None) == (self.build is None):
            raise ValueError("give either model (a directory or a hub name) or build (sizes of a model from scratch)")

    def _pick_start(self, start: str) -> None:
        if start not in self.starts:
            raise ValueError(f"start is {start!r}; {nearest(start, self.starts)}")
        if self.model not in (None, self.starts[start]):
            raise ValueError("model and start are both given; keep one")
        object.__setattr__(self, "model", self.starts[start])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole recipe. Relative paths in it are relative to the working directory."""

    run_dir: str
    seed: int = 0
    device: str = "auto"
    """auto: the first GPU, else the CPU."""
    loggers: tuple[str, ...] = ()
    """Beside metrics.jsonl: tensorboard, wandb, trackio."""
    student: Student
    teacher: AnyTeacher | None = config.choice(TEACHERS, optional=True)
    teachers: Mapping[str, AnyTeacher] = config.choices(TEACHERS)
    """In place of `teacher`: several, by the names that the task's prompts have for them."""
    reference: AnyReference | None = config.choice(REFERENCES, optional=True)
    """None: the student's start, where the method asks for a reference."""
    responses: AnyResponses | None = config.choice(RESPONSES, optional=True)
    """Where a teacher's own responses come from: prefixes, slots of rejected samples, and what is imitated."""
    task: AnyTask = config.choice(TASKS)
    method: Method = config.choice(METHODS, refused=REFUSED)
    sampling: Sampling = Sampling()
    rollout: AnyEngine | None = config.choice(ENGINES, optional=True)
    """The engine that writes samples; None: `hf`, the student itself."""
    train: Train
    async_: Async | None = None
    """Generation, scoring and updates at the same time; None: one after the other."""
    eval: Eval | None = None
    eval_task: AnyTask | None = config.choice(TASKS, optional=True)
    """Where evaluation problems come from; None: `task`."""

    def __post_init__(self) -> None:
        if self.device != "auto" and self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu, cuda or cuda:N")
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher and teachers are both given; keep one")
        check_needs(
            self.method,
            self.judges,
            several=bool(self.teachers),
            reference=self.reference,
            responses=self.responses,
            rejects=self.eval is not None and self.eval.reject_below is not None,
        )
        plans = [part.plan(0) for part in self.method.members]
        if self.sampling.temperature == 0 and any(plan.on_policy_share > 0 for plan in plans):
            raise ValueError(
                "sampling.temperature is 0; a student that learns from its own samples has to draw them (above 0)"
            )
        check_groups(self.method, self.train)
        self._check_async()
        self._check_engine()
        self.run_method  # noqa: B018 (raises for phases that no step falls into)
        if self.eval_task is not None and self.eval is None:
            raise ValueError("eval_task is given without a section eval")

    def _check_engine(self) -> None:
        """Raises RecipeError for sampling that the engine, or a teacher's, cannot do."""
        if isinstance(self.engine, VLLM):
            check_temperature(self.sampling)
            logprobs_mode(self.sampling)
        for section in self.judges.values():
            if isinstance(section, Http):
                section.check_temperature(self.sampling.temperature or 1.0)

    def _check_async(self) -> None:
        if self.async_ is None:
            return
        if isinstance(self.engine, HF) and not self.engine.copy:
            raise ValueError(
                "async has samples written beside the update, but they are written with the weights that are updated; set "
                "rollout: {type: hf, copy: true}, which takes the memory of the weights once more, or use an engine "
                "(rollout.type: vllm)"
            )
        if any(isinstance(section, Stored) for section in self.judges.values()):
            raise ValueError("async has nothing to overlap where samples are stored; remove the section async")
        moving = [name for name, section in self.judges.items() if isinstance(section, Privileged) and section.ema]
        starts = isinstance(self.reference, Start) or self.reference is None
        if self.student.lora is not None and "reference" in self.method.needs and starts:
            # the live model without its adapters
            moving.append("reference")
        if moving:
            raise ValueError(
                f"async has the {moving[0]} score beside the update, but it runs on the student's own weights or follows "
                "them; give it a model of its own, or remove the section async"
            )

    @property
    def engine(self) -> AnyEngine:
        """What writes samples."""
        return self.rollout or HF()

    @property
    def held_out(self) -> AnyTask:
        """The task that evaluation problems come from."""
        return self.eval_task or self.task

    @property
    def judges(self) -> dict[str, AnyTeacher]:
        """Every teacher by its name; one alone is called "teacher"."""
        return dict(self.teachers) if self.teacher is None else {"teacher": self.teacher}

    @property
    def run_method(self) -> Method:
        """The method with what depends on the run filled in."""
        return self.method.for_run(self.train.steps, self.sampling.max_new_tokens)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML with dotted overrides. `run_dir` defaults to runs/NAME of the file. Raises RecipeError."""
    values = config.override(config.read_yaml(path), overrides)
    values.setdefault("run_dir", f"runs/{path.stem}")
    return config.parse(Recipe, values)


def differing_keys(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Leaves that are not equal, by their path."""
    first, second = (config.flatten(config.dump(recipe)) for recipe in (one, other))
    keys = [*first, *(key for key in second if key not in first)]
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


RESUMABLE = ("run_dir", "device", "train.save_every", "train.keep_last", "train.keep_best")
"""Keys that may change when a run is resumed: they do not change what it computes."""


RESUMABLE_SECTIONS = ("loggers", "rollout")
RESUMABLE_ENDS = (
    *(".url", ".api_key_env", ".token_env", ".timeout_s", ".deadline_s", ".max_retries", ".backoff_s"),
    *(".max_concurrency", ".break_after", ".batch_tokens", ".cache"),
)
"""Where a server is and how patiently it is asked."""


def _is_resumable(key: str) -> bool:
    return key in RESUMABLE or key.split(".")[0] in RESUMABLE_SECTIONS or key.endswith(RESUMABLE_ENDS)


def check_same_recipe(saved: Recipe, given: Recipe) -> None:
    """Raises RecipeError that lists the keys in which a resumed run would differ from its start."""
    changed = {key: pair for key, pair in differing_keys(saved, given).items() if not _is_resumable(key)}
    if changed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise RecipeError(
            f"the run in {saved.run_dir} was started with another recipe: {listed}. Restore these keys, or start a new run "
            "with another run_dir"
        )


__all__ = ["Lora", "Recipe", "Student", "check_same_recipe", "differing_keys", "load_recipe"]
