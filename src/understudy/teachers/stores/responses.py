"""A teacher's own responses: from the task, a file, a data set, or the teacher itself, which writes each once.

Written responses are kept as lines of JSON, which are only ever appended: run directories lie on network disks too, shared by
several machines, where SQLite's log does not work and locks may be missing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import FileIO
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from understudy.config import load_json
from understudy.errors import CheckpointError, DataError, RecipeError, TemplateError
from understudy.lazy import Tensor, torch
from understudy.randomness import keyed_uniform
from understudy.tasks.renderer import Renderer
from understudy.tasks.responses import FileResponses, Find, HubResponses, ResponseSection, Solutions
from understudy.teachers.base import hash_facts
from understudy.teachers.judges.wording import rest_of
from understudy.teachers.stores.cache import Claims
from understudy.types import Prompt, Request, Sample, Sampling

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

Generate = Callable[[Sequence[Prompt]], list[str | None]]
"""Returns the teacher's response to each prompt as text, without special tokens; None for none, or an unfinished one."""
Texts = Callable[[Sequence[Request], Sequence[str]], list[Sequence[str]]]
"""Returns every known response to each request's prompt. The second argument names the draw that a teacher who writes on demand
makes for each request; "" is the one that all requests for the prompt share."""
CACHE_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TeacherResponses(ResponseSection):
    """The section `responses` of type `teacher`: the teacher writes a response when a prompt first needs one."""

    by_teacher = True

    temperature: float | None = None
    """None: the student's."""
    max_new_tokens: int | None = None
    """None: the student's."""
    cache: str | None = None
    """A directory that runs may share; None: `responses` in the run directory."""
    continue_template: str | None = None
    """The question for the rest of a response whose beginning was accepted, with {problem}, {steps} and {fence}; None:
    `wording.CONTINUE`."""

    def __post_init__(self) -> None:
        self.sampling(Sampling())
        rest_of(Prompt(""), "", self.continue_template)

    @property
    def shown(self) -> str:
        return "the teacher's own responses"

    @property
    def in_run_dir(self) -> bool:
        return self.cache is None

    def kept_in(self, folder: Path) -> TeacherResponses:
        return replace(self, cache=str(folder))

    def find(self) -> Find:
        return lambda prompt: ()

    def sampling(self, student: Sampling) -> Sampling:
        """Returns the teacher's sampling. Raises ValueError for values out of range."""
        return Sampling(
            temperature=student.temperature if self.temperature is None else self.temperature,
            max_new_tokens=student.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
        )

    def check(self) -> str:
        """Raises RecipeError if the cache cannot be a directory."""
        if self.cache is not None and Path(self.cache).exists() and not Path(self.cache).is_dir():
            raise RecipeError(f"responses.cache is {self.cache!r}, which is a file; name a directory")
        return f"responses: {self.shown}, kept in {self.cache or 'the run directory'}"


RESPONSES: Mapping[str, type[ResponseSection]] = {
    "solutions": Solutions,
    "file": FileResponses,
    "jsonl": FileResponses,
    "hub": HubResponses,
    "teacher": TeacherResponses,
}
"""`responses.type` in a recipe -> its section."""


@dataclass(frozen=True, kw_only=True)
class ResponseSetup:
    """The run's side of a store of responses."""

    renderer: Renderer
    """The student's."""
    seed: int
    run_dir: Path
    sampling: Sampling
    """The student's."""
    generate: Generate | None = None
    """For type `teacher` only, as the next."""
    fingerprint: str | None = None
    """The teacher's."""


def open_responses(section: ResponseSection, setup: ResponseSetup) -> ResponseStore:
    """Opens the store of a section. Raises RecipeError or DataError, also for type `teacher` if no teacher writes."""
    if not isinstance(section, TeacherResponses):
        find = section.find()
        texts: Texts = lambda requests, draws: [find(request.prompt) for request in requests]  # noqa: E731
        return ResponseStore(texts, setup, shown=section.shown)
    if setup.generate is None or setup.fingerprint is None:
        raise RecipeError("responses.type is 'teacher', but no teacher here writes responses; add a section teacher")
    sampling = section.sampling(setup.sampling)
    identity = {
        "teacher": setup.fingerprint,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": setup.seed,
    }
    cache = ResponseCache(setup.run_dir / "responses" if section.cache is None else Path(section.cache), identity)
    texts, template = WrittenOnce(setup.generate, cache), section.continue_template
    return ResponseStore(texts, setup, shown=section.shown, cache=cache, continue_template=template)


