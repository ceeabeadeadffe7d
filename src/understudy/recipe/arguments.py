"""A recipe from the arguments of `distil`. Loaded models, rows and functions have names in it; `objects` collects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import count
from pathlib import Path
from typing import Any

from understudy import config, given
from understudy.errors import RecipeError
from understudy.recipe.schema import Recipe
from understudy.trainer.settings import Train

CALLBACK_METHODS = {
    "on_step": ("step", "metrics"),
    "on_evaluation": ("summary",),
    "on_alarm": ("change",),
    "on_end": ("run",),
}
"""The methods of a callback, and their arguments."""
_ARGUMENTS = {
    "student": "model base_model student_model model_name_or_path",
    "student=(model, tokenizer)": "tokenizer processing_class",
    "student={'model': ..., 'lora': {'rank': 16}}": "lora peft_config",
    "teacher": "teacher_model teacher_model_name_or_path",
    "train": "data dataset rows train_dataset train_data train_rows",
    "test": "eval_dataset test_dataset eval_data test_data evaluation",
    "validation": "validation_dataset val_dataset validation_data",
    "prompt": "prompt_field question input_field",
    "reference": "reference_field answer label ground_truth",
    "solution": "solution_field completion response",
    "reward": "reward_funcs reward_func reward_fn reward_function",
    "verifier": "verify grader",
    "callbacks": "callback",
    "run_dir": "output_dir out_dir",
    "resume=True, with the same run_dir": "resume_from_checkpoint",
    "quiet": "verbose disable_tqdm",
}
OTHER_ARGUMENTS = {name: argument for argument, names in _ARGUMENTS.items() for name in names.split()}
"""A name elsewhere -> the argument of `distil`. What other toolkits call the keys of a recipe is in `recipe.names`."""


def sections(keys: Mapping[str, Any], objects: dict[str, Any]) -> dict[str, Any]:
    """The sections of a recipe from keys of it and of its section `train`. Raises RecipeError for another toolkit's name."""
    for key in keys:
        if key in OTHER_ARGUMENTS:
            raise RecipeError(f"{key}: unknown argument; it is {OTHER_ARGUMENTS[key]} here")
    of_train = {item.name for item in fields(Train)}
    # async is a word that Python reserves
    values = {key.rstrip("_"): plain(key, value) for key, value in keys.items() if key not in of_train}
    values["train"] = {key: plain(key, value) for key, value in keys.items() if key in of_train}
    for several in ("teachers", "references"):
        if several in values:
            named = values[several].items()
            values[several] = {name: model(one, f"{several}.{name}", objects) for name, one in named}
    return values


def plain(key: str, value: Any) -> Any:
    """A section that may be a dataclass, as a recipe has it. Raises RecipeError for a class in place of an object."""
    if isinstance(value, type):
        raise RecipeError(f"{key} is the class {value.__name__}; give an object of it, as in {value.__name__}()")
    if not is_dataclass(value):
        return str(value) if isinstance(value, Path) else value
    known = {config.key_of(item): item for item in fields(Recipe)}
    table = known[key].metadata.get("choice") if key in known else None
    if table is not None and type(value) not in table.table.values():
        raise RecipeError(
            f"{key} is of type {type(value).__name__}, which has no name in a recipe; known: {', '.join(table.table)}"
        )
    return config.dump(value, table)


def model(value: Any, place: str, objects: dict[str, Any]) -> dict[str, Any]:
    """The section of a student, teacher or reference. Raises RecipeError for what is no model that can be used here."""
    section = plain(place, value)
    section = dict(section) if isinstance(section, Mapping) else {"model": section}
    source = section.get("model")
    if isinstance(source, Path):
        section["model"] = str(source)
    elif isinstance(source, tuple) and len(source) == 2:
        if (
            not hasattr(source[0], "state_dict")
            or not hasattr(source[0], "config")
            or not hasattr(source[1], "get_vocab")
        ):
            kinds = ", ".join(type(one).__name__ for one in source)
            raise RecipeError(
                f"{place} is a pair of {kinds}; it must be a loaded model and its tokenizer, in this order"
            )
        if hasattr(source[0], "peft_config"):
            raise RecipeError(
                f"{place} has adapters: merge them first (merge_and_unload), and train new ones with "
                "student={'model': ..., 'lora': {'rank': 16}}"
            )
        if any(value.is_meta for value in source[0].state_dict().values()):
            raise RecipeError(
                f"{place} has weights on no device (meta, or offloaded); load all of them, without device_map"
            )
        section["model"] = _added(given.name_of_model(*source), source, objects)
    elif hasattr(source, "state_dict"):
        raise RecipeError(
            f"{place} is a loaded model without its tokenizer; give both, as in {place}=(model, tokenizer)"
        )
    elif source is not None and not isinstance(source, str):
        several = "; several teachers are teachers={'name': ...}" if place == "teacher" else ""
        raise RecipeError(
            f"{place} is of type {type(source).__name__}; it must be a directory, a hub name, or a pair (model, tokenizer)"
            + several
        )
    return section if place == "student" or "type" in section else {"type": "local"} | section


