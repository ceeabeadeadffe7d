"""The section `rollout`: which engine writes the samples, and how it gets the student's weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from understudy.engines.base import Engine, Weights
from understudy.engines.hf.engine import HFEngine
from understudy.errors import RecipeError
from understudy.lazy import nn, torch
from understudy.models import has_bfloat16
from understudy.models.parallel import shards_of, stream
from understudy.types import Sampling


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """The student's side of the run, as an engine needs it to open."""

    model: nn.Module
    tokenizer: Any
    vocab_size: int
    absent: tuple[int, ...] = ()
    """Ids below `vocab_size` that are not tokens."""
    stop_ids: tuple[int, ...]
    autocast: torch.dtype | None
    seed: int
    sampling: Sampling
    max_new_tokens: int
    """The longest response of training and evaluation."""
    run_dir: Path

    def hf(self, model: nn.Module, dtype: torch.dtype | None = None) -> HFEngine:
        """An engine in this process over `model`; `dtype` as there."""
        return HFEngine(
            model,
            self.tokenizer,
            seed=self.seed,
            stop_ids=self.stop_ids,
            vocab_size=self.vocab_size,
            absent=self.absent,
            autocast=self.autocast,
            dtype=dtype,
        )


@dataclass(frozen=True, kw_only=True)
class ServerCommand:
    """The command and settings that start a server of the run on another machine."""

    command: Sequence[str]
    """`{host}` and `{port}` stand for its address."""
    env: Mapping[str, str]
    port: int
    """0: any free port."""
    ready_timeout_s: float


class EngineSection(ABC):
    """The section `rollout`: an engine's capabilities, known before it is opened.

    To add an engine, write a frozen subclass and list it in `ENGINES`.
    """

    grouped: bool = False
    """Whether to request all samples of a prompt together."""
    runs_here: bool = False
    """Whether it generates in this process, and so needs memory for keys and values."""
    sleep: bool = False
    """Whether it frees its memory while the student is trained."""
    reads_images: bool = False
    """Whether it accepts images in prompts."""
    dtype: str = "auto"
    """Compute precision; auto: that of the student's weights."""

    @abstractmethod
    def check(self) -> str:
        """Returns a line for the dry run. Checks the section alone; raises RecipeError."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises RecipeError for sampling that the engine does not support, or cannot return log-probabilities for."""

    @abstractmethod
    def open(self, setup: EngineSetup) -> Engine:
        """Raises RecipeError, EngineError."""

    @abstractmethod
    def pushed(self, model: nn.Module) -> Callable[[], Weights] | None:
        """Gives the weights that are pushed to it; None where it writes with the live model."""

    @property
    def beside_update(self) -> bool:
        """Whether it can generate during an update of the student."""
        return True

    @property
    def launches(self) -> bool:
        """Whether it starts its own servers, each used by one rank only."""
        return False

    def elsewhere(self, model: str, dtype: str, sampling: Sampling) -> list[ServerCommand]:
        """Commands that start its servers on other machines with the weights of `model`; empty if it has none."""
        return []


@dataclass(frozen=True, kw_only=True)
class HF(EngineSection):
    """Generates with the trainer's own model, through transformers."""

    runs_here = True
    reads_images = True

    copy: bool = False
    """Whether it keeps a copy of the weights, so that it can generate during an update."""
    dtype: Literal["auto", "bfloat16"] = "auto"
    """On a CPU, the precision of linear layers during generation; auto: the trainer's."""

    def check(self) -> str:
        return "rollout: the student itself"

    @property
    def beside_update(self) -> bool:
        return self.copy

    def open(self, setup: EngineSetup) -> HFEngine:
        if self.dtype != "auto":
            self._check_dtype(setup)
        model = copy.deepcopy(setup.model).requires_grad_(False) if self.copy else setup.model
        return setup.hf(model, None if self.dtype == "auto" else torch.bfloat16)

    def _check_dtype(self, setup: EngineSetup) -> None:
        weight = next(setup.model.parameters())
        why = None
        if weight.device.type != "cpu":
            why = f"the student is on {weight.device}, and the key is for CPUs"
        elif shards_of(setup.model) is not None:
            why = "the student is in shards (parallel.shard), of which no copies are made"
        elif weight.dtype not in (torch.float32, torch.bfloat16):
            why = f"the student's weights are {weight.dtype}".replace("torch.", "")
        elif not has_bfloat16(weight.device):
            why = "this CPU has no instructions for bfloat16 (avx512_bf16 or amx_bf16; bf16 on ARM)"
        elif not torch.backends.mkldnn.is_available():
            why = "this build of torch lacks oneDNN, which multiplies in it"
        if why is not None:
            raise RecipeError(f"rollout.dtype is {self.dtype}, but {why}; leave the key out")

    def pushed(self, model: nn.Module) -> Callable[[], Weights] | None:
        if not self.copy:
            return None
        return lambda: stream(model)
