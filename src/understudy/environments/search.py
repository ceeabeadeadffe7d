"""A search engine that answers the student: over a corpus on this machine, by a service, or played by a chat model.

The student writes `<search>query</search>` and reads `<information>...</information>` in its own turn, until it writes
`<answer>...</answer>`: the form of Search-R1 (arXiv 2503.09516), R1-Searcher (2503.05592) and ZeroSearch (2505.04588).
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from understudy.environments.base import Step
from understudy.environments.corpus import Passage, ReadRows, Source, open_corpus
from understudy.errors import RecipeError, check_range
from understudy.http.client import HttpClient, RetryOptions
from understudy.http.replies import BadReply, Refused, Reply, check_address, check_key, check_variable
from understudy.randomness import keyed_uniform
from understudy.types import Message, ToolCall

STOP = ("</search>", "</answer>")
GATHER_S = 0.005
"""How long the first of several queries waits for the others of its turn."""
_NOTHING = "No passage matches this query; search for other words."
_DOC = re.compile(r"^\s*(?:Doc(?:ument)?\s*)?\d+\s*[:.)]\s*", re.IGNORECASE | re.MULTILINE)
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TEMPLATE = (
    "You are the Google search engine.\nGiven a query, you need to generate {num} {quality} documents for the query.\n\n"
    'The user is trying to answer the question: "{question}" whose answer is {answer}.\n'
    "Each document should contain about 30 words, and these documents should contain {quality} information.\n\n"
    "Query: {query}\n{Quality} Output:\n"
)
"""ZeroSearch, table 2."""


@dataclass(frozen=True)
class Query:
    """A query, and the question that the student was asked, which a model that plays the search engine is told."""

    text: str
    question: str = ""
    answer: str = ""
    step: int = 0
    """The optimizer step that the episode is trained in."""


Find = Callable[[Sequence[Query]], list[list[Passage]]]
"""The passages for each query, in order."""


@dataclass(frozen=True, kw_only=True)
class Search(ABC):
    """The section `search` of a task: who finds passages, and how many of them a student reads."""

    top_k: int = 3
    """Passages for each query."""
    max_chars: int | None = 1000
    """Characters of each passage that the student reads; null: all."""
    max_searches: int = 4
    """Searches in an episode; the message after the last has to be the answer."""

    def __post_init__(self) -> None:
        check_range(self, 1, "top_k", "max_searches")
        check_range(self, 1, "max_chars", off="null shows all of a passage")

    @property
    @abstractmethod
    def step_s(self) -> float:
        """Seconds that one search may take."""

    @abstractmethod
    def check(self) -> None:
        """Raises RecipeError for what is wrong with the section, without a search."""

    @property
    def file(self) -> Mapping[str, str] | None:
        """The file that is searched as `source`, and its hash as `digest`; None: another machine finds the passages."""
        return None

    @abstractmethod
    def open(self, rows: ReadRows) -> Find:
        """Opens the search engine; `rows` reads a file of passages. Raises RecipeError or DataError."""


@dataclass(frozen=True, kw_only=True)
class CorpusSearch(Search):
    """The section `corpus`: BM25 over the passages of a file, by the package bm25s."""

    path: str
    """A file with one passage a row."""
    text_field: str = "text"
    """The passage."""
    title_field: str | None = "title"
    """Its title, which is searched too; null: it has none."""
    k1: float = 0.9
    """How soon a word that is repeated counts no more."""
    b: float = 0.4
    """How much a long passage is held against its words."""
    cache_dir: str | None = None
    """Folder of the indices, each under the fingerprint of its corpus; null: `understudy/search` in the user's cache."""
    deadline_s: float = 60.0
    """Seconds for one search."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, "k1")
        check_range(self, 0, "b", high=1)
        check_range(self, 0, "deadline_s", above=True)

    @property
    def source(self) -> Source:
        """The file, and how it is indexed."""
        return Source(self.path, self.text_field, self.title_field, self.k1, self.b)

    @property
    def step_s(self) -> float:
        return self.deadline_s

    def check(self) -> None:
        self.source.fingerprint()

    @property
    def file(self) -> Mapping[str, str]:
        return {"source": self.path, "digest": self.source.fingerprint()}

    def open(self, rows: ReadRows) -> Find:
        corpus = open_corpus(self.source, rows, self.cache_dir)
        return lambda queries: corpus.search([query.text for query in queries], self.top_k)


@dataclass(frozen=True, kw_only=True)
class ServiceSearch(RetryOptions, Search):
    """The section `service`: a search service that speaks as the retrieval server of Search-R1.

    POST URL/retrieve {"queries": [...], "topk": 3, "return_scores": true} gives {"result": [[{"document": {"contents":
    "title\\ntext"}, "score": 1.0}, ...], ...]}. A document may have `title` and `text` instead.
    """

    url: str
    """The base, such as http://host:8000."""
    api_key_env: str = ""
    """The NAME of the environment variable with a key; empty: none is sent."""
    deadline_s: float = 60.0
    """Seconds for one search with all its attempts and waits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.retry_policy
        check_variable(self.api_key_env, "api_key_env")

    @property
    def step_s(self) -> float:
        # the client's own error says more than a deadline does
        return self.deadline_s + 30.0

    def check(self) -> None:
        check_address(self.url, "search.url")
        check_key(self.api_key_env)

    def open(self, rows: ReadRows) -> Find:
        self.check()
        base = self.url.rstrip("/").removesuffix("/retrieve")
        client = HttpClient([base], name="search", retry_policy=self.retry_policy, api_key_env=self.api_key_env)

        def find(queries: Sequence[Query]) -> list[list[Passage]]:
            texts = [query.text for query in queries]
            body = {"queries": texts, "topk": self.top_k, "return_scores": True}
            try:
                return client.request("/retrieve", lambda reply: _read_results(reply, texts), key=texts[0], json=body)
            except Refused:
                if len(queries) == 1:
                    raise
            # one of them is refused: the others still have an answer
            return [passages for query in queries for passages in find([query])]

        return find


@dataclass(frozen=True, kw_only=True)
class ModelSearch(RetryOptions, Search):
    """The section `model`: a chat model behind an endpoint of the OpenAI kind plays the search engine, as in ZeroSearch.

    It is told the question and its answer. Whether a query gets useful or noisy passages is drawn for each query and question
    with the share that `noise_at` gives, which may rise in the course of training; a query that is noisy then stays so.
    """

    url: str
    """The base, such as http://host:8000/v1."""
    model: str
    """Its name at the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """The NAME of the environment variable with the key; this one may be unset, and then none is sent."""
    top_k: int = 5
    """Passages for each query."""
    noise: float = 0.0
    """Share of queries that get noisy passages; that of the first step where it rises, and of every evaluation."""
    noise_end: float | None = None
    """The share from step `noise_steps` on; null: it stays as it is."""
    noise_steps: int | None = None
    """Optimizer steps in which the share goes from `noise` to `noise_end`."""
    noise_base: float = 4.0
    """How late the share rises: above 1 most of it comes in the last steps, near 1 it is a straight line."""
    temperature: float = 0.0
    """Sampling temperature of the model; above 0 a run that is resumed reads other passages."""
    max_tokens: int = 600
    """Limit of a reply."""
    template: str = TEMPLATE
    """The request. {query}, {question}, {answer} and {num} stand for these, {quality} for useful or noisy, {Quality} for the
    same with a capital."""
    seed: int = 0
    """Seed of the draws for `noise`."""
    deadline_s: float = 120.0
    """Seconds for one search with all its attempts and waits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.retry_policy
        check_variable(self.api_key_env, "api_key_env")
        check_range(self, 0, "noise", "noise_end", high=1)
        check_range(self, 1, "noise_steps", off="null keeps the share")
        check_range(self, 1, "noise_base", above=True)
        if (self.noise_end is None) != (self.noise_steps is None):
            raise ValueError(
                "noise_end and noise_steps go together: the last share of noisy queries, and when it is reached"
            )
        check_range(self, 0, "temperature")
        check_range(self, 1, "max_tokens")
        if "{query}" not in self.template:
            raise ValueError("template has no {query}, for which passages are written")

    @property
    def step_s(self) -> float:
        return self.deadline_s + 30.0

    def check(self) -> None:
        check_address(self.url, "search.url", "http://host:8000/v1")
        check_key(self.api_key_env, optional="OPENAI_API_KEY")
        if not self.model.strip():
            raise RecipeError("search.model is empty; give the model's name at the server (see its /v1/models)")

    def noise_at(self, step: int) -> float:
        """The share of noisy queries, p_s + (b^(i/m) - 1) / (b - 1) * (p_e - p_s) at step i of m (ZeroSearch's curriculum)."""
        if self.noise_end is None or self.noise_steps is None:
            return self.noise
        risen: float = (self.noise_base ** min(1.0, step / self.noise_steps) - 1.0) / (self.noise_base - 1.0)
        return self.noise + risen * (self.noise_end - self.noise)

    def request(self, query: Query) -> str:
        """The text that the model is asked with."""
        draw = float(keyed_uniform(self.seed, "search/noise", 0, [f"{query.question}\0{query.text}"], 1))
        quality = "noisy" if draw < self.noise_at(query.step) else "useful"
        num = _NUMBERS[self.top_k - 1] if self.top_k <= len(_NUMBERS) else str(self.top_k)
        words = {"query": query.text, "question": query.question, "answer": query.answer, "num": num}
        words |= {"quality": quality, "Quality": quality.capitalize()}
        # in one pass: what a query says is no place for another word
        return re.sub(r"\{(\w+)\}", lambda match: words.get(match[1], match[0]), self.template)

    def open(self, rows: ReadRows) -> Find:
        self.check()
        client = HttpClient([self.url], name="search", retry_policy=self.retry_policy, api_key_env=self.api_key_env)

        def ask(query: Query) -> list[Passage]:
            messages = [{"role": "user", "content": self.request(query)}]
            body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens}
            body["temperature"] = self.temperature
            said = client.request("/chat/completions", _read_chat, key=query.text, json=body)
            parts = _DOC.split(said)[1:] if _DOC.search(said) else said.splitlines()
            return [Passage(part.strip()) for part in parts if part.strip()][: self.top_k]

        return lambda queries: client.each(queries, ask)


