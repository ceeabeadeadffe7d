"""The student as it was before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from understudy.errors import RecipeError
from understudy.models import DType, load_causal_lm, unwrap
from understudy.teachers.base import Setup, TeacherSection, Weights
from understudy.teachers.local import ADAPTERS, CAN, Local, LocalTeacher
from understudy.types import Need


@dataclass(frozen=True, kw_only=True)
class Start(TeacherSection):
    """The section of a recipe for the student's initial weights.

    With LoRA these are the student's own weights, adapters switched off, and take no memory; else they are loaded again.
    """

    dtype: DType = "auto"
    """ "auto": the student's."""
    offload: bool = False
    """Keep the weights in host memory between uses; with LoRA there are none to keep."""

    @property
    def gives(self) -> frozenset[Need]:
        return CAN

    @property
    def is_start(self) -> bool:
        return True

    @property
    def weights(self) -> Weights:
        return Weights(model=None, dtype=self.dtype, offload=self.offload)

    @property
    def shown(self) -> str:
        return "the student's start"

    def check(self) -> str:
        return "reference: the student's start"

    def open(self, setup: Setup) -> LocalTeacher:
        """Raises RecipeError as `open_start`."""
        return open_start(setup, dtype=self.dtype, offload=self.offload)


def open_start(
    setup: Setup, *, dtype: DType = "auto", offload: bool = False, attn_implementation: str | None = None
) -> LocalTeacher:
    """The student's initial weights as a teacher. What is left out is the student's.

    Raises RecipeError for a LoRA student whose weights are not the start once its adapters are off, or which is to be run
    in another way than it is, and where there is neither a start to load nor a way to build it again.
    """
    student = setup.student
    common: dict[str, Any] = {
        "name": setup.name,
        "vocab_size": setup.vocab_size,
        "temperature": setup.temperature,
        "device": setup.device,
    }
    if student is not None and unwrap(student) is not student:
        _check_adapters(student, dtype, attn_implementation)
        return LocalTeacher(student, around=partial(without_adapters, student), **common)
    model = load_start(setup, dtype=dtype, attn_implementation=attn_implementation, offload=offload)
    return LocalTeacher(model, offload=offload, **common)


def load_start(setup: Setup, *, dtype: DType, attn_implementation: str | None, offload: bool) -> nn.Module:
    """A model of its own with the student's initial weights. Raises RecipeError where there is no start."""
    if dtype == "auto" and setup.student is not None:
        dtype = cast("DType", str(unwrap(setup.student).dtype).removeprefix("torch."))
    device = "cpu" if offload else setup.device
    model: nn.Module
    if setup.start is not None:
        model = load_causal_lm(
            setup.start,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation or _attention(setup.student),
            revision=setup.start_revision,
        )
        return model
    if setup.fresh_student is None:
        raise RecipeError(
            f"{setup.name}: the student's start cannot be had again: it is built from scratch (student.build), and nothing "
            "says how to build it once more; set Setup.fresh_student, or name a model instead"
        )
    model = setup.fresh_student().to(device).eval()
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def _attention(student: nn.Module | None) -> str | None:
    return None if student is None else getattr(unwrap(student).config, "_attn_implementation", None)


def _check_adapters(student: nn.Module, dtype: DType, attn_implementation: str | None) -> None:
    """Raises RecipeError unless the student without its adapters is the start, run as asked."""
    moving = [
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and not any(part in name for part in ADAPTERS)
    ]
    if moving:
        raise RecipeError(
            f"{len(moving)} weights outside the adapters are trained too, first {moving[0]!r}, so the student without its "
            "adapters is not its start; train adapters only, or name the start as a model of its own"
        )
    base = unwrap(student)
    has = {"dtype": str(base.dtype).removeprefix("torch."), "attn_implementation": _attention(student)}
    for key, asked in {"dtype": dtype, "attn_implementation": attn_implementation}.items():
        if asked not in (None, "auto", has[key]):
            raise RecipeError(
                f"{key} is {asked!r}, but with LoRA the student's start is the live model without its adapters, which has "
                f"{has[key]!r}; leave {key} out, or name the start as a model of its own"
            )


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Adapters off inside, on again after, and the same parameters trainable. Gradients that are there stay."""
    trainable: list[tuple[nn.Parameter, bool]] = [(value, value.requires_grad) for value in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


REFERENCES: dict[str, type[TeacherSection]] = {"start": Start, "local": Local}
"""`reference.type` in a recipe -> its section."""