def task(section: Mapping[str, Any], sources: Mapping[str, Any], objects: dict[str, Any]) -> dict[str, Any]:
    """The section of the task with the sources of its rows. Raises RecipeError for sources of several kinds."""
    own = dict(plain("task", section))
    named = {split: str(rows) for split, rows in sources.items() if isinstance(rows, str | Path)}
    rows = {split: rows for split, rows in sources.items() if rows is not None and split not in named}
    if not named and not rows:
        return own
    if sources["train"] is None:
        raise RecipeError(f"{', '.join([*rows, *named])} without train; give train, or all sources in task")
    if rows and named:
        raise RecipeError(
            f"{', '.join(rows)} are rows, {', '.join(named)} names; give all of them as rows or all by name"
        )
    if rows:
        for split, table in rows.items():
            # a Dataset has features and a length; an IterableDataset has no length, and a DatasetDict is a mapping
            is_dataset = hasattr(table, "features") and hasattr(table, "__len__") and not isinstance(table, Mapping)
            if not is_dataset and not isinstance(table, list | tuple):
                raise RecipeError(
                    f"{split} is of type {type(table).__name__}; rows are a datasets.Dataset (one split) or a list of mappings"
                )
            if isinstance(table, tuple):
                rows[split] = list(table)  # a tuple is a loaded model with its tokenizer
            elif is_dataset and table.format["type"] not in (None, "custom"):
                # arrays and tensors of a format have fewer digits than the rows
                rows[split] = table.with_format(None, columns=table.format["columns"])
        found = {split: _added(given.name_of_rows(table), table, objects) for split, table in rows.items()}
        return {"type": "rows"} | found | own
    first = named.pop("train")
    path = Path(first).expanduser()
    if own.get("type", "file") != "hub" and (path.exists() or path.suffix or first.startswith((".", "/", "~"))):
        return {"type": "file", "path": first} | {f"{split}_path": name for split, name in named.items()} | own
    return {"type": "hub", "dataset": first} | {f"split_{split}": name for split, name in named.items()} | own


def function(value: Any, name: str, called_with: Sequence[str], objects: dict[str, Any]) -> Any:
    """The name that stands for a function; anything else as it is. Raises RecipeError for one that takes other arguments."""
    if not callable(value):
        return value
    given.check_callable(value, name, *called_with)
    return _added(given.name_of_function(value), value, objects)


def callbacks(values: Any, objects: dict[str, Any]) -> list[str]:
    """The names that stand for callbacks. Raises RecipeError for what lacks one of their methods."""
    if not isinstance(values, list | tuple):
        raise RecipeError(f"callbacks is of type {type(values).__name__}; it must be a list of objects")
    for one in values:
        if isinstance(one, type):
            raise RecipeError(f"callbacks: {one.__name__} is a class; give an object of it, as in {one.__name__}()")
        for name, called_with in CALLBACK_METHODS.items():
            kind, method = type(one).__name__, getattr(one, name, None)
            if not callable(method):
                raise RecipeError(f"callbacks: {kind} lacks one of {', '.join(CALLBACK_METHODS)}; extend Callback")
            given.check_callable(method, f"callbacks: {name} of {kind}", *called_with)
    return [_added(given.name_of_function(one), one, objects) for one in values]


def _added(name: str, one: Any, objects: dict[str, Any]) -> str:
    """Adds an object under its name; of two functions with one name the second gets a number."""
    free = (f"{name} {n}" if n > 1 else name for n in count(1))
    chosen = next(other for other in free if objects.get(other, one) is one)
    objects[chosen] = one
    return chosen
