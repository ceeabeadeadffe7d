"""Teachers behind a server: the keys of their sections, and the client that they share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from understudy.http import HttpClient, RetryOptions, RetryPolicy
from understudy.teachers.base import Setup, Source, Teacher, TeacherSection
from understudy.teachers.stores.cache import CACHE_FILE, CachedTeacher

AnyTeacher = TypeVar("AnyTeacher", bound=Teacher)


@dataclass(frozen=True, kw_only=True)
class RemoteSection(RetryOptions, TeacherSection):
    """Keys of every teacher behind a server."""

    url: str | tuple[str, ...]
    """Base URL; several: replicas of one server."""
    batch_tokens: int = 16_384
    """Tokens of all samples in one request."""
    tokenizer: str | None = None
    """The teacher's, a directory or hub name, to compare with the student's; None: they are taken to be the same."""
    cache: str | None = None
    """A directory on a local disk that keeps scores; a rerun asks for nothing twice."""

    def __post_init__(self) -> None:
        _ = self.retry_policy
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; it must be at least 1")
        if not self.urls:
            raise ValueError("url is empty; give the address of the server")

    @property
    def urls(self) -> tuple[str, ...]:
        """All replicas, as they stand in the recipe."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @property
    def retry_policy(self) -> RetryPolicy:
        """Raises ValueError for a value out of range."""
        return RetryPolicy.of(self)

    @property
    def vocabulary(self) -> Source | None:
        return None if self.tokenizer is None else Source(self.tokenizer)

    def cached(self, teacher: AnyTeacher) -> AnyTeacher | CachedTeacher:
        """Returns the teacher behind its cache, if the section has one. Raises RecipeError if that cannot be opened."""
        return teacher if self.cache is None else CachedTeacher(teacher, Path(self.cache).expanduser() / CACHE_FILE)


class RemoteTeacher(Teacher):
    """A teacher that is asked through a client, and closes it."""

    remote = True

    def __init__(self, section: RemoteSection, setup: Setup, client: HttpClient) -> None:
        self.name, self.temperature = setup.name, setup.temperature
        # as many batches as may be in flight, so that one that waits holds up no other
        self.concurrency = section.max_concurrency
        self._setup = setup
        self._client = client

    def stats(self) -> Mapping[str, Any]:
        """Requests, retries, failures and bytes (`HttpClient.stats`)."""
        return self._client.stats()

    def close(self) -> None:
        """Cancels requests in flight."""
        self._client.close()

    def hashed(self, *facts: object) -> str:
        """Returns a fingerprint of facts about the server, and of temperature and vocabulary size."""
        values = [*facts, float(self._setup.temperature), self._setup.vocab_size]
        return blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
