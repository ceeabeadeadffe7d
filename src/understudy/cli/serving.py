"""`serve-teacher`."""

from __future__ import annotations

from typing import Any, get_args

from understudy.errors import RecipeError, nearest
from understudy.models import DType
from understudy.serve import Settings, run
from understudy.serve.scorer import HiddenDType
from understudy.trainer.console import Console

from .commands import quieten_libraries

WORDS = {"dtype": get_args(DType), "hidden_dtype": get_args(HiddenDType)}


def serve(model: str, **options: Any) -> None:
    """Serves until a signal. `options`: those of `serve.Settings` that are given; None: its default.

    Raises RecipeError for an option that cannot be, and where the model cannot be served.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, words in WORDS.items():
        if given.get(name, words[0]) not in words:
            raise RecipeError(f"--{name.replace('_', '-')} is {given[name]!r}; {nearest(given[name], words)}")
    quieten_libraries()
    with Console() as console:
        run(Settings(model=model, **given), console.note)
