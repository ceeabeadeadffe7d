"""The papers' settings as recipes: each passes a dry run, has a miniature with its keys that trains, and stands in the page."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from understudy import config
from understudy.errors import RecipeError
from understudy.recipe import load_recipe
from understudy.recipe.checks import check
from understudy.run import train
from understudy.trainer.console import Console

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "papers.py"
FOLDER = ROOT / "recipes" / "papers"
NAMES = sorted(path.name.removesuffix(".mini.yaml") for path in FOLDER.glob("*.mini.yaml"))
RUN_ALONE = ("run_dir", "device", "rollout.", "teacher.max_tokens", "teacher.model", "train.micro_batch_tokens")
"""Keys by which a miniature may differ from its recipe: where it runs, and the engine, of which it has none."""
SMALLER = (
    *(
        "train.steps",
        "train.prompts_per_step",
        "train.samples_per_prompt",
        "train.max_prompt_tokens",
        "train.save_every",
    ),
    *("eval.every", "eval.problems", "eval.samples_per_prompt"),
)
STEPS = 2


@pytest.fixture(scope="module")
def papers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("papers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["papers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(papers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the models and rows of the miniatures."""
    path = tmp_path_factory.mktemp("papers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        papers.make_parts()
        yield path


def leaves(name: str) -> dict[str, Any]:
    """The values of a recipe by their keys; a data set of the hub without a name of its own is a file in a miniature."""
    found = config.flatten(config.read_yaml(FOLDER / f"{name}.yaml"))
    for key in [key for key, value in found.items() if key.endswith(".type") and value == "hub"]:
        found[key] = "file"
        del found[key.removesuffix("type") + "dataset"]
    return found


def place(key: str) -> bool:
    """Whether a key names a file or a directory."""
    return bool(re.search(r"(^|\.)(path|model)$", key))


def test_every_setting_has_a_miniature(papers: ModuleType) -> None:
    assert list(papers.recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_passes_what_is_checked_without_the_network(name: str, papers: ModuleType) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    try:
        assert check(recipe)
    except RecipeError as error:
        if "bubblewrap" not in str(error):
            raise
        pytest.skip(f"no sandbox on this machine: {error}")
    about = papers.said(FOLDER / f"{name}.yaml")
    assert "arXiv" in about["Source"]
    assert about["Open"]
    assert about["Cost"] == f"at most {papers.rounded(papers.hours(recipe))} H100 hours"
    assert recipe.run_dir == f"runs/papers/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_miniature_has_the_keys_of_its_setting(name: str) -> None:
    """Method, data sets, fields, schedule and evaluation are the same; sizes are smaller, paths are local, and programs, of
    which a random student writes none, run without bubblewrap."""
    whole, mini = (
        {key: value for key, value in leaves(part).items() if not key.startswith(RUN_ALONE)}
        for part in (name, f"{name}.mini")
    )
    added = {key for key in mini if key.endswith("path") and key.startswith(("task.", "eval_task."))}
    added |= {key for key in mini if key.endswith((".sandbox.unsafe", ".python.unsafe"))}
    assert mini.keys() - added == whole.keys()
    for key, value in whole.items():
        if key in SMALLER or key.endswith("max_new_tokens"):
            assert 0 < mini[key] <= value, key
        elif not place(key) and not key.endswith((".dtype", ".sandbox.type", ".python.type")):
            assert mini[key] == value, key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_miniature_trains(name: str, papers: ModuleType, folder: Path) -> None:
    path = FOLDER / f"{name}.mini.yaml"
    with papers.servers() as address, Console(quiet=True) as console:
        recipe = load_recipe(path, [*papers.overrides(path, address), f"train.steps={STEPS}", f"eval.every={STEPS}"])
        result = train(recipe, console=console)
    rows: list[Mapping[str, Any]] = [
        json.loads(line) for line in (result.run_dir.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, STEPS]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    if name.startswith("tropd"):
        assert all(row["prefix_tokens"] > 0 for row in rows)
    if name.startswith("ovd"):
        assert all(row["filled"] > 0 and row["slots_empty"] == row["unscored"] == 0 for row in rows)
    assert result.run_dir.student.is_dir()
    assert len(result.summaries) == 2


def test_the_arithmetic_of_the_cost(papers: ModuleType) -> None:
    """A size by hand: parameters and attention, of which the mean token has half the sample before it."""
    size = papers.Size(1e9, 10, 100)
    assert size.forward(tokens=7, length=50) == 7 * (2e9 + 4 * 10 * 100 * 25)
    recipe = load_recipe(
        FOLDER / "gopd-same-size.yaml", ["eval=null", "eval_task=null", "train.gradient_checkpointing=false"]
    )
    one = papers.MODELS["Qwen/Qwen3-4B"].forward(50 * 1024 * 16384, 16384)
    # written once; read by teacher, reference and student, and updated for three passes
    assert papers.hours(recipe) == pytest.approx(one * (1 / 0.1 + 6 / 0.4) / 989e12 / 3600)
    assert [papers.rounded(value) for value in (1234, 86.4, 7.26, 0.123)] == ["1,200", "86", "7.3", "0.12"]


def test_the_page_says_what_the_recipes_say(papers: ModuleType) -> None:
    page = papers.PAGE.read_text(encoding="utf-8")
    assert papers.drawn(page) == page, "run python scripts/papers.py"
