"""Search engines for the student: a corpus with its index, a service, a model; and episodes that use them."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_server import ChatServer, Response, refuses, says
from tests.engine_stub import EngineStub
from tests.integration.test_environments import STUDENT, Speaks
from tests.integration.test_overlap import ahead
from tests.integration.test_verbal import byte_tokenizer
from tests.runs import assert_same_run, metric_rows, tiny_recipe, train, train_in_two
from understudy import config
from understudy.environments.corpus import Corpus, Passage, Source, open_corpus
from understudy.environments.play import play
from understudy.environments.search import (
    SEARCHES,
    Batched,
    CorpusSearch,
    ModelSearch,
    Query,
    Search,
    SearchEnvironment,
    ServiceSearch,
    open_search,
)
from understudy.errors import CheckpointError, DataError, EngineError, RecipeError
from understudy.eval.evaluate import run_eval
from understudy.models import build_causal_lm, load_tokenizer, save_hf
from understudy.recipe import Recipe
from understudy.recipe.load import read_environment_files
from understudy.tasks import QuestionAnswering, Renderer
from understudy.tasks.rows import read_rows
from understudy.trainer.checkpoint import check_same_inputs
from understudy.types import Author, Message, Prompt, Request, Sample, Sampling, ToolCall

pytestmark = pytest.mark.slow

PASSAGES = [
    {"title": "Moon", "text": "The Moon orbits the Earth. Apollo 11 landed in 1969."},
    {"title": "Mars", "text": "Mars is red."},
    {"title": "Solaris", "text": "A novel by Stanislaw Lem about an ocean that thinks."},
    {"title": "Apollo 17", "text": "The last people on the Moon, in December 1972; the moon was grey."},
]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def source_of(path: str, **changes: Any) -> Source:
    return replace(Source(path, "text", "title", 0.9, 0.4), **changes)


# The corpus


def plain_bm25(query: str, k1: float = 0.9, b: float = 0.4) -> list[int]:
    """Places of passages by score, by the formula of Lucene."""
    documents = [[word.strip(".,;").lower() for word in f"{p['title']} {p['text']}".split()] for p in PASSAGES]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        counts, score = Counter(words), 0.0
        for word in query.lower().split():
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            norm = k1 * (1 - b + b * len(words) / mean)
            score += idf * counts[word] / (counts[word] + norm) if counts[word] else 0.0
        scores.append(score)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [index for index in order if scores[index] > 0]


def test_passages_come_in_the_order_of_bm25(tmp_path: Path) -> None:
    corpus = open_corpus(source_of(write(tmp_path / "p.jsonl", PASSAGES)), read_rows, str(tmp_path / "cache"))
    queries = ["moon", "the last moon", "a novel about mars", "apollo 1972", "solaris", "nothing here matches"]
    found = corpus.search(queries, 10)
    for query, passages in zip(queries, found, strict=True):
        expected = [Passage(PASSAGES[index]["text"], PASSAGES[index]["title"]) for index in plain_bm25(query)]
        assert passages == expected, query
    assert found[-2] == [Passage(PASSAGES[2]["text"], "Solaris")]
    assert corpus.search(["", "xyzzy"], 3) == [[], []]
    assert [len(one) for one in corpus.search(queries, 1)] == [min(1, len(one)) for one in found]


def test_an_index_is_built_once(tmp_path: Path) -> None:
    """For the bytes of the file and all that decides what the index holds, whatever the file is called."""
    path, reads = write(tmp_path / "p.jsonl", PASSAGES), []

    def counted(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        reads.append(name)
        return read_rows(name)

    def opened(source: Source) -> Corpus:
        return open_corpus(source, counted, str(tmp_path / "cache"))

    first = opened(source_of(path)).search(["moon"], 2)
    assert opened(source_of(path)).search(["moon"], 2) == first
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(path).read_bytes())
    opened(source_of(str(copy)))
    assert len(reads) == 1
    for changes in ({"k1": 1.5}, {"b": 0.75}, {"title_field": None}):
        opened(source_of(path, **changes))
    with Path(path).open("a") as file:
        file.write(json.dumps({"title": "New", "text": "a moon"}) + "\n")
    assert opened(source_of(path)).search(["moon"], 9) != opened(source_of(str(copy))).search(["moon"], 9)
    assert len(reads) == 5
    assert not list((tmp_path / "cache").glob("building-*"))


def test_several_processes_may_build_at_the_same_time(tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "p.jsonl", PASSAGES))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_corpus(source, read_rows, str(tmp_path / "cache")), range(8)))
    assert len({repr(one.search(["moon"], 3)) for one in found}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_passage_without_text_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*PASSAGES, {"title": "Empty", "text": "  "}, {"title": "Null", "text": None}]
    source = source_of(write(tmp_path / "p.jsonl", rows))
    for _ in range(2):
        # the warning comes from the cache too
        with pytest.warns(UserWarning, match=r"2 of 6 passages have no text and are left out, first .*p\.jsonl:5"):
            corpus = open_corpus(source, read_rows, str(tmp_path / "cache"))
        assert len(corpus) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*PASSAGES, '{"title": "Broken", "text'], r"p\.jsonl:5"),
        ([{"title": "A", "body": "b"}], r"p\.jsonl:1: no field 'text'.*set search.text_field"),
        ([{"title": "A", "text": ["b"]}], r"p\.jsonl:1: field 'text' is \['b'\]; it must be a string"),
        ([{"title": 3, "text": "b"}], r"p\.jsonl:1: field 'title' is 3; it must be a string"),
        ([{"title": "A", "text": ""}], "none of the 1 passages has text in field 'text'"),
    ],
)
def test_a_bad_corpus_is_a_clear_error(tmp_path: Path, rows: list[Any], message: str) -> None:
    source = source_of(write(tmp_path / "p.jsonl", rows))
    with pytest.raises(DataError, match=message):
        open_corpus(source, read_rows, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "passages.jsonl", PASSAGES)
    with pytest.raises(RecipeError, match=r"no corpus .*pasages\.jsonl; did you mean 'passages\.jsonl'"):
        CorpusSearch(path=str(tmp_path / "pasages.jsonl")).check()
    open_corpus(source_of(path), read_rows, str(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "offsets.npy").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be read .*delete the folder"):
        open_corpus(source_of(path), read_rows, str(tmp_path / "cache"))
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(RecipeError, match=r"needs bm25s: pip install 'understudy\[search\]'"):
        CorpusSearch(path=path).check()


def test_the_cache_of_the_user_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    open_corpus(source_of(write(tmp_path / "p.jsonl", PASSAGES)), read_rows)
    assert len(os.listdir(tmp_path / "home" / "understudy" / "search")) == 1


# Services and models


@contextmanager
def service(answer: Any) -> Iterator[ChatServer]:
    with ChatServer(answer) as server:
        yield server


PATIENCE = {"timeout_s": 10.0, "deadline_s": 10.0, "backoff_s": 0.01}


def retrieves(request: Any, number: int) -> Response:
    """As Search-R1's server."""
    results = [
        [
            {"document": {"id": str(rank), "contents": f'"{query}"\nabout {query}, {rank}'}, "score": 1.0}
            for rank in range(3)
        ]
        for query in request.body["queries"]
    ]
    return Response({"result": results})


