"""On-policy distillation of language models: a small student learns from its own attempts, judged by a larger teacher.

```python
from understudy import GKD, distil

run = distil(student="Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-4B", train=rows, prompt="question", reference="answer",
             method=GKD(beta=1.0), steps=200, lr=1e-5)
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.api import distil, evaluate, evaluate_suite, sample, train
    from understudy.methods import (
        AOPD,
        DAPO,
        EOPD,
        GKD,
        GOPD,
        GRPO,
        KDRL,
        OPD,
        OVD,
        REOPOLD,
        SFT,
        TOPD,
        DrGRPO,
        Phases,
        TopK,
        TopKTail,
        TrOPD,
    )
    from understudy.recipe import Recipe
    from understudy.run import Run
    from understudy.trainer.observe import Callback
    from understudy.types import Grade, Sampling

__version__ = "0.1.0"
__all__ = [
    "AOPD",
    "DAPO",
    "EOPD",
    "GKD",
    "GOPD",
    "GRPO",
    "KDRL",
    "OPD",
    "OVD",
    "REOPOLD",
    "SFT",
    "TOPD",
    "Callback",
    "DrGRPO",
    "Grade",
    "Phases",
    "Recipe",
    "Run",
    "Sampling",
    "TopK",
    "TopKTail",
    "TrOPD",
    "distil",
    "evaluate",
    "evaluate_suite",
    "sample",
    "train",
]
_MODULES = {
    **dict.fromkeys(("distil", "evaluate", "evaluate_suite", "sample", "train"), "understudy.api"),
    "Recipe": "understudy.recipe",
    "Run": "understudy.run",
    "Callback": "understudy.trainer.observe",
    "Grade": "understudy.types",
    "Sampling": "understudy.types",
}
"""Module of each name; the other names are methods."""


def __getattr__(name: str) -> Any:
    """Imports a name, and torch with it, when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "understudy.methods")), name)


def __dir__() -> list[str]:
    """Includes names not imported yet, for completion and Python's suggestions."""
    return sorted({*globals(), *__all__})
