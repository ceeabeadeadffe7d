"""Problems from files and from data sets of the Hugging Face hub, with the fields named in the recipe."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, cast

from understudy import given
from understudy.errors import DataError, RecipeError, brief, check_range
from understudy.hub import unreachable
from understudy.models.vision import open_image
from understudy.randomness import hash_name
from understudy.tasks.base import Carried, Intake, Split, Task
from understudy.tasks.chats import SYSTEM_ROLES, Said, chat_in, conversation_facts, read_messages, read_tools
from understudy.tasks.fields import (
    Condition,
    MissingValueError,
    NoFieldError,
    accepted_answers,
    is_missing,
    read_field,
    read_text,
)
from understudy.tasks.overlap import normalise, problem_key
from understudy.tasks.rows import Row, bare_name, find_files, padded, read_rows
from understudy.tasks.verifiers import find_verifier
from understudy.types import IMAGE, Grade, Image, Prompt

NUM_CHECKED_ROWS = 8
"""Rows of each file that a dry run reads."""
NUM_SHOWN = 3
"""Rows without a value that are named."""
TOOLS_FIELD = "tools"
IMAGE_WORD = "<image>"
"""Stands for an image in the text of most data sets."""
_COMMIT = re.compile(r"@([0-9a-f]{40})\b")


@dataclass(frozen=True, kw_only=True)
class Records(Task):
    """A task that reads rows: which field means what, how a prompt is worded, and how train and validation are split.

    A field may be nested, `reward_model.ground_truth`. A row's prompt is a string, or a list of messages of a chat; an
    assistant's turn at its end is the solution. A row without a value (null, NaN, nothing) in one of the fields is left out
    and counted. Without `reference_field` the samples cannot be graded; they are left unscored. With `validation_share` a
    row goes to validation by a hash of its prompt and `seed`: rows that are added or moved leave the others where they
    are, and equal prompts stay together.
    """

    prompt_field: str
    """A string, or the list of messages of a chat; a field may be nested: `a.b`."""
    reference_field: str | None = None
    """The final answer that the verifier compares with, or a list of answers that are all accepted. Several fields with
    commas between them, `answer, answer_aliases`, are one list; every row has all of them."""
    solution_field: str | None = None
    """A whole response to imitate, as text or as a list of one message of the assistant; the field of the prompt again where
    it is the end of the chat."""
    image_field: str | None = None
    """An image, or a list of images: paths in the folder of the rows' file, or bytes. `<image>` in a message of the user is
    where one stands, or a part of type image; without these they come before the last message's text."""
    tools_field: str | None = TOOLS_FIELD
    """Schemas of the tools of a chat; a row may have none."""
    reference_after: str | None = None
    """Take only what follows the last of this mark in the reference: "####" for GSM8K."""
    teacher_field: str | None = None
    """Names the teacher that judges the row."""
    template: str = "{prompt}"
    """The wording around the prompt, of a chat around its last message of the user; other braces stay as they are."""
    system: str | None = None
    """The system message of the chat, where the rows bring none."""
    chat: bool = True
    """Through the tokenizer's chat template; false: as plain text."""
    validation_share: float = 0.0
    """Share of the training rows held out for validation."""
    where: tuple[str, ...] = ()
    """Conditions of which a row meets all, or it is no part of the data: `difficulty >= 6`, `domain = math`,
    `subject in algebra, geometry`; also `!=` and `<=`."""
    limit: int | None = None
    """At most so many prompts of each split, the first ones."""
    verifier: str = "math"
    """`math`, `exact`, `choice`, or the name of a function that a Python program gives."""
    reward_function: str | None = None
    """Name of a function that a Python program gives (`understudy.distil`): its reward replaces the grade in training."""
    seed: int = 0
    """Seed of the split into training and validation."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"template is {self.template!r}; it must contain {{prompt}}")
        if self.system is not None and not self.chat:
            raise ValueError("system is a message of a chat; with chat: false put its text into template")
        if self.image_field is not None and not self.chat:
            raise ValueError("image_field is given with chat: false; only a chat template says where an image stands")
        if not 0.0 <= self.validation_share < 1.0:
            raise ValueError(f"validation_share is {self.validation_share}; it must be at least 0 and less than 1")
        if self.validation_share > 0 and "validation" in self.sources():
            raise ValueError("validation_share and a validation source are both given; keep one")
        check_range(self, 1, "limit", off="null takes every row")
        if self.reference_after is not None and self.reference_field is None:
            raise ValueError("reference_after is given without reference_field")
        _ = self.conditions
        find_verifier(self.verifier)
        if self.reward_function is not None and not given.is_given(self.reward_function):
            raise ValueError(
                f"reward_function is {self.reward_function!r}; a function is given from Python: understudy.distil(reward=...)"
            )

    def on_file(self, path: str) -> Records:
        read_alike = {item.name: getattr(self, item.name) for item in fields(Records)}
        own = {"path": path, "validation_path": path, "test_path": path, "validation_share": 0.0, "limit": None}
        return File(**read_alike | own)

    @abstractmethod
    def sources(self) -> Mapping[str, str]:
        """Split -> the file or hub split that it is read from."""

    @abstractmethod
    def rows(self, source: str) -> Iterator[Row]:
        """The rows of one source, in order. Raises RecipeError or DataError."""

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions of `where`. Raises ValueError for one that cannot be read."""
        return tuple(map(Condition.read, self.where))

    def chosen_rows(self, source: str) -> Iterator[Row]:
        """The rows of one source that meet all conditions, their images found. Raises as `rows`, and DataError for a value with
        no order."""
        folder = None
        for place, row in self.rows(source):
            if all(condition.holds(row, place) for condition in self.conditions):
                field = self.image_field
                if field is not None and isinstance(row.get(field), str | list):
                    folder = self.folder(source) if folder is None else folder
                    row = {**row, field: _located(row[field], folder)}
                yield place, row

    def fields_read(self, row: Mapping[str, Any]) -> list[str | None]:
        """The fields that determine a row's content; None if the recipe names none."""
        named = [self.prompt_field, self.tools_field, *self.reference_fields(row)]
        return [*named, self.solution_field, self.teacher_field]

    def reference_fields(self, row: Mapping[str, Any]) -> list[str]:
        """The names in `reference_field`; a name of the row may have a comma itself."""
        field = self.reference_field
        return [] if field is None else [field] if field in row else [name.strip() for name in field.split(",")]

    @property
    def computed(self) -> bool:
        return False

    @property
    def carries(self) -> frozenset[Carried]:
        fields: dict[Carried, str | None]
        fields = {"solution": self.solution_field, "reference": self.reference_field, "teacher": self.teacher_field}
        found = frozenset(name for name, field in fields.items() if field)
        # what a chat ends with is seen in the rows alone; of those far away the recipe has to say it
        if self.is_local and self.prompts(self.first_split)[0].solution is not None:
            found |= {"solution"}
        return found

    @property
    def first_split(self) -> Split:
        return cast(Split, next(iter(self.sources())))

    @property
    def is_chat(self) -> bool:
        return self.chat

    @property
    def has_images(self) -> bool:
        return self.image_field is not None

    def check_split(self, split: Split) -> None:
        if split not in self.sources() and not (split == "validation" and self.validation_share > 0):
            hint = " or set task.validation_share" if split == "validation" else ""
            raise RecipeError(f"{self.name} has no {split} split; give it a source{hint}")

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """All prompts of the split, in the order of the source, repeated ones too (`num_repeated` counts them).

        Raises RecipeError for a split that the recipe gives no source for, DataError for a bad row or an empty split.
        """
        return self._loaded(split)[0]

    def intake(self, split: Split) -> Intake:
        return self._loaded(split)[1]

    def folder(self, source: str) -> Path:
        """The folder that paths in the rows of a source are in."""
        return Path()

    def _stamp(self, source: str) -> object:
        """Changes with the files of a source, which are then read again."""
        return None

    def commit(self, source: str) -> str | None:
        """The commit of a source that was read, where it has one."""
        return None

    def _loaded(self, split: Split) -> tuple[tuple[Prompt, ...], Intake]:
        self.check_split(split)
        source = self.sources().get(split) or self.sources()["train"]
        return _load(self, split, source, self._stamp(source))

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verifier's verdict. Raises DataError for a prompt without reference."""
        if prompt.reference is None:
            raise DataError(f"prompt {prompt.id} has no reference to grade with; set task.reference_field")
        return find_verifier(self.verifier)(text, prompt.reference)

    def same_answer(self, prompt: Prompt, one: str, other: str) -> bool:
        """Whether the verifier `math` finds them equal: 0.5 and 1/2 are one vote."""
        return one == other or (self.verifier == "math" and find_verifier("math")(f"\\boxed{{{one}}}", other).right)

    def gold(self, prompt: Prompt) -> Sequence[str]:
        if self.verifier == "instructions":
            return ()
        if self.verifier == "code":
            # the reference is its tests
            return () if prompt.solution is None else (prompt.solution,)
        answers = prompt.reference or ()
        return [f"\\boxed{{{answer}}}" for answer in answers] if self.verifier in ("math", "choice") else answers

    @property
    def rewards(self) -> bool:
        return self.reward_function is not None

    def reward(self, prompt: Prompt, text: str) -> Grade | None:
        """The result of the function that was given, or the grade. Raises DataError as `grade`, and for no number."""
        if self.reward_function is None:
            return self.grade(prompt, text)
        reward = given.call(self.reward_function, prompt, text)
        return None if reward is None else given.as_grade(reward, self.reward_function)

    def check_files(self) -> None:
        """Read the first rows of every source, as the run would. Raises RecipeError or DataError."""
        for source in dict.fromkeys(self.sources().values()):
            rows = list(islice(self.chosen_rows(source), NUM_CHECKED_ROWS + 1))
            if not rows:
                met = f" that meets {' and '.join(self.where)}" if self.where else ""
                raise DataError(f"{source} is empty; it must hold at least one row{met}")
            missing = []
            for place, row in rows:
                try:
                    self.read_prompt(place, row)
                except MissingValueError as error:
                    missing.append(error)
            if len(missing) == len(rows) <= NUM_CHECKED_ROWS:
                raise missing[0]

    def read_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        """`to_prompt`; an error about a field that the row lacks also says by which key it is named."""
        try:
            return self.to_prompt(place, row)
        except NoFieldError as error:
            for item in fields(self):
                names = str(getattr(self, item.name)).split(",") if item.name.endswith("_field") else []
                if error.field is not None and error.field in [name.strip() for name in names]:
                    error.args = (f"{error}; set {item.name} to the field that is meant",)
                    break
            raise

    def to_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        """One row as a prompt. Its id is a hash of the bare conversation with the names of its images: it survives another
        order and another template.

        Raises MissingValueError for a row without a value in one of the fields, and for an image that is not there or cannot be
        read; DataError for a value of the wrong kind.
        """
        messages, tools, solution = self._conversation(place, row)
        if len(messages) == 1 and messages[0]["role"] == "user" and not tools:
            said = str(messages[0]["content"])
        else:
            told = [{**message, "content": normalise(message["content"])} for message in messages]
            said = json.dumps(conversation_facts(told, tools), sort_keys=True, ensure_ascii=False)
        key = blake2b(normalise(said).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        try:
            images, names = self._images(place, row)
            if images:
                key = blake2b("\n".join([key, *names]).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
            references = None if self.reference_field is None else self._references(place, row)
            if self.solution_field == self.prompt_field and solution is None:
                raise MissingValueError(f"{place}: the chat does not end with words of the assistant")
            if self.solution_field not in (None, self.prompt_field):
                solution = self._solution(place, row, self.solution_field)
            teacher = None if self.teacher_field is None else read_text(row, self.teacher_field, place)
        except MissingValueError as error:
            error.key = key
            raise
        asked = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
        quoted = ""
        if asked is not None:
            quoted = messages[asked]["content"]
            messages[asked] = {**messages[asked], "content": self.template.replace("{prompt}", quoted)}
        elif self.template != "{prompt}":
            raise DataError(f"{place}: the chat has no message of the user to put into task.template")
        if images:
            self._place_images(place, messages, len(images))
        if self.system is not None:
            if any(message["role"] in SYSTEM_ROLES for message in messages):
                raise DataError(f"{place}: the chat has a system message, and so has task.system; keep one")
            messages.insert(0, {"role": "system", "content": self.system})
        return Prompt(
            id=f"{self.name}/{key}",
            text=None if self.chat else messages[0]["content"],
            messages=tuple(messages) if self.chat else None,
            tools=tools,
            images=images,
            quoted=() if self.chat else (quoted,),
            reference=references,
            solution=solution,
            teacher=teacher,
        )

    def _conversation(
        self, place: str, row: Mapping[str, Any]
    ) -> tuple[list[Said], tuple[Said, ...] | None, str | None]:
        """The messages that the student answers, its tools, and the assistant's answer where the row ends with one."""
        raw, solution = read_field(row, self.prompt_field, place, required=True), None
        messages = _messages(place, self.prompt_field, raw, images=self.has_images)
        where = f"{place}: the chat in field {self.prompt_field!r}"
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()
            if self.solution_field not in (None, self.prompt_field):
                raise DataError(f"{where} ends with the assistant, and task.solution_field names a solution; keep one")
            if "tool_calls" not in answer:
                if is_missing(answer["content"]):
                    raise MissingValueError(f"{where} ends with an empty turn of the assistant")
                solution = _response(answer)
        last = messages[-1]["role"] if messages else "assistant"
        if last == "user" and is_missing(messages[-1]["content"]):
            raise MissingValueError(f"{where} asks nothing: its last message is empty")
        if last not in ("user", "tool"):
            raise DataError(f"{where} leaves nothing to answer: before its end comes {last!r}, not a user or a tool")
        tools = None
        try:
            # a name that the recipe gives has to be there; the usual one is taken where it is
            if self.tools_field is not None and (self.tools_field in row or self.tools_field != TOOLS_FIELD):
                tools = read_tools(read_field(row, self.tools_field, place, required=True))
        except MissingValueError:
            pass
        except ValueError as error:
            raise DataError(
                f"{place}: field {self.tools_field!r}{error}; where it holds no tools, set task.tools_field to null"
            ) from error
        if not self.chat and len(messages) > 1:
            raise DataError(f"{where} has {len(messages)} messages, of which chat: false takes one; leave chat out")
        return messages, tools, solution

    def _images(self, place: str, row: Mapping[str, Any]) -> tuple[tuple[Image, ...], list[str]]:
        """The images of a row, and their names as the row has them."""
        if self.image_field is None:
            return (), []
        value = read_field(row, self.image_field, place, required=True)
        images, names = list[Image](), list[str]()
        for item in value if isinstance(value, list) else [value]:
            # data sets of the hub have both, of which either may be null
            found = item if isinstance(item, Mapping) else {"bytes" if isinstance(item, bytes) else "path": item}
            data, path = found.get("bytes"), found.get("path")
            if isinstance(data, bytes):
                image = Image(data=data)
                names.append(image.name)
            elif isinstance(path, str) and "://" not in path and not path.startswith("data:"):
                image = Image(path=str(Path(path).expanduser()))
                # the row's content, the same on every machine
                names.append(str(found.get("name", path)))
            else:
                raise DataError(
                    f"{place}: field {self.image_field!r} holds {brief(item)}; an image is the path of a file, or its bytes"
                )
            try:
                open_image(image, whole=False)
            except DataError as error:
                raise MissingValueError(f"{place}: {error}") from error
            images.append(image)
        return tuple(images), names

    def _place_images(self, place: str, messages: list[Said], count: int) -> None:
        """Puts `IMAGE` where an image stands: in place of each `<image>` of the user, or before the last message."""
        users = [n for n, message in enumerate(messages) if message["role"] == "user"]
        for n in users:
            messages[n] = {**messages[n], "content": messages[n]["content"].replace(IMAGE_WORD, IMAGE)}
        found = sum(message["content"].count(IMAGE) for message in messages)
        if not found and users:
            messages[users[-1]] = {**messages[users[-1]], "content": IMAGE * count + messages[users[-1]]["content"]}
        elif found != count:
            raise DataError(
                f"{place}: the chat has {found} places for images ({IMAGE_WORD}), but field {self.image_field!r} holds {count}"
            )

    def _solution(self, place: str, row: Mapping[str, Any], field: str) -> str:
        """A text, or the one turn of the assistant in a list of messages."""
        value = read_field(row, field, place)
        try:
            value = chat_in(value) or value if isinstance(value, str) else value
        except ValueError as error:
            raise DataError(f"{place}: field {field!r}{error}") from error
        if not isinstance(value, list):
            return read_text(row, field, place)
        messages = _messages(place, field, value)
        if len(messages) != 1 or messages[0]["role"] != "assistant" or "tool_calls" in messages[0]:
            raise DataError(
                f"{place}: field {field!r} must hold one message of the assistant with text; where it holds the whole chat, "
                "name it as the field of the prompt"
            )
        if is_missing(messages[0]["content"]):
            raise MissingValueError(f"{place}: field {field!r} holds an empty turn of the assistant")
        return _response(messages[0])

    def _references(self, place: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The accepted answers, each cut to what follows `reference_after`."""
        field = str(self.reference_field)
        names = self.reference_fields(row)
        found: list[str] = []
        for name in names:
            try:
                found += accepted_answers(read_field(row, name, place, required=len(names) > 1))
            except MissingValueError:
                if len(names) == 1:
                    raise
            except ValueError as error:
                raise DataError(f"{place}: field {name!r} is {str(error).replace('FIELD', name)}") from error
        if self.reference_after is not None:
            for text in found:
                if self.reference_after not in text:
                    raise DataError(f"{place}: field {field!r} does not contain {self.reference_after!r}")
            found = [text.rpartition(self.reference_after)[2].strip() for text in found]
        found = [text for text in dict.fromkeys(found) if text.strip()]
        if not found:
            raise MissingValueError(f"{place}: field {field!r} is empty")
        return tuple(found)


def _located(value: Any, folder: Path) -> Any:
    """The images of a field with the folder before relative paths, and the names that they have in the data."""
    if isinstance(value, list):
        return [_located(item, folder) for item in value]
    if not isinstance(value, str) or "://" in value:
        return value
    return {"path": str(folder / Path(value).expanduser()), "name": value}


def _messages(place: str, field: str, value: object, *, images: bool = False) -> list[Said]:
    """A field as messages. Raises MissingValueError for one without content, DataError for what is no chat."""
    try:
        return read_messages(value, images=images)
    except (MissingValueError, ValueError) as error:
        kind = MissingValueError if isinstance(error, MissingValueError) else DataError
        raise kind(f"{place}: field {field!r}{error}") from error


def _response(answer: Said) -> str:
    """A turn of the assistant as a text to imitate, its reasoning in front."""
    thought = answer.get("reasoning_content")
    return str(answer["content"]) if thought is None else f"<think>\n{thought}\n</think>\n\n{answer['content']}"


@dataclass(frozen=True, kw_only=True)
class File(Records):
    """The task `file`, also `jsonl`: JSON, JSON lines, CSV, TSV, Parquet or Arrow, compressed (.gz, .zst, .bz2, .xz, .zip)
    or not. A path is a file, a folder or a pattern."""

    path: str
    """The training rows."""
    validation_path: str | None = None
    """Rows of the split `validation`."""
    test_path: str | None = None
    """Rows of the split `test`."""

    @property
    def name(self) -> str:
        return bare_name(self.path)

    def sources(self) -> Mapping[str, str]:
        paths = {"train": self.path, "validation": self.validation_path, "test": self.test_path}
        return {split: path for split, path in paths.items() if path is not None}

    def rows(self, source: str) -> Iterator[Row]:
        return read_rows(source)

    def folder(self, source: str) -> Path:
        return find_files(source)[0].parent

    def _stamp(self, source: str) -> object:
        return _stamp(find_files(source))


Jsonl = File


@dataclass(frozen=True, kw_only=True)
class Hub(Records):
    """The task `hub`: a data set that `datasets.load_dataset` knows, by its name on the hub or as a local folder.

    `check_files` reads nothing from the network: of a hub name it checks the form only.
    """

    dataset: str
    """`owner/name` on the hub, or a folder."""
    config: str | None = None
    """Its configuration, where it has several."""
    split_train: str = "train"
    """The split to train on."""
    split_validation: str | None = None
    """The split `validation`."""
    split_test: str | None = None
    """The split `test`."""
    revision: str | None = None
    """A commit or tag; set it for reproducible results."""

    @property
    def name(self) -> str:
        return self.dataset

    def sources(self) -> Mapping[str, str]:
        splits = {"train": self.split_train, "validation": self.split_validation, "test": self.split_test}
        return {split: source for split, source in splits.items() if source is not None}

    def rows(self, source: str) -> Iterator[Row]:
        data = _open_split(self.dataset, self.config, source, self.revision, self._stamp(source))
        for number, row in enumerate(data):
            yield f"{self.dataset}[{source}] row {number}", padded(row, data.features.arrow_schema)

    def folder(self, source: str) -> Path:
        return Path(self.dataset) if self.is_local else Path()

    def commit(self, source: str) -> str | None:
        data = _open_split(self.dataset, self.config, source, self.revision, self._stamp(source))
        return next(iter(_COMMIT.findall(" ".join(data.info.download_checksums or ()))), None)

    def _stamp(self, source: str) -> object:
        return _stamp(Path(self.dataset).rglob("*")) if self.is_local else None

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


@lru_cache(maxsize=32)
def _load(task: Records, split: Split, source: str, stamp: object) -> tuple[tuple[Prompt, ...], Intake]:
    """`stamp`: with another one the source is read anew."""
    found, seen, digest = list[Prompt](), Counter[str](), blake2b(digest_size=16)
    num_rows, skipped = 0, list[str]()
    for place, row in task.chosen_rows(source):
        num_rows += 1
        fields = task.fields_read(row)
        said = [row.get(field, row.get(field.partition(".")[0])) for field in fields if field is not None]
        try:
            digest.update(json.dumps(said, default=repr).encode() + b"\n")
            prompt = task.read_prompt(place, row)
            # of an image in a file the size, for to read all of them takes long
            images = [(one.name, Path(one.path).stat().st_size if one.path else 0) for one in prompt.images]
            digest.update("".join(f"{name} {size}\n" for name, size in images).encode())
        except MissingValueError as error:
            skipped.append(str(error))
            # counted, so that a repetition keeps its id
            seen[f"{task.name}/{error.key}"] += 1
            continue
        except RecursionError:
            raise DataError(f"{place} is nested too deeply") from None
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
    if skipped and len(skipped) == num_rows:
        raise DataError(f"{skipped[0]}; none of the {num_rows} rows of {source} can be used")
    if not found:
        met = f" that meets {' and '.join(task.where)}" if task.where else ""
        raise DataError(f"{source}: the {split} split is empty; it must hold at least one row{met}")
    examples = tuple(skipped[:NUM_SHOWN])
    return tuple(found), Intake(source, num_rows, len(skipped), examples, digest.hexdigest(), task.commit(source))


@lru_cache(maxsize=4)
def _open_split(dataset: str, config: str | None, split: str, revision: str | None, stamp: object) -> Any:
    from datasets import config as settings
    from datasets import load_dataset, load_from_disk

    offline = None if Path(dataset).exists() else unreachable()
    # the library keeps a copy of the hub's setting, from the time when it was imported
    settings.HF_HUB_OFFLINE |= offline is not None
    try:
        if any((Path(dataset) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = load_from_disk(dataset)
            return _undecoded(data[split] if isinstance(data, dict) else data)
        return _undecoded(load_dataset(dataset, config, split=split, revision=revision))
    except Exception as error:  # the library raises a dozen unrelated types for a bad name
        told = f"it is not in the cache of `datasets`, and {offline}" if offline else error
        raise DataError(f"cannot load split {split!r} of data set {dataset!r}: {told}") from error


def _undecoded(data: Any) -> Any:
    """The data set with its images as bytes: they are decoded where a model reads them."""
    from datasets import Image as Stored

    for name, feature in data.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, Stored):
            data = data.cast_column(name, Stored(decode=False))
        elif isinstance(inner, Stored):
            data = data.cast_column(name, type(feature)(Stored(decode=False)))
    return data


def _stamp(paths: Iterable[Path]) -> object:
    found = sorted((str(path), path.stat()) for path in paths if path.is_file())
    return tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found)