class ResponseStore:
    """A teacher's responses as tokens of the student. One of several to a prompt is drawn by (seed, step, request or slot).

    `cache`: where they are written on demand, so that every prompt can get one; `continue_template` asks for the rest of one
    (`wording.rest_of`).
    """

    def __init__(
        self,
        texts: Texts,
        setup: ResponseSetup,
        *,
        shown: str,
        cache: ResponseCache | None = None,
        continue_template: str | None = None,
    ) -> None:
        self._texts = texts
        self._renderer = setup.renderer
        self._seed = setup.seed
        self._cache = cache
        self._template = continue_template
        self._counts: Counter[str] = Counter()
        # generation runs in threads of its own while the student learns
        self._lock = Lock()
        self.shown = shown

    def find(
        self,
        requests: Sequence[Request],
        step: int,
        slots: Sequence[int] | None = None,
        begun: Mapping[str, Sample] | None = None,
    ) -> list[Tensor | None]:
        """Returns a response [F] int64 for each request, whole and with its end; None if there is none.

        `slots`: the number of each request among those for its prompt, from 0; each slot has a response of its own. Known
        responses are dealt in an order drawn by (seed, step, prompt), each at most once; a teacher that writes on demand
        writes one for each (step, slot). `begun`: the beginnings of responses, by the requests' keys, that such a teacher is
        to continue; what is returned is then the rest. A text that the student cannot say (`Renderer.faithful`,
        `Renderer.continuation`) counts as none (`take_counts`). Raises TemplateError.
        """
        if not requests:
            return []
        begun = begun or {}
        assert not begun or self._cache is not None, "only a teacher that writes on demand continues a response"
        shared = slots is None or self._cache is None
        names = [""] * len(requests) if shared else [f"{step}/{slot}" for slot in slots or ()]
        asked = list(requests)
        for at, request in enumerate(requests):
            if (start := begun.get(request.key)) is not None:
                question = rest_of(request.prompt, start.text, self._template)
                asked[at] = replace(request, prompt=question)
                # a text behind one beginning says nothing about what follows another
                names[at] += f"/{hash_facts([question.text])}"
        encoded: dict[tuple[str, int | None, str], Tensor | None] = {}
        usable: list[list[Tensor]] = []
        for request, texts in zip(requests, self._texts(asked, names), strict=True):
            prompt, start = request.prompt, begun.get(request.key)
            keys = [(prompt.id, None if start is None else request.index, text) for text in texts]
            for key, text in zip(keys, texts, strict=True):
                if key not in encoded:
                    encoded[key] = self._say(prompt, text, start)[0]
            usable.append([ids for key in keys if (ids := encoded[key]) is not None])
        found: list[Tensor | None] = []
        if slots is None or not shared:
            draws = keyed_uniform(self._seed, "response", step, [request.key for request in requests], 1)[:, 0].tolist()
            found += [one[int(draw * len(one))] if one else None for one, draw in zip(usable, draws, strict=True)]
        else:
            for request, one, slot in zip(requests, usable, slots, strict=True):
                order = keyed_uniform(self._seed, "response", step, [request.prompt.id], len(one))[0].argsort()
                found.append(one[int(order[slot])] if slot < len(one) else None)
        with self._lock:
            self._counts["responses_missing"] += sum(ids is None for ids in found)
            self._counts["responses_unreadable"] += sum(ids is None for ids in encoded.values())
        return found

    def take_counts(self) -> dict[str, int]:
        """Returns, since the last call, requests without a response and texts that the student cannot say;
        `responses_damaged` if lines of the cache could not be read."""
        with self._lock:
            counts = {name: self._counts[name] for name in ("responses_missing", "responses_unreadable")}
            self._counts.clear()
        num_damaged = 0 if self._cache is None else self._cache.take_damaged()
        return counts | {"responses_damaged": num_damaged} if num_damaged else counts

    def check(self, prompts: Sequence[Prompt], task: str, limit: int | None = None) -> None:
        """Raises RecipeError if none of the first `limit` prompts has a response that the student can say."""
        if self._cache is not None:
            return
        num_prompts = unreadable = 0
        reason = ""
        # one at a time: most often the first has one
        for prompt in islice(prompts, limit):
            texts = self._texts([Request(prompt, 0, torch.tensor([]))], [""])[0]
            for text in texts:
                ids, reason = self._say(prompt, text)
                if ids is not None:
                    return
            num_prompts += 1
            unreadable += bool(texts)
        why = (
            f"{unreadable} have one, but the student cannot say it: {reason}"
            if unreadable
            else "compare the problems in both (letter case, white space and template do not matter)"
        )
        raise RecipeError(f"none of the {num_prompts} prompts of task {task} has a response in {self.shown}: {why}")

    def _say(self, prompt: Prompt, text: str, start: Sample | None = None) -> tuple[Tensor | None, str]:
        """The ids of a response, or of the rest of one that was begun; or None and why there are none."""
        try:
            if start is not None:
                return self._renderer.continuation(prompt, start.response_ids, start.text, text), ""
            return self._renderer.faithful(prompt, text), ""
        except TemplateError:
            raise
        except DataError as error:
            return None, str(error)


