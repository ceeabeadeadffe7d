"""A recipe: everything that decides a run, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import config
from .errors import RecipeError
from .methods import METHODS, REFUSED, Method
from .models import DType
from .tasks import TASKS, Arithmetic, Hub, Jsonl
from .teachers import TEACHERS, Local
from .trainer.settings import Eval, Train
from .types import Sampling


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
        if (self.model is None) == (self.build is None):
            raise ValueError("give either model (a directory or a hub name) or build (sizes of a model from scratch)")


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
    teacher: Local | None = config.choice(TEACHERS, optional=True)
    task: Arithmetic | Jsonl | Hub = config.choice(TASKS)
    method: Method = config.choice(METHODS, refused=REFUSED)
    sampling: Sampling = Sampling()
    train: Train
    eval: Eval | None = None
    eval_task: Arithmetic | Jsonl | Hub | None = config.choice(TASKS, optional=True)
    """Where evaluation problems come from; None: `task`."""

    def __post_init__(self) -> None:
        if self.device != "auto" and self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu, cuda or cuda:N")
        _check_teacher(self.method, self.teacher)
        if self.sampling.temperature == 0 and self.method.plan(0).on_policy_share > 0:
            raise ValueError(
                "sampling.temperature is 0; a student that learns from its own samples has to draw them (above 0)"
            )
        if self.eval_task is not None and self.eval is None:
            raise ValueError("eval_task is given without a section eval")

    @property
    def held_out(self) -> Arithmetic | Jsonl | Hub:
        """The task that evaluation problems come from."""
        return self.eval_task or self.task


def _check_teacher(method: Method, teacher: Local | None) -> None:
    asked = method.needs - {"none"}
    if asked and teacher is None:
        raise ValueError(
            f"the method {type(method).__name__} needs a teacher ({', '.join(sorted(asked))} scores); add a section "
            "`teacher: {type: local, model: ...}`"
        )
    if not asked and teacher is not None:
        raise ValueError(f"the method {type(method).__name__} asks no teacher; remove the section teacher")


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


RESUMABLE = ("run_dir", "loggers", "device", "train.save_every", "train.keep_last", "train.keep_best")
"""Keys that may change when a run is resumed: they do not change what it computes."""


def check_same_recipe(saved: Recipe, given: Recipe) -> None:
    """Raises RecipeError that lists the keys in which a resumed run would differ from its start."""
    changed = {
        key: pair
        for key, pair in differing_keys(saved, given).items()
        if key not in RESUMABLE and not key.startswith("loggers")
    }
    if changed:
        listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise RecipeError(
            f"the run in {saved.run_dir} was started with another recipe: {listed}. Restore these keys, or start a new run "
            "with another run_dir"
        )


__all__ = ["Lora", "Recipe", "Student", "check_same_recipe", "differing_keys", "load_recipe"]
