"""The JSON Schema of recipes accepts what is a recipe, and refuses wrong keys and types as the parser does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from tests.integration import test_recipe
from tests.runs import distillation, tiny_recipe
from understudy import config
from understudy.cli.app import app
from understudy.errors import RecipeError
from understudy.methods import METHODS
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.editor import FILE, MODELINE, key_bounds, key_docs, recipe_schema
from understudy.recipe.schema import Lora
from understudy.tasks import Arithmetic, Jsonl
from understudy.trainer.settings import Async, Eval, Train
from understudy.types import Sampling

SCHEMA = recipe_schema()
CHECK = jsonschema.Draft202012Validator(SCHEMA)
RECIPES = [path for path in test_recipe.FILES if path.stem not in ("grid", "claim")]
REFUSED: list[tuple[dict[str, Any], str]] = test_recipe.test_what_a_recipe_may_not_say.pytestmark[0].args[1]  # type: ignore[attr-defined]
PARSERS_ALONE = (
    "student: give either",
    "needs a teacher",
    "uses no teacher",
    "device is",
    "lr is nan",
    "betas",
    "without a section eval",
    "set one of them to false",
)
"""Refusals that concern several keys, or what no schema can say."""


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_projects_recipes_are_valid_and_name_their_schema(path: Path) -> None:
    text = path.read_text()
    CHECK.validate(yaml.safe_load(text))
    assert text.splitlines()[0] == MODELINE + os.path.relpath(test_recipe.ROOT / FILE, path.parent)
    # the resolved recipe too, which has every key
    CHECK.validate(json.loads(json.dumps(config.dump(load_recipe(path)))))


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_wrong_keys_and_types_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    values = tiny_recipe(tmp_path, **changes)
    assert CHECK.is_valid(values) == any(part in words for part in PARSERS_ALONE)


@pytest.mark.parametrize(
    "part",
    [{"type": "gkd", "until": 0.5}, {"type": "gkd", "untill": 0.5}, {"type": "topk", "k": 0}, {"type": "phases"}],
)
def test_parts_of_phases_are_methods_with_an_end(tmp_path: Path, part: dict[str, Any]) -> None:
    method = {"type": "phases", "parts": [part, {"type": "opd"}]}
    values = tiny_recipe(tmp_path, **distillation(tmp_path, method=method))
    assert CHECK.is_valid(values) == (part == {"type": "gkd", "until": 0.5})


@pytest.mark.parametrize("name", METHODS)
def test_bounds_of_methods_are_in_the_schema(name: str) -> None:
    """What lies just outside is refused by both."""
    kind = METHODS[name]
    properties = SCHEMA["$defs"][f"{kind.__module__.removeprefix('understudy.')}.{name}"]["properties"]
    for key, found in properties.items():
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound in found:
                with pytest.raises(ValueError, match=key):
                    kind(**{key: found[bound] + step})
                assert not CHECK.is_valid({"method": {"type": name, key: found[bound] + step}})


@pytest.mark.parametrize("kind", [Train, Async, Eval, Sampling, Lora, Arithmetic])
def test_bounds_of_sections_are_in_the_schema(kind: type[Any]) -> None:
    required = {"steps": 1} if kind is Train else {}
    bounds = key_bounds(kind)
    assert bounds
    for key, found in bounds.items():
        for word, step in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1)):
            if word in found:
                with pytest.raises(RecipeError, match=key):
                    config.parse(kind, required | {key: found[word] + step})
            if word in found and word != "exclusiveMinimum":
                assert getattr(config.parse(kind, required | {key: found[word]}), key) == found[word]


def test_keys_have_their_docstrings_and_defaults() -> None:
    train = SCHEMA["$defs"]["trainer.settings.Train"]["properties"]
    assert train["stop_at"]["description"] == "Stop when an evaluation's avg@k reaches this."
    assert train["lr"]["default"] == 1e-5
    assert train["micro_batch_tokens"]["description"].startswith("Tokens of one forward")
    assert "null: 16,384" in train["micro_batch_tokens"]["description"]
    # inherited ones too
    assert key_docs(Jsonl)["reference_field"].startswith("The final answer")
    for name, section in {"recipe": SCHEMA, **SCHEMA["$defs"]}.items():
        lacking = [
            key
            for key, value in section["properties"].items()
            if key != "type" and "description" not in value and not {"$ref", "oneOf", "anyOf"} & value.keys()
        ]
        assert not lacking, name
        assert section.get("description"), name


def test_the_command_prints_or_writes_it_and_init_lays_it_beside(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["schema"])
    assert json.loads(printed.output) == json.loads(json.dumps(SCHEMA))
    CliRunner().invoke(app, ["schema", str(tmp_path / "mine.json")])
    assert json.loads((tmp_path / "mine.json").read_text())["title"] == "understudy recipe"
    CliRunner().invoke(app, ["init", str(tmp_path / "new" / "recipe.yaml")])
    first = (tmp_path / "new" / "recipe.yaml").read_text().splitlines()[0]
    named = tmp_path / "new" / first.removeprefix(MODELINE)
    written = json.loads(named.read_text())
    jsonschema.validate(yaml.safe_load((tmp_path / "new" / "recipe.yaml").read_text()), written)


def test_a_recipe_of_the_parser_is_one_of_the_schema(tmp_path: Path) -> None:
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, **distillation(tmp_path, eval={"every": 2})))
    CHECK.validate(json.loads(json.dumps(config.dump(recipe))))


def test_a_new_recipe_brings_the_schema_of_this_version(tmp_path: Path) -> None:
    """A schema that an older version wrote beside it is replaced; a file of the user's own is not."""
    beside = tmp_path / FILE
    beside.write_text(json.dumps({"title": "understudy recipe", "properties": {}}, indent=2))
    CliRunner().invoke(app, ["init", str(tmp_path / "one.yaml")])
    assert json.loads(beside.read_text()) == json.loads(json.dumps(SCHEMA))
    beside.write_text('{"title": "mine"}')
    CliRunner().invoke(app, ["init", str(tmp_path / "two.yaml")])
    assert beside.read_text() == '{"title": "mine"}'
    refused = CliRunner().invoke(app, ["schema", str(tmp_path)])
    assert "is a directory; name a file" in str(refused.exception)