SEARCHES: Mapping[str, type[Search]] = {"corpus": CorpusSearch, "model": ModelSearch, "service": ServiceSearch}
"""`search.type` -> its section."""


class Batched:
    """Asks the search engine once for the queries that several episodes have at the same time. Any thread may call it."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._lock = Lock()
        self._waiting: dict[Query, Future[list[Passage]]] = {}

    def __call__(self, query: Query) -> list[Passage]:
        """The passages for a query. Raises as the search engine does."""
        with self._lock:
            leads = not self._waiting
            answer = self._waiting.setdefault(query, Future())
        if leads:
            time.sleep(GATHER_S)
            with self._lock:
                asked, self._waiting = self._waiting, {}
            try:
                for future, passages in zip(asked.values(), self._find(list(asked)), strict=True):
                    future.set_result(passages)
            except BaseException as error:
                for future in asked.values():
                    if not future.done():
                        future.set_exception(error)
        return answer.result()


@lru_cache(maxsize=8)
def open_search(section: Search, rows: ReadRows) -> Batched:
    """The search engine of a section, opened once in a process. Raises as `Search.open`."""
    return Batched(section.open(rows))


class SearchEnvironment:
    """Answers each search of one episode, and ends it at an answer, or at a message with neither."""

    stop = STOP
    training_step = 0

    def __init__(self, section: Search, find: Callable[[Query], list[Passage]], question: str, answer: str) -> None:
        self.max_turns = section.max_searches + 1
        self.deadline_s = section.step_s
        self._section, self._find, self._question, self._answer = section, find, question, answer

    def step(self, message: Message) -> Step:
        """Returns the passages, or why there are none. Raises where the search engine does not answer."""
        call = message.tagged
        if call is None or call.name == "answer":
            return Step(done=True)
        found, failed = self._search(call)
        reply = {"role": "tool", "content": f"\n\n<information>{found}</information>\n\n"}
        return Step((reply | {"error": True} if failed else reply,), inline=True)

    def _search(self, call: ToolCall) -> tuple[str, bool]:
        """The text that the student reads, and whether it says what is wrong with the query."""
        if call.error or not call.text:
            return f"Error: {call.error or 'the query is empty'}; write <search>query</search>", True
        passages = self._find(Query(call.text, self._question, self._answer, self.training_step))
        shown = [
            f"Doc {number}{f'(Title: {passage.title})' if passage.title else ':'} {passage.text[: self._section.max_chars]}"
            for number, passage in enumerate(passages, 1)
        ]
        return "\n".join(shown) or _NOTHING, False

    def close(self) -> None:
        """Nothing is held: the search engine serves all episodes."""


def _read_results(reply: Reply, queries: Sequence[str]) -> list[list[Passage]]:
    """Raises BadReply for what is no list of passages for each query."""
    values = reply.json()
    results = values.get("result") if isinstance(values, dict) else None
    if not isinstance(results, list) or len(results) != len(queries):
        count = len(results) if isinstance(results, list) else "no"
        raise BadReply(f"{count} results for {len(queries)} queries")
    return [[_read_document(item) for item in result] for result in results]


def _read_document(item: Any) -> Passage:
    document = item.get("document", item) if isinstance(item, dict) else item
    if isinstance(document, dict):
        title, text = document.get("title") or "", document.get("text")
        if text is None and isinstance(document.get("contents"), str):
            # the corpus of Search-R1: the title in quotes on the first line
            first, _, rest = document["contents"].partition("\n")
            title, text = (first.strip().strip('"'), rest) if rest else (title, first)
        if isinstance(title, str) and isinstance(text, str):
            return Passage(text.strip(), title)
    raise BadReply(f"a document without text: {str(item)[:80]}")


def _read_chat(reply: Reply) -> str:
    try:
        said = reply.json()["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise BadReply(f"a reply that is not a chat completion: {reply.text}") from error
    if not isinstance(said, str) or not said.strip():
        raise BadReply("a reply without text")
    return said