def test_a_service_is_asked_in_the_form_of_search_r1() -> None:
    with service(retrieves) as server:
        base = server.url.removesuffix("/v1")
        for url in (base, f"{base}/retrieve", f"{base}/"):
            find = ServiceSearch(url=url, **PATIENCE).open(read_rows)
            found = find([Query("moon"), Query("mars")])
            assert found[1] == [Passage(f"about mars, {rank}", "mars") for rank in range(3)]
        assert [one.path for one in server.requests] == ["/retrieve"] * 3
        assert server.requests[0].body == {"queries": ["moon", "mars"], "topk": 3, "return_scores": True}


def test_documents_may_have_fields_of_their_own() -> None:
    documents = [{"title": "A", "text": "b"}, {"contents": "only text"}, {"document": {"text": "c"}}]
    with service(lambda *_: Response({"result": [documents]})) as server:
        find = ServiceSearch(url=server.url.removesuffix("/v1"), **PATIENCE).open(read_rows)
        assert find([Query("q")]) == [[Passage("b", "A"), Passage("only text"), Passage("c")]]


@pytest.mark.parametrize("body", [{"result": []}, {"result": [[{"document": {}}]]}, {"results": [[]]}, "no JSON", [1]])
def test_a_malformed_reply_is_asked_for_again(body: Any) -> None:
    with service(lambda request, number: retrieves(request, 0) if number else Response(body)) as server:
        find = ServiceSearch(url=server.url.removesuffix("/v1"), **PATIENCE).open(read_rows)
        assert len(find([Query("q")])[0]) == 3
        assert len(server.requests) == 2


