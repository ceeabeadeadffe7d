"""The task `vision`: questions about images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from understudy.tasks.datasets import Named
from understudy.tasks.math import BOXED


@dataclass(frozen=True, kw_only=True)
class Visual(Named):
    r"""The task `vision`: Geometry3K and NLVR by name, or a file of questions about images, with answers.

    The student is asked to reason step by step and to put its final answer within `\boxed{}`; `template` asks otherwise. The
    verifier is `math`, by which words and letters have to be equal; `exact` compares the whole response.
    """

    kind: ClassVar[str] = "vision"

    template: str = ""
    """The wording around the question. Empty: that of the data set, or of the task `math`."""

    def __post_init__(self) -> None:
        data = self.data
        if not self.template and (data is None or "template" not in data.keys):
            object.__setattr__(self, "template", BOXED)
        super().__post_init__()
        if self.image_field is None:
            raise ValueError("image_field is missing; it names the field of the image, or of a list of them")
