"""A cache of a teacher's scores on disk: this run and later ones ask for nothing twice."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from threading import Condition
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError

from understudy.errors import RecipeError, ScoreError
from understudy.lazy import Tensor, nn, safetensors, torch
from understudy.linear.head import LMHead
from understudy.packing import Unscored
from understudy.teachers.base import Teacher
from understudy.teachers.grouping import chunks
from understudy.types import Author, Need, Prompt, Sample, Scores

FORMAT = 1
CACHE_FILE = "scores.sqlite3"
"""In the directory that a recipe names."""
DRIFT = 0.05
"""Nats per token by which scores may differ, on the mean, when stored samples are scored again. Other batches and kernels
move bfloat16 scores by about 0.005 (measured: vLLM against transformers), an update that makes another teacher by more than
0.05. A single unlikely token may move by more than either."""
COMPARED = 3
"""Most stored entries that are scored again: their tokens count, and two more than one make up for short ones."""
COMPARED_TOKENS = 64
"""Enough tokens. One that is certain, such as the end of a short answer, scores 0 by any teacher; of 64 some are not."""
COMPARED_OF = 200
"""Oldest entries, among which the longest responses are chosen: to read all of a large file would take minutes."""
COMPARE_EVERY = 1_000
"""Misses between two comparisons: a server may change its weights during a run. It costs at most 3 in 1,000."""
CHUNK_TOKENS = 262_144
"""Tokens scored between two writes: the most that a kill costs, and 16 requests of 16,384 tokens in flight."""
WAIT_S = 60.0
"""Time that another process has to finish its write."""
STORED = ("logprob", "entropy", "topk_ids", "topk_logprob", "likeliest_ids", "likeliest_logprob", "rank")
"""Fields of `Scores` that are kept; the last three where they came with the others."""
NARROW = ("token_ids", "topk_ids", "likeliest_ids", "rank")
"""Stored as int32."""
_TABLES = """
CREATE TABLE IF NOT EXISTS scores (
    key BLOB PRIMARY KEY, fingerprint TEXT NOT NULL, teacher TEXT, prompt_length INTEGER NOT NULL, value BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_fingerprint ON scores (fingerprint);
"""
Key = TypeVar("Key")
Item = TypeVar("Item")


class Claims(Generic[Key, Item]):
    """Keys whose results some thread is making, so that no other makes them again. `lock` guards the results too."""

    def __init__(self) -> None:
        self.lock = Condition()
        self._taken: set[Key] = set()

    @contextmanager
    def take(self, lacking: Callable[[], Mapping[Key, Item]]) -> Iterator[dict[Key, Item]]:
        """The part of `lacking()` that is this thread's to make inside; empty if nothing lacks.

        Waits where other threads make all of it, and takes over what they fail to make; every teacher has a deadline.
        """
        with self.lock:
            while True:
                missing = lacking()
                mine = {key: item for key, item in missing.items() if key not in self._taken}
                if mine or not missing:
                    break
                self.lock.wait(WAIT_S)
            self._taken |= mine.keys()
        try:
            yield mine
        finally:
            with self.lock:
                self._taken -= mine.keys()
                self.lock.notify_all()


class CachedTeacher(Teacher):
    """Asks any teacher whose scores depend on tokens alone once for each (fingerprint, tokens, prompt length, need, k).

    The file (SQLite, with a write-ahead log) survives a kill and serves several processes of one machine; the log needs
    shared memory, so it belongs on a local disk. Whole rows ("full") are not kept: hidden states of one sample are
    megabytes, and their head changes with the teacher. An `Unscored` sample is asked for again.

    If every sample is in the file, the teacher is never asked. Before its first request, and after every `COMPARE_EVERY`
    samples, some stored entries of its fingerprint are scored again: a server shows no weights, so a fingerprint cannot tell
    that they changed behind a name.
    """

    def __init__(self, teacher: Teacher, path: Path) -> None:
        self.teacher = teacher
        self.name, self.concurrency = teacher.name, teacher.concurrency
        self._path = path
        self._since: dict[str, int] = {}
        """Misses since the last comparison, by fingerprint."""
        self._claims: Claims[bytes, Sample] = Claims()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # prompts and responses are private; SQLite gives its log the same mode
            path.touch(mode=0o600)
            self._file = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise RecipeError(
                f"cannot open the cache of scores {path}: {error}; give another teacher.cache, or delete the file"
            ) from error

    @property
    def origin(self) -> str | None:
        return self.teacher.origin

    @property
    def fingerprint(self) -> str:
        return self.teacher.fingerprint

    def head_for(self, name: str | None) -> LMHead | None:
        return self.teacher.head_for(name)

    @property
    def max_tokens(self) -> int | None:
        return self.teacher.max_tokens

    def follow(self, student: nn.Module) -> None:
        """Lets the teacher follow; if that changes its fingerprint, nothing stored is used any more."""
        self.teacher.follow(student)

    def state(self) -> dict[str, Tensor]:
        return self.teacher.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.teacher.load_state(state)

    def uncached(self) -> Teacher:
        return self.teacher

    def close(self) -> None:
        """Closes the teacher, which ends waiting requests, and the file."""
        try:
            self.teacher.close()
        finally:
            with self._claims.lock:
                self._file.close()

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Scores as the teacher; samples with the same tokens are asked for once.

        Raises the teacher's errors, after storing what it scored before them, and ScoreError if the teacher contradicts
        stored scores, or the file is damaged.
        """
        if need - {"none", "sampled", "topk"} or not need - {"none"} or ("topk" in need and (k is None or k < 1)):
            return self.teacher.score(samples, need, k=k)
        fingerprint = self.fingerprint
        asked = "sampled" if "topk" not in need else f"topk/{k}"
        keys = []
        for sample in samples:
            key = repr((fingerprint, sample.teacher, sample.prompt_length, asked)).encode()
            key += sample.token_ids.long().contiguous().numpy().tobytes()
            keys.append(blake2b(key, digest_size=16).digest())
        by_key: dict[bytes, Sample] = {}
        for key, sample in zip(keys, samples, strict=True):
            # of equal samples the one that is kept token by token
            if key not in by_key or sample.keep_tokens:
                by_key[key] = sample
        found: dict[bytes, Scores] = {}

        def lacking() -> dict[bytes, Sample]:
            missing = {key: sample for key, sample in by_key.items() if key not in found}
            found.update(self._read(missing))
            return {key: sample for key, sample in missing.items() if key not in found}

        while len(found) < len(by_key):
            with self._claims.take(lacking) as mine:
                if mine:
                    with self._claims.lock:
                        self._compare(fingerprint)
                        self._since[fingerprint] += len(mine)
                for chunk in chunks(mine.items(), lambda item: item[1].token_ids.numel(), CHUNK_TOKENS):
                    # outside the lock, so that other threads can ask for other samples meanwhile
                    scores = self.teacher.score([sample for _, sample in chunk], need, k=k)
                    with self._claims.lock:
                        self._write(fingerprint, chunk, scores)
                    found.update(zip((key for key, _ in chunk), scores, strict=True))
        return [found[key] for key in keys]

    def _read(self, samples: Mapping[bytes, Sample]) -> dict[bytes, Scores]:
        found: dict[bytes, Scores] = {}
        for key, sample in samples.items():
            for (value,) in self._run("SELECT value FROM scores WHERE key = ?", [key]):
                tensors = self._unpack(value)
                if not torch.equal(tensors.pop("token_ids"), sample.token_ids):
                    raise self._damaged(f"sample {sample.key} is stored with other tokens")
                found[key] = Scores(sample.response_ids, **tensors)
        return found

    def _write(self, fingerprint: str, chunk: Sequence[tuple[bytes, Sample]], scores: Sequence[Scores]) -> None:
        """Writes all or nothing. If another process was first, its entry stays."""
        rows = []
        for (key, sample), score in zip(chunk, scores, strict=True):
            if not sample.num_response_tokens or isinstance(score, Unscored):
                continue
            tensors = {name: getattr(score, name) for name in STORED}
            tensors["token_ids"] = sample.token_ids
            packed = {
                name: (value.int() if name in NARROW else value).cpu().contiguous()
                for name, value in tensors.items()
                if value is not None
            }
            rows.append((key, fingerprint, sample.teacher, sample.prompt_length, safetensors.save(packed)))
        self._run("BEGIN IMMEDIATE")
        try:
            for row in rows:
                self._run("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?)", row)
            self._run("COMMIT")
        except BaseException:
            self._file.rollback()
            raise

    def _compare(self, fingerprint: str) -> None:
        """Raises ScoreError if the teacher contradicts what is stored under its fingerprint, or does not score it any more."""
        if self._since.get(fingerprint, COMPARE_EVERY) < COMPARE_EVERY:
            return
        query = "SELECT teacher, prompt_length, value FROM scores WHERE fingerprint = ? ORDER BY rowid LIMIT ?"
        stored = []
        for index, (teacher, length, value) in enumerate(self._run(query, [fingerprint, COMPARED_OF])):
            tensors = self._unpack(value)
            ids, prompt = tensors["token_ids"], Prompt(id="stored", teacher=teacher)
            # tokens alone, which is all that the teacher of a cache reads
            author = torch.full(ids.shape, int(Author.STUDENT), dtype=torch.uint8)
            sample = Sample(prompt, index, ids, author, length, "data", "", teacher=teacher)
            stored.append((sample, tensors["logprob"]))
        stored.sort(key=lambda pair: -pair[0].num_response_tokens)
        del stored[COMPARED:]
        while sum(len(before) for _, before in stored[:-1]) >= COMPARED_TOKENS:
            stored.pop()
        gaps = []
        now = self.teacher.score([sample for sample, _ in stored], frozenset({"sampled"})) if stored else []
        for scores, (_, before) in zip(now, stored, strict=True):
            if isinstance(scores, Unscored) or scores.logprob is None:
                reason = scores.reason if isinstance(scores, Unscored) else "it gave no log-probabilities"
                raise ScoreError(
                    f"cannot tell whether teacher {self.name!r} is the one that filled {self._path}: what is stored there it "
                    f"does not score any more ({reason}); see to the teacher, or give another teacher.cache"
                )
            gaps.append((scores.logprob.double() - before.double()).abs())
        # `not <=` in place of `>`, so that NaN counts as different
        if gaps and not (drift := float(torch.cat(gaps).mean())) <= DRIFT:
            raise ScoreError(
                f"teacher {self.name!r} is not the one that filled {self._path}: {sum(map(len, gaps))} response tokens that "
                f"are stored there now score {drift:.3g} nats a token otherwise (at most {DRIFT:g}). Serve the "
                "model that filled it, or change teacher.revision (scores are then stored apart), or delete the file"
            )
        self._since[fingerprint] = 0

    def _run(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        try:
            with closing(self._file.execute(query, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.OperationalError as error:
            raise ScoreError(
                f"the cache of scores {self._path}: {error}; free space, or end the process that holds it"
            ) from error
        except sqlite3.ProgrammingError as error:
            raise ScoreError(f"the cache of scores {self._path} is closed: nothing more can be asked of it") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _unpack(self, value: bytes) -> dict[str, Tensor]:
        try:
            tensors = safetensors.load(value)
        except (SafetensorError, ValueError) as error:
            raise self._damaged(str(error)) from error
        return {name: tensor.long() if name in NARROW else tensor for name, tensor in tensors.items()}

    def _damaged(self, problem: str) -> ScoreError:
        return ScoreError(f"the cache of scores {self._path} is damaged ({problem}); delete it, and it is filled again")


def _connect(path: Path) -> sqlite3.Connection:
    """Opens or creates the file. Raises sqlite3.Error if it is not a cache, or has another version."""
    end = time.monotonic() + WAIT_S
    while True:
        file = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            found = int(file.execute("PRAGMA user_version").fetchone()[0])
            if found not in (0, FORMAT):
                raise sqlite3.DatabaseError(f"it has format {found}, this version writes {FORMAT}")
            file.execute("PRAGMA journal_mode=WAL")
            # a commit survives the death of the process; a power failure may lose the last ones, which are asked for again
            file.execute("PRAGMA synchronous=NORMAL")
            file.executescript(_TABLES)
            file.execute(f"PRAGMA user_version={FORMAT}")
            return file
        except BaseException as error:
            file.close()
            # SQLite does not wait for a change of the journal mode, whatever the timeout
            locked = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
            if not locked or time.monotonic() > end:
                raise
            time.sleep(0.05)
