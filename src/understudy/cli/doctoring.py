"""`doctor`: whether a recipe can be trained, and what it would train."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from understudy import run
from understudy.cli.commands import quieten_libraries
from understudy.recipe import doctor, load_recipe
from understudy.recipe.checks import Files, Parts
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.rundir import RunDir
from understudy.trainer.signals import terminable


def examine(path: Path, overrides: Sequence[str]) -> int:
    """Prints every finding and returns the number of errors. Nothing is written."""
    recipe = load_recipe(path, overrides)
    quieten_libraries()
    with terminable(), Console() as console:
        found = doctor.examine(recipe, lambda files: loaded(files, console))
        doctor.show(console, found)
    return len(doctor.errors_of(found))


@contextmanager
def loaded(files: Files, console: Console) -> Iterator[Parts]:
    """Loads as for a new run, in a directory that is thrown away; it lies beside the run's, where engines on other machines
    see it."""
    console.note("loading as for training")
    beside = Path(files.recipe.run_dir).absolute().parent
    while not beside.is_dir():
        beside = beside.parent
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=beside) as folder, ExitStack() as opened:
        scratch = Files(replace(files.recipe, run_dir=folder, loggers=()))
        scratch.tokenizers = files.tokenizers
        parts = run.assemble(scratch, RunDir(Path(folder)), None, Ranks(), Console(quiet=True), opened)
        opened.callback(parts.trainer.observer.close)
        # what is shown names the run's own directory
        parts.recipe = files.recipe
        yield parts