def test_a_query_that_is_refused_leaves_the_others_their_answer() -> None:
    def answer(request: Any, number: int) -> Response:
        return refuses(422, "bad query") if "bad" in request.body["queries"] else retrieves(request, number)

    with service(answer) as server:
        find = Batched(ServiceSearch(url=server.url.removesuffix("/v1"), **PATIENCE).open(read_rows))
        with ThreadPoolExecutor(2) as pool:
            good, bad = (pool.submit(find, Query(text)) for text in ("good", "bad"))
            assert isinstance(bad.exception(), Exception)
            # asked together it shares the error; alone it is answered
            assert good.exception() is None or len(find(Query("good"))) == 3


def test_queries_at_the_same_time_are_asked_together() -> None:
    asked: list[list[str]] = []

    def find(queries: Sequence[Query]) -> list[list[Passage]]:
        asked.append([query.text for query in queries])
        return [[Passage(query.text)] for query in queries]

    batched = Batched(find)
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(batched, [Query(f"q{index % 16}") for index in range(32)]))
    assert [one[0].text for one in found] == [f"q{index % 16}" for index in range(32)]
    assert len(asked) < 16
    assert all(len(set(part)) == len(part) for part in asked)


def test_an_error_reaches_every_query_of_its_batch() -> None:
    def find(queries: Sequence[Query]) -> list[list[Passage]]:
        raise EngineError("gone")

    batched = Batched(find)
    with ThreadPoolExecutor(4) as pool:
        errors = [future.exception() for future in [pool.submit(batched, Query(f"q{n}")) for n in range(4)]]
    assert [str(error) for error in errors] == ["gone"] * 4


def test_a_model_plays_the_search_engine() -> None:
    said = "Doc 1: The moon is grey.\nIt orbits.\n\nDoc 2: Apollo landed.\nDoc 3: no\nDoc 4: no\nDoc 5: no\nDoc 6: no"
    with service(lambda *_: says(said)) as server:
        section = ModelSearch(url=server.url, model="m", top_k=2, temperature=0.5, **PATIENCE)
        find = section.open(read_rows)
        found = find([Query("what {question}?", "When?", "1969"), Query("b", "c", "d")])
        assert found[0] == [Passage("The moon is grey.\nIt orbits."), Passage("Apollo landed.")]
        body = server.requests[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 600)
    question = section.request(Query("what {question}?", "When?", "1969"))
    assert question.startswith(
        "You are the Google search engine.\nGiven a query, you need to generate two useful documents"
    )
    assert 'the question: "When?" whose answer is 1969.' in question
    assert question.endswith("Query: what {question}?\nUseful Output:\n")


def test_lines_are_documents_where_the_model_numbers_none() -> None:
    with service(lambda *_: says("one\n\ntwo\nthree")) as server:
        find = ModelSearch(url=server.url, model="m", top_k=2, **PATIENCE).open(read_rows)
        assert find([Query("q")]) == [[Passage("one"), Passage("two")]]


def test_noise_rises_over_the_steps_as_in_zerosearch() -> None:
    """p(i) = p_s + (b^(i/m) - 1) / (b - 1) (p_e - p_s): its ends, its middle with b = 4, and a straight line for b near 1."""
    section = ModelSearch(url="http://host", model="m", noise=0.1, noise_end=0.7, noise_steps=200)
    assert [section.noise_at(step) for step in (0, 100, 200, 300)] == pytest.approx([0.1, 0.1 + 0.6 / 3, 0.7, 0.7])
    assert replace(section, noise_base=1.0001).noise_at(100) == pytest.approx(0.4, abs=1e-4)
    assert ModelSearch(url="http://host", model="m", noise=0.3).noise_at(100) == 0.3

    def noisy(step: int) -> set[int]:
        return {n for n in range(400) if "noisy" in section.request(Query(f"q{n}", "question", "a", step))}

    assert noisy(0) < noisy(100) < noisy(200) == noisy(300), "what is noisy stays noisy"
    assert len(noisy(200)) / 400 == pytest.approx(0.7, abs=0.08)


