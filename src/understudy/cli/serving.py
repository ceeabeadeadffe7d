"""`serve-teacher`."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import transformers
import typer

from understudy.errors import RecipeError, nearest
from understudy.serve import Settings, run
from understudy.text import visible

CHOICES = ("dtype", "hidden_dtype")


def serve(model: str, **options: Any) -> None:
    """Serves until a signal. `options`: those of `serve.Settings` that are given; None: its default.

    Raises RecipeError for an option that cannot be, and where the model cannot be served.
    """
    given = {name: value for name, value in options.items() if value is not None}
    hints = get_type_hints(Settings)
    for name in CHOICES:
        known = get_args(hints[name])
        if given.get(name, known[0]) not in known:
            raise RecipeError(f"--{name.replace('_', '-')} is {given[name]!r}; {nearest(given[name], known)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # plain lines: a server's log has no display that is redrawn
    run(Settings(model=model, **given), lambda line: typer.echo(visible(line)))
