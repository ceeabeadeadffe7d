"""The runs of a comparison: their recipes, the checks before any of them starts, and how far each of them is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

from understudy import config
from understudy.compare.grid import Combination, Grid, apply, slug
from understudy.errors import RecipeError, UnderstudyError
from understudy.files import check_writable
from understudy.format import count
from understudy.methods import METHODS, REFUSED, Method
from understudy.recipe import Recipe, check_same_recipe
from understudy.recipe.checks import check
from understudy.recipe.load import eval_prompts
from understudy.tasks import overlap
from understudy.tasks.renderer import now
from understudy.trainer.checkpoint import RunDir
from understudy.trainer.rollouts import MAX_ROUNDS

State = Literal["new", "started", "finished"]

DONE = ("finished", "good enough", "did not learn")
"""Values of `status` in run.json that end a run for good."""


@dataclass(frozen=True)
class Cell:
    """One run: a combination with one seed or one tuned value."""

    combination: Combination
    recipe: Recipe
    tuned: Mapping[str, Any]
    dropped: tuple[str, ...]
    """Sections of the base recipe that were left out because the method has no use for them."""

    @property
    def path(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def log(self) -> Path:
        """Log of its console output, beside the run directory, which must be empty when a run begins."""
        return self.path.with_name(self.path.name + ".log")

    @property
    def name(self) -> str:
        return f"{self.combination.name}, {self.path.name}"

    @cached_property
    def budget_tokens(self) -> int:
        """Most response tokens that training may take: every response as long as `max_new_tokens`."""
        train, method = self.recipe.train, self.recipe.run_method
        total = 0
        for part, step in (method.at(step) for step in range(train.steps)):
            plan = part.plan(step)
            # a guided sample stands beside the others of its prompt
            guided = plan.prefix_share > 0 and plan.guided == "beside"
            rounds = MAX_ROUNDS if plan.rewards is not None and plan.rewards.dynamic_sampling else 1
            attempts = 2 if plan.acceptance is not None and plan.acceptance.on_reject == "resample" else 1
            total += rounds * attempts * train.prompts_per_step * (train.samples_per_prompt + guided)
        return total * self.recipe.sampling.max_new_tokens

    def state(self) -> State:
        """Raises RecipeError where the directory holds another run, or something else."""
        run_dir = RunDir(self.path)
        if not run_dir.recipe.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise RecipeError(f"{self.path} exists and holds no run; move it away, or choose another --out")
            return "new"
        check_same_recipe(config.parse(Recipe, config.read_yaml(run_dir.recipe)), self.recipe)
        try:
            facts = config.load_json(run_dir.facts.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed before or while it wrote them
            facts = None
        return "finished" if isinstance(facts, dict) and facts.get("status") in DONE else "started"


@dataclass(frozen=True)
class Cells:
    """All runs of a grid. `base` is a recipe as plain values, `out` where everything goes."""

    grid: Grid
    base: Mapping[str, Any]
    out: Path

    @cached_property
    def tuning(self) -> list[Cell]:
        """One run per combination and tuned value, evaluated on the validation split."""
        grid, found = self.grid, []
        for combination, tuned in product(grid.combinations(), grid.tunings() if grid.tune else []):
            cell = self._cell(combination, tuned)
            if cell.recipe.eval is None:
                raise RecipeError("tuning chooses by avg@k, so the recipe needs a section eval")
            if cell.recipe.eval.split == "validation":
                raise RecipeError(
                    "tuning chooses on the validation split, so the comparison has to be on another: eval.split=test"
                )
            labels = [f"{key.rpartition('.')[2]}={json.dumps(value)}" for key, value in tuned.items()]
            recipe = replace(
                cell.recipe,
                seed=grid.tune_seed,
                run_dir=str(self.out / "tuning" / combination.slug / slug(labels)),
                eval=replace(cell.recipe.eval, split="validation"),
                train=replace(cell.recipe.train, steps=grid.tune_steps or cell.recipe.train.steps),
            )
            found.append(replace(cell, recipe=recipe))
        return found

    def compared(self, tuned: Mapping[Combination, Mapping[str, Any]]) -> list[Cell]:
        """Every combination that `tuned` has with every seed; the seeds of a combination differ in nothing else."""
        firsts = [self._cell(combination, chosen) for combination, chosen in tuned.items()]
        return [
            replace(first, recipe=replace(first.recipe, seed=seed, run_dir=str(first.path.with_name(f"seed-{seed}"))))
            for first in firsts
            for seed in range(self.grid.seeds)
        ]

    def check(self) -> None:
        """Finds everything that can be found wrong before a run starts; each message has the cell's name.

        Raises RecipeError, DataError or VocabularyError.
        """
        check_writable(self.out, "--out")
        for cell in self.tuning:
            with _named(cell.name):
                check(cell.recipe)
                compared = self._cell(cell.combination, cell.tuned).recipe
                if shared := overlap(eval_prompts(cell.recipe), eval_prompts(compared)):
                    raise RecipeError(
                        f"{count(len(shared), 'problem')} of the evaluation stand in the validation split too "
                        f"({', '.join(shared[:3])}): tuning would see what is compared; give the task another "
                        "split_validation or validation_share"
                    )
                cell.state()
        for combination in self.grid.combinations():
            candidates = [self.compared({combination: tuned}) for tuned in self.grid.tunings()]
            with _named(combination.name):
                for seeds in candidates:
                    check(seeds[0].recipe)  # nothing that is checked depends on the seed
            # a directory has to fit one of the recipes that tuning may yet choose
            for same_seed in zip(*candidates, strict=True):
                problems = []
                for cell in same_seed:
                    try:
                        cell.state()
                        break
                    except RecipeError as error:
                        problems.append(error)
                else:
                    raise RecipeError(f"cell {same_seed[0].name}: {problems[0]}") from problems[0]

    def _cell(self, combination: Combination, tuned: Mapping[str, Any]) -> Cell:
        """The first seed."""
        changes = [self.grid.vary[axis][label] for axis, label in combination.labels]
        values = apply(self.base, [*changes, *({key: value} for key, value in tuned.items())])
        values |= {"seed": 0, "run_dir": str(self.out / "cells" / combination.slug / "seed-0")}
        with _named(combination.name):
            recipe, dropped = parse_cell(values)
        return Cell(combination, recipe.dated(self._date), tuned, dropped)

    @cached_property
    def _date(self) -> str:
        """One clock for the chat templates of all runs: that of one that has begun, else now."""
        for path in sorted(self.out.glob("*/*/*/recipe.yaml")):
            date = config.read_yaml(path).get("student", {}).get("template_date")
            if date is not None:
                return str(date)
        return now()


@dataclass(frozen=True)
class _Learning:
    """The section `method` alone."""

    method: Method = config.choice(METHODS, refused=REFUSED)


def parse_cell(values: Mapping[str, Any]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe, and the sections, as few as possible, left out of it because its method never reads them.

    Raises RecipeError.
    """
    try:
        recipe = config.parse(Recipe, values)
        return (replace(recipe, teacher=None), ("teacher",)) if recipe.leaves_teacher else (recipe, ())
    except RecipeError as error:
        method = config.parse(_Learning, {key: item for key, item in values.items() if key == "method"}).method
        steps = values.get("train", {}).get("steps")
        known = steps if isinstance(steps, int) and steps > 0 else 1
        # weights and references go by the names of teachers
        unused = [] if method.needs - {"none", "reference"} else ["teacher", "teachers", "weights", "references"]
        unused += [] if "reference" in method.needs else ["reference", "references"]
        takes_responses = any(part.uses(known).takes_responses for part in method.for_run(known, 1).members)
        unused += [] if takes_responses else ["responses"]
        unused = [name for name in dict.fromkeys(unused) if values.get(name)]
        for names in (names for count in range(len(unused)) for names in combinations(unused, count + 1)):
            with suppress(RecipeError):
                recipe = config.parse(Recipe, {key: item for key, item in values.items() if key not in names})
                if not recipe.leaves_teacher:
                    return recipe, names
        raise error


def budgets(cells: Iterable[Cell]) -> dict[Combination, int]:
    """The token budget of each combination."""
    return {cell.combination: cell.budget_tokens for cell in cells}


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the cell's name before an error of the package."""
    try:
        yield
    except UnderstudyError as error:
        raise type(error)(f"cell {name}: {error}") from error