def test_an_episode_knows_the_step_that_it_is_for() -> None:
    asked: list[int] = []

    def find(query: Query) -> list[Passage]:
        asked.append(query.step)
        return []

    tokenizer = byte_tokenizer(chat=True)
    prompt = Prompt("p", messages=({"role": "user", "content": "when?"},))
    renderer = Renderer(tokenizer)
    for step in (0, 7):
        engine = Speaks(tokenizer, "<search>moon</search>", "<answer>1</answer>")
        made = [Request(prompt, 0, renderer.start(prompt))]
        play(engine, renderer, lambda _: environment_of(find), made, Sampling(max_new_tokens=400), step=step)
    assert asked == [0, 7]


def test_noise_is_drawn_for_each_query_and_question() -> None:
    section = ModelSearch(url="http://host", model="m", noise=0.3)
    requests = [section.request(Query(f"q{n}", "question", "a")) for n in range(400)]
    share = sum("noisy documents" in one for one in requests) / 400
    assert 0.22 < share < 0.38
    assert requests == [section.request(Query(f"q{n}", "question", "a")) for n in range(400)]
    assert all(
        "noisy" not in one for one in map(replace(section, noise=0.0).request, [Query(f"q{n}") for n in range(50)])
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "corpus"}, "path"),
        ({"type": "corpus", "path": "x", "top_k": 0}, "top_k is 0"),
        ({"type": "corpus", "path": "x", "b": 2}, "b is 2"),
        ({"type": "service", "url": "http://h", "api_key_env": "sk-secret!"}, "NAME of an environment variable"),
        ({"type": "model", "url": "http://h", "model": "m", "noise": 2}, "noise is 2"),
        ({"type": "model", "url": "http://h", "model": "m", "noise_end": 0.5}, "noise_end and noise_steps go together"),
        ({"type": "model", "url": "http://h", "model": "m", "noise_base": 1}, "noise_base is 1"),
        ({"type": "model", "url": "http://h", "model": "m", "template": "x"}, "no {query}"),
        ({"type": "google"}, "google"),
    ],
)
def test_a_wrong_section_is_refused(values: dict[str, Any], message: str) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Section:
        search: Search = config.choice(SEARCHES)

    with pytest.raises(RecipeError, match=message):
        config.parse(Section, {"search": values})


@pytest.mark.parametrize("section", [ServiceSearch(url="host"), ModelSearch(url="http://host", model=" ")])
def test_a_wrong_address_is_refused_before_anything_is_sent(section: Search) -> None:
    with pytest.raises(RecipeError):
        section.check()


