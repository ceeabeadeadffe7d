"""`doctor`: whether a recipe can be trained, and what it would train."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from understudy import run
from understudy.cli.commands import quieten_libraries
from understudy.recipe import Recipe, doctor, load, load_recipe
from understudy.recipe.load import Loaded
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.loop import Trainer
from understudy.trainer.rundir import RunDir
from understudy.trainer.signals import terminable


def examine(path: Path, overrides: Sequence[str]) -> int:
    """Prints every finding; how many of them are errors. Nothing is written."""
    recipe = load_recipe(path, overrides)
    quieten_libraries()
    with terminable(), Console() as console:
        found = doctor.examine(recipe, lambda recipe: loaded(recipe, console))
        doctor.show(console, found)
    return len(doctor.errors_of(found))


@contextmanager
def loaded(recipe: Recipe, console: Console) -> Iterator[tuple[Loaded, Trainer]]:
    """As for a new run, in a directory beside that of the run that is thrown away: engines elsewhere may have to see it."""
    console.note("loading as for training")
    beside = Path(recipe.run_dir).absolute().parent
    while not beside.is_dir():
        beside = beside.parent
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=beside) as folder, ExitStack() as opened:
        scratch = replace(recipe, run_dir=folder, loggers=())
        device = load.choose_device(recipe.device)
        quiet = Console(quiet=True)
        trainer, made = run._build(scratch, RunDir(Path(folder)), None, Ranks(), quiet, device, opened)
        opened.callback(trainer.observer.close)
        opened.callback(trainer.rollouts.close)
        yield made, trainer