class WrittenOnce:
    """Texts of a generator, kept as soon as they are written.

    The prompts of one call that no process has written yet are generated together. A prompt to which the teacher gave
    nothing is asked again by the next run only.
    """

    def __init__(self, generate: Generate, cache: ResponseCache) -> None:
        self._generate = generate
        self._cache = cache
        self._without: set[str] = set()
        self._claims: Claims[str, Prompt] = Claims()

    def __call__(self, requests: Sequence[Request], draws: Sequence[str]) -> list[Sequence[str]]:
        """Raises DataError if the generator returns another number of texts than it was given prompts."""
        keys, prompts = [], dict[str, Prompt]()
        for request, draw in zip(requests, draws, strict=True):
            # the name keys the teacher's random numbers, so under another name it draws another response
            name = f"{request.prompt.id}@{draw}" if draw else request.prompt.id
            told = name.encode("utf-8", "surrogatepass") + b"\0" + request.token_ids.numpy().tobytes()
            keys.append(blake2b(told, digest_size=16).hexdigest())
            prompts[keys[-1]] = replace(request.prompt, id=name)
        written = self._cache.texts

        def lacking() -> dict[str, Prompt]:
            if prompts.keys() - written.keys() - self._without:
                self._cache.refresh()
            return {k: prompt for k, prompt in prompts.items() if k not in written and k not in self._without}

        while True:
            with self._claims.take(lacking) as mine:
                if not mine:
                    return [(written[key],) if key in written else () for key in keys]
                made = self._generate(list(mine.values()))
                if len(made) != len(mine):
                    raise DataError(
                        f"the teacher gave {len(made)} responses to {len(mine)} prompts; it must give one each"
                    )
                texts = dict(zip(mine, made, strict=True))
                with self._claims.lock:
                    self._without |= {key for key, text in texts.items() if text is None}
                    self._cache.add([(key, mine[key].id, text) for key, text in texts.items() if text is not None])


class ResponseCache:
    """Texts by key in `folder/HASH.jsonl`; the hash is that of `identity`, everything that decides a text beside its prompt.

    Lines are only appended, so several processes may share the file, and a killed one loses at most a line: one that is not
    whole is skipped. The first of two texts for one key counts, for every process.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        header = {"format": CACHE_FORMAT, **identity}
        self._header = header
        self.path = folder / f"{blake2b(_line(header), digest_size=8).hexdigest()}.jsonl"
        self.texts: dict[str, str] = {}
        self._num_damaged = 0
        self._offset = 0
        """Bytes of the file that have been read, up to the end of a line."""
        self.refresh()

    def refresh(self) -> None:
        """Reads what was appended since. Raises CheckpointError if the file exists and cannot be read."""
        try:
            with self.path.open("rb", buffering=0) as file:
                _lock(file, exclusive=False)
                self._read(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}; fix permissions") from error

    def take_damaged(self) -> int:
        """Returns the number of damaged lines that were found since the last call."""
        num_damaged, self._num_damaged = self._num_damaged, 0
        return num_damaged

    def add(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Adds (key, prompt id, text) unless some process has added the key; on disk when this returns.

        Raises CheckpointError if it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                _lock(file, exclusive=True)
                unfinished = self._read(file)
                lines = [
                    _line({"key": key, "prompt": prompt, "text": text})
                    for key, prompt, text in rows
                    if key not in self.texts
                ]
                if not lines:
                    return
                # the unfinished line of a killed process becomes a line of its own, which is then skipped
                first = b"\n" if unfinished else b"" if self._offset else _line(self._header)
                _write(file, first + b"".join(lines))
                os.fsync(file.fileno())
                # without locks, another process may have written its text before ours
                self._read(file)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror or error}; free space, fix permissions, or set responses.cache"
            ) from error

    def _read(self, file: FileIO) -> bool:
        """Reads everything from the offset on. Returns whether the file ends within a line."""
        if os.fstat(file.fileno()).st_size < self._offset:
            # it is another file than before
            self._offset = 0
        file.seek(self._offset)
        data = file.readall()
        *whole, last = data.split(b"\n")
        for line in whole:
            self._num_damaged += not self._take(line)
        # another process may still be writing the last line, so it is read again
        self._take(last)
        self._offset += len(data) - len(last)
        return bool(last)

    def _take(self, line: bytes) -> bool:
        """Keeps the text of a line. Returns False for a damaged one."""
        try:
            row = load_json(line) if line.strip() else {}
        except ValueError:
            return False
        if isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("text"), str):
            self.texts.setdefault(row["key"], row["text"])
        return True


def _lock(file: FileIO, *, exclusive: bool) -> None:
    """Locks the file until it is closed. Without locks, as on some network disks, lines are appended all the same."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


def _write(file: FileIO, data: bytes) -> None:
    """Writes in one system call, unless that takes less."""
    while data:
        data = data[file.write(data) :]


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"