def test_a_checkpoint_has_the_fingerprint_of_the_corpus(tmp_path: Path) -> None:
    corpus, rows = tmp_path / "p.jsonl", write(tmp_path / "q.jsonl", [{"question": "when?", "answer": "1969"}])
    keys = {"type": "qa", "path": rows, "prompt_field": "question", "reference_field": "answer"}
    search = {"type": "corpus", "path": write(corpus, PASSAGES), "cache_dir": str(tmp_path / "cache")}
    values = tiny_recipe(tmp_path, train={"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2})
    values |= {"task": keys | {"search": search}, "method": {"type": "grpo"}}
    recipe = config.parse(Recipe, values)
    before = read_environment_files(recipe)
    assert before == read_environment_files(recipe)
    assert before.keys() == {"task.search"}
    write(corpus, [*PASSAGES[:3], {"title": "Apollo 17", "text": "somebody else's"}])
    with pytest.raises(CheckpointError, match=r"task.search \(.*p\.jsonl\): another than before"):
        check_same_inputs(before, read_environment_files(recipe))
    assert read_environment_files(config.parse(Recipe, values | {"task": keys})) == {}


# Episodes


def environment_of(find: Any, **section: Any) -> SearchEnvironment:
    return SearchEnvironment(CorpusSearch(path="p", **section), find, "asked?", "right")


def message(text: str, tagged: ToolCall | None = None) -> Message:
    return Message(text, text, tagged=tagged)


def test_the_student_reads_passages_in_its_own_turn() -> None:
    asked: list[Query] = []

    def find(query: Query) -> list[Passage]:
        asked.append(query)
        return [Passage("a" * 30, "A"), Passage("b")] if query.text == "moon" else []

    environment = environment_of(find, max_chars=10, max_searches=2)
    step = environment.step(message("", ToolCall("moon", "search")))
    assert step.inline
    assert not step.done
    text = "\n\n<information>Doc 1(Title: A) aaaaaaaaaa\nDoc 2: b</information>\n\n"
    assert step.messages == ({"role": "tool", "content": text},)
    assert asked == [Query("moon", "asked?", "right")]
    assert "No passage matches" in environment.step(message("", ToolCall("mars", "search"))).messages[0]["content"]
    assert environment.max_turns == 3
    assert environment.step(message("", ToolCall("1969", "answer"))).done
    assert environment.step(message("I do not know")).done


@pytest.mark.parametrize(
    "call", [ToolCall("", "search"), ToolCall("x", "search", error="there is no <search> before </search>")]
)
def test_a_bad_query_goes_back_to_the_student(call: ToolCall) -> None:
    (reply,) = environment_of(None).step(message("", call)).messages
    assert reply["error"] is True
    assert "<information>Error: " in reply["content"]
    assert "write <search>query</search></information>" in reply["content"]


def test_a_search_engine_that_is_gone_ends_its_episodes() -> None:
    tokenizer = byte_tokenizer(chat=True)
    renderer = Renderer(tokenizer)
    prompt = Prompt("p", messages=({"role": "user", "content": "when?"},), reference=("1969",))
    section = ServiceSearch(url="http://127.0.0.1:9", timeout_s=1.0, deadline_s=0.5, max_retries=0)
    find = open_search(section, read_rows)
    engine = Speaks(tokenizer, "<search>moon</search>")
    requests = [Request(prompt, index, renderer.start(prompt)) for index in range(3)]
    made = lambda prompt: SearchEnvironment(section, find, "when?", "1969")  # noqa: E731
    samples = play(engine, renderer, made, requests, Sampling(max_new_tokens=300), step=0)
    assert {sample.finish for sample in samples} == {"environment"}
    assert all("EngineError: search (http://127.0.0.1:9) gave no answer" in s.messages[-1]["content"] for s in samples)


class Reader:
    """A student that searches for the question, and says the right answer if it reads the title of the gold passage."""

    def __init__(self, tokenizer: Any, gold: Mapping[str, str]) -> None:
        self.tokenizer, self.gold = tokenizer, gold

    def generate(self, requests: Sequence[Request], *_: object, **__: object) -> list[Sample]:
        samples = []
        for one in requests:
            question = one.prompt.messages[-1]["content"].rpartition("Question: ")[2]  # type: ignore[index]
            if one.prefix_ids is None:
                text = f"<think>I search.</think><search>{question}</search>"
            else:
                read = f"(Title: {self.gold[question]})" in self.tokenizer.decode(one.prefix_ids)
                text = f"<answer>{one.prompt.reference[0] if read else 'unknown'}</answer>"  # type: ignore[index]
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            prefix = torch.zeros(0, dtype=torch.int64) if one.prefix_ids is None else one.prefix_ids
            context = torch.cat([one.token_ids, prefix])
            author = torch.tensor([0] * len(context) + [STUDENT] * len(ids), dtype=torch.uint8)
            tokens = torch.cat([context, ids])
            samples.append(Sample(one.prompt, one.index, tokens, author, len(one.token_ids), "stop", ""))
        return samples


def test_a_scripted_student_has_the_known_score_on_the_real_corpus(shared: Path, tmp_path: Path) -> None:
    """BM25 finds the gold title of 89 of 100 questions of NQ in ten passages (README of the corpus, first 600)."""
    corpus = str(shared / "data" / "search_corpus" / "passages.jsonl.gz")
    nq = shared / "data" / "nq_open" / "dev_with_gold_passage.jsonl"
    section = CorpusSearch(path=corpus, top_k=10, max_chars=200, cache_dir=str(tmp_path / "cache"))
    task = QuestionAnswering(dataset="nq", test_path=str(nq), reference_field="answers", limit=600, search=section)
    task.check_files()
    gold = {row["question"]: row["gold_title"] for row in map(json.loads, nq.read_text().splitlines())}
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "qwen"))
    summary = run_eval(
        prompts=task.prompts("test"),
        task=task,
        renderer=Renderer(tokenizer),
        engine=Reader(tokenizer, gold),  # type: ignore[arg-type]
        sampling=Sampling(max_new_tokens=4000),
        samples_per_prompt=1,
        step=0,
        split="test",
        out_dir=tmp_path / "eval",
        max_prompt_tokens=1000,
    )
    found = open_corpus(section.source, read_rows, section.cache_dir).search(list(gold)[:600], 10)
    hits = [gold[question] in [one.title for one in passages] for question, passages in zip(gold, found, strict=False)]
    expected = sum(hits) / 600
    assert summary.num_problems == 600
    assert summary.metrics["avg@1"].value == pytest.approx(expected)
    assert expected == pytest.approx(0.89, abs=0.02)
    assert summary.metrics["score/em"].value == pytest.approx(expected)
    assert summary.metrics["score/f1"].value == pytest.approx(expected, abs=0.005)
    assert summary.metrics["score/cover_em"].value == pytest.approx(expected)
    assert summary.metrics["truncated"].value == 0.0
    rows = [json.loads(line) for line in (tmp_path / "eval" / "step_000000.jsonl").read_text().splitlines()]
    assert all([said["role"] for said in row["messages"]] == ["assistant", "tool", "assistant"] for row in rows)


