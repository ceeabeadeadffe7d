"""Problems from files: JSON lines and data sets of the Hugging Face hub, with the fields named in the recipe.

`overlap` finds problems that stand both in the training data and in the evaluation, `num_repeated` those that stand twice.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from understudy.config import brief
from understudy.errors import DataError, RecipeError, nearest
from understudy.randomness import hash_name
from understudy.tasks.base import Carried, Split, Task
from understudy.tasks.verifiers import find_verifier
from understudy.types import Grade, Prompt

Row = tuple[str, Mapping[str, Any]]
"""The place of the row (file and line), and its fields."""

NUM_CHECKED_ROWS = 8
"""Rows of each file that a dry run reads."""
NUM_EXAMPLES = 3
_TYPESETTING = re.compile(r"\\[()]|\.(?!\d)|[^\w+*/=<>^().-]|_")
"""Characters in which two copies of a problem differ: white space, mathematical markup, braces, commas and full stops."""


@dataclass(frozen=True, kw_only=True)
class Records(Task):
    """A task that reads rows: which field means what, how a prompt is worded, and how train and validation are split.

    A field may be nested, `reward_model.ground_truth`. A row's prompt is a string, or a list of messages of a chat.
    Without `reference_field` the samples cannot be graded; they are left unscored. With `validation_share` a row goes
    to validation by a hash of its prompt and `seed`: rows that are added or moved leave the others where they are, and
    equal prompts stay together.
    """

    prompt_field: str
    reference_field: str | None = None
    """The final answer that the verifier compares with."""
    solution_field: str | None = None
    """A whole response to imitate."""
    reference_after: str | None = None
    """Take only what follows the last of this mark in the reference: "####" for GSM8K."""
    teacher_field: str | None = None
    """Names the teacher that judges the row."""
    template: str = "{prompt}"
    """The wording around the prompt; other braces stay as they are."""
    system: str | None = None
    """The system message of the chat."""
    chat: bool = True
    """Through the tokenizer's chat template; false: as plain text."""
    validation_share: float = 0.0
    limit: int | None = None
    """At most so many prompts of each split, the first ones."""
    verifier: str = "math"
    seed: int = 0

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"template is {self.template!r}; it must contain {{prompt}}")
        if self.system is not None and not self.chat:
            raise ValueError("system is a message of a chat; with chat: false put its text into template")
        if not 0.0 <= self.validation_share < 1.0:
            raise ValueError(f"validation_share is {self.validation_share}; it must be at least 0 and less than 1")
        if self.validation_share > 0 and "validation" in self.sources():
            raise ValueError("validation_share and a validation source are both given; keep one")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1, or left out")
        if self.reference_after is not None and self.reference_field is None:
            raise ValueError("reference_after is given without reference_field")
        find_verifier(self.verifier)

    @abstractmethod
    def sources(self) -> Mapping[str, str]:
        """Split -> the file or hub split that it is read from."""

    @abstractmethod
    def rows(self, source: str) -> Iterator[Row]:
        """The rows of one source, in order. Raises RecipeError or DataError."""

    @property
    def computed(self) -> bool:
        return False

    @property
    def carries(self) -> frozenset[Carried]:
        fields: dict[Carried, str | None]
        fields = {"solution": self.solution_field, "reference": self.reference_field, "teacher": self.teacher_field}
        return frozenset(name for name, field in fields.items() if field)

    @property
    def is_chat(self) -> bool:
        return self.chat

    def check_split(self, split: Split) -> None:
        if split not in self.sources() and not (split == "validation" and self.validation_share > 0):
            hint = " or set task.validation_share" if split == "validation" else ""
            raise RecipeError(f"task {self.name} has no {split} split; give it a source{hint}")

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """All prompts of the split, in the order of the source, repeated ones too (`num_repeated` counts them).

        Raises RecipeError for a split that the recipe gives no source for, DataError for a bad row or an empty split.
        """
        return _load(self, split)

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verifier's verdict. Raises DataError for a prompt without reference."""
        if prompt.reference is None:
            raise DataError(f"prompt {prompt.id} has no reference to grade with; set task.reference_field")
        return find_verifier(self.verifier)(text, prompt.reference)

    def check_files(self) -> None:
        """Read the first rows of every source, as the run would. Raises RecipeError or DataError."""
        for source in dict.fromkeys(self.sources().values()):
            if not [self.to_prompt(place, row) for place, row in islice(self.rows(source), NUM_CHECKED_ROWS)]:
                raise DataError(f"{source} is empty; it must hold at least one row")

    def to_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        """One row as a prompt. Its id is a hash of the bare prompt: it survives another order and another template."""
        raw = _field(row, self.prompt_field, place)
        if isinstance(raw, str):
            raw = [{"role": "user", "content": raw}]
        try:
            messages = [{"role": item["role"], "content": item["content"]} for item in raw]
            question = messages[-1]["content"]
        except (TypeError, KeyError, IndexError):
            messages = []
        if not messages or not all(isinstance(value, str) for item in messages for value in item.values()):
            raise DataError(
                f"{place}: field {self.prompt_field!r} is {brief(raw)}; it must be a string, or a list of messages with "
                "role and content"
            )
        text = self.template.replace("{prompt}", question)
        messages[-1] = {**messages[-1], "content": text}
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        reference = _optional_text(row, self.reference_field, place)
        if reference is not None and self.reference_after is not None:
            if self.reference_after not in reference:
                raise DataError(f"{place}: field {self.reference_field!r} does not contain {self.reference_after!r}")
            reference = reference.rpartition(self.reference_after)[2].strip()
        digest = blake2b(normalise(question).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return Prompt(
            id=f"{self.name}/{digest}",
            text=None if self.chat else text,
            messages=tuple(messages) if self.chat else None,
            reference=None if reference is None else (reference,),
            solution=_optional_text(row, self.solution_field, place),
            teacher=_optional_text(row, self.teacher_field, place),
        )


@dataclass(frozen=True, kw_only=True)
class Jsonl(Records):
    """The task `jsonl`: files of one JSON object per line, `.jsonl` or `.jsonl.gz`."""

    path: str
    validation_path: str | None = None
    test_path: str | None = None

    @property
    def name(self) -> str:
        path = Path(self.path)
        stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
        return f"{path.parent.name}/{stem}" if path.parent.name else stem

    def sources(self) -> Mapping[str, str]:
        paths = {"train": self.path, "validation": self.validation_path, "test": self.test_path}
        return {split: path for split, path in paths.items() if path is not None}

    def rows(self, source: str) -> Iterator[Row]:
        path = Path(source)
        if not path.is_file():
            siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = nearest(path.name, siblings) if siblings else f"there is no folder {path.parent}"
            raise RecipeError(f"there is no file {path}; {hint}")
        line_number = 0
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                for line_number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{line_number}", _parse_line(line, f"{path}:{line_number}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file, after line {line_number}: {error}") from error
        except OSError as error:
            raise RecipeError(f"cannot read {path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Hub(Records):
    """The task `hub`: a data set that `datasets.load_dataset` knows, by its name on the hub or as a local folder.

    `check_files` reads nothing from the network: of a hub name it checks the form only.
    """

    dataset: str
    config: str | None = None
    split_train: str = "train"
    split_validation: str | None = None
    split_test: str | None = None
    revision: str | None = None
    """A commit or tag; give it where results are to be repeated."""

    @property
    def name(self) -> str:
        return self.dataset

    def sources(self) -> Mapping[str, str]:
        splits = {"train": self.split_train, "validation": self.split_validation, "test": self.split_test}
        return {split: source for split, source in splits.items() if source is not None}

    def rows(self, source: str) -> Iterator[Row]:
        from datasets import load_dataset

        try:
            data = load_dataset(self.dataset, self.config, split=source, revision=self.revision)
        except Exception as error:  # the library raises a dozen unrelated types for what is wrong with a name
            raise DataError(f"cannot load split {source!r} of data set {self.dataset!r}: {error}") from error
        for number, row in enumerate(data):
            yield f"{self.dataset}[{source}] row {number}", row

    @property
    def is_local(self) -> bool:
        return Path(self.dataset).is_dir()

    def check_files(self) -> None:
        if self.is_local:
            super().check_files()
        elif self.dataset.startswith((".", "/", "~")) or self.dataset.count("/") > 1:
            raise RecipeError(
                f"task.dataset is {self.dataset!r}; there is no such folder, and it is not a hub name (owner/name)"
            )


@lru_cache(maxsize=8)
def _load(task: Records, split: Split) -> tuple[Prompt, ...]:
    task.check_split(split)
    source = task.sources().get(split, task.sources()["train"])
    found, seen = list[Prompt](), Counter[str]()
    for place, row in task.rows(source):
        prompt = task.to_prompt(place, row)
        if task.validation_share > 0 and split != "test":
            draw = hash_name(f"{task.seed}/validation/{problem_key(prompt)}") / 2**64
            if (draw < task.validation_share) != (split == "validation"):
                continue
        seen[prompt.id] += 1
        count = seen[prompt.id]
        # repeated prompts get "~2", "~3" behind their id: randomness is keyed by it
        found.append(prompt if count == 1 else replace(prompt, id=f"{prompt.id}~{count}"))
        if len(found) == task.limit:
            break
    if not found:
        raise DataError(f"{source}: the {split} split is empty; it must hold at least one row")
    return tuple(found)


def problem_key(prompt: Prompt) -> str:
    """The part of a prompt's id that names the problem, whatever data set, template or repetition it comes in."""
    return prompt.id.rpartition("/")[2].partition("~")[0]


def normalise(text: str) -> str:
    """The text without letter case and white space, for comparing two prompts."""
    return " ".join(text.casefold().split())


def _field(row: Mapping[str, Any], field: str, place: str) -> Any:
    """The value of a field, which may be nested: `a.b`."""
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = value if isinstance(value, Mapping) else row
            raise DataError(f"{place}: no field {field!r}; fields: {', '.join(map(str, row))} ({nearest(part, known)})")
        value = value[part]
    return value


def _optional_text(row: Mapping[str, Any], field: str | None, place: str) -> str | None:
    if field is None:
        return None
    value = _field(row, field, place)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{place}: field {field!r} is {brief(value)}; it must be a string or a number")


def _parse_line(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # the encoding, the syntax, ten thousand brackets
        raise DataError(f"{place}: not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: {brief(row)} is not a JSON object; one line holds one object with named fields")
    return row


def overlap(train: Sequence[Prompt], evaluation: Sequence[Prompt], limit: int | None = None) -> list[str]:
    """Ids of the evaluation prompts that also stand in `train`, letter case, white space, typesetting and template aside.

    Looks at the first `limit` training prompts only, where it is given: a computed task may have millions.
    """
    keys = {key for prompt in islice(train, limit) for key in _keys(prompt)}
    return [prompt.id for prompt in evaluation if not keys.isdisjoint(_keys(prompt))]


def overlap_message(ids: Sequence[str], num_evaluation: int) -> str:
    """One sentence for the console and the report. `ids` as `overlap` returns them."""
    if not ids:
        return f"none of the {num_evaluation} evaluation prompts is in the training data"
    examples = ", ".join(ids[:NUM_EXAMPLES]) + (", ..." if len(ids) > NUM_EXAMPLES else "")
    return (
        f"{len(ids)} of {num_evaluation} evaluation prompts are also in the training data ({examples}): the accuracy "
        "measures memory too; remove them from one side"
    )


def num_repeated(prompts: Sequence[Prompt]) -> int:
    """How many prompts repeat an earlier one of the sequence."""
    return len(prompts) - len({problem_key(prompt) for prompt in prompts})


def _keys(prompt: Prompt) -> tuple[str, str]:
    """The problem as its id names it (without a template) and the wording as the model sees it."""
    users = [message["content"] for message in prompt.messages or () if message["role"] == "user"]
    text = prompt.text if prompt.text is not None else "\n".join(users)
    return problem_key(prompt), _TYPESETTING.sub("", text.casefold()) or normalise(text)
