"""Teachers behind a server: the keys of their sections, and the client that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.errors import check_range
from understudy.http.client import HttpClient, RetryOptions
from understudy.http.replies import check_address
from understudy.teachers.base import (
    Rendering,
    RunFacts,
    Setup,
    Source,
    Teacher,
    TeacherSection,
    check_need,
    check_rendering,
    hash_facts,
)
from understudy.teachers.stores.cache import CACHE_FILE, CachedTeacher
from understudy.types import Need, Sample, Scores


@dataclass(frozen=True, kw_only=True)
class RemoteSection(RetryOptions, TeacherSection):
    """Keys of every teacher behind a server."""

    url: str | tuple[str, ...]
    """Base URL; several: replicas of one server."""
    batch_tokens: int = 16_384
    """Tokens of all samples in one request."""
    tokenizer: str | None = None
    """The teacher's, a directory or hub name, to compare with the student's; None: they are taken to be the same."""
    rendering: Rendering = "student"
    """The prompt that it reads before a response: the student's ids, or the messages in its own chat template (own)."""
    cache: str | None = None
    """A directory on a local disk that keeps scores; a rerun asks for nothing twice."""

    def __post_init__(self) -> None:
        _ = self.retry_policy
        check_range(self, 1, "batch_tokens", off="1 sends every sample alone")
        if self.rendering == "own" and self.tokenizer is None:
            raise ValueError("rendering is own, which needs the teacher's chat template: set tokenizer to its model")
        if not self.urls:
            raise ValueError("url is empty; give the address of the server")
        for url in self.urls:
            check_address(url, "teacher.url")

    @property
    def urls(self) -> tuple[str, ...]:
        """All replicas, as they stand in the recipe."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @property
    def vocabulary(self) -> Source | None:
        return None if self.tokenizer is None else Source(self.tokenizer)

    def check_run(self, run: RunFacts) -> None:
        check_rendering(self, run)

    def check(self) -> str:
        return f"teacher: {self.shown}, not asked yet"

    def cached(self, teacher: Teacher) -> Teacher:
        """Returns the teacher behind its cache, if the section has one. Raises RecipeError if that cannot be opened."""
        return teacher if self.cache is None else CachedTeacher(teacher, Path(self.cache).expanduser() / CACHE_FILE)


class RemoteTeacher(Teacher):
    """A teacher that is asked through a client, and closes it."""

    remote = True

    def __init__(self, section: RemoteSection, setup: Setup, client: HttpClient, who: str, *facts: str) -> None:
        """`who`: names the teacher in errors; `facts`: all that is known of the weights behind the server."""
        self.name, self.temperature = setup.name, setup.temperature
        # as many batches as may be in flight, so that one that waits holds up no other
        self.concurrency = section.max_concurrency
        self._section = section
        self._setup = setup
        self._client = client
        self._who = who
        self._facts = [*facts, float(setup.temperature), setup.vocab_size, *([setup.absent] if setup.absent else [])]

    @property
    def fingerprint(self) -> str:
        """Hash of what is known of the server's weights, of temperature and vocabulary size."""
        return hash_facts(self._facts)

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Scores of each sample, in order, on the CPU; `Unscored` if a number is not finite after all.

        Raises ScoreError for another need, a larger top-k than the server returns and a sample that is too long for it,
        ValueError for "topk" without k, EngineError if the server does not answer, refuses, or is another than before.
        """
        check_need(need, k, self._section.gives, self._who)
        if not need - {"none"}:
            return [Scores(sample.response_ids) for sample in samples]
        k = min(k, self._setup.vocab_size) if k is not None and "topk" in need else None
        return self._score(samples, need - {"none"}, k)

    @abstractmethod
    def _score(self, samples: Sequence[Sample], need: frozenset[Need], k: int | None) -> list[Scores]:
        """As `score`, for a need that the server meets; `k` at most the vocabulary's size, None without "topk"."""

    def stats(self) -> Mapping[str, Any]:
        """Requests, retries, failures and bytes (`HttpClient.stats`)."""
        return self._client.stats()

    def close(self) -> None:
        """Cancels requests in flight."""
        self._client.close()


def named(samples: Sequence[Sample]) -> str:
    """The samples of a request, for messages."""
    rest = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
    return f"sample {samples[0].key}{rest}"