def test_gold_titles_of_several_hops_are_found_as_the_readme_says(shared: Path, tmp_path: Path) -> None:
    """HotpotQA, 0.83 of all gold titles in ten passages."""
    corpus = source_of(str(shared / "data" / "search_corpus" / "passages.jsonl.gz"))
    opened = open_corpus(corpus, read_rows, str(tmp_path / "cache"))
    assert len(opened) == 19_462
    path = shared / "data" / "hotpotqa" / "dev_distractor_with_contexts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = opened.search([row["question"] for row in rows], 10)
    shares = []
    for row, passages in zip(rows, found, strict=True):
        wanted = {title for title, _ in row["supporting_facts"]}
        shares += [title in {passage.title for passage in passages} for title in wanted]
    assert sum(shares) / len(shares) == pytest.approx(0.83, abs=0.02)


# Whole runs

QUESTIONS = [{"question": f"What is number {n}?", "golden_answers": [str(n)]} for n in range(24)]
SEARCHED = "<search>moon</search>"


def tiny_agent(path: Path, *, seed: int, train_first: bool = False) -> str:
    """A model of bytes; `train_first`: until it begins with a search."""
    tokenizer = byte_tokenizer(chat=False)
    size = {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 512}
    model = build_causal_lm(
        size, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None, seed=seed
    )
    if train_first:
        text = torch.tensor(tokenizer(f"Q: What is number 1?\n{SEARCHED}")["input_ids"])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(120):
            logits = model(input_ids=text[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, text[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_hf(model, tokenizer, path)
    return str(path)


def agent_run(folder: Path, *, steps: int = 4) -> dict[str, Any]:
    """Changes that make the tiny recipe a search agent, which learns from another tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    search = {"type": "corpus", "path": write(folder / "p.jsonl", PASSAGES), "cache_dir": str(folder / "cache")}
    return {
        "student": {"model": tiny_agent(folder / "student", seed=1, train_first=True), "build": None},
        "teacher": {"type": "local", "model": tiny_agent(folder / "teacher", seed=2)},
        "task": {
            "type": "qa",
            "path": write(folder / "q.jsonl", QUESTIONS),
            "prompt_field": "question",
            "reference_field": "golden_answers",
            "template": "Q: {prompt}\n",
            "chat": False,
            "search": search | {"top_k": 2, "max_chars": 30, "max_searches": 2},
        },
        "method": {"type": "gkd"},
        "sampling": {"max_new_tokens": 260},
        "train": {"steps": steps, "prompts_per_step": 4, "lr": 1e-4, "save_samples_every": 1},
    }


def test_a_tiny_model_learns_while_it_searches(tmp_path: Path) -> None:
    run_dir = train(tmp_path, **agent_run(tmp_path / "m", steps=2))
    rows = metric_rows(run_dir)
    assert len(rows) == 2
    for row in rows:
        assert row["tool_calls"] > 0.5
        assert row["turns"] > 1
        assert row["environment_tokens"] > 20
        assert row["environment_failed"] == 0
        assert row["tokens/student"] == pytest.approx(row["response_tokens"])
        assert math.isfinite(row["loss"])
        # nothing that the environment said is trained
        assert row["student_tokens"] == pytest.approx(4 * row["response_tokens"])
    saved = [json.loads(line) for line in (run_dir / "samples" / "step_000001.jsonl").read_text().splitlines()]
    searched = [row for row in saved if "messages" in row]
    assert searched
    for row in searched:
        assert row["messages"][0] == {"role": "assistant", "content": SEARCHED}
        assert "Doc 1(Title: " in row["messages"][1]["content"]
        told = "".join(said["content"] for said in row["messages"])
        authors = row["tokens"]["author"]
        own = sum(len(said["content"].encode()) for said in row["messages"] if said["role"] == "assistant")
        if "\ufffd" in told:
            # bytes that are no text
            continue
        # an EOS may end the episode
        assert authors.count("student") - own in (0, 1), told
        assert authors.count("environment") == sum(
            len(said["content"].encode()) for said in row["messages"] if said["role"] == "tool"
        )
        assert authors.count(Author.TEACHER.name.lower()) == 0
    # of a token that the environment wrote nothing is kept but that it did
    kept = [json.loads(line)["tokens"] for line in (run_dir / "tokens" / "step_000001.jsonl").read_text().splitlines()]
    for table in kept:
        assert {"sampled", "environment"} <= set(table["kind"])
        for name in ("student_logprob", "student_top", "teacher_rank", "loss/divergence", "gradient"):
            known = [value is not None for value in table[name]]
            assert known == [kind == "sampled" for kind in table["kind"]], name


def test_a_resumed_agent_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    changes = agent_run(tmp_path / "m")
    whole = train(tmp_path / "whole", **changes)
    assert any(row["tool_calls"] > 0 for row in metric_rows(whole))
    assert_same_run(whole, train_in_two(tmp_path / "parts", 2, **changes))


def test_episodes_with_searches_are_played_ahead(tmp_path: Path) -> None:
    changes = agent_run(tmp_path / "m")
    plain = metric_rows(train(tmp_path / "plain", **changes))
    settings = {key: value for key, value in ahead(tmp_path / "a", 2).items() if key in ("async", "rollout")}
    fresh = metric_rows(train(tmp_path / "ahead", **changes, **settings))
    assert plain[0]["tool_calls"] == fresh[0]["tool_calls"] > 0
    assert max(row["staleness"] for row in fresh) > 0


def test_servers_write_the_turns_of_an_agent(tmp_path: Path) -> None:
    changes = agent_run(tmp_path / "m", steps=2)
    with EngineStub(changes["student"]["model"]) as stub:
        rollout = {"type": "vllm", "url": stub.url, "dtype": "float32"}
        rows = metric_rows(train(tmp_path / "run", **changes, rollout=rollout))
        asked = [request.body for request in stub.asked("/v1/completions") if "stop" in request.body]
        assert len(asked) > 8
        assert all(body["stop"] == ["</search>", "</answer>"] for body in asked)
    assert all(row["tool_calls"] > 0.5 and row["environment_tokens"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["nq", "triviaqa", "popqa", "hotpotqa", "2wiki", "musique", "bamboogle"])
def test_a_data_set_is_a_section(name: str) -> None:
    task = QuestionAnswering(dataset=name)
    assert (task.prompt_field, task.reference_field, task.verifier) == ("question", "golden_answers", "em")
    assert "<answer>" in task.template
    assert "<search>" not in task.template
    assert "<search>" in QuestionAnswering(dataset=name, search=CorpusSearch(path="p")).template


def test_the_answer_needs_its_tag_where_the_template_asks_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", QUESTIONS)
    keys = {"path": path, "prompt_field": "question", "reference_field": "golden_answers"}
    task = QuestionAnswering(**keys)
    prompt = task.prompts("train")[3]
    assert task.grade(prompt, "<answer>3</answer>").also == {"em": 1.0, "f1": 1.0, "cover_em": 1.0}
    assert task.grade(prompt, "3").score == 0.0
    assert QuestionAnswering(**keys, template="{prompt}").grade(prompt, "3").right
    assert QuestionAnswering(**keys, verifier="f1").grade(
        prompt, "<answer>the number 3</answer>"
    ).score == pytest.approx(2 / 3)


def test_a_compressed_corpus_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in PASSAGES).encode()))
    find = open_search(CorpusSearch(path=str(path), cache_dir=str(tmp_path / "cache")), read_rows)
    assert find(Query("solaris"))[0].title == "Solaris"


def test_an_audit_of_gold_answers_finds_no_fault(shared: Path) -> None:
    """And those of other questions are not."""
    task = QuestionAnswering(
        dataset="nq", test_path=str(shared / "data" / "nq_open" / "dev.jsonl"), reference_field="answers", limit=100
    )
    prompts = task.prompts("test")
    for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        assert all(task.grade(prompt, response).right for response in task.gold(prompt))
        assert not any(task.grade(prompt, response).right for response in task.gold(other))
        assert not task.grade(prompt, "").right
